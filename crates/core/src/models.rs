//! The architectures `apr` runs, and how a file's tensors become a model's weights.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::backend::{Backend, BackendError, Bytes, Storage, WeightData};
use crate::batch::Batch;
use crate::gguf::{Gguf, TensorInfo};
use crate::hparams::{Architecture, Hparams, HparamsError};
use crate::probe::{NoProbe, Probe};
use crate::qtype;
use crate::rope::Scaling;
use crate::stage::Stage;

pub mod dense;
pub mod parts;
pub mod qwen3_moe;

pub use parts::{State, StateOf};

/// The weights of a model of any architecture.
pub enum Model<W> {
    Qwen3Moe(qwen3_moe::Weights<W>),
    Dense(dense::Weights<W>),
}

/// What can be wrong with the tensors of a file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Hparams(#[from] HparamsError),
    #[error("tensor '{name}' is missing: the file is incomplete or not of architecture {arch}")]
    Missing { name: String, arch: Architecture },
    #[error("tensor '{name}' has shape {got:?}, expected {expected:?} from the file's metadata")]
    Shape { name: String, expected: Vec<u64>, got: Vec<u64> },
    #[error("tensor '{name}' has type {got}, expected a float type (F32, F16 or BF16)")]
    NotFloat { name: String, got: qtype::GgmlType },
    #[error(
        "tensor '{name}' is not part of architecture {arch} as apr computes it; ignoring it would change the model"
    )]
    Unknown { name: String, arch: Architecture },
    #[error("tensor '{name}' holds {what} at index {index}")]
    BadValue { name: String, what: String, index: usize },
    #[error("rotary embedding of base {base}, {scaling}, has frequencies that are not finite")]
    Rope { base: f32, scaling: Scaling },
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Hands a file's tensors to a backend, checks their shapes and remembers which were taken.
pub struct TensorSource<'a, B: Backend> {
    backend: &'a B,
    by_name: HashMap<&'a str, &'a TensorInfo>,
    parts: &'a [Arc<dyn Storage>],
    arch: Architecture,
    taken: BTreeSet<String>,
}

impl<B: Backend> TensorSource<'_, B> {
    /// Whether the file has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// A matrix `[n_rows, n_cols]`.
    pub fn matrix(&mut self, name: &str, n_cols: usize, n_rows: usize) -> Result<B::Weight, LoadError> {
        self.take(name, &[n_cols, n_rows])
    }

    /// One matrix per expert.
    pub fn experts(&mut self, name: &str, n_cols: usize, n_rows: usize, n_mat: usize) -> Result<B::Weight, LoadError> {
        self.take(name, &[n_cols, n_rows, n_mat])
    }

    /// A vector of floats: a norm or a bias. What is not finite in it shows in the pass, as it does in any other weight.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<B::Weight, LoadError> {
        let data = self.data(name, &[n])?;
        if !data.qtype.is_float() {
            return Err(LoadError::NotFloat { name: name.to_string(), got: data.qtype });
        }
        Ok(self.backend.upload(&data)?)
    }

    /// The values of a vector of finite floats, on the host.
    pub fn floats(&mut self, name: &str, n: usize) -> Result<Vec<f32>, LoadError> {
        let data = self.data(name, &[n])?;
        if !data.qtype.is_float() {
            return Err(LoadError::NotFloat { name: name.to_string(), got: data.qtype });
        }
        let mut out = vec![0.0; n];
        qtype::dequantize_row(data.qtype, &data.bytes, &mut out);
        match out.iter().position(|v| !v.is_finite()) {
            Some(index) => Err(LoadError::BadValue { name: name.to_string(), what: out[index].to_string(), index }),
            None => Ok(out),
        }
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<B::Weight, LoadError> {
        let data = self.data(name, shape)?;
        Ok(self.backend.upload(&data)?)
    }

    fn data(&mut self, name: &str, shape: &[usize]) -> Result<WeightData, LoadError> {
        let info =
            *self.by_name.get(name).ok_or_else(|| LoadError::Missing { name: name.to_string(), arch: self.arch })?;
        let expected: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        if !same_shape(&info.ne, &expected) {
            return Err(LoadError::Shape { name: name.to_string(), expected, got: info.ne.clone() });
        }
        self.taken.insert(name.to_string());
        let dim = |i: usize| shape.get(i).copied().unwrap_or(1);
        let bytes = Bytes::new(self.parts[info.part].clone(), byte_range(info));
        Ok(WeightData {
            name: name.to_string(),
            qtype: info.qtype,
            n_cols: dim(0),
            n_rows: dim(1),
            n_mat: dim(2),
            bytes,
        })
    }

    /// Every tensor of the file must have been taken: one that is ignored is a part of the model that is not computed.
    fn finish(self, gguf: &Gguf) -> Result<(), LoadError> {
        match gguf.tensors.iter().find(|t| !self.taken.contains(&t.name)) {
            Some(t) => Err(LoadError::Unknown { name: t.name.clone(), arch: self.arch }),
            None => Ok(()),
        }
    }
}

fn byte_range(info: &TensorInfo) -> std::ops::Range<usize> {
    info.offset as usize..(info.offset + info.n_bytes) as usize
}

