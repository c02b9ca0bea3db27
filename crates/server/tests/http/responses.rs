//! Responses over a socket: forms of answers, streams that equal whole answers, and what is refused.

use serde_json::{Value, json};

use crate::support::*;

const RESPONSES: &str = "/v1/responses";

/// A request with these fields on top.
fn ask(fields: Value) -> Value {
    let mut body = json!({"model": "tiny", "input": "Hello there", "max_output_tokens": 24, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[test]
fn a_whole_answer_has_the_form_of_a_response() {
    let server = start();
    let answer = ok(&server, RESPONSES, &ask(json!({"store": true, "metadata": {"a": "b"}})));
    assert!(answer["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("response"), &json!("tiny-qwen3moe")));
    assert_eq!((&answer["status"], &answer["store"]), (&json!("incomplete"), &json!(false)));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!((&answer["metadata"], &answer["tools"]), (&json!({"a": "b"}), &json!([])));
    let chat = json!({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "ignore_eos": true});
    let chat = ok(&server, "/v1/chat/completions", &chat);
    let [message] = &answer["output"].as_array().unwrap()[..] else { panic!("{answer}") };
    assert_eq!((&message["type"], &message["status"]), (&json!("message"), &json!("incomplete")));
    assert_eq!(message["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    for (own, of_chat) in [("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")] {
        assert_eq!(answer["usage"][own], chat["usage"][of_chat]);
    }
    let counted = ok(&server, "/v1/responses/input_tokens", &ask(json!({})));
    assert_eq!(counted["input_tokens"], answer["usage"]["input_tokens"]);
}

/// Streams `body` and holds it to the whole answer.
#[track_caller]
fn streams_alike(server: &apr_server::Server, mut body: Value) {
    let whole = ok(server, RESPONSES, &body);
    body["stream"] = true.into();
    let events = post(server, RESPONSES, &body).named_events();
    let numbers: Vec<u64> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let [created, in_progress, .., last] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&created["type"], &in_progress["type"]), (&json!("response.created"), &json!("response.in_progress")));
    assert_eq!(created["response"]["status"], "in_progress");
    assert_eq!(last["type"], format!("response.{}", whole["status"].as_str().unwrap()));
    assert_eq!(last["response"]["id"], created["response"]["id"]);
    let texts = |response: &Value| -> Vec<Value> {
        response["output"].as_array().unwrap().iter().map(|item| item["content"].clone()).collect()
    };
    assert_eq!(texts(&last["response"]), texts(&whole), "{body}");
    assert_eq!(last["response"]["usage"]["output_tokens"], whole["usage"]["output_tokens"]);
    let deltas = events.iter().filter(|e| e["type"] == "response.output_text.delta");
    let text: String = deltas.map(|e| e["delta"].as_str().unwrap()).collect();
    let expected: String = texts(&whole).iter().map(|content| content[0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, expected);
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = start();
    streams_alike(&server, ask(json!({})));
    streams_alike(&server, ask(json!({"temperature": 1.5, "top_p": 0.9, "seed": 7, "instructions": "Be brief."})));
    streams_alike(&server, ask(json!({"max_output_tokens": 0})));
    let text = ok(&server, RESPONSES, &ask(json!({})))["output"][0]["content"][0]["text"].as_str().unwrap().to_string();
    let whole: Vec<char> = text.chars().collect();
    let stop: String = whole[whole.len() / 2..].iter().take(2).collect();
    let stopped = ask(json!({"stop": stop}));
    assert_eq!(ok(&server, RESPONSES, &stopped)["status"], "completed");
    streams_alike(&server, stopped);
}

#[test]
fn a_history_of_items_is_told_to_the_model() {
    let server = start();
    let tool =
        json!({"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}, "strict": true});
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "Find a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": "{\"what\": \"a\"}"},
        {"type": "function_call_output", "call_id": "c1", "output": "none"},
    ]);
    let answer = ok(&server, RESPONSES, &ask(json!({"input": input, "tools": [tool], "instructions": "Be brief."})));
    assert_eq!(answer["tools"][0], tool, "the settings of the request are repeated");
    let short = ok(&server, RESPONSES, &ask(json!({"input": "Find a"})));
    assert!(answer["usage"]["input_tokens"].as_u64() > short["usage"]["input_tokens"].as_u64());
}

#[test]
fn what_cannot_be_done_is_refused_by_its_name() {
    let server = start();
    let param = |fields: Value| {
        let reply = post(&server, RESPONSES, &ask(fields));
        assert_eq!(reply.status, 400, "{}", reply.text());
        reply.json()["error"]["param"].as_str().unwrap().to_string()
    };
    assert_eq!(param(json!({"previous_response_id": "resp_1"})), "previous_response_id");
    assert_eq!(param(json!({"background": true})), "background");
    assert_eq!(param(json!({"input": []})), "input");
    assert_eq!(param(json!({"max_output_tokens": -7})), "max_output_tokens");
    assert_eq!(param(json!({"temperature": -1})), "temperature");
    assert_eq!(post(&server, RESPONSES, &ask(json!({"model": "gpt-5"}))).status, 404);
    let long = post(&server, RESPONSES, &ask(json!({"input": "word ".repeat(2000)})));
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn likelihoods_are_those_of_the_text() {
    let server = start();
    let asked = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 3});
    let whole = ok(&server, RESPONSES, &ask(asked.clone()));
    let part = &whole["output"][0]["content"][0];
    let tokens = part["logprobs"].as_array().unwrap();
    assert_eq!(tokens.len(), 24);
    let bytes = tokens.iter().flat_map(|t| t["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8);
    assert_eq!(String::from_utf8_lossy(&bytes.collect::<Vec<_>>()), part["text"].as_str().unwrap());
    assert!(
        tokens.iter().all(|t| t["logprob"].as_f64() <= Some(0.0) && t["top_logprobs"].as_array().unwrap().len() == 3)
    );
    let mut body = ask(asked);
    body["stream"] = true.into();
    let events = post(&server, RESPONSES, &body).named_events();
    let deltas = events.iter().filter(|e| e["type"] == "response.output_text.delta");
    let streamed: Vec<Value> = deltas.flat_map(|e| e["logprobs"].as_array().unwrap().clone()).collect();
    assert_eq!(&streamed, tokens);
    let done = events.iter().find(|e| e["type"] == "response.output_text.done").unwrap();
    assert_eq!(&done["logprobs"], &part["logprobs"]);
}
