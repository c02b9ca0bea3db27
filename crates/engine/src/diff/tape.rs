//! A pass on disk that feeds another: its stages are the inputs from which the other computes each stage anew.

use apr_core::backend::Result;
use apr_core::backend::fed::Feed;
use apr_core::batch::Batch;
use apr_core::stage::{Place, Stage};

use crate::trace::file::SavedTrace;

/// Feeds what a trace holds.
pub struct TapeFeed<'a> {
    tape: &'a SavedTrace,
    batch: Batch,
}

impl<'a> TapeFeed<'a> {
    pub fn new(tape: &'a SavedTrace) -> TapeFeed<'a> {
        TapeFeed { tape, batch: Batch::default() }
    }
}

impl Feed for TapeFeed<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn has(&self, stage: Stage, layer: usize) -> bool {
        self.tape.shape(Place::new(layer, stage)).is_some()
    }

    fn replace(&mut self, stage: Stage, layer: usize, n_rows: usize, values: &mut [f32]) -> Result<()> {
        let (place, mut row) = (Place::new(layer, stage), Vec::new());
        for (position, to) in self.batch.positions_of(n_rows).zip(values.chunks_exact_mut(values.len() / n_rows.max(1)))
        {
            if self.tape.read(place, position, &mut row) {
                to.copy_from_slice(&row);
            }
        }
        Ok(())
    }
}

/// Feeds the routing of one token in one layer, and nothing else: what a flip of its experts costs.
pub struct RouteFeed<'a> {
    pub tape: &'a SavedTrace,
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
        let mut row = Vec::new();
        for (position, to) in self.batch.positions_of(n_rows).zip(values.chunks_exact_mut(values.len() / n_rows.max(1)))
        {
            if position == self.position && self.tape.read(Place::new(layer, stage), position, &mut row) {
                to.copy_from_slice(&row);
            }
        }
        Ok(())
    }
}
