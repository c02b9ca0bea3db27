//! Q5_0: 32 weights of 5 bits around zero, one scale. `w = d · (q - 16)`.

use super::float::{f16_to_f32, f32_to_f16};
use super::{inverse, largest, nibble, pack_nibbles};
use bytemuck::{Pod, Zeroable};

/// 32 weights in 22 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// Scale, an F16.
    pub d: [u8; 2],
    /// Fifth bits of the codes: bit `i`, counted from the low end of the first byte, is weight `i`'s.
    pub qh: [u8; 4],
    /// Low four bits of the codes: byte `i` has weight `i` in its low half and weight `i + 16` in its high half.
    pub qs: [u8; 16],
}

/// The code, 0..=31, of weight `i` of 32, from the fields `qh` and `qs` that Q5_0 and Q5_1 share.
pub fn code(i: usize, qh: [u8; 4], qs: &[u8; 16]) -> u8 {
    let high = (u32::from_le_bytes(qh) >> i) as u8 & 1;
    nibble(qs, i) | high << 4
}

/// The fields `qh` and `qs` for the codes, 0..=31, of 32 weights: the inverse of [`code`].
pub fn pack_codes(codes: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let mut qh = 0u32;
    for i in 0..32 {
        qh |= u32::from(codes[i] >> 4) << i;
    }
    (qh.to_le_bytes(), pack_nibbles(|i| codes[i] & 0xf))
}

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockQ5_0, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for i in 0..32 {
        let q = i32::from(code(i, block.qh, &block.qs)) - 16;
        out[i] = d * q as f32;
    }
}

/// Rounds 32 weights to the nearest code. The weight farthest from zero gets code 0, whose multiple of the scale, -16,
/// is the largest there is; one as far on the other side is off by a whole step.
pub fn quantize_block(x: &[f32]) -> BlockQ5_0 {
    let d = f32_to_f16(largest(x) / -16.0);
    let inv = inverse(f16_to_f32(d));
    let codes = std::array::from_fn(|i| (x[i] * inv + 16.0).round().clamp(0.0, 31.0) as u8);
    let (qh, qs) = pack_codes(&codes);
    BlockQ5_0 { d, qh, qs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_holds_every_code() {
        for shift in 0..32u8 {
            let codes: [u8; 32] = std::array::from_fn(|i| (i as u8 + shift) % 32);
            let (qh, qs) = pack_codes(&codes);
            for i in 0..32 {
                assert_eq!(code(i, qh, &qs), codes[i]);
            }
        }
    }

    #[test]
    fn the_fifth_bits_are_in_the_order_of_the_weights() {
        let block = BlockQ5_0 { d: f32_to_f16(1.0), qh: [0x01, 0, 0x02, 0x80], qs: [0; 16] };
        let mut out = [1.0; 32];
        dequantize_block(&block, &mut out);
        for i in 0..32 {
            assert_eq!(out[i], if [0, 17, 31].contains(&i) { 0.0 } else { -16.0 }, "weight {i}");
        }
    }

    #[test]
    fn the_scale_may_be_zero_negative_or_huge() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockQ5_0::zeroed(), &mut out);
        assert_eq!(out, [0.0; 32]);
        dequantize_block(&BlockQ5_0 { d: f32_to_f16(-65504.0), qh: [0; 4], qs: [0; 16] }, &mut out);
        assert_eq!(out, [1048064.0; 32]);
    }
}
