//! Many answers at once: who computes what in the next step, and who waits.
//!
//! [`Batcher`] puts the newest token of every answer and pieces of the prompts that wait into one step, and is driven step by
//! step. What an answer is does not depend on who else is in its steps: the forward pass gives the same bits whatever the
//! batch, and tokens are sampled from a stream of their own. [`Scheduler`] drives one on a thread of its own.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use apr_core::backend::{BackendError, KV_BLOCK};

use crate::answer::{Answer, Piece, PromptStep};
use crate::engine::Engine;
use crate::generate::{Finish, GenerateError, Generated, LOGITS_CHUNK, PREFILL_CHUNK, Request, check_fits, speculator};
use crate::onlook;
use crate::prefix_cache::{PrefixCache, n_equal};
use crate::sampler::SamplerError;
use crate::session::{KvBlock, StepError};
use crate::shadow::Shadow;
use crate::trace::served::Unfinished;

/// What is told of a request, on the thread that steps. It must not wait for anything.
pub trait Listener: Send {
    /// What a step computed of the prompt, where the request asks to be told of it. All of it comes before the first token.
    fn prompt(&mut self, step: PromptStep);

    /// A token. Nothing more is computed after a break.
    fn piece(&mut self, piece: Piece) -> ControlFlow<()>;

    /// Whether nobody waits for the answer any more. Looked at before every step.
    fn is_gone(&self) -> bool;

    /// The end; nothing comes after it.
    fn end(&mut self, result: Result<Generated, GenerateError>);
}

/// How much is done at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Answers in the making.
    pub n_parallel: usize,
    /// Requests that wait for one of them to end.
    pub n_queue: usize,
    /// Blocks of keys and values, those kept for later prompts among them. At least those of one whole context.
    pub n_kv_block: usize,
    /// Keeps keys and values for prompts that begin alike.
    pub keep_prefixes: bool,
    /// How long a step with pieces of prompts may take while others wait for their next token. Five times as long where nobody
    /// does, as long as whoever comes then waits.
    pub step_time: Duration,
}

/// Tokens of prompts in any step at least, however slow: fewer read nearly as many weights.
const LEAST_PREFILL: usize = 32;
/// The same where nobody waits for a token: from here on more are hardly faster each.
const LEAST_QUIET_PREFILL: usize = 256;
/// How many times as long a step may take that nobody waits for.
const QUIET: u32 = 5;
/// Fewer tokens than these are computed sooner than it is worth to copy them or to wait for them.
const WORTH_SHARING: usize = 16;

/// What goes on now, and what was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Answers in the making, requests that wait for one of them to end, blocks that either of them or the prefix cache has, and
    /// all that may be had.
    pub n_running: usize,
    pub n_waiting: usize,
    pub n_kv_block_used: usize,
    pub n_kv_block: usize,
    /// Blocks that only the prefix cache has.
    pub n_kv_block_idle: usize,
    /// Requests that were submitted, so far as all that follows; those that were refused too.
    pub n_submitted: u64,
    /// Tokens of prompts that steps computed: not those that were found, and twice those of a prompt that was set back.
    pub n_prompt_token: u64,
    /// Tokens of answers, without the ends of turns.
    pub n_generated_token: u64,
    /// Tokens of prompts that were looked up among those kept, and that were found. Counted when the prompt's end is computed.
    pub n_prefix_queried: u64,
    pub n_prefix_hit: u64,
    /// Answers that were set back because others needed their blocks.
    pub n_set_back: u64,
    /// Answers that nobody waited for any more, or that were broken off.
    pub n_cancelled: u64,
    /// Answers that ended because logits were not numbers.
    pub n_numerical_error: u64,
}

/// Answers in the making, and requests that wait.
pub struct Batcher {
    limits: Limits,
    /// In the order in which they began, or began again.
    running: Vec<Running>,
    /// Those that were set back first, then in the order in which they came.
    waiting: VecDeque<Running>,
    kept: PrefixCache<KvBlock>,
    /// Has some answers replayed.
    shadow: Option<Shadow>,
    prefill_tok_per_s: Option<f64>,
    /// What was done so far; what goes on now is counted when somebody asks.
    counts: Load,
}

