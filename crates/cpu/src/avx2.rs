//! Kernels for x86-64 with AVX2, FMA and F16C.
//!
//! Quantized rows are taken in strips of eight. For few tokens a strip is multiplied straight from the file's layout
//! (`direct`); for more it is unpacked once into a [`Panel`], where every 32-bit lane belongs to one row (`tile`). Both
//! take up to four tokens at a time and give the same bits.

mod direct;
mod float;
mod iq4;
mod k23;
mod k_quants;
mod load;
mod q6_k;
mod quantize;
mod reduce;
mod small;
mod tile;
pub(crate) mod vnni;

use std::arch::x86_64::*;

use apr_core::qtype::GgmlType;

use crate::kernels::{Isa, Kernels, Out, Panel, PanelScratch, Q8Block, Q8Tokens, STRIP, SUPER, WeightRows};
use load::{prefetch, store8};

pub(crate) static KERNELS: Kernels = Kernels::new(Isa::Avx2, quantize::quantize_row, matmul_q8, float::matmul_f32);

/// Eight weight rows of `n_blocks` blocks of 32 columns each, as they lie in the file. A strip with fewer rows repeats
/// its last one.
#[derive(Clone, Copy)]
struct Strip<'a> {
    rows: [&'a [u8]; STRIP],
    n_blocks: usize,
    /// How far ahead of a byte to fetch, in bytes.
    ahead: usize,
}

impl Strip<'_> {
    /// Fetches the next strips' counterpart of bytes `at .. at + len` of this one, its rows taken one after another.
    ///
    /// Strips are adjacent, so the fetches of a whole pass run through memory in ascending order, whatever the order
    /// in which the eight rows are read. Fetching ahead in eight places at a time reaches two thirds of the speed.
    #[inline(always)]
    fn fetch(&self, at: usize, len: usize) {
        for line in (0..len).step_by(64) {
            prefetch(self.rows[0], self.ahead + at + line);
        }
    }
}

/// What differs between quant types. The functions are `unsafe` because they may run only on a CPU with AVX2, FMA
/// and F16C.
trait Format {
    /// From this many tokens on unpacking pays.
    const TILES_FROM: usize;

    /// The products of a strip with `N` tokens.
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N];

    /// Unpacks super-block `s` of a strip.
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel);

    /// The products of an unpacked strip with `N` tokens.
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N];
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul_q8(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    use GgmlType::*;
    match w.qtype() {
        Q4_K => matmul::<k_quants::K45<false, 144>>(w, x, out, scratch),
        Q5_K => matmul::<k_quants::K45<true, 176>>(w, x, out, scratch),
        Q6_K => matmul::<q6_k::Q6K>(w, x, out, scratch),
        Q8_0 => matmul::<small::Q8>(w, x, out, scratch),
        Q4_0 => matmul::<small::Nibbles<false, false>>(w, x, out, scratch),
        Q4_1 => matmul::<small::Nibbles<true, false>>(w, x, out, scratch),
        Q5_0 => matmul::<small::Nibbles<false, true>>(w, x, out, scratch),
        Q5_1 => matmul::<small::Nibbles<true, true>>(w, x, out, scratch),
        Q2_K => matmul::<k23::K23<false, 84>>(w, x, out, scratch),
        Q3_K => matmul::<k23::K23<true, 110>>(w, x, out, scratch),
        IQ4_NL => matmul::<iq4::Iq4Nl>(w, x, out, scratch),
        IQ4_XS => matmul::<iq4::Iq4Xs>(w, x, out, scratch),
        MXFP4 => matmul::<iq4::Mxfp4>(w, x, out, scratch),
        F32 | F16 | BF16 => unreachable!("{} is not quantized", w.qtype()),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul<F: Format>(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    let n_blocks = w.n_cols().div_ceil(32);
    let n_rows = w.n_rows();
    let panels = scratch.panels(w.n_cols().div_ceil(SUPER));
    let row_bytes_of_super = SUPER / w.qtype().block_len() * w.qtype().block_bytes();
    let ahead = prefetch_distance(w.row_bytes());
    for r in (0..n_rows).step_by(STRIP) {
        let n = STRIP.min(n_rows - r);
        let rows = std::array::from_fn(|i| w.row(r + i.min(n - 1)));
        let strip = Strip { rows, n_blocks, ahead };
        if x.len() < F::TILES_FROM {
            let mut t = 0;
            while t < x.len() {
                t += match x.len() - t {
                    1 => direct_to::<F, 1>(&strip, x, t, out, r, n),
                    2 => direct_to::<F, 2>(&strip, x, t, out, r, n),
                    3 => direct_to::<F, 3>(&strip, x, t, out, r, n),
                    _ => direct_to::<F, 4>(&strip, x, t, out, r, n),
                };
            }
            continue;
        }
        for (s, panel) in panels.iter_mut().enumerate() {
            let at = s * row_bytes_of_super;
            strip.fetch(STRIP * at, STRIP * row_bytes_of_super);
            // SAFETY: as above.
            unsafe { F::unpack(&strip, s, panel) };
        }
        let mut t = 0;
        while t < x.len() {
            t += match x.len() - t {
                1 => tile_to::<F, 1>(panels, n_blocks, x, t, out, r, n),
                2 => tile_to::<F, 2>(panels, n_blocks, x, t, out, r, n),
                3 => tile_to::<F, 3>(panels, n_blocks, x, t, out, r, n),
                _ => tile_to::<F, 4>(panels, n_blocks, x, t, out, r, n),
            };
        }
    }
}

/// Multiplies tokens `t .. t + N` with a strip and writes the `n` results of each; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn direct_to<F: Format, const N: usize>(
    strip: &Strip<'_>,
    x: Q8Tokens<'_>,
    t: usize,
    out: &mut Out<'_>,
    r: usize,
    n: usize,
) -> usize {
    // SAFETY: this function itself runs only with the features that `Format` asks for.
    put(unsafe { F::direct::<N>(strip, std::array::from_fn(|i| x.row(t + i))) }, x, t, out, r, n)
}

/// Multiplies tokens `t .. t + N` and writes the `n` results of each; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_to<F: Format, const N: usize>(
    panels: &[Panel],
    n_blocks: usize,
    x: Q8Tokens<'_>,
    t: usize,
    out: &mut Out<'_>,
    r: usize,
    n: usize,
) -> usize {
    // SAFETY: this function itself runs only with the features that `Format` asks for.
    put(unsafe { F::tile::<N>(panels, n_blocks, std::array::from_fn(|i| x.row(t + i))) }, x, t, out, r, n)
}

/// Writes the `n` results from weight row `r` on of tokens `t .. t + N`; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn put<const N: usize>(y: [__m256; N], x: Q8Tokens<'_>, t: usize, out: &mut Out<'_>, r: usize, n: usize) -> usize {
    for (i, y) in y.into_iter().enumerate() {
        out.put(x.out_row(t + i), r, &store8(y)[..n]);
    }
    N
}

/// How far ahead of its place in memory a strip is fetched: whole strips, at least six kilobytes.
fn prefetch_distance(row_bytes: usize) -> usize {
    let strip = STRIP * row_bytes;
    (6usize << 10).div_ceil(strip) * strip
}
