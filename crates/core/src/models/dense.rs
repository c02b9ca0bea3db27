//! Dense transformers: Qwen3, Qwen2 and Llama. They differ in data only: per-head norms, biases and the order in which heads rotate.

use crate::backend::{Backend, FfnWeights, Result};
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
    pub ffn: FfnWeights<W>,
}

/// Weights of the model.
pub struct Weights<W> {
    pub frame: Frame<W>,
    pub layers: Vec<Layer<W>>,
}

/// The forward pass of these architectures: prefill and decode, plain and traced, every backend.
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
        b.dense_ffn(&mut s.y, &mut s.ffn, &l.ffn, &s.xn, il, probe)?;
        seen(probe, b, Stage::FfnOut, il, &s.y)?;
        b.add(&mut s.x, &s.y)?;
        seen(probe, b, Stage::PostFfnResidual, il, &s.x)?;
    }
    parts::output(b, &m.frame, s, m.layers.len(), batch.kept_for_logits(), probe)
}

/// Buffers for a step.
pub fn state<B: Backend>(b: &B, h: &Hparams, m: &Weights<B::Weight>) -> StateOf<B> {
    State::new(b, h, &m.frame, m.layers.iter().map(|l| (&l.attn, &l.ffn, None)))
}

/// Takes the weights out of a file.
pub fn load<B: Backend>(
    t: &mut TensorSource<'_, B>,
    h: &Hparams,
    kind: AttnKind,
) -> std::result::Result<Weights<B::Weight>, LoadError> {
    let layer = |t: &mut TensorSource<'_, B>, il: usize| {
        Ok(Layer {
            attn: parts::load_attention(t, h, il, kind)?,
            ffn_norm: t.vector(&format!("blk.{il}.ffn_norm.weight"), h.n_embd)?,
            ffn: parts::load_dense_ffn(t, h, il)?,
        })
    };
    let layers = (0..h.n_layer).map(|il| layer(t, il)).collect::<std::result::Result<_, LoadError>>()?;
    Ok(Weights { frame: parts::load_frame(t, h)?, layers })
}
