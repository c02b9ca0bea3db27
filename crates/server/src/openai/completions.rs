//! `POST /v1/completions`: text as it is, or tokens, and how it goes on.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::{Piece, PromptStep, Standing};
use apr_engine::constraint::Thought;
use apr_engine::generate::{Generated, Request};
use axum::Json;
use axum::extract::State as Shared;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::inside::{Shown, TokenExperts};
use super::logprobs::{Columns, PromptLogprobs, check_scored, n_best_of_prompt, prompt_logprobs};
use super::prompts::{Prompts, Written, text_of};
use super::sampling::{Keep, N_BEST_MAX, Sampling, n_best};
use super::usage::{PromptProgress, Timings, Usage};
use super::{
    Completion, Frame, Head, StreamOptions, check_model, error_event, finish_reason, given, stop_reason, structured,
};
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::infill::FimTokens;
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
    prompt_logprobs: Option<i64>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
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

/// How answers are told.
struct Form {
    prompts: Vec<Prompt>,
    /// Answers to each prompt.
    n: usize,
    shown: Shown,
    /// Alternatives that are told of each token of a prompt that is repeated.
    n_best_of_echo: Option<usize>,
    /// The same, where vLLM's `prompt_logprobs` asks.
    n_best_of_prompt: Option<usize>,
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
    let n_best_of_prompt = n_best_of_prompt(own.prompt_logprobs, is_stream)?;
    let echo = own.echo.unwrap_or(false);
    refuse(&own, &sampling, echo && n_best.is_some())?;
    let suffix = own.suffix.filter(|suffix| !suffix.is_empty());
    let infill = suffix.map(|suffix| FimTokens::of(&model.about, "suffix").map(|fim| (fim, suffix))).transpose()?;
    infill.iter().for_each(|(fim, _)| sampling.ends.tokens.extend(&fim.ends));
    let prompts = own.prompt.ok_or_else(|| ApiError::field("prompt", "is missing"))?.list();
    job::check_places(&model, prompts.len() * sampling.n)?;
    let (about, keep, max_tokens) = (model.about.clone(), sampling.keep, sampling.max_tokens);
    let prompts = prompt::elsewhere(move || read_prompts(&about, prompts, infill, (echo, keep, max_tokens))).await?;
    sampling.constraint = structured::constraint(&model, Thought::None, format.into_iter().collect(), "").await?;
    drop(room);
    let shown = Shown { logprobs: n_best.is_some(), experts: sampling.show_experts, tokens: sampling.show_tokens };
    let form = Form { prompts, n: sampling.n, shown, n_best_of_echo: n_best.filter(|_| echo), n_best_of_prompt };
    let mut requests = form.requests(&sampling, n_best, is_stream)?;
    trace.put_in(&mut requests)?;
    let answers = job::submit(&state.settings, (&model, active), requests)?;
    let head = Head::new(&state, &model, "cmpl", "text_completion");
    if is_stream {
        let n_prompt = form.prompts.iter().map(|p| p.tokens.len()).sum();
        let n_answer = form.prompts.len() * form.n;
        let chunks = TextChunks {
            frame: Frame::new(head, &model, own.stream_options, n_prompt),
            n_char: vec![0; n_answer],
            form,
            max_tokens: sampling.max_tokens,
            n_token: vec![0; n_answer],
            held: (0..n_answer).map(|_| None).collect(),
            show_progress: sampling.show_progress,
            of_prompt: vec![None; n_answer],
            begun: vec![false; n_answer],
        };
        return sse::respond(answers, chunks, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?;
    Ok(Json(form.completion(head, &model.about, whole)).into_response())
}

/// Refuses what completions cannot do.
fn refuse(own: &Fields, sampling: &Sampling, echoes_logprobs: bool) -> Result<(), ApiError> {
    if echoes_logprobs && own.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
        let message =
            "is not supported together with suffix and logprobs, as tokens of such a prompt are not those of its text";
        return Err(ApiError::unsupported("echo", message));
    }
    if own.best_of.is_some_and(|best| best != sampling.n as i64) {
        return Err(ApiError::unsupported("best_of", "is not supported, unless it is n"));
    }
    Ok(())
}

/// Tokens of all prompts; nobody is answered where one cannot be. With a suffix a prompt is what comes before the answer's text, and that
/// is what comes after it.
fn read_prompts(
    about: &About,
    prompts: Vec<Written>,
    infill: Option<(FimTokens, String)>,
    (echo, keep, max_tokens): (bool, Keep, Option<usize>),
) -> Result<Vec<Prompt>, ApiError> {
    let infill = infill.map(|(fim, suffix)| (fim, about.tokenizer.encode_text(&suffix, false)));
    let read = |written: Written| {
        let tokens = match &infill {
            Some((fim, after)) => fim.prompt(about, &[], [&written.inner_tokens(about, "prompt")?, after, &[]]),
            None => written.tokens(about, "prompt", false)?,
        };
        let n_written = tokens.len();
        let tokens = keep.of(about, tokens, max_tokens)?;
        prompt::check_fits(about, &tokens, max_tokens)?;
        let echo = match echo {
            true if tokens.len() < n_written => text_of(about, &tokens),
            true => written.text(about),
            false => String::new(),
        };
        Ok(Prompt { tokens, echo })
    };
    prompts.into_iter().map(read).collect()
}

impl Form {
    /// What is asked of the engine. Prompts are scored once where their answers are told together.
    fn requests(&self, sampling: &Sampling, n_best: Option<usize>, is_stream: bool) -> Result<Vec<Request>, ApiError> {
        let requests = self.prompts.iter().flat_map(|p| sampling.requests(&p.tokens, n_best));
        let mut requests: Vec<Request> = requests.collect();
        if let Some(n_best) = self.n_best_of_prompt.max(self.n_best_of_echo) {
            let scored = requests.iter_mut().step_by(if is_stream { 1 } else { self.n });
            scored.for_each(|request| request.n_best_of_prompt = Some(n_best));
            let asked = requests.iter().filter(|request| request.n_best_of_prompt.is_some());
            let param = if self.n_best_of_prompt.is_some() { "prompt_logprobs" } else { "logprobs" };
            check_scored(param, asked.map(|request| request.prompt.len()).sum(), n_best)?;
        }
        Ok(requests)
    }

