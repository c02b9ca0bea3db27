//! Which path leads where, and what every request passes on its way.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use crate::errors::ApiError;
use crate::state::State;
use crate::{anthropic, guard, health, keys, llama, metrics, note, ollama, openai, openapi, page};

/// Everything that is answered.
pub(crate) fn router(state: Arc<State>) -> Router {
    let routes = Router::new()
        .merge(page::routes())
        .route("/health", get(health::health))
        .route("/v1/health", get(health::health))
        .route("/ping", get(health::health))
        .route("/version", get(llama::version))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::openapi))
        .route("/v1/models", get(openai::models::list))
        .route("/models", get(openai::models::list))
        .route("/v1/models/{*id}", get(openai::models::one))
        .route("/v1/chat/completions", post(openai::chat::create))
        .route("/chat/completions", post(openai::chat::create))
        .route("/v1/completions", post(openai::completions::create))
        .route("/v1/responses", post(openai::responses::create))
        .route("/responses", post(openai::responses::create))
        .route("/v1/responses/input_tokens", post(openai::responses::input_tokens))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/embeddings", post(openai::embeddings::create))
        .route("/embeddings", post(openai::embeddings::create))
        .route("/completion", post(llama::completion::create))
        .route("/completions", post(llama::completion::create))
        .route("/infill", post(llama::infill::create))
        .route("/slots", get(llama::slots::slots))
        .route("/tokenize", post(llama::tokenize))
        .route("/detokenize", post(llama::detokenize))
        .route("/apply-template", post(llama::apply_template))
        .route("/props", get(llama::props::props))
        .route("/api/chat", post(ollama::chat))
        .route("/api/generate", post(ollama::generate))
        .route("/api/embed", post(ollama::embed::embed))
        .route("/api/embeddings", post(ollama::embed::embeddings))
        .route("/api/tags", get(ollama::models::tags))
        .route("/api/ps", get(ollama::models::ps))
        .route("/api/show", post(ollama::models::show))
        .route("/api/version", get(ollama::version))
        .route("/api/pull", post(ollama::refuse))
        .route("/api/push", post(ollama::refuse))
        .route("/api/create", post(ollama::refuse))
        .route("/api/copy", post(ollama::refuse))
        .route("/api/delete", delete(ollama::refuse))
        .fallback(async || ApiError::refused(StatusCode::NOT_FOUND, "unknown_path", "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            let message = "this path does not take this method; the Allow header names those it takes";
            ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        })
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), keys::require));
    let routes = match cors(&state.settings.cors_origins) {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes
        .layer(from_fn(note::limit))
        .layer(from_fn_with_state(state.clone(), guard::guard))
        .layer(from_fn_with_state(state.clone(), note::note))
        .with_state(state)
}

/// What lets pages of other sites ask and read, where any may. Preflight requests, which bring no key, are answered here.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origin = match origins {
        [] => return None,
        all if all.iter().any(|o| o == "*") => AllowOrigin::any(),
        some => AllowOrigin::list(some.iter().filter_map(|o| HeaderValue::from_str(o).ok())),
    };
    let cors = CorsLayer::new().allow_origin(origin).allow_headers(AllowHeaders::mirror_request());
    let cors = cors.allow_methods(AllowMethods::mirror_request()).allow_private_network(true);
    Some(cors.expose_headers([guard::REQUEST_ID, header::RETRY_AFTER]).max_age(PREFLIGHT_TIME))
}

/// How long a browser may remember what a preflight request told it.
const PREFLIGHT_TIME: Duration = Duration::from_secs(600);

/// A programmer's mistake ends one request, not the server.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::engine("internal_error", "the server made a mistake while answering this request").into_response()
}
