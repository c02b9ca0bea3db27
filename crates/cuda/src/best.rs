//! The best values of rows, found where they are: what a sampler wants of logits, a few bytes of each row.

use apr_core::backend::{BEST_MAX, Best};

use crate::counters;
use crate::driver::{Arg, Result};
use crate::memory::{Buffer, Device};
use crate::tensor::{CudaTensor, ensure};

/// Values of a row that a block of threads looks through.
const PART: usize = 2048;
/// Groups of a part, each of which has a word.
const GROUPS: usize = 32;

/// The `k` best of every row of `t`, or all where there are fewer columns. `found` is kept for the next call.
pub(crate) fn best(
    device: &Device,
    counts: &mut Option<Buffer>,
    found: &mut Option<Buffer>,
    t: &CudaTensor,
    k: usize,
    out: &mut Vec<Best>,
) -> Result<()> {
    assert!(k <= BEST_MAX, "{k} of the best are asked for");
    let (n_rows, n_cols) = (t.n_rows(), t.n_cols());
    let k = k.min(n_cols);
    out.clear();
    if n_rows * k == 0 {
        return Ok(());
    }
    let n_parts = n_cols.div_ceil(PART);
    // What was found, and what every block has to tell the last.
    let (n_found, per_part) = (8 * n_rows * k, if k == 1 { 8 } else { 4 * GROUPS });
    ensure(device, found, (n_found + n_rows * n_parts * per_part).next_power_of_two())?;
    let found = found.as_ref().expect("it was ensured");
    let (parts, counts) = (Arg::Address(found.address(n_found)), counters(device, counts, n_rows)?);
    let mut args = vec![found.arg(), parts, counts, t.arg(), n_cols.into()];
    if k > 1 {
        args.push(k.into());
    }
    device.launch(if k == 1 { "best_one" } else { "best" }, 256, [n_parts, n_rows, 1], &args);
    let mut words = vec![[0u32; 2]; n_rows * k];
    found.read(0, bytemuck::cast_slice_mut(&mut words))?;
    out.extend(words.iter().map(|&[index, bits]| Best { index, value: f32::from_bits(bits) }));
    Ok(())
}
