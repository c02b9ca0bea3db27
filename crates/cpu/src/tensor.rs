//! Tensors and weights of the CPU backend, and the one parallel loop over rows that the small ops share.

use std::ops::Range;

use apr_core::backend::{Bytes, WeightData};
use apr_core::qtype::GgmlType;

use crate::kernels::{Kernels, Q8Rows, SharedOut, WeightRows};
use crate::lines::Lines;
use crate::pool::Pool;

/// Rows of floats, and their 8-bit form where a consumer's weights are quantized.
pub struct CpuTensor {
    /// At least `[n_rows, n_cols]`; grows and is then reused.
    data: Lines,
    n_rows: usize,
    n_cols: usize,
    q8: Option<Q8>,
}

/// The 8-bit form of a tensor. A row of experts' inputs has one part per slot, each quantized on its own.
struct Q8 {
    rows: Q8Rows,
    n_part: usize,
}

/// Rows of expert ids.
pub struct CpuIds {
    /// `[n_rows, n_cols]`
    pub data: Vec<u32>,
    pub n_cols: usize,
}

/// The largest float matrix that is looked through for values that fit fewer bytes: routers, not embeddings.
const LOOKED_THROUGH_BYTES: usize = 16 << 20;

/// A weight tensor in the file's own layout, but for small matrices whose floats all fit half the bytes.
pub struct CpuWeight {
    data: WeightData,
    /// The values of a vector, such as a norm.
    pub vector: Vec<f32>,
}

impl CpuTensor {
    /// `consumers` are the weights that the tensor, or each of its parts, is multiplied with.
    pub fn new(n_cols: usize, consumers: &[&CpuWeight]) -> CpuTensor {
        let quantized = consumers.iter().find(|w| !w.data.qtype.is_float());
        let q8 = quantized.map(|w| Q8 { rows: Q8Rows::new(), n_part: n_cols / w.data.n_cols });
        CpuTensor { data: Lines::default(), n_rows: 0, n_cols, q8 }
    }

    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Changes the number of rows. Values of rows that were there stay.
    pub fn set_rows(&mut self, n_rows: usize) {
        if self.data.len() < n_rows * self.n_cols {
            self.data.resize(n_rows * self.n_cols);
        }
        self.n_rows = n_rows;
    }

    /// `[n_rows, n_cols]`
    pub fn values(&self) -> &[f32] {
        &self.data[..self.n_rows * self.n_cols]
    }

    /// `[n_rows, n_cols]`; the 8-bit form is stale until [`write_rows`] has run.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.n_rows * self.n_cols]
    }

    pub fn row(&self, i: usize) -> &[f32] {
        &self.values()[i * self.n_cols..(i + 1) * self.n_cols]
    }

    /// The 8-bit rows, `[n_rows * n_part, n_cols / n_part]`.
    pub fn q8(&self) -> &Q8Rows {
        &self.q8.as_ref().expect("the tensor was told of a quantized consumer").rows
    }
}

impl CpuWeight {
    pub fn new(data: &WeightData) -> CpuWeight {
        let mut vector = Vec::new();
        if data.n_rows == 1 && data.n_mat == 1 && data.qtype.is_float() {
            vector.resize(data.n_cols, 0.0);
            apr_core::qtype::dequantize_row(data.qtype, &data.bytes, &mut vector);
        }
        CpuWeight { data: narrowed(data), vector }
    }

    pub fn n_rows(&self) -> usize {
        self.data.n_rows
    }

    pub fn n_cols(&self) -> usize {
        self.data.n_cols
    }

    pub fn n_mat(&self) -> usize {
        self.data.n_mat
    }

    pub fn is_float(&self) -> bool {
        self.data.qtype.is_float()
    }

    /// Rows `rows` of matrix `mat`.
    pub fn rows(&self, mat: usize, rows: Range<usize>) -> WeightRows<'_> {
        let n = self.data.row_bytes();
        let at = mat * self.data.n_rows;
        let bytes = &self.data.bytes[(at + rows.start) * n..(at + rows.end) * n];
        WeightRows::new(self.data.qtype, bytes, self.data.n_cols)
    }

    /// Tells whoever holds the bytes that matrix `mat` is about to be read.
    pub fn will_need(&self, mat: usize) {
        let n = self.data.n_rows * self.data.row_bytes();
        self.data.bytes.will_need(mat * n..(mat + 1) * n);
    }

    /// Writes row `row` of the first matrix as floats.
    pub fn dequantize(&self, row: usize, out: &mut [f32]) {
        let n = self.data.row_bytes();
        apr_core::qtype::dequantize_row(self.data.qtype, &self.data.bytes[row * n..(row + 1) * n], out);
    }
}

