//! Q4_K: 256 weights of 4 bits in 8 sub-blocks, each with a 6-bit scale and a 6-bit minimum.
//! `w = d · sc · q - dmin · m`.

use super::float::{f16_to_f32, f32_to_f16};
use super::{inverse, min_max};
use bytemuck::{Pod, Zeroable};

/// 256 weights in 144 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_K {
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
    /// Scale of the minima, an F16.
    pub dmin: [u8; 2],
    /// Eight scales and eight minima of 6 bits, see [`scale_min`].
    pub scales: [u8; 12],
    /// Codes 0..=15, see [`code`].
    pub qs: [u8; 128],
}

/// Scale and minimum, each 0..=63, of sub-block `j` of 8, as Q4_K and Q5_K pack them. Bytes 0..4 hold the first four
/// scales and bytes 4..8 the first four minima in their low six bits, bytes 8..12 the low four bits of the last four
/// scales (low half) and minima (high half), whose upper two bits are the top bits of bytes 0..4 and 4..8.
pub fn scale_min(j: usize, scales: &[u8; 12]) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let low = scales[j + 4];
        (low & 0xf | scales[j - 4] >> 6 << 4, low >> 4 | scales[j] >> 6 << 4)
    }
}

/// Packs eight (scale, minimum) pairs, each 0..=63: the inverse of [`scale_min`].
pub fn pack_scales_mins(pairs: &[(u8, u8); 8]) -> [u8; 12] {
    let mut scales = [0; 12];
    for j in 0..4 {
        let (first, last) = (pairs[j], pairs[j + 4]);
        scales[j] = first.0 | last.0 >> 4 << 6;
        scales[j + 4] = first.1 | last.1 >> 4 << 6;
        scales[j + 8] = last.0 & 0xf | (last.1 & 0xf) << 4;
    }
    scales
}

/// The four bits of weight `i` of 256. Each 32 bytes hold 64 weights: the first 32 in the low halves, the others in the
/// high ones. Q5_K keeps its low bits in the same way.
pub fn code(i: usize, qs: &[u8; 128]) -> u8 {
    let (chunk, shift) = (i / 64, i % 64 / 32 * 4);
    qs[chunk * 32 + i % 32] >> shift & 0xf
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockQ4_K, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    let dmin = f16_to_f32(block.dmin);
    for j in 0..8 {
        let (sc, m) = scale_min(j, &block.scales);
        let scale = d * f32::from(sc);
        let min = dmin * f32::from(m);
        for i in j * 32..j * 32 + 32 {
            out[i] = scale * f32::from(code(i, &block.qs)) - min;
        }
    }
}

/// Rounds 256 weights to 16 steps between the least (at most zero) and the greatest of each sub-block. Minimum and
/// maximum decide; nothing is searched for.
pub fn quantize_block(x: &[f32]) -> BlockQ4_K {
    let steps: [(f32, f32); 8] = std::array::from_fn(|j| {
        let (min, max) = min_max(&x[j * 32..j * 32 + 32]);
        let min = min.min(0.0);
        ((max.max(min) - min) / 15.0, -min)
    });
    let d = f32_to_f16(steps.iter().fold(0.0, |a: f32, s| a.max(s.0)) / 63.0);
    let dmin = f32_to_f16(steps.iter().fold(0.0, |a: f32, s| a.max(s.1)) / 63.0);
    let (inv_d, inv_dmin) = (inverse(f16_to_f32(d)), inverse(f16_to_f32(dmin)));
    let six_bits = |v: f32| v.round().clamp(0.0, 63.0) as u8;
    let pairs = steps.map(|(scale, min)| (six_bits(scale * inv_d), six_bits(min * inv_dmin)));
    let mut block = BlockQ4_K { d, dmin, scales: pack_scales_mins(&pairs), qs: [0; 128] };
    for i in 0..256 {
        let (sc, m) = pairs[i / 32];
        let (inv, min) = (inverse(f16_to_f32(d) * f32::from(sc)), f16_to_f32(dmin) * f32::from(m));
        let q = ((x[i] + min) * inv).round().clamp(0.0, 15.0) as u8;
        block.qs[i / 64 * 32 + i % 32] |= q << (i % 64 / 32 * 4);
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scale_and_minimum_unpacks_to_what_was_packed() {
        for value in 0..64u8 {
            let pairs: [(u8, u8); 8] = std::array::from_fn(|j| ((value + 8 * j as u8) % 64, (value ^ j as u8) % 64));
            let scales = pack_scales_mins(&pairs);
            for j in 0..8 {
                assert_eq!(scale_min(j, &scales), pairs[j]);
            }
        }
    }

    #[test]
    fn the_last_scales_borrow_the_top_bits_of_the_first() {
        let scales = [0xc1, 0, 0, 0x40, 0x82, 0, 0, 0, 0x53, 0, 0, 0xf0];
        let unpacked: [(u8, u8); 8] = std::array::from_fn(|j| scale_min(j, &scales));
        assert_eq!(unpacked, [(1, 2), (0, 0), (0, 0), (0, 0), (0x33, 0x25), (0, 0), (0, 0), (0x10, 0x0f)]);
    }

    #[test]
    fn one_byte_of_codes_is_two_weights_32_apart() {
        let mut block = BlockQ4_K { d: f32_to_f16(0.5), scales: pack_scales_mins(&[(3, 0); 8]), ..Zeroable::zeroed() };
        block.qs[64 + 7] = 0xa1;
        let mut out = [9.0; 256];
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [(135, 1.5), (167, 15.0)].iter().find(|e| e.0 == i).map_or(0.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn minima_are_subtracted_and_scales_may_be_negative_or_huge() {
        let mut out = [1.0; 256];
        dequantize_block(&BlockQ4_K::zeroed(), &mut out);
        assert_eq!(out, [0.0; 256]);
        let scales = pack_scales_mins(&[(63, 63); 8]);
        let block = BlockQ4_K { d: f32_to_f16(65504.0), dmin: f32_to_f16(-65504.0), scales, qs: [0xff; 128] };
        dequantize_block(&block, &mut out);
        assert_eq!(out, [65504.0 * 63.0 * 16.0; 256]);
    }

    #[test]
    fn weights_that_a_block_can_hold_are_quantized_to_that_block() {
        let pairs: [(u8, u8); 8] = std::array::from_fn(|j| (63 - 7 * j as u8, 63 - 5 * j as u8));
        let scales = pack_scales_mins(&pairs);
        // Each byte has its own index in both halves, so that every sub-block has all sixteen codes.
        let qs = std::array::from_fn(|i| (i % 16 * 17) as u8);
        let block = BlockQ4_K { d: f32_to_f16(0.3), dmin: f32_to_f16(0.7), scales, qs };
        let mut x = [0.0; 256];
        dequantize_block(&block, &mut x);
        assert_eq!(bytemuck::bytes_of(&quantize_block(&x)), bytemuck::bytes_of(&block));
    }
}
