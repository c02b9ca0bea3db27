//! OpenAI's API over a socket: forms of answers, streams that equal whole answers, and what each field does.

use crate::support::*;
use apr_engine::tokenizer::Piece;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// A chat with these fields on top.
fn chat(fields: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 24, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn text_of(answer: &Value, index: usize) -> &str {
    answer["choices"][index]["message"]["content"].as_str().unwrap()
}

#[test]
fn health_and_models() {
    let server = start();
    assert_eq!(get(&server, "/health").json(), json!({"status": "ok"}));
    let models = get(&server, "/v1/models").json();
    let ids: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tiny-qwen3moe", "other:1"]);
    assert_eq!(
        (&models["data"][0]["max_model_len"], &models["data"][0]["aliases"]),
        (&json!(1024), &json!(["other:1"]))
    );
    assert_eq!(get(&server, "/v1/models/TINY-qwen3moe").json()["id"], "tiny-qwen3moe");
    assert_eq!(get(&server, "/v1/models/none").status, 404);
    for name in ["tiny", "other", "Other:1", "synthetic-qwen3moe"] {
        ok(&server, CHAT, &chat(json!({"model": name, "max_tokens": 1})));
    }
    let refused = post(&server, CHAT, &chat(json!({"model": "gpt-4"})));
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    assert!(refused.text().contains("tiny-qwen3moe"), "the name to use is told");
}

#[test]
fn before_the_model_is_there_clients_are_told_to_come_back() {
    let server = apr_server::Server::bind("127.0.0.1", 0, apr_server::Settings::default()).unwrap();
    let health = get(&server, "/health");
    assert_eq!((health.status, health.json()), (503, json!({"status": "loading"})));
    let refused = post(&server, CHAT, &chat(json!({})));
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
}

#[test]
fn a_whole_answer_has_openais_form() {
    let server = start();
    let answer = ok(&server, CHAT, &chat(json!({})));
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["model"], "tiny-qwen3moe");
    let choice = &answer["choices"][0];
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    assert_eq!((&choice["message"]["role"], &choice["logprobs"]), (&json!("assistant"), &Value::Null));
    let n_prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(n_prompt > 4);
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    assert_eq!(answer["usage"]["total_tokens"], n_prompt + 24);
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
    assert!(answer["timings"]["predicted_ms"].as_f64().unwrap() > 0.0);
}

/// Streams `body` and holds it to the whole answer.
#[track_caller]
fn streams_alike(server: &apr_server::Server, body: Value) {
    let whole = ok(server, CHAT, &body);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let reply = post(server, CHAT, &streamed);
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let mut events = reply.events();
    let last = events.pop().unwrap();
    assert_eq!(last["choices"], json!([]), "usage comes alone");
    assert!(last["timings"]["predicted_n"].is_u64());
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][count], whole["usage"][count], "{count}");
    }
    let choices = whole["choices"].as_array().unwrap();
    let (mut texts, mut logprobs) = (vec![String::new(); choices.len()], vec![Vec::new(); choices.len()]);
    let mut reasons = vec![Value::Null; choices.len()];
    for (i, event) in events.iter().enumerate() {
        assert_eq!((&event["object"], &event["id"]), (&json!("chat.completion.chunk"), &events[0]["id"]));
        assert_eq!(event.get("usage"), Some(&Value::Null));
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        assert_eq!(choice["delta"]["role"] == "assistant", i < choices.len(), "the role comes first: {event}");
        assert_eq!(reasons[index], Value::Null, "nothing comes after the reason");
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        logprobs[index].extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
        reasons[index] = choice["finish_reason"].clone();
    }
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!(texts[i], choice["message"]["content"], "{body}");
        assert_eq!(reasons[i], choice["finish_reason"]);
        let expected = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        assert_eq!(logprobs[i], expected);
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = start();
    streams_alike(&server, chat(json!({})));
    streams_alike(&server, chat(json!({"temperature": 1.5, "seed": 7, "logprobs": true, "top_logprobs": 3})));
    streams_alike(
        &server,
        chat(json!({"temperature": 1.0, "seed": -5, "n": 3, "top_k": 50, "top_p": 0.9, "min_p": 0.01})),
    );
    streams_alike(&server, chat(json!({"max_tokens": 0})));
    let text = text_of(&ok(&server, CHAT, &chat(json!({}))), 0).to_string();
    let stop: String = text.chars().skip(text.chars().count() / 2).take(2).collect();
    streams_alike(&server, chat(json!({"stop": [stop, "never comes"]})));
    let plain = post(&server, CHAT, &chat(json!({"stream": true}))).events();
    assert!(plain.iter().all(|e| e.get("usage").is_none()), "usage is for those who ask");
}

#[test]
fn counts_come_as_they_grow_where_they_are_asked_for() {
    let server = start();
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = post(&server, CHAT, &chat(json!({"stream": true, "stream_options": options}))).events();
    let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts[0] == 0 && *counts.last().unwrap() == 24, "{counts:?}");
    let n_prompt = &events.last().unwrap()["usage"]["prompt_tokens"];
    assert!(events.iter().all(|e| &e["usage"]["prompt_tokens"] == n_prompt));
    for path in [CHAT, "/v1/completions"] {
        let body = chat(json!({"prompt": "a", "stream_options": options}));
        let reply = post(&server, path, &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!("stream_options")));
    }
}

