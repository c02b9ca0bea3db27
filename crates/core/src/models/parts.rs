//! Pieces that several architectures share: the attention block, the buffers of a step, loading tensors by name.

use crate::backend::{Backend, FfnScratch, FfnWeights, Heads, Result, Routing};
use crate::batch::Batch;
use crate::hparams::Hparams;
use crate::probe::{Probe, seen, seen_cols};
use crate::rope::Rope;
use crate::stage::Stage;

use super::{LoadError, TensorSource};

/// Weights of an attention block.
pub struct AttnWeights<W> {
    /// `[n_embd]`
    pub attn_norm: W,
    /// `[n_head * head_dim, n_embd]`
    pub attn_q: W,
    /// `[n_head_kv * head_dim, n_embd]`
    pub attn_k: W,
    /// `[n_head_kv * head_dim, n_embd]`
    pub attn_v: W,
    /// Query, key and value biases, where the file has them.
    pub bias: Option<[W; 3]>,
    /// Query and key norms `[head_dim]`, where the architecture has them.
    pub head_norm: Option<[W; 2]>,
    /// `[n_embd, n_head * head_dim]`
    pub attn_output: W,
}

/// What every architecture has around its layers.
pub struct Frame<W> {
    /// `[n_vocab, n_embd]`
    pub token_embd: W,
    /// `[n_embd]`
    pub output_norm: W,
    /// `[n_vocab, n_embd]`; the embedding again where the file has no output matrix.
    pub output: W,
    pub heads: Heads,
    pub rope: Rope,
    pub rms_eps: f32,
}

/// Buffers of a step: tensors `T` and expert ids `I` of a backend. Rows are the tokens of the step.
pub struct State<T, I> {
    /// Residual stream `[n_tokens, n_embd]`
    pub x: T,
    /// Normalised input of a block `[n_tokens, n_embd]`
    pub xn: T,
    /// `[n_tokens, n_qkv]`
    pub qkv: T,
    /// `[n_tokens, n_head * head_dim]`
    pub attn: T,
    /// Output of a block `[n_tokens, n_embd]`
    pub y: T,
    pub ffn: FfnScratch<T>,
    /// Of an architecture with experts.
    pub routing: Option<Routing<T, I>>,
    /// `[n_kept, n_vocab]`
    pub logits: T,
}

/// The buffers of a step on backend `B`.
pub type StateOf<B> = State<<B as Backend>::Tensor, <B as Backend>::Ids>;

impl<T, I> State<T, I> {
    /// Buffers for a model with these sizes. Each tensor learns the weights that consume it, over all layers.
    pub fn new<'w, B: Backend<Tensor = T, Ids = I>>(
        b: &B,
        h: &Hparams,
        frame: &'w Frame<B::Weight>,
        layers: impl Iterator<Item = (&'w AttnWeights<B::Weight>, &'w FfnWeights<B::Weight>, Option<&'w B::Weight>)>,
    ) -> State<T, I>
    where
        B::Weight: 'w,
    {
        let (mut of_xn, mut of_attn, mut of_swigl) = (vec![&frame.output], Vec::new(), Vec::new());
        for (attn, ffn, router) in layers {
            of_xn.extend([&attn.attn_q, &attn.attn_k, &attn.attn_v, &ffn.gate, &ffn.up]);
            of_xn.extend(router);
            of_attn.push(&attn.attn_output);
            of_swigl.push(&ffn.down);
        }
        let k = h.experts.as_ref().map_or(1, |e| e.n_expert_used);
        let n_ff = h.experts.as_ref().map_or(h.n_ff, |e| e.n_ff_exp);
        State {
            x: b.tensor(h.n_embd, &[]),
            xn: b.tensor(h.n_embd, &of_xn),
            qkv: b.tensor(h.heads.n_qkv(), &[]),
            attn: b.tensor(h.heads.q().len(), &of_attn),
            y: b.tensor(h.n_embd, &[]),
            ffn: FfnScratch {
                gate: b.tensor(k * n_ff, &of_swigl),
                up: b.tensor(k * n_ff, &[]),
                down: b.tensor(k * h.n_embd, &[]),
            },
            routing: h.experts.as_ref().map(|e| Routing {
                logits: b.tensor(e.n_expert, &[]),
                ids: b.ids(e.n_expert_used),
                weights: b.tensor(e.n_expert_used, &[]),
            }),
            logits: b.tensor(h.n_vocab, &[]),
        }
    }
}

/// Norm, projections, rotation, attention and residual of layer `il`. After the last layer's attention only the rows that want
/// more than keys and values remain.
pub fn attention_block<B: Backend, P: Probe<B>>(
    b: &B,
    f: &Frame<B::Weight>,
    w: &AttnWeights<B::Weight>,
    s: &mut StateOf<B>,
    kv: &mut B::KvCache,
    batch: &Batch,
    (il, is_last): (usize, bool),
    probe: &mut P,
) -> Result<()> {
    let (q, k, v) = (f.heads.q(), f.heads.k(), f.heads.v());
    b.rms_norm(&mut s.xn, &s.x, &w.attn_norm, f.rms_eps)?;
    seen(probe, b, Stage::AttnNorm, il, &s.xn)?;
    b.qkv(&mut s.qkv, [&w.attn_q, &w.attn_k, &w.attn_v], f.heads, &s.xn)?;
    seen(probe, b, Stage::QkvMatmul, il, &s.qkv)?;
    if let Some(bias) = &w.bias {
        for (bias, cols) in bias.iter().zip([&q, &k, &v]) {
            b.add_bias(&mut s.qkv, cols.start, bias)?;
        }
        seen(probe, b, Stage::QkvBias, il, &s.qkv)?;
    }
    let norms = w.head_norm.as_ref().map(|norms| (norms, f.rms_eps));
    b.norm_rope(&mut s.qkv, f.heads, norms, &f.rope, batch)?;
    seen_cols(probe, b, Stage::QPostRope, il, &s.qkv, q)?;
    seen_cols(probe, b, Stage::KPostRope, il, &s.qkv, k)?;
    b.attention(&mut s.attn, &s.qkv, kv, il, f.heads, batch, probe)?;
    seen(probe, b, Stage::Attention, il, &s.attn)?;
    if is_last {
        b.keep_rows(&mut s.attn, batch.kept())?;
        b.keep_rows(&mut s.x, batch.kept())?;
    }
    b.matmul(&mut s.y, 0, &w.attn_output, &s.attn)?;
    seen(probe, b, Stage::AttnOut, il, &s.y)?;
    b.add(&mut s.x, &s.y)?;
    seen(probe, b, Stage::PostAttnResidual, il, &s.x)
}

