//! Kernels for x86-64 with AVX2, FMA and F16C.
//!
//! Quantized rows are taken in strips of eight. For few tokens a strip is multiplied straight from the file's layout
//! (`direct`); for more it is unpacked once into a [`Panel`], where every 32-bit lane belongs to one row (`tile`), or where codes
//! stay in the order of rows (`by_row`). All give the same bits.

mod by_row;
mod direct;
mod float;
mod iq4;
mod k23;
mod k_quants;
mod lanes;
mod load;
mod q6_k;
mod quantize;
mod reduce;
mod small;
mod tile;
pub(crate) mod vnni;

use std::arch::x86_64::*;

use apr_core::qtype::GgmlType;

use crate::kernels::{
    Isa, Kernels, LANES, LaneSums, Lanes, Order, Out, Panel, PanelScratch, Q8Block, Q8Tokens, SPAN, STRIP, SUPER,
    WeightRows,
};
use load::{prefetch, store8};
use reduce::transpose_floats;
use tile::{Acc, Rows};

pub(crate) static KERNELS: Kernels =
    Kernels::new(Isa::Avx2, &crate::float::avx2::TABLE, quantize::quantize_row, matmul_q8, float::matmul_f32);

/// Strips that are unpacked at a time: many, so that interleaved tokens are seldom read again, and no more than fit the
/// first cache beside four groups of tokens.
const STRIPS: usize = 4;

/// Tokens that a strip meets at most while it is decoded.
const SEVERAL: usize = 8;

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
        prefetch(self.rows[0], self.ahead + at, len);
    }
}

/// What is fetched while a super-block meets the tokens: bytes `at .. at + len` counted from the strips' first.
///
/// A little behind every tile: a burst fills the CPU's list of misses, and the next tile's loads from the second cache wait for
/// memory.
struct Next<'a> {
    /// The strips that are at hand; what is fetched lies behind them.
    from: &'a [u8],
    at: usize,
    /// What belongs to a part of the work, in lines, of which the last [`Next::FRACTION`] bits are a fraction: so a tile's share takes
    /// no division.
    per_part: usize,
}

impl<'a> Next<'a> {
    const FRACTION: u32 = 16;

    /// `len` bytes from `at` on, during `n` parts of work.
    #[inline(always)]
    fn new(from: &'a [u8], at: usize, len: usize, n: usize) -> Next<'a> {
        Next { from, at, per_part: ((len / 64) << Next::FRACTION).div_ceil(n.max(1)) }
    }

    /// Fetches what belongs to these parts.
    #[inline(always)]
    fn fetch(&self, done: std::ops::Range<usize>) {
        let line = |i: usize| (self.per_part * i) >> Next::FRACTION;
        prefetch(self.from, self.at + 64 * line(done.start), 64 * (line(done.end) - line(done.start)));
    }
}

/// What differs between quant types. The functions are `unsafe` because they may run only on a CPU with AVX2, FMA
/// and F16C.
trait Format {
    /// From this many tokens on tiles are faster.
    const TILES_FROM: usize;

    /// From this many tokens on, [`Format::several`] is faster than [`Format::direct`].
    const SEVERAL_FROM: usize = usize::MAX;

    /// Whether tiles take codes of two blocks at a time, as [`Panel::codes`] tells.
    const PAIRED: bool = false;

    /// Whether codes are offset by 32, which tiles take off by [`Lanes::offsets`].
    const OFFSET_32: bool = false;

    /// Whether one or two groups of tokens meet several rows at a time, in panels by row.
    const BY_ROW: bool = false;

    /// The products of a strip with `N` tokens.
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N];

    /// Adds the products of a strip with as many tokens as there are, at most [`SEVERAL`], to `acc`.
    ///
    /// Tokens are a loop that runs over each block of the strip, and what becomes of a block's sums is a loop of its own: the
    /// CPU sees a few dozen instructions ahead, and a token's chain from codes to floats is too long for it to begin the next
    /// token's meanwhile.
    unsafe fn several(_: &Strip<'_>, _: &[&[Q8Block]], _: &mut [__m256; SEVERAL]) {
        unreachable!("no number of tokens is `several`")
    }