/// Shapes are equal up to trailing dimensions of 1, which some writers keep.
fn same_shape(a: &[u64], b: &[u64]) -> bool {
    let n = a.len().max(b.len());
    (0..n).all(|i| a.get(i).unwrap_or(&1) == b.get(i).unwrap_or(&1))
}

/// Takes the weights of a parsed file to a backend. `parts` are the bytes of the files the GGUF was split into, which the reader
/// has checked the tensors' ranges against.
pub fn load<B: Backend>(
    backend: &B,
    gguf: &Gguf,
    h: &Hparams,
    parts: &[Arc<dyn Storage>],
) -> Result<Model<B::Weight>, LoadError> {
    let by_name = gguf.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut t = TensorSource { backend, by_name, parts, arch: h.arch, taken: BTreeSet::new() };
    let dense = |head_norm, needs_bias| parts::AttnKind { head_norm, needs_bias };
    let model = match h.arch {
        Architecture::Qwen3Moe => Model::Qwen3Moe(qwen3_moe::load(&mut t, h)?),
        Architecture::Qwen3 => Model::Dense(dense::load(&mut t, h, dense(true, false))?),
        Architecture::Qwen2 => Model::Dense(dense::load(&mut t, h, dense(false, true))?),
        Architecture::Llama => Model::Dense(dense::load(&mut t, h, dense(false, false))?),
    };
    t.finish(gguf)?;
    Ok(model)
}

/// Buffers for a step of this model.
pub fn state<B: Backend>(b: &B, h: &Hparams, model: &Model<B::Weight>) -> StateOf<B> {
    match model {
        Model::Qwen3Moe(m) => qwen3_moe::state(b, h, m),
        Model::Dense(m) => dense::state(b, h, m),
    }
}

/// One step through the model: logits of the rows that want them end up in `s.logits`, keys and values in `kv`.
pub fn step<B: Backend, P: Probe<B>>(
    b: &B,
    model: &Model<B::Weight>,
    s: &mut StateOf<B>,
    kv: &mut B::KvCache,
    batch: &Batch,
    probe: &mut P,
) -> crate::backend::Result<()> {
    probe.begin(batch);
    b.run_step(&mut || match model {
        Model::Qwen3Moe(m) => qwen3_moe::forward(b, m, s, kv, batch, probe),
        Model::Dense(m) => dense::forward(b, m, s, kv, batch, probe),
    })
}

/// The final norm and the logits of given rows of the residual stream, `[n_rows, n_embd]`: what the model would say if it ended there.
/// The logits end up in `s.logits`.
pub fn output_of<B: Backend>(
    b: &B,
    model: &Model<B::Weight>,
    s: &mut StateOf<B>,
    residual: &[f32],
) -> crate::backend::Result<()> {
    let (frame, n_layer) = match model {
        Model::Qwen3Moe(m) => (&m.frame, m.layers.len()),
        Model::Dense(m) => (&m.frame, m.layers.len()),
    };
    b.write(&mut s.x, residual)?;
    parts::output(b, frame, s, n_layer, None, &mut NoProbe)
}

/// The stages that a model computes, in order.
pub fn stages(h: &Hparams, gguf: &Gguf) -> Vec<Stage> {
    use Stage::*;
    let has_bias = gguf.tensor("blk.0.attn_q.bias").is_some();
    let exists = |stage| match stage {
        QkvBias => has_bias,
        FfnGate | FfnUp | FfnSilu | FfnSwigl | FfnOut => h.experts.is_none(),
        MoeRouterLogits | MoeRouter | MoeRouterIndices | MoeExpertGate | MoeExpertUp | MoeExpertSwigl
        | MoeExpertOut | MoeFfnOut => h.experts.is_some(),
        _ => true,
    };
    Stage::all().filter(|&stage| exists(stage)).collect()
}

/// The shape of a stage's value for one position. Scores of attention have a column for each of `n_kv` positions.
pub fn stage_shape(h: &Hparams, stage: Stage, n_kv: usize) -> Vec<usize> {
    use Stage::*;
    let (n_expert, k, n_ff_exp) = h.experts.as_ref().map_or((0, 0, 0), |e| (e.n_expert, e.n_expert_used, e.n_ff_exp));
    match stage {
        QkvMatmul | QkvBias => vec![h.heads.n_qkv()],
        QPostRope | Attention => vec![h.heads.q().len()],
        KPostRope => vec![h.heads.k().len()],
        AttnScores | AttnSoftmax => vec![h.heads.n_head, n_kv],
        FfnGate | FfnUp | FfnSilu | FfnSwigl => vec![h.n_ff],
        MoeRouterLogits => vec![n_expert],
        MoeRouter | MoeRouterIndices => vec![k],
        MoeExpertGate | MoeExpertUp | MoeExpertSwigl => vec![k, n_ff_exp],
        MoeExpertOut => vec![k, h.n_embd],
        LmHead => vec![h.n_vocab],
        Embedding | AttnNorm | AttnOut | PostAttnResidual | FfnNorm | FfnOut | MoeFfnOut | PostFfnResidual
        | FinalNorm => vec![h.n_embd],
    }
}
