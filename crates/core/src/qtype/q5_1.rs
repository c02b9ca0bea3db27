//! Q5_1: 32 weights of 5 bits above a minimum. `w = d · q + m`.

use super::float::{f16_to_f32, f32_to_f16};
use super::q5_0::{code, pack_codes};
use super::{inverse, min_max};
use bytemuck::{Pod, Zeroable};

/// 32 weights in 24 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// Scale, an F16.
    pub d: [u8; 2],
    /// Minimum, an F16: the value of code 0.
    pub m: [u8; 2],
    /// Fifth bits of the codes: bit `i`, counted from the low end of the first byte, is weight `i`'s.
    pub qh: [u8; 4],
    /// Low four bits of the codes: byte `i` has weight `i` in its low half and weight `i + 16` in its high half.
    pub qs: [u8; 16],
}

/// Writes the block's 32 weights.
pub fn dequantize_block(block: &BlockQ5_1, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    let m = f16_to_f32(block.m);
    for i in 0..32 {
        out[i] = d * f32::from(code(i, block.qh, &block.qs)) + m;
    }
}

/// Rounds 32 weights to the nearest of 32 steps between their least and their greatest.
pub fn quantize_block(x: &[f32]) -> BlockQ5_1 {
    let (min, max) = min_max(x);
    let (d, m) = (f32_to_f16((max - min) / 31.0), f32_to_f16(min));
    let (inv, base) = (inverse(f16_to_f32(d)), f16_to_f32(m));
    let codes = std::array::from_fn(|i| ((x[i] - base) * inv).round().clamp(0.0, 31.0) as u8);
    let (qh, qs) = pack_codes(&codes);
    BlockQ5_1 { d, m, qh, qs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_zero_is_the_minimum_and_codes_reach_31() {
        let mut block = BlockQ5_1 { d: f32_to_f16(-2.0), m: f32_to_f16(7.0), qh: [0; 4], qs: [0; 16] };
        block.qs[4] = 0x0f;
        block.qh[0] = 0x10;
        block.qh[2] = 0x10;
        let mut out = [0.0; 32];
        dequantize_block(&block, &mut out);
        for i in 0..32 {
            let expected = [(4, -55.0), (20, -25.0)].iter().find(|e| e.0 == i).map_or(7.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn scale_and_minimum_may_be_zero_or_huge() {
        let mut out = [1.0; 32];
        dequantize_block(&BlockQ5_1::zeroed(), &mut out);
        assert_eq!(out, [0.0; 32]);
        let block = BlockQ5_1 { d: f32_to_f16(65504.0), m: f32_to_f16(-65504.0), qh: [0xff; 4], qs: [0xff; 16] };
        dequantize_block(&block, &mut out);
        assert_eq!(out, [1965120.0; 32]);
    }
}
