//! Whatever is guessed, right or wrong, the answer is the one that comes of decoding token by token.

use std::cell::RefCell;
use std::path::Path;

use apr_core::backend::KvType;
use apr_core::backend::faulty::{Fault, Faulty};
use apr_cpu::CpuBackend;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::device::Device;
use crate::engine::EngineOptions;
use crate::session::{self, SessionSettings};

/// Guesses what will come, and errs now and then.
struct Oracle {
    truth: Vec<u32>,
    n_pushed: usize,
    random: u64,
    /// Of 8 guesses, those that are wrong.
    n_wrong: u64,
    n_max: usize,
}

impl Oracle {
    fn next(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % n
    }
}

impl Speculate for Oracle {
    fn push(&mut self, _: u32) {
        self.n_pushed += 1;
    }

    fn draft(&mut self, n_max: usize) -> Vec<u32> {
        let n = self.next(self.n_max as u64 + 1) as usize;
        let rest: Vec<u32> = self.truth.iter().copied().skip(self.n_pushed).chain([7, 7, 7]).collect();
        let mut wrong = |t: u32| if self.next(8) < self.n_wrong { (t + 1) % 2000 } else { t };
        rest.into_iter().take(n.min(n_max)).map(&mut wrong).collect()
    }

    fn stepped(&mut self, _: usize, _: Duration) {}
}

fn load(n_ctx: usize) -> Engine {
    let device = Device::Cpu { n_threads: Some(2), isa: None };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
    Engine::load(&path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(n_ctx) }).unwrap()
}

fn greedy(n: usize) -> Request {
    Request {
        prompt: (100..140).collect(),
        max_tokens: Some(n),
        sampler: SamplerConfig::default(),
        stop: Vec::new(),
        ignore_eos: true,
        ends: Ends::default(),
        show_control: false,
        speculate: false,
        constraint: None,
        n_best: None,
        n_best_of_prompt: None,
        show_progress: false,
        show_experts: false,
        trace: None,
        embed: false,
    }
}

fn random(n: usize, seed: u64) -> Request {
    let sampler = SamplerConfig { temperature: 1.0, top_p: 0.95, seed: Some(seed), ..SamplerConfig::default() };
    Request { sampler, ..greedy(n) }
}

/// An answer, the pieces that its text came in, and what is told of it that guesses must not change.
type Answer = (Vec<u32>, String, Vec<String>, Finish, usize);

/// The answer, cancelled where `cancel_at` pieces have come, and what came of guessing.
fn answer(
    engine: &mut Engine,
    request: &Request,
    speculator: Box<dyn Speculate + Send>,
    cancel_at: usize,
) -> (Answer, SpeculationCounts) {
    let (mut pieces, cancel) = (Vec::new(), AtomicBool::new(false));
    let mut on_text = |text: &str| {
        pieces.push(text.to_string());
        cancel.store(pieces.len() >= cancel_at, Ordering::Relaxed);
    };
    let g = generate_with(engine, request, speculator, &cancel, &mut on_text).unwrap();
    assert_eq!(engine.session.kv_bytes(), 0, "every block is given back");
    assert!(g.speculation.n_accepted <= g.speculation.n_drafted);
    ((g.tokens, g.text, pieces, g.finish, g.n_decode_token), g.speculation)
}

/// Tokens that would be sampled if nothing ended the answer but the context.
fn truth(engine: &mut Engine, request: &Request) -> Vec<u32> {
    let endless = Request { max_tokens: None, stop: Vec::new(), ignore_eos: true, ..request.clone() };
    answer(engine, &endless, Box::new(NoSpeculation), usize::MAX).0.0
}

/// Answers without guesses, with guesses that are right, often wrong and always wrong, and with those of [`Speculator`].
#[track_caller]
fn check(engine: &mut Engine, request: &Request, cancel_at: usize) -> Answer {
    let truth = truth(engine, request);
    let (plain, counts) = answer(engine, request, Box::new(NoSpeculation), cancel_at);
    assert_eq!(counts, SpeculationCounts::default());
    for (seed, n_wrong, n_max) in [(1, 0, 47), (2, 1, 8), (3, 1, 8), (4, 3, 4), (5, 8, 5)] {
        let oracle = Box::new(Oracle { truth: truth.clone(), n_pushed: 0, random: seed, n_wrong, n_max });
        let (guessed, counts) = answer(engine, request, oracle, cancel_at);
        assert_eq!(guessed, plain, "{n_wrong} of 8 guesses wrong: {counts:?}");
        assert!(plain.0.len() < 20 || counts.n_step > 0, "guesses were tried");
        assert!(plain.0.len() < 20 || (n_wrong == 8) == (counts.n_accepted == 0), "{n_wrong}: {counts:?}");
    }
    assert_eq!(answer(engine, request, Box::new(Speculator::new(&request.prompt)), cancel_at).0, plain);
    plain
}

