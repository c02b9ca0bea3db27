//! Bodies of requests: which types are read, how large, how long; and fields out of them, with the path of what is wrong.

use std::sync::Arc;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use crate::errors::ApiError;
use crate::json_text::readable;
use crate::state::State;
use crate::trace;

/// A body that is a JSON object. What it holds is read with [`fields`], which leaves alone what it does not know.
pub(crate) struct JsonBody {
    pub(crate) body: Value,
    /// To be held as long as `body` and what was read out of it.
    pub(crate) room: OwnedSemaphorePermit,
    /// What the head asks to have traced of the answer.
    pub(crate) trace: trace::Asked,
}

/// The same where no answer is generated, so that none can be traced.
pub(crate) struct Untraced(pub(crate) JsonBody);

impl FromRequest<Arc<State>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<State>) -> Result<JsonBody, ApiError> {
        let (head, body) = request.into_parts();
        let trace = trace::Asked::read(&head, state)?;
        check_type(&head.headers)?;
        let settings = &state.settings;
        let n_max = settings.body_bytes;
        let n_declared = declared(&head.headers);
        if n_declared.is_some_and(|n| n > n_max as u64) {
            return Err(too_large(n_max));
        }
        let room = state.room_for(n_declared.map_or(n_max, |n| n as usize))?;
        let late = || {
            let message = format!("the body did not arrive within {} s", settings.body_time.as_secs_f32());
            ApiError::refused(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
        };
        let bytes = tokio::time::timeout(settings.body_time, read(body, n_max)).await.map_err(|_| late())??;
        Ok(JsonBody { body: object(&bytes)?, room, trace })
    }
}

impl FromRequest<Arc<State>> for Untraced {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<State>) -> Result<Untraced, ApiError> {
        let body = JsonBody::from_request(request, state).await?;
        body.trace.refuse()?;
        Ok(Untraced(body))
    }
}

/// Refuses other types than JSON. What `curl -d` sends without being told a type passes as well.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let essence = text.split(';').next().unwrap_or_default().trim();
    match ["", "application/json", "application/x-www-form-urlencoded"].iter().any(|t| essence.eq_ignore_ascii_case(t))
    {
        true => Ok(()),
        false => Err(ApiError::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            format!("the body has type {essence:?}; expected application/json"),
        )),
    }
}

/// The size that a head tells of its body.
fn declared(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn too_large(n_max: usize) -> ApiError {
    let message = format!("the body has more than {n_max} bytes");
    ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

async fn read(body: Body, n_max: usize) -> Result<Bytes, ApiError> {
    to_bytes(body, n_max).await.map_err(|e| match is_length_limit(&e) {
        true => too_large(n_max),
        false => ApiError::invalid("unreadable_body", format!("the body cannot be read: {e}")),
    })
}

fn is_length_limit(e: &axum::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(e) = cause {
        if e.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = e.source();
    }
    false
}

fn object(bytes: &[u8]) -> Result<Value, ApiError> {
    let mut value = serde_json::from_str::<Value>(&readable(bytes))
        .map_err(|e| ApiError::invalid("invalid_json", format!("the body is not JSON: {e}")))?;
    match &mut value {
        Value::Object(fields) => {
            fields.values_mut().for_each(make_whole);
            Ok(value)
        }
        other => {
            let message = format!("the body is {}; expected a JSON object", kind_of(other));
            Err(ApiError::invalid("invalid_type", message))
        }
    }
}

/// Writes `1.0` as `1`, as languages that know one kind of number send integers so; in lists too, but not in what belongs to a
/// message or a schema.
fn make_whole(value: &mut Value) {
    /// Up to here every integer is a float.
    const EXACT: f64 = (1_i64 << 53) as f64;
    match value {
        Value::Number(n) if n.is_f64() => {
            if let Some(x) = n.as_f64().filter(|x| x.fract() == 0.0 && x.abs() <= EXACT) {
                *value = (x as i64).into();
            }
        }
        Value::Array(list) => list.iter_mut().for_each(make_whole),
        _ => {}
    }
}

/// What a JSON value is, in words.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The fields that `T` has.
///
/// # Errors
/// A field of another type, named by its path.
pub(crate) fn fields<T: DeserializeOwned>(body: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|e| match e.path().to_string() {
        path if path == "." => ApiError::invalid("invalid_type", e.inner().to_string()),
        path => ApiError { code: Some("invalid_type"), ..ApiError::field(&path, e.inner()) },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn integers_may_be_written_as_floats() {
        let body = object(br#"{"a": 16.0, "b": [[1.0, -2.0]], "c": 1.5, "d": 1e30, "e": {"x": 1.0}}"#).unwrap();
        assert_eq!(body, json!({"a": 16, "b": [[1, -2]], "c": 1.5, "d": 1e30, "e": {"x": 1.0}}));
    }
}
