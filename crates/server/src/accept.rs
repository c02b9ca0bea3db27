//! Connections: how many at a time, how long a head may take, and what happens to a client that does not read.
//!
//! hyper is driven directly because its timeouts need a timer, and because a connection is to be had back when it ends: a head that
//! took too long gets its 408, and a client that still sends a body nobody wants gets to read why before the connection is reset.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use crate::patience::{self, Clock};
use crate::state::{Phase, Settings, State};

/// How long the rest of what a client sends is read and dropped.
const LINGER: Duration = Duration::from_secs(1);
/// A pause after the system has run out of something that connections need.
const PAUSE: Duration = Duration::from_millis(100);

const LATE_HEAD: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// What nginx and Go's servers say as well to who speaks plain HTTP where TLS is spoken.
const NOT_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n\
                         content-length: 48\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";

/// Accepts connections until the server closes, and waits for them to end.
pub(crate) async fn run(listener: TcpListener, router: Router, state: Arc<State>) {
    let n = state.settings.n_connections;
    let places = Arc::new(Semaphore::new(n));
    let mut phase = state.phase.subscribe();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.expect("the semaphore stays open");
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            _ = phase.wait_for(|p| *p == Phase::Closing) => break,
        };
        let Ok((stream, _)) = accepted else {
            // A client that has left already, or too many open files: the next may go better.
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (router, state) = (router.clone(), state.clone());
        tokio::spawn(async move {
            serve(stream, router, &state).await;
            drop(place);
        });
    }
    _ = places.acquire_many(n as u32).await;
}

async fn serve(stream: TcpStream, router: Router, state: &State) {
    // Tokens are small and are to leave at once.
    _ = stream.set_nodelay(true);
    let timed = |stream| {
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(state.settings.write_time));
        Box::pin(stream)
    };
    let Some(tls) = state.tls() else { return serve_http(timed(stream), router, state).await };
    let greeting = async {
        if is_plain(&stream).await {
            return Err(timed(stream));
        }
        Ok(tls.acceptor().accept(timed(stream)).await)
    };
    // Who does not greet in time is not served; of what is wrong with a greeting rustls tells where it can.
    match tokio::time::timeout(state.settings.head_time, greeting).await {
        Ok(Ok(Ok(stream))) => serve_http(stream, router, state).await,
        Ok(Err(plain)) => end(plain, Some(NOT_TLS)).await,
        Ok(Ok(Err(_))) | Err(_) => {}
    }
}

/// Whether a client begins as HTTP does: with a method, where TLS has a byte that is no letter.
async fn is_plain(stream: &TcpStream) -> bool {
    let mut first = [0];
    stream.peek(&mut first).await.is_ok_and(|n| n == 1) && first[0].is_ascii_alphabetic()
}

async fn serve_http(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, state: &State) {
    let routes = TowerToHyperService::new(router);
    // Boxed, because a connection can be had back only where futures may be moved.
    let service = service_fn(move |request| Box::pin(routes.call(request)));
    let (stream, clock) = patience::watched(stream, state.settings.head_time);
    let mut connection = http(&state.settings, clock).serve_connection(TokioIo::new(stream), service);
    let mut phase = state.phase.subscribe();
    let closing = async move { _ = phase.wait_for(|p| *p == Phase::Closing).await };
    tokio::pin!(closing);
    let mut is_closing = false;
    let result = poll_fn(|cx| {
        if !is_closing && closing.as_mut().poll(cx).is_ready() {
            is_closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        connection.poll_without_shutdown(cx)
    })
    .await;
    let parts = connection.into_parts();
    let is_late = result.is_err_and(|e| e.is_timeout()) && !parts.read_buf.is_empty();
    end(parts.io.into_inner(), is_late.then_some(LATE_HEAD)).await;
}

fn http(settings: &Settings, clock: Clock) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(clock).header_read_timeout(settings.idle_time).max_header_size(settings.head_bytes);
    http
}

/// Ends a connection, with a last answer or without, so that the client can read all that was sent to it.
async fn end(mut stream: impl AsyncRead + AsyncWrite + Unpin, last: Option<&[u8]>) {
    if let Some(last) = last
        && stream.write_all(last).await.is_err()
    {
        return;
    }
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut rest = [0; 4096];
    let drop_rest = async { while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
    _ = tokio::time::timeout(LINGER, drop_rest).await;
}
