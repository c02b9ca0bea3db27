//! Embeddings: the mean of the final norm over a text's positions, as a vector of length 1.
//!
//! The rows of such a text ride along in the steps that answer others, and leave the pass at the final norm, before the output
//! matrix. Who looks on for the request takes them there.

use apr_core::backend::Result;
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::Stage;

/// Sums the final norm of a sequence's positions while they are computed.
#[derive(Debug, Default)]
pub(crate) struct Mean {
    sum: Vec<f64>,
    /// Positions summed so far.
    n_summed: usize,
    /// The first position of the step.
    first: usize,
    row: Vec<f32>,
}

impl Mean {
    /// The mean at length 1; `None` where it has no direction.
    pub(crate) fn unit(&self) -> Option<Vec<f32>> {
        let length = self.sum.iter().map(|v| v * v).sum::<f64>().sqrt();
        (length.is_finite() && length > 0.0).then(|| self.sum.iter().map(|v| (v / length) as f32).collect())
    }
}

impl Watch for Mean {
    fn begin(&mut self, batch: &Batch) {
        self.first = batch.rows()[0].position as usize;
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        stage == Stage::FinalNorm
    }

    /// A position counts once, however often it is computed, and rows are added one by one, so that the sum does not depend on how
    /// they were cut into steps.
    fn seen(&mut self, _: Stage, _: usize, value: &dyn StageValue) -> Result<()> {
        let (n_rows, n_embd) = value.shape();
        self.sum.resize(n_embd, 0.0);
        for i in self.n_summed - self.first..n_rows {
            value.read(i..i + 1, &mut self.row)?;
            self.sum.iter_mut().zip(&self.row).for_each(|(sum, v)| *sum += f64::from(*v));
            self.n_summed += 1;
        }
        Ok(())
    }
}
