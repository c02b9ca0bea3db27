//! The model that a server answers with: the engine on its scheduler, its names, and what requests leave out.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use apr_engine::plan;
use apr_engine::sampler::SamplerConfig;
use apr_engine::scheduler::{Limits, Scheduler};
use apr_engine::shadow::{Replay, Shadow, ShadowCounts, ShadowMeter};
use apr_engine::{About, Engine, EngineError};
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::names::Names;
use crate::system_lines::SystemLines;

/// A model that answers.
pub struct Model {
    pub(crate) about: Arc<About>,
    pub(crate) scheduler: Scheduler,
    /// What replays found, where some answers are replayed.
    pub(crate) shadow: Option<ShadowMeter>,
    pub(crate) names: Names,
    pub(crate) metrics: Arc<Metrics>,
    /// Sampling where a request says nothing: the file's, or greedy.
    pub(crate) defaults: SamplerConfig,
    /// Answers that may be in the making or wait; one permit each.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) n_places: usize,
    /// Formats of answers that may be compiled at a time; see [`structured`](crate::openai::structured).
    pub(crate) compiling: Arc<Semaphore>,
    pub(crate) system_lines: SystemLines,
    /// Answers in the making at a time.
    pub(crate) n_parallel: usize,
    /// When it began to answer, in seconds since 1970.
    pub(crate) since: u64,
}

/// Why a model cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the scheduler's thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

impl Model {
    /// Starts answering. Clients may ask for the model by the file's name, `general.name` and these aliases.
    ///
    /// # Errors
    /// Sampling defaults in the file that are out of range, and a system that starts no thread.
    pub fn start(engine: Engine, limits: Limits, aliases: Vec<String>) -> Result<Model, ModelError> {
        Model::start_with(engine, limits, aliases, None)
    }

    /// As [`start`](Self::start). Where `shadow_every` is given, every so manieth short answer is replayed on the reference when nobody
    /// is answered, and what is found is counted and, where it is more than rounding, logged.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(
        engine: Engine,
        limits: Limits,
        aliases: Vec<String>,
        shadow_every: Option<NonZeroU64>,
    ) -> Result<Model, ModelError> {
        let about = engine.about.clone();
        let shadow = shadow_every.map(|every| Shadow::start(&engine, every.get(), log_replay)).transpose()?;
        let n_places = limits.n_parallel + limits.n_queue;
        let names = Names::of(&about, aliases);
        Ok(Model {
            metrics: Arc::new(Metrics::new(&names.id, about.n_ctx, &limits)),
            names,
            defaults: about.sampling_defaults()?,
            places: Arc::new(Semaphore::new(n_places)),
            n_places,
            compiling: Arc::new(Semaphore::new(crate::openai::structured::N_COMPILING)),
            system_lines: SystemLines::default(),
            n_parallel: limits.n_parallel,
            since: crate::openai::now(),
            shadow: shadow.as_ref().map(Shadow::meter),
            scheduler: Scheduler::start_with(engine, limits, shadow)?,
            about,
        })
    }

    /// The same, leaving out these lines of system messages.
    pub fn without(self, system_lines: SystemLines) -> Model {
        Model { system_lines, ..self }
    }

    /// What is left out of system messages.
    pub fn system_lines(&self) -> &SystemLines {
        &self.system_lines
    }

    /// What is known of the model.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// What replays on the reference found, where some answers are replayed.
    pub fn shadow(&self) -> Option<ShadowCounts> {
        self.shadow.as_ref().map(ShadowMeter::counts)
    }

    /// Where it is computed.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Answers that could be taken on now.
    pub fn n_free_places(&self) -> usize {
        self.places.available_permits()
    }
}

/// Says what a replay found where that is more than rounding.
fn log_replay(replay: Result<Replay, EngineError>) {
    match replay {
        Ok(replay) if replay.is_above() => tracing::warn!(
            median_kld = replay.median_kld,
            bound = replay.bound,
            same_top_percent = replay.served.same_top_p,
            n_positions = replay.served.n_positions,
            "what was served differs from the reference by more than its precision explains; run apr verify on this machine"
        ),
        Ok(_) => {}
        Err(e) => tracing::warn!("the reference cannot replay an answer: {e}"),
    }
}

/// How long a step may take while others wait for their next token.
const STEP_TIME: Duration = Duration::from_millis(200);

/// Limits for a number of answers at a time, with room for keys and values as [`plan`] says.
pub fn limits(engine: &Engine, n_parallel: usize, n_queue: usize) -> Limits {
    let block_bytes = engine.session.kv_bytes_of(1);
    let n_kv_block = plan::n_kv_block(block_bytes, engine.n_ctx, n_parallel, engine.session.available_bytes()) as usize;
    Limits { n_parallel, n_queue, n_kv_block, keep_prefixes: true, step_time: STEP_TIME }
}
