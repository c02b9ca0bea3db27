//! Products of weights with activations: which kernel multiplies which type, and how rows are put into tiles.

use apr_core::backend::{FfnScratch, FfnWeights, Routing};
use apr_core::qtype::GgmlType;

use crate::driver::{Arg, Launch, Result};
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

/// The kernel that computes gate, up and SiLU of a quantized type for tiles of at most 8 rows.
fn gate_up_kernel(qtype: GgmlType, tile: usize) -> Option<&'static str> {
    match tile {
        _ if qtype.is_float() => None,
        1 => per_type!(qtype, "gate_up_", "_1"),
        4 => per_type!(qtype, "gate_up_", "_4"),
        8 => per_type!(qtype, "gate_up_", "_8"),
        _ => None,
    }
}

/// The kernel that routes with the logits that a product gives.
pub(crate) fn router_kernel(product: &Launch) -> Option<&'static str> {
    match product.kernel {
        "matvec_f32_1" => Some("router_f32_1"),
        "matvec_f32_4" => Some("router_f32_4"),
        "matvec_f32_8" => Some("router_f32_8"),
        _ => None,
    }
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

/// Slots up to which tensor cores do without work rather than be too few at it.
const N_SLOTS_FEW: usize = 64;

/// Rows of a tile of all of `n_slots`, for products with `w`.
///
/// A block of threads on tensor cores takes 128 rows of a matrix and goes along them in steps, each of which takes about as long as the
/// memory to answer, 16 of them for 2,048 columns. Blocks that are fewer than multiprocessors leave most of the bandwidth unused
/// meanwhile: reading weights from the second-level cache again for every eight slots is faster then.
fn tile_of(device: &Device, n_slots: usize, w: &CudaWeight) -> usize {
    let n_blocks = w.n_rows.div_ceil(128) * n_slots.div_ceil(64);
    let is_idle = n_slots <= N_SLOTS_FEW && n_blocks < device.driver().description().n_sm as usize;
    match n_slots {
        0 | 1 => 1,
        2..=4 => 4,
        n if w.qtype.is_float() || n < 16 || is_idle => 8,
        n if n <= 32 => 32,
        _ => 64,
    }
}

impl Rows {
    /// All rows of `x`, with one matrix.
    fn all(device: &Device, x: &CudaTensor, w: &CudaWeight) -> Rows {
        let (none, n_slots) = (Arg::Address(0), x.n_rows());
        let tile = tile_of(device, n_slots, w);
        Rows { tiles: none, order: none, ids: none, tile, n_tiles: n_slots.div_ceil(tile), n_slots, x_div: 1 }
    }

    /// The slots of `ids`, sorted for products with a matrix of `n_cols` columns per expert.
    fn of_experts(groups: &Groups, ids: &CudaIds, x: &CudaTensor, n_cols: usize) -> Rows {
        let [order, tiles] = groups.args();
        let n_slots = ids.n_rows() * ids.n_cols();
        let x_div = if x.n_cols() == n_cols { ids.n_cols() } else { 1 };
        Rows { tiles, order, ids: ids.arg(), tile: groups.tile, n_tiles: groups.n_tiles, n_slots, x_div }
    }
}

/// `out[:, at..at + n_rows of w] = x wᵀ`
pub(crate) fn matmul(device: &Device, out: &mut CudaTensor, at: usize, w: &CudaWeight, x: &CudaTensor) -> Result<()> {
    let ld = out.n_cols();
    product(device, out, (at, ld), w, x, &Rows::all(device, x, w))
}

