//! Decides when guessed tokens are worth a step: what they cost, how often they are right, and how much may be lost to finding out.
//!
//! A step that computes the next token can compute the logits after `k` guessed tokens too. Where the guesses are right, several tokens
//! come of one step (speculative decoding, Leviathan et al. 2022). Whether that is faster depends on the model and the machine (of a
//! mixture of experts, `k` tokens read up to `k` times the experts), so both sides are measured while it runs: [`CostModel`] knows how long
//! steps take, [`Acceptance`] how often guesses turn out right, which plain decoding shows as well, at no cost. [`Speculator`] guesses only
//! where the two promise a gain.
//!
//! Nothing here runs a model, or looks at a clock: it works for one sequence of any loop that says what was sampled and what steps took.

use std::collections::VecDeque;
use std::time::Duration;

use crate::draft::{Drafter, Guess, MATCH_MIN};

/// Who guesses tokens for a generation loop. The loop says every token ([`push`](Self::push)), asks before every step
/// ([`draft`](Self::draft)) and says what the step took ([`stepped`](Self::stepped)). Whatever is guessed, the answer is the same.
pub trait Speculate {
    /// Takes note of a token that was sampled.
    fn push(&mut self, token: u32);

    /// At most `n_max` tokens to compute along with the newest.
    fn draft(&mut self, n_max: usize) -> Vec<u32>;

    /// Takes note of a step of the newest token and `n_drafted` more.
    fn stepped(&mut self, n_drafted: usize, time: Duration);
}

/// Nobody guesses.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSpeculation;

/// Guesses from the text itself where that promises to be faster.
///
/// What is lost to wrong guesses, against decoding token by token, is at most 2 % of the time of that and four of its steps, as far as
/// the cost of a step can be foretold: a step is taken only where the credit covers the case that no guess is right. Every plain step adds
/// 2 % of itself to the credit, a guess adds what it gains or takes what it loses. Losses in a row double the plain steps that follow.
#[derive(Clone, Debug)]
pub struct Speculator {
    drafter: Drafter,
    cost: CostModel,
    acceptance: Acceptance,
    /// Steps of one token that may be lost.
    credit: f64,
    n_loss_in_row: u32,
    /// Plain steps before the next guess.
    hold: u32,
    /// What the last step took, in steps of one token, while it is not known what it gave.
    open: Option<f64>,
    /// Tokens sampled since the last step.
    n_pushed: usize,
}

/// Lengths of drafts. Few of them, so that each is soon measured; with the newest token they make 2 to 48 rows.
const LENGTHS: [usize; 10] = [1, 2, 3, 5, 7, 11, 15, 23, 31, 47];
/// Tokens of the longest draft.
pub(crate) const N_DRAFT_MAX: usize = LENGTHS[LENGTHS.len() - 1];
/// How much faster than plain decoding a draft must promise to be.
const MARGIN: f64 = 1.1;
/// Credit at the beginning, what a plain step adds, and the most there can be, in steps of one token.
const CREDIT: f64 = 4.0;
const CREDIT_PER_STEP: f64 = 0.02;
const CREDIT_MAX: f64 = 32.0;
/// Doublings of the pause after losses.
const N_DOUBLING: u32 = 8;

impl Speculator {
    /// One that knows a prompt.
    pub fn new(prompt: &[u32]) -> Speculator {
        let mut drafter = Drafter::default();
        prompt.iter().for_each(|&t| {
            drafter.push(t);
        });
        Speculator {
            drafter,
            cost: CostModel::default(),
            acceptance: Acceptance::default(),
            credit: CREDIT,
            n_loss_in_row: 0,
            hold: 0,
            open: None,
            n_pushed: 0,
        }
    }

    /// Books what the last step with a draft gained or lost.
    fn settle(&mut self) {
        let Some(cost) = self.open.take() else { return };
        let gain = self.n_pushed as f64 - cost;
        self.credit = (self.credit + gain).min(CREDIT_MAX);
        if gain < 0.0 {
            self.n_loss_in_row += 1;
            self.hold = 1 << self.n_loss_in_row.min(N_DOUBLING);
        } else {
            self.n_loss_in_row = 0;
        }
    }

    /// The length that promises most tokens per time, where one promises enough.
    fn best_length(&self, n_max: usize) -> Option<usize> {
        let matched = self.drafter.length()?;
        let (mut best, mut best_rate) = (None, MARGIN);
        // Tokens that the step is expected to give, and the probability that all guesses so far are right.
        let (mut expected, mut right, mut n) = (1.0, 1.0, 0);
        for (i, &length) in LENGTHS.iter().enumerate().take_while(|(_, length)| **length <= n_max) {
            while n < length {
                right *= self.acceptance.probability(matched + n);
                expected += right;
                n += 1;
            }
            let cost = self.cost.of_length(i)?;
            if cost - 1.0 <= self.credit && expected / cost > best_rate {
                (best, best_rate) = (Some(length), expected / cost);
            }
        }
        best
    }
}

impl Speculate for Speculator {
    fn push(&mut self, token: u32) {
        if let Some(guess) = self.drafter.push(token) {
            self.acceptance.observe(guess);
        }
        self.n_pushed += 1;
    }

