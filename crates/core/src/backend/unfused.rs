//! The plain computation of the fusable ops, and a backend that runs every op of another but never its fused overrides: no second
//! forward is needed to see the stages that a fused kernel keeps to itself.

use super::decorator::delegate;
use super::{Backend, FfnScratch, FfnWeights, Heads, Result, Routing};
use crate::batch::Batch;
use crate::probe::{Probe, seen};
use crate::rope::Rope;
use crate::stage::Stage;

/// `B` with the plain bodies of the fusable ops.
pub struct Unfused<'a, B>(pub &'a B);

impl<B: Backend> Backend for Unfused<'_, B> {
    delegate!();

    fn shows(&self, stage: Stage) -> bool {
        INTERIOR.contains(&stage) || self.0.shows(stage)
    }
}

/// Stages inside the fusable ops.
pub const INTERIOR: [Stage; 8] = [
    Stage::FfnGate,
    Stage::FfnUp,
    Stage::FfnSilu,
    Stage::FfnSwigl,
    Stage::MoeExpertGate,
    Stage::MoeExpertUp,
    Stage::MoeExpertSwigl,
    Stage::MoeExpertOut,
];

/// What [`Backend::qkv`] means.
pub fn qkv<B: Backend>(b: &B, out: &mut B::Tensor, w: [&B::Weight; 3], heads: Heads, x: &B::Tensor) -> Result<()> {
    for (w, cols) in w.into_iter().zip([heads.q(), heads.k(), heads.v()]) {
        b.matmul(out, cols.start, w, x)?;
    }
    Ok(())
}

/// What [`Backend::norm_rope`] means.
pub fn norm_rope<B: Backend>(
    b: &B,
    qkv: &mut B::Tensor,
    heads: Heads,
    norms: Option<(&[B::Weight; 2], f32)>,
    rope: &Rope,
    batch: &Batch,
) -> Result<()> {
    if let Some(([q_norm, k_norm], eps)) = norms {
        b.head_norm(qkv, heads.q(), q_norm, eps)?;
        b.head_norm(qkv, heads.k(), k_norm, eps)?;
    }
    b.rope(qkv, heads.q().start..heads.k().end, heads.head_dim, rope, batch)
}

/// What [`Backend::dense_ffn`] means.
pub fn dense_ffn<B: Backend, P: Probe<B>>(
    b: &B,
    out: &mut B::Tensor,
    s: &mut FfnScratch<B::Tensor>,
    w: &FfnWeights<B::Weight>,
    x: &B::Tensor,
    il: usize,
    probe: &mut P,
) -> Result<()> {
    b.matmul(&mut s.gate, 0, &w.gate, x)?;
    seen(probe, b, Stage::FfnGate, il, &s.gate)?;
    b.matmul(&mut s.up, 0, &w.up, x)?;
    seen(probe, b, Stage::FfnUp, il, &s.up)?;
    b.silu(&mut s.gate)?;
    seen(probe, b, Stage::FfnSilu, il, &s.gate)?;
    b.mul(&mut s.gate, &s.up)?;
    seen(probe, b, Stage::FfnSwigl, il, &s.gate)?;
    b.matmul(out, 0, &w.down, &s.gate)
}

/// What [`Backend::experts_ffn`] means.
pub fn experts_ffn<B: Backend, P: Probe<B>>(
    b: &B,
    out: &mut B::Tensor,
    s: &mut FfnScratch<B::Tensor>,
    w: &FfnWeights<B::Weight>,
    routing: &Routing<B::Tensor, B::Ids>,
    x: &B::Tensor,
    il: usize,
    probe: &mut P,
) -> Result<()> {
    b.matmul_experts(&mut s.gate, &w.gate, &routing.ids, x)?;
    seen(probe, b, Stage::MoeExpertGate, il, &s.gate)?;
    b.matmul_experts(&mut s.up, &w.up, &routing.ids, x)?;
    seen(probe, b, Stage::MoeExpertUp, il, &s.up)?;
    b.silu(&mut s.gate)?;
    b.mul(&mut s.gate, &s.up)?;
    seen(probe, b, Stage::MoeExpertSwigl, il, &s.gate)?;
    b.matmul_experts(&mut s.down, &w.down, &routing.ids, &s.gate)?;
    seen(probe, b, Stage::MoeExpertOut, il, &s.down)?;
    b.weighted_sum(out, &s.down, &routing.weights)
}
