//! Sixteen rows at a time, a 32-bit lane of AVX-512 vectors for each: what all formats with such kernels share.
//!
//! A super-block is 256 columns, of one block or of eight. Few tokens meet it as it is read. For many it is made ready once. That
//! may be no more than a transposition: the bytes of the file in an order in which a vector is four of every row. Codes and
//! scales are then taken out of it again for every eight tokens, by units that otherwise wait for multiplications, which costs
//! less than it takes to write twice as many vectors of unpacked codes and to read them.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::super::direct::super_block;
use super::super::load::{Plain, broadcast, prefetch};
use super::super::{self as avx2, Format, Next, STRIP};
use crate::kernels::{Out, PanelScratch, Q8Block, Q8Tokens, SPAN, WeightRows};

/// Rows of a vector.
const ROWS: usize = 2 * STRIP;

/// Tokens that rows meet at a time: as many as there are registers for their sums.
const TOKENS: usize = 8;

/// A super-block of sixteen rows in dwords of all of them.
///
/// The functions are `unsafe` because they may run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
pub(super) trait SuperBlock {
    /// The `c`-th sixteen bytes of each row's, or the last sixteen where fewer are left: lane `r` of vector `i` is dword `i` of
    /// row `r`.
    unsafe fn dwords(&self, c: usize) -> [__m512i; 4];

    /// Fetches the `k`-th quarter of what is needed when this has been computed.
    unsafe fn fetch(&self, k: usize);
}

/// Formats that are multiplied so.
///
/// # Safety of its functions
/// As for [`SuperBlock`].
pub(super) trait Wide: Format {
    /// Bytes of a super-block.
    const BYTES: usize;

    /// A super-block made ready to meet many tokens.
    type Ready;

    /// One of zeros.
    unsafe fn zero() -> Self::Ready;

    /// Makes the first `n_blocks` times 32 columns of a super-block ready.
    unsafe fn prepare<B: SuperBlock>(b: &B, n_blocks: usize, to: &mut Self::Ready);

    /// Adds the products of the first `n_blocks` times 32 columns of a super-block with `N` tokens to `acc`, by the steps of the
    /// sequence of [`crate::kernels`].
    unsafe fn add<const N: usize>(b: &Self::Ready, n_blocks: usize, x: &[&Q8Block; N], acc: &mut [__m512; N]);
}

/// Formats of which few tokens meet a super-block as soon as it is read, with their sums in registers for a whole row.
pub(super) trait Straight: Wide {
    /// From this many tokens on it is faster than the AVX2 code.
    const FROM: usize;

    /// [`Wide::add`] of what is read now, fetching ahead meanwhile. `room` is for what registers do not hold.
    unsafe fn add_straight<B: SuperBlock, const N: usize>(
        b: &B,
        n_blocks: usize,
        x: &[&Q8Block; N],
        acc: &mut [__m512; N],
        room: &mut Self::Ready,
    );
}

/// Sixteen rows, as they lie in the file.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    row_bytes: usize,
}

/// A super-block in the file's layout.
struct Raw<'a, F> {
    rows: Rows<'a>,
    /// Where it begins in each row.
    at: usize,
    /// How far ahead of a byte to fetch, in bytes.
    ahead: usize,
    format: PhantomData<F>,
}

/// A super-block of `CHUNKS` sixteens of bytes, transposed.
pub(super) struct Transposed<const CHUNKS: usize>(pub(super) [[__m512i; 4]; CHUNKS]);

/// Multiplies any number of tokens, few of them straight from the file's layout: for formats that need every sixteen bytes once.
///
/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn few_or_many<F: Straight>(
    w: WeightRows<'_>,
    x: Q8Tokens<'_>,
    out: &mut Out<'_>,
    scratch: &mut PanelScratch,
) {
    if w.n_rows() < ROWS || x.len() < F::FROM {
        return avx2::matmul::<F>(w, x, out, scratch);
    }
    match x.len() {
        1 => few::<F, 1>(w, x, out),
        2 => few::<F, 2>(w, x, out),
        3 => few::<F, 3>(w, x, out),
        4 => few::<F, 4>(w, x, out),
        5 => few::<F, 5>(w, x, out),
        6 => few::<F, 6>(w, x, out),
        7 => few::<F, 7>(w, x, out),
        TOKENS => few::<F, TOKENS>(w, x, out),
        _ => many::<F>(w, x, out, scratch),
    }
}

