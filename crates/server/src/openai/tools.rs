//! Tools of a chat: what a request declares, how the model is told, and what becomes of the calls it writes.

use apr_engine::chat_template::ChatInput;
use apr_engine::constraint::{Calls, Form};
use apr_engine::output_parser::{Event, OutputParser, Thinking, ToolForm, hermes_system_text};
use serde::Serialize;
use serde_json::{Value, json};

use super::given;
use crate::errors::ApiError;
use crate::extract::kind_of;

/// Tools that the model may call.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    /// As they were declared: `{"type": "function", "function": {…}}`.
    list: Vec<Value>,
    /// Those of which one has to be called.
    forced: Option<Vec<Value>>,
    /// Whether one answer may call several.
    parallel: bool,
}

/// A call, or what is new of one where an answer comes in pieces.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Call {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    pub(crate) function: Function,
}

#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

/// The fields of a message, or of what is new of one.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Fields {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<Call>,
}

impl Fields {
    /// A message that says nothing yet.
    pub(crate) fn silent() -> Fields {
        Fields { content: Some(String::new()), ..Fields::default() }
    }
}

/// Where the text of one answer goes in, and fields of a message come out.
pub(crate) struct Outlet {
    parser: OutputParser,
    parallel: bool,
    /// Ids of calls are this and their index.
    id: String,
    /// Calls that have ended whole.
    n_call: usize,
    /// The end of what the client began with, which the parser may still give out. The client has it.
    held: String,
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    ///
    /// # Errors
    /// What is no tool, named by its path.
    pub(crate) fn read(body: &Value) -> Result<Tools, ApiError> {
        for name in ["functions", "function_call"] {
            if given(body, name).is_some() {
                return Err(ApiError::unsupported(name, "was replaced by tools and tool_choice"));
            }
        }
        let list = match given(body, "tools") {
            None => Vec::new(),
            Some(Value::Array(list)) => list.clone(),
            Some(other) => {
                return Err(ApiError::field("tools", format_args!("expected a list, got {}", kind_of(other))));
            }
        };
        for (i, tool) in list.iter().enumerate() {
            let kind = tool.get("type").and_then(Value::as_str);
            if kind != Some("function") {
                let message = format_args!("expected \"function\", got {}", tool.get("type").unwrap_or(&Value::Null));
                return Err(ApiError::field(&format!("tools[{i}].type"), message));
            }
            if tool["function"]["name"].as_str().is_none_or(str::is_empty) {
                return Err(ApiError::field(&format!("tools[{i}].function.name"), "expected a name"));
            }
            check_described(&format!("tools[{i}].function"), &tool["function"])?;
        }
        let (list, forced) = choose(list, given(body, "tool_choice"))?;
        let parallel = match given(body, "parallel_tool_calls") {
            None => true,
            Some(Value::Bool(parallel)) => *parallel,
            Some(other) => {
                let message = format_args!("expected true or false, got {}", kind_of(other));
                return Err(ApiError::field("parallel_tool_calls", message));
            }
        };
        // Who names a tool wants it called once.
        let is_named = body.pointer("/tool_choice/type").is_some_and(|kind| kind == "function");
        Ok(Tools { list, forced, parallel: parallel && !is_named })
    }

    /// The forms that an answer has to have, in one of which it may be what `format` says. Where the model may call and some tools
    /// are strict, calls amid the text are held to them.
    pub(super) fn forms(&self, template: &str, format: Option<Form>) -> Vec<Form> {
        let form = ToolForm::of_template(template).unwrap_or(ToolForm::Hermes);
        let only_one = !self.parallel;
        let calls = |tools: &[Value]| Form::Calls(Calls { form, tools: tools.to_vec(), only_one, amid_text: false });
        match (&self.forced, format) {
            (Some(forced), _) => vec![calls(forced)],
            (None, Some(format)) if self.list.is_empty() => vec![format],
            (None, Some(format)) => vec![format, calls(&self.list)],
            (None, None) if self.list.iter().any(|tool| tool["function"]["strict"] == true) => {
                vec![Form::Calls(Calls { form, tools: self.list.clone(), only_one, amid_text: true })]
            }
            (None, None) => Vec::new(),
        }
    }

    /// Tells the model: through its template, or in the system message where the template has no place for tools.
    pub(super) fn tell(&self, template: &str, input: &mut ChatInput) {
        if ToolForm::of_template(template).is_some() {
            input.tools = (!self.list.is_empty()).then(|| self.list.clone());
            return;
        }
        input.messages.iter_mut().for_each(in_hermes_form);
        if self.list.is_empty() {
            return;
        }
        let text = hermes_system_text(&self.list);
        match input.messages.first_mut().filter(|m| m["role"] == "system") {
            Some(system) => {
                let own = system["content"].as_str().unwrap_or_default();
                system["content"] = format!("{own}\n\n{text}").into();
            }
            None => input.messages.insert(0, json!({"role": "system", "content": text})),
        }
    }

