//! Q2_K: 256 weights of 2 bits in 16 sub-blocks, each with a 4-bit scale and a 4-bit minimum.
//! `w = d · sc · q - dmin · m`.

use super::float::f16_to_f32;
use bytemuck::{Pod, Zeroable};

/// 256 weights in 84 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2_K {
    /// For each sub-block of 16 weights its scale in the low half and its minimum in the high half.
    pub scales: [u8; 16],
    /// Codes 0..=3, see [`code`].
    pub qs: [u8; 64],
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
    /// Scale of the minima, an F16.
    pub dmin: [u8; 2],
}

/// The two bits of weight `i` of 256. Each 32 bytes hold 128 weights: byte `i % 32`, lowest bits for the first 32
/// weights. Q3_K keeps its low bits in the same way.
pub fn code(i: usize, qs: &[u8; 64]) -> u8 {
    let (half, shift) = (i / 128, i % 128 / 32 * 2);
    qs[half * 32 + i % 32] >> shift & 3
}

/// Scale and minimum, each 0..=15, of sub-block `j` of 16.
pub fn scale_min(j: usize, scales: &[u8; 16]) -> (u8, u8) {
    (scales[j] & 0xf, scales[j] >> 4)
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockQ2_K, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    let dmin = f16_to_f32(block.dmin);
    for j in 0..16 {
        let (sc, m) = scale_min(j, &block.scales);
        let scale = d * f32::from(sc);
        let min = dmin * f32::from(m);
        for i in j * 16..j * 16 + 16 {
            out[i] = scale * f32::from(code(i, &block.qs)) - min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::float::f32_to_f16;
    use super::*;

    #[test]
    fn one_byte_of_codes_is_four_weights_32_apart() {
        let mut block = BlockQ2_K { scales: [1; 16], d: f32_to_f16(1.0), ..Zeroable::zeroed() };
        block.qs[33] = 0b00_01_10_11;
        let mut out = [9.0; 256];
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [(129, 3.0), (161, 2.0), (193, 1.0)].iter().find(|e| e.0 == i).map_or(0.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn minima_are_subtracted_and_scales_may_be_negative_or_huge() {
        let mut block = BlockQ2_K::zeroed();
        let mut out = [1.0; 256];
        dequantize_block(&block, &mut out);
        assert_eq!(out, [0.0; 256]);
        block.scales[2] = 0xf0;
        block.scales[3] = 0x0f;
        block.qs = [0xff; 64];
        block.d = f32_to_f16(65504.0);
        block.dmin = f32_to_f16(-65504.0);
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [0.0, 982560.0, 2947680.0][if i / 16 == 2 { 1 } else { usize::from(i / 16 == 3) * 2 }];
            assert_eq!(out[i], expected, "weight {i}");
        }
    }
}
