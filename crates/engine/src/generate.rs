//! Generation: prefill, then token by token until an end of turn, a stop string, the limit or a cancellation.
//!
//! A step may compute guessed tokens along with the newest. Their logits are those that a step of each alone would give, bit for bit, and
//! each position is sampled once, in order; a guess only decides whether the logits of the next position are there already.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::answer::{Answer, Piece};
use crate::constraint::{Constraint, ConstraintError};
use crate::engine::{Engine, N_CTX_COUNTED};
use crate::onlook;
use crate::sampler::{SamplerConfig, SamplerError};
use crate::session::{Logits, Part, Sequence, StepError};
use crate::speculate::{NoSpeculation, Speculate, Speculator};
use crate::trace::served::{ServedTrace, TraceAsk, TraceAskError};

/// Tokens of a prompt that go through the model together. More of them share each expert's weights, fewer keep buffers small.
pub const PREFILL_CHUNK: usize = 1024;
/// The same of prompts whose every position reaches the output: a row of logits is as long as the vocabulary.
pub(crate) const LOGITS_CHUNK: usize = 64;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; up to the end of the context without it.
    pub max_tokens: Option<usize>,
    pub sampler: SamplerConfig,
    /// Strings that end the answer and do not appear in it.
    pub stop: Vec<String>,
    /// Goes on after an end-of-turn token.
    pub ignore_eos: bool,
    pub ends: Ends,
    /// Shows the text of CONTROL tokens.
    pub show_control: bool,
    /// Guesses tokens from the text itself where that promises to be faster. The answer is the same.
    pub speculate: bool,
    /// What the answer may be. Its end ends the answer, `ignore_eos` or not.
    pub constraint: Option<Constraint>,
    /// Tells of every token where it stands among the model's, and so many of the best.
    pub n_best: Option<usize>,
    /// The same of every token of the prompt but the first, whose positions are then all computed, whatever is kept of earlier prompts.
    /// A [`Listener`](crate::scheduler::Listener) is told; [`generate`] has nobody to tell.
    pub n_best_of_prompt: Option<usize>,
    /// Has a listener told of every step of the prompt.
    pub show_progress: bool,
    /// Tells of every token which experts the position that gave it went to.
    pub show_experts: bool,
    /// Has all positions of the pass traced. Such a request neither guesses tokens nor uses what is kept of earlier prompts.
    pub trace: Option<TraceAsk>,
    /// Asks for no answer, but for the prompt's [embedding](Generated::embedding).
    pub embed: bool,
}

impl Request {
    /// Asks for the embedding of a text.
    pub fn embedding(prompt: Vec<u32>) -> Request {
        Request {
            prompt,
            max_tokens: Some(0),
            sampler: SamplerConfig::default(),
            stop: Vec::new(),
            ignore_eos: false,
            ends: Ends::default(),
            show_control: false,
            speculate: false,
            n_best: None,
            n_best_of_prompt: None,
            show_progress: false,
            show_experts: false,
            constraint: None,
            trace: None,
            embed: true,
        }
    }
}

/// Where an answer ends and where not, besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Tokens before which neither a token nor a string ends it.
    pub min_tokens: usize,
    /// Tokens that end it, `ignore_eos` or not.
    pub tokens: Vec<u32>,
    /// Shows the string or the token of these that ended it.
    pub are_shown: bool,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-turn token, or a stop string.
    Stop,
    /// The limit of tokens, or the end of the context.
    Length,
    /// Asked to.
    Cancelled,
}

impl Finish {
    /// The name that APIs use.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }
}

