//! Requests: the form of responses put into that of chats.

use serde_json::{Map, Value, json};

use crate::errors::ApiError;
use crate::extract::kind_of;
use crate::openai::given;

/// What fields are called here that are named otherwise in the chat form.
pub(super) const NAMES: [(&str, &str); 3] =
    [("max_tokens", "max_output_tokens"), ("response_format", "text.format"), ("messages", "input")];

/// Fields that mean the same in both forms; those after the first three are none of OpenAI's.
const SAME: [&str; 11] = [
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "ignore_eos",
    "repetition_penalty",
    "logit_bias",
    "chat_template_kwargs",
];

/// A request as a chat.
///
/// # Errors
/// What needs a memory, and what cannot be told to a model of text, by its path.
pub(super) fn in_chat_form(body: &Value) -> Result<Value, ApiError> {
    refuse(body)?;
    let mut chat = Map::new();
    for name in SAME {
        chat.extend(given(body, name).map(|value| (name.to_string(), value.clone())));
    }
    chat.extend(given(body, "max_output_tokens").map(|n| ("max_tokens".to_string(), n.clone())));
    let includes_logprobs = |include: &Value| {
        include.as_array().is_some_and(|list| list.iter().any(|i| i == "message.output_text.logprobs"))
    };
    let top = given(body, "top_logprobs");
    if given(body, "include").is_some_and(includes_logprobs) || top.is_some_and(|n| *n != 0) {
        chat.insert("logprobs".to_string(), true.into());
        chat.extend(top.map(|n| ("top_logprobs".to_string(), n.clone())));
    }
    if given(body, "reasoning").is_some_and(|r| r["effort"] == "none") {
        let kwargs = chat.entry("chat_template_kwargs").or_insert_with(|| json!({}));
        kwargs.as_object_mut().and_then(|kwargs| kwargs.insert("enable_thinking".to_string(), false.into()));
    }
    if let Some(format) = given(body, "text").and_then(|text| given(text, "format")) {
        chat.insert("response_format".to_string(), response_format(format)?);
    }
    if let Some(tools) = given(body, "tools") {
        let Value::Array(tools) = tools else { return Err(wrong_type("tools", "a list", tools)) };
        let tools = tools.iter().enumerate().map(|(i, t)| tool(&format!("tools[{i}]"), t));
        chat.insert("tools".to_string(), tools.collect::<Result<_, _>>()?);
    }
    if let Some(choice) = given(body, "tool_choice") {
        chat.insert("tool_choice".to_string(), tool_choice(choice)?);
    }
    chat.insert("messages".to_string(), messages(body)?.into());
    Ok(chat.into())
}

/// Refuses what would need a memory of other responses, or more than text.
fn refuse(body: &Value) -> Result<(), ApiError> {
    for name in ["previous_response_id", "conversation", "prompt"] {
        if given(body, name).is_some() {
            let message = "nothing is stored on this server; send the whole conversation as input";
            return Err(ApiError::unsupported(name, message));
        }
    }
    if given(body, "background").is_some_and(|background| background != false) {
        return Err(ApiError::unsupported("background", "answers are given at once, never in the background"));
    }
    Ok(())
}

fn wrong_type(param: &str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "nothing",
        got => kind_of(got),
    };
    ApiError { code: Some("invalid_type"), ..ApiError::field(param, format_args!("expected {expected}, got {got}")) }
}

/// Flat here, nested there.
fn response_format(format: &Value) -> Result<Value, ApiError> {
    if format["type"] != "json_schema" {
        return Ok(format.clone());
    }
    if given(format, "schema").is_none() {
        return Err(ApiError::field("text.format.schema", "expected a JSON schema"));
    }
    Ok(json!({"type": "json_schema", "json_schema": without_type(format)}))
}

/// Flat here, nested there.
fn tool(path: &str, tool: &Value) -> Result<Value, ApiError> {
    if tool["type"] != "function" {
        let message = format_args!("expected \"function\", got {}; the server has no tools of its own", tool["type"]);
        return Err(ApiError::unsupported(&format!("{path}.type"), message));
    }
    if tool["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::field(&format!("{path}.name"), "expected a name"));
    }
    Ok(json!({"type": "function", "function": without_type(tool)}))
}

fn without_type(value: &Value) -> Value {
    let fields = value.as_object().into_iter().flatten();
    fields.filter(|(name, value)| *name != "type" && !value.is_null()).map(|(n, v)| (n.clone(), v.clone())).collect()
}

