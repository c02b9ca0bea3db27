//! Speed of a loaded model: prefill and decode as llama-bench measures them, beside what the machine can do at best, measured in the
//! same run.

use std::fmt;
use std::hint::black_box;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use apr_cpu::kernels::Isa;

use crate::engine::Engine;
use crate::generate::prefill;
use crate::sampler::{Sampler, SamplerConfig, SamplerError};
use crate::session::{Logits, Part, Sequence, StepError};
use crate::threads::default_threads;

pub mod limits;
pub mod macs;

pub use limits::{Limits, read_gb_per_s};
pub use macs::ActiveWeights;

/// What to measure: a test for every depth with every size of prompt, and with every number of tokens and sequences.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Tokens of prefill tests; 0 is no test.
    pub n_prompt: Vec<usize>,
    /// Tokens of decode tests; 0 is no test.
    pub n_gen: Vec<usize>,
    /// Tokens that are already in the context.
    pub depth: Vec<usize>,
    /// Sequences that decode together, one token each in a step; at least 1.
    pub batch: Vec<usize>,
    /// Counted repetitions, at least 1; one more runs first and is dropped.
    pub reps: usize,
}

/// One thing to measure. Its name is `pp512`, `tg64`, `tg64b8`, with `@d4096` behind where the context is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub kind: Kind,
    /// Tokens, of every sequence.
    pub n: usize,
    pub depth: usize,
    pub n_sequence: usize,
}

/// Which half of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Prefill,
    Decode,
}

/// The limit that a test is nearer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Bandwidth,
    Compute,
}

/// One test's figures. Tokens, bytes and multiply-adds are those of all sequences together.
#[derive(Clone, Debug)]
pub struct BenchResult {
    pub test: Test,
    /// Median over the repetitions.
    pub tok_per_s: f64,
    /// Half the distance of the quartiles.
    pub spread_tok_per_s: f64,
    /// Bytes of weights, keys and values read per token; absent where the backend does not count them.
    pub bytes_per_token: Option<u64>,
    /// Multiply-adds per token, the mean over the test's tokens.
    pub macs_per_token: f64,
    /// The machine's, measured just before the test; absent where something else than its cores computes.
    pub limits: Option<Limits>,
    pub reps: usize,
}

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("{test} needs {need} positions of the context, which holds {n_ctx}; ask for less or raise --ctx")]
    Context { test: Test, need: usize, n_ctx: usize },
    #[error(
        "{test} needs {need_bytes} bytes for keys and values, the machine has {available_bytes} left; \
         ask for fewer tokens or sequences, or use --kv q8_0"
    )]
    Memory { test: Test, need_bytes: u64, available_bytes: u64 },
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Sampler(#[from] SamplerError),
}

