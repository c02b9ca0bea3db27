//! How likely tokens were, in the two forms that OpenAI's API has for it.

use apr_engine::About;
use apr_engine::answer::Standing;
use apr_engine::sampler::Ranked;
use serde::Serialize;
use serde_json::{Map, Value};

/// What stands for the logarithm of nothing, as in OpenAI's own answers.
const NEVER: f64 = -9999.0;

/// A token as chats tell of it.
#[derive(Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    chosen: Token,
    top_logprobs: Vec<Token>,
}

#[derive(Serialize)]
struct Token {
    /// As llama.cpp tells it.
    id: u32,
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl ChatToken {
    pub(crate) fn new(about: &About, standing: &Standing) -> ChatToken {
        let token = |r: &Ranked| {
            let bytes = bytes_of(about, r.token);
            Token { id: r.token, token: String::from_utf8_lossy(&bytes).into_owned(), logprob: logprob(r), bytes }
        };
        ChatToken { chosen: token(&standing.chosen), top_logprobs: standing.best.iter().map(token).collect() }
    }
}

/// Tokens as completions tell of them: one list each.
#[derive(Default, Serialize)]
pub(super) struct Columns {
    tokens: Vec<String>,
    token_logprobs: Vec<f64>,
    top_logprobs: Vec<Map<String, Value>>,
    /// Characters before each token in the text that the tokens make.
    text_offset: Vec<usize>,
}

impl Columns {
    /// Adds a token that begins after `offset` characters, and gives the offset after it.
    pub(super) fn push(&mut self, about: &About, standing: &Standing, offset: usize) -> usize {
        let text = name_of(about, standing.chosen.token);
        let n_char = about.tokenizer.piece(standing.chosen.token).chars().count();
        self.tokens.push(text);
        self.token_logprobs.push(logprob(&standing.chosen));
        // The token itself is always told of, so that there may be one more than was asked for.
        let best = standing.best.iter().chain([&standing.chosen]).map(|r| (name_of(about, r.token), logprob(r).into()));
        self.top_logprobs.push(best.collect());
        self.text_offset.push(offset);
        offset + n_char
    }
}

/// A token's text, or its bytes in the way of OpenAI's completions: as text all halves of characters would be the same.
fn name_of(about: &About, token: u32) -> String {
    let spelled = |bytes: Vec<u8>| bytes.iter().fold("bytes:".to_string(), |text, b| format!("{text}\\x{b:02x}"));
    String::from_utf8(bytes_of(about, token)).unwrap_or_else(|e| spelled(e.into_bytes()))
}

fn bytes_of(about: &About, token: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    about.tokenizer.decode_bytes(token, &mut bytes, true);
    bytes
}

fn logprob(r: &Ranked) -> f64 {
    r.p.ln().max(NEVER)
}
