//! A backend with one deliberate mistake, for tests that show that mistakes are noticed. Nothing else uses it.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::decorator::{Through, delegate};
use super::{Backend, BackendError, Bytes, FfnScratch, FfnWeights, Heads, Result, Routing, WeightData};
use crate::batch::{Batch, Row};
use crate::probe::Probe;
use crate::qtype::GgmlType;
use crate::rope::Rope;
use crate::stage::Stage;

/// The mistakes that forward passes have been found to make, or could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Queries and keys are not normalised per head.
    DropHeadNorm,
    /// Q6_K tensors are decoded as if they were Q4_K.
    ReadQ6kAsQ4k,
    /// Experts 0 and 1 of every expert tensor trade places.
    SwapExperts,
    /// Weights of the chosen experts are not renormalised to sum to 1.
    SkipRenormalise,
    /// Keys and values go one position too far. Needs a free slot after the batch's last position.
    KvOffByOne,
    /// Heads rotate as if the base were 1 % larger.
    WrongRopeBase,
    /// The chosen experts have equal weights.
    UniformWeights,
    /// The first chosen expert has weight 0, and the others sum to 1 without it.
    DropTopExpert,
    /// The second chosen expert is the first one again.
    RepeatExpert,
    /// The last chosen expert is the least likely one.
    WrongExpert,
    /// Attention's first output is not a number.
    NanInAttention,
    /// Norms take what is not a number for 0.
    HideNan,
    /// Rows that want no logits are not dropped.
    KeepAllRows,
    /// Attention depends on how often it has been called.
    Unsteady,
    /// Attention differs when someone looks at it.
    WatchedDiffers,
    /// Feed-forward blocks differ from their plain bodies.
    FusedDiffers,
    /// Attention sees the tokens of its own step only.
    ForgetEarlierSteps,
    /// A step of one token attends otherwise than a step of many.
    DecodeDiffers,
    /// Attention of a sequence takes in a little of another in its batch.
    NeighbourLeaks,
    /// A KV block that is restored has lost its first byte of every four.
    KvRestoreForgets,
    /// There is memory for [`N_KV_BLOCK`] blocks of keys and values only.
    KvMemoryEnds,
    /// The device fails in a step in which a sequence comes to position [`LAST_POSITION`], and works in all others.
    DeviceFails,
}

/// Blocks that there is memory for under [`Fault::KvMemoryEnds`].
pub const N_KV_BLOCK: usize = 7;

/// The position at which a device fails under [`Fault::DeviceFails`].
pub const LAST_POSITION: u32 = 200;

impl Fault {
    /// Every fault.
    pub const ALL: [Fault; 22] = [
        Fault::DropHeadNorm,
        Fault::ReadQ6kAsQ4k,
        Fault::SwapExperts,
        Fault::SkipRenormalise,
        Fault::KvOffByOne,
        Fault::WrongRopeBase,
        Fault::UniformWeights,
        Fault::DropTopExpert,
        Fault::RepeatExpert,
        Fault::WrongExpert,
        Fault::NanInAttention,
        Fault::HideNan,
        Fault::KeepAllRows,
        Fault::Unsteady,
        Fault::WatchedDiffers,
        Fault::FusedDiffers,
        Fault::ForgetEarlierSteps,
        Fault::DecodeDiffers,
        Fault::NeighbourLeaks,
        Fault::KvRestoreForgets,
        Fault::KvMemoryEnds,
        Fault::DeviceFails,
    ];

    /// The fault of this name, which is that of its variant.
    pub fn named(name: &str) -> Option<Fault> {
        Fault::ALL.into_iter().find(|f| format!("{f:?}") == name)
    }
}

/// `B`, making one mistake.
pub struct Faulty<B>(pub B, pub Fault);

/// How far the faults that scale a result are off: far above the rounding of floats, and not much else.
const OFF: f32 = 1.01;

/// Calls of attention under [`Fault::Unsteady`], in all backends.
static N_CALL: AtomicU32 = AtomicU32::new(0);

impl<B: Backend> Faulty<B> {
    fn makes(&self, fault: Fault) -> bool {
        self.1 == fault
    }

