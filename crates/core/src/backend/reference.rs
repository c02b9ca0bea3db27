//! The reference backend: weights dequantized, products summed in 64-bit floats, plain loops, no tricks.
//!
//! Slow and obviously right. The kernel suite and the tests judge every other backend by it.

use std::ops::Range;

use half::f16;

use super::{Backend, Heads, KV_BLOCK, KvShape, KvType, Precision, Result, Routing, WeightData};
use crate::batch::Batch;
use crate::probe::{Probe, seen};
use crate::qtype;
use crate::rope::Rope;
use crate::stage::Stage;

/// Runs models on the host in plain loops.
#[derive(Clone, Copy, Default)]
pub struct Reference;

/// Rows of floats on the host.
pub struct HostTensor {
    /// `[n_rows, n_cols]`
    pub data: Vec<f32>,
    pub n_cols: usize,
}

/// Rows of expert ids on the host.
pub struct HostIds {
    /// `[n_rows, n_cols]`
    pub data: Vec<u32>,
    pub n_cols: usize,
}

/// Keys and values as the floats that the cache's type can hold.
pub struct HostKv {
    pub(super) shape: KvShape,
    pub(super) rounding: Rounding,
    /// One per block: `[n_layer, 2 (key, value), n_head_kv, KV_BLOCK, head_dim]`
    blocks: Vec<Vec<f32>>,
}

/// What keys, values and weights are before they are multiplied.
pub(super) struct Rounding {
    /// Rounds a head's key (`part` 0) or value (1) to what is stored.
    pub part: fn(KvType, usize, &mut [f32]),
    /// Rounds the softmax of a query over a block's positions, given the values that they meet.
    pub weights: fn(&mut [f32], &[&[f32]]),
}

impl HostTensor {
    fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(self.n_cols)
    }

    fn n_rows(&self) -> usize {
        self.data.len() / self.n_cols
    }

    /// Gives the tensor `n_rows` rows of zeros.
    fn reset(&mut self, n_rows: usize) {
        self.data.clear();
        self.data.resize(n_rows * self.n_cols, 0.0);
    }
}

impl HostKv {
    /// Where one position's key (`part` 0) or value (1) of a head lies in its block.
    fn at(&self, il: usize, part: usize, head: usize, slot: usize) -> Range<usize> {
        let s = &self.shape;
        let at = (((il * 2 + part) * s.n_head_kv + head) * KV_BLOCK + slot) * s.head_dim;
        at..at + s.head_dim
    }
}

/// Rounds values to what the KV type can hold.
pub fn round_kv(kv_type: KvType, x: &mut [f32]) {
    match kv_type {
        KvType::F32 => {}
        KvType::F16 => x.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        KvType::Q8_0 => {
            for block in x.chunks_mut(32) {
                let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                let d = f16::from_f32(largest / 127.0).to_f32();
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                block.iter_mut().for_each(|v| *v = (*v * inverse).round_ties_even().clamp(-127.0, 127.0) * d);
            }
        }
    }
}

/// `Σ a b` in 64-bit floats.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}

/// Mean square of `x` in 64-bit floats.
fn mean_square(x: &[f32]) -> f64 {
    x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64
}

fn normalise(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (mean_square(x) + f64::from(eps)).sqrt();
    for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *o = (f64::from(x) * scale) as f32 * w;
    }
}

/// Row `row` of matrix `mat` as floats.
fn dequantized(w: &WeightData, mat: usize, row: usize) -> Vec<f32> {
    let n = w.row_bytes();
    let at = (mat * w.n_rows + row) * n;
    let mut out = vec![0.0; w.n_cols];
    qtype::dequantize_row(w.qtype, &w.bytes[at..at + n], &mut out);
    out
}

/// Softmax in place, in 64-bit floats.
fn softmax(x: &mut [f32]) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = x.iter().map(|&v| (f64::from(v) - f64::from(largest)).exp()).collect();
    let sum: f64 = exp.iter().sum();
    x.iter_mut().zip(exp).for_each(|(x, e)| *x = (e / sum) as f32);
}

impl Backend for Reference {
    type Tensor = HostTensor;
    type Ids = HostIds;
    type Weight = WeightData;
    type KvCache = HostKv;

