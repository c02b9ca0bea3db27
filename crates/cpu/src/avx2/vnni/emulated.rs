//! The operations of [`Vectors`] computed lane by lane, as Intel's manual defines them (Software Developer's Manual,
//! volume 2, the "Operation" of each instruction). They need no instruction of their own.

use bytemuck::Pod;

use super::super::load::Plain;
use super::Tiles;
use super::vectors::Vectors;
use crate::kernels::{LaneSums, Panel, Q8Block, STRIP};

pub(super) struct Emulated;

type Ints = [i32; STRIP];
type Floats = [f32; STRIP];

/// `f` of every lane of two vectors.
#[inline(always)]
fn lanes<T: Copy, U: Copy>(a: [T; STRIP], b: [T; STRIP], f: fn(T, T) -> U) -> [U; STRIP] {
    std::array::from_fn(|r| f(a[r], b[r]))
}

/// The sum of the four products of an unsigned byte of `a` with a signed byte of `b`. No product leaves 16 bits.
#[inline(always)]
fn byte_products(a: i32, b: i32) -> i32 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    (0..4).map(|i| i32::from(a[i]) * i32::from(b[i] as i8)).sum()
}

/// The two signed 16-bit halves.
#[inline(always)]
fn words(v: i32) -> [i16; 2] {
    [v as i16, (v >> 16) as i16]
}

/// The sum of the two products of signed 16-bit halves. It wraps where all four are -32768.
#[inline(always)]
fn word_products(a: i32, b: i32) -> i32 {
    let (a, b) = (words(a), words(b));
    (i32::from(a[0]) * i32::from(b[0])).wrapping_add(i32::from(a[1]) * i32::from(b[1]))
}

/// The lower 16 bits of the products of halves.
#[inline(always)]
fn low_words(a: i32, b: i32) -> i32 {
    let (a, b) = (words(a), words(b));
    i32::from(a[0].wrapping_mul(b[0]) as u16) | i32::from(a[1].wrapping_mul(b[1])) << 16
}

impl Vectors for Emulated {
    type Ints = Ints;
    type Floats = Floats;

    unsafe fn tile<F: Tiles, const N: usize>(p: &Panel, n_blocks: usize, x: &[&Q8Block; N], sums: &mut [LaneSums; N]) {
        let mut acc: [Floats; N] = std::array::from_fn(|t| sums[t].0);
        // SAFETY: these vectors need no instructions.
        unsafe { F::tile::<Self, N>(p, n_blocks, x, &mut acc) };
        for t in 0..N {
            sums[t].0 = acc[t];
        }
    }

    #[inline(always)]
    unsafe fn load<T: Plain + Pod>(from: &T) -> Ints {
        let (lanes, _) = bytemuck::bytes_of(from).as_chunks::<4>();
        std::array::from_fn(|r| i32::from_le_bytes(lanes[r]))
    }

    #[inline(always)]
    unsafe fn load_floats(from: &[f32; 8]) -> Floats {
        *from
    }

    #[inline(always)]
    unsafe fn broadcast<T: Plain + Pod>(from: &T, i: usize) -> Ints {
        let (lanes, _) = bytemuck::bytes_of(from).as_chunks::<4>();
        [i32::from_le_bytes(lanes[i]); STRIP]
    }

    #[inline(always)]
    unsafe fn set1(v: i32) -> Ints {
        [v; STRIP]
    }

    #[inline(always)]
    unsafe fn set1_ps(v: f32) -> Floats {
        [v; STRIP]
    }

