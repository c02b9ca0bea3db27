//! Weight blocks of every quantized type, unpacked one way: signed codes, integer scales, float scales.
//!
//! Layouts follow ggml (`ggml-common.h` of llama.cpp is the definition). The portable kernels multiply from this form.

use apr_core::qtype::GgmlType;
use half::f16;

use crate::kernels::SUPER;

/// How a type's sums are scaled; see [`crate::kernels`] for the sequences of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Integer scales and minima under one float scale per 256 columns.
    Super,
    /// The same without minima, with scales of eight bits: the sum of 256 columns could exceed 32 bits, that of 128 cannot.
    Halves,
    /// One float scale per 32 columns, and a float minimum where `with_min`.
    Block { with_min: bool },
}

/// The family of a quantized type.
pub(crate) fn family(qtype: GgmlType) -> Family {
    use GgmlType::*;
    match qtype {
        Q2_K | Q3_K | Q4_K | Q5_K => Family::Super,
        Q6_K => Family::Halves,
        Q4_1 | Q5_1 => Family::Block { with_min: true },
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS | MXFP4 => Family::Block { with_min: false },
        F32 | F16 | BF16 => unreachable!("{qtype} is not quantized"),
    }
}

/// 256 columns of one weight row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacked {
    /// Signed codes: a type's constant offset is taken off.
    pub(crate) codes: [i8; SUPER],
    /// Integer scale of every 16 columns; 1 where a type has none.
    pub(crate) scales: [i16; 16],
    /// Integer minimum of every 16 columns ([`Family::Super`]).
    pub(crate) mins: [i16; 16],
    /// Float scale: the first for 256 columns ([`Family::Super`], [`Family::Halves`]), or one for every 32.
    pub(crate) d: [f32; 8],
    /// Float scale of the minima ([`Family::Super`], the first), or the minimum of every 32 columns.
    pub(crate) m: [f32; 8],
}

impl Unpacked {
    pub(crate) const ZERO: Unpacked =
        Unpacked { codes: [0; SUPER], scales: [1; 16], mins: [0; 16], d: [0.0; 8], m: [0.0; 8] };
}

