//! How to generate: the fields that chats and completions share, with their ranges.

use apr_engine::About;
use apr_engine::constraint::Constraint;
use apr_engine::generate::{Ends, Request};
use apr_engine::sampler::SamplerConfig;
use serde::Deserialize;
use serde_json::{Number, Value};

use super::prompts::check_ids;
use crate::errors::ApiError;
use crate::extract::{fields, kind_of};
use crate::model::Model;
use crate::prompt::check_fits;

/// Answers to one prompt.
const N_MAX: i64 = 16;
const N_STOP_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const N_BIAS_MAX: usize = 1024;
/// Alternatives that are told of each token, in OpenAI's form and in llama.cpp's.
pub(crate) const N_BEST_MAX: i64 = 20;
pub(crate) const N_PROBS_MAX: i64 = 100;

/// The fields as they come; OpenAI's, and what vLLM and llama.cpp add to them.
#[derive(Deserialize)]
struct Fields {
    n: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    min_tokens: Option<i64>,
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: Option<bool>,
    seed: Option<Number>,
    temperature: Option<f64>,
    top_k: Option<i64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    #[serde(alias = "repeat_penalty")]
    repetition_penalty: Option<f64>,
    repeat_last_n: Option<i64>,
    frequency_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    logit_bias: Option<Value>,
    return_token_ids: Option<bool>,
    return_progress: Option<bool>,
    truncate_prompt_tokens: Option<i64>,
    apr_experts: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// How to generate, checked.
#[derive(Debug)]
pub(crate) struct Sampling {
    /// Answers to each prompt.
    pub(crate) n: usize,
    pub(crate) max_tokens: Option<usize>,
    /// What is left of a prompt that is too long.
    pub(super) keep: Keep,
    /// Tells of every token which experts it came of.
    pub(super) show_experts: bool,
    /// Tells the ids of all tokens, the prompt's too.
    pub(super) show_tokens: bool,
    /// Tells how far the prompt is, where an answer is streamed.
    pub(crate) show_progress: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) ends: Ends,
    pub(crate) sampler: SamplerConfig,
    /// What the answers may be.
    pub(crate) constraint: Option<Constraint>,
}

impl Sampling {
    /// Reads the fields of a request; what it leaves out is the model's default.
    ///
    /// # Errors
    /// A field of another type, or out of its range.
    pub(crate) fn read(body: &Value, model: &Model) -> Result<Sampling, ApiError> {
        let mut f: Fields = fields(body)?;
        let (limit, limit_name) = match f.max_completion_tokens {
            Some(n) => (Some(n), "max_completion_tokens"),
            None => (f.max_tokens, "max_tokens"),
        };
        Ok(Sampling {
            n: within("n", f.n.unwrap_or(1), 1, N_MAX)? as usize,
            // -1 says no limit where people come from llama.cpp or LM Studio.
            max_tokens: match limit.filter(|n| *n != -1) {
                Some(n) => Some(within(limit_name, n, 0, i64::MAX)? as usize),
                None => None,
            },
            keep: Keep::read(f.truncate_prompt_tokens)?,
            stop: stop(f.stop.take())?,
            show_experts: f.apr_experts.unwrap_or(false),
            show_tokens: f.return_token_ids.unwrap_or(false),
            show_progress: f.return_progress.unwrap_or(false),
            ignore_eos: f.ignore_eos.unwrap_or(false),
            ends: ends(&mut f, model)?,
            sampler: sampler(f, model)?,
            constraint: None,
        })
    }

    /// Requests for the answers to one prompt.
    pub(crate) fn requests(&self, prompt: &[u32], n_best: Option<usize>) -> impl Iterator<Item = Request> {
        (0..self.n as u64).map(move |i| Request {
            prompt: prompt.to_vec(),
            max_tokens: self.max_tokens,
            // Answers with one seed would all be the same.
            sampler: SamplerConfig { seed: self.sampler.seed.map(|s| s.wrapping_add(i)), ..self.sampler.clone() },
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ends: self.ends.clone(),
            show_control: false,
            speculate: true,
            constraint: self.constraint.clone(),
            n_best,
            n_best_of_prompt: None,
            show_progress: self.show_progress,
            show_experts: self.show_experts,
            trace: None,
            embed: false,
        })
    }
}