/// What was generated, and what it took.
#[derive(Clone, Debug)]
pub struct Generated {
    pub text: String,
    /// Without the end-of-turn token.
    pub tokens: Vec<u32>,
    pub finish: Finish,
    /// The stop string that ended it, which is not in the text unless [`Ends::are_shown`].
    pub stopped: Option<String>,
    /// The token of [`Ends::tokens`] that ended it.
    pub stopped_at: Option<u32>,
    /// The seed that was used; drawn where none was given.
    pub seed: u64,
    pub n_prompt: usize,
    /// Tokens of the prompt whose keys and values were there already.
    pub n_cached: usize,
    pub prefill: Duration,
    /// Time after the prefill.
    pub decode: Duration,
    /// Tokens that steps in `decode` gave, an end-of-turn token too; the first comes of the prefill.
    pub n_decode_token: usize,
    pub speculation: SpeculationCounts,
    /// Bytes read in `decode`, where the backend counts them.
    pub decode_read_bytes: Option<u64>,
    /// Bytes of keys and values at the end.
    pub kv_bytes: usize,
    /// Where [`Request::trace`] asks for it.
    pub trace: Option<Box<ServedTrace>>,
    /// Where the request asks for it: the mean of the final norm over the prompt's positions, at length 1.
    pub embedding: Option<Vec<f32>>,
}

/// What came of guessing tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationCounts {
    /// Steps that computed guessed tokens.
    pub n_step: usize,
    /// Tokens guessed, and those of them that were sampled.
    pub n_drafted: usize,
    pub n_accepted: usize,
}

