//! Chooses the next token from a model's logits.
//!
//! The steps and their order are those of llama.cpp's default chain:
//!
//! 1. `logit_bias` is added (OpenAI's API).
//! 2. Penalties over the last `repeat_last_n` tokens: the repetition penalty divides a positive logit and multiplies a
//!    negative one, once per token seen (CTRL, Keskar et al. 2019); then `count · frequency_penalty + presence_penalty`
//!    is subtracted (OpenAI's API).
//! 3. top-k keeps the `k` best. 4. top-p keeps the fewest best whose probabilities reach `p`. 5. min-p keeps those at
//!    least `min_p` times as probable as the best. Both take the softmax of what is left at that point, before
//!    temperature, and always keep the best.
//! 6. Temperature divides the logits that are left, and one is drawn from their softmax.
//!
//! At temperature 0 the best logit after step 2 is taken, the lowest id among equals. All arithmetic on probabilities
//! is f64 and sequential, ordered by logit and id, so that the same seed gives the same tokens on any thread count.
//!
//! Where top-k is on, few of the best logits are enough, which a device finds where they are: what step 2 lowers makes room for no more
//! others than it lowers. The same token comes of them, by the same code.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};

use apr_core::backend::{BEST_MAX, Best};

/// How to choose tokens. The default is greedy, with everything off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerConfig {
    /// 0 is greedy; 1 draws from the model's own distribution.
    pub temperature: f32,
    /// Keep this many of the best; 0 is off.
    pub top_k: u32,
    /// Keep the fewest best with this much probability, in `(0, 1]`; 1 is off.
    pub top_p: f32,
    /// Keep those at least this share as probable as the best, in `[0, 1]`; 0 is off.
    pub min_p: f32,
    /// Above 1 discourages tokens seen lately, below encourages them; 1 is off.
    pub repetition_penalty: f32,
    /// How many of the latest tokens the three penalties count, the prompt's too.
    pub repeat_last_n: usize,
    /// Subtracted once per occurrence, in `[-2, 2]`; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once where a token occurs at all, in `[-2, 2]`; 0 is off.
    pub presence_penalty: f32,
    /// The same seed chooses the same tokens; `None` draws one.
    pub seed: Option<u64>,
    /// Added to the logits of these tokens; negative infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

/// Why nothing can be sampled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplerError {
    #[error("{field} is {got}; expected {expected}")]
    OutOfRange { field: &'static str, expected: &'static str, got: f32 },
    #[error("logit_bias names token {token}, but the vocabulary has {vocabulary} tokens")]
    UnknownToken { token: u32, vocabulary: usize },
    #[error(
        "the logit of token {token} is {got}; the model computed something that is not a number or is infinite; apr trace shows where"
    )]
    NotFinite { token: usize, got: f32 },
    #[error("no token can be chosen: all {vocabulary} logits are negative infinity")]
    NothingLeft { vocabulary: usize },
}

/// Draws tokens for one sequence: a configuration, the tokens seen lately, and a random stream.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    seed: u64,
    random: SplitMix64,
    /// The last `repeat_last_n` tokens, oldest first, and how often each occurs among them.
    recent: VecDeque<u32>,
    counts: HashMap<u32, u32>,
    /// Candidates of the current step, kept to spare an allocation per token.
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: u32,
    logit: f32,
}

/// A token's standing among all at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    pub token: u32,
    pub logit: f32,
    /// Softmax probability.
    pub p: f64,
}

/// The `k` best of one position's logits, best first and lower ids first among equals, and the entropy of the whole distribution in
/// bits. Logits that are not finite are left out; NaN is the entropy of nothing.
pub fn ranked(logits: &[f32], k: usize) -> (Vec<Ranked>, f64) {
    let all = logits.iter().enumerate().map(|(token, logit)| Candidate { token: token as u32, logit: *logit });
    let mut candidates: Vec<Candidate> = all.filter(|c| c.logit.is_finite()).collect();
    let best = candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max);
    let (mut total, mut moment) = (0.0, 0.0);
    for c in &candidates {
        let w = weight(c.logit, best, 1.0);
        total += w;
        moment += w * (f64::from(c.logit) - f64::from(best));
    }
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k, better_first);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(better_first);
    let rank = |c: &Candidate| Ranked { token: c.token, logit: c.logit, p: weight(c.logit, best, 1.0) / total };
    (candidates.iter().map(rank).collect(), (total.ln() - moment / total) / std::f64::consts::LN_2)
}

