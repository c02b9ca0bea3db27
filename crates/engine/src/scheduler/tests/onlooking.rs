//! Whoever looks on sees what a pass over the same tokens alone shows, and changes nothing.

use apr_core::probe::Recorder;
use apr_core::stage::Stage;

use super::*;
use crate::onlook::{self, Experts};
use crate::session::{Logits, Look, Part, Sequence};
use crate::trace::file::SavedTrace;
use crate::trace::served::{SaveAsk, ServedTrace, TraceAsk};
use crate::trace::{SaveRequest, TraceRequest, header_of, trace};

/// Experts of every position of a pass over the tokens alone.
fn experts_alone(engine: &mut Engine, tokens: &[u32]) -> Vec<Experts> {
    let mut recorder = Recorder::of(&[Stage::MoeRouterIndices]);
    let mut sequence = Sequence::default();
    let part = Part { sequence: &mut sequence, tokens, logits: Logits::All };
    let look = Look { watch: &mut recorder, unfused: false, feed: None };
    engine.session.step_watched(&mut [part], look).unwrap();
    engine.session.release(&mut sequence);
    let of = |i: usize| Experts {
        layers: recorder.seen.values().map(|r| r.row(i).iter().map(|id| *id as u32).collect()).collect(),
    };
    (0..tokens.len()).map(of).collect()
}

/// Holds the experts of an answer's pieces to those of a pass alone.
#[track_caller]
fn check_experts(engine: &mut Engine, request: &Request, pieces: &[Piece]) {
    let tokens: Vec<u32> = pieces.iter().filter_map(|p| p.token).collect();
    let want = experts_alone(engine, &[&request.prompt[..], &tokens].concat());
    let got: Vec<&Experts> = pieces.iter().filter_map(|p| p.experts.as_ref()).collect();
    let from = request.prompt.len() - 1;
    assert_eq!(got, want[from..from + tokens.len()].iter().collect::<Vec<_>>());
    assert!(got.iter().all(|e| e.layers.len() == engine.hparams.n_layer && e.layers.iter().all(|l| l.len() > 1)));
}

#[test]
fn experts_are_those_of_the_tokens_whoever_else_is_answered() {
    let mut engine = load(400);
    let requests: Vec<Request> = (0..6u32)
        .map(|i| {
            let prompt = (0..20 + 37 * i).map(|t| 100 + (t * 7 + i / 3) % 900).collect();
            Request { show_experts: i % 2 == 0, ..request(prompt, 5 + 7 * (i as usize % 4), u64::from(i)) }
        })
        .collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    for n_kv_block in [1000, 8] {
        let mut batcher = Batcher::new(limits(4, n_kv_block));
        let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
        run(&mut batcher, &mut engine);
        for ((request, told), want) in requests.iter().zip(&told).zip(&want) {
            check_same(told, want);
            let pieces = told.pieces.lock().unwrap();
            match request.show_experts {
                true => check_experts(&mut engine, request, &pieces),
                false => assert!(pieces.iter().all(|p| p.experts.is_none()), "nobody asked"),
            }
        }
        check_empty(&mut batcher, &mut engine);
    }
}

#[test]
fn tokens_that_were_guessed_have_their_experts_too() {
    let mut engine = load(400);
    let request = Request { show_experts: true, ..request((100..140).collect(), 40, 3) };
    let want = alone(&mut engine, &request);
    let speculator = Box::new(Knows(want.tokens.clone(), 0));
    let mut answer = Answer::new(&engine, request.clone(), 40, speculator).unwrap();
    let mut pieces = Vec::new();
    while !answer.is_done() {
        let (part, onlooker) = answer.part(PREFILL_CHUNK, true);
        onlook::step(&mut *engine.session, &mut [part], &mut [onlooker]).unwrap();
        let mut on_piece = |piece| {
            pieces.push(piece);
            ControlFlow::Continue(())
        };
        answer.stepped(&*engine.session, &engine.tokenizer, 0, None, &mut on_piece).unwrap();
    }
    engine.session.release(&mut answer.sequence);
    let got = answer.into_generated();
    assert!(got.speculation.n_accepted > 10 && got.speculation.n_drafted > got.speculation.n_accepted);
    assert_eq!(got.tokens, want.tokens);
    check_experts(&mut engine, &request, &pieces);
}

