//! What one core can do at best: int8 multiply-adds per second and clock cycles per second, both from registers alone.
//!
//! Products of a model are held against these, so they are measured by loops that wait for nothing but the units in question.
//! Whoever wants the limit of several cores runs them on as many threads at once, as cores slow each other down.

use std::hint::black_box;
use std::time::Instant;

use crate::kernels::{Isa, Kernels};

/// Seconds that one measurement takes at least; the best of [`N_TRY`] counts, as whatever disturbs only slows.
const SECONDS: f64 = 0.01;
const N_TRY: usize = 3;

/// Multiply-adds of bytes per second of the calling thread with the instructions that the kernels of `isa` use.
///
/// - AVX2: the chain of a Q4_K product, eight `vpmaddubsw` summed in 16 bits, then one `vpmaddwd` and a sum in 32 bits; 32
///   multiply-adds are counted per `vpmaddubsw` and none for the rest. Types whose products do not fit eight to a 16-bit sum reach less.
/// - AVX-VNNI and AVX-512 VNNI: `vpdpbusd`, of 32 and 64 multiply-adds.
/// - Scalar: products of bytes summed in 32 bits, as the compiler vectorises them for the build's target.
///
/// The CPU has `isa`, as whoever has its kernels knows.
pub fn int8_macs_per_s(isa: Isa) -> f64 {
    assert!(Kernels::for_isa(isa).is_some(), "this CPU lacks {isa}");
    match isa {
        Isa::Scalar => rate(scalar),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has the instruction set.
        Isa::Avx2 => rate(|n| unsafe { x86::avx2(n) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has the instruction set.
        Isa::AvxVnni => rate(|n| unsafe { x86::avx_vnni(n) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the CPU has the instruction set.
        Isa::Avx512Vnni => rate(|n| unsafe { x86::avx512_vnni(n) }),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("no CPU of another architecture has {isa}"),
    }
}

/// Clock cycles per second of the calling thread, by a chain of additions and exclusive ors, each of which needs the one before: every
/// core of today takes one cycle for each.
pub fn clock_hz() -> f64 {
    rate(|n| {
        let (a, b) = (black_box(0x9e37_79b9_7f4a_7c15_u64), black_box(0x0123_4567_89ab_cdef_u64));
        let mut x = black_box(1u64);
        for _ in 0..n {
            // Operands that the compiler does not know: it cannot sum the chain up, nor can a core that folds constants.
            for _ in 0..16 {
                x = x.wrapping_add(a) ^ b;
            }
        }
        black_box(x);
        n * 32
    })
}

/// Units per second of `work`, which takes a number of rounds and returns how many units they were.
fn rate(work: impl Fn(usize) -> usize) -> f64 {
    let timed = |n| {
        let start = Instant::now();
        let units = work(n);
        (units as f64, start.elapsed().as_secs_f64())
    };
    let mut n = 1000;
    while timed(n).1 < SECONDS {
        n *= 2;
    }
    (0..N_TRY).map(|_| timed(n)).map(|(units, seconds)| units / seconds).fold(0.0, f64::max)
}

fn scalar(n: usize) -> usize {
    const LANES: usize = 16;
    let w: [[i8; LANES]; 4] = black_box([[3; LANES], [5; LANES], [7; LANES], [9; LANES]]);
    let mut x: [i8; LANES] = black_box([7; LANES]);
    let mut sums = [0i32; LANES];
    for _ in 0..n {
        for w in &w {
            for l in 0..LANES {
                sums[l] = sums[l].wrapping_add(i32::from(w[l]) * i32::from(x[l]));
            }
        }
        // The products of one round are no others' products.
        x.iter_mut().for_each(|x| *x = x.wrapping_add(1));
    }
    black_box(sums);
    n * 4 * LANES
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx2")]
    pub fn avx2(n: usize) -> usize {
        let codes = |i: i8| _mm256_set1_epi8(black_box(i));
        let (w, step, scales) = ([codes(1), codes(2), codes(3), codes(4)], codes(1), _mm256_set1_epi16(black_box(3)));
        let mut x = [codes(5), codes(6), codes(7), codes(8)];
        let mut sums = [_mm256_setzero_si256(); 2];
        for _ in 0..n {
            // Two chains of eight, sixteen different pairs of operands.
            for (chain, sum) in sums.iter_mut().enumerate() {
                let mut products = _mm256_setzero_si256();
                for x in &x[2 * chain..2 * chain + 2] {
                    for w in &w {
                        products = _mm256_add_epi16(products, _mm256_maddubs_epi16(*w, *x));
                    }
                }
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(products, scales));
            }
            // The products of one round are no others' products.
            x.iter_mut().for_each(|x| *x = _mm256_add_epi8(*x, step));
        }
        black_box(sums);
        n * 2 * 8 * 32
    }

    /// Sums that do not wait for each other: more than a core's multipliers have under way.
    const N_SUM: usize = 12;

    #[target_feature(enable = "avx2,avxvnni")]
    pub fn avx_vnni(n: usize) -> usize {
        let (w, x) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
        let mut sums = [_mm256_setzero_si256(); N_SUM];
        for _ in 0..n {
            sums.iter_mut().for_each(|sum| *sum = _mm256_dpbusd_avx_epi32(*sum, w, x));
        }
        black_box(sums);
        n * N_SUM * 32
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn avx512_vnni(n: usize) -> usize {
        let (w, x) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); N_SUM];
        for _ in 0..n {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, w, x));
        }
        black_box(sums);
        n * N_SUM * 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_those_of_a_core() {
        let clock = clock_hz();
        assert!((2e8..2e10).contains(&clock), "{clock} Hz");
        let per_cycle = |isa| int8_macs_per_s(isa) / clock;
        // Noise of other processes moves both figures, but not by a factor of ten.
        let scalar = per_cycle(Isa::Scalar);
        assert!((0.1..64.0).contains(&scalar), "{scalar} MAC/cycle");
        for isa in Isa::ALL.into_iter().filter(|isa| *isa != Isa::Scalar) {
            match Kernels::for_isa(isa) {
                // Two multiplying units of 64 bytes are the most that cores have.
                Some(_) => {
                    assert!((4.0..200.0).contains(&per_cycle(isa)), "{isa}: {} MAC/cycle", per_cycle(isa));
                }
                None => println!("skipped: needs a CPU with {isa}"),
            }
        }
    }
}