    fn precision(&self) -> Precision {
        Precision::F32
    }

    fn shows(&self, _: Stage) -> bool {
        true
    }

    fn upload(&self, data: &WeightData) -> Result<WeightData> {
        Ok(data.clone())
    }

    fn tensor(&self, n_cols: usize, _: &[&WeightData]) -> HostTensor {
        HostTensor { data: Vec::new(), n_cols }
    }

    fn ids(&self, n_cols: usize) -> HostIds {
        HostIds { data: Vec::new(), n_cols }
    }

    fn shape(&self, t: &HostTensor) -> (usize, usize) {
        (t.n_rows(), t.n_cols)
    }

    fn read(&self, t: &HostTensor, out: &mut Vec<f32>) -> Result<()> {
        out.clone_from(&t.data);
        Ok(())
    }

    fn write(&self, t: &mut HostTensor, values: &[f32]) -> Result<()> {
        t.data.clear();
        t.data.extend_from_slice(values);
        Ok(())
    }

    fn read_row(&self, t: &HostTensor, row: usize, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&t.data[row * t.n_cols..(row + 1) * t.n_cols]);
        Ok(())
    }

    fn read_ids(&self, ids: &HostIds, out: &mut Vec<u32>) -> Result<(usize, usize)> {
        out.clone_from(&ids.data);
        Ok(self.ids_shape(ids))
    }

    fn ids_shape(&self, ids: &HostIds) -> (usize, usize) {
        (ids.data.len() / ids.n_cols, ids.n_cols)
    }

    fn write_ids(&self, ids: &mut HostIds, values: &[u32]) -> Result<()> {
        ids.data.clear();
        ids.data.extend_from_slice(values);
        Ok(())
    }

    fn kv_cache(&self, shape: KvShape) -> HostKv {
        let rounding = Rounding { part: |kv_type, _, x| round_kv(kv_type, x), weights: |_, _| {} };
        HostKv { shape, rounding, blocks: Vec::new() }
    }

    fn kv_reserve(&self, kv: &mut HostKv, n_blocks: usize) -> Result<()> {
        let s = kv.shape;
        while kv.blocks.len() < n_blocks {
            kv.blocks.push(vec![0.0; 2 * s.n_layer * s.n_head_kv * KV_BLOCK * s.head_dim]);
        }
        Ok(())
    }

    fn kv_save(&self, kv: &HostKv, block: u32, out: &mut Vec<u8>) -> Result<()> {
        out.extend_from_slice(bytemuck::cast_slice(&kv.blocks[block as usize]));
        Ok(())
    }

    fn kv_restore(&self, kv: &mut HostKv, block: u32, saved: &[u8]) -> Result<()> {
        let block: &mut [u8] = bytemuck::cast_slice_mut(&mut kv.blocks[block as usize]);
        super::check_restore(block.len(), saved.len())?;
        block.copy_from_slice(saved);
        Ok(())
    }

    fn embed(&self, out: &mut HostTensor, table: &WeightData, batch: &Batch) -> Result<()> {
        out.reset(0);
        batch.rows().iter().for_each(|row| out.data.extend(dequantized(table, 0, row.token as usize)));
        Ok(())
    }

    fn rms_norm(&self, out: &mut HostTensor, x: &HostTensor, w: &WeightData, eps: f32) -> Result<()> {
        let w = dequantized(w, 0, 0);
        out.reset(x.n_rows());
        x.rows().zip(out.data.chunks_exact_mut(x.n_cols)).for_each(|(x, out)| normalise(x, &w, eps, out));
        Ok(())
    }

    fn matmul(&self, out: &mut HostTensor, at: usize, w: &WeightData, x: &HostTensor) -> Result<()> {
        if out.n_rows() != x.n_rows() {
            out.reset(x.n_rows());
        }
        for j in 0..w.n_rows {
            let row = dequantized(w, 0, j);
            let n = out.n_cols;
            x.rows().zip(out.data.chunks_exact_mut(n)).for_each(|(x, out)| out[at + j] = dot(&row, x));
        }
        Ok(())
    }

    fn add_bias(&self, x: &mut HostTensor, at: usize, bias: &WeightData) -> Result<()> {
        let b = dequantized(bias, 0, 0);
        for row in x.data.chunks_exact_mut(x.n_cols) {
            row[at..at + b.len()].iter_mut().zip(&b).for_each(|(x, b)| *x += b);
        }
        Ok(())
    }

    fn head_norm(&self, x: &mut HostTensor, cols: Range<usize>, w: &WeightData, eps: f32) -> Result<()> {
        let w = dequantized(w, 0, 0);
        for row in x.data.chunks_exact_mut(x.n_cols) {
            for head in row[cols.clone()].chunks_exact_mut(w.len()) {
                let before = head.to_vec();
                normalise(&before, &w, eps, head);
            }
        }
        Ok(())
    }

    fn rope(&self, x: &mut HostTensor, cols: Range<usize>, head_dim: usize, rope: &Rope, batch: &Batch) -> Result<()> {
        let n_pair = rope.inv_freq.len();
        let (mut cos, mut sin) = (vec![0.0; n_pair], vec![0.0; n_pair]);
        for (row, at) in x.data.chunks_exact_mut(x.n_cols).zip(batch.rows()) {
            rope.angles(at.position, &mut cos, &mut sin);
            row[cols.clone()].chunks_exact_mut(head_dim).for_each(|head| rope.rotate(head, &cos, &sin));
        }
        Ok(())
    }

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut HostTensor,
        qkv: &HostTensor,
        kv: &mut HostKv,
        il: usize,
        heads: Heads,
        batch: &Batch,
        probe: &mut P,
    ) -> Result<()> {
        store_kv(kv, qkv, il, heads, batch);
        let n_kv = batch.rows().iter().map(|r| r.position as usize + 1).max().unwrap_or(0);
        let kept = probe.wants(Stage::AttnScores, il) || probe.wants(Stage::AttnSoftmax, il);
        let table = |n| HostTensor { data: vec![0.0; n], n_cols: heads.n_head * n_kv };
        let n_kept = if kept { batch.rows().len() * heads.n_head * n_kv } else { 0 };
        let (mut all_scores, mut all_softmax) = (table(n_kept), table(n_kept));
        out.reset(qkv.n_rows());
        for (i, (row, q)) in batch.rows().iter().zip(qkv.rows()).enumerate() {
            let n = row.position as usize + 1;
            let place = |p: usize| (batch.table(row.sequence)[p / KV_BLOCK] as usize, p % KV_BLOCK);
            for h in 0..heads.n_head {
                let head_kv = h / (heads.n_head / heads.n_head_kv);
                let q = &q[h * heads.head_dim..(h + 1) * heads.head_dim];
                let mut scores: Vec<f32> = (0..n)
                    .map(place)
                    .map(|(b, slot)| {
                        dot(q, &kv.blocks[b][kv.at(il, 0, head_kv, slot)]) / (heads.head_dim as f32).sqrt()
                    })
                    .collect();
                let at = (i * heads.n_head + h) * n_kv;
                if kept {
                    all_scores.data[at..at + n].copy_from_slice(&scores);
                }
                softmax(&mut scores);
                if kept {
                    all_softmax.data[at..at + n].copy_from_slice(&scores);
                }
                let mut sum = vec![0f64; heads.head_dim];
                for (first, weights) in (0..n).step_by(KV_BLOCK).zip(scores.chunks_mut(KV_BLOCK)) {
                    let value = |slot| &kv.blocks[place(first).0][kv.at(il, 1, head_kv, slot)];
                    let values: Vec<&[f32]> = (0..weights.len()).map(value).collect();
                    (kv.rounding.weights)(weights, &values);
                    for (&weight, v) in weights.iter().zip(values) {
                        sum.iter_mut().zip(v).for_each(|(s, &v)| *s += f64::from(weight) * f64::from(v));
                    }
                }
                let o = &mut out.data[i * out.n_cols + h * heads.head_dim..][..heads.head_dim];
                o.iter_mut().zip(sum).for_each(|(o, s)| *o = s as f32);
            }
        }
        if kept {
            seen(probe, self, Stage::AttnScores, il, &all_scores)?;
            seen(probe, self, Stage::AttnSoftmax, il, &all_softmax)?;
        }
        Ok(())
    }

    fn keep_rows(&self, x: &mut HostTensor, rows: &[u32]) -> Result<()> {
        for (to, &from) in rows.iter().enumerate() {
            let from = from as usize * x.n_cols;
            x.data.copy_within(from..from + x.n_cols, to * x.n_cols);
        }
        x.data.truncate(rows.len() * x.n_cols);
        Ok(())
    }

    fn route(&self, r: &mut Routing<HostTensor, HostIds>) -> Result<()> {
        let k = r.ids.n_cols;
        r.ids.data.clear();
        r.weights.data.clear();
        for logits in r.logits.rows() {
            let mut p = logits.to_vec();
            softmax(&mut p);
            // By logits: what softmax rounds to the same number, or to nothing, is still ordered.
            let mut order: Vec<u32> = (0..p.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let sum: f32 = order[..k].iter().map(|&e| p[e as usize]).sum();
            r.ids.data.extend_from_slice(&order[..k]);
            r.weights.data.extend(order[..k].iter().map(|&e| p[e as usize] / sum));
        }
        Ok(())
    }

    fn matmul_experts(&self, out: &mut HostTensor, w: &WeightData, ids: &HostIds, x: &HostTensor) -> Result<()> {
        let k = ids.n_cols;
        out.reset(x.n_rows());
        for e in 0..w.n_mat {
            let slots: Vec<usize> = (0..ids.data.len()).filter(|&s| ids.data[s] as usize == e).collect();
            for j in 0..if slots.is_empty() { 0 } else { w.n_rows } {
                let row = dequantized(w, e, j);
                for &s in &slots {
                    let part = if x.n_cols == w.n_cols { 0 } else { s % k };
                    let x = &x.data[s / k * x.n_cols + part * w.n_cols..][..w.n_cols];
                    out.data[s * w.n_rows + j] = dot(&row, x);
                }
            }
        }
        Ok(())
    }

    fn silu(&self, x: &mut HostTensor) -> Result<()> {
        x.data.iter_mut().for_each(|v| *v = (f64::from(*v) / (1.0 + (-f64::from(*v)).exp())) as f32);
        Ok(())
    }

    fn mul(&self, x: &mut HostTensor, y: &HostTensor) -> Result<()> {
        x.data.iter_mut().zip(&y.data).for_each(|(x, y)| *x *= y);
        Ok(())
    }

    fn weighted_sum(&self, out: &mut HostTensor, x: &HostTensor, weights: &HostTensor) -> Result<()> {
        out.reset(weights.n_rows());
        let n = out.n_cols;
        for ((out, x), w) in out.data.chunks_exact_mut(n).zip(x.rows()).zip(weights.rows()) {
            for (part, &w) in x.chunks_exact(n).zip(w) {
                out.iter_mut().zip(part).for_each(|(o, v)| *o += w * v);
            }
        }
        Ok(())
    }

    fn add(&self, x: &mut HostTensor, y: &HostTensor) -> Result<()> {
        x.data.iter_mut().zip(&y.data).for_each(|(x, y)| *x += y);
        Ok(())
    }
}

