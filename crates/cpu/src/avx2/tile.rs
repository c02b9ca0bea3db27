//! Tiles: unpacked weight rows with several tokens, in either of two arrangements.
//!
//! Groups of eight tokens (`Lanes<8>`): a dword of one weight row, four columns, is broadcast and meets the same columns of
//! eight tokens, one in each lane, for three to five such groups. The tokens' vectors are operands in memory, so that a
//! multiplication costs no load of its own. One or two groups meet several rows instead (`by_row`). Tokens that fill no group
//! (`Lanes<1>`): that dword of eight rows, one in each lane, meets a broadcast of one token, for one to five tokens, and no lane is
//! idle.
//!
//! `maddubs` results are summed in 16 bits as often as their largest value allows (eight times for codes to 15, and sixteen times
//! for all but strange activations; four for 31, and for 63 that stand for -32 to 31) before `madd` widens them.

use std::arch::asm;
use std::arch::x86_64::*;

use super::by_row;
use super::load::{Plain, broadcast, spread, spread_float, vector};
use crate::kernels::{LANES, Lanes, Panel, STRIP};

/// Integer sums: of a weight row with `N` groups of tokens, or of eight rows with `N` tokens.
pub(super) type Sums<const N: usize> = [__m256i; N];

/// The same as floats.
pub(super) type Acc<const N: usize> = [__m256; N];

/// An unpacked super-block of eight rows, of which those from `r` on take part where tokens come in groups, as many as a tile has,
/// else all.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, const L: usize> {
    pub(super) panel: &'a Panel,
    pub(super) r: usize,
}

impl<const L: usize> Rows<'_, L> {
    /// The vector of a field of the panel.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn of<P: Plain>(self, field: &P) -> __m256i {
        if L == LANES { broadcast(field, self.r) } else { vector(field) }
    }

    /// [`Rows::of`] for floats.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn floats_of(self, field: &[f32; 8]) -> __m256 {
        _mm256_castsi256_ps(self.of(field))
    }

    /// From the `m`-th of these rows on.
    #[inline(always)]
    fn skip(self, m: usize) -> Self {
        Rows { r: self.r + m, ..self }
    }
}

/// Unsigned codes in pairs of blocks with integer scales and minima per 32 columns; `SUMS` results of `maddubs` fit 16 bits, and
/// where tokens are `NARROW`, products of their sums and sub-scales do.
///
/// Lower halves of lanes sum one block and upper halves the other, so that one multiplication takes in the scales of both.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_pairs<const SUMS: usize, const NARROW: bool, const L: usize, const M: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    acc: &mut [Acc<N>; M],
) {
    let mut sum = [[_mm256_setzero_si256(); N]; M];
    for k in 0..4 {
        for g in 0..16 / SUMS {
            let y = unsigned_16::<SUMS, L, M, N>(w, x, 16 * k + g * SUMS);
            for m in 0..M {
                let scales = w.skip(m).of(&w.panel.scales[k]);
                for t in 0..N {
                    let scales = _mm256_mullo_epi16(scales, spread(&x[t].scales[k]));
                    sum[m][t] = _mm256_add_epi32(sum[m][t], _mm256_madd_epi16(y[m][t], scales));
                }
            }
        }
    }
    for m in 0..M {
        let mut min = [_mm256_setzero_si256(); N];
        for i in 0..4 {
            let mins = w.skip(m).of(&w.panel.mins[i]);
            for t in 0..N {
                let product = if NARROW {
                    _mm256_madd_epi16(mins, spread(&x[t].scaled_sums[i]))
                } else {
                    _mm256_madd_epi16(_mm256_mullo_epi16(mins, spread(&x[t].scales[i])), spread(&x[t].sums[i]))
                };
                min[t] = _mm256_add_epi32(min[t], product);
            }
        }
        finish_super(w.skip(m), x, &sum[m], &min, &mut acc[m]);
    }
}

/// The sums of `SUMS` results of `maddubs` in 16-bit lanes: dwords `from ..` of the codes, which are by row where rows are several.
#[target_feature(enable = "avx2")]
#[inline]
fn unsigned_16<const SUMS: usize, const L: usize, const M: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    from: usize,
) -> [Sums<N>; M] {
    if M > 1 {
        return by_row::unsigned_16::<SUMS, L, M, N>(w, x, from);
    }
    if N > 1 {
        return [unsigned_16_in_order::<SUMS, L, N>(w, x, from); M];
    }
    let mut y = [_mm256_setzero_si256(); N];
    for i in from..from + SUMS {
        let w = w.of(&w.panel.codes.as_flattened()[i]);
        for t in 0..N {
            let product = _mm256_maddubs_epi16(w, spread(&x[t].codes[i]));
            y[t] = if i == from { product } else { _mm256_add_epi16(y[t], product) };
        }
    }
    [y; M]
}

