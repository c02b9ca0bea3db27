//! The project's contracts, checked on a model, a machine and this build: what holds of every pass, whatever it computes.
//!
//! The contracts are written down in `contracts/*.yaml`, each with the tests that hold it and the fault that must break it. Those that
//! can be checked on any model are listed here in [`CONTRACTS`] and checked by [`verify`] through the steps that answering takes.

use std::time::{Duration, Instant};

use apr_core::gguf::Gguf;
use apr_core::hparams::Hparams;
use apr_core::stage::{Place, Stage};

use crate::device::{self, Device};
use crate::diff::DiffError;
use crate::engine::{Engine, EngineError};
use crate::model_file::ModelFile;
use crate::session::{Session, SessionSettings, StepError};
use crate::tokenizer::Tokenizer;

mod checks;
mod passes;
mod precision;
mod report;
mod stages;

#[cfg(test)]
mod tests;

use report::Reporter;

/// A claim that is checked on a model.
#[derive(Debug, PartialEq, Eq)]
pub struct Contract {
    pub id: &'static str,
    pub statement: &'static str,
    /// The fault that must break it.
    pub fault: &'static str,
}

const fn contract(id: &'static str, statement: &'static str, fault: &'static str) -> Contract {
    Contract { id, statement, fault }
}

/// The contracts that [`verify`] checks, in its order.
pub const CONTRACTS: [Contract; 17] = [
    contract("FALSIFY-TOKENIZER-001", "the tokens of a text are the text again", "byte-without-token"),
    contract("FALSIFY-FORWARD-003", "every stage has its shape, in every layer", "KeepAllRows"),
    contract("FALSIFY-FORWARD-004", "every value of every stage is a finite number", "NanInAttention"),
    contract("FALSIFY-MOE-ROUTER-001", "router weights of a token sum to 1", "SkipRenormalise"),
    contract("FALSIFY-MOE-ROUTER-002", "the experts of a token exist and are distinct", "RepeatExpert"),
    contract("FALSIFY-MOE-ROUTER-003", "the experts of a token are its likeliest, likeliest first", "WrongExpert"),
    contract("FALSIFY-MOE-ROUTER-004", "router weights are the softmax over the chosen experts", "UniformWeights"),
    contract("FALSIFY-TRACE-001", "a pass that is looked at gives the logits of one that is not", "WatchedDiffers"),
    contract("FALSIFY-BATCHING-001", "the same tokens give the same logits again", "Unsteady"),
    contract("FALSIFY-BATCHING-002", "logits do not depend on how a prompt is cut into steps", "ForgetEarlierSteps"),
    contract("FALSIFY-BATCHING-003", "tokens decoded one by one give the logits of a prefill", "DecodeDiffers"),
    contract("FALSIFY-BATCHING-004", "a sequence in a batch gets the logits it gets alone", "NeighbourLeaks"),
    contract("FALSIFY-FORWARD-005", "NaN reaches the logits of its own position and of none before", "HideNan"),
    contract("FALSIFY-TRACE-002", "fused feed-forward blocks give what their plain bodies give", "FusedDiffers"),
    contract("FALSIFY-KV-001", "a sequence goes on from saved keys and values as from its own", "KvRestoreForgets"),
    contract("FALSIFY-BATCHING-005", "logits do not depend on the number of threads", "Unsteady"),
    contract(
        "FALSIFY-PRECISION-001",
        "stages differ from exact arithmetic by the noise of the declared precision",
        "WrongRopeBase",
    ),
];

/// What to verify of a model.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// Layers that are held against the reference; by default the first, one in the middle and the last.
    pub layers: Option<Vec<usize>>,
    /// Positions that are held against the reference; by default a few at the beginning and a few at the end of the longest line.
    pub positions: Option<Vec<u32>>,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed,
    /// Does not apply to this model or device, and why.
    Skipped(String),
}

/// What was measured, of which a contract allows at most `bound`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    pub value: f64,
    pub bound: f64,
    /// What `value` is.
    pub unit: &'static str,
}

/// Where a contract was broken first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub place: Place,
    pub position: u32,
}

/// How one contract fared.
#[derive(Clone, Debug)]
pub struct CheckResult {
    pub contract: &'static Contract,
    pub outcome: Outcome,
    /// The positions and layers that were looked at.
    pub sampled: String,
    pub measure: Option<Measure>,
    /// Of a broken contract, where that can be told.
    pub at: Option<At>,
}

/// How all contracts fared.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    pub results: Vec<CheckResult>,
    pub time: Duration,
}