#[test]
fn guesses_change_no_token() {
    let mut engine = load(120);
    for request in [greedy(60), greedy(1), greedy(2), random(60, 1), random(60, 2)] {
        assert_eq!(check(&mut engine, &request, usize::MAX).3, Finish::Length);
    }
    let penalties = SamplerConfig {
        repetition_penalty: 0.7,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        repeat_last_n: 9,
        ..random(0, 3).sampler
    };
    check(&mut engine, &Request { sampler: penalties, ..greedy(60) }, usize::MAX);
}

#[test]
fn every_end_is_where_it_is_without_guesses() {
    let mut engine = load(120);
    for n in 1..30 {
        let (tokens, .., finish, n_token) = check(&mut engine, &random(n, 5), usize::MAX);
        assert_eq!((tokens.len(), finish, n_token), (n, Finish::Length, n - 1));
    }
    // The context holds 120 tokens; the last is sampled and never fed.
    let (tokens, .., finish, _) = check(&mut engine, &Request { max_tokens: None, ..random(0, 6) }, usize::MAX);
    assert_eq!((tokens.len(), finish), (80, Finish::Length));
    let (_, text, pieces, ..) = check(&mut engine, &random(60, 7), usize::MAX);
    for from in [3, 10, 31, 32, 33] {
        let stop: String = text.chars().skip(from).take(4).collect();
        let (_, cut, _, finish, _) = check(&mut engine, &Request { stop: vec![stop], ..random(60, 7) }, usize::MAX);
        assert!(finish == Finish::Stop && cut.len() < text.len(), "{cut}");
    }
    for cancel_at in [1, 2, 9, pieces.len() - 3] {
        assert_eq!(check(&mut engine, &random(60, 7), cancel_at).3, Finish::Cancelled);
    }
}

#[test]
fn an_end_of_turn_inside_a_draft_ends_the_answer() {
    let mut engine = load(120);
    let end = engine.tokenizer.end_of_turn()[0];
    let mut lengths = Vec::new();
    for seed in 0..8 {
        let mut request = Request { ignore_eos: false, ..random(60, seed) };
        request.sampler.logit_bias = vec![(end, 3.0)];
        let (tokens, .., finish, n_token) = check(&mut engine, &request, usize::MAX);
        if finish == Finish::Stop {
            assert_eq!(n_token, tokens.len(), "the first token was the prefill's, and the end of turn is in no answer");
            lengths.push(tokens.len());
        }
    }
    assert!(lengths.iter().filter(|n| **n > 3).count() >= 3, "answers end in their middle: {lengths:?}");
}

#[test]
fn a_model_that_loops_is_guessed() {
    let mut engine = load(400);
    let encouraged = SamplerConfig { frequency_penalty: -2.0, presence_penalty: -2.0, ..SamplerConfig::default() };
    let request = Request { sampler: encouraged, ..greedy(300) };
    let (plain, _) = answer(&mut engine, &request, Box::new(NoSpeculation), usize::MAX);
    let (guessed, counts) = answer(&mut engine, &request, Box::new(Speculator::new(&request.prompt)), usize::MAX);
    assert_eq!(guessed, plain);
    // How often depends on how long steps take; that it is tried does not.
    assert!(counts.n_step > 0 && counts.n_accepted > 0, "{counts:?}");
}

/// Tokens, and how often they come again.
type Repeated = (Vec<u32>, usize);

/// Twice the temperature, the repetition penalty, the seed, and tokens to generate.
type Setting = (u32, f32, u64, usize);

