//! `POST /api/embed`, and `POST /api/embeddings`, which it replaces.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State as Shared;
use serde::{Deserialize, Serialize};

use super::{check_model, nanos};
use crate::embed;
use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::openai::prompts::Prompts;
use crate::prompt;
use crate::state::State;

#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    input: Option<Prompts>,
    prompt: Option<String>,
    /// Takes the end off a text that is too long. It is for the client to ask for: by default such a text is refused.
    truncate: Option<bool>,
    dimensions: Option<i64>,
}

#[derive(Serialize)]
pub(crate) struct Embeddings {
    model: String,
    embeddings: Vec<Vec<f32>>,
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: usize,
}

#[derive(Serialize)]
pub(crate) struct Embedding {
    embedding: Vec<f32>,
}

/// `POST /api/embed`
pub(crate) async fn embed(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Json<Embeddings>, ApiError> {
    let began = Instant::now();
    let f: Fields = fields(&body.body)?;
    let name = f.model.clone();
    // Nothing is asked by who loads a model so.
    let is_load = |p: &Prompts| matches!(p, Prompts::Text(t) if t.is_empty());
    let input = f.input.clone().filter(|p| !is_load(p));
    let (id, embedded) = embedded(state, body, f, input, "input").await?;
    Ok(Json(Embeddings {
        model: name.unwrap_or(id),
        embeddings: embedded.vectors,
        total_duration: nanos(began.elapsed()),
        load_duration: 0,
        prompt_eval_count: embedded.n_token,
    }))
}

/// `POST /api/embeddings`
pub(crate) async fn embeddings(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Json<Embedding>, ApiError> {
    let f: Fields = fields(&body.body)?;
    let prompt = f.prompt.clone().filter(|p| !p.is_empty()).map(Prompts::Text);
    let (_, mut embedded) = embedded(state, body, f, prompt, "prompt").await?;
    Ok(Json(Embedding { embedding: embedded.vectors.pop().unwrap_or_default() }))
}

/// The model's id and the embeddings of what is asked, if anything is.
async fn embedded(
    state: Arc<State>,
    body: JsonBody,
    f: Fields,
    input: Option<Prompts>,
    param: &'static str,
) -> Result<(String, embed::Embedded), ApiError> {
    let (model, active) = state.begin()?;
    check_model(&model, f.model.as_deref())?;
    embed::check_dimensions(&model.about, f.dimensions)?;
    let id = model.names.id.clone();
    let Some(input) = input else { return Ok((id, embed::Embedded { vectors: Vec::new(), n_token: 0 })) };
    let (about, cut) = (model.about.clone(), f.truncate.unwrap_or(false));
    let texts = prompt::elsewhere(move || embed::read(&about, param, input.list(), cut)).await?;
    drop(body.room);
    Ok((id, embed::embed(&model, active, texts).await?))
}
