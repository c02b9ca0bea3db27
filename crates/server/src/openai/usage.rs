//! Counts of tokens, and how long they took.

use std::time::Duration;

use apr_engine::answer::PromptStep;
use apr_engine::generate::Generated;
use serde::Serialize;

/// OpenAI's counts.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

impl Usage {
    /// Before anything is generated.
    pub(super) fn of_prompt(n_prompt: usize) -> Usage {
        Usage { prompt_tokens: n_prompt, total_tokens: n_prompt, ..Usage::default() }
    }

    /// Counts a token of an answer.
    pub(super) fn count_one(&mut self) {
        self.completion_tokens += 1;
        self.total_tokens += 1;
    }

    /// Adds an answer; a prompt counts once, with the first of its answers.
    pub(super) fn add(&mut self, g: &Generated, is_first_of_prompt: bool) {
        if is_first_of_prompt {
            self.prompt_tokens += g.n_prompt;
            self.prompt_tokens_details.cached_tokens += g.n_cached;
        }
        self.completion_tokens += g.tokens.len();
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// How far a prompt is, by llama.cpp's names.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct PromptProgress {
    total: usize,
    /// Tokens that were there already, and those that are there now.
    cache: usize,
    processed: usize,
    time_ms: f64,
}

impl PromptProgress {
    /// After a step of a prompt of `total` tokens.
    pub(crate) fn of(step: &PromptStep, total: usize) -> PromptProgress {
        PromptProgress { total, cache: step.n_cached, processed: step.n_done, time_ms: ms(step.time) }
    }
}

/// How long an answer took, by llama.cpp's names.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timings {
    /// Tokens of the prompt that were there already, and those that were computed.
    cache_n: usize,
    prompt_n: usize,
    prompt_ms: f64,
    prompt_per_second: Option<f64>,
    predicted_n: usize,
    predicted_ms: f64,
    predicted_per_second: Option<f64>,
    draft_n: usize,
    draft_n_accepted: usize,
}

impl Timings {
    pub(crate) fn of(g: &Generated) -> Timings {
        let n_computed = g.n_prompt.saturating_sub(g.n_cached);
        Timings {
            cache_n: g.n_cached,
            prompt_n: n_computed,
            prompt_ms: ms(g.prefill),
            prompt_per_second: rate(n_computed, g.prefill),
            predicted_n: g.tokens.len(),
            predicted_ms: ms(g.decode),
            // The first token is the prefill's.
            predicted_per_second: rate(g.n_decode_token, g.decode),
            draft_n: g.speculation.n_drafted,
            draft_n_accepted: g.speculation.n_accepted,
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn rate(n: usize, time: Duration) -> Option<f64> {
    (n > 0 && !time.is_zero()).then(|| n as f64 / time.as_secs_f64())
}