/// Which of a prompt's tokens are used.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keep {
    All,
    /// So many, from its end.
    Last(usize),
    /// As many as there is room for beside the answer, from its end.
    WhatFits,
}

impl Keep {
    /// vLLM's `truncate_prompt_tokens`. A prompt is never cut unless it asks for it.
    fn read(asked: Option<i64>) -> Result<Keep, ApiError> {
        match asked {
            None => Ok(Keep::All),
            Some(-1) => Ok(Keep::WhatFits),
            Some(n @ 1..) => Ok(Keep::Last(n as usize)),
            Some(n) => {
                let message = format_args!("expected -1, for as many as fit, or a number from 1 on, got {n}");
                Err(ApiError::field("truncate_prompt_tokens", message))
            }
        }
    }

    /// The tokens that are used of a prompt, whose answer has at most `max_tokens`.
    ///
    /// # Errors
    /// A prompt so long that not all of it has been read into tokens.
    pub(super) fn of(
        self,
        about: &About,
        mut tokens: Vec<u32>,
        max_tokens: Option<usize>,
    ) -> Result<Vec<u32>, ApiError> {
        let n = match self {
            Keep::All => return Ok(tokens),
            Keep::Last(n) => n,
            Keep::WhatFits => about.n_ctx.saturating_sub(max_tokens.unwrap_or(1)),
        };
        if tokens.len() >= about.n_counted() {
            check_fits(about, &tokens, max_tokens)?;
        }
        tokens.drain(..tokens.len().saturating_sub(n));
        Ok(tokens)
    }
}

/// An integer in a range.
fn within(name: &str, got: i64, min: i64, max: i64) -> Result<i64, ApiError> {
    let expected = || match max {
        i64::MAX => format!("at least {min}"),
        _ => format!("from {min} to {max}"),
    };
    match (min..=max).contains(&got) {
        true => Ok(got),
        false => Err(ApiError::field(name, format_args!("expected a number {}, got {got}", expected()))),
    }
}

/// How many alternatives a field asks for.
///
/// # Errors
/// More than are told.
pub(crate) fn n_best(name: &str, asked: i64, max: i64) -> Result<usize, ApiError> {
    Ok(within(name, asked, 0, max)? as usize)
}

fn stop(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let mut stop = match stop {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Many(texts)) => texts,
    };
    if stop.len() > N_STOP_MAX {
        return Err(ApiError::field("stop", format_args!("{} strings; at most {N_STOP_MAX} are taken", stop.len())));
    }
    match stop.iter().find(|text| text.len() > STOP_BYTES_MAX) {
        Some(text) => {
            let message = format!("a string of {} bytes; at most {STOP_BYTES_MAX} are taken", text.len());
            Err(ApiError::field("stop", message))
        }
        None => {
            // Every text has the empty one in it.
            stop.retain(|text| !text.is_empty());
            Ok(stop)
        }
    }
}

/// vLLM's fields about where an answer ends.
fn ends(f: &mut Fields, model: &Model) -> Result<Ends, ApiError> {
    let min_tokens = within("min_tokens", f.min_tokens.unwrap_or(0), 0, i64::MAX)? as usize;
    if let Some(limit) = f.max_completion_tokens.or(f.max_tokens).filter(|limit| *limit >= 0)
        && min_tokens as u64 > limit as u64
    {
        let message = format_args!("expected at most max_tokens, which is {limit}, got {min_tokens}");
        return Err(ApiError::field("min_tokens", message));
    }
    let tokens = f.stop_token_ids.take().unwrap_or_default();
    if tokens.len() > N_BIAS_MAX {
        return Err(ApiError::field("stop_token_ids", format_args!("more than {N_BIAS_MAX} tokens")));
    }
    check_ids(&model.about, "stop_token_ids", &tokens)?;
    Ok(Ends { min_tokens, tokens, are_shown: f.include_stop_str_in_output.unwrap_or(false) })
}