    /// Unpacks super-block `s` of a strip for [`Format::tile`], or for tiles of dot-product instructions (`DOT`), which take no pairs
    /// of blocks, and what codes are offset by as minima.
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel);

    /// Adds to `acc` the products of an unpacked super-block, of `n_blocks` blocks of 32 columns: of one row with `N` groups
    /// of eight tokens, or of eight rows with `N` tokens.
    unsafe fn tile<const L: usize, const N: usize>(
        w: Rows<'_, L>,
        n_blocks: usize,
        x: &[&Lanes<L>; N],
        acc: &mut Acc<N>,
    );

    /// [`Format::unpack`] with codes by row, for [`Format::tile_by_row`].
    unsafe fn unpack_by_row(_: &Strip<'_>, _: usize, _: &mut Panel) {
        unreachable!("no tile is by row")
    }

    /// Adds to `acc` the products of `M` rows of a super-block by row with `N` groups of eight tokens.
    unsafe fn tile_by_row<const M: usize, const N: usize>(
        _: Rows<'_, LANES>,
        _: &[&Lanes<LANES>; N],
        _: &mut [Acc<N>; M],
    ) {
        unreachable!("no tile is by row")
    }
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
    if x.len() >= F::TILES_FROM {
        for from in (0..x.len()).step_by(SPAN) {
            tiled::<F>(&w, x.part(from, SPAN), out, scratch);
        }
        return;
    }
    let n_blocks = w.n_cols().div_ceil(32);
    let n_rows = w.n_rows();
    let ahead = prefetch_distance(w.row_bytes());
    for r in (0..n_rows).step_by(STRIP) {
        let n = STRIP.min(n_rows - r);
        let strip = Strip { rows: rows_from(&w, r, n_rows), n_blocks, ahead };
        let mut t = 0;
        while t < x.len() {
            t += match x.len() - t {
                left if left >= F::SEVERAL_FROM => several_to::<F>(&strip, x, t, out, r, n),
                1 => direct_to::<F, 1>(&strip, x, t, out, r, n),
                2 => direct_to::<F, 2>(&strip, x, t, out, r, n),
                3 => direct_to::<F, 3>(&strip, x, t, out, r, n),
                _ => direct_to::<F, 4>(&strip, x, t, out, r, n),
            };
        }
    }
}

/// Eight of the `n_rows` rows from `r` on, the last one for those that there are not.
#[inline(always)]
fn rows_from<'a>(w: &WeightRows<'a>, r: usize, n_rows: usize) -> [&'a [u8]; STRIP] {
    let mut rows: [&[u8]; STRIP] = [&[]; STRIP];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = w.row((r + i).min(n_rows - 1));
    }
    rows
}

/// Fills `rows` with the activations of tokens from `t` on.
#[inline(always)]
fn tokens_from<'a>(x: Q8Tokens<'a>, t: usize, rows: &mut [&'a [Q8Block]]) {
    for (i, row) in rows.iter_mut().enumerate() {
        *row = x.row(t + i);
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
    let mut rows: [&[Q8Block]; N] = [&[]; N];
    tokens_from(x, t, &mut rows);
    // SAFETY: this function itself runs only with the features that `Format` asks for.
    put(unsafe { F::direct::<N>(strip, rows) }, x, t, out, r, n)
}

/// Multiplies tokens from `t` on, at most [`SEVERAL`], with a strip and writes the `n` results of each; returns how many.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn several_to<F: Format>(strip: &Strip<'_>, x: Q8Tokens<'_>, t: usize, out: &mut Out<'_>, r: usize, n: usize) -> usize {
    let count = SEVERAL.min(x.len() - t);
    let mut rows: [&[Q8Block]; SEVERAL] = [&[]; SEVERAL];
    tokens_from(x, t, &mut rows[..count]);
    let mut acc = [_mm256_setzero_ps(); SEVERAL];
    // SAFETY: this function itself runs only with the features that `Format` asks for.
    unsafe { F::several(strip, &rows[..count], &mut acc) };
    for (i, y) in acc[..count].iter().enumerate() {
        out.put(x.out_row(t + i), r, &store8(*y)[..n]);
    }
    count
}

