//! Answers by random weights that are valid all the same, and what is refused.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use apr_core::backend::faulty::{Fault, Faulty};
use apr_cpu::CpuBackend;
use serde_json::json;

use super::*;
use crate::device::Device;
use crate::generate::{Ends, Finish, GenerateError, Generated, Request, generate};
use crate::output_parser::{Event, OutputParser, Thinking};
use crate::sampler::{SamplerConfig, SamplerError};
use crate::session::{self, SessionSettings};
use crate::{Engine, EngineOptions, KvType};

/// What takes a tenth of this on an idle machine.
const PATIENCE: Duration = Duration::from_secs(4);
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

fn engine() -> Engine {
    let device = Device::Cpu { n_threads: Some(2), isa: None };
    Engine::load(Path::new(TINY), EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(1024) }).unwrap()
}

fn only(form: Form) -> Grammar {
    Grammar { thought: Thought::None, forms: vec![form] }
}

fn compile(engine: &Engine, form: Form) -> Result<Constraint, ConstraintError> {
    engine.constraints.compile(&only(form), "")
}

fn request(constraint: Constraint, temperature: f32, seed: u64) -> Request {
    Request {
        prompt: vec![5, 6, 7, 5, 6, 7],
        max_tokens: Some(300),
        sampler: SamplerConfig { temperature, seed: Some(seed), ..SamplerConfig::default() },
        stop: Vec::new(),
        ignore_eos: false,
        ends: Ends::default(),
        show_control: false,
        speculate: true,
        embed: false,
        constraint: Some(constraint),
        n_best: None,
        n_best_of_prompt: None,
        show_progress: false,
        show_experts: false,
        trace: None,
    }
}

fn run(engine: &mut Engine, request: &Request) -> Generated {
    generate(engine, request, &AtomicBool::new(false), &mut |_| ()).unwrap()
}

/// Answers by random weights, with several seeds and temperatures.
fn answers(engine: &mut Engine, grammar: &Grammar) -> Vec<Generated> {
    let constraint = engine.constraints.compile(grammar, "").unwrap();
    let ways = [(0.0, 0), (0.7, 1), (1.0, 2), (1.0, 3), (3.0, 4), (3.0, 5)];
    ways.iter().map(|&(t, seed)| run(engine, &request(constraint.clone(), t, seed))).collect()
}

/// What is wrong with a value, by the keywords that these tests use.
fn wrong(value: &Value, schema: &Value, root: &Value) -> Option<String> {
    let at = |key: &str| schema.get(key);
    let list = |key: &str| schema.get(key).and_then(Value::as_array).map(Vec::as_slice);
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    if let Some(to) = at("$ref") {
        return wrong(value, root.pointer(to.as_str().unwrap().strip_prefix('#').unwrap()).unwrap(), root);
    }
    let is_type = |name: &str| match name {
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "boolean" => value.is_boolean(),
        _ => value.is_null(),
    };
    let size = match value {
        Value::String(text) => text.chars().count(),
        Value::Array(items) => items.len(),
        _ => 0,
    } as f64;
    let checks = [
        ("type", at("type").is_none_or(|t| is_type(t.as_str().unwrap()))),
        ("const", at("const").is_none_or(|c| c == value)),
        ("enum", list("enum").is_none_or(|l| l.contains(value))),
        ("anyOf", list("anyOf").is_none_or(|l| l.iter().any(|s| wrong(value, s, root).is_none()))),
        ("minimum", number("minimum").is_none_or(|n| value.as_f64().unwrap() >= n)),
        ("maximum", number("maximum").is_none_or(|n| value.as_f64().unwrap() <= n)),
        ("minLength", number("minLength").is_none_or(|n| size >= n)),
        ("maxLength", number("maxLength").is_none_or(|n| size <= n)),
        ("minItems", number("minItems").is_none_or(|n| size >= n)),
        ("maxItems", number("maxItems").is_none_or(|n| size <= n)),
        ("required", list("required").is_none_or(|l| l.iter().all(|k| value.get(k.as_str().unwrap()).is_some()))),
    ];
    if let Some((name, _)) = checks.iter().find(|(_, ok)| !ok) {
        return Some(format!("{name} of {schema} is not kept by {value}"));
    }
    let inner = |(key, part): (&String, &Value)| match schema["properties"].get(key) {
        Some(schema) => wrong(part, schema, root),
        None if at("additionalProperties") == Some(&json!(false)) => Some(format!("{key} is not a property")),
        None => None,
    };
    let of_fields = value.as_object().and_then(|fields| fields.iter().find_map(inner));
    let of_items = at("items").and_then(|s| value.as_array()?.iter().find_map(|part| wrong(part, s, root)));
    of_fields.or(of_items)
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "mood": {"enum": ["happy", "sad", null, 7]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3}
        },
        "required": ["name", "age", "mood", "tags"],
        "additionalProperties": false
    })
}

