//! How long requests and connections may last, and pages of which other sites may ask.

use std::time::{Duration, Instant};

use crate::support::*;
use apr_server::{Server, Settings};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// Eight answers one after the other, each as long as the context allows.
fn endless(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "go on"}], "n": 8, "ignore_eos": true, "stream": stream})
}

#[track_caller]
fn is_free(server: &Server) {
    let model = server.model().unwrap();
    soon("nothing is left of the request", || {
        server.n_active() == 0 && model.scheduler().with_engine(|engine| engine.session.n_kv_blocks()) == Some(0)
    });
}

#[test]
fn a_request_that_takes_too_long_is_ended() {
    let settings = Settings { request_time: Some(Duration::from_millis(150)), ..Settings::default() };
    let server = start_with(settings, |limits| (limits.n_parallel, limits.keep_prefixes) = (1, false));
    let reply = post(&server, CHAT, &endless(false));
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (504, &json!("timeout")));
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    is_free(&server);
    let reply = post(&server, CHAT, &endless(true));
    let text = reply.text();
    assert_eq!(reply.status, 200, "it had begun: {text}");
    let last = text.trim_end().rsplit("\n\n").next().unwrap().strip_prefix("data: ").unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "timeout", "{text}");
    is_free(&server);
    // A body that comes slowly counts from the beginning.
    let mut slow = Client::connect(server.addr());
    slow.send(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{");
    assert_eq!(slow.reply().status, 504);
    assert_eq!(
        post(&server, CHAT, &json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})).status,
        200
    );
}

#[test]
fn between_requests_a_client_may_take_its_time_and_within_a_head_it_may_not() {
    let (head_time, idle_time) = (Duration::from_millis(200), Duration::from_millis(1500));
    let server = start_with(Settings { head_time, idle_time, ..Settings::default() }, |_| ());
    let mut client = Client::connect(server.addr());
    let ask = |client: &mut Client| {
        client.request("GET", "/health", &[], b"");
        assert_eq!(client.reply().status, 200);
    };
    for _ in 0..2 {
        ask(&mut client);
        std::thread::sleep(2 * head_time);
    }
    let start = Instant::now();
    client.send(b"GET /health HTTP/1.1\r\nhost:");
    assert_eq!(client.reply().status, 408);
    assert!(start.elapsed() < idle_time, "a head that has begun is not waited for as long as for the next request");
    let mut client = Client::connect(server.addr());
    ask(&mut client);
    let start = Instant::now();
    assert_eq!(client.line(), None, "who says nothing is told nothing");
    assert!((idle_time / 2..2 * idle_time).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[test]
fn pages_of_other_sites_may_ask_where_they_are_named() {
    let named = vec!["https://app.example".to_string()];
    let server = start_with(Settings { cors_origins: named, ..Settings::default() }, |_| ());
    let send = |server: &Server, method: &str, origin: &str| {
        let mut client = Client::connect(server.addr());
        let origin = format!("origin: {origin}");
        let asks =
            ["access-control-request-method: POST", "access-control-request-headers: authorization,content-type"];
        let headers = if method == "OPTIONS" { vec![&*origin, asks[0], asks[1]] } else { vec![&*origin] };
        client.request(method, CHAT, &headers, br#"{"messages":[{"role":"user","content":"x"}],"max_tokens":1}"#);
        client.reply()
    };
    let preflight = send(&server, "OPTIONS", "https://app.example");
    assert_eq!(preflight.status, 200);
    assert_eq!(preflight.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(preflight.header("access-control-allow-headers"), Some("authorization,content-type"));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("POST"));
    let reply = send(&server, "POST", "https://app.example");
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("https://app.example")));
    for method in ["OPTIONS", "POST"] {
        let refused = send(&server, method, "https://other.example");
        assert_eq!((refused.status, refused.header("access-control-allow-origin")), (403, None));
    }
    let all = start_with(Settings { cors_origins: vec!["*".to_string()], ..Settings::default() }, |_| ());
    let reply = send(&all, "POST", "https://other.example");
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("*")));
    let none = send(&start(), "POST", "https://app.example");
    assert_eq!((none.status, none.header("access-control-allow-origin")), (403, None), "nobody is named by default");
}

#[test]
fn a_proxy_may_pass_its_own_name_on() {
    let settings = Settings { allowed_hosts: vec!["llm.example".to_string()], ..Settings::default() };
    let server = start_with(settings, |_| ());
    let status = |host: &str, origin: &str| {
        let mut client = Client::connect(server.addr());
        client.request("GET", "/health", &[host, origin], b"");
        client.reply().status
    };
    assert_eq!(status("host: LLM.example:443", "x: y"), 200);
    assert_eq!(status("host: llm.example", "origin: https://llm.example"), 200, "a page of its own");
    assert_eq!(status("host: llm.example", "origin: https://evil.example"), 403);
    assert_eq!(status("host: other.example", "x: y"), 403);
    assert_eq!(status("host: sub.llm.example", "x: y"), 403);
}
