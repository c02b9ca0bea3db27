//! Speed of a loaded model: prefill and decode as llama-bench measures them, and the machine's read bandwidth in the same run.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crate::engine::Engine;
use crate::generate::prefill;
use crate::session::{Logits, Part, Sequence, StepError};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct BenchOptions {
    /// Tokens of the prefill test; 0 leaves it out.
    pub n_prompt: usize,
    /// Tokens of the decode test; 0 leaves it out.
    pub n_gen: usize,
    /// Tokens already in the context.
    pub depth: usize,
    /// Counted repetitions; one more runs first and is dropped.
    pub reps: usize,
}

impl BenchOptions {
    /// Whether every test fits a context of `n_ctx` positions.
    ///
    /// # Errors
    /// The positions needed and those there are.
    pub fn check(&self, n_ctx: usize) -> Result<(), StepError> {
        let need = self.depth.saturating_add(self.n_prompt.max(self.n_gen));
        if need > n_ctx { Err(StepError::ContextFull { need, n_ctx }) } else { Ok(()) }
    }
}

/// One test's figures.
#[derive(Clone, Debug)]
pub struct BenchResult {
    /// `pp512`, `tg64`, with `@d4096` where the context was not empty.
    pub test: String,
    /// Median over the repetitions.
    pub tok_per_s: f64,
    /// Half the distance of the quartiles.
    pub spread_tok_per_s: f64,
    /// Bytes of weights, keys and values read per second; absent where the backend does not count them.
    pub gb_per_s: Option<f64>,
    /// Bytes read per token.
    pub bytes_per_token: Option<u64>,
    pub reps: usize,
}

/// Runs the tests. `on_result` is called as each ends, and may break off.
///
/// # Errors
/// A context too small for the tests.
pub fn bench(
    engine: &mut Engine,
    o: BenchOptions,
    on_result: &mut dyn FnMut(&BenchResult) -> ControlFlow<()>,
) -> Result<(), StepError> {
    o.check(engine.session.n_ctx())?;
    let suffix = if o.depth > 0 { format!("@d{}", o.depth) } else { String::new() };
    let tests =
        [(format!("pp{}{suffix}", o.n_prompt), o.n_prompt, true), (format!("tg{}{suffix}", o.n_gen), o.n_gen, false)];
    for (test, n, is_prefill) in tests.into_iter().filter(|t| t.1 > 0) {
        let mut runs = Vec::new();
        for _ in 0..=o.reps {
            runs.push(timed(engine, o.depth, n, is_prefill)?);
        }
        if on_result(&summary(test, n, &runs[1..])).is_break() {
            break;
        }
    }
    Ok(())
}

/// Seconds, and bytes read, of one repetition.
type Timed = (f64, Option<u64>);

fn timed(engine: &mut Engine, depth: usize, n: usize, is_prefill: bool) -> Result<Timed, StepError> {
    let never = AtomicBool::new(false);
    let tokens = pseudo_random_tokens(depth + n, engine.hparams.n_vocab);
    let mut sequence = Sequence::default();
    prefill(engine, &mut sequence, &tokens[..depth], &never)?;
    let (start, before) = (Instant::now(), engine.session.read_bytes());
    if is_prefill {
        prefill(engine, &mut sequence, &tokens[depth..], &never)?;
    } else {
        for token in &tokens[depth..] {
            let part = Part { sequence: &mut sequence, tokens: std::slice::from_ref(token), logits: Logits::Last };
            engine.session.step(&mut [part])?;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let read = engine.session.read_bytes().zip(before).map(|(after, before)| after - before);
    engine.session.release(&mut sequence);
    Ok((seconds, read))
}

fn summary(test: String, n: usize, runs: &[Timed]) -> BenchResult {
    let mut rates: Vec<f64> = runs.iter().map(|(seconds, _)| n as f64 / seconds).collect();
    rates.sort_by(f64::total_cmp);
    let at = |share: f64| rates[((rates.len() - 1) as f64 * share).round() as usize];
    let bytes_per_token = runs[0].1.map(|bytes| bytes / n as u64);
    let median = at(0.5);
    BenchResult {
        test,
        tok_per_s: median,
        spread_tok_per_s: (at(0.75) - at(0.25)) / 2.0,
        gb_per_s: bytes_per_token.map(|bytes| bytes as f64 * median / 1e9),
        bytes_per_token,
        reps: runs.len(),
    }
}

/// How fast `n_threads` threads read memory: the limit that decoding is held against. Median of several passes over a buffer that
/// no cache holds.
pub fn read_gb_per_s(n_threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let buffer = vec![1u64; BYTES / 8];
    let share = buffer.len().div_ceil(n_threads.max(1));
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(share) {
                scope.spawn(move || std::hint::black_box(sum(part)));
            }
        });
        BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    let mut rates: Vec<f64> = (0..5).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// A sum that the memory, not the adder, limits.
fn sum(x: &[u64]) -> u64 {
    let (chunks, _) = x.as_chunks::<16>();
    let mut lanes = [0u64; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = lane.wrapping_add(*v));
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// Tokens that visit many experts, the same in every run.
fn pseudo_random_tokens(n: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}
