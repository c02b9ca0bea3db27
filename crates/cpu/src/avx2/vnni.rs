//! Kernels with dot-product instructions (`vpdpbusd`): AVX-VNNI in vectors of eight rows, AVX-512 VNNI in vectors of
//! sixteen.
//!
//! With AVX-512 types have kernels of their own: [`sixteen`] and the files that implement its traits. What is written here is tiles
//! for AVX-VNNI. They are generic over [`Vectors`], the dozen operations they need, which exist twice: as instructions, and
//! computed lane by lane ([`Emulated`]), so that the tiles can be held to the portable kernels on a CPU that lacks the
//! instructions. Few tokens are multiplied by the AVX2 code around this module.

mod emulated;
mod k_quants;
mod q6_k;
mod q6_k_few;
mod sixteen;
mod small;
mod tile;
mod vectors;

use apr_core::qtype::GgmlType;

use super::k_quants::K45;
use super::q6_k::Q6K;
use super::small::{Nibbles, Q8};
use super::{Format, Next, Strip, float, quantize};
use crate::float::FloatKernels;
use crate::float::avx2::TABLE as AVX2;
use crate::float::avx512::TABLE as AVX512;
use crate::kernels::{
    Isa, Kernels, LANES, LaneSums, MatmulQ8, Out, Panel, PanelScratch, Q8Block, Q8Tokens, SPAN, STRIP, SUPER,
    WeightRows,
};
use emulated::Emulated;
use vectors::{Vectors, Ymm};

pub(crate) static AVX_VNNI: Kernels = table(Isa::AvxVnni, &AVX2, matmul_q8::<Ymm>);
pub(crate) static AVX512_VNNI: Kernels = table(Isa::Avx512Vnni, &AVX512, matmul_q8_sixteen);
/// [`AVX_VNNI`] for a CPU that has no more than AVX2.
pub(crate) static AVX_VNNI_EMULATED: Kernels = table(Isa::AvxVnni, &AVX2, matmul_q8::<Emulated>);

const fn table(isa: Isa, float: &'static FloatKernels, matmul_q8: MatmulQ8) -> Kernels {
    Kernels::new(isa, float, quantize::quantize_row, matmul_q8, float::matmul_f32)
}

/// From this many tokens on the tiles here are taken, even where those of AVX2 would wait for more.
const DIRECT_BELOW: usize = 5;

/// How the panels of a format, as its [`Format::unpack`] leaves them, are multiplied.
trait Tiles {
    /// Adds to `acc` the products of an unpacked super-block of eight rows, of `n_blocks` blocks of 32 columns, with `N` tokens.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`.
    unsafe fn tile<V: Vectors, const N: usize>(p: &Panel, n_blocks: usize, x: &[&Q8Block; N], acc: &mut [V::Floats; N]);
}

impl<const FIVE: bool, const BYTES: usize> Tiles for K45<FIVE, BYTES> {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(p: &Panel, _: usize, x: &[&Q8Block; N], acc: &mut [V::Floats; N]) {
        // SAFETY: the caller's promise.
        unsafe { tile::super_32::<V, N>(p, x, acc) }
    }
}

impl Tiles for Q6K {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(p: &Panel, _: usize, x: &[&Q8Block; N], acc: &mut [V::Floats; N]) {
        // SAFETY: the caller's promise.
        unsafe { tile::halves_16::<V, N>(p, x, acc) }
    }
}

impl Tiles for Q8 {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(
        p: &Panel,
        n_blocks: usize,
        x: &[&Q8Block; N],
        acc: &mut [V::Floats; N],
    ) {
        // SAFETY: the caller's promise.
        unsafe { tile::blocks_32::<V, 128, true, false, N>(p, n_blocks, x, acc) }
    }
}

impl<const MIN: bool, const FIVE: bool> Tiles for Nibbles<MIN, FIVE> {
    #[inline(always)]
    unsafe fn tile<V: Vectors, const N: usize>(
        p: &Panel,
        n_blocks: usize,
        x: &[&Q8Block; N],
        acc: &mut [V::Floats; N],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match (MIN, FIVE) {
                (true, _) => tile::blocks_32::<V, 0, false, MIN, N>(p, n_blocks, x, acc),
                (false, false) => tile::blocks_32::<V, 8, false, MIN, N>(p, n_blocks, x, acc),
                (false, true) => tile::blocks_32::<V, 16, false, MIN, N>(p, n_blocks, x, acc),
            }
        }
    }
}

