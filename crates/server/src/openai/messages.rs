//! Conversations: OpenAI's messages, checked, in the form that chat templates read.

use serde_json::{Map, Value};

use crate::errors::ApiError;
use crate::extract::kind_of;

/// A conversation for the template.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    /// The beginning of the answer, where the last message is the assistant's.
    pub(super) begun: Option<String>,
}

/// Reads `messages`.
///
/// # Errors
/// None at all, or one that is no message, named by its path.
pub(super) fn read(messages: Option<Value>) -> Result<Conversation, ApiError> {
    let messages = match messages {
        Some(Value::Array(messages)) if !messages.is_empty() => messages,
        Some(Value::Array(_)) => return Err(ApiError::field("messages", "expected at least one message")),
        other => {
            let got = other.as_ref().map_or("nothing", kind_of);
            return Err(wrong_type("messages", format_args!("expected a list of messages, got {got}")));
        }
    };
    let read = |(i, message)| read_one(&format!("messages[{i}]"), message);
    let mut messages = messages.into_iter().enumerate().map(read).collect::<Result<Vec<Value>, _>>()?;
    let is_begun = |m: &mut Value| m["role"] == "assistant" && m.get("tool_calls").is_none();
    if messages.iter_mut().rev().take(2).filter_map(|m| is_begun(m).then_some(())).count() == 2 {
        let message = "the last two are the assistant's; one at most can be gone on with";
        return Err(ApiError::field("messages", message));
    }
    let begun = messages.pop_if(is_begun).map(|m| m["content"].as_str().unwrap_or_default().to_string());
    Ok(Conversation { messages, begun })
}

fn wrong_type(param: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError { code: Some("invalid_type"), ..ApiError::field(param, message) }
}

fn read_one(path: &str, message: Value) -> Result<Value, ApiError> {
    let mut message = match message {
        Value::Object(message) => message,
        other => return Err(wrong_type(path, format_args!("expected an object, got {}", kind_of(&other)))),
    };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.clone(),
        other => {
            let got = other.map_or("nothing", kind_of);
            return Err(wrong_type(&format!("{path}.role"), format_args!("expected a string, got {got}")));
        }
    };
    let role = match role.as_str() {
        // The same to every template there is.
        "system" | "developer" => "system",
        "tool" | "function" => "tool",
        "user" => "user",
        "assistant" => "assistant",
        _ => {
            let expected = "expected system, developer, user, assistant, tool or function";
            return Err(ApiError::field(&format!("{path}.role"), format_args!("{expected}, got {role:?}")));
        }
    };
    message.insert("role".to_string(), role.into());
    let may_be_silent = matches!(role, "assistant" | "tool");
    let content = content(&format!("{path}.content"), message.remove("content"), may_be_silent)?;
    message.insert("content".to_string(), content.into());
    tool_calls(path, &mut message)?;
    Ok(Value::Object(message))
}

/// The text of a message: a string, or parts of type text, one after the other.
fn content(path: &str, content: Option<Value>, may_be_silent: bool) -> Result<String, ApiError> {
    match content {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let texts = parts.into_iter().enumerate().map(|(i, part)| part_text(&format!("{path}[{i}]"), part));
            texts.collect()
        }
        None | Some(Value::Null) if may_be_silent => Ok(String::new()),
        other => {
            let got = other.as_ref().map_or("nothing", kind_of);
            Err(wrong_type(path, format_args!("expected a string or a list of parts, got {got}")))
        }
    }
}

fn part_text(path: &str, part: Value) -> Result<String, ApiError> {
    match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text") | None, Some(Value::String(text))) => Ok(text.clone()),
        (Some("text") | None, other) => {
            let got = other.map_or("nothing", kind_of);
            Err(wrong_type(&format!("{path}.text"), format_args!("expected a string, got {got}")))
        }
        (Some(kind), _) => {
            Err(ApiError::unsupported(&format!("{path}.type"), format_args!("expected \"text\", got {kind:?}")))
        }
    }
}