/// What one dword of the weights does to every sum, as assembly: `first` starts the sums, `next` adds to them. `groups` of tokens
/// are vectors in memory that meet one row's dword; tokens `alone` are broadcast and meet those of eight rows. `signed` weights
/// give their signs to the tokens.
macro_rules! dword {
    (groups first $(($y:ident $x:ident))*) => {
        concat!(
            "vpbroadcastd {w}, [{p}]\n",
            $("vpmaddubsw {", stringify!($y), "}, {w}, [{", stringify!($x), "}]\n",)*
        )
    };
    (groups next $i:literal $(($y:ident $x:ident))*) => {
        concat!(
            "vpbroadcastd {w}, [{p} + 32 * ", $i, "]\n",
            $("vpmaddubsw {z}, {w}, [{", stringify!($x), "} + 32 * ", $i, "]\n",
              "vpaddw {", stringify!($y), "}, {", stringify!($y), "}, {z}\n",)*
        )
    };
    (alone first $(($y:ident $x:ident))*) => {
        concat!(
            "vmovdqa {w}, [{p}]\n",
            $("vpbroadcastd {z}, [{", stringify!($x), "}]\n",
              "vpmaddubsw {", stringify!($y), "}, {w}, {z}\n",)*
        )
    };
    (alone next $i:literal $(($y:ident $x:ident))*) => {
        concat!(
            "vmovdqa {w}, [{p} + 32 * ", $i, "]\n",
            $("vpbroadcastd {z}, [{", stringify!($x), "} + 4 * ", $i, "]\n",
              "vpmaddubsw {z}, {w}, {z}\n",
              "vpaddw {", stringify!($y), "}, {", stringify!($y), "}, {z}\n",)*
        )
    };
    (signed first $(($y:ident $x:ident))*) => {
        concat!(
            "vpbroadcastd {w}, [{p}]\n",
            "vpabsb {m}, {w}\n",
            $("vmovdqa {z}, [{", stringify!($x), "}]\n",
              "vpsignb {z}, {z}, {w}\n",
              "vpmaddubsw {z}, {m}, {z}\n",
              "vpmaddwd {", stringify!($y), "}, {z}, {ones}\n",)*
        )
    };
    (signed next $i:literal $(($y:ident $x:ident))*) => {
        concat!(
            "vpbroadcastd {w}, [{p} + 32 * ", $i, "]\n",
            "vpabsb {m}, {w}\n",
            $("vmovdqa {z}, [{", stringify!($x), "} + 32 * ", $i, "]\n",
              "vpsignb {z}, {z}, {w}\n",
              "vpmaddubsw {z}, {m}, {z}\n",
              "vpmaddwd {z}, {z}, {ones}\n",
              "vpaddd {", stringify!($y), "}, {", stringify!($y), "}, {z}\n",)*
        )
    };
}

/// All dwords of the sums of `N` tokens or groups in the one order in which no sum waits for another. Compilers take the dwords of
/// one sum after another: an eighth slower, and half as fast where weights are signed.
macro_rules! dwords {
    ($n:expr, $kind:ident, $p:ident, $codes:ident, $sums:ident, $i:tt, $more:tt) => {
        match $n {
            1 => dwords!(@of $kind, $p, $codes, $sums, ((y0 x0)), [0 y0 x0], $i, $more),
            2 => dwords!(@of $kind, $p, $codes, $sums, ((y0 x0)(y1 x1)), [0 y0 x0, 1 y1 x1], $i, $more),
            3 => dwords!(
                @of $kind, $p, $codes, $sums, ((y0 x0)(y1 x1)(y2 x2)), [0 y0 x0, 1 y1 x1, 2 y2 x2], $i, $more
            ),
            4 => dwords!(
                @of $kind, $p, $codes, $sums, ((y0 x0)(y1 x1)(y2 x2)(y3 x3)),
                [0 y0 x0, 1 y1 x1, 2 y2 x2, 3 y3 x3], $i, $more
            ),
            5 => dwords!(
                @of $kind, $p, $codes, $sums, ((y0 x0)(y1 x1)(y2 x2)(y3 x3)(y4 x4)),
                [0 y0 x0, 1 y1 x1, 2 y2 x2, 3 y3 x3, 4 y4 x4], $i, $more
            ),
            n => unreachable!("tiles of {n}"),
        }
    };
    (@of $kind:ident, $p:ident, $codes:ident, $sums:ident, $of:tt, [$($t:literal $y:ident $x:ident),*], [$($i:literal)*],
     {$($more:tt)*}) => {
        asm!(
            dwords!(@first $kind $of),
            $(dwords!(@next $kind $i $of),)*
            w = out(ymm_reg) _,
            p = in(reg) $p,
            $($x = in(reg) $codes[$t], $y = out(ymm_reg) $sums[$t],)*
            $($more)*
            options(pure, readonly, nostack, preserves_flags),
        )
    };
    (@first $kind:ident ($($of:tt)*)) => { dword!($kind first $($of)*) };
    (@next $kind:ident $i:literal ($($of:tt)*)) => { dword!($kind next $i $($of)*) };
}

