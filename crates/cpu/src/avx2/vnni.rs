//! Kernels with dot-product instructions (`vpdpbusd`): AVX-VNNI in vectors of eight rows, AVX-512 VNNI in vectors of
//! sixteen.
//!
//! Strips are unpacked, and single tokens multiplied, by the AVX2 code around this module: the first is done once for
//! many tokens, the second waits for memory. What is written here is the tiles. They are generic over [`Vectors`], the
//! dozen operations they need, which exist three times: as instructions of either set, and computed lane by lane
//! ([`Emulated`]), so that the tiles can be held to the portable kernels on a CPU that lacks the instructions.

mod emulated;
mod tile;
mod vectors;

use apr_core::qtype::GgmlType;

use super::k_quants::K45;
use super::q6_k::Q6K;
use super::small::{Nibbles, Q8};
use super::{Format, Strip, float, prefetch_distance, quantize};
use crate::kernels::{Isa, Kernels, Out, Panel, PanelScratch, Q8Block, Q8Tokens, STRIP, SUPER, WeightRows};
use emulated::Emulated;
use vectors::{MAX_ROWS, Vectors, Ymm, Zmm};

pub(crate) static AVX_VNNI: Kernels = table(Isa::AvxVnni, matmul_q8::<Ymm>);
pub(crate) static AVX512_VNNI: Kernels = table(Isa::Avx512Vnni, matmul_q8::<Zmm>);
/// [`AVX_VNNI`] for a CPU that has no more than AVX2.
pub(crate) static AVX_VNNI_EMULATED: Kernels = table(Isa::AvxVnni, matmul_q8::<Emulated<1>>);
/// [`AVX512_VNNI`] for a CPU that has no more than AVX2.
pub(crate) static AVX512_VNNI_EMULATED: Kernels = table(Isa::Avx512Vnni, matmul_q8::<Emulated<2>>);

const fn table(isa: Isa, matmul_q8: crate::kernels::MatmulQ8) -> Kernels {
    Kernels::new(isa, quantize::quantize_row, matmul_q8, float::matmul_f32)
}

/// From this many tokens on the tiles here are taken, even where those of AVX2 would wait for more.
const DIRECT_BELOW: usize = 5;

/// How the panels of a format, as its [`Format::unpack`] leaves them, are multiplied.
trait Tiles {
    /// The products of strips side by side with `N` tokens.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    unsafe fn tile<V: Vectors, const N: usize>(
        panels: &[V::Panels],
        n_blocks: usize,
        x: [&[Q8Block]; N],
    ) -> [V::Floats; N];
}

impl<const FIVE: bool, const BYTES: usize> Tiles for K45<FIVE, BYTES> {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(panels: &[V::Panels], _: usize, x: [&[Q8Block]; N]) -> [V::Floats; N] {
        // SAFETY: the caller's promise.
        unsafe { tile::super_32::<V, N>(panels, x) }
    }
}

impl Tiles for Q6K {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(panels: &[V::Panels], _: usize, x: [&[Q8Block]; N]) -> [V::Floats; N] {
        // SAFETY: the caller's promise.
        unsafe { tile::halves_16::<V, N>(panels, x) }
    }
}

impl Tiles for Q8 {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(
        panels: &[V::Panels],
        n_blocks: usize,
        x: [&[Q8Block]; N],
    ) -> [V::Floats; N] {
        // SAFETY: the caller's promise.
        unsafe { tile::blocks_32::<V, 128, true, false, N>(panels, n_blocks, x) }
    }
}

impl<const MIN: bool, const FIVE: bool> Tiles for Nibbles<MIN, FIVE> {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(
        panels: &[V::Panels],
        n_blocks: usize,
        x: [&[Q8Block]; N],
    ) -> [V::Floats; N] {
        // SAFETY: the caller's promise.
        unsafe {
            match (MIN, FIVE) {
                (true, _) => tile::blocks_32::<V, 0, false, MIN, N>(panels, n_blocks, x),
                (false, false) => tile::blocks_32::<V, 8, false, MIN, N>(panels, n_blocks, x),
                (false, true) => tile::blocks_32::<V, 16, false, MIN, N>(panels, n_blocks, x),
            }
        }
    }
}

