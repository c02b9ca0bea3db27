//! Quant types: how GGUF stores a row of weights, one table row and one file per type.
//!
//! Every type cuts a row into blocks of [`GgmlType::block_len`] weights stored in [`GgmlType::block_bytes`] bytes.
//! Block layouts follow ggml (`ggml-common.h` of llama.cpp is the format's definition).
//!
//! [`dequantize_row`] is the definition the kernels are held to: plain loops, no tricks. The block structs have
//! alignment 1 (halves are kept as bytes), so that any slice of a file casts to them.

pub mod float;
pub mod iq4_nl;
pub mod iq4_xs;
pub mod mxfp4;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;

use bytemuck::{AnyBitPattern, NoUninit};

/// A tensor type of the GGUF format that `apr` reads. Spelled as ggml spells it.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Type, GGUF id, name, weights per block, bytes per block.
const TABLE: [(GgmlType, u32, &str, usize, usize); 16] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q2_K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3_K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (GgmlType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (GgmlType::MXFP4, 39, "MXFP4", 32, 17),
];

/// Ids that ggml defines and `apr` does not read, so that a refusal can name them.
const UNSUPPORTED: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// Every type that can be read, in the order of the table.
    pub const ALL: [GgmlType; 16] = {
        let mut all = [GgmlType::F32; 16];
        let mut i = 0;
        while i < 16 {
            all[i] = TABLE[i].0;
            i += 1;
        }
        all
    };

    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        &TABLE[self as usize]
    }

    /// The type with this id in a GGUF file, if it can be read.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TABLE.iter().find(|r| r.1 == id).map(|r| r.0)
    }

    /// What ggml calls the type with this id, readable or not.
    pub fn name_of_id(id: u32) -> Option<&'static str> {
        let readable = TABLE.iter().find(|r| r.1 == id).map(|r| r.2);
        readable.or_else(|| UNSUPPORTED.iter().find(|r| r.0 == id).map(|r| r.1))
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// The name, as in `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Weights per block.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `n` weights; `n` is a multiple of [`block_len`](Self::block_len).
    pub fn row_bytes(self, n: usize) -> usize {
        assert_eq!(n % self.block_len(), 0, "a row of {} holds whole blocks", self.name());
        n / self.block_len() * self.block_bytes()
    }

    /// True for the types whose weights are plain floats, which are never multiplied with quantized activations.
    pub fn is_float(self) -> bool {
        matches!(self, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes the float32 values of one row of `qtype`, allocating nothing.
///
/// `bytes` are the row's whole blocks, `out` has its `bytes.len() / block_bytes * block_len` weights. Panics if the two
/// lengths do not belong together.
pub fn dequantize_row(qtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), qtype.row_bytes(out.len()), "bytes of {} weights of {qtype}", out.len());
    let n = qtype.block_len();
    match qtype {
        GgmlType::F32 => each_block(bytes, out, n, |block: &[u8; 4], y| y[0] = f32::from_le_bytes(*block)),
        GgmlType::F16 => each_block(bytes, out, n, |block: &[u8; 2], y| y[0] = float::f16_to_f32(*block)),
        GgmlType::BF16 => each_block(bytes, out, n, |block: &[u8; 2], y| y[0] = float::bf16_to_f32(*block)),
        GgmlType::Q4_0 => each_block(bytes, out, n, q4_0::dequantize_block),
        GgmlType::Q4_1 => each_block(bytes, out, n, q4_1::dequantize_block),
        GgmlType::Q5_0 => each_block(bytes, out, n, q5_0::dequantize_block),
        GgmlType::Q5_1 => each_block(bytes, out, n, q5_1::dequantize_block),
        GgmlType::Q8_0 => each_block(bytes, out, n, q8_0::dequantize_block),
        GgmlType::Q2_K => each_block(bytes, out, n, q2_k::dequantize_block),
        GgmlType::Q3_K => each_block(bytes, out, n, q3_k::dequantize_block),
        GgmlType::Q4_K => each_block(bytes, out, n, q4_k::dequantize_block),
        GgmlType::Q5_K => each_block(bytes, out, n, q5_k::dequantize_block),
        GgmlType::Q6_K => each_block(bytes, out, n, q6_k::dequantize_block),
        GgmlType::IQ4_NL => each_block(bytes, out, n, iq4_nl::dequantize_block),
        GgmlType::IQ4_XS => each_block(bytes, out, n, iq4_xs::dequantize_block),
        GgmlType::MXFP4 => each_block(bytes, out, n, mxfp4::dequantize_block),
    }
}

