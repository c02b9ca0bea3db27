//! Ollama's requests in the form that chats are read in.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answer::Shape;
use crate::errors::ApiError;
use crate::extract::kind_of;
use crate::model::Model;

/// The fields of both kinds of request. `keep_alive` is taken and means nothing: the model stays.
#[derive(Deserialize)]
pub(super) struct Wire {
    pub(super) model: Option<String>,
    pub(super) stream: Option<bool>,
    options: Option<Map<String, Value>>,
    format: Option<Value>,
    think: Option<Value>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    tools: Option<Vec<Value>>,
    prompt: Option<String>,
    system: Option<String>,
    template: Option<String>,
    suffix: Option<String>,
    raw: Option<bool>,
    context: Option<Vec<i64>>,
    images: Option<Vec<Value>>,
}

/// Options that have a name and meaning here too, and their names.
const SAME: [(&str, &str); 12] = [
    ("num_predict", "max_tokens"),
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("repeat_penalty", "repetition_penalty"),
    ("repeat_last_n", "repeat_last_n"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("logit_bias", "logit_bias"),
];

/// Options that change an answer in a way that is not there, and the value that leaves it alone.
const NEUTRAL: [(&str, f64); 3] = [("mirostat", 0.0), ("tfs_z", 1.0), ("typical_p", 1.0)];

impl Wire {
    /// Refuses what would be answered otherwise than asked.
    pub(super) fn refuse(&self, model: &Model) -> Result<(), ApiError> {
        let has = |text: &Option<String>| text.as_ref().is_some_and(|t| !t.is_empty());
        let not = |param, message: &str| Err(ApiError::unsupported(param, message));
        if has(&self.template) {
            return not(
                "template",
                "prompts are made by the template of the model's file; use raw for one of your own",
            );
        }
        if self.after().is_some() && self.raw == Some(true) {
            return not("suffix", "is not supported together with raw, whose prompt goes to the model as it is");
        }
        if self.images.as_ref().is_some_and(|i| !i.is_empty()) {
            return not("images", "this model reads text only");
        }
        if self.context.as_ref().is_some_and(|c| !c.is_empty()) {
            return not("context", "is not kept; use /api/chat with the messages so far");
        }
        let options = self.options.iter().flatten();
        for (name, value) in options {
            let param = format!("options.{name}");
            if let Some((_, neutral)) = NEUTRAL.iter().find(|(n, _)| n == name)
                && value.as_f64() != Some(*neutral)
            {
                return Err(ApiError::unsupported(&param, format_args!("is not supported, unless it is {neutral}")));
            }
            let n_ctx = model.about.n_ctx;
            if name == "num_ctx" && value.as_f64().is_none_or(|n| n > n_ctx as f64) {
                let message =
                    format_args!("this server's context holds {n_ctx}, got {value}; start it with --ctx {value}");
                return Err(ApiError::field(&param, message));
            }
        }
        let thinks = model.about.template.as_ref().is_some_and(|t| super::models::thinks(t.source()));
        let asks = self.think.as_ref().is_some_and(|t| *t == true || t.as_str().is_some_and(|t| !t.is_empty()));
        match asks && !thinks {
            true => Err(ApiError::field("think", format_args!("{:?} does not support thinking", model.names.id))),
            false => Ok(()),
        }
    }

    /// What comes after the text that is asked for, where that is between two texts.
    fn after(&self) -> Option<&String> {
        self.suffix.as_ref().filter(|s| !s.is_empty())
    }

    /// Whether the prompt is a text to be gone on with, and no conversation.
    pub(super) fn is_text(&self, shape: Shape) -> bool {
        shape == Shape::Text && (self.raw == Some(true) || self.after().is_some())
    }

    /// The fields that do not depend on what is asked.
    fn common(&self) -> Result<Map<String, Value>, ApiError> {
        let mut out = Map::new();
        for (name, value) in self.options.iter().flatten().filter(|(_, v)| !v.is_null()) {
            let Some((_, ours)) = SAME.iter().find(|(theirs, _)| theirs == name) else { continue };
            // Numbers below one say no limit.
            let is_endless = name == "num_predict" && value.as_f64().is_some_and(|n| n < 1.0);
            if !is_endless {
                out.insert(ours.to_string(), whole_number(value));
            }
        }
        out.insert("logprobs".to_string(), self.logprobs.into());
        if self.logprobs == Some(true) {
            out.insert("top_logprobs".to_string(), self.top_logprobs.into());
        }
        if let Some(tools) = &self.tools {
            out.insert("tools".to_string(), tools.clone().into());
        }
        match &self.format {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) if text == "json" => {
                out.insert("response_format".to_string(), json!({"type": "json_object"}));
            }
            Some(schema @ Value::Object(_)) => {
                let schema = json!({"name": "format", "schema": schema, "strict": true});
                out.insert("response_format".to_string(), json!({"type": "json_schema", "json_schema": schema}));
            }
            Some(other) => {
                return Err(ApiError::field("format", format_args!("expected \"json\" or a JSON schema, got {other}")));
            }
        }
        let kwargs = match &self.think {
            None | Some(Value::Null) => None,
            Some(Value::Bool(think)) => Some(json!({"enable_thinking": think})),
            Some(Value::String(level)) => Some(json!({"enable_thinking": true, "reasoning_effort": level})),
            Some(other) => {
                let got = kind_of(other);
                return Err(ApiError::field("think", format_args!("expected true, false or a level, got {got}")));
            }
        };
        if let Some(kwargs) = kwargs {
            out.insert("chat_template_kwargs".to_string(), kwargs);
        }
        Ok(out)
    }
}

