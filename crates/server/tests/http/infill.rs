//! Text between two texts, in the forms of OpenAI's completions, of llama.cpp's `/infill` and of Ollama's `/api/generate`.

use std::path::Path;

use crate::support::*;
use apr_engine::device::Device;
use apr_engine::{Engine, EngineOptions, KvType};
use apr_server::{Model, Server, Settings, limits};
use serde_json::{Value, json};

const TEXT: &str = "/v1/completions";
const INFILL: &str = "/infill";

const BEFORE: &str = "fn add(a: u32, b: u32) -> u32 {\n    ";
const AFTER: &str = "\n}\n";

/// Ids of these texts, one after the other: control tokens where they are names in angles.
fn ids(parts: &[&str]) -> Vec<u32> {
    let tokenizer = engine().tokenizer.clone();
    parts.iter().flat_map(|part| tokenizer.encode_text(part, part.starts_with("<|"))).collect()
}

#[test]
fn a_suffix_comes_before_the_middle() {
    let server = start();
    let with = |fields: Value| {
        let mut body = json!({"max_tokens": 12, "ignore_eos": true, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        ok(&server, TEXT, &body)["choices"][0].clone()
    };
    let expected = ids(&["<|fim_prefix|>", BEFORE, "<|fim_suffix|>", AFTER, "<|fim_middle|>"]);
    assert_eq!(expected.iter().filter(|id| ids(&["<|fim_middle|>"]).contains(id)).count(), 1, "one token each");
    let filled = with(json!({"prompt": BEFORE, "suffix": AFTER}));
    assert_eq!(filled["prompt_token_ids"], json!(expected));
    let by_ids = with(json!({"prompt": expected}));
    assert_eq!((&filled["text"], &filled["token_ids"]), (&by_ids["text"], &by_ids["token_ids"]));
    let mixed = with(json!({"prompt": [[5, BEFORE]], "suffix": AFTER, "echo": true}));
    let told: Vec<u32> = serde_json::from_value(mixed["prompt_token_ids"].clone()).unwrap();
    assert_eq!(told[..2], [expected[0], 5]);
    assert!(mixed["text"].as_str().unwrap().contains(BEFORE) && !mixed["text"].as_str().unwrap().contains("fim"));
    assert_eq!(with(json!({"prompt": BEFORE, "suffix": ""}))["prompt_token_ids"], json!(ids(&[BEFORE])));
    // What never is in a middle ends it.
    let file = ids(&["<|file_sep|>"])[0];
    let ended = with(json!({"prompt": BEFORE, "suffix": AFTER, "logit_bias": {file.to_string(): 100}}));
    assert_eq!(
        (&ended["text"], &ended["finish_reason"], &ended["stop_reason"]),
        (&json!(""), &json!("stop"), &json!(file))
    );
}

#[test]
fn files_are_filled_in_as_llama_cpp_does() {
    let server = start();
    let with = |fields: Value| {
        let mut body = json!({"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 8, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        ok(&server, INFILL, &body)
    };
    let extra = json!([{"filename": "a.rs", "text": "mod b;\n"}, {"text": "x"}]);
    let parts = ["<|fim_prefix|>", BEFORE, "<|fim_suffix|>", AFTER, "<|fim_middle|>"];
    let others = [
        "<|repo_name|>",
        "myproject\n",
        "<|file_sep|>",
        "a.rs\n",
        "mod b;\n",
        "<|file_sep|>",
        "filename\n",
        "x",
        "<|file_sep|>",
        "filename\n",
    ];
    for (fields, expected) in [
        (json!({}), ids(&parts)),
        (json!({"prompt": "a +"}), ids(&[&parts[..], &["a +"]].concat())),
        (json!({"input_extra": extra}), ids(&[&others[..], &parts].concat())),
        (json!({"input_prefix": [BEFORE], "input_extra": [], "prompt": ""}), ids(&parts)),
    ] {
        let filled = with(fields);
        let body = json!({"prompt": expected, "n_predict": 8, "ignore_eos": true});
        let completed = ok(&server, "/completion", &body);
        assert_eq!((&filled["content"], &filled["prompt"]), (&completed["content"], &completed["prompt"]));
        assert_eq!(filled["tokens_evaluated"], expected.len());
    }
    let mut client = Client::connect(server.addr());
    let body = json!({"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 3, "stream": true});
    client.request("POST", INFILL, &["content-type: application/json"], body.to_string().as_bytes());
    assert_eq!(client.reply().header("content-type"), Some("text/event-stream"));
}

#[test]
fn ollamas_suffix_is_that_of_completions() {
    let server = start();
    let mut body = json!({"prompt": BEFORE, "suffix": AFTER, "max_tokens": 8, "temperature": 0});
    let expected = ok(&server, TEXT, &body);
    body["options"] = json!({"num_predict": 8, "temperature": 0});
    for stream in [false, true] {
        body["stream"] = stream.into();
        let lines = post(&server, "/api/generate", &body).text();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let text: String = lines.iter().map(|line| line["response"].as_str().unwrap()).collect();
        assert_eq!(json!(text), expected["choices"][0]["text"]);
        assert_eq!(lines.last().unwrap()["prompt_eval_count"], expected["usage"]["prompt_tokens"]);
    }
}

#[test]
fn what_cannot_be_filled_in_is_refused() {
    let server = start();
    let refused = |server: &Server, path: &str, body: Value, param: &str| {
        let reply = post(server, path, &body);
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)), "{}", reply.text());
        reply.text()
    };
    refused(&server, INFILL, json!({"input_suffix": AFTER}), "input_prefix");
    refused(&server, INFILL, json!({"input_prefix": BEFORE}), "input_suffix");
    refused(&server, INFILL, json!({"input_prefix": [99_999], "input_suffix": ""}), "input_prefix");
    let extra = |extra: Value| json!({"input_prefix": "", "input_suffix": "", "input_extra": extra});
    refused(&server, INFILL, extra(json!([{"filename": "a"}])), "input_extra[0]");
    refused(&server, INFILL, extra(json!("a")), "input_extra");
    refused(&server, TEXT, json!({"prompt": "a", "suffix": 5}), "suffix");
    refused(&server, TEXT, json!({"prompt": "a", "suffix": "b", "echo": true, "logprobs": 1}), "echo");
    let long = post(&server, INFILL, &json!({"input_prefix": "a b ".repeat(900), "input_suffix": ""}));
    assert!(long.status == 400 && long.text().contains("the context holds 1024"), "nothing is cut: {}", long.text());
    // A vocabulary without such tokens.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/arch/qwen2.gguf");
    let device = Device::Cpu { n_threads: Some(1), isa: None };
    let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: None };
    let engine = Engine::load(Path::new(path), options).unwrap();
    let other = Server::bind("127.0.0.1", 0, Settings::default()).unwrap();
    let limits = limits(&engine, 1, 1);
    other.answer_with(Model::start(engine, limits, Vec::new()).unwrap());
    let message = refused(&other, TEXT, json!({"prompt": "a", "suffix": "b"}), "suffix");
    assert!(message.contains("expected <|fim_prefix|> or <fim_prefix> in it, got none"), "{message}");
    refused(&other, INFILL, json!({"input_prefix": "a", "input_suffix": "b"}), "input_prefix");
    let reply = post(&other, "/api/generate", &json!({"prompt": "a", "suffix": "b"}));
    assert!(reply.status == 400 && reply.text().contains("<|fim_prefix|>"), "{}", reply.text());
}
