//! F32, F16 and BF16: plain floats, little-endian. The block formats keep their scales as the same F16 bytes, so the
//! conversions here are what every other type reads its scales with.

use half::{bf16, f16};

/// The value of an IEEE half as the file stores it. Exact, for every bit pattern.
pub fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// The nearest IEEE half (ties to even), as the file stores it; infinite above 65,519.
pub fn f32_to_f16(x: f32) -> [u8; 2] {
    f16::from_f32(x).to_le_bytes()
}

/// The value of a bfloat16 as the file stores it. Exact, for every bit pattern.
pub fn bf16_to_f32(bytes: [u8; 2]) -> f32 {
    bf16::from_le_bytes(bytes).to_f32()
}

/// The nearest bfloat16 (ties to even), as the file stores it.
pub fn f32_to_bf16(x: f32) -> [u8; 2] {
    bf16::from_f32(x).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_convert_at_the_edges_of_their_range() {
        assert_eq!(f16_to_f32([0xff, 0x7b]), 65504.0);
        assert_eq!(f16_to_f32([0x01, 0x80]), -(2f32.powi(-24)));
        assert_eq!(f16_to_f32([0x00, 0x7c]), f32::INFINITY);
        assert!(f16_to_f32([0x01, 0x7e]).is_nan());
        assert_eq!(f32_to_f16(65504.0), [0xff, 0x7b]);
        assert_eq!(f32_to_f16(1e6), [0x00, 0x7c]);
    }

    #[test]
    fn bfloats_are_the_upper_half_of_a_float() {
        for bits in [0u16, 0x8000, 0x3f80, 0xbf81, 0x7f7f, 0x0001, 0x7f80] {
            let value = f32::from_bits(u32::from(bits) << 16);
            assert_eq!(bf16_to_f32(bits.to_le_bytes()).to_bits(), value.to_bits());
            assert_eq!(f32_to_bf16(value), bits.to_le_bytes());
        }
    }
}
