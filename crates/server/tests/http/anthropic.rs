//! Anthropic's API over a socket: forms of answers and errors, streams that equal whole answers, and what fields do.

use serde_json::{Value, json};

use crate::support::*;

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

/// A request with these fields on top.
fn ask(fields: Value) -> Value {
    let mut body = json!({"model": "tiny", "max_tokens": 24, "ignore_eos": true, "temperature": 0,
        "messages": [{"role": "user", "content": "Hello there"}]});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[track_caller]
fn error_of(reply: &Reply) -> (u16, String) {
    let body = reply.json();
    assert_eq!(body["type"], "error", "{body}");
    assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{body}");
    assert_eq!(body["request_id"].as_str(), reply.header("request-id"), "{body}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    (reply.status, body["error"]["type"].as_str().unwrap().to_string())
}

#[test]
fn whoever_refuses_a_request_does_so_in_the_form_of_its_path() {
    let server = start();
    let wrong_method = get(&server, MESSAGES);
    assert_eq!(wrong_method.header("allow"), Some("POST"));
    assert_eq!(error_of(&wrong_method), (405, "invalid_request_error".into()));
    let wrong_path = post(&server, "/v1/messages/batches", &json!({}));
    assert_eq!(error_of(&wrong_path), (404, "not_found_error".into()));
    let mut client = Client::connect(server.addr());
    client.request("POST", MESSAGES, &["origin: http://evil.example"], b"{}");
    assert_eq!(error_of(&client.reply()), (403, "permission_error".into()));
    client.request("POST", "/api/none", &["host: evil.example"], b"{}");
    let refused = client.reply();
    assert_eq!((refused.status, refused.json()["error"].is_string()), (403, true));
    assert!(matches!(get(&server, "/none").json()["error"], Value::Object(_)));
    let no_json = post_bytes(server.addr(), MESSAGES, b"{");
    assert_eq!(error_of(&no_json), (400, "invalid_request_error".into()));
    let no_model = post(&server, MESSAGES, &ask(json!({"model": "claude-opus"})));
    assert_eq!(error_of(&no_model), (404, "not_found_error".into()));
    let mut client = Client::connect(server.addr());
    client.send(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n");
    assert_eq!(error_of(&client.reply()), (413, "request_too_large".into()));
}

#[test]
fn before_the_model_is_there_clients_are_told_of_an_overload() {
    let server = apr_server::Server::bind("127.0.0.1", 0, apr_server::Settings::default()).unwrap();
    let refused = post(&server, MESSAGES, &ask(json!({})));
    assert_eq!(error_of(&refused), (529, "overloaded_error".into()));
    assert_eq!(refused.header("retry-after"), Some("1"));
}

#[test]
fn what_is_wrong_is_named() {
    let server = start();
    let message = |fields: Value| {
        let reply = post(&server, MESSAGES, &ask(fields));
        assert_eq!(error_of(&reply), (400, "invalid_request_error".into()));
        reply.json()["error"]["message"].as_str().unwrap().to_string()
    };
    assert!(message(json!({"messages": []})).starts_with("messages: "));
    assert!(message(json!({"max_tokens": -1})).starts_with("max_tokens: "));
    assert!(message(json!({"temperature": -1})).starts_with("temperature: "));
    assert!(message(json!({"stop_sequences": ["x".repeat(300)]})).starts_with("stop_sequences: "));
    let image = json!([{"role": "user", "content": [{"type": "image", "source": {}}]}]);
    assert!(message(json!({"messages": image})).contains("image input is not supported"));
    let long = json!([{"role": "user", "content": "word ".repeat(2000)}]);
    assert!(message(json!({"messages": long})).starts_with("prompt is too long: "));
}

#[test]
fn a_whole_answer_has_anthropics_form() {
    let server = start();
    let answer = ok(&server, MESSAGES, &ask(json!({})));
    assert!(answer["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(
        (&answer["type"], &answer["role"], &answer["model"]),
        (&json!("message"), &json!("assistant"), &json!("tiny-qwen3moe"))
    );
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("max_tokens"), &Value::Null));
    assert_eq!(answer["content"].as_array().unwrap().len(), 1);
    let chat = ok(&server, "/v1/chat/completions", &ask(json!({})));
    assert_eq!(answer["content"][0], json!({"type": "text", "text": chat["choices"][0]["message"]["content"]}));
    let usage = &answer["usage"];
    assert_eq!((&usage["output_tokens"], &usage["cache_creation_input_tokens"]), (&json!(24), &json!(0)));
    let n_prompt = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(chat["usage"]["prompt_tokens"], n_prompt);
    assert_eq!(ok(&server, COUNT, &ask(json!({}))), json!({"input_tokens": n_prompt}));
}

#[test]
fn what_is_cached_is_none_of_the_input() {
    let server = start();
    let long = json!([{"type": "text", "text": "Of all that was ever said. ".repeat(20), "cache_control": {"type": "ephemeral"}}]);
    let usage = |fields: &Value| ok(&server, MESSAGES, &ask(json!({"system": fields}))).get("usage").cloned().unwrap();
    let (first, second) = (usage(&long), usage(&long));
    let count = |usage: &Value, name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count(&first, "cache_read_input_tokens"), 0);
    assert!(count(&second, "cache_read_input_tokens") > count(&second, "input_tokens"), "{second}");
    let n_prompt = count(&second, "cache_read_input_tokens") + count(&second, "input_tokens");
    assert_eq!(count(&first, "input_tokens"), n_prompt);
}

#[test]
fn the_stop_sequence_that_ended_an_answer_is_told() {
    let server = start();
    let text = ok(&server, MESSAGES, &ask(json!({})))["content"][0]["text"].as_str().unwrap().to_string();
    let whole: Vec<char> = text.chars().collect();
    let stop: String = whole[whole.len() / 2..].iter().take(2).collect();
    let body = ask(json!({"stop_sequences": ["never comes", stop]}));
    let stopped = ok(&server, MESSAGES, &body);
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(stopped["content"][0]["text"], text.split(&stop).next().unwrap());
    streams_alike(&server, body);
}

/// Streams `body` and holds it to the whole answer.
#[track_caller]
fn streams_alike(server: &apr_server::Server, mut body: Value) {
    let mut whole = ok(server, MESSAGES, &body);
    body["stream"] = true.into();
    let events = post(server, MESSAGES, &body).named_events();
    let [start, blocks @ .., delta, stop] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&start["type"], &stop["type"]), (&json!("message_start"), &json!("message_stop")));
    let mut message = start["message"].clone();
    for event in blocks {
        let index = event["index"].as_u64().unwrap() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => message["content"].as_array_mut().unwrap().push(event["content_block"].clone()),
            "content_block_delta" => {
                assert_eq!(event["delta"]["type"], "text_delta");
                let so_far = message["content"][index]["text"].as_str().unwrap();
                let more = event["delta"]["text"].as_str().unwrap();
                message["content"][index]["text"] = format!("{so_far}{more}").into();
            }
            other => assert_eq!(other, "content_block_stop"),
        }
    }
    assert_eq!(delta["type"], "message_delta");
    message.as_object_mut().unwrap().extend(delta["delta"].as_object().unwrap().clone());
    message["usage"] = delta["usage"].clone();
    // Each has its own id, and found other things in the cache.
    for message in [&mut message, &mut whole] {
        message["id"].take();
        let usage = message["usage"].as_object_mut().unwrap();
        let cached = usage.remove("cache_read_input_tokens").unwrap().as_u64().unwrap();
        usage["input_tokens"] = (usage["input_tokens"].as_u64().unwrap() + cached).into();
    }
    assert_eq!(message, whole, "{body}");
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = start();
    streams_alike(&server, ask(json!({})));
    streams_alike(&server, ask(json!({"temperature": 1.0, "seed": 7, "top_k": 50, "top_p": 0.9})));
    streams_alike(&server, ask(json!({"max_tokens": 0})));
    streams_alike(
        &server,
        ask(json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]})),
    );
}