/// Why generation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GenerateError {
    #[error("the prompt is empty: there is nothing to continue")]
    EmptyPrompt,
    #[error(
        "the prompt has {}{n_prompt} tokens and {max_tokens} more are asked for, together {}: the context holds {n_ctx}; \
         shorten the prompt, ask for less or raise --ctx",
        if *n_prompt >= N_CTX_COUNTED.saturating_mul(*n_ctx) { "at least " } else { "" },
        n_prompt.saturating_add(*max_tokens)
    )]
    ContextOverflow { n_prompt: usize, max_tokens: usize, n_ctx: usize },
    #[error(
        "the KV cache of {n_tokens} tokens needs {need_bytes} bytes, the machine has {available_bytes} left; \
         ask for fewer tokens, or use --kv q8_0"
    )]
    Memory { n_tokens: usize, need_bytes: u64, available_bytes: u64 },
    #[error("{n_waiting} requests wait already; try again later")]
    Busy { n_waiting: usize },
    #[error("the engine has been stopped")]
    Stopped,
    #[error("the format of the answer {0}")]
    Constraint(#[from] ConstraintError),
    #[error("the engine has failed and answers nothing more; start the program again")]
    Failed,
    #[error("the text has no embedding: the mean of the model's final norm is zero or not finite")]
    NoEmbedding,
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    #[error(transparent)]
    Trace(#[from] TraceAskError),
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Generates an answer. `on_text` gets it piece by piece, never half a character; `cancel` is looked at before every step.
///
/// # Errors
/// A request that cannot fit the context, before anything is computed; sampler settings out of range; logits that are not numbers.
pub fn generate(
    engine: &mut Engine,
    request: &Request,
    cancel: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generated, GenerateError> {
    generate_with(engine, request, speculator(engine, request), cancel, on_text)
}

/// Who guesses tokens of an answer. Guesses are checked several at a time, which must not change what is answered.
pub(crate) fn speculator(engine: &Engine, request: &Request) -> Box<dyn Speculate + Send> {
    match request.speculate && engine.session.is_batch_invariant() {
        true => Box::new(Speculator::new(&request.prompt)),
        false => Box::new(NoSpeculation),
    }
}

fn generate_with(
    engine: &mut Engine,
    request: &Request,
    speculator: Box<dyn Speculate + Send>,
    cancel: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generated, GenerateError> {
    let max_tokens = check_fits(engine, request.prompt.len(), request.max_tokens)?;
    let request = Request { n_best_of_prompt: None, ..request.clone() };
    let mut answer = Answer::new(engine, request, max_tokens, speculator)?;
    let result = run(engine, &mut answer, cancel, on_text);
    engine.session.release(&mut answer.sequence);
    let trace = answer.take_trace().map(|trace| Box::new(trace.finish()));
    result.map(|()| Generated { trace, ..answer.into_generated() })
}

/// Steps until the answer has ended.
fn run(
    engine: &mut Engine,
    answer: &mut Answer,
    cancel: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<(), GenerateError> {
    let mut on_piece = |piece: Piece| {
        if !piece.text.is_empty() {
            on_text(&piece.text);
        }
        if cancel.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    while !answer.is_done() {
        if cancel.load(Ordering::Relaxed) {
            answer.finish(&*engine.session, Finish::Cancelled, &mut on_piece);
            break;
        }
        let start = Instant::now();
        let (part, onlooker) = answer.part(PREFILL_CHUNK, true);
        onlook::step(&mut *engine.session, &mut [part], &mut [onlooker])?;
        let time = Some(start.elapsed());
        answer.stepped(&*engine.session, &engine.tokenizer, 0, time, &mut on_piece)?;
    }
    Ok(())
}

/// Refuses a request that does not fit the context or the memory; the tokens it may generate at most are returned.
///
/// # Errors
/// An empty prompt, and what is too long, before anything is computed.
pub(crate) fn check_fits(engine: &Engine, n_prompt: usize, max_tokens: Option<usize>) -> Result<usize, GenerateError> {
    let n_ctx = engine.session.n_ctx();
    if n_prompt == 0 {
        return Err(GenerateError::EmptyPrompt);
    }
    // An answer without a limit needs room for one token at least.
    let most = max_tokens.unwrap_or_else(|| n_ctx.saturating_sub(n_prompt).max(1));
    if n_prompt.saturating_add(most) > n_ctx {
        return Err(GenerateError::ContextOverflow { n_prompt, max_tokens: most, n_ctx });
    }
    check_memory(engine, n_prompt.saturating_add(max_tokens.unwrap_or(0)))?;
    Ok(most)
}

/// Refuses a sequence whose keys and values would not fit the memory that is left.
fn check_memory(engine: &Engine, n_tokens: usize) -> Result<(), GenerateError> {
    let need_bytes = engine.session.kv_bytes_of(n_tokens);
    match engine.session.available_bytes().filter(|&available| need_bytes > available) {
        Some(available_bytes) => Err(GenerateError::Memory { n_tokens, need_bytes, available_bytes }),
        None => Ok(()),
    }
}

/// Feeds a prompt in chunks; false when cancelled.
pub fn prefill(
    engine: &mut Engine,
    sequence: &mut Sequence,
    prompt: &[u32],
    cancel: &AtomicBool,
) -> Result<bool, StepError> {
    let n_chunk = prompt.len().div_ceil(PREFILL_CHUNK);
    for (i, tokens) in prompt.chunks(PREFILL_CHUNK).enumerate() {
        if cancel.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let logits = if i + 1 == n_chunk { Logits::Last } else { Logits::None };
        engine.session.step(&mut [Part { sequence: &mut *sequence, tokens, logits }])?;
    }
    Ok(true)
}

impl Generated {
    /// What is generated of a request before its first step.
    pub fn nothing(request: &Request, seed: u64) -> Generated {
        Generated {
            text: String::new(),
            tokens: Vec::new(),
            finish: Finish::Length,
            stopped: None,
            stopped_at: None,
            seed,
            n_prompt: request.prompt.len(),
            n_cached: 0,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            n_decode_token: 0,
            speculation: SpeculationCounts::default(),
            decode_read_bytes: None,
            kv_bytes: 0,
            trace: None,
            embedding: None,
        }
    }
}

impl SpeculationCounts {
    /// Counts a step with a draft of `n` tokens.
    pub(crate) fn count(&mut self, n: usize) {
        self.n_step += usize::from(n > 0);
        self.n_drafted += n;
    }
}

#[cfg(test)]
mod tests;
