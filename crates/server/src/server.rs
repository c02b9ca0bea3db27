//! A server's life: it listens before the model is there, answers, drains and ends.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use apr_engine::BackendError;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::accept;
use crate::keys::Keys;
use crate::model::Model;
use crate::openai::structured::N_COMPILING;
use crate::routes::router;
use crate::state::{Phase, Settings, State};
use crate::tls::Tls;

/// Threads for connections. Answers are computed elsewhere, and need the cores.
const N_WORKER: usize = 2;
/// Threads for prompts.
const N_BLOCKING: usize = 4;
const _: () = assert!(N_COMPILING < N_BLOCKING, "formats of answers leave threads to prompts");
/// How long clients may take to read the last of their answers when the server ends.
const CLOSING_TIME: Duration = Duration::from_secs(5);
/// How often it is looked whether the engine still runs.
const LOOK_TIME: Duration = Duration::from_millis(500);

/// A server that listens. Requests are told to come back until it [has a model](Server::answer_with).
pub struct Server {
    state: Arc<State>,
    addr: SocketAddr,
    accepting: JoinHandle<()>,
    /// Held from the beginning, as a process that does not listen for it is ended by it.
    hangups: Hangups,
    runtime: Runtime,
}

/// Why a server ended, where nobody told it to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("signals of the system cannot be listened for: {0}")]
    Signals(std::io::Error),
    #[error("the engine has failed and answers nothing more; what it said is above. Start the server again")]
    Engine,
    #[error("{0}; nothing is answered any more. Start the server again")]
    Device(BackendError),
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "cannot listen on {host} port {port}: {source}; choose another port with --port, or 0 for any that is free"
    )]
    InUse { host: String, port: u16, source: std::io::Error },
    #[error("cannot listen on {host} port {port}: {source}")]
    Address { host: String, port: u16, source: std::io::Error },
    #[error("the server's threads cannot be started: {0}")]
    Threads(std::io::Error),
}

impl Server {
    /// Listens; with port 0 on any that is free.
    ///
    /// # Errors
    /// An address that is in use, or none of this machine's.
    pub fn bind(host: &str, port: u16, settings: Settings) -> Result<Server, BindError> {
        let refused = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::AddrInUse => BindError::InUse { host: host.to_string(), port, source },
            _ => BindError::Address { host: host.to_string(), port, source },
        };
        let listener = TcpListener::bind((host, port)).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let addr = listener.local_addr().map_err(refused)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(N_WORKER)
            .max_blocking_threads(N_BLOCKING)
            .thread_name("http")
            .enable_all()
            .build()
            .map_err(BindError::Threads)?;
        let state = Arc::new(State::new(settings, addr.ip(), host.to_string()));
        let (listener, hangups) = {
            let _in = runtime.enter();
            (tokio::net::TcpListener::from_std(listener).map_err(refused)?, Hangups::new().map_err(BindError::Threads)?)
        };
        let accepting = runtime.spawn(accept::run(listener, router(state.clone()), state.clone()));
        Ok(Server { state, addr, accepting, hangups, runtime })
    }

    /// The address that is listened on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on requests are answered.
    pub fn answer_with(&self, model: Model) {
        self.state.set_model(model);
    }

    /// The model that answers, once there is one.
    pub fn model(&self) -> Option<Arc<Model>> {
        self.state.loaded().cloned()
    }

    /// From now on these keys are asked for, and no others.
    pub fn set_keys(&self, keys: Keys) {
        self.state.set_keys(keys);
    }

    /// From now on connections are greeted with this; those that are open go on.
    pub fn set_tls(&self, tls: Tls) {
        self.state.set_tls(tls);
    }

    /// Requests that are being answered.
    pub fn n_active(&self) -> usize {
        self.state.n_active()
    }

    /// Runs until the process is told to stop (SIGINT, SIGTERM), then as [`stop`](Server::stop) does. A second signal ends the
    /// process at once, with 128 and the signal's number. `ready` is called once signals are listened for, `told` hears
    /// of the first, `reload` of every SIGHUP before it. A server whose engine has failed stops by itself: whoever keeps
    /// it running sees that and starts it again, where one that only refuses would be left as it is.
    ///
    /// # Errors
    /// A system without signals, and an engine that has failed.
    pub fn run(
        mut self,
        ready: impl FnOnce(),
        told: impl FnOnce(usize),
        mut reload: impl FnMut(&Server),
    ) -> Result<(), RunError> {
        let mut signals = {
            let _in = self.runtime.enter();
            Signals::new().map_err(RunError::Signals)?
        };
        ready();
        let ended = loop {
            let ended = self.runtime.block_on(async {
                tokio::select! {
                    _ = signals.next() => Some(Ok(())),
                    e = failure(&self.state) => Some(Err(e)),
                    () = self.hangups.next() => None,
                }
            });
            match ended {
                Some(ended) => break ended,
                None => reload(&self),
            }
        };
        told(self.n_active());
        self.runtime.spawn(async move { std::process::exit(128 + signals.next().await) });
        self.stop();
        ended
    }

    /// Takes no more requests, lets those that have begun end, for as long as the settings allow, then cancels them.
    pub fn stop(self) {
        let Server { state, accepting, runtime, .. } = self;
        state.enter(Phase::Draining);
        runtime.block_on(async {
            if tokio::time::timeout(state.settings.drain_time, state.idle()).await.is_err() {
                if let Some(model) = state.loaded() {
                    model.scheduler.cancel_all();
                }
                _ = tokio::time::timeout(CLOSING_TIME, state.idle()).await;
            }
            state.enter(Phase::Closing);
            _ = tokio::time::timeout(CLOSING_TIME, accepting).await;
        });
        runtime.shutdown_timeout(CLOSING_TIME);
    }
}

/// Waits until the engine has failed.
async fn failure(state: &State) -> RunError {
    loop {
        if let Some(model) = state.loaded().filter(|model| !model.scheduler.is_alive()) {
            return model.scheduler.failure().map_or(RunError::Engine, |e| RunError::Device(e.clone()));
        }
        tokio::time::sleep(LOOK_TIME).await;
    }
}

/// Requests of the system to stop.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {})
    }

    /// Waits for one, and gives its number.
    #[cfg(unix)]
    async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => 15,
            _ = self.interrupt.recv() => 2,
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> i32 {
        _ = tokio::signal::ctrl_c().await;
        2
    }
}

/// Requests of the system to read files anew.
struct Hangups {
    #[cfg(unix)]
    signal: tokio::signal::unix::Signal,
}

impl Hangups {
    #[cfg(unix)]
    fn new() -> std::io::Result<Hangups> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Hangups { signal: signal(SignalKind::hangup())? })
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Hangups> {
        Ok(Hangups {})
    }

    /// Waits for one.
    async fn next(&mut self) {
        #[cfg(unix)]
        self.signal.recv().await;
        #[cfg(not(unix))]
        std::future::pending::<()>().await;
    }
}
