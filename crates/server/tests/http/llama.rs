//! What llama.cpp's and vLLM's servers have beside OpenAI's API.

use std::time::Duration;

use apr_server::Settings;

use crate::support::*;
use serde_json::{Value, json};

fn tokens(answer: &Value) -> Vec<u32> {
    answer["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_become_text_again() {
    let server = start();
    let text = "Hello <|im_end|> wörld";
    let answer = ok(&server, "/tokenize", &json!({"content": text}));
    assert_eq!(answer.as_object().unwrap().len(), 1, "llama.cpp's form");
    let own = engine();
    assert_eq!(tokens(&answer), own.tokenizer.encode_text(text, true));
    let back = ok(&server, "/detokenize", &json!({"tokens": answer["tokens"]}));
    assert_eq!(back, json!({"content": text, "prompt": text}));
    let plain = ok(&server, "/tokenize", &json!({"content": text, "parse_special": false}));
    assert_eq!(tokens(&plain), own.tokenizer.encode_text(text, false));
    let mixed = ok(&server, "/tokenize", &json!({"content": [5, "Hello", 7]}));
    let middle = own.tokenizer.encode_text("Hello", true);
    assert_eq!(tokens(&mixed), [&[5], &middle[..], &[7]].concat());
    assert_eq!(ok(&server, "/tokenize", &json!({})), json!({"tokens": []}));
    assert_eq!(ok(&server, "/detokenize", &json!({})), json!({"content": "", "prompt": ""}));
}

#[test]
fn pieces_are_text_or_bytes() {
    let server = start();
    let answer = ok(&server, "/tokenize", &json!({"content": "a\u{1f984}", "with_pieces": true}));
    let mut bytes: Vec<u8> = Vec::new();
    for token in answer["tokens"].as_array().unwrap() {
        assert!(token["id"].is_u64());
        match &token["piece"] {
            Value::String(text) => bytes.extend(text.as_bytes()),
            piece => bytes.extend(piece.as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8)),
        }
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), "a\u{1f984}");
    assert!(answer.to_string().contains("\"piece\":["), "the animal is cut into bytes: {answer}");
}

#[test]
fn vllms_form_counts() {
    let server = start();
    let answer =
        ok(&server, "/tokenize", &json!({"model": "tiny", "prompt": "Hello there", "return_token_strs": true}));
    let n = tokens(&answer).len();
    assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(n), &json!(1024)));
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), n);
    let messages = json!([{"role": "user", "content": "Hello there"}]);
    let chat = ok(&server, "/tokenize", &json!({"messages": messages}));
    assert_eq!(chat["token_strs"], Value::Null);
    let answered = ok(&server, "/v1/chat/completions", &json!({"messages": messages, "max_tokens": 1}));
    assert_eq!(answered["usage"]["prompt_tokens"], chat["count"], "it is the prompt that would be answered");
    let prompt = ok(&server, "/apply-template", &json!({"messages": messages}))["prompt"].as_str().unwrap().to_string();
    assert!(prompt.contains("Hello there") && prompt.contains("<|im_start|>assistant"), "{prompt}");
    assert_eq!(ok(&server, "/tokenize", &json!({"prompt": prompt}))["tokens"], chat["tokens"]);
}

#[test]
fn what_is_wrong_is_named() {
    let server = start();
    for (path, body, param) in [
        ("/tokenize", json!({"content": [99_999]}), "content"),
        ("/tokenize", json!({"content": {}}), "content"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens[0]"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens[0]"),
        ("/detokenize", json!({"tokens": [99_999]}), "tokens"),
        ("/apply-template", json!({}), "messages"),
        (
            "/apply-template",
            json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": true,
                "continue_final_message": true}),
            "continue_final_message",
        ),
    ] {
        let reply = post(&server, path, &body);
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)), "{}", reply.text());
    }
    for path in ["/tokenize", "/detokenize", "/apply-template"] {
        assert_eq!(post(&server, path, &json!({"model": "gpt-4"})).status, 404);
    }
}

#[test]
fn props_tell_of_the_model() {
    let server = start();
    let props = get(&server, "/props").json();
    assert_eq!((&props["total_slots"], &props["model_path"]), (&json!(4), &json!("tiny-qwen3moe.gguf")));
    assert_eq!(props["default_generation_settings"]["n_ctx"], 1024);
    assert_eq!(props["default_generation_settings"]["params"]["seed"], -1);
    assert!(props["chat_template"].as_str().unwrap().contains("im_start"));
    assert_eq!(props["modalities"], json!({"vision": false, "audio": false}));
}

