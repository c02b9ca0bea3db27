//! Steps on a loaded model: the one entry to the forward pass, and the KV blocks of the sequences on it.

use std::cell::RefCell;
use std::ops::Range;

use apr_core::backend::fed::{Fed, Feed, Feeding};
use apr_core::backend::unfused::Unfused;
use apr_core::backend::{BEST_MAX, Backend, BackendError, Best, KV_BLOCK, KvShape, KvType, Precision};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::hparams::Hparams;
use apr_core::models::{self, LoadError, Model, StateOf};
use apr_core::probe::{NoProbe, Watch};
use apr_core::stage::Stage;

use crate::memory;
use crate::model_file::ModelFile;

/// One timeline of tokens. Its keys and values live in the session's blocks.
#[derive(Debug, Default)]
pub struct Sequence {
    blocks: Vec<u32>,
    n_tokens: usize,
}

/// A block of keys and values that is held beside the sequence that computed it, or after it.
#[derive(Debug)]
pub struct KvBlock(u32);

/// A sequence's keys and values, taken out of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedSequence {
    kv_shape: KvShape,
    n_tokens: usize,
    blocks: Vec<Vec<u8>>,
}

/// Which rows of a part reach the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    None,
    Last,
    All,
    /// All rows go as far as the final norm, where a watch sees them, and no logits are computed.
    OnlyNorm,
}

/// New tokens of one sequence in a step.
pub struct Part<'a> {
    pub sequence: &'a mut Sequence,
    pub tokens: &'a [u32],
    pub logits: Logits,
}

/// What a session is made with.
#[derive(Clone, Copy, Debug)]
pub struct SessionSettings {
    pub kv_type: KvType,
    /// Positions that a sequence may have.
    pub n_ctx: usize,
}

/// Why a step cannot be run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StepError {
    #[error("{need} tokens do not fit the context of {n_ctx}; shorten the prompt or raise --ctx")]
    ContextFull { need: usize, n_ctx: usize },
    #[error("the saved sequence is of a cache of {got:?}, this one is of {expected:?}")]
    OtherCache { expected: KvShape, got: KvShape },
    #[error("token {token} does not exist: the vocabulary has {n_vocab}")]
    Token { token: u32, n_vocab: usize },
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// How a step is looked at.
pub struct Look<'a> {
    pub watch: &'a mut dyn Watch,
    /// Runs the plain bodies of fused ops, so that their interior stages are seen.
    pub unfused: bool,
    /// Values that stand in for those of the pass, once they have been seen.
    pub feed: Option<&'a mut dyn Feed>,
}

