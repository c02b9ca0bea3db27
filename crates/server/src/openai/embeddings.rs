//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Shared;
use serde::{Deserialize, Serialize};

use super::check_model;
use super::prompts::Prompts;
use crate::embed;
use crate::errors::ApiError;
use crate::extract::{JsonBody, Untraced, fields};
use crate::prompt;
use crate::state::State;

#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    input: Option<Prompts>,
    encoding_format: Option<Encoding>,
    dimensions: Option<i64>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Float,
    /// Of little-endian 32-bit floats.
    Base64,
}

#[derive(Serialize)]
struct Embeddings {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Embeds texts.
pub(crate) async fn create(
    Shared(state): Shared<Arc<State>>,
    Untraced(JsonBody { body, room, .. }): Untraced,
) -> Result<Json<impl Serialize>, ApiError> {
    let (model, active) = state.begin()?;
    let f: Fields = fields(&body)?;
    check_model(&model, f.model.as_deref())?;
    embed::check_dimensions(&model.about, f.dimensions)?;
    let input = f.input.ok_or_else(|| ApiError::field("input", "is missing"))?;
    let about = model.about.clone();
    let texts = prompt::elsewhere(move || embed::read(&about, "input", input.list(), false)).await?;
    drop(room);
    let embedded = embed::embed(&model, active, texts).await?;
    let vector = |v: Vec<f32>| match f.encoding_format.unwrap_or(Encoding::Float) {
        Encoding::Float => Vector::Float(v),
        Encoding::Base64 => Vector::Base64(base64(&v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())),
    };
    let embedding = |(index, v)| Embedding { object: "embedding", index, embedding: vector(v) };
    Ok(Json(Embeddings {
        object: "list",
        data: embedded.vectors.into_iter().enumerate().map(embedding).collect(),
        model: model.names.id.clone(),
        usage: Usage { prompt_tokens: embedded.n_token, total_tokens: embedded.n_token },
    }))
}

/// Bytes in base64 with padding (RFC 4648 §4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, i| bits << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        // One byte takes two digits, two take three.
        let digit = |i: usize| if i <= three.len() { DIGITS[(bits >> (18 - 6 * i)) as usize & 63] } else { b'=' };
        out.extend((0..4).map(|i| char::from(digit(i))));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let pairs =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("\u{7f}?~", "fz9+")];
        pairs.iter().for_each(|(text, expected)| assert_eq!(&base64(text.as_bytes()), expected));
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }
}
