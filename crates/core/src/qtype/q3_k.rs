//! Q3_K: 256 weights of 3 bits around zero in 16 sub-blocks, each with a 6-bit signed scale. `w = d · sc · (q - 4)`.

use super::float::f16_to_f32;
use super::q2_k;
use bytemuck::{Pod, Zeroable};

/// 256 weights in 110 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3_K {
    /// Third bits of the codes: weight `i`'s is bit `i / 32` of byte `i % 32`.
    pub hmask: [u8; 32],
    /// Low two bits of the codes, laid out as in Q2_K.
    pub qs: [u8; 64],
    /// Sixteen scales of 6 bits, see [`scale`].
    pub scales: [u8; 12],
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
}

/// Scale, -32..=31, of sub-block `j` of 16. Bytes 0..8 hold the low four bits (of scale `j` and scale `j + 8`), bytes
/// 8..12 the high two (of scales `j`, `j + 4`, `j + 8` and `j + 12`).
pub fn scale(j: usize, scales: &[u8; 12]) -> i8 {
    let low = scales[j % 8] >> (j / 8 * 4) & 0xf;
    let high = scales[8 + j % 4] >> (j / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// Signed code, -4..=3, of weight `i` of 256.
pub fn code(i: usize, hmask: &[u8; 32], qs: &[u8; 64]) -> i8 {
    let high = hmask[i % 32] >> (i / 32) & 1;
    (q2_k::code(i, qs) | high << 2) as i8 - 4
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockQ3_K, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for j in 0..16 {
        let scale = d * f32::from(scale(j, &block.scales));
        for i in j * 16..j * 16 + 16 {
            out[i] = scale * f32::from(code(i, &block.hmask, &block.qs));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::float::f32_to_f16;
    use super::*;

    #[test]
    fn scales_are_six_bits_from_two_places() {
        for j in 0..16 {
            let mut scales = [0; 12];
            scales[j % 8] = if j < 8 { 0x0d } else { 0xd0 };
            scales[8 + j % 4] = 2 << (j / 4 * 2);
            for other in 0..16 {
                assert_eq!(scale(other, &scales), if other == j { 13 } else { -32 }, "{other} when {j} is set");
            }
        }
        assert_eq!(scale(15, &[0xff; 12]), 31);
    }

    #[test]
    fn third_bits_are_a_plane_of_their_own() {
        // Scale 1 everywhere: low four bits 1, high two bits 2.
        let mut block = BlockQ3_K { d: f32_to_f16(-1.0), ..Zeroable::zeroed() };
        block.scales = [0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0xaa, 0xaa, 0xaa, 0xaa];
        block.hmask[5] = 0x82;
        block.qs[37] = 0xc0;
        let mut out = [9.0; 256];
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [(37, 0.0), (229, -3.0)].iter().find(|e| e.0 == i).map_or(4.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn a_zero_block_is_zero_and_the_largest_is_finite() {
        let mut block = BlockQ3_K::zeroed();
        let mut out = [1.0; 256];
        dequantize_block(&block, &mut out);
        assert_eq!(out, [0.0; 256]);
        block.d = f32_to_f16(65504.0);
        dequantize_block(&block, &mut out);
        assert_eq!(out, [65504.0 * 128.0; 256]);
    }
}
