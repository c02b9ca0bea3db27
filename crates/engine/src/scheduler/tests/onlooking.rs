//! Whoever looks on sees what a pass over the same tokens alone shows, and changes nothing.

use apr_core::probe::Recorder;
use apr_core::stage::Stage;

use super::*;
use crate::onlook::{self, Experts};
use crate::session::{Logits, Look, Part, Sequence};
use crate::speculate::Speculate;

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

#[test]
fn tokens_that_were_guessed_have_their_experts_too() {
    let mut engine = load(400);
    let request = Request { show_experts: true, ..request((100..140).collect(), 40, 3) };
    let want = alone(&mut engine, &request);
    let speculator = Box::new(Knows(want.tokens.clone(), 0));
    let mut answer = Answer::new(request.clone(), 40, speculator).unwrap();
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
