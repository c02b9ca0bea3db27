//! What a device must be able to do: about a dozen coarse ops that mean something in the model.
//!
//! A fused op is a trait method whose default body is the unfused computation, so that the plain meaning of an op can never be lost;
//! an override must agree with it. Shapes are written as `[rows, columns]`, rows being the tokens of the step.

use std::ops::Range;
use std::sync::Arc;

use crate::batch::Batch;
use crate::probe::{Probe, View};
use crate::qtype::GgmlType;
use crate::rope::Rope;
use crate::stage::Stage;
use crate::stats::RowStats;

pub mod faulty;
pub mod fed;
pub mod reference;
pub mod rounded;
pub mod unfused;

mod best;
mod decorator;

pub use best::{BEST_BLOCK, BEST_MAX, Best};

/// Positions in a KV block, which is also the tile in which attention sums: fixed, so that results do not depend on batching.
pub const KV_BLOCK: usize = 64;

/// What can go wrong in a backend once a model is loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackendError {
    /// A buffer could not be had.
    #[error("out of memory: {what} needs {need_bytes} bytes")]
    OutOfMemory { what: String, need_bytes: usize },
    /// The weight's type has no kernel on this device.
    #[error("tensor '{tensor}' has type {qtype}, which {device} cannot multiply")]
    UnsupportedType { tensor: String, qtype: GgmlType, device: &'static str },
    /// The device does not do what it is asked to.
    #[error("{device} failed: {what}")]
    Device { device: String, what: String },
    /// The model has a shape that the device's kernels are not written for.
    #[error("{device} cannot run {what}")]
    UnsupportedShape { device: &'static str, what: String },
    /// Whoever looked on ended the pass, and knows why.
    #[error("the pass was stopped by whoever looked on")]
    Stopped,
    /// A saved KV block does not fit the cache it is restored into.
    #[error("saved KV block has {got} bytes, this cache needs {expected}: it was saved with other settings")]
    KvRestore { expected: usize, got: usize },
}

/// Result of a backend op.
pub type Result<T> = std::result::Result<T, BackendError>;

/// Precision in which a backend multiplies activations, declared so that comparisons know what error to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Activations stay 32-bit floats.
    F32,
    /// Activations are 8-bit integers with a scale per 32 where weights are quantized, and have 16 bits in attention where keys and
    /// values are not 32-bit floats: integers with a scale per head, or half floats.
    Int8,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Int8 => "int8",
        })
    }
}

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    F32,
    F16,
    /// 8-bit integers, one f16 scale per 32 values along the head.
    Q8_0,
}

impl KvType {
    /// Bytes of `n` values, `n` a multiple of 32.
    pub fn bytes(self, n: usize) -> usize {
        match self {
            KvType::F32 => 4 * n,
            KvType::F16 => 2 * n,
            KvType::Q8_0 => n / 32 * 34,
        }
    }
}

impl std::str::FromStr for KvType {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<KvType, String> {
        match s {
            "f32" => Ok(KvType::F32),
            "f16" => Ok(KvType::F16),
            "q8_0" => Ok(KvType::Q8_0),
            _ => Err(format!("unknown KV type '{s}'; the types are f32, f16 and q8_0")),
        }
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
        })
    }
}

/// The sizes of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub n_layer: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub kv_type: KvType,
}

impl KvShape {
    /// Bytes of the values of one block of [`KV_BLOCK`] positions, all layers.
    pub fn block_bytes(&self) -> usize {
        2 * self.n_layer * self.n_head_kv * KV_BLOCK * self.kv_type.bytes(self.head_dim)
    }
}

/// The sizes of attention's heads. Rows of `qkv` are `n_head` queries, then `n_head_kv` keys, then `n_head_kv` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Columns of the queries in a `qkv` row.
    pub fn q(&self) -> Range<usize> {
        0..self.n_head * self.head_dim
    }

    /// Columns of the keys in a `qkv` row.
    pub fn k(&self) -> Range<usize> {
        let at = self.q().end;
        at..at + self.n_head_kv * self.head_dim
    }

    /// Columns of the values in a `qkv` row.
    pub fn v(&self) -> Range<usize> {
        let at = self.k().end;
        at..at + self.n_head_kv * self.head_dim
    }

    /// Columns of a `qkv` row.
    pub fn n_qkv(&self) -> usize {
        self.v().end
    }
}

