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
        let ((n_rows, n_cols), place) = (value.shape(), Place::new(layer, stage));
        value.read(0..n_rows, &mut self.values)?;
        // Scores of attention have a column for each position so far; the file has one for each that comes.
        if let Some(&[n_head, n_kv]) = self.writer.shape(place).filter(|s| s.iter().product::<usize>() > n_cols) {
            self.values = widened(&self.values, n_cols / n_head, n_kv);
        }
        let positions: Vec<u32> = self.batch.positions_of(n_rows).collect();
        self.writer.write(place, &positions, &self.values).map_err(|e| {
            self.failure = Some(e);
            BackendError::Stopped
        })
    }
}

/// Rows of `from` values with zeros added up to `to`.
fn widened(values: &[f32], from: usize, to: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len() / from * to);
    for row in values.chunks_exact(from) {
        out.extend_from_slice(row);
        out.resize(out.len() + to - from, 0.0);
    }
    out
}
