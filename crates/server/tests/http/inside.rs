//! Looking inside while it talks: experts of tokens, and traces, of the steps that serve.

use std::path::Path;

use crate::support::*;
use apr_engine::device::Device;
use apr_engine::diff::verdict::Rule;
use apr_engine::diff::{DiffOptions, ModelSource, Source, diff};
use apr_engine::{EngineOptions, KvType};
use apr_server::{Keys, Server, Settings};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(fields: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 12, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// The experts of each token in the events of a stream.
fn streamed(events: &[Value]) -> Vec<&Value> {
    events.iter().filter_map(|e| e["choices"][0].get("apr_experts")).collect()
}

#[test]
fn each_token_has_its_experts_where_a_request_asks() {
    let server = start();
    for (path, body) in [
        (CHAT, chat(json!({}))),
        (CHAT, chat(json!({"logprobs": true}))),
        (TEXT, json!({"prompt": "Hello", "max_tokens": 12, "ignore_eos": true})),
    ] {
        let plain = ok(&server, path, &body);
        assert!(plain["choices"][0].get("apr_experts").is_none(), "nobody asked");
        let mut asking = body.clone();
        asking["apr_experts"] = true.into();
        let whole = ok(&server, path, &asking);
        for field in ["text", "message", "logprobs"] {
            assert_eq!(whole["choices"][0].get(field), plain["choices"][0].get(field), "looking changes nothing");
        }
        let list = whole["choices"][0]["apr_experts"].as_array().unwrap();
        assert_eq!(list.len(), 12, "one for each token");
        for experts in list {
            let layers = experts["layers"].as_array().unwrap();
            assert_eq!(layers.len(), 4);
            for ids in layers {
                let mut ids: Vec<u64> = ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
                assert_eq!(ids.len(), 2);
                ids.dedup();
                assert!(ids.len() == 2 && ids.iter().all(|id| *id < 8), "{experts}");
            }
        }
        asking["stream"] = true.into();
        let events = post(&server, path, &asking).events();
        assert_eq!(streamed(&events), list.iter().collect::<Vec<_>>(), "a stream tells the same");
    }
    let refused = post(&server, CHAT, &chat(json!({"apr_experts": "yes"})));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("apr_experts")));
}

/// A server whose administrator's key is `root`, and which saves traces in a folder.
fn start_for_traces(dir: &Path, trace_bytes: u64) -> Server {
    let file = dir.join("keys");
    std::fs::write(&file, "root\n").unwrap();
    let keys = Keys::read(None, Some(&file)).unwrap();
    start_with(Settings { keys, trace_dir: Some(dir.to_path_buf()), trace_bytes, ..Settings::default() }, |_| ())
}

fn send(server: &Server, path: &str, headers: &[&str], body: &Value) -> Reply {
    let mut client = Client::connect(server.addr());
    let headers = [&["content-type: application/json"], headers].concat();
    client.request("POST", path, &headers, body.to_string().as_bytes());
    client.reply()
}

const ROOT: &str = "authorization: Bearer root";

#[test]
fn statistics_come_with_the_answer_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_for_traces(dir.path(), 1 << 30);
    let text = json!({"prompt": "Hello", "max_tokens": 12, "ignore_eos": true});
    for (path, body) in [(CHAT, chat(json!({"temperature": 1.0, "seed": 3}))), (TEXT, text)] {
        let plain = ok(&server, path, &body);
        assert!(plain.get("apr_trace").is_none(), "nobody asked");
        let whole = send(&server, path, &[ROOT, "x-apr-trace: stats"], &body).json();
        assert_eq!(whole["choices"], plain["choices"]);
        let trace = &whole["apr_trace"];
        let n = whole["usage"]["prompt_tokens"].as_u64().unwrap() + 11;
        assert_eq!((&trace["schema"], &trace["positions"]), (&json!("apr.trace/1"), &json!([0, n])));
        let layers = trace["layers"].as_array().unwrap();
        assert_eq!((layers.len(), &trace["saved"], &trace["error"]), (4, &Value::Null, &Value::Null));
        for layer in layers {
            let width = layer["output"]["count"].as_u64().unwrap() / n;
            assert!(width > 1 && layer["output"]["count"] == width * n, "all positions, in every layer: {layer}");
            assert!(layer["moe_router"]["std_dev"].is_f64() && layer["output"]["nan_count"] == 0);
        }
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        streamed["stream_options"] = json!({"include_usage": true});
        let mut events = send(&server, path, &[ROOT, "x-apr-trace: stats"], &streamed).events();
        assert!(events.pop().unwrap()["usage"].is_object(), "usage comes last");
        let last = events.pop().unwrap();
        assert_eq!((&last["choices"], &last["apr_trace"]["layers"]), (&json!([]), &trace["layers"]));
        assert!(events.iter().all(|e| e.get("apr_trace").is_none()));
    }
}