    /// Changes the rows of a tensor.
    fn change(&self, t: &mut B::Tensor, mut f: impl FnMut(&mut [f32])) -> Result<()> {
        let (n_cols, mut values) = (self.0.shape(t).1, Vec::new());
        self.0.read(t, &mut values)?;
        values.chunks_exact_mut(n_cols).for_each(&mut f);
        self.0.write(t, &values)
    }

    /// Where attention believes that the rows of a batch are.
    fn misplaced(&self, batch: &Batch) -> Batch {
        let first = |row: &Row| batch.rows().iter().filter(|r| r.sequence == row.sequence).map(|r| r.position).min();
        let position = |row: &Row| match self.1 {
            Fault::KvOffByOne => row.position + 1,
            Fault::ForgetEarlierSteps => row.position - first(row).unwrap_or(0),
            _ => row.position,
        };
        let rows = batch.rows().iter().map(|r| Row { position: position(r), ..*r }).collect();
        Batch::new(rows, batch.tables().to_vec())
    }

    /// Spoils what attention gave.
    fn spoil_attention(&self, out: &mut B::Tensor, batch: &Batch, is_watched: bool) -> Result<()> {
        let scale = match self.1 {
            Fault::Unsteady => 1.0 + (OFF - 1.0) * (N_CALL.fetch_add(1, Ordering::Relaxed) % 1009) as f32 / 100.0,
            Fault::WatchedDiffers if is_watched => OFF,
            Fault::DecodeDiffers if batch.rows().len() == 1 => OFF,
            Fault::NanInAttention | Fault::NeighbourLeaks => 1.0,
            _ => return Ok(()),
        };
        let leaks = self.makes(Fault::NeighbourLeaks) && batch.tables().len() > 1;
        let (mut i, mut first) = (0, Vec::new());
        self.change(out, |row| {
            row.iter_mut().for_each(|v| *v *= scale);
            if i == 0 && self.makes(Fault::NanInAttention) {
                row[0] = f32::NAN;
            }
            if leaks {
                first.extend_from_slice(&row[..if i == 0 { row.len() } else { 0 }]);
                row.iter_mut().zip(&first).for_each(|(v, f)| *v += (OFF - 1.0) * f);
            }
            i += 1;
        })
    }
}

/// Spoils the routing of one token.
fn spoil_routing(fault: Fault, logits: &[f32], ids: &mut [u32], weights: &mut [f32]) {
    let (k, exp) = (weights.len(), |e: &u32| logits[*e as usize].exp());
    match fault {
        Fault::SkipRenormalise => {
            let share = ids.iter().map(exp).sum::<f32>() / logits.iter().map(|l| l.exp()).sum::<f32>();
            weights.iter_mut().for_each(|w| *w *= share);
        }
        Fault::UniformWeights => weights.fill(1.0 / k as f32),
        Fault::DropTopExpert => {
            let rest = 1.0 - weights[0];
            weights[0] = 0.0;
            weights.iter_mut().for_each(|w| *w /= rest);
        }
        Fault::RepeatExpert if k > 1 => ids[1] = ids[0],
        Fault::WrongExpert => {
            let least = (0..logits.len()).min_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            ids[k - 1] = least.map_or(0, |e| e as u32);
        }
        _ => {}
    }
}

impl<B: Backend> Backend for Faulty<B> {
    delegate!(types);
    delegate!(precision);
    delegate!(products);

    fn shows(&self, stage: Stage) -> bool {
        self.0.shows(stage)
    }

    fn upload(&self, data: &WeightData) -> Result<Self::Weight> {
        let mut data = data.clone();
        if self.makes(Fault::ReadQ6kAsQ4k) && data.qtype == GgmlType::Q6_K {
            data.qtype = GgmlType::Q4_K;
        }
        if self.makes(Fault::SwapExperts) && data.n_mat > 1 {
            let n = data.n_rows * data.row_bytes();
            let swapped = [&data.bytes[n..2 * n], &data.bytes[..n], &data.bytes[2 * n..]].concat();
            data.bytes = Bytes::from_vec(swapped);
        }
        self.0.upload(&data)
    }

    fn kv_reserve(&self, kv: &mut Self::KvCache, n_blocks: usize) -> Result<()> {
        if self.makes(Fault::KvMemoryEnds) && n_blocks > N_KV_BLOCK {
            return Err(BackendError::OutOfMemory { what: format!("KV block {N_KV_BLOCK}"), need_bytes: 1 });
        }
        self.0.kv_reserve(kv, n_blocks)
    }

