//! `POST /v1/completions`: text as it is, or tokens, and how it goes on.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::Piece;
use apr_engine::constraint::Thought;
use apr_engine::generate::{Generated, Request};
use axum::Json;
use axum::extract::State as Shared;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::inside::{Shown, TokenExperts};
use super::logprobs::Columns;
use super::prompts::{Prompts, Written};
use super::sampling::{N_BEST_MAX, Sampling, n_best};
use super::usage::{Timings, Usage};
use super::{
    Completion, Frame, Head, StreamOptions, check_model, error_event, finish_reason, given, stop_reason, structured,
};
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::job::{self, Whole};
use crate::prompt;
use crate::sse::{self, Chunks};
use crate::state::State;
use crate::trace;

/// Tokens where a request names no limit. It is what OpenAI's API says.
const MAX_TOKENS_DEFAULT: usize = 16;

/// The fields that completions have of their own.
#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    prompt: Option<Prompts>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<i64>,
    echo: Option<bool>,
    best_of: Option<i64>,
    suffix: Option<String>,
}

#[derive(Default, Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<Columns>,
    #[serde(skip_serializing_if = "Option::is_none")]
    apr_experts: Option<ApiExperts>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// Of one token in a stream, or of all.
#[derive(Serialize)]
#[serde(untagged)]
enum ApiExperts {
    Token(TokenExperts),
    All(Vec<TokenExperts>),
}

/// A prompt, and its text where it is to be repeated.
struct Prompt {
    tokens: Vec<u32>,
    echo: String,
}

/// Goes on with texts.
pub(crate) async fn create(
    Shared(state): Shared<Arc<State>>,
    JsonBody { body, room, trace }: JsonBody,
) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let own: Fields = fields(&body)?;
    check_model(&model, own.model.as_deref())?;
    let is_stream = own.stream.unwrap_or(false);
    StreamOptions::check(own.stream_options.as_ref(), is_stream)?;
    let format = structured::read(&body)?;
    let mut sampling = Sampling::read(&body, &model)?;
    if given(&body, "max_tokens").or(given(&body, "max_completion_tokens")).is_none() {
        sampling.max_tokens = Some(MAX_TOKENS_DEFAULT);
    }
    let n_best = own.logprobs.map(|n| n_best("logprobs", n, N_BEST_MAX)).transpose()?;
    let echo = own.echo.unwrap_or(false);
    refuse(&own, &sampling, echo && n_best.is_some())?;
    let prompts = own.prompt.ok_or_else(|| ApiError::field("prompt", "is missing"))?.list();
    job::check_places(&model, prompts.len() * sampling.n)?;
    let (about, max_tokens) = (model.about.clone(), sampling.max_tokens);
    let prompts = prompt::elsewhere(move || read_prompts(&about, prompts, echo, max_tokens)).await?;
    sampling.constraint = structured::constraint(&model, Thought::None, format.into_iter().collect(), "").await?;
    drop(room);
    let mut requests: Vec<Request> = prompts.iter().flat_map(|p| sampling.requests(&p.tokens, n_best)).collect();
    trace.put_in(&mut requests)?;
    let answers = job::submit(&state.settings, (&model, active), requests)?;
    let head = Head::new(&state, &model, "cmpl", "text_completion");
    let n_prompt = prompts.iter().map(|p| p.tokens.len()).sum();
    if is_stream {
        let n_answer = prompts.len() * sampling.n;
        let chunks = TextChunks {
            frame: Frame::new(head, &model, own.stream_options, n_prompt),
            n_char: vec![0; n_answer],
            prompts,
            n: sampling.n,
            max_tokens: sampling.max_tokens,
            n_token: vec![0; n_answer],
            held: (0..n_answer).map(|_| None).collect(),
            show_tokens: sampling.show_tokens,
            begun: vec![false; n_answer],
        };
        return sse::respond(answers, chunks, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?;
    let shown = Shown { logprobs: n_best.is_some(), experts: sampling.show_experts, tokens: sampling.show_tokens };
    Ok(Json(completion(head, &model.about, whole, &prompts, sampling.n, shown)).into_response())
}

/// Refuses what completions cannot do.
fn refuse(own: &Fields, sampling: &Sampling, echoes_logprobs: bool) -> Result<(), ApiError> {
    if own.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        return Err(ApiError::unsupported("suffix", "text between two texts is not supported yet"));
    }
    if own.best_of.is_some_and(|best| best != sampling.n as i64) {
        return Err(ApiError::unsupported("best_of", "is not supported, unless it is n"));
    }
    if echoes_logprobs {
        return Err(ApiError::unsupported("echo", "logprobs of a prompt are not supported yet"));
    }
    Ok(())
}

