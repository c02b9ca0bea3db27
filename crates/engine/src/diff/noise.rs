//! The noise that two sides must have: what the reference does to every stage when its activations, keys and values are rounded as the
//! sides declare, on the same run.

use std::path::{Path, PathBuf};

use apr_core::backend::fed::Feed;
use apr_core::backend::{KvType, Precision};

use super::DiffError;
use super::measure::{Comparison, Measured};
use super::routing::Route;
use super::sides::{Loaded, ModelSource};
use super::tape::TapeFeed;
use crate::device::Device;
use crate::engine::EngineOptions;
use crate::trace::file::SavedTrace;

/// Two ways to run the reference whose difference is the noise.
#[derive(Clone, Debug)]
pub(super) struct Noise {
    /// The file whose weights are run.
    pub model: PathBuf,
    /// The coarser of what the two sides declare, for activations and for keys and values each.
    pub activations: Precision,
    pub kv_coarse: KvType,
    pub kv_fine: KvType,
    pub n_ctx: Option<usize>,
}

impl Noise {
    /// Whether the two sides declare the same exact computation, so that nothing but the order of float sums is between them.
    pub fn is_none(&self) -> bool {
        self.activations == Precision::F32 && self.kv_coarse == self.kv_fine
    }

    /// Whether a side that runs like this is the exact one of the two.
    pub fn is_exact(&self, source: &ModelSource) -> bool {
        source.options.device == Device::Reference { activations: Precision::F32 }
            && source.options.kv_type == self.kv_fine
    }

    /// Measures the noise of a pass with this feed, or of a free one. `exact` is the pass of the exact one where it has been run.
    pub fn measure<'a>(
        &self,
        (tokens, positions): (&[u32], &[u32]),
        feed: &dyn Fn() -> Option<TapeFeed<'a>>,
        exact: Option<&SavedTrace>,
        scratch: &Path,
    ) -> Result<(Measured, Vec<Route>), DiffError> {
        if self.is_none() {
            return Ok(Default::default());
        }
        let recorded = match exact {
            Some(_) => None,
            None => {
                let (mut side, mut feed) = (self.side(Precision::F32, self.kv_fine)?, feed());
                let feed = feed.as_mut().map(|f| f as &mut dyn Feed);
                Some(side.record(&scratch.join("exact.safetensors"), (tokens, positions), &|_| true, None, feed)?)
            }
        };
        let exact = exact.or(recorded.as_ref()).expect("one of the two is there");
        let mut comparison = Comparison::new(exact, tokens, feed().is_none());
        let (mut side, mut feed) = (self.side(self.activations, self.kv_coarse)?, feed());
        side.run(tokens, positions, &mut comparison, feed.as_mut().map(|f| f as &mut dyn Feed))?;
        Ok((comparison.measured, comparison.routes))
    }

    fn side(&self, activations: Precision, kv_type: KvType) -> Result<Loaded, DiffError> {
        let options = EngineOptions { device: Device::Reference { activations }, kv_type, n_ctx: self.n_ctx };
        Loaded::load(&ModelSource { path: self.model.clone(), options, unfused: false })
    }
}

/// How coarsely keys and values are stored.
pub(super) fn coarseness(kv: KvType) -> usize {
    match kv {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Q8_0 => 2,
    }
}
