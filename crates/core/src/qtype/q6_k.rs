//! Q6_K: 256 weights of 6 bits around zero in 16 sub-blocks, each with an 8-bit signed scale. `w = d · sc · (q - 32)`.

use super::float::{f16_to_f32, f32_to_f16};
use super::{inverse, largest};
use bytemuck::{Pod, Zeroable};

/// 256 weights in 210 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6_K {
    /// Low four bits of the codes, see [`code`].
    pub ql: [u8; 128],
    /// High two bits of the codes, laid out as the codes of Q2_K.
    pub qh: [u8; 64],
    /// Scales of the sub-blocks of 16 weights.
    pub scales: [i8; 16],
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
}

/// Where weight `i` of 256 has its bits: (byte and shift in `ql`, byte and shift in `qh`). Each half of 128 weights has
/// 64 bytes of `ql`, whose low halves are its first 64 weights and whose high halves the others, and 32 bytes of `qh`,
/// each of which serves four weights 32 apart.
fn place(i: usize) -> (usize, usize, usize, usize) {
    let (half, r) = (i / 128, i % 128);
    (half * 64 + r % 64, r / 64 * 4, half * 32 + r % 32, r / 32 * 2)
}

/// Signed code, -32..=31, of weight `i` of 256.
pub fn code(i: usize, ql: &[u8; 128], qh: &[u8; 64]) -> i8 {
    let (low, low_shift, high, high_shift) = place(i);
    (ql[low] >> low_shift & 0xf | (qh[high] >> high_shift & 3) << 4) as i8 - 32
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockQ6_K, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for j in 0..16 {
        let scale = d * f32::from(block.scales[j]);
        for i in j * 16..j * 16 + 16 {
            out[i] = scale * f32::from(code(i, &block.ql, &block.qh));
        }
    }
}

/// Rounds 256 weights to multiples of their sub-block's scale, of which the weight farthest from zero is -32.
pub fn quantize_block(x: &[f32]) -> BlockQ6_K {
    let steps: [f32; 16] = std::array::from_fn(|j| largest(&x[j * 16..j * 16 + 16]) / -32.0);
    let d = f32_to_f16(largest(&steps) / -128.0);
    let inv_d = inverse(f16_to_f32(d));
    let scales = steps.map(|step| (step * inv_d).round().clamp(-128.0, 127.0) as i8);
    let mut block = BlockQ6_K { ql: [0; 128], qh: [0; 64], scales, d };
    for i in 0..256 {
        let inv = inverse(f16_to_f32(d) * f32::from(scales[i / 16]));
        let q = ((x[i] * inv).round().clamp(-32.0, 31.0) + 32.0) as u8;
        let (low, low_shift, high, high_shift) = place(i);
        block.ql[low] |= (q & 0xf) << low_shift;
        block.qh[high] |= q >> 4 << high_shift;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_takes_its_bits_from_both_planes() {
        let mut block = BlockQ6_K { scales: [1; 16], d: f32_to_f16(1.0), ..Zeroable::zeroed() };
        block.ql[64 + 40] = 0x5a;
        block.qh[32 + 8] = 0b11_10_01_00;
        let mut out = [9.0; 256];
        dequantize_block(&block, &mut out);
        // Second half, byte 40 of `ql`: weights 40 and 104; byte 8 of `qh`: weights 8, 40, 72 and 104.
        let set = [(168, -32.0 + 16.0 + 10.0), (200, 0.0), (232, 16.0 + 5.0)];
        for i in 0..256 {
            let expected = set.iter().find(|e| e.0 == i).map_or(-32.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn scales_may_be_zero_negative_or_extreme() {
        let mut block = BlockQ6_K::zeroed();
        let mut out = [1.0; 256];
        dequantize_block(&block, &mut out);
        assert_eq!(out, [0.0; 256]);
        block.d = f32_to_f16(65504.0);
        block.scales = std::array::from_fn(|j| [-128, 127][j % 2]);
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            assert_eq!(out[i], 65504.0 * [4096.0, -4064.0][i / 16 % 2]);
        }
    }

    #[test]
    fn weights_that_a_block_can_hold_are_quantized_to_that_block() {
        // Scales of both signs, and code -32, which fixes the sign, in every sub-block.
        let mut x: [f32; 256] = std::array::from_fn(|i| [-32.0, 31.0, 5.0, -1.0][i % 4]);
        let d = f16_to_f32(f32_to_f16(0.3));
        let scales: [i8; 16] = std::array::from_fn(|j| [-128, 127, 1, -60][j % 4]);
        for i in 0..256 {
            x[i] *= d * f32::from(scales[i / 16]);
        }
        let block = quantize_block(&x);
        assert_eq!((f16_to_f32(block.d), block.scales), (d, scales));
        let mut out = [0.0; 256];
        dequantize_block(&block, &mut out);
        assert_eq!(out, x);
    }
}
