//! Whoever else is answered, and whatever is kept, set back or cancelled: an answer is the one that comes of it alone.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use apr_core::backend::KvType;
use apr_core::backend::faulty::{Fault, Faulty, LAST_POSITION, N_KV_BLOCK};
use apr_cpu::CpuBackend;
use proptest::prelude::*;

use super::*;
use crate::constraint::{Form, Grammar, Thought};
use crate::device::Device;
use crate::engine::EngineOptions;
use crate::generate::{Ends, generate};
use crate::sampler::{Sampler, SamplerConfig};
use crate::session::{self, SessionSettings};
use crate::speculate::Speculate;

mod onlooking;
mod scoring;
mod shadowing;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

fn load(n_ctx: usize) -> Engine {
    load_file(Path::new(TINY), n_ctx)
}

fn load_file(path: &Path, n_ctx: usize) -> Engine {
    let device = Device::Cpu { n_threads: Some(2), isa: None };
    Engine::load(path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(n_ctx) }).unwrap()
}

fn request(prompt: Vec<u32>, n: usize, seed: u64) -> Request {
    let sampler = SamplerConfig { temperature: 1.0, top_p: 0.95, seed: Some(seed), ..SamplerConfig::default() };
    let (stop, n_best) = (Vec::new(), None);
    Request {
        prompt,
        max_tokens: Some(n),
        sampler,
        stop,
        ignore_eos: true,
        ends: Ends::default(),
        show_control: false,
        speculate: true,
        constraint: None,
        n_best,
        n_best_of_prompt: None,
        show_progress: false,
        show_experts: false,
        trace: None,
        embed: false,
    }
}

fn limits(n_parallel: usize, n_kv_block: usize) -> Limits {
    Limits { n_parallel, n_queue: 100, n_kv_block, keep_prefixes: true, step_time: Duration::from_millis(5) }
}

/// What a listener was told.
#[derive(Default)]
struct Told {
    prompt: Mutex<Vec<PromptStep>>,
    pieces: Mutex<Vec<Piece>>,
    result: Mutex<Option<Result<Generated, GenerateError>>>,
    is_gone: AtomicBool,
    /// Pieces after which it breaks off.
    n_wanted: AtomicUsize,
}

impl Told {
    fn new() -> Arc<Told> {
        Arc::new(Told { n_wanted: AtomicUsize::new(usize::MAX), ..Told::default() })
    }

    fn n_pieces(&self) -> usize {
        self.pieces.lock().unwrap().len()
    }

    fn generated(&self) -> Generated {
        self.result.lock().unwrap().clone().expect("the answer has ended").unwrap()
    }

    fn has_ended(&self) -> bool {
        self.result.lock().unwrap().is_some()
    }
}

struct Ear(Arc<Told>);

impl Listener for Ear {
    fn prompt(&mut self, step: PromptStep) {
        assert!(!self.0.has_ended() && self.0.n_pieces() == 0, "the prompt comes first");
        self.0.prompt.lock().unwrap().push(step);
    }

    fn piece(&mut self, piece: Piece) -> ControlFlow<()> {
        assert!(!self.0.has_ended(), "nothing comes after the end");
        let mut pieces = self.0.pieces.lock().unwrap();
        pieces.push(piece);
        match pieces.len() >= self.0.n_wanted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn is_gone(&self) -> bool {
        self.0.is_gone.load(Ordering::Relaxed)
    }

    fn end(&mut self, result: Result<Generated, GenerateError>) {
        let before = self.0.result.lock().unwrap().replace(result);
        assert!(before.is_none(), "there is one end");
    }
}

/// Guesses three tokens, the last of them wrong.
struct Knows(Vec<u32>, usize);

impl Speculate for Knows {
    fn push(&mut self, _: u32) {
        self.1 += 1;
    }

    fn draft(&mut self, n_max: usize) -> Vec<u32> {
        let rest = self.0.iter().skip(self.1).take(2).copied().chain([7]);
        rest.take(n_max).collect()
    }

