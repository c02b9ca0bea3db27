//! `POST /v1/responses`, without a memory: a request has the whole conversation, and nothing is stored. It is put in the form of a
//! chat; the answer is written in items.

mod answer;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::chat::Chat;
use super::{check_model, now};
use crate::blocks::Blocks;
use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::job::Event;
use crate::model::Model;
use crate::sse;
use crate::state::State;
use answer::{Frame, Items, ResponseChunks};

/// How a conversation is to be answered.
#[derive(Deserialize)]
struct Wire {
    model: Option<String>,
    stream: Option<bool>,
}

/// Answers a conversation.
pub(crate) async fn create(Shared(state): Shared<Arc<State>>, body: JsonBody) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let salt = state.unique();
    let frame = Frame::new(&body.body, format!("resp_{salt}"), model.names.id.clone(), now());
    let (wire, chat) = read(&model, body).await?;
    chat.check_fits(&model)?;
    let (mut answers, mut outlets) = chat.submit(&state, &model, active)?;
    let blocks = Blocks::new(outlets.pop().expect("a request asks for one answer"));
    let mut items = Items::new(blocks, salt, model.about.clone());
    if wire.stream.unwrap_or(false) {
        return sse::respond(answers, ResponseChunks::new(frame, items), state.settings.keep_alive).await;
    }
    loop {
        match answers.next().await?.expect("an answer ends before there is nothing more of it") {
            (_, Event::Prompt(_)) => {}
            (_, Event::Piece(piece)) => _ = items.push(piece),
            (_, Event::End(generated)) => return Ok(Json(answer::response(&frame, items, &generated?)).into_response()),
        }
    }
}

/// `POST /v1/responses/input_tokens`: tokens of a conversation as it would be answered.
pub(crate) async fn input_tokens(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Response, ApiError> {
    let (model, _active) = state.begin()?;
    let (_, chat) = read(&model, body).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": chat.prompt.tokens.len()})).into_response())
}

async fn read(model: &Model, JsonBody { body, room, trace }: JsonBody) -> Result<(Wire, Chat), ApiError> {
    let wire: Wire = fields(&body)?;
    check_model(model, wire.model.as_deref())?;
    let body = request::in_chat_form(&body)?;
    let chat = Chat::of_any_length(model, JsonBody { body, room, trace }).await;
    Ok((wire, chat.map_err(|e| e.renamed(&request::NAMES))?))
}
