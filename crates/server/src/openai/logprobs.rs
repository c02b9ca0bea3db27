//! How likely tokens were, in the two forms that OpenAI's API has for it.

use apr_engine::About;
use apr_engine::answer::Standing;
use apr_engine::sampler::Ranked;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::sampling::{N_BEST_MAX, n_best};
use crate::errors::ApiError;

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
    /// Null for the first token of a prompt, as nothing comes before it.
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters before each token in the text that the tokens make. One that goes on in the middle of a character begins after it.
    text_offset: Vec<usize>,
}

impl Columns {
    /// Tokens of a prompt, of which `standings` are told from the second on, with `n` alternatives each; and the characters of its text.
    /// A `has_mark` is a token in front that is not in the text.
    pub(super) fn of_prompt(
        about: &About,
        tokens: &[u32],
        standings: &[Standing],
        (n, has_mark): (usize, bool),
    ) -> (Columns, usize) {
        let (mut columns, mut offset) = (Columns::default(), 0);
        let standings = [None].into_iter().chain(standings.iter().map(Some));
        for (i, (&token, standing)) in tokens.iter().zip(standings).enumerate() {
            columns.add(about, token, standing.map(|s| (s, n)), offset);
            if i > 0 || !has_mark {
                offset += n_char(about, token, true);
            }
        }
        (columns, offset)
    }

    /// Adds a token of an answer that begins after `offset` characters, and gives the offset after it.
    pub(super) fn push(&mut self, about: &About, standing: &Standing, offset: usize) -> usize {
        let token = standing.chosen.token;
        self.add(about, token, Some((standing, standing.best.len())), offset);
        offset + n_char(about, token, false)
    }

    fn add(&mut self, about: &About, token: u32, standing: Option<(&Standing, usize)>, offset: usize) {
        self.tokens.push(name_of(about, token));
        self.token_logprobs.push(standing.map(|(s, _)| logprob(&s.chosen)));
        // The token itself is always told of, so that there may be one more than was asked for.
        let best = standing.map(|(s, n)| s.best.iter().take(n).chain([&s.chosen]));
        self.top_logprobs.push(best.map(|all| all.map(|r| (name_of(about, r.token), logprob(r).into())).collect()));
        self.text_offset.push(offset);
    }
}

/// Tokens of a prompt as vLLM tells of them: null for the first, then of each a map from ids of tokens to what they would have been.
pub(super) type PromptLogprobs = Vec<Option<Map<String, Value>>>;

/// `prompt_logprobs`: how many alternatives vLLM's field asks for of each token of the prompt.
///
/// # Errors
/// More than are told; a stream, which has no place for them.
pub(super) fn n_best_of_prompt(asked: Option<i64>, is_stream: bool) -> Result<Option<usize>, ApiError> {
    let n = asked.map(|n| n_best("prompt_logprobs", n, N_BEST_MAX)).transpose()?;
    match n.is_some() && is_stream {
        true => Err(ApiError::field(
            "prompt_logprobs",
            "expected stream to be false, got true: they are told with whole answers",
        )),
        false => Ok(n),
    }
}

/// All tokens of a prompt of which `standings` are told from the second on, with `n` alternatives each.
pub(super) fn prompt_logprobs(about: &About, standings: &[Standing], n: usize) -> PromptLogprobs {
    let entry = |r: &Ranked, rank: usize| {
        let text = about.tokenizer.piece(r.token);
        (r.token.to_string(), json!({"logprob": logprob(r), "rank": rank, "decoded_token": text}))
    };
    let of_token = |s: &Standing| {
        let best = s.best.iter().take(n).zip(1..).map(|(r, rank)| entry(r, rank));
        Some(best.chain([entry(&s.chosen, s.rank)]).collect())
    };
    [None].into_iter().chain(standings.iter().map(of_token)).collect()
}

/// Most logarithms that are told of the prompts of one request: each of their tokens has its own, and so many alternatives.
const N_SCORED_MAX: usize = 1 << 18;

/// Refuses prompts of whose tokens more would be told than is held for one request. `param` asked for it.
///
/// # Errors
/// More tokens, with `n_best` alternatives each.
pub(super) fn check_scored(param: &str, n_token: usize, n_best: usize) -> Result<(), ApiError> {
    let n = n_token.saturating_mul(n_best + 1);
    match n > N_SCORED_MAX {
        true => {
            let message = format_args!(
                "expected at most {N_SCORED_MAX} logprobs of prompts in a request, got {n}: {n_token} tokens with {} each",
                n_best + 1
            );
            Err(ApiError::field(param, message))
        }
        false => Ok(()),
    }
}

/// Characters that begin in a token, which is in the text also where it is a control token if `show_control`.
fn n_char(about: &About, token: u32, show_control: bool) -> usize {
    let mut bytes = Vec::new();
    about.tokenizer.decode_bytes(token, &mut bytes, show_control);
    // In UTF-8 every other byte of a character begins with the bits 10.
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
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
