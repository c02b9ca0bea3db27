//! Requests: Anthropic's form put into that of OpenAI's chats. What neither knows is left out.

use serde_json::{Map, Value, json};

use crate::errors::ApiError;
use crate::extract::kind_of;
use crate::openai::given;

/// What fields are called here that are named otherwise in the chat form.
pub(super) const NAMES: [(&str, &str); 3] = [
    ("stop", "stop_sequences"),
    ("response_format", "output_config.format"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
];

/// Fields that mean the same in both forms; those after the first three are none of Anthropic's.
const SAME: [&str; 10] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
];

/// A request as a chat without a limit of tokens.
///
/// # Errors
/// What cannot be told to a model of text, by its path.
pub(super) fn in_chat_form(mut body: Value) -> Result<Value, ApiError> {
    let mut chat = Map::new();
    for name in SAME {
        chat.extend(given(&body, name).map(|value| (name.to_string(), value.clone())));
    }
    chat.extend(given(&body, "stop_sequences").map(|stop| ("stop".to_string(), stop.clone())));
    chat.extend(template_fields(&body)?.map(|kwargs| ("chat_template_kwargs".to_string(), kwargs)));
    chat.extend(output_format(&body).map(|format| ("response_format".to_string(), format)));
    if let Some(tools) = given(&body, "tools") {
        let tools = list("tools", tools)?.iter().enumerate().map(|(i, t)| tool(&format!("tools[{i}]"), t));
        chat.insert("tools".to_string(), tools.collect::<Result<_, _>>()?);
    }
    if let Some(choice) = given(&body, "tool_choice") {
        chat.insert("tool_choice".to_string(), tool_choice(choice)?);
        let is_one = given(choice, "disable_parallel_tool_use").is_some_and(|disable| disable == true);
        chat.insert("parallel_tool_calls".to_string(), (!is_one).into());
    }
    let mut messages = Vec::new();
    if let Some(system) = given(&body, "system") {
        messages.push(json!({"role": "system", "content": text("system", system)?}));
    }
    let conversation = body.get_mut("messages").map_or(Value::Null, Value::take);
    let conversation = list("messages", &conversation)?;
    if conversation.is_empty() {
        return Err(ApiError::field("messages", "expected at least one message"));
    }
    for (i, message) in conversation.iter().enumerate() {
        add_message(&mut messages, &format!("messages[{i}]"), message)?;
    }
    chat.insert("messages".to_string(), messages.into());
    Ok(chat.into())
}

fn wrong_type(param: &str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "nothing",
        got => kind_of(got),
    };
    ApiError { code: Some("invalid_type"), ..ApiError::field(param, format_args!("expected {expected}, got {got}")) }
}

fn list<'a>(param: &str, value: &'a Value) -> Result<&'a [Value], ApiError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| wrong_type(param, "a list", value))
}

/// Variables of the template: whether to think, and what the client sets itself.
fn template_fields(body: &Value) -> Result<Option<Value>, ApiError> {
    let own = given(body, "chat_template_kwargs").cloned();
    let Some(thinking) = given(body, "thinking") else { return Ok(own) };
    let enable = match thinking["type"].as_str() {
        Some("enabled") => true,
        Some("disabled") => false,
        // The model decides, which is what it does unasked.
        Some("adaptive" | "between_tools") => return Ok(own),
        _ => {
            let message = format_args!("expected \"enabled\", \"disabled\" or \"adaptive\", got {}", thinking["type"]);
            return Err(ApiError::field("thinking.type", message));
        }
    };
    let mut kwargs = own.unwrap_or_else(|| json!({}));
    if let Some(kwargs) = kwargs.as_object_mut() {
        kwargs.insert("enable_thinking".to_string(), enable.into());
    }
    Ok(Some(kwargs))
}

/// The form of the answer's text, where one is asked for.
fn output_format(body: &Value) -> Option<Value> {
    let format = given(body, "output_config").and_then(|c| given(c, "format")).or(given(body, "output_format"))?;
    match format["type"].as_str() {
        Some("json_schema") => {
            let schema = json!({"name": "output", "schema": format["schema"], "strict": true});
            Some(json!({"type": "json_schema", "json_schema": schema}))
        }
        _ => Some(format.clone()),
    }
}

