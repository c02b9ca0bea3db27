//! Products of weights with activations: which kernel multiplies which type, and how rows are put into tiles.

use apr_core::qtype::GgmlType;

use crate::driver::{Arg, Result};
use crate::memory::{Buffer, Device};
use crate::tensor::{CudaIds, CudaTensor, CudaWeight, ensure};

/// The name of a kernel that exists for every type.
macro_rules! per_type {
    ($qtype:expr, $before:literal, $after:literal) => {
        match $qtype {
            GgmlType::Q4_K => Some(concat!($before, "q4_k", $after)),
            GgmlType::Q5_K => Some(concat!($before, "q5_k", $after)),
            GgmlType::Q6_K => Some(concat!($before, "q6_k", $after)),
            GgmlType::Q8_0 => Some(concat!($before, "q8_0", $after)),
            GgmlType::Q4_0 => Some(concat!($before, "q4_0", $after)),
            GgmlType::Q4_1 => Some(concat!($before, "q4_1", $after)),
            GgmlType::Q5_0 => Some(concat!($before, "q5_0", $after)),
            GgmlType::Q5_1 => Some(concat!($before, "q5_1", $after)),
            GgmlType::F32 => Some(concat!($before, "f32", $after)),
            GgmlType::F16 => Some(concat!($before, "f16", $after)),
            GgmlType::BF16 => Some(concat!($before, "bf16", $after)),
            _ => None,
        }
    };
}

/// The kernel that multiplies a type's rows with `tile` rows of activations. Tiles of more than 8 are for quantized types.
pub(crate) fn kernel_of(qtype: GgmlType, tile: usize) -> Option<&'static str> {
    match tile {
        1 => per_type!(qtype, "matvec_", "_1"),
        4 => per_type!(qtype, "matvec_", "_4"),
        8 => per_type!(qtype, "matvec_", "_8"),
        32 => per_type!(qtype, "matmul_", "_32"),
        64 => per_type!(qtype, "matmul_", "_64"),
        _ => unreachable!("tiles have 1, 4, 8, 32 or 64 rows"),
    }
}

/// The kernel that looks tokens up in a table.
pub(crate) fn embed_kernel(qtype: GgmlType) -> &'static str {
    per_type!(qtype, "embed_", "").expect("a type that was uploaded")
}

/// A step's slots sorted by expert, cut into tiles.
#[derive(Default)]
pub(crate) struct Groups {
    order: Option<Buffer>,
    tiles: Option<Buffer>,
    tile: usize,
    n_tiles: usize,
}

/// Experts that `group_by_expert` has threads for.
const N_EXPERT_MAX: usize = 1024;

impl Groups {
    /// Sorts the slots of `ids` for products with all of `weights`. With so few of them that experts hardly meet, every slot is a
    /// tile.
    pub fn prepare(&mut self, device: &Device, ids: &CudaIds, weights: &[&CudaWeight]) -> Result<()> {
        let n_slots = ids.n_rows() * ids.n_cols();
        let n_expert = weights[0].n_mat;
        if ids.n_rows() <= 2 || n_expert > N_EXPERT_MAX {
            (self.tile, self.n_tiles) = (1, n_slots);
            return Ok(());
        }
        let floats = weights.iter().any(|w| w.qtype.is_float());
        self.tile = expert_tile(n_slots, n_expert, floats);
        self.n_tiles = n_slots.div_ceil(self.tile) + n_expert.min(n_slots);
        ensure(device, &mut self.order, (n_slots * 4).next_power_of_two())?;
        ensure(device, &mut self.tiles, (self.n_tiles * 16).next_power_of_two())?;
        let [order, tiles] = self.args();
        let args = [order, tiles, ids.arg(), n_slots.into(), n_expert.into(), self.tile.into(), self.n_tiles.into()];
        device.launch("group_by_expert", 1024, [1, 1, 1], &args);
        Ok(())
    }

    /// Order and tiles, null where every slot is a tile.
    fn args(&self) -> [Arg; 2] {
        let arg = |b: &Option<Buffer>| b.as_ref().map_or(Arg::Address(0), Buffer::arg);
        if self.tile == 1 { [Arg::Address(0); 2] } else { [arg(&self.order), arg(&self.tiles)] }
    }
}