/// Multiplies any number of tokens, with rows that are made ready for them.
///
/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn many<F: Wide>(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    if w.n_rows() < ROWS {
        return avx2::matmul::<F>(w, x, out, scratch);
    }
    for from in (0..x.len()).step_by(SPAN) {
        span::<F>(w, x.part(from, SPAN), out);
    }
}

/// Multiplies with `N` tokens, each sixteen rows with all of them.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn few<F: Straight, const N: usize>(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>) {
    let (n_rows, n_blocks) = (w.n_rows(), w.n_cols().div_ceil(32));
    // SAFETY: this function itself runs only where the CPU has the instructions.
    let mut room = unsafe { F::zero() };
    let ahead = avx2::prefetch_distance(ROWS / STRIP * w.row_bytes());
    let tokens: [&[Q8Block]; N] = std::array::from_fn(|t| x.row(t));
    for r in (0..n_rows).step_by(ROWS) {
        // Where fewer than sixteen rows are left, some before them are multiplied again.
        let first = r.min(n_rows - ROWS);
        let rows = Rows::new(w.rows(first..first + ROWS));
        let mut acc = [_mm512_setzero_ps(); N];
        for s in 0..w.row_bytes().div_ceil(F::BYTES) {
            let block = Raw::<F> { rows, at: s * F::BYTES, ahead, format: PhantomData };
            let n_blocks = n_blocks.min(8 * s + 8) - 8 * s;
            // SAFETY: as above.
            unsafe { F::add_straight(&block, n_blocks, &super_block(&tokens, s), &mut acc, &mut room) };
        }
        for t in 0..N {
            out.put(x.out_row(t), r, &store(acc[t])[r - first..]);
        }
    }
}

/// Multiplies with at most [`SPAN`] tokens: super-block by super-block, sixteen rows are made ready in the first cache and meet all
/// of them, while the same super-block of the next rows is fetched.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn span<F: Wide>(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>) {
    let (n_rows, n_blocks) = (w.n_rows(), w.n_cols().div_ceil(32));
    let mut sums = [_mm512_setzero_ps(); SPAN];
    let tokens: [&[Q8Block]; SPAN] = std::array::from_fn(|t| if t < x.len() { x.row(t) } else { &[] });
    let tokens = &tokens[..x.len()];
    // SAFETY: this function itself runs only where the CPU has the instructions.
    let mut ready = unsafe { F::zero() };
    for r in (0..n_rows).step_by(ROWS) {
        let first = r.min(n_rows - ROWS);
        let rows = Rows::new(w.rows(first..first + ROWS));
        sums[..x.len()].fill(_mm512_setzero_ps());
        for s in 0..w.row_bytes().div_ceil(F::BYTES) {
            let block = Raw::<F> { rows, at: s * F::BYTES, ahead: 0, format: PhantomData };
            let n_blocks = n_blocks.min(8 * s + 8) - 8 * s;
            // SAFETY: as above.
            unsafe { F::prepare(&block, n_blocks, &mut ready) };
            let len = ROWS * F::BYTES;
            let next = Next::new(rows.data, rows.data.len() + s * len, len, tokens.len());
            meet::<F>(&ready, n_blocks, tokens, s, &next, &mut sums);
        }
        for (t, sums) in sums[..x.len()].iter().enumerate() {
            match r - first {
                0 => out.put(x.out_row(t), r, &store(*sums)),
                n => out.put(x.out_row(t), r, &store(*sums)[n..]),
            }
        }
    }
}

/// Adds the products with super-block `s` of the tokens to `sums`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn meet<F: Wide>(
    block: &F::Ready,
    n_blocks: usize,
    tokens: &[&[Q8Block]],
    s: usize,
    next: &Next<'_>,
    sums: &mut [__m512],
) {
    let mut t = 0;
    while t < tokens.len() {
        let (x, sums) = (&tokens[t..], &mut sums[t..]);
        let n = match x.len() {
            1 => tile::<F, 1>(block, n_blocks, x, s, sums),
            2 => tile::<F, 2>(block, n_blocks, x, s, sums),
            3 => tile::<F, 3>(block, n_blocks, x, s, sums),
            4 => tile::<F, 4>(block, n_blocks, x, s, sums),
            5 => tile::<F, 5>(block, n_blocks, x, s, sums),
            6 => tile::<F, 6>(block, n_blocks, x, s, sums),
            7 => tile::<F, 7>(block, n_blocks, x, s, sums),
            _ => tile::<F, TOKENS>(block, n_blocks, x, s, sums),
        };
        next.fetch(t..t + n);
        t += n;
    }
}