    fn stepped(&mut self, _: usize, _: Duration) {}
}

fn submit(batcher: &mut Batcher, engine: &Engine, request: &Request) -> Arc<Told> {
    let told = Told::new();
    batcher.submit(engine, request.clone(), Box::new(Ear(told.clone())));
    told
}

fn alone(engine: &mut Engine, request: &Request) -> Generated {
    generate(engine, request, &AtomicBool::new(false), &mut |_| {}).unwrap()
}

fn run(batcher: &mut Batcher, engine: &mut Engine) {
    for _ in 0..10_000 {
        if batcher.is_idle() {
            return;
        }
        batcher.step(engine).unwrap();
    }
    panic!("the batcher does not come to an end");
}

#[track_caller]
fn check_same(told: &Told, want: &Generated) {
    let got = told.generated();
    assert_eq!((&got.tokens, &got.text, got.finish), (&want.tokens, &want.text, want.finish));
    let pieces = told.pieces.lock().unwrap();
    assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), want.text);
    assert_eq!(pieces.iter().filter_map(|p| p.token).collect::<Vec<_>>(), want.tokens);
}

fn check_empty(batcher: &mut Batcher, engine: &mut Engine) {
    batcher.forget_prefixes(engine);
    assert_eq!(engine.session.n_kv_blocks(), 0, "every block is given back");
}

#[test]
fn answers_do_not_depend_on_who_else_is_answered() {
    let mut engine = load(400);
    let requests: Vec<Request> = (0..9)
        .map(|i| {
            let prompt = (0..20 + 37 * i).map(|t| 100 + (t * 7 + i / 3) % 900).collect();
            // A third of them are held to something.
            let form = Form::Json(serde_json::json!({"type": "array", "items": {"enum": ["a", "bc", 17]}}));
            let grammar = Grammar { thought: Thought::None, forms: vec![form] };
            let constraint = (i % 3 == 1).then(|| engine.constraints.compile(&grammar, "").unwrap());
            Request { constraint, ..request(prompt, 5 + 7 * (i as usize % 4), u64::from(i)) }
        })
        .collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    assert!(want.iter().skip(1).step_by(3).all(|w| w.text.starts_with('[')));
    // With room for all, and with so little that answers are set back again and again.
    for n_kv_block in [1000, 8] {
        let mut batcher = Batcher::new(limits(4, n_kv_block));
        let mut told = Vec::new();
        for r in &requests {
            told.push(submit(&mut batcher, &engine, r));
            (0..3).for_each(|_| batcher.step(&mut engine).unwrap());
            assert!(engine.session.n_kv_blocks() <= n_kv_block, "the limit of blocks holds");
        }
        run(&mut batcher, &mut engine);
        told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
        check_empty(&mut batcher, &mut engine);
    }
}

#[test]
fn answers_of_the_best_logits_are_those_of_all() {
    let mut engine = load(400);
    let warm = SamplerConfig { temperature: 0.7, top_k: 20, top_p: 0.8, seed: Some(3), ..SamplerConfig::default() };
    let samplers = [
        SamplerConfig { repetition_penalty: 1.05, ..warm.clone() },
        SamplerConfig { temperature: 2.0, top_k: 180, top_p: 1.0, presence_penalty: 1.5, ..warm.clone() },
        SamplerConfig { temperature: 1.0, top_k: 3, logit_bias: vec![(500, -1.0)], ..warm.clone() },
        SamplerConfig::default(),
        SamplerConfig { temperature: 0.0, frequency_penalty: 0.5, ..warm },
    ];
    let n_vocab = engine.session.n_vocab();
    let request = |(i, sampler): (u32, &SamplerConfig)| {
        let mut few = Sampler::new(sampler.clone()).unwrap();
        (100..164).for_each(|token| few.accept(token));
        assert!(few.n_wanted(n_vocab).is_some_and(|k| k < n_vocab), "{sampler:?}");
        let n = 90 - 11 * i as usize;
        Request { sampler: sampler.clone(), ..request((100 + i..150 + 3 * i).collect(), n, 0) }
    };
    let requests: Vec<Request> = (0..).zip(&samplers).map(request).collect();
    // Whoever wants to know how tokens stand looks at all logits.
    let all = |r: &Request| Request { n_best: Some(1), ..r.clone() };
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, &all(r))).collect();
    for (r, want) in requests.iter().zip(&want) {
        assert_eq!(alone(&mut engine, r).tokens, want.tokens, "{:?}", r.sampler);
    }
    // Each wants another number of them in the same step.
    let mut batcher = Batcher::new(limits(5, 1000));
    let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
    run(&mut batcher, &mut engine);
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
}

