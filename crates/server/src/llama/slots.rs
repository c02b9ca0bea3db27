//! `GET /slots`: how many answers are in the making, as llama.cpp's server tells it. Nothing of anybody's request is told.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::state::State;

/// An object for each answer that may be in the making. Which of them an answer counts as means nothing.
pub(crate) async fn slots(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let n_running = model.scheduler.load().n_running;
    let slot =
        |id| json!({"id": id, "n_ctx": model.about.n_ctx, "speculative": false, "is_processing": id < n_running});
    Ok(Json((0..model.n_parallel).map(slot).collect()))
}