fn tool_choice(choice: &Value) -> Result<Value, ApiError> {
    match (choice, choice["type"].as_str()) {
        (Value::String(_), _) => Ok(choice.clone()),
        (_, Some("function")) => Ok(json!({"type": "function", "function": {"name": choice["name"]}})),
        (_, Some("allowed_tools")) => {
            let tools = choice["tools"].as_array().map(Vec::as_slice).unwrap_or_default().iter();
            let tools: Vec<Value> = tools.map(|t| json!({"type": "function", "function": without_type(t)})).collect();
            Ok(json!({"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}}))
        }
        _ => {
            let expected = "expected \"auto\", \"none\", \"required\" or a function";
            Err(ApiError::field("tool_choice", format_args!("{expected}, got {choice}")))
        }
    }
}

fn messages(body: &Value) -> Result<Vec<Value>, ApiError> {
    let mut conversation = Conversation::default();
    match given(body, "instructions") {
        None => {}
        Some(Value::String(text)) => conversation.messages.push(json!({"role": "system", "content": text})),
        Some(other) => return Err(wrong_type("instructions", "a string", other)),
    }
    match given(body, "input") {
        Some(Value::String(text)) => conversation.messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                conversation.add(&format!("input[{i}]"), item)?;
            }
        }
        Some(Value::Array(_)) => return Err(ApiError::field("input", "expected at least one item")),
        other => return Err(wrong_type("input", "a string or a list of items", other.unwrap_or(&Value::Null))),
    }
    Ok(conversation.messages)
}

/// Messages of a chat, made of items.
#[derive(Default)]
struct Conversation {
    messages: Vec<Value>,
    /// Reasoning, which belongs to what the assistant says or calls next.
    thought: String,
}

impl Conversation {
    fn add(&mut self, path: &str, item: &Value) -> Result<(), ApiError> {
        match item["type"].as_str() {
            None | Some("message") => self.add_message(path, item),
            Some("function_call") => self.add_call(path, item),
            Some("function_call_output") => {
                let output = text(&format!("{path}.output"), &item["output"])?;
                self.messages.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": output}));
                Ok(())
            }
            Some("reasoning") => {
                // What is there whole, or else its summary.
                let parts =
                    ["content", "summary"].iter().find_map(|name| item[*name].as_array().filter(|p| !p.is_empty()));
                parts.into_iter().flatten().for_each(|p| self.thought += p["text"].as_str().unwrap_or_default());
                Ok(())
            }
            Some("item_reference") => {
                let message = "nothing is stored on this server; send the item itself";
                Err(ApiError::unsupported(&format!("{path}.type"), message))
            }
            Some(kind) => {
                let expected = "expected message, function_call, function_call_output or reasoning";
                Err(ApiError::unsupported(&format!("{path}.type"), format_args!("{expected}, got {kind:?}")))
            }
        }
    }

    fn add_message(&mut self, path: &str, item: &Value) -> Result<(), ApiError> {
        let content = text(&format!("{path}.content"), &item["content"])?;
        match item["role"].as_str() {
            Some("assistant") => {
                let message = self.assistant(content);
                self.messages.push(message);
                Ok(())
            }
            Some(role @ ("user" | "system" | "developer")) => {
                self.messages.push(json!({"role": role, "content": content}));
                Ok(())
            }
            Some(role) => {
                let expected = "expected user, system, developer or assistant";
                Err(ApiError::field(&format!("{path}.role"), format_args!("{expected}, got {role:?}")))
            }
            None => Err(wrong_type(&format!("{path}.role"), "a string", &item["role"])),
        }
    }

    /// A message of the assistant, with the reasoning before it.
    fn assistant(&mut self, content: String) -> Value {
        let mut message = json!({"role": "assistant", "content": content});
        if !self.thought.is_empty() {
            message["reasoning_content"] = std::mem::take(&mut self.thought).into();
        }
        message
    }

    /// A call belongs to the message of the assistant that comes right before it.
    fn add_call(&mut self, path: &str, item: &Value) -> Result<(), ApiError> {
        let Some(name) = item["name"].as_str() else {
            return Err(wrong_type(&format!("{path}.name"), "a string", &item["name"]));
        };
        let arguments = match &item["arguments"] {
            Value::String(text) if text.trim().is_empty() => json!({}),
            Value::String(text) => serde_json::from_str::<Map<String, Value>>(text).map(Value::from).map_err(|e| {
                ApiError::field(&format!("{path}.arguments"), format_args!("expected a JSON object in a string: {e}"))
            })?,
            other => return Err(wrong_type(&format!("{path}.arguments"), "a JSON object in a string", other)),
        };
        let call =
            json!({"id": item["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}});
        if !self.thought.is_empty() || self.messages.last().is_none_or(|last| last["role"] != "assistant") {
            let message = self.assistant(String::new());
            self.messages.push(message);
        }
        let message = self.messages.last_mut().and_then(Value::as_object_mut).expect("an object was put there");
        let calls = message.entry("tool_calls").or_insert_with(|| json!([]));
        calls.as_array_mut().expect("a list was put there").push(call);
        Ok(())
    }
}

/// Text, or parts of text one after the other.
fn text(path: &str, content: &Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts.iter().enumerate().map(|(i, p)| part_text(&format!("{path}[{i}]"), p)).collect(),
        other => Err(wrong_type(path, "a string or a list of parts", other)),
    }
}

fn part_text(path: &str, part: &Value) -> Result<String, ApiError> {
    let name = match part["type"].as_str() {
        Some("input_text" | "output_text" | "text") => "text",
        Some("refusal") => "refusal",
        Some(kind @ ("input_image" | "input_audio" | "input_file")) => {
            let what = kind.trim_start_matches("input_");
            let message = format_args!("{what} input is not supported: the model reads text only");
            return Err(ApiError::unsupported(&format!("{path}.type"), message));
        }
        _ => {
            let message = format_args!("expected \"input_text\" or \"output_text\", got {}", part["type"]);
            return Err(ApiError::unsupported(&format!("{path}.type"), message));
        }
    };
    let text = part[name].as_str().map(str::to_string);
    text.ok_or_else(|| wrong_type(&format!("{path}.{name}"), "a string", &part[name]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages() {
        let body = json!({
            "model": "m", "instructions": "Be brief.", "max_output_tokens": 9, "store": true, "temperature": 0.5,
            "reasoning": {"effort": "none"}, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": null}],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{\"x\":1}"},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": ""},
                {"type": "function_call_output", "call_id": "c1", "output": "42"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
            ],
        });
        let call = |id: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
        let expected = json!({
            "temperature": 0.5, "max_tokens": 9, "logprobs": true, "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": false},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "Well.", "reasoning_content": "hm",
                 "tool_calls": [call("c1", json!({"x": 1})), call("c2", json!({}))]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                {"role": "tool", "tool_call_id": "c2", "content": "43"},
            ],
        });
        assert_eq!(in_chat_form(&body).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_done_is_named_by_its_path() {
        let param = |body: Value| in_chat_form(&body).unwrap_err().param.unwrap();
        let with = |name: &str, value: Value| param(json!({"input": "x", name: value}));
        assert_eq!(with("previous_response_id", json!("resp_1")), "previous_response_id");
        assert_eq!(with("conversation", json!("c")), "conversation");
        assert_eq!(with("background", json!(true)), "background");
        assert_eq!(with("instructions", json!(1)), "instructions");
        assert_eq!(with("tools", json!([{"type": "web_search"}])), "tools[0].type");
        assert_eq!(with("tools", json!([{"type": "function"}])), "tools[0].name");
        assert_eq!(with("tool_choice", json!({"type": "mcp"})), "tool_choice");
        assert_eq!(with("text", json!({"format": {"type": "json_schema", "name": "n"}})), "text.format.schema");
        assert_eq!(param(json!({})), "input");
        assert_eq!(param(json!({"input": []})), "input");
        let of_item = |item: Value| param(json!({"input": [item]}));
        assert_eq!(of_item(json!({"role": "wizard", "content": "x"})), "input[0].role");
        assert_eq!(of_item(json!({"role": "user"})), "input[0].content");
        assert_eq!(of_item(json!({"role": "user", "content": [{"type": "input_image"}]})), "input[0].content[0].type");
        assert_eq!(of_item(json!({"role": "user", "content": [{"type": "input_text"}]})), "input[0].content[0].text");
        assert_eq!(of_item(json!({"type": "item_reference", "id": "1"})), "input[0].type");
        let call = |arguments: Value| of_item(json!({"type": "function_call", "name": "f", "arguments": arguments}));
        assert_eq!(call(json!("{")), "input[0].arguments");
        assert_eq!(call(json!("[]")), "input[0].arguments");
        assert_eq!(of_item(json!({"type": "function_call"})), "input[0].name");
        assert_eq!(of_item(json!({"type": "function_call_output"})), "input[0].output");
    }
}