/// Multiplies in tiles. Super-block by super-block, some strips are unpacked into the first cache and meet all tokens, some of
/// them in groups and the others one by one. The same super-block of the next strips is fetched meanwhile.
#[target_feature(enable = "avx2,fma,f16c")]
fn tiled<F: Format>(w: &WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    let (n_rows, n_blocks, n_supers) = (w.n_rows(), w.n_cols().div_ceil(32), w.n_cols().div_ceil(SUPER));
    let n_groups = groups_of::<F>(x.len());
    let (grouped, single) = (x.part(0, LANES * n_groups), x.part((LANES * n_groups).min(x.len()), SPAN));
    let order = Order { paired: F::PAIRED, offset: F::OFFSET_32 };
    let at_hand = scratch.has_interleaved(x, order);
    let n_sums = STRIPS * (STRIP * n_groups + single.len());
    let (panels, lanes, singles, sums) = scratch.tiles(STRIPS, n_supers * n_groups, n_supers * single.len(), n_sums);
    if !at_hand {
        interleave(grouped, n_groups, order, lanes);
        for t in 0..single.len() {
            for (x, to) in single.row(t).iter().zip(singles[t..].iter_mut().step_by(single.len())) {
                lanes::alone(x, order, to);
            }
        }
    }
    let bytes_of_super = STRIPS * STRIP * SUPER / w.qtype().block_len() * w.qtype().block_bytes();
    for first in (0..n_rows).step_by(STRIPS * STRIP) {
        let n = (STRIPS * STRIP).min(n_rows - first);
        let panels = &mut panels[..n.div_ceil(STRIP)];
        let strips: [Strip<'_>; STRIPS] = std::array::from_fn(|h| Strip {
            rows: rows_from(w, first + STRIP * h, n_rows),
            n_blocks,
            ahead: STRIPS * STRIP * w.row_bytes(),
        });
        sums.fill(LaneSums([0.0; LANES]));
        let (of_groups, of_single) = sums.split_at_mut(STRIPS * STRIP * n_groups);
        for s in 0..n_supers {
            for (strip, panel) in strips.iter().zip(panels.iter_mut()) {
                // SAFETY: this function itself runs only with the features that `Format` asks for.
                unsafe {
                    match n_groups {
                        1 | 2 => F::unpack_by_row(strip, s, panel),
                        _ => F::unpack::<false>(strip, s, panel),
                    }
                };
            }
            let n_blocks = 8.min(n_blocks - 8 * s);
            let at = strips[0].ahead + s * bytes_of_super;
            let (from, n_strips) = (strips[0].rows[0], panels.len());
            let next = Next::new(from, at, bytes_of_super, n_groups * n_strips * STRIP);
            meet_groups::<F>(panels, n_blocks, &lanes[s * n_groups..][..n_groups], &next, of_groups);
            let left = if n_groups == 0 { bytes_of_super } else { 0 };
            let next = Next::new(from, at, left, single.len() * n_strips);
            meet_single::<F>(panels, n_blocks, &singles[s * single.len()..][..single.len()], &next, of_single);
        }
        put_groups(of_groups, n_groups, grouped, out, first, n);
        for (h, sums) in of_single.chunks_exact(single.len().max(1)).take(panels.len()).enumerate() {
            for (t, sums) in sums.iter().enumerate() {
                out.put(single.out_row(t), first + STRIP * h, &sums.0[..STRIP.min(n - STRIP * h)]);
            }
        }
    }
}