    /// An outlet for an answer. `begun` is what it begins with, written by the client.
    pub(crate) fn outlet(&self, thinking: Thinking, begun: &str, id: String) -> Outlet {
        let mut parser = OutputParser::new(&self.list, thinking);
        let given = parser.push(begun);
        let last = given.iter().rev().find_map(|e| match e {
            Event::Content(text) | Event::Reasoning(text) => Some(text.as_str()),
            _ => None,
        });
        let held_from = last.map_or(0, |last| begun.rfind(last).map_or(begun.len(), |at| at + last.len()));
        Outlet { parser, parallel: self.parallel, id, n_call: 0, held: begun[held_from..].to_string() }
    }
}

/// Refuses a description that is no text, parameters that no schema of an object describes, and what is neither strict nor not.
fn check_described(path: &str, function: &Value) -> Result<(), ApiError> {
    let wrong = |name: &str, what: &str, got: &Value| {
        let message = format_args!("expected {what}, got {}", kind_of(got));
        Err(ApiError::field(&format!("{path}.{name}"), message))
    };
    if let Some(got) = given(function, "description").filter(|value| !value.is_string()) {
        return wrong("description", "a string", got);
    }
    if let Some(got) = given(function, "parameters").filter(|value| !value.is_object()) {
        return wrong("parameters", "an object", got);
    }
    if let Some(got) = given(function, "strict").filter(|value| !value.is_boolean()) {
        return wrong("strict", "true or false", got);
    }
    Ok(())
}

/// The tools that the model is told of, and those of which it has to call one.
///
/// # Errors
/// A choice that is none, or names a tool that is not declared.
fn choose(list: Vec<Value>, choice: Option<&Value>) -> Result<(Vec<Value>, Option<Vec<Value>>), ApiError> {
    let wrong = |message: String| Err(ApiError::field("tool_choice", message));
    let named = |choices: &[&Value]| -> Result<Vec<Value>, ApiError> {
        let find = |choice: &&Value| {
            let name = &choice["function"]["name"];
            let found = list.iter().find(|tool| name.is_string() && tool["function"]["name"] == *name);
            found.cloned().ok_or_else(|| ApiError::field("tool_choice", format_args!("there is no tool {name}")))
        };
        choices.iter().map(find).collect()
    };
    let Some(choice) = choice else { return Ok((list, None)) };
    let allowed = match choice.get("type").and_then(Value::as_str) {
        Some("function") => {
            let forced = named(&[choice])?;
            return Ok((list, Some(forced)));
        }
        // Chats have the list in a field of its own, responses beside the type.
        Some("allowed_tools") => Some(choice.get("allowed_tools").unwrap_or(choice)),
        _ => None,
    };
    let list = match allowed.map(|a| a.get("tools").and_then(Value::as_array)) {
        None => list,
        Some(Some(tools)) => named(&tools.iter().collect::<Vec<_>>())?,
        Some(None) => return wrong("allowed_tools needs a list of tools".to_string()),
    };
    match allowed.map_or(Some(choice), |a| a.get("mode")).and_then(Value::as_str) {
        Some("auto") => Ok((list, None)),
        Some("none") => Ok((Vec::new(), None)),
        Some("required") if list.is_empty() => wrong("a call is required, and there are no tools".to_string()),
        Some("required") => Ok((list.clone(), Some(list))),
        _ => wrong(format!("expected auto, none, required or a function, got {choice}")),
    }
}

/// Writes calls and their results as text, for a template that knows neither.
fn in_hermes_form(message: &mut Value) {
    if message["role"] == "tool" {
        let result = message["content"].as_str().unwrap_or_default();
        *message = json!({"role": "user", "content": format!("<tool_response>\n{result}\n</tool_response>")});
    } else if let Some(calls) = message.as_object_mut().and_then(|m| m.remove("tool_calls")) {
        let mut text = message["content"].as_str().unwrap_or_default().to_string();
        for call in calls.as_array().into_iter().flatten() {
            let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
            let line = if text.is_empty() { "" } else { "\n" };
            let call = json!({"name": name, "arguments": arguments});
            text.push_str(&format!("{line}<tool_call>\n{call}\n</tool_call>"));
        }
        message["content"] = text.into();
    }
}

