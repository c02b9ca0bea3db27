//! A loaded model with everything that belongs to it: tokenizer, chat template, device, and the file's own defaults.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use apr_core::backend::{BackendError, KV_BLOCK, KvType};
use apr_core::gguf::{GgufError, Metadata};
use apr_core::hparams::{Hparams, HparamsError};
use apr_core::models::LoadError;

use apr_cpu::CpuError;
use apr_cuda::nvidia::ConnectError;

use crate::chat_template::{ChatInput, ChatTemplate, RenderedPiece, TemplateError};
use crate::constraint::Constraints;
use crate::device::{self, Device, DeviceInfo};
use crate::generate::PREFILL_CHUNK;
use crate::loading::Loading;
use crate::memory;
use crate::model_file::{ModelFile, OpenError};
use crate::offload::GpuPlan;
use crate::sampler::{SamplerConfig, SamplerError};
use crate::session::{Session, SessionSettings};
use crate::tokenizer::{Piece, Tokenizer, TokenizerError, Vocab};

/// Context length where none is asked for and the file allows more.
const N_CTX_DEFAULT: usize = 32_768;

/// How to load a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineOptions {
    pub device: Device,
    pub kv_type: KvType,
    /// Positions of a sequence; by default the smaller of the file's context and 32,768.
    pub n_ctx: Option<usize>,
}

/// A loaded model.
pub struct Engine {
    /// What is known of it, and can be asked while it computes. [`Engine`] dereferences to it.
    pub about: Arc<About>,
    pub session: Box<dyn Session>,
    /// Weights that are still on their way into memory.
    pub loading: Loading,
}

/// What belongs to a loaded model and does not change.
pub struct About {
    pub file: ModelFile,
    pub hparams: Hparams,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    /// What answers can be held to.
    pub constraints: Constraints,
    pub device: DeviceInfo,
    /// Positions that a sequence may have.
    pub n_ctx: usize,
}

impl Deref for Engine {
    type Target = About;
    fn deref(&self) -> &About {
        &self.about
    }
}

/// Why a model cannot be loaded, or a prompt not be made.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Hparams(#[from] HparamsError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the file's defaults general.sampling.*: {0}")]
    Sampling(SamplerError),
    #[error("the vocabulary has {got} tokens, but 'token_embd.weight' has {expected} rows")]
    Vocabulary { expected: usize, got: usize },
    #[error("--ctx {asked} is more than the {trained} positions the model was trained for")]
    Context { asked: usize, trained: usize },
    #[error(
        "--ctx {asked} needs {need} bytes for keys and values, but {available} bytes of memory are available; --ctx {fits} would fit"
    )]
    KvMemory { asked: usize, need: u64, available: u64, fits: u64 },
    #[error(
        "a step of {n_tokens} tokens needs {need} bytes for activations, but {available} bytes of memory are available"
    )]
    BufferMemory { n_tokens: usize, need: u64, available: u64 },
    #[error("8-bit KV needs heads of a multiple of 32 values, this model's have {0}; use --kv f16 or f32")]
    KvType(usize),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error("{got} threads: expected between 1 and {max}")]
    Threads { got: usize, max: usize },
    #[error(transparent)]
    Gpu(#[from] ConnectError),
    #[error(
        "the GPU has {} bytes free: weights need {}, keys and values of --ctx {n_ctx} {}, buffers {}; use a smaller --ctx, --kv q8_0, leave \
         --n-cpu-moe out or raise it, or leave --gpu out",
        plan.free_bytes, plan.weight_bytes, plan.kv_bytes, plan.buffer_bytes
    )]
    GpuMemory { plan: GpuPlan, n_ctx: usize },
    #[error("--n-cpu-moe keeps experts on the CPU, and this model has none")]
    NoExperts,
    #[error("the file has no chat template; use --raw to give the text to the model as it is")]
    NoTemplate,
}

/// Contexts of tokens that are counted before a prompt is refused.
pub(crate) const N_CTX_COUNTED: usize = 4;