/// `out = [x qᵀ, x kᵀ, x vᵀ]` in one launch for a few rows of `x`; false where that is not to be had, and nothing is launched.
pub(crate) fn qkv(device: &Device, out: &mut CudaTensor, w: [&CudaWeight; 3], x: &CudaTensor) -> Result<bool> {
    let (rows, n_cols) = (Rows::all(device, x, w[0]), w[0].n_cols);
    if w.iter().any(|w| w.qtype.is_float()) || rows.tile > 8 {
        return Ok(false);
    }
    assert!(w[1].n_rows == w[2].n_rows && w.iter().all(|w| w.n_cols == n_cols), "one input, as many keys as values");
    let kernel = match rows.tile {
        1 => "qkv_1",
        4 => "qkv_4",
        _ => "qkv_8",
    };
    let lanes = lanes_of(n_cols);
    let n_blocks = w.iter().map(|w| w.n_rows.div_ceil(256 / lanes)).sum();
    let (planes, types) = (w.map(CudaWeight::planes).concat(), w.map(|w| Arg::from(w.qtype.id())));
    let sizes = [rows.n_slots, w[0].n_rows, w[1].n_rows, n_cols, lanes].map(Arg::from);
    let args = [&[out.arg_mut()][..], &planes, &types, &x.q8()?, &sizes].concat();
    device.launch(kernel, 128, [n_blocks, rows.n_tiles, 1], &args);
    Ok(true)
}

/// `s.gate = silu(gate x) · up x`, `s.up = up x`, dense or of the experts of `ids`.
pub(crate) fn gate_up(
    device: &Device,
    s: &mut FfnScratch<CudaTensor>,
    w: &FfnWeights<CudaWeight>,
    experts: Option<(&Groups, &CudaIds)>,
    x: &CudaTensor,
) -> Result<()> {
    let FfnWeights { gate, up, .. } = w;
    let rows = || match experts {
        Some((groups, ids)) => Rows::of_experts(groups, ids, x, gate.n_cols),
        None => Rows::all(device, x, gate),
    };
    s.gate.set_rows(x.n_rows())?;
    s.up.set_rows(x.n_rows())?;
    let few = gate_up_kernel(gate.qtype, rows().tile);
    let Some(kernel) = few.filter(|_| gate.qtype == up.qtype && gate.n_rows.is_multiple_of(32)) else {
        product(device, &mut s.gate, (0, gate.n_rows), gate, x, &rows())?;
        product(device, &mut s.up, (0, up.n_rows), up, x, &rows())?;
        return swiglu(device, s);
    };
    let (rows, lanes, input) = (rows(), lanes_of(gate.n_cols), x.q8()?);
    let written = [s.gate.arg_mut(), s.up.arg_mut()];
    let q8 = s.gate.q8_mut()?.unwrap_or([Arg::Address(0); 2]);
    let places = [rows.tiles, rows.order, rows.ids];
    let sizes = [rows.n_slots, gate.n_rows, gate.n_cols, rows.x_div, lanes].map(Arg::from);
    let args = [&written[..], &q8, &gate.planes(), &up.planes(), &input, &places, &sizes].concat();
    let threads = if rows.tile == 1 { 512 } else { 256 };
    device.launch(kernel, threads, [gate.n_rows / 32, rows.n_tiles, 1], &args);
    Ok(())
}

/// `s.gate = silu(s.gate) · s.up`
fn swiglu(device: &Device, s: &mut FfnScratch<CudaTensor>) -> Result<()> {
    let (n, gate) = (s.gate.n(), s.gate.arg_mut());
    match s.gate.q8_mut()? {
        Some([codes, scales]) => {
            let args = [gate, s.up.arg(), codes, scales, n.into()];
            device.launch("swiglu_q8", 256, [(n / 4).div_ceil(256), 1, 1], &args);
        }
        None => device.launch("swiglu", 256, [n.div_ceil(256), 1, 1], &[gate, s.up.arg(), n.into()]),
    }
    Ok(())
}

/// Products of outputs with slots that a block of `down` holds at most.
const DOWN_PRODUCTS: usize = 256;

