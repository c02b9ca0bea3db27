//! What an answer may be: `response_format`, and the fields in which clients of llama.cpp and vLLM say the same.

use std::time::Duration;

use apr_engine::constraint::{Constraint, ConstraintError, Form, Grammar, Thought};
use serde_json::{Value, json};

use super::given;
use crate::errors::ApiError;
use crate::extract::kind_of;
use crate::model::Model;
use crate::prompt::elsewhere;

/// What a constraint may take to compile.
const COMPILE_TIME: Duration = Duration::from_millis(900);
/// Constraints that are compiled at a time. One that takes longer than it may cannot be stopped; with fewer of them than there are
/// threads for prompts, prompts of others are made all the same.
pub(crate) const N_COMPILING: usize = 2;

/// Reads what the answer may be; none is any text.
///
/// # Errors
/// A format that is not known, lacks something, or is asked for twice.
pub(crate) fn read(body: &Value) -> Result<Option<Form>, ApiError> {
    let mut found: Vec<(String, Form)> = Vec::new();
    if let Some(format) = given(body, "response_format") {
        found.extend(response_format(format)?.map(|form| ("response_format".to_string(), form)));
    }
    let nested = nested(body)?;
    for (param, value, read) in [
        ("json_schema", given(body, "json_schema"), schema as Read),
        ("grammar", given(body, "grammar"), grammar),
        ("guided_json", given(body, "guided_json"), schema),
        ("guided_regex", given(body, "guided_regex"), regex),
        ("guided_choice", given(body, "guided_choice"), choice),
        ("guided_grammar", given(body, "guided_grammar"), grammar),
        ("structured_outputs.json", given(nested, "json"), schema),
        ("structured_outputs.regex", given(nested, "regex"), regex),
        ("structured_outputs.choice", given(nested, "choice"), choice),
        ("structured_outputs.grammar", given(nested, "grammar"), grammar),
        ("structured_outputs.json_object", given(nested, "json_object").filter(|v| **v != false), any_object),
    ] {
        // llama.cpp's clients leave fields empty that they do not use.
        if let Some(value) = value.filter(|v| **v != "") {
            found.push((param.to_string(), read(param, value)?));
        }
    }
    match found.get(1) {
        Some((param, _)) => Err(ApiError::field(param, format_args!("{} says what the answer is already", found[0].0))),
        None => Ok(found.pop().map(|(_, form)| form)),
    }
}

/// vLLM's `structured_outputs`, or null.
///
/// # Errors
/// What is no object, and a form of answers that would be left out.
fn nested(body: &Value) -> Result<&Value, ApiError> {
    let nested = given(body, "structured_outputs").unwrap_or(&Value::Null);
    if !matches!(nested, Value::Object(_) | Value::Null) {
        let message = format_args!("expected an object, got {}", kind_of(nested));
        return Err(ApiError::field("structured_outputs", message));
    }
    match given(nested, "structural_tag") {
        Some(_) => {
            Err(ApiError::unsupported("structured_outputs.structural_tag", "is not supported; tools have calls"))
        }
        None => Ok(nested),
    }
}

/// Compiles forms of which an answer has one; none is any text.
///
/// # Errors
/// What is malformed, not supported, or too large; as many as are compiled at a time, where none of them is soon done.
pub(crate) async fn constraint(
    model: &Model,
    thought: Thought,
    forms: Vec<Form>,
    begun: &str,
) -> Result<Option<Constraint>, ApiError> {
    if forms.is_empty() {
        return Ok(None);
    }
    let param = match forms[..] {
        [Form::Calls(_)] => "tools",
        _ => "response_format",
    };
    let refused = |e: ConstraintError| {
        let e = ApiError::invalid("invalid_schema", format!("{param}: {e}"));
        ApiError { param: Some(param.to_string()), ..e }
    };
    let about = model.about.clone();
    let prepare = move || {
        about.constraints.prepare();
        Ok(())
    };
    elsewhere(prepare).await?;
    let (about, begun) = (model.about.clone(), begun.to_string());
    let turn = tokio::time::timeout(COMPILE_TIME, model.compiling.clone().acquire_owned()).await;
    let turn = turn.map_err(|_| ApiError::busy())?;
    let compiling = elsewhere(move || {
        let compiled = about.constraints.compile(&Grammar { thought, forms }, &begun);
        // Held however long it took, whether or not somebody still waits.
        drop(turn);
        Ok(compiled)
    });
    match tokio::time::timeout(COMPILE_TIME, compiling).await {
        Ok(compiled) => compiled?.map(Some).map_err(refused),
        Err(_) => {
            let message = format!("takes more than {} s to compile", COMPILE_TIME.as_secs_f32());
            Err(refused(ConstraintError::Refused(message)))
        }
    }
}

