//! A watch that saves what it sees.

use apr_core::backend::{BackendError, Result};
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::file::{TraceFileError, TraceHeader, TraceWriter};

/// Writes the stages that a trace has room for, as they are computed.
pub struct SaveWatch {
    writer: TraceWriter,
    batch: Batch,
    values: Vec<f32>,
    failure: Option<TraceFileError>,
}

impl SaveWatch {
    pub fn new(writer: TraceWriter) -> SaveWatch {
        SaveWatch { writer, batch: Batch::default(), values: Vec::new(), failure: None }
    }

    /// Why the pass was stopped with [`BackendError::Stopped`].
    pub fn failure(&mut self) -> Option<TraceFileError> {
        self.failure.take()
    }

    /// Ends the trace: see [`TraceWriter::finish`].
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(self, header: &TraceHeader) -> std::result::Result<std::path::PathBuf, TraceFileError> {
        self.writer.finish(header)
    }
}

impl Watch for SaveWatch {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.writer.has(Place::new(layer, stage))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let n_rows = value.shape().0;
        value.read(0..n_rows, &mut self.values)?;
        let positions: Vec<u32> = self.batch.positions_of(n_rows).collect();
        self.writer.write(Place::new(layer, stage), &positions, &self.values).map_err(|e| {
            self.failure = Some(e);
            BackendError::Stopped
        })
    }
}
