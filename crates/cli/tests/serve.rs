//! `apr serve run` as a process: where it listens, how it is stopped, and what it says when it cannot.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};

#[path = "support/apr.rs"]
mod apr;

fn serve(args: &[&str]) -> Child {
    let model = apr::tiny();
    let all = ["serve", "run", &model, "--threads", "1", "--ctx", "512"];
    apr::command(all.iter().chain(args)).spawn().expect("apr starts")
}

/// A server that listens, and where.
fn listening(args: &[&str]) -> (Child, BufReader<std::process::ChildStderr>, String) {
    let mut child = serve(args);
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("listening on ") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "it says where it listens");
    }
    let addr = line.trim().strip_prefix("listening on http://").unwrap().to_string();
    (child, err, addr)
}

fn post(addr: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\ncontent-length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
    stream
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap().success());
}

fn rest(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
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
    assert!(rest(err).starts_with("stopping"));
    assert_eq!(rest(child.stdout.take().unwrap()), "", "stdout is for nobody");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (mut child, mut err, addr) = listening(&["--port", "0"]);
    let mut running = post(&addr, r#"{"prompt":"Hello","max_tokens":400,"ignore_eos":true,"stream":true,"n":8}"#);
    running.read_exact(&mut [0; 12]).unwrap();
    signal(&child, "INT");
    let mut line = String::new();
    err.read_line(&mut line).unwrap();
    assert!(line.contains("a second signal ends them at once"), "{line}");
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
        let mut line = String::new();
        while !line.contains("keys") {
            line.clear();
            assert!(err.read_line(&mut line).unwrap() > 0);
        }
        assert!(line.contains(expected), "{line}");
    };
    assert_eq!((status("one"), status("two")), ("200".to_string(), "401".to_string()));
    hang_up("two\n", "read keys and certificate again");
    assert_eq!((status("one"), status("two")), ("401".to_string(), "200".to_string()));
    hang_up("", "holds no key");
    assert_eq!(status("two"), "200", "those in use stay");
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