    #[inline(always)]
    unsafe fn dpbusd(acc: Ints, unsigned: Ints, signed: Ints) -> Ints {
        lanes(acc, lanes(unsigned, signed, byte_products), i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn dpwssd(acc: Ints, a: Ints, b: Ints) -> Ints {
        lanes(acc, lanes(a, b, word_products), i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn mullo_epi16(a: Ints, b: Ints) -> Ints {
        lanes(a, b, low_words)
    }

    #[inline(always)]
    unsafe fn mullo_epi32(a: Ints, b: Ints) -> Ints {
        lanes(a, b, i32::wrapping_mul)
    }

    #[inline(always)]
    unsafe fn add_epi32(a: Ints, b: Ints) -> Ints {
        lanes(a, b, i32::wrapping_add)
    }

    #[inline(always)]
    unsafe fn xor(a: Ints, b: Ints) -> Ints {
        lanes(a, b, |a, b| a ^ b)
    }

    #[inline(always)]
    unsafe fn upper_16(a: Ints) -> Ints {
        lanes(a, a, |a, _| a >> 16)
    }

    #[inline(always)]
    unsafe fn cvtepi32_ps(a: Ints) -> Floats {
        lanes(a, a, |a, _| a as f32)
    }

    #[inline(always)]
    unsafe fn add_ps(a: Floats, b: Floats) -> Floats {
        lanes(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub_ps(a: Floats, b: Floats) -> Floats {
        lanes(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul_ps(a: Floats, b: Floats) -> Floats {
        lanes(a, b, |a, b| a * b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::avx2::vnni::vectors::Ymm;
    use crate::kernels::{Isa, Kernels};

    /// A small generator (SplitMix64).
    struct Rng(u64);

    impl Rng {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }

        /// Any 32 bits; often with bytes at the ends of their ranges, where saturation would show.
        fn bits(&mut self) -> i32 {
            let extremes = [0x00, 0x01, 0x7f, 0x80, 0x81, 0xff];
            let bytes: [u8; 4] = std::array::from_fn(|_| match self.next() {
                r if r & 1 == 0 => (r >> 8) as u8,
                r => extremes[(r >> 8) as usize % extremes.len()],
            });
            i32::from_le_bytes(bytes)
        }

        /// A finite number, from tiny to large.
        fn float(&mut self) -> f32 {
            let v = f32::from_bits(self.bits() as u32);
            if v.is_finite() { v } else { 1.5 }
        }

        fn panel(&mut self) -> Panel {
            let mut p = Panel::ZERO;
            p.codes.as_flattened_mut().as_flattened_mut().fill_with(|| self.next() as u8);
            p.d.as_flattened_mut().fill_with(|| self.float());
            p
        }
    }

    /// The lanes of vectors of any kind.
    fn lanes_of<V: Vectors>(v: V::Ints) -> Vec<i32> {
        assert_eq!(size_of::<V::Ints>(), STRIP * 4);
        // SAFETY: vectors of integers have no padding, and any bits are integers.
        unsafe { std::slice::from_raw_parts((&raw const v).cast::<i32>(), STRIP) }.to_vec()
    }

    /// As [`lanes_of`]; NaN, whose bits are not specified, as one.
    fn floats_of<V: Vectors>(v: V::Floats) -> Vec<u32> {
        assert_eq!(size_of::<V::Floats>(), STRIP * 4);
        // SAFETY: vectors of floats have no padding, and any bits are floats.
        let lanes = unsafe { std::slice::from_raw_parts((&raw const v).cast::<f32>(), STRIP) };
        lanes.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
    }

    /// Every operation on vectors drawn from `seed`: what it gives, lane by lane. The vectors are loaded as tiles load
    /// them, from panels, so that loads are among the operations.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    unsafe fn every_operation<V: Vectors>(seed: u64) -> Vec<(&'static str, Vec<i32>, Vec<u32>)> {
        let mut rng = Rng(seed);
        let p = Rng(seed + 1000).panel();
        let mut dwords = [[[0u8; 4]; 8]; 3];
        dwords.as_flattened_mut().fill_with(|| rng.bits().to_le_bytes());
        let (float, any) = (rng.float(), rng.bits());
        // SAFETY: the caller's promise.
        unsafe {
            let a = V::load(&p.codes[0][1]);
            let b = V::xor(V::load(&p.codes[7][7]), V::broadcast(&dwords[0], 3));
            let (c, d) = (V::broadcast(&dwords[1], 7), V::broadcast(&dwords[2], 0));
            let (f, g) = (V::load_floats(&p.d[3]), V::set1_ps(float));
            let ints = [
                ("load", a),
                ("broadcast", c),
                ("set1", V::set1(any)),
                ("xor", b),
                ("dpbusd", V::dpbusd(a, b, c)),
                ("dpbusd of extremes", V::dpbusd(a, d, c)),
                ("dpwssd", V::dpwssd(a, b, c)),
                ("dpwssd of extremes", V::dpwssd(c, V::set1(i32::from_le_bytes([0, 0x80, 0, 0x80])), d)),
                ("mullo_epi16", V::mullo_epi16(a, c)),
                ("mullo_epi32", V::mullo_epi32(a, c)),
                ("add_epi32", V::add_epi32(a, c)),
                ("upper_16", V::upper_16(a)),
            ];
            let floats = [
                ("load_floats", f),
                ("set1_ps", g),
                ("cvtepi32_ps", V::cvtepi32_ps(a)),
                ("add_ps", V::add_ps(f, g)),
                ("sub_ps", V::sub_ps(f, g)),
                ("mul_ps", V::mul_ps(f, g)),
            ];
            let ints = ints.map(|(name, v)| (name, lanes_of::<V>(v), Vec::new()));
            ints.into_iter().chain(floats.map(|(name, v)| (name, Vec::new(), floats_of::<V>(v)))).collect()
        }
    }

    #[test]
    fn instructions_of_avx_vnni_are_what_the_manual_says() {
        if Kernels::for_isa(Isa::AvxVnni).is_none() {
            return println!("skipped: needs a CPU with {}", Isa::AvxVnni);
        }
        for seed in 0..10_000 {
            // SAFETY: the CPU has the instructions of `Ymm`, and the emulation needs none.
            let (got, want) = unsafe { (every_operation::<Ymm>(seed), every_operation::<Emulated>(seed)) };
            assert_eq!(got, want, "seed {seed}");
        }
    }

    /// The examples of the manual's rules that are easy to get wrong: which operand is signed, and that sums wrap.
    #[test]
    fn emulated_sums_have_the_right_signs_and_wrap() {
        type V = Emulated;
        let set1 = |v: [u8; 4]| i32::from_le_bytes(v);
        // SAFETY: the emulation needs no instructions.
        unsafe {
            let sum = |acc, a, b| V::dpbusd(V::set1(acc), V::set1(set1(a)), V::set1(set1(b)))[5];
            assert_eq!(sum(7, [255, 0, 0, 0], [0x80, 1, 1, 1]), 7 - 255 * 128);
            assert_eq!(sum(0, [255; 4], [127; 4]), 4 * 255 * 127);
            assert_eq!(sum(0, [1, 2, 3, 4], [1, 0, 0xff, 10]), 1 - 3 + 40);
            assert_eq!(sum(i32::MAX, [1, 0, 0, 0], [1, 0, 0, 0]), i32::MIN);
            let words = |acc, a, b| V::dpwssd(V::set1(acc), V::set1(set1(a)), V::set1(set1(b)))[0];
            assert_eq!(words(1, [0xff, 0xff, 2, 0], [3, 0, 0xfe, 0xff]), 1 - 3 - 4);
            assert_eq!(words(0, [0, 0x80, 0, 0x80], [0, 0x80, 0, 0x80]), i32::MIN);
            assert_eq!(V::mullo_epi16(V::set1(set1([0xff, 0xff, 0, 1])), V::set1(set1([2, 0, 0, 1])))[0], 0xfffe);
            assert_eq!(V::upper_16(V::set1(set1([0, 0, 0xff, 0xff])))[0], -1);
            assert_eq!(V::cvtepi32_ps(V::set1(16_777_217))[0], 16_777_216.0);
            assert_eq!(V::cvtepi32_ps(V::set1(16_777_219))[0], 16_777_220.0);
        }
    }
}