    /// The prompt of an answer.
    fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.n]
    }

    fn completion(self, head: Head, about: &About, mut whole: Vec<Whole>) -> Completion<Choice> {
        let mut usage = Usage::default();
        whole.iter().enumerate().for_each(|(i, w)| usage.add(&w.generated, i.is_multiple_of(self.n)));
        let timings = Timings::of(&whole[0].generated);
        let apr_trace = trace::of(&whole[0].generated);
        let of_prompts: Vec<Vec<Standing>> =
            whole.iter_mut().step_by(self.n).map(|w| std::mem::take(&mut w.of_prompt)).collect();
        let choice = |(index, w): (usize, Whole)| {
            let (prompt, of_prompt) = (self.prompt(index), &of_prompts[index / self.n]);
            let logprobs = self.shown.logprobs.then(|| {
                let echo = self.n_best_of_echo.map(|n| prompt.columns(about, of_prompt, n));
                let (mut columns, mut offset) = echo.unwrap_or_default();
                w.standings.iter().for_each(|s| offset = columns.push(about, s, offset));
                columns
            });
            Choice {
                index,
                text: format!("{}{}", prompt.echo, w.generated.text),
                logprobs,
                apr_experts: self.shown.experts(w.experts).map(ApiExperts::All),
                finish_reason: Some(finish_reason(w.generated.finish)),
                stop_reason: stop_reason(&w.generated),
                token_ids: self.shown.tokens.then_some(w.generated.tokens),
                prompt_token_ids: self.shown.tokens.then(|| prompt.tokens.clone()),
                prompt_logprobs: self.n_best_of_prompt.map(|n| prompt_logprobs(about, of_prompt, n)),
            }
        };
        let choices = whole.into_iter().enumerate().map(choice).collect();
        Completion { head, choices, usage, timings, prompt_token_ids: None, prompt_logprobs: None, apr_trace }
    }
}

impl Prompt {
    /// Its tokens, and the characters of its text.
    fn columns(&self, about: &About, standings: &[Standing], n_best: usize) -> (Columns, usize) {
        // A mark of a text's beginning that the tokenizer adds is not in the text that was sent.
        let bos = about.tokenizer.bos().filter(|bos| self.tokens.first() == Some(bos));
        let has_mark = bos.is_some_and(|bos| !self.echo.starts_with(&about.tokenizer.piece(bos)));
        Columns::of_prompt(about, &self.tokens, standings, (n_best, has_mark))
    }
}

