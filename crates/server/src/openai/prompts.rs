//! Texts as requests write them: strings, token ids, and both in one list.

use apr_engine::About;
use serde::Deserialize;

use crate::errors::ApiError;

/// One or several texts.
#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a string, token ids with strings between them, or a list of those")]
pub(crate) enum Prompts {
    Text(String),
    /// One text where a token id is among them, else as many as there are strings.
    Mixed(Vec<Part>),
    Several(Vec<Item>),
    Wrapped(Wrapped),
}

/// A text in a list of several.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Item {
    Text(String),
    Mixed(Vec<Part>),
    Wrapped(Wrapped),
}

/// A piece of a text.
#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a string or a token id")]
pub(crate) enum Part {
    Text(String),
    Token(u32),
}

/// A text in an object, as llama.cpp's clients write those that images may go with. Images are refused.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Wrapped {
    Prompt(PromptString),
    Content(ContentParts),
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PromptString {
    prompt_string: String,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ContentParts {
    content: Vec<ContentPart>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields, tag = "type", rename_all = "lowercase")]
enum ContentPart {
    Text { text: String },
}

/// A text.
pub(crate) enum Written {
    Text(String),
    Mixed(Vec<Part>),
}

impl Prompts {
    pub(crate) fn list(self) -> Vec<Written> {
        let item = |item: Item| match item {
            Item::Text(text) => Written::Text(text),
            Item::Mixed(parts) => Written::Mixed(parts),
            Item::Wrapped(wrapped) => Written::Text(wrapped.text()),
        };
        let one = |part: Part| match part {
            Part::Text(text) => Written::Text(text),
            token => Written::Mixed(vec![token]),
        };
        match self {
            Prompts::Text(text) => vec![Written::Text(text)],
            Prompts::Wrapped(wrapped) => vec![Written::Text(wrapped.text())],
            Prompts::Several(items) => items.into_iter().map(item).collect(),
            Prompts::Mixed(parts) if parts.is_empty() || parts.iter().any(|p| matches!(p, Part::Token(_))) => {
                vec![Written::Mixed(parts)]
            }
            Prompts::Mixed(parts) => parts.into_iter().map(one).collect(),
        }
    }
}

impl Wrapped {
    fn text(self) -> String {
        match self {
            Wrapped::Prompt(p) => p.prompt_string,
            Wrapped::Content(c) => c.content.into_iter().map(|ContentPart::Text { text }| text).collect(),
        }
    }
}

impl Written {
    /// Its tokens. `param` is the field it was in; control tokens are found in strings only with `parse`.
    ///
    /// # Errors
    /// An id that no token has.
    pub(crate) fn tokens(&self, about: &About, param: &str, parse: bool) -> Result<Vec<u32>, ApiError> {
        match self {
            Written::Text(text) => Ok(about.prompt_tokens(text.as_bytes(), parse)),
            Written::Mixed(parts) => tokens_of(about, param, parts, (true, parse)),
        }
    }

    /// Its tokens where it does not begin a prompt; control tokens are not found in strings.
    ///
    /// # Errors
    /// An id that no token has.
    pub(crate) fn inner_tokens(&self, about: &About, param: &str) -> Result<Vec<u32>, ApiError> {
        match self {
            Written::Text(text) => Ok(about.tokenizer.encode_text(text, false)),
            Written::Mixed(parts) => tokens_of(about, param, parts, (false, false)),
        }
    }

    pub(crate) fn text(self, about: &About) -> String {
        let mut bytes = Vec::new();
        match self {
            Written::Text(text) => return text,
            Written::Mixed(parts) => parts.iter().for_each(|part| match part {
                Part::Text(text) => bytes.extend(text.as_bytes()),
                Part::Token(id) => about.tokenizer.decode_bytes(*id, &mut bytes, true),
            }),
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Tokens of pieces, one after the other. With `add`, a string at the beginning is tokenized as a text's beginning.
///
/// # Errors
/// An id that no token has.
pub(crate) fn tokens_of(
    about: &About,
    param: &str,
    parts: &[Part],
    (add, parse): (bool, bool),
) -> Result<Vec<u32>, ApiError> {
    let mut tokens = Vec::new();
    for part in parts {
        match part {
            Part::Text(text) if add && tokens.is_empty() => tokens = about.text_tokens(text.as_bytes(), parse),
            Part::Text(text) => tokens.extend(about.tokenizer.encode_text(text, parse)),
            Part::Token(id) => {
                check_ids(about, param, &[*id])?;
                tokens.push(*id);
            }
        }
    }
    Ok(tokens)
}

/// Refuses ids that no token has.
pub(crate) fn check_ids(about: &About, param: &str, tokens: &[u32]) -> Result<(), ApiError> {
    let n_vocab = about.tokenizer.n_vocab();
    match tokens.iter().find(|id| **id as usize >= n_vocab) {
        Some(id) => Err(ApiError::field(param, format_args!("token {id} is out of vocabulary, which has {n_vocab}"))),
        None => Ok(()),
    }
}

/// What tokens say, control tokens spelled out.
pub(crate) fn text_of(about: &About, tokens: &[u32]) -> String {
    let mut bytes = Vec::new();
    tokens.iter().for_each(|t| about.tokenizer.decode_bytes(*t, &mut bytes, true));
    String::from_utf8_lossy(&bytes).into_owned()
}