/// The last value of a stream of events or lines.
fn last_value(reply: &Reply) -> Value {
    let text = reply.text();
    let last = text.lines().rfind(|line| line.starts_with("data: {") || line.starts_with('{')).expect("a value");
    serde_json::from_str(last.trim_start_matches("data: ")).unwrap()
}

#[test]
fn every_api_that_answers_tells_of_the_trace() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_for_traces(dir.path(), 1 << 30);
    let messages = json!([{"role": "user", "content": "Hello there"}]);
    for (path, body) in [
        ("/v1/responses", json!({"input": "Hello there", "max_output_tokens": 12})),
        ("/v1/messages", json!({"messages": messages, "max_tokens": 12})),
        ("/completion", json!({"prompt": "Hello", "n_predict": 12})),
        ("/completion", json!({"prompt": "Hello", "n_predict": 12, "response_fields": ["content"]})),
        ("/api/chat", json!({"messages": messages, "options": {"num_predict": 12}})),
        ("/api/generate", json!({"prompt": "Hello", "options": {"num_predict": 12}})),
        ("/api/generate", json!({"prompt": "Hello", "raw": true, "options": {"num_predict": 12}})),
    ] {
        let send = |stream: bool, headers: &[&str]| {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let reply = send(&server, path, headers, &body);
            assert_eq!(reply.status, 200, "{path}: {}", reply.text());
            reply
        };
        let asked = [ROOT, "x-apr-trace: stats"];
        let whole = send(false, &asked).json();
        let trace = &whole["apr_trace"];
        assert_eq!((&trace["schema"], trace["layers"].as_array().unwrap().len()), (&json!("apr.trace/1"), 4), "{path}");
        let end = last_value(&send(true, &asked));
        // The last event of a response holds all of it.
        let end = end.get("response").filter(|r| r.is_object()).unwrap_or(&end);
        assert!(end["apr_trace"]["layers"] == trace["layers"], "{path}");
        for quiet in [send(false, &[ROOT]), send(true, &[ROOT])] {
            assert!(!quiet.text().contains("apr_trace"), "nobody asked: {path}");
        }
    }
}

#[test]
fn no_path_passes_over_what_it_cannot_trace() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_for_traces(dir.path(), 1 << 30);
    let document: Value = serde_json::from_str(include_str!("../../openapi.json")).unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        // What pulls and makes models is refused whatever it says.
        let refuses = ["/api/pull", "/api/push", "/api/create", "/api/copy"].contains(&path.as_str());
        if methods.get("post").is_none() || refuses {
            continue;
        }
        let stranger = send(&server, path, &["x-apr-trace: stats"], &json!({}));
        assert_eq!(stranger.status, 403, "{path}");
        let wrong = send(&server, path, &[ROOT, "x-apr-trace: everything"], &json!({}));
        assert!(wrong.status == 400 && wrong.text().contains("x-apr-trace: expected"), "{path}: {}", wrong.text());
        let is_told = methods["post"]["parameters"].to_string().contains("/Trace\"");
        let empty = send(&server, path, &[ROOT, "x-apr-trace: stats"], &json!({}));
        let is_refused = empty.status == 400 && empty.text().contains("x-apr-trace: this request generates no answer");
        // A request of these that asks nothing loads the model.
        let loads = ["/api/chat", "/api/generate"].contains(&path.as_str());
        assert_eq!(is_refused, !is_told || loads, "{path}: {}", empty.text());
    }
}