/// Refuses logits that are not-a-number or positive infinity.
pub(crate) fn check_numbers(logits: &[f32]) -> Result<(), SamplerError> {
    match logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(token) => Err(SamplerError::NotFinite { token, got: logits[token] }),
        None => Ok(()),
    }
}

impl SamplerConfig {
    /// Names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let check = |field, expected, got: f32, ok: bool| match ok {
            true => Ok(()),
            false => Err(SamplerError::OutOfRange { field, expected, got }),
        };
        let penalty = "a number from -2 to 2";
        let within_two = |got: f32| (-2.0..=2.0).contains(&got);
        let warm = self.temperature;
        check("temperature", "a finite number, 0 (greedy) or above", warm, warm.is_finite() && warm >= 0.0)?;
        check("top_p", "above 0 and at most 1 (off)", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0)?;
        check("min_p", "from 0 (off) to 1", self.min_p, (0.0..=1.0).contains(&self.min_p))?;
        let repetition = self.repetition_penalty;
        let ok = repetition.is_finite() && repetition > 0.0;
        check("repetition_penalty", "a finite number above 0, 1 (off)", repetition, ok)?;
        check("frequency_penalty", penalty, self.frequency_penalty, within_two(self.frequency_penalty))?;
        check("presence_penalty", penalty, self.presence_penalty, within_two(self.presence_penalty))?;
        self.logit_bias.iter().try_for_each(|(_, bias)| {
            check("logit_bias", "a number below infinity", *bias, !bias.is_nan() && *bias < f32::INFINITY)
        })
    }

    fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

impl Sampler {
    /// A sampler with an empty history. Without a seed one is drawn from the system's randomness; see [`Self::seed`].
    pub fn new(config: SamplerConfig) -> Result<Self, SamplerError> {
        config.validate()?;
        let seed = config.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let random = SplitMix64(seed);
        Ok(Self { config, seed, random, recent: VecDeque::new(), counts: HashMap::new(), candidates: Vec::new() })
    }

    /// The seed in use, to report and to repeat a run with.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Counts a token of the prompt or of the answer into the history that the penalties see.
    pub fn accept(&mut self, token: u32) {
        if !self.config.penalizes() || self.config.repeat_last_n == 0 {
            return;
        }
        if self.recent.len() == self.config.repeat_last_n
            && let Some(oldest) = self.recent.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
        self.recent.push_back(token);
        *self.counts.entry(token).or_default() += 1;
    }