/// Holds bytes of weights: memory, or a mapped file.
pub trait Storage: AsRef<[u8]> + Send + Sync {
    /// Told that `range` is about to be read, so that what lies on disk can be asked for. Returns at once.
    fn will_need(&self, _range: Range<usize>) {}
}

impl Storage for Vec<u8> {}

/// Bytes that stay where they are, usually in a mapped file.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Storage>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`. Panics where the owner is shorter.
    pub fn new(owner: Arc<dyn Storage>, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= (*owner).as_ref().len(), "bytes {range:?} exist");
        Bytes { owner, range }
    }

    /// Bytes owned by the caller, for weights made in memory.
    pub fn from_vec(v: Vec<u8>) -> Bytes {
        let range = 0..v.len();
        Bytes::new(Arc::new(v), range)
    }

    /// Tells whoever holds the bytes that `range` of them is about to be read.
    pub fn will_need(&self, range: Range<usize>) {
        self.owner.will_need(self.range.start + range.start..self.range.start + range.end);
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// A weight tensor as the file stores it: `n_mat` matrices of `n_rows` rows of `n_cols` weights.
#[derive(Clone)]
pub struct WeightData {
    pub name: String,
    pub qtype: GgmlType,
    /// Inputs of the matrix (ggml's `ne[0]`), or the length of a vector.
    pub n_cols: usize,
    /// Outputs of the matrix; 1 for a vector.
    pub n_rows: usize,
    /// Experts; 1 for a plain matrix.
    pub n_mat: usize,
    pub bytes: Bytes,
}

impl WeightData {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.qtype.row_bytes(self.n_cols)
    }
}

/// Weights of a SwiGLU feed-forward block, dense or one per expert.
pub struct FfnWeights<W> {
    /// `[n_ff, n_embd]` per matrix
    pub gate: W,
    /// `[n_ff, n_embd]` per matrix
    pub up: W,
    /// `[n_embd, n_ff]` per matrix
    pub down: W,
}

/// Buffers of a feed-forward block. `k` is `n_expert_used`, 1 in a dense block.
pub struct FfnScratch<T> {
    /// `[n_tokens, k * n_ff]`
    pub gate: T,
    /// `[n_tokens, k * n_ff]`
    pub up: T,
    /// `[n_tokens, k * n_embd]`, used by experts only
    pub down: T,
}

/// The routing of a step.
pub struct Routing<T, I> {
    /// `[n_tokens, n_expert]`
    pub logits: T,
    /// `[n_tokens, n_expert_used]`, largest weight first
    pub ids: I,
    /// `[n_tokens, n_expert_used]`, positive, summing to 1
    pub weights: T,
}

/// A device that can run the ops of the models.
pub trait Backend: Sized {
    /// Rows of floats, one per token of the step, resident on the device.
    type Tensor;
    /// Rows of expert ids.
    type Ids;
    /// A weight tensor in the layout the device wants.
    type Weight;
    /// Keys and values of all sequences, in blocks.
    type KvCache;

    /// Precision of activations in products with quantized weights, and in attention.
    fn precision(&self) -> Precision;

    /// Whether a row's values are the same, bit for bit, whatever other rows are in its step. Where they are not, sums are in another
    /// order; the same step twice gives the same bits on any backend.
    fn is_batch_invariant(&self) -> bool {
        true
    }

    /// Whether the ops as this backend runs them report the stage to a probe.
    fn shows(&self, stage: Stage) -> bool;

    /// Bytes of weights, keys and values that ops have read since the backend was made; `None` where they are not counted.
    fn read_bytes(&self) -> Option<u64> {
        None
    }

    /// Bytes left of a device's own memory; `None` where it computes in the machine's.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Takes a weight in. The bytes may stay where they are.
    fn upload(&self, data: &WeightData) -> Result<Self::Weight>;

    /// A tensor of `n_cols` columns, without rows yet. `consumers` are the weights it is multiplied with, which decide the formats
    /// that ops writing the tensor prepare.
    fn tensor(&self, n_cols: usize, consumers: &[&Self::Weight]) -> Self::Tensor;