impl EngineError {
    /// Whether the machine lacks something, as opposed to the file being wrong.
    pub fn is_resource(&self) -> bool {
        use EngineError::*;
        matches!(
            self,
            Gpu(_)
                | GpuMemory { .. }
                | KvMemory { .. }
                | BufferMemory { .. }
                | Cpu(CpuError::Threads { .. })
                | Load(LoadError::Backend(BackendError::OutOfMemory { .. }))
                | Backend(BackendError::OutOfMemory { .. })
        )
    }

    /// Whether the request was wrong, as opposed to file or machine.
    pub fn is_usage(&self) -> bool {
        use EngineError::*;
        matches!(self, Context { .. } | KvType(_) | Cpu(CpuError::Isa(_)) | Threads { .. } | NoTemplate | NoExperts)
    }
}

impl Engine {
    /// Opens, checks and loads a model.
    ///
    /// # Errors
    /// Whatever is wrong with the file, named; or what the device lacks.
    pub fn load(path: &Path, options: EngineOptions) -> Result<Engine, EngineError> {
        Engine::load_within(path, options, memory::available())
    }

    /// As [`load`](Self::load), on a machine with that much memory available.
    fn load_within(path: &Path, options: EngineOptions, available: Option<u64>) -> Result<Engine, EngineError> {
        let file = ModelFile::open(path)?;
        let hparams = file.hparams()?;
        let loading = Loading::start(&file, file.file_bytes, available);
        let tokenizer = load_tokenizer(&file.gguf.metadata, &hparams)?;
        let template = load_template(&file.gguf.metadata, &tokenizer)?;
        let n_ctx = context(&hparams, options.n_ctx)?;
        if options.kv_type == KvType::Q8_0 && !hparams.heads.head_dim.is_multiple_of(32) {
            return Err(EngineError::KvType(hparams.heads.head_dim));
        }
        let settings = SessionSettings { kv_type: options.kv_type, n_ctx };
        let (session, device) = device::open(options.device, &file, &hparams, settings)?;
        // After loading, when the file's tensors vouch for the sizes and their product fits.
        check_buffers(&hparams, n_ctx.min(PREFILL_CHUNK), available)?;
        if let Some(n_ctx) = options.n_ctx {
            check_memory(&*session, n_ctx)?;
        }
        let tokenizer = Arc::new(tokenizer);
        let constraints = Constraints::new(tokenizer.clone());
        let about = Arc::new(About { file, hparams, tokenizer, template, constraints, device, n_ctx });
        Ok(Engine { about, session, loading })
    }
}

impl About {
    /// Tokens of a conversation, by the file's template.
    ///
    /// # Errors
    /// A file without a template, or what the template refuses.
    pub fn chat_tokens(&self, input: &ChatInput) -> Result<Vec<u32>, EngineError> {
        let template = self.template.as_ref().ok_or(EngineError::NoTemplate)?;
        let rendered = template.render(input)?;
        Ok(self.rendered_tokens(&rendered, None))
    }

    /// Tokens of what a template rendered, and of the text with which its answer begins. Far beyond the context it stops counting.
    pub fn rendered_tokens(&self, rendered: &[RenderedPiece], begun: Option<&str>) -> Vec<u32> {
        let pieces = rendered.iter().map(|p| match p {
            RenderedPiece::Control(text) => Piece::Template(text),
            RenderedPiece::Text(text) => Piece::Content(text),
        });
        let pieces: Vec<Piece<'_>> = pieces.chain(begun.map(Piece::Content)).collect();
        self.tokenizer.encode_within(&pieces, self.n_counted())
    }

    /// Tokens of a prompt that are counted: beyond so many it is certain that they do not fit, and by how much matters to nobody.
    pub fn n_counted(&self) -> usize {
        N_CTX_COUNTED.saturating_mul(self.n_ctx)
    }

