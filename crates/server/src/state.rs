//! What all requests share: settings, the model once it is loaded, and whether the server is going down.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use axum::http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::errors::ApiError;
use crate::keys::Keys;
use crate::metrics::ServerMetrics;
use crate::model::Model;
use crate::note::Note;
use crate::tls::Tls;

/// Limits of what a client may take, and how long things may last.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who is answered: everybody, unless they say otherwise.
    pub keys: Keys,
    /// What connections are greeted with; without it they are plain.
    pub tls: Option<Tls>,
    /// Connections at a time; more wait in the system's backlog.
    pub n_connections: usize,
    /// Pages whose scripts may ask and read, as browsers name them in `Origin`, or `*` for all.
    pub cors_origins: Vec<String>,
    /// Names in `Host` that a server on a loopback address answers to, beside the usual ones.
    pub allowed_hosts: Vec<String>,
    /// Bytes of a request's head, and how long it may take; a connection's first may not let wait for its beginning any longer.
    pub head_bytes: usize,
    pub head_time: Duration,
    /// How long a connection may say nothing between two requests.
    pub idle_time: Duration,
    /// How long a request may take from its arrival to the end of its answer.
    pub request_time: Option<Duration>,
    /// Bytes of a request's body, and how long it may take.
    pub body_bytes: usize,
    pub body_time: Duration,
    /// Bytes of bodies that are being read at a time, until they are prompts.
    pub bodies_bytes: usize,
    /// How long a client may leave what is sent to it unread.
    pub write_time: Duration,
    /// Pieces of an answer that wait for a client that reads slowly; with more the answer is cancelled.
    pub n_backlog: usize,
    /// How often a silent stream is kept alive, by a comment or what its form has instead.
    pub keep_alive: Duration,
    /// Where traces of requests are saved; none are without it.
    pub trace_dir: Option<PathBuf>,
    /// Bytes of values that one of them may have.
    pub trace_bytes: u64,
    /// How long answers may go on after the server was asked to stop.
    pub drain_time: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            keys: Keys::default(),
            tls: None,
            n_connections: 1024,
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            head_bytes: 64 << 10,
            head_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(75),
            request_time: None,
            body_bytes: 16 << 20,
            body_time: Duration::from_secs(30),
            bodies_bytes: 64 << 20,
            write_time: Duration::from_secs(30),
            n_backlog: 4096,
            keep_alive: Duration::from_secs(15),
            trace_dir: None,
            trace_bytes: 4 << 30,
            drain_time: Duration::from_secs(30),
        }
    }
}

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Phase {
    /// It answers, or will once the model is loaded.
    Open,
    /// What has begun ends; nothing begins.
    Draining,
    /// Connections are closed.
    Closing,
}

/// What all requests share.
pub(crate) struct State {
    pub(crate) settings: Settings,
    /// As read last.
    keys: RwLock<Arc<Keys>>,
    tls: RwLock<Option<Tls>>,
    /// The address that is listened on.
    pub(crate) ip: IpAddr,
    /// Names under which clients of this machine may know it, beside the usual ones.
    pub(crate) host: String,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) metrics: ServerMetrics,
    model: OnceLock<Arc<Model>>,
    /// Requests that are being answered.
    n_active: watch::Sender<usize>,
    /// What is left of [`Settings::bodies_bytes`], a permit for each [`ROOM_UNIT`].
    room: Arc<Semaphore>,
    id_salt: RandomState,
    n_id: AtomicU64,
}

/// Bytes of bodies that are counted as one.
const ROOM_UNIT: usize = 1024;

/// A request that is being answered, for as long as this lives.
pub(crate) struct Active(Arc<State>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.n_active.send_modify(|n| *n -= 1);
    }
}

impl State {
    pub(crate) fn new(settings: Settings, ip: IpAddr, host: String) -> State {
        State {
            room: Arc::new(Semaphore::new(settings.bodies_bytes / ROOM_UNIT)),
            keys: RwLock::new(Arc::new(settings.keys.clone())),
            tls: RwLock::new(settings.tls.clone()),
            settings,
            ip,
            host,
            phase: watch::channel(Phase::Open).0,
            metrics: ServerMetrics::new(),
            model: OnceLock::new(),
            n_active: watch::channel(0).0,
            id_salt: RandomState::new(),
            n_id: AtomicU64::new(0),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes on to a later phase; never back.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let is_later = *now < phase;
            if is_later {
                *now = phase;
            }
            is_later
        });
    }

    pub(crate) fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    pub(crate) fn set_keys(&self, keys: Keys) {
        *self.keys.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(keys);
    }

    pub(crate) fn tls(&self) -> Option<Tls> {
        self.tls.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    pub(crate) fn set_tls(&self, tls: Tls) {
        *self.tls.write().unwrap_or_else(|e| e.into_inner()) = Some(tls);
    }

    /// Whether a request shows a key of those who may look inside. Nobody's does where no such key was given.
    pub(crate) fn is_admin(&self, headers: &HeaderMap) -> bool {
        self.keys().allow_admin(headers)
    }

    /// From now on there is something to answer with.
    pub(crate) fn set_model(&self, model: Model) {
        assert!(self.model.set(Arc::new(model)).is_ok(), "a server has one model");
    }

    pub(crate) fn loaded(&self) -> Option<&Arc<Model>> {
        self.model.get()
    }

    /// The model.
    ///
    /// # Errors
    /// A server that still loads, or stops.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ApiError> {
        if self.phase() != Phase::Open {
            return Err(ApiError::unavailable("the server is stopping and takes no more requests"));
        }
        self.loaded().cloned().ok_or_else(|| ApiError::unavailable("the model is still being loaded"))
    }

    /// The model, for a request that begins now, and counts until the second is dropped.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub(crate) fn begin(self: &Arc<State>) -> Result<(Arc<Model>, Active), ApiError> {
        // Counted first: a server that begins to drain meanwhile either refuses it here or waits for it.
        let active = self.count();
        let model = self.model()?;
        Note::current().into_iter().for_each(|note| note.asks(&model.names.id));
        Ok((model, active))
    }

    /// Counts a request until the result is dropped.
    pub(crate) fn count(self: &Arc<State>) -> Active {
        self.n_active.send_modify(|n| *n += 1);
        Active(self.clone())
    }

    /// Room for a body, until the result is dropped.
    ///
    /// # Errors
    /// As many bodies as are read at a time.
    pub(crate) fn room_for(&self, n_bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let n = u32::try_from(n_bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX);
        self.room.clone().try_acquire_many_owned(n).map_err(|_| ApiError::busy())
    }

    pub(crate) fn n_active(&self) -> usize {
        *self.n_active.borrow()
    }

    /// Waits until nothing is being answered.
    pub(crate) async fn idle(&self) {
        // The sender is in `self`, so that the wait ends with what it waits for.
        _ = self.n_active.subscribe().wait_for(|n| *n == 0).await;
    }

    /// 32 hexadecimal digits that were never given before and cannot be guessed from others.
    pub(crate) fn unique(&self) -> String {
        let n = self.n_id.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{:016x}", self.id_salt.hash_one((n, 0)), self.id_salt.hash_one((n, 1)))
    }
}