/// Completions as they come.
struct TextChunks {
    frame: Frame,
    form: Form,
    /// Characters of each answer's tokens so far, and of its prompt where that is repeated with its logprobs.
    n_char: Vec<usize>,
    max_tokens: Option<usize>,
    /// Tokens of each answer so far.
    n_token: Vec<usize>,
    /// The last token that an answer may have, which is told together with its end, as vLLM does.
    held: Vec<Option<Choice>>,
    show_progress: bool,
    /// What is known of the tokens of each answer's prompt while they wait to be repeated together.
    of_prompt: Vec<Option<Vec<Standing>>>,
    /// Whether each answer's prompt has been told, where tokens are.
    begun: Vec<bool>,
}

impl TextChunks {
    /// The prompt, as it is repeated; with logprobs it waits until all of them are known.
    fn echo(&mut self, index: usize) -> Option<Event> {
        let (text, n_token) = (self.form.prompt(index).echo.clone(), self.form.prompt(index).tokens.len());
        if self.form.n_best_of_echo.is_some() {
            self.of_prompt[index] = Some(Vec::with_capacity(n_token));
            return (n_token == 1).then(|| self.scored(index)).flatten();
        }
        let choice = (!text.is_empty()).then(|| Choice { text, ..self.choice(index) });
        choice.map(|choice| self.frame.chunk(choice))
    }

    /// The prompt with what is known of its tokens, unless it has been told.
    fn scored(&mut self, index: usize) -> Option<Event> {
        let (n_best, standings) = (self.form.n_best_of_echo?, self.of_prompt[index].take()?);
        let prompt = self.form.prompt(index);
        let (text, (columns, n_char)) = (prompt.echo.clone(), prompt.columns(&self.frame.about, &standings, n_best));
        self.n_char[index] = n_char;
        let choice = Choice { text, logprobs: Some(columns), ..self.choice(index) };
        Some(self.frame.chunk(choice))
    }

    /// A choice that says nothing yet, but for the prompt's tokens where it is the first.
    fn choice(&mut self, index: usize) -> Choice {
        let is_first = self.form.shown.tokens && !std::mem::replace(&mut self.begun[index], true);
        let prompt_token_ids = is_first.then(|| self.form.prompt(index).tokens.clone());
        Choice { index, prompt_token_ids, token_ids: self.form.shown.tokens.then(Vec::new), ..Choice::default() }
    }
}

impl Chunks for TextChunks {
    fn begin(&mut self) -> Vec<Event> {
        (0..self.n_char.len()).filter_map(|index| self.echo(index)).collect()
    }

    fn prompt(&mut self, index: usize, step: PromptStep) -> Vec<Event> {
        let n_prompt = self.form.prompt(index).tokens.len();
        let mut events = Vec::new();
        if self.show_progress {
            let choice = self.choice(index);
            events.push(self.frame.progress(choice, PromptProgress::of(&step, n_prompt)));
        }
        if let Some(standings) = &mut self.of_prompt[index] {
            standings.extend(step.standings);
            let is_all = standings.len() + 1 == n_prompt;
            events.extend(is_all.then(|| self.scored(index)).flatten());
        }
        events
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Event> {
        self.frame.count(&piece);
        self.n_token[index] += usize::from(piece.token.is_some());
        if let Some(held) = &mut self.held[index] {
            held.text.push_str(&piece.text);
            return Vec::new();
        }
        if piece.text.is_empty() && piece.standing.is_none() && piece.experts.is_none() && !self.form.shown.tokens {
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
        self.frame.end(&generated, index.is_multiple_of(self.form.n));
        // One that was broken off in its prompt repeats what there is.
        let mut events: Vec<Event> = self.scored(index).into_iter().collect();
        let finish_reason = Some(finish_reason(generated.finish));
        let last = self.held[index].take().unwrap_or_else(|| self.choice(index));
        events.push(self.frame.last(Choice { finish_reason, stop_reason: stop_reason(&generated), ..last }));
        events
    }

    fn finish(&mut self) -> Vec<Event> {
        self.frame.finish()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![error_event(e)]
    }
}