/// Writes the batch's keys and values into their slots, rounded to the cache's type.
fn store_kv(kv: &mut HostKv, qkv: &HostTensor, il: usize, heads: Heads, batch: &Batch) {
    for (row, values) in batch.rows().iter().zip(qkv.rows()) {
        let (block, slot) = batch.slot(row);
        for (part, cols) in [heads.k(), heads.v()].into_iter().enumerate() {
            for (h, head) in values[cols].chunks_exact(heads.head_dim).enumerate() {
                let at = kv.at(il, part, h, slot);
                let to = &mut kv.blocks[block as usize][at];
                to.copy_from_slice(head);
                (kv.rounding.part)(kv.shape.kv_type, part, to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_ordered_by_logits_where_softmax_rounds_them_to_nothing() {
        let tensor = |data: Vec<f32>, n_cols| HostTensor { data, n_cols };
        let mut r = Routing {
            logits: tensor(vec![0.0, 400.0, 100.0, 200.0], 4),
            ids: HostIds { data: Vec::new(), n_cols: 3 },
            weights: tensor(Vec::new(), 3),
        };
        Reference.route(&mut r).unwrap();
        assert_eq!(r.ids.data, [1, 3, 2]);
        assert_eq!(r.weights.data, [1.0, 0.0, 0.0]);
    }
}
