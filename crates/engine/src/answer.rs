//! One answer in the making: which tokens its next step computes, and what becomes of the logits.
//!
//! Tokens of the prompt and of the answer so far are one list; a step computes those that the sequence does not have yet. So
//! a sequence may be taken away at any time: what it held is computed again, with the same bits.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::constraint::Constraint;
use crate::engine::Engine;
use crate::generate::{Finish, GenerateError, Generated, LOGITS_CHUNK, Request};
use crate::onlook::{Experts, Onlooker};
use crate::prefix_cache::n_equal;
use crate::sampler::{Ranked, Sampler, ranked};
use crate::scoring::Scoring;
use crate::session::{Logits, Part, Sequence, Session};
use crate::shadow::{N_TOKENS_MAX, Served, Ticket};
use crate::speculate::{N_DRAFT_MAX, Speculate};
use crate::text_stream::TextStream;
use crate::tokenizer::Tokenizer;
use crate::trace::served::Unfinished;

/// What a token gave, or at the end what had been held back.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub token: Option<u32>,
    /// Text that is final. It may be empty, and of more tokens than this one.
    pub text: String,
    /// Where [`Request::n_best`] asks for it.
    pub standing: Option<Standing>,
    /// Of the position that gave the token, where [`Request::show_experts`] asks for it.
    pub experts: Option<Experts>,
}

/// A token among the others that could have been.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub chosen: Ranked,
    /// Its place among all, the best first and lower ids first among equals; the best has place 1.
    pub rank: usize,
    /// The best of the model's own distribution, best first.
    pub best: Vec<Ranked>,
}

/// What a step computed of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptStep {
    /// Tokens of the prompt whose keys and values are there now, those that were found among them.
    pub n_done: usize,
    /// Those that were found.
    pub n_cached: usize,
    /// Since its first step began.
    pub time: Duration,
    /// Of its next tokens, the first of which is the prompt's second: nothing comes before the first.
    pub standings: Vec<Standing>,
}

/// An answer, and the sequence it lives in.
pub(crate) struct Answer {
    pub(crate) sequence: Sequence,
    request: Request,
    /// At most so many tokens of answer.
    max_tokens: usize,
    sampler: Sampler,
    speculator: Box<dyn Speculate + Send>,
    onlooker: Option<Onlooker>,
    /// Until all of the prompt's tokens are scored, where that is asked for.
    scoring: Option<Scoring>,
    /// What tokens were sampled from, where that is to be kept.
    kept: Option<(Ticket, Vec<Vec<f32>>)>,
    stream: TextStream,
    /// The prompt, then the answer.
    tokens: Vec<u32>,
    /// Tokens guessed to come after these.
    draft: Vec<u32>,
    /// What the next step computes.
    feed: Vec<u32>,
    /// Whether its last step has the logits after the newest token.
    has_logits: bool,
    /// Rows of logits of its last step.
    n_rows: usize,
    out: Generated,
    is_done: bool,
    began: Option<Instant>,
    /// When the first logits came, and bytes read until then.
    prefilled: Option<(Instant, Option<u64>)>,
}

impl Answer {
    /// # Errors
    /// Sampler settings out of range; a trace that cannot be taken.
    pub(crate) fn new(
        engine: &Engine,
        request: Request,
        max_tokens: usize,
        speculator: Box<dyn Speculate + Send>,
    ) -> Result<Answer, GenerateError> {
        let mut sampler = Sampler::new(request.sampler.clone())?;
        request.prompt.iter().for_each(|&t| sampler.accept(t));
        let out = Generated::nothing(&request, sampler.seed());
        Ok(Answer {
            sequence: Sequence::default(),
            max_tokens,
            sampler,
            speculator,
            onlooker: Onlooker::of(engine, &request, max_tokens)?,
            scoring: Scoring::of(&request),
            kept: None,
            stream: TextStream::new(if request.ends.min_tokens == 0 { request.stop.clone() } else { Vec::new() }),
            tokens: request.prompt.clone(),
            draft: Vec::new(),
            feed: Vec::new(),
            has_logits: false,
            n_rows: 0,
            out,
            is_done: false,
            began: None,
            prefilled: None,
            request,
        })
    }