/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn matmul_q8_sixteen(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    use GgmlType::*;
    match w.qtype() {
        Q4_K => sixteen::few_or_many::<K45<false, 144>>(w, x, out, scratch),
        Q5_K => sixteen::few_or_many::<K45<true, 176>>(w, x, out, scratch),
        Q6_K => q6_k::matmul(w, x, out, scratch),
        Q8_0 => sixteen::few_or_many::<Q8>(w, x, out, scratch),
        Q4_0 => sixteen::few_or_many::<Nibbles<false, false>>(w, x, out, scratch),
        Q4_1 => sixteen::few_or_many::<Nibbles<true, false>>(w, x, out, scratch),
        Q5_0 => sixteen::few_or_many::<Nibbles<false, true>>(w, x, out, scratch),
        Q5_1 => sixteen::few_or_many::<Nibbles<true, true>>(w, x, out, scratch),
        _ => super::matmul_q8(w, x, out, scratch),
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
    if x.len() < DIRECT_BELOW {
        return super::matmul::<F>(w, x, out, scratch);
    }
    for from in (0..x.len()).step_by(SPAN) {
        tiled::<F, V>(&w, x.part(from, SPAN), out, scratch);
    }
}

/// Multiplies in tiles: super-block by super-block, a strip is unpacked into the first cache and meets all tokens, while the same
/// super-block of the next strip is fetched.
#[target_feature(enable = "avx2,fma,f16c")]
fn tiled<F: Format + Tiles, V: Vectors>(
    w: &WeightRows<'_>,
    x: Q8Tokens<'_>,
    out: &mut Out<'_>,
    scratch: &mut PanelScratch,
) {
    let (n_rows, n_blocks, n_supers) = (w.n_rows(), w.n_cols().div_ceil(32), w.n_cols().div_ceil(SUPER));
    let (panels, _, _, sums) = scratch.tiles(1, 0, 0, x.len());
    let panel = &mut panels[0];
    let bytes_of_super = STRIP * SUPER / w.qtype().block_len() * w.qtype().block_bytes();
    for first in (0..n_rows).step_by(STRIP) {
        let rows = std::array::from_fn(|i| w.row((first + i).min(n_rows - 1)));
        let strip = Strip { rows, n_blocks, ahead: STRIP * w.row_bytes() };
        sums.fill(LaneSums([0.0; LANES]));
        for s in 0..n_supers {
            // SAFETY: the tables of `V` are had only where the CPU has its instructions, AVX2 among them.
            unsafe { F::unpack::<true>(&strip, s, panel) };
            let next = Next::new(strip.rows[0], strip.ahead + s * bytes_of_super, bytes_of_super, x.len());
            meet::<F, V>(panel, 8.min(n_blocks - 8 * s), x, s, &next, sums);
        }
        for (t, sums) in sums.iter().enumerate() {
            match n_rows - first {
                STRIP.. => out.put(x.out_row(t), first, &sums.0),
                n => out.put(x.out_row(t), first, &sums.0[..n]),
            }
        }
    }
}

/// Adds the products of an unpacked strip with super-block `s` of the tokens to `sums`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn meet<F: Tiles, V: Vectors>(
    p: &Panel,
    n_blocks: usize,
    x: Q8Tokens<'_>,
    s: usize,
    next: &Next<'_>,
    sums: &mut [LaneSums],
) {
    let mut t = 0;
    while t < x.len() {
        let n = match x.len() - t {
            1 => tile_to::<F, V, 1>(p, n_blocks, x, t, s, sums),
            2 => tile_to::<F, V, 2>(p, n_blocks, x, t, s, sums),
            3 => tile_to::<F, V, 3>(p, n_blocks, x, t, s, sums),
            _ => tile_to::<F, V, 4>(p, n_blocks, x, t, s, sums),
        };
        next.fetch(t..t + n);
        t += n;
    }
}

/// Adds the products with tokens `t .. t + N`; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_to<F: Tiles, V: Vectors, const N: usize>(
    p: &Panel,
    n_blocks: usize,
    x: Q8Tokens<'_>,
    t: usize,
    s: usize,
    sums: &mut [LaneSums],
) -> usize {
    let mut blocks = [&x.row(t)[s]; N];
    for i in 1..N {
        blocks[i] = &x.row(t + i)[s];
    }
    let sums = sums[t..].first_chunk_mut().expect("sums of every token");
    // SAFETY: the tables of `V` are had only where the CPU has its instructions.
    unsafe { V::tile::<F, N>(p, n_blocks, &blocks, sums) };
    N
}
