//! Q4_0: 32 weights of 4 bits around zero, one scale. `w = d · (q - 8)`.

use super::float::{f16_to_f32, f32_to_f16};
use super::{inverse, largest, nibble, pack_nibbles};
use bytemuck::{Pod, Zeroable};

/// 32 weights in 18 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// Scale, an F16.
    pub d: [u8; 2],
    /// Codes 0..=15: byte `i` has weight `i` in its low half and weight `i + 16` in its high half.
    pub qs: [u8; 16],
}

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockQ4_0, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for i in 0..32 {
        let q = i32::from(nibble(&block.qs, i)) - 8;
        out[i] = d * q as f32;
    }
}

/// Rounds 32 weights to the nearest code. The weight farthest from zero gets code 0, whose multiple of the scale, -8,
/// is the largest there is; one as far on the other side is off by a whole step.
pub fn quantize_block(x: &[f32]) -> BlockQ4_0 {
    let d = f32_to_f16(largest(x) / -8.0);
    let inv = inverse(f16_to_f32(d));
    BlockQ4_0 { d, qs: pack_nibbles(|i| (x[i] * inv + 8.0).round().clamp(0.0, 15.0) as u8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_split_into_halves_of_the_block() {
        let mut block = BlockQ4_0 { d: f32_to_f16(0.5), qs: [0x88; 16] };
        block.qs[3] = 0xf0;
        let mut out = [1.0; 32];
        dequantize_block(&block, &mut out);
        for i in 0..32 {
            let expected = [(3, -4.0), (19, 3.5)].iter().find(|e| e.0 == i).map_or(0.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn the_scale_may_be_zero_negative_or_huge() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockQ4_0::zeroed(), &mut out);
        assert_eq!(out, [0.0; 32]);
        dequantize_block(&BlockQ4_0 { d: f32_to_f16(-65504.0), qs: [0; 16] }, &mut out);
        assert_eq!(out, [524032.0; 32]);
    }
}