/// A loaded model that runs steps. Engines hold it boxed, so that nothing above names a backend.
pub trait Session: Send {
    /// Feeds new tokens of some sequences, all in one step. Nothing changes when it fails.
    fn step(&mut self, parts: &mut [Part<'_>]) -> Result<(), StepError>;

    /// As [`step`](Self::step), with someone looking on.
    fn step_watched(&mut self, parts: &mut [Part<'_>], look: Look<'_>) -> Result<(), StepError>;

    /// Whether a watched step of this kind shows the stage, where the model computes it.
    fn shows(&self, stage: Stage, unfused: bool) -> bool;

    /// Precision of activations in products with quantized weights.
    fn precision(&self) -> Precision;

    /// Whether a row's values are the same, bit for bit, whatever other rows are in its step.
    fn is_batch_invariant(&self) -> bool;

    /// Bytes that are left for keys and values, in blocks that nobody uses and where more could be had: of the device's own memory, or
    /// the machine's. `None` where nobody knows.
    fn available_bytes(&self) -> Option<u64>;

    /// How keys and values are stored.
    fn kv_type(&self) -> KvType;

    /// Logits that rows of the residual stream, `[n_rows, n_embd]`, would give: final norm and output matrix. They are then read with
    /// [`logits`](Self::logits).
    fn step_output(&mut self, residual: &[f32]) -> Result<(), StepError>;

    /// Copies the logits of the `i`-th row that wanted them in the last step.
    fn logits(&self, i: usize, out: &mut Vec<f32>) -> Result<(), StepError>;

    /// The `k` best logits of the `i`-th row that wanted them in the last step, best first, for whoever wants no more: at most
    /// [`BEST_MAX`], and no more than there are.
    fn best_logits(&self, i: usize, k: usize, out: &mut Vec<Best>) -> Result<(), StepError>;

    /// Logits in a row.
    fn n_vocab(&self) -> usize;

    /// Positions that a sequence may have.
    fn n_ctx(&self) -> usize;

    /// Gives a sequence's blocks back.
    fn release(&mut self, sequence: &mut Sequence);

    /// Holds blocks of a sequence, so that they stay when it is released. One that is not full may not be written any more.
    fn hold(&mut self, sequence: &Sequence, blocks: Range<usize>) -> Vec<KvBlock>;

    /// Lets go of a block.
    fn let_go(&mut self, block: KvBlock);

    /// A sequence of `n_tokens` that are in these blocks, which it shares with whoever else has them. It is not stepped where its last
    /// block is not full, only [forked](Self::fork).
    fn sequence_of(&mut self, blocks: &[&KvBlock], n_tokens: usize) -> Sequence;

    /// A sequence of the first `n_tokens` of another. Whole blocks are shared, the rest of them is copied.
    ///
    /// # Errors
    /// No memory for the copy.
    fn fork(&mut self, of: &Sequence, n_tokens: usize) -> Result<Sequence, StepError>;

    /// Whether a sequence uses a block, or somebody else holds it too.
    fn is_used(&self, block: &KvBlock) -> bool;

    /// Copies a sequence's keys and values out.
    fn save(&self, sequence: &Sequence) -> Result<SavedSequence, StepError>;

    /// Makes a sequence of what [`save`](Self::save) gave.
    fn restore(&mut self, saved: &SavedSequence) -> Result<Sequence, StepError>;

    /// Bytes of weights, keys and values that ops have read so far, where the backend counts them.
    fn read_bytes(&self) -> Option<u64>;

    /// Blocks of KV cache in use.
    fn n_kv_blocks(&self) -> usize;

    /// Bytes of KV cache in use.
    fn kv_bytes(&self) -> usize;

    /// Bytes of KV cache that a sequence of `n_tokens` takes.
    fn kv_bytes_of(&self, n_tokens: usize) -> u64;
}

impl Sequence {
    /// Tokens fed so far.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Blocks that it has; those of tokens that were forgotten among them.
    pub(crate) fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Forgets the tokens from position `n_tokens` on.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
    }
}

/// Hands out KV blocks, and counts who has each.
#[derive(Default)]
struct BlockPool {
    free: Vec<u32>,
    /// Of every block that was made: sequences and holders.
    n_users: Vec<u32>,
}

impl BlockPool {
    fn take(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| {
            self.n_users.push(0);
            self.n_users.len() as u32 - 1
        });
        self.n_users[block as usize] = 1;
        block
    }

    fn share(&mut self, block: u32) -> u32 {
        self.n_users[block as usize] += 1;
        block
    }

    fn give_back(&mut self, block: u32) {
        let n_users = &mut self.n_users[block as usize];
        *n_users -= 1;
        if *n_users == 0 {
            self.free.push(block);
        }
    }

    fn n_used(&self) -> usize {
        self.n_users.len() - self.free.len()
    }
}

/// Uploads a file's weights to a backend.
///
/// # Errors
/// Tensors that are missing or of another shape than the header says; types that the backend does not multiply; not enough memory.
pub fn load<B>(b: B, file: &ModelFile, h: &Hparams, settings: SessionSettings) -> Result<Box<dyn Session>, LoadError>
where
    B: Backend + Send + 'static,
    B::Tensor: Send,
    B::Ids: Send,
    B::Weight: Send,
    B::KvCache: Send,
{
    let model = models::load(&b, &file.gguf, h, &file.parts)?;
    let state = models::state(&b, h, &model);
    let (n_head_kv, head_dim) = (h.heads.n_head_kv, h.heads.head_dim);
    let kv_shape = KvShape { n_layer: h.n_layer, n_head_kv, head_dim, kv_type: settings.kv_type };
    let kv = b.kv_cache(kv_shape);
    Ok(Box::new(Runner {
        backend: b,
        model,
        state,
        kv,
        kv_shape,
        blocks: BlockPool::default(),
        n_ctx: settings.n_ctx,
        hparams: h.clone(),
        n_logits: 0,
        best: RefCell::default(),
    }))
}

/// A model on one backend.
struct Runner<B: Backend> {
    backend: B,
    model: Model<B::Weight>,
    state: StateOf<B>,
    kv: B::KvCache,
    kv_shape: KvShape,
    blocks: BlockPool,
    n_ctx: usize,
    hparams: Hparams,
    /// Rows of the last step that wanted logits.
    n_logits: usize,
    best: RefCell<BestLogits>,
}

/// The best logits of the last step's rows, once somebody has asked for them. All rows' are found at once, as many of each as the last
/// step that was asked for any was asked for at most, so that rows that want different numbers find theirs together.
#[derive(Default)]
struct BestLogits {
    /// `[n_rows, k]`
    values: Vec<Best>,
    k: usize,
    /// The most that anybody has asked for in this step, and in the last where anybody has.
    n_asked: usize,
    n_asked_before: usize,
}

impl BestLogits {
    /// Another step is to come.
    fn forget(&mut self) {
        if self.n_asked > 0 {
            self.n_asked_before = self.n_asked;
        }
        (self.n_asked, self.k) = (0, 0);
    }
}

impl<B: Backend> Runner<B> {
    fn check(&self, parts: &[Part<'_>]) -> Result<(), StepError> {
        for part in parts {
            let need = part.sequence.n_tokens + part.tokens.len();
            if need > self.n_ctx {
                return Err(StepError::ContextFull { need, n_ctx: self.n_ctx });
            }
            if let Some(&token) = part.tokens.iter().find(|&&t| t as usize >= self.hparams.n_vocab) {
                return Err(StepError::Token { token, n_vocab: self.hparams.n_vocab });
            }
        }
        Ok(())
    }

    /// Gives a sequence blocks for `n_tokens` positions. A sequence holds a block only once there is memory for it.
    fn grow(&mut self, sequence: &mut Sequence, n_tokens: usize) -> Result<(), StepError> {
        while sequence.blocks.len() * KV_BLOCK < n_tokens {
            // A block is made once there is memory for it, so that without more memory those that are free go round.
            if self.blocks.free.is_empty() {
                self.backend.kv_reserve(&mut self.kv, self.blocks.n_users.len() + 1)?;
            }
            sequence.blocks.push(self.blocks.take());
        }
        Ok(())
    }

    /// The batch of a step, with room for its keys and values; `None` where there is nothing to do.
    fn batch(&mut self, parts: &mut [Part<'_>]) -> Result<Option<Batch>, StepError> {
        self.check(parts)?;
        self.n_logits = 0;
        self.best.get_mut().forget();
        let (mut rows, mut tables) = (Vec::new(), Vec::new());
        for part in parts.iter_mut().filter(|p| !p.tokens.is_empty()) {
            let from = part.sequence.n_tokens;
            self.grow(part.sequence, from + part.tokens.len())?;
            let n = part.tokens.len();
            let written = &part.sequence.blocks[from / KV_BLOCK..(from + n).div_ceil(KV_BLOCK)];
            assert!(
                written.iter().all(|&block| self.blocks.n_users[block as usize] == 1),
                "a block that others read is not written"
            );
            rows.extend(part.tokens.iter().enumerate().map(|(i, &token)| Row {
                token,
                position: (from + i) as u32,
                sequence: tables.len() as u32,
                wants: match part.logits {
                    Logits::OnlyNorm => Wants::FinalNorm,
                    Logits::All => Wants::Logits,
                    Logits::Last if i + 1 == n => Wants::Logits,
                    Logits::Last | Logits::None => Wants::Nothing,
                },
            }));
            tables.push(part.sequence.blocks.clone());
        }
        Ok((!rows.is_empty()).then(|| Batch::new(rows, tables)))
    }

    /// Takes note of a step that has been run.
    fn done(&mut self, parts: &mut [Part<'_>], batch: &Batch) {
        self.n_logits = batch.n_logits();
        parts.iter_mut().for_each(|p| p.sequence.n_tokens += p.tokens.len());
    }

    /// A step whose stages are seen, and replaced where there is a feed.
    fn run_watched(&mut self, batch: &Batch, look: Look<'_>) -> Result<(), StepError> {
        let Look { mut watch, unfused, feed } = look;
        let (b, model, kv) = (&self.backend, &self.model, &mut self.kv);
        if let Some(feed) = feed {
            let fed = Fed::new(b, unfused);
            let mut state = models::state(&fed, &self.hparams, model);
            models::step(&fed, model, &mut state, kv, batch, &mut Feeding { watch, feed })?;
            let mut logits = Vec::new();
            fed.read(&state.logits, &mut logits)?;
            b.write(&mut self.state.logits, &logits)?;
        } else if unfused {
            models::step(&Unfused(b), model, &mut self.state, kv, batch, &mut watch)?;
        } else {
            models::step(b, model, &mut self.state, kv, batch, &mut watch)?;
        }
        Ok(())
    }
}

impl<B> Session for Runner<B>
where
    B: Backend + Send,
    B::Tensor: Send,
    B::Ids: Send,
    B::Weight: Send,
    B::KvCache: Send,
{
    fn step(&mut self, parts: &mut [Part<'_>]) -> Result<(), StepError> {
        let Some(batch) = self.batch(parts)? else { return Ok(()) };
        models::step(&self.backend, &self.model, &mut self.state, &mut self.kv, &batch, &mut NoProbe)?;
        self.done(parts, &batch);
        Ok(())
    }

    fn step_watched(&mut self, parts: &mut [Part<'_>], look: Look<'_>) -> Result<(), StepError> {
        let Some(batch) = self.batch(parts)? else { return Ok(()) };
        self.run_watched(&batch, look)?;
        self.done(parts, &batch);
        Ok(())
    }

    fn shows(&self, stage: Stage, unfused: bool) -> bool {
        if unfused { Unfused(&self.backend).shows(stage) } else { self.backend.shows(stage) }
    }

    fn precision(&self) -> Precision {
        self.backend.precision()
    }

    fn is_batch_invariant(&self) -> bool {
        self.backend.is_batch_invariant()
    }

    fn available_bytes(&self) -> Option<u64> {
        let unused = self.blocks.free.len() as u64 * self.backend.kv_block_bytes(&self.kv_shape) as u64;
        Some(self.backend.free_bytes().or_else(memory::available)? + unused)
    }

    fn kv_type(&self) -> KvType {
        self.kv_shape.kv_type
    }

    fn step_output(&mut self, residual: &[f32]) -> Result<(), StepError> {
        assert!(residual.len().is_multiple_of(self.hparams.n_embd), "whole rows of the residual stream");
        self.best.get_mut().forget();
        models::output_of(&self.backend, &self.model, &mut self.state, residual)?;
        self.n_logits = residual.len() / self.hparams.n_embd;
        Ok(())
    }

    fn logits(&self, i: usize, out: &mut Vec<f32>) -> Result<(), StepError> {
        assert!(i < self.n_logits, "row {i} of the {} that wanted logits", self.n_logits);
        Ok(self.backend.read_row(&self.state.logits, i, out)?)
    }

    fn best_logits(&self, i: usize, k: usize, out: &mut Vec<Best>) -> Result<(), StepError> {
        assert!(i < self.n_logits, "row {i} of the {} that wanted logits", self.n_logits);
        assert!(k <= BEST_MAX, "{k} of the best are asked for");
        let k = k.min(self.n_vocab());
        let best = &mut *self.best.borrow_mut();
        best.n_asked = best.n_asked.max(k);
        if best.k < k {
            let all = k.max(best.n_asked_before).next_power_of_two().min(BEST_MAX).min(self.n_vocab());
            // Where this fails, nothing is known any more.
            best.k = 0;
            self.backend.best(&self.state.logits, all, &mut best.values)?;
            best.k = all;
        }
        out.clear();
        out.extend_from_slice(&best.values[i * best.k..][..k]);
        Ok(())
    }

    fn n_vocab(&self) -> usize {
        self.hparams.n_vocab
    }

    fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    fn release(&mut self, sequence: &mut Sequence) {
        sequence.blocks.drain(..).for_each(|block| self.blocks.give_back(block));
        sequence.n_tokens = 0;
    }

    fn hold(&mut self, sequence: &Sequence, blocks: Range<usize>) -> Vec<KvBlock> {
        assert!(
            blocks.end <= sequence.n_tokens.div_ceil(KV_BLOCK),
            "blocks {blocks:?} of {} tokens have some",
            sequence.n_tokens
        );
        sequence.blocks[blocks].iter().map(|&block| KvBlock(self.blocks.share(block))).collect()
    }

    fn let_go(&mut self, block: KvBlock) {
        self.blocks.give_back(block.0);
    }

    fn sequence_of(&mut self, blocks: &[&KvBlock], n_tokens: usize) -> Sequence {
        assert!(n_tokens.div_ceil(KV_BLOCK) == blocks.len(), "{n_tokens} tokens are in {} blocks", blocks.len());
        let blocks = blocks.iter().map(|block| self.blocks.share(block.0)).collect();
        Sequence { n_tokens, blocks }
    }

    fn fork(&mut self, of: &Sequence, n_tokens: usize) -> Result<Sequence, StepError> {
        assert!(n_tokens <= of.n_tokens, "{n_tokens} of {} tokens", of.n_tokens);
        let n_whole = n_tokens / KV_BLOCK;
        let blocks = of.blocks[..n_whole].iter().map(|&block| self.blocks.share(block)).collect();
        let mut sequence = Sequence { blocks, n_tokens: n_whole * KV_BLOCK };
        if sequence.n_tokens < n_tokens {
            let mut bytes = Vec::new();
            let copied = self.grow(&mut sequence, n_tokens).and_then(|()| {
                self.backend.kv_save(&self.kv, of.blocks[n_whole], &mut bytes)?;
                Ok(self.backend.kv_restore(&mut self.kv, sequence.blocks[n_whole], &bytes)?)
            });
            if let Err(e) = copied {
                self.release(&mut sequence);
                return Err(e);
            }
            sequence.n_tokens = n_tokens;
        }
        Ok(sequence)
    }

    fn is_used(&self, block: &KvBlock) -> bool {
        self.blocks.n_users[block.0 as usize] > 1
    }

    fn save(&self, sequence: &Sequence) -> Result<SavedSequence, StepError> {
        let mut blocks = Vec::new();
        for &block in &sequence.blocks[..sequence.n_tokens.div_ceil(KV_BLOCK)] {
            let mut bytes = Vec::new();
            self.backend.kv_save(&self.kv, block, &mut bytes)?;
            blocks.push(bytes);
        }
        Ok(SavedSequence { kv_shape: self.kv_shape, n_tokens: sequence.n_tokens, blocks })
    }

    fn restore(&mut self, saved: &SavedSequence) -> Result<Sequence, StepError> {
        if saved.kv_shape != self.kv_shape {
            return Err(StepError::OtherCache { expected: self.kv_shape, got: saved.kv_shape });
        }
        if saved.n_tokens > self.n_ctx {
            return Err(StepError::ContextFull { need: saved.n_tokens, n_ctx: self.n_ctx });
        }
        let mut sequence = Sequence::default();
        let filled = self.grow(&mut sequence, saved.n_tokens).and_then(|()| {
            let mut pairs = sequence.blocks.iter().zip(&saved.blocks);
            pairs.try_for_each(|(&b, bytes)| Ok(self.backend.kv_restore(&mut self.kv, b, bytes)?))
        });
        match filled {
            Ok(()) => sequence.n_tokens = saved.n_tokens,
            Err(e) => {
                self.release(&mut sequence);
                return Err(e);
            }
        }
        Ok(sequence)
    }

    fn read_bytes(&self) -> Option<u64> {
        self.backend.read_bytes()
    }

    fn kv_bytes_of(&self, n_tokens: usize) -> u64 {
        (n_tokens.div_ceil(KV_BLOCK) as u64).saturating_mul(self.backend.kv_block_bytes(&self.kv_shape) as u64)
    }

    fn kv_bytes(&self) -> usize {
        self.n_kv_blocks() * self.backend.kv_block_bytes(&self.kv_shape)
    }

    fn n_kv_blocks(&self) -> usize {
        self.blocks.n_used()
    }
}
