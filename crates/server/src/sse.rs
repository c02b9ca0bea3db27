//! Answers as a stream, of server-sent events or of lines of JSON, in whatever form an API writes them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use apr_engine::answer::{Piece, PromptStep};
use apr_engine::generate::Generated;
use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, stream};
use serde_json::Value;

use crate::errors::ApiError;
use crate::job::{Answers, Event};

/// How long an answer may fail and still be refused with a status of its own, before the stream is begun.
const EARLY: Duration = Duration::from_millis(50);

/// How an API writes answers as they come.
pub(crate) trait Chunks<E = SseEvent>: Send + 'static {
    /// Before anything is known of any answer.
    fn begin(&mut self) -> Vec<E>;
    /// Something has been computed of the prompt of an answer that wants to know of it.
    fn prompt(&mut self, _index: usize, _step: PromptStep) -> Vec<E> {
        Vec::new()
    }
    /// A token of an answer, or text that had been held back.
    fn piece(&mut self, index: usize, piece: Piece) -> Vec<E>;
    /// An answer has ended.
    fn end(&mut self, index: usize, generated: Generated) -> Vec<E>;
    /// All have.
    fn finish(&mut self) -> Vec<E>;
    /// Something failed, and nothing follows.
    fn error(&mut self, e: &ApiError) -> Vec<E>;
    /// Nothing has happened for a while; `None` where nothing need be written then but what the stream's form has for it.
    fn alive(&self) -> Option<E> {
        None
    }
}

/// A stream of events, kept alive while nothing is there to be sent.
///
/// # Errors
/// What fails at once.
pub(crate) async fn respond(answers: Answers, chunks: impl Chunks, keep_alive: Duration) -> Result<Response, ApiError> {
    let alive = chunks.alive().unwrap_or_else(|| SseEvent::default().comment("keep-alive"));
    let alive = KeepAlive::new().interval(keep_alive).event(alive);
    let events = begin(answers, chunks).await?.events();
    let mut response = Sse::new(events).keep_alive(alive).into_response();
    // nginx would collect the events otherwise.
    let header = (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response.headers_mut().insert(header.0, header.1);
    Ok(response)
}

/// A stream of lines, each a JSON value, kept alive while nothing is there to be sent. The form has no comments, and clients parse an
/// empty line too, so that it takes a line that says nothing.
///
/// # Errors
/// What fails at once.
pub(crate) async fn respond_lines(
    answers: Answers,
    chunks: impl Chunks<Value>,
    keep_alive: Duration,
) -> Result<Response, ApiError> {
    let streaming = begin(answers, chunks).await?;
    let lines = stream::unfold(streaming, move |mut s| async move {
        // Nothing is lost where the wait is given up: an event is taken when it is there.
        let next = tokio::time::timeout(keep_alive, s.next()).await;
        let line = next.unwrap_or_else(|_| s.chunks.alive())?;
        Some((Ok::<_, Infallible>(format!("{line}\n")), s))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Waits a moment for what fails at once.
async fn begin<E, C: Chunks<E>>(mut answers: Answers, mut chunks: C) -> Result<Streaming<C, E>, ApiError> {
    let mut ready: VecDeque<E> = chunks.begin().into();
    let first = async {
        loop {
            match answers.next().await {
                // It does not say yet whether there will be an answer.
                Ok(Some((index, Event::Prompt(step)))) => ready.extend(chunks.prompt(index, step)),
                other => return other,
            }
        }
    };
    if let Ok(first) = tokio::time::timeout(EARLY, first).await {
        match first? {
            Some((_, Event::End(Err(e)))) => return Err(e.into()),
            Some(event) => ready.extend(written(&mut chunks, event).0),
            None => ready.extend(chunks.finish()),
        }
    }
    Ok(Streaming { answers: Some(answers), chunks, ready })
}

struct Streaming<C, E> {
    /// `None` once the last event is ready.
    answers: Option<Answers>,
    chunks: C,
    ready: VecDeque<E>,
}

impl<E: Send + 'static, C: Chunks<E>> Streaming<C, E> {
    fn events(self) -> impl Stream<Item = Result<E, Infallible>> + Send + 'static {
        stream::unfold(self, |mut s| async {
            let event = s.next().await?;
            Some((Ok(event), s))
        })
    }

    async fn next(&mut self) -> Option<E> {
        while self.ready.is_empty() {
            let answers = self.answers.as_mut()?;
            let (events, is_last) = match answers.next().await {
                Ok(Some(event)) => written(&mut self.chunks, event),
                Ok(None) => (self.chunks.finish(), true),
                Err(e) => (self.chunks.error(&e), true),
            };
            self.ready.extend(events);
            if is_last {
                self.answers = None;
            }
        }
        self.ready.pop_front()
    }
}

/// What an event is written as, and whether nothing follows it.
fn written<E>(chunks: &mut impl Chunks<E>, (index, event): (usize, Event)) -> (Vec<E>, bool) {
    match event {
        Event::Prompt(step) => (chunks.prompt(index, step), false),
        Event::Piece(piece) => (chunks.piece(index, piece), false),
        Event::End(Ok(generated)) => (chunks.end(index, generated), false),
        Event::End(Err(e)) => (chunks.error(&e.into()), true),
    }
}

#[cfg(test)]
mod tests {
    use apr_engine::generate::GenerateError;
    use axum::body::to_bytes;

    use super::*;
    use crate::job::tests::answers;

    /// Writes words for what it is told.
    struct Words;

    impl Chunks for Words {
        fn begin(&mut self) -> Vec<SseEvent> {
            vec![SseEvent::default().data("begin")]
        }

        fn piece(&mut self, index: usize, piece: Piece) -> Vec<SseEvent> {
            vec![SseEvent::default().data(format!("{index} {}", piece.text))]
        }

        fn end(&mut self, _: usize, _: Generated) -> Vec<SseEvent> {
            Vec::new()
        }

        fn finish(&mut self) -> Vec<SseEvent> {
            vec![SseEvent::default().data("finish")]
        }

        fn error(&mut self, e: &ApiError) -> Vec<SseEvent> {
            vec![SseEvent::default().data(format!("error {}", e.status))]
        }
    }

    fn piece(text: &str) -> Event {
        Event::Piece(Piece { token: None, text: text.to_string(), standing: None, experts: None })
    }

    async fn streamed(events: Vec<(usize, Event)>) -> Result<String, ApiError> {
        let response = respond(answers(2, events), Words, Duration::from_secs(60)).await?;
        Ok(String::from_utf8(to_bytes(response.into_body(), 1000).await.unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_failure_in_the_middle_is_told_and_ends_the_stream() {
        let stopped = || Event::End(Err(GenerateError::Stopped));
        let text = streamed(vec![(0, piece("a")), (1, piece("b")), (0, stopped()), (1, piece("c"))]).await;
        let expected = "data: begin\n\ndata: 0 a\n\ndata: 1 b\n\ndata: error 503 Service Unavailable\n\n";
        assert_eq!(text.unwrap(), expected);
        let refused = streamed(vec![(0, stopped())]).await.unwrap_err();
        assert_eq!(refused.status, 503, "before anything was sent it has a status of its own");
    }

    #[tokio::test]
    async fn an_engine_that_is_gone_is_an_error() {
        let text = streamed(vec![(1, piece("a"))]).await.unwrap();
        assert_eq!(text, "data: begin\n\ndata: 1 a\n\ndata: error 500 Internal Server Error\n\n");
    }
}
