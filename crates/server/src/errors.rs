//! Errors as clients see them. Every API writes the same [`ApiError`] in its own [form](ErrorForm), which the path decides: what
//! refuses a request need not know whose it is. This is also where errors of the engine get their status.

use apr_engine::EngineError;
use apr_engine::chat_template::TemplateError;
use apr_engine::generate::GenerateError;
use apr_engine::sampler::SamplerError;
use axum::body::Body;
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
    /// Tokens of a prompt that is too long, and those that the context holds.
    pub(crate) context: Option<(usize, usize)>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, code, param: None, message: message.into(), context: None }
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

    /// No key, or a wrong one. Nothing is said of what there would be.
    pub(crate) fn no_key() -> ApiError {
        let message = "this server wants an API key, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; none was sent, or a wrong one";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// Something that may work later.
    pub(crate) fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", Some("unavailable"), message)
    }

    /// A request that took longer than any may.
    pub(crate) fn late(limit: std::time::Duration) -> ApiError {
        let message = format!(
            "the answer was not complete within {} s, the most that this server spends on one",
            limit.as_secs_f32()
        );
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("timeout"), message)
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

    /// The same, for an API that calls fields otherwise: pairs of a name as it is here and as its clients know it.
    pub(crate) fn renamed(self, names: &[(&str, &str)]) -> ApiError {
        let Some(param) = &self.param else { return self };
        let is_at =
            |name: &str| param.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
        let Some((old, new)) = names.iter().find(|(old, _)| is_at(old)) else { return self };
        let renamed = |text: &str| text.strip_prefix(old).map_or(text.to_string(), |rest| format!("{new}{rest}"));
        ApiError { message: renamed(&self.message), param: Some(renamed(param)), ..self }
    }

    fn may_be_retried(&self) -> bool {
        matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)
    }
}