fn tool(path: &str, tool: &Value) -> Result<Value, ApiError> {
    if tool["name"].as_str().is_none_or(str::is_empty) {
        return Err(ApiError::field(&format!("{path}.name"), "expected a name"));
    }
    let Some(schema) = given(tool, "input_schema") else {
        let message = match tool["type"].as_str() {
            Some(kind) if kind != "custom" => {
                format!("expected a schema; tools that the server has itself, as {kind:?}, are not supported")
            }
            _ => "expected a schema".to_string(),
        };
        return Err(ApiError::field(&format!("{path}.input_schema"), message));
    };
    let mut function = Map::new();
    function.insert("name".to_string(), tool["name"].clone());
    function.extend(given(tool, "description").map(|d| ("description".to_string(), d.clone())));
    function.insert("parameters".to_string(), schema.clone());
    function.extend(given(tool, "strict").map(|strict| ("strict".to_string(), strict.clone())));
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: &Value) -> Result<Value, ApiError> {
    match (choice["type"].as_str(), choice["name"].as_str()) {
        (Some("auto"), _) => Ok("auto".into()),
        (Some("any"), _) => Ok("required".into()),
        (Some("none"), _) => Ok("none".into()),
        (Some("tool"), Some(name)) => Ok(json!({"type": "function", "function": {"name": name}})),
        (Some("tool"), None) => Err(ApiError::field("tool_choice.name", "expected the name of a tool")),
        _ => {
            let expected = "expected \"auto\", \"any\", \"tool\" or \"none\"";
            Err(ApiError::field("tool_choice.type", format_args!("{expected}, got {}", choice["type"])))
        }
    }
}

/// Text, or blocks of text one after the other.
fn text(path: &str, content: &Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => {
            blocks.iter().enumerate().map(|(i, b)| block_text(&format!("{path}[{i}]"), b)).collect()
        }
        other => Err(wrong_type(path, "a string or a list of blocks", other)),
    }
}

fn block_text(path: &str, block: &Value) -> Result<String, ApiError> {
    match (block["type"].as_str(), &block["text"]) {
        (Some("text"), Value::String(text)) => Ok(text.clone()),
        (Some("text"), other) => Err(wrong_type(&format!("{path}.text"), "a string", other)),
        (Some("image"), _) => {
            let message = "image input is not supported: the model reads text only";
            Err(ApiError::unsupported(&format!("{path}.type"), message))
        }
        (Some(kind), _) => {
            let message = format_args!("blocks of type {kind:?} are not supported here");
            Err(ApiError::unsupported(&format!("{path}.type"), message))
        }
        (None, _) => Err(wrong_type(&format!("{path}.type"), "a string", &block["type"])),
    }
}

/// Adds what a message becomes: none, one or several of the chat form.
fn add_message(messages: &mut Vec<Value>, path: &str, message: &Value) -> Result<(), ApiError> {
    let content_path = format!("{path}.content");
    let content = &message["content"];
    match message["role"].as_str() {
        Some("user") => add_user(messages, &content_path, content),
        Some("assistant") => add_assistant(messages, &content_path, content),
        Some("system") => {
            messages.push(json!({"role": "system", "content": text(&content_path, content)?}));
            Ok(())
        }
        Some(role) => {
            let message = format_args!("expected \"user\" or \"assistant\", got {role:?}");
            Err(ApiError::field(&format!("{path}.role"), message))
        }
        None => Err(wrong_type(&format!("{path}.role"), "a string", &message["role"])),
    }
}

/// Results of tools come first, as they answer the calls before; then what the user says.
fn add_user(messages: &mut Vec<Value>, path: &str, content: &Value) -> Result<(), ApiError> {
    let Value::Array(blocks) = content else {
        messages.push(json!({"role": "user", "content": text(path, content)?}));
        return Ok(());
    };
    let (mut said, mut n_result) = (String::new(), 0);
    for (i, block) in blocks.iter().enumerate() {
        let path = format!("{path}[{i}]");
        if block["type"] != "tool_result" {
            said += &block_text(&path, block)?;
            continue;
        }
        let result = given(block, "content").map_or(Ok(String::new()), |c| text(&format!("{path}.content"), c))?;
        messages.push(json!({"role": "tool", "tool_call_id": block["tool_use_id"], "content": result}));
        n_result += 1;
    }
    if n_result == 0 || !said.is_empty() {
        messages.push(json!({"role": "user", "content": said}));
    }
    Ok(())
}

