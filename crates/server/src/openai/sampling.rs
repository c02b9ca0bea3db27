//! How to generate: the fields that chats and completions share, with their ranges.

use std::collections::BTreeMap;

use apr_engine::constraint::Constraint;
use apr_engine::generate::Request;
use apr_engine::sampler::SamplerConfig;
use serde::Deserialize;
use serde_json::{Number, Value};

use crate::errors::ApiError;
use crate::extract::fields;
use crate::model::Model;

/// Answers to one prompt.
const N_MAX: i64 = 16;
const N_STOP_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const N_BIAS_MAX: usize = 1024;
/// Alternatives that are told of each token.
const N_BEST_MAX: i64 = 20;

/// The fields as they come; OpenAI's, and what vLLM and llama.cpp add to them.
#[derive(Deserialize)]
struct Fields {
    n: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
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
    logit_bias: Option<BTreeMap<String, f64>>,
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
pub(super) struct Sampling {
    /// Answers to each prompt.
    pub(super) n: usize,
    pub(super) max_tokens: Option<usize>,
    /// Tells of every token which experts it came of.
    pub(super) show_experts: bool,
    stop: Vec<String>,
    ignore_eos: bool,
    sampler: SamplerConfig,
    /// What the answers may be.
    pub(super) constraint: Option<Constraint>,
}

impl Sampling {
    /// Reads the fields of a request; what it leaves out is the model's default.
    ///
    /// # Errors
    /// A field of another type, or out of its range.
    pub(super) fn read(body: &Value, model: &Model) -> Result<Sampling, ApiError> {
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
            stop: stop(f.stop.take())?,
            show_experts: f.apr_experts.unwrap_or(false),
            ignore_eos: f.ignore_eos.unwrap_or(false),
            sampler: sampler(f, model)?,
            constraint: None,
        })
    }

    /// Requests for the answers to one prompt.
    pub(super) fn requests(&self, prompt: &[u32], n_best: Option<usize>) -> impl Iterator<Item = Request> {
        (0..self.n as u64).map(move |i| Request {
            prompt: prompt.to_vec(),
            max_tokens: self.max_tokens,
            // Answers with one seed would all be the same.
            sampler: SamplerConfig { seed: self.sampler.seed.map(|s| s.wrapping_add(i)), ..self.sampler.clone() },
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            show_control: false,
            speculate: true,
            constraint: self.constraint.clone(),
            n_best,
            show_experts: self.show_experts,
            trace: None,
            embed: false,
        })
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
pub(super) fn n_best(name: &str, asked: i64) -> Result<usize, ApiError> {
    Ok(within(name, asked, 0, N_BEST_MAX)? as usize)
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
        c.logit_bias = logit_bias(&bias, model.about.tokenizer.n_vocab())?;
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

fn logit_bias(bias: &BTreeMap<String, f64>, n_vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    if bias.len() > N_BIAS_MAX {
        let message = format!("{} tokens; at most {N_BIAS_MAX} are taken", bias.len());
        return Err(ApiError::field("logit_bias", message));
    }
    let read = |(token, bias): (&String, &f64)| {
        let param = format!("logit_bias.{token}");
        let id = token.parse::<u32>().ok().filter(|id| (*id as usize) < n_vocab);
        let id = id.ok_or_else(|| {
            ApiError::field(&param, format_args!("expected a token id from 0 to {}", n_vocab.saturating_sub(1)))
        })?;
        match (-100.0..=100.0).contains(bias) {
            true => Ok((id, *bias as f32)),
            false => Err(ApiError::field(&param, format_args!("expected a number from -100 to 100, got {bias}"))),
        }
    };
    bias.iter().map(read).collect()
}