impl BenchOptions {
    /// The tests, depth by depth, prefills first.
    pub fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for &depth in &self.depth {
            tests.extend(self.n_prompt.iter().map(|&n| Test { kind: Kind::Prefill, n, depth, n_sequence: 1 }));
            for &n in &self.n_gen {
                tests.extend(self.batch.iter().map(|&n_sequence| Test { kind: Kind::Decode, n, depth, n_sequence }));
            }
        }
        tests.retain(|t| t.n > 0);
        tests
    }

    /// Whether every test fits the context and the memory that is left.
    ///
    /// # Errors
    /// The first test that does not.
    pub fn check(&self, engine: &Engine) -> Result<(), BenchError> {
        let n_ctx = engine.session.n_ctx();
        for test in self.tests() {
            let need = test.depth.saturating_add(test.n);
            if need > n_ctx {
                return Err(BenchError::Context { test, need, n_ctx });
            }
            let need_bytes = engine.session.kv_bytes_of(need).saturating_mul(test.n_sequence as u64);
            if let Some(available_bytes) = engine.session.available_bytes().filter(|&bytes| need_bytes > bytes) {
                return Err(BenchError::Memory { test, need_bytes, available_bytes });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind == Kind::Prefill { "pp" } else { "tg" };
        write!(f, "{kind}{}", self.n)?;
        if self.n_sequence > 1 {
            write!(f, "b{}", self.n_sequence)?;
        }
        if self.depth > 0 { write!(f, "@d{}", self.depth) } else { Ok(()) }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(if *self == Bound::Bandwidth { "bandwidth" } else { "compute" })
    }
}

impl BenchResult {
    /// Bytes of weights, keys and values read per second, in 10⁹.
    pub fn gb_per_s(&self) -> Option<f64> {
        self.bytes_per_token.map(|bytes| bytes as f64 * self.tok_per_s / 1e9)
    }

    /// Multiply-adds per second.
    pub fn macs_per_s(&self) -> f64 {
        self.macs_per_token * self.tok_per_s
    }

    /// The part of the machine's read bandwidth that is reached.
    pub fn share_of_read(&self) -> Option<f64> {
        Some(self.gb_per_s()? / self.limits?.read_gb_per_s)
    }

    /// The part of the cores' multiply-adds of bytes that is reached.
    pub fn share_of_int8(&self) -> Option<f64> {
        Some(self.macs_per_s() / self.limits?.int8_macs_per_s)
    }

    /// The limit of which the larger part is reached; unknown where bytes are not counted.
    pub fn bound(&self) -> Option<Bound> {
        let read = self.share_of_read()?;
        Some(if read > self.share_of_int8()? { Bound::Bandwidth } else { Bound::Compute })
    }
}

/// Runs the tests. `on_result` is called as each ends, and may break off.
///
/// # Errors
/// What [`BenchOptions::check`] refuses, before anything is measured; logits that are not numbers.
pub fn bench(
    engine: &mut Engine,
    o: &BenchOptions,
    on_result: &mut dyn FnMut(&BenchResult) -> ControlFlow<()>,
) -> Result<(), BenchError> {
    o.check(engine)?;
    for test in o.tests() {
        let n_threads = engine.device.n_threads.unwrap_or_else(default_threads);
        let is_host = engine.device.kind != "cuda";
        let limits = is_host.then(|| Limits::measure(n_threads, engine.device.isa.unwrap_or(Isa::Scalar)));
        let mut sequences: Vec<Sequence> = (0..test.n_sequence).map(|_| Sequence::default()).collect();
        let runs = timed_runs(engine, test, o.reps, &mut sequences);
        sequences.iter_mut().for_each(|s| engine.session.release(s));
        if on_result(&summary(engine, test, limits, &runs?[1..])).is_break() {
            break;
        }
    }
    Ok(())
}

/// Seconds, and bytes read, of one repetition.
type Timed = (f64, Option<u64>);

/// Fills the contexts up to the test's depth once, and runs the test from there one time more than it counts.
fn timed_runs(
    engine: &mut Engine,
    test: Test,
    reps: usize,
    sequences: &mut [Sequence],
) -> Result<Vec<Timed>, BenchError> {
    let n_vocab = engine.hparams.n_vocab;
    let tokens: Vec<_> =
        (1..=test.n_sequence).map(|i| pseudo_random_tokens(i as u64, test.depth + test.n, n_vocab)).collect();
    let never = AtomicBool::new(false);
    for (sequence, tokens) in sequences.iter_mut().zip(&tokens) {
        prefill(engine, sequence, &tokens[..test.depth], &never)?;
    }
    let mut runs = Vec::new();
    for _ in 0..=reps {
        sequences.iter_mut().for_each(|s| s.truncate(test.depth));
        let (start, before) = (Instant::now(), engine.session.read_bytes());
        match test.kind {
            Kind::Prefill => _ = prefill(engine, &mut sequences[0], &tokens[0][test.depth..], &never)?,
            Kind::Decode => decode(engine, sequences, &tokens, test.depth)?,
        }
        let seconds = start.elapsed().as_secs_f64();
        runs.push((seconds, engine.session.read_bytes().zip(before).map(|(after, before)| after - before)));
    }
    Ok(runs)
}

/// Decodes `tokens` from `depth` on. Every step ends as it does in an answer, with the choice of each sequence's next token; the token
/// that then follows is a given one all the same, so that every run visits the same experts.
fn decode(
    engine: &mut Engine,
    sequences: &mut [Sequence],
    tokens: &[Vec<u32>],
    depth: usize,
) -> Result<(), BenchError> {
    let mut greedy = Sampler::new(SamplerConfig::default())?;
    let (mut best, mut logits) = (Vec::new(), Vec::new());
    for position in depth..tokens[0].len() {
        let part = |(sequence, tokens)| {
            let tokens: &Vec<u32> = tokens;
            Part { sequence, tokens: &tokens[position..=position], logits: Logits::Last }
        };
        let mut parts: Vec<Part<'_>> = sequences.iter_mut().zip(tokens).map(part).collect();
        engine.session.step(&mut parts)?;
        for i in 0..tokens.len() {
            engine.session.best_logits(i, 1, &mut best)?;
            if black_box(greedy.sample_best(&best)).is_none() {
                engine.session.logits(i, &mut logits)?;
                greedy.sample(&logits)?;
            }
        }
    }
    Ok(())
}

fn summary(engine: &Engine, test: Test, limits: Option<Limits>, runs: &[Timed]) -> BenchResult {
    let n_tokens = test.n * test.n_sequence;
    let (tok_per_s, spread_tok_per_s) = median_and_spread(runs.iter().map(|(seconds, _)| n_tokens as f64 / seconds));
    // Of a prefill only the last token's logits are computed, in a decode every token's.
    let n_kept = if test.kind == Kind::Prefill { 1 } else { test.n };
    BenchResult {
        test,
        tok_per_s,
        spread_tok_per_s,
        bytes_per_token: runs[0].1.map(|bytes| bytes / n_tokens as u64),
        macs_per_token: macs::macs(&engine.hparams, test.depth, test.n, n_kept) as f64 / test.n as f64,
        limits,
        reps: runs.len(),
    }
}

/// The median, and half the distance of the quartiles, of at least one value.
pub fn median_and_spread(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    (at(0.5), (at(0.75) - at(0.25)) / 2.0)
}

/// Tokens that visit many experts, the same in every run, others with another `seed`.
fn pseudo_random_tokens(seed: u64, n: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}
