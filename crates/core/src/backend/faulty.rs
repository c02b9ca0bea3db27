//! A backend with one deliberate mistake, for tests that show that mistakes are noticed. Nothing else uses it.

use std::ops::Range;

use super::decorator::{Through, delegate};
use super::{Backend, Bytes, Heads, Result, Routing, WeightData};
use crate::batch::{Batch, Row};
use crate::probe::Probe;
use crate::qtype::GgmlType;
use crate::stage::Stage;

/// The mistakes that forward passes have been found to make.
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
}

/// `B`, making one mistake.
pub struct Faulty<B>(pub B, pub Fault);

impl<B: Backend> Backend for Faulty<B> {
    delegate!(types);
    delegate!(precision);
    delegate!(products);

    fn shows(&self, stage: Stage) -> bool {
        self.0.shows(stage)
    }

    fn upload(&self, data: &WeightData) -> Result<Self::Weight> {
        let mut data = data.clone();
        if self.1 == Fault::ReadQ6kAsQ4k && data.qtype == GgmlType::Q6_K {
            data.qtype = GgmlType::Q4_K;
        }
        if self.1 == Fault::SwapExperts && data.n_mat > 1 {
            let n = data.n_rows * data.row_bytes();
            let swapped = [&data.bytes[n..2 * n], &data.bytes[..n], &data.bytes[2 * n..]].concat();
            data.bytes = Bytes::from_vec(swapped);
        }
        self.0.upload(&data)
    }

    fn head_norm(&self, x: &mut Self::Tensor, cols: Range<usize>, w: &Self::Weight, eps: f32) -> Result<()> {
        if self.1 == Fault::DropHeadNorm { Ok(()) } else { self.0.head_norm(x, cols, w, eps) }
    }

    fn route(&self, r: &mut Routing<Self::Tensor, Self::Ids>) -> Result<()> {
        self.0.route(r)?;
        if self.1 != Fault::SkipRenormalise {
            return Ok(());
        }
        let (mut logits, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        self.0.read(&r.logits, &mut logits)?;
        self.0.read(&r.weights, &mut weights)?;
        let (_, k) = self.0.read_ids(&r.ids, &mut ids)?;
        let n_expert = self.0.shape(&r.logits).1;
        for ((logits, ids), weights) in logits.chunks(n_expert).zip(ids.chunks(k)).zip(weights.chunks_mut(k)) {
            let sum = |logits: &mut dyn Iterator<Item = f32>| logits.map(f32::exp).sum::<f32>();
            let share = sum(&mut ids.iter().map(|&e| logits[e as usize])) / sum(&mut logits.iter().copied());
            weights.iter_mut().for_each(|w| *w *= share);
        }
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
        let mut probe = Through { outer: self, probe };
        let shift = u32::from(self.1 == Fault::KvOffByOne);
        let rows = batch.rows().iter().map(|r| Row { position: r.position + shift, ..*r }).collect();
        let shifted = Batch::new(rows, batch.tables().to_vec());
        self.0.attention(out, qkv, kv, il, heads, &shifted, &mut probe)
    }
}
