//! `POST /completion`, and `/completions` without `/v1`: completions in llama.cpp's own form.
//!
//! A prompt is read as llama.cpp reads it: control tokens in it are found, as its clients render conversations themselves. The wire
//! form is that of llama.cpp's `tools/server/README.md`.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::{Piece, PromptStep, Standing};
use apr_engine::constraint::Thought;
use apr_engine::generate::{Finish, Generated, Request};
use apr_engine::sampler::Ranked;
use axum::Json;
use axum::extract::State as Shared;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::props;
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::job::{self, Whole};
use crate::model::Model;
use crate::openai::logprobs::ChatToken;
use crate::openai::prompts::{Prompts, Written, text_of};
use crate::openai::sampling::{N_PROBS_MAX, Sampling, n_best};
use crate::openai::usage::{PromptProgress, Timings};
use crate::openai::{check_model, error_event, event, structured};
use crate::prompt;
use crate::sse::{self, Chunks};
use crate::state::State;
use crate::trace;

/// The fields that it has of its own.
#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    prompt: Option<Prompts>,
    stream: Option<bool>,
    n_predict: Option<i64>,
    n_cmpl: Option<i64>,
    n_probs: Option<i64>,
    post_sampling_probs: Option<bool>,
    return_tokens: Option<bool>,
    response_fields: Option<Vec<String>>,
}

/// What fields are called in OpenAI's form, and here.
const NAMES: [(&str, &str); 2] = [("max_completion_tokens", "n_predict"), ("n", "n_cmpl")];

/// How answers are to be told.
struct Form {
    about: Arc<About>,
    model: String,
    /// Texts of the prompts, with their control tokens.
    prompts: Vec<String>,
    /// Answers to each prompt.
    n: usize,
    settings: Value,
    probs: Option<Probs>,
    return_tokens: bool,
    /// Paths of those fields of an end that are told; none are all.
    response_fields: Vec<String>,
}

/// Which likelihoods are told of each token.
#[derive(Clone, Copy)]
enum Probs {
    /// The model's.
    OfModel,
    /// Those it was drawn with, where that is the best token always.
    OfGreedy,
}

