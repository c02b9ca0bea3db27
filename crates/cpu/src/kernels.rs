//! The matrix kernels: one table of function pointers per instruction set, chosen at run time.
//!
//! A call multiplies a block of consecutive weight rows with any number of activation rows, so the indirect call is
//! amortised over many thousand multiply-adds. Quantized weights meet quantized activations ([`Q8Rows`]).
//!
//! **The sequence of operations is part of the contract**, and it is the same in every kernel and instruction set, so
//! a result depends neither on how many rows or tokens a call has nor on the thread it runs on:
//!
//! - Q2_K, Q3_K, Q4_K, Q5_K: per super-block of 256 columns the sums `i = Σ_j w_scale_j · x_scale_j · Σ w·x` and
//!   `m = Σ_j w_min_j · x_scale_j · Σ x` are exact in 32 bits. Then `acc = acc + (f32(i) · (w_d · x_d))`,
//!   `acc = acc - (f32(m) · (w_dmin · x_d))`, each operation rounded by itself, super-blocks in ascending order.
//! - Q6_K: the same sum `i` per 128 columns, as its scales have eight bits and that of 256 columns need not fit 32. Its codes
//!   are signed, so there is no `m`.
//! - The other quantized types: per block of 32 columns the exact sum `i`, then
//!   `acc = acc + (f32(i) · (w_d · (x_d · x_scale)))` and, for Q4_1 and Q5_1, `acc = acc + (w_m · ((x_d · x_scale) · f32(Σ x)))`,
//!   blocks in ascending order.
//! - F32, F16, BF16 use the activations' floats; each instruction set has one fixed order of summation.

mod activations;
mod out;

use std::fmt;
use std::str::FromStr;

use apr_core::qtype::GgmlType;

pub(crate) use activations::{LANES, Lanes, MAX_CODE, Regrouped, sub_scale, super_scale};
pub use activations::{Q8Block, Q8Rows, SUPER, SharedQ8Rows};
pub use out::{Out, SharedOut};

#[cfg(target_arch = "x86_64")]
use crate::avx2::{self, vnni};
use crate::float::FloatKernels;
use crate::scalar;

/// Tokens that a call keeps at hand in another form, at most: no more than fit the second cache. What it made of them serves the next call
/// with the same tokens, so callers with more tokens do well to bring as many at a time.
pub(crate) const SPAN: usize = 128;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable Rust: the reference of the others, and what runs where nothing better is written.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// What [`Isa::Avx2`] needs, and AVX-VNNI.
    AvxVnni,
    /// What [`Isa::Avx2`] needs, and AVX-512 F, BW, VL and VNNI.
    Avx512Vnni,
}

impl Isa {
    /// Every instruction set, from the slowest to the fastest.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512Vnni];

    /// The instruction sets whose tests have passed on a CPU that has them. Others run when they are asked for by name,
    /// and are never chosen.
    pub const PROVEN: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512Vnni];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx512Vnni => "avx512-vnni",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no instruction set.
#[derive(Debug, thiserror::Error)]
#[error("no instruction set is called {name:?}; there are: {}", Isa::ALL.map(Isa::name).join(", "))]
pub struct UnknownIsa {
    name: String,
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(s: &str) -> Result<Isa, UnknownIsa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == s).ok_or_else(|| UnknownIsa { name: s.to_owned() })
    }
}

/// The kernels of one instruction set. There is no way to hold the table of a set that this CPU lacks.
pub struct Kernels {
    isa: Isa,
    float: &'static FloatKernels,
    pub(crate) quantize_row: QuantizeRow,
    pub(crate) matmul_q8: MatmulQ8,
    pub(crate) matmul_f32: MatmulF32,
}

