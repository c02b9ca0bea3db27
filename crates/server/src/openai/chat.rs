//! `POST /v1/chat/completions`.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::Piece;
use apr_engine::chat_template::ChatInput;
use apr_engine::generate::Generated;
use axum::Json;
use axum::extract::State as Shared;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::logprobs::ChatToken;
use super::sampling::{Sampling, n_best};
use super::usage::{Timings, Usage};
use super::{Head, StreamOptions, check_model, done, error_event, event, finish_reason, messages, unsupported};
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::job::{self, Whole};
use crate::prompt;
use crate::sse::{self, Chunks};
use crate::state::State;

/// The fields that chats have of their own.
#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

impl Fields {
    fn n_best(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(ApiError::field("top_logprobs", "needs logprobs to be true")),
            (true, n) => n_best("top_logprobs", n.unwrap_or(0)).map(Some),
        }
    }
}

#[derive(Serialize)]
struct Completion {
    #[serde(flatten)]
    head: Head,
    choices: Vec<Choice>,
    usage: Usage,
    timings: Timings,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<ChatToken>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: Vec<ChunkChoice>,
    /// Null in every chunk but the last where it was asked for, else not there at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Answers a conversation.
pub(crate) async fn create(
    Shared(state): Shared<Arc<State>>,
    JsonBody { mut body, room }: JsonBody,
) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let own: Fields = fields(&body)?;
    check_model(&model, own.model.as_deref())?;
    unsupported::refuse(&body)?;
    let sampling = Sampling::read(&body, &model)?;
    let n_best = own.n_best()?;
    let conversation = messages::read(body.get_mut("messages").map(Value::take))?;
    let about = model.about.clone();
    let (kwargs, max_tokens) = (own.chat_template_kwargs.unwrap_or_default(), sampling.max_tokens);
    let tokens = prompt::elsewhere(move || {
        let input = ChatInput { kwargs, ..about.chat_input(conversation.messages) };
        let tokens = prompt::chat(&about, &input, conversation.begun.as_deref())?;
        prompt::check_fits(&about, &tokens, max_tokens)?;
        Ok(tokens)
    });
    let tokens = tokens.await?;
    drop(room);
    let answers = job::submit(&state.settings, (&model, active), sampling.requests(&tokens, n_best).collect())?;
    if own.stream.unwrap_or(false) {
        let head = Head::new(&state, &model, "chatcmpl", "chat.completion.chunk");
        let with_usage = own.stream_options.and_then(|o| o.include_usage).unwrap_or(false);
        let chunks =
            ChatChunks { head, about: model.about.clone(), n: sampling.n, usage: Usage::default(), with_usage };
        return sse::respond(answers, chunks, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?;
    let head = Head::new(&state, &model, "chatcmpl", "chat.completion");
    Ok(Json(completion(head, &model.about, whole, n_best.is_some())).into_response())
}

fn completion(head: Head, about: &About, whole: Vec<Whole>, with_logprobs: bool) -> Completion {
    let mut usage = Usage::default();
    whole.iter().enumerate().for_each(|(i, w)| usage.add(&w.generated, i == 0));
    let timings = Timings::of(&whole[0].generated);
    let logprobs = |w: &Whole| Logprobs { content: w.standings.iter().map(|s| ChatToken::new(about, s)).collect() };
    let choice = |(index, w): (usize, Whole)| Choice {
        index,
        logprobs: with_logprobs.then(|| logprobs(&w)),
        finish_reason: finish_reason(w.generated.finish),
        message: Message { role: "assistant", content: w.generated.text, refusal: None },
    };
    Completion { head, choices: whole.into_iter().enumerate().map(choice).collect(), usage, timings }
}

/// A chat's answers as they come.
struct ChatChunks {
    head: Head,
    about: Arc<About>,
    /// Answers.
    n: usize,
    usage: Usage,
    with_usage: bool,
}

impl ChatChunks {
    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Usage>, timings: Option<Timings>) -> Event {
        event(&Chunk { head: &self.head, choices, usage: self.with_usage.then_some(usage), timings })
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self) -> Vec<Event> {
        let delta = || Delta { role: Some("assistant"), content: Some(String::new()) };
        let choice = |index| ChunkChoice { index, delta: delta(), logprobs: None, finish_reason: None };
        (0..self.n).map(|i| self.chunk(vec![choice(i)], None, None)).collect()
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Event> {
        if piece.text.is_empty() && piece.standing.is_none() {
            return Vec::new();
        }
        let logprobs = piece.standing.map(|s| Logprobs { content: vec![ChatToken::new(&self.about, &s)] });
        let delta = Delta { role: None, content: Some(piece.text) };
        vec![self.chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason: None }], None, None)]
    }

    fn end(&mut self, index: usize, generated: Generated) -> Vec<Event> {
        self.usage.add(&generated, index == 0);
        let finish_reason = Some(finish_reason(generated.finish));
        let choice = ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason };
        vec![self.chunk(vec![choice], None, Some(Timings::of(&generated)))]
    }

    fn finish(&mut self) -> Vec<Event> {
        let usage = self.with_usage.then(|| self.chunk(Vec::new(), Some(self.usage), None));
        usage.into_iter().chain([done()]).collect()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![error_event(e)]
    }
}
