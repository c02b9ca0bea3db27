//! Attention: which rows of a step are computed by which kernel, and in how many parts.

use apr_core::backend::{Heads, KV_BLOCK, KvType};
use apr_core::batch::Batch;

use crate::batch::{DeviceBatch, Places};
use crate::driver::{Arg, Launch, Result};
use crate::kv::KvCache;
use crate::memory::{Buffer, Device};
use crate::tensor::{CudaTensor, ensure};

fn store_kernel(kv: KvType) -> &'static str {
    match kv {
        KvType::F32 => "kv_store_f32",
        KvType::F16 => "kv_store_f16",
        KvType::Q8_0 => "kv_store_q8_0",
    }
}

fn norm_rope_store_kernel(kv: KvType) -> &'static str {
    match kv {
        KvType::F32 => "norm_rope_store_f32",
        KvType::F16 => "norm_rope_store_f16",
        KvType::Q8_0 => "norm_rope_store_q8_0",
    }
}

/// The kernel that computes rows one by one, and how many heads that share a KV head it holds at once.
fn row_kernel(kv: KvType, head_dim: usize) -> (&'static str, usize) {
    let kernel = match kv {
        KvType::F16 if head_dim <= 64 => return ("attention_decode_64", 8),
        KvType::F16 if head_dim <= 128 => return ("attention_decode_128", 8),
        KvType::F32 => "attention_f32",
        KvType::F16 => "attention_f16",
        KvType::Q8_0 => "attention_q8_0",
    };
    (kernel, (2048 / head_dim).clamp(1, 16))
}

/// Tokens by heads that a block of `attention_prefill` computes.
const TILE_ROWS: usize = 64;

/// Of heads that share a KV head, as many as are computed together: a divisor of their number, at most `most`.
fn chunk_of(heads: Heads, most: usize) -> usize {
    let group = heads.n_head / heads.n_head_kv;
    (1..=group.min(most)).rev().find(|n| group.is_multiple_of(*n)).unwrap_or(1)
}

/// Parts that keys and values are cut into, and KV blocks of each, so that blocks of threads, `n_beside` for every part, keep the
/// device busy: `per_sm` for each multiprocessor.
fn split(device: &Device, n_kv: usize, n_beside: usize, per_sm: usize) -> (usize, usize) {
    let n_blocks = n_kv.div_ceil(KV_BLOCK);
    // Rounded up by at most an eighth: launches stay the same for a while as contexts grow.
    let n_blocks = n_blocks.next_multiple_of((n_blocks.next_power_of_two() / 16).max(1));
    let wanted = (per_sm * device.driver().description().n_sm as usize).div_ceil(n_beside);
    let per_split = n_blocks.div_ceil(wanted.clamp(1, n_blocks));
    (n_blocks.div_ceil(per_split), per_split)
}

/// What both ways of computing rows are given.
struct Call<'a> {
    device: &'a Device,
    parts: &'a mut Option<Buffer>,
    out: Arg,
    qkv: [Arg; 2],
    /// The 8-bit form of `out`, null where it is not to be written.
    q8: [Arg; 2],
    places: &'a Places,
    layer: usize,
    heads: Heads,
}

impl Call<'_> {
    /// Computes `n_rows` rows whose indices are `rows`; `index` is what the kernel finds them by, `n_blocks` the grid's.
    fn run(
        &mut self,
        kernel: &'static str,
        index: Arg,
        rows: (Arg, usize),
        n_kv: usize,
        n_blocks: usize,
        chunk: usize,
    ) -> Result<()> {
        let Heads { n_head, n_head_kv, head_dim } = self.heads;
        // As many of `attention_decode` as a multiprocessor holds: one more would begin when those are done.
        let per_sm = if kernel.starts_with("attention_decode") { 3 } else { 4 };
        let (n_split, per_split) = split(self.device, n_kv, n_blocks * (n_head / chunk), per_sm);
        if n_split > 1 {
            ensure(self.device, self.parts, (rows.1 * n_head * n_split * (2 + head_dim) * 4).next_power_of_two())?;
        }
        let parts = self.parts.as_ref().map_or(Arg::Address(0), Buffer::arg);
        let places = [self.places.blocks, self.places.tables, self.places.positions];
        let sizes = [n_head, n_head_kv, head_dim, self.layer, chunk, n_split, per_split].map(Arg::from);
        let mut args = [&[self.out, parts, index, self.qkv[0]], &places[..], &[self.qkv[1]], &sizes].concat();
        if !kernel.starts_with("attention_prefill") {
            args.extend(self.q8);
        }
        self.device.launch(kernel, 128, [n_blocks, n_head / chunk, n_split], &args);
        if n_split > 1 {
            let args = [self.out, parts, rows.0, n_head.into(), head_dim.into(), n_split.into()];
            let args = [&args[..], &self.q8].concat();
            self.device.launch("attention_merge", 128, [rows.1, n_head, 1], &args);
        }
        Ok(())
    }
}