#[test]
fn a_trace_that_was_saved_while_others_were_answered_is_that_of_its_tokens_alone() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_for_traces(dir.path(), 1 << 30);
    let body = chat(json!({"temperature": 1.0, "seed": 5, "max_tokens": 30}));
    let reply = std::thread::scope(|scope| {
        for i in 0..3 {
            let other = chat(json!({"max_tokens": 60, "temperature": 1.0, "seed": i}));
            let server = &server;
            scope.spawn(move || ok(server, CHAT, &other));
        }
        send(&server, CHAT, &[ROOT, "x-apr-trace: save"], &body)
    });
    let path = dir.path().join(format!("{}.safetensors", reply.header("x-request-id").unwrap()));
    assert_eq!(reply.json()["apr_trace"]["saved"], json!(path.display().to_string()));
    let device = Device::Cpu { n_threads: Some(1), isa: None };
    let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(1024) };
    let model = ModelSource { path: TINY.into(), options, unfused: false };
    let scratch = tempfile::tempdir().unwrap();
    let options = DiffOptions {
        a: Source::Trace(path),
        b: Source::Model(model),
        prompt: None,
        threshold: 3.0,
        model: None,
        scratch: scratch.path().to_path_buf(),
    };
    let report = diff(&options).unwrap();
    assert_eq!(report.rule, Rule::Bits, "the two must be the same to the bit");
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert!(report.places.len() > 40 && report.positions.len() == report.tokens.len());
}

#[test]
fn whose_trace_is_refused_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = start_for_traces(dir.path(), 100_000);
    let refused = |headers: &[&str], body: &Value| {
        let reply = send(&server, CHAT, headers, body);
        (reply.status, reply.json()["error"]["message"].as_str().unwrap().to_string())
    };
    let body = chat(json!({}));
    for headers in [&["x-apr-trace: stats"][..], &["x-apr-trace: stats", "authorization: Bearer other"]] {
        let (status, message) = refused(headers, &body);
        assert!(status == 403 && message.contains("--admin-key-file"), "{message}");
    }
    for (value, word) in [
        ("everything", "stats, save"),
        ("save=attn_nrm", "attn_norm"),
        ("save=ffn_out", "no stage 'ffn_out'"),
        ("save", "100000 are allowed"),
    ] {
        let (status, message) = refused(&[ROOT, &format!("x-apr-trace: {value}")], &body);
        assert!(status == 400 && message.contains(word), "{value}: {message}");
    }
    let (status, message) = refused(&[ROOT, "x-apr-trace: stats"], &chat(json!({"n": 2})));
    assert!(status == 400 && message.contains("one answer"), "{message}");
    let some = send(&server, CHAT, &[ROOT, "x-apr-trace: save=moe_router", "x-request-id: ../../x"], &body);
    let name = dir.path().join("______x.safetensors");
    assert_eq!(some.json()["apr_trace"]["saved"], json!(name.display().to_string()));
    let again = send(&server, CHAT, &[ROOT, "x-apr-trace: save=moe_router", "x-request-id: ../../x"], &body).json();
    assert!(again["apr_trace"]["error"].as_str().unwrap().contains("exists"), "nothing is written over");
    assert!(again["choices"][0]["message"]["content"].is_string(), "the answer does not suffer");
    // A server without administrators traces nothing.
    let open = start();
    assert_eq!(send(&open, CHAT, &["x-apr-trace: stats"], &body).status, 403);
    assert_eq!(send(&open, CHAT, &[ROOT, "x-apr-trace: stats"], &body).status, 403);
}