    /// Expert ids of `n_cols` columns, without rows yet.
    fn ids(&self, n_cols: usize) -> Self::Ids;

    /// Rows and columns of a tensor.
    fn shape(&self, t: &Self::Tensor) -> (usize, usize);

    /// Copies a tensor to the host.
    fn read(&self, t: &Self::Tensor, out: &mut Vec<f32>) -> Result<()>;

    /// Fills a tensor from the host: as many rows as `values` has.
    fn write(&self, t: &mut Self::Tensor, values: &[f32]) -> Result<()>;

    /// Copies one row of a tensor to the host.
    fn read_row(&self, t: &Self::Tensor, row: usize, out: &mut Vec<f32>) -> Result<()>;

    /// Copies expert ids to the host; their rows and columns are returned.
    fn read_ids(&self, ids: &Self::Ids, out: &mut Vec<u32>) -> Result<(usize, usize)>;

    /// Rows and columns of expert ids.
    fn ids_shape(&self, ids: &Self::Ids) -> (usize, usize);

    /// Fills expert ids from the host: as many rows as `values` has.
    fn write_ids(&self, ids: &mut Self::Ids, values: &[u32]) -> Result<()>;

    /// Statistics of the columns `cols` of each of the rows `rows`, appended to `out`. A device computes them where the values are.
    fn row_stats(
        &self,
        t: &Self::Tensor,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut Vec<RowStats>,
    ) -> Result<()> {
        let mut row = Vec::new();
        for i in rows {
            self.read_row(t, i, &mut row)?;
            out.push(RowStats::of(&row[cols.clone()]));
        }
        Ok(())
    }

    /// The `k` best values of every row, best first, for whoever wants no more of them: `[n_rows, k]`, or all columns where there are
    /// fewer than `k`, which is at most [`BEST_MAX`]. A device finds them where the values are.
    fn best(&self, t: &Self::Tensor, k: usize, out: &mut Vec<Best>) -> Result<()> {
        let (n_rows, n_cols) = self.shape(t);
        let k = k.min(n_cols);
        let mut row = Vec::new();
        out.clear();
        out.resize(n_rows * k, Best::default());
        for i in 0..n_rows {
            self.read_row(t, i, &mut row)?;
            Best::of(&row, &mut out[i * k..(i + 1) * k]);
        }
        Ok(())
    }

    /// Bytes that a KV block of this shape takes: its values, and what the backend keeps beside them.
    fn kv_block_bytes(&self, shape: &KvShape) -> usize {
        shape.block_bytes()
    }

    /// An empty KV cache.
    fn kv_cache(&self, shape: KvShape) -> Self::KvCache;

    /// Makes room for blocks `0..n_blocks`.
    fn kv_reserve(&self, kv: &mut Self::KvCache, n_blocks: usize) -> Result<()>;

    /// Copies a KV block to the host, in the backend's own format.
    fn kv_save(&self, kv: &Self::KvCache, block: u32, out: &mut Vec<u8>) -> Result<()>;

    /// Writes back what [`kv_save`](Self::kv_save) gave.
    fn kv_restore(&self, kv: &mut Self::KvCache, block: u32, saved: &[u8]) -> Result<()>;

    /// `out[i] = table[token of row i]`
    fn embed(&self, out: &mut Self::Tensor, table: &Self::Weight, batch: &Batch) -> Result<()>;

    /// `out = x / rms(x) * w`, with `eps` added to the mean square.
    fn rms_norm(&self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Weight, eps: f32) -> Result<()>;

    /// `out[:, at..at + n_rows of w] = x wᵀ`; `out` gets the rows of `x`.
    fn matmul(&self, out: &mut Self::Tensor, at: usize, w: &Self::Weight, x: &Self::Tensor) -> Result<()>;

    /// Queries, keys and values of `heads`: `out = [x qᵀ, x kᵀ, x vᵀ]`, `w` being their weights.
    fn qkv(&self, out: &mut Self::Tensor, w: [&Self::Weight; 3], heads: Heads, x: &Self::Tensor) -> Result<()> {
        unfused::qkv(self, out, w, heads, x)
    }