#[test]
fn a_prompt_may_end_with_any_turn() {
    let server = start();
    let said = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure,"}]);
    let prompt = |fields: Value| {
        let mut body = json!({"messages": said});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        ok(&server, "/apply-template", &body)["prompt"].as_str().unwrap().to_string()
    };
    let begun = prompt(json!({}));
    assert!(begun.ends_with("Sure,"), "{begun}");
    assert_eq!(prompt(json!({"add_generation_prompt": false, "continue_final_message": true})), begun);
    let closed = prompt(json!({"add_generation_prompt": false}));
    assert!(closed.trim_end().ends_with("<|im_end|>") && closed.contains("Sure,"), "{closed}");
    let answered = prompt(json!({"continue_final_message": false}));
    assert!(answered.starts_with(&closed) && answered.contains("<|im_start|>assistant\n"), "{answered}");
    assert_ne!(answered, closed);
}

#[test]
fn paths_without_a_version_are_llamas() {
    let server = start();
    for path in ["/v1/health", "/ping"] {
        assert_eq!(get(&server, path).json(), json!({"status": "ok"}));
    }
    assert_eq!(get(&server, "/version").json(), json!({"version": env!("CARGO_PKG_VERSION")}));
    assert_eq!(get(&server, "/models").json(), get(&server, "/v1/models").json());
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    assert_eq!(ok(&server, "/chat/completions", &chat)["object"], "chat.completion");
    assert_eq!(ok(&server, "/responses", &json!({"input": "Hi", "max_output_tokens": 2}))["object"], "response");
    assert_eq!(ok(&server, "/embeddings", &json!({"input": "Hi"}))["object"], "list");
    let idle = |id: u32| json!({"id": id, "n_ctx": 1024, "speculative": false, "is_processing": false});
    let idle = json!([idle(0), idle(1), idle(2), idle(3)]);
    soon("nothing is in the making", || get(&server, "/slots").json() == idle);
}

/// The data of a stream at whose end nothing stands.
fn native_events(reply: &Reply) -> Vec<Value> {
    let text = reply.text();
    let data = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    data.map(|json| serde_json::from_str(json).unwrap()).collect()
}

const NATIVE: &str = "/completion";

#[test]
fn a_native_completion_has_llamas_form() {
    let server = start();
    let body = json!({"prompt": "Once upon a time", "n_predict": 12, "ignore_eos": true, "seed": 7});
    let answer = ok(&server, NATIVE, &body);
    let text = answer["content"].as_str().unwrap();
    let n_prompt = ok(&server, "/tokenize", &json!({"content": "Once upon a time", "add_special": true}));
    let n_prompt = tokens(&n_prompt).len();
    for (name, expected) in [
        ("index", json!(0)),
        ("tokens", json!([])),
        ("stop", json!(true)),
        ("model", json!("tiny-qwen3moe")),
        ("tokens_predicted", json!(12)),
        ("tokens_evaluated", json!(n_prompt)),
        ("tokens_cached", json!(n_prompt + 12)),
        ("prompt", json!("Once upon a time")),
        ("has_new_line", json!(text.contains('\n'))),
        ("truncated", json!(false)),
        ("stop_type", json!("limit")),
        ("stopping_word", json!("")),
    ] {
        assert_eq!(answer[name], expected, "{name}");
    }
    assert_eq!(answer["timings"]["predicted_n"], 12);
    let settings = &answer["generation_settings"];
    assert_eq!((&settings["n_predict"], &settings["seed"]), (&json!(12), &json!(7)));
    let biases = settings["logit_bias"].as_array().unwrap();
    assert!(!biases.is_empty() && biases.iter().all(|b| b["bias"].is_null()), "{biases:?}");

    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = native_events(&post(&server, "/completions", &streamed));
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!(pieces.iter().map(|e| e["content"].as_str().unwrap()).collect::<String>(), text);
    assert!(pieces.iter().all(|e| e["stop"] == false));
    let streamed: Vec<Value> = pieces.iter().flat_map(|e| e["tokens"].as_array().unwrap().clone()).collect();
    let mut with_tokens = body.clone();
    with_tokens["return_tokens"] = true.into();
    assert_eq!(ok(&server, NATIVE, &with_tokens)["tokens"], Value::from(streamed));
    assert_eq!((&last["stop"], &last["content"], &last["stop_type"]), (&json!(true), &json!(""), &json!("limit")));

    let stop: String = text.chars().skip(text.chars().count() / 2).take(2).collect();
    let mut stopped = body.clone();
    stopped["stop"] = json!([stop]);
    stopped["response_fields"] = json!(["content", "stop_type", "stopping_word", "generation_settings/n_predict", "x"]);
    let expected = json!({"content": text.split(&stop).next().unwrap(), "stop_type": "word", "stopping_word": stop,
        "generation_settings/n_predict": 12});
    assert_eq!(ok(&server, NATIVE, &stopped), expected);
    let endless = ok(&server, NATIVE, &json!({"prompt": vec![7; 1000], "n_predict": -1, "ignore_eos": true}));
    assert_eq!((&endless["tokens_predicted"], &endless["truncated"]), (&json!(24), &json!(true)));
}

