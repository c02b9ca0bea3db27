//! Texts as requests write them: strings, or lists of token ids.

use apr_engine::About;
use serde::Deserialize;

use crate::errors::ApiError;

/// One or several texts.
#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a string, a list of strings, a list of token ids, or a list of those")]
pub(crate) enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// A text.
pub(crate) enum Written {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompts {
    pub(crate) fn list(self) -> Vec<Written> {
        match self {
            Prompts::Text(text) => vec![Written::Text(text)],
            Prompts::Tokens(tokens) => vec![Written::Tokens(tokens)],
            Prompts::Texts(texts) => texts.into_iter().map(Written::Text).collect(),
            Prompts::TokenLists(lists) => lists.into_iter().map(Written::Tokens).collect(),
        }
    }
}

impl Written {
    /// Its tokens. `param` is the field it was in.
    ///
    /// # Errors
    /// An id that no token has.
    pub(crate) fn tokens(&self, about: &About, param: &str) -> Result<Vec<u32>, ApiError> {
        match self {
            Written::Text(text) => Ok(about.text_tokens(text.as_bytes(), false)),
            Written::Tokens(tokens) => {
                check_ids(about, param, tokens)?;
                Ok(tokens.clone())
            }
        }
    }

    pub(crate) fn text(self, about: &About) -> String {
        match self {
            Written::Text(text) => text,
            Written::Tokens(tokens) => text_of(about, &tokens),
        }
    }
}

/// Refuses ids that no token has.
pub(crate) fn check_ids(about: &About, param: &str, tokens: &[u32]) -> Result<(), ApiError> {
    let n_vocab = about.tokenizer.n_vocab();
    match tokens.iter().find(|id| **id as usize >= n_vocab) {
        Some(id) => Err(ApiError::field(param, format_args!("there is no token {id}; the vocabulary has {n_vocab}"))),
        None => Ok(()),
    }
}

/// What tokens say, control tokens spelled out.
pub(crate) fn text_of(about: &About, tokens: &[u32]) -> String {
    let mut bytes = Vec::new();
    tokens.iter().for_each(|t| about.tokenizer.decode_bytes(*t, &mut bytes, true));
    String::from_utf8_lossy(&bytes).into_owned()
}