#[test]
fn a_history_of_tools_is_told_to_the_model() {
    let server = start();
    let tools =
        json!([{"name": "find", "description": "Finds.", "input_schema": {"type": "object", "properties": {}}}]);
    let calls = json!([{"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "tool_use", "id": "toolu_1", "name": "find", "input": {"what": "a"}}]);
    let results = json!([{"type": "tool_result", "tool_use_id": "toolu_1", "is_error": true, "content": "none"}]);
    let messages = json!([{"role": "user", "content": "Find a"}, {"role": "assistant", "content": calls},
        {"role": "user", "content": results}]);
    let body = ask(
        json!({"messages": messages, "tools": tools, "tool_choice": {"type": "auto"}, "metadata": {"user_id": "u"}}),
    );
    ok(&server, MESSAGES, &body);
    let count = |body: &Value| ok(&server, COUNT, body)["input_tokens"].as_u64().unwrap();
    let mut bare = body.clone();
    bare.as_object_mut().unwrap().remove("tools");
    assert!(count(&body) > count(&bare), "declared tools are in the prompt");
    assert!(count(&bare) > count(&ask(json!({"messages": [{"role": "user", "content": "Find a"}]}))));
    let many = ask(json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]}));
    assert!(count(&many) > 1024, "more than the context holds can be counted");
}

#[test]
fn a_limit_beyond_the_context_is_no_error() {
    let server = start();
    let n_prompt = ok(&server, COUNT, &ask(json!({})))["input_tokens"].as_u64().unwrap();
    let filler = json!([{"role": "user", "content": "a b c d e f g h i j ".repeat(48)}]);
    let n_filled = ok(&server, COUNT, &ask(json!({"messages": filler.clone()})))["input_tokens"].as_u64().unwrap();
    assert!(n_prompt < n_filled && n_filled < 1024, "{n_filled} tokens");
    let answer = ok(&server, MESSAGES, &ask(json!({"messages": filler, "max_tokens": 32000})));
    assert_eq!(answer["stop_reason"], "model_context_window_exceeded");
    assert_eq!(answer["usage"]["output_tokens"], 1024 - n_filled);
}