#[test]
fn prompts_are_texts_tokens_and_both() {
    let server = start();
    let about = engine();
    let ids = about.tokenizer.encode_text("Hello there", true);
    let native = |prompt: Value| ok(&server, NATIVE, &json!({"prompt": prompt, "n_predict": 4, "ignore_eos": true}));
    let one = native(json!(ids));
    assert_eq!(one["prompt"], "Hello there");
    let several = native(json!([ids, "Hello there", {"prompt_string": "Hello there"}, ["Hello there"]]));
    let several = several.as_array().unwrap();
    assert_eq!(several.len(), 4);
    assert!(several.iter().enumerate().all(|(i, a)| a["index"] == i && a["content"] == one["content"]), "{several:?}");
    let mixed = native(json!([ids[0], "<|im_end|>", ids[1]]));
    assert_eq!(mixed["tokens_evaluated"], 3, "control tokens are found in strings");
    let said =
        json!([{"content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]}, "Hello there"]);
    let embedded = ok(&server, "/v1/embeddings", &json!({"input": said}));
    assert_eq!(embedded["data"][0]["embedding"], embedded["data"][1]["embedding"]);
    for prompt in
        [json!([]), json!([1, [2]]), json!({"content": "x"}), json!({"prompt_string": "x", "y": 1}), json!([-1])]
    {
        assert_eq!(post(&server, NATIVE, &json!({"prompt": prompt})).status, 400, "{prompt}");
    }
}

#[test]
fn tokens_come_with_their_likelihood() {
    let server = start();
    let body = |fields: Value| {
        let mut body = json!({"prompt": "Once", "n_predict": 3, "n_probs": 60, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let whole = ok(&server, NATIVE, &body(json!({})));
    let told = whole["completion_probabilities"].as_array().unwrap();
    assert_eq!(told.len(), 3);
    for token in told {
        assert!(token["id"].is_u64() && token["token"].is_string() && token["bytes"].is_array());
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 60);
        assert_eq!(token["top_logprobs"][0]["id"], token["id"], "greedy takes the best");
    }
    let events = native_events(&post(&server, NATIVE, &body(json!({"stream": true}))));
    let streamed = events.iter().flat_map(|e| e["completion_probabilities"].as_array().cloned().unwrap_or_default());
    assert_eq!(&streamed.collect::<Vec<_>>(), told);
    let drawn = ok(&server, NATIVE, &body(json!({"post_sampling_probs": true})));
    let token = &drawn["completion_probabilities"][0];
    assert_eq!(
        (&token["prob"], &token["top_probs"][0]["prob"], &token["top_probs"][1]["prob"]),
        (&json!(1.0), &json!(1.0), &json!(0.0))
    );
    for (fields, param) in [
        (json!({"post_sampling_probs": true, "temperature": 1.0}), "post_sampling_probs"),
        (json!({"n_predict": -7}), "n_predict"),
        (json!({"n_probs": 101}), "n_probs"),
    ] {
        let reply = post(&server, NATIVE, &body(fields));
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)), "{}", reply.text());
    }
}

#[test]
fn biases_have_three_forms() {
    let server = start();
    let first = |bias: Value| {
        let body =
            json!({"prompt": "x", "n_predict": 1, "return_tokens": true, "ignore_eos": true, "logit_bias": bias});
        ok(&server, NATIVE, &body)["tokens"][0].as_u64().unwrap()
    };
    let id = engine().tokenizer.encode_text("A", false)[0];
    for bias in [json!([[id, 100]]), json!([["A", 100]]), json!({"A": 100}), json!({id.to_string(): 100})] {
        assert_eq!(first(bias.clone()), u64::from(id), "{bias}");
    }
    let best = first(Value::Null);
    assert_ne!(first(json!([[best, false]])), best);
    for (bias, param) in [
        (json!([[1]]), "logit_bias[0]"),
        (json!([[1, true]]), "logit_bias[0]"),
        (json!([[99_999, 1]]), "logit_bias[0]"),
        (json!([[null, 1]]), "logit_bias[0]"),
        (json!({"99999": 1}), "logit_bias.99999"),
        (json!(5), "logit_bias"),
    ] {
        let reply = post(&server, NATIVE, &json!({"prompt": "x", "logit_bias": bias}));
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)), "{}", reply.text());
    }
}

