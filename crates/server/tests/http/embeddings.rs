//! Embeddings over a socket: forms, equality whatever they are asked beside, and what is refused.

use crate::support::*;
use serde_json::{Value, json};

const PATH: &str = "/v1/embeddings";

fn vector(v: &Value) -> Vec<f32> {
    v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn of(server: &apr_server::Server, input: Value) -> Vec<Vec<f32>> {
    let answer = ok(server, PATH, &json!({"input": input}));
    let data = answer["data"].as_array().unwrap();
    assert!(data.iter().enumerate().all(|(i, d)| d["index"] == i && d["object"] == "embedding"));
    data.iter().map(|d| vector(&d["embedding"])).collect()
}

/// Bytes that standard base64 means.
fn decoded(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let value = |b: &u8| digits.iter().position(|d| d == b).unwrap_or(0) as u32;
        let bits = four.iter().fold(0, |bits, b| bits << 6 | value(b));
        out.extend(&bits.to_be_bytes()[1..]);
    }
    let n_pad = text.bytes().filter(|b| *b == b'=').count();
    out.truncate(out.len() - n_pad);
    out
}

#[test]
fn an_embedding_has_openais_form_and_length_1() {
    let server = start();
    let answer = ok(&server, PATH, &json!({"model": "tiny", "input": "Hello there", "dimensions": 256, "user": "me"}));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("tiny-qwen3moe")));
    let n = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(n > 1 && answer["usage"]["total_tokens"] == n);
    let v = vector(&answer["data"][0]["embedding"]);
    assert_eq!(v.len(), 256);
    assert!((v.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
    let body = json!({"input": "Hello there", "encoding_format": "base64"});
    let text = ok(&server, PATH, &body)["data"][0]["embedding"].as_str().unwrap().to_string();
    let floats: Vec<f32> = decoded(&text).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(floats, v);
}

#[test]
fn an_embedding_is_the_same_whatever_it_is_asked_beside() {
    let server = start();
    let texts: Vec<String> = (0..30).map(|i| format!("text {i} {}", "of some length ".repeat(i % 7))).collect();
    let all = of(&server, json!(texts));
    assert_eq!(all.len(), 30);
    for i in [0, 13, 29] {
        assert_eq!(of(&server, json!(texts[i])), [all[i].clone()], "the same bits");
    }
    let tokens: Vec<Vec<u32>> = texts[..3].iter().map(|t| engine().text_tokens(t.as_bytes(), false)).collect();
    assert_eq!(of(&server, json!(tokens)), all[..3]);
    assert_eq!(of(&server, json!(tokens[1])), [all[1].clone()]);
    assert_ne!(all[0], all[1]);
}

#[test]
fn what_cannot_be_embedded_is_refused() {
    let server = start();
    let long = "word ".repeat(2000);
    for (body, param, code) in [
        (json!({}), json!("input"), "invalid_value"),
        (json!({"input": ""}), json!("input"), "empty_prompt"),
        (json!({"input": ["a", ""]}), json!("input"), "empty_prompt"),
        (json!({"input": []}), json!("input"), "empty_prompt"),
        (json!({"input": [[]]}), json!("input"), "empty_prompt"),
        (json!({"input": vec!["a"; 2049]}), json!("input"), "invalid_value"),
        (json!({"input": [99_999]}), json!("input"), "invalid_value"),
        (json!({"input": 5}), json!("input"), "invalid_type"),
        (json!({"input": long}), Value::Null, "context_length_exceeded"),
        (json!({"input": "a", "dimensions": 64}), json!("dimensions"), "unsupported_value"),
        (json!({"input": "a", "encoding_format": "hex"}), json!("encoding_format"), "invalid_type"),
    ] {
        let reply = post(&server, PATH, &body);
        let error = &reply.json()["error"];
        assert_eq!((reply.status, &error["param"], &error["code"]), (400, &param, &json!(code)), "{error}");
    }
    assert_eq!(post(&server, PATH, &json!({"input": "a", "model": "gpt"})).status, 404);
}

#[test]
fn a_client_that_leaves_frees_its_places() {
    let server = start();
    let texts = vec!["word ".repeat(150); 500];
    let mut client = Client::connect(server.addr());
    let body = json!({"input": texts}).to_string();
    client.request("POST", PATH, &["content-type: application/json"], body.as_bytes());
    let model = server.model().unwrap();
    soon("it is computed", || model.scheduler().load().n_running > 0);
    assert!(model.n_free_places() >= 16, "it leaves places to others");
    ok(&server, "/v1/completions", &json!({"prompt": "beside", "max_tokens": 1}));
    drop(client);
    soon("its places are free", || model.n_free_places() == 20);
    soon("its blocks too", || model.scheduler().with_engine(|e| e.session.n_kv_blocks()).unwrap() <= 1);
}
