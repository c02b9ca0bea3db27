//! The cost model against made-up machines and texts, whose costs and tokens are known: what is gained, and what is lost at most.

use super::*;

/// Seconds of a step of one token.
const SINGLE: f64 = 0.025;

/// A decode: time it took, and tokens that came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    seconds: f64,
    n_token: usize,
    n_guessing: usize,
}

impl Spent {
    /// Steps of one token that were lost; negative where some were gained.
    fn lost(&self) -> f64 {
        self.seconds / SINGLE - self.n_token as f64
    }

    fn speedup(&self) -> f64 {
        self.n_token as f64 * SINGLE / self.seconds
    }
}

/// Decodes until `n` tokens have come. `next` gives the token after those sampled so far, of which the last step's draft is known to it;
/// `cost` is what a step with a draft of so many tokens takes, in steps of one token.
fn decode(
    s: &mut Speculator,
    n: usize,
    next: &mut dyn FnMut(&[u32]) -> u32,
    cost: &mut dyn FnMut(usize) -> f64,
) -> Spent {
    let mut spent = Spent::default();
    while spent.n_token < n {
        let draft = s.draft(n - spent.n_token - 1);
        let seconds = SINGLE * if draft.is_empty() { 1.0 } else { cost(draft.len()) };
        s.stepped(draft.len(), Duration::from_secs_f64(seconds));
        spent.seconds += seconds;
        spent.n_guessing += usize::from(!draft.is_empty());
        for i in 0..=draft.len() {
            let token = next(&draft[i..]);
            s.push(token);
            spent.n_token += 1;
            if draft.get(i) != Some(&token) {
                break;
            }
        }
    }
    spent
}

/// Tokens of which no run of three occurs twice, other ones for every `seed`.
fn novel(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| seed * 1_000_000 + i).collect()
}

/// Tokens at random from a small vocabulary.
fn noise(seed: u64, n_vocab: u64, n: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab) as u32
    };
    (0..n).map(|_| next()).collect()
}

fn decode_text(s: &mut Speculator, text: &[u32], cost: &mut dyn FnMut(usize) -> f64) -> Spent {
    let mut at = 0;
    let mut next = |_: &[u32]| {
        at += 1;
        text[at - 1]
    };
    decode(s, text.len(), &mut next, cost)
}

/// A machine whose arithmetic, not its memory, is the limit.
fn dense(n_drafted: usize) -> f64 {
    1.0 + 0.15 * n_drafted as f64
}

#[test]
fn copying_is_faster() {
    let prompt = novel(1, 600);
    for (cost, at_least) in [(foretold as fn(usize) -> f64, 3.0), (dense, 4.0)] {
        let spent = decode_text(&mut Speculator::new(&prompt), &prompt[50..550], &mut { cost });
        assert!(spent.speedup() > at_least, "{spent:?}: {}", spent.speedup());
    }
}

#[test]
fn a_copy_with_edits_is_faster() {
    let prompt = novel(1, 800);
    let edited: Vec<u32> = prompt.iter().map(|t| if t % 40 == 39 { t + 500_000 } else { *t }).collect();
    let spent = decode_text(&mut Speculator::new(&prompt), &edited, &mut foretold);
    assert!(spent.speedup() > 1.5, "{spent:?}: {}", spent.speedup());
}

#[test]
fn what_is_new_costs_nothing() {
    let spent = decode_text(&mut Speculator::new(&novel(1, 600)), &novel(2, 500), &mut foretold);
    assert_eq!((spent.n_guessing, spent.n_token), (0, 500));
    // Runs of three tokens that occurred before are common here, and say nothing of the next.
    for seed in 0..20 {
        let prompt = noise(seed, 8, 600);
        let spent = decode_text(&mut Speculator::new(&prompt), &noise(seed + 100, 8, 500), &mut foretold);
        assert!(spent.lost() <= 5.0, "{seed}: {} of 500 steps lost, {spent:?}", spent.lost());
    }
}

#[test]
fn no_text_loses_more_than_the_bound() {
    // The worst there can be copies while nothing is guessed, and what is guessed is wrong.
    let prompt = novel(1, 3000);
    for n in [50, 200, 2000] {
        let mut at = 100;
        let mut next = |draft: &[u32]| {
            at += 1;
            if draft.is_empty() { prompt[at] } else { 9_000_000 + at as u32 }
        };
        let spent = decode(&mut Speculator::new(&prompt), n, &mut next, &mut foretold);
        assert!(spent.n_guessing > 0);
        assert!(
            spent.lost() > 0.0 && spent.lost() <= CREDIT + CREDIT_PER_STEP * n as f64,
            "{spent:?}: {}",
            spent.lost()
        );
    }
}

