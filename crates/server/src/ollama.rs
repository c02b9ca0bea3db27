//! Ollama's API: `/api/chat` and `/api/generate` put into OpenAI's chat form and answered as chats; the one model under `/api/tags`,
//! `/api/show` and `/api/ps`; embeddings. Nothing is pulled, made or deleted.

mod answer;
pub(crate) mod embed;
pub(crate) mod models;
mod request;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::model::Model;
use crate::openai::chat::Chat;
use crate::sse;
use crate::state::State;
use answer::{Lines, Shape};
use request::Wire;

/// Names of fields in the form that chats are read in, and as these clients know them.
const NAMES: [(&str, &str); 6] = [
    ("response_format", "format"),
    ("max_tokens", "options.num_predict"),
    ("repetition_penalty", "options.repeat_penalty"),
    ("temperature", "options.temperature"),
    ("top_p", "options.top_p"),
    ("top_k", "options.top_k"),
];

/// Refuses a request for another model.
fn check_model(model: &Model, asked: Option<&str>) -> Result<(), ApiError> {
    match asked {
        Some(asked) if !model.names.include_tagged(asked) => {
            let message = format!("model '{asked}' not found; this server has '{}'", model.names.id);
            Err(ApiError::refused(StatusCode::NOT_FOUND, "model_not_found", message))
        }
        _ => Ok(()),
    }
}

/// Nanoseconds, as this API counts time.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// `POST /api/chat`
pub(crate) async fn chat(state: Shared<Arc<State>>, body: JsonBody) -> Result<Response, ApiError> {
    answer(state, body, Shape::Chat).await
}

/// `POST /api/generate`
pub(crate) async fn generate(state: Shared<Arc<State>>, body: JsonBody) -> Result<Response, ApiError> {
    answer(state, body, Shape::Text).await
}

async fn answer(Shared(state): Shared<Arc<State>>, body: JsonBody, shape: Shape) -> Result<Response, ApiError> {
    let began = Instant::now();
    let (model, active) = state.begin()?;
    let JsonBody { mut body, room, trace } = body;
    let wire: Wire = fields(&body)?;
    check_model(&model, wire.model.as_deref())?;
    wire.refuse(&model)?;
    let name = wire.model.clone().unwrap_or_else(|| model.names.id.clone());
    let mut lines = Lines::new(shape, name, model.about.clone(), began);
    let asked = match shape {
        Shape::Chat => request::of_chat(&wire, &mut body)?,
        Shape::Text => request::of_text(&wire)?,
    };
    // Nothing is asked: these clients load a model so, and this one is there.
    let Some(asked) = asked else {
        trace.refuse()?;
        return Ok(Json(lines.loaded()).into_response());
    };
    let body = JsonBody { body: asked, room, trace };
    let chat = match wire.is_text(shape) {
        true => Chat::read_text(&model, body).await,
        false => Chat::read(&model, body).await,
    };
    let chat = chat.map_err(|e| e.renamed(&NAMES))?;
    chat.check_fits(&model)?;
    let (answers, outlets) = chat.submit(&state, &model, active)?;
    lines.answer_by(outlets);
    if wire.stream.unwrap_or(true) {
        return sse::respond_lines(answers, lines, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?.pop().expect("one answer");
    Ok(Json(lines.whole(whole)).into_response())
}

/// What would change which models there are.
pub(crate) async fn refuse() -> ApiError {
    let message = "this server has the one model that it was started with: nothing is pulled, pushed, made, copied or deleted; \
                   start `apr serve run` with another file";
    ApiError::refused(StatusCode::FORBIDDEN, "one_model", message)
}

/// `GET /api/version`: the version of Ollama whose API this is. Clients look whether it is new enough.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": "0.13.3", "server": concat!("apr ", env!("CARGO_PKG_VERSION"))}))
}