/// [`unsigned_16`] of one row.
#[target_feature(enable = "avx2")]
#[inline]
fn unsigned_16_in_order<const SUMS: usize, const L: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    from: usize,
) -> Sums<N> {
    assert!((L == LANES || L == 1) && from + SUMS <= 64 && w.r < STRIP);
    let r = if L == LANES { w.r } else { 0 };
    let p = w.panel.codes.as_flattened().as_flattened()[32 * from + 4 * r..].as_ptr();
    let mut codes = [p.cast::<i8>(); N];
    for t in 0..N {
        codes[t] = x[t].codes[from..].as_ptr().cast();
    }
    let mut y = [_mm256_setzero_si256(); N];
    macro_rules! of {
        ($kind:ident, $i:tt) => {
            // SAFETY: of the panel's codes, `SUMS` entries of 32 bytes from `p` on are read, aligned as the panel is, or four bytes
            // of each; of a token's or group's codes as many whole entries. Both have them by the assertion.
            unsafe { dwords!(N, $kind, p, codes, y, $i, { z = out(ymm_reg) _, }) }
        };
    }
    match (L == LANES, SUMS) {
        (true, 16) => of!(groups, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]),
        (true, 8) => of!(groups, [1 2 3 4 5 6 7]),
        (true, 4) => of!(groups, [1 2 3]),
        (false, 16) => of!(alone, [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]),
        (false, 8) => of!(alone, [1 2 3 4 5 6 7]),
        (false, 4) => of!(alone, [1 2 3]),
        _ => unreachable!("{SUMS} results of maddubs"),
    }
    y
}

/// The sums of block `j` of signed codes. The sign of a weight moves to the activation, whose codes never are -128, and
/// `128 · 127 · 2` still fits 16 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn signed_32<const L: usize, const N: usize>(w: Rows<'_, L>, x: &[&Lanes<L>; N], j: usize) -> Sums<N> {
    let ones = _mm256_set1_epi16(1);
    let mut y = [_mm256_setzero_si256(); N];
    if L == LANES {
        assert!(j < 8 && w.r < STRIP);
        let p = w.panel.codes[j].as_flattened()[4 * w.r..].as_ptr();
        let mut codes = [p.cast::<i8>(); N];
        for t in 0..N {
            codes[t] = x[t].codes[8 * j..].as_ptr().cast();
        }
        // SAFETY: of the panel's codes, four bytes of eight entries are read, of a group's as many whole entries, aligned as
        // groups are. Both have them by the assertion.
        unsafe {
            dwords!(N, signed, p, codes, y, [1 2 3 4 5 6 7], {
                z = out(ymm_reg) _, m = out(ymm_reg) _, ones = in(ymm_reg) ones,
            });
        }
        return y;
    }
    for i in 0..8 {
        let codes = w.of(&w.panel.codes[j][i]);
        let magnitude = _mm256_abs_epi8(codes);
        for t in 0..N {
            let signed = _mm256_sign_epi8(spread(&x[t].codes[8 * j + i]), codes);
            y[t] = _mm256_add_epi32(y[t], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), ones));
        }
    }
    y
}

/// Adds a super-block's integer sums to the float accumulators.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn finish_super<const L: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    sum: &Sums<N>,
    min: &Sums<N>,
    acc: &mut Acc<N>,
) {
    let (d, m) = (w.floats_of(&w.panel.d[0]), w.floats_of(&w.panel.m[0]));
    for t in 0..N {
        acc[t] = add_super(acc[t], sum[t], min[t], d, m, spread_float(&x[t].d));
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a super-block sum, in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_super(acc: __m256, sum: __m256i, min: __m256i, d: __m256, m: __m256, x_d: __m256) -> __m256 {
    let acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, x_d)));
    _mm256_sub_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(min), _mm256_mul_ps(m, x_d)))
}