/// Quantizes a row; the blocks are as many as the row needs.
pub(crate) type QuantizeRow = unsafe fn(&[f32], &mut [Q8Block]);
/// Multiplies; the job's shapes have been checked.
pub(crate) type MatmulQ8 = unsafe fn(WeightRows<'_>, Q8Tokens<'_>, &mut Out<'_>, &mut PanelScratch);
/// Multiplies; the job's shapes have been checked.
pub(crate) type MatmulF32 = unsafe fn(WeightRows<'_>, F32Tokens<'_>, &mut Out<'_>);

impl Kernels {
    pub(crate) const fn new(
        isa: Isa,
        float: &'static FloatKernels,
        quantize_row: QuantizeRow,
        matmul_q8: MatmulQ8,
        matmul_f32: MatmulF32,
    ) -> Kernels {
        Kernels { isa, float, quantize_row, matmul_q8, matmul_f32 }
    }

    /// The fastest kernels that this CPU can run, of those that are proven ([`Isa::PROVEN`]).
    pub fn detect() -> &'static Kernels {
        Isa::PROVEN.into_iter().rev().find_map(Kernels::for_isa).expect("scalar kernels run everywhere")
    }

    /// The kernels of `isa`, or `None` where this CPU lacks it.
    #[cfg(target_arch = "x86_64")]
    pub fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        match isa {
            Isa::Scalar => Some(&scalar::KERNELS),
            Isa::Avx2 => avx2.then_some(&avx2::KERNELS),
            Isa::AvxVnni => (avx2 && is_x86_feature_detected!("avxvnni")).then_some(&vnni::AVX_VNNI),
            Isa::Avx512Vnni => (avx2 && avx512 && is_x86_feature_detected!("avx512vnni")).then_some(&vnni::AVX512_VNNI),
        }
    }

    /// The kernels of `isa`, or `None` where this CPU lacks it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        (isa == Isa::Scalar).then_some(&scalar::KERNELS)
    }

    /// The kernels of an `isa` that most CPUs lack, its instructions beyond AVX2 computed lane by lane. They are slow, and
    /// for tests: these are the kernels that run where the CPU has the instructions, but for the instructions themselves.
    ///
    /// `None` for a set that is not emulated, and where this CPU lacks AVX2.
    #[cfg(target_arch = "x86_64")]
    pub fn emulated(isa: Isa) -> Option<&'static Kernels> {
        let table = match isa {
            Isa::AvxVnni => Some(&vnni::AVX_VNNI_EMULATED),
            _ => None,
        };
        table.filter(|_| Kernels::for_isa(Isa::Avx2).is_some())
    }

    /// No set is emulated on this architecture.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn emulated(_: Isa) -> Option<&'static Kernels> {
        None
    }

    /// The instruction set of this table.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The float loops of this instruction set.
    pub fn float(&self) -> &'static FloatKernels {
        self.float
    }

    /// Quantizes one activation row into a row of [`Q8Rows`] of the same width. A super-block that holds an infinity
    /// or a NaN makes NaN of every product it takes part in.
    pub fn quantize_row(&self, x: &[f32], out: &mut [Q8Block]) {
        assert_eq!(x.len().div_ceil(SUPER), out.len(), "super-blocks for a row of {}", x.len());
        // SAFETY: a table exists only where the CPU has its instruction set.
        unsafe { (self.quantize_row)(x, out) }
    }

    /// `out[out_rows[t]][r] = w[r] · x[x_rows[t]]` for every token `t` and weight row `r`. The type of `w` is
    /// quantized.
    pub fn matmul_q8(
        &self,
        w: WeightRows<'_>,
        x: &Q8Rows,
        x_rows: &[u32],
        out: &mut Out<'_>,
        out_rows: &[u32],
        scratch: &mut PanelScratch,
    ) {
        assert!(!w.qtype.is_float(), "{} rows meet float activations", w.qtype);
        assert_eq!(w.n_cols, x.n_cols(), "columns of weights and activations");
        check_rows(&w, x.n_rows(), x_rows, out, out_rows);
        // SAFETY: a table exists only where the CPU has its instruction set.
        unsafe { (self.matmul_q8)(w, Q8Tokens { x, x_rows, out_rows }, out, scratch) }
    }

    /// `out[out_rows[t]][r] = w[r] · x[x_rows[t]]` for every token `t` and weight row `r`, where `x` has rows of
    /// `w.n_cols()` floats. The type of `w` is F32, F16 or BF16.
    pub fn matmul_f32(&self, w: WeightRows<'_>, x: &[f32], x_rows: &[u32], out: &mut Out<'_>, out_rows: &[u32]) {
        assert!(w.qtype.is_float(), "{} rows meet quantized activations", w.qtype);
        assert_eq!(x.len() % w.n_cols, 0, "activations are rows of {}", w.n_cols);
        check_rows(&w, x.len() / w.n_cols, x_rows, out, out_rows);
        // SAFETY: a table exists only where the CPU has its instruction set.
        unsafe { (self.matmul_f32)(w, F32Tokens { x, x_rows, out_rows }, out) }
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa).finish_non_exhaustive()
    }
}

fn check_rows(w: &WeightRows<'_>, n_x: usize, x_rows: &[u32], out: &Out<'_>, out_rows: &[u32]) {
    assert_eq!(x_rows.len(), out_rows.len(), "activation rows and output rows");
    assert_eq!(w.n_rows(), out.n_cols(), "weight rows and output columns");
    assert!(x_rows.iter().all(|&r| (r as usize) < n_x), "an activation row beyond {n_x}");
    assert!(out_rows.iter().all(|&r| (r as usize) < out.n_rows()), "an output row beyond {}", out.n_rows());
}