    fn kv_restore(&self, kv: &mut Self::KvCache, block: u32, saved: &[u8]) -> Result<()> {
        let mut saved = saved.to_vec();
        if self.makes(Fault::KvRestoreForgets) {
            saved.iter_mut().step_by(4).for_each(|b| *b = 0);
        }
        self.0.kv_restore(kv, block, &saved)
    }

    fn rms_norm(&self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Weight, eps: f32) -> Result<()> {
        if !self.makes(Fault::HideNan) {
            return self.0.rms_norm(out, x, w, eps);
        }
        let (mut values, mut shown) = (Vec::new(), self.0.tensor(self.0.shape(x).1, &[]));
        self.0.read(x, &mut values)?;
        values.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.0);
        self.0.write(&mut shown, &values)?;
        self.0.rms_norm(out, &shown, w, eps)
    }

    fn head_norm(&self, x: &mut Self::Tensor, cols: Range<usize>, w: &Self::Weight, eps: f32) -> Result<()> {
        if self.makes(Fault::DropHeadNorm) { Ok(()) } else { self.0.head_norm(x, cols, w, eps) }
    }

    fn rope(
        &self,
        x: &mut Self::Tensor,
        cols: Range<usize>,
        head_dim: usize,
        rope: &Rope,
        batch: &Batch,
    ) -> Result<()> {
        let mut rope = rope.clone();
        if self.makes(Fault::WrongRopeBase) {
            let n = rope.inv_freq.len() as f32;
            rope.inv_freq.iter_mut().enumerate().for_each(|(i, f)| *f /= OFF.powf(i as f32 / n));
        }
        self.0.rope(x, cols, head_dim, &rope, batch)
    }

    fn keep_rows(&self, x: &mut Self::Tensor, rows: &[u32]) -> Result<()> {
        if self.makes(Fault::KeepAllRows) { Ok(()) } else { self.0.keep_rows(x, rows) }
    }

    fn route(&self, r: &mut Routing<Self::Tensor, Self::Ids>) -> Result<()> {
        self.0.route(r)?;
        let (mut logits, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        self.0.read(&r.logits, &mut logits)?;
        self.0.read(&r.weights, &mut weights)?;
        let (_, k) = self.0.read_ids(&r.ids, &mut ids)?;
        let rows = logits.chunks_exact(self.0.shape(&r.logits).1).zip(ids.chunks_exact_mut(k));
        for ((logits, ids), weights) in rows.zip(weights.chunks_exact_mut(k)) {
            spoil_routing(self.1, logits, ids, weights);
        }
        self.0.write_ids(&mut r.ids, &ids)?;
        self.0.write(&mut r.weights, &weights)
    }

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kv: &mut Self::KvCache,
        il: usize,
        heads: Heads,
        batch: &Batch,
        probe: &mut P,
    ) -> Result<()> {
        if self.makes(Fault::DeviceFails) && batch.rows().iter().any(|r| r.position >= LAST_POSITION) {
            let (device, what) = ("a device".to_string(), "it does not answer".to_string());
            return Err(BackendError::Device { device, what });
        }
        let is_watched = probe.wants(Stage::Attention, il);
        let mut probe = Through { outer: self, probe };
        self.0.attention(out, qkv, kv, il, heads, &self.misplaced(batch), &mut probe)?;
        self.spoil_attention(out, batch, is_watched)
    }

    fn dense_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<Self::Weight>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        self.0.dense_ffn(out, s, w, x, il, &mut Through { outer: self, probe })?;
        if self.makes(Fault::FusedDiffers) {
            self.change(out, |row| row.iter_mut().for_each(|v| *v *= OFF))?;
        }
        Ok(())
    }

    fn experts_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<Self::Weight>,
        routing: &Routing<Self::Tensor, Self::Ids>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        self.0.experts_ffn(out, s, w, routing, x, il, &mut Through { outer: self, probe })?;
        if self.makes(Fault::FusedDiffers) {
            self.change(out, |row| row.iter_mut().for_each(|v| *v *= OFF))?;
        }
        Ok(())
    }
}