/// Clients of languages without integers write 40.0.
fn whole_number(value: &Value) -> Value {
    match value.as_f64() {
        Some(f) if value.is_f64() && f.fract() == 0.0 && f.abs() < 9e15 => (f as i64).into(),
        _ => value.clone(),
    }
}

/// A chat, or nothing where there are no messages.
pub(super) fn of_chat(wire: &Wire, body: &mut Value) -> Result<Option<Value>, ApiError> {
    let mut messages = match body.get_mut("messages").map(Value::take) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(messages)) if messages.is_empty() => return Ok(None),
        Some(Value::Array(messages)) => messages,
        Some(other) => {
            return Err(ApiError::field("messages", format_args!("expected a list, got {}", kind_of(&other))));
        }
    };
    for (i, message) in messages.iter_mut().enumerate() {
        let Some(message) = message.as_object_mut() else { continue };
        if message.remove("images").is_some_and(|images| images.as_array().is_some_and(|i| !i.is_empty())) {
            return Err(ApiError::unsupported(&format!("messages[{i}].images"), "this model reads text only"));
        }
        if message.get("content").is_none_or(Value::is_null) {
            message.insert("content".to_string(), "".into());
        }
        for (theirs, ours) in [("thinking", "reasoning_content"), ("tool_name", "name")] {
            if let Some(value) = message.remove(theirs).filter(|v| !v.is_null()) {
                message.insert(ours.to_string(), value);
            }
        }
    }
    let mut out = wire.common()?;
    out.insert("messages".to_string(), messages.into());
    Ok(Some(Value::Object(out)))
}

/// A text to be answered, or to be gone on with where it is raw or another comes after it; nothing where there is none.
pub(super) fn of_text(wire: &Wire) -> Result<Option<Value>, ApiError> {
    let Some(prompt) = wire.prompt.as_ref().filter(|p| !p.is_empty()) else { return Ok(None) };
    let mut out = wire.common()?;
    if wire.is_text(Shape::Text) {
        out.insert("prompt".to_string(), prompt.clone().into());
        out.extend(wire.after().map(|after| ("suffix".to_string(), after.clone().into())));
        return Ok(Some(Value::Object(out)));
    }
    let system = wire.system.as_ref().filter(|s| !s.is_empty()).map(|s| json!({"role": "system", "content": s}));
    let messages: Vec<Value> = system.into_iter().chain([json!({"role": "user", "content": prompt})]).collect();
    out.insert("messages".to_string(), messages.into());
    Ok(Some(Value::Object(out)))
}