fn tree() -> Value {
    json!({
        "$defs": {"node": {
            "type": "object",
            "properties": {
                "value": {"type": "boolean"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
            },
            "required": ["value", "next"],
            "additionalProperties": false
        }},
        "$ref": "#/$defs/node"
    })
}

#[test]
fn random_weights_write_what_a_schema_allows() {
    let mut engine = engine();
    for schema in [person(), tree(), json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 4})] {
        let mut n_whole = 0;
        for answer in answers(&mut engine, &only(Form::Json(schema.clone()))) {
            if answer.finish == Finish::Length {
                continue;
            }
            n_whole += 1;
            let value: Value = serde_json::from_str(&answer.text).unwrap_or_else(|e| panic!("{e}: {}", answer.text));
            assert_eq!(wrong(&value, &schema, &schema), None, "{}", answer.text);
            assert_eq!(answer.finish, Finish::Stop);
        }
        assert!(n_whole >= 3, "{n_whole} of 6 answers ended by themselves: {schema}");
    }
}

#[test]
fn without_the_mask_nothing_is_valid() {
    let mut engine = engine();
    let asked = request(compile(&engine, Form::Json(person())).unwrap(), 1.0, 1);
    let free = run(&mut engine, &Request { constraint: None, ..asked });
    assert!(serde_json::from_str::<Value>(&free.text).is_err(), "random weights write no JSON: {}", free.text);
}

#[test]
fn numbers_that_are_none_do_not_hide_behind_the_mask() {
    let mut engine = engine();
    let asked = request(compile(&engine, Form::Json(person())).unwrap(), 1.0, 1);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 1024 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::NanInAttention);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let broken = generate(&mut engine, &asked, &AtomicBool::new(false), &mut |_| ());
    assert!(matches!(broken, Err(GenerateError::Sampler(SamplerError::NotFinite { .. }))), "{broken:?}");
}

#[test]
fn json_has_no_white_space() {
    let mut engine = engine();
    let schema = json!({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": [2, 3]}},
        "required": ["a", "b"], "additionalProperties": false});
    for answer in answers(&mut engine, &only(Form::Json(schema.clone()))) {
        assert_eq!((answer.text.as_str(), answer.finish), ("{\"a\":1,\"b\":[2,3]}", Finish::Stop));
    }
}

#[test]
fn expressions_grammars_and_choices_hold() {
    let mut engine = engine();
    for answer in answers(&mut engine, &only(Form::Regex("[a-c]{2,4}/[0-9]".to_string()))) {
        let (letters, digit) = answer.text.split_once('/').unwrap();
        assert!((2..=4).contains(&letters.len()) && letters.bytes().all(|b| (b'a'..=b'c').contains(&b)), "{letters}");
        assert!(digit.len() == 1 && digit.as_bytes()[0].is_ascii_digit(), "{digit}");
    }
    let lark = "start: \"[\" word (\",\" word)? \"]\"\nword: /x+y{1,3}/\n";
    for answer in answers(&mut engine, &only(Form::Lark(lark.to_string()))) {
        let is_cut = answer.finish == Finish::Length;
        assert!(is_cut || (answer.text.starts_with("[x") && answer.text.ends_with("y]")), "{}", answer.text);
    }
    let choice = Form::Choice(vec!["yes".to_string(), "no \"way\"".to_string()]);
    for answer in answers(&mut engine, &only(choice)) {
        assert!(["yes", "no \"way\""].contains(&answer.text.as_str()), "{}", answer.text);
    }
}

