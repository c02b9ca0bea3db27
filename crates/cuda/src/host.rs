//! Experts that stay in the machine's memory, because the device's does not hold them: somebody else computes them, in the same step.

use apr_core::backend::{Result, WeightData};

/// Whoever has weights of experts on the host, and computes with them there.
pub trait HostExperts: Send + Sync {
    /// Takes a weight that stays on the host. `None` for one that belongs on the device.
    ///
    /// # Errors
    /// A type that the host cannot multiply.
    fn take(&self, data: &WeightData) -> Result<Option<HostWeight>>;

    /// A block of routed experts, as [`Backend::experts_ffn`](apr_core::backend::Backend::experts_ffn) of the weights that were taken as
    /// parts of `block`.
    ///
    /// # Errors
    /// Whatever the host's backend says.
    fn experts_ffn(&self, block: usize, call: &mut HostCall) -> Result<()>;

    /// `call.out[i, s] = w[ids[i, s]] x[i]`, or `x[i, s]` where `call.x` has a part per slot.
    ///
    /// # Errors
    /// Whatever the host's backend says.
    fn matmul_experts(&self, w: HostWeight, call: &mut HostCall) -> Result<()>;
}

/// A weight on the host: a part of the block of experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostWeight {
    pub block: usize,
    /// 0 gate, 1 up, 2 down
    pub part: usize,
}

/// What goes to the host and what comes back, row by row.
#[derive(Default)]
pub struct HostCall {
    /// Columns of `ids` and `weights`.
    pub n_used: usize,
    /// `[n_tokens, n_embd]`, or what a product is to multiply.
    pub x: Vec<f32>,
    /// `[n_tokens, n_used]`
    pub ids: Vec<u32>,
    /// `[n_tokens, n_used]`
    pub weights: Vec<f32>,
    /// `[n_tokens, n_embd]`, or what a product gives.
    pub out: Vec<f32>,
    /// Whether up, SwiGLU and down of every slot are wanted too.
    pub wants_parts: bool,
    /// Those, `[n_tokens, n_used · width]` each.
    pub parts: [Vec<f32>; 3],
}