    /// Tokens known so far: the prompt, then the answer.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens whose keys and values may be had from an earlier prompt. The logits after the last one are wanted, so that it is computed
    /// in any case; of what is traced or embedded all is, and of what is scored each position that is not yet.
    pub(crate) fn needed(&self) -> &[u32] {
        let n = match &self.scoring {
            _ if self.is_traced() || self.is_embedding() => 0,
            Some(scoring) => scoring.n_scored(),
            None => self.tokens.len() - 1,
        };
        &self.tokens[..n]
    }

    fn is_traced(&self) -> bool {
        self.onlooker.as_ref().is_some_and(Onlooker::is_tracing)
    }

    /// Tokens that the sequence does not have yet.
    pub(crate) fn n_to_feed(&self) -> usize {
        self.tokens.len() - self.sequence.n_tokens()
    }

    /// Whether the logits of all positions that the next step computes are wanted.
    pub(crate) fn wants_all_logits(&self) -> bool {
        self.is_traced() || self.scoring.is_some()
    }

    /// How many of them one step may compute.
    pub(crate) fn n_at_once(&self) -> usize {
        if self.wants_all_logits() { self.n_to_feed().min(LOGITS_CHUNK) } else { self.n_to_feed() }
    }

    /// How many of `tokens` the sequence begins with; none while it is about to have more of them.
    pub(crate) fn n_in_common(&self, tokens: &[u32]) -> usize {
        let n = n_equal(tokens, &self.tokens);
        if n <= self.sequence.n_tokens() { n } else { 0 }
    }

    /// Whether the newest token is all that is missing.
    pub(crate) fn is_decoding(&self) -> bool {
        self.prefilled.is_some() && self.n_to_feed() == 1
    }