#[test]
fn fields_of_sampling_do_what_they_say() {
    let server = start();
    let greedy = ok(&server, CHAT, &chat(json!({})));
    let text = text_of(&greedy, 0);
    let whole: Vec<char> = text.chars().collect();
    let stop: String = whole[whole.len() / 2..].iter().take(2).collect();
    let stopped = ok(&server, CHAT, &chat(json!({"stop": stop.clone()})));
    assert_eq!(text_of(&stopped, 0), text.split(&stop).next().unwrap(), "up to the stop string");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");

    let two = ok(&server, CHAT, &chat(json!({"n": 2, "seed": 3, "temperature": 2.0})));
    let one = ok(&server, CHAT, &chat(json!({"seed": 4, "temperature": 2.0})));
    assert_ne!(text_of(&two, 0), text_of(&two, 1));
    assert_eq!(text_of(&two, 1), text_of(&one, 0), "each answer has the next seed");

    let none = ok(&server, CHAT, &chat(json!({"max_completion_tokens": 0})));
    assert_eq!((text_of(&none, 0), &none["usage"]["completion_tokens"]), ("", &json!(0)));
    let probs = ok(&server, CHAT, &chat(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 4})));
    let tokens = probs["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 4);
    for token in tokens {
        let best = token["top_logprobs"].as_array().unwrap();
        assert_eq!(best.len(), 2);
        assert_eq!(
            (&best[0]["token"], &best[0]["logprob"]),
            (&token["token"], &token["logprob"]),
            "greedy takes the best"
        );
        assert!(best[0]["logprob"].as_f64() >= best[1]["logprob"].as_f64());
    }
    // The biased token wins every time.
    let biased = json!({"prompt": "x", "max_tokens": 5, "logit_bias": {"65": 100}, "ignore_eos": true});
    let letters = server.model().unwrap().about().tokenizer.piece(65).repeat(5);
    assert_eq!(ok(&server, TEXT, &biased)["choices"][0]["text"], json!(letters));
}

#[test]
fn completions_take_texts_and_tokens() {
    let server = start();
    let tokens = server.model().unwrap().about().text_tokens(b"Once upon a time", false);
    let by_text = ok(&server, TEXT, &json!({"prompt": "Once upon a time", "ignore_eos": true}));
    assert_eq!((&by_text["object"], &by_text["usage"]["completion_tokens"]), (&json!("text_completion"), &json!(16)));
    let text = by_text["choices"][0]["text"].as_str().unwrap();
    let by_tokens = ok(&server, TEXT, &json!({"prompt": tokens, "ignore_eos": true}));
    assert_eq!(by_tokens["choices"][0]["text"], text);
    let several = json!({"prompt": ["Once upon a time", "Twice"], "n": 2, "ignore_eos": true, "echo": true});
    let several = ok(&server, TEXT, &several);
    assert_eq!(several["choices"].as_array().unwrap().len(), 4);
    assert_eq!(several["choices"][1]["text"], format!("Once upon a time{text}"));
    assert!(several["choices"][2]["text"].as_str().unwrap().starts_with("Twice"));
    let body = json!({"prompt": [tokens], "ignore_eos": true, "stream": true, "logprobs": 1, "echo": false});
    let events = post(&server, TEXT, &body).events();
    let joined: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(joined, text);
    assert_eq!(events.iter().filter(|e| !e["choices"][0]["logprobs"].is_null()).count(), 16);
}

#[test]
fn a_message_of_the_assistant_is_continued() {
    let server = start();
    let model = server.model().unwrap();
    let about = model.about();
    let question = json!({"role": "user", "content": "Hello there"});
    let mut prompt = about.chat_tokens(&about.chat_input(vec![question.clone()])).unwrap();
    prompt.extend(about.tokenizer.encode(&[Piece::Content("Well, ")]));
    let begun = chat(json!({"messages": [question, {"role": "assistant", "content": "Well, "}]}));
    let expected = ok(&server, TEXT, &json!({"prompt": prompt, "max_tokens": 24, "ignore_eos": true}));
    assert_eq!(text_of(&ok(&server, CHAT, &begun), 0), expected["choices"][0]["text"]);
}

#[test]
fn a_prefix_that_was_computed_is_counted() {
    let server = start();
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(200)}], "max_tokens": 2});
    let first = ok(&server, CHAT, &long);
    let again = ok(&server, CHAT, &long);
    assert_eq!(text_of(&first, 0), text_of(&again, 0));
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(&first), 0);
    assert!(cached(&again) >= again["usage"]["prompt_tokens"].as_u64().unwrap() / 2, "{again}");
}