#[test]
fn a_neighbour_that_leaks_would_show() {
    let mut engine = load(400);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 400 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::NeighbourLeaks);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let requests: Vec<Request> = (0..4).map(|i| request((100 + i..150 + i).collect(), 30, u64::from(i))).collect();
    let mut batcher = Batcher::new(limits(4, 100));
    let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
    run(&mut batcher, &mut engine);
    let differs = |(r, told): (&Request, &Arc<Told>)| alone(&mut engine, r).tokens != told.generated().tokens;
    assert!(requests.iter().zip(&told).any(differs), "a token that sees its neighbours changes an answer");
}

#[test]
fn answers_that_grow_into_each_other_s_room_are_set_back_and_end_the_same() {
    let mut engine = load(400);
    let requests: Vec<Request> = (0..4).map(|i| request((100 + i..150 + i).collect(), 200, u64::from(i))).collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    let mut batcher = Batcher::new(limits(4, 8));
    let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
    run(&mut batcher, &mut engine);
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    assert!(batcher.load(&engine).n_set_back > 0);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn with_less_memory_than_was_promised_fewer_are_answered_at_a_time() {
    let mut engine = load(400);
    let mut requests: Vec<Request> = (0..4).map(|i| request((100 + i..150 + i).collect(), 200, u64::from(i))).collect();
    requests.push(request((300..350).collect(), 350, 9));
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 400 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::KvMemoryEnds);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let mut batcher = Batcher::new(limits(4, 100));
    // The last takes all that there is, what was kept of the others too.
    let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
    run(&mut batcher, &mut engine);
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    let load = batcher.load(&engine);
    assert!(load.n_set_back > 0);
    assert_eq!(load.n_kv_block, N_KV_BLOCK, "it is known from then on what may be had");
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn guesses_take_no_more_than_may_be_had() {
    let mut engine = load(400);
    let asked = request((100..220).collect(), 60, 1);
    let want = alone(&mut engine, &asked);
    let mut batcher = Batcher::new(limits(2, 4));
    submit(&mut batcher, &engine, &request((500..600).collect(), 5, 1));
    run(&mut batcher, &mut engine);
    assert_eq!(engine.session.n_kv_blocks(), 2, "they are kept");
    let told = Told::new();
    let speculator = Box::new(Knows(want.tokens.clone(), 0));
    let answer = Answer::new(&engine, asked, 60, speculator).unwrap();
    batcher.running.push(Running { answer, listener: Box::new(Ear(told.clone())), failed: None });
    while !batcher.is_idle() {
        batcher.step(&mut engine).unwrap();
        assert!(engine.session.n_kv_blocks() <= 4, "a guess takes a block of those kept");
    }
    check_same(&told, &want);
}

#[test]
fn embeddings_ride_along_and_are_the_same() {
    let mut engine = load(600);
    let text = |i: u32| (0..150 + 110 * i).map(|t| 100 + (t * 7 + i) % 900).collect::<Vec<u32>>();
    let chats: Vec<Request> = (0..3).map(|i| request(text(i), 30, u64::from(i))).collect();
    let embeds: Vec<Request> = (0..3).map(|i| Request::embedding(text(i))).collect();
    let requests: Vec<&Request> = chats.iter().zip(&embeds).flat_map(|(a, b)| [a, b]).collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    assert!(want[1].embedding.is_some() && want[0].embedding.is_none());
    // The last embedding is set back once, when a part of its text has been summed.
    for sets_back in [false, true] {
        let mut batcher = Batcher::new(limits(6, 1000));
        let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
        if sets_back {
            while batcher.running.last().is_none_or(|r| r.answer.sequence.n_tokens() == 0) {
                batcher.step(&mut engine).unwrap();
            }
            assert!(batcher.running.last().unwrap().answer.n_to_feed() > 0, "it is in the middle");
            batcher.set_back_last(&mut engine);
        }
        run(&mut batcher, &mut engine);
        for (told, want) in told.iter().zip(&want) {
            check_same(told, want);
            let bits = |g: &Generated| g.embedding.as_ref().map(|e| e.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            assert_eq!(bits(&told.generated()), bits(want));
        }
        assert_eq!(told[5].generated().n_cached, 0, "every position is computed, whatever is kept");
        check_empty(&mut batcher, &mut engine);
    }
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_not_computed_again() {
    let mut engine = load(600);
    let system: Vec<u32> = (0..300).map(|t| 100 + t * 3 % 1500).collect();
    let ask = |end: u32| request(system.iter().copied().chain([end, end + 1]).collect(), 4, 7);
    let want: Vec<Generated> = (0..4).map(|i| alone(&mut engine, &ask(i))).collect();
    let mut batcher = Batcher::new(limits(8, 100));
    // The first alone; then all at once, who find what the first left and wait for nobody.
    let told = submit(&mut batcher, &engine, &ask(0));
    run(&mut batcher, &mut engine);
    check_same(&told, &want[0]);
    assert_eq!(told.generated().n_cached, 0);
    let told: Vec<_> = (0..4).map(|i| submit(&mut batcher, &engine, &ask(i))).collect();
    run(&mut batcher, &mut engine);
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    // Four whole blocks and what is equal of the fifth: of the same prompt all but the last token.
    let cached: Vec<usize> = told.iter().map(|t| t.generated().n_cached).collect();
    assert_eq!(cached, [301, 300, 300, 300]);
    check_empty(&mut batcher, &mut engine);
    // All at once with nothing kept: one computes the beginning, the others take it over.
    let told: Vec<_> = (0..4).map(|i| submit(&mut batcher, &engine, &ask(i))).collect();
    run(&mut batcher, &mut engine);
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    let mut cached: Vec<usize> = told.iter().map(|t| t.generated().n_cached).collect();
    cached.sort_unstable();
    assert_eq!(cached, [0, 300, 300, 300]);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn a_follow_up_finds_the_answer_before_it() {
    let mut engine = load(600);
    let mut batcher = Batcher::new(limits(2, 100));
    let first = request((100..200).collect(), 100, 1);
    let told = submit(&mut batcher, &engine, &first);
    run(&mut batcher, &mut engine);
    let turn: Vec<u32> = first.prompt.iter().copied().chain(told.generated().tokens).chain(300..330).collect();
    let follow_up = request(turn, 10, 2);
    let told = submit(&mut batcher, &engine, &follow_up);
    run(&mut batcher, &mut engine);
    assert_eq!(told.generated().n_cached, 192);
    check_same(&told, &alone(&mut engine, &follow_up));
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut engine = load(2000);
    let mut batcher = Batcher::new(limits(2, 100));
    let long = submit(&mut batcher, &engine, &request((0..1800).map(|t| 100 + t % 1000).collect(), 4, 1));
    batcher.step(&mut engine).unwrap();
    let short = submit(&mut batcher, &engine, &request((100..120).collect(), 4, 2));
    batcher.step(&mut engine).unwrap();
    assert_eq!((short.n_pieces(), long.n_pieces()), (1, 0), "its prompt is in the next step");
    run(&mut batcher, &mut engine);
}

/// Tokens of every running answer that a step computes, where a step time is enough for `n_short` tokens of prompts.
fn step_tokens(batcher: &mut Batcher, engine: &mut Engine, n_short: usize) -> Vec<usize> {
    let fed = |b: &Batcher| b.running.iter().map(|r| r.answer.sequence.n_tokens()).collect::<Vec<_>>();
    batcher.prefill_tok_per_s = Some(n_short as f64 / batcher.limits.step_time.as_secs_f64());
    batcher.admit(engine);
    batcher.use_kept(engine);
    let before = fed(batcher);
    batcher.step(engine).unwrap();
    fed(batcher).iter().zip(&before).map(|(after, before)| after - before).collect()
}

fn long_prompt(begins_with: u32) -> Request {
    request((0..1800).map(|t| begins_with + t % 1000).collect(), 40, 1)
}

#[test]
fn a_step_that_nobody_gets_a_token_of_is_long_and_others_are_short() {
    let mut engine = load(2000);
    let mut batcher = Batcher::new(limits(4, 1000));
    let _long = submit(&mut batcher, &engine, &long_prompt(100));
    assert_eq!(step_tokens(&mut batcher, &mut engine, 10), [256], "the least of a long step");
    assert_eq!(step_tokens(&mut batcher, &mut engine, 60), [300], "five step times");
    assert_eq!(step_tokens(&mut batcher, &mut engine, 1000), [1024], "the most of any step");
    let _short = submit(&mut batcher, &engine, &request((300..350).collect(), 40, 2));
    // The short one ends, and who came first gets a quarter of a step time.
    assert_eq!(step_tokens(&mut batcher, &mut engine, 60), [15, 50]);
    assert_eq!(step_tokens(&mut batcher, &mut engine, 60), [60, 1], "somebody waits for a token");
    let _also = submit(&mut batcher, &engine, &request((500..570).collect(), 40, 2));
    assert_eq!(step_tokens(&mut batcher, &mut engine, 60), [15, 1, 45]);
    assert_eq!(step_tokens(&mut batcher, &mut engine, 60), [35, 1, 25]);
    run(&mut batcher, &mut engine);
}

#[test]
fn prompts_that_come_together_are_computed_together() {
    let mut engine = load(2000);
    let short = |i: u32, n: u32| request((0..n).map(|t| 100 + 200 * i + t).collect(), 4, 1);
    let mut batcher = Batcher::new(limits(9, 1000));
    let told: Vec<_> = (0..8).map(|i| submit(&mut batcher, &engine, &short(i, 64))).collect();
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [64; 8]);
    assert!(told.iter().all(|t| t.n_pieces() == 1));
    run(&mut batcher, &mut engine);
    batcher.forget_prefixes(&mut engine);
    // Not where the shorter would wait for more than twice as long.
    let _told: Vec<_> = [(0, 190), (1, 30)].map(|(i, n)| submit(&mut batcher, &engine, &short(i, n))).into();
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [20, 30]);
    run(&mut batcher, &mut engine);
}

#[test]
fn who_begins_alike_computes_only_what_differs() {
    let mut engine = load(2000);
    let system: Vec<u32> = (0..300).map(|t| 100 + t * 3 % 1500).collect();
    let ask = |i: u32| request(system.iter().copied().chain([50 + i; 20]).collect(), 100, 7);
    let want: Vec<Generated> = (0..4).map(|i| alone(&mut engine, &ask(i))).collect();
    let mut batcher = Batcher::new(limits(4, 100));
    let told: Vec<_> = (0..3).map(|i| submit(&mut batcher, &engine, &ask(i))).collect();
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [256, 0, 0], "one computes for all");
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [64, 0, 0]);
    // Beside the first, which is in its answer, from the middle of a block.
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [1, 20, 20]);
    run(&mut batcher, &mut engine);
    // After all have ended.
    let late = submit(&mut batcher, &engine, &ask(3));
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [20]);
    run(&mut batcher, &mut engine);
    told.iter().chain([&late]).zip(&want).for_each(|(told, want)| check_same(told, want));
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn room_for_a_copy_is_made_of_what_is_kept() {
    let mut engine = load(400);
    let ask = |i: u32| request((100..200).chain([50 + i; 20]).collect(), 20, 7);
    let want = alone(&mut engine, &ask(1));
    let mut batcher = Batcher::new(limits(2, 8));
    for asked in [ask(0), request((700..1000).collect(), 4, 1)] {
        submit(&mut batcher, &engine, &asked);
        run(&mut batcher, &mut engine);
    }
    assert_eq!(engine.session.n_kv_blocks(), 8, "all that may be had");
    let told = submit(&mut batcher, &engine, &ask(1));
    assert_eq!(step_tokens(&mut batcher, &mut engine, 50), [20]);
    run(&mut batcher, &mut engine);
    check_same(&told, &want);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn a_thread_that_fails_ends_what_it_was_to_answer() {
    let scheduler = Scheduler::start(load(400), limits(1, 100)).unwrap();
    let told: Vec<Arc<Told>> = (0..2).map(|_| Told::new()).collect();
    told.iter().for_each(|told| scheduler.submit(request((100..110).collect(), 300, 1), Box::new(Ear(told.clone()))));
    let answer: Option<()> = scheduler.with_engine(|_| panic!("a fault of the engine"));
    assert!(answer.is_none());
    while scheduler.is_alive() {
        std::thread::yield_now();
    }
    assert!(told.iter().all(|t| Arc::strong_count(t) == 1), "no listener is left waiting");
    let late = Told::new();
    scheduler.submit(request((100..110).collect(), 3, 1), Box::new(Ear(late.clone())));
    assert!(matches!(*late.result.lock().unwrap(), Some(Err(GenerateError::Failed))));
}

/// An engine whose device fails where a sequence comes to [`LAST_POSITION`].
fn failing() -> Engine {
    let mut engine = load(400);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 400 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::DeviceFails);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    engine
}