#[test]
fn a_machine_where_guessing_never_pays_is_found_out() {
    let prompt = novel(1, 3000);
    // Three times what is foretold: even a draft that is right throughout loses.
    let mut cost = |n: usize| 3.0 * (n + 1) as f64;
    let spent = decode_text(&mut Speculator::new(&prompt), &prompt[..2500], &mut cost);
    // One step costs more than its credit, as it is not known yet.
    let overrun = cost(5) - foretold(5);
    assert!(spent.n_guessing > 0 && spent.lost() <= CREDIT + CREDIT_PER_STEP * 2500.0 + overrun, "{}", spent.lost());
    assert!(spent.n_guessing < 10, "{spent:?}");
}

#[test]
fn it_turns_itself_off_and_on_again() {
    let prompt = novel(1, 2000);
    let mut s = Speculator::new(&prompt);
    let copied = decode_text(&mut s, &prompt[..300], &mut foretold);
    assert!(copied.speedup() > 2.0, "{copied:?}");
    let between = decode_text(&mut s, &novel(2, 300), &mut foretold);
    assert!(between.n_guessing <= 1 && between.lost() < CREDIT_MAX, "the end of the copy may surprise it: {between:?}");
    let copied = decode_text(&mut s, &prompt[1000..1300], &mut foretold);
    assert!(copied.speedup() > 2.0, "{copied:?}");
}

#[test]
fn what_was_measured_while_the_machine_was_busy_is_forgotten() {
    let prompt = novel(1, 9000);
    let mut s = Speculator::new(&prompt);
    let busy = decode_text(&mut s, &prompt[..200], &mut |n| 6.0 * foretold(n));
    assert!(busy.n_guessing > 0 && busy.lost() > 0.0, "{busy:?}");
    let idle = decode_text(&mut s, &prompt[200..4000], &mut foretold);
    assert!(idle.speedup() > 1.5, "{idle:?}: {}", idle.speedup());
}

#[test]
fn drafts_keep_to_what_is_left() {
    let prompt = novel(1, 600);
    let mut s = Speculator::new(&prompt);
    decode_text(&mut s, &prompt[..300], &mut foretold);
    for n_max in [0, 1, 2, 9, 46] {
        assert!(s.clone().draft(n_max).len() <= n_max);
    }
    assert!(s.draft(100).len() > 20, "long drafts where nothing was wrong for long");
}

#[test]
fn nothing_is_guessed_before_the_time_of_a_step_is_known() {
    let prompt = novel(1, 600);
    let mut s = Speculator::new(&prompt);
    prompt[..40].iter().for_each(|&t| s.push(t));
    for _ in 0..N_SINGLE_MIN {
        assert!(s.draft(100).is_empty());
        s.stepped(0, Duration::from_millis(25));
    }
    assert!(!s.draft(100).is_empty());
}

#[test]
fn matches_fall_into_their_classes() {
    let expected = [(3, 0), (4, 1), (5, 2), (6, 2), (7, 3), (10, 3), (11, 4), (18, 4), (19, 5), (100_000, 5)];
    expected.iter().for_each(|(length, c)| assert_eq!(class(*length), *c, "{length}"));
}

#[test]
fn costs_are_measured_and_lend_themselves_to_their_neighbours() {
    let mut c = CostModel::default();
    assert_eq!(c.of_length(0), None);
    let near =
        |got: Option<f64>, expected: f64| assert!((got.unwrap() / expected - 1.0).abs() < 1e-9, "{got:?}, {expected}");
    [0.02, 0.5, 0.02].iter().for_each(|s| assert_eq!(c.observe(0, *s), None));
    near(c.of_length(3), foretold(5)); // An outlier of three is not their median.
    near(c.observe(5, 0.02 * foretold(5) / 2.0), foretold(5) / 2.0);
    for (i, &length) in LENGTHS.iter().enumerate() {
        near(c.of_length(i), foretold(length) / 2.0);
    }
    c.observe(47, 0.02 * foretold(47) * 2.0);
    near(c.of_length(3), foretold(5) / 2.0);
    near(c.of_length(8), foretold(31) * 2.0);
    (0..4 * WEARS_OFF as usize).for_each(|_| assert_eq!(c.observe(0, 0.02), None));
    assert!((c.of_length(9).unwrap() / foretold(47) - 1.0).abs() < 0.05);
}
