//! What is told of prompts while they are computed. How likely their tokens were is what a pass over the same tokens alone gives,
//! whoever else is answered.

use safetensors::SafeTensors;

use super::*;
use crate::answer::Standing;
use crate::onlook;
use crate::session::{Logits, Part, Sequence};

/// Logits of every position, from one step over the tokens alone.
fn logits_alone(engine: &mut Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut sequence = Sequence::default();
    engine.session.step(&mut [Part { sequence: &mut sequence, tokens, logits: Logits::All }]).unwrap();
    engine.session.release(&mut sequence);
    let read = |i| {
        let mut row = Vec::new();
        engine.session.logits(i, &mut row).unwrap();
        row
    };
    (0..tokens.len()).map(read).collect()
}

/// Natural logarithm of each token's probability, in the plainest way.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
    logits.iter().map(|l| f64::from(*l) - largest - sum.ln()).collect()
}

/// Holds where the second and later `tokens` stand to the logits of the positions before them.
#[track_caller]
fn check_standings(standings: &[Standing], tokens: &[u32], logits: &[Vec<f32>], n_best: usize, bound: f64) {
    assert_eq!(standings.len() + 1, tokens.len(), "one for each token but the first");
    for ((standing, &token), logits) in standings.iter().zip(&tokens[1..]).zip(logits) {
        let expected = log_softmax(logits);
        assert_eq!((standing.chosen.token, standing.best.len()), (token, n_best));
        for ranked in standing.best.iter().chain([&standing.chosen]) {
            let error = (ranked.p.ln() - expected[ranked.token as usize]).abs();
            assert!(error < bound, "token {} is off by {error}", ranked.token);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if bound < 1e-6 {
            assert_eq!(order[standing.rank - 1], token, "its rank is its place in the order");
            let best: Vec<u32> = standing.best.iter().map(|r| r.token).collect();
            assert_eq!(best, order[..n_best]);
        }
    }
}

impl Told {
    fn standings(&self) -> Vec<Standing> {
        self.prompt.lock().unwrap().iter().flat_map(|step| step.standings.clone()).collect()
    }
}

#[test]
fn tokens_of_prompts_stand_where_a_pass_alone_puts_them() {
    let mut engine = load(400);
    let requests: Vec<Request> = (0..9u32)
        .map(|i| {
            // Prompts of 1 to 297 tokens, every third of which begins like the next.
            let prompt = (0..1 + 37 * i).map(|t| 100 + (t * 7 + i / 3) % 900).collect();
            let n_best_of_prompt = (i % 3 != 1).then_some(i as usize % 4);
            Request { n_best_of_prompt, ..request(prompt, 60 - 7 * (i as usize % 4), u64::from(i)) }
        })
        .collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    for n_kv_block in [1000, 8] {
        let mut batcher = Batcher::new(limits(4, n_kv_block));
        // The second time keys and values of all of them are there.
        for _ in 0..2 {
            let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
            run(&mut batcher, &mut engine);
            for ((request, told), want) in requests.iter().zip(&told).zip(&want) {
                check_same(told, want);
                let Some(n_best) = request.n_best_of_prompt else {
                    assert!(told.prompt.lock().unwrap().is_empty(), "nobody asked");
                    continue;
                };
                // Who is set back finds again what is scored already.
                assert!(n_kv_block == 8 || told.generated().n_cached == 0, "every position is computed");
                let logits = logits_alone(&mut engine, &request.prompt);
                check_standings(&told.standings(), &request.prompt, &logits, n_best, 1e-9);
            }
        }
        assert_eq!(batcher.counts.n_set_back > 0, n_kv_block == 8);
        check_empty(&mut batcher, &mut engine);
    }
}

#[test]
fn what_is_generated_stands_the_same_when_it_is_a_prompt() {
    let mut engine = load(400);
    let mut batcher = Batcher::new(limits(2, 1000));
    let asked = Request { n_best: Some(5), ..request((100..170).collect(), 90, 3) };
    let generated = submit(&mut batcher, &engine, &asked);
    run(&mut batcher, &mut engine);
    let pieces = generated.pieces.lock().unwrap();
    let standings: Vec<Standing> = pieces.iter().filter_map(|p| p.standing.clone()).collect();
    let prompt = [&asked.prompt[..], &generated.generated().tokens].concat();
    let scored = submit(&mut batcher, &engine, &Request { n_best_of_prompt: Some(5), ..request(prompt, 0, 1) });
    run(&mut batcher, &mut engine);
    assert_eq!(scored.standings()[69..], standings, "bit for bit");
}

#[test]
fn a_step_has_few_rows_of_logits_however_many_are_scored() {
    let mut engine = load(400);
    let mut batcher = Batcher::new(Limits { step_time: Duration::from_secs(1), ..limits(4, 1000) });
    for i in 0..4 {
        let asked = request((100 + 40 * i..400 + 40 * i).collect(), 2, 1);
        submit(&mut batcher, &engine, &Request { n_best_of_prompt: Some(0), ..asked });
    }
    let told = |batcher: &Batcher| batcher.running.iter().map(|r| r.answer.sequence.n_tokens()).sum::<usize>();
    while batcher.counts.n_generated_token == 0 {
        let before = told(&batcher);
        batcher.step(&mut engine).unwrap();
        let n = told(&batcher) - before;
        assert!(n <= LOGITS_CHUNK, "{n} rows of logits in a step");
    }
}

#[test]
fn the_reference_scores_as_hugging_face_does() {
    let fixture = |name: &str| format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(fixture("tiny-1024tok-last128-logits.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| golden.tensor(name).unwrap().data().chunks_exact(4).map(|b| b.try_into().unwrap());
    let tokens: Vec<u32> = words("tokens").map(u32::from_le_bytes).collect();
    let values: Vec<f32> = words("lm_head").map(f32::from_le_bytes).collect();
    let logits: Vec<Vec<f32>> = values.chunks(values.len() / 128).map(<[f32]>::to_vec).collect();
    let device = Device::Reference { activations: apr_core::backend::Precision::F32 };
    let options = EngineOptions { device, kv_type: KvType::F32, n_ctx: Some(1024) };
    let mut engine = Engine::load(Path::new(TINY), options).unwrap();
    let mut batcher = Batcher::new(limits(1, 100));
    let asked = Request { n_best_of_prompt: Some(3), ..request(tokens.clone(), 0, 1) };
    let told = submit(&mut batcher, &engine, &asked);
    run(&mut batcher, &mut engine);
    check_standings(&told.standings()[1024 - 128..], &tokens[1024 - 128..], &logits, 3, 1e-3);
}

#[test]
fn a_prompt_whose_logits_are_no_numbers_fails_and_nobody_else_does() {
    let mut engine = load(100);
    let asked = Request { n_best_of_prompt: Some(1), ..request((100..120).collect(), 5, 1) };
    let mut answer = Answer::new(&engine, asked, 5, Box::new(crate::speculate::NoSpeculation)).unwrap();
    let (part, onlooker) = answer.part(PREFILL_CHUNK, false);
    onlook::step(&mut *engine.session, &mut [part], &mut [onlooker]).unwrap();
    let residual = vec![f32::NAN; 20 * engine.hparams.n_embd];
    engine.session.step_output(&residual).unwrap();
    let failed = answer.prompt_step(&*engine.session, 0);
    assert!(matches!(failed, Err(GenerateError::Sampler(SamplerError::NotFinite { token: 0, .. }))), "{failed:?}");
}

#[test]
fn every_step_of_a_prompt_is_told_of_where_it_is_asked_for() {
    let mut engine = load(1000);
    let mut batcher = Batcher::new(limits(2, 1000));
    let asked = Request { show_progress: true, ..request((0..900).map(|t| 100 + t * 7 % 900).collect(), 4, 3) };
    let want = alone(&mut engine, &asked);
    for is_kept in [false, true] {
        let others = submit(&mut batcher, &engine, &request((700..760).collect(), 20, 1));
        let told = submit(&mut batcher, &engine, &asked);
        run(&mut batcher, &mut engine);
        check_same(&told, &want);
        let n_cached = told.generated().n_cached;
        assert_eq!(n_cached >= 850, is_kept, "{n_cached}");
        let steps = told.prompt.lock().unwrap();
        assert_eq!(steps.last().unwrap().n_done, 900);
        assert!(steps.is_sorted_by(|a, b| a.n_done < b.n_done && a.time <= b.time), "{steps:?}");
        assert!(steps.iter().all(|s| s.n_cached == n_cached && s.n_done > n_cached && s.standings.is_empty()));
        assert!(steps.len() > usize::from(!is_kept), "{steps:?}");
        assert!(others.prompt.lock().unwrap().is_empty(), "nobody asked");
    }
}