/// May run only on a CPU with AVX2, FMA, F16C and the instructions of `V`.
#[target_feature(enable = "avx2,fma,f16c")]
fn matmul_q8<V: Vectors>(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    use GgmlType::*;
    match w.qtype() {
        Q4_K => matmul::<K45<false, 144>, V>(w, x, out, scratch),
        Q5_K => matmul::<K45<true, 176>, V>(w, x, out, scratch),
        Q6_K => matmul::<Q6K, V>(w, x, out, scratch),
        Q8_0 => matmul::<Q8, V>(w, x, out, scratch),
        Q4_0 => matmul::<Nibbles<false, false>, V>(w, x, out, scratch),
        Q4_1 => matmul::<Nibbles<true, false>, V>(w, x, out, scratch),
        Q5_0 => matmul::<Nibbles<false, true>, V>(w, x, out, scratch),
        Q5_1 => matmul::<Nibbles<true, true>, V>(w, x, out, scratch),
        _ => super::matmul_q8(w, x, out, scratch),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul<F: Format + Tiles, V: Vectors>(
    w: WeightRows<'_>,
    x: Q8Tokens<'_>,
    out: &mut Out<'_>,
    scratch: &mut PanelScratch,
) {
    if x.len() < F::TILES_FROM.min(DIRECT_BELOW) {
        return super::matmul::<F>(w, x, out, scratch);
    }
    let (n_rows, n_blocks) = (w.n_rows(), w.n_cols().div_ceil(32));
    let panels = scratch.panels(V::STRIPS * w.n_cols().div_ceil(SUPER));
    for r in (0..n_rows).step_by(V::STRIPS * STRIP) {
        unpack::<F>(&w, r, V::STRIPS, panels);
        let panels = V::side_by_side(panels);
        let n = (V::STRIPS * STRIP).min(n_rows - r);
        let mut t = 0;
        while t < x.len() {
            t += match x.len() - t {
                1 => tile_to::<F, V, 1>(panels, n_blocks, x, t, out, r, n),
                2 => tile_to::<F, V, 2>(panels, n_blocks, x, t, out, r, n),
                3 => tile_to::<F, V, 3>(panels, n_blocks, x, t, out, r, n),
                8.. if V::TOKENS == 8 => tile_to::<F, V, 8>(panels, n_blocks, x, t, out, r, n),
                _ => tile_to::<F, V, 4>(panels, n_blocks, x, t, out, r, n),
            };
        }
    }
}

/// Unpacks the rows from `first` on into strips side by side. Where rows run out, the last one is repeated.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unpack<F: Format>(w: &WeightRows<'_>, first: usize, strips: usize, panels: &mut [Panel]) {
    let n_blocks = w.n_cols().div_ceil(32);
    let row_bytes_of_super = SUPER / w.qtype().block_len() * w.qtype().block_bytes();
    let ahead = prefetch_distance(w.row_bytes());
    for h in 0..strips {
        let rows = std::array::from_fn(|i| w.row((first + STRIP * h + i).min(w.n_rows() - 1)));
        let strip = Strip { rows, n_blocks, ahead };
        for (s, panel) in panels.iter_mut().skip(h).step_by(strips).enumerate() {
            let at = s * row_bytes_of_super;
            strip.fetch(STRIP * at, STRIP * row_bytes_of_super);
            // SAFETY: this function itself runs only with the features that `Format` asks for.
            unsafe { F::unpack(&strip, s, panel) };
        }
    }
}

/// Multiplies tokens `t .. t + N` and writes the `n` results of each; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_to<F: Tiles, V: Vectors, const N: usize>(
    panels: &[V::Panels],
    n_blocks: usize,
    x: Q8Tokens<'_>,
    t: usize,
    out: &mut Out<'_>,
    r: usize,
    n: usize,
) -> usize {
    let mut y = [[0.0; MAX_ROWS]; N];
    // SAFETY: the tables of `V` are had only where the CPU has its instructions.
    unsafe { V::tile::<F, N>(panels, n_blocks, std::array::from_fn(|i| x.row(t + i)), &mut y) };
    for (i, y) in y.iter().enumerate() {
        out.put(x.out_row(t + i), r, &y[..n]);
    }
    N
}
