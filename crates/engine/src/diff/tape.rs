//! Passes that have been recorded, on disk or in memory, and that feed others: their stages are the inputs from which another pass
//! computes each stage anew.

use std::collections::{BTreeMap, HashMap};

use apr_core::backend::Result;
use apr_core::backend::fed::{Feed, Work};
use apr_core::backend::unfused::INTERIOR;
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use crate::trace::file::SavedTrace;

/// A recorded pass.
pub trait Tape {
    /// Shape of a place's value for one position, where the place was recorded.
    fn shape(&self, place: Place) -> Option<&[usize]>;
    /// Copies a value; false where it was not recorded.
    fn read(&self, place: Place, position: u32, out: &mut Vec<f32>) -> bool;
}

impl Tape for SavedTrace {
    fn shape(&self, place: Place) -> Option<&[usize]> {
        SavedTrace::shape(self, place)
    }
    fn read(&self, place: Place, position: u32, out: &mut Vec<f32>) -> bool {
        SavedTrace::read(self, place, position, out)
    }
}

/// Layers and positions that stand for all of a large model's.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Ascending.
    pub layers: Vec<usize>,
    /// Ascending.
    pub positions: Vec<u32>,
    /// Layers of the model; the stages behind the last are always looked at.
    pub n_layer: usize,
}

impl Sample {
    /// Whether a value is one of the sample. The stages before and after the layers are at its positions.
    pub fn has(&self, place: Place, position: u32) -> bool {
        place.layer().is_none_or(|il| self.layers.contains(&il)) && self.positions.binary_search(&position).is_ok()
    }

    /// Whether a value is needed to compute the sample: its own values, the residual stream that enters its layers and the stages behind
    /// the last, and the layers' keys and values at all positions.
    fn needs(&self, place: Place, position: u32) -> bool {
        let is_computed = |il: usize| il == self.n_layer || self.layers.contains(&il);
        let enters = place.stage == Stage::PostFfnResidual && place.layer().is_some_and(|il| is_computed(il + 1));
        let stores = matches!(place.stage, Stage::QkvMatmul | Stage::QkvBias | Stage::KPostRope)
            && place.layer().is_some_and(|il| self.layers.contains(&il));
        stores || self.has(place, position) || (enters && self.positions.binary_search(&position).is_ok())
    }
}

/// The part of a pass that a sample needs, in memory.
pub struct MemoryTape<'a> {
    sample: &'a Sample,
    batch: Batch,
    shapes: HashMap<Place, [usize; 1]>,
    values: BTreeMap<(Place, u32), Vec<f32>>,
}

impl<'a> MemoryTape<'a> {
    pub fn new(sample: &'a Sample) -> MemoryTape<'a> {
        MemoryTape { sample, batch: Batch::default(), shapes: HashMap::new(), values: BTreeMap::new() }
    }
}

impl Tape for MemoryTape<'_> {
    fn shape(&self, place: Place) -> Option<&[usize]> {
        self.shapes.get(&place).map(|s| s.as_slice())
    }
    fn read(&self, place: Place, position: u32, out: &mut Vec<f32>) -> bool {
        out.clear();
        self.values.get(&(place, position)).inspect(|values| out.extend_from_slice(values)).is_some()
    }
}

impl Watch for MemoryTape<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        let (place, first) = (Place::new(layer, stage), self.sample.positions.first());
        !matches!(stage, Stage::AttnScores | Stage::AttnSoftmax) && first.is_some_and(|&p| self.sample.needs(place, p))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let (place, (n_rows, n_cols)) = (Place::new(layer, stage), value.shape());
        for (i, position) in self.batch.positions_of(n_rows).enumerate() {
            if self.sample.needs(place, position) {
                let mut row = Vec::new();
                value.read(i..i + 1, &mut row)?;
                self.values.insert((place, position), row);
            }
        }
        self.shapes.insert(place, [n_cols]);
        Ok(())
    }
}

/// Feeds what a tape holds; with a sample, only what the sample needs is computed.
pub struct TapeFeed<'a> {
    tape: &'a dyn Tape,
    sample: Option<&'a Sample>,
    /// Whether the stages inside fusable ops are fed.
    interior: bool,
    batch: Batch,
}

impl<'a> TapeFeed<'a> {
    /// Feeds all of a pass. Without `interior` fusable ops are computed whole from their inputs, as a fused one is in any case.
    pub fn new(tape: &'a dyn Tape, interior: bool) -> TapeFeed<'a> {
        TapeFeed { tape, sample: None, interior, batch: Batch::default() }
    }

    /// Feeds a sample. Steps hold positions of the sample or others, never both.
    pub fn sampled(tape: &'a dyn Tape, sample: &'a Sample) -> TapeFeed<'a> {
        TapeFeed { sample: Some(sample), ..TapeFeed::new(tape, true) }
    }
}

impl Feed for TapeFeed<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn work(&self, layer: usize) -> Work {
        let Some(sample) = self.sample else { return Work::All };
        let is_sampled = self.batch.rows().iter().any(|r| sample.positions.binary_search(&r.position).is_ok());
        match sample.layers.contains(&layer) || layer == sample.n_layer {
            true if is_sampled => Work::All,
            true => Work::Attention,
            false => Work::Nothing,
        }
    }

    fn has(&self, stage: Stage, layer: usize) -> bool {
        (self.interior || !INTERIOR.contains(&stage)) && self.tape.shape(Place::new(layer, stage)).is_some()
    }

    fn replace(&mut self, stage: Stage, layer: usize, n_rows: usize, values: &mut [f32]) -> Result<()> {
        copy_rows(self.tape, Place::new(layer, stage), self.batch.positions_of(n_rows), values, &|_| true);
        Ok(())
    }
}

/// Feeds the routing of one token in one layer, and nothing else: what a flip of its experts costs.
pub struct RouteFeed<'a> {
    pub tape: &'a dyn Tape,
    pub layer: usize,
    pub position: u32,
    pub batch: Batch,
}

impl Feed for RouteFeed<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn has(&self, stage: Stage, layer: usize) -> bool {
        layer == self.layer && matches!(stage, Stage::MoeRouter | Stage::MoeRouterIndices)
    }

    fn replace(&mut self, stage: Stage, layer: usize, n_rows: usize, values: &mut [f32]) -> Result<()> {
        let positions = self.batch.positions_of(n_rows);
        copy_rows(self.tape, Place::new(layer, stage), positions, values, &|position| position == self.position);
        Ok(())
    }
}

/// Replaces the rows of `values` at the chosen positions by those that the tape has.
fn copy_rows(
    tape: &dyn Tape,
    place: Place,
    positions: impl ExactSizeIterator<Item = u32>,
    values: &mut [f32],
    is_chosen: &dyn Fn(u32) -> bool,
) {
    // A step none of whose rows want logits has empty stages after the last layer's attention.
    let n_cols = values.len() / positions.len().max(1);
    let mut row = Vec::new();
    for (position, to) in positions.zip(values.chunks_exact_mut(n_cols.max(1))) {
        if is_chosen(position) && tape.read(place, position, &mut row) {
            to.copy_from_slice(&row);
        }
    }
}