    /// `x[:, at..] += bias`
    fn add_bias(&self, x: &mut Self::Tensor, at: usize, bias: &Self::Weight) -> Result<()>;

    /// RMS-normalises every head of `cols` on its own: `x = x / rms(x) * w`, `w` `[head_dim]`.
    fn head_norm(&self, x: &mut Self::Tensor, cols: Range<usize>, w: &Self::Weight, eps: f32) -> Result<()>;

    /// Rotates every head of `cols` by its row's position.
    fn rope(&self, x: &mut Self::Tensor, cols: Range<usize>, head_dim: usize, rope: &Rope, batch: &Batch)
    -> Result<()>;

    /// Normalises every head of queries and keys on its own where `norms` has their weights and eps, then rotates it by its row's position.
    fn norm_rope(
        &self,
        qkv: &mut Self::Tensor,
        heads: Heads,
        norms: Option<(&[Self::Weight; 2], f32)>,
        rope: &Rope,
        batch: &Batch,
    ) -> Result<()> {
        unfused::norm_rope(self, qkv, heads, norms, rope, batch)
    }

    /// Stores the keys and values of `qkv` in layer `il` of the cache, then attends: `out[i] = softmax(q_i Kᵀ / √head_dim) V` over
    /// the positions up to row `i`'s own. `out` is `[n_tokens, n_head * head_dim]`.
    fn attention<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        kv: &mut Self::KvCache,
        il: usize,
        heads: Heads,
        batch: &Batch,
        probe: &mut P,
    ) -> Result<()>;

    /// Drops all rows but these, whose indices ascend.
    fn keep_rows(&self, x: &mut Self::Tensor, rows: &[u32]) -> Result<()>;

    /// Softmax over the router's logits, the largest experts by weight (lower id first on ties), weights renormalised to sum 1.
    fn route(&self, routing: &mut Routing<Self::Tensor, Self::Ids>) -> Result<()>;

    /// `out[i, s] = w[ids[i, s]] x[i]`, or `x[i, s]` where `x` has a part per slot.
    fn matmul_experts(&self, out: &mut Self::Tensor, w: &Self::Weight, ids: &Self::Ids, x: &Self::Tensor)
    -> Result<()>;

    /// `x = x * sigmoid(x)`
    fn silu(&self, x: &mut Self::Tensor) -> Result<()>;

    /// `x = x * y`
    fn mul(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// `out[i] = Σ_s weights[i, s] x[i, s]`, in order of slots.
    fn weighted_sum(&self, out: &mut Self::Tensor, x: &Self::Tensor, weights: &Self::Tensor) -> Result<()>;

    /// `x = x + y`
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// A dense SwiGLU block: `out = down (silu(gate x) * up x)`. Afterwards `s.up` holds [`Stage::FfnUp`] and `s.gate`
    /// [`Stage::FfnSwigl`] where the backend shows them.
    fn dense_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<Self::Weight>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        unfused::dense_ffn(self, out, s, w, x, il, probe)
    }

    /// The routed experts: `out[i] = Σ_s weights[i, s] FFN_{ids[i, s]}(x[i])`. Afterwards `s.up` holds [`Stage::MoeExpertUp`], `s.gate`
    /// [`Stage::MoeExpertSwigl`] and `s.down` [`Stage::MoeExpertOut`] where the backend shows them.
    fn experts_ffn<P: Probe<Self>>(
        &self,
        out: &mut Self::Tensor,
        s: &mut FfnScratch<Self::Tensor>,
        w: &FfnWeights<Self::Weight>,
        routing: &Routing<Self::Tensor, Self::Ids>,
        x: &Self::Tensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        unfused::experts_ffn(self, out, s, w, routing, x, il, probe)
    }

    /// Runs one step; a device may record it once and replay it.
    fn run_step(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        step()
    }
}

/// Refuses a saved KV block of another size.
pub fn check_restore(expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(BackendError::KvRestore { expected, got }) }
}

/// Offers the ids of a routing to a probe.
pub fn seen_ids<B: Backend, P: Probe<B>>(p: &mut P, b: &B, stage: Stage, layer: usize, ids: &B::Ids) -> Result<()> {
    p.seen(b, stage, layer, View::Ids(ids))
}