/// The result of an answer whose trace is written on a thread of its own.
#[track_caller]
fn traced(told: &Told) -> (Generated, ServedTrace) {
    let start = Instant::now();
    while !told.has_ended() {
        assert!(start.elapsed() < Duration::from_secs(20), "the trace is written");
        std::thread::sleep(Duration::from_millis(1));
    }
    let generated = told.generated();
    let trace = generated.trace.clone().expect("a trace was asked for");
    (generated, *trace)
}

/// Holds a served trace, and its file, to those that `apr trace` makes of the same tokens alone.
#[track_caller]
fn check_trace(engine: &mut Engine, served: &ServedTrace, dir: &Path) {
    let saved = SavedTrace::open(served.saved.as_ref().unwrap().as_ref().unwrap()).unwrap();
    let n = served.header.tokens.len() as u32;
    let save = SaveRequest {
        path: dir.join("alone.safetensors"),
        places: saved.places().collect(),
        positions: 0..n,
        header: header_of(engine),
    };
    let request = TraceRequest {
        prompt: served.header.tokens.clone(),
        n_decode: 0,
        positions: 0..n,
        unfused: false,
        detailed: false,
        save: Some(save),
    };
    let alone = trace(engine, &request).unwrap();
    assert_eq!(served.stats.stages, alone.stats.stages);
    assert_eq!(served.stats.routers, alone.stats.routers);
    let alone = SavedTrace::open(&alone.saved.unwrap()).unwrap();
    assert_eq!(saved.header.positions, alone.header.positions);
    assert_eq!((&saved.header.tokens, &saved.header), (&alone.header.tokens, &served.header));
    assert!(saved.places().count() > 40, "all that the device shows");
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for place in alone.places() {
        assert_eq!(saved.shape(place), alone.shape(place), "{place}");
        for position in 0..n {
            assert!(saved.read(place, position, &mut a) && alone.read(place, position, &mut b));
            assert!(a.iter().map(|v| v.to_bits()).eq(b.iter().map(|v| v.to_bits())), "{place} at {position}");
        }
    }
}

fn ask(dir: &Path, i: u32) -> TraceAsk {
    let path = dir.join(format!("{i}.safetensors"));
    TraceAsk { save: Some(SaveAsk { path, stages: None, max_bytes: 1 << 30 }) }
}

#[test]
fn a_served_request_s_trace_is_the_trace_of_its_tokens() {
    let mut engine = load(400);
    let dir = tempfile::tempdir().unwrap();
    let requests: Vec<Request> = (0..6u32)
        .map(|i| {
            let prompt = (0..20 + 37 * i).map(|t| 100 + (t * 7 + i / 3) % 900).collect();
            request(prompt, 5 + 7 * (i as usize % 4), u64::from(i))
        })
        .collect();
    let want: Vec<Generated> = requests.iter().map(|r| alone(&mut engine, r)).collect();
    // With room for all, and with so little that answers are set back and computed again.
    for n_kv_block in [1000, 7] {
        let mut batcher = Batcher::new(limits(4, n_kv_block));
        let with_trace = |(i, r): (u32, &Request)| match i % 2 {
            1 => Request { trace: Some(ask(dir.path(), i)), show_experts: i == 3, ..r.clone() },
            _ => r.clone(),
        };
        let requests: Vec<Request> = (0..).zip(&requests).map(with_trace).collect();
        let told: Vec<_> = requests.iter().map(|r| submit(&mut batcher, &engine, r)).collect();
        run(&mut batcher, &mut engine);
        for ((request, told), want) in requests.iter().zip(&told).zip(&want) {
            if request.trace.is_some() {
                let (generated, trace) = traced(told);
                assert_eq!((generated.n_cached, trace.header.n_prompt), (0, request.prompt.len()));
                assert_eq!(trace.header.tokens.len(), request.prompt.len() + want.tokens.len() - 1);
                check_trace(&mut engine, &trace, dir.path());
                std::fs::remove_file(trace.saved.unwrap().unwrap()).unwrap();
            }
            check_same(told, want);
            if request.show_experts {
                check_experts(&mut engine, request, &told.pieces.lock().unwrap());
            }
        }
        check_empty(&mut batcher, &mut engine);
    }
}

