//! Portable kernels: the reference that other instruction sets are held to, and the fallback where there is none.

mod unpack;

use apr_core::qtype::GgmlType;
use half::{bf16, f16};

use crate::kernels::{
    F32Tokens, Isa, Kernels, MAX_CODE, Out, PanelScratch, Q8Block, Q8Tokens, SUPER, WeightRows, sub_scale, super_scale,
};

pub(crate) use unpack::{Family, IQ4_VALUES, MXFP4_VALUES, Unpacked, family, unpack};

pub(crate) static KERNELS: Kernels =
    Kernels::new(Isa::Scalar, &crate::float::SCALAR, quantize_row, matmul_q8, matmul_f32);

pub(crate) fn quantize_row(x: &[f32], out: &mut [Q8Block]) {
    for (x, block) in x.chunks(SUPER).zip(out) {
        quantize_block(x, block);
    }
}

/// Quantizes up to 256 values; missing ones are zeros.
pub(crate) fn quantize_block(x: &[f32], out: &mut Q8Block) {
    if x.iter().any(|v| !v.is_finite()) {
        *out = Q8Block::NAN;
        return;
    }
    *out = Q8Block::ZERO;
    let amax = |x: &[f32]| x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let Some(d) = super_scale(amax(x)) else { return };
    out.d = d;
    let mut magnitudes = [0; 8];
    for (j, x) in x.chunks(32).enumerate() {
        out.scales[j] = sub_scale(amax(x), d);
        if out.scales[j] == 0 {
            continue;
        }
        let inverse = 1.0 / (d * f32::from(out.scales[j]));
        for (c, v) in x.iter().enumerate() {
            let code = (v * inverse).round_ties_even().clamp(-MAX_CODE, MAX_CODE) as i8;
            out.codes[32 * j + c] = code;
            out.half_sums[2 * j + c / 16] += i16::from(code);
            magnitudes[j] += i16::from(code.abs());
        }
    }
    out.derive(&magnitudes);
}

pub(crate) fn matmul_q8(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    let n_super = w.n_cols().div_ceil(SUPER);
    let row = scratch.unpacked(n_super);
    let family = family(w.qtype());
    for r in 0..w.n_rows() {
        for (s, block) in row.iter_mut().enumerate() {
            unpack(w.qtype(), w.row(r), s, block);
        }
        for t in 0..x.len() {
            let y = match family {
                Family::Super => dot_super(row, x.row(t)),
                Family::Halves => dot_halves(row, x.row(t)),
                Family::Block { with_min } => dot_blocks(row, x.row(t), w.n_cols() / 32, with_min),
            };
            out.put(x.out_row(t), r, &[y]);
        }
    }
}

/// The dot product of types whose super-block has an exact integer sum.
fn dot_super(w: &[Unpacked], x: &[Q8Block]) -> f32 {
    let mut acc = 0.0f32;
    for (w, x) in w.iter().zip(x) {
        let (mut sum, mut min) = (0i32, 0i32);
        for k in 0..16 {
            let x_scale = i32::from(x.scales[k / 2]);
            sum += i32::from(w.scales[k]) * x_scale * dot16(w, x, k);
            min += i32::from(w.mins[k]) * x_scale * i32::from(x.half_sums[k]);
        }
        acc += sum as f32 * (w.d[0] * x.d);
        acc -= min as f32 * (w.m[0] * x.d);
    }
    acc
}

/// The dot product of types whose half super-block has an exact integer sum.
fn dot_halves(w: &[Unpacked], x: &[Q8Block]) -> f32 {
    let mut acc = 0.0f32;
    for (w, x) in w.iter().zip(x) {
        for half in 0..2 {
            let scaled = |k: usize| i32::from(w.scales[k]) * i32::from(x.scales[k / 2]) * dot16(w, x, k);
            let sum: i32 = (8 * half..8 * half + 8).map(scaled).sum();
            acc += sum as f32 * (w.d[0] * x.d);
        }
    }
    acc
}

/// The dot product of types with a float scale per block of 32 columns.
fn dot_blocks(w: &[Unpacked], x: &[Q8Block], n_blocks: usize, with_min: bool) -> f32 {
    let mut acc = 0.0f32;
    for b in 0..n_blocks {
        let (w, x, j) = (&w[b / 8], &x[b / 8], b % 8);
        let sum: i32 = (2 * j..2 * j + 2).map(|k| i32::from(w.scales[k]) * dot16(w, x, k)).sum();
        acc += sum as f32 * (w.d[j] * x.block_d[j]);
        if with_min {
            acc += w.m[j] * x.block_sum[j];
        }
    }
    acc
}

/// The sum of products of the codes of columns `16 k .. 16 k + 16`.
fn dot16(w: &Unpacked, x: &Q8Block, k: usize) -> i32 {
    (16 * k..16 * k + 16).map(|c| i32::from(w.codes[c]) * i32::from(x.codes[c])).sum()
}

pub(crate) fn matmul_f32(w: WeightRows<'_>, x: F32Tokens<'_>, out: &mut Out<'_>) {
    for r in 0..w.n_rows() {
        for t in 0..x.len() {
            let x_row = x.row(t, w.n_cols());
            let products = x_row.iter().enumerate().map(|(c, v)| f64::from(weight(&w, r, c)) * f64::from(*v));
            out.put(x.out_row(t), r, &[products.sum::<f64>() as f32]);
        }
    }
}

/// The float weight in row `r` and column `c`.
fn weight(w: &WeightRows<'_>, r: usize, c: usize) -> f32 {
    let row = w.row(r);
    let two = |c: usize| [row[2 * c], row[2 * c + 1]];
    match w.qtype() {
        GgmlType::F16 => f16::from_le_bytes(two(c)).to_f32(),
        GgmlType::BF16 => bf16::from_le_bytes(two(c)).to_f32(),
        _ => f32::from_le_bytes([row[4 * c], row[4 * c + 1], row[4 * c + 2], row[4 * c + 3]]),
    }
}
