//! What answers become, form by form, and what holds of any text however it is cut.

use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;
use crate::chat_template::{ChatInput, ChatTemplate, RenderedPiece};

/// An answer put together again.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    content: String,
    reasoning: String,
    /// Name, arguments, whether the call is complete.
    calls: Vec<(String, String, bool)>,
}

fn tools() -> Vec<Value> {
    let weather = json!({
        "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"},
        "scale": {"type": "number"}, "where": {"type": "object"}, "tags": {"type": "array"},
        "nothing": {"type": "null"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "id": {"type": ["string", "integer"]},
        "mode": {"$ref": "#/$defs/Mode"}, "box": {"$ref": "#/$defs/Box"}, "any": {},
    });
    let defs = json!({"Mode": {"enum": ["a", "b"]}, "Box": {"allOf": [{"type": "object"}]}});
    let parameters = json!({"type": "object", "properties": weather, "$defs": defs});
    vec![
        json!({"type": "function", "function": {"name": "weather", "parameters": parameters}}),
        json!({"name": "stop"}),
        json!({"name": "count", "parameters": {"type": "object", "additionalProperties": {"type": "integer"}}}),
    ]
}

fn joined(events: &[Event]) -> Answer {
    let mut answer = Answer::default();
    let mut open = false;
    for event in events {
        match event {
            Event::Content(text) => answer.content += text,
            Event::Reasoning(text) => answer.reasoning += text,
            Event::ToolCallBegin { index, name } => {
                assert_eq!((*index, open), (answer.calls.len(), false), "calls follow one another");
                answer.calls.push((name.clone(), String::new(), false));
                open = true;
            }
            Event::ToolCallArguments { index, delta } => {
                assert_eq!((*index + 1, open), (answer.calls.len(), true), "arguments belong to the open call");
                answer.calls[*index].1 += delta;
            }
            Event::ToolCallEnd { index, complete } => {
                assert_eq!((*index + 1, open), (answer.calls.len(), true), "the open call ends");
                answer.calls[*index].2 = *complete;
                open = false;
            }
        }
    }
    assert!(!open, "every call ends");
    answer
}

fn parse_as(thinking: Thinking, pieces: &[&str]) -> Answer {
    let mut parser = OutputParser::new(&tools(), thinking);
    let mut events: Vec<Event> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    joined(&events)
}

/// What a text becomes, whole and character by character.
#[track_caller]
fn parse_thinking(thinking: Thinking, text: &str) -> Answer {
    let whole = parse_as(thinking, &[text]);
    let chars: Vec<String> = text.chars().map(String::from).collect();
    assert_eq!(parse_as(thinking, &chars.iter().map(String::as_str).collect::<Vec<_>>()), whole, "{text:?}");
    whole
}

#[track_caller]
fn parse(text: &str) -> Answer {
    parse_thinking(Thinking::Split, text)
}

fn call(name: &str, arguments: &str) -> (String, String, bool) {
    (name.to_owned(), arguments.to_owned(), true)
}

fn answer(content: &str, reasoning: &str, calls: Vec<(String, String, bool)>) -> Answer {
    Answer { content: content.to_owned(), reasoning: reasoning.to_owned(), calls }
}

/// One parameter of `weather`, as the template writes it.
fn weather(key: &str, value: &str) -> String {
    format!("<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>")
}

/// The arguments' JSON of one complete call.
#[track_caller]
fn arguments(text: &str) -> String {
    let parsed = parse(text);
    assert_eq!((parsed.calls.len(), parsed.calls[0].2), (1, true), "{text:?}: {parsed:?}");
    parsed.calls[0].1.clone()
}

#[test]
fn plain_text_is_content() {
    for text in
        ["", " \n", "Hello <b>you</b>, 1 < 2 \n", "a <think>b</think>", "<tool_call>", "x </tool_call> <func", "<"]
    {
        assert_eq!(parse(text), answer(text, "", vec![]));
    }
    let mut parser = OutputParser::new(&[], Thinking::AsText);
    let text = format!("<think>{}", weather("city", "Oslo"));
    assert_eq!([parser.push(&text), parser.finish()].concat(), [Event::Content(text)]);
}

