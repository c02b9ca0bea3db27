//! Where a matrix product is written: a rectangle of a row-major matrix that many threads fill in disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;

/// A range of columns of a row-major f32 matrix, exclusively held.
#[derive(Debug)]
pub struct Out<'a> {
    ptr: *mut f32,
    stride: usize,
    n_rows: usize,
    n_cols: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: an `Out` is the only access to its cells, as `&mut [f32]` would be.
unsafe impl Send for Out<'_> {}

impl<'a> Out<'a> {
    /// The whole of `data`, a matrix with rows of `n_cols`.
    pub fn new(data: &'a mut [f32], n_cols: usize) -> Out<'a> {
        let shared = SharedOut::new(data, n_cols);
        // SAFETY: `shared` is dropped here, so this is the only handle on the borrowed data.
        unsafe { shared.cols(0..n_cols) }
    }

    /// Rows of the matrix.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns of the range.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Writes `values` to row `row` from column `col` of the range on. Of a number that is known they are written without a call.
    #[inline(always)]
    pub(crate) fn put(&mut self, row: usize, col: usize, values: &[f32]) {
        assert!(row < self.n_rows && col <= self.n_cols && values.len() <= self.n_cols - col);
        // SAFETY: the assertion keeps the cells within this range of columns, which nobody else accesses.
        unsafe {
            let to = self.ptr.add(row * self.stride + col);
            to.copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }
}

/// A row-major f32 matrix that several threads write, each in columns of its own.
#[derive(Clone, Copy, Debug)]
pub struct SharedOut<'a> {
    ptr: *mut f32,
    stride: usize,
    n_rows: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: the matrix is borrowed exclusively and cells are reached only through `cols`, whose caller promises that
// no two threads hold the same columns.
unsafe impl Send for SharedOut<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for SharedOut<'_> {}

impl<'a> SharedOut<'a> {
    /// `data` as rows of `n_cols`.
    pub fn new(data: &'a mut [f32], n_cols: usize) -> SharedOut<'a> {
        assert!(n_cols > 0 && data.len().is_multiple_of(n_cols), "{} values are not rows of {n_cols}", data.len());
        SharedOut { ptr: data.as_mut_ptr(), stride: n_cols, n_rows: data.len() / n_cols, data: PhantomData }
    }

    /// Columns `range` of every row, for one thread.
    ///
    /// # Safety
    /// While the returned [`Out`] lives, a cell that it writes may be touched through no other handle. Two handles on
    /// the same columns are fine as long as they write different rows.
    pub unsafe fn cols(self, range: Range<usize>) -> Out<'a> {
        assert!(range.start <= range.end && range.end <= self.stride, "columns {range:?} of {}", self.stride);
        let n_cols = range.end - range.start;
        // SAFETY: `range.start` lies within the first row, or one past an empty matrix's end at most.
        let ptr = if self.n_rows == 0 { self.ptr } else { unsafe { self.ptr.add(range.start) } };
        Out { ptr, stride: self.stride, n_rows: self.n_rows, n_cols, data: PhantomData }
    }

    /// Columns `range` of row `i`, for one thread.
    ///
    /// # Safety
    /// While the slice lives, nobody else may reach these cells.
    pub unsafe fn cells(self, i: usize, range: Range<usize>) -> &'a mut [f32] {
        assert!(
            i < self.n_rows && range.start <= range.end && range.end <= self.stride,
            "row {i}, columns {range:?} exist"
        );
        // SAFETY: the cells lie within the borrowed matrix by the assertion; the caller rules out aliases.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.stride + range.start), range.len()) }
    }
}