/// `data`, as BF16 where it is a small F32 matrix and every value survives: models are trained in BF16 and their routers
/// written as F32, and half the bytes are read in half the time.
fn narrowed(data: &WeightData) -> WeightData {
    let mut data = data.clone();
    let is_small_matrix = data.qtype == GgmlType::F32 && data.n_rows > 1 && data.bytes.len() <= LOOKED_THROUGH_BYTES;
    let values = data.bytes.as_chunks::<4>().0;
    if is_small_matrix && values.iter().all(|value| value[..2] == [0, 0]) {
        let upper = values.iter().flat_map(|value| [value[2], value[3]]).collect();
        (data.qtype, data.bytes) = (GgmlType::BF16, Bytes::from_vec(upper));
    }
    data
}

/// Calls `f(i, row)` for every row of `t`, then prepares the row's 8-bit form: every op that writes a tensor ends here.
pub fn write_rows(pool: &Pool, kernels: &Kernels, t: &mut CpuTensor, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let (n_rows, n_cols) = (t.n_rows, t.n_cols);
    let n_part = t.q8.as_ref().map_or(1, |q| q.n_part);
    let rows = SharedOut::new(&mut t.data[..n_rows * n_cols], n_cols);
    let q8 = t.q8.as_mut().map(|q| {
        q.rows.resize(n_rows * n_part, n_cols / n_part);
        q.rows.shared()
    });
    // Waking another thread costs more than a few rows.
    let per_task = if n_rows < 4 { n_rows.max(1) } else { n_rows.div_ceil(4 * pool.n_threads()).min(16) };
    pool.run(n_rows.div_ceil(per_task), &|_, task| {
        for i in task * per_task..((task + 1) * per_task).min(n_rows) {
            // SAFETY: every row belongs to one task.
            let row = unsafe { rows.cells(i, 0..n_cols) };
            f(i, row);
            let Some(q8) = q8 else { continue };
            for (part, x) in row.chunks_exact(n_cols / n_part).enumerate() {
                // SAFETY: as for the row itself.
                kernels.quantize_row(x, unsafe { q8.row(i * n_part + part) });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Out};

    /// A matrix of `n_rows` rows of 40 values.
    fn matrix(n_rows: usize, value: impl Fn(usize) -> f32) -> WeightData {
        let bytes = (0..n_rows * 40).flat_map(|i| value(i).to_le_bytes()).collect();
        let (name, bytes) = ("ffn_gate_inp".to_string(), Bytes::from_vec(bytes));
        WeightData { name, qtype: GgmlType::F32, n_cols: 40, n_rows, n_mat: 1, bytes }
    }

    fn product(kernels: &Kernels, w: WeightRows<'_>) -> Vec<u32> {
        let x: Vec<f32> = (0..80).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut y = vec![0.0; 2 * w.n_rows()];
        kernels.matmul_f32(w, &x, &[0, 1], &mut Out::new(&mut y, w.n_rows()), &[0, 1]);
        y.iter().map(|y| y.to_bits()).collect()
    }

    #[test]
    fn a_router_of_bf16_values_is_read_in_half_the_bytes_with_the_same_bits() {
        let data = matrix(9, |i| f32::from_bits((i as f32 * 0.11).cos().to_bits() & 0xffff_0000));
        let w = CpuWeight::new(&data);
        assert_eq!(w.rows(0, 0..9).qtype(), GgmlType::BF16);
        assert_eq!(w.rows(0, 0..9).row_bytes(), 80);
        for kernels in [Isa::Scalar, Isa::Avx2].into_iter().filter_map(Kernels::for_isa) {
            let whole = WeightRows::new(GgmlType::F32, &data.bytes, 40);
            assert_eq!(product(kernels, w.rows(0, 0..9)), product(kernels, whole), "{}", kernels.isa());
        }
    }

    #[test]
    fn a_value_that_needs_its_bytes_keeps_them() {
        let w = CpuWeight::new(&matrix(9, |i| if i == 359 { 1.0 + f32::EPSILON } else { 0.5 }));
        assert_eq!(w.rows(0, 0..9).qtype(), GgmlType::F32);
        let vector = CpuWeight::new(&matrix(1, |_| 0.5));
        assert_eq!(vector.rows(0, 0..1).qtype(), GgmlType::F32);
        assert_eq!(vector.vector, [0.5; 40]);
    }
}
