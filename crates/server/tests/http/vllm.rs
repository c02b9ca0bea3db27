//! Fields that vLLM's server adds to OpenAI's API.

use crate::support::*;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn text(fields: Value) -> Value {
    let mut body = json!({"prompt": "Hello there", "max_tokens": 12, "ignore_eos": true, "return_token_ids": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn chat(fields: Value) -> Value {
    let mut body = text(fields);
    body["prompt"].take();
    if body.get("messages").is_none() {
        body["messages"] = json!([{"role": "user", "content": "Hello there"}]);
    }
    body
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn ids_of_tokens_are_told_where_they_are_asked_for() {
    let server = start();
    let prompt = ok(&server, "/tokenize", &json!({"prompt": "Hello there"}));
    let whole = ok(&server, TEXT, &text(json!({"n": 2})));
    for choice in whole["choices"].as_array().unwrap() {
        assert_eq!((&choice["prompt_token_ids"], ids(&choice["token_ids"]).len()), (&prompt["tokens"], 12));
    }
    let mut streamed = Vec::new();
    for (i, event) in post(&server, TEXT, &text(json!({"stream": true}))).events().iter().enumerate() {
        let choice = &event["choices"][0];
        assert_eq!(choice["prompt_token_ids"], if i == 0 { prompt["tokens"].clone() } else { Value::Null });
        streamed.extend(ids(&choice["token_ids"]));
    }
    assert_eq!(streamed, ids(&whole["choices"][0]["token_ids"]));
    let whole = ok(&server, CHAT, &chat(json!({})));
    assert_eq!(ids(&whole["prompt_token_ids"]).len() as u64, whole["usage"]["prompt_tokens"].as_u64().unwrap());
    let events = post(&server, CHAT, &chat(json!({"stream": true}))).events();
    assert_eq!(events[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    assert!(events[1..].iter().all(|e| e.get("prompt_token_ids").is_none()));
    let told = events.iter().filter_map(|e| e["choices"][0].get("token_ids"));
    assert_eq!(told.flat_map(ids).collect::<Vec<_>>(), ids(&whole["choices"][0]["token_ids"]));
    let unasked = ok(&server, CHAT, &chat(json!({"return_token_ids": false}))).to_string();
    assert!(!unasked.contains("token_ids") && !unasked.contains("stop_reason"), "{unasked}");
}

#[test]
fn tokens_end_an_answer_that_are_named() {
    let server = start();
    let choice = |path: &str, body: Value| ok(&server, path, &body)["choices"][0].clone();
    let tokens = ids(&choice(TEXT, text(json!({})))["token_ids"]);
    let at = (3..12).find(|i| !tokens[..*i].contains(&tokens[*i])).unwrap();
    let ended = choice(TEXT, text(json!({"stop_token_ids": [tokens[at]]})));
    assert_eq!((&ended["finish_reason"], &ended["stop_reason"]), (&json!("stop"), &json!(tokens[at])));
    assert_eq!(ids(&ended["token_ids"]), tokens[..at]);
    let shown = choice(TEXT, text(json!({"stop_token_ids": [tokens[at]], "include_stop_str_in_output": true})));
    assert_eq!(ids(&shown["token_ids"]), tokens[..=at]);
    assert!(shown["text"].as_str().unwrap().len() > ended["text"].as_str().unwrap().len());
    let late = choice(TEXT, text(json!({"stop_token_ids": [tokens[at]], "min_tokens": 12})));
    assert_eq!((&late["finish_reason"], ids(&late["token_ids"]).len()), (&json!("length"), 12));
    let whole = choice(CHAT, chat(json!({})))["message"]["content"].as_str().unwrap().to_string();
    let stop: String = whole.chars().skip(6).take(3).collect();
    for shown in [false, true] {
        let body = chat(json!({"stop": stop, "include_stop_str_in_output": shown}));
        let ended = choice(CHAT, body.clone());
        let content = ended["message"]["content"].as_str().unwrap();
        assert_eq!((content.contains(&stop), &ended["stop_reason"]), (shown, &json!(stop)), "{ended}");
        let mut body = body;
        body["stream"] = true.into();
        let events = post(&server, CHAT, &body).events();
        let streamed: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(streamed, content);
        assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], stop);
    }
}

#[test]
fn what_no_answer_can_end_at_is_refused() {
    let server = start();
    for (fields, param) in [
        (json!({"stop_token_ids": [99_999]}), "stop_token_ids"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids[0]"),
        (json!({"min_tokens": 13}), "min_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"include_stop_str_in_output": "yes"}), "include_stop_str_in_output"),
    ] {
        let refused = post(&server, TEXT, &text(fields));
        assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some(param)));
    }
    for body in [text(json!({"prompt": [99_999]})), text(json!({"logit_bias": {"99999": 1}}))] {
        let message = post(&server, TEXT, &body).text();
        assert!(message.contains("99999") && message.contains("vocabulary") && message.contains("2048"), "{message}");
    }
}

#[test]
fn halves_of_characters_are_kept_apart() {
    let server = start();
    let logprobs = &ok(&server, TEXT, &text(json!({"logprobs": 20})))["choices"][0]["logprobs"];
    for best in logprobs["top_logprobs"].as_array().unwrap() {
        assert!((20..=21).contains(&best.as_object().unwrap().len()), "{best}");
    }
    assert!(logprobs.to_string().contains(r#""bytes:\\x"#), "{logprobs}");
}

#[test]
fn tokens_of_prompts_are_told_with_their_logprobs() {
    let server = start();
    let words = "word and ".repeat(80);
    let check = |told: &Value, ids: &Value, columns: &Value, n_best: usize| {
        let (told, ids) = (told.as_array().unwrap(), self::ids(ids));
        assert_eq!((told.len(), &told[0]), (ids.len(), &Value::Null));
        for (i, entry) in told.iter().enumerate().skip(1) {
            let entry = entry.as_object().unwrap();
            let own = &entry[&ids[i].to_string()];
            let rank = own["rank"].as_u64().unwrap() as usize;
            assert_eq!(entry.len(), n_best + usize::from(rank > n_best), "{entry:?}");
            let mut ranks: Vec<u64> = entry.values().map(|e| e["rank"].as_u64().unwrap()).collect();
            ranks.sort_unstable();
            assert!(ranks.iter().zip(1..).take(n_best).all(|(rank, i)| *rank == i), "{ranks:?}");
            assert_eq!(own["logprob"], columns["token_logprobs"][i], "as echo tells it");
            let token = server.model().unwrap().about().tokenizer.piece(ids[i] as u32);
            assert_eq!(own["decoded_token"], token);
            let better = entry.values().filter(|e| e["logprob"].as_f64() > own["logprob"].as_f64()).count();
            assert!(better < rank && (rank > n_best || better + 1 == rank), "{entry:?}");
        }
    };
    for n_best in [0, 3] {
        let echo = text(json!({"prompt": words, "echo": true, "logprobs": 1, "max_tokens": 0}));
        let echo = ok(&server, TEXT, &echo)["choices"][0].clone();
        let fields = json!({"prompt": [words, "Hello"], "n": 2, "prompt_logprobs": n_best});
        let answer = ok(&server, TEXT, &text(fields));
        for choice in &answer["choices"].as_array().unwrap()[..2] {
            check(&choice["prompt_logprobs"], &choice["prompt_token_ids"], &echo["logprobs"], n_best);
        }
        let plain = ok(&server, TEXT, &text(json!({"prompt": words})));
        assert_eq!(plain["choices"][0]["text"], answer["choices"][0]["text"], "the answer is the same");
        assert!(!plain.to_string().contains("prompt_logprobs"));
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "all positions are computed");
    }
    let body = json!({"messages": [{"role": "user", "content": words}], "prompt_logprobs": 2, "n": 2});
    let answer = ok(&server, CHAT, &chat(body));
    let echo = json!({"prompt": answer["prompt_token_ids"], "echo": true, "logprobs": 1, "max_tokens": 0});
    let echo = ok(&server, TEXT, &echo)["choices"][0].clone();
    check(&answer["prompt_logprobs"], &answer["prompt_token_ids"], &echo["logprobs"], 2);
}

#[test]
fn logprobs_of_prompts_have_limits() {
    let server = start();
    for (path, fields, message) in [
        (TEXT, json!({"prompt_logprobs": 21}), "expected a number from 0 to 20, got 21"),
        (CHAT, json!({"prompt_logprobs": -1}), "expected a number from 0 to 20, got -1"),
        (TEXT, json!({"prompt_logprobs": "all"}), "invalid type"),
        (TEXT, json!({"prompt_logprobs": 1, "stream": true}), "expected stream to be false, got true"),
        (CHAT, json!({"prompt_logprobs": 0, "stream": true}), "expected stream to be false, got true"),
        (TEXT, json!({"prompt_logprobs": 20, "prompt": vec![vec![5; 1000]; 13]}), "expected at most 262144 logprobs"),
    ] {
        let body = if path == TEXT { text(fields) } else { chat(fields) };
        let refused = post(&server, path, &body);
        let error = refused.json()["error"].clone();
        assert_eq!((refused.status, error["param"].as_str()), (400, Some("prompt_logprobs")), "{error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    }
}

#[test]
fn a_prompt_is_cut_where_that_is_asked_for() {
    let server = start();
    let prompt = "one and two and three and four ".repeat(60);
    let all = ok(&server, "/tokenize", &json!({"prompt": prompt}))["tokens"].as_array().unwrap().clone();
    let with = |n: i64| ok(&server, TEXT, &text(json!({"prompt": prompt, "truncate_prompt_tokens": n, "echo": true})));
    let cut = &with(7)["choices"][0];
    assert_eq!(cut["prompt_token_ids"].as_array().unwrap(), &all[all.len() - 7..]);
    let same = ok(&server, TEXT, &text(json!({"prompt": all[all.len() - 7..], "echo": true})));
    assert_eq!(cut["text"], same["choices"][0]["text"]);
    assert_eq!(with(100_000)["choices"][0]["prompt_token_ids"], Value::from(all.clone()));
    let long = json!({"prompt": prompt.repeat(3), "truncate_prompt_tokens": -1, "max_tokens": 24});
    assert_eq!(ok(&server, TEXT, &text(long))["usage"]["prompt_tokens"], 1000, "beside 24 tokens of answer");
    let cut = ok(&server, CHAT, &chat(json!({"truncate_prompt_tokens": 5})));
    let whole = ok(&server, CHAT, &chat(json!({})));
    let of = |answer: &Value| ids(&answer["prompt_token_ids"]);
    assert_eq!(of(&cut), of(&whole)[of(&whole).len() - 5..]);
    let endless = json!({"prompt": prompt.repeat(30), "truncate_prompt_tokens": 5});
    for (path, body, param, message) in [
        (TEXT, text(json!({"truncate_prompt_tokens": 0})), "truncate_prompt_tokens", "expected -1, for as many as fit"),
        (CHAT, chat(json!({"truncate_prompt_tokens": -2})), "truncate_prompt_tokens", "got -2"),
        (TEXT, text(endless), "", "the context holds 1024"),
    ] {
        let refused = post(&server, path, &body);
        let error = refused.json()["error"].clone();
        assert_eq!((refused.status, error["param"].as_str().unwrap_or_default()), (400, param), "{error}");
        assert!(error["message"].as_str().unwrap().contains(message), "{error}");
    }
}
