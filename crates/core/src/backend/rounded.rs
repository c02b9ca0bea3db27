//! A backend that rounds activations where others declare that they do, and is otherwise the backend it wraps. Around the
//! reference it makes the error that a precision must have, which is the noise that comparisons judge by. In attention it is that
//! of the CPU: a GPU, which multiplies half floats, is judged by it as well.

use super::decorator::{Through, delegate};
use super::reference::{HostKv, Rounding, round_kv};
use super::{Backend, Heads, KvType, Precision, Result, WeightData};
use crate::batch::Batch;
use crate::probe::Probe;
use crate::stage::Stage;

/// `B` with the inputs of quantized weights, queries, keys, values and their weights rounded as [`Precision::Int8`] says.
pub struct Rounded<B>(pub B);

impl<B: Backend<Weight = WeightData, KvCache = HostKv>> Backend for Rounded<B> {
    delegate!(types);
    delegate!(plain);

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kv: &mut HostKv,
        il: usize,
        heads: Heads,
        batch: &Batch,
        probe: &mut P,
    ) -> Result<()> {
        let mut probe = Through { outer: self, probe };
        if kv.shape.kv_type == KvType::F32 {
            return self.0.attention(out, qkv, kv, il, heads, batch, &mut probe);
        }
        kv.rounding = Rounding { part: round_part, weights: round_weights };
        let (mut values, n) = (Vec::new(), heads.n_qkv());
        self.0.read(qkv, &mut values)?;
        for row in values.chunks_exact_mut(n) {
            row[heads.q()].chunks_exact_mut(heads.head_dim).for_each(round_query);
        }
        let mut rounded = self.0.tensor(n, &[]);
        self.0.write(&mut rounded, &values)?;
        self.0.attention(out, &rounded, kv, il, heads, batch, &mut probe)
    }

    fn precision(&self) -> Precision {
        Precision::Int8
    }

    fn shows(&self, stage: Stage) -> bool {
        self.0.shows(stage)
    }

    fn matmul(&self, out: &mut Self::Tensor, at: usize, w: &Self::Weight, x: &Self::Tensor) -> Result<()> {
        self.0.matmul(out, at, w, &self.rounded(x, w)?)
    }

    fn matmul_experts(
        &self,
        out: &mut Self::Tensor,
        w: &Self::Weight,
        ids: &Self::Ids,
        x: &Self::Tensor,
    ) -> Result<()> {
        self.0.matmul_experts(out, w, ids, &self.rounded(x, w)?)
    }
}

impl<B: Backend<Weight = WeightData, KvCache = HostKv>> Rounded<B> {
    /// `x` as a product with `w` sees it.
    fn rounded(&self, x: &B::Tensor, w: &WeightData) -> Result<B::Tensor> {
        let mut values = Vec::new();
        self.0.read(x, &mut values)?;
        if !w.qtype.is_float() {
            values.chunks_exact_mut(w.n_cols).for_each(round_int8);
        }
        let mut out = self.0.tensor(self.0.shape(x).1, &[w]);
        self.0.write(&mut out, &values)?;
        Ok(out)
    }
}

/// Columns that share a float scale.
const SUPER: usize = 256;
/// The largest code.
const MAX_CODE: f32 = 127.0;
/// The largest integer sub-scale, of which every 32 columns have one.
const MAX_SCALE: f32 = 32.0;

/// Rounds a row of activations to 8-bit codes with a float scale per 256 and an integer sub-scale per 32 columns. What is not finite
/// makes NaN of its 256 columns, as it does of every product they take part in.
pub fn round_int8(x: &mut [f32]) {
    let amax = |x: &[f32]| x.iter().fold(0f32, |a, v| a.max(v.abs()));
    for x in x.chunks_mut(SUPER) {
        let d = amax(x) / (MAX_CODE * MAX_SCALE);
        if x.iter().any(|v| !v.is_finite()) {
            x.fill(f32::NAN);
        } else if d < f32::MIN_POSITIVE {
            x.fill(0.0);
        } else {
            for x in x.chunks_mut(32) {
                let scale = (amax(x) / (MAX_CODE * d)).ceil().clamp(1.0, MAX_SCALE) * d;
                x.iter_mut().for_each(|v| *v = (*v / scale).round_ties_even().clamp(-MAX_CODE, MAX_CODE) * scale);
            }
        }
    }
}

/// The length of a query in 16-bit codes: none of them is larger.
pub const QUERY_LENGTH: f32 = 31_000.0;

/// The length in codes that no key exceeds before they are rounded: its product with [`QUERY_LENGTH`] is below 2³¹, rounding of both
/// included.
pub const KEY_LENGTH: f32 = 63_000.0;

/// The largest code of a value.
pub const LARGEST_VALUE: f32 = 16_383.0;

/// The largest code of all.
pub const LARGEST: f32 = 32_767.0;

/// What the codes of a block's weights may amount to before they are rounded: with half a code more for each of its positions and
/// [`LARGEST_VALUE`] it is below 2³¹.
pub const WEIGHTS: f32 = 131_000.0;

/// Rounds a query to codes of 16 bits.
fn round_query(x: &mut [f32]) {
    let length = x.iter().map(|v| v * v).sum::<f32>().sqrt();
    round_to(x, length / QUERY_LENGTH);
}

/// Rounds a key (`part` 0) or value (1) to what a cache of this type holds, and attention multiplies, in codes of 16 bits. Of the type
/// f16 only their number of bits is left.
fn round_part(kv_type: KvType, part: usize, x: &mut [f32]) {
    if kv_type == KvType::Q8_0 {
        round_kv(kv_type, x);
    }
    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let length = match kv_type {
        // The longest of so many columns.
        KvType::Q8_0 => largest * (x.len() as f32).sqrt(),
        _ => x.iter().map(|v| v * v).sum::<f32>().sqrt(),
    };
    round_to(x, if part == 0 { (length / KEY_LENGTH).max(largest / LARGEST) } else { largest / LARGEST_VALUE });
}

/// Rounds what the values of a block are weighted with, each times the unit of its value.
fn round_weights(weights: &mut [f32], values: &[&[f32]]) {
    let of_value = |v: &&[f32]| v.iter().fold(0f32, |m, v| m.max(v.abs())) / LARGEST_VALUE;
    let units: Vec<f32> = values.iter().map(of_value).collect();
    let mut x: Vec<f32> = weights.iter().zip(&units).map(|(w, unit)| w * unit).collect();
    let (largest, sum) = (x.iter().copied().fold(0f32, f32::max), x.iter().sum::<f32>());
    round_to(&mut x, (largest / LARGEST).max(sum / WEIGHTS));
    for ((weight, x), unit) in weights.iter_mut().zip(x).zip(units) {
        *weight = if unit > 0.0 { x / unit } else { *weight };
    }
}

/// Rounds to multiples of `unit`.
fn round_to(x: &mut [f32], unit: f32) {
    if unit > 0.0 {
        x.iter_mut().for_each(|v| *v = (*v / unit).round_ties_even() * unit);
    }
}