    /// What the template is given for a conversation: the messages and the file's BOS and EOS; an answer is asked for.
    pub fn chat_input(&self, messages: Vec<serde_json::Value>) -> ChatInput {
        let token = |id: Option<u32>| id.and_then(|id| self.tokenizer.token_text(id)).unwrap_or_default().to_string();
        ChatInput {
            messages,
            add_generation_prompt: true,
            bos_token: token(self.tokenizer.bos()),
            eos_token: token(self.tokenizer.eos()),
            ..ChatInput::default()
        }
    }

    /// Tokens of plain text. CONTROL tokens are found in it only with `parse_control`.
    pub fn text_tokens(&self, text: &[u8], parse_control: bool) -> Vec<u32> {
        self.text_tokens_within(text, parse_control, usize::MAX)
    }

    /// As [`text_tokens`](Self::text_tokens), of a prompt: far beyond the context it stops counting.
    pub fn prompt_tokens(&self, text: &[u8], parse_control: bool) -> Vec<u32> {
        self.text_tokens_within(text, parse_control, self.n_counted())
    }

    fn text_tokens_within(&self, text: &[u8], parse_control: bool, n_max: usize) -> Vec<u32> {
        let text = String::from_utf8_lossy(text);
        let piece = if parse_control { Piece::Template(&text) } else { Piece::Content(&text) };
        let mut tokens = self.tokenizer.encode_within(&[piece], n_max);
        if let (true, Some(bos)) = (self.tokenizer.add_bos(), self.tokenizer.bos())
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        tokens
    }

    /// The sampling settings the file recommends (`general.sampling.*`); greedy where it names none.
    ///
    /// # Errors
    /// A key of the wrong type, or a value out of its range.
    pub fn sampling_defaults(&self) -> Result<SamplerConfig, EngineError> {
        let m = &self.file.gguf.metadata;
        let mut c = SamplerConfig::default();
        let float = |key: &str| m.f32(&format!("general.sampling.{key}"));
        let size = |key: &str| m.u32(&format!("general.sampling.{key}"));
        c.temperature = float("temp")?.unwrap_or(c.temperature);
        c.top_k = size("top_k")?.unwrap_or(c.top_k);
        c.top_p = float("top_p")?.unwrap_or(c.top_p);
        c.min_p = float("min_p")?.unwrap_or(c.min_p);
        c.repetition_penalty = float("penalty_repeat")?.unwrap_or(c.repetition_penalty);
        c.repeat_last_n = size("penalty_last_n")?.map_or(c.repeat_last_n, |n| n as usize);
        c.validate().map_err(EngineError::Sampling)?;
        Ok(c)
    }
}

/// Positions of a context, where so many are asked for.
pub(crate) fn context(h: &Hparams, asked: Option<usize>) -> Result<usize, EngineError> {
    match asked.unwrap_or(h.n_ctx_train.min(N_CTX_DEFAULT)) {
        asked if asked > h.n_ctx_train => Err(EngineError::Context { asked, trained: h.n_ctx_train }),
        n_ctx => Ok(n_ctx),
    }
}

/// Refuses a context that was asked for and whose keys and values this machine cannot hold. The default one is allocated as it is
/// used, and most requests use little of it.
fn check_memory(session: &dyn Session, asked: usize) -> Result<(), EngineError> {
    let need = session.kv_bytes_of(asked);
    match session.available_bytes().filter(|&available| need > available) {
        Some(available) => {
            let fits = available / session.kv_bytes_of(KV_BLOCK) * KV_BLOCK as u64;
            Err(EngineError::KvMemory { asked, need, available, fits })
        }
        None => Ok(()),
    }
}

/// Refuses a machine that cannot hold the buffers of a prefill's steps: they grow in the middle of one, where nothing else is left than
/// to end the process.
fn check_buffers(h: &Hparams, n_tokens: usize, available: Option<u64>) -> Result<(), EngineError> {
    let need = memory::buffer_bytes(h, n_tokens);
    match available {
        Some(available) if available < need => Err(EngineError::BufferMemory { n_tokens, need, available }),
        _ => Ok(()),
    }
}