#[test]
fn the_end_of_a_grammar_is_the_end_of_the_answer() {
    let mut engine = engine();
    let open = compile(&engine, Form::Regex("[a-z ]+".to_string())).unwrap();
    let answer = run(&mut engine, &Request { ignore_eos: true, max_tokens: Some(20), ..request(open, 1.0, 1) });
    assert_eq!((answer.finish, answer.tokens.len()), (Finish::Length, 20), "it could go on");
    let closed = compile(&engine, Form::Regex("ok".to_string())).unwrap();
    let answer = run(&mut engine, &Request { ignore_eos: true, ..request(closed.clone(), 1.0, 1) });
    assert_eq!((answer.finish, answer.text.as_str()), (Finish::Stop, "ok"));
    let answer = run(&mut engine, &Request { stop: vec!["k".to_string()], ..request(closed.clone(), 1.0, 1) });
    assert_eq!((answer.finish, answer.text.as_str()), (Finish::Stop, "o"));
    let answer = run(&mut engine, &Request { max_tokens: Some(0), ..request(closed, 1.0, 1) });
    assert_eq!((answer.finish, answer.text.as_str()), (Finish::Length, ""));
}

#[test]
fn what_is_told_of_tokens_is_the_models_own_distribution() {
    let mut engine = engine();
    let constraint = compile(&engine, Form::Choice(vec!["yes".to_string()])).unwrap();
    let biased = vec![(3, 50.0), (4, -50.0)];
    let mut asked = request(constraint, 1.0, 1);
    asked.sampler = SamplerConfig { logit_bias: biased, repetition_penalty: 1.3, top_k: 5, ..asked.sampler };
    assert_eq!(run(&mut engine, &asked).text, "yes", "neither bias nor penalties nor filters lead out");
}

#[test]
fn guessing_changes_nothing() {
    let mut engine = engine();
    let schema =
        json!({"type": "array", "items": {"enum": ["alpha beta gamma", "delta"]}, "minItems": 12, "maxItems": 12});
    let constraint = compile(&engine, Form::Json(schema)).unwrap();
    for seed in 0..3 {
        let asked = request(constraint.clone(), 0.8, seed);
        let guessed = run(&mut engine, &asked);
        let plain = run(&mut engine, &Request { speculate: false, ..asked });
        assert_eq!(guessed.tokens, plain.tokens);
        assert!(serde_json::from_str::<Value>(&plain.text).unwrap().as_array().unwrap().len() == 12);
    }
}

#[test]
fn a_thought_comes_before_what_is_constrained() {
    let mut engine = engine();
    let form = Form::Choice(vec!["yes".to_string()]);
    let grammar = |thought| Grammar { thought, forms: vec![form.clone()] };
    let opened = engine.constraints.compile(&grammar(Thought::Opened), "I know</think>\n\n").unwrap();
    assert_eq!(run(&mut engine, &request(opened, 1.0, 1)).text.trim_start(), "yes");
    let may = engine.constraints.compile(&grammar(Thought::May), "<think>I </think>").unwrap();
    let text = run(&mut engine, &request(may, 1.0, 1)).text;
    assert_eq!(text.trim_start(), "yes");
    let may = engine.constraints.compile(&grammar(Thought::May), "").unwrap();
    let text = run(&mut engine, &request(may, 1.0, 1)).text;
    assert!(text.starts_with("<think>") || text == "yes", "{text}");
    let thinking = engine.constraints.compile(&grammar(Thought::Opened), "").unwrap();
    let answer = run(&mut engine, &request(thinking, 1.0, 1));
    assert_eq!(answer.finish, Finish::Length, "it thinks for ever: {}", answer.text);
}

