//! The check that costs most: a sample of layers and positions, early and late, held against the reference.

use apr_core::backend::Precision;

use super::passes::some_tokens;
use super::report::{Finding, Reporter};
use super::stages::worse;
use super::{At, Measure, VerifyError, VerifyOptions};
use crate::diff::isolated::{Sample, judge};
use crate::engine::Engine;

const ID: &str = "FALSIFY-PRECISION-001";
/// How many times the noise of its precision an op's error may be.
const RATIO_MAX: f64 = 3.0;

/// Refuses layers and positions that do not exist, before anything is computed.
pub fn check(engine: &Engine, options: &VerifyOptions) -> Result<(), VerifyError> {
    let (n_layer, n_ctx) = (engine.hparams.n_layer, engine.session.n_ctx());
    if let Some(&layer) = options.layers.iter().flatten().find(|&&il| il >= n_layer) {
        return Err(VerifyError::NoLayer { layer, n_layer });
    }
    if let Some(&position) = options.positions.iter().flatten().find(|&&p| p as usize >= n_ctx) {
        return Err(VerifyError::NoPosition { position, n_ctx });
    }
    Ok(())
}

/// That the device computes what the reference does, but for the rounding it declares. `tokens` are those that other checks ran.
pub fn run(
    engine: &mut Engine,
    options: &VerifyOptions,
    tokens: Vec<u32>,
    reporter: &mut Reporter<'_>,
) -> Result<(), VerifyError> {
    if engine.device.kind == "reference" && engine.session.precision() == Precision::F32 {
        reporter.skipped(ID, "this device is the reference");
        return Ok(());
    }
    let sample = sample(engine.hparams.n_layer, tokens.len() as u32, options);
    let n_needed = sample.positions.last().map_or(0, |&p| p as usize + 1);
    let n_vocab = engine.hparams.n_vocab.min(engine.tokenizer.n_vocab());
    let tokens = if n_needed > tokens.len() { some_tokens(n_needed, n_vocab, 4) } else { tokens };
    let judged = judge(engine, &tokens[..n_needed], &sample, RATIO_MAX)?;
    let value = judged.places.iter().map(|(_, summary)| summary.ratio).fold(0.0, worse);
    let at = judged.culprits.first().map(|c| At { place: c.place, position: c.row.position });
    let sampled = format!(
        "positions {} in layers {} and at the output, {} stages",
        list(&sample.positions),
        list(&sample.layers),
        judged.places.len()
    );
    let measure = Measure { value, bound: RATIO_MAX, unit: "times the noise, the worst stage and position" };
    reporter.found(ID, Finding { sampled, measure, at });
    Ok(())
}

/// What is asked for, or: first, middle and last layer; two early positions and three late ones of `n`.
fn sample(n_layer: usize, n: u32, options: &VerifyOptions) -> Sample {
    let some = |positions: [u32; 5]| positions.into_iter().filter(|&p| p < n).collect::<Vec<_>>();
    let mut layers = options.layers.clone().unwrap_or_else(|| vec![0, n_layer / 2, n_layer - 1]);
    let late = |i: u32| n.saturating_sub(i);
    let mut positions = options.positions.clone().unwrap_or_else(|| some([1, 7, late(65), late(2), late(1)]));
    layers.sort_unstable();
    layers.dedup();
    positions.sort_unstable();
    positions.dedup();
    Sample { layers, positions, n_layer }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}
