//! Many clients at once, clients that leave, and a server that is told to stop.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::*;
use apr_core::backend::faulty::{Fault, Faulty};
use apr_cpu::CpuBackend;
use apr_engine::session::{self, SessionSettings};
use apr_engine::{Engine, KvType};
use apr_server::{Model, Server, Settings, SystemLines};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn question(i: usize) -> Value {
    let content = format!("{} question number {i}", "some words before ".repeat(i * 3));
    let temperature = [0.0, 1.0, 1.5][i % 3];
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]);
    json!({"messages": messages, "max_tokens": 20 + i, "temperature": temperature, "seed": i, "ignore_eos": true})
}

/// A request whose answer takes as long as the context allows.
fn long(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "go on"}], "ignore_eos": true, "stream": stream, "temperature": 1})
}

/// Waits until nothing of any request is left.
#[track_caller]
fn is_free(server: &Server, n_places: usize) {
    let model = server.model().unwrap();
    soon("no request is being answered", || server.n_active() == 0);
    soon("all places are free", || model.n_free_places() == n_places);
    soon("no block of keys and values is in use", || {
        model.scheduler().with_engine(|engine| engine.session.n_kv_blocks()) == Some(0)
    });
}

#[test]
fn together_each_gets_what_it_gets_alone() {
    let server = start_with(Settings::default(), |limits| limits.n_parallel = 3);
    let alone: Vec<Value> = (0..9).map(|i| ok(&server, CHAT, &question(i))["choices"].take()).collect();
    let server = start_with(Settings::default(), |limits| limits.n_parallel = 3);
    std::thread::scope(|scope| {
        let send = |i| ok(&server, CHAT, &question(i))["choices"].take();
        let sent: Vec<_> = (0..9).map(|i| scope.spawn(move || send(i))).collect();
        for (i, answer) in sent.into_iter().enumerate() {
            assert_eq!(answer.join().unwrap(), alone[i], "question {i}");
        }
    });
}

#[test]
fn who_comes_too_many_is_told_to_come_back_at_once() {
    let server = start_with(Settings::default(), |limits| (limits.n_parallel, limits.n_queue) = (1, 1));
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(server.addr())).collect();
    for client in &mut clients {
        client.request("POST", CHAT, &[], long(true).to_string().as_bytes());
        assert_eq!(client.head().0, 200);
    }
    let refused = post(&server, CHAT, &question(0));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    let never = post(&server, CHAT, &json!({"messages": [{"role": "user", "content": "x"}], "n": 3}));
    assert_eq!((never.status, &never.json()["error"]["code"]), (400, &json!("too_many_answers")));
    for (path, n) in [("/v1/completions", "n"), ("/completion", "n_cmpl")] {
        let prompts = post(&server, path, &json!({"prompt": ["", ""], n: 2}));
        let code = &prompts.json()["error"]["code"];
        assert_eq!((prompts.status, code), (400, &json!("too_many_answers")), "before a prompt is looked at: {path}");
    }
    drop(clients);
    soon("room again", || post(&server, CHAT, &question(0)).status == 200);
}

#[test]
fn who_leaves_takes_everything_along() {
    let server = start_with(Settings::default(), |limits| {
        (limits.n_parallel, limits.n_queue, limits.keep_prefixes) = (4, 32, false);
    });
    let n_begun = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (server, n_begun) = (&server, &n_begun);
            scope.spawn(move || {
                for i in 0..25 {
                    // Spread over sending, waiting, prefill and decode.
                    let pause = Duration::from_micros((thread * 7919 + i * 104_729) % 60_000);
                    let body = match i % 3 {
                        0 => long(true),
                        1 => long(false),
                        _ => json!({"prompt": vec![9; 900], "n": 2, "max_tokens": 100, "ignore_eos": true}),
                    };
                    let path = if i % 3 == 2 { "/v1/completions" } else { CHAT };
                    let mut client = Client::connect(server.addr());
                    client.request("POST", path, &[], body.to_string().as_bytes());
                    std::thread::sleep(pause);
                    n_begun.fetch_add(usize::from(server.n_active() > 0), Ordering::Relaxed);
                }
            });
        }
    });
    assert!(n_begun.into_inner() > 50, "requests were being answered when their clients left");
    is_free(&server, 36);
    ok(&server, CHAT, &question(1));
    is_free(&server, 36);
}

#[test]
fn who_does_not_read_is_cut_off_and_others_go_on() {
    let settings = Settings { n_backlog: 8, write_time: Duration::from_millis(300), ..Settings::default() };
    let server = start_with(settings, |limits| limits.keep_prefixes = false);
    // Its answers are more than sockets hold: much is told of every token.
    let mut body = long(true);
    (body["n"], body["logprobs"], body["top_logprobs"]) = (json!(4), json!(true), json!(20));
    let mut deaf = Client::connect(server.addr());
    deaf.request("POST", CHAT, &[], body.to_string().as_bytes());
    soon("it is being answered", || server.n_active() == 1);
    ok(&server, CHAT, &question(2));
    is_free(&server, 20);
}