/// The final norm, and the logits of rows `for_logits` or of all.
pub fn output<B: Backend, P: Probe<B>>(
    b: &B,
    f: &Frame<B::Weight>,
    s: &mut StateOf<B>,
    il: usize,
    for_logits: Option<&[u32]>,
    probe: &mut P,
) -> Result<()> {
    b.rms_norm(&mut s.xn, &s.x, &f.output_norm, f.rms_eps)?;
    seen(probe, b, Stage::FinalNorm, il, &s.xn)?;
    match for_logits {
        Some([]) => return Ok(()),
        Some(rows) => b.keep_rows(&mut s.xn, rows)?,
        None => {}
    }
    b.matmul(&mut s.logits, 0, &f.output, &s.xn)?;
    seen(probe, b, Stage::LmHead, il, &s.logits)
}

/// Which optional parts an architecture's attention has.
#[derive(Clone, Copy)]
pub struct AttnKind {
    pub head_norm: bool,
    pub needs_bias: bool,
}

/// Loads what surrounds the layers.
pub fn load_frame<B: Backend>(
    t: &mut TensorSource<'_, B>,
    h: &Hparams,
) -> std::result::Result<Frame<B::Weight>, LoadError> {
    let output = if t.has("output.weight") { "output.weight" } else { "token_embd.weight" };
    let factors = match t.has("rope_freqs.weight") {
        true => Some(t.floats("rope_freqs.weight", h.n_rot / 2)?),
        false => None,
    };
    if let Some(index) = factors.iter().flatten().position(|f| *f <= 0.0) {
        let what = "a frequency factor that is not above 0".to_string();
        return Err(LoadError::BadValue { name: "rope_freqs.weight".to_string(), what, index });
    }
    let rope = Rope::new(h.pairing, h.n_rot, h.rope_base, h.rope_scaling, factors.as_deref());
    if !rope.inv_freq.iter().chain([&rope.magnitude]).all(|f| f.is_finite()) {
        return Err(LoadError::Rope { base: h.rope_base, scaling: h.rope_scaling });
    }
    Ok(Frame {
        token_embd: t.matrix("token_embd.weight", h.n_embd, h.n_vocab)?,
        output_norm: t.vector("output_norm.weight", h.n_embd)?,
        output: t.matrix(output, h.n_embd, h.n_vocab)?,
        heads: h.heads,
        rope,
        rms_eps: h.rms_eps,
    })
}

/// Loads the attention block of layer `il`.
pub fn load_attention<B: Backend>(
    t: &mut TensorSource<'_, B>,
    h: &Hparams,
    il: usize,
    kind: AttnKind,
) -> std::result::Result<AttnWeights<B::Weight>, LoadError> {
    let name = |part: &str| format!("blk.{il}.{part}");
    let (n_q, n_kv) = (h.heads.q().len(), h.heads.k().len());
    let has_bias = kind.needs_bias || t.has(&name("attn_q.bias"));
    Ok(AttnWeights {
        attn_norm: t.vector(&name("attn_norm.weight"), h.n_embd)?,
        attn_q: t.matrix(&name("attn_q.weight"), h.n_embd, n_q)?,
        attn_k: t.matrix(&name("attn_k.weight"), h.n_embd, n_kv)?,
        attn_v: t.matrix(&name("attn_v.weight"), h.n_embd, n_kv)?,
        bias: match has_bias {
            true => Some([
                t.vector(&name("attn_q.bias"), n_q)?,
                t.vector(&name("attn_k.bias"), n_kv)?,
                t.vector(&name("attn_v.bias"), n_kv)?,
            ]),
            false => None,
        },
        head_norm: match kind.head_norm {
            true => Some([
                t.vector(&name("attn_q_norm.weight"), h.heads.head_dim)?,
                t.vector(&name("attn_k_norm.weight"), h.heads.head_dim)?,
            ]),
            false => None,
        },
        attn_output: t.matrix(&name("attn_output.weight"), n_q, h.n_embd)?,
    })
}

/// Loads the dense feed-forward block of layer `il`.
pub fn load_dense_ffn<B: Backend>(
    t: &mut TensorSource<'_, B>,
    h: &Hparams,
    il: usize,
) -> std::result::Result<FfnWeights<B::Weight>, LoadError> {
    let name = |part: &str| format!("blk.{il}.{part}.weight");
    Ok(FfnWeights {
        gate: t.matrix(&name("ffn_gate"), h.n_embd, h.n_ff)?,
        up: t.matrix(&name("ffn_up"), h.n_embd, h.n_ff)?,
        down: t.matrix(&name("ffn_down"), h.n_ff, h.n_embd)?,
    })
}
