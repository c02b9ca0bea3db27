//! `GET /props`: what llama.cpp's clients ask a server before they use it.

use std::sync::Arc;

use apr_engine::sampler::SamplerConfig;
use axum::Json;
use axum::extract::State as Shared;
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::state::State;

/// Settings where a request says nothing, the model, and what it can do.
pub(crate) async fn props(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let about = &model.about;
    // The name alone: where a file lies is no client's business.
    let file = about.file.path.file_name().map(|name| name.to_string_lossy().into_owned());
    let token = |id: Option<u32>| id.and_then(|id| about.tokenizer.token_text(id)).unwrap_or_default().to_string();
    Ok(Json(json!({
        "default_generation_settings": {"n_ctx": about.n_ctx, "params": settings(&model.defaults)},
        "total_slots": model.n_parallel,
        "model_alias": model.names.id,
        "model_path": file,
        "n_ctx": about.n_ctx,
        "modalities": {"vision": false, "audio": false},
        "chat_template": about.template.as_ref().map_or("", |t| t.source()),
        "bos_token": token(about.tokenizer.bos()),
        "eos_token": token(about.tokenizer.eos()),
        "build_info": concat!("apr-", env!("CARGO_PKG_VERSION")),
        "is_sleeping": false,
    })))
}

/// Sampling by llama.cpp's names, of an answer without a limit.
pub(super) fn settings(c: &SamplerConfig) -> Value {
    json!({
        "n_predict": -1,
        "max_tokens": -1,
        "seed": c.seed.map_or_else(|| Value::from(-1), Value::from),
        "temperature": c.temperature,
        "top_k": c.top_k,
        "top_p": c.top_p,
        "min_p": c.min_p,
        "repeat_penalty": c.repetition_penalty,
        "repeat_last_n": c.repeat_last_n,
        "presence_penalty": c.presence_penalty,
        "frequency_penalty": c.frequency_penalty,
        "stop": [],
        "ignore_eos": false,
        "stream": false,
        "logit_bias": [],
        "n_probs": 0,
    })
}
