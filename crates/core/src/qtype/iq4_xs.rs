//! IQ4_XS: 256 weights coded as in IQ4_NL in 8 sub-blocks, each with a 6-bit signed scale. `w = d · sc · VALUES[q]`.

use super::float::f16_to_f32;
use super::iq4_nl::IQ4_NL_VALUES;
use super::nibble;
use bytemuck::{Pod, Zeroable};

/// 256 weights in 136 bytes.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4_XS {
    /// Scale of the scales, an F16.
    pub d: [u8; 2],
    /// High two bits of the scales, a little-endian 16-bit number with sub-block 0 in its lowest bits.
    pub scales_h: [u8; 2],
    /// Low four bits of the scales: sub-block `2 i` in the low half of byte `i`, sub-block `2 i + 1` in the high half.
    pub scales_l: [u8; 4],
    /// Codes 0..=15: sixteen bytes per sub-block, laid out as in IQ4_NL.
    pub qs: [[u8; 16]; 8],
}

/// Scale, -32..=31, of sub-block `j` of 8.
pub fn scale(j: usize, scales_h: [u8; 2], scales_l: &[u8; 4]) -> i8 {
    let low = scales_l[j / 2] >> (j % 2 * 4) & 0xf;
    let high = (u16::from_le_bytes(scales_h) >> (j * 2)) as u8 & 3;
    (low | high << 4) as i8 - 32
}

/// Writes the block's 256 weights.
pub fn dequantize_block(block: &BlockIQ4_XS, out: &mut [f32]) {
    let d = f16_to_f32(block.d);
    for j in 0..8 {
        let scale = d * f32::from(scale(j, block.scales_h, &block.scales_l));
        for i in 0..32 {
            let q = usize::from(nibble(&block.qs[j], i));
            out[j * 32 + i] = scale * f32::from(IQ4_NL_VALUES[q]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::float::f32_to_f16;
    use super::*;

    #[test]
    fn scales_are_six_bits_from_two_places() {
        for j in 0..8 {
            let mut scales_l = [0; 4];
            scales_l[j / 2] = if j % 2 == 0 { 0x0d } else { 0xd0 };
            let scales_h = (2u16 << (2 * j)).to_le_bytes();
            for other in 0..8 {
                let expected = if other == j { 13 } else { -32 };
                assert_eq!(scale(other, scales_h, &scales_l), expected, "{other} when {j} is set");
            }
        }
        assert_eq!(scale(7, [0xff; 2], &[0xff; 4]), 31);
    }

    #[test]
    fn each_sub_block_has_sixteen_bytes() {
        // Scale 1 everywhere: low four bits 1, high two bits 2.
        let mut block = BlockIQ4_XS { d: f32_to_f16(-1.0), scales_h: [0xaa; 2], scales_l: [0x11; 4], qs: [[0; 16]; 8] };
        block.qs[5][3] = 0xf8;
        let mut out = [0.0; 256];
        dequantize_block(&block, &mut out);
        for i in 0..256 {
            let expected = [(163, -1.0), (179, -113.0)].iter().find(|e| e.0 == i).map_or(127.0, |e| e.1);
            assert_eq!(out[i], expected, "weight {i}");
        }
    }

    #[test]
    fn a_zero_block_is_zero_and_the_largest_is_finite() {
        let mut block = BlockIQ4_XS::zeroed();
        let mut out = [1.0; 256];
        dequantize_block(&block, &mut out);
        assert_eq!(out, [0.0; 256]);
        block.d = f32_to_f16(65504.0);
        dequantize_block(&block, &mut out);
        assert_eq!(out, [65504.0 * 32.0 * 127.0; 256]);
    }
}