struct Running {
    answer: Answer,
    listener: Box<dyn Listener>,
    failed: Option<GenerateError>,
}

impl Running {
    fn is_done(&self) -> bool {
        self.failed.is_some() || self.answer.is_done()
    }

    fn end(&mut self, engine: &Engine, finish: Finish) {
        self.answer.finish(&*engine.session, finish, &mut |piece| self.listener.piece(piece));
    }

    /// Blocks that the tokens known so far and the next need beyond those it has.
    fn n_blocks_to_come(&self) -> usize {
        n_blocks(self.answer.tokens().len() + 1).saturating_sub(self.answer.sequence.n_blocks())
    }
}

/// Blocks of `n_tokens` positions.
pub(crate) fn n_blocks(n_tokens: usize) -> usize {
    n_tokens.div_ceil(KV_BLOCK)
}

/// What the next step computes of one answer.
#[derive(Clone, Copy)]
struct Share {
    i: usize,
    n_tokens: usize,
}

impl Batcher {
    pub fn new(limits: Limits) -> Batcher {
        assert!(limits.n_parallel > 0, "somebody can be answered");
        Batcher {
            limits,
            running: Vec::new(),
            waiting: VecDeque::new(),
            kept: PrefixCache::default(),
            shadow: None,
            prefill_tok_per_s: None,
            counts: Load { n_kv_block: limits.n_kv_block, ..Load::default() },
        }
    }

