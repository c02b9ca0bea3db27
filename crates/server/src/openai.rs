//! OpenAI's API: its wire types, what they mean to the engine, and what the engine's answers mean to it.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
mod inside;
pub(crate) mod logprobs;
mod messages;
pub(crate) mod models;
pub(crate) mod prompts;
pub(crate) mod responses;
pub(crate) mod sampling;
pub(crate) mod structured;
pub(crate) mod tools;
pub(crate) mod usage;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use apr_engine::About;
use apr_engine::answer::Piece;
use apr_engine::generate::{Finish, Generated};
use axum::response::sse::Event;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::errors::{ApiError, ErrorForm};
use crate::model::Model;
use crate::state::State;
use crate::trace;
use logprobs::PromptLogprobs;
use usage::{PromptProgress, Timings, Usage};

/// What streaming answers may be asked to add.
#[derive(Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Counts in every chunk, as vLLM gives them.
    continuous_usage_stats: Option<bool>,
}

impl StreamOptions {
    /// Refuses options of streams where none is asked for.
    fn check(options: Option<&StreamOptions>, stream: bool) -> Result<(), ApiError> {
        match options.is_some() && !stream {
            true => Err(ApiError::field("stream_options", "needs stream to be true")),
            false => Ok(()),
        }
    }
}

/// What all parts of one answer begin with.
#[derive(Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Head {
    fn new(state: &State, model: &Model, prefix: &str, object: &'static str) -> Head {
        Head {
            id: format!("{prefix}-{}", state.unique()),
            object,
            created: now(),
            model: model.names.id.clone(),
            system_fingerprint: concat!("apr-", env!("CARGO_PKG_VERSION")),
        }
    }
}

/// A whole answer, of choices as the API writes them.
#[derive(Serialize)]
struct Completion<C> {
    #[serde(flatten)]
    head: Head,
    choices: Vec<C>,
    usage: Usage,
    timings: Timings,
    /// Where `return_token_ids` asks for them, of a chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    /// The same where `prompt_logprobs` does.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    apr_trace: Option<Value>,
}

/// What a streamed answer has beside its choices.
struct Frame {
    head: Head,
    about: Arc<About>,
    usage: Usage,
    with_usage: bool,
    /// Counts so far, where every chunk is to tell them.
    running: Option<Usage>,
    timings: Option<Timings>,
    /// Where the first chunk is to tell them.
    prompt_token_ids: Option<Vec<u32>>,
    /// Of the one answer that is traced.
    trace: Option<Value>,
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<C>,
    /// Null in every chunk but the last where it was asked for, else not there at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_progress: Option<PromptProgress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    apr_trace: Option<&'a Value>,
}

/// What a chunk tells beside its choice.
#[derive(Default)]
struct Beside {
    timings: Option<Timings>,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_progress: Option<PromptProgress>,
}

impl Frame {
    fn new(head: Head, model: &Model, options: Option<StreamOptions>, n_prompt: usize) -> Frame {
        let with_usage = options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        let is_continuous = with_usage && options.and_then(|o| o.continuous_usage_stats).unwrap_or(false);
        let running = is_continuous.then(|| Usage::of_prompt(n_prompt));
        Frame {
            head,
            about: model.about.clone(),
            usage: Usage::default(),
            with_usage,
            running,
            timings: None,
            prompt_token_ids: None,
            trace: None,
        }
    }

    /// Counts a piece of an answer.
    fn count(&mut self, piece: &Piece) {
        if let Some(running) = self.running.as_mut().filter(|_| piece.token.is_some()) {
            running.count_one();
        }
    }

    /// An answer has ended; a prompt counts once, with the first of its answers.
    fn end(&mut self, generated: &Generated, is_first_of_prompt: bool) {
        self.usage.add(generated, is_first_of_prompt);
        self.timings = Some(Timings::of(generated));
        self.trace = trace::of(generated);
    }

    fn chunk(&self, choice: impl Serialize) -> Event {
        self.chunk_with(choice, Beside::default())
    }

    /// The first chunk.
    fn first(&mut self, choice: impl Serialize) -> Event {
        let prompt_token_ids = self.prompt_token_ids.take();
        self.chunk_with(choice, Beside { prompt_token_ids, ..Beside::default() })
    }

    /// How far a prompt is, beside a choice that says nothing.
    fn progress(&self, choice: impl Serialize, progress: PromptProgress) -> Event {
        self.chunk_with(choice, Beside { prompt_progress: Some(progress), ..Beside::default() })
    }

    /// The last chunk of an answer.
    fn last(&self, choice: impl Serialize) -> Event {
        self.chunk_with(choice, Beside { timings: self.timings, ..Beside::default() })
    }

    fn chunk_with(&self, choice: impl Serialize, beside: Beside) -> Event {
        let Beside { timings, prompt_token_ids, prompt_progress } = beside;
        event(&Chunk {
            head: &self.head,
            choices: vec![choice],
            usage: self.with_usage.then_some(self.running),
            timings,
            prompt_token_ids,
            prompt_progress,
            apr_trace: None,
        })
    }

    /// What ends a stream.
    fn finish(&self) -> Vec<Event> {
        let chunk = |usage, timings, apr_trace| {
            let (head, prompt_token_ids, prompt_progress) = (&self.head, None, None);
            let choices: Vec<()> = Vec::new();
            event(&Chunk { head, choices, usage, timings, prompt_token_ids, prompt_progress, apr_trace })
        };
        let usage = self.with_usage.then(|| chunk(Some(Some(self.usage)), self.timings, None));
        let trace = self.trace.as_ref().map(|trace| chunk(self.with_usage.then_some(None), None, Some(trace)));
        trace.into_iter().chain(usage).chain([Event::default().data("[DONE]")]).collect()
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// Refuses a request for another model.
pub(crate) fn check_model(model: &Model, asked: Option<&str>) -> Result<(), ApiError> {
    match asked {
        Some(asked) if !model.names.include(asked) => {
            let message = format!("there is no model {asked:?}; this server has {:?}", model.names.id);
            let e = ApiError::refused(axum::http::StatusCode::NOT_FOUND, "model_not_found", message);
            Err(ApiError { param: Some("model".to_string()), ..e })
        }
        _ => Ok(()),
    }
}

/// Why an answer ended, in OpenAI's words.
fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Cancelled => "abort",
    }
}

/// What a choice is told to have stopped at, as vLLM tells it: a string or a token of the request's.
fn stop_reason(generated: &Generated) -> Option<Value> {
    generated.stopped.clone().map(Value::from).or(generated.stopped_at.map(Value::from))
}

/// An event with a JSON value.
pub(crate) fn event(value: &impl Serialize) -> Event {
    let text = serde_json::to_string(value).expect("wire types are JSON");
    Event::default().data(text)
}

/// An error in the middle of a stream.
pub(crate) fn error_event(e: &ApiError) -> Event {
    event(&ErrorForm::OpenAi.body(e, None))
}

/// A field that is neither missing nor null: both mean the same.
pub(crate) fn given<'a>(body: &'a Value, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|v| !v.is_null())
}
