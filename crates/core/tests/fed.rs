//! Passes fed with another pass's values: nothing changes by being fed with one's own, and a fault shows where it is made only.

#[path = "support/runs.rs"]
mod runs;

use std::collections::BTreeMap;

use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::fed::Feed;
use apr_core::backend::reference::Reference;
use apr_core::backend::rounded::Rounded;
use apr_core::backend::{KvType, Result};
use apr_core::batch::Batch;
use apr_core::probe::{Recorder, Recording};
use apr_core::stage::Stage;
use runs::{Run, relative_rms};

const TINY: &str = "tiny-qwen3moe.gguf";
const TOKENS: [u32; 7] = [100, 200, 300, 400, 500, 600, 700];

/// Feeds what a recorder saw.
struct Recorded(BTreeMap<(usize, Stage), Recording>);

impl Feed for Recorded {
    fn begin(&mut self, _: &Batch) {}
    fn has(&self, stage: Stage, layer: usize) -> bool {
        self.0.contains_key(&(layer, stage))
    }
    fn replace(&mut self, stage: Stage, layer: usize, _: usize, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&self.0[&(layer, stage)].values);
        Ok(())
    }
}

fn recorded() -> BTreeMap<(usize, Stage), Recording> {
    let mut all = Recorder::all();
    Run::new(Reference, TINY, KvType::F16, |_| {}).step(&TOKENS, 0, 7, &mut all);
    all.seen
}

/// Stages other than those inside attention, which are not fed.
fn fed_stages(seen: &BTreeMap<(usize, Stage), Recording>) -> impl Iterator<Item = (&(usize, Stage), &Recording)> {
    seen.iter().filter(|((_, stage), _)| ![Stage::AttnScores, Stage::AttnSoftmax].contains(stage))
}

#[test]
fn a_pass_fed_with_its_own_values_is_the_same_pass() {
    let plain = recorded();
    for unfused in [false, true] {
        let mut seen = Recorder::all();
        Run::new(Reference, TINY, KvType::F16, |_| {}).step_fed(
            &TOKENS,
            unfused,
            &mut Recorded(plain.clone()),
            &mut seen,
        );
        assert!(fed_stages(&plain).eq(seen.seen.iter()));
    }
}

#[test]
fn a_fault_shows_in_its_own_stage_only() {
    let plain = recorded();
    for (fault, stages) in [
        (Fault::DropHeadNorm, &[Stage::QPostRope, Stage::KPostRope][..]),
        (Fault::SkipRenormalise, &[Stage::MoeRouter]),
        (Fault::SwapExperts, &[Stage::MoeExpertGate, Stage::MoeExpertUp, Stage::MoeExpertOut]),
    ] {
        let mut seen = Recorder::all();
        let mut run = Run::new(Faulty(Reference, fault), TINY, KvType::F16, |_| {});
        run.step_fed(&TOKENS, false, &mut Recorded(plain.clone()), &mut seen);
        let mut differ: Vec<Stage> =
            fed_stages(&plain).filter(|(key, r)| **r != seen.seen[key]).map(|((_, stage), _)| *stage).collect();
        differ.sort();
        differ.dedup();
        assert_eq!(differ, stages, "{fault:?}");
    }
}

#[test]
fn rounding_shows_in_attention_and_products_with_quantized_weights_only() {
    let plain = recorded();
    let mut seen = Recorder::all();
    let mut run = Run::new(Rounded(Reference), TINY, KvType::F16, |_| {});
    run.step_fed(&TOKENS, false, &mut Recorded(plain.clone()), &mut seen);
    for (key, recording) in fed_stages(&plain) {
        use Stage::*;
        let rounds = matches!(
            key.1,
            QkvMatmul
                | AttnScores
                | AttnSoftmax
                | Attention
                | AttnOut
                | MoeExpertGate
                | MoeExpertUp
                | MoeExpertOut
                | LmHead
        );
        let error = relative_rms(&seen.seen[key].values, &recording.values);
        assert_eq!(error > 0.0, rounds, "{}: {error:e}", key.1.tensor_name(key.0));
        assert!(error < 0.01, "{}: {error:e}", key.1.tensor_name(key.0));
    }
}