#[test]
fn a_call_in_tags() {
    let text = "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n\
                </parameter>\n</function>\n</tool_call>\n";
    assert_eq!(parse(text), answer("I look.", "", vec![call("weather", r#"{"city":"Oslo","days":3}"#)]));
    let inline = "<tool_call><function=weather><parameter=city>Oslo</parameter></function></tool_call>";
    assert_eq!(arguments(inline), r#"{"city":"Oslo"}"#);
    assert_eq!(arguments("<tool_call>\n<function=stop>\n</function>\n</tool_call>"), "{}");
    let indented =
        "<tool_call>\n  <function=weather>\n    <parameter=days>\n      1\n    </parameter>\n  </function>\n";
    assert_eq!(arguments(indented), r#"{"days":1}"#);
}

#[test]
fn strings_are_passed_on_as_they_come() {
    let mut parser = OutputParser::new(&tools(), Thinking::Split);
    let begin = Event::ToolCallBegin { index: 0, name: "weather".to_owned() };
    let delta = |text: &str| Event::ToolCallArguments { index: 0, delta: text.to_owned() };
    assert_eq!(parser.push("<tool_call>\n<function=weather>"), []);
    assert_eq!(parser.push("\n<parameter=city>\nOs"), [begin, delta(r#"{"city":"Os"#)]);
    assert_eq!(parser.push("\"lo\n"), [delta(r#"\"lo"#)]);
    assert_eq!(parser.push("x <"), [delta(r"\nx ")]);
    assert_eq!(parser.push("br>\n</param"), [delta("<br>")]);
    assert_eq!(parser.push("eter>\n</function>"), [delta(r#""}"#), Event::ToolCallEnd { index: 0, complete: true }]);
    assert_eq!(parser.push("\n</tool_call>\n"), []);
    assert_eq!(parser.finish(), []);
}

#[test]
fn values_have_the_types_that_the_schema_declares() {
    let cases = [
        ("city", "5", r#""5""#),
        ("city", "null", r#""null""#),
        ("city", "", r#""""#),
        ("city", "\"a\" \\ <b>\n\té", r#""\"a\" \\ <b>\n\té""#),
        ("days", " -3 ", "-3"),
        ("days", "12345678901234567890123", "12345678901234567890123"),
        ("days", "soon", r#""soon""#),
        ("days", "None", "null"),
        ("days", "", r#""""#),
        ("scale", "1.23e-4", "1.23e-4"),
        ("exact", "True", "true"),
        ("exact", "false", "false"),
        ("exact", "maybe", r#""maybe""#),
        ("where", "{\"a\": [1,\n 2]}", "{\"a\": [1,\n 2]}"),
        ("where", "{'a': 1}", r#""{'a': 1}""#),
        ("tags", "[\"</parameter>\"]", r#"["</parameter>"]"#),
        ("nothing", "null", "null"),
        ("note", "none", "null"),
        ("note", "nonsense", r#""nonsense""#),
        ("note", "nu", r#""nu""#),
        ("id", "7", "7"),
        ("id", "07", r#""07""#),
        ("id", "7.5", r#""7.5""#),
        ("id", "\"7\"", r#""\"7\"""#),
        ("mode", "a", r#""a""#),
        ("box", "{}", "{}"),
        ("any", "5", r#""5""#),
        ("undeclared", "5", r#""5""#),
    ];
    for (key, value, expected) in cases {
        assert_eq!(arguments(&weather(key, value)), format!("{{\"{key}\":{expected}}}"), "{value:?}");
    }
    assert_eq!(arguments(&weather("n", "4").replace("weather", "count")), r#"{"n":4}"#);
    assert_eq!(arguments(&weather("n", "4").replace("weather", "undeclared")), r#"{"n":"4"}"#);
}

#[test]
fn one_line_feed_at_either_end_of_a_value_is_markup() {
    for value in ["\n  if x:\n    y\n\n", "  indented  ", "\n", "\n\n", "\u{a0}x\u{a0}"] {
        assert_eq!(arguments(&weather("city", value)), json!({ "city": value }).to_string());
    }
    let inline = "<tool_call><function=weather><parameter=city>x\n</parameter></function></tool_call>";
    assert_eq!(arguments(inline), r#"{"city":"x"}"#);
    assert_eq!(arguments(&inline.replace("x\n", "\n")), r#"{"city":""}"#);
}

#[test]
fn closing_tags_within_a_value_are_its_text() {
    let values = [
        "a </parameter> b",
        "</function>",
        "</tool_call>\nx",
        "<parameter=unknown>\n1",
        "<parameter=city>\n1",
        "say <parameter=days> and </parameter",
        "<function=stop>",
        "<tool_call>\n{\"name\": \"stop\"}",
        "<think></think>",
    ];
    for value in values {
        assert_eq!(arguments(&weather("city", value)), json!({ "city": value }).to_string());
    }
}

#[test]
fn forgotten_tags_are_made_up_for() {
    let expected = r#"{"city":"Oslo","days":3}"#;
    let full = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n\
                </parameter>\n</function>\n</tool_call>";
    assert_eq!(arguments(full), expected);
    for tag in ["<tool_call>\n", "</tool_call>", "Oslo\n</parameter>\n", "3\n</parameter>\n", "</function>\n"] {
        let word = tag.split('<').next().unwrap();
        assert_eq!(arguments(&full.replace(tag, word)), expected, "{tag}");
    }
    // Without the outer tag only a declared name is a call.
    let unknown = full.replace("<tool_call>\n", "").replace("weather", "unknown");
    assert_eq!(parse(&unknown), answer(&unknown, "", vec![]));
}

#[test]
fn several_calls_in_one_answer() {
    let two = vec![call("weather", r#"{"city":"Oslo"}"#), call("weather", r#"{"city":"Rome"}"#)];
    let (oslo, rome) = (weather("city", "Oslo"), weather("city", "Rome"));
    assert_eq!(parse(&format!("{oslo}\n{rome}")), answer("", "", two.clone()));
    assert_eq!(parse(&format!(" a\n{oslo}\n\nb {rome} \n")), answer(" a\n\n\nb", "", two.clone()));
    assert_eq!(parse(&format!("{oslo}\nand{rome} done.\n")), answer("and done.\n", "", two.clone()));
    let one_block = format!("{oslo}\n{rome}").replace("</tool_call>\n<tool_call>\n", "");
    assert_eq!(parse(&one_block), answer("", "", two));
    let hermes = "<tool_call>\n{\"name\": \"stop\", \"arguments\": {}}\n";
    let stops = vec![call("stop", "{}"), call("stop", "{}")];
    assert_eq!(parse(&format!("{hermes}</tool_call>\n{hermes}</tool_call>")), answer("", "", stops.clone()));
    assert_eq!(parse(&format!("{hermes}{}", &hermes[12..])), answer("", "", stops));
}

#[test]
fn a_call_in_hermes_form() {
    let cases = [
        (
            r#"{"name": "weather", "arguments": {"city": "Oslo", "days": [1, {}]}}"#,
            r#"{"city": "Oslo", "days": [1, {}]}"#,
        ),
        (r#"{"arguments": {"a": "</tool_call>"}, "name": "weather"}"#, r#"{"a": "</tool_call>"}"#),
        (r#"{"name": "weather", "arguments": "{\"city\": \"\\u00e9\"}"}"#, r#"{"city": "\u00e9"}"#),
        (r#"{"arguments": "{}", "name": "weather"}"#, "{}"),
        (r#"{"name": "weather", "arguments": ""}"#, "{}"),
        (r#"{"name": "weather", "arguments": null}"#, "{}"),
        (r#"{"name": "weather", "arguments": {}}"#, "{}"),
        (r#"{"id": 7, "name": "weather", "x": {"name": [1]}}"#, "{}"),
        ("{\"name\":\"weather\",\n\"arguments\":{\n\"a\":-1.5e3}\n}", "{\n\"a\":-1.5e3}"),
    ];
    for (object, expected) in cases {
        let text = format!("Well: <tool_call>\n{object}\n</tool_call>\n");
        assert_eq!(parse(&text), answer("Well:", "", vec![call("weather", expected)]));
        assert_eq!(arguments(&format!("<tool_call>{object}")), expected);
    }
    let mut parser = OutputParser::new(&tools(), Thinking::Split);
    assert_eq!(parser.push("<tool_call>\n{\"name\": \"weather\", \"arguments\": "), []);
    let begin = Event::ToolCallBegin { index: 0, name: "weather".to_owned() };
    let delta = |text: &str| Event::ToolCallArguments { index: 0, delta: text.to_owned() };
    assert_eq!(parser.push("{\"city\": \"Os"), [begin, delta("{\"city\": \"Os")]);
    assert_eq!(parser.push("lo\"}"), [delta("lo\"")]);
    assert_eq!(parser.push("}"), [delta("}"), Event::ToolCallEnd { index: 0, complete: true }]);
}

#[test]
fn malformed_json_is_text() {
    let objects = [
        "{}",
        "{\"name\": \"\"}",
        "{\"name\": 1}",
        "{\"name\": [\"weather\"]}",
        "{\"name\": \"weather\", \"arguments\": [1]}",
        "{\"name\": \"weather\", \"arguments\": 1}",
        "{\"name\": \"weather\", \"arguments\": \"[1]\"}",
        "{\"name\": \"weather\", \"name\": \"stop\"}",
        "{\"arguments\": {}, \"arguments\": {}, \"name\": \"stop\"}",
        "{'name': 'weather'}",
        "{\"name\": \"wea\nther\"}",
        "{\"name\": \"\\ud800\"}",
        "{\"name\": \"weather\",}",
        "{\"name\": tru}",
        "{\"a\": [1}",
        "{\"a\": 01}",
        "{\"a\" 1}",
        "{\"name\": \"weather\"",
        "{{\"name\": \"weather\"}}",
    ];
    for object in objects {
        let text = format!("a <tool_call>\n{object}\n</tool_call> b ");
        assert_eq!(parse(&text), answer(&text, "", vec![]));
    }
    // The text of what is no call may hold one.
    let doubled = "<tool_call>\n<tool_call>\n{\"name\": \"stop\"}\n</tool_call>";
    assert_eq!(parse(doubled), answer("<tool_call>", "", vec![call("stop", "{}")]));
    let deep = format!("<tool_call>{{\"a\": {}", "[".repeat(200_000));
    assert_eq!(parse(&deep), answer(&deep, "", vec![]));
}

#[test]
fn a_call_that_breaks_off_is_not_complete() {
    let cases = [
        ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</param", "{\"city\":\"Oslo\\n</param"),
        ("<tool_call>\n<function=weather>\n<parameter=days>\n1}", "{\"days\":\"1}"),
        ("<tool_call>\n<function=weather>\n<parameter=note>\nnull", "{\"note\":\"null"),
        ("<tool_call>\n<function=weather>\n<parameter=city>\n", "{\"city\":\""),
        ("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"a\": \"b", "{\"a\": \"b"),
        ("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"a\": 1}", "{\"a\": 1"),
    ];
    for (text, expected) in cases {
        let broken = ("weather".to_owned(), expected.to_owned(), false);
        assert_eq!(parse(&format!("So: {text}")), answer("So:", "", vec![broken]));
    }
    let malformed = "<tool_call>{\"name\": \"stop\", \"arguments\": {\"a\": oops}}</tool_call> end";
    let broken = ("stop".to_owned(), "{\"a\": ".to_owned(), false);
    assert_eq!(parse(malformed), answer("oops}}</tool_call> end", "", vec![broken]));
    for text in
        ["<tool_call>\n<function=wea", "<tool_call>\n<function=weather>\n<para", "<tool_call>\n{\"name\": \"weather\""]
    {
        assert_eq!(parse(text), answer(text, "", vec![]));
    }
}

#[test]
fn reasoning_is_split_off() {
    let text = "<think>\nHm, <b>.\n\n</think>\n\nYes. ";
    assert_eq!(parse(text), answer("Yes. ", "Hm, <b>.", vec![]));
    assert_eq!(parse_thinking(Thinking::Opened, text), answer("Yes. ", "Hm, <b>.", vec![]));
    assert_eq!(parse_thinking(Thinking::Opened, &text[7..]), answer("Yes. ", "Hm, <b>.", vec![]));
    assert_eq!(parse_thinking(Thinking::AsText, text), answer(text, "", vec![]));
    assert_eq!(parse("\n<think>\n\n</think>\n\n"), answer("", "", vec![]));
    assert_eq!(parse("<think>no end </thin"), answer("", "no end </thin", vec![]));
    assert_eq!(parse_thinking(Thinking::Opened, "no end\n"), answer("", "no end", vec![]));
    assert_eq!(parse(" <thin"), answer(" <thin", "", vec![]));
    assert_eq!(Thinking::of_prompt("<|im_start|>assistant\n<think>\n"), Thinking::Opened);
    assert_eq!(Thinking::of_prompt("<|im_start|>assistant\n<think>\n\n</think>\n\n"), Thinking::Split);
}

#[test]
fn calls_of_declared_tools_count_within_reasoning() {
    let oslo = weather("city", "Oslo");
    let expected = vec![call("weather", r#"{"city":"Oslo"}"#)];
    assert_eq!(parse(&format!("<think>\na\n</think>\n\n{oslo}")), answer("", "a", expected.clone()));
    assert_eq!(parse(&format!("<think>a\n{oslo}")), answer("", "a", expected.clone()));
    assert_eq!(parse(&format!("<think>a{oslo}\n</think>b")), answer("b", "a", expected));
    let hermes = "<tool_call>{\"name\": \"stop\", \"arguments\": {}}</tool_call>";
    assert_eq!(parse(&format!("<think>a{hermes}")), answer("", "a", vec![call("stop", "{}")]));
    for quoted in [oslo.replace("weather", "my_tool"), hermes.replace("stop", "my_tool")] {
        assert_eq!(parse(&format!("<think>{quoted}</think>b")), answer("b", &quoted, vec![]));
    }
}

fn template(name: &str) -> ChatTemplate {
    let path = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/templates/{}.jinja"), name);
    ChatTemplate::parse(&std::fs::read_to_string(path).unwrap(), &[]).unwrap()
}

#[test]
fn what_templates_write_of_past_calls_is_read_back() {
    let given = json!({"city": " a\n<b> \"c\"\n", "days": 3, "where": {"x": [1, "y"]}, "exact": true, "note": "none"});
    for (name, form) in [("qwen3-coder", ToolForm::Xml), ("qwen3", ToolForm::Hermes)] {
        let template = template(name);
        assert_eq!(ToolForm::of_template(template.source()), Some(form));
        let function = json!({"name": "weather", "arguments": given});
        let past = json!({"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": function}]});
        let messages = vec![json!({"role": "user", "content": "?"}), past];
        let pieces = template.render(&ChatInput { messages, ..ChatInput::default() }).unwrap();
        let text: String =
            pieces.iter().map(|(RenderedPiece::Text(t) | RenderedPiece::Control(t))| t.as_str()).collect();
        let turn = text.split("<|im_start|>assistant\n").last().unwrap().trim_end().trim_end_matches("<|im_end|>");
        let parsed = parse(turn);
        assert_eq!((parsed.content.as_str(), parsed.calls.len()), ("Let me see.", 1), "{turn}");
        let mut expected = given.clone();
        if form == ToolForm::Xml {
            // The tags cannot tell the word from null; the schema allows both.
            expected["note"] = Value::Null;
        }
        assert_eq!(serde_json::from_str::<Value>(&parsed.calls[0].1).unwrap(), expected);
    }
}

#[test]
fn the_system_text_lists_every_tool_and_shows_the_form() {
    let text = hermes_system_text(&tools());
    let (_, list) = text.split_once("<tools>\n").unwrap();
    let lines: Vec<Value> =
        list.split_once("</tools>").unwrap().0.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, tools());
    assert_eq!(ToolForm::of_template(&text), Some(ToolForm::Hermes));
    assert_eq!(ToolForm::of_template("{{ messages[0].content }}"), None);
}

/// Texts of tags and pieces of tags, in any order.
fn soup() -> impl Strategy<Value = String> {
    let tags = [
        "<tool_call>",
        "</tool_call>",
        "<function=weather>",
        "<function=other>",
        "</function>",
        "<parameter=city>",
        "<parameter=days>",
        "<parameter=note>",
        "</parameter>",
        "<think>",
        "</think>",
        "<",
        "</",
        "<tool_",
        "<para",
        "\n",
        " ",
        "\n\n",
        "x",
        "null",
        "3",
        "é😀",
        "}",
        "{",
        "\"",
        "\\",
        ",",
        "[",
        "]",
        "{\"name\": \"weather\"",
        ", \"arguments\": {",
        "\"city\": \"O",
        "\"}}",
        "\"name\": \"stop\"",
        "}}",
        "1}",
        "<tool_call>\n<function=weather>\n<parameter=city>\n",
        "\n</parameter>\n",
        "\n</function>\n</tool_call>",
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": ",
        "<tool_call>\n<function=weather>\n<parameter=city>\nx\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": null}}</tool_call>",
        "<tool_call>\n{\"arguments\": \"{}\", ",
    ];
    let piece = prop_oneof![8 => prop::sample::select(tags.to_vec()).prop_map(str::to_owned), 1 => ".{0,6}"];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

fn thinkings() -> impl Strategy<Value = Thinking> {
    prop::sample::select(vec![Thinking::AsText, Thinking::Split, Thinking::Opened])
}

/// Cuts a text into pieces of the given numbers of characters, over and over.
fn cut<'t>(text: &'t str, sizes: &[usize]) -> Vec<&'t str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let at = rest.char_indices().nth(*size).map_or(rest.len(), |(at, _)| at);
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
    }
    pieces
}

fn cutting() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..12, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn any_cutting_gives_the_same_events(text in soup(), thinking in thinkings(), sizes in cutting()) {
        prop_assert_eq!(parse_as(thinking, &cut(&text, &sizes)), parse_as(thinking, &[&text]));
    }

    #[test]
    fn only_complete_calls_are_valid(text in soup(), thinking in thinkings()) {
        for (name, arguments, complete) in parse_as(thinking, &[&text]).calls {
            let parsed = serde_json::from_str::<Map<String, Value>>(&arguments);
            prop_assert_eq!(parsed.is_ok(), complete, "{} {}", name, arguments);
        }
    }

    #[test]
    fn text_without_calls_is_never_lost(text in soup(), sizes in cutting()) {
        let parsed = parse_as(Thinking::AsText, &cut(&text, &sizes));
        if parsed.calls.is_empty() {
            prop_assert_eq!(parsed, answer(&text, "", vec![]));
        }
    }

    #[test]
    fn text_without_tags_is_content(text in "(?s)[^<]{0,60}", sizes in cutting()) {
        prop_assert_eq!(parse_as(Thinking::Split, &cut(&text, &sizes)), answer(&text, "", vec![]));
    }

    #[test]
    fn values_in_tags_are_read_back(
        city in "[^<]{0,30}(<[a-z]{0,9}[^<]{0,9}){0,3}",
        days: i64,
        sizes in cutting(),
    ) {
        let text = format!(
            "x<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n\
             </parameter>\n</function>\n</tool_call>"
        );
        let expected = json!({"city": city, "days": days}).to_string();
        let parsed = parse_as(Thinking::Split, &cut(&text, &sizes));
        prop_assert_eq!(parsed, answer("x", "", vec![call("weather", &expected)]));
    }

    #[test]
    fn arguments_in_json_are_read_back(
        pairs in prop::collection::hash_map(".{0,8}", ".{0,20}", 0..4),
        as_text: bool,
        first: bool,
        sizes in cutting(),
    ) {
        let object = serde_json::to_string(&pairs).unwrap();
        let value = if as_text { Value::from(object.as_str()).to_string() } else { object.clone() };
        let fields = [format!("\"arguments\": {value}"), "\"name\": \"weather\"".to_owned()];
        let fields = if first { fields.join(", ") } else { format!("{}, {}", fields[1], fields[0]) };
        let text = format!("x\n<tool_call>\n{{{fields}}}\n</tool_call>");
        let parsed = parse_as(Thinking::Split, &cut(&text, &sizes));
        prop_assert_eq!(parsed, answer("x", "", vec![call("weather", &object)]));
    }
}