    /// Chooses a token from one position's `logits` (`[vocabulary]`). Does not [`accept`](Self::accept) it.
    ///
    /// A logit may be negative infinity (forbidden, by a grammar for one). Not-a-number, positive infinity, or nothing
    /// above negative infinity is an error.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SamplerError> {
        check_numbers(logits)?;
        let vocabulary = logits.len();
        if let Some(&(token, _)) = self.config.logit_bias.iter().find(|(token, _)| *token as usize >= vocabulary) {
            return Err(SamplerError::UnknownToken { token, vocabulary });
        }
        let all = logits.iter().enumerate().map(|(token, logit)| Candidate { token: token as u32, logit: *logit });
        self.candidates.clear();
        self.candidates.extend(all);
        self.choose().ok_or(SamplerError::NothingLeft { vocabulary })
    }

    /// How many of the best logits of a position [`sample_best`](Self::sample_best) needs, of a vocabulary of `n_vocab`. `None` where it
    /// takes all of them, or more than a backend finds.
    pub fn n_wanted(&self, n_vocab: usize) -> Option<usize> {
        let c = &self.config;
        let raises = c.repetition_penalty < 1.0 || c.frequency_penalty < 0.0 || c.presence_penalty < 0.0;
        if raises || c.logit_bias.iter().any(|(token, bias)| *bias > 0.0 || *token as usize >= n_vocab) {
            return None;
        }
        let n_kept = match c.top_k as usize {
            _ if c.temperature == 0.0 => 1,
            0 => return None,
            // One more shows that some are left out, on which the order of those that are kept depends.
            k => k + 1,
        };
        let n_wanted = n_kept + self.counts.len() + c.logit_bias.len();
        (n_wanted <= BEST_MAX).then_some(n_wanted)
    }

    /// Chooses the token that [`sample`](Self::sample) does of all logits, of the [`n_wanted`](Self::n_wanted) `best`, or all where there
    /// are fewer. `None` where `sample` says what is wrong with them; nothing has been drawn then.
    pub fn sample_best(&mut self, best: &[Best]) -> Option<u32> {
        if best.first().is_none_or(|b| !b.value.is_finite()) {
            return None;
        }
        self.candidates.clear();
        self.candidates.extend(best.iter().map(|b| Candidate { token: b.index, logit: b.value }));
        self.candidates.sort_unstable_by_key(|c| c.token);
        self.choose()
    }

    /// Chooses among the candidates, which are ordered by id. `None` where all are forbidden.
    fn choose(&mut self) -> Option<u32> {
        self.weigh();
        if self.config.temperature == 0.0 {
            return self.candidates.iter().copied().min_by(better_first).map(|best| best.token);
        }
        if self.candidates.is_empty() {
            return None;
        }
        self.keep_top_k();
        self.keep_top_p();
        self.keep_min_p();
        Some(self.draw())
    }

    /// Biases and penalizes the logits of the candidates, and drops those that are not above negative infinity.
    fn weigh(&mut self) {
        let candidates = &mut self.candidates;
        let find = |candidates: &[Candidate], token: &u32| candidates.binary_search_by_key(token, |c| c.token).ok();
        for (token, bias) in &self.config.logit_bias {
            if let Some(at) = find(candidates, token) {
                candidates[at].logit = (candidates[at].logit + bias).min(f32::MAX);
            }
        }
        for (token, count) in &self.counts {
            if let Some(at) = find(candidates, token) {
                candidates[at].logit = self.config.penalized(candidates[at].logit, *count);
            }
        }
        candidates.retain(|candidate| candidate.logit > f32::NEG_INFINITY);
    }

    fn keep_top_k(&mut self) {
        let k = self.config.top_k as usize;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, better_first);
            self.candidates.truncate(k);
            self.candidates.sort_unstable_by(better_first);
        }
    }

    fn keep_top_p(&mut self) {
        if self.config.top_p >= 1.0 {
            return;
        }
        let best = self.best();
        let total: f64 = self.candidates.iter().map(|c| weight(c.logit, best, 1.0)).sum();
        let wanted = f64::from(self.config.top_p) * total;
        // Sorts the best first, ever more of them, until they hold the mass: a vocabulary is rarely sorted whole.
        let (mut sorted, mut mass) = (0, 0.0);
        let mut block = 64;
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let size = block.min(rest.len());
            if size < rest.len() {
                rest.select_nth_unstable_by(size - 1, better_first);
            }
            rest[..size].sort_unstable_by(better_first);
            for candidate in &rest[..size] {
                mass += weight(candidate.logit, best, 1.0);
                sorted += 1;
                if mass >= wanted {
                    self.candidates.truncate(sorted);
                    return;
                }
            }
            block *= 8;
        }
    }

    fn keep_min_p(&mut self) {
        if self.config.min_p > 0.0 {
            let (best, least) = (self.best(), f64::from(self.config.min_p));
            self.candidates.retain(|candidate| weight(candidate.logit, best, 1.0) >= least);
        }
    }

    /// Draws by the softmax of the logits over the temperature.
    fn draw(&mut self) -> u32 {
        let (best, temperature) = (self.best(), f64::from(self.config.temperature));
        let total: f64 = self.candidates.iter().map(|c| weight(c.logit, best, temperature)).sum();
        let mut left = self.random.unit() * total;
        let mut drawn = self.candidates[0];
        for candidate in &self.candidates {
            let weight = weight(candidate.logit, best, temperature);
            if weight > 0.0 {
                drawn = *candidate;
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        drawn.token
    }

    fn best(&self) -> f32 {
        self.candidates.iter().map(|candidate| candidate.logit).fold(f32::NEG_INFINITY, f32::max)
    }
}

impl SamplerConfig {
    /// The logit of a token that occurs `count` times in the history.
    fn penalized(&self, logit: f32, count: u32) -> f32 {
        let repeated = if logit > 0.0 { logit / self.repetition_penalty } else { logit * self.repetition_penalty };
        // Dividing by a tiny penalty may overflow; the largest number keeps the order of the others.
        (repeated - count as f32 * self.frequency_penalty - self.presence_penalty).min(f32::MAX)
    }
}

/// `exp((logit - best) / temperature)`: a probability up to a common factor, 1 for the best.
fn weight(logit: f32, best: f32, temperature: f64) -> f64 {
    ((f64::from(logit) - f64::from(best)) / temperature).exp()
}

fn better_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// The SplitMix64 generator (Steele, Lea, Flood 2014): a counter through a mixing function, the same everywhere.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`, with all 53 bits of an f64.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn warm() -> SamplerConfig {
        SamplerConfig { temperature: 1.0, seed: Some(7), ..SamplerConfig::default() }
    }

    fn sampler(config: SamplerConfig) -> Sampler {
        Sampler::new(config).expect("the configuration is valid")
    }

    /// The ids that the filters leave, sorted.
    fn kept(config: SamplerConfig, logits: &[f32]) -> Vec<u32> {
        let mut sampler = sampler(config);
        sampler.sample(logits).expect("a token");
        let mut kept: Vec<u32> = sampler.candidates.iter().map(|c| c.token).collect();
        kept.sort_unstable();
        kept
    }

    /// Ids best first, with their probabilities, by a full sort.
    fn sorted(logits: &[f32]) -> Vec<(u32, f64)> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = logits.iter().map(|l| weight(*l, best, 1.0)).sum();
        let mut ranked: Vec<_> =
            logits.iter().enumerate().map(|(i, l)| (i as u32, weight(*l, best, 1.0) / total)).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked
    }

    fn rows() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec((-400i32..400).prop_map(|n| n as f32 / 50.0), 1..300)
    }

    #[test]
    fn whoever_may_raise_a_logit_wants_all_of_them() {
        let off = SamplerConfig::default;
        for (config, expected) in [
            (off(), Some(1)),
            (warm(), None),
            (SamplerConfig { top_k: 20, ..warm() }, Some(21)),
            (SamplerConfig { top_k: BEST_MAX as u32 - 1, ..warm() }, Some(BEST_MAX)),
            (SamplerConfig { top_k: BEST_MAX as u32, ..warm() }, None),
            (SamplerConfig { top_k: u32::MAX, ..warm() }, None),
            (SamplerConfig { logit_bias: vec![(1, 2.0)], ..off() }, None),
            (SamplerConfig { logit_bias: vec![(1, -2.0), (9, f32::NEG_INFINITY)], ..off() }, Some(3)),
            (SamplerConfig { logit_bias: vec![(1, -2.0), (10, -1.0)], ..off() }, None),
            (SamplerConfig { repetition_penalty: 1.05, ..off() }, Some(3)),
            (SamplerConfig { repetition_penalty: 0.95, ..off() }, None),
            (SamplerConfig { frequency_penalty: 0.5, top_k: 4, ..warm() }, Some(7)),
            (SamplerConfig { frequency_penalty: -0.5, ..off() }, None),
            (SamplerConfig { presence_penalty: -0.5, ..off() }, None),
        ] {
            let mut sampler = sampler(config.clone());
            [5, 7, 5].into_iter().for_each(|token| sampler.accept(token));
            assert_eq!(sampler.n_wanted(10), expected, "{config:?}");
        }
    }

    /// Settings of all kinds that few of the best are enough for.
    fn narrow() -> impl Strategy<Value = SamplerConfig> {
        let bias = (0u32..40, prop_oneof![Just(f32::NEG_INFINITY), Just(-0.0), -9f32..0.0]);
        let penalties = (
            prop_oneof![Just(1.0), Just(1.05), 1f32..4.0, Just(1e38)],
            prop_oneof![Just(0.0), 0f32..2.0],
            prop_oneof![Just(0.0), 0f32..2.0],
            0usize..12,
            prop_oneof![Just(Vec::new()), prop::collection::vec(bias, 0..4)],
        );
        let filters = (
            1u32..30,
            prop_oneof![Just(1.0), 0.05f32..1.0],
            prop_oneof![Just(0.0), 0f32..0.5],
            prop_oneof![Just(0.0), 0.1f32..3.0],
        );
        (penalties, filters, any::<u64>()).prop_map(|(penalties, (top_k, top_p, min_p, temperature), seed)| {
            let (repetition_penalty, frequency_penalty, presence_penalty, repeat_last_n, logit_bias) = penalties;
            SamplerConfig {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                repeat_last_n,
                frequency_penalty,
                presence_penalty,
                seed: Some(seed),
                logit_bias,
            }
        })
    }

    /// Rows with many equals, and with logits that are forbidden or no logits.
    fn rough_rows() -> impl Strategy<Value = Vec<f32>> {
        let odd = prop_oneof![
            300 => (-12i32..12).prop_map(|n| n as f32 / 4.0),
            100 => -20f32..20.0,
            5 => Just(-3e38),
            60 => Just(f32::NEG_INFINITY),
            1 => prop_oneof![Just(f32::NAN), Just(f32::INFINITY)],
        ];
        prop_oneof![4 => rows(), 4 => prop::collection::vec(odd, 40..90), 1 => Just(vec![f32::NEG_INFINITY; 50])]
    }

    /// What a session does: the best few where they are enough and nothing is wrong with them, else all.
    fn shortly(sampler: &mut Sampler, logits: &[f32]) -> Result<u32, SamplerError> {
        let Some(k) = sampler.n_wanted(logits.len()) else { return sampler.sample(logits) };
        let mut best = vec![Best::default(); k.min(logits.len())];
        Best::of(logits, &mut best);
        sampler.sample_best(&best).map_or_else(|| sampler.sample(logits), Ok)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn few_of_the_best_give_the_token_that_all_do(
            config in narrow(),
            rows in prop::collection::vec(rough_rows(), 1..12),
        ) {
            let (mut whole, mut short) = (sampler(config.clone()), sampler(config));
            for logits in &rows {
                let (expected, got) = (whole.sample(logits), shortly(&mut short, logits));
                // NaN, which is no number, is not itself.
                prop_assert_eq!(format!("{expected:?}"), format!("{got:?}"));
                prop_assert_eq!(whole.random.0, short.random.0);
                if let Ok(token) = got {
                    whole.accept(token);
                    short.accept(token);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn greedy_is_the_first_of_the_largest(logits in rows()) {
            let mut greedy = sampler(SamplerConfig::default());
            prop_assert_eq!(greedy.sample(&logits).unwrap(), sorted(&logits)[0].0);
        }

        #[test]
        fn top_k_keeps_the_k_best(logits in rows(), k in 1u32..310) {
            let mut expected: Vec<u32> = sorted(&logits).iter().take(k as usize).map(|r| r.0).collect();
            expected.sort_unstable();
            prop_assert_eq!(kept(SamplerConfig { top_k: k, ..warm() }, &logits), expected);
        }

        #[test]
        fn top_p_keeps_the_fewest_that_hold_the_mass(logits in rows(), top_p in 0.01f32..0.99) {
            let ranked = sorted(&logits);
            let kept = kept(SamplerConfig { top_p, ..warm() }, &logits);
            let mass: f64 = ranked.iter().take(kept.len()).map(|r| r.1).sum();
            let without_last: f64 = ranked.iter().take(kept.len() - 1).map(|r| r.1).sum();
            let mut expected: Vec<u32> = ranked.iter().take(kept.len()).map(|r| r.0).collect();
            expected.sort_unstable();
            prop_assert_eq!(kept, expected);
            prop_assert!(mass >= f64::from(top_p) - 1e-12 && without_last < f64::from(top_p) + 1e-12);
        }

        #[test]
        fn min_p_keeps_a_share_of_the_best(logits in rows(), min_p in 0.01f32..1.0) {
            let ranked = sorted(&logits);
            let kept = kept(SamplerConfig { min_p, ..warm() }, &logits);
            for (token, probability) in &ranked {
                let share = probability / ranked[0].1 - f64::from(min_p);
                prop_assert!(share.abs() < 1e-12 || kept.contains(token) == (share > 0.0));
            }
        }

        #[test]
        fn ranking_is_a_full_sort_cut_short(logits in rows(), k in 0usize..310) {
            let (found, entropy) = ranked(&logits, k);
            let expected = sorted(&logits);
            prop_assert_eq!(found.len(), k.min(logits.len()));
            for (found, (token, p)) in found.iter().zip(&expected) {
                prop_assert_eq!((found.token, found.logit), (*token, logits[*token as usize]));
                prop_assert!((found.p - p).abs() < 1e-12);
            }
            let plain: f64 = expected.iter().filter(|(_, p)| *p > 0.0).map(|(_, p)| -p * p.log2()).sum();
            prop_assert!((entropy - plain).abs() < 1e-9);
        }

        #[test]
        fn cold_and_top_1_are_greedy(logits in rows(), seed: u64) {
            let greedy = sampler(SamplerConfig::default()).sample(&logits).unwrap();
            prop_assert_eq!(greedy, sorted(&logits)[0].0);
            let one = SamplerConfig { top_k: 1, seed: Some(seed), ..warm() };
            prop_assert_eq!(sampler(one).sample(&logits).unwrap(), greedy);
            let cold = SamplerConfig { temperature: 1e-30, seed: Some(seed), ..warm() };
            let cold = sampler(cold).sample(&logits).unwrap();
            prop_assert_eq!(logits[cold as usize], logits[greedy as usize]);
        }

        #[test]
        fn a_drawn_token_is_never_forbidden(logits in rows(), config_seed: u64, every in 2usize..5) {
            let logits: Vec<f32> =
                logits.iter().enumerate().map(|(i, l)| if i % every == 0 { *l } else { f32::NEG_INFINITY }).collect();
            let mut sampler = sampler(SamplerConfig { seed: Some(config_seed), top_p: 0.9, ..warm() });
            for _ in 0..5 {
                prop_assert_eq!(sampler.sample(&logits).unwrap() as usize % every, 0);
            }
        }
    }

    #[test]
    fn what_is_not_finite_has_no_rank() {
        let (found, entropy) = ranked(&[f32::NAN, 1.0, f32::INFINITY, 2.0, f32::NEG_INFINITY], 9);
        assert_eq!(found.iter().map(|r| r.token).collect::<Vec<_>>(), [3, 1]);
        assert!((found[0].p + found[1].p - 1.0).abs() < 1e-12 && entropy < 1.0);
        let (none, entropy) = ranked(&[f32::NAN], 1);
        assert!(none.is_empty() && entropy.is_nan());
    }

    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5f64, 0.25, 0.125, 0.1, 0.02, 0.005];
        for temperature in [1.0f32, 0.5, 2.0] {
            let powers = probabilities.map(|p| p.powf(1.0 / f64::from(temperature)));
            let total: f64 = powers.iter().sum();
            let logits = probabilities.map(|p| p.ln() as f32 + 3.0);
            let mut sampler = sampler(SamplerConfig { temperature, ..warm() });
            let mut seen = [0u32; 6];
            let draws = 100_000;
            for _ in 0..draws {
                seen[sampler.sample(&logits).unwrap() as usize] += 1;
            }
            let expected = powers.map(|p| p / total * f64::from(draws));
            let chi: f64 = seen.iter().zip(expected).map(|(n, e)| (f64::from(*n) - e).powi(2) / e).sum();
            // The 99.9 % point of chi-square with five degrees of freedom.
            assert!(chi < 20.5, "temperature {temperature}: chi-square {chi}, {seen:?}");
        }
    }

    #[test]
    fn filters_come_before_temperature() {
        // Hot enough for a flat distribution, top-p still sees the model's own: one token holds more than half.
        let logits = [3.0, 1.0, 1.0, 1.0];
        assert_eq!(kept(SamplerConfig { temperature: 100.0, top_p: 0.6, ..warm() }, &logits), [0]);
        assert_eq!(kept(SamplerConfig { temperature: 100.0, min_p: 0.2, ..warm() }, &logits), [0]);
        // top-p takes its mass from what top-k left: of two equals, half the mass is one token, the lower id.
        assert_eq!(kept(SamplerConfig { top_k: 2, top_p: 0.5, ..warm() }, &[1.0; 4]), [0]);
    }

    #[test]
    fn penalties_are_computed_as_documented() {
        let config = SamplerConfig {
            repetition_penalty: 2.0,
            frequency_penalty: 0.25,
            presence_penalty: 0.5,
            repeat_last_n: 3,
            logit_bias: vec![(3, -1.5)],
            ..SamplerConfig::default()
        };
        let mut sampler = sampler(config);
        for token in [2, 0, 0, 1] {
            sampler.accept(token);
        }
        sampler.sample(&[4.0, -1.0, 8.0, 1.0]).unwrap();
        let logits: Vec<f32> = sampler.candidates.iter().map(|c| c.logit).collect();
        // 4 / 2 - 2 · 0.25 - 0.5; -1 · 2 - 0.25 - 0.5; forgotten; biased.
        assert_eq!(logits, [1.0, -2.75, 8.0, -0.5]);
    }

    #[test]
    fn the_repetition_penalty_changes_the_greedy_choice() {
        let mut sampler = sampler(SamplerConfig { repetition_penalty: 1.5, ..SamplerConfig::default() });
        assert_eq!(sampler.sample(&[1.0, 1.2]).unwrap(), 1);
        sampler.accept(1);
        sampler.accept(99);
        assert_eq!(sampler.sample(&[1.0, 1.2]).unwrap(), 0);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32 / 20.0).collect();
        let run = |seed| {
            let mut sampler = sampler(SamplerConfig { seed, top_p: 0.95, ..warm() });
            let tokens: Vec<u32> = (0..20).map(|_| sampler.sample(&logits).unwrap()).collect();
            (sampler.seed(), tokens)
        };
        assert_eq!(run(Some(5)), run(Some(5)));
        assert_ne!(run(Some(5)).1, run(Some(6)).1);
        let (seed, tokens) = run(None);
        assert_eq!(run(Some(seed)).1, tokens);
        assert_ne!(run(None).0, seed);
        // The generator's published first outputs for seed 0.
        let mut random = SplitMix64(0);
        assert_eq!([random.next(), random.next()], [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4]);
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        assert_eq!(sampler(SamplerConfig::default()).sample(&[0.0, 2.0, -0.0, 2.0]).unwrap(), 1);
        assert_eq!(sampler(SamplerConfig::default()).sample(&[-0.0, 0.0]).unwrap(), 0);
    }

    #[test]
    fn logits_that_mean_nothing_are_errors() {
        for config in [SamplerConfig::default(), warm()] {
            let mut sampler = sampler(config);
            let none = f32::NEG_INFINITY;
            assert!(matches!(sampler.sample(&[0.0, f32::NAN]), Err(SamplerError::NotFinite { token: 1, .. })));
            assert!(matches!(sampler.sample(&[f32::INFINITY]), Err(SamplerError::NotFinite { token: 0, .. })));
            assert_eq!(sampler.sample(&[none, none]), Err(SamplerError::NothingLeft { vocabulary: 2 }));
            assert_eq!(sampler.sample(&[]), Err(SamplerError::NothingLeft { vocabulary: 0 }));
            assert_eq!(sampler.sample(&[none, -1e30]), Ok(1));
        }
        let bias = |token, by| SamplerConfig { logit_bias: vec![(token, by)], ..SamplerConfig::default() };
        assert_eq!(sampler(bias(0, f32::NEG_INFINITY)).sample(&[9.0, 1.0]), Ok(1));
        let most = SamplerConfig { temperature: 1.0, seed: Some(1), ..bias(1, f32::MAX) };
        assert_eq!(sampler(most).sample(&[9.0, 1e38]), Ok(1));
        let unknown = sampler(bias(2, 1.0)).sample(&[9.0, 1.0]);
        assert_eq!(unknown, Err(SamplerError::UnknownToken { token: 2, vocabulary: 2 }));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let off = SamplerConfig::default;
        let nan = f32::NAN;
        let bad: [(&str, SamplerConfig); 12] = [
            ("temperature", SamplerConfig { temperature: -0.1, ..off() }),
            ("temperature", SamplerConfig { temperature: nan, ..off() }),
            ("temperature", SamplerConfig { temperature: f32::INFINITY, ..off() }),
            ("top_p", SamplerConfig { top_p: 0.0, ..off() }),
            ("top_p", SamplerConfig { top_p: 1.01, ..off() }),
            ("min_p", SamplerConfig { min_p: -0.5, ..off() }),
            ("min_p", SamplerConfig { min_p: nan, ..off() }),
            ("repetition_penalty", SamplerConfig { repetition_penalty: 0.0, ..off() }),
            ("frequency_penalty", SamplerConfig { frequency_penalty: 2.5, ..off() }),
            ("presence_penalty", SamplerConfig { presence_penalty: nan, ..off() }),
            ("logit_bias", SamplerConfig { logit_bias: vec![(0, nan)], ..off() }),
            ("logit_bias", SamplerConfig { logit_bias: vec![(0, f32::INFINITY)], ..off() }),
        ];
        for (name, config) in bad {
            match Sampler::new(config) {
                Err(SamplerError::OutOfRange { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        let message = SamplerConfig { top_p: 1.5, ..off() }.validate().unwrap_err().to_string();
        assert_eq!(message, "top_p is 1.5; expected above 0 and at most 1 (off)");
        assert!(off().validate().is_ok());
    }
}
