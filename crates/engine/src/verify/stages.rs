//! What must hold of every stage of a pass: its shape, its values' being numbers, and a routing's being one.

use std::collections::BTreeSet;

use apr_core::backend::Result;
use apr_core::batch::Batch;
use apr_core::gguf::Gguf;
use apr_core::hparams::Hparams;
use apr_core::models;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::At;
use crate::session::Session;

/// How far the weights of a token's experts may be from what they must be: a few roundings of values of at most 1.
const WEIGHT_BOUND: f64 = 1e-5;

/// The worst of many values, and the first place that was worse than allowed.
pub struct Tally {
    pub bound: f64,
    pub worst: f64,
    pub at: Option<At>,
    /// Values seen.
    pub n: u64,
}

/// A watch that holds every stage to its contracts.
pub struct StageChecks<'a> {
    hparams: &'a Hparams,
    batch: Batch,
    /// Stages that are yet to be seen.
    missing: BTreeSet<Place>,
    pub shape: Tally,
    pub finite: Tally,
    pub sum: Tally,
    pub distinct: Tally,
    pub likeliest: Tally,
    pub softmax: Tally,
    /// Of the layer that is being routed.
    logits: Vec<f32>,
    weights: Vec<f32>,
}

impl Tally {
    pub fn new(bound: f64) -> Tally {
        Tally { bound, worst: 0.0, at: None, n: 0 }
    }

    /// Takes in a value.
    pub fn see(&mut self, value: f64, at: At) {
        self.n += 1;
        self.worst = worse(self.worst, value);
        if self.at.is_none() && (value.is_nan() || value > self.bound) {
            self.at = Some(at);
        }
    }
}

impl<'a> StageChecks<'a> {
    pub fn new(hparams: &'a Hparams, gguf: &Gguf, session: &dyn Session) -> StageChecks<'a> {
        let stages = models::stages(hparams, gguf).into_iter().filter(|&s| is_looked_at(s) && session.shows(s, false));
        let missing = stages.flat_map(|s| {
            let n_layer = if s.is_global() { 1 } else { hparams.n_layer };
            (0..n_layer).map(move |il| Place::new(il, s))
        });
        StageChecks {
            hparams,
            batch: Batch::default(),
            missing: missing.collect(),
            shape: Tally::new(0.0),
            finite: Tally::new(0.0),
            sum: Tally::new(WEIGHT_BOUND),
            distinct: Tally::new(0.0),
            likeliest: Tally::new(0.0),
            softmax: Tally::new(WEIGHT_BOUND),
            logits: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// Counts the stages that no pass has shown as wrong shapes.
    pub fn finish(&mut self) {
        for place in std::mem::take(&mut self.missing) {
            self.shape.see(1.0, At { place, position: 0 });
        }
    }

    /// Rows that a stage must have: those that want no logits are dropped after the last layer's attention.
    fn n_rows(&self, stage: Stage, layer: usize) -> usize {
        let kept = layer >= self.hparams.n_layer || layer + 1 == self.hparams.n_layer && stage >= Stage::AttnOut;
        if kept && stage != Stage::Embedding { self.batch.kept().len() } else { self.batch.rows().len() }
    }

    /// The position of a stage's row.
    fn position(&self, n_rows: usize, i: usize) -> u32 {
        let all = n_rows == self.batch.rows().len();
        self.batch.rows()[if all { i } else { self.batch.kept()[i] as usize }].position
    }

    fn check_finite(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let (n_rows, mut stats) = (value.shape().0, Vec::new());
        value.stats(0..n_rows, &mut stats)?;
        for (i, s) in stats.iter().enumerate() {
            self.finite.see((s.n_nan + s.n_inf) as f64, At::new(layer, stage, self.position(n_rows, i)));
        }
        Ok(())
    }

    /// The routing of some tokens in a layer, all of it having been seen.
    fn check_routing(&mut self, layer: usize, n_rows: usize, ids: &[f32]) {
        let (k, n_expert) = (ids.len() / n_rows.max(1), self.logits.len() / n_rows.max(1));
        for i in 0..n_rows {
            let ids: Vec<usize> = ids[i * k..(i + 1) * k].iter().map(|&id| id as usize).collect();
            let (logits, weights) = (&self.logits[i * n_expert..][..n_expert], &self.weights[i * k..][..k]);
            let position = self.position(n_rows, i);
            let (of_ids, of_weights) =
                (At::new(layer, Stage::MoeRouterIndices, position), At::new(layer, Stage::MoeRouter, position));
            let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            self.sum.see((sum - 1.0).abs(), of_weights);
            let n_wrong = ids.iter().enumerate().filter(|(j, e)| **e >= n_expert || ids[..*j].contains(e)).count();
            self.distinct.see(n_wrong as f64, of_ids);
            if ids.iter().all(|&e| e < n_expert) {
                self.likeliest.see(excess(logits, &ids), of_ids);
                self.softmax.see(distance_from_softmax(logits, &ids, weights), of_weights);
            }
        }
    }
}

/// The larger of two values; what is not a number is the largest.
pub fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// By how much a logit is larger than one that comes before it: along the chosen, and of those left out over the last chosen.
fn excess(logits: &[f32], ids: &[usize]) -> f64 {
    let last = ids.last().map_or(f32::INFINITY, |&e| logits[e]);
    let left_out = (0..logits.len()).filter(|e| !ids.contains(e)).map(|e| logits[e] - last);
    let along = ids.windows(2).map(|pair| logits[pair[1]] - logits[pair[0]]);
    left_out.chain(along).map(f64::from).fold(0.0, worse)
}

/// The largest difference of the weights from the softmax of the chosen experts' logits.
fn distance_from_softmax(logits: &[f32], ids: &[usize], weights: &[f32]) -> f64 {
    let max = ids.iter().map(|&e| logits[e]).fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = ids.iter().map(|&e| f64::from(logits[e] - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().zip(weights).map(|(e, &w)| (e / sum - f64::from(w)).abs()).fold(0.0, worse)
}

/// Scores of attention are large, and shown by few devices.
fn is_looked_at(stage: Stage) -> bool {
    !matches!(stage, Stage::AttnScores | Stage::AttnSoftmax)
}

impl Watch for StageChecks<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch = batch.clone();
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        is_looked_at(stage)
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let n_cols = models::stage_shape(self.hparams, stage, 0).iter().product();
        let (expected, got) = ((self.n_rows(stage, layer), n_cols), value.shape());
        let place = Place::new(layer, stage);
        self.missing.remove(&place);
        let position = self.batch.rows()[0].position;
        self.shape.see(f64::from(u8::from(expected != got)), At { place, position });
        if expected != got {
            return Ok(()); // Nothing is known of whose rows these are.
        }
        match stage {
            Stage::MoeRouterLogits => value.read(0..got.0, &mut self.logits)?,
            Stage::MoeRouter => value.read(0..got.0, &mut self.weights)?,
            Stage::MoeRouterIndices => {
                let mut ids = Vec::new();
                value.read(0..got.0, &mut ids)?;
                self.check_routing(layer, got.0, &ids);
            }
            _ => {}
        }
        self.check_finite(stage, layer, value)
    }
}