#[test]
fn a_request_that_is_traced_does_not_use_what_is_kept_and_leaves_it_for_others() {
    let mut engine = load(400);
    let mut batcher = Batcher::new(limits(4, 1000));
    let plain = request((100..300).collect(), 4, 1);
    let tracing = Request { trace: Some(TraceAsk::default()), ..plain.clone() };
    let n_cached = |batcher: &mut Batcher, engine: &mut Engine, request: &Request| {
        let told = submit(batcher, engine, request);
        run(batcher, engine);
        match request.trace.is_some() {
            true => traced(&told).0.n_cached,
            false => told.generated().n_cached,
        }
    };
    assert_eq!(n_cached(&mut batcher, &mut engine, &tracing), 0);
    assert_eq!(n_cached(&mut batcher, &mut engine, &plain), 192);
    assert_eq!(n_cached(&mut batcher, &mut engine, &tracing), 0);
    check_empty(&mut batcher, &mut engine);
}

#[test]
fn a_trace_that_cannot_be_is_refused_or_told_of_and_costs_no_answer() {
    let mut engine = load(400);
    let dir = tempfile::tempdir().unwrap();
    let plain = request((100..140).collect(), 9, 1);
    let want = alone(&mut engine, &plain);
    let save = |change: &dyn Fn(&mut SaveAsk)| {
        let mut ask = ask(dir.path(), 0);
        ask.save.iter_mut().for_each(change);
        Request { trace: Some(ask), ..plain.clone() }
    };
    let mut batcher = Batcher::new(limits(4, 1000));
    for (request, word) in [
        (save(&|ask| ask.max_bytes = 1000), "1000"),
        (save(&|ask| ask.stages = Some(vec![Stage::FfnOut])), "ffn_out"),
        (save(&|ask| ask.stages = Some(vec![Stage::AttnScores])), "attn_scores"),
    ] {
        let told = submit(&mut batcher, &engine, &request);
        let e = told.result.lock().unwrap().take().unwrap().unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
    std::fs::write(dir.path().join("0.safetensors"), "mine").unwrap();
    for request in [save(&|_| ()), save(&|ask| ask.path = dir.path().join("no/such.safetensors"))] {
        let told = submit(&mut batcher, &engine, &request);
        run(&mut batcher, &mut engine);
        let (_, trace) = traced(&told);
        check_same(&told, &want);
        assert!(trace.saved.unwrap().is_err() && !trace.stats.stages.is_empty());
    }
    assert_eq!(std::fs::read(dir.path().join("0.safetensors")).unwrap(), b"mine", "nothing is written over");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_neighbour_that_leaks_would_show_in_a_trace() {
    let mut engine = load(400);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 400 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::NeighbourLeaks);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let asked = Request { trace: Some(TraceAsk::default()), ..request((100..150).collect(), 10, 1) };
    let mut batcher = Batcher::new(limits(4, 100));
    let told = submit(&mut batcher, &engine, &asked);
    let other = submit(&mut batcher, &engine, &request((200..250).collect(), 10, 2));
    run(&mut batcher, &mut engine);
    assert!(other.has_ended());
    let (_, served) = traced(&told);
    let n = served.header.tokens.len() as u32;
    let prompt = served.header.tokens;
    let request = TraceRequest { prompt, n_decode: 0, positions: 0..n, unfused: false, detailed: false, save: None };
    assert_ne!(served.stats.stages, trace(&mut engine, &request).unwrap().stats.stages);
}