/// Stores a step's keys and values, in the launch that has rotated them where they come from there.
fn store(device: &Device, qkv: &CudaTensor, kv_type: KvType, places: &Places, (layer, heads): (usize, Heads)) {
    let Heads { n_head, n_head_kv, head_dim } = heads;
    let to = [places.blocks, places.tables, places.positions, n_head_kv.into(), layer.into()];
    let rotated = |last: &Launch| (last.kernel == "norm_rope").then(|| norm_rope_store_kernel(kv_type));
    if let Some(mut launch) = device.take_open(qkv.arg(), rotated) {
        launch.grid[0] = (n_head + 2 * n_head_kv).div_ceil(4) as u32;
        launch.args.extend(to);
        return device.push(launch);
    }
    let from = [qkv.arg(), qkv.n_cols().into(), heads.k().start.into(), head_dim.into()];
    let grid = [(2 * n_head_kv).div_ceil(4), qkv.n_rows(), 1];
    device.launch(store_kernel(kv_type), 128, grid, &[&from[..], &to].concat());
}

/// Stores a step's keys and values and attends to all of them: `out` is `[n_tokens, n_head · head_dim]`, `qkv` has queries, keys and
/// values of each token.
///
/// Sequences with many tokens in the step are computed in tiles on tensor cores where the cache has halves. Queries and weights are
/// rounded to halves there, sums are floats.
#[expect(clippy::too_many_arguments, reason = "an op's arguments, and the buffers it shares with others")]
pub(crate) fn attention(
    device: &Device,
    on_device: &mut DeviceBatch,
    parts: &mut Option<Buffer>,
    out: &mut CudaTensor,
    qkv: &CudaTensor,
    kv: &KvCache,
    (layer, heads): (usize, Heads),
    batch: &Batch,
) -> Result<()> {
    let n_rows = qkv.n_rows();
    out.set_rows(n_rows)?;
    let head_dim = heads.head_dim;
    let kv_type = kv.shape().kv_type;
    let places = on_device.places(device, batch, kv)?;
    store(device, qkv, kv_type, &places, (layer, heads));

    let chunk = chunk_of(heads, TILE_ROWS);
    let per_tile = (kv_type == KvType::F16 && head_dim <= 128).then_some(TILE_ROWS / chunk);
    let rows = on_device.attention_rows(device, batch, per_tile)?;
    let qkv = [qkv.arg(), qkv.n_cols().into()];
    let written = out.arg_mut();
    // Tiles of many rows do not write it.
    let q8 = if rows.many.n == 0 && head_dim.is_multiple_of(32) { out.q8_mut()? } else { None };
    let q8 = q8.unwrap_or([Arg::Address(0); 2]);
    let mut call = Call { device, parts, out: written, qkv, q8, places: &places, layer, heads };
    if rows.many.n > 0 {
        let kernel = if head_dim <= 64 { "attention_prefill_64" } else { "attention_prefill_128" };
        call.run(kernel, rows.tiles, (rows.many.rows, rows.many.n), rows.many.n_kv, rows.n_tiles, chunk)?;
    }
    if rows.few.n > 0 {
        let (kernel, most) = row_kernel(kv_type, head_dim);
        let chunk = chunk_of(heads, most);
        let few = (rows.few.rows, rows.few.n);
        call.run(kernel, rows.few.rows, few, rows.few.n_kv, rows.few.n, chunk)?;
    }
    Ok(())
}
