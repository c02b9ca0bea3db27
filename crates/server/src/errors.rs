//! Errors as clients see them. Every API writes the same [`ApiError`] in its own form; this is also where errors of the engine
//! get their status.

use apr_engine::EngineError;
use apr_engine::chat_template::TemplateError;
use apr_engine::generate::GenerateError;
use apr_engine::sampler::SamplerError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds after which a client may try again.
const RETRY_AFTER_S: u32 = 1;

/// What went wrong with a request, for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// OpenAI's `type`.
    pub(crate) kind: &'static str,
    pub(crate) code: Option<&'static str>,
    /// The field of the request that is at fault, as a path.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, code, param: None, message: message.into() }
    }

    /// A request that is wrong as a whole.
    pub(crate) fn invalid(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some(code), message)
    }

    /// A field that is wrong; the message begins with its name.
    pub(crate) fn field(param: &str, message: impl std::fmt::Display) -> ApiError {
        let e = ApiError::invalid("invalid_value", format!("{param}: {message}"));
        ApiError { param: Some(param.to_string()), ..e }
    }

    /// A field whose meaning is not there yet.
    pub(crate) fn unsupported(param: &str, message: impl std::fmt::Display) -> ApiError {
        ApiError { code: Some("unsupported_value"), ..ApiError::field(param, message) }
    }

    /// A request of another kind than this server or route takes.
    pub(crate) fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(status, "invalid_request_error", Some(code), message)
    }

    /// Something that may work later.
    pub(crate) fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", Some("unavailable"), message)
    }

    /// More requests than are taken at a time.
    pub(crate) fn busy() -> ApiError {
        let message = "as many requests as are taken at a time are running or waiting; try again later";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message)
    }

    /// The server's own fault.
    pub(crate) fn engine(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some(code), message)
    }

    /// OpenAI's form.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    fn may_be_retried(&self) -> bool {
        matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.may_be_retried() {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
        }
        if matches!(self.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            // What is left of the body is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<SamplerError> for ApiError {
    fn from(e: SamplerError) -> ApiError {
        match &e {
            SamplerError::OutOfRange { field, expected, got } => {
                ApiError::field(field, format_args!("expected {expected}, got {got}"))
            }
            SamplerError::UnknownToken { .. } => ApiError::field("logit_bias", e),
            SamplerError::NotFinite { .. } => ApiError::engine("numerical_error", e.to_string()),
            SamplerError::NothingLeft { .. } => ApiError::field("logit_bias", e),
        }
    }
}

impl From<GenerateError> for ApiError {
    fn from(e: GenerateError) -> ApiError {
        match e {
            GenerateError::EmptyPrompt => ApiError::invalid("empty_prompt", e.to_string()),
            GenerateError::ContextOverflow { .. } => ApiError::invalid("context_length_exceeded", e.to_string()),
            GenerateError::Memory { .. } => ApiError::unavailable(e.to_string()),
            GenerateError::Busy { .. } => ApiError::busy(),
            GenerateError::Stopped => ApiError::unavailable("the server is stopping"),
            GenerateError::Sampler(e) => e.into(),
            GenerateError::Step(e) => ApiError::engine("engine_error", e.to_string()),
        }
    }
}

impl From<EngineError> for ApiError {
    /// What the engine says of a prompt.
    fn from(e: EngineError) -> ApiError {
        match e {
            EngineError::NoTemplate => {
                let message = "the model's file has no chat template; use /v1/completions, which takes text as it is";
                ApiError::invalid("no_chat_template", message)
            }
            EngineError::Template(e) => e.into(),
            e => ApiError::engine("engine_error", e.to_string()),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(e: TemplateError) -> ApiError {
        ApiError { param: Some("messages".to_string()), ..ApiError::invalid("template_error", e.to_string()) }
    }
}
