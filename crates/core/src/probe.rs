//! Looking into a forward pass while it runs.
//!
//! The forward offers every stage to a [`Probe`]. A probe reads, never writes, so that the pass that is traced is the pass that is
//! served; [`NoProbe`] compiles to nothing. [`Recorder`] keeps chosen stages on the host.

use std::collections::BTreeMap;

use crate::backend::{Backend, Result};
use crate::batch::Batch;
use crate::stage::Stage;

/// Some columns of a tensor, or the expert ids of a routing.
pub enum View<'a, B: Backend> {
    /// Columns `cols` of every row of a tensor.
    Values { tensor: &'a B::Tensor, cols: std::ops::Range<usize> },
    /// Expert ids `[n_tokens, n_expert_used]`.
    Ids(&'a B::Ids),
}

/// Sees the stages of a forward pass as they are computed.
pub trait Probe<B: Backend> {
    /// Called once per step, before the first stage.
    fn begin(&mut self, batch: &Batch);
    /// Whether this stage is wanted at all; ops skip work that only a probe needs.
    fn wants(&self, stage: Stage, layer: usize) -> bool;
    /// A stage has been computed.
    fn seen(&mut self, b: &B, stage: Stage, layer: usize, view: View<'_, B>) -> Result<()>;
}

/// Offers a whole tensor to a probe.
#[inline(always)]
pub fn seen<B: Backend, P: Probe<B>>(p: &mut P, b: &B, stage: Stage, layer: usize, tensor: &B::Tensor) -> Result<()> {
    seen_cols(p, b, stage, layer, tensor, 0..b.shape(tensor).1)
}

/// Offers some columns of a tensor to a probe.
#[inline(always)]
pub fn seen_cols<B: Backend, P: Probe<B>>(
    p: &mut P,
    b: &B,
    stage: Stage,
    layer: usize,
    tensor: &B::Tensor,
    cols: std::ops::Range<usize>,
) -> Result<()> {
    p.seen(b, stage, layer, View::Values { tensor, cols })
}

/// Looks at nothing and costs nothing.
pub struct NoProbe;

impl<B: Backend> Probe<B> for NoProbe {
    #[inline(always)]
    fn begin(&mut self, _: &Batch) {}
    #[inline(always)]
    fn wants(&self, _: Stage, _: usize) -> bool {
        false
    }
    #[inline(always)]
    fn seen(&mut self, _: &B, _: Stage, _: usize, _: View<'_, B>) -> Result<()> {
        Ok(())
    }
}

/// One recorded stage: one row of values per position seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// Absolute positions, in the order seen.
    pub positions: Vec<u32>,
    /// `[positions.len(), n_cols]`; expert ids are stored as floats, exact below 2^24.
    pub values: Vec<f32>,
}

impl Recording {
    /// Values per position.
    pub fn n_cols(&self) -> usize {
        self.values.len() / self.positions.len().max(1)
    }

    /// The values of the `i`-th position seen.
    pub fn row(&self, i: usize) -> &[f32] {
        let n = self.n_cols();
        &self.values[i * n..(i + 1) * n]
    }
}

/// Keeps the stages it was asked for, over all steps it watches.
#[derive(Default)]
pub struct Recorder {
    /// `None` keeps every stage.
    wanted: Option<Vec<Stage>>,
    batch: Batch,
    /// What was seen, by layer and stage: in order of computation.
    pub seen: BTreeMap<(usize, Stage), Recording>,
}

impl Recorder {
    /// Records the given stages of every layer.
    pub fn of(stages: &[Stage]) -> Recorder {
        Recorder { wanted: Some(stages.to_vec()), ..Default::default() }
    }

    /// Records everything the backend shows.
    pub fn all() -> Recorder {
        Recorder::default()
    }
}

impl<B: Backend> Probe<B> for Recorder {
    fn begin(&mut self, batch: &Batch) {
        self.batch = batch.clone();
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        self.wanted.as_ref().is_none_or(|w| w.contains(&stage))
    }

    fn seen(&mut self, b: &B, stage: Stage, layer: usize, view: View<'_, B>) -> Result<()> {
        if !Probe::<B>::wants(self, stage, layer) {
            return Ok(());
        }
        let mut values = Vec::new();
        let n_rows = match view {
            View::Values { tensor, cols } => {
                let mut all = Vec::new();
                b.read(tensor, &mut all)?;
                let (n_rows, n_cols) = b.shape(tensor);
                all.chunks_exact(n_cols).for_each(|row| values.extend_from_slice(&row[cols.clone()]));
                n_rows
            }
            View::Ids(ids) => {
                let mut all = Vec::new();
                let (n_rows, _) = b.read_ids(ids, &mut all)?;
                values.extend(all.iter().map(|&id| id as f32));
                n_rows
            }
        };
        let rows = self.batch.rows();
        let record = self.seen.entry((layer, stage)).or_default();
        if n_rows == rows.len() {
            record.positions.extend(rows.iter().map(|r| r.position));
        } else {
            assert_eq!(n_rows, self.batch.kept().len(), "a stage has all rows or those that want logits");
            record.positions.extend(self.batch.kept().iter().map(|&r| rows[r as usize].position));
        }
        record.values.extend(values);
        Ok(())
    }
}
