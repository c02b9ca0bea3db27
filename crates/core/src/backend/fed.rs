//! A backend whose tensors can be given other values while a pass runs: each stage is then computed from the inputs of another pass,
//! which is how the op that is at fault is told from those that only inherit its error.
//!
//! A [`Feed`] holds the other pass's values. [`Feeding`] stands where the probe stands: it first shows a stage as this backend computed
//! it, then puts the other pass's values in its place, from which everything downstream goes on. The backend itself is not touched.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use super::unfused::{self, INTERIOR};
use super::{Backend, FfnScratch, FfnWeights, Heads, KvShape, Precision, Result, Routing, WeightData};
use crate::batch::Batch;
use crate::probe::{NoProbe, Probe, View, Watch, seen};
use crate::rope::Rope;
use crate::stage::Stage;

/// Values that stand in for those of a pass.
pub trait Feed {
    /// Called once per step.
    fn begin(&mut self, batch: &Batch);
    /// What the pass has to compute in a layer, in this step. The stages after the layers count as one more layer.
    fn work(&self, _layer: usize) -> Work {
        Work::All
    }
    /// Whether [`replace`](Self::replace) would change the stage.
    fn has(&self, stage: Stage, layer: usize) -> bool;
    /// Replaces `values`, `[n_rows, n_cols]`, expert ids as floats.
    fn replace(&mut self, stage: Stage, layer: usize, n_rows: usize, values: &mut [f32]) -> Result<()>;
}

/// How much of a layer a fed pass computes. What is left out is zeros: where every value of interest is fed, so are its inputs, and the
/// rest need not be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    All,
    /// Attention only, for the keys and values that it stores.
    Attention,
    Nothing,
}

/// `B` with tensors that a [`Feed`] can reach.
pub struct Fed<'a, B> {
    inner: &'a B,
    /// What is computed at present.
    work: Cell<Work>,
    /// Whether the stages inside fused ops are fed too, by running their plain bodies.
    unfused: bool,
}

/// A tensor, or expert ids, of the inner backend. Taken out only while a fused op of it runs.
pub struct Slot<T>(RefCell<Option<T>>);

/// Wants what a fused op leaves in its buffers, which is looked at once the op is done.
struct LooksLater;

impl<B: Backend> Probe<B> for LooksLater {
    fn begin(&mut self, _: &Batch) {}
    fn wants(&self, _: Stage, _: usize) -> bool {
        true
    }
    fn seen(&mut self, _: &B, _: Stage, _: usize, _: View<'_, B>) -> Result<()> {
        Ok(())
    }
}

/// Shows stages to a watch, then feeds them.
pub struct Feeding<'a> {
    pub watch: &'a mut dyn Watch,
    pub feed: &'a mut dyn Feed,
}

impl<'a, B: Backend> Fed<'a, B> {
    /// With `unfused`, fusable ops run their plain bodies. So they do anyway where the backend has no others: then nothing changes but
    /// that their interior can be fed.
    pub fn new(inner: &'a B, unfused: bool) -> Fed<'a, B> {
        Fed { inner, work: Cell::new(Work::All), unfused: unfused || INTERIOR.iter().all(|&s| inner.shows(s)) }
    }
}

impl<T> Slot<T> {
    fn new(value: T) -> Slot<T> {
        Slot(RefCell::new(Some(value)))
    }

    fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        f(self.0.borrow().as_ref().expect("no fused op is running"))
    }

    fn with_mut<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(self.0.borrow_mut().as_mut().expect("no fused op is running"))
    }

    fn take(&self) -> T {
        self.0.borrow_mut().take().expect("no fused op is running")
    }

    fn put(&self, value: T) {
        *self.0.borrow_mut() = Some(value);
    }
}