/// `s.down[i, s] = w[ids[i, s]] s.gate[i, s]`, `out[i] = Σ_s weights[i, s] s.down[i, s]`
pub(crate) fn down(
    device: &Device,
    groups: &Groups,
    out: &mut CudaTensor,
    s: &mut FfnScratch<CudaTensor>,
    w: &CudaWeight,
    routing: &Routing<CudaTensor, CudaIds>,
) -> Result<()> {
    let (n_tokens, k) = (routing.ids.n_rows(), routing.ids.n_cols());
    s.down.set_rows(n_tokens)?;
    out.set_rows(n_tokens)?;
    if groups.tile > 1 || w.qtype.is_float() || 2 * k > DOWN_PRODUCTS {
        matmul_experts(device, groups, &mut s.down, w, &routing.ids, &s.gate)?;
        weighted_sum(device, out, &s.down, &routing.weights);
        return Ok(());
    }
    let (kernel, lanes) = (per_type!(w.qtype, "down_", "").expect("a type that was uploaded"), lanes_of(w.n_cols));
    let per_block = 2 * (256 / lanes / k).max(1);
    let input = s.gate.q8()?;
    let sizes = [k, w.n_rows, w.n_cols, lanes, per_block].map(Arg::from);
    let head = [&[out.arg_mut(), s.down.arg_mut()][..], &w.planes(), &input].concat();
    let args = [&head[..], &[routing.ids.arg(), routing.weights.arg()], &sizes, &[Arg::Address(0)]].concat();
    device.launch_open(kernel, 256, [w.n_rows.div_ceil(per_block), n_tokens, 1], &args);
    Ok(())
}

/// `out[i] = Σ_s weights[i, s] x[i, s]`; `out` has its rows.
pub(crate) fn weighted_sum(device: &Device, out: &mut CudaTensor, x: &CudaTensor, weights: &CudaTensor) {
    let (rows, n) = (out.n_rows(), out.n_cols());
    let args = [out.arg_mut(), x.arg(), weights.arg(), weights.n_cols().into(), n.into(), Arg::Address(0)];
    device.launch_open("weighted_sum", 256, [n.div_ceil(256), rows, 1], &args);
}

/// `x += y`, by the launch that has just written `y` where that can.
pub(crate) fn add(device: &Device, x: &mut CudaTensor, y: &CudaTensor) {
    let to = x.arg_mut();
    // Kernels that can have what to add to as their last argument, which none of their threads may read for anything else.
    let adds = |last: &Launch| (last.kernel != "norm_rope" && !last.args.contains(&to)).then_some(last.kernel);
    match device.take_open(y.arg(), adds) {
        Some(mut launch) => {
            *launch.args.last_mut().expect("kernels have arguments") = to;
            device.push(launch);
        }
        None => {
            let n = x.n();
            device.launch("add", 256, [n.div_ceil(256), 1, 1], &[to, y.arg(), n.into()]);
        }
    }
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
    product(device, out, (0, w.n_rows), w, x, &Rows::of_experts(groups, ids, x, w.n_cols))
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
    let none = Arg::Address(0);
    if rows.tile > 8 {
        let args = [&head[..], &x.q8()?, &places, &sizes].concat();
        device.launch(kernel, 256, [w.n_rows.div_ceil(128), rows.n_tiles, 1], &args);
        return Ok(());
    }
    let (args, per_block) = match w.qtype.is_float() {
        true => ([&head[..], &[x.arg()], &places, &sizes, &[none]].concat(), 4),
        false => {
            let lanes = lanes_of(w.n_cols);
            ([&head[..], &x.q8()?, &places, &sizes, &[lanes.into(), none]].concat(), 256 / lanes)
        }
    };
    let grid = [w.n_rows.div_ceil(per_block), rows.n_tiles, 1];
    match (at, ld) == (0, w.n_rows) {
        true => device.launch_open(kernel, 128, grid, &args),
        false => device.launch(kernel, 128, grid, &args),
    }
    Ok(())
}

/// Lanes that share a row of a weight: as many as leave few of them idle.
fn lanes_of(n_cols: usize) -> usize {
    let n_units = n_cols.div_ceil(64);
    let busy = |lanes: &usize| 4 * n_units >= 3 * n_units.next_multiple_of(*lanes);
    [32, 16, 8, 4, 2].into_iter().find(busy).unwrap_or(1)
}
