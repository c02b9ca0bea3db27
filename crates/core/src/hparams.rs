//! Hyper-parameters: what a file's metadata says about the model, checked for presence and domain.
//!
//! The file says it; nothing is guessed. The few values that published files leave out have documented defaults, and using one is
//! reported in [`Hparams::notes`].

use crate::backend::Heads;
use crate::gguf::{Gguf, GgufError};
use crate::rope::{Pairing, Scaling};

/// An architecture whose forward pass `apr` computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Qwen3Moe,
    Qwen3,
    Qwen2,
    Llama,
}

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    pub n_expert: usize,
    /// Experts per token.
    pub n_expert_used: usize,
    /// Width of one expert.
    pub n_ff_exp: usize,
}

/// The sizes and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Hparams {
    pub arch: Architecture,
    pub n_layer: usize,
    pub n_embd: usize,
    /// Width of the dense feed-forward block; 0 where there are only experts.
    pub n_ff: usize,
    pub n_vocab: usize,
    /// Context length the model was trained for.
    pub n_ctx_train: usize,
    pub heads: Heads,
    pub experts: Option<Experts>,
    pub rms_eps: f32,
    pub pairing: Pairing,
    /// Values of a head that rotate.
    pub n_rot: usize,
    pub rope_base: f32,
    pub rope_scaling: Scaling,
    /// Defaults that stood in for keys the file leaves out.
    pub notes: Vec<String>,
}

/// What can be wrong with a file's hyper-parameters.
#[derive(Debug, thiserror::Error)]
pub enum HparamsError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("architecture '{0}' is not supported; apr runs qwen3moe, qwen3, qwen2 and llama")]
    Architecture(String),
    #[error("key '{key}' is {got}, expected {expected}")]
    Domain { key: String, expected: String, got: String },
    #[error("tensor 'token_embd.weight' is missing: the file holds no model")]
    NoEmbedding,
    #[error("tensor 'token_embd.weight' has shape {got:?}, expected [{n_embd}, vocabulary] from '{key}'")]
    Embedding { got: Vec<u64>, n_embd: usize, key: String },
    #[error("key '{key}' is {got}, which apr cannot compute; supported: {supported}")]
    Unsupported { key: String, got: String, supported: &'static str },
}

impl Architecture {
    /// Every architecture's name in files.
    pub const NAMES: [&'static str; 4] = ["qwen3moe", "qwen3", "qwen2", "llama"];

    /// Reads `general.architecture`.
    ///
    /// # Errors
    /// Any other name, listing the supported ones.
    pub fn parse(name: &str) -> Result<Architecture, HparamsError> {
        match name {
            "qwen3moe" | "qwen3_moe" => Ok(Architecture::Qwen3Moe),
            "qwen3" => Ok(Architecture::Qwen3),
            "qwen2" => Ok(Architecture::Qwen2),
            "llama" => Ok(Architecture::Llama),
            other => Err(HparamsError::Architecture(other.to_string())),
        }
    }

    /// RoPE base of the architecture's published configuration, for files that leave it out.
    fn default_rope_base(self) -> f32 {
        match self {
            Architecture::Qwen3Moe | Architecture::Qwen3 | Architecture::Qwen2 => 1e6,
            Architecture::Llama => 1e4,
        }
    }
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(Architecture::NAMES[*self as usize])
    }
}

/// Reads keys below the architecture's prefix and checks their domain.
struct Reader<'a> {
    gguf: &'a Gguf,
    /// As the file spells it.
    prefix: &'a str,
}