    /// Whether the embedding of its prompt is all that is asked for.
    pub(crate) fn is_embedding(&self) -> bool {
        self.request.embed
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether the prompt's end has been computed.
    pub(crate) fn is_prefilled(&self) -> bool {
        self.prefilled.is_some()
    }

    pub(crate) fn n_prompt(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens of the prompt that were found.
    pub(crate) fn n_cached(&self) -> usize {
        self.out.n_cached
    }

    /// How many of the newest `n` tokens of the sequence are the prompt's.
    pub(crate) fn n_of_prompt(&self, n: usize) -> usize {
        let (n_prompt, n_tokens) = (self.n_prompt(), self.sequence.n_tokens());
        n_prompt.min(n_tokens).saturating_sub(n_tokens.saturating_sub(n))
    }

    /// Begins again with an empty sequence; gives back the one it had.
    pub(crate) fn set_back(&mut self) -> Sequence {
        if self.prefilled.is_none() {
            self.out.n_cached = 0;
        }
        std::mem::take(&mut self.sequence)
    }

    /// Goes on from keys and values that were there already; gives back the sequence it had.
    pub(crate) fn found(&mut self, sequence: Sequence) -> Sequence {
        if self.prefilled.is_none() {
            self.out.n_cached += sequence.n_tokens() - self.sequence.n_tokens();
        }
        std::mem::replace(&mut self.sequence, sequence)
    }

    /// What the next step computes: at most `n_max` tokens, and guesses where `may_guess`; and who looks on.
    pub(crate) fn part(&mut self, n_max: usize, may_guess: bool) -> (Part<'_>, Option<&mut Onlooker>) {
        self.began.get_or_insert_with(Instant::now);
        let n_max = n_max.min(self.n_at_once());
        let rest = &self.tokens[self.sequence.n_tokens()..];
        self.feed.clear();
        self.feed.extend_from_slice(&rest[..rest.len().min(n_max)]);
        self.has_logits = self.feed.len() == rest.len() && !self.is_embedding();
        self.draft.clear();
        if self.is_decoding() && may_guess && !self.is_traced() {
            let n_left = self.max_tokens - self.out.tokens.len();
            self.draft = self.guess(n_left - 1);
            self.feed.extend_from_slice(&self.draft);
            self.out.speculation.count(self.draft.len());
        }
        let (logits, n_rows) = match (self.has_logits, self.draft.is_empty()) {
            _ if self.wants_all_logits() => (Logits::All, self.feed.len()),
            (false, _) if self.is_embedding() => (Logits::OnlyNorm, 0),
            (false, _) => (Logits::None, 0),
            (true, true) => (Logits::Last, 1),
            (true, false) => (Logits::All, self.feed.len()),
        };
        self.n_rows = n_rows;
        (Part { sequence: &mut self.sequence, tokens: &self.feed, logits }, self.onlooker.as_mut())
    }

    /// Guesses that the next step may compute at most, where it may any.
    pub(crate) fn n_guess_max(&self) -> usize {
        match self.is_decoding() && !self.is_traced() {
            true => (self.max_tokens - self.out.tokens.len()).saturating_sub(1).min(N_DRAFT_MAX),
            false => 0,
        }
    }

    /// Guesses of the tokens after the newest, as far as they are allowed.
    fn guess(&mut self, n_max: usize) -> Vec<u32> {
        let Some(constraint) = &mut self.request.constraint else { return self.speculator.draft(n_max) };
        let mut draft = self.speculator.draft(n_max);
        draft.truncate(constraint.n_allowed(&draft));
        draft
    }

    /// Rows of logits that the last part wanted.
    pub(crate) fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// What is to be told of the prompt's tokens that a step computed, whose logits begin at row `first`; `None` where nobody wants to
    /// know. It comes before what [`stepped`](Self::stepped) tells.
    ///
    /// # Errors
    /// Logits that are not numbers.
    pub(crate) fn prompt_step(
        &mut self,
        session: &dyn Session,
        first: usize,
    ) -> Result<Option<PromptStep>, GenerateError> {
        let is_shown = self.request.show_progress && self.prefilled.is_none();
        if self.scoring.is_none() && !is_shown {
            return Ok(None);
        }
        let n_tokens = self.sequence.n_tokens();
        let at = n_tokens - self.feed.len();
        let mut standings = Vec::new();
        if let Some(scoring) = &mut self.scoring {
            standings = scoring.take(session, &self.request.prompt, at, first..first + self.n_rows)?;
            if scoring.n_scored() + 1 == self.request.prompt.len() {
                self.scoring = None;
            }
        }
        let time = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        Ok(Some(PromptStep { n_done: n_tokens.min(self.n_prompt()), n_cached: self.out.n_cached, time, standings }))
    }

    /// Goes on with what a step gave; its logits begin at row `first`. `time` is that of the step where it computed nothing
    /// else. `on_piece` may break the answer off.
    ///
    /// # Errors
    /// Logits that are not numbers.
    pub(crate) fn stepped(
        &mut self,
        session: &dyn Session,
        tokenizer: &Tokenizer,
        first: usize,
        time: Option<Duration>,
        on_piece: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<(), GenerateError> {
        self.onlooker.iter_mut().for_each(Onlooker::stepped);
        if self.is_embedding() {
            return self.embedded(session);
        }
        if !self.has_logits {
            return Ok(());
        }
        let n_before = self.n_rows() - (1 + self.draft.len());
        match (self.prefilled, time) {
            (None, _) => self.prefilled = Some((Instant::now(), session.read_bytes())),
            (Some(_), Some(time)) if self.feed.len() == 1 + self.draft.len() => {
                self.speculator.stepped(self.draft.len(), time);
            }
            (Some(_), _) => {}
        }
        if self.max_tokens == 0 {
            self.finish(session, Finish::Length, on_piece);
        }
        let (mut logits, mut n_right) = (Vec::new(), 0);
        while !self.is_done {
            let row = n_before + n_right;
            let token = match self.choose_of_best(session, first + row)? {
                Some(token) => token,
                None => {
                    session.logits(first + row, &mut logits)?;
                    self.choose(tokenizer, &logits)?
                }
            };
            self.keep_logits(&logits);
            self.take((session, tokenizer), token, (row, &logits), on_piece)?;
            if self.draft.get(n_right) != Some(&token) {
                break;
            }
            self.out.speculation.n_accepted += 1;
            n_right += 1;
        }
        // Guesses that were wrong are in the sequence, the newest token is not.
        self.sequence.truncate(self.tokens.len() - 1);
        Ok(())
    }

    /// The token that is taken where nobody wants more of a position's logits than a few of the best: a device then need not hand over
    /// all. Where something is wrong with them it is left to [`choose`](Self::choose).
    fn choose_of_best(&mut self, session: &dyn Session, row: usize) -> Result<Option<u32>, GenerateError> {
        let Request { constraint, ends, n_best, .. } = &self.request;
        let may_end = self.out.tokens.len() >= ends.min_tokens;
        let is_free = may_end && constraint.is_none() && n_best.is_none() && self.kept.is_none();
        let Some(k) = self.sampler.n_wanted(session.n_vocab()).filter(|_| is_free) else { return Ok(None) };
        let mut best = Vec::new();
        session.best_logits(row, k, &mut best)?;
        Ok(self.sampler.sample_best(&best))
    }

    /// The token that is taken, of the model's own logits.
    fn choose(&mut self, tokenizer: &Tokenizer, logits: &[f32]) -> Result<u32, GenerateError> {
        let Request { constraint, ends, ignore_eos, .. } = &mut self.request;
        let is_constrained = constraint.is_some();
        let may_end = self.out.tokens.len() >= ends.min_tokens;
        let allowed = match constraint {
            Some(constraint) => constraint.mask(logits, *ignore_eos || !may_end)?,
            None => logits,
        };
        if may_end {
            return Ok(self.sampler.sample(allowed)?);
        }
        let mut others = allowed.to_vec();
        let forbidden = ends.tokens.iter().chain(tokenizer.end_of_turn());
        forbidden.for_each(|&t| others.get_mut(t as usize).into_iter().for_each(|logit| *logit = f32::NEG_INFINITY));
        // Where a constraint has nothing else, the answer ends all the same.
        let is_stuck = is_constrained && others.iter().all(|logit| *logit == f32::NEG_INFINITY);
        Ok(self.sampler.sample(if is_stuck { allowed } else { &others })?)
    }

    /// Ends an embedding when all of its text has been computed.
    fn embedded(&mut self, session: &dyn Session) -> Result<(), GenerateError> {
        if self.n_to_feed() == 0 {
            let embedding = self.onlooker.as_ref().and_then(Onlooker::embedding);
            self.out.embedding = Some(embedding.ok_or(GenerateError::NoEmbedding)?);
            self.prefilled = Some((Instant::now(), session.read_bytes()));
            self.finish(session, Finish::Stop, &mut |_| ControlFlow::Continue(()));
        }
        Ok(())
    }

    /// Takes a token into the answer that was sampled from `logits`, those of the `row`-th row of the part that wanted any.
    ///
    /// # Errors
    /// A constraint whose next step would cost too much.
    fn take(
        &mut self,
        (session, tokenizer): (&dyn Session, &Tokenizer),
        token: u32,
        (row, logits): (usize, &[f32]),
        on_piece: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<(), GenerateError> {
        self.sampler.accept(token);
        self.speculator.push(token);
        self.out.n_decode_token += 1;
        // A constraint lets such a token pass only where the answer may end.
        let goes_on = self.request.ignore_eos && self.request.constraint.is_none();
        let is_end_of_turn = !goes_on && tokenizer.end_of_turn().contains(&token);
        let is_stop = !is_end_of_turn && self.request.ends.tokens.contains(&token);
        self.out.stopped_at = is_stop.then_some(token);
        if is_end_of_turn || (is_stop && !self.request.ends.are_shown) {
            self.finish(session, Finish::Stop, on_piece);
            return Ok(());
        }
        self.request.constraint.as_mut().map_or(Ok(()), |c| c.advance(token))?;
        self.tokens.push(token);
        self.out.tokens.push(token);
        let mut bytes = Vec::new();
        tokenizer.decode_bytes(token, &mut bytes, self.request.show_control || is_stop);
        if self.out.tokens.len() == self.request.ends.min_tokens + 1 {
            self.stream.stop_at(self.request.stop.clone());
        }
        let mut delta = self.stream.push(&bytes);
        if let (Some(index), true) = (delta.stopped, self.request.ends.are_shown) {
            delta.text.push_str(&self.request.stop[index]);
        }
        self.out.text.push_str(&delta.text);
        let standing = self.request.n_best.map(|n| standing(logits, token, n));
        let experts = self.onlooker.as_ref().and_then(|o| o.experts(row));
        let flow = on_piece(Piece { token: Some(token), text: delta.text, standing, experts });
        let is_complete = self.request.constraint.as_ref().is_some_and(Constraint::is_complete);
        if let Some(index) = delta.stopped {
            self.out.stopped = Some(self.request.stop[index].clone());
            self.finish(session, Finish::Stop, on_piece);
        } else if is_stop || (is_complete && flow.is_continue()) {
            self.finish(session, Finish::Stop, on_piece);
        } else if flow.is_break() {
            self.finish(session, Finish::Cancelled, on_piece);
        } else if self.out.tokens.len() == self.max_tokens {
            self.finish(session, Finish::Length, on_piece);
        }
        Ok(())
    }

    /// Ends the answer, unless it has ended.
    pub(crate) fn finish(
        &mut self,
        session: &dyn Session,
        finish: Finish,
        on_piece: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) {
        if std::mem::replace(&mut self.is_done, true) {
            return;
        }
        self.out.finish = finish;
        let text = self.stream.finish().text;
        self.out.text.push_str(&text);
        if !text.is_empty() {
            // The answer has ended, whatever the listener says.
            _ = on_piece(Piece { token: None, text, standing: None, experts: None });
        }
        // The first token was the prefill's.
        self.out.n_decode_token = self.out.n_decode_token.saturating_sub(1);
        if let (Some(began), Some((prefilled, read_before))) = (self.began, self.prefilled) {
            self.out.prefill = prefilled - began;
            self.out.decode = prefilled.elapsed();
            self.out.decode_read_bytes = session.read_bytes().zip(read_before).map(|(after, before)| after - before);
        }
        self.out.kv_bytes = session.kv_bytes();
    }

    /// From now on logits are kept, until the answer is too long for a shadow.
    pub(crate) fn keep(&mut self, ticket: Ticket) {
        self.kept = Some((ticket, Vec::new()));
    }

    fn keep_logits(&mut self, logits: &[f32]) {
        match &mut self.kept {
            Some((_, rows)) if self.tokens.len() < N_TOKENS_MAX => rows.push(logits.to_vec()),
            _ => self.kept = None,
        }
    }

    /// What was served, where logits were kept.
    pub(crate) fn take_served(&mut self) -> Option<Served> {
        let (ticket, logits) = self.kept.take()?;
        let n = (self.request.prompt.len() + logits.len()).saturating_sub(1);
        (!logits.is_empty()).then(|| Served { tokens: self.tokens[..n].to_vec(), logits, _ticket: ticket })
    }

    /// What was traced.
    pub(crate) fn take_trace(&mut self) -> Option<Unfinished> {
        self.onlooker.as_mut()?.take_trace(&self.tokens)
    }

    /// What was generated.
    pub(crate) fn into_generated(self) -> Generated {
        assert!(self.is_done, "the answer has ended");
        self.out
    }
}

/// Where `token` stands in the model's own distribution, with its `n` best. One logit at least is finite.
pub(crate) fn standing(logits: &[f32], token: u32, n: usize) -> Standing {
    let (best, _) = ranked(logits, n.max(1));
    let logit = logits[token as usize];
    // `ranked` gives probabilities beside logits: any of them fixes the sum.
    let p = best[0].p * (f64::from(logit) - f64::from(best[0].logit)).exp();
    let chosen = Ranked { token, logit, p };
    let (before, after) = logits.split_at(token as usize);
    let n_better = before.iter().filter(|l| **l >= logit).count() + after.iter().filter(|l| **l > logit).count();
    Standing { chosen, rank: n_better + 1, best: best.into_iter().take(n).collect() }
}
