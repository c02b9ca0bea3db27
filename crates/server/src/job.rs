//! Answers to one HTTP request on their way: submitted to the scheduler together, and told of here until the last has ended.
//!
//! [`Answers`] lives as long as somebody waits. Dropping it, which is what happens to the future or body of a client that has
//! left, is all there is to cancelling: the scheduler finds its listeners deserted at the next step.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use apr_engine::answer::{Piece, PromptStep, Standing};
use apr_engine::generate::{GenerateError, Generated, Request};
use apr_engine::onlook::Experts;
use apr_engine::scheduler::Listener;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::errors::ApiError;
use crate::metrics::Watch;
use crate::model::Model;
use crate::note::Note;
use crate::state::{Active, Settings};

/// What became of an answer.
#[derive(Debug)]
pub(crate) enum Event {
    Prompt(PromptStep),
    Piece(Piece),
    End(Result<Generated, GenerateError>),
}

/// The answers to one HTTP request.
pub(crate) struct Answers {
    events: UnboundedReceiver<(usize, Event)>,
    /// Pieces that were sent and not yet taken.
    n_pending: Arc<AtomicUsize>,
    n_open: usize,
    /// Of the request that they answer.
    note: Option<Arc<Note>>,
    _active: Active,
}

/// A whole answer.
pub(crate) struct Whole {
    pub(crate) generated: Generated,
    /// Of each token, where the request asked for it.
    pub(crate) standings: Vec<Standing>,
    pub(crate) experts: Vec<Experts>,
    /// Of each token of the prompt but the first, where the request asked for it.
    pub(crate) of_prompt: Vec<Standing>,
}

/// What has been told of an answer.
#[derive(Default)]
struct Told {
    generated: Option<Generated>,
    standings: Vec<Standing>,
    experts: Vec<Experts>,
    of_prompt: Vec<Standing>,
}

/// Refuses more answers than there are places. Who reads a list of prompts asks before anything is made of each of them.
///
/// # Errors
/// More answers than there are places.
pub(crate) fn check_places(model: &Model, n_answer: usize) -> Result<(), ApiError> {
    match n_answer > model.n_places {
        true => {
            let n_places = model.n_places;
            let message = format!("{n_answer} answers are asked for at once; this server makes or queues {n_places}");
            Err(ApiError::invalid("too_many_answers", message))
        }
        false => Ok(()),
    }
}

/// Submits requests that are answered together; their index is that of their answer.
///
/// # Errors
/// More answers than there are places, or than are free now.
pub(crate) fn submit(
    settings: &Settings,
    (model, active): (&Model, Active),
    requests: Vec<Request>,
) -> Result<Answers, ApiError> {
    let n_open = requests.len();
    check_places(model, n_open)?;
    let permits = model.places.clone().try_acquire_many_owned(n_open as u32).map_err(|_| ApiError::busy())?;
    let (sender, events) = unbounded_channel();
    let n_pending = Arc::new(AtomicUsize::new(0));
    let mut permits = Some(permits);
    for (index, request) in requests.into_iter().enumerate() {
        let one = permits.as_mut().and_then(|p| p.split(1)).expect("a permit for each request");
        let reporter = Reporter {
            index,
            events: sender.clone(),
            n_pending: n_pending.clone(),
            n_backlog: settings.n_backlog * n_open,
            is_unread: false,
            watch: Watch::new(model.metrics.clone(), request.prompt.len()),
            _place: one,
        };
        model.scheduler.submit(request, Box::new(reporter));
    }
    Ok(Answers { events, n_pending, n_open, note: Note::current(), _active: active })
}

