//! Who is answered: keys.

use std::net::SocketAddr;
use std::path::Path;

use crate::support::*;
use apr_server::{Keys, Server, Settings};
use serde_json::json;

const TEXT: &str = "/v1/completions";

fn keys(api: &str, admin: &str) -> Keys {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    Keys::read(Some(&write("api", api)), Some(&write("admin", admin))).unwrap()
}

fn start_with_keys() -> Server {
    start_with(Settings { keys: keys("first\nsecond\n", "admin\n"), ..Settings::default() }, |_| ())
}

fn send(addr: SocketAddr, method: &str, path: &str, header: &str) -> Reply {
    let mut client = Client::connect(addr);
    client.request(method, path, &[header], br#"{"prompt":"x","max_tokens":1}"#);
    client.reply()
}

/// Paths as they are written in the source of the router, so that none that is added can be forgotten here.
fn all_paths() -> Vec<String> {
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/routes.rs")).unwrap();
    let paths = source.split(".route(").skip(1).map(|rest| {
        let path = rest.trim_start().strip_prefix('"').expect("a path is written where it is routed");
        path.split('"').next().unwrap().replace("{*", "").replace(['{', '}'], "")
    });
    paths.collect()
}

#[test]
fn without_a_key_there_is_health_and_the_page_and_nothing_else() {
    let server = start_with_keys();
    let paths = all_paths();
    assert!(paths.iter().any(|p| p == TEXT) && paths.len() >= 5, "{paths:?}");
    let is_open = |path: &str| {
        ["/health", "/v1/health", "/ping", "/", "/favicon.ico"].contains(&path) || path.starts_with("/page/")
    };
    for path in paths.iter().map(String::as_str).chain(["/v1/nothing", "/health/x", "/page", "//health"]) {
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS"] {
            let reply = send(server.addr(), method, path, "x: y");
            let is_refused = reply.status == 401;
            assert_eq!(is_refused, !(is_open(path) && method == "GET"), "{method} {path} gave {}", reply.status);
        }
    }
}

#[test]
fn a_key_is_taken_in_either_header_and_a_refusal_tells_nothing() {
    let server = start_with_keys();
    for key in ["authorization: Bearer first", "authorization: bearer second", "x-api-key: second", "x-api-key: admin"]
    {
        assert_eq!(send(server.addr(), "POST", TEXT, key).status, 200, "{key}");
    }
    for key in ["authorization: Bearer firs", "authorization: Basic Zmlyc3Q=", "x-api-key:", "authorization: first"] {
        let reply = send(server.addr(), "POST", TEXT, key);
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, Some("Bearer")), "{key}");
        let error = &reply.json()["error"];
        assert_eq!((&error["type"], &error["code"]), (&json!("authentication_error"), &json!("invalid_api_key")));
        assert!(!reply.text().contains("tiny") && !reply.text().contains("firs"), "{}", reply.text());
    }
    // Nobody waits for a body that will not be read.
    let mut client = Client::connect(server.addr());
    client.send(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n");
    assert_eq!(client.reply().status, 401);
}

#[test]
fn keys_can_be_changed_while_it_answers() {
    let server = start_with_keys();
    server.set_keys(keys("third\n", "admin\n"));
    assert_eq!(send(server.addr(), "POST", TEXT, "x-api-key: first").status, 401);
    assert_eq!(send(server.addr(), "POST", TEXT, "x-api-key: third").status, 200);
}