/// Tokens of all prompts; nobody is answered where one cannot be.
fn read_prompts(
    about: &About,
    prompts: Vec<Written>,
    echo: bool,
    max_tokens: Option<usize>,
) -> Result<Vec<Prompt>, ApiError> {
    let read = |written: Written| {
        let tokens = written.tokens(about, "prompt", false)?;
        prompt::check_fits(about, &tokens, max_tokens)?;
        let echo = if echo { written.text(about) } else { String::new() };
        Ok(Prompt { tokens, echo })
    };
    prompts.into_iter().map(read).collect()
}

fn completion(
    head: Head,
    about: &About,
    whole: Vec<Whole>,
    prompts: &[Prompt],
    n: usize,
    shown: Shown,
) -> Completion<Choice> {
    let mut usage = Usage::default();
    whole.iter().enumerate().for_each(|(i, w)| usage.add(&w.generated, i.is_multiple_of(n)));
    let timings = Timings::of(&whole[0].generated);
    let apr_trace = trace::of(&whole[0].generated);
    let choice = |(index, w): (usize, Whole)| {
        let logprobs = shown.logprobs.then(|| {
            let (mut columns, mut offset) = (Columns::default(), 0);
            w.standings.iter().for_each(|s| offset = columns.push(about, s, offset));
            columns
        });
        let prompt = &prompts[index / n];
        Choice {
            index,
            text: format!("{}{}", prompt.echo, w.generated.text),
            logprobs,
            apr_experts: shown.experts(w.experts).map(ApiExperts::All),
            finish_reason: Some(finish_reason(w.generated.finish)),
            stop_reason: stop_reason(&w.generated),
            token_ids: shown.tokens.then_some(w.generated.tokens),
            prompt_token_ids: shown.tokens.then(|| prompt.tokens.clone()),
        }
    };
    let choices = whole.into_iter().enumerate().map(choice).collect();
    Completion { head, choices, usage, timings, prompt_token_ids: None, apr_trace }
}

/// Completions as they come.
struct TextChunks {
    frame: Frame,
    prompts: Vec<Prompt>,
    /// Answers to each prompt.
    n: usize,
    /// Characters of each answer's tokens so far.
    n_char: Vec<usize>,
    max_tokens: Option<usize>,
    /// Tokens of each answer so far.
    n_token: Vec<usize>,
    /// The last token that an answer may have, which is told together with its end, as vLLM does.
    held: Vec<Option<Choice>>,
    show_tokens: bool,
    /// Whether each answer's prompt has been told, where tokens are.
    begun: Vec<bool>,
}

impl TextChunks {
    fn echo(&mut self, index: usize) -> Option<Event> {
        let text = self.prompts[index / self.n].echo.clone();
        let choice = (!text.is_empty()).then(|| Choice { text, ..self.choice(index) });
        choice.map(|choice| self.frame.chunk(choice))
    }

    /// A choice that says nothing yet, but for the prompt's tokens where it is the first.
    fn choice(&mut self, index: usize) -> Choice {
        let is_first = self.show_tokens && !std::mem::replace(&mut self.begun[index], true);
        let prompt_token_ids = is_first.then(|| self.prompts[index / self.n].tokens.clone());
        Choice { index, prompt_token_ids, token_ids: self.show_tokens.then(Vec::new), ..Choice::default() }
    }
}

impl Chunks for TextChunks {
    fn begin(&mut self) -> Vec<Event> {
        (0..self.n_char.len()).filter_map(|index| self.echo(index)).collect()
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Event> {
        self.frame.count(&piece);
        self.n_token[index] += usize::from(piece.token.is_some());
        if let Some(held) = &mut self.held[index] {
            held.text.push_str(&piece.text);
            return Vec::new();
        }
        if piece.text.is_empty() && piece.standing.is_none() && piece.experts.is_none() && !self.show_tokens {
            return Vec::new();
        }
        let logprobs = piece.standing.map(|s| {
            let mut columns = Columns::default();
            self.n_char[index] = columns.push(&self.frame.about, &s, self.n_char[index]);
            columns
        });
        let apr_experts = piece.experts.map(|e| ApiExperts::Token(e.into()));
        let mut choice = Choice { text: piece.text, logprobs, apr_experts, ..self.choice(index) };
        choice.token_ids.iter_mut().for_each(|ids| ids.extend(piece.token));
        if self.max_tokens == Some(self.n_token[index]) {
            self.held[index] = Some(choice);
            return Vec::new();
        }
        vec![self.frame.chunk(choice)]
    }

    fn end(&mut self, index: usize, generated: Generated) -> Vec<Event> {
        self.frame.end(&generated, index.is_multiple_of(self.n));
        let finish_reason = Some(finish_reason(generated.finish));
        let last = self.held[index].take().unwrap_or_else(|| self.choice(index));
        vec![self.frame.last(Choice { finish_reason, stop_reason: stop_reason(&generated), ..last })]
    }

    fn finish(&mut self) -> Vec<Event> {
        self.frame.finish()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![error_event(e)]
    }
}