#[test]
fn an_answer_that_has_begun_goes_on_by_the_grammar() {
    let mut engine = engine();
    let schema = only(Form::Json(json!({"type": "array", "items": {"const": 10}, "minItems": 2, "maxItems": 2})));
    let constraint = engine.constraints.compile(&schema, "[1").unwrap();
    assert_eq!(run(&mut engine, &request(constraint, 1.0, 1)).text, "0,10]");
    for begun in ["{", "[10,10]", "x"] {
        assert_eq!(engine.constraints.compile(&schema, begun).unwrap_err(), ConstraintError::Begun);
    }
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

/// Calls that the parser finds in an answer, all of which are complete, and nothing beside them.
fn parsed(text: &str, tools: &[Value]) -> Vec<(String, Value)> {
    let mut parser = OutputParser::new(tools, Thinking::Split);
    let mut calls: Vec<(String, String)> = Vec::new();
    for event in parser.push(text).into_iter().chain(parser.finish()) {
        match event {
            Event::ToolCallBegin { name, .. } => calls.push((name, String::new())),
            Event::ToolCallArguments { delta, .. } => calls.last_mut().unwrap().1.push_str(&delta),
            Event::ToolCallEnd { complete, .. } => assert!(complete, "{text}"),
            Event::Content(_) | Event::Reasoning(_) => panic!("not a call: {event:?} in {text}"),
        }
    }
    let json = |text: &str| serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    calls.into_iter().map(|(name, arguments)| (name, json(&arguments))).collect()
}

#[test]
fn calls_are_those_of_the_tools_in_either_form() {
    let mut engine = engine();
    let flags = json!({"$defs": {"flag": {"type": "object", "properties": {"on": {"type": "boolean"}},
        "required": ["on"], "additionalProperties": false}}, "type": "object", "properties": {
        "which": {"type": "string", "enum": ["left", "right"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$", "maxLength": 6},
        "maybe": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
        "mixed": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 0, "maximum": 9}]},
        "flag": {"$ref": "#/$defs/flag"}
    }, "required": ["which", "code", "mixed", "flag"], "additionalProperties": false});
    let tools =
        [tool("person", person()), tool("flags", flags), json!({"type": "function", "function": {"name": "none"}})];
    let mut seen = std::collections::BTreeSet::new();
    for form in [ToolForm::Xml, ToolForm::Hermes] {
        for only_one in [true, false] {
            for answer in answers(
                &mut engine,
                &only(Form::Calls(Calls { form, tools: tools.to_vec(), only_one, amid_text: false })),
            ) {
                if answer.finish == Finish::Length {
                    continue;
                }
                let calls = parsed(&answer.text, &tools);
                assert!(!calls.is_empty() && (!only_one || calls.len() == 1), "{}", answer.text);
                for (name, arguments) in calls {
                    let called = tools.iter().find(|t| t["function"]["name"] == *name).unwrap();
                    let schema = &called["function"]["parameters"];
                    assert_eq!(wrong(&arguments, schema, schema), None, "{}", answer.text);
                    seen.insert((form == ToolForm::Xml, name));
                }
            }
        }
    }
    assert!(seen.len() >= 4, "{seen:?}");
}

fn amid_text(form: ToolForm, tools: &[Value], only_one: bool) -> Grammar {
    only(Form::Calls(Calls { form, tools: tools.to_vec(), only_one, amid_text: true }))
}

#[test]
fn calls_amid_text_are_those_of_strict_tools() {
    let mut engine = engine();
    let mut strict = tool("person", person());
    strict["function"]["strict"] = true.into();
    let tools = [strict];
    let mut n_whole = 0;
    for (form, begun) in [
        (ToolForm::Xml, "Let me see. <tool_call>"),
        (ToolForm::Xml, "<think>Should I? <function="),
        (ToolForm::Hermes, "Let me see.\n\n<tool_call>"),
        (ToolForm::Hermes, "<think>Well, <tool_call>\n"),
    ] {
        let grammar = Grammar { thought: Thought::Opened, ..amid_text(form, &tools, true) };
        let constraint = engine.constraints.compile(&grammar, begun).unwrap();
        for (t, seed) in [(0.0, 0), (0.7, 1), (1.0, 2), (1.0, 3), (3.0, 4), (3.0, 5)] {
            let answer = run(&mut engine, &request(constraint.clone(), t, seed));
            if answer.finish == Finish::Length {
                continue;
            }
            n_whole += 1;
            let call = &format!("{begun}{}", answer.text)[begun.rfind('<').unwrap()..];
            let [(name, arguments)] = &parsed(call, &tools)[..] else { panic!("one call: {call}") };
            assert_eq!((name.as_str(), wrong(arguments, &person(), &person())), ("person", None), "{call}");
        }
    }
    assert!(n_whole > 12, "{n_whole} answers ended by themselves");
}

