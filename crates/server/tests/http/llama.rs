//! What llama.cpp's and vLLM's servers tell beside answers.

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
            json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false}),
            "add_generation_prompt",
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