#[test]
fn a_server_that_stops_lets_answers_end() {
    let server = start();
    let addr = server.addr();
    let mut client = Client::connect(addr);
    let mut body = long(true);
    body["max_tokens"] = json!(900);
    client.request("POST", CHAT, &[], body.to_string().as_bytes());
    assert_eq!(client.head().0, 200);
    std::thread::scope(|scope| {
        let stopped = scope.spawn(move || server.stop());
        soon("it says that it stops", || {
            let mut health = Client::connect(addr);
            health.request("GET", "/health", &[], b"");
            let health = health.reply();
            (health.status, health.json()) == (503, json!({"status": "draining"}))
        });
        let refused = post_bytes(addr, CHAT, question(0).to_string().as_bytes());
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
        let mut text = Vec::new();
        while let Some(chunk) = client.chunk() {
            text.extend(chunk);
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("data: [DONE]\n\n") && text.contains(r#""finish_reason":"length""#), "{text}");
        stopped.join().unwrap();
    });
    assert!(std::net::TcpStream::connect(addr).is_err(), "nobody listens any more");
}

#[test]
fn answers_that_take_too_long_to_drain_are_ended_where_they_are() {
    let server = start_with(Settings { drain_time: Duration::from_millis(100), ..Settings::default() }, |_| ());
    let addr = server.addr();
    let sent = std::thread::spawn(move || post_bytes(addr, CHAT, long(false).to_string().as_bytes()));
    soon("it is being answered", || server.n_active() == 1);
    server.stop();
    let reply = sent.join().unwrap();
    assert_eq!((reply.status, &reply.json()["choices"][0]["finish_reason"]), (200, &json!("abort")));
}

#[test]
fn a_line_that_changes_keeps_nobody_from_sharing_once_it_is_left_out() {
    let cached = |lines: &[&str]| {
        let server = Server::bind("127.0.0.1", 0, Settings::default()).unwrap();
        let patterns: Vec<String> = lines.iter().map(|line| line.to_string()).collect();
        let engine = engine();
        let limits = apr_server::limits(&engine, 4, 16);
        let model = Model::start(engine, limits, Vec::new()).unwrap();
        server.answer_with(model.without(SystemLines::matching(&patterns).unwrap()));
        let ask = |id: usize| {
            let system = format!("x-billing-header: {id}\n{}", "Many words that stay as they are. ".repeat(12));
            let messages = json!([{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]);
            ok(&server, CHAT, &json!({"messages": messages, "max_tokens": 1}))["usage"].take()
        };
        let (_, second) = (ask(1), ask(2));
        let n_dropped = server.model().unwrap().system_lines().n_dropped();
        (
            second["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
            second["prompt_tokens"].as_u64().unwrap(),
            n_dropped,
        )
    };
    let (n_cached, n_prompt, n_dropped) = cached(&[]);
    assert!(n_cached < n_prompt / 2 && n_dropped == 0, "{n_cached} of {n_prompt}, as the prompts differ early");
    let (n_cached, n_prompt, n_dropped) = cached(&["^x-billing-header:"]);
    // Whole blocks of keys and values are shared.
    assert!(n_cached + 64 >= n_prompt && n_dropped == 2, "{n_cached} of {n_prompt} shared, {n_dropped} lines left out");
}

#[test]
fn an_engine_that_fails_ends_what_it_was_to_answer_and_is_unhealthy() {
    let server = start_with(Settings::default(), |limits| limits.n_parallel = 1);
    let mut clients: Vec<Client> = (0..2).map(|_| Client::connect(server.addr())).collect();
    for client in &mut clients {
        client.request("POST", CHAT, &[], long(false).to_string().as_bytes());
    }
    soon("both have been taken", || server.model().unwrap().n_free_places() == 1 + 16 - 2);
    let model = server.model().unwrap();
    let answer: Option<()> = model.scheduler().with_engine(|_| panic!("a fault of the engine"));
    assert!(answer.is_none());
    for client in &mut clients {
        let reply = client.reply();
        assert_eq!((reply.status, &reply.json()["error"]["code"]), (500, &json!("engine_error")));
    }
    soon("the server is unhealthy", || get(&server, "/health").status == 503);
    assert_eq!(get(&server, "/health").json(), json!({"status": "failed"}));
    let refused = post(&server, CHAT, &question(0));
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("the engine has failed"), "{}", refused.text());
}

#[test]
fn a_device_that_fails_ends_the_server_and_is_named() {
    let server = start_with(Settings::default(), |_| ());
    let (addr, model) = (server.addr(), server.model().unwrap());
    let fails = |engine: &mut Engine| {
        let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 1024 };
        let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::DeviceFails);
        engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    };
    model.scheduler().with_engine(fails).unwrap();
    let running = std::thread::spawn(move || server.run(|| (), |_| (), |_| ()));
    let mut client = Client::connect(addr);
    client.request("POST", CHAT, &[], long(false).to_string().as_bytes());
    let reply = client.reply();
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (500, &json!("engine_error")));
    assert!(reply.text().contains("a device failed: it does not answer"), "{}", reply.text());
    let error = running.join().unwrap().unwrap_err();
    assert!(error.to_string().starts_with("a device failed: it does not answer;"), "{error}");
}

#[test]
fn an_engine_that_fails_ends_the_server_too() {
    let server = start_with(Settings::default(), |limits| limits.n_parallel = 1);
    let model = server.model().unwrap();
    let mut client = Client::connect(server.addr());
    client.request("POST", CHAT, &[], long(false).to_string().as_bytes());
    soon("it has been taken", || model.n_free_places() == 1 + 16 - 1);
    let (is_told, hears) = std::sync::mpsc::channel();
    let running = std::thread::spawn(move || server.run(|| (), |_| is_told.send(()).unwrap(), |_| ()));
    let answer: Option<()> = model.scheduler().with_engine(|_| panic!("a fault of the engine"));
    assert!(answer.is_none());
    assert_eq!(client.reply().status, 500, "who waits is told");
    hears.recv_timeout(Duration::from_secs(20)).expect("it stops by itself");
    let error = running.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("the engine has failed"), "{error}");
}