    /// Takes a request. One that cannot be answered ends at once.
    pub fn submit(&mut self, engine: &Engine, request: Request, mut listener: Box<dyn Listener>) {
        self.counts.n_submitted += 1;
        let n_waiting = self.waiting.len();
        if self.running.len() + n_waiting >= self.limits.n_parallel + self.limits.n_queue {
            return listener.end(Err(GenerateError::Busy { n_waiting }));
        }
        let answer = begin(engine, request).map(|mut answer| {
            if let Some(shadow) = &mut self.shadow {
                shadow.set_busy(true);
                shadow.ticket(answer.tokens().len()).into_iter().for_each(|ticket| answer.keep(ticket));
            }
            answer
        });
        match answer {
            Ok(answer) => self.waiting.push_back(Running { answer, listener, failed: None }),
            Err(e) => listener.end(Err(e)),
        }
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub fn load(&self, engine: &Engine) -> Load {
        Load {
            n_running: self.running.len(),
            n_waiting: self.waiting.len(),
            n_kv_block_used: engine.session.n_kv_blocks(),
            n_kv_block_idle: self.n_idle(engine),
            ..self.counts
        }
    }

    /// Runs one step.
    ///
    /// # Errors
    /// A device that fails. It will not work in any later step, so nothing is left but [`fail_all`](Self::fail_all).
    pub fn step(&mut self, engine: &mut Engine) -> Result<(), BackendError> {
        self.drop_gone(engine);
        self.admit(engine);
        self.use_kept(engine);
        let shares = self.shares_that_fit(engine);
        if shares.is_empty() {
            return Ok(());
        }
        match self.run(engine, &shares) {
            Ok(()) => self.keep(engine, &shares),
            Err(StepError::Backend(BackendError::OutOfMemory { .. })) if self.makes_do(engine) => {}
            Err(e) => shares.iter().for_each(|s| self.running[s.i].failed = Some(e.clone().into())),
        }
        if let Some(e) = self.running.iter().find_map(|r| r.failed.as_ref().and_then(of_device)) {
            return Err(e.clone());
        }
        self.remove_done(engine);
        Ok(())
    }

    /// Ends all answers because the device has failed; those that have not begun are told that nothing is answered any more.
    pub fn fail_all(&mut self, engine: &mut Engine, e: &BackendError) {
        for r in self.running.iter_mut().filter(|r| !r.is_done()) {
            r.failed = Some(StepError::from(e.clone()).into());
        }
        self.waiting.drain(..).for_each(|mut w| w.listener.end(Err(GenerateError::Failed)));
        self.remove_done(engine);
    }

    /// Goes on with the memory that there is, where it is less than the limits promised; false where no less will do.
    fn makes_do(&mut self, engine: &mut Engine) -> bool {
        let n_there = engine.session.n_kv_blocks();
        if n_there < self.limits.n_kv_block {
            // The next step takes what is kept for later, then the blocks of who came last.
            (self.limits.n_kv_block, self.counts.n_kv_block) = (n_there, n_there);
            return true;
        }
        let others = self.running.len() > 1;
        if others {
            self.set_back_last(engine);
        }
        others
    }

    /// Tells the shadow whether it may go on.
    fn tell_shadow(&self) {
        if let Some(shadow) = &self.shadow {
            shadow.set_busy(!self.is_idle());
        }
    }

    /// Ends everything that has begun or waits.
    pub fn cancel_all(&mut self, engine: &mut Engine) {
        for r in &mut self.running {
            r.end(engine, Finish::Cancelled);
        }
        self.counts.n_cancelled += self.waiting.len() as u64;
        self.waiting.drain(..).for_each(|mut w| w.listener.end(Err(GenerateError::Stopped)));
        self.remove_done(engine);
    }

    /// Lets go of keys and values that are kept for later.
    pub fn forget_prefixes(&mut self, engine: &mut Engine) {
        while let Some(block) = self.kept.forget_one(|_| true) {
            engine.session.let_go(block);
        }
    }

    fn drop_gone(&mut self, engine: &mut Engine) {
        let n_waiting = self.waiting.len();
        self.waiting.retain(|w| !w.listener.is_gone());
        self.counts.n_cancelled += (n_waiting - self.waiting.len()) as u64;
        for r in self.running.iter_mut().filter(|r| r.listener.is_gone()) {
            r.end(engine, Finish::Cancelled);
        }
        self.remove_done(engine);
    }

    /// Blocks that are kept for later prompts and that no answer has.
    fn n_idle(&self, engine: &Engine) -> usize {
        self.kept.count(|block| !engine.session.is_used(block))
    }

    /// Begins answers while there is room for what is known of them.
    fn admit(&mut self, engine: &Engine) {
        while self.running.len() < self.limits.n_parallel && !self.waiting.is_empty() {
            let idle = self.n_idle(engine);
            let promised: usize = self.running.iter().map(Running::n_blocks_to_come).sum();
            let next = &self.waiting[0];
            // Those that are idle count as free already.
            let shared = self.kept.whole(next.answer.needed()).filter(|block| engine.session.is_used(block));
            let need = next.n_blocks_to_come() - shared.count();
            if !self.running.is_empty()
                && engine.session.n_kv_blocks() - idle + promised + need > self.limits.n_kv_block
            {
                break;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Gives answers the keys and values that are kept for their prompts, or that came of another's steps just now.
    fn use_kept(&mut self, engine: &mut Engine) {
        if !self.limits.keep_prefixes {
            return;
        }
        for i in 0..self.running.len() {
            let answer = &self.running[i].answer;
            if answer.is_decoding() {
                continue;
            }
            let (tokens, has) = (answer.needed(), answer.sequence.n_tokens());
            let kept = self.kept.find(tokens);
            // Who has no more than what is there already is not worth a look.
            let least = kept.n_tokens.max(has);
            let ahead = self.running.iter().filter(|r| r.answer.sequence.n_tokens() > least);
            let beside = ahead.map(|r| (r.answer.n_in_common(tokens), &r.answer.sequence));
            let beside = beside.max_by_key(|(n, _)| *n).filter(|(n, _)| *n > kept.n_tokens);
            let n_tokens = beside.map_or(kept.n_tokens, |(n, _)| n);
            // Part of a block is copied, which takes a block.
            let n_whole = n_tokens / KV_BLOCK * KV_BLOCK;
            let is_copied = n_tokens >= has.max(n_whole) + WORTH_SHARING;
            if !is_copied && n_whole <= has {
                continue;
            }
            let mut found = engine.session.sequence_of(&kept.blocks, kept.n_tokens);
            if is_copied && engine.session.n_kv_blocks() >= self.limits.n_kv_block {
                // What was found is in use by now, and does not go.
                let gone = self.kept.forget_one(|block| !engine.session.is_used(block));
                gone.into_iter().for_each(|block| engine.session.let_go(block));
            }
            let has_room = engine.session.n_kv_blocks() < self.limits.n_kv_block;
            let of = beside.map_or(&found, |(_, sequence)| sequence);
            // Without memory for a copy the tokens are computed.
            let copied = (is_copied && has_room).then(|| engine.session.fork(of, n_tokens)).and_then(Result::ok);
            let forked = copied.or_else(|| (n_whole > has).then(|| engine.session.fork(of, n_whole))?.ok());
            engine.session.release(&mut found);
            if let Some(forked) = forked {
                engine.session.release(&mut self.running[i].answer.found(forked));
            }
        }
    }

    /// The next step, with room for what it writes: what is kept for later goes first, then who came last is set back.
    fn shares_that_fit(&mut self, engine: &mut Engine) -> Vec<Share> {
        loop {
            let shares = self.shares();
            let is_alone = self.running.len() == 1;
            let grown = |s: &Share| {
                let (answer, sequence) = (&self.running[s.i].answer, &self.running[s.i].answer.sequence);
                let n_guess = if is_alone { answer.n_guess_max() } else { 0 };
                n_blocks(sequence.n_tokens() + s.n_tokens + n_guess).saturating_sub(sequence.n_blocks())
            };
            let need: usize = shares.iter().map(grown).sum();
            while engine.session.n_kv_blocks() + need > self.limits.n_kv_block {
                let Some(block) = self.kept.forget_one(|block| !engine.session.is_used(block)) else { break };
                engine.session.let_go(block);
            }
            // Who is alone has what there is, whatever was promised.
            if engine.session.n_kv_blocks() + need <= self.limits.n_kv_block || self.running.len() <= 1 {
                return shares;
            }
            self.set_back_last(engine);
        }
    }

    /// Who computes how many tokens. Everybody who has an answer gets its next token. What is left of the step goes to prompts: a
    /// quarter of what is done in `step_time` to the one that came first, the rest to those that are nearest their end.
    fn shares(&self) -> Vec<Share> {
        let (decoding, mut prefilling): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|&i| self.running[i].answer.is_decoding());
        let mut shares: Vec<Share> = decoding.iter().map(|&i| Share { i, n_tokens: 1 }).collect();
        if self.limits.keep_prefixes {
            let all = prefilling.clone();
            prefilling.retain(|&i| !all.iter().any(|&before| before < i && self.comes_of(i, before)));
        }
        let first = prefilling.first().copied();
        prefilling.sort_by_key(|&i| self.running[i].answer.n_to_feed());
        let n_first = self.n_prefill_in(1, LEAST_PREFILL).div_ceil(4);
        let mut left = self.n_prefill(!decoding.is_empty(), &prefilling);
        let mut reserved = first.map_or(0, |i| n_first.min(self.running[i].answer.n_to_feed()));
        let mut left_with_logits = LOGITS_CHUNK;
        for i in prefilling {
            if Some(i) == first {
                reserved = 0;
            }
            let answer = &self.running[i].answer;
            let mut n_tokens = answer.n_at_once().min(left.saturating_sub(reserved));
            if answer.wants_all_logits() {
                n_tokens = n_tokens.min(left_with_logits);
                left_with_logits -= n_tokens;
            }
            if n_tokens > 0 {
                shares.push(Share { i, n_tokens });
                left -= n_tokens;
            }
        }
        shares
    }

    /// Whether answer `i` will take over tokens that answer `before` is about to compute.
    fn comes_of(&self, i: usize, before: usize) -> bool {
        let (a, b) = (&self.running[i].answer, &self.running[before].answer);
        let n = n_equal(a.needed(), b.tokens());
        b.sequence.n_tokens() < n && n >= a.sequence.n_tokens() + WORTH_SHARING
    }

    /// Tokens of prompts in the next step, where those of `prefilling` are sorted by what they lack. A step that somebody gets a
    /// token of is short. One that nobody gets a token of may be longer, but not as long as that whoever comes now would
    /// notice. Prompts that come together are computed together: the shortest waits for another that is to end in the same
    /// step only while that at most doubles the step.
    fn n_prefill(&self, is_waited_for: bool, prefilling: &[usize]) -> usize {
        let short = self.n_prefill_in(1, LEAST_PREFILL);
        if is_waited_for {
            return short;
        }
        let quiet = self.n_prefill_in(QUIET, LEAST_QUIET_PREFILL);
        let mut n_ending = 0;
        for &i in prefilling {
            let n = self.running[i].answer.n_to_feed();
            let n_most = if n_ending == 0 { quiet } else { n_ending.max(short) };
            if n > n_most || n_ending + n > PREFILL_CHUNK {
                break;
            }
            n_ending += n;
        }
        if n_ending == 0 { quiet } else { (n_ending + short.div_ceil(4)).max(short) }
    }

    /// Tokens of prompts that are computed in so many step times.
    fn n_prefill_in(&self, n_step_time: u32, least: usize) -> usize {
        let time = (self.limits.step_time * n_step_time).as_secs_f64();
        self.prefill_tok_per_s.map_or(least, |rate| (rate * time) as usize).clamp(least, PREFILL_CHUNK)
    }

    fn run(&mut self, engine: &mut Engine, shares: &[Share]) -> Result<(), StepError> {
        let is_alone = self.running.len() == 1;
        let mut n_of = vec![0; self.running.len()];
        shares.iter().for_each(|s| n_of[s.i] = s.n_tokens);
        let in_step = self.running.iter_mut().zip(&n_of).filter(|(_, n)| **n > 0);
        let (mut parts, mut onlookers): (Vec<_>, Vec<_>) = in_step.map(|(r, &n)| r.answer.part(n, is_alone)).unzip();
        let n_tokens: usize = parts.iter().map(|p| p.tokens.len()).sum();
        let start = Instant::now();
        onlook::step(&mut *engine.session, &mut parts, &mut onlookers)?;
        let time = start.elapsed();
        let (mut row, mut scoring_time) = (0, Duration::ZERO);
        for (r, &n) in self.running.iter_mut().zip(&n_of).filter(|(_, n)| **n > 0) {
            let Running { answer, listener, failed } = r;
            let n_rows = answer.n_rows();
            self.counts.n_prompt_token += answer.n_of_prompt(n) as u64;
            let (counts, is_first) = (&mut self.counts, !answer.is_prefilled());
            let start = Instant::now();
            let told = answer.prompt_step(&*engine.session, row);
            scoring_time += start.elapsed();
            let told = told.map(|step| step.into_iter().for_each(|step| listener.prompt(step)));
            let mut on_piece = |piece: Piece| {
                counts.n_generated_token += u64::from(piece.token.is_some());
                listener.piece(piece)
            };
            let stepped = told.and_then(|()| {
                answer.stepped(&*engine.session, &engine.tokenizer, row, is_alone.then_some(time), &mut on_piece)
            });
            row += n_rows;
            *failed = stepped.err();
            if is_first && answer.is_prefilled() && self.limits.keep_prefixes {
                self.counts.n_prefix_queried += answer.n_prompt() as u64;
                self.counts.n_prefix_hit += answer.n_cached() as u64;
            }
        }
        if n_tokens >= 2 * shares.len().max(16) {
            let rate = n_tokens as f64 / (time + scoring_time).as_secs_f64();
            self.prefill_tok_per_s = Some(self.prefill_tok_per_s.map_or(rate, |before| 0.7 * before + 0.3 * rate));
        }
        Ok(())
    }

    /// Keeps the blocks that a step has filled.
    fn keep(&mut self, engine: &mut Engine, shares: &[Share]) {
        if !self.limits.keep_prefixes {
            return;
        }
        // Texts that are embedded are as many as they are different: they would drive out what is asked for again.
        let is_kept = |r: &&Running| r.failed.is_none() && !r.answer.is_embedding();
        for r in shares.iter().map(|s| &self.running[s.i]).filter(is_kept) {
            let sequence = &r.answer.sequence;
            let tokens = &r.answer.tokens()[..sequence.n_tokens()];
            let tokens = &tokens[..tokens.len() / KV_BLOCK * KV_BLOCK];
            if self.kept.whole(tokens).len() * KV_BLOCK < tokens.len() {
                self.kept.add(tokens, |i| engine.session.hold(sequence, i..i + 1).pop().expect("one block"));
            }
        }
    }

    /// Takes the keys and values of who came last away; they are computed again when there is room.
    fn set_back_last(&mut self, engine: &mut Engine) {
        let Some(mut last) = self.running.pop() else { return };
        engine.session.release(&mut last.answer.set_back());
        self.waiting.push_front(last);
        self.counts.n_set_back += 1;
    }

    fn remove_done(&mut self, engine: &mut Engine) {
        for mut r in self.running.extract_if(.., |r| r.is_done()) {
            if self.limits.keep_prefixes && r.failed.is_none() && !r.answer.is_embedding() {
                // The last block will not grow any more.
                let sequence = &r.answer.sequence;
                let tokens = &r.answer.tokens()[..sequence.n_tokens()];
                self.kept.add(tokens, |i| engine.session.hold(sequence, i..i + 1).pop().expect("one block"));
            }
            engine.session.release(&mut r.answer.sequence);
            let trace = r.answer.take_trace();
            if let Some(shadow) = &mut self.shadow {
                shadow.ended(r.answer.tokens().len(), r.answer.take_served().filter(|_| r.failed.is_none()));
            }
            let result = r.failed.map_or_else(|| Ok(r.answer.into_generated()), Err);
            match &result {
                Ok(generated) => self.counts.n_cancelled += u64::from(generated.finish == Finish::Cancelled),
                Err(GenerateError::Sampler(SamplerError::NotFinite { .. })) => self.counts.n_numerical_error += 1,
                Err(_) => {}
            }
            tell_end(r.listener, result, trace);
        }
    }
}

/// The failure of the device, where an answer failed by that.
fn of_device(e: &GenerateError) -> Option<&BackendError> {
    match e {
        GenerateError::Step(StepError::Backend(e @ BackendError::Device { .. })) => Some(e),
        _ => None,
    }
}

/// An answer to a request that fits.
fn begin(engine: &Engine, request: Request) -> Result<Answer, GenerateError> {
    let max_tokens = check_fits(engine, request.prompt.len(), request.max_tokens)?;
    let speculator = speculator(engine, &request);
    Answer::new(engine, request, max_tokens, speculator)
}

/// Tells the end of an answer. A trace is written to its end on a thread of its own, so that nobody else waits for the disk.
fn tell_end(mut listener: Box<dyn Listener>, result: Result<Generated, GenerateError>, trace: Option<Unfinished>) {
    let Some(trace) = trace else { return listener.end(result) };
    let write = move || {
        // Of an answer that failed nothing is kept.
        listener.end(result.map(|generated| Generated { trace: Some(Box::new(trace.finish())), ..generated }));
    };
    // Where the system starts no thread the listener is dropped, which tells whoever waits as well.
    _ = std::thread::Builder::new().name("trace".into()).spawn(write);
}

/// A batcher on a thread of its own, with the engine.
pub struct Scheduler {
    commands: Sender<Command>,
    load: Arc<Mutex<Load>>,
    n_submitted: AtomicU64,
    /// Why the thread has ended, where its device has failed. It is there before anybody hears of the failure.
    failure: Arc<OnceLock<BackendError>>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Submit(Box<Request>, Box<dyn Listener>),
    With(Box<dyn FnOnce(&mut Engine) + Send>),
    CancelAll,
}

impl Scheduler {
    /// Starts the thread.
    ///
    /// # Errors
    /// A system that does not start one.
    pub fn start(engine: Engine, limits: Limits) -> std::io::Result<Scheduler> {
        Scheduler::start_with(engine, limits, None)
    }

    /// As [`start`](Self::start), with some answers replayed.
    ///
    /// # Errors
    /// A system that does not start a thread.
    pub fn start_with(mut engine: Engine, limits: Limits, shadow: Option<Shadow>) -> std::io::Result<Scheduler> {
        let n_whole = n_blocks(engine.session.n_ctx());
        assert!(limits.n_kv_block >= n_whole, "{} blocks hold a context of {n_whole}", limits.n_kv_block);
        let (commands, received) = channel();
        let load = Arc::new(Mutex::new(Load::default()));
        let failure = Arc::new(OnceLock::new());
        let (told, failed) = (load.clone(), failure.clone());
        let thread = std::thread::Builder::new().name("scheduler".into()).spawn(move || {
            let mut batcher = Batcher { shadow, ..Batcher::new(limits) };
            while follow(&received, &mut batcher, &mut engine, &told) {
                if let Err(e) = batcher.step(&mut engine) {
                    _ = failed.set(e.clone());
                    batcher.fail_all(&mut engine, &e);
                    break;
                }
                batcher.tell_shadow();
            }
            // What was submitted since then must not wait until a large model has been let go of.
            drop(received);
            batcher.cancel_all(&mut engine);
        })?;
        Ok(Scheduler { commands, load, n_submitted: AtomicU64::new(0), failure, thread: Some(thread) })
    }

    /// Takes a request; its listener is told of everything, refusal too.
    pub fn submit(&self, request: Request, listener: Box<dyn Listener>) {
        self.n_submitted.fetch_add(1, Ordering::Relaxed);
        if let Err(e) = self.commands.send(Command::Submit(Box::new(request), listener))
            && let Command::Submit(_, mut listener) = e.0
        {
            listener.end(Err(GenerateError::Failed));
        }
    }

    /// Does something with the engine between two steps, and waits for it. `None` where the thread has ended.
    pub fn with_engine<T: Send + 'static>(&self, f: impl FnOnce(&mut Engine) -> T + Send + 'static) -> Option<T> {
        let (answer, answered) = channel();
        let send = move |engine: &mut Engine| _ = answer.send(f(engine));
        self.commands.send(Command::With(Box::new(send))).ok()?;
        answered.recv().ok()
    }

    /// Ends all answers where they are.
    pub fn cancel_all(&self) {
        _ = self.commands.send(Command::CancelAll);
    }

    /// What goes on: where a step runs, as it was before it; what was submitted since then waits.
    pub fn load(&self) -> Load {
        let told = *self.load.lock().unwrap_or_else(|e| e.into_inner());
        let n_submitted = self.n_submitted.load(Ordering::Relaxed).max(told.n_submitted);
        Load { n_waiting: told.n_waiting + (n_submitted - told.n_submitted) as usize, n_submitted, ..told }
    }

    /// Whether answers are made: neither has the thread ended nor its device failed.
    pub fn is_alive(&self) -> bool {
        self.failure().is_none() && self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// How the device has failed, where that is why nothing is answered.
    pub fn failure(&self) -> Option<&BackendError> {
        self.failure.get()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        // The thread ends when nobody can send any more.
        self.commands = channel().0;
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// How long the first of several requests waits for one more. What is sent together comes some milliseconds apart, and who is
/// computed first and alone keeps all others waiting for a step.
const GATHER: Duration = Duration::from_millis(4);
/// How long all of them together wait, however many come.
const GATHER_MOST: Duration = Duration::from_millis(40);

/// Does what was asked for since the last step, and waits where there is nothing else to do; false when nobody is left to ask.
fn follow(received: &Receiver<Command>, batcher: &mut Batcher, engine: &mut Engine, told: &Mutex<Load>) -> bool {
    // What is waited for first may be long in coming.
    let (mut since, mut begins) = (Instant::now(), false);
    loop {
        // Before the wait too, as nobody would correct it until something comes.
        *told.lock().unwrap_or_else(|e| e.into_inner()) = batcher.load(engine);
        let command = if batcher.is_idle() {
            let first = received.recv();
            (since, begins) = (Instant::now(), true);
            first.map_err(|_| TryRecvError::Disconnected)
        } else if since.elapsed() >= GATHER_MOST {
            return true;
        } else if begins {
            received.recv_timeout(GATHER).map_err(|e| match e {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            })
        } else {
            received.try_recv()
        };
        match command {
            Ok(Command::Submit(request, listener)) => batcher.submit(engine, *request, listener),
            Ok(Command::With(f)) => f(engine),
            Ok(Command::CancelAll) => batcher.cancel_all(engine),
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
}

#[cfg(test)]
mod tests;
