//! Qwen3-MoE: grouped-query attention with per-head query and key norms, and a router that sends every token to a few SwiGLU experts.

use crate::backend::{Backend, FfnWeights, Result, seen_ids};
use crate::batch::Batch;
use crate::hparams::Hparams;
use crate::probe::{Probe, seen};
use crate::stage::Stage;

use super::parts::{self, AttnKind, AttnWeights, Frame, State, StateOf};
use super::{LoadError, TensorSource};

/// Weights of one layer.
pub struct Layer<W> {
    pub attn: AttnWeights<W>,
    /// `[n_embd]`
    pub ffn_norm: W,
    /// The router, `[n_expert, n_embd]`
    pub ffn_gate_inp: W,
    /// One matrix per expert.
    pub experts: FfnWeights<W>,
}

/// Weights of the model.
pub struct Weights<W> {
    pub frame: Frame<W>,
    pub layers: Vec<Layer<W>>,
}

/// The forward pass of this architecture: prefill and decode, plain and traced, every backend.
pub fn forward<B: Backend, P: Probe<B>>(
    b: &B,
    m: &Weights<B::Weight>,
    s: &mut StateOf<B>,
    kv: &mut B::KvCache,
    batch: &Batch,
    probe: &mut P,
) -> Result<()> {
    b.embed(&mut s.x, &m.frame.token_embd, batch)?;
    seen(probe, b, Stage::Embedding, 0, &s.x)?;
    for (il, l) in m.layers.iter().enumerate() {
        let is_last = il + 1 == m.layers.len();
        parts::attention_block(b, &m.frame, &l.attn, s, kv, batch, (il, is_last), probe)?;
        if batch.kept().is_empty() && is_last {
            return Ok(());
        }

        b.rms_norm(&mut s.xn, &s.x, &l.ffn_norm, m.frame.rms_eps)?;
        seen(probe, b, Stage::FfnNorm, il, &s.xn)?;
        let routing = s.routing.as_mut().expect("an architecture with experts has a routing");
        b.matmul(&mut routing.logits, 0, &l.ffn_gate_inp, &s.xn)?;
        seen(probe, b, Stage::MoeRouterLogits, il, &routing.logits)?;
        b.route(routing)?;
        seen(probe, b, Stage::MoeRouter, il, &routing.weights)?;
        seen_ids(probe, b, Stage::MoeRouterIndices, il, &routing.ids)?;
        b.experts_ffn(&mut s.y, &mut s.ffn, &l.experts, routing, &s.xn, il, probe)?;
        seen(probe, b, Stage::MoeFfnOut, il, &s.y)?;
        b.add(&mut s.x, &s.y)?;
        seen(probe, b, Stage::PostFfnResidual, il, &s.x)?;
    }
    parts::output(b, &m.frame, s, m.layers.len(), batch.kept_for_logits(), probe)
}

/// Buffers for a step.
pub fn state<B: Backend>(b: &B, h: &Hparams, m: &Weights<B::Weight>) -> StateOf<B> {
    State::new(b, h, &m.frame, m.layers.iter().map(|l| (&l.attn, &l.experts, Some(&l.ffn_gate_inp))))
}

/// Takes the weights out of a file.
pub fn load<B: Backend>(
    t: &mut TensorSource<'_, B>,
    h: &Hparams,
) -> std::result::Result<Weights<B::Weight>, LoadError> {
    let e = h.experts.as_ref().expect("hyper-parameters of this architecture have experts");
    let layer = |t: &mut TensorSource<'_, B>, il: usize| {
        let name = |part: &str| format!("blk.{il}.{part}.weight");
        Ok(Layer {
            attn: parts::load_attention(t, h, il, AttnKind { head_norm: true, needs_bias: false })?,
            ffn_norm: t.vector(&name("ffn_norm"), h.n_embd)?,
            ffn_gate_inp: t.matrix(&name("ffn_gate_inp"), h.n_embd, e.n_expert)?,
            experts: FfnWeights {
                gate: t.experts(&name("ffn_gate_exps"), h.n_embd, e.n_ff_exp, e.n_expert)?,
                up: t.experts(&name("ffn_up_exps"), h.n_embd, e.n_ff_exp, e.n_expert)?,
                down: t.experts(&name("ffn_down_exps"), e.n_ff_exp, h.n_embd, e.n_expert)?,
            },
        })
    };
    Ok(Weights {
        frame: parts::load_frame(t, h)?,
        layers: (0..h.n_layer).map(|il| layer(t, il)).collect::<std::result::Result<_, LoadError>>()?,
    })
}
