//! The model that a server answers with: the engine on its scheduler, its names, and what requests leave out.

use std::sync::Arc;
use std::time::Duration;

use apr_engine::memory;
use apr_engine::sampler::SamplerConfig;
use apr_engine::scheduler::{Limits, Scheduler};
use apr_engine::{About, Engine, EngineError};
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::names::Names;

/// A model that answers.
pub struct Model {
    pub(crate) about: Arc<About>,
    pub(crate) scheduler: Scheduler,
    pub(crate) names: Names,
    pub(crate) metrics: Arc<Metrics>,
    /// Sampling where a request says nothing: the file's, or greedy.
    pub(crate) defaults: SamplerConfig,
    /// Answers that may be in the making or wait; one permit each.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) n_places: usize,
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
        let about = engine.about.clone();
        let n_places = limits.n_parallel + limits.n_queue;
        let names = Names::of(&about, aliases);
        Ok(Model {
            metrics: Arc::new(Metrics::new(&names.id, about.n_ctx, &limits)),
            names,
            defaults: about.sampling_defaults()?,
            places: Arc::new(Semaphore::new(n_places)),
            n_places,
            since: crate::openai::now(),
            scheduler: Scheduler::start(engine, limits)?,
            about,
        })
    }

    /// What is known of the model.
    pub fn about(&self) -> &About {
        &self.about
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

/// How long a step may take while others wait for their next token.
const STEP_TIME: Duration = Duration::from_millis(200);

/// Limits for a number of answers at a time: room for keys and values of as many whole contexts, but no more than half of the memory
/// that is left, and no less than one context.
pub fn limits(engine: &Engine, n_parallel: usize, n_queue: usize) -> Limits {
    let block_bytes = engine.session.kv_bytes_of(1);
    let n_whole = engine.session.kv_bytes_of(engine.n_ctx).div_ceil(block_bytes);
    let n_wanted = n_whole.saturating_mul(n_parallel as u64);
    let n_fit = memory::available().map_or(n_wanted, |bytes| bytes / 2 / block_bytes);
    let n_kv_block = n_wanted.min(n_fit).max(n_whole) as usize;
    Limits { n_parallel, n_queue, n_kv_block, keep_prefixes: true, step_time: STEP_TIME }
}
