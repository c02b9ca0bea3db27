//! A server on the tiny model, and a client that sees every byte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use apr_engine::device::Device;
use apr_engine::scheduler::Limits;
use apr_engine::{Engine, EngineOptions, KvType};
use apr_server::{Model, Server, Settings, limits};
use serde_json::Value;

pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");
/// Longer than any test waits for what comes.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn engine() -> Engine {
    let device = Device::Cpu { n_threads: Some(2), isa: None };
    Engine::load(Path::new(TINY), EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(1024) }).unwrap()
}

/// A server with these settings and what `change` makes of the limits of four answers at a time.
pub fn start_with(settings: Settings, change: impl FnOnce(&mut Limits)) -> Server {
    let server = Server::bind("127.0.0.1", 0, settings).unwrap();
    let engine = engine();
    let mut limits = limits(&engine, 4, 16);
    change(&mut limits);
    server.answer_with(Model::start(engine, limits, vec!["other:1".to_string()]).unwrap());
    server
}

pub fn start() -> Server {
    start_with(Settings::default(), |_| ())
}

/// An answer as it came.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("every answer is UTF-8")
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in {:?}", self.text()))
    }

    /// The data of a stream's events; each is a JSON value, but the last.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let text = self.text();
        let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|json| serde_json::from_str(json).unwrap()).collect()
    }
}

impl Reply {
    /// The data of a stream whose events are named by their type; nothing marks its end.
    #[track_caller]
    pub fn named_events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        let read = |event: &str| {
            let (name, data) = event.split_once("\ndata: ").expect("a name and data");
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            data
        };
        self.text().split_terminator("\n\n").map(read).collect()
    }
}

/// A connection.
pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn connect(addr: SocketAddr) -> Client {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(BufReader::new(stream))
    }

    /// Writes; that the server does not listen any more is for the reading to tell.
    pub fn send(&mut self, bytes: &[u8]) {
        _ = self.0.get_mut().write_all(bytes);
    }

    pub fn request(&mut self, method: &str, path: &str, headers: &[&str], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\ncontent-length: {}\r\n", body.len());
        if !headers.iter().any(|h| h.starts_with("host:")) {
            head += "host: localhost\r\n";
        }
        headers.iter().for_each(|h| head += &format!("{h}\r\n"));
        self.send(&[head.as_bytes(), b"\r\n", body].concat());
    }

    /// The next line, without its end; `None` where the connection has ended.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.0.read_line(&mut line).unwrap() {
            0 => None,
            _ => Some(line.trim_end_matches(['\r', '\n']).to_string()),
        }
    }

    #[track_caller]
    pub fn reply(&mut self) -> Reply {
        let (status, headers) = self.head();
        let mut reply = Reply { status, headers, body: Vec::new() };
        if reply.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                reply.body.extend(chunk);
            }
        } else {
            let n = reply.header("content-length").map_or(0, |n| n.parse().unwrap());
            reply.body.resize(n, 0);
            self.0.read_exact(&mut reply.body).unwrap();
        }
        reply
    }

    #[track_caller]
    pub fn head(&mut self) -> (u16, Vec<(String, String)>) {
        let status = self.line().expect("an answer");
        let status = status.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        while let Some(line) = self.line().filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            headers.push((name.to_ascii_lowercase(), value.to_string()));
        }
        (status, headers)
    }

    /// The next chunk of a body; `None` after the last.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let n = usize::from_str_radix(&self.line().expect("a chunk"), 16).unwrap();
        let mut bytes = vec![0; n + 2];
        self.0.read_exact(&mut bytes).unwrap();
        bytes.truncate(n);
        (n > 0).then_some(bytes)
    }
}

pub fn get(server: &Server, path: &str) -> Reply {
    let mut client = Client::connect(server.addr());
    client.request("GET", path, &[], b"");
    client.reply()
}

/// Sends raw bytes as a body of JSON.
#[track_caller]
pub fn post_bytes(addr: SocketAddr, path: &str, body: &[u8]) -> Reply {
    let mut client = Client::connect(addr);
    client.request("POST", path, &["content-type: application/json"], body);
    client.reply()
}

#[track_caller]
pub fn post(server: &Server, path: &str, body: &Value) -> Reply {
    post_bytes(server.addr(), path, body.to_string().as_bytes())
}

/// Sends what is answered well.
#[track_caller]
pub fn ok(server: &Server, path: &str, body: &Value) -> Value {
    let reply = post(server, path, body);
    assert_eq!(reply.status, 200, "{body} gave {}", reply.text());
    reply.json()
}

/// Waits until something holds.
#[track_caller]
pub fn soon(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