/// Why a model cannot be verified, which is no verdict on it.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("verifying takes {need} positions and the context has {n_ctx}; raise --ctx")]
    Context { need: usize, n_ctx: usize },
    #[error("there is no layer {layer}: the model has {n_layer}, from 0 on")]
    NoLayer { layer: usize, n_layer: usize },
    #[error("there is no position {position}: the context has {n_ctx}, from 0 on")]
    NoPosition { position: u32, n_ctx: usize },
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Reference(#[from] DiffError),
}

impl VerifyReport {
    /// Whether no contract was broken.
    pub fn passed(&self) -> bool {
        self.broken().next().is_none()
    }

    /// The results of contracts that were broken.
    pub fn broken(&self) -> impl Iterator<Item = &CheckResult> {
        self.results.iter().filter(|r| r.outcome == Outcome::Failed)
    }
}

impl At {
    fn new(layer: usize, stage: Stage, position: u32) -> At {
        At { place: Place::new(layer, stage), position }
    }

    /// Logits of a position.
    fn logits(position: u32) -> At {
        At::new(0, Stage::LmHead, position)
    }
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at position {}", self.place, self.position)
    }
}

/// Makes a session on a model with a number of threads.
type Reload<'a> = dyn Fn(&ModelFile, &Hparams, SessionSettings, usize) -> Result<Box<dyn Session>, EngineError> + 'a;

/// What is verified.
struct Subject<'a> {
    session: &'a mut dyn Session,
    hparams: &'a Hparams,
    gguf: &'a Gguf,
    tokenizer: &'a Tokenizer,
    /// Another number of threads, and a session with them. Absent where threads are not the caller's to choose.
    reload: Option<(usize, Load<'a>)>,
}

/// Makes another session on the same model.
type Load<'a> = Box<dyn Fn() -> Result<Box<dyn Session>, EngineError> + 'a>;

/// Checks every contract on a loaded model; `report` gets each result as it comes. How many tokens are used depends on how fast the
/// model's first steps are, so that also a large model takes no more than a few minutes.
///
/// # Errors
/// Options that ask for what the model does not have, a context too small to try anything in, or a machine that cannot go on. A broken
/// contract is a result, not an error.
pub fn verify(
    engine: &mut Engine,
    options: &VerifyOptions,
    report: &mut dyn FnMut(&CheckResult),
) -> Result<VerifyReport, VerifyError> {
    let isa = engine.device.isa;
    let reload = |file: &ModelFile, hparams: &Hparams, settings, n_threads| {
        Ok(device::open(Device::Cpu { n_threads: Some(n_threads), isa }, file, hparams, settings)?.0)
    };
    run(engine, options, &reload, report)
}

/// Tokens of the check before a first use.
const N_FIRST_USE: usize = 8;

/// Holds a device against the reference before a model is first used on it: a few positions, the first, a middle and the last layer and
/// the output, each op given what the reference would be given. Takes seconds also on a large model.
///
/// # Errors
/// A context too small to try anything in, or a machine that cannot go on. Another result than the reference's is a result.
pub fn before_first_use(engine: &mut Engine) -> Result<CheckResult, VerifyError> {
    let positions = (0..N_FIRST_USE as u32).collect();
    let options = VerifyOptions { layers: None, positions: Some(positions) };
    precision::check(engine, &options)?;
    let mut found = None;
    let mut send = |result| found = Some(result);
    precision::run(engine, &options, Vec::new(), &mut Reporter::new(&mut send))?;
    Ok(found.expect("the check has a result"))
}

/// As [`verify`], with sessions of other numbers of threads as `reload` makes them.
fn run(
    engine: &mut Engine,
    options: &VerifyOptions,
    reload: &Reload<'_>,
    report: &mut dyn FnMut(&CheckResult),
) -> Result<VerifyReport, VerifyError> {
    let start = Instant::now();
    precision::check(engine, options)?;
    let settings = SessionSettings { kv_type: engine.session.kv_type(), n_ctx: engine.session.n_ctx() };
    let about = engine.about.clone();
    let (file, hparams) = (&about.file, &about.hparams);
    let other = about.device.n_threads.map(|n| if n > 1 { n / 2 } else { 2 });
    let load = |n: usize| -> Load<'_> { Box::new(move || reload(file, hparams, settings, n)) };
    let mut subject = Subject {
        session: &mut *engine.session,
        hparams,
        gguf: &file.gguf,
        tokenizer: &about.tokenizer,
        reload: other.map(|n| (n, load(n))),
    };
    let mut results = Vec::new();
    let mut send = |result| {
        report(&result);
        results.push(result);
    };
    let mut reporter = Reporter::new(&mut send);
    let tokens = checks::run(&mut subject, &mut reporter)?;
    drop(subject);
    precision::run(engine, options, tokens, &mut reporter)?;
    Ok(VerifyReport { results, time: start.elapsed() })
}