/// Quantizes one row, for tests and tools: simple rounding, no search for better scales. `None` for the types that have
/// no quantizer here.
///
/// `x` is a whole number of blocks of finite weights, small enough that the scales fit an F16. Panics if the length is
/// no multiple of the type's block.
pub fn quantize_row(qtype: GgmlType, x: &[f32]) -> Option<Vec<u8>> {
    assert_eq!(x.len() % qtype.block_len(), 0, "a row of {qtype} holds whole blocks");
    let n = qtype.block_len();
    Some(match qtype {
        GgmlType::F32 => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        GgmlType::F16 => x.iter().flat_map(|&v| float::f32_to_f16(v)).collect(),
        GgmlType::BF16 => x.iter().flat_map(|&v| float::f32_to_bf16(v)).collect(),
        GgmlType::Q4_0 => to_blocks(x, n, q4_0::quantize_block),
        GgmlType::Q4_1 => to_blocks(x, n, q4_1::quantize_block),
        GgmlType::Q5_0 => to_blocks(x, n, q5_0::quantize_block),
        GgmlType::Q5_1 => to_blocks(x, n, q5_1::quantize_block),
        GgmlType::Q8_0 => to_blocks(x, n, q8_0::quantize_block),
        GgmlType::Q4_K => to_blocks(x, n, q4_k::quantize_block),
        GgmlType::Q6_K => to_blocks(x, n, q6_k::quantize_block),
        GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::Q5_K => return None,
        GgmlType::IQ4_NL | GgmlType::IQ4_XS | GgmlType::MXFP4 => return None,
    })
}

/// Calls `dequantize` on each block with its `n` weights of `out`.
fn each_block<B: AnyBitPattern>(bytes: &[u8], out: &mut [f32], n: usize, dequantize: impl Fn(&B, &mut [f32])) {
    let blocks: &[B] = bytemuck::cast_slice(bytes);
    for (block, y) in blocks.iter().zip(out.chunks_exact_mut(n)) {
        dequantize(block, y);
    }
}

/// The bytes of the blocks that `quantize` makes of each `n` weights.
fn to_blocks<B: NoUninit>(x: &[f32], n: usize, quantize: impl Fn(&[f32]) -> B) -> Vec<u8> {
    let blocks: Vec<B> = x.chunks_exact(n).map(quantize).collect();
    bytemuck::cast_slice(&blocks).to_vec()
}

/// The four bits of weight `i` of 32, as all types with blocks of 32 store them: weights 0..16 in the low halves of
/// sixteen bytes, weights 16..32 in the high halves.
pub fn nibble(qs: &[u8; 16], i: usize) -> u8 {
    qs[i % 16] >> (i / 16 * 4) & 0xf
}

/// The sixteen bytes for the codes, 0..=15, of 32 weights: the inverse of [`nibble`].
fn pack_nibbles(code: impl Fn(usize) -> u8) -> [u8; 16] {
    std::array::from_fn(|i| code(i) | code(i + 16) << 4)
}

/// The element farthest from zero, with its sign.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |best: f32, &v| if v.abs() > best.abs() { v } else { best })
}

/// The least and the greatest element.
fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &v| (min.min(v), max.max(v)))
}

/// `1 / d`, or 0 where `d` is: a scale of zero makes every code the one for zero.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_structs_have_the_size_of_the_table_and_fit_any_address() {
        fn check<B>(qtype: GgmlType) {
            assert_eq!(size_of::<B>(), qtype.block_bytes(), "size of {qtype}");
            assert_eq!(align_of::<B>(), 1, "alignment of {qtype}");
        }
        check::<q4_0::BlockQ4_0>(GgmlType::Q4_0);
        check::<q4_1::BlockQ4_1>(GgmlType::Q4_1);
        check::<q5_0::BlockQ5_0>(GgmlType::Q5_0);
        check::<q5_1::BlockQ5_1>(GgmlType::Q5_1);
        check::<q8_0::BlockQ8_0>(GgmlType::Q8_0);
        check::<q2_k::BlockQ2_K>(GgmlType::Q2_K);
        check::<q3_k::BlockQ3_K>(GgmlType::Q3_K);
        check::<q4_k::BlockQ4_K>(GgmlType::Q4_K);
        check::<q5_k::BlockQ5_K>(GgmlType::Q5_K);
        check::<q6_k::BlockQ6_K>(GgmlType::Q6_K);
        check::<iq4_nl::BlockIQ4_NL>(GgmlType::IQ4_NL);
        check::<iq4_xs::BlockIQ4_XS>(GgmlType::IQ4_XS);
        check::<mxfp4::BlockMXFP4>(GgmlType::MXFP4);
    }

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(GgmlType::from_id(row.1), Some(row.0));
        }
    }
}