/// Unsigned codes up to 7 with integer scales and minima per 16 columns; where `OFFSET`, the minima are in the scale of
/// the products and are taken off before the sum becomes a float.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_16<const OFFSET: bool, const L: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    acc: &mut Acc<N>,
) {
    let (mut sum, mut min) = ([_mm256_setzero_si256(); N], [_mm256_setzero_si256(); N]);
    for j in 0..8 {
        for h in 0..2 {
            let [y] = unsigned_16::<4, L, 1, N>(w, x, 8 * j + 4 * h);
            let scale = w.of(&w.panel.scales[2 * j + h]);
            for t in 0..N {
                let scale = _mm256_mullo_epi16(scale, spread(&x[t].scale_pairs[j]));
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(y[t], scale));
            }
        }
        let m = w.of(&w.panel.mins[j]);
        for t in 0..N {
            let m = _mm256_mullo_epi16(m, spread(&x[t].scale_pairs[j]));
            min[t] = _mm256_add_epi32(min[t], _mm256_madd_epi16(m, spread(&x[t].half_sums[j])));
        }
    }
    if OFFSET {
        for t in 0..N {
            (sum[t], min[t]) = (_mm256_sub_epi32(sum[t], min[t]), _mm256_setzero_si256());
        }
    }
    finish_super(w, x, &sum, &min, acc);
}

/// Unsigned codes that stand for `code - offset`, with a float scale per 32 columns, and a float minimum where
/// `MIN`; `SUMS` results of `maddubs` fit 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_unsigned<const SUMS: usize, const MIN: bool, const L: usize, const N: usize>(
    w: Rows<'_, L>,
    n_blocks: usize,
    x: &[&Lanes<L>; N],
    offset: i16,
    acc: &mut Acc<N>,
) {
    let ones = _mm256_set1_epi16(1);
    for j in 0..n_blocks {
        let mut sum = [_mm256_setzero_si256(); N];
        for t in 0..N {
            sum[t] = _mm256_madd_epi16(spread(&x[t].half_sums[j]), _mm256_set1_epi16(-offset));
        }
        for g in 0..8 / SUMS {
            let [y] = unsigned_16::<SUMS, L, 1, N>(w, x, 8 * j + g * SUMS);
            for t in 0..N {
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(y[t], ones));
            }
        }
        add_blocks(w, j, x, &sum, acc);
        if MIN {
            let m = w.floats_of(&w.panel.m[j]);
            for t in 0..N {
                acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(m, spread_float(&x[t].block_sum[j])));
            }
        }
    }
}

/// Adds the integer sums of block `j` to the float accumulators.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_blocks<const L: usize, const N: usize>(
    w: Rows<'_, L>,
    j: usize,
    x: &[&Lanes<L>; N],
    sum: &Sums<N>,
    acc: &mut Acc<N>,
) {
    let d = w.floats_of(&w.panel.d[j]);
    for t in 0..N {
        acc[t] = add_block(acc[t], sum[t], d, spread_float(&x[t].block_d[j]));
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a float scale per 32 columns, or with sums of half super-blocks, in
/// every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_block(acc: __m256, sum: __m256i, d: __m256, x_d: __m256) -> __m256 {
    _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, x_d)))
}

/// Unsigned codes to 63 that stand for `code - 32`, with an integer scale per 16 columns and a float per super-block, whose
/// halves are summed apart.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn halves_16<const L: usize, const M: usize, const N: usize>(
    w: Rows<'_, L>,
    x: &[&Lanes<L>; N],
    acc: &mut [Acc<N>; M],
) {
    for half in 0..2 {
        let mut sum = [[_mm256_setzero_si256(); N]; M];
        for j in 4 * half..4 * half + 4 {
            for i in [2 * j, 2 * j + 1] {
                // Sums of eight columns may not fit 16 bits until the offset is off, but they come out right all the same.
                let y = unsigned_16::<4, L, M, N>(w, x, 4 * i);
                for m in 0..M {
                    let scale = w.skip(m).of(&w.panel.scales[i]);
                    for t in 0..N {
                        let y = _mm256_add_epi16(y[m][t], spread(&x[t].offsets[i]));
                        let scale = _mm256_mullo_epi16(scale, spread(&x[t].scale_pairs[j]));
                        sum[m][t] = _mm256_add_epi32(sum[m][t], _mm256_madd_epi16(y, scale));
                    }
                }
                by_row::settle(&mut sum);
            }
        }
        for m in 0..M {
            let d = w.skip(m).floats_of(&w.panel.d[0]);
            for t in 0..N {
                acc[m][t] = add_block(acc[m][t], sum[m][t], d, spread_float(&x[t].d));
            }
        }
    }
}

/// A block's sums times the tokens' sub-scales, given as pairs.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn times_scale(sum: __m256i, scale_pairs: __m256i) -> __m256i {
    _mm256_mullo_epi32(sum, _mm256_srli_epi32::<16>(scale_pairs))
}

/// Signed 8-bit codes with a float scale per 32 columns. A function of its own, since within its callers it is unrolled for all rows of
/// a panel and a twentieth slower.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub(super) fn blocks_signed<const L: usize, const N: usize>(
    w: Rows<'_, L>,
    n_blocks: usize,
    x: &[&Lanes<L>; N],
    acc: &mut Acc<N>,
) {
    for j in 0..n_blocks {
        let sum = signed_32(w, x, j);
        add_blocks(w, j, x, &sum, acc);
    }
}