#[test]
fn text_around_calls_is_free_and_so_are_tools_that_are_not_strict() {
    let engine = engine();
    let mut strict = tool("person", person());
    strict["function"]["strict"] = true.into();
    let tools = [strict, tool("any", person())];
    let (end, logits) = (engine.tokenizer.eos().unwrap() as usize, vec![0.0; engine.hparams.n_vocab]);
    // Whether an answer may begin with a text, and whether it may end after it.
    let begins = |form: ToolForm, only_one: bool, text: &str| {
        let mut constraint = engine.constraints.compile(&amid_text(form, &tools, only_one), "").unwrap();
        let tokens = engine.tokenizer.encode_text(text, false);
        let n = constraint.n_allowed(&tokens);
        tokens[..n].iter().for_each(|token| constraint.advance(*token).unwrap());
        let ends = constraint.is_complete() || constraint.mask(&logits, false).unwrap()[end].is_finite();
        (n == tokens.len(), ends)
    };
    let xml = "<tool_call>\n<function=any>\n<parameter=age>\nold\n</parameter>\n</function>\n</tool_call>";
    let hermes = "<tool_call>\n{\"name\": \"any\", \"arguments\": {\"age\": \"old\"}}\n</tool_call>";
    for (form, call) in [(ToolForm::Xml, xml), (ToolForm::Hermes, hermes)] {
        for text in ["", "<think>a < b</think>\n\n{\"x\": 1} <b>é</b> <tool_ <functio", call] {
            assert_eq!(begins(form, false, text), (true, true), "{text}");
        }
        assert_eq!(begins(form, false, &format!("a {call}\n{call} b")), (true, true));
        assert!(begins(form, true, &format!("a {call}")).0);
        assert!(!begins(form, true, &format!("a {call} b")).0, "there is one call only");
        let (half, _) = call.split_at(call.len() - 5);
        assert_eq!(begins(form, false, half), (true, false), "a call that has begun has to end");
        assert!(!begins(form, false, &call.replace("any", "person")).0, "its age is a number");
        assert!(!begins(form, false, &call.replace("any", "nobody")).0, "there is no such tool");
    }
    assert!(begins(ToolForm::Xml, false, "a <function=any>\n</function> b").0, "the outer tag may be forgotten");
    assert!(!begins(ToolForm::Hermes, false, "a <function=any>").0, "what would be read as a call is one of the form");
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    let engine = engine();
    let refusal = |form: Form| {
        let start = Instant::now();
        let e = compile(&engine, form).unwrap_err().to_string();
        assert!(start.elapsed() < PATIENCE, "{:?}: {e:.200}", start.elapsed());
        e
    };
    let schema = |schema: Value| refusal(Form::Json(schema));
    for (keyword, with) in [
        ("uniqueItems", json!({"type": "array", "uniqueItems": true})),
        ("not", json!({"not": {"type": "null"}})),
        ("if", json!({"if": {"type": "null"}, "then": {"const": 1}})),
        ("oneOf", json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
        ("$ref", json!({"$ref": "https://example.com/schema.json"})),
        ("minItems", json!({"type": "array", "minItems": "x"})),
        ("object", json!([1])),
        ("false", json!({"type": "object", "properties": {"a": false}, "required": ["a"]})),
    ] {
        let message = schema(with);
        assert!(message.contains(keyword), "{keyword}: {message}");
    }
    assert!(schema(json!({"$ref": "#"})).contains("refers to itself without end"));
    assert!(refusal(Form::Lark("start: other\nother: start".to_string())).contains("refers to itself without end"));
    let regex = |regex: &str| refusal(Form::Regex(regex.to_string()));
    assert!(regex("a(?=b)").contains("look"));
    assert!(regex("(").contains("unclosed"));
    assert!(refusal(Form::Lark("start: missing".to_string())).contains("missing"));
    let deep = "(".repeat(1000) + &")".repeat(1000);
    assert!(refusal(Form::Lark(format!("start: {deep}"))).contains("deep"));
    let quoting = refusal(Form::Lark(format!("start: missing {}", "\"a\" ".repeat(20_000))));
    assert!(quoting.contains("missing") && quoting.len() < 3000, "{} bytes", quoting.len());
    assert!(refusal(Form::Choice(vec![String::new(); 200_000])).contains("at most 262144"));
    let large = json!({"enum": vec!["x".repeat(1000); 300]});
    assert!(schema(large).contains("at most 262144"));
}

/// Whether a text is one that a grammar in llama.cpp's syntax allows.
fn allows(engine: &Engine, gbnf: &str, text: &str) -> bool {
    let mut constraint = compile(engine, Form::Gbnf(gbnf.to_string())).unwrap();
    let tokens = engine.tokenizer.encode_text(text, false);
    constraint.n_allowed(&tokens) == tokens.len()
        && tokens.iter().all(|t| constraint.advance(*t).is_ok())
        && constraint.matcher.is_accepting().unwrap()
}

#[test]
fn llamas_grammars_allow_what_they_say() {
    let engine = engine();
    let json = r#"
        root   ::= object
        value  ::= object | array | string | number | ("true" | "false" | "null") ws
        object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
        array  ::= "[" ws ( value ("," ws value)* )? "]" ws
        string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
        number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
        # Optional space.
        ws     ::= | " " | "\n" [ \t]{0,20}
    "#;
    let sums = r#"root ::= (sum "\n")+
        sum ::= term ([-+*/] term)*
        term ::= num | "(" sum ")"
        num ::= [0-9]+"#;
    let list = r#"root ::= item+

        item ::= "- " [^\r\n\x0b\u2028]+ "\n""#;
    let spaces = r#"root ::= "a" ws "b"
        ws ::= ([ \t\n] ws)?"#;
    let lines = r#"root ::= ("ab"? .)+
        | [^]{2}
        | "\U0001F600""#;
    let objects = (r#"{"a": [1, -2.5e3, {"ä\n": null}], "b":true }"#, r#"{"a":01}"#);
    for (gbnf, yes, no) in [
        (json, &["{}", objects.0][..], &["", "[]", "{,}", objects.1, "{\"a\"}"][..]),
        (sums, &["1+2\n", "(1*(23-4))/5\n6\n"], &["1+\n", "1", "(1\n"]),
        (list, &["- a/b\n", "- é\n- \"x\"\n"], &["-a\n", "- a", "- \u{2028}\n"]),
        (spaces, &["ab", "a \t\nb"], &["a", "a-b"]),
        ("root ::= \"a\"{5,5}", &["aaaaa"], &["aaaa", "aaaaaa"]),
        (lines, &["x", "abx", "\u{1F600}"], &[""]),
        ("root ::= one*\none ::= \"(\" root \")\"", &["", "()(())"], &["(", "())"]),
    ] {
        yes.iter().for_each(|text| assert!(allows(&engine, gbnf, text), "{text:?} by {gbnf}"));
        no.iter().for_each(|text| assert!(!allows(&engine, gbnf, text), "{text:?} by {gbnf}"));
    }
}

#[test]
fn answers_obey_llamas_grammars() {
    let mut engine = engine();
    let gbnf = "root ::= \"[\" (root (\",\" root){0,2})? \"]\" | [0-9]{1,3}".to_string();
    for answer in answers(&mut engine, &only(Form::Gbnf(gbnf))) {
        let n = |c: char| answer.text.matches(c).count();
        assert!(answer.text.bytes().all(|b| b"[],0123456789".contains(&b)), "{}", answer.text);
        assert!(n('[') == n(']') || answer.finish == Finish::Length, "{}", answer.text);
    }
    let e = compile(&engine, Form::Gbnf("root ::= \"a\" two".to_string())).unwrap_err();
    assert_eq!(e, ConstraintError::Refused("there is no rule \"two\"".to_string()));
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(2000), ")".repeat(2000));
    assert_eq!(compile(&engine, Form::Gbnf(deep)).unwrap_err(), ConstraintError::TooDeep);
}

/// A grammar in llama.cpp's syntax whose rules say something with the next.
fn rules(n: usize, what: impl Fn(usize) -> String) -> Form {
    let rules: String = (0..n).map(|i| format!("r{i} ::= {}\n", what(i + 1))).collect();
    Form::Gbnf(format!("{rules}root ::= r0\nr{n} ::= [a-z]*"))
}

#[test]
fn what_would_take_all_memory_to_compile_is_refused() {
    let engine = engine();
    let pattern = |i: usize| json!({"pattern": format!("a.*{i}.*b")});
    let patterns = |n: usize| (0..n).map(pattern).collect::<Vec<_>>();
    // Each refers to the next, with a pattern of its own.
    let chain: Map<String, Value> = (0..30)
        .map(|i| (format!("d{i}"), json!({"pattern": format!("a.*{i}"), "$ref": format!("#/$defs/d{}", i + 1)})))
        .chain([("d30".to_string(), json!({"type": "string"}))])
        .collect();
    let of_x = |i: usize| json!({"type": "object", "properties": {"x": pattern(i)}});
    let expressions = (0..30).map(|i| format!("/(.|\\n)*a.{{{i}}}b(.|\\n)*/")).collect::<Vec<_>>().join(" & ");
    let within = json!({"type": "string", "allOf": patterns(30)});
    for form in [
        Form::Json(json!({"type": "string", "allOf": patterns(30)})),
        Form::Json(json!({"allOf": (0..30).map(of_x).collect::<Vec<_>>()})),
        Form::Json(json!({"$defs": chain, "$ref": "#/$defs/d0"})),
        Form::Lark(format!("start: T\nT: {expressions}\n")),
        Form::Lark(format!("start: %json {within}\n")),
        Form::Lark(format!("start: %json {}\n", within.to_string().replace("pattern", "p\\u0061ttern"))),
    ] {
        let refused = compile(&engine, form).unwrap_err();
        assert!(matches!(refused, ConstraintError::TooManyAtOnce { n } if n >= 30), "{refused}");
    }
    // Patterns that no text has to match together are as many as one likes.
    let of = |i: usize| (format!("x{i}"), json!({"type": "string", "pattern": format!("^a{i}$")}));
    let many: Map<String, Value> = (0..30).map(of).collect();
    let flag = json!({"type": "object", "properties": {"y": {"type": "boolean"}}});
    let allowed = json!({"type": "object", "properties": many, "allOf": [flag]});
    assert_eq!(compile(&engine, Form::Json(allowed)).map(|_| ()), Ok(()));
}

#[test]
fn what_costs_too_much_is_refused_soon() {
    let engine = engine();
    engine.constraints.factory();
    let regex = |regex: String| Form::Regex(regex);
    let chain = |n: usize| {
        let defs: Map<String, Value> =
            (0..n).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))).collect();
        json!({"$defs": defs, "$ref": "#/$defs/d0"})
    };
    let branches = json!({"anyOf": (0..40).map(|i| json!({"type": "object", "properties": {format!("k{i}"): {"type": "string"}}})).collect::<Vec<_>>()});
    for (name, form) in [
        ("nested repeats", regex("((((a{1,500}){1,500}){1,500}){1,500})".to_string())),
        ("nested stars", regex("((((a*)*)*)*)*b".to_string())),
        ("bounded tails", regex("(.*a.{200}b.*){50}".to_string())),
        ("many words", regex((0..20_000).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|"))),
        ("a long chain", Form::Json(chain(2000))),
        ("a longer chain", Form::Json(chain(8000))),
        ("a loop of references", Form::Json(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}))),
        ("products", Form::Json(json!({"allOf": vec![branches; 5]}))),
        ("many strings", Form::Json(json!({"enum": (0..20_000).map(|i| format!("w{i}")).collect::<Vec<_>>()}))),
        ("long strings", Form::Json(json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}))),
        ("long lists", Form::Json(json!({"type": "array", "minItems": 100_000, "items": {"type": "object"}}))),
        ("patterns", Form::Json(json!({"type": "string", "pattern": "(a+)+$|((x+x+)+y){1,300}"}))),
        (
            "many properties",
            Form::Json(json!({"type": "object", "properties":
            (0..5000).map(|i| (format!("p{i}"), json!({"type": "integer"}))).collect::<Map<_, _>>()})),
        ),
        (
            "rules",
            Form::Lark(
                (0..8000).map(|i| format!("r{i}: r{} \"x\"\n", i + 1)).collect::<String>()
                    + "start: r0\nr8000: \"y\"\n",
            ),
        ),
        ("rules of another's", rules(8000, |next| format!("r{next} \"x\""))),
        ("doubled again and again", rules(40, |next| format!("r{next} r{next}"))),
        ("a loop of rules", Form::Lark("start: start start | \"a\"\n".to_string())),
    ] {
        let start = Instant::now();
        eprintln!("{name}");
        let compiled = compile(&engine, form);
        let compiling = start.elapsed();
        let outcome = compiled.as_ref().map(|_| ()).map_err(|e| format!("{e:.90}"));
        let mut worst = Duration::ZERO;
        if let Ok(mut constraint) = compiled {
            let logits = vec![0.0; engine.hparams.n_vocab];
            for _ in 0..50 {
                let start = Instant::now();
                let Ok(mask) = constraint.mask(&logits, false) else { break };
                let token = mask.iter().rposition(|l| l.is_finite()).unwrap();
                worst = worst.max(start.elapsed());
                if constraint.advance(token as u32).is_err() || constraint.is_complete() {
                    break;
                }
            }
        }
        println!("{name}: {compiling:?} {outcome:?}, worst mask {worst:?}");
        assert!(compiling < PATIENCE, "{name} took {compiling:?}");
        assert!(worst < Duration::from_millis(500), "{name}: a mask took {worst:?}");
    }
}
