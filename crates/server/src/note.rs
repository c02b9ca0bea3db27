//! What is known of a request beside what it asks for: when it came, how long it may take, and what the log says of it when it is over.
//! Never what was asked or answered, and no key.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use apr_engine::generate::{Finish, Generated};
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State as Shared};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};

use crate::errors::ApiError;
use crate::guard::{self, REQUEST_ID};
use crate::job::Event;
use crate::state::State;

tokio::task_local! {
    /// The request that is being answered here.
    static CURRENT: Arc<Note>;
}

/// Notes on one request.
pub(crate) struct Note {
    came: Instant,
    method: Method,
    path: String,
    /// How long it may take from when it came.
    limit: Option<Duration>,
    answered: Mutex<Answered>,
}

/// What became of it.
#[derive(Clone, Default)]
struct Answered {
    model: Option<String>,
    n_prompt: Option<u64>,
    n_cached: Option<u64>,
    n_generated: Option<u64>,
    first_token: Option<Duration>,
    finish: Option<&'static str>,
}

impl Answered {
    fn add(&mut self, generated: &Generated) {
        // Several answers to one prompt have it in common.
        self.n_prompt = self.n_prompt.max(Some(generated.n_prompt as u64));
        self.n_cached = self.n_cached.max(Some(generated.n_cached as u64));
        *self.n_generated.get_or_insert(0) += generated.tokens.len() as u64;
        self.finish.get_or_insert(match generated.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "abort",
        });
    }
}

impl Note {
    /// That of the request that is answered here; there is none in tests of parts.
    pub(crate) fn current() -> Option<Arc<Note>> {
        CURRENT.try_with(Arc::clone).ok()
    }

    /// When it must be over.
    pub(crate) fn deadline(&self) -> Option<tokio::time::Instant> {
        self.limit.map(|limit| (self.came + limit).into())
    }

    /// What a request is told that took too long.
    pub(crate) fn late(&self) -> ApiError {
        self.finish_with("timeout");
        ApiError::late(self.limit.unwrap_or_default())
    }

    /// What happens to one of its answers.
    pub(crate) fn event(&self, event: &Event) {
        let mut a = self.answered();
        match event {
            Event::Prompt(_) => {}
            Event::Piece(_) => _ = a.first_token.get_or_insert(self.came.elapsed()),
            Event::End(Ok(generated)) => a.add(generated),
            Event::End(Err(_)) => _ = a.finish.get_or_insert("error"),
        }
    }

    /// Which model it asks.
    pub(crate) fn asks(&self, model: &str) {
        self.answered().model = Some(model.to_string());
    }

    /// Tokens of texts that it has embedded.
    pub(crate) fn embeds(&self, n_token: usize) {
        self.answered().n_prompt = Some(n_token as u64);
    }

    /// How it ended, unless that is known.
    pub(crate) fn finish_with(&self, how: &'static str) {
        self.answered().finish.get_or_insert(how);
    }

    fn answered(&self) -> MutexGuard<'_, Answered> {
        self.answered.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A line of the log. Supervisors ask for some paths every few seconds; that is for those who want to know everything.
    fn log(&self, id: &str, status: u16) {
        let a = self.answered().clone();
        let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 10.0;
        macro_rules! line {
            ($level:expr) => {
                tracing::event!(
                    $level,
                    id,
                    method = %self.method,
                    path = %self.path.escape_debug(),
                    status,
                    model = a.model,
                    prompt_tokens = a.n_prompt,
                    cached_tokens = a.n_cached,
                    generated_tokens = a.n_generated,
                    first_token_ms = a.first_token.map(ms),
                    total_ms = ms(self.came.elapsed()),
                    finish = a.finish,
                    "request"
                )
            };
        }
        match (self.path.as_str(), status) {
            ("/health" | "/v1/health" | "/ping" | "/metrics", _) => line!(tracing::Level::DEBUG),
            (_, 500..=599) => line!(tracing::Level::WARN),
            _ => line!(tracing::Level::INFO),
        }
    }
}

/// Notes a request, and logs it when its answer has been sent or its client has left.
pub(crate) async fn note(Shared(state): Shared<Arc<State>>, mut request: Request, next: Next) -> Response {
    let id = guard::request_id(&state, request.headers());
    let shown = id.to_str().unwrap_or_default().to_string();
    // So that all who see it find the same.
    request.headers_mut().insert(REQUEST_ID, id);
    let note = Arc::new(Note {
        came: Instant::now(),
        method: request.method().clone(),
        path: request.uri().path().to_string(),
        limit: state.settings.request_time,
        answered: Mutex::default(),
    });
    // Logs as well where the client leaves before there is an answer.
    let mut line = Line { note: note.clone(), id: shown, status: CLIENT_LEFT };
    let response = CURRENT.scope(note, next.run(request)).await;
    line.status = response.status().as_u16();
    response.map(|body| Body::new(Noted { body, line }))
}

/// What nginx logs where the client did not wait for the answer.
const CLIENT_LEFT: u16 = 499;

/// Ends a request that takes too long before its answer has begun.
pub(crate) async fn limit(request: Request, next: Next) -> Response {
    let Some((note, deadline)) = Note::current().and_then(|note| Some((note.clone(), note.deadline()?))) else {
        return next.run(request).await;
    };
    match tokio::time::timeout_at(deadline, next.run(request)).await {
        Ok(response) => response,
        Err(_) => note.late().into_response(),
    }
}

/// Logs when it is dropped.
struct Line {
    note: Arc<Note>,
    id: String,
    status: u16,
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.status == CLIENT_LEFT {
            self.note.finish_with("cancelled");
        }
        self.note.log(&self.id, self.status);
    }
}

/// A body that is logged with its end.
struct Noted {
    body: Body,
    #[expect(dead_code, reason = "what matters is when it is dropped")]
    line: Line,
}

impl HttpBody for Noted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
