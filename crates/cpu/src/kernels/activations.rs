//! Activation rows as the integer kernels read them: 8-bit codes with two levels of scale.
//!
//! A super-block is 256 columns with one float `d`; each 32 columns have a five-bit integer sub-scale `s`, so that a
//! value is `code · d · s`. One scale per 32 columns halves the error of one per 256, and because the sub-scale is an
//! integer it folds into the integer scales of a K-quant: a whole super-block is then one exact 32-bit sum.

use std::sync::atomic::{AtomicU64, Ordering};

/// Columns of a super-block.
pub const SUPER: usize = 256;

/// The largest sub-scale. With it the sum of a Q5_K super-block, `31·127·256·63·32`, still fits 32 bits.
pub const MAX_SCALE: i16 = 32;

/// The largest code: symmetric, so that a code can always be negated.
pub const MAX_CODE: f32 = 127.0;

/// 256 quantized activations, and the sums and products that kernels would otherwise compute again for every row.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Q8Block {
    /// -127..=127; column `c` is worth `codes[c] · d · scales[c / 32]`.
    pub(crate) codes: [i8; SUPER],
    /// `scales`, each twice: a broadcast of four bytes fills every 16-bit lane.
    pub(crate) scale_pairs: [[i16; 2]; 8],
    /// Sum of the codes of every 16 columns.
    pub(crate) half_sums: [i16; 16],
    /// Sub-scale of every 32 columns, 0..=32.
    pub(crate) scales: [i16; 8],
    /// Sum of the codes of every 32 columns.
    pub(crate) sums: [i16; 8],
    /// `d · scales[j]`.
    pub(crate) block_d: [f32; 8],
    /// `(d · scales[j]) · sums[j]`: what a constant weight of 1 adds to the dot product.
    pub(crate) block_sum: [f32; 8],
    /// Scale of the super-block; NaN where an input was not finite, so that every output that depends on it is NaN.
    pub(crate) d: f32,
    /// `scales[j] · sums[j]`, where it is `narrow`.
    pub(crate) scaled_sums: [i16; 8],
    /// Whether `scaled_sums` fit 16 bits, and with any codes of four bits also the sum of the products of any 32 columns. It takes
    /// columns of nearly one sign to be wider.
    pub(crate) narrow: bool,
}

impl Q8Block {
    /// A block of zeros.
    pub const ZERO: Q8Block = Q8Block {
        codes: [0; SUPER],
        scale_pairs: [[0; 2]; 8],
        half_sums: [0; 16],
        scales: [0; 8],
        sums: [0; 8],
        block_d: [0.0; 8],
        block_sum: [0.0; 8],
        d: 0.0,
        scaled_sums: [0; 8],
        narrow: true,
    };

    /// The block that makes NaN of every product it takes part in.
    pub(crate) const NAN: Q8Block = {
        let mut b = Q8Block::ZERO;
        b.d = f32::NAN;
        b.block_d = [f32::NAN; 8];
        b.block_sum = [f32::NAN; 8];
        b
    };

    /// Fills the derived fields from `d`, `scales`, `half_sums`, and the sums of the magnitudes of every 32 codes.
    #[inline(always)]
    pub(crate) fn derive(&mut self, magnitudes: &[i16; 8]) {
        for j in 0..8 {
            self.scale_pairs[j] = [self.scales[j]; 2];
            self.sums[j] = self.half_sums[2 * j] + self.half_sums[2 * j + 1];
            self.block_d[j] = self.d * f32::from(self.scales[j]);
            self.block_sum[j] = self.block_d[j] * f32::from(self.sums[j]);
            let scaled_sum = i32::from(self.scales[j]) * i32::from(self.sums[j]);
            self.scaled_sums[j] = scaled_sum as i16;
            // The larger of the sums of positive and of negative codes, twice.
            let larger = magnitudes[j] + self.sums[j].abs();
            self.narrow &= scaled_sum.abs() <= i32::from(i16::MAX) && larger <= 2 * (i16::MAX / 15);
        }
    }