/// The tokenizer that a file describes.
///
/// # Errors
/// Keys of the wrong type, and whatever [`Tokenizer::new`] refuses.
pub fn tokenizer_of(m: &Metadata) -> Result<Tokenizer, EngineError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let id = |name: &str| m.u32(&key(name));
    let vocab = Vocab {
        model: m.required_string(&key("model"))?.to_string(),
        pre: m.string(&key("pre"))?.map(str::to_string),
        tokens: m.required_string_array(&key("tokens"))?.to_vec(),
        token_types: m.i32_array(&key("token_type"))?,
        merges: m.required_string_array(&key("merges"))?.to_vec(),
        bos: id("bos_token_id")?,
        eos: id("eos_token_id")?,
        eot: id("eot_token_id")?,
        eom: id("eom_token_id")?,
        unk: id("unknown_token_id")?,
        pad: id("padding_token_id")?,
        add_bos: m.bool(&key("add_bos_token"))?,
        add_eos: m.bool(&key("add_eos_token"))?,
    };
    Ok(Tokenizer::new(vocab)?)
}

fn load_tokenizer(m: &Metadata, h: &Hparams) -> Result<Tokenizer, EngineError> {
    let tokenizer = tokenizer_of(m)?;
    if tokenizer.n_vocab() > h.n_vocab {
        return Err(EngineError::Vocabulary { expected: h.n_vocab, got: tokenizer.n_vocab() });
    }
    Ok(tokenizer)
}

fn load_template(m: &Metadata, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, EngineError> {
    let Some(source) = m.string("tokenizer.chat_template")? else { return Ok(None) };
    let ids = 0..tokenizer.n_vocab() as u32;
    let control =
        ids.filter(|&id| tokenizer.is_control(id)).filter_map(|id| tokenizer.token_text(id).map(str::to_string));
    Ok(Some(ChatTemplate::parse(source, &control.collect::<Vec<_>>())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loading::Way;
    use crate::session::{Logits, Part, Sequence};

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

    fn load(available: Option<u64>) -> Result<Engine, EngineError> {
        let device = Device::Cpu { n_threads: Some(2), isa: None };
        Engine::load_within(Path::new(TINY), EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(64) }, available)
    }

    /// Bits of the logits after a prompt and a step of one token.
    fn logits(engine: &mut Engine) -> Vec<u32> {
        let (mut sequence, mut all, mut row) = (Sequence::default(), Vec::new(), Vec::new());
        for tokens in [&(100..140).collect::<Vec<u32>>()[..], &[7]] {
            engine.session.step(&mut [Part { sequence: &mut sequence, tokens, logits: Logits::Last }]).unwrap();
            engine.session.logits(0, &mut row).unwrap();
            all.extend(row.iter().map(|v| v.to_bits()));
        }
        all
    }

    #[test]
    fn a_file_larger_than_memory_gives_the_same_bits() {
        let (mut whole, mut part) = (load(None).unwrap(), load(Some(4 << 20)).unwrap());
        assert_eq!(whole.loading.way, Way::Cached, "nothing is known of memory, and nothing is done");
        let need_bytes = part.file.file_bytes;
        assert_eq!(part.loading.way, Way::OnDemand { need_bytes, available_bytes: 4 << 20 });
        assert_eq!(logits(&mut whole), logits(&mut part));
    }

    #[test]
    fn a_machine_without_room_for_activations_is_refused() {
        let Err(e) = load(Some(1000)) else { panic!("1000 bytes are not enough") };
        assert!(e.is_resource(), "exit code 4");
        let need = memory::buffer_bytes(&load(None).unwrap().hparams, 64);
        assert_eq!(
            e.to_string(),
            format!("a step of 64 tokens needs {need} bytes for activations, but 1000 bytes of memory are available")
        );
    }
}
