//! The one model, as Ollama's clients list, show and watch models.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use apr_engine::gguf::{Array, Value as Meta};
use apr_engine::output_parser::ToolForm;
use apr_engine::{About, demo};
use axum::Json;
use axum::extract::State as Shared;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::check_model;
use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::infill::FimTokens;
use crate::model::Model;
use crate::state::State;

/// How long Ollama says that a model stays which stays for good.
const FOR_GOOD: Duration = Duration::from_nanos(i64::MAX as u64);

/// Whether a template is one of a model that thinks.
pub(super) fn thinks(template: &str) -> bool {
    ["enable_thinking", "<think>"].iter().any(|word| template.contains(word))
}

/// `GET /api/tags`
pub(crate) async fn tags(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let mut card = card(&model);
    card["modified_at"] = modified(&model.about).into();
    Ok(Json(json!({"models": [card]})))
}

/// `GET /api/ps`
pub(crate) async fn ps(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let mut card = card(&model);
    card["expires_at"] = rfc3339(SystemTime::now() + FOR_GOOD).into();
    card["size_vram"] = 0.into();
    card["context_length"] = model.about.n_ctx.into();
    Ok(Json(json!({"models": [card]})))
}

#[derive(Deserialize)]
struct Show {
    model: Option<String>,
    /// What `model` was called before.
    name: Option<String>,
    verbose: Option<bool>,
}

/// `POST /api/show`
pub(crate) async fn show(
    Shared(state): Shared<Arc<State>>,
    Untraced(JsonBody { body, .. }): Untraced,
) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let f: Show = fields(&body)?;
    check_model(&model, f.model.or(f.name).as_deref())?;
    let about = &model.about;
    let template = about.template.as_ref().map_or("", |t| t.source());
    let capable = [
        ("completion", true),
        ("tools", ToolForm::of_template(template).is_some()),
        ("insert", FimTokens::of(about, "suffix").is_ok()),
        ("thinking", thinks(template)),
        ("embedding", true),
    ];
    let capabilities: Vec<&str> = capable.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    let c = &model.defaults;
    let parameters = format!("temperature {}\ntop_k {}\ntop_p {}\nmin_p {}", c.temperature, c.top_k, c.top_p, c.min_p);
    Ok(Json(json!({
        "modelfile": format!("FROM {}\n", model.names.id),
        "parameters": parameters,
        "template": template,
        "details": details(about),
        "model_info": info(about, f.verbose.unwrap_or(false)),
        "capabilities": capabilities,
        "modified_at": modified(about),
    })))
}

fn card(model: &Model) -> Value {
    let (about, name) = (&model.about, format!("{}:latest", model.names.id));
    json!({
        "name": name,
        "model": name,
        "size": about.file.file_bytes,
        "digest": identity(model),
        "details": details(about),
    })
}

/// 64 hexadecimal digits that stay the same for a file of this name and size; clients shorten them and compare them. To hash the
/// file would read all of it.
fn identity(model: &Model) -> String {
    let digits = |i: u64| {
        let mut hasher = DefaultHasher::new();
        (i, &model.names.id, model.about.file.file_bytes).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    (0..4).map(digits).collect()
}

fn details(about: &About) -> Value {
    let family = about.hparams.arch.to_string();
    json!({
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": size_label(n_weights(about)),
        "quantization_level": quantization(about),
    })
}

fn n_weights(about: &About) -> u64 {
    about.file.gguf.tensors.iter().map(|t| t.ne.iter().product::<u64>()).sum()
}

fn size_label(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.1}B", n as f64 / 1e9),
        1_000_000.. => format!("{:.2}M", n as f64 / 1e6),
        _ => format!("{:.2}K", n as f64 / 1e3),
    }
}

/// The type that most bytes of the file have.
fn quantization(about: &About) -> &'static str {
    let mut bytes: BTreeMap<&'static str, u64> = BTreeMap::new();
    about.file.gguf.tensors.iter().for_each(|t| *bytes.entry(t.qtype.name()).or_default() += t.n_bytes);
    bytes.into_iter().max_by_key(|(_, n)| *n).map_or("unknown", |(name, _)| name)
}

/// The file's metadata. Lists are long and null unless they are asked for.
fn info(about: &About, with_lists: bool) -> Value {
    let metadata = about.file.gguf.metadata.iter();
    let entry = |(key, value): (&str, &Meta)| (key.to_string(), json_of(value, with_lists));
    let mut info: Map<String, Value> =
        metadata.filter(|(key, _)| *key != "tokenizer.chat_template").map(entry).collect();
    info.insert("general.parameter_count".to_string(), n_weights(about).into());
    Value::Object(info)
}

fn json_of(value: &Meta, with_lists: bool) -> Value {
    match value {
        Meta::U8(v) => (*v).into(),
        Meta::I8(v) => (*v).into(),
        Meta::U16(v) => (*v).into(),
        Meta::I16(v) => (*v).into(),
        Meta::U32(v) => (*v).into(),
        Meta::I32(v) => (*v).into(),
        Meta::F32(v) => (*v).into(),
        Meta::Bool(v) => (*v).into(),
        Meta::String(v) => v.as_str().into(),
        Meta::U64(v) => (*v).into(),
        Meta::I64(v) => (*v).into(),
        Meta::F64(v) => (*v).into(),
        Meta::Array(_) if !with_lists => Value::Null,
        Meta::Array(list) => list_of(list),
    }
}

fn list_of(list: &Array) -> Value {
    match list {
        Array::U8(v) => v.clone().into(),
        Array::I8(v) => v.clone().into(),
        Array::U16(v) => v.clone().into(),
        Array::I16(v) => v.clone().into(),
        Array::U32(v) => v.clone().into(),
        Array::I32(v) => v.clone().into(),
        Array::F32(v) => v.clone().into(),
        Array::Bool(v) => v.clone().into(),
        Array::String(v) => v.clone().into(),
        Array::U64(v) => v.clone().into(),
        Array::I64(v) => v.clone().into(),
        Array::F64(v) => v.clone().into(),
    }
}

/// When the file was last written; of a model that is part of the program, the program.
fn modified(about: &About) -> String {
    let path = match demo::is_meant(&about.file.path) {
        true => std::env::current_exe(),
        false => Ok(about.file.path.clone()),
    };
    let time = path.and_then(std::fs::metadata).and_then(|m| m.modified());
    rfc3339(time.unwrap_or(UNIX_EPOCH))
}

/// A time of the Gregorian calendar, in UTC (RFC 3339).
pub(super) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, days) = (since.as_secs() % 86_400, since.as_secs() / 86_400);
    // Years begin in March here, so that the day that some have ends them, and 400 of them have always as many days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = 400 * era + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(
            [size_label(30_532_122_624), size_label(134_515_008), size_label(9_000)],
            ["30.5B", "134.52M", "9.00K"]
        );
    }
}
