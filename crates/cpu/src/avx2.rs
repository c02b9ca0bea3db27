//! Kernels for x86-64 with AVX2, FMA and F16C.
//!
//! Quantized rows are taken in strips of eight. For few tokens a strip is read straight from the file's layout, one
//! row after another (`gemv`); for more it is unpacked once into a [`Panel`], where every 32-bit lane belongs to one
//! row, and multiplied with four tokens at a time (`tile`). Both give the same bits.

mod float;
mod k_quants;
mod load;
mod portable;
mod q6_k;
mod quantize;
mod reduce;
mod small;
mod tile;

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

/// What differs between quant types. The functions are `unsafe` because they may run only on a CPU with AVX2, FMA
/// and F16C.
trait Format {
    /// From this many tokens on unpacking pays.
    const TILES_FROM: usize;

    /// The products of a strip with one token.
    unsafe fn gemv(strip: &Strip<'_>, x: &[Q8Block]) -> __m256;

    /// Unpacks super-block `s` of a strip.
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel);

    /// The products of an unpacked strip with `N` tokens.
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N];
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul_q8(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    use GgmlType::*;
    match w.qtype() {
        Q4_K => matmul::<k_quants::K45<false>>(w, x, out, scratch),
        Q5_K => matmul::<k_quants::K45<true>>(w, x, out, scratch),
        Q6_K => matmul::<q6_k::Q6K>(w, x, out, scratch),
        Q8_0 => matmul::<small::Q8>(w, x, out, scratch),
        Q4_0 => matmul::<small::Nibbles<false, false>>(w, x, out, scratch),
        Q4_1 => matmul::<small::Nibbles<true, false>>(w, x, out, scratch),
        Q5_0 => matmul::<small::Nibbles<false, true>>(w, x, out, scratch),
        Q5_1 => matmul::<small::Nibbles<true, true>>(w, x, out, scratch),
        Q2_K => matmul::<portable::Portable<{ Q2_K as usize }>>(w, x, out, scratch),
        Q3_K => matmul::<portable::Portable<{ Q3_K as usize }>>(w, x, out, scratch),
        IQ4_NL => matmul::<portable::Portable<{ IQ4_NL as usize }>>(w, x, out, scratch),
        IQ4_XS => matmul::<portable::Portable<{ IQ4_XS as usize }>>(w, x, out, scratch),
        MXFP4 => matmul::<portable::Portable<{ MXFP4 as usize }>>(w, x, out, scratch),
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
            for t in 0..x.len() {
                // SAFETY: this function itself runs only with the features that `Format` asks for.
                let y = store8(unsafe { F::gemv(&strip, x.row(t)) });
                out.put(x.out_row(t), r, &y[..n]);
            }
            continue;
        }
        for (s, panel) in panels.iter_mut().enumerate() {
            let at = s * row_bytes_of_super;
            for row in rows {
                for line in (0..row_bytes_of_super).step_by(64) {
                    prefetch(&row[at..], ahead + line);
                }
            }
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
    let y = unsafe { F::tile::<N>(panels, n_blocks, std::array::from_fn(|i| x.row(t + i))) };
    for (i, y) in y.into_iter().enumerate() {
        out.put(x.out_row(t + i), r, &store8(y)[..n]);
    }
    N
}

/// How far ahead a row-by-row pass fetches. Eight rows are in flight, so whole strips ahead where they are short, and
/// within each row where they are long; four to eight kilobytes in all.
fn prefetch_distance(row_bytes: usize) -> usize {
    let strip = STRIP * row_bytes;
    if strip > 24 << 10 { 1024 } else { (6usize << 10).div_ceil(strip) * strip }
}