fn sampler(f: Fields, model: &Model) -> Result<SamplerConfig, ApiError> {
    let mut c = model.defaults.clone();
    let float = |value: Option<f64>, default: f32| value.map_or(default, |v| v as f32);
    c.temperature = float(f.temperature, c.temperature);
    c.top_p = float(f.top_p, c.top_p);
    c.min_p = float(f.min_p, c.min_p);
    c.repetition_penalty = float(f.repetition_penalty, c.repetition_penalty);
    c.frequency_penalty = float(f.frequency_penalty, c.frequency_penalty);
    c.presence_penalty = float(f.presence_penalty, c.presence_penalty);
    if let Some(k) = f.top_k {
        // vLLM's clients write -1 for off.
        c.top_k = within("top_k", k, -1, u32::MAX.into())?.max(0) as u32;
    }
    if let Some(n) = f.repeat_last_n {
        // llama.cpp's write -1 for the whole context.
        let n = within("repeat_last_n", n, -1, u32::MAX.into())?;
        c.repeat_last_n = usize::try_from(n).unwrap_or(model.about.n_ctx);
    }
    if let Some(seed) = f.seed {
        c.seed = read_seed(&seed)?;
    }
    if let Some(bias) = f.logit_bias {
        c.logit_bias = logit_bias(&bias, &model.about)?;
    }
    c.validate()?;
    Ok(c)
}

/// -1 asks for any seed.
fn read_seed(seed: &Number) -> Result<Option<u64>, ApiError> {
    match (seed.as_u64(), seed.as_i64()) {
        (Some(seed), _) => Ok(Some(seed)),
        (None, Some(-1)) => Ok(None),
        (None, Some(seed)) => Ok(Some(seed as u64)),
        (None, None) => Err(ApiError::field("seed", format_args!("expected an integer of 64 bits, got {seed}"))),
    }
}

/// Biases of tokens: OpenAI's object, or llama.cpp's list of pairs. Either names a token by its id or several by their text, and false
/// forbids them.
fn logit_bias(bias: &Value, about: &About) -> Result<Vec<(u32, f32)>, ApiError> {
    let mut read = Vec::new();
    let mut add = |param: &str, token: &Value, by: &Value| {
        let by = bias_of(param, by)?;
        read.extend(biased(param, token, about)?.into_iter().map(|id| (id, by)));
        match read.len() > N_BIAS_MAX {
            true => Err(ApiError::field("logit_bias", format_args!("more than {N_BIAS_MAX} tokens"))),
            false => Ok(()),
        }
    };
    match bias {
        Value::Object(map) => {
            map.iter()
                .try_for_each(|(name, by)| add(&format!("logit_bias.{name}"), &Value::from(name.as_str()), by))?;
        }
        Value::Array(list) => {
            for (i, pair) in list.iter().enumerate() {
                let param = format!("logit_bias[{i}]");
                match pair.as_array().map(Vec::as_slice) {
                    Some([token, by]) => add(&param, token, by)?,
                    _ => return Err(ApiError::field(&param, "expected a token and its bias")),
                }
            }
        }
        other => {
            let message = format_args!("expected an object or a list of pairs, got {}", kind_of(other));
            return Err(ApiError::field("logit_bias", message));
        }
    }
    Ok(read)
}

fn bias_of(param: &str, by: &Value) -> Result<f32, ApiError> {
    match by {
        Value::Bool(false) => Ok(f32::NEG_INFINITY),
        by => by.as_f64().filter(|by| (-100.0..=100.0).contains(by)).map(|by| by as f32).ok_or_else(|| {
            ApiError::field(param, format_args!("expected a number from -100 to 100, or false, got {by}"))
        }),
    }
}

/// The tokens that a bias names. A string of digits is an id.
fn biased(param: &str, token: &Value, about: &About) -> Result<Vec<u32>, ApiError> {
    let n_vocab = about.tokenizer.n_vocab();
    let checked = |id: Option<u64>| {
        let message = format_args!("expected the id of a token in the vocabulary of {n_vocab}, got {token}");
        id.filter(|id| (*id as usize) < n_vocab).ok_or_else(|| ApiError::field(param, message))
    };
    match token {
        Value::String(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(vec![checked(text.parse().ok())? as u32])
        }
        Value::String(text) => Ok(about.tokenizer.encode_text(text, false)),
        Value::Number(id) => Ok(vec![checked(id.as_u64())? as u32]),
        other => Err(ApiError::field(param, format_args!("expected a token id or a string, got {}", kind_of(other)))),
    }
}
