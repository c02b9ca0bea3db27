//! A loaded model held against the reference on a sample of layers and positions: what a check of a model too large to run through the
//! reference can afford.
//!
//! The model runs all of a prompt. The reference, exact and with its activations rounded as the model's device declares, then computes
//! the sampled layers at the sampled positions only, from the model's own inputs, keys and values.

use apr_core::backend::Precision;

use super::DiffError;
use super::measure::{Comparison, Measured};
pub use super::tape::Sample;
use super::tape::{MemoryTape, TapeFeed};
use super::verdict::{Culprit, Judge, Mode, Rule, Summary};
use crate::device::{self, Device};
use crate::engine::Engine;
use crate::session::{Sequence, Session, SessionSettings};
use crate::trace::pass::{self, PassLook};
use apr_core::probe::Watch;
use apr_core::stage::Place;

/// What the sample showed.
pub struct Judged {
    /// Every sampled place, in order of computation.
    pub places: Vec<(Place, Summary)>,
    /// Places whose error is more than the threshold times the noise, with the first such position.
    pub culprits: Vec<Culprit>,
}

/// Judges the engine's device on `tokens` by the reference.
///
/// # Errors
/// What a session refuses.
pub fn judge(engine: &mut Engine, tokens: &[u32], sample: &Sample, threshold: f64) -> Result<Judged, DiffError> {
    let mut tape = MemoryTape::new(sample);
    let mut sequence = Sequence::default();
    let look = PassLook { watch: &mut tape, unfused: false, feed: None };
    let session = &mut *engine.session;
    let run = pass::run(session, &mut sequence, tokens, &sample.positions, look, &mut |_, _| Ok(()));
    session.release(&mut sequence);
    run?;
    let precision = engine.session.precision();
    let mut exact = MemoryTape::new(sample);
    let mut errors = Comparison::sampled(&tape, tokens, sample);
    let mut feed = TapeFeed::sampled(&tape, sample);
    run_fed(engine, Precision::F32, tokens, sample, &mut super::sides::Both(&mut exact, &mut errors), &mut feed)?;
    let mut noise = Measured::new();
    if precision != Precision::F32 {
        let mut rounded = Comparison::sampled(&exact, tokens, sample);
        let mut feed = TapeFeed::sampled(&tape, sample);
        run_fed(engine, precision, tokens, sample, &mut rounded, &mut feed)?;
        noise = rounded.measured;
    }
    let judge = Judge::new(Rule::Ratio { threshold }, Mode::Isolated, &errors.measured, &noise, &[]);
    let places = errors.measured.keys().filter_map(|&place| Some((place, judge.summary(place)?))).collect();
    Ok(Judged { places, culprits: judge.culprits() })
}

/// A pass of the reference on the engine's file, fed.
fn run_fed(
    engine: &Engine,
    activations: Precision,
    tokens: &[u32],
    sample: &Sample,
    watch: &mut dyn Watch,
    feed: &mut TapeFeed<'_>,
) -> Result<(), DiffError> {
    let settings = SessionSettings { kv_type: engine.session.kv_type(), n_ctx: engine.session.n_ctx() };
    let (mut session, _) = device::open(Device::Reference { activations }, &engine.file, &engine.hparams, settings)?;
    let look = PassLook { watch, unfused: false, feed: Some(feed) };
    let session: &mut dyn Session = &mut *session;
    pass::run(session, &mut Sequence::default(), tokens, &sample.positions, look, &mut |_, _| Ok(()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use apr_core::backend::KvType;
    use apr_core::backend::faulty::{Fault, Faulty};
    use apr_core::hparams::Hparams;
    use apr_core::stage::Stage;
    use apr_cpu::CpuBackend;

    use super::*;
    use crate::engine::EngineOptions;
    use crate::session;

    const N_TOKENS: u32 = 400;

    fn engine() -> Engine {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
        let device = Device::Cpu { n_threads: Some(2), isa: None };
        Engine::load(&path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(1024) }).unwrap()
    }

    fn judged(engine: &mut Engine, layers: &[usize]) -> Judged {
        let tokens: Vec<u32> = (0..N_TOKENS).map(|i| ((i * 2_654_435) >> 7) % 2048).collect();
        let sample =
            Sample { layers: layers.to_vec(), positions: vec![1, 2, 60, N_TOKENS - 2, N_TOKENS - 1], n_layer: 4 };
        judge(engine, &tokens, &sample, 3.0).unwrap()
    }

    /// The places found in an engine whose session makes a mistake.
    fn found(fault: Option<Fault>, change: impl Fn(&mut Hparams)) -> Vec<String> {
        let mut engine = engine();
        let (mut h, settings) = (engine.hparams.clone(), SessionSettings { kv_type: KvType::F16, n_ctx: 1024 });
        change(&mut h);
        let cpu = CpuBackend::new(2, None).unwrap();
        engine.session = match fault {
            Some(fault) => session::load(Faulty(cpu, fault), &engine.file, &h, settings).unwrap(),
            None => session::load(cpu, &engine.file, &h, settings).unwrap(),
        };
        judged(&mut engine, &[0, 2, 3]).culprits.iter().map(|c| c.place.to_string()).collect()
    }

    #[test]
    fn a_sound_device_makes_the_noise_it_declares() {
        let judged = judged(&mut engine(), &[0, 2, 3]);
        assert!(judged.culprits.is_empty(), "{:?}", judged.culprits);
        let of = |stage| judged.places.iter().filter(move |(p, _)| p.stage == stage).map(|(p, s)| (p.layer(), s.ratio));
        for stage in [Stage::QkvMatmul, Stage::AttnOut, Stage::MoeExpertUp, Stage::MoeExpertOut] {
            let ratios: Vec<_> = of(stage).collect();
            assert_eq!(ratios.iter().map(|r| r.0).collect::<Vec<_>>(), [Some(0), Some(2), Some(3)]);
            assert!(ratios.iter().all(|(_, r)| (0.9..1.1).contains(r)), "{stage:?}: {ratios:?}");
        }
        assert!(of(Stage::LmHead).all(|(_, r)| (0.9..1.1).contains(&r)));
    }

    #[test]
    fn the_output_is_computed_from_the_last_layer_whether_or_not_that_is_sampled() {
        for layers in [&[0][..], &[1, 2], &[3], &[]] {
            let judged = judged(&mut engine(), layers);
            assert!(judged.culprits.is_empty(), "{layers:?}: {:?}", judged.culprits);
            assert!(judged.places.iter().any(|(p, s)| p.stage == Stage::LmHead && (0.9..1.1).contains(&s.ratio)));
        }
    }

    #[test]
    fn faults_are_found_where_they_are_made() {
        let of = |fault| found(Some(fault), |_| {});
        assert_eq!(of(Fault::DropHeadNorm)[..2], ["blk.0.q_post_rope", "blk.0.k_post_rope"]);
        assert_eq!(of(Fault::SkipRenormalise), ["blk.0.moe_router", "blk.2.moe_router", "blk.3.moe_router"]);
        assert_eq!(of(Fault::KvOffByOne), ["blk.0.attention", "blk.2.attention", "blk.3.attention"]);
        // A fused op keeps the gate to itself.
        assert_eq!(of(Fault::SwapExperts)[0], "blk.0.moe_expert_up");
        let wrong_base = found(None, |h| h.rope_base *= 10.0);
        assert_eq!(wrong_base[..2], ["blk.0.q_post_rope", "blk.0.k_post_rope"]);
    }
}