/// Goes on with texts.
pub(crate) async fn create(
    Shared(state): Shared<Arc<State>>,
    JsonBody { mut body, room, trace }: JsonBody,
) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let own: Fields = fields(&body)?;
    check_model(&model, own.model.as_deref())?;
    let format = structured::read(&body)?;
    let mut sampling = read_sampling(&own, &mut body, &model)?;
    if sampling.ignore_eos && format.is_none() {
        forbid_ends(&mut sampling, &model.about);
    }
    let n_best = own.n_probs.filter(|n| *n != 0).map(|n| n_best("n_probs", n, N_PROBS_MAX)).transpose()?;
    let probs = n_best.map(|_| own.probs(&sampling)).transpose()?;
    let prompts = own.prompt.clone().ok_or_else(|| ApiError::field("prompt", "is missing"))?.list();
    job::check_places(&model, prompts.len() * sampling.n)?;
    let (about, max_tokens) = (model.about.clone(), sampling.max_tokens);
    let read = move || {
        let read = |written: Written| {
            let tokens = written.tokens(&about, "prompt", true)?;
            prompt::check_fits(&about, &tokens, max_tokens)?;
            Ok(tokens)
        };
        prompts.into_iter().map(read).collect::<Result<Vec<_>, ApiError>>()
    };
    let prompts = prompt::elsewhere(read).await?;
    sampling.constraint = structured::constraint(&model, Thought::None, format.into_iter().collect(), "").await?;
    drop(room);
    let mut requests: Vec<Request> = prompts.iter().flat_map(|p| sampling.requests(p, n_best)).collect();
    trace.put_in(&mut requests)?;
    let answers = job::submit(&state.settings, (&model, active), requests)?;
    let form = Form {
        about: model.about.clone(),
        model: model.names.id.clone(),
        prompts: prompts.iter().map(|p| text_of(&model.about, p)).collect(),
        n: sampling.n,
        settings: settings(&own, &sampling),
        probs,
        return_tokens: own.return_tokens.unwrap_or(false),
        response_fields: own.response_fields.unwrap_or_default(),
    };
    if own.stream.unwrap_or(false) {
        let n_told = vec![0; form.prompts.len() * form.n];
        let n_prompt = prompts.iter().map(Vec::len).collect();
        return sse::respond(answers, NativeChunks { form, n_prompt, n_told }, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?;
    let mut all: Vec<Value> = whole.iter().enumerate().map(|(index, whole)| form.whole(index, whole)).collect();
    let answer = if all.len() == 1 { all.remove(0) } else { Value::Array(all) };
    Ok(Json(answer).into_response())
}

impl Fields {
    fn probs(&self, sampling: &Sampling) -> Result<Probs, ApiError> {
        match (self.post_sampling_probs.unwrap_or(false), sampling.sampler.temperature > 0.0) {
            (false, _) => Ok(Probs::OfModel),
            (true, false) => Ok(Probs::OfGreedy),
            (true, true) => {
                let message = "is not supported with a temperature; n_probs tells the model's own";
                Err(ApiError::unsupported("post_sampling_probs", message))
            }
        }
    }
}

/// The fields that are those of other completions, some by other names.
fn read_sampling(own: &Fields, body: &mut Value, model: &Model) -> Result<Sampling, ApiError> {
    if let Some(n) = own.n_predict {
        body["max_completion_tokens"] = n.into();
    }
    if let Some(n) = own.n_cmpl {
        body["n"] = n.into();
    }
    Sampling::read(body, model).map_err(|e| e.renamed(&NAMES))
}

/// Forbids the ends of turns, as llama.cpp does where other APIs go on after one.
fn forbid_ends(sampling: &mut Sampling, about: &About) {
    sampling.sampler.logit_bias.extend(about.tokenizer.end_of_turn().iter().map(|id| (*id, f32::NEG_INFINITY)));
}

/// What an answer was generated with, by llama.cpp's names.
fn settings(own: &Fields, sampling: &Sampling) -> Value {
    let n_predict = sampling.max_tokens.map_or_else(|| Value::from(-1), Value::from);
    // No number of JSON is negative infinity, which becomes null.
    let bias = |(token, bias): &(u32, f32)| json!({"token": token, "bias": bias});
    let mut settings = props::settings(&sampling.sampler);
    settings["n_predict"] = n_predict.clone();
    settings["max_tokens"] = n_predict;
    settings["stop"] = sampling.stop.clone().into();
    settings["ignore_eos"] = sampling.ignore_eos.into();
    settings["stream"] = own.stream.unwrap_or(false).into();
    settings["logit_bias"] = sampling.sampler.logit_bias.iter().map(bias).collect();
    settings["n_probs"] = own.n_probs.unwrap_or(0).into();
    settings["post_sampling_probs"] = own.post_sampling_probs.unwrap_or(false).into();
    settings
}

impl Form {
    /// A whole answer.
    fn whole(&self, index: usize, whole: &Whole) -> Value {
        let g = &whole.generated;
        let mut end = self.end(index, g);
        end["content"] = g.text.as_str().into();
        if self.return_tokens {
            end["tokens"] = g.tokens.clone().into();
        }
        if let Some(probs) = self.probs {
            let told = whole.standings.iter().map(|s| self.probabilities(probs, s));
            end["completion_probabilities"] = told.collect();
        }
        self.chosen(end, g)
    }

    /// The end of an answer, all of whose text has been told.
    fn end(&self, index: usize, g: &Generated) -> Value {
        let n_tokens = g.n_prompt + g.tokens.len();
        let stop_type = match (g.finish, &g.stopped) {
            (Finish::Stop, Some(_)) => "word",
            (Finish::Stop, None) => "eos",
            (Finish::Length, _) => "limit",
            (Finish::Cancelled, _) => "none",
        };
        json!({
            "index": index,
            "content": "",
            "tokens": [],
            "id_slot": -1,
            "stop": true,
            "model": self.model,
            "tokens_predicted": g.tokens.len(),
            "tokens_evaluated": g.n_prompt,
            "generation_settings": self.settings,
            "prompt": self.prompts[index / self.n],
            "has_new_line": g.text.contains('\n'),
            "truncated": g.finish == Finish::Length && n_tokens >= self.about.n_ctx,
            "stop_type": stop_type,
            "stopping_word": g.stopped.as_deref().unwrap_or_default(),
            "tokens_cached": n_tokens,
            "timings": Timings::of(g),
        })
    }

    /// The fields that the client asks for, by paths with `/`, and the trace, which has a header of its own to ask for it.
    fn chosen(&self, end: Value, g: &Generated) -> Value {
        let mut chosen = if self.response_fields.is_empty() { end } else { self.named(&end) };
        trace::add(&mut chosen, g);
        chosen
    }

    fn named(&self, end: &Value) -> Value {
        let named = |path: &String| {
            let value = path.split('/').try_fold(end, |value, name| value.get(name))?;
            Some((path.clone(), value.clone()))
        };
        Value::Object(self.response_fields.iter().filter_map(named).collect::<Map<_, _>>())
    }

    fn probabilities(&self, probs: Probs, standing: &Standing) -> Value {
        let mut told = serde_json::to_value(ChatToken::new(&self.about, standing)).expect("wire types are JSON");
        if let (Probs::OfGreedy, Some(fields)) = (probs, told.as_object_mut()) {
            let p = |r: &Ranked| if r.token == standing.chosen.token { 1.0 } else { 0.0 };
            let in_place = |fields: &mut Map<String, Value>, r: &Ranked| {
                fields.remove("logprob");
                fields.insert("prob".to_string(), p(r).into());
            };
            in_place(fields, &standing.chosen);
            let mut best = fields.remove("top_logprobs").unwrap_or_default();
            let ranked = best.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut).zip(&standing.best);
            ranked.for_each(|(fields, r)| in_place(fields, r));
            fields.insert("top_probs".to_string(), best);
        }
        told
    }
}