/// Rows of a tile of experts' slots.
///
/// A tile costs about as many instructions as it has rows with padding, and the decoding of the weights besides, which is worth 16 rows
/// on tensor cores; on them a tile of 32 takes the time of one and a half of 8 without. An expert with n slots has n / tile + 1/2 tiles
/// on average. So from 8 slots per expert on 32 are the fastest, and from 96 on 64.
fn expert_tile(n_slots: usize, n_expert: usize, floats: bool) -> usize {
    match n_slots {
        n if n <= 4 * n_expert => 4,
        n if floats || n < 8 * n_expert => 8,
        n if n < 96 * n_expert => 32,
        _ => 64,
    }
}

/// Which rows a product computes.
struct Rows {
    tiles: Arg,
    order: Arg,
    ids: Arg,
    tile: usize,
    n_tiles: usize,
    n_slots: usize,
    /// Slots of an input row.
    x_div: usize,
}

/// `out[:, at..at + n_rows of w] = x wᵀ`
pub(crate) fn matmul(device: &Device, out: &mut CudaTensor, at: usize, w: &CudaWeight, x: &CudaTensor) -> Result<()> {
    let n_slots = x.n_rows();
    let tile = match n_slots {
        0 | 1 => 1,
        2..=4 => 4,
        n if w.qtype.is_float() || n < 16 => 8,
        n if n <= 32 => 32,
        _ => 64,
    };
    let none = Arg::Address(0);
    let n_tiles = n_slots.div_ceil(tile);
    let rows = Rows { tiles: none, order: none, ids: none, tile, n_tiles, n_slots, x_div: 1 };
    let ld = out.n_cols();
    product(device, out, (at, ld), w, x, &rows)
}

/// `out[i, s] = w[ids[i, s]] x[i]`, or `x[i, s]` where `x` has a part per slot.
pub(crate) fn matmul_experts(
    device: &Device,
    groups: &Groups,
    out: &mut CudaTensor,
    w: &CudaWeight,
    ids: &CudaIds,
    x: &CudaTensor,
) -> Result<()> {
    let [order, tiles] = groups.args();
    let n_slots = ids.n_rows() * ids.n_cols();
    let x_div = if x.n_cols() == w.n_cols { ids.n_cols() } else { 1 };
    let rows = Rows { tiles, order, ids: ids.arg(), tile: groups.tile, n_tiles: groups.n_tiles, n_slots, x_div };
    product(device, out, (0, w.n_rows), w, x, &rows)
}

fn product(
    device: &Device,
    out: &mut CudaTensor,
    (at, ld): (usize, usize),
    w: &CudaWeight,
    x: &CudaTensor,
    rows: &Rows,
) -> Result<()> {
    let kernel = kernel_of(w.qtype, rows.tile).expect("a type that was uploaded");
    let head = [&[out.arg_mut()][..], &w.planes()].concat();
    let places = [rows.tiles, rows.order, rows.ids];
    let sizes = [rows.n_slots, w.n_rows, w.n_cols, rows.x_div, ld, at].map(Arg::from);
    if w.qtype.is_float() {
        let args = [&head[..], &[x.arg()], &places, &sizes].concat();
        device.launch(kernel, 128, [w.n_rows.div_ceil(4), rows.n_tiles, 1], &args);
    } else if rows.tile > 8 {
        let args = [&head[..], &x.q8()?, &places, &sizes].concat();
        device.launch(kernel, 256, [w.n_rows.div_ceil(128), rows.n_tiles, 1], &args);
    } else {
        let lanes = lanes_of(w.n_cols);
        let args = [&head[..], &x.q8()?, &places, &sizes, &[lanes.into()]].concat();
        device.launch(kernel, 128, [w.n_rows.div_ceil(128 / lanes), rows.n_tiles, 1], &args);
    }
    Ok(())
}

/// Lanes that share a row of a weight: as many as leave few of them idle.
fn lanes_of(n_cols: usize) -> usize {
    let n_units = n_cols.div_ceil(64);
    let busy = |lanes: &usize| 4 * n_units >= 3 * n_units.next_multiple_of(*lanes);
    [32, 16, 8, 4, 2].into_iter().find(busy).unwrap_or(1)
}