impl Outlet {
    /// What a piece of text gives.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Fields> {
        let events = self.parser.push(text);
        events.into_iter().filter_map(|e| self.fields(e)).collect()
    }

    /// What had been held back.
    pub(crate) fn finish(&mut self) -> Vec<Fields> {
        let events = self.parser.finish();
        events.into_iter().filter_map(|e| self.fields(e)).collect()
    }

    /// Whether the answer calls a tool.
    pub(crate) fn has_called(&self) -> bool {
        self.n_call > 0
    }

    /// The whole message of a whole text.
    pub(crate) fn message(&mut self, text: &str) -> Fields {
        let mut message = Fields::default();
        for piece in self.push(text).into_iter().chain(self.finish()) {
            append(&mut message.content, piece.content);
            append(&mut message.reasoning_content, piece.reasoning_content);
            for mut call in piece.tool_calls {
                let is_new = call.id.is_some();
                call.index = None;
                match message.tool_calls.last_mut() {
                    Some(last) if !is_new => last.function.arguments.push_str(&call.function.arguments),
                    _ => message.tool_calls.push(call),
                }
            }
        }
        message
    }

    /// Text without what the client has of it.
    fn without_held(&mut self, text: String) -> Option<String> {
        let held = std::mem::take(&mut self.held);
        match (text.strip_prefix(&held), held.strip_prefix(&text)) {
            (Some(rest), _) => Some(rest.to_string()).filter(|rest| !rest.is_empty()),
            (None, Some(still)) => {
                self.held = still.to_string();
                None
            }
            (None, None) => Some(text),
        }
    }

    fn fields(&mut self, event: Event) -> Option<Fields> {
        let is_wanted = |index: usize| self.parallel || index == 0;
        match event {
            Event::Content(text) => {
                let content = Some(self.without_held(text)?);
                Some(Fields { content, ..Fields::default() })
            }
            Event::Reasoning(text) => {
                let reasoning_content = Some(self.without_held(text)?);
                Some(Fields { reasoning_content, ..Fields::default() })
            }
            Event::ToolCallBegin { index, name } if is_wanted(index) => {
                let id = Some(format!("call_{}_{index}", self.id));
                let function = Function { name: Some(name), arguments: String::new() };
                Some(one_call(Call { index: Some(index), id, kind: Some("function"), function }))
            }
            Event::ToolCallArguments { index, delta } if is_wanted(index) => {
                let function = Function { name: None, arguments: delta };
                Some(one_call(Call { index: Some(index), id: None, kind: None, function }))
            }
            Event::ToolCallEnd { index, complete } => {
                self.n_call += usize::from(complete && is_wanted(index));
                None
            }
            Event::ToolCallBegin { .. } | Event::ToolCallArguments { .. } => None,
        }
    }
}

fn one_call(call: Call) -> Fields {
    Fields { tool_calls: vec![call], ..Fields::default() }
}