/// An API's way of writing errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorForm {
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}, "request_id"}`
    Anthropic,
    /// `{"error": MESSAGE}`
    Ollama,
}

/// Anthropic's status for a server that cannot answer now. Its clients know it as something to try again.
const OVERLOADED: u16 = 529;

impl ErrorForm {
    /// The form of the API that a path belongs to.
    pub(crate) fn of_path(path: &str) -> ErrorForm {
        let is_below =
            |root| path.strip_prefix(root).is_some_and(|rest: &str| rest.is_empty() || rest.starts_with('/'));
        match path {
            _ if is_below("/v1/messages") => ErrorForm::Anthropic,
            _ if is_below("/api") => ErrorForm::Ollama,
            _ => ErrorForm::OpenAi,
        }
    }

    /// An error in this form; in the middle of a stream the client has the request's id already.
    pub(crate) fn body(self, e: &ApiError, request_id: Option<&str>) -> Value {
        match self {
            ErrorForm::OpenAi => {
                let mut error = json!({"message": e.message, "type": e.kind, "param": e.param, "code": e.code});
                if let Some((n_prompt, n_ctx)) = e.context {
                    error["n_prompt_tokens"] = n_prompt.into();
                    error["n_ctx"] = n_ctx.into();
                }
                json!({"error": error})
            }
            ErrorForm::Anthropic => {
                let error = json!({"type": anthropic_type(self.status(e.status)), "message": e.message});
                json!({"type": "error", "error": error, "request_id": request_id})
            }
            ErrorForm::Ollama => json!({"error": e.message}),
        }
    }

    fn status(self, status: StatusCode) -> StatusCode {
        match (self, status) {
            (ErrorForm::Anthropic, StatusCode::SERVICE_UNAVAILABLE) => {
                StatusCode::from_u16(OVERLOADED).expect("three digits")
            }
            _ => status,
        }
    }

    /// Puts a response that is an [`ApiError`] in this form; any other stays as it is.
    pub(crate) fn apply(self, mut response: Response, request_id: &str) -> Response {
        let Some(e) = response.extensions_mut().remove::<ApiError>() else { return response };
        let (mut head, _) = response.into_parts();
        head.status = self.status(head.status);
        Response::from_parts(head, Body::from(self.body(&e, Some(request_id)).to_string()))
    }
}

/// What Anthropic's API calls an error of this status.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        OVERLOADED => "overloaded_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// Status and headers; the body is written by [`ErrorForm::apply`], which every response passes.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if self.may_be_retried() {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
        }
        if self.status == StatusCode::GATEWAY_TIMEOUT {
            // Official clients would send it again, and it would take as long again.
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            // What is left of the body is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(self);
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
            GenerateError::ContextOverflow { n_prompt, n_ctx, .. } => ApiError {
                // llama.cpp's type, OpenAI's code.
                kind: "exceed_context_size_error",
                context: Some((n_prompt, n_ctx)),
                ..ApiError::invalid("context_length_exceeded", e.to_string())
            },
            GenerateError::Memory { .. } => ApiError::unavailable(e.to_string()),
            GenerateError::Busy { .. } => ApiError::busy(),
            GenerateError::NoEmbedding => ApiError::engine("numerical_error", e.to_string()),
            GenerateError::Stopped => ApiError::unavailable("the server is stopping"),
            GenerateError::Constraint(_) => ApiError::invalid("invalid_schema", e.to_string()),
            GenerateError::Failed => ApiError::unavailable(e.to_string()),
            GenerateError::Sampler(e) => e.into(),
            GenerateError::Trace(e) => ApiError::invalid("invalid_trace", format!("x-apr-trace: {e}")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_decides_the_form() {
        for path in ["/v1/messages", "/v1/messages/", "/v1/messages/count_tokens"] {
            assert_eq!(ErrorForm::of_path(path), ErrorForm::Anthropic, "{path}");
        }
        for path in ["/api", "/api/chat", "/api/none"] {
            assert_eq!(ErrorForm::of_path(path), ErrorForm::Ollama, "{path}");
        }
        for path in ["", "/", "/v1/messagesx", "/apis", "/v1/chat/completions", "/v1/api/chat"] {
            assert_eq!(ErrorForm::of_path(path), ErrorForm::OpenAi, "{path}");
        }
    }

    #[test]
    fn a_field_is_called_what_the_client_calls_it() {
        let names = [("stop", "stop_sequences")];
        let e = ApiError::field("stop[1]", "is long").renamed(&names);
        assert_eq!((e.param.as_deref(), e.message.as_str()), (Some("stop_sequences[1]"), "stop_sequences[1]: is long"));
        let e = ApiError::field("stops", "is long");
        assert_eq!(e.clone().renamed(&names), e);
    }

    #[test]
    fn every_form_says_the_same() {
        let e = ApiError::field("top_p", "expected less");
        let expected = json!({"error": {"message": "top_p: expected less", "type": "invalid_request_error",
            "param": "top_p", "code": "invalid_value"}});
        assert_eq!(ErrorForm::OpenAi.body(&e, Some("r1")), expected);
        assert_eq!(ErrorForm::Ollama.body(&e, Some("r1")), json!({"error": "top_p: expected less"}));
        let error = json!({"type": "invalid_request_error", "message": "top_p: expected less"});
        let expected = json!({"type": "error", "error": error, "request_id": "r1"});
        assert_eq!(ErrorForm::Anthropic.body(&e, Some("r1")), expected);
    }

    #[test]
    fn what_may_work_later_is_an_overload_to_anthropics_clients() {
        let response = |form: ErrorForm, e: ApiError| form.apply(e.into_response(), "r1");
        let unavailable = response(ErrorForm::Anthropic, ApiError::unavailable("loading"));
        assert_eq!(unavailable.status().as_u16(), 529);
        assert!(unavailable.headers().contains_key(header::RETRY_AFTER));
        let body = ErrorForm::Anthropic.body(&ApiError::unavailable("loading"), None);
        assert_eq!(body["error"]["type"], "overloaded_error");
        assert_eq!(ErrorForm::Anthropic.body(&ApiError::busy(), None)["error"]["type"], "rate_limit_error");
        assert_eq!(response(ErrorForm::Anthropic, ApiError::busy()).status(), 429);
        assert_eq!(response(ErrorForm::Ollama, ApiError::unavailable("loading")).status(), 503);
    }
}