    /// The 256 values that the codes stand for; all NaN where an input was not finite.
    pub fn dequantize(&self) -> [f32; SUPER] {
        std::array::from_fn(|c| f32::from(self.codes[c]) * self.block_d[c / 32])
    }
}

/// Tokens of a group.
pub(crate) const LANES: usize = 8;

/// A super-block of `L` tokens, interleaved so that every 32-bit lane of a vector belongs to one token. Fields of the names of
/// [`Q8Block`]'s are the same numbers, 16-bit ones in pairs of neighbours; those that weights of an [`Order`] do not read are anything.
///
/// [`Order`]: super::Order
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave tokens"))]
pub(crate) struct Lanes<const L: usize> {
    /// `codes[i][token][c]` is the code of column `4 i + c`; or, for weights whose [`Panel`] is so, dwords of 64 columns each that hold
    /// two of the first 32 in their lower half and two of the others in their upper one.
    ///
    /// [`Panel`]: super::Panel
    pub(crate) codes: [[[i8; 4]; L]; SUPER / 4],
    pub(crate) scale_pairs: [[[i16; 2]; L]; 8],
    pub(crate) half_sums: [[[i16; 2]; L]; 8],
    pub(crate) scales: [[[i16; 2]; L]; 4],
    pub(crate) sums: [[[i16; 2]; L]; 4],
    pub(crate) block_d: [[f32; L]; 8],
    pub(crate) block_sum: [[f32; L]; 8],
    pub(crate) scaled_sums: [[[i16; 2]; L]; 4],
    /// For weights that are offset by 32: -32 times the sums of the codes in the lower and in the upper halves of four dwords.
    pub(crate) offsets: [[[i16; 2]; L]; 16],
    pub(crate) d: [f32; L],
    /// Whether all tokens are.
    pub(crate) narrow: bool,
}

impl<const L: usize> Lanes<L> {
    pub(crate) const ZERO: Lanes<L> = Lanes {
        codes: [[[0; 4]; L]; SUPER / 4],
        scale_pairs: [[[0; 2]; L]; 8],
        half_sums: [[[0; 2]; L]; 8],
        scales: [[[0; 2]; L]; 4],
        sums: [[[0; 2]; L]; 4],
        block_d: [[0.0; L]; 8],
        block_sum: [[0.0; L]; 8],
        scaled_sums: [[[0; 2]; L]; 4],
        offsets: [[[0; 2]; L]; 16],
        d: [0.0; L],
        narrow: true,
    };
}

/// A super-block of one token for weights that are offset by 32, in an order in which sums of eight columns need no shuffle.
/// Entry `[p][e]` of `codes` holds columns `64 p .. 64 p + 64` of both halves of the super-block: eight columns of the first,
/// the same ones of the second, and so on; of every sixteen columns the first eight where `e` is 0, the others where it is 1.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels regroup columns"))]
pub(crate) struct Regrouped {
    pub(crate) codes: [[[i8; 64]; 2]; 2],
    /// -32 times the sum of the codes of eight columns: four of `codes[p][0]` and the four at the same place of `codes[p][1]`.
    pub(crate) offsets: [[i32; 16]; 2],
    /// As in [`Q8Block`].
    pub(crate) scale_pairs: [[i16; 2]; 8],
    /// As in [`Q8Block`].
    pub(crate) d: f32,
}

impl Regrouped {
    pub(crate) const ZERO: Regrouped =
        Regrouped { codes: [[[0; 64]; 2]; 2], offsets: [[0; 16]; 2], scale_pairs: [[0; 2]; 8], d: 0.0 };
}

/// The scale of a super-block whose largest magnitude is `amax`, or `None` where all codes are zero: the largest
/// value gets code 127 and sub-scale 32. Values so small that `d` would be subnormal count as zero.
#[inline(always)]
pub(crate) fn super_scale(amax: f32) -> Option<f32> {
    let d = amax / (MAX_CODE * MAX_SCALE as f32);
    (d >= f32::MIN_POSITIVE).then_some(d)
}

