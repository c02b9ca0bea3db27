//! The best values of rows of logits: every thread looks through parts of rows for the best of each block of columns, then a row's few
//! promising blocks are looked at again.

use std::sync::Mutex;

use apr_core::backend::{BEST_BLOCK, Best};

use crate::float::FloatKernels;
use crate::pool::Pool;
use crate::tensor::CpuTensor;

/// Blocks of columns that are one task: enough that waking another thread pays.
const N_BLOCKS: usize = 64;

/// Part of a row, and where the best rank of each of its blocks goes.
struct Part<'a> {
    values: &'a [f32],
    tops: Mutex<&'a mut [u32]>,
}

/// The `k` best of every row of `t`, or all where there are fewer columns.
pub fn best(pool: &Pool, float: &FloatKernels, t: &CpuTensor, k: usize, out: &mut Vec<Best>) {
    let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
    let k = k.min(n_cols);
    out.clear();
    out.resize(n_rows * k, Best::default());
    if out.is_empty() {
        return;
    }
    let n_tops = n_cols.div_ceil(BEST_BLOCK);
    let mut tops = vec![0; n_rows * n_tops];
    let parts: Vec<Part<'_>> = tops
        .chunks_mut(n_tops)
        .enumerate()
        .flat_map(|(i, tops)| t.row(i).chunks(N_BLOCKS * BEST_BLOCK).zip(tops.chunks_mut(N_BLOCKS)))
        .map(|(values, tops)| Part { values, tops: Mutex::new(tops) })
        .collect();
    pool.run(parts.len(), &|_, i| {
        float.tops(parts[i].values, &mut parts[i].tops.lock().unwrap_or_else(|e| e.into_inner()));
    });
    drop(parts);
    let rows: Vec<Mutex<&mut [Best]>> = out.chunks_mut(k).map(Mutex::new).collect();
    pool.run(n_rows, &|_, i| {
        let mut out = rows[i].lock().unwrap_or_else(|e| e.into_inner());
        Best::among(t.row(i), &tops[i * n_tops..(i + 1) * n_tops], &mut out);
    });
}
