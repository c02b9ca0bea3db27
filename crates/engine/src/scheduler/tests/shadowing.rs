//! Answers that are computed once more on the reference.

use super::*;
use crate::shadow::{N_TOKENS_MAX, Shadow, ShadowCounts};

/// Answers the requests one after the other, with every `every`-th replayed, until so many replays have been made.
fn counts(engine: Engine, every: u64, requests: &[Request], n_replayed: u64) -> ShadowCounts {
    let shadow = Shadow::start(&engine, every, |replay| assert!(replay.is_ok())).unwrap();
    let meter = shadow.meter();
    let scheduler = Scheduler::start_with(engine, limits(3, 100), Some(shadow)).unwrap();
    let start = Instant::now();
    let wait = |holds: &dyn Fn() -> bool| {
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", meter.counts());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let mut due = 0;
    for (i, request) in (1u64..).zip(requests) {
        let told = Told::new();
        scheduler.submit(request.clone(), Box::new(Ear(told.clone())));
        wait(&|| told.has_ended());
        // One at a time is replayed: the next waits for it, so that none is skipped.
        due = (i / every).min(n_replayed);
        wait(&|| meter.counts().n_replayed >= due);
    }
    assert_eq!(due, n_replayed);
    meter.counts()
}

fn short(n: u64) -> Vec<Request> {
    (0..n).map(|i| request((100 + i as u32..110 + i as u32).collect(), 6, i)).collect()
}

#[test]
fn every_so_manieth_answer_is_replayed_and_is_what_the_reference_gives_but_for_rounding() {
    let c = counts(load(400), 2, &short(6), 3);
    assert_eq!((c.n_replayed, c.n_failed, c.n_positions, c.n_above), (3, 0, 18, 0), "{c:?}");
    // A near tie of this model's router moves single positions further than rounding alone would.
    let mean = c.kld_sum / 18.0;
    assert!(mean > 0.0 && mean < 0.05 && c.kld_max >= mean && c.n_disagreeing < 9, "{c:?}");
}

#[test]
fn what_is_too_long_is_not_replayed() {
    let n = N_TOKENS_MAX as u32;
    let long = [request((100..100 + n).collect(), 4, 1), request((100..90 + n).collect(), 30, 1)];
    let c = counts(load(400), 1, &long, 0);
    assert_eq!(c, ShadowCounts::default());
}

#[test]
fn a_backend_that_errs_is_found() {
    let mut engine = load(400);
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 400 };
    let backend = Faulty(CpuBackend::new(2, None).unwrap(), Fault::SkipRenormalise);
    engine.session = session::load(backend, &engine.file, &engine.hparams, settings).unwrap();
    let c = counts(engine, 1, &short(2), 2);
    assert!(c.n_replayed == 2 && c.n_above > 0, "{c:?}");
}