/// The sub-scale of 32 columns with largest magnitude `amax` under the super-block's scale `d`.
#[inline(always)]
pub(crate) fn sub_scale(amax: f32, d: f32) -> i16 {
    if amax == 0.0 { 0 } else { ((amax / (MAX_CODE * d)).ceil() as i16).clamp(1, MAX_SCALE) }
}

/// Stamps of contents of [`Q8Rows`] that have been given out, none of them twice.
static STAMPS: AtomicU64 = AtomicU64::new(0);

/// Quantized activation rows of one width. Memory is kept when the shape changes, so the steady state allocates
/// nothing.
#[derive(Debug, Default)]
pub struct Q8Rows {
    blocks: Vec<Q8Block>,
    n_rows: usize,
    n_cols: usize,
    /// Another one whenever somebody may write the rows, so that what was made of them is known to be theirs still.
    stamp: u64,
}

impl Q8Rows {
    /// No rows yet.
    pub fn new() -> Q8Rows {
        Q8Rows::default()
    }

    /// Gives the rows a new shape. Contents are unspecified until each row is quantized.
    pub fn resize(&mut self, n_rows: usize, n_cols: usize) {
        let n = n_rows * n_cols.div_ceil(SUPER);
        if self.blocks.len() < n {
            self.blocks.resize(n, Q8Block::ZERO);
        }
        (self.n_rows, self.n_cols) = (n_rows, n_cols);
        self.renew();
    }

    fn renew(&mut self) {
        self.stamp = STAMPS.fetch_add(1, Ordering::Relaxed) + 1;
    }

    /// Equal for two looks at any rows only if they are the same and nobody has written them meanwhile; 0 where there never were any.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels keep what they made of rows"))]
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Rows held.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns of a row, not counting the zeros that pad it to whole super-blocks.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    fn blocks_per_row(&self) -> usize {
        self.n_cols.div_ceil(SUPER)
    }

    /// Row `i`, as super-blocks.
    pub fn row(&self, i: usize) -> &[Q8Block] {
        assert!(i < self.n_rows, "row {i} of {} activation rows", self.n_rows);
        let n = self.blocks_per_row();
        &self.blocks[i * n..][..n]
    }

    /// Row `i`, to be written by [`Kernels::quantize_row`](super::Kernels::quantize_row).
    pub fn row_mut(&mut self, i: usize) -> &mut [Q8Block] {
        assert!(i < self.n_rows, "row {i} of {} activation rows", self.n_rows);
        self.renew();
        let n = self.blocks_per_row();
        &mut self.blocks[i * n..][..n]
    }

    /// A handle through which several threads can each write their own rows.
    pub fn shared(&mut self) -> SharedQ8Rows<'_> {
        self.renew();
        let blocks_per_row = self.blocks_per_row();
        SharedQ8Rows { ptr: self.blocks.as_mut_ptr(), blocks_per_row, n_rows: self.n_rows, rows: Default::default() }
    }
}

/// Write access to [`Q8Rows`] for many threads, each for rows of its own.
#[derive(Clone, Copy, Debug)]
pub struct SharedQ8Rows<'a> {
    ptr: *mut Q8Block,
    blocks_per_row: usize,
    n_rows: usize,
    rows: std::marker::PhantomData<&'a mut [Q8Block]>,
}

// SAFETY: the handle borrows its rows exclusively and gives access only through `row`, whose caller promises that no
// row is used by two threads at a time.
unsafe impl Send for SharedQ8Rows<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedQ8Rows<'_> {}

impl<'a> SharedQ8Rows<'a> {
    /// Row `i` for writing.
    ///
    /// # Safety
    /// While the returned slice lives, nobody else may ask for the same row.
    pub unsafe fn row(self, i: usize) -> &'a mut [Q8Block] {
        assert!(i < self.n_rows, "row {i} of {} activation rows", self.n_rows);
        // SAFETY: row `i` lies within the borrowed blocks by the assertion; the caller rules out aliases.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.blocks_per_row), self.blocks_per_row) }
    }
}