/// Adds the products with the first `N` tokens to their sums; returns `N`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn tile<F: Wide, const N: usize>(
    block: &F::Ready,
    n_blocks: usize,
    tokens: &[&[Q8Block]],
    s: usize,
    sums: &mut [__m512],
) -> usize {
    let blocks = super_block(tokens.first_chunk::<N>().expect("as many tokens"), s);
    // They stay where they lie until the products are there: registers are needed for these.
    let sums = sums.first_chunk_mut().expect("sums of every token");
    // SAFETY: this function itself runs only where the CPU has the instructions.
    unsafe { F::add(block, n_blocks, &blocks, sums) };
    N
}

impl<'a> Rows<'a> {
    /// All rows of `w`, which are sixteen.
    #[inline(always)]
    fn new(w: WeightRows<'a>) -> Rows<'a> {
        assert_eq!(w.n_rows(), ROWS);
        Rows { data: w.data(), row_bytes: w.row_bytes() }
    }

    /// Sixteen bytes at `at` of rows `4 l + i`, where `l` counts lanes of 128 bits; zeros where rows end before.
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
    #[inline]
    fn quarter(&self, i: usize, at: usize) -> __m512i {
        assert!(i < 4 && at < self.row_bytes);
        let left = self.row_bytes - at;
        // Four rows' distance is a factor of addresses, where sixteen rows' offsets would need as many registers.
        // SAFETY: there are sixteen rows, and the byte lies within each by the assertion.
        let (first, step) = (unsafe { self.data.as_ptr().add(i * self.row_bytes + at) }, 4 * self.row_bytes);
        // SAFETY: as above, with the bytes behind it, of which there are sixteen or as many as are loaded.
        let [a, b, c, d] = unsafe {
            let rows = [first, first.add(step), first.add(2 * step), first.add(3 * step)];
            if left >= 16 {
                [load(rows[0]), load(rows[1]), load(rows[2]), load(rows[3])]
            } else {
                load_part(rows, left)
            }
        };
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c))
    }
}

impl<F: Wide> SuperBlock for Raw<'_, F> {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn dwords(&self, c: usize) -> [__m512i; 4] {
        let at = self.at + (16 * c).min(F::BYTES - 16);
        let mut v = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            v[i] = self.rows.quarter(i, at);
        }
        transpose_quarters(v)
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn fetch(&self, k: usize) {
        // Rows are taken one after another, as strips are in `avx2::Strip::fetch`.
        let quarter = ROWS * F::BYTES / 4;
        prefetch(self.rows.data, self.ahead + ROWS * self.at + k * quarter, quarter);
    }
}

impl<const CHUNKS: usize> SuperBlock for Transposed<CHUNKS> {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn dwords(&self, c: usize) -> [__m512i; 4] {
        self.0[c]
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn fetch(&self, _: usize) {}
}

/// Transposes four by four lanes in every 128 bits of the vectors.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_quarters(v: [__m512i; 4]) -> [__m512i; 4] {
    let (a, b) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    let (c, d) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    [_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)]
}

/// Dword `i` of `from` in every lane.
#[target_feature(enable = "avx2,avx512f")]
#[inline]
pub(super) fn spread<T: Plain>(from: &T, i: usize) -> __m512i {
    _mm512_broadcastd_epi32(_mm256_castsi256_si128(broadcast(from, i)))
}

/// Sixteen bytes.
///
/// # Safety
/// They may be read.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load(from: *const u8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadu_si128(from.cast()) }
}

/// The first `n` bytes of sixteen, and zeros, four times.
///
/// # Safety
/// They may be read.
#[target_feature(enable = "avx512bw,avx512vl")]
#[cold]
unsafe fn load_part(from: [*const u8; 4], n: usize) -> [__m128i; 4] {
    let mask = (1 << n) - 1;
    let mut v = [_mm_setzero_si128(); 4];
    for i in 0..4 {
        // SAFETY: the caller's promise; what the mask leaves out is not read.
        v[i] = unsafe { _mm_maskz_loadu_epi8(mask, from[i].cast()) };
    }
    v
}

/// The sixteen floats of a vector.
#[target_feature(enable = "avx512f")]
#[inline]
fn store(v: __m512) -> [f32; ROWS] {
    let mut to = [0.0; ROWS];
    // SAFETY: `to` has sixteen floats.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) };
    to
}
