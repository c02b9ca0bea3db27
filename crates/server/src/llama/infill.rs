//! `POST /infill`: what is between a prefix and a suffix, of a file among others, in llama.cpp's form.

use std::sync::Arc;

use apr_engine::About;
use axum::extract::State as Shared;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;

use super::{Content, completion};
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::infill::FimTokens;
use crate::openai::prompts::tokens_of;
use crate::openai::{check_model, given};
use crate::prompt;
use crate::state::State;

/// The fields that it has of its own; all others are those of `/completion`.
#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    input_prefix: Option<Content>,
    input_suffix: Option<Content>,
    #[serde(default)]
    input_extra: Option<Vec<Extra>>,
    /// What the middle begins with.
    prompt: Option<Content>,
}

/// Another file.
#[derive(Deserialize)]
struct Extra {
    text: String,
    filename: Option<String>,
}

/// What a repository and a file are called whose names nobody told.
const REPOSITORY: &str = "myproject";
const FILE: &str = "filename";

/// Fills in a text: a completion of the prompt that the texts make.
pub(crate) async fn create(
    Shared(state): Shared<Arc<State>>,
    JsonBody { mut body, room, trace }: JsonBody,
) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let f: Fields = fields(&body)?;
    check_model(&model, f.model.as_deref())?;
    let missing = |name: &str| ApiError::field(name, "is missing");
    let before = f.input_prefix.ok_or_else(|| missing("input_prefix"))?;
    let after = f.input_suffix.ok_or_else(|| missing("input_suffix"))?;
    let fim = FimTokens::of(&model.about, "input_prefix")?;
    let ends = fim.ends.clone();
    let about = model.about.clone();
    let tokens = prompt::elsewhere(move || {
        let before = tokens_of(&about, "input_prefix", &before.parts(), (false, false))?;
        let after = tokens_of(&about, "input_suffix", &after.parts(), (false, false))?;
        let begun = f.prompt.map_or_else(Vec::new, Content::parts);
        let begun = tokens_of(&about, "prompt", &begun, (false, true))?;
        let context = context(&about, &fim, &f.input_extra.unwrap_or_default());
        Ok(fim.prompt(&about, &context, [&before, &after, &begun]))
    });
    body["prompt"] = tokens.await?.into();
    if given(&body, "stop_token_ids").is_none() {
        body["stop_token_ids"] = Value::Array(Vec::new());
    }
    if let Some(list) = body["stop_token_ids"].as_array_mut() {
        list.extend(ends.into_iter().map(Value::from));
    }
    // The completion counts itself.
    drop((model, active));
    completion::create(Shared(state), JsonBody { body, room, trace }).await
}

/// Other files, as models were shown repositories; one after the other where the vocabulary has no tokens for that.
fn context(about: &About, fim: &FimTokens, extra: &[Extra]) -> Vec<u32> {
    let mut tokens = Vec::new();
    let mut add = |mark: Option<u32>, text: &str| {
        tokens.extend(mark);
        tokens.extend(about.tokenizer.encode_text(text, false));
    };
    if extra.is_empty() {
        return tokens;
    }
    if fim.repository.is_some() {
        add(fim.repository, &format!("{REPOSITORY}\n"));
    }
    for file in extra {
        if fim.file.is_some() {
            add(fim.file, &format!("{}\n", file.filename.as_deref().unwrap_or(FILE)));
        }
        add(None, &file.text);
    }
    if fim.file.is_some() {
        add(fim.file, &format!("{FILE}\n"));
    }
    tokens
}
