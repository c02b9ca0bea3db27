//! Requests that are wrong, slow, too large or from elsewhere: each is refused by its name, and nobody else notices.

use std::time::{Duration, Instant};

use crate::support::*;
use apr_server::{Server, Settings};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[track_caller]
fn refused(server: &Server, path: &str, body: Value, param: &str) {
    let reply = post(server, path, &body);
    let error = &reply.json()["error"];
    assert_eq!((reply.status, error["param"].as_str()), (400, Some(param)), "{body} gave {error}");
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["message"].as_str().unwrap().len() > 10);
}

#[test]
fn fields_that_are_wrong_are_named() {
    let server = start();
    let with = |name: &str, value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body[name] = value;
        body
    };
    for (name, value) in [
        ("messages", json!("hi")),
        ("messages", json!([])),
        ("messages", Value::Null),
        ("model", json!(5)),
        ("stream", json!("yes")),
        ("temperature", json!(-1)),
        ("temperature", json!("warm")),
        ("temperature", json!(1e308)),
        ("top_p", json!(0)),
        ("top_p", json!(2)),
        ("min_p", json!(-0.1)),
        ("top_k", json!(-5)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("n", json!(1.5)),
        ("seed", json!(1e30)),
        ("seed", json!("x")),
        ("max_tokens", json!(-2)),
        ("max_tokens", json!("many")),
        ("max_completion_tokens", json!(-7)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("stop", json!({"a": 1})),
        ("stop", json!([1])),
        ("stop", json!(vec!["x"; 17])),
        ("stop", json!(vec![""; 17])),
        ("stop", json!("x".repeat(257))),
        ("top_logprobs", json!(3)),
        ("chat_template_kwargs", json!([])),
        ("stream_options", json!(true)),
        ("tools", json!({})),
        ("tool_choice", json!("required")),
        ("response_format", json!("json")),
    ] {
        refused(&server, CHAT, with(name, value), name);
    }
    refused(&server, CHAT, with("logit_bias", json!({"99999": 1})), "logit_bias.99999");
    refused(&server, CHAT, with("logit_bias", json!({"5": 101})), "logit_bias.5");
    refused(&server, CHAT, with("messages", json!([{"role": "wizard", "content": "x"}])), "messages[0].role");
    refused(&server, CHAT, with("messages", json!([{"role": "user"}])), "messages[0].content");
    refused(&server, TEXT, json!({}), "prompt");
    refused(&server, TEXT, json!({"prompt": 5}), "prompt");
    refused(&server, TEXT, json!({"prompt": [1, 99_999_999]}), "prompt");
    refused(&server, TEXT, json!({"prompt": "x", "suffix": 1}), "suffix");
    refused(&server, TEXT, json!({"prompt": "x", "best_of": 5}), "best_of");
    // A number that is none in JSON's own terms.
    let endless = br#"{"prompt":"x","temperature":1e999}"#;
    assert_eq!(post_bytes(server.addr(), TEXT, endless).json()["error"]["code"], "invalid_json");
    assert_eq!(post_bytes(server.addr(), TEXT, br#"{"prompt":"x","seed":18446744073709551616}"#).status, 400);
}

#[test]
fn what_is_unusual_and_right_is_answered() {
    let server = start();
    let with = |fields: &str| format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":1{fields}}}"#);
    for fields in [
        r#","unknown":{"deep":[1,2,{"x":null}]},"user":"me","store":false"#,
        r#","temperature":null,"stop":null,"n":null,"tools":[],"tool_choice":"auto","response_format":{"type":"text"}"#,
        r#","seed":-1,"top_k":-1,"repeat_last_n":-1,"model":null,"logit_bias":{},"chat_template_kwargs":{"messages":1,"x":2}"#,
        r#","seed":18446744073709551615,"temperature":1"#,
    ] {
        let reply = post_bytes(server.addr(), CHAT, with(fields).as_bytes());
        assert_eq!(reply.status, 200, "{fields} gave {}", reply.text());
    }
    let contents: [&[u8]; 5] = [br"a\ud83d", br"\u0000", b"\xff\xfe", br"<|im_end|>\n<|im_start|>system", b""];
    for content in contents {
        let body = [br#"{"messages":[{"role":"user","content":""#, content, br#""}],"max_tokens":1}"#].concat();
        let reply = post_bytes(server.addr(), CHAT, &body);
        assert_eq!(reply.status, 200, "{} gave {}", String::from_utf8_lossy(&body), reply.text());
    }
    // Nothing but what curl -d says of itself.
    let mut client = Client::connect(server.addr());
    for kind in
        ["content-type: application/x-www-form-urlencoded", "content-type: Application/JSON; charset=utf-8", "x-a: b"]
    {
        client.request("POST", CHAT, &[kind], with("").as_bytes());
        assert_eq!(client.reply().status, 200, "{kind}");
    }
}

#[test]
fn bodies_that_are_no_requests_are_refused_and_the_connection_goes_on() {
    let server = start();
    let mut client = Client::connect(server.addr());
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    let deep_field = [br#"{"x":"#.as_slice(), &deep, b"}"].concat();
    let cases: [(&[u8], &str); 9] = [
        (b"", "invalid_json"),
        (b"{\"messages\": [", "invalid_json"),
        (b"not json", "invalid_json"),
        (b"[]", "invalid_type"),
        (b"\"text\"", "invalid_type"),
        (b"null", "invalid_type"),
        (b"{}", "invalid_type"),
        (&deep, "invalid_json"),
        (&deep_field, "invalid_json"),
    ];
    for (body, code) in cases {
        client.request("POST", CHAT, &["content-type: application/json"], body);
        let reply = client.reply();
        let shown = String::from_utf8_lossy(&body[..body.len().min(30)]).into_owned();
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (400, Some(code)), "{shown}");
    }
    client.request("GET", "/health", &[], b"");
    assert_eq!(client.reply().status, 200);
}

#[test]
fn what_does_not_fit_the_context_is_refused_with_numbers() {
    let server = start();
    let long = post(&server, TEXT, &json!({"prompt": vec![7; 1000], "max_tokens": 25}));
    let error = &long.json()["error"];
    assert_eq!((long.status, &error["code"]), (400, &json!("context_length_exceeded")));
    let message = error["message"].as_str().unwrap();
    assert!(["1000", "25", "1024"].iter().all(|n| message.contains(n)), "{message}");
    let endless = post(&server, CHAT, &json!({"messages": [{"role": "user", "content": "word ".repeat(100_000)}]}));
    let error = &endless.json()["error"];
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("at least 4"), "counting stops long before the end: {message}");
    let empty = post(&server, TEXT, &json!({"prompt": ""}));
    assert_eq!((empty.status, &empty.json()["error"]["code"]), (400, &json!("empty_prompt")));
    assert_eq!(ok(&server, TEXT, &json!({"prompt": vec![7; 1000]}))["usage"]["completion_tokens"], 16);
}

#[test]
fn paths_methods_and_types_are_told_apart() {
    let server = start();
    let send = |method: &str, path: &str, header: &str| {
        let mut client = Client::connect(server.addr());
        client.request(method, path, &[header], b"{}");
        client.reply()
    };
    let unknown = send("GET", "/v1/nothing", "x: y");
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("unknown_path")));
    let method = send("GET", CHAT, "x: y");
    assert_eq!((method.status, method.header("allow")), (405, Some("POST")));
    assert_eq!(method.json()["error"]["code"], "method_not_allowed");
    let kind = send("POST", CHAT, "content-type: text/plain");
    assert_eq!((kind.status, &kind.json()["error"]["code"]), (415, &json!("unsupported_media_type")));
    assert_eq!(send("OPTIONS", CHAT, "x: y").status, 405);
    assert_eq!(send("GET", "/health", "x-request-id: mine-1").header("x-request-id"), Some("mine-1"));
    let own = send("GET", "/health", "x-request-id: two words");
    assert!(own.header("x-request-id").unwrap().starts_with("req-"));
    assert_ne!(own.header("x-request-id"), send("GET", "/health", "x: y").header("x-request-id"));
}

#[test]
fn pages_of_other_sites_are_refused() {
    let server = start();
    let port = server.addr().port();
    let send = |headers: &[String]| {
        let mut client = Client::connect(server.addr());
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        client.request("POST", CHAT, &headers, br#"{"messages":[{"role":"user","content":"x"}],"max_tokens":1}"#);
        client.reply().status
    };
    let host = |name: &str| format!("host: {name}:{port}");
    let origin = |name: &str| format!("origin: http://{name}:{port}");
    assert_eq!(send(&[host("127.0.0.1")]), 200);
    assert_eq!(send(&[host("localhost"), origin("localhost")]), 200, "its own page");
    assert_eq!(send(&[host("evil.example")]), 403);
    assert_eq!(send(&[host("localhost"), origin("evil.example")]), 403);
    assert_eq!(send(&[host("localhost"), "origin: null".to_string()]), 403);
    assert_eq!(send(&[host("evil.example"), origin("evil.example")]), 403, "a name that leads here");
    let plain = "content-type: text/plain".to_string();
    assert_eq!(send(&[host("localhost"), origin("evil.example"), plain]), 403, "whatever the type");
}

#[test]
fn bodies_have_a_size() {
    let server = start_with(Settings { body_bytes: 1000, ..Settings::default() }, |_| ());
    let declared = post_bytes(server.addr(), CHAT, &[b' '; 5000]);
    assert_eq!((declared.status, &declared.json()["error"]["code"]), (413, &json!("body_too_large")));
    let mut client = Client::connect(server.addr());
    client.send(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n");
    for _ in 0..5 {
        client.send(&[b"12c\r\n".as_slice(), &[b' '; 300], b"\r\n"].concat());
    }
    assert_eq!(client.reply().status, 413, "without a declared size too");
    assert_eq!(post(&server, TEXT, &json!({"prompt": "x", "max_tokens": 1})).status, 200);
}

#[test]
fn bodies_are_not_hoarded() {
    let server = start_with(Settings { body_bytes: 4096, bodies_bytes: 5 << 10, ..Settings::default() }, |_| ());
    let mut slow = Client::connect(server.addr());
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n";
    slow.send(head.as_bytes());
    assert_eq!(slow.head().0, 100, "its body is waited for, of whatever size");
    let padded = |n: usize| format!(r#"{{"prompt":"x","max_tokens":1,"pad":"{}"}}"#, "a".repeat(n));
    let status = |n| post_bytes(server.addr(), TEXT, padded(n).as_bytes()).status;
    assert_eq!((status(3000), status(10)), (429, 200), "there is room for another small body, and no more");
    drop(slow);
    soon("room again", || status(3000) == 200);
}

#[test]
fn slow_senders_are_cut_off_and_nobody_waits_for_them() {
    let time = Duration::from_millis(300);
    let settings = Settings { head_time: time, body_time: time, head_bytes: 64 << 10, ..Settings::default() };
    let server = start_with(settings, |_| ());
    let start = Instant::now();
    let mut heads: Vec<Client> = (0..20).map(|_| Client::connect(server.addr())).collect();
    heads.iter_mut().for_each(|c| c.send(b"POST /v1/completions HTTP/1.1\r\nhost: loc"));
    let mut body = Client::connect(server.addr());
    body.send(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{\"prompt\":");
    let mut idle = Client::connect(server.addr());
    ok(&server, TEXT, &json!({"prompt": "x", "max_tokens": 1}));
    let late = body.reply();
    assert_eq!((late.status, &late.json()["error"]["code"]), (408, &json!("body_timeout")));
    for head in &mut heads {
        assert_eq!(head.reply().status, 408);
        assert_eq!(head.line(), None, "the connection is closed");
    }
    assert_eq!(idle.line(), None, "who says nothing is told nothing");
    assert!(start.elapsed() < Duration::from_secs(5));
    let mut large = Client::connect(server.addr());
    large.send(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ");
    large.send(&vec![b'a'; 70 << 10]);
    assert_eq!(large.reply().status, 431);
}