/// Unpacks super-block `s` of a row of `qtype`. The last one of a row may have fewer than 256 columns.
pub(crate) fn unpack(qtype: GgmlType, row: &[u8], s: usize, out: &mut Unpacked) {
    use GgmlType::*;
    *out = Unpacked::ZERO;
    let per_super = SUPER / qtype.block_len() * qtype.block_bytes();
    let bytes = &row[s * per_super..row.len().min((s + 1) * per_super)];
    match qtype {
        Q2_K => q2_k(bytes, out),
        Q3_K => q3_k(bytes, out),
        Q4_K => q4_k(bytes, out),
        Q5_K => q5_k(bytes, out),
        Q6_K => q6_k(bytes, out),
        IQ4_XS => iq4_xs(bytes, out),
        _ => {
            for (j, block) in bytes.chunks_exact(qtype.block_bytes()).enumerate() {
                small_block(qtype, block, j, out);
            }
        }
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Low nibbles are the first 16 columns of a block of 32, high nibbles the others.
fn nibbles(qs: &[u8], codes: &mut [i8], code: impl Fn(usize, u8) -> i8) {
    for i in 0..16 {
        codes[i] = code(i, qs[i] & 15);
        codes[i + 16] = code(i + 16, qs[i] >> 4);
    }
}

/// The types with blocks of 32 columns.
fn small_block(qtype: GgmlType, b: &[u8], j: usize, out: &mut Unpacked) {
    use GgmlType::*;
    let codes = &mut out.codes[32 * j..][..32];
    let fifth_bit = |at: usize, i: usize| (b[at + i / 8] >> (i % 8) & 1) << 4;
    match qtype {
        MXFP4 => out.d[j] = half_of_e8m0(b[0]),
        _ => out.d[j] = half_at(b, 0),
    }
    if matches!(qtype, Q4_1 | Q5_1) {
        out.m[j] = half_at(b, 2);
    }
    match qtype {
        Q4_0 => nibbles(&b[2..], codes, |_, q| q as i8 - 8),
        Q4_1 => nibbles(&b[4..], codes, |_, q| q as i8),
        Q5_0 => nibbles(&b[6..], codes, |i, q| (q | fifth_bit(2, i)) as i8 - 16),
        Q5_1 => nibbles(&b[8..], codes, |i, q| (q | fifth_bit(4, i)) as i8),
        IQ4_NL => nibbles(&b[2..], codes, |_, q| IQ4_VALUES[q as usize]),
        MXFP4 => nibbles(&b[1..], codes, |_, q| MXFP4_VALUES[q as usize]),
        Q8_0 => codes.iter_mut().zip(&b[2..]).for_each(|(c, q)| *c = *q as i8),
        _ => unreachable!("{qtype} has no blocks of 32"),
    }
}

/// The non-linear grid of IQ4_NL and IQ4_XS.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The values of FP4 (E2M1), doubled so that they are integers; the block's scale is halved in turn.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of the power of two `2^(e - 127)`; subnormal for the two smallest.
pub(crate) fn half_of_e8m0(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// The six-bit scales and minima of Q4_K and Q5_K, from their twelve bytes.
pub(crate) fn scales_and_mins(b: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (b[j] & 63, b[j + 4] & 63)
    } else {
        (b[j + 4] & 15 | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4)
    }
}

fn scales_of_4_and_5(b: &[u8], out: &mut Unpacked) {
    (out.d[0], out.m[0]) = (half_at(b, 0), half_at(b, 2));
    for k in 0..16 {
        let (scale, min) = scales_and_mins(&b[4..16], k / 2);
        (out.scales[k], out.mins[k]) = (scale.into(), min.into());
    }
}

fn q4_k(b: &[u8], out: &mut Unpacked) {
    scales_of_4_and_5(b, out);
    for c in 0..SUPER {
        let byte = b[16 + c / 64 * 32 + c % 32];
        out.codes[c] = (byte >> (c / 32 % 2 * 4) & 15) as i8;
    }
}

fn q5_k(b: &[u8], out: &mut Unpacked) {
    scales_of_4_and_5(b, out);
    for c in 0..SUPER {
        let low = b[48 + c / 64 * 32 + c % 32] >> (c / 32 % 2 * 4) & 15;
        let high = b[16 + c % 32] >> (c / 32) & 1;
        out.codes[c] = (low | high << 4) as i8;
    }
}

fn q6_k(b: &[u8], out: &mut Unpacked) {
    out.d[0] = half_at(b, 208);
    for k in 0..16 {
        out.scales[k] = i16::from(b[192 + k] as i8);
    }
    for c in 0..SUPER {
        let (half, quarter, i) = (c / 128, c / 32 % 4, c % 32);
        let low = b[64 * half + 32 * (quarter % 2) + i] >> (quarter / 2 * 4) & 15;
        let high = b[128 + 32 * half + i] >> (2 * quarter) & 3;
        out.codes[c] = (low | high << 4) as i8 - 32;
    }
}

fn q2_k(b: &[u8], out: &mut Unpacked) {
    (out.d[0], out.m[0]) = (half_at(b, 80), half_at(b, 82));
    for k in 0..16 {
        (out.scales[k], out.mins[k]) = ((b[k] & 15).into(), (b[k] >> 4).into());
    }
    for c in 0..SUPER {
        out.codes[c] = (b[16 + c / 128 * 32 + c % 32] >> (c / 32 % 4 * 2) & 3) as i8;
    }
}

fn q3_k(b: &[u8], out: &mut Unpacked) {
    out.d[0] = half_at(b, 108);
    for k in 0..16 {
        let low = b[96 + k % 8] >> (k / 8 * 4) & 15;
        let high = b[104 + k % 4] >> (k / 4 * 2) & 3;
        out.scales[k] = i16::from(low | high << 4) - 32;
    }
    for c in 0..SUPER {
        let low = b[32 + c / 128 * 32 + c % 32] >> (c / 32 % 4 * 2) & 3;
        let high = b[c % 32] >> (c / 32) & 1;
        out.codes[c] = (low | high << 2) as i8 - 4;
    }
}

fn iq4_xs(b: &[u8], out: &mut Unpacked) {
    let high = u16::from_le_bytes([b[2], b[3]]);
    for j in 0..8 {
        let scale = i16::from(b[4 + j / 2] >> (j % 2 * 4) & 15) | ((high >> (2 * j) & 3) << 4) as i16;
        out.d[j] = half_at(b, 0) * f32::from(scale - 32);
        nibbles(&b[8 + 16 * j..], &mut out.codes[32 * j..][..32], |_, q| IQ4_VALUES[q as usize]);
    }
}
