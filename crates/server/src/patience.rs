//! How long a connection may say nothing: a head that has begun is to end soon, while between two requests a client may take its time.
//!
//! hyper has one timer for both. It is told to wait as long as a connection may be idle, by a clock that looks whether the head has
//! begun meanwhile.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::rt::{Sleep, Timer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// When the first byte came since a head was waited for.
#[derive(Default)]
struct Seen(Mutex<Option<Instant>>);

impl Seen {
    fn first(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn note(&self) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_with(Instant::now);
    }

    fn forget(&self) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = None;
    }
}

/// hyper's clock for the heads of one connection.
pub(crate) struct Clock {
    seen: Arc<Seen>,
    head_time: Duration,
    had_one: AtomicBool,
}

/// A stream whose first bytes are seen, and the clock that knows of them.
pub(crate) fn watched<S>(stream: S, head_time: Duration) -> (Watched<S>, Clock) {
    let seen = Arc::new(Seen::default());
    (Watched { stream, seen: seen.clone() }, Clock { seen, head_time, had_one: AtomicBool::new(false) })
}

impl Timer for Clock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    /// Called when hyper begins to wait for a head. A connection's first is not to be waited for any longer than a head may take.
    fn sleep_until(&self, idle_until: Instant) -> Pin<Box<dyn Sleep>> {
        self.seen.forget();
        let is_first = !self.had_one.swap(true, Ordering::Relaxed);
        let until = if is_first { idle_until.min(Instant::now() + self.head_time) } else { idle_until };
        let inner = Box::pin(tokio::time::sleep_until(until.into()));
        Box::pin(HeadSleep { inner, seen: self.seen.clone(), head_time: self.head_time, until })
    }
}

struct HeadSleep {
    inner: Pin<Box<tokio::time::Sleep>>,
    seen: Arc<Seen>,
    head_time: Duration,
    until: Instant,
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let until = self.seen.first().map_or(self.until, |first| self.until.min(first + self.head_time));
        if self.inner.deadline() != until.into() {
            self.inner.as_mut().reset(until.into());
        }
        self.inner.as_mut().poll(cx)
    }
}

/// A stream that notes when something comes.
pub(crate) struct Watched<S> {
    stream: S,
    seen: Arc<Seen>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let n_before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > n_before {
            self.seen.note();
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
