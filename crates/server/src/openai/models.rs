//! `/v1/models`: the one model, under its id and its aliases.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State as Shared};
use serde_json::{Value, json};

use super::check_model;
use crate::errors::ApiError;
use crate::model::Model;
use crate::state::State;

/// `GET /v1/models`.
pub(crate) async fn list(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let ids = std::iter::once(&model.names.id).chain(&model.names.aliases);
    let data: Vec<Value> = ids.map(|id| card(&model, id)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /v1/models/ID`.
pub(crate) async fn one(Shared(state): Shared<Arc<State>>, Path(asked): Path<String>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    check_model(&model, Some(&asked))?;
    Ok(Json(card(&model, &model.names.id)))
}

fn card(model: &Model, id: &str) -> Value {
    let about = &model.about;
    json!({
        "id": id,
        "object": "model",
        "created": model.since,
        "owned_by": "apr",
        "root": model.names.id,
        "aliases": model.names.aliases,
        "max_model_len": about.n_ctx,
        "meta": {
            "n_ctx": about.n_ctx,
            "n_ctx_train": about.hparams.n_ctx_train,
            "n_vocab": about.tokenizer.n_vocab(),
            "size": about.file.file_bytes,
            "n_layer": about.hparams.n_layer,
            "n_expert": about.hparams.experts.map(|e| e.n_expert),
        },
    })
}