/// Answers as they come.
struct NativeChunks {
    form: Form,
    /// Tokens of each prompt.
    n_prompt: Vec<usize>,
    /// Tokens of each answer that were told.
    n_told: Vec<usize>,
}

impl Chunks for NativeChunks {
    fn begin(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn prompt(&mut self, index: usize, step: PromptStep) -> Vec<Event> {
        vec![event(&json!({
            "index": index,
            "content": "",
            "tokens": [],
            "id_slot": -1,
            "stop": false,
            "tokens_predicted": 0,
            "tokens_evaluated": self.n_prompt[index / self.form.n],
            "prompt_progress": PromptProgress::of(&step, self.n_prompt[index / self.form.n]),
        }))]
    }

    /// Every token is told, without text where none is certain yet.
    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Event> {
        self.n_told[index] += usize::from(piece.token.is_some());
        let mut chunk = json!({
            "index": index,
            "content": piece.text,
            "tokens": piece.token.into_iter().collect::<Vec<u32>>(),
            "id_slot": -1,
            "stop": false,
            "tokens_predicted": self.n_told[index],
        });
        if let (Some(probs), Some(standing)) = (self.form.probs, &piece.standing) {
            chunk["completion_probabilities"] = json!([self.form.probabilities(probs, standing)]);
        }
        vec![event(&chunk)]
    }

    fn end(&mut self, index: usize, generated: Generated) -> Vec<Event> {
        vec![event(&self.form.chosen(self.form.end(index, &generated), &generated))]
    }

    fn finish(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![error_event(e)]
    }
}
