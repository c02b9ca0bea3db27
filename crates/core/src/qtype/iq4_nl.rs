//! IQ4_NL: 32 weights of 4 bits that index a table of unequal steps, one scale. `w = d · VALUES[q]`.

use super::float::f16_to_f32;
use super::nibble;
use bytemuck::{Pod, Zeroable};

/// 32 weights in 18 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4_NL {
    /// Scale, an F16.
    pub d: [u8; 2],
    /// Codes 0..=15: byte `i` has weight `i` in its low half and weight `i + 16` in its high half.
    pub qs: [u8; 16],
}

/// What the sixteen codes of IQ4_NL and IQ4_XS stand for: finer near zero, where most weights are.
pub const IQ4_NL_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockIQ4_NL, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for i in 0..32 {
        let q = usize::from(nibble(&block.qs, i));
        out[i] = d * f32::from(IQ4_NL_VALUES[q]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::float::f32_to_f16;
    use super::*;

    #[test]
    fn codes_index_the_table() {
        let block = BlockIQ4_NL { d: f32_to_f16(-2.0), qs: std::array::from_fn(|i| (i | (15 - i) << 4) as u8) };
        let mut out = [0.0; 32];
        dequantize_block(&block, &mut out);
        for i in 0..16 {
            assert_eq!(out[i], -2.0 * f32::from(IQ4_NL_VALUES[i]));
            assert_eq!(out[i + 16], -2.0 * f32::from(IQ4_NL_VALUES[15 - i]));
        }
        assert!(IQ4_NL_VALUES.is_sorted());
    }

    #[test]
    fn the_scale_may_be_zero_or_huge() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockIQ4_NL::zeroed(), &mut out);
        assert_eq!(out, [0.0; 32]);
        dequantize_block(&BlockIQ4_NL { d: f32_to_f16(65504.0), qs: [0; 16] }, &mut out);
        assert_eq!(out, [65504.0 * -127.0; 32]);
    }
}
