//! What decorators of a backend share: forwarding of every primitive op to the inner backend in field `0`, and a probe that stands
//! between the two.

use super::{Backend, Result};
use crate::batch::Batch;
use crate::probe::{Probe, View};
use crate::stage::Stage;

/// Shows the inner backend's stages to a probe of the decorator.
pub(super) struct Through<'a, D, P> {
    pub outer: &'a D,
    pub probe: &'a mut P,
}

impl<B, D, P> Probe<B> for Through<'_, D, P>
where
    B: Backend,
    D: Backend<Tensor = B::Tensor, Ids = B::Ids>,
    P: Probe<D>,
{
    fn begin(&mut self, batch: &Batch) {
        self.probe.begin(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.probe.wants(stage, layer)
    }

    fn seen(&mut self, _: &B, stage: Stage, layer: usize, view: View<'_, B>) -> Result<()> {
        let view = match view {
            View::Values { tensor, cols } => View::Values { tensor, cols },
            View::Ids(ids) => View::Ids(ids),
        };
        self.probe.seen(self.outer, stage, layer, view)
    }
}

/// Forwards types, memory and the ops that no decorator here changes. The ops named in brackets are left to the decorator.
macro_rules! delegate {
    () => {
        $crate::backend::decorator::delegate!(types);
        $crate::backend::decorator::delegate!(precision);
        $crate::backend::decorator::delegate!(plain);
        $crate::backend::decorator::delegate!(products);
        $crate::backend::decorator::delegate!(attention);
    };
    (precision) => {
        fn precision(&self) -> $crate::backend::Precision {
            self.0.precision()
        }
    };
    (plain) => {
        $crate::backend::decorator::delegate!(op upload(data: &$crate::backend::WeightData) -> Self::Weight);
        $crate::backend::decorator::delegate!(op kv_reserve(kv: &mut Self::KvCache, n_blocks: usize) -> ());
        $crate::backend::decorator::delegate!(op kv_restore(kv: &mut Self::KvCache, block: u32, saved: &[u8]) -> ());
        $crate::backend::decorator::delegate!(op rms_norm(out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Weight, eps: f32) -> ());
        $crate::backend::decorator::delegate!(op rope(x: &mut Self::Tensor, cols: std::ops::Range<usize>, head_dim: usize, rope: &$crate::rope::Rope, batch: &$crate::batch::Batch) -> ());
        $crate::backend::decorator::delegate!(op keep_rows(x: &mut Self::Tensor, rows: &[u32]) -> ());
        $crate::backend::decorator::delegate!(op head_norm(x: &mut Self::Tensor, cols: std::ops::Range<usize>, w: &Self::Weight, eps: f32) -> ());
        $crate::backend::decorator::delegate!(op route(r: &mut $crate::backend::Routing<Self::Tensor, Self::Ids>) -> ());
    };
    (products) => {
        $crate::backend::decorator::delegate!(op matmul(out: &mut Self::Tensor, at: usize, w: &Self::Weight, x: &Self::Tensor) -> ());
        $crate::backend::decorator::delegate!(op matmul_experts(out: &mut Self::Tensor, w: &Self::Weight, ids: &Self::Ids, x: &Self::Tensor) -> ());
    };
    (op $name:ident($($arg:ident: $ty:ty),*) -> $out:ty) => {
        fn $name(&self, $($arg: $ty),*) -> $crate::backend::Result<$out> {
            self.0.$name($($arg),*)
        }
    };
    (attention) => {
        fn attention<P: $crate::probe::Probe<Self>>(
            &self,
            out: &mut Self::Tensor,
            qkv: &Self::Tensor,
            kv: &mut Self::KvCache,
            il: usize,
            heads: $crate::backend::Heads,
            batch: &$crate::batch::Batch,
            probe: &mut P,
        ) -> $crate::backend::Result<()> {
            let mut probe = $crate::backend::decorator::Through { outer: self, probe };
            self.0.attention(out, qkv, kv, il, heads, batch, &mut probe)
        }
    };
    (types) => {
        type Tensor = B::Tensor;
        type Ids = B::Ids;
        type Weight = B::Weight;
        type KvCache = B::KvCache;

        fn read_bytes(&self) -> Option<u64> {
            self.0.read_bytes()
        }
        fn is_batch_invariant(&self) -> bool {
            self.0.is_batch_invariant()
        }
        fn free_bytes(&self) -> Option<u64> {
            self.0.free_bytes()
        }
        fn run_step(&self, step: &mut dyn FnMut() -> $crate::backend::Result<()>) -> $crate::backend::Result<()> {
            self.0.run_step(step)
        }
        fn tensor(&self, n_cols: usize, consumers: &[&Self::Weight]) -> Self::Tensor {
            self.0.tensor(n_cols, consumers)
        }
        fn ids(&self, n_cols: usize) -> Self::Ids {
            self.0.ids(n_cols)
        }
        fn shape(&self, t: &Self::Tensor) -> (usize, usize) {
            self.0.shape(t)
        }
        fn kv_block_bytes(&self, shape: &$crate::backend::KvShape) -> usize {
            self.0.kv_block_bytes(shape)
        }
        fn kv_cache(&self, shape: $crate::backend::KvShape) -> Self::KvCache {
            self.0.kv_cache(shape)
        }
        $crate::backend::decorator::delegate!(op read(t: &Self::Tensor, out: &mut Vec<f32>) -> ());
        $crate::backend::decorator::delegate!(op write(t: &mut Self::Tensor, values: &[f32]) -> ());
        $crate::backend::decorator::delegate!(op read_row(t: &Self::Tensor, row: usize, out: &mut Vec<f32>) -> ());
        $crate::backend::decorator::delegate!(op read_ids(ids: &Self::Ids, out: &mut Vec<u32>) -> (usize, usize));
        fn ids_shape(&self, ids: &Self::Ids) -> (usize, usize) {
            self.0.ids_shape(ids)
        }
        $crate::backend::decorator::delegate!(op write_ids(ids: &mut Self::Ids, values: &[u32]) -> ());
        $crate::backend::decorator::delegate!(op row_stats(t: &Self::Tensor, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>, out: &mut Vec<$crate::stats::RowStats>) -> ());
        $crate::backend::decorator::delegate!(op best(t: &Self::Tensor, k: usize, out: &mut Vec<$crate::backend::Best>) -> ());
        $crate::backend::decorator::delegate!(op kv_save(kv: &Self::KvCache, block: u32, out: &mut Vec<u8>) -> ());
        $crate::backend::decorator::delegate!(op embed(out: &mut Self::Tensor, table: &Self::Weight, batch: &$crate::batch::Batch) -> ());
        $crate::backend::decorator::delegate!(op add_bias(x: &mut Self::Tensor, at: usize, bias: &Self::Weight) -> ());
        $crate::backend::decorator::delegate!(op silu(x: &mut Self::Tensor) -> ());
        $crate::backend::decorator::delegate!(op mul(x: &mut Self::Tensor, y: &Self::Tensor) -> ());
        $crate::backend::decorator::delegate!(op weighted_sum(out: &mut Self::Tensor, x: &Self::Tensor, weights: &Self::Tensor) -> ());
        $crate::backend::decorator::delegate!(op add(x: &mut Self::Tensor, y: &Self::Tensor) -> ());
    };
}
pub(crate) use delegate;
