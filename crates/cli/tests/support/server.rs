//! A server as a process, and one request to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command};

/// A server that listens, what it says from then on, and where.
pub fn listening_child(mut child: Child) -> (Child, BufReader<std::process::ChildStderr>, String) {
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("listening on ") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "it says where it listens");
    }
    let addr = line.trim().strip_prefix("listening on http://").unwrap().to_string();
    (child, err, addr)
}

/// Sends a request for a completion, whose answer is what can be read.
pub fn post(addr: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\ncontent-length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
    stream
}

/// Sends a signal, `TERM` for example.
pub fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap().success());
}

/// What is left to read.
pub fn rest(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}
