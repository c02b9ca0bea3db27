//! MXFP4: 32 weights as 4-bit floats (E2M1) with a shared power of two (E8M0), the OCP Microscaling format.
//! `w = 2^(e - 128) · VALUES[q]`, where `VALUES` are twice the floats, so that they are whole numbers.

use super::nibble;
use bytemuck::{Pod, Zeroable};

/// 32 weights in 17 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// Exponent of the scale, see [`half_scale`].
    pub e: u8,
    /// Codes 0..=15: byte `i` has weight `i` in its low half and weight `i + 16` in its high half.
    pub qs: [u8; 16],
}

/// Twice what the sixteen codes stand for; bit 3 is the sign. Code 8 is zero, not minus zero.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half the scale that `e` stands for, 2^(e - 128). Every exponent is a number, as in ggml: 255, which the OCP
/// specification calls not-a-number, is 2^127 here.
pub fn half_scale(e: u8) -> f32 {
    match e {
        // 2^-128 and 2^-127 have no normal float.
        0 => f32::from_bits(0x0020_0000),
        1 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits((u32::from(e) - 1) << 23),
    }
}

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockMXFP4, out: &mut [f32]) {
    let half_scale = half_scale(block.e);
    for i in 0..32 {
        let q = usize::from(nibble(&block.qs, i));
        out[i] = half_scale * f32::from(MXFP4_VALUES[q]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_down_to_subnormal_ones() {
        for e in 0..=255u8 {
            assert_eq!(f64::from(half_scale(e)), 2f64.powi(i32::from(e) - 128), "exponent {e}");
        }
    }

    #[test]
    fn codes_are_floats_of_one_mantissa_bit() {
        let block = BlockMXFP4 { e: 127, qs: std::array::from_fn(|i| (i | (15 - i) << 4) as u8) };
        let floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        let mut out = [9.0; 32];
        dequantize_block(&block, &mut out);
        for i in 0..16 {
            assert_eq!(out[i], floats[i]);
            assert_eq!(out[i + 16], floats[15 - i]);
        }
        assert!(out[8].is_sign_positive());
    }

    #[test]
    fn a_zero_block_is_zero_and_the_largest_overflows() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockMXFP4::zeroed(), &mut out);
        assert_eq!(out, [0.0; 32]);
        dequantize_block(&BlockMXFP4 { e: 255, qs: [0x71; 16] }, &mut out);
        assert_eq!(out[0], 2f32.powi(127));
        assert_eq!(out[31], f32::INFINITY);
    }
}