#[test]
fn a_device_that_fails_ends_every_answer_and_those_that_wait() {
    let mut engine = failing();
    let mut batcher = Batcher::new(limits(2, 100));
    // Alone none but the first would fail.
    let told: Vec<_> = [(190, 100), (10, 150), (10, 3)]
        .map(|(n_prompt, n)| submit(&mut batcher, &engine, &request((100..100 + n_prompt).collect(), n, 1)))
        .into();
    let failure = loop {
        if let Err(e) = batcher.step(&mut engine) {
            break e;
        }
    };
    assert!(!told.iter().any(|t| t.has_ended()), "nobody is told before the scheduler knows");
    batcher.fail_all(&mut engine, &failure);
    for (told, what) in told.iter().zip(["a device failed", "a device failed", "the engine has failed"]) {
        let result = told.result.lock().unwrap().clone().unwrap();
        assert!(result.unwrap_err().to_string().starts_with(what), "{what}");
    }
    assert_eq!(told[0].n_pieces(), LAST_POSITION as usize - 190 + 1, "what was computed before was handed over");
    assert!(batcher.is_idle());
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn a_scheduler_whose_device_fails_is_over() {
    let scheduler = Scheduler::start(failing(), limits(2, 100)).unwrap();
    assert!(scheduler.is_alive() && scheduler.failure().is_none());
    let submit = |n_prompt: u32| {
        let told = Told::new();
        scheduler.submit(request((100..100 + n_prompt).collect(), 100, 1), Box::new(Ear(told.clone())));
        while Arc::strong_count(&told) > 1 {
            std::thread::yield_now();
        }
        told
    };
    assert!(submit(190).has_ended());
    assert!(!scheduler.is_alive(), "whoever is told of a failure finds that nothing is answered");
    assert_eq!(scheduler.failure().unwrap().to_string(), "a device failed: it does not answer");
    let late = submit(10).result.lock().unwrap().clone();
    assert!(late.is_none_or(|result| matches!(result, Err(GenerateError::Failed))));
    assert!(scheduler.with_engine(|_| ()).is_none());
}

#[test]
fn who_is_gone_costs_nothing_more() {
    let mut engine = load(400);
    let mut batcher = Batcher::new(limits(2, 100));
    let stays = request((100..180).collect(), 30, 1);
    let want = alone(&mut engine, &stays);
    let told: Vec<_> = (0..6)
        .map(|i| submit(&mut batcher, &engine, &Request { prompt: (100 + i..300).collect(), ..stays.clone() }))
        .collect();
    let stays = submit(&mut batcher, &engine, &stays);
    batcher.step(&mut engine).unwrap();
    // In its prefill, while waiting, and in its answer.
    told[0].is_gone.store(true, Ordering::Relaxed);
    told[4].is_gone.store(true, Ordering::Relaxed);
    told[1].n_wanted.store(3, Ordering::Relaxed);
    run(&mut batcher, &mut engine);
    assert_eq!(told[0].generated().finish, Finish::Cancelled);
    assert_eq!((told[1].n_pieces(), told[1].generated().finish), (3, Finish::Cancelled));
    assert!(!told[4].has_ended(), "nobody was there to be told");
    check_same(&stays, &want);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn more_than_may_wait_are_refused_and_what_cannot_be_answered_says_why() {
    let mut engine = load(100);
    let mut batcher = Batcher::new(Limits { n_queue: 2, ..limits(1, 100) });
    let one = request((100..120).collect(), 3, 1);
    let too_long = submit(&mut batcher, &engine, &request((0..98).collect(), 3, 1));
    assert!(matches!(*too_long.result.lock().unwrap(), Some(Err(GenerateError::ContextOverflow { .. }))));
    let told: Vec<_> = (0..4).map(|_| submit(&mut batcher, &engine, &one)).collect();
    assert!(matches!(*told[3].result.lock().unwrap(), Some(Err(GenerateError::Busy { n_waiting: 3 }))));
    run(&mut batcher, &mut engine);
    told[..3].iter().for_each(|t| assert_eq!(t.generated().tokens.len(), 3));
}

#[test]
fn where_a_token_stands_is_told() {
    let mut engine = load(100);
    let mut batcher = Batcher::new(limits(1, 100));
    let asked = Request { n_best: Some(3), ..request((100..120).collect(), 8, 3) };
    let told = submit(&mut batcher, &engine, &asked);
    run(&mut batcher, &mut engine);
    for piece in told.pieces.lock().unwrap().iter() {
        let standing = piece.standing.as_ref().unwrap();
        assert_eq!((Some(standing.chosen.token), standing.best.len()), (piece.token, 3));
        assert!(standing.best.is_sorted_by(|a, b| a.p >= b.p) && standing.best[0].p >= standing.chosen.p);
        if let Some(same) = standing.best.iter().find(|b| Some(b.token) == piece.token) {
            assert!((same.p - standing.chosen.p).abs() < 1e-12);
        }
    }
}

#[test]
fn a_thread_answers_several_and_ends_when_nobody_asks() {
    let mut engine = load(400);
    let requests: Vec<Request> = (0..5).map(|i| request((100 + i..160).collect(), 20, u64::from(i))).collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    let scheduler = Scheduler::start(engine, limits(3, 100)).unwrap();
    let told: Vec<Arc<Told>> = requests.iter().map(|_| Told::new()).collect();
    for (r, told) in requests.iter().zip(&told) {
        scheduler.submit(r.clone(), Box::new(Ear(told.clone())));
    }
    while !told.iter().all(|t| t.has_ended()) {
        std::thread::yield_now();
    }
    assert_eq!(scheduler.with_engine(|engine| engine.session.n_ctx()), Some(400));
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    let endless = Told::new();
    scheduler.submit(request((100..110).collect(), 300, 1), Box::new(Ear(endless.clone())));
    scheduler.cancel_all();
    drop(scheduler);
    assert!(endless.has_ended());
}

#[test]
fn who_comes_does_not_keep_others_waiting_by_coming() {
    let scheduler = Scheduler::start(load(400), limits(2, 100)).unwrap();
    let told = Told::new();
    scheduler.submit(request((100..110).collect(), 3, 1), Box::new(Ear(told.clone())));
    let start = Instant::now();
    while !told.has_ended() {
        assert!(start.elapsed() < Duration::from_secs(10), "steps are run between what is asked for");
        scheduler.with_engine(|_| ()).unwrap();
    }
}

#[test]
fn what_is_kept_and_idle_is_no_room_beside_what_it_would_take() {
    let mut engine = load(400);
    // Three blocks are kept, two of them whole.
    let kept = request((100..250).collect(), 2, 1);
    let mut batcher = Batcher::new(limits(2, 8));
    submit(&mut batcher, &engine, &kept);
    run(&mut batcher, &mut engine);
    // Six blocks of another answer leave room for two.
    let other = request((300..650).collect(), 40, 2);
    let (want, want_kept) = (alone(&mut engine, &other), alone(&mut engine, &kept));
    let other = submit(&mut batcher, &engine, &other);
    batcher.step(&mut engine).unwrap();
    let again = submit(&mut batcher, &engine, &kept);
    for _ in 0..5 {
        batcher.step(&mut engine).unwrap();
    }
    assert_eq!((batcher.running.len(), batcher.waiting.len()), (1, 1), "three do not fit");
    run(&mut batcher, &mut engine);
    assert_eq!(batcher.load(&engine).n_set_back, 0);
    check_same(&other, &want);
    check_same(&again, &want_kept);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn what_was_done_is_counted() {
    let mut engine = load(400);
    let mut batcher = Batcher::new(Limits { n_queue: 1, ..limits(2, 20) });
    let asked = request((100..250).collect(), 10, 1);
    let told: Vec<_> = (0..4).map(|_| submit(&mut batcher, &engine, &asked)).collect();
    let load = batcher.load(&engine);
    assert_eq!((load.n_submitted, load.n_waiting, load.n_running), (4, 3, 0));
    run(&mut batcher, &mut engine);
    let generated: Vec<Generated> = told[..3].iter().map(|t| t.generated()).collect();
    let n_cached: usize = generated.iter().map(|g| g.n_cached).sum();
    let load = batcher.load(&engine);
    assert_eq!((load.n_running, load.n_waiting, load.n_kv_block), (0, 0, 20));
    assert_eq!(load.n_prompt_token, 3 * 150 - n_cached as u64);
    assert_eq!(load.n_generated_token, 30);
    assert_eq!((load.n_prefix_queried, load.n_prefix_hit), (450, n_cached as u64));
    assert!(n_cached >= 256, "two of three find two whole blocks at least");
    assert_eq!((load.n_cancelled, load.n_numerical_error, load.n_set_back), (0, 0, 0));
    let told = submit(&mut batcher, &engine, &asked);
    batcher.step(&mut engine).unwrap();
    let waits: Vec<_> = (0..2).map(|_| submit(&mut batcher, &engine, &asked)).collect();
    [&told, &waits[0], &waits[1]].iter().for_each(|t| t.is_gone.store(true, Ordering::Relaxed));
    batcher.step(&mut engine).unwrap();
    assert_eq!(batcher.load(&engine).n_cancelled, 3);
}

/// The tiny model, whose embedding of one token is not a number.
fn poisoned(token: usize, n_ctx: usize) -> Engine {
    const Q4_K_BLOCK: usize = 144;
    let mut bytes = std::fs::read(TINY).unwrap();
    let info = load(n_ctx).file.gguf.tensor("token_embd.weight").unwrap().clone();
    assert_eq!((info.qtype.name(), info.ne[0]), ("Q4_K", 256), "a row is a block");
    let at = info.offset as usize + token * Q4_K_BLOCK;
    bytes[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("poisoned.gguf");
    std::fs::write(&path, bytes).unwrap();
    load_file(&path, n_ctx)
}

#[test]
fn logits_that_are_not_numbers_end_their_own_answer_only() {
    let mut engine = poisoned(7, 400);
    let good: Vec<Request> = (0..3).map(|i| request((100 + i..180).collect(), 20, u64::from(i))).collect();
    let want: Vec<Generated> = good.iter().map(|r| alone(&mut engine, r)).collect();
    let bad = request((100..150).chain([7]).chain(150..160).collect(), 20, 9);
    // One looks at all logits, one at the best only.
    let few = Request { sampler: SamplerConfig { top_k: 20, ..bad.sampler.clone() }, ..bad.clone() };
    let mut batcher = Batcher::new(limits(4, 100));
    let mut told = vec![submit(&mut batcher, &engine, &good[0])];
    let spoiled = [bad, few].map(|bad| submit(&mut batcher, &engine, &bad));
    told.extend(good[1..].iter().map(|r| submit(&mut batcher, &engine, r)));
    run(&mut batcher, &mut engine);
    for spoiled in spoiled {
        let error = spoiled.result.lock().unwrap().take().unwrap().unwrap_err();
        assert!(matches!(error, GenerateError::Sampler(SamplerError::NotFinite { token: 0, .. })), "{error}");
        assert!(error.to_string().contains("apr trace shows where"), "{error}");
    }
    told.iter().zip(&want).for_each(|(told, want)| check_same(told, want));
    assert_eq!(batcher.load(&engine).n_numerical_error, 2);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn what_goes_on_is_told_while_nothing_does() {
    let scheduler = Scheduler::start(load(400), limits(1, 100)).unwrap();
    let told: Vec<Arc<Told>> = (0..3).map(|_| Told::new()).collect();
    for told in &told {
        scheduler.submit(request((100..160).collect(), 20, 1), Box::new(Ear(told.clone())));
        let load = scheduler.load();
        assert!(load.n_running + load.n_waiting > 0 || told.has_ended(), "what was submitted counts at once");
    }
    while !told.iter().all(|t| t.has_ended()) {
        std::thread::yield_now();
    }
    // The thread waits again once it has done this.
    scheduler.with_engine(|_| ()).unwrap();
    let load = scheduler.load();
    assert_eq!((load.n_running, load.n_waiting, load.n_submitted), (0, 0, 3));
    assert_eq!(load.n_generated_token, 60);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_comes_and_goes_no_block_is_lost(
        coming in prop::collection::vec((1..150usize, 1..40usize, 0..3u32, 0..6usize, prop::option::of(0..30usize)), 1..14),
        n_kv_block in 4..20usize,
        n_parallel in 1..5usize,
    ) {
        let mut engine = load(200);
        let mut batcher = Batcher::new(limits(n_parallel, n_kv_block));
        let mut all = Vec::new();
        for (i, &(n_prompt, n, kind, n_step, leaves)) in coming.iter().enumerate() {
            let prompt = (0..n_prompt as u32).map(|t| 100 + 300 * kind + t).collect();
            let asked = request(prompt, n, i as u64);
            let told = submit(&mut batcher, &engine, &asked);
            all.push((asked, told, leaves));
            for _ in 0..n_step {
                batcher.step(&mut engine).unwrap();
                for (_, told, leaves) in &all {
                    if leaves.is_some_and(|at| told.n_pieces() >= at) {
                        told.is_gone.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        run(&mut batcher, &mut engine);
        check_empty(&mut batcher, &mut engine);
        for (asked, told, leaves) in all.iter().filter(|(_, told, _)| told.has_ended()) {
            let want = alone(&mut engine, asked);
            let got = told.generated();
            prop_assert!(want.tokens.starts_with(&got.tokens));
            prop_assert!(leaves.is_some() || got.tokens == want.tokens);
        }
    }
}
