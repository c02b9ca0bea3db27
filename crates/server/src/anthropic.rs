//! Anthropic's API: messages and how many tokens they are. Requests are put in the form of OpenAI's chats; answers are written in
//! blocks.

mod answer;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use crate::blocks::Blocks;
use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::model::Model;
use crate::openai::chat::Chat;
use crate::openai::check_model;
use crate::sse;
use crate::state::State;
use answer::{Head, MessageChunks};

/// How a conversation is to be answered.
#[derive(Deserialize)]
struct Wire {
    model: Option<String>,
    max_tokens: Option<usize>,
    stream: Option<bool>,
}

/// `POST /v1/messages`: answers a conversation.
pub(crate) async fn messages(Shared(state): Shared<Arc<State>>, body: JsonBody) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let (wire, mut chat) = read(&model, body).await?;
    chat.check_fits(&model).map_err(|e| ApiError { message: format!("prompt is too long: {}", e.message), ..e })?;
    if let Some(n) = wire.max_tokens {
        chat.limit(&model, n);
    }
    let head = Head {
        id: format!("msg_{}", state.unique()),
        model: model.names.id.clone(),
        n_prompt: chat.prompt.tokens.len(),
        max_tokens: wire.max_tokens,
    };
    let (answers, mut outlets) = chat.submit(&state, &model, active)?;
    let mut blocks = Blocks::new(outlets.pop().expect("a request asks for one answer"));
    if wire.stream.unwrap_or(false) {
        return sse::respond(answers, MessageChunks::new(head, blocks), state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?.pop().expect("one answer");
    Ok(Json(answer::message(&head, &mut blocks, &whole.generated)).into_response())
}

/// `POST /v1/messages/count_tokens`: tokens of a conversation as it would be answered, more than the context holds too.
pub(crate) async fn count_tokens(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Response, ApiError> {
    let (model, _active) = state.begin()?;
    let (_, chat) = read(&model, body).await?;
    Ok(Json(json!({"input_tokens": chat.prompt.tokens.len()})).into_response())
}

async fn read(model: &Model, JsonBody { body, room, trace }: JsonBody) -> Result<(Wire, Chat), ApiError> {
    let wire: Wire = fields(&body)?;
    check_model(model, wire.model.as_deref())?;
    let body = request::in_chat_form(body)?;
    let chat = Chat::of_any_length(model, JsonBody { body, room, trace }).await;
    Ok((wire, chat.map_err(|e| e.renamed(&request::NAMES))?))
}