/// The largest size that is believed; real models stay far below, and products of a few such sizes fit 64 bits.
const SIZE_MAX: u32 = 1 << 20;

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    /// A size of at least 1, if present.
    fn size(&self, name: &str) -> Result<Option<usize>, HparamsError> {
        let key = self.key(name);
        match self.gguf.metadata.u32(&key)? {
            Some(n) if n == 0 || n > SIZE_MAX => Err(domain(&key, format!("between 1 and {SIZE_MAX}"), n)),
            n => Ok(n.map(|n| n as usize)),
        }
    }

    fn required_size(&self, name: &str) -> Result<usize, HparamsError> {
        self.gguf.metadata.required_u32(&self.key(name))?;
        Ok(self.size(name)?.expect("a required key is present"))
    }

    /// A finite number above 0, if present.
    fn positive(&self, name: &str) -> Result<Option<f32>, HparamsError> {
        let key = self.key(name);
        match self.gguf.metadata.f32(&key)? {
            Some(x) if !x.is_finite() || x <= 0.0 => Err(domain(&key, "a finite number above 0".to_string(), x)),
            x => Ok(x),
        }
    }

    fn scaling(&self) -> Result<Scaling, HparamsError> {
        let key = self.key("rope.scaling.type");
        let factor = match self.positive("rope.scaling.factor")? {
            Some(f) => Some(f),
            None => self.positive("rope.scale_linear")?,
        };
        let required = || match factor {
            Some(f) => Ok(f),
            None => Err(HparamsError::Gguf(
                self.gguf.metadata.required_f32(&self.key("rope.scaling.factor")).expect_err("the factor is missing"),
            )),
        };
        match self.gguf.metadata.string(&key)? {
            None => Ok(factor.filter(|&f| f != 1.0).map_or(Scaling::None, |factor| Scaling::Linear { factor })),
            Some("none") => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear { factor: required()? }),
            Some("yarn") => {
                let attn =
                    self.positive("rope.scaling.attn_factor")?.or(self.positive("rope.scaling.yarn_attn_factor")?);
                Ok(Scaling::Yarn {
                    factor: required()?,
                    n_ctx_orig: self.required_size("rope.scaling.original_context_length")? as u32,
                    attn_factor: attn.unwrap_or(1.0),
                    beta_fast: self.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                })
            }
            Some(other) => {
                Err(HparamsError::Unsupported { key, got: format!("'{other}'"), supported: "none, linear and yarn" })
            }
        }
    }

    fn heads(&self, n_embd: usize) -> Result<Heads, HparamsError> {
        let n_head = self.required_size("attention.head_count")?;
        let n_head_kv = self.size("attention.head_count_kv")?.unwrap_or(n_head);
        if n_head % n_head_kv != 0 {
            let expected = format!("a divisor of the {n_head} query heads");
            return Err(domain(&self.key("attention.head_count_kv"), expected, n_head_kv));
        }
        let head_dim = match self.size("attention.key_length")? {
            Some(n) => n,
            None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
            None => {
                let expected =
                    format!("a divisor of the embedding length {n_embd}, as there is no attention.key_length");
                return Err(domain(&self.key("attention.head_count"), expected, n_head));
            }
        };
        if let Some(n) = self.size("attention.value_length")?.filter(|&n| n != head_dim) {
            return Err(domain(&self.key("attention.value_length"), format!("the key length {head_dim}"), n));
        }
        if head_dim % 2 != 0 || head_dim > 1024 {
            let expected = "an even number of at most 1024".to_string();
            return Err(domain(&self.key("attention.key_length"), expected, head_dim));
        }
        Ok(Heads { n_head, n_head_kv, head_dim })
    }

    fn experts(&self) -> Result<Experts, HparamsError> {
        let n_expert = self.required_size("expert_count")?;
        let n_expert_used = self.required_size("expert_used_count")?;
        if n_expert_used > n_expert {
            return Err(domain(
                &self.key("expert_used_count"),
                format!("at most the {n_expert} experts"),
                n_expert_used,
            ));
        }
        Ok(Experts { n_expert, n_expert_used, n_ff_exp: self.required_size("expert_feed_forward_length")? })
    }
}

fn domain(key: &str, expected: String, got: impl std::fmt::Display) -> HparamsError {
    HparamsError::Domain { key: key.to_string(), expected, got: got.to_string() }
}

impl Hparams {
    /// Reads and checks a file's hyper-parameters.
    ///
    /// # Errors
    /// A missing required key, a value outside its domain, an architecture or scaling that is not computed: each named with what
    /// was expected and what was found.
    pub fn from_gguf(gguf: &Gguf) -> Result<Hparams, HparamsError> {
        let name = gguf.metadata.required_string("general.architecture")?;
        let arch = Architecture::parse(name)?;
        let r = Reader { gguf, prefix: name };
        let n_embd = r.required_size("embedding_length")?;
        let heads = r.heads(n_embd)?;
        let experts = match arch {
            Architecture::Qwen3Moe => Some(r.experts()?),
            _ => None,
        };
        if let (None, Some(n)) = (experts, gguf.metadata.u32(&r.key("expert_count"))?.filter(|&n| n > 0)) {
            let supported = "experts in architecture qwen3moe only";
            return Err(HparamsError::Unsupported { key: r.key("expert_count"), got: n.to_string(), supported });
        }
        let n_rot = r.size("rope.dimension_count")?.unwrap_or(heads.head_dim);
        if n_rot % 2 != 0 || n_rot > heads.head_dim {
            let expected = format!("an even number of at most the head's {}", heads.head_dim);
            return Err(domain(&r.key("rope.dimension_count"), expected, n_rot));
        }
        let mut notes = Vec::new();
        let rope_base = r.positive("rope.freq_base")?.unwrap_or_else(|| {
            let base = arch.default_rope_base();
            notes.push(format!("the file has no '{}'; using {base}, the default of {arch}", r.key("rope.freq_base")));
            base
        });
        gguf.metadata.required_f32(&r.key("attention.layer_norm_rms_epsilon"))?;
        Ok(Hparams {
            arch,
            n_layer: r.required_size("block_count")?,
            n_embd,
            n_ff: if experts.is_some() { 0 } else { r.required_size("feed_forward_length")? },
            n_vocab: n_vocab(gguf, n_embd, r.key("embedding_length"))?,
            n_ctx_train: n_ctx_train(&r)?,
            heads,
            experts,
            rms_eps: r.positive("attention.layer_norm_rms_epsilon")?.expect("a required key is present"),
            pairing: if arch == Architecture::Llama { Pairing::Adjacent } else { Pairing::Halves },
            n_rot,
            rope_base,
            rope_scaling: r.scaling()?,
            notes,
        })
    }
}

/// The context length; unlike other sizes it may be in the tens of millions.
fn n_ctx_train(r: &Reader<'_>) -> Result<usize, HparamsError> {
    let key = r.key("context_length");
    match r.gguf.metadata.required_u32(&key)? {
        0 => Err(domain(&key, "at least 1".to_string(), 0)),
        n => Ok(n as usize),
    }
}

/// The vocabulary is as large as the embedding table says.
fn n_vocab(gguf: &Gguf, n_embd: usize, key: String) -> Result<usize, HparamsError> {
    let t = gguf.tensor("token_embd.weight").ok_or(HparamsError::NoEmbedding)?;
    match t.ne[..] {
        [cols, rows] if cols == n_embd as u64 && rows <= u64::from(u32::MAX) => Ok(rows as usize),
        _ => Err(HparamsError::Embedding { got: t.ne.clone(), n_embd, key }),
    }
}
