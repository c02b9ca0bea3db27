//! Tiles of attention's products of codes with AVX2, as assembly.
//!
//! Compilers spend a quarter of a tile's instructions on addresses, and instructions are what is scarce where another thread, or
//! another tenant of the machine, runs on the same core.

use std::arch::asm;
use std::arch::x86_64::*;

use super::vector::Operands;

/// Pair `$k` of all rows with the two vectors at `$b`.
macro_rules! pair {
    ($k:literal, $b:literal, $next:literal, $rows:tt) => {
        concat!(
            "vmovdqu {b0}, [", $b, "]\n",
            "vmovdqu {b1}, [", $b, " + 32]\n",
            "prefetcht1 [", $next, "]\n",
            pair!(@rows $k, $rows),
        )
    };
    (@rows $k:literal, 4) => {
        concat!(
            pair!(@row $k, "{a}", "s0", "s1"),
            pair!(@row $k, "{a} + {lda}", "s2", "s3"),
            pair!(@row $k, "{a} + 2 * {lda}", "s4", "s5"),
            pair!(@row $k, "{a3}", "s6", "s7"),
        )
    };
    (@rows $k:literal, 6) => {
        concat!(
            pair!(@rows $k, 4),
            pair!(@row $k, "{a3} + {lda}", "s8", "s9"),
            pair!(@row $k, "{a3} + 2 * {lda}", "s10", "s11"),
        )
    };
    (@row $k:literal, $row:literal, $y:literal, $z:literal) => {
        concat!(
            "vpbroadcastd {t}, [", $row, " + 4 * ", $k, "]\n",
            "vpmaddwd {u}, {t}, {b0}\n",
            "vpmaddwd {t}, {t}, {b1}\n",
            "vpaddd {", $y, "}, {", $y, "}, {u}\n",
            "vpaddd {", $z, "}, {", $z, "}, {t}\n",
        )
    };
}

/// Four pairs, and on to the next.
macro_rules! four_pairs {
    ($rows:tt, $a:literal, $b:literal, $c:literal, $d:literal) => {
        concat!(
            pair!($a, "{b}", "{next}", $rows),
            pair!($b, "{b} + {ldb}", "{next} + {step}", $rows),
            pair!($c, "{b} + 2 * {ldb}", "{next} + 2 * {step}", $rows),
            pair!($d, "{b} + {ldb3}", "{next} + {step3}", $rows),
            "lea {b}, [{b} + 4 * {ldb}]\n",
            "lea {next}, [{next} + 4 * {step}]\n",
        )
    };
}

/// All pairs of a tile, eight at a time.
macro_rules! eights {
    ($of:ident, $sums:ident, $n:ident, $rows:tt, [$($r:literal $y:ident $z:ident),*]) => {
        asm!(
            "2:",
            four_pairs!($rows, "0", "1", "2", "3"),
            four_pairs!($rows, "4", "5", "6", "7"),
            "add {a}, 32",
            "add {a3}, 32",
            "dec {n}",
            "jnz 2b",
            b0 = out(ymm_reg) _,
            b1 = out(ymm_reg) _,
            t = out(ymm_reg) _,
            u = out(ymm_reg) _,
            a = inout(reg) $of.a => _,
            a3 = inout(reg) $of.a.add(3 * $of.lda) => _,
            lda = in(reg) 4 * $of.lda,
            b = inout(reg) $of.b => _,
            ldb = in(reg) 4 * $of.ldb,
            ldb3 = in(reg) 12 * $of.ldb,
            next = inout(reg) $of.ahead => _,
            step = in(reg) $of.step,
            step3 = in(reg) 3 * $of.step,
            n = inout(reg) $n => _,
            $($y = inout(ymm_reg) $sums[$r][0], $z = inout(ymm_reg) $sums[$r][1],)*
            options(readonly, nostack),
        )
    };
}

/// [`Vector::add_first`](super::vector::Vector::add_first) for tiles of four and six rows by two vectors.
///
/// # Safety
/// What `of` tells is there.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn add_eights<const R: usize, const C: usize>(sums: &mut [[__m256i; C]; R], of: &Operands) -> usize {
    let n = of.n_pairs / 8;
    if C != 2 || R != 4 && R != 6 || n == 0 {
        return 0;
    }
    // SAFETY: `8 n` pairs of `R` rows, and as many rows of two vectors, are read, which there are by the caller's promise. A prefetch
    // accesses nothing.
    unsafe {
        match R {
            4 => eights!(of, sums, n, 4, [0 s0 s1, 1 s2 s3, 2 s4 s5, 3 s6 s7]),
            _ => eights!(of, sums, n, 6, [0 s0 s1, 1 s2 s3, 2 s4 s5, 3 s6 s7, 4 s8 s9, 5 s10 s11]),
        }
    }
    8 * n
}