/// Into how many groups of eight tokens go; those that are left are taken one by one. It takes three groups to be faster than tokens
/// alone, and a further one takes as long as six of them, so the last one may have to be filled up. Fewer groups need panels by row,
/// in which no token can be alone.
fn groups_of<F: Format>(n_tokens: usize) -> usize {
    match (n_tokens + 2) / LANES {
        n_groups @ (1 | 2) if F::BY_ROW && matches!(n_tokens % LANES, 0 | 7) => n_groups,
        0..3 => 0,
        n_groups => n_groups,
    }
}

/// Interleaves the tokens: `lanes[s * n_groups + g]` is super-block `s` of the `g`-th eight of them; the last one fills up its group.
#[target_feature(enable = "avx2,fma,f16c")]
fn interleave(x: Q8Tokens<'_>, n_groups: usize, order: Order, lanes: &mut [Lanes<LANES>]) {
    for g in 0..n_groups {
        let rows: [&[Q8Block]; LANES] = std::array::from_fn(|t| x.row((LANES * g + t).min(x.len() - 1)));
        for (s, to) in lanes[g..].iter_mut().step_by(n_groups).enumerate() {
            lanes::interleave(&std::array::from_fn(|t| &rows[t][s]), order, to);
        }
    }
}

/// Adds the products of unpacked strips with all groups of a super-block to `sums`, `[rows, n_groups]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn meet_groups<F: Format>(
    panels: &[Panel],
    n_blocks: usize,
    lanes: &[Lanes<LANES>],
    next: &Next<'_>,
    sums: &mut [LaneSums],
) {
    match lanes.len() {
        1 => return by_row_to::<F, 4, 1>(panels, lanes, next, sums),
        2 => return by_row_to::<F, 2, 2>(panels, lanes, next, sums),
        _ => {}
    }
    // Four at a time are fastest, and fewer than three are never left.
    let mut g = 0;
    while g < lanes.len() {
        let left = lanes.len() - g;
        g += match left % 4 {
            0 => groups_to::<F, 4>(panels, n_blocks, lanes, g, next, sums),
            1 => groups_to::<F, 5>(panels, n_blocks, lanes, g, next, sums),
            _ => groups_to::<F, 3>(panels, n_blocks, lanes, g, next, sums),
        };
    }
}

/// Adds the products of `M` rows at a time with all `N` groups.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn by_row_to<F: Format, const M: usize, const N: usize>(
    panels: &[Panel],
    lanes: &[Lanes<LANES>],
    next: &Next<'_>,
    sums: &mut [LaneSums],
) {
    let x: [&Lanes<LANES>; N] = std::array::from_fn(|t| &lanes[t]);
    for (h, panel) in panels.iter().enumerate() {
        for r in (0..STRIP).step_by(M) {
            let at = (STRIP * h + r) * N;
            // SAFETY: this function itself runs only with the features that `Format` asks for.
            unsafe { F::tile_by_row::<M, N>(Rows { panel, r }, &x, accumulators(&mut sums[at..at + M * N])) };
            next.fetch(at..at + M * N);
        }
    }
}

/// Adds the products with groups `g .. g + N`; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn groups_to<F: Format, const N: usize>(
    panels: &[Panel],
    n_blocks: usize,
    lanes: &[Lanes<LANES>],
    g: usize,
    next: &Next<'_>,
    sums: &mut [LaneSums],
) -> usize {
    let x: [&Lanes<LANES>; N] = std::array::from_fn(|t| &lanes[g + t]);
    for (h, panel) in panels.iter().enumerate() {
        for r in 0..STRIP {
            let at = (STRIP * h + r) * lanes.len() + g;
            tile_to::<F, LANES, N>(Rows { panel, r }, n_blocks, &x, &mut sums[at..at + N]);
            let done = g * panels.len() * STRIP + N * (STRIP * h + r);
            next.fetch(done..done + N);
        }
    }
    N
}