type Read = fn(&str, &Value) -> Result<Form, ApiError>;

fn response_format(format: &Value) -> Result<Option<Form>, ApiError> {
    let missing = |name: &str| ApiError::field(&format!("response_format.{name}"), "is missing");
    let part = |name: &str| given(format, name).ok_or_else(|| missing(name));
    if !format.is_object() {
        return Err(ApiError::field("response_format", format_args!("expected an object, got {}", kind_of(format))));
    }
    match given(format, "type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        // llama.cpp puts a schema beside this type.
        Some("json_object") => match given(format, "schema") {
            Some(value) => schema("response_format.schema", value).map(Some),
            None => any_object("", format).map(Some),
        },
        // The schema stands within json_schema, where some clients of llama.cpp put it beside the type.
        Some("json_schema") => match (given(format, "json_schema"), given(format, "schema")) {
            (Some(inner), _) => {
                let value = given(inner, "schema").ok_or_else(|| missing("json_schema.schema"))?;
                schema("response_format.json_schema.schema", value).map(Some)
            }
            (None, Some(value)) => schema("response_format.schema", value).map(Some),
            (None, None) => Err(missing("json_schema")),
        },
        Some("regex") => regex("response_format.regex", part("regex")?).map(Some),
        Some("grammar") => grammar("response_format.grammar", part("grammar")?).map(Some),
        _ => {
            let got = format.get("type").unwrap_or(&Value::Null);
            let message = format_args!("expected text, json_object, json_schema, regex or grammar, got {got}");
            Err(ApiError::field("response_format.type", message))
        }
    }
}

fn any_object(_: &str, _: &Value) -> Result<Form, ApiError> {
    Ok(Form::Json(json!({"type": "object"})))
}

/// A schema, or its text.
fn schema(param: &str, value: &Value) -> Result<Form, ApiError> {
    match value {
        Value::Object(_) | Value::Bool(_) => Ok(Form::Json(value.clone())),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(schema) => Ok(Form::Json(schema)),
            Err(e) => Err(ApiError::field(param, format_args!("is not JSON: {e}"))),
        },
        other => Err(ApiError::field(param, format_args!("expected a JSON schema, got {}", kind_of(other)))),
    }
}

fn text<'a>(param: &str, value: &'a Value) -> Result<&'a str, ApiError> {
    match value.as_str() {
        Some("") => Err(ApiError::field(param, "expected a string that is not empty")),
        Some(text) => Ok(text),
        None => Err(ApiError::field(param, format_args!("expected a string, got {}", kind_of(value)))),
    }
}

fn regex(param: &str, value: &Value) -> Result<Form, ApiError> {
    Ok(Form::Regex(text(param, value)?.to_string()))
}

/// A grammar in llama.cpp's syntax, which vLLM calls EBNF, or else in Lark's.
fn grammar(param: &str, value: &Value) -> Result<Form, ApiError> {
    let text = text(param, value)?.to_string();
    Ok(if is_gbnf(&text) { Form::Gbnf(text) } else { Form::Lark(text) })
}

/// Whether a line begins with `name ::=`, as no line of Lark's does.
fn is_gbnf(text: &str) -> bool {
    let is_name =
        |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    text.lines().filter_map(|line| line.split_once("::=")).any(|(name, _)| is_name(name.trim()))
}

fn choice(param: &str, value: &Value) -> Result<Form, ApiError> {
    let texts = value.as_array().filter(|list| !list.is_empty());
    let texts = texts.and_then(|list| list.iter().map(|t| t.as_str().map(str::to_string)).collect());
    texts.map(Form::Choice).ok_or_else(|| ApiError::field(param, "expected a list of strings"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use apr_engine::device::Device;
    use apr_engine::{Engine, EngineOptions, KvType};

    use super::*;
    use crate::model::limits;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

    #[tokio::test]
    async fn only_so_many_are_compiled_at_a_time() {
        let device = Device::Cpu { n_threads: Some(1), isa: None };
        let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(64) };
        let engine = Engine::load(Path::new(TINY), options).unwrap();
        let limits = limits(&engine, 1, 1);
        let model = Model::start(engine, limits, Vec::new()).unwrap();
        let compile = || constraint(&model, Thought::None, vec![Form::Regex("a".to_string())], "");
        // As if as many were being compiled and came to no end.
        let held = model.compiling.clone().acquire_many_owned(N_COMPILING as u32).await.unwrap();
        assert_eq!(compile().await.unwrap_err().code, Some("queue_full"));
        drop(held);
        assert!(compile().await.unwrap().is_some());
        assert_eq!(model.compiling.available_permits(), N_COMPILING);
    }
}
