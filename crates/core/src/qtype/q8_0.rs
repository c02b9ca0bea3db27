//! Q8_0: 32 weights of 8 bits, one scale. `w = d · q`. Also how activations and the KV cache are quantized.

use super::float::{f16_to_f32, f32_to_f16};
use super::{inverse, largest};
use bytemuck::{Pod, Zeroable};

/// 32 weights in 34 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// Scale, an F16.
    pub d: [u8; 2],
    /// Signed codes, in the order of the weights.
    pub qs: [i8; 32],
}

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockQ8_0, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for i in 0..32 {
        out[i] = d * f32::from(block.qs[i]);
    }
}

/// Rounds 32 weights to the nearest code in -127..=127; the weight farthest from zero gets ±127.
pub fn quantize_block(x: &[f32]) -> BlockQ8_0 {
    let d = f32_to_f16(largest(x).abs() / 127.0);
    let inv = inverse(f16_to_f32(d));
    BlockQ8_0 { d, qs: std::array::from_fn(|i| (x[i] * inv).round().clamp(-127.0, 127.0) as i8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_signed() {
        let block = BlockQ8_0 { d: f32_to_f16(-0.5), qs: std::array::from_fn(|i| (i as i32 * 8 - 128) as i8) };
        let mut out = [0.0; 32];
        dequantize_block(&block, &mut out);
        assert_eq!(out, std::array::from_fn(|i| 64.0 - 4.0 * i as f32));
    }

    #[test]
    fn the_scale_may_be_zero_or_the_smallest_half() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockQ8_0 { d: [0; 2], qs: [-128; 32] }, &mut out);
        assert_eq!(out, [0.0; 32]);
        dequantize_block(&BlockQ8_0 { d: [1, 0], qs: [-128; 32] }, &mut out);
        assert_eq!(out, [-(2f32.powi(-17)); 32]);
    }

    #[test]
    fn whole_multiples_of_the_scale_survive() {
        let x: [f32; 32] = std::array::from_fn(|i| 0.25 * (i as f32 * 8.0 - 121.0));
        let block = quantize_block(&x);
        assert_eq!(f16_to_f32(block.d), 0.25);
        let mut out = [0.0; 32];
        dequantize_block(&block, &mut out);
        assert_eq!(out, x);
    }
}