impl<B: Backend> Probe<Fed<'_, B>> for Feeding<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.watch.begin(batch);
        self.feed.begin(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        Watch::wants(&self.watch, stage, layer)
    }

    fn seen(&mut self, b: &Fed<'_, B>, stage: Stage, layer: usize, view: View<'_, Fed<'_, B>>) -> Result<()> {
        let result = match view {
            View::Values { tensor, cols } => tensor.with_mut(|t| {
                let shown = View::Values { tensor: &*t, cols: cols.clone() };
                Probe::<B>::seen(&mut self.watch, b.inner, stage, layer, shown)?;
                if self.feed.has(stage, layer) { self.feed_tensor(b.inner, stage, layer, t, cols) } else { Ok(()) }
            }),
            View::Ids(ids) => ids.with_mut(|ids| {
                Probe::<B>::seen(&mut self.watch, b.inner, stage, layer, View::Ids(ids))?;
                if self.feed.has(stage, layer) { self.feed_ids(b.inner, stage, layer, ids) } else { Ok(()) }
            }),
        };
        b.work.set(self.feed.work(if stage == Stage::PostFfnResidual { layer + 1 } else { layer }));
        result
    }
}

impl Feeding<'_> {
    fn feed_tensor<B: Backend>(
        &mut self,
        b: &B,
        stage: Stage,
        layer: usize,
        t: &mut B::Tensor,
        cols: Range<usize>,
    ) -> Result<()> {
        let ((n_rows, n_cols), mut all) = (b.shape(t), Vec::new());
        b.read(t, &mut all)?;
        let mut part: Vec<f32> = all.chunks_exact(n_cols).flat_map(|row| &row[cols.clone()]).copied().collect();
        self.feed.replace(stage, layer, n_rows, &mut part)?;
        for (row, new) in all.chunks_exact_mut(n_cols).zip(part.chunks_exact(cols.len())) {
            row[cols.clone()].copy_from_slice(new);
        }
        b.write(t, &all)
    }

    fn feed_ids<B: Backend>(&mut self, b: &B, stage: Stage, layer: usize, ids: &mut B::Ids) -> Result<()> {
        let mut all = Vec::new();
        let (n_rows, _) = b.read_ids(ids, &mut all)?;
        let mut values: Vec<f32> = all.iter().map(|&id| id as f32).collect();
        self.feed.replace(stage, layer, n_rows, &mut values)?;
        b.write_ids(ids, &values.iter().map(|&v| v as u32).collect::<Vec<_>>())
    }
}

/// Calls `f` with the inner backend's buffers of a feed-forward block.
fn with_scratch<T, R>(s: &FfnScratch<Slot<T>>, f: impl FnOnce(&mut FfnScratch<T>) -> R) -> R {
    let mut inner = FfnScratch { gate: s.gate.take(), up: s.up.take(), down: s.down.take() };
    let result = f(&mut inner);
    s.gate.put(inner.gate);
    s.up.put(inner.up);
    s.down.put(inner.down);
    result
}

/// Calls `f` with the inner backend's routing.
fn with_routing<T, I, R>(r: &Routing<Slot<T>, Slot<I>>, f: impl FnOnce(&mut Routing<T, I>) -> R) -> R {
    let mut inner = Routing { logits: r.logits.take(), ids: r.ids.take(), weights: r.weights.take() };
    let result = f(&mut inner);
    r.logits.put(inner.logits);
    r.ids.put(inner.ids);
    r.weights.put(inner.weights);
    result
}

impl<B: Backend> Fed<'_, B> {
    /// Whether ops other than attention are left out at present.
    fn skips(&self) -> bool {
        self.work.get() != Work::All
    }

    /// Gives a tensor rows of zeros.
    fn blank(&self, t: &Slot<B::Tensor>, n_rows: usize) -> Result<()> {
        t.with_mut(|t| self.inner.write(t, &vec![0.0; n_rows * self.inner.shape(t).1]))
    }

    /// Shows what a fused op has left in its buffers.
    fn show_left<P: Probe<Self>>(&self, left: &[(Stage, &Slot<B::Tensor>)], il: usize, probe: &mut P) -> Result<()> {
        for &(stage, t) in left {
            if self.inner.shows(stage) {
                seen(probe, self, stage, il, t)?;
            }
        }
        Ok(())
    }
}