/// Adds the products of unpacked strips with a super-block of single tokens to `sums`, `[strips, tokens]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn meet_single<F: Format>(panels: &[Panel], n_blocks: usize, x: &[Lanes<1>], next: &Next<'_>, sums: &mut [LaneSums]) {
    // As few times over the panels as five tokens at a time allow, with about as many each time: the registers hold no more sums.
    let mut t = 0;
    while t < x.len() {
        let left = x.len() - t;
        t += match left.div_ceil(left.div_ceil(5)) {
            1 => singles_to::<F, 1>(panels, n_blocks, x, t, next, sums),
            2 => singles_to::<F, 2>(panels, n_blocks, x, t, next, sums),
            3 => singles_to::<F, 3>(panels, n_blocks, x, t, next, sums),
            4 => singles_to::<F, 4>(panels, n_blocks, x, t, next, sums),
            _ => singles_to::<F, 5>(panels, n_blocks, x, t, next, sums),
        };
    }
}

/// Adds the products with tokens `t .. t + N`; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn singles_to<F: Format, const N: usize>(
    panels: &[Panel],
    n_blocks: usize,
    x: &[Lanes<1>],
    t: usize,
    next: &Next<'_>,
    sums: &mut [LaneSums],
) -> usize {
    let blocks: [&Lanes<1>; N] = std::array::from_fn(|i| &x[t + i]);
    for (h, panel) in panels.iter().enumerate() {
        tile_to::<F, 1, N>(Rows { panel, r: 0 }, n_blocks, &blocks, &mut sums[h * x.len() + t..][..N]);
        let done = t * panels.len() + N * h;
        next.fetch(done..done + N);
    }
    N
}

/// Adds a tile to its sums.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile_to<F: Format, const L: usize, const N: usize>(
    w: Rows<'_, L>,
    n_blocks: usize,
    x: &[&Lanes<L>; N],
    sums: &mut [LaneSums],
) {
    let [acc] = accumulators(sums);
    // SAFETY: this function itself runs only with the features that `Format` asks for.
    unsafe { F::tile::<L, N>(w, n_blocks, x, acc) };
}

/// The sums of a tile of `M` rows with `N` groups or tokens as vectors.
#[inline(always)]
fn accumulators<const M: usize, const N: usize>(sums: &mut [LaneSums]) -> &mut [Acc<N>; M] {
    const { assert!(size_of::<LaneSums>() == size_of::<__m256>() && align_of::<LaneSums>() == align_of::<__m256>()) };
    let sums: &mut [[LaneSums; N]; M] =
        sums.as_chunks_mut().0.first_chunk_mut().expect("sums of every token with every row");
    // SAFETY: the floats of a sum are those of a vector, and as aligned; the borrow of the sums goes on as that of the vectors.
    unsafe { &mut *(&raw mut *sums).cast() }
}

/// Writes the groups' sums of weight rows `first .. first + n`.
#[target_feature(enable = "avx2,fma,f16c")]
fn put_groups(sums: &[LaneSums], n_groups: usize, x: Q8Tokens<'_>, out: &mut Out<'_>, first: usize, n: usize) {
    // Strips one after another, so that all that goes to a line of the output goes there while it is at hand.
    for g in 0..n_groups {
        for r in (0..n).step_by(STRIP) {
            let n = STRIP.min(n - r);
            let mut y = [_mm256_setzero_ps(); STRIP];
            for i in 0..STRIP {
                y[i] = load::spread_float(&sums[(r + i) * n_groups + g].0);
            }
            let y = transpose_floats(y);
            for t in 0..LANES.min(x.len() - LANES * g) {
                let row = x.out_row(LANES * g + t);
                match n {
                    STRIP => out.put(row, first + r, &store8(y[t])),
                    _ => out.put(row, first + r, &store8(y[t])[..n]),
                }
            }
        }
    }
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
