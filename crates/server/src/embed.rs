//! Embeddings of texts, whichever API asks for them.
//!
//! Each text is a request of its own to the scheduler, in whose steps it stands beside others' answers. One HTTP request has as many
//! of them there at a time as are answered together, and the rest waits here, so that a long list leaves places to others.

use std::ops::ControlFlow;
use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::{Piece, PromptStep};
use apr_engine::generate::{GenerateError, Generated, Request};
use apr_engine::scheduler::Listener;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::errors::ApiError;
use crate::model::Model;
use crate::note::Note;
use crate::openai::prompts::Written;
use crate::prompt;
use crate::state::Active;

/// Texts of one request; as many as OpenAI's API takes.
pub(crate) const N_TEXT_MAX: usize = 2048;

/// What texts were embedded as.
pub(crate) struct Embedded {
    /// In the order of the texts, each of length 1.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub(crate) n_token: usize,
}

/// Tokens of the texts that field `param` lists. With `cut`, a text that is too long loses its end.
///
/// # Errors
/// No text, more than are taken, one that is empty or longer than the context.
pub(crate) fn read(about: &About, param: &str, texts: Vec<Written>, cut: bool) -> Result<Vec<Vec<u32>>, ApiError> {
    if texts.is_empty() || texts.len() > N_TEXT_MAX {
        let message = format_args!("expected 1 to {N_TEXT_MAX} texts, got {}", texts.len());
        return Err(ApiError::field(param, message));
    }
    let read = |text: Written| {
        let is_empty_text = matches!(&text, Written::Text(text) if text.is_empty());
        let mut tokens = text.tokens(about, param, false)?;
        if is_empty_text || tokens.is_empty() {
            let e = ApiError::field(param, "a text is empty: there is nothing to embed");
            return Err(ApiError { code: Some("empty_prompt"), ..e });
        }
        if let (true, Written::Text(_), Some(eos)) = (about.tokenizer.add_eos(), &text, about.tokenizer.eos()) {
            tokens.push(eos);
        }
        if cut {
            tokens.truncate(about.n_ctx);
        }
        prompt::check_fits(about, &tokens, Some(0))?;
        Ok(tokens)
    };
    texts.into_iter().map(read).collect()
}

/// Refuses a number of dimensions that the model does not have.
pub(crate) fn check_dimensions(about: &About, dimensions: Option<i64>) -> Result<(), ApiError> {
    let n_embd = about.hparams.n_embd;
    match dimensions.filter(|n| *n != n_embd as i64) {
        Some(n) => {
            Err(ApiError::unsupported("dimensions", format_args!("this model's embeddings have {n_embd}, got {n}")))
        }
        None => Ok(()),
    }
}

/// Embeds texts. To drop the future is to cancel.
///
/// # Errors
/// No place, and whatever fails with one of the texts.
pub(crate) async fn embed(model: &Model, _active: Active, texts: Vec<Vec<u32>>) -> Result<Embedded, ApiError> {
    let place = || model.places.clone().try_acquire_owned();
    let mut places = vec![Arc::new(place().map_err(|_| ApiError::busy())?)];
    let more = std::iter::from_fn(|| place().ok().map(Arc::new));
    places.extend(more.take(texts.len().min(model.n_parallel) - 1));
    let n_token = texts.iter().map(Vec::len).sum();
    let note = Note::current();
    note.iter().for_each(|note| note.embeds(n_token));
    // A text may begin when the one before it on its place has ended.
    let of_text = |(i, tokens): (usize, Vec<u32>)| one(model, places[i % places.len()].clone(), tokens);
    let vectors = stream::iter(texts.into_iter().enumerate()).map(of_text).buffered(places.len());
    let vectors = vectors.try_collect().await;
    note.iter().for_each(|note| note.finish_with(if vectors.is_ok() { "stop" } else { "error" }));
    Ok(Embedded { vectors: vectors?, n_token })
}

async fn one(model: &Model, place: Arc<OwnedSemaphorePermit>, tokens: Vec<u32>) -> Result<Vec<f32>, ApiError> {
    let (told, result) = oneshot::channel();
    model.scheduler.submit(Request::embedding(tokens), Box::new(Waiting { told: Some(told), _place: place }));
    let gone = |_| ApiError::engine("engine_error", "the engine ended before the embedding was computed");
    let generated = result.await.map_err(gone)??;
    // An answer without one was broken off by a server that stops.
    generated.embedding.ok_or_else(|| GenerateError::Stopped.into())
}

/// Hears of one embedding.
struct Waiting {
    told: Option<oneshot::Sender<Result<Generated, GenerateError>>>,
    _place: Arc<OwnedSemaphorePermit>,
}

impl Listener for Waiting {
    fn prompt(&mut self, _: PromptStep) {
        // Nobody asks of texts that are embedded.
    }

    fn piece(&mut self, _: Piece) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn is_gone(&self) -> bool {
        self.told.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn end(&mut self, result: Result<Generated, GenerateError>) {
        if let Some(told) = self.told.take() {
            // Nobody may be left to hear it.
            _ = told.send(result);
        }
    }
}
