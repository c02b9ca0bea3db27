//! Answers that are held to a schema, an expression or a grammar, and calls of tools that have to be made. The weights are random,
//! so that whatever is valid was made so.

use crate::support::*;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 200, "temperature": 1.0, "seed": 7});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn person() -> Value {
    json!({"type": "object", "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130}}, "required": ["name", "age"], "additionalProperties": false})
}

fn schema(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "it", "strict": true, "schema": schema}})
}

#[track_caller]
fn is_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(value["name"].is_string() && value["age"].as_u64().unwrap() <= 130, "{text}");
    assert_eq!(value.as_object().unwrap().len(), 2);
    assert_eq!(value.to_string(), text, "no white space");
}

#[test]
fn every_way_to_ask_gives_what_is_asked_for() {
    let server = start();
    for fields in [
        json!({"response_format": schema(person())}),
        json!({"response_format": {"type": "json_object", "schema": person()}}),
        json!({"response_format": {"type": "json_schema", "schema": person()}}),
        json!({"json_schema": person()}),
        json!({"guided_json": person().to_string()}),
        json!({"structured_outputs": {"json": person()}, "grammar": ""}),
    ] {
        let choice = &ok(&server, CHAT, &chat(fields.clone()))["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{fields}");
        is_person(choice["message"]["content"].as_str().unwrap());
        let mut body = fields;
        body.as_object_mut()
            .unwrap()
            .extend([("prompt".to_string(), json!("x")), ("max_tokens".to_string(), json!(200))]);
        is_person(ok(&server, TEXT, &body)["choices"][0]["text"].as_str().unwrap());
    }
    for (fields, texts) in [
        (json!({"response_format": {"type": "regex", "regex": "(ab|ba)!"}}), ["ab!", "ba!"]),
        (json!({"guided_regex": "ab/|ba/"}), ["ab/", "ba/"]),
        (json!({"response_format": {"type": "grammar", "grammar": "start: \"yes\" | \"no\""}}), ["yes", "no"]),
        (json!({"grammar": "start: \"yes\" | \"no\""}), ["yes", "no"]),
        (json!({"grammar": "root ::= yes | \"no\"\nyes ::= \"y\" [e] \"s\"{1}"}), ["yes", "no"]),
        (json!({"structured_outputs": {"grammar": "root ::= \"a ::= \" | \"b\""}}), ["a ::= ", "b"]),
        (json!({"grammar": "start: \"a ::= \" | \"b\""}), ["a ::= ", "b"]),
        (json!({"structured_outputs": {"choice": ["yes", "n\"o"]}}), ["yes", "n\"o"]),
    ] {
        for seed in 0..3 {
            let mut body = chat(fields.clone());
            body["seed"] = seed.into();
            let answer = ok(&server, CHAT, &body);
            let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
            assert!(texts.contains(&text), "{text} for {fields}");
        }
    }
    let any = ok(&server, CHAT, &chat(json!({"response_format": {"type": "text"}, "max_tokens": 3})));
    assert_eq!(any["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_stream_is_the_whole_answer_in_pieces() {
    let server = start();
    let fields = json!({"response_format": schema(person()), "logprobs": true, "top_logprobs": 2, "ignore_eos": true});
    let whole = ok(&server, CHAT, &chat(fields.clone()));
    let mut body = chat(fields);
    body["stream"] = true.into();
    let events = post(&server, CHAT, &body).events();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
    is_person(&text);
    let best = |token: &Value| token["top_logprobs"][0]["logprob"].as_f64().unwrap();
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(tokens.iter().any(|t| t["logprob"].as_f64().unwrap() < best(t)), "the model's own distribution is told");
}

#[test]
fn answers_in_a_batch_are_the_answers_alone() {
    let server = start();
    let bodies: Vec<Value> = (0..6)
        .map(|i| {
            let format = match i % 3 {
                0 => json!({"response_format": schema(person())}),
                1 => json!({"response_format": {"type": "regex", "regex": "[a-z]{5,30}"}}),
                _ => json!({"max_tokens": 30}),
            };
            let mut body = chat(format);
            body["seed"] = i.into();
            body
        })
        .collect();
    let text = |answer: Value| answer["choices"][0]["message"]["content"].as_str().unwrap().to_string();
    let alone: Vec<String> = bodies.iter().map(|body| text(ok(&server, CHAT, body))).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let asked: Vec<_> = bodies.iter().map(|body| scope.spawn(|| text(ok(&server, CHAT, body)))).collect();
        asked.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
    let several = ok(&server, CHAT, &chat(json!({"response_format": schema(person()), "n": 3})));
    let texts: Vec<&str> =
        several["choices"].as_array().unwrap().iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    texts.iter().for_each(|text| is_person(text));
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "each has its own seed: {texts:?}");
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": person()}})
}

#[test]
fn calls_that_are_asked_for_are_made() {
    let server = start();
    let tools = json!([tool("first"), tool("second")]);
    let second = json!({"type": "function", "function": {"name": "second"}});
    let only = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [second]}});
    for (choice, parallel, may_call) in [
        (json!("required"), true, vec!["first", "second"]),
        (json!("required"), false, vec!["first", "second"]),
        (second.clone(), true, vec!["second"]),
        (only, false, vec!["second"]),
    ] {
        let fields = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 400});
        let whole = ok(&server, CHAT, &chat(fields.clone()));
        let made = &whole["choices"][0];
        let calls = made["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{whole}"));
        if made["finish_reason"] == "length" {
            continue;
        }
        assert_eq!((&made["finish_reason"], &made["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        assert!(calls.len() == 1 || parallel && may_call.len() == 2, "{calls:?}");
        for call in calls {
            assert!(may_call.contains(&call["function"]["name"].as_str().unwrap()), "{call}");
            let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            is_person(&arguments.to_string());
        }
        let mut body = chat(fields);
        body["stream"] = true.into();
        let streamed: String = post(&server, CHAT, &body)
            .events()
            .iter()
            .filter_map(|e| e.pointer("/choices/0/delta/tool_calls/0/function/arguments")?.as_str().map(str::to_string))
            .collect();
        let joined: String = calls.iter().map(|c| c["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(streamed, joined);
    }
    let either =
        ok(&server, CHAT, &chat(json!({"tools": tools, "response_format": schema(person()), "max_tokens": 400})));
    let message = &either["choices"][0]["message"];
    assert!(
        message["tool_calls"].is_array() || serde_json::from_str::<Value>(message["content"].as_str().unwrap()).is_ok()
    );
}

#[test]
fn calls_that_a_model_makes_by_itself_are_those_of_strict_tools() {
    let server = start();
    let mut strict = tool("first");
    strict["function"]["strict"] = true.into();
    let said = json!([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well. <tool_call>"}]);
    let mut n_whole = 0;
    for seed in 0..4 {
        let fields = json!({"tools": [strict], "messages": said, "parallel_tool_calls": false, "seed": seed});
        let choice = &ok(&server, CHAT, &chat(fields))["choices"][0];
        if choice["finish_reason"] == "length" {
            continue;
        }
        n_whole += 1;
        let calls = choice["message"]["tool_calls"].as_array().unwrap_or_else(|| panic!("{choice}"));
        let arguments: Value = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!((calls.len(), &choice["finish_reason"]), (1, &json!("tool_calls")));
        is_person(&arguments.to_string());
    }
    assert!(n_whole > 1, "{n_whole} calls ended");
    let text = ok(&server, CHAT, &chat(json!({"tools": [strict], "max_tokens": 12})));
    assert!(text["choices"][0]["message"]["content"].is_string(), "text alone is an answer too: {text}");
    // What no answer can be held to is refused where it is to be held, and only there.
    strict["function"]["parameters"] =
        json!({"type": "object", "properties": {"list": {"type": "array", "uniqueItems": true}}});
    let refused = post(&server, CHAT, &chat(json!({"tools": [strict]})));
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")), "{}", refused.text());
    strict["function"]["strict"] = false.into();
    assert_eq!(post(&server, CHAT, &chat(json!({"tools": [strict], "max_tokens": 3}))).status, 200);
}

#[test]
fn what_cannot_be_kept_is_refused_and_harms_nobody() {
    let server = start();
    let mut large = person();
    large["description"] = "x".repeat(1 << 20).into();
    let deep = (0..60).fold(json!({"type": "null"}), |inner, _| json!({"items": inner}));
    for (fields, code, says) in [
        (json!({"response_format": schema(large)}), "invalid_schema", "at most 262144"),
        (
            json!({"response_format": schema(json!({"type": "array", "uniqueItems": true}))}),
            "invalid_schema",
            "uniqueItems",
        ),
        (json!({"response_format": schema(json!({"type": "string", "pattern": "(?=a)"}))}), "invalid_schema", "look"),
        (json!({"response_format": schema(json!({"type": "void"}))}), "invalid_schema", "void"),
        (json!({"response_format": {"type": "regex", "regex": "("}}), "invalid_schema", "unclosed"),
        (json!({"response_format": {"type": "regex", "regex": ""}}), "invalid_value", "not empty"),
        (json!({"response_format": {"type": "grammar", "grammar": "root ::= a"}}), "invalid_schema", "no rule \"a\""),
        (json!({"grammar": "root ::= \"a\"\nroot = \"b\""}), "invalid_schema", "line 2: expected ::="),
        (json!({"response_format": {"type": "xml"}}), "invalid_value", "json_schema"),
        (json!({"response_format": {"type": "json_schema"}}), "invalid_value", "json_schema: is missing"),
        (json!({"response_format": "json"}), "invalid_value", "expected an object"),
        (json!({"guided_json": "{", "max_tokens": 3}), "invalid_value", "not JSON"),
        (json!({"guided_choice": []}), "invalid_value", "list of strings"),
        (json!({"structured_outputs": "json"}), "invalid_value", "expected an object"),
        (json!({"structured_outputs": {"structural_tag": "{}"}}), "unsupported_value", "structural_tag"),
        (json!({"guided_choice": ["a"], "guided_regex": "a"}), "invalid_value", "already"),
        (
            json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
            "invalid_value",
            "\"b\"",
        ),
    ] {
        let start = std::time::Instant::now();
        let refused = post(&server, CHAT, &chat(fields.clone()));
        assert_eq!(refused.status, 400, "{fields:.200} gave {}", refused.text());
        let error = &refused.json()["error"];
        assert_eq!(error["code"], code, "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert!(error["param"].is_string(), "{error}");
        assert!(start.elapsed().as_secs() < 3, "{fields:.200}");
    }
    let recursive = json!({"$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/n"},
        "maxItems": 2}]}}, "$ref": "#/$defs/n"});
    for fine in [recursive, deep] {
        let answer = ok(&server, CHAT, &chat(json!({"response_format": schema(fine), "max_tokens": 100})));
        assert!(answer["choices"][0]["message"]["content"].is_string());
    }
}