    fn draft(&mut self, n_max: usize) -> Vec<u32> {
        self.settle();
        if self.hold > 0 {
            self.hold -= 1;
            return Vec::new();
        }
        let length = self.best_length(n_max).unwrap_or(0);
        self.drafter.draft(length).collect()
    }

    fn stepped(&mut self, n_drafted: usize, time: Duration) {
        self.n_pushed = 0;
        self.open = self.cost.observe(n_drafted, time.as_secs_f64());
        if n_drafted == 0 {
            self.credit = (self.credit + CREDIT_PER_STEP).min(CREDIT_MAX);
        }
    }
}

impl Speculate for NoSpeculation {
    fn push(&mut self, _: u32) {}

    fn draft(&mut self, _: usize) -> Vec<u32> {
        Vec::new()
    }

    fn stepped(&mut self, _: usize, _: Duration) {}
}

/// How long a step with a draft takes, in steps of one token.
///
/// It starts from the bytes that a mixture of 128 experts reads of which a token uses 8: `1 - (15/16)^n` of the experts for `n` tokens,
/// 57 % of the bytes of one token being experts. What is measured corrects it: a length by its own measurements, and one without any by
/// those of the nearest length. A correction wears off while nothing is guessed, so that a measurement that was an accident, or a
/// machine that had other things to do, does not decide for ever.
#[derive(Clone, Debug, Default)]
struct CostModel {
    /// Seconds of the latest steps of one token.
    singles: VecDeque<f64>,
    /// By length: measured over foretold, and how often it was measured.
    corrections: [Option<(f64, u32)>; LENGTHS.len()],
}

/// Steps of one token whose median is their time, and those it takes to know it.
const N_SINGLE: usize = 9;
const N_SINGLE_MIN: usize = 3;
/// Measurements that a correction averages, and plain steps after which 1/e of it is left.
const N_AVERAGED: u32 = 4;
const WEARS_OFF: f64 = 512.0;

impl CostModel {
    /// Takes note of a step's time; of one with a draft, this is what it took in steps of one token.
    fn observe(&mut self, n_drafted: usize, seconds: f64) -> Option<f64> {
        if n_drafted == 0 {
            if self.singles.len() == N_SINGLE {
                self.singles.pop_front();
            }
            self.singles.push_back(seconds);
            self.corrections.iter_mut().flatten().for_each(|(c, _)| *c += (1.0 - *c) / WEARS_OFF);
            return None;
        }
        let cost = seconds / self.single()?;
        if let Some(i) = LENGTHS.iter().position(|l| *l == n_drafted) {
            let measured = cost / foretold(n_drafted);
            let (c, n) = self.corrections[i].unwrap_or((measured, 0));
            let n = N_AVERAGED.min(n + 1);
            self.corrections[i] = Some((c + (measured - c) / f64::from(n), n));
        }
        Some(cost)
    }

    /// Seconds of a step of one token.
    fn single(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.singles.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        (sorted.len() >= N_SINGLE_MIN).then(|| sorted[sorted.len() / 2].max(f64::MIN_POSITIVE))
    }

    /// What a step with a draft of `LENGTHS[i]` tokens takes, in steps of one token.
    fn of_length(&self, i: usize) -> Option<f64> {
        self.single()?;
        let measured = self.corrections.iter().enumerate().filter_map(|(j, c)| c.map(|(c, _)| (i.abs_diff(j), c)));
        let correction = measured.min_by_key(|(distance, _)| *distance).map_or(1.0, |(_, c)| c);
        Some(foretold(LENGTHS[i]) * correction)
    }
}

/// What a step with a draft is taken to cost before it is measured.
fn foretold(n_drafted: usize) -> f64 {
    0.43 + 0.57 * 16.0 * (1.0 - (15.0_f64 / 16.0).powi(n_drafted as i32 + 1))
}

/// How often a guess is right, by the number of tokens that agreed before it.
#[derive(Clone, Debug, Default)]
struct Acceptance {
    /// Guesses that were right and all guesses, the latest counting most.
    classes: [(f64, f64); PRIOR.len()],
}

/// What is assumed of matches of 3, 4, 5 to 6, 7 to 10, 11 to 18 and more tokens, with the weight of this many guesses.
const PRIOR: [f64; 6] = [0.3, 0.4, 0.5, 0.7, 0.85, 0.95];
const PRIOR_WEIGHT: f64 = 4.0;
/// What a guess counts when the next of its class comes.
const FADES: f64 = 0.97;

impl Acceptance {
    fn observe(&mut self, guess: Guess) {
        let (right, all) = &mut self.classes[class(guess.length)];
        *right = *right * FADES + if guess.was_right { 1.0 } else { 0.0 };
        *all = *all * FADES + 1.0;
    }

    fn probability(&self, length: usize) -> f64 {
        let class = class(length);
        let (right, all) = self.classes[class];
        (right + PRIOR[class] * PRIOR_WEIGHT) / (all + PRIOR_WEIGHT)
    }
}

/// The class of a match of at least [`MATCH_MIN`] tokens, each twice as wide as the one before.
fn class(length: usize) -> usize {
    let beyond = length + 1 - MATCH_MIN;
    (beyond.next_power_of_two().ilog2() as usize).min(PRIOR.len() - 1)
}

#[cfg(test)]
mod tests;