#[test]
fn a_silent_stream_is_kept_alive() {
    let settings = apr_server::Settings { keep_alive: std::time::Duration::from_millis(1), ..Default::default() };
    let server = start_with(settings, |_| ());
    let body = json!({"messages": [{"role": "user", "content": "word ".repeat(480)}], "max_tokens": 2, "stream": true});
    let reply = post(&server, CHAT, &body);
    assert!(reply.text().contains(": keep-alive\n\n"), "{}", reply.text());
    assert!(!reply.events().is_empty());
}

/// The columns of a choice's logprobs.
fn columns(choice: &Value) -> [&Vec<Value>; 4] {
    ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|name| choice["logprobs"][name].as_array().unwrap())
}

#[test]
fn a_prompt_is_repeated_with_its_logprobs() {
    let server = start();
    let prompt = "Once upon a t\u{ee}me, \u{1f984}s";
    let body =
        json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true, "logprobs": 3, "temperature": 1.0, "seed": 3});
    let plain = ok(&server, TEXT, &body)["choices"][0].clone();
    let mut echoed = body.clone();
    echoed["echo"] = true.into();
    let answer = ok(&server, TEXT, &echoed);
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().unwrap();
    assert_eq!(text, format!("{prompt}{}", plain["text"].as_str().unwrap()));
    let [tokens, logprobs, best, offsets] = columns(choice);
    let n = tokens.len();
    let n_prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!((n, logprobs.len(), best.len(), offsets.len()), (n_prompt + 20, n, n, n));
    assert_eq!((&logprobs[0], &best[0], &offsets[0]), (&Value::Null, &Value::Null, &json!(0)));
    for (all, generated) in columns(choice).into_iter().zip(columns(&plain)).take(3) {
        assert_eq!(&all[n_prompt..], generated, "the answer is what it is without its prompt");
    }
    assert_eq!(offsets[n_prompt], prompt.chars().count(), "the answer begins where the prompt ends");
    assert!(offsets.is_sorted_by(|a, b| a.as_u64() <= b.as_u64()), "{offsets:?}");
    for (i, token) in tokens.iter().map(|t| t.as_str().unwrap()).enumerate() {
        let whole = !token.starts_with("bytes:") && !token.contains('\u{fffd}');
        let there: String = text.chars().skip(offsets[i].as_u64().unwrap() as usize).collect();
        assert!(!whole || i > n_prompt || there.starts_with(token), "{token:?} at {}", offsets[i]);
        let best = best[i].as_object().map_or(3, serde_json::Map::len);
        assert!((3..=4).contains(&best), "{best} alternatives");
    }
    let mut streamed = echoed.clone();
    streamed["stream"] = true.into();
    let events = post(&server, TEXT, &streamed).events();
    for (i, name) in ["tokens", "token_logprobs", "top_logprobs", "text_offset"].iter().enumerate() {
        let of = |e: &Value| e["choices"][0]["logprobs"][name].as_array().cloned().unwrap_or_default();
        assert_eq!(&events.iter().flat_map(of).collect::<Vec<_>>(), columns(choice)[i], "{name}");
    }
    let joined: String = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(joined, text);
}

#[test]
fn a_text_is_scored_as_it_was_generated() {
    let server = start();
    let body = json!({"prompt": "Once upon a time", "max_tokens": 90, "ignore_eos": true, "logprobs": 2,
        "temperature": 1.0, "seed": 5, "return_token_ids": true});
    let generated = ok(&server, TEXT, &body)["choices"][0].clone();
    let ids = |name: &str| generated[name].as_array().unwrap().clone();
    let all = [ids("prompt_token_ids"), ids("token_ids")].concat();
    let score = |fields: Value| {
        let mut body = json!({"prompt": [all, "Twice"], "max_tokens": 0, "logprobs": 2, "echo": true});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        ok(&server, TEXT, &body)
    };
    let scored = score(json!({}));
    assert_eq!(
        (&scored["usage"]["completion_tokens"], &scored["choices"][0]["finish_reason"]),
        (&json!(0), &json!("length"))
    );
    let n_prompt = ids("prompt_token_ids").len();
    let [tokens, logprobs, best, _] = columns(&scored["choices"][0]);
    let [.., expected_logprobs, expected_best, _] = columns(&generated);
    assert_eq!((tokens.len(), &logprobs[n_prompt..]), (all.len(), &expected_logprobs[..]), "to the last digit");
    assert_eq!(&best[n_prompt..], &expected_best[..]);
    let twice = &scored["choices"][1];
    assert_eq!((&twice["text"], &twice["logprobs"]["token_logprobs"][0]), (&json!("Twice"), &Value::Null));
    // Several answers have one prompt, and evaluations ask for a token more, which they drop.
    let two = score(json!({"n": 2, "max_tokens": 1, "ignore_eos": true}));
    for i in 0..2 {
        let [_, again, ..] = columns(&two["choices"][i]);
        assert_eq!((&again[..again.len() - 1], again.len()), (&logprobs[..], all.len() + 1));
    }
    let stream = json!({"prompt": "x", "max_tokens": 0, "logprobs": 0, "echo": true, "stream": true, "n": 2});
    let events = post(&server, TEXT, &stream).events();
    let texts: Vec<&str> = events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["x", "x", "", ""], "a prompt of one token has nothing to wait for: {events:?}");
}
