//! Sums of tiles of several rows, four with one group of eight tokens or two with two groups, from codes by row.
//!
//! Codes in the order of the file take no shuffles to unpack, and with so few tokens unpacking is a good part of the work. Several rows
//! share the load of a group's vector: with one row, a multiplication would cost two loads.

use std::arch::asm;
use std::arch::x86_64::*;

use super::tile::{Rows, Sums};
use crate::kernels::{LANES, Lanes, STRIP};

/// Where dword `$i` of a row is, counted from its first: eight are 32 columns, and the next 32 lie behind those of seven other rows.
macro_rules! place {
    ($i:literal) => {
        concat!("256 * (", $i, " / 8) + 4 * (", $i, " mod 8)")
    };
}

/// Four rows with one group: the first dword starts the sums, the others add to them.
macro_rules! four_rows {
    ($p:ident, $x:ident, $y:ident, [$($i:literal)*]) => {
        asm!(
            "vmovdqa {x}, [{x0}]",
            "vpbroadcastd {y0}, [{p}]",
            "vpmaddubsw {y0}, {y0}, {x}",
            "vpbroadcastd {y1}, [{p} + 32]",
            "vpmaddubsw {y1}, {y1}, {x}",
            "vpbroadcastd {y2}, [{p} + 64]",
            "vpmaddubsw {y2}, {y2}, {x}",
            "vpbroadcastd {y3}, [{p} + 96]",
            "vpmaddubsw {y3}, {y3}, {x}",
            $(
                concat!("vmovdqa {x}, [{x0} + 32 * ", $i, "]"),
                concat!("vpbroadcastd {z}, [{p} + ", place!($i), "]"),
                "vpmaddubsw {z}, {z}, {x}",
                "vpaddw {y0}, {y0}, {z}",
                concat!("vpbroadcastd {z}, [{p} + 32 + ", place!($i), "]"),
                "vpmaddubsw {z}, {z}, {x}",
                "vpaddw {y1}, {y1}, {z}",
                concat!("vpbroadcastd {z}, [{p} + 64 + ", place!($i), "]"),
                "vpmaddubsw {z}, {z}, {x}",
                "vpaddw {y2}, {y2}, {z}",
                concat!("vpbroadcastd {z}, [{p} + 96 + ", place!($i), "]"),
                "vpmaddubsw {z}, {z}, {x}",
                "vpaddw {y3}, {y3}, {z}",
            )*
            x = out(ymm_reg) _,
            z = out(ymm_reg) _,
            p = in(reg) $p,
            x0 = in(reg) $x[0],
            y0 = out(ymm_reg) $y[0][0],
            y1 = out(ymm_reg) $y[1][0],
            y2 = out(ymm_reg) $y[2][0],
            y3 = out(ymm_reg) $y[3][0],
            options(pure, readonly, nostack, preserves_flags),
        )
    };
}

/// Two rows with two groups, in the same way. Multiplications in a row leave additions fewer chances to take their units.
macro_rules! two_rows {
    ($p:ident, $x:ident, $y:ident, [$($i:literal)*]) => {
        asm!(
            "vpbroadcastd {v}, [{p}]",
            "vpbroadcastd {w}, [{p} + 32]",
            "vpmaddubsw {y0}, {v}, [{x0}]",
            "vpmaddubsw {y1}, {v}, [{x1}]",
            "vpmaddubsw {y2}, {w}, [{x0}]",
            "vpmaddubsw {y3}, {w}, [{x1}]",
            $(
                concat!("vmovdqa {z2}, [{x0} + 32 * ", $i, "]"),
                concat!("vmovdqa {z3}, [{x1} + 32 * ", $i, "]"),
                concat!("vpbroadcastd {v}, [{p} + ", place!($i), "]"),
                concat!("vpbroadcastd {w}, [{p} + 32 + ", place!($i), "]"),
                "vpmaddubsw {z0}, {v}, {z2}",
                "vpmaddubsw {z1}, {v}, {z3}",
                "vpmaddubsw {z2}, {w}, {z2}",
                "vpmaddubsw {z3}, {w}, {z3}",
                "vpaddw {y0}, {y0}, {z0}",
                "vpaddw {y1}, {y1}, {z1}",
                "vpaddw {y2}, {y2}, {z2}",
                "vpaddw {y3}, {y3}, {z3}",
            )*
            v = out(ymm_reg) _,
            w = out(ymm_reg) _,
            z0 = out(ymm_reg) _,
            z1 = out(ymm_reg) _,
            z2 = out(ymm_reg) _,
            z3 = out(ymm_reg) _,
            p = in(reg) $p,
            x0 = in(reg) $x[0],
            x1 = in(reg) $x[1],
            y0 = out(ymm_reg) $y[0][0],
            y1 = out(ymm_reg) $y[0][1],
            y2 = out(ymm_reg) $y[1][0],
            y3 = out(ymm_reg) $y[1][1],
            options(pure, readonly, nostack, preserves_flags),
        )
    };
}

/// The sums of `SUMS` results of `maddubs` in 16-bit lanes: dwords `from ..` of the codes of `M` rows with `N` groups.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn unsigned_16<const SUMS: usize, const L: usize, const M: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    from: usize,
) -> [Sums<N>; M] {
    assert!(L == LANES && from + SUMS <= 64 && from.is_multiple_of(SUMS.min(8)) && w.r + M <= STRIP);
    let p = w.panel.codes[from / 8][w.r][4 * (from % 8)..].as_ptr();
    let mut codes = [p.cast::<i8>(); N];
    for t in 0..N {
        codes[t] = x[t].codes[from..].as_ptr().cast();
    }
    let mut y = [[_mm256_setzero_si256(); N]; M];
    // SAFETY: of the codes of `M` rows, `SUMS` dwords are read, of a group's codes as many whole entries, aligned as groups are. Both
    // have them by the assertion.
    unsafe {
        match (M, N, SUMS) {
            (4, 1, 16) => four_rows!(p, codes, y, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]),
            (4, 1, 8) => four_rows!(p, codes, y, [1 2 3 4 5 6 7]),
            (4, 1, 4) => four_rows!(p, codes, y, [1 2 3]),
            (2, 2, 16) => two_rows!(p, codes, y, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]),
            (2, 2, 8) => two_rows!(p, codes, y, [1 2 3 4 5 6 7]),
            (2, 2, 4) => two_rows!(p, codes, y, [1 2 3]),
            _ => unreachable!("{SUMS} results of maddubs, of {M} rows with {N} groups"),
        }
    }
    y
}

/// Has compilers compute the sums of four rows before they go on. They would finish one row after the other, and keep what the
/// others' sums are made of in memory.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn settle<const M: usize, const N: usize>(sums: &mut [Sums<N>; M]) {
    if let [a, b, c, d] = sums.as_flattened_mut()
        && M == 4
    {
        // SAFETY: there are no instructions.
        unsafe {
            asm!(
                "/* {a} {b} {c} {d} */",
                a = inout(ymm_reg) * a,
                b = inout(ymm_reg) * b,
                c = inout(ymm_reg) * c,
                d = inout(ymm_reg) * d,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}