/// Messages of the assistant that follow one another are one, as Anthropic's API has it.
fn add_assistant(messages: &mut Vec<Value>, path: &str, content: &Value) -> Result<(), ApiError> {
    let (mut said, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
    match content {
        Value::Array(blocks) => {
            for (i, block) in blocks.iter().enumerate() {
                let path = format!("{path}[{i}]");
                match block["type"].as_str() {
                    Some("thinking") => thought += block["thinking"].as_str().unwrap_or_default(),
                    Some("redacted_thinking") => {}
                    Some("tool_use") => calls.push(call(&path, block)?),
                    _ => said += &block_text(&path, block)?,
                }
            }
        }
        content => said = text(path, content)?,
    }
    if messages.last().is_none_or(|last| last["role"] != "assistant") {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
    let last = messages.last_mut().and_then(Value::as_object_mut).expect("an object was put there");
    append(last, "content", &said);
    if !thought.is_empty() {
        append(last, "reasoning_content", &thought);
    }
    if !calls.is_empty() {
        let all = last.entry("tool_calls").or_insert_with(|| json!([]));
        all.as_array_mut().expect("a list was put there").extend(calls);
    }
    Ok(())
}

fn append(message: &mut Map<String, Value>, name: &str, more: &str) {
    let before = message.get(name).and_then(Value::as_str).unwrap_or_default();
    message.insert(name.to_string(), format!("{before}{more}").into());
}

fn call(path: &str, block: &Value) -> Result<Value, ApiError> {
    let Some(name) = block["name"].as_str() else {
        return Err(wrong_type(&format!("{path}.name"), "a string", &block["name"]));
    };
    let input = match given(block, "input") {
        None => json!({}),
        Some(input @ Value::Object(_)) => input.clone(),
        Some(other) => return Err(wrong_type(&format!("{path}.input"), "an object", other)),
    };
    Ok(json!({"id": block["id"], "type": "function", "function": {"name": name, "arguments": input}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn reads(body: Value, expected: Value) {
        assert_eq!(in_chat_form(body).unwrap(), expected);
    }

    #[test]
    fn a_conversation_with_tools_becomes_a_chat() {
        let call = json!({"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
        reads(
            json!({
                "model": "m", "max_tokens": 9, "top_k": 3, "stop_sequences": ["A"], "metadata": {"user_id": "u"},
                "system": [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}],
                "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {}}],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "Well."}]},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]},
                    {"role": "user", "content": [
                        {"type": "text", "text": "and"},
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]}]},
                ],
            }),
            json!({
                "top_k": 3, "stop": ["A"], "chat_template_kwargs": {"enable_thinking": true},
                "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
                "tool_choice": "required", "parallel_tool_calls": false,
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "Well.", "reasoning_content": "hm", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "t1", "content": "42"},
                    {"role": "user", "content": "and"},
                ],
            }),
        );
    }

    #[test]
    fn choices_and_formats_have_their_counterparts() {
        let hi = json!([{"role": "user", "content": "hi"}]);
        let read = |mut body: Value| {
            body["messages"] = hi.clone();
            in_chat_form(body).unwrap()
        };
        for (choice, expected) in [
            (json!({"type": "auto"}), json!("auto")),
            (json!({"type": "none"}), json!("none")),
            (json!({"type": "tool", "name": "f"}), json!({"type": "function", "function": {"name": "f"}})),
        ] {
            let chat = read(json!({"tool_choice": choice}));
            assert_eq!((&chat["tool_choice"], &chat["parallel_tool_calls"]), (&expected, &json!(true)));
        }
        let thinking = |kind: &str| read(json!({"thinking": {"type": kind}})).get("chat_template_kwargs").cloned();
        assert_eq!(thinking("disabled"), Some(json!({"enable_thinking": false})));
        assert_eq!(thinking("adaptive"), None);
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        let chat = read(json!({"output_config": {"format": format}}));
        assert_eq!(chat["response_format"]["json_schema"]["schema"], json!({"type": "object"}));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        let param = |body: Value| in_chat_form(body).unwrap_err().param.unwrap();
        assert_eq!(param(json!({})), "messages");
        assert_eq!(param(json!({"messages": []})), "messages");
        assert_eq!(param(json!({"messages": [1]})), "messages[0].role");
        assert_eq!(param(json!({"messages": [{"role": "tool"}]})), "messages[0].role");
        assert_eq!(param(json!({"messages": [{"role": "user"}]})), "messages[0].content");
        let of_block = |role: &str, block: Value| param(json!({"messages": [{"role": role, "content": [block]}]}));
        assert_eq!(of_block("user", json!({"type": "text"})), "messages[0].content[0].text");
        assert_eq!(of_block("user", json!({"type": "image"})), "messages[0].content[0].type");
        assert_eq!(of_block("user", json!({"type": "tool_use"})), "messages[0].content[0].type");
        assert_eq!(of_block("assistant", json!({"type": "tool_use"})), "messages[0].content[0].name");
        let broken = json!({"type": "tool_use", "name": "f", "input": "{"});
        assert_eq!(of_block("assistant", broken), "messages[0].content[0].input");
        let image = json!({"type": "tool_result", "content": [{"type": "image"}]});
        assert_eq!(of_block("user", image), "messages[0].content[0].content[0].type");
        let with = |name: &str, value: Value| param(json!({"messages": [], name: value}));
        assert_eq!(with("system", json!(1)), "system");
        assert_eq!(with("tools", json!([{"name": "f"}])), "tools[0].input_schema");
        assert_eq!(with("tools", json!([{"type": "bash_20250124", "name": "bash"}])), "tools[0].input_schema");
        assert_eq!(with("tools", json!([{"input_schema": {}}])), "tools[0].name");
        assert_eq!(with("tool_choice", json!({"type": "tool"})), "tool_choice.name");
        assert_eq!(with("tool_choice", json!("auto")), "tool_choice.type");
        assert_eq!(with("thinking", json!({"type": "much"})), "thinking.type");
    }
}
