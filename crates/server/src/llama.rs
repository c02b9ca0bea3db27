//! What llama.cpp's and vLLM's servers have beside OpenAI's API: completions in a form of their own, tokens of texts, texts of tokens,
//! prompts of conversations, settings.

pub(crate) mod completion;
pub(crate) mod infill;
pub(crate) mod props;
pub(crate) mod slots;

use std::sync::Arc;

use apr_engine::About;
use axum::Json;
use axum::extract::State as Shared;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::model::Model;
use crate::openai::chat::Chat;
use crate::openai::prompts::{Part, check_ids, text_of, tokens_of};
use crate::openai::{check_model, given};
use crate::prompt;
use crate::state::State;

/// llama.cpp's `content`, or vLLM's `prompt` or `messages`.
#[derive(Deserialize)]
struct Tokenize {
    model: Option<String>,
    content: Option<Content>,
    add_special: Option<bool>,
    parse_special: Option<bool>,
    with_pieces: Option<bool>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

/// Texts and token ids, one after the other.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a string, or a list of strings and token ids")]
enum Content {
    Text(String),
    Mixed(Vec<Part>),
}

impl Content {
    fn parts(self) -> Vec<Part> {
        match self {
            Content::Text(text) => vec![Part::Text(text)],
            Content::Mixed(parts) => parts,
        }
    }
}

/// `POST /tokenize`
pub(crate) async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Json<Value>, ApiError> {
    let (model, _active) = state.begin()?;
    let f: Tokenize = fields(&body.body)?;
    check_model(&model, f.model.as_deref())?;
    if given(&body.body, "messages").is_some() {
        let tokens = rendered(&model, body).await?;
        return Ok(Json(counted(&model.about, tokens, f.return_token_strs.unwrap_or(false))));
    }
    let about = model.about.clone();
    prompt::elsewhere(move || {
        let _room = body.room;
        if let Some(text) = f.prompt {
            // vLLM's text is a prompt, in which its users spell control tokens.
            let tokens = match f.add_special_tokens.unwrap_or(true) {
                true => about.text_tokens(text.as_bytes(), true),
                false => about.tokenizer.encode_text(&text, true),
            };
            return Ok(Json(counted(&about, tokens, f.return_token_strs.unwrap_or(false))));
        }
        let how = (f.add_special.unwrap_or(false), f.parse_special.unwrap_or(true));
        let parts = f.content.map_or_else(Vec::new, Content::parts);
        let tokens = tokens_of(&about, "content", &parts, how)?;
        let tokens: Vec<Value> = match f.with_pieces.unwrap_or(false) {
            true => tokens.into_iter().map(|id| json!({"id": id, "piece": piece(&about, id)})).collect(),
            false => tokens.into_iter().map(Value::from).collect(),
        };
        Ok(Json(json!({"tokens": tokens})))
    })
    .await
}

/// vLLM's form of tokens.
fn counted(about: &About, tokens: Vec<u32>, with_texts: bool) -> Value {
    let texts = with_texts.then(|| tokens.iter().map(|t| about.tokenizer.token_text(*t)).collect::<Vec<_>>());
    json!({"count": tokens.len(), "max_model_len": about.n_ctx, "tokens": tokens, "token_strs": texts})
}

/// A token's text, or its bytes where they are no text.
fn piece(about: &About, id: u32) -> Value {
    let mut bytes = Vec::new();
    about.tokenizer.decode_bytes(id, &mut bytes, true);
    String::from_utf8(bytes).map_or_else(|e| e.into_bytes().into(), Value::from)
}

#[derive(Deserialize)]
struct Detokenize {
    model: Option<String>,
    tokens: Option<Vec<u32>>,
}

/// `POST /detokenize`: the text as llama.cpp's `content` and as vLLM's `prompt`.
pub(crate) async fn detokenize(
    Shared(state): Shared<Arc<State>>,
    Untraced(JsonBody { body, room, .. }): Untraced,
) -> Result<Json<Value>, ApiError> {
    let (model, _active) = state.begin()?;
    let f: Detokenize = fields(&body)?;
    check_model(&model, f.model.as_deref())?;
    let tokens = f.tokens.unwrap_or_default();
    check_ids(&model.about, "tokens", &tokens)?;
    let text = text_of(&model.about, &tokens);
    drop(room);
    Ok(Json(json!({"content": text, "prompt": text})))
}

/// `POST /apply-template`: what the model would be given for a conversation.
pub(crate) async fn apply_template(
    Shared(state): Shared<Arc<State>>,
    Untraced(body): Untraced,
) -> Result<Json<Value>, ApiError> {
    let (model, _active) = state.begin()?;
    check_model(&model, given(&body.body, "model").and_then(Value::as_str))?;
    let tokens = rendered(&model, body).await?;
    Ok(Json(json!({"prompt": text_of(&model.about, &tokens)})))
}

/// Tokens of a conversation, as an answer to it would begin.
async fn rendered(model: &Model, body: JsonBody) -> Result<Vec<u32>, ApiError> {
    Ok(Chat::of_any_length(model, body).await?.prompt.tokens)
}

/// `GET /version`, as vLLM's server has it.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