#[test]
fn a_prompt_that_is_too_long_is_counted() {
    let server = start();
    let reply =
        post(&server, "/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "a b ".repeat(900)}]}));
    let error = &reply.json()["error"];
    assert_eq!(
        (reply.status, &error["type"], &error["n_ctx"]),
        (400, &json!("exceed_context_size_error"), &json!(1024))
    );
    assert!(error["n_prompt_tokens"].as_u64() > Some(1024), "{error}");
}

#[test]
fn a_last_token_is_told_with_the_end() {
    let server = start();
    let body = json!({"prompt": "Once", "max_tokens": 5, "ignore_eos": true, "stream": true, "logprobs": 1});
    let events = post(&server, "/v1/completions", &body).events();
    assert_eq!(events.len(), 5);
    assert_eq!(events[4]["choices"][0]["finish_reason"], "length");
    assert!(events.iter().all(|e| !e["choices"][0]["logprobs"].is_null()));
}

#[test]
fn how_far_a_prompt_is_can_be_told() {
    // Steps as short as they get, so that a prompt takes several.
    let server = start_with(Settings::default(), |limits| limits.step_time = Duration::from_micros(1));
    let n = tokens(&ok(&server, "/tokenize", &json!({"content": "word and word and "}))).len() / 2;
    let prompt = "word and ".repeat(800 / n);
    let body = |fields: Value| {
        let mut body = json!({"stream": true, "return_progress": true, "max_tokens": 3, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let chat = body(json!({"messages": [{"role": "user", "content": prompt}]}));
    for path in [NATIVE, "/v1/completions", "/v1/chat/completions"] {
        let body =
            if path.contains("chat") { chat.clone() } else { body(json!({"prompt": format!("{path} {prompt}")})) };
        for is_again in [false, true] {
            let reply = post(&server, path, &body);
            let events = if path == NATIVE { native_events(&reply) } else { reply.events() };
            let told: Vec<Value> = events.iter().filter_map(|e| e.get("prompt_progress").cloned()).collect();
            let of = |p: &Value, name: &str| p[name].as_u64().unwrap();
            let last = told.last().unwrap_or_else(|| panic!("{path}: {}", reply.text()));
            assert_eq!(of(last, "total"), of(last, "processed"));
            assert!(told.is_sorted_by(|a, b| of(a, "processed") < of(b, "processed")), "{told:?}");
            assert!(told.iter().all(|p| of(p, "cache") < of(p, "processed") && p["time_ms"].as_f64() > Some(0.0)));
            assert_eq!((told.len() > 1, of(last, "cache") > 500), (!is_again, is_again), "{told:?}");
            let is_told = |e: &Value| e.get("prompt_progress").is_some();
            let first_text = events.iter().position(|e| !is_told(e) && e["choices"][0]["delta"]["role"].is_null());
            assert!(events.iter().rposition(is_told) < first_text, "the prompt comes before the answer");
            let mut plain = body.clone();
            plain["return_progress"] = false.into();
            assert!(!post(&server, path, &plain).text().contains("prompt_progress"));
        }
    }
    let whole = ok(&server, NATIVE, &json!({"prompt": "a", "n_predict": 1, "return_progress": true}));
    assert!(whole.get("prompt_progress").is_none(), "it is for streams");
    let refused = post(&server, NATIVE, &json!({"prompt": "a", "return_progress": "yes"}));
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("return_progress")));
}
