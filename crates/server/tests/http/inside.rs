//! Looking inside while it talks: experts of tokens, on the steps that serve.

use crate::support::*;
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