fn append(to: &mut Option<String>, more: Option<String>) {
    if let Some(more) = more {
        to.get_or_insert_default().push_str(&more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weather() -> Value {
        let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        json!({"type": "function", "function": {"name": "weather", "parameters": parameters}})
    }

    fn tools(body: Value) -> Tools {
        Tools::read(&body).unwrap()
    }

    const CALLS: &str = "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n\
                         </tool_call>\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>";

    fn calls(fields: &Fields) -> Vec<(String, String)> {
        let pair = |c: &Call| (c.function.name.clone().unwrap(), c.function.arguments.replace(' ', ""));
        fields.tool_calls.iter().map(pair).collect()
    }

    #[test]
    fn calls_are_cut_out_of_an_answer() {
        let tools = tools(json!({"tools": [weather()]}));
        let mut outlet = tools.outlet(Thinking::Split, "", "x".into());
        let message = outlet.message(&format!("<think>\nhm\n</think>\n\n{CALLS}"));
        assert_eq!(message.reasoning_content.as_deref(), Some("hm"));
        assert_eq!(message.content.as_deref(), Some("Let me see."));
        let paris = ("weather".to_string(), "{\"city\":\"Paris\"}".to_string());
        let rome = ("weather".to_string(), "{\"city\":\"Rome\"}".to_string());
        assert_eq!(calls(&message), [paris.clone(), rome]);
        assert_ne!(message.tool_calls[0].id, message.tool_calls[1].id);
        assert!(outlet.has_called());
        let one = Tools { parallel: false, ..tools };
        assert_eq!(calls(&one.outlet(Thinking::Split, "", "x".into()).message(CALLS)), [paris]);
    }

    #[test]
    fn pieces_joined_are_the_whole() {
        let tools = tools(json!({"tools": [weather()]}));
        let whole = tools.outlet(Thinking::Split, "", "x".into()).message(CALLS);
        let mut outlet = tools.outlet(Thinking::Split, "", "x".into());
        let mut pieces: Vec<Fields> = CALLS.chars().flat_map(|c| outlet.push(&c.to_string())).collect();
        pieces.extend(outlet.finish());
        let arguments = |index| -> String {
            let of_call = pieces.iter().flat_map(|p| &p.tool_calls).filter(|c| c.index == Some(index));
            of_call.map(|c| c.function.arguments.as_str()).collect()
        };
        for (i, call) in whole.tool_calls.iter().enumerate() {
            assert_eq!(arguments(i), call.function.arguments);
        }
        assert_eq!(pieces.iter().filter_map(|p| p.content.as_deref()).collect::<String>(), "Let me see.");
    }

    #[test]
    fn a_call_that_breaks_off_is_none() {
        let mut outlet = tools(json!({"tools": [weather()]})).outlet(Thinking::Split, "", "x".into());
        outlet.message("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Par");
        assert!(!outlet.has_called());
    }

    #[test]
    fn without_tools_their_text_is_text() {
        for body in [json!({}), json!({"tools": []}), json!({"tools": [weather()], "tool_choice": "none"})] {
            let message = tools(body).outlet(Thinking::Split, "", "x".into()).message(CALLS);
            assert_eq!(message, Fields { content: Some(CALLS.to_string()), ..Fields::default() });
        }
    }

    #[test]
    fn an_answer_that_the_client_began_goes_on() {
        for (begun, answer, reasoning, content) in [
            ("<think>I ", "know.</think>Yes.", Some("know."), Some("Yes.")),
            ("<think>I know.</think>\n\n", "Yes.", None, Some("Yes.")),
            ("Well, ", " yes.", None, Some(" yes.")),
            ("a < b <tool", "_x>", None, Some("_x>")),
            ("  ", "x", None, Some("x")),
            ("", " x", None, Some(" x")),
        ] {
            let mut outlet = tools(json!({"tools": [weather()]})).outlet(Thinking::Split, begun, "x".into());
            let message = outlet.message(answer);
            assert_eq!(
                (message.reasoning_content.as_deref(), message.content.as_deref()),
                (reasoning, content),
                "{begun}"
            );
        }
    }

    #[test]
    fn a_template_without_a_place_for_tools_gets_them_as_text() {
        let call = json!({"function": {"name": "weather", "arguments": {"city": "Rome"}}});
        let mut input = ChatInput {
            messages: vec![
                json!({"role": "system", "content": "Be brief."}),
                json!({"role": "assistant", "content": "Well.", "tool_calls": [call]}),
                json!({"role": "tool", "content": "sunny"}),
            ],
            ..ChatInput::default()
        };
        let tools = tools(json!({"tools": [weather()]}));
        let mut with_place = input.clone();
        tools.tell("{% if tools %}<tool_call>", &mut with_place);
        assert_eq!((with_place.tools, with_place.messages), (Some(vec![weather()]), input.messages.clone()));
        tools.tell("{{ messages }}", &mut input);
        assert_eq!(input.tools, None);
        let text = |i: usize| input.messages[i]["content"].as_str().unwrap();
        assert!(text(0).starts_with("Be brief.\n\n# Tools") && text(0).contains("\"weather\""));
        assert!(text(1).starts_with("Well.\n<tool_call>\n{") && text(1).ends_with("}\n</tool_call>"));
        assert_eq!(input.messages[2], json!({"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}));
    }

    #[test]
    fn what_is_no_tool_is_named() {
        let param = |body: Value| Tools::read(&body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"tools": {}})), "tools");
        assert_eq!(param(json!({"tools": [{"type": "web"}]})), "tools[0].type");
        assert_eq!(param(json!({"tools": [{"type": "function"}]})), "tools[0].function.name");
        for (name, wrong) in [("description", json!(5)), ("parameters", json!("{}")), ("strict", json!("yes"))] {
            let tool = json!({"type": "function", "function": {"name": "f", name: wrong}});
            assert_eq!(param(json!({"tools": [tool]})), format!("tools[0].function.{name}"));
        }
        for choice in [json!("some"), json!({"type": "function", "function": {"name": "none"}}), json!(1)] {
            assert_eq!(param(json!({"tools": [weather()], "tool_choice": choice})), "tool_choice");
        }
        assert_eq!(param(json!({"tool_choice": "required"})), "tool_choice");
        assert_eq!(param(json!({"parallel_tool_calls": 1})), "parallel_tool_calls");
        assert_eq!(param(json!({"functions": []})), "functions");
    }
}
