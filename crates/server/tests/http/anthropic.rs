//! Anthropic's API over a socket.

use serde_json::{Value, json};

use crate::support::*;

const MESSAGES: &str = "/v1/messages";

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
    let wrong_path = post(&server, "/v1/messages/batches", &json!({}));
    assert_eq!(error_of(&wrong_path), (404, "not_found_error".into()));
    let mut client = Client::connect(server.addr());
    client.request("POST", MESSAGES, &["origin: http://evil.example"], b"{}");
    assert_eq!(error_of(&client.reply()), (403, "permission_error".into()));
    client.request("POST", "/api/none", &["host: evil.example"], b"{}");
    let refused = client.reply();
    assert_eq!((refused.status, refused.json()["error"].is_string()), (403, true));
    assert!(matches!(get(&server, "/none").json()["error"], Value::Object(_)));
}