/// Consecutive rows of a weight matrix, as the GGUF file stores them.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    qtype: GgmlType,
    data: &'a [u8],
    n_cols: usize,
    row_bytes: usize,
}

impl<'a> WeightRows<'a> {
    /// `data` as rows of `n_cols` weights. `n_cols` is a multiple of the type's block.
    pub fn new(qtype: GgmlType, data: &'a [u8], n_cols: usize) -> WeightRows<'a> {
        let row_bytes = qtype.row_bytes(n_cols);
        assert!(
            row_bytes > 0 && data.len().is_multiple_of(row_bytes),
            "{} bytes are not rows of {row_bytes}",
            data.len()
        );
        WeightRows { qtype, data, n_cols, row_bytes }
    }

    /// How the weights are stored.
    pub fn qtype(&self) -> GgmlType {
        self.qtype
    }

    /// Columns of a row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.data.len() / self.row_bytes
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &'a [u8] {
        &self.data[r * self.row_bytes..][..self.row_bytes]
    }

    /// The rows' bytes, one row after another.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels take rows side by side"))]
    pub(crate) fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Rows `range`, as a matrix.
    pub fn rows(&self, range: std::ops::Range<usize>) -> WeightRows<'a> {
        WeightRows { data: &self.data[range.start * self.row_bytes..range.end * self.row_bytes], ..*self }
    }
}

/// The activation side of a product: which rows, and where each row's results go.
#[derive(Clone, Copy)]
pub(crate) struct Q8Tokens<'a> {
    x: &'a Q8Rows,
    x_rows: &'a [u32],
    out_rows: &'a [u32],
}

impl<'a> Q8Tokens<'a> {
    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        self.x_rows.len()
    }

    /// At most `n` tokens from `from` on.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave tokens"))]
    pub(crate) fn part(&self, from: usize, n: usize) -> Q8Tokens<'a> {
        let range = from..(from + n).min(self.len());
        Q8Tokens { x: self.x, x_rows: &self.x_rows[range.clone()], out_rows: &self.out_rows[range] }
    }

    /// The activations of token `t`.
    #[inline]
    pub(crate) fn row(&self, t: usize) -> &'a [Q8Block] {
        self.x.row(self.x_rows[t] as usize)
    }

    /// The row of the output that belongs to token `t`.
    #[inline]
    pub(crate) fn out_row(&self, t: usize) -> usize {
        self.out_rows[t] as usize
    }
}

/// [`Q8Tokens`] for float activations.
#[derive(Clone, Copy)]
pub(crate) struct F32Tokens<'a> {
    x: &'a [f32],
    x_rows: &'a [u32],
    out_rows: &'a [u32],
}

impl<'a> F32Tokens<'a> {
    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        self.x_rows.len()
    }

    /// The activations of token `t`, of `n_cols` columns.
    #[inline]
    pub(crate) fn row(&self, t: usize, n_cols: usize) -> &'a [f32] {
        &self.x[self.x_rows[t] as usize * n_cols..][..n_cols]
    }

    /// The row of the output that belongs to token `t`.
    #[inline]
    pub(crate) fn out_row(&self, t: usize) -> usize {
        self.out_rows[t] as usize
    }
}

/// What a thread's kernel calls reuse from one to the next: unpacked weights, and tokens in other orders. One per thread; it
/// grows to the widest matrix and then allocates nothing.
#[derive(Debug, Default)]
pub struct PanelScratch {
    unpacked: Vec<scalar::Unpacked>,
    panels: Vec<Panel>,
    lanes: Vec<Lanes<LANES>>,
    singles: Vec<Lanes<1>>,
    interleaved: Interleaved,
    sums: Vec<LaneSums>,
    regrouped: Vec<Regrouped>,
}

/// Which tokens are in `lanes` and `singles` of a [`PanelScratch`], in which order.
#[derive(Debug, Default)]
struct Interleaved {
    /// Of the rows that they are of.
    stamp: u64,
    rows: Vec<u32>,
    order: Order,
}

/// In which order tiles take the codes of activations, and what they want to know of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Order {
    /// Whether codes of two blocks at a time, as [`Lanes::codes`] tells.
    pub(crate) paired: bool,
    /// Whether weights' codes are offset by 32, which [`Lanes::offsets`] takes off.
    pub(crate) offset: bool,
}

