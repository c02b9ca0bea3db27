//! `GET /health`: whether requests are answered. Meant for load balancers and supervisors, so it needs no key and costs nothing.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::state::{Phase, State};

/// 200 where the status is `ok`, else 503.
pub(crate) async fn health(Shared(state): Shared<Arc<State>>) -> (StatusCode, Json<Value>) {
    let status = match (state.phase(), state.loaded()) {
        (Phase::Draining | Phase::Closing, _) => "draining",
        (Phase::Open, None) => "loading",
        (Phase::Open, Some(model)) if model.scheduler.is_alive() => "ok",
        (Phase::Open, Some(_)) => "failed",
    };
    let code = if status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"status": status})))
}