/// Checks calls that the assistant made before. Templates read arguments as an object, where the wire has JSON in a string.
fn tool_calls(path: &str, message: &mut Map<String, Value>) -> Result<(), ApiError> {
    let path = format!("{path}.tool_calls");
    match message.get_mut("tool_calls") {
        None => Ok(()),
        Some(Value::Null) => {
            message.remove("tool_calls");
            Ok(())
        }
        Some(Value::Array(calls)) if calls.is_empty() => {
            message.remove("tool_calls");
            Ok(())
        }
        Some(Value::Array(calls)) => {
            calls.iter_mut().enumerate().try_for_each(|(i, call)| tool_call(&format!("{path}[{i}].function"), call))
        }
        Some(other) => Err(wrong_type(&path, format_args!("expected a list, got {}", kind_of(other)))),
    }
}

fn tool_call(path: &str, call: &mut Value) -> Result<(), ApiError> {
    let Some(Value::Object(function)) = call.get_mut("function") else {
        return Err(wrong_type(path, "expected an object with name and arguments"));
    };
    if !function.get("name").is_some_and(Value::is_string) {
        return Err(wrong_type(&format!("{path}.name"), "expected a string"));
    }
    let arguments = match function.get("arguments") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(arguments)) => arguments.clone(),
        Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|e| {
            ApiError::field(&format!("{path}.arguments"), format_args!("expected a JSON object in a string: {e}"))
        })?,
        Some(other) => {
            let message = format!("expected a JSON object in a string, got {}", kind_of(other));
            return Err(wrong_type(&format!("{path}.arguments"), message));
        }
    };
    function.insert("arguments".to_string(), Value::Object(arguments));
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn param(messages: Value) -> String {
        read(Some(messages)).unwrap_err().param.expect("the path of what is wrong")
    }

    #[test]
    fn messages_become_what_templates_read() {
        let read = read(Some(json!([
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "", "name": "u"},
            {"role": "assistant", "content": null,
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ])));
        let expected = json!([
            {"role": "system", "content": "ab"},
            {"role": "user", "name": "u", "content": ""},
            {"role": "assistant", "content": "",
             "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]);
        let read = read.unwrap();
        assert_eq!(Value::Array(read.messages), expected);
        assert_eq!(read.begun, None, "a tool's result is answered, not continued");
    }

    #[test]
    fn a_last_message_of_the_assistant_is_the_beginning_of_the_answer() {
        let conversation =
            read(Some(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Well, "}]))).unwrap();
        assert_eq!(conversation.messages, [json!({"role": "user", "content": "q"})]);
        assert_eq!(conversation.begun.as_deref(), Some("Well, "));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        assert_eq!(param(json!("hi")), "messages");
        assert_eq!(param(json!([])), "messages");
        assert_eq!(param(json!([1])), "messages[0]");
        let said = json!({"role": "assistant", "content": "x"});
        assert_eq!(param(json!([{"role": "user", "content": "q"}, said, said])), "messages");
        assert_eq!(param(json!([{"content": "x"}])), "messages[0].role");
        assert_eq!(param(json!([{"role": "wizard", "content": "x"}])), "messages[0].role");
        assert_eq!(param(json!([{"role": "user", "content": null}])), "messages[0].content");
        assert_eq!(param(json!([{"role": "user", "content": 5}])), "messages[0].content");
        assert_eq!(param(json!([{"role": "user", "content": [{"type": "image_url"}]}])), "messages[0].content[0].type");
        assert_eq!(param(json!([{"role": "user", "content": [{"type": "text"}]}])), "messages[0].content[0].text");
        let call = |f: Value| json!([{"role": "assistant", "tool_calls": [{"function": f}]}]);
        assert_eq!(param(call(json!({"arguments": "{}"}))), "messages[0].tool_calls[0].function.name");
        let broken = call(json!({"name": "f", "arguments": "{"}));
        assert_eq!(param(broken), "messages[0].tool_calls[0].function.arguments");
        assert!(read(None).is_err());
    }
}