impl PanelScratch {
    /// Empty scratch.
    pub fn new() -> PanelScratch {
        PanelScratch::default()
    }

    /// `n` super-blocks of one row.
    pub(crate) fn unpacked(&mut self, n: usize) -> &mut [scalar::Unpacked] {
        if self.unpacked.len() < n {
            self.unpacked.resize(n, scalar::Unpacked::ZERO);
        }
        &mut self.unpacked[..n]
    }

    /// `n` super-blocks of eight rows.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave rows"))]
    pub(crate) fn panels(&mut self, n: usize) -> &mut [Panel] {
        if self.panels.len() < n {
            self.panels.resize(n, Panel::ZERO);
        }
        &mut self.panels[..n]
    }

    /// `n` super-blocks of one token.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels regroup columns"))]
    pub(crate) fn regrouped(&mut self, n: usize) -> &mut [Regrouped] {
        if self.regrouped.len() < n {
            self.regrouped.resize(n, Regrouped::ZERO);
        }
        &mut self.regrouped[..n]
    }

    /// Whether the tokens of [`PanelScratch::tiles`] are these in this order, which they will be from now on: neighbouring tasks
    /// multiply the same tokens with other weights.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave tokens"))]
    pub(crate) fn has_interleaved(&mut self, x: Q8Tokens<'_>, order: Order) -> bool {
        let of = &mut self.interleaved;
        let stamp = x.x.stamp();
        if stamp == of.stamp && order == of.order && x.x_rows == of.rows {
            return true;
        }
        (of.stamp, of.order) = (stamp, order);
        of.rows.clear();
        of.rows.extend_from_slice(x.x_rows);
        false
    }

    /// What tiles are made of: `n_panels` super-blocks of eight rows, `n_lanes` of eight tokens, `n_singles` of one, and `n_sums`
    /// times the sums of a row with eight tokens.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave rows"))]
    pub(crate) fn tiles(
        &mut self,
        n_panels: usize,
        n_lanes: usize,
        n_singles: usize,
        n_sums: usize,
    ) -> (&mut [Panel], &mut [Lanes<LANES>], &mut [Lanes<1>], &mut [LaneSums]) {
        if self.lanes.len() < n_lanes {
            self.lanes.resize(n_lanes, Lanes::ZERO);
        }
        if self.singles.len() < n_singles {
            self.singles.resize(n_singles, Lanes::ZERO);
        }
        if self.sums.len() < n_sums {
            self.sums.resize(n_sums, LaneSums([0.0; LANES]));
        }
        self.panels(n_panels);
        let (panels, lanes) = (&mut self.panels[..n_panels], &mut self.lanes[..n_lanes]);
        (panels, lanes, &mut self.singles[..n_singles], &mut self.sums[..n_sums])
    }
}

/// Rows of a [`Panel`].
pub(crate) const STRIP: usize = 8;

/// A super-block of eight weight rows, interleaved so that every 32-bit lane of a vector belongs to one row.
/// Which fields are used, and the meaning of codes, depends on the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave rows"))]
pub(crate) struct Panel {
    /// `codes[j][i][4 * row + c]` is the code of column `32 j + 4 i + c`, or in pairs of blocks as [`Lanes::codes`]; or, by row,
    /// `codes[j][row][4 * i + c]` is: rows that meet the same tokens are neighbours in the cache.
    pub(crate) codes: [[[u8; 32]; 8]; 8],
    /// Integer scales of 16 or 32 columns each, twice per row; or those of two neighbours as a pair, as `mins`.
    pub(crate) scales: [[[i16; 2]; STRIP]; 16],
    /// Integer minima of 16 or 32 columns, those of two neighbours as a pair per row.
    pub(crate) mins: [[[i16; 2]; STRIP]; 8],
    /// Float scales: of the super-block (first entry), or of every 32 columns.
    pub(crate) d: [[f32; STRIP]; 8],
    /// Float minima, as `d`.
    pub(crate) m: [[f32; STRIP]; 8],
}

impl Panel {
    pub(crate) const ZERO: Panel = Panel {
        codes: [[[0; 32]; 8]; 8],
        scales: [[[0; 2]; STRIP]; 16],
        mins: [[[0; 2]; STRIP]; 8],
        d: [[0.0; STRIP]; 8],
        m: [[0.0; STRIP]; 8],
    };
}

/// A row's sums with the tokens of [`Lanes`].
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only SIMD kernels interleave tokens"))]
pub(crate) struct LaneSums(pub(crate) [f32; LANES]);
