//! `apr serve run` as a process: where it listens, how it is stopped, and what it says when it cannot.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Child;

#[path = "support/apr.rs"]
mod apr;
#[path = "support/server.rs"]
mod server;

use server::{listening_child, post, rest, signal};

fn serve(args: &[&str]) -> Child {
    let model = apr::tiny();
    let all = ["serve", "run", &model, "--threads", "1", "--ctx", "512"];
    apr::command(all.iter().chain(args)).spawn().expect("apr starts")
}

/// A server that listens, and where.
fn listening(args: &[&str]) -> (Child, BufReader<std::process::ChildStderr>, String) {
    listening_child(serve(args))
}

/// Lines of stderr up to one that holds `word`, the last.
fn line_with(err: &mut impl BufRead, word: &str) -> String {
    let mut line = String::new();
    while !line.contains(word) {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "{word:?} is logged");
    }
    line
}

#[test]
fn it_answers_until_it_is_told_to_stop() {
    let (mut child, err, addr) = listening(&["--port", "0", "--alias", "small", "--parallel", "2"]);
    let answer = rest(post(&addr, r#"{"model":"small","prompt":"Hello","max_tokens":3,"ignore_eos":true}"#));
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(r#""completion_tokens":3"#), "{answer}");
    let mut running = post(&addr, r#"{"prompt":"Hello","max_tokens":300,"ignore_eos":true,"stream":true}"#);
    running.read_exact(&mut [0; 12]).unwrap();
    signal(&child, "TERM");
    let streamed = rest(running);
    assert!(streamed.contains("data: [DONE]"), "what has begun ends");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(rest(err).lines().any(|line| line.starts_with("stopping")), "it says so");
    assert_eq!(rest(child.stdout.take().unwrap()), "", "stdout is for nobody");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut child, mut err, addr) = listening(&["--port", "0"]);
    let mut running = post(&addr, r#"{"prompt":"Hello","max_tokens":400,"ignore_eos":true,"stream":true,"n":8}"#);
    running.read_exact(&mut [0; 12]).unwrap();
    signal(&child, "INT");
    line_with(&mut err, "a second signal ends them at once");
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn what_keeps_it_from_listening_is_said_before_the_model_is_loaded() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let run = |args: &[&str]| apr::finish(serve(args));
    run(&["--port", &port]).fails(4, &[&port, "--port"]);
    run(&["--host", "192.0.2.1", "--port", "0"]).fails(2, &["192.0.2.1"]);
    assert_eq!(run(&["--parallel", "0"]).code, Some(2));
}

#[test]
fn an_address_that_others_reach_needs_keys_or_consent() {
    let everywhere = ["--host", "0.0.0.0", "--port", "0"];
    let run = |args: &[&str]| apr::finish(serve(&[&everywhere, args].concat()));
    run(&[]).fails(2, &["0.0.0.0", "--api-key-file", "--insecure-no-auth"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let keys = ["--api-key-file", file.to_str().unwrap()];
    run(&keys).fails(1, &["keys"]);
    std::fs::write(&file, "# none\n").unwrap();
    run(&keys).fails(2, &["holds no key"]);
    let (mut child, _err, _) = listening(&[&everywhere[..], &["--insecure-no-auth"]].concat());
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_hangup_reads_the_keys_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "one\n").unwrap();
    let (mut child, mut err, addr) = listening(&["--port", "0", "--api-key-file", file.to_str().unwrap()]);
    let status = |key: &str| {
        let mut stream = TcpStream::connect(&addr).unwrap();
        let head = format!("GET /v1/models HTTP/1.1\r\nhost: {addr}\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        rest(stream)["HTTP/1.1 ".len()..][..3].to_string()
    };
    let mut hang_up = |text: &str, expected: &str| {
        std::fs::write(&file, text).unwrap();
        signal(&child, "HUP");
        line_with(&mut err, expected);
    };
    assert_eq!((status("one"), status("two")), ("200".to_string(), "401".to_string()));
    hang_up("two\n", "read keys and certificate again");
    assert_eq!((status("one"), status("two")), ("401".to_string(), "200".to_string()));
    hang_up("", "holds no key");
    assert_eq!(status("two"), "200", "those in use stay");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_log_has_a_line_for_each_request_and_neither_prompts_nor_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "my-own-key\n").unwrap();
    let keys = ["--api-key-file", file.to_str().unwrap()];
    let send = |addr: &str, head: &str, body: &str| {
        let mut stream = TcpStream::connect(addr).unwrap();
        let rest_of_head = format!("host: {addr}\r\nx-api-key: my-own-key\r\nx-request-id: mine\r\nconnection: close");
        let n = body.len();
        let head = format!("{head} HTTP/1.1\r\n{rest_of_head}\r\ncontent-length: {n}\r\n\r\n{body}");
        stream.write_all(head.as_bytes()).unwrap();
        rest(stream)
    };
    let body = r#"{"prompt":"very secret words","max_tokens":3,"ignore_eos":true}"#;
    let (mut child, mut err, addr) = listening(&[&["--port", "0"], &keys[..]].concat());
    send(&addr, "POST /v1/completions", body);
    let line = line_with(&mut err, "request");
    for part in [
        "INFO",
        "id=\"mine\"",
        "method=POST",
        "path=/v1/completions",
        "status=200",
        "model=\"tiny-qwen3moe\"",
        "generated_tokens=3",
        "finish=\"length\"",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    send(&addr, "POST /v1/embeddings", r#"{"input":[[5,6,7],[8,9]]}"#);
    let line = line_with(&mut err, "request");
    for part in ["model=\"tiny-qwen3moe\"", "prompt_tokens=5", "finish=\"stop\""] {
        assert!(line.contains(part), "{part} in {line}");
    }
    send(&addr, "GET /health", "");
    // What steers a terminal: CSI as one character, in UTF-8.
    send(&addr, "GET /\u{9b}31m", "");
    let line = line_with(&mut err, "request");
    assert!(
        line.contains("/\\u{9b}31m") && line.contains("status=404"),
        "/health is not logged, and nothing steers: {line}"
    );
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let all = rest(err);
    assert!(!all.contains("secret") && !all.contains("my-own-key"), "{all}");

    let (mut child, mut err, addr) = {
        let mut child = serve(&["--port", "0", "--log-format", "json", "-v"]);
        let mut err = BufReader::new(child.stderr.take().unwrap());
        let line: serde_json::Value = serde_json::from_str(&line_with(&mut err, "listening on")).unwrap();
        let addr = line["message"].as_str().unwrap().strip_prefix("listening on http://").unwrap().to_string();
        (child, err, addr)
    };
    send(&addr, "GET /health", "");
    send(&addr, "POST /v1/completions", body);
    let parse = |line: String| serde_json::from_str::<serde_json::Value>(&line).expect("every line is JSON");
    let health = parse(line_with(&mut err, "request"));
    assert_eq!((&health["level"], &health["path"]), (&"DEBUG".into(), &"/health".into()));
    let line = parse(line_with(&mut err, "request"));
    assert_eq!((&line["status"], &line["generated_tokens"], &line["id"]), (&200.into(), &3.into(), &"mine".into()));
    assert!(line["first_token_ms"].as_f64().unwrap() <= line["total_ms"].as_f64().unwrap(), "{line}");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_service_manager_hears_when_it_answers_and_when_it_stops() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let hear = || {
        let mut buf = [0; 200];
        let n = socket.recv(&mut buf).expect("news");
        String::from_utf8(buf[..n].to_vec()).unwrap()
    };
    let model = apr::tiny();
    let args = ["serve", "run", &model, "--threads", "1", "--ctx", "512", "--port", "0"];
    let (mut child, _err, addr) = listening_child(apr::command(args).env("NOTIFY_SOCKET", &path).spawn().unwrap());
    assert_eq!(hear().trim(), "READY=1");
    assert!(rest(post(&addr, r#"{"prompt":"x","max_tokens":1}"#)).starts_with("HTTP/1.1 200"));
    signal(&child, "HUP");
    assert!(hear().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(hear().trim(), "READY=1");
    signal(&child, "TERM");
    assert_eq!(hear().trim(), "STOPPING=1");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_is_refused_by_the_option_that_asks_for_it() {
    let run = |args: &[&str]| {
        let model = apr::tiny();
        apr::finish(apr::command(["serve", "run", &model, "--port", "0"].iter().chain(args)).spawn().unwrap())
    };
    run(&["--ctx", "1000000000"]).fails(2, &["--ctx 1000000000"]);
    run(&["--threads", "0"]).fails(2, &["0 threads"]);
    run(&["--threads", "1000000"]).fails(2, &["1000000 threads"]);
    run(&["--drop-system-line", "("]).fails(2, &["--drop-system-line"]);
    for args in [
        ["--request-timeout", "soon"],
        ["--request-timeout", "nan"],
        ["--shutdown-timeout", "1e30"],
        ["--cors-origin", "app.example"],
        ["--tls-cert", "only-a-certificate"],
        ["--log-format", "xml"],
    ] {
        let done = run(&args);
        assert!(done.code == Some(2) && done.err.contains(args[0]), "{done:?}");
    }
}

#[test]
fn a_plan_tells_memory_and_speed_from_the_header() {
    let model = apr::tiny();
    let plan = |args: &[&str]| apr::apr(["serve", "plan", &model, "--threads", "1"].iter().chain(args));
    let json = plan(&["--ctx", "512", "--parallel", "4", "--read-gb-per-s", "10", "--json"]).json();
    assert_eq!(json["schema"], "apr.serve-plan/1");
    let memory = &json["memory"];
    let n = |name: &str| memory[name].as_u64().unwrap();
    assert_eq!(n("weights"), std::fs::metadata(&model).unwrap().len());
    assert_eq!(n("kv"), 4 * n("kv_of_a_context"));
    assert_eq!(n("total"), n("weights") + n("kv") + n("activations"));
    let alone = &json["speed"]["decode_at_most"][0];
    let expected = 1e10 / alone["bytes_per_step"].as_f64().unwrap();
    assert!((alone["tok_per_s"].as_f64().unwrap() / expected - 1.0).abs() < 1e-9, "{json}");
    assert!(json["refused"].is_null());
    // How fast a machine reads may be said once for all plans on it.
    let mut told = apr::command(["serve", "plan", &model, "--threads", "1", "--ctx", "512"]);
    let text = apr::finish(told.env("APR_READ_GB_PER_S", "10").spawn().unwrap()).answer();
    assert!(text.contains("reading 10.0 GB/s (as given)"), "{text}");
    let text = plan(&["--ctx", "512"]).answer();
    for part in
        ["weights", "keys and values", "8 whole contexts of 512", "(measured)", "reading a prompt of 512 tokens"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    plan(&["--ctx", "1000000000"]).fails(2, &["--ctx 1000000000"]);
}