impl Answers {
    /// What happens next to which answer; `None` after the last end.
    ///
    /// # Errors
    /// A scheduler that has failed, and a request that takes longer than any may.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Event)>, ApiError> {
        if self.n_open == 0 {
            return Ok(None);
        }
        let note = self.note.as_deref();
        let received = match note.and_then(|note| Some((note, note.deadline()?))) {
            Some((note, deadline)) => {
                tokio::time::timeout_at(deadline, self.events.recv()).await.map_err(|_| note.late())?
            }
            None => self.events.recv().await,
        };
        match received {
            Some((index, event)) => {
                note.into_iter().for_each(|note| note.event(&event));
                match event {
                    Event::Prompt(_) => {}
                    Event::Piece(_) => _ = self.n_pending.fetch_sub(1, Ordering::Relaxed),
                    Event::End(_) => self.n_open -= 1,
                }
                Ok(Some((index, event)))
            }
            None => Err(ApiError::engine("engine_error", "the engine ended before the answer did")),
        }
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// Of the first answer that fails; the others are cancelled.
    pub(crate) async fn whole(mut self) -> Result<Vec<Whole>, ApiError> {
        let mut told: Vec<Told> = (0..self.n_open).map(|_| Told::default()).collect();
        while let Some((index, event)) = self.next().await? {
            let told = &mut told[index];
            match event {
                Event::Prompt(step) => told.of_prompt.extend(step.standings),
                Event::Piece(piece) => {
                    told.standings.extend(piece.standing);
                    told.experts.extend(piece.experts);
                }
                Event::End(result) => told.generated = Some(result?),
            }
        }
        let whole = |Told { generated, standings, experts, of_prompt }| Whole {
            generated: generated.expect("every answer has ended"),
            standings,
            experts,
            of_prompt,
        };
        Ok(told.into_iter().map(whole).collect())
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if self.n_open > 0 {
            self.note.iter().for_each(|note| note.finish_with("cancelled"));
        }
    }
}

/// Tells [`Answers`] of one answer, and holds its place until the scheduler lets go of it.
struct Reporter {
    index: usize,
    events: UnboundedSender<(usize, Event)>,
    n_pending: Arc<AtomicUsize>,
    /// With more pieces pending nobody is taken to read them.
    n_backlog: usize,
    /// Whether so many were.
    is_unread: bool,
    watch: Watch,
    _place: OwnedSemaphorePermit,
}

impl Listener for Reporter {
    /// One for each step of the prompt: they are few, and whoever is gone is noticed before the next.
    fn prompt(&mut self, step: PromptStep) {
        _ = self.events.send((self.index, Event::Prompt(step)));
    }

    fn piece(&mut self, piece: Piece) -> ControlFlow<()> {
        if piece.token.is_some() {
            self.watch.token();
        }
        let n_pending = self.n_pending.fetch_add(1, Ordering::Relaxed);
        match self.events.send((self.index, Event::Piece(piece))) {
            Ok(()) if n_pending < self.n_backlog => ControlFlow::Continue(()),
            _ => {
                self.is_unread = true;
                ControlFlow::Break(())
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    fn end(&mut self, result: Result<Generated, GenerateError>) {
        self.watch.ended(&result, self.is_unread || self.is_gone());
        // Nobody may be left to hear it.
        _ = self.events.send((self.index, Event::End(result)));
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.watch.let_go();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use apr_engine::generate::Finish;

    use super::*;
    use crate::state::State;

    /// Answers of which this is told before the engine goes away.
    pub(crate) fn answers(n: usize, told: Vec<(usize, Event)>) -> Answers {
        let (answers, sender) = pending(n);
        answers.n_pending.store(told.len(), Ordering::Relaxed);
        told.into_iter().for_each(|event| sender.send(event).unwrap());
        answers
    }

    /// Answers of which nothing is told yet.
    pub(crate) fn pending(n: usize) -> (Answers, UnboundedSender<(usize, Event)>) {
        let (sender, events) = unbounded_channel();
        let state = State::new(Settings::default(), std::net::Ipv4Addr::LOCALHOST.into(), String::new());
        (Answers { events, n_pending: Arc::default(), n_open: n, note: None, _active: Arc::new(state).count() }, sender)
    }

    /// An answer that has ended by itself.
    pub(crate) fn generated(text: &str) -> Generated {
        let nothing = Generated::nothing(&Request::embedding(vec![1; 3]), 0);
        Generated { text: text.to_string(), tokens: vec![1], finish: Finish::Stop, ..nothing }
    }

    /// The same as a whole, of which nothing else was asked.
    pub(crate) fn whole(text: &str) -> Whole {
        Whole { generated: generated(text), standings: Vec::new(), experts: Vec::new(), of_prompt: Vec::new() }
    }
}
