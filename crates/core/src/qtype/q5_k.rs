//! Q5_K: Q4_K with a fifth bit per weight. `w = d · sc · q - dmin · m`.

use super::float::f16_to_f32;
use super::q4_k::{self, scale_min};
use bytemuck::{Pod, Zeroable};

/// 256 weights in 176 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_K {
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
    /// Scale of the minima, an F16.
    pub dmin: [u8; 2],
    /// Eight scales and eight minima of 6 bits, packed as in Q4_K.
    pub scales: [u8; 12],
    /// Fifth bits of the codes: weight `i`'s is bit `i / 32` of byte `i % 32`.
    pub qh: [u8; 32],
    /// Low four bits of the codes, laid out as in Q4_K.
    pub qs: [u8; 128],
}

/// The code, 0..=31, of weight `i` of 256.
pub fn code(i: usize, qh: &[u8; 32], qs: &[u8; 128]) -> u8 {
    let high = qh[i % 32] >> (i / 32) & 1;
    q4_k::code(i, qs) | high << 4
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockQ5_K, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    let dmin = f16_to_f32(block.dmin);
    for j in 0..8 {
        let (sc, m) = scale_min(j, &block.scales);
        let scale = d * f32::from(sc);
        let min = dmin * f32::from(m);
        for i in j * 32..j * 32 + 32 {
            out[i] = scale * f32::from(code(i, &block.qh, &block.qs)) - min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::float::f32_to_f16;
    use super::*;

    #[test]
    fn one_byte_of_fifth_bits_is_eight_weights_32_apart() {
        let scales = q4_k::pack_scales_mins(&[(1, 0); 8]);
        let mut block = BlockQ5_K { d: f32_to_f16(-1.0), scales, ..Zeroable::zeroed() };
        block.qh[31] = 0x81;
        block.qs[127] = 0x50;
        let mut out = [9.0; 256];
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [(31, -16.0), (255, -21.0)].iter().find(|e| e.0 == i).map_or(0.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn a_zero_block_is_zero_and_the_largest_is_finite() {
        let mut out = [1.0; 256];
        dequantize_block(&BlockQ5_K::zeroed(), &mut out);
        assert_eq!(out, [0.0; 256]);
        let scales = q4_k::pack_scales_mins(&[(63, 63); 8]);
        let (d, dmin) = (f32_to_f16(65504.0), f32_to_f16(-65504.0));
        dequantize_block(&BlockQ5_K { d, dmin, scales, qh: [0xff; 32], qs: [0xff; 128] }, &mut out);
        assert_eq!(out, [65504.0 * 63.0 * 32.0; 256]);
    }
}