impl<B: Backend> Backend for Fed<'_, B> {
    type Tensor = Slot<B::Tensor>;
    type Ids = Slot<B::Ids>;
    type Weight = B::Weight;
    type KvCache = B::KvCache;

    fn precision(&self) -> Precision {
        self.inner.precision()
    }

    fn shows(&self, stage: Stage) -> bool {
        let of_attention = matches!(stage, Stage::AttnScores | Stage::AttnSoftmax);
        !of_attention && (self.unfused && INTERIOR.contains(&stage) || self.inner.shows(stage))
    }

    fn upload(&self, data: &WeightData) -> Result<B::Weight> {
        self.inner.upload(data)
    }

    fn tensor(&self, n_cols: usize, consumers: &[&B::Weight]) -> Self::Tensor {
        Slot::new(self.inner.tensor(n_cols, consumers))
    }

    fn ids(&self, n_cols: usize) -> Self::Ids {
        Slot::new(self.inner.ids(n_cols))
    }

    fn shape(&self, t: &Self::Tensor) -> (usize, usize) {
        t.with(|t| self.inner.shape(t))
    }

    fn read(&self, t: &Self::Tensor, out: &mut Vec<f32>) -> Result<()> {
        t.with(|t| self.inner.read(t, out))
    }

    fn write(&self, t: &mut Self::Tensor, values: &[f32]) -> Result<()> {
        t.with_mut(|t| self.inner.write(t, values))
    }

    fn read_row(&self, t: &Self::Tensor, row: usize, out: &mut Vec<f32>) -> Result<()> {
        t.with(|t| self.inner.read_row(t, row, out))
    }

    fn read_ids(&self, ids: &Self::Ids, out: &mut Vec<u32>) -> Result<(usize, usize)> {
        ids.with(|ids| self.inner.read_ids(ids, out))
    }

    fn ids_shape(&self, ids: &Self::Ids) -> (usize, usize) {
        ids.with(|ids| self.inner.ids_shape(ids))
    }

    fn write_ids(&self, ids: &mut Self::Ids, values: &[u32]) -> Result<()> {
        ids.with_mut(|ids| self.inner.write_ids(ids, values))
    }

    fn kv_block_bytes(&self, shape: &KvShape) -> usize {
        self.inner.kv_block_bytes(shape)
    }

    fn kv_cache(&self, shape: KvShape) -> B::KvCache {
        self.inner.kv_cache(shape)
    }

    fn kv_reserve(&self, kv: &mut B::KvCache, n_blocks: usize) -> Result<()> {
        self.inner.kv_reserve(kv, n_blocks)
    }

    fn kv_save(&self, kv: &B::KvCache, block: u32, out: &mut Vec<u8>) -> Result<()> {
        self.inner.kv_save(kv, block, out)
    }

    fn kv_restore(&self, kv: &mut B::KvCache, block: u32, saved: &[u8]) -> Result<()> {
        self.inner.kv_restore(kv, block, saved)
    }

    fn embed(&self, out: &mut Self::Tensor, table: &B::Weight, batch: &Batch) -> Result<()> {
        out.with_mut(|out| self.inner.embed(out, table, batch))
    }

    fn rms_norm(&self, out: &mut Self::Tensor, x: &Self::Tensor, w: &B::Weight, eps: f32) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(x).0);
        }
        out.with_mut(|out| x.with(|x| self.inner.rms_norm(out, x, w, eps)))
    }

    fn matmul(&self, out: &mut Self::Tensor, at: usize, w: &B::Weight, x: &Self::Tensor) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(x).0);
        }
        out.with_mut(|out| x.with(|x| self.inner.matmul(out, at, w, x)))
    }

    fn add_bias(&self, x: &mut Self::Tensor, at: usize, bias: &B::Weight) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| self.inner.add_bias(x, at, bias))
    }

    fn head_norm(&self, x: &mut Self::Tensor, cols: Range<usize>, w: &B::Weight, eps: f32) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| self.inner.head_norm(x, cols, w, eps))
    }

    fn rope(
        &self,
        x: &mut Self::Tensor,
        cols: Range<usize>,
        head_dim: usize,
        rope: &Rope,
        batch: &Batch,
    ) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| self.inner.rope(x, cols, head_dim, rope, batch))
    }

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kv: &mut B::KvCache,
        il: usize,
        heads: Heads,
        batch: &Batch,
        _: &mut P,
    ) -> Result<()> {
        if self.work.get() == Work::Nothing {
            return self.blank(out, self.shape(qkv).0);
        }
        out.with_mut(|out| qkv.with(|qkv| self.inner.attention(out, qkv, kv, il, heads, batch, &mut NoProbe)))
    }

    fn keep_rows(&self, x: &mut Self::Tensor, rows: &[u32]) -> Result<()> {
        x.with_mut(|x| self.inner.keep_rows(x, rows))
    }

    fn route(&self, routing: &mut Routing<Self::Tensor, Self::Ids>) -> Result<()> {
        if self.skips() {
            let n_rows = self.shape(&routing.logits).0;
            let n_ids = n_rows * self.ids_shape(&routing.ids).1;
            self.blank(&routing.weights, n_rows)?;
            return self.write_ids(&mut routing.ids, &vec![0; n_ids]);
        }
        with_routing(routing, |r| self.inner.route(r))
    }

    fn matmul_experts(&self, out: &mut Self::Tensor, w: &B::Weight, ids: &Self::Ids, x: &Self::Tensor) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(x).0);
        }
        out.with_mut(|out| ids.with(|ids| x.with(|x| self.inner.matmul_experts(out, w, ids, x))))
    }

    fn silu(&self, x: &mut Self::Tensor) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| self.inner.silu(x))
    }

    fn mul(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| y.with(|y| self.inner.mul(x, y)))
    }

    fn weighted_sum(&self, out: &mut Self::Tensor, x: &Self::Tensor, weights: &Self::Tensor) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(weights).0);
        }
        out.with_mut(|out| x.with(|x| weights.with(|w| self.inner.weighted_sum(out, x, w))))
    }

    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()> {
        if self.skips() {
            return Ok(());
        }
        x.with_mut(|x| y.with(|y| self.inner.add(x, y)))
    }

    fn dense_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<B::Weight>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(x).0);
        }
        if self.unfused {
            return unfused::dense_ffn(self, out, s, w, x, il, probe);
        }
        out.with_mut(|out| x.with(|x| with_scratch(s, |s| self.inner.dense_ffn(out, s, w, x, il, &mut NoProbe))))?;
        self.show_left(&[(Stage::FfnUp, &s.up), (Stage::FfnSwigl, &s.gate)], il, probe)
    }

    fn experts_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<B::Weight>,
        routing: &Routing<Self::Tensor, Self::Ids>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        if self.skips() {
            return self.blank(out, self.shape(x).0);
        }
        if self.unfused {
            return unfused::experts_ffn(self, out, s, w, routing, x, il, probe);
        }
        out.with_mut(|out| {
            x.with(|x| {
                with_routing(routing, |r| {
                    with_scratch(s, |s| self.inner.experts_ffn(out, s, w, r, x, il, &mut LooksLater))
                })
            })
        })?;
        let left = [(Stage::MoeExpertUp, &s.up), (Stage::MoeExpertSwigl, &s.gate), (Stage::MoeExpertOut, &s.down)];
        self.show_left(&left, il, probe)
    }
}
