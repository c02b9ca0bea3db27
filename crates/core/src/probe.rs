//! Looking into a forward pass while it runs.
//!
//! The forward offers every stage to a [`Probe`]. A probe reads, never writes, so that the pass that is traced is the pass that is
//! served; [`NoProbe`] compiles to nothing. A [`Watch`] is a probe that does not know the backend, which is what everything above a
//! session is; [`Recorder`] is one that keeps chosen stages on the host.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::backend::{Backend, Result};
use crate::batch::Batch;
use crate::stage::Stage;
use crate::stats::RowStats;

/// Some columns of a tensor, or the expert ids of a routing.
pub enum View<'a, B: Backend> {
    /// Columns `cols` of every row of a tensor.
    Values { tensor: &'a B::Tensor, cols: Range<usize> },
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
    cols: Range<usize>,
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

/// A stage's values as a watcher meets them, whatever the backend.
pub trait StageValue {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);
    /// Copies rows `rows` to the host: `[rows.len(), n_cols]`. Expert ids are read as floats, exact below 2^24.
    fn read(&self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()>;
    /// Statistics of each of the rows, computed where the values are.
    fn stats(&self, rows: Range<usize>, out: &mut Vec<RowStats>) -> Result<()>;
    /// Bytes of weights, keys and values that the device has read so far, where it counts them.
    fn read_bytes(&self) -> Option<u64>;
}

/// A probe that does not know the backend.
pub trait Watch {
    /// Called once per step, before the first stage.
    fn begin(&mut self, batch: &Batch);
    /// Whether this stage is wanted at all.
    fn wants(&self, stage: Stage, layer: usize) -> bool;
    /// A stage has been computed; [`Batch::positions_of`] tells the positions of its rows.
    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()>;
}

impl<W: Watch + ?Sized> Watch for &mut W {
    fn begin(&mut self, batch: &Batch) {
        (**self).begin(batch);
    }
    fn wants(&self, stage: Stage, layer: usize) -> bool {
        (**self).wants(stage, layer)
    }
    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        (**self).seen(stage, layer, value)
    }
}

impl<B: Backend, W: Watch> Probe<B> for W {
    fn begin(&mut self, batch: &Batch) {
        Watch::begin(self, batch);
    }
    fn wants(&self, stage: Stage, layer: usize) -> bool {
        Watch::wants(self, stage, layer)
    }
    fn seen(&mut self, b: &B, stage: Stage, layer: usize, view: View<'_, B>) -> Result<()> {
        if Watch::wants(self, stage, layer) { Watch::seen(self, stage, layer, &OnDevice { b, view }) } else { Ok(()) }
    }
}

/// A stage's values on a backend.
struct OnDevice<'a, B: Backend> {
    b: &'a B,
    view: View<'a, B>,
}

impl<B: Backend> StageValue for OnDevice<'_, B> {
    fn shape(&self) -> (usize, usize) {
        match &self.view {
            View::Values { tensor, cols } => (self.b.shape(tensor).0, cols.len()),
            View::Ids(ids) => self.b.ids_shape(ids),
        }
    }

    fn read(&self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        match &self.view {
            View::Values { tensor, cols } => {
                let mut row = Vec::new();
                for i in rows {
                    self.b.read_row(tensor, i, &mut row)?;
                    out.extend_from_slice(&row[cols.clone()]);
                }
            }
            View::Ids(ids) => {
                let mut all = Vec::new();
                let (_, n) = self.b.read_ids(ids, &mut all)?;
                out.extend(all[rows.start * n..rows.end * n].iter().map(|&id| id as f32));
            }
        }
        Ok(())
    }

    fn stats(&self, rows: Range<usize>, out: &mut Vec<RowStats>) -> Result<()> {
        out.clear();
        match &self.view {
            View::Values { tensor, cols } => self.b.row_stats(tensor, rows, cols.clone(), out),
            View::Ids(_) => {
                let (mut values, n) = (Vec::new(), self.shape().1);
                self.read(rows, &mut values)?;
                out.extend(values.chunks_exact(n.max(1)).map(RowStats::of));
                Ok(())
            }
        }
    }

    fn read_bytes(&self) -> Option<u64> {
        self.b.read_bytes()
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

impl Watch for Recorder {
    fn begin(&mut self, batch: &Batch) {
        self.batch = batch.clone();
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        self.wanted.as_ref().is_none_or(|w| w.contains(&stage))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let (n_rows, mut values) = (value.shape().0, Vec::new());
        value.read(0..n_rows, &mut values)?;
        let record = self.seen.entry((layer, stage)).or_default();
        record.positions.extend(self.batch.positions_of(n_rows));
        record.values.extend(values);
        Ok(())
    }
}