#[test]
fn prompts_that_repeat_themselves_give_the_same_with_and_without_guesses() {
    let engine = RefCell::new(load(160));
    let part = proptest::collection::vec(0..6_u32, 1..20);
    let parts = proptest::collection::vec((part, 0..4_usize), 1..4);
    let settings = (0..3_u32, 0.5..2.0_f32, any::<u64>(), 1..60_usize);
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let run = |(parts, (warmth, penalty, seed, n)): (Vec<Repeated>, Setting)| {
        let prompt = parts.iter().flat_map(|(part, again)| part.repeat(again + 1)).map(|t| 300 + 11 * t).take(100);
        let mut request = Request { prompt: prompt.collect(), ..random(n, seed) };
        request.sampler.temperature = warmth as f32 / 2.0;
        request.sampler.repetition_penalty = penalty;
        check(&mut engine.borrow_mut(), &request, usize::MAX);
        Ok(())
    };
    runner.run(&(parts, settings), run).unwrap();
}

#[test]
fn a_pass_that_depends_on_its_rows_would_show() {
    let mut engine = load(120);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 120 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::DecodeDiffers);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let differs = (0..8).any(|seed| {
        let request = random(60, seed);
        let (plain, _) = answer(&mut engine, &request, Box::new(NoSpeculation), usize::MAX);
        let oracle = Box::new(Oracle { truth: plain.0.clone(), n_pushed: 0, random: seed, n_wrong: 0, n_max: 8 });
        answer(&mut engine, &request, oracle, usize::MAX).0 != plain
    });
    assert!(differs, "a step of one token that differs from a step of many changes an answer");
}

fn whole(engine: &mut Engine, request: &Request) -> Generated {
    generate(engine, request, &AtomicBool::new(false), &mut |_| ()).unwrap()
}

#[test]
fn an_answer_ends_where_it_is_told_to() {
    let mut engine = load(120);
    let truth = truth(&mut engine, &greedy(60));
    let at = (5..15).find(|i| !truth[..*i].contains(&truth[*i])).unwrap();
    let ends = Ends { tokens: vec![truth[at]], ..Ends::default() };
    let hidden = Request { ends: ends.clone(), ..greedy(60) };
    let (tokens, text, _, finish, _) = check(&mut engine, &hidden, usize::MAX);
    assert_eq!((&tokens[..], finish), (&truth[..at], Finish::Stop));
    assert_eq!(whole(&mut engine, &hidden).stopped_at, Some(truth[at]));
    let shown = Request { ends: Ends { are_shown: true, ..ends.clone() }, ..greedy(60) };
    let (tokens, longer, ..) = check(&mut engine, &shown, usize::MAX);
    assert_eq!(tokens, truth[..=at]);
    assert!(longer.len() > text.len() && longer.starts_with(&text), "{longer:?} after {text:?}");
    let late = Request { ends: Ends { min_tokens: at + 3, ..ends }, ..greedy(60) };
    let (tokens, ..) = check(&mut engine, &late, usize::MAX);
    assert!(tokens.len() >= at + 3 && tokens[at] != truth[at], "{tokens:?}");
    assert_eq!(tokens[..at], truth[..at]);
    let eos = engine.tokenizer.end_of_turn()[0];
    let sampler = SamplerConfig { logit_bias: vec![(eos, 100.0)], ..SamplerConfig::default() };
    let ends = Ends { min_tokens: 7, ..Ends::default() };
    let soon = Request { sampler, ends, ignore_eos: false, ..greedy(60) };
    assert_eq!(check(&mut engine, &soon, usize::MAX).0.len(), 7);
}

#[test]
fn a_stop_string_may_be_shown_and_may_have_to_wait() {
    let mut engine = load(120);
    let text = whole(&mut engine, &greedy(60)).text;
    let stop: String = text.chars().skip(10).take(3).collect();
    let request = |ends: Ends| Request { stop: vec![stop.clone()], ends, ..greedy(60) };
    let hidden = whole(&mut engine, &request(Ends::default()));
    let shown = whole(&mut engine, &request(Ends { are_shown: true, ..Ends::default() }));
    assert_eq!((shown.text, shown.stopped), (hidden.text.clone() + &stop, hidden.stopped));
    let late = whole(&mut engine, &request(Ends { min_tokens: 60, ..Ends::default() }));
    assert_eq!((late.text, late.finish), (text, Finish::Length));
    assert!(hidden.tokens.len() < 60);
}
