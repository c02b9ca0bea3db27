//! Ollama's API over a socket: forms, lines that say what the whole answer says, and what is refused.

use crate::support::*;
use serde_json::{Value, json};

fn chat(fields: Value) -> Value {
    let options = json!({"num_predict": 24, "temperature": 0, "seed": 3});
    let mut body =
        json!({"model": "tiny:latest", "messages": [{"role": "user", "content": "Hello there"}], "options": options});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn lines(server: &apr_server::Server, path: &str, body: &Value) -> Vec<Value> {
    let reply = post(server, path, body);
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/x-ndjson")), "{}", reply.text());
    reply.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn lines_say_what_the_whole_answer_says() {
    let server = start();
    for (path, body, text) in [
        ("/api/chat", chat(json!({})), "/message/content"),
        ("/api/chat", chat(json!({"logprobs": true, "top_logprobs": 2})), "/message/content"),
        ("/api/generate", chat(json!({"prompt": "Hello", "system": "Be brief."})), "/response"),
        ("/api/generate", chat(json!({"prompt": "<|im_start|>user\nHello", "raw": true})), "/response"),
    ] {
        let mut whole_body = body.clone();
        whole_body["stream"] = false.into();
        let whole = ok(&server, path, &whole_body);
        let mut lines = lines(&server, path, &body);
        let last = lines.last().unwrap().clone();
        assert_eq!((&whole["model"], &whole["done"]), (&json!("tiny:latest"), &json!(true)));
        for field in ["done_reason", "prompt_eval_count", "eval_count"] {
            assert_eq!(last[field], whole[field], "{field}");
        }
        for field in ["total_duration", "load_duration", "prompt_eval_duration", "eval_duration"] {
            assert!(whole[field].is_u64() && last[field].is_u64(), "{field}");
        }
        assert!(lines.iter().rev().skip(1).all(|l| l["done"] == false && l["created_at"].is_string()));
        let joined: String = lines.iter().map(|l| l.pointer(text).unwrap().as_str().unwrap()).collect();
        assert_eq!(joined, whole.pointer(text).unwrap().as_str().unwrap());
        let told: Vec<Value> = lines.iter_mut().filter_map(|l| l["logprobs"].as_array_mut()?.pop()).collect();
        assert_eq!(json!(told), whole.get("logprobs").cloned().unwrap_or(json!([])));
    }
}

#[test]
fn a_chat_says_what_openais_says() {
    let server = start();
    let ours = ok(&server, "/api/chat", &chat(json!({"stream": false})));
    let body = json!({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "temperature": 0});
    let theirs = ok(&server, "/v1/chat/completions", &body);
    assert_eq!(ours["message"]["content"], theirs["choices"][0]["message"]["content"]);
    assert_eq!(ours["prompt_eval_count"], theirs["usage"]["prompt_tokens"]);
}

#[test]
fn who_asks_nothing_finds_the_model_loaded() {
    let server = start();
    for body in [chat(json!({"messages": []})), json!({"model": "tiny"})] {
        let answer = ok(&server, "/api/chat", &body);
        assert_eq!((&answer["done"], &answer["done_reason"]), (&json!(true), &json!("load")));
    }
    assert_eq!(ok(&server, "/api/generate", &json!({"model": "tiny"}))["response"], "");
    assert_eq!(ok(&server, "/api/embed", &json!({"model": "tiny", "input": ""}))["embeddings"], json!([]));
}

#[test]
fn the_model_is_listed_and_shown() {
    let server = start();
    let tags = get(&server, "/api/tags").json();
    let model = &tags["models"][0];
    assert_eq!((&model["name"], &model["model"]), (&json!("tiny-qwen3moe:latest"), &json!("tiny-qwen3moe:latest")));
    assert_eq!((&model["details"]["family"], &model["details"]["format"]), (&json!("qwen3moe"), &json!("gguf")));
    assert_eq!(model["digest"].as_str().unwrap().len(), 64);
    assert!(model["size"].as_u64().unwrap() > 0 && model["modified_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(get(&server, "/api/ps").json()["models"][0]["context_length"], 1024);
    let shown = ok(&server, "/api/show", &json!({"model": model["name"]}));
    assert_eq!(shown["model_info"]["general.architecture"], "qwen3moe");
    assert_eq!(shown["model_info"]["tokenizer.ggml.tokens"], Value::Null);
    assert!(shown["template"].as_str().unwrap().contains("im_start"));
    let capabilities = shown["capabilities"].as_array().unwrap();
    assert!(["completion", "insert"].iter().all(|one| capabilities.contains(&json!(one))), "{capabilities:?}");
    let verbose = ok(&server, "/api/show", &json!({"name": "tiny", "verbose": true}));
    assert!(verbose["model_info"]["tokenizer.ggml.tokens"].is_array());
    assert!(get(&server, "/api/version").json()["version"].is_string());
}

#[test]
fn embeddings_are_those_of_openais_form() {
    let server = start();
    let theirs = ok(&server, "/v1/embeddings", &json!({"input": ["a", "b c"]}));
    let ours = ok(&server, "/api/embed", &json!({"model": "tiny", "input": ["a", "b c"]}));
    assert_eq!(ours["embeddings"][1], theirs["data"][1]["embedding"]);
    assert_eq!(ours["prompt_eval_count"], theirs["usage"]["prompt_tokens"]);
    let old = ok(&server, "/api/embeddings", &json!({"model": "tiny", "prompt": "a"}));
    assert_eq!(old["embedding"], theirs["data"][0]["embedding"]);
    let long = "word ".repeat(2000);
    assert_eq!(post(&server, "/api/embed", &json!({"input": long})).status, 400, "nothing is cut unasked");
    ok(&server, "/api/embed", &json!({"input": long, "truncate": true}));
}

#[test]
fn what_cannot_be_done_is_said() {
    let server = start();
    for (path, body, status, words) in [
        ("/api/chat", chat(json!({"model": "llama3"})), 404, "'llama3' not found"),
        ("/api/chat", chat(json!({"options": {"num_ctx": 4096}})), 400, "options.num_ctx"),
        ("/api/chat", chat(json!({"options": {"mirostat": 2}})), 400, "options.mirostat"),
        ("/api/chat", chat(json!({"options": {"temperature": -1}})), 400, "options.temperature"),
        ("/api/chat", chat(json!({"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]})), 400, "images"),
        ("/api/chat", chat(json!({"messages": [1, {"role": "user", "images": ["aaaa"]}]})), 400, "messages[1].images"),
        ("/api/chat", chat(json!({"format": "xml"})), 400, "format"),
        ("/api/chat", chat(json!({"messages": [{"role": "user", "content": "word ".repeat(2000)}]})), 400, "context"),
        ("/api/generate", json!({"prompt": "a", "suffix": "b", "raw": true}), 400, "suffix"),
        ("/api/generate", json!({"prompt": "a", "template": "b"}), 400, "template"),
        ("/api/generate", json!({"prompt": "a", "context": [1]}), 400, "context"),
        ("/api/pull", json!({"model": "llama3"}), 403, "one model"),
        ("/api/none", json!({}), 404, "nothing"),
    ] {
        let reply = post(&server, path, &body);
        let error = reply.json();
        assert_eq!(reply.status, status, "{path} {error}");
        assert!(error["error"].as_str().unwrap().contains(words), "{error}");
    }
    // Options of the machine are the server's business, and a context that is large enough is fine.
    ok(
        &server,
        "/api/chat",
        &chat(
            json!({"stream": false, "keep_alive": "5m", "options": {"num_ctx": 512, "num_gpu": 99, "num_predict": 3.0}}),
        ),
    );
}
