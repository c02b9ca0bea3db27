//! The reference backend against Hugging Face transformers' float32 forward on the same files: every stage, every position.

mod support {
    pub mod runs;
}

use apr_core::backend::KvType;
use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::reference::Reference;
use apr_core::hparams::Hparams;
use apr_core::probe::Recorder;
use support::runs::{Golden, Run, first_difference};

const TINY: &str = "tiny-qwen3moe.gguf";
const BOUND: f64 = 1e-4;

/// The first difference of a run on the 7-token golden.
fn difference_at_7(run: &mut Run<impl apr_core::backend::Backend>) -> Option<String> {
    let golden = Golden::read("tiny-7tok.safetensors");
    let (tokens, mut probe) = (golden.ids("tokens"), Recorder::all());
    run.step(&tokens, 0, tokens.len(), &mut probe);
    first_difference(&golden, &probe.seen, BOUND)
}

fn same(_: &mut Hparams) {}

#[test]
fn every_stage_of_7_tokens_equals_hugging_face() {
    assert_eq!(difference_at_7(&mut Run::new(Reference, TINY, KvType::F32, same)), None);
}

#[test]
fn the_unfused_decorator_computes_the_same() {
    let golden = Golden::read("tiny-7tok.safetensors");
    let mut probe = Recorder::all();
    Run::new(Reference, TINY, KvType::F32, same).step_unfused(&golden.ids("tokens"), &mut probe);
    assert_eq!(first_difference(&golden, &probe.seen, BOUND), None);
}

#[test]
fn every_golden_stage_is_shown() {
    let golden = Golden::read("tiny-7tok.safetensors");
    let mut probe = Recorder::all();
    Run::new(Reference, TINY, KvType::F32, same).step(&golden.ids("tokens"), 0, 7, &mut probe);
    let shown: Vec<String> = probe.seen.keys().map(|(il, stage)| stage.tensor_name(*il)).collect();
    for name in golden.names().filter(|n| !["tokens", "greedy"].contains(n)) {
        assert!(shown.iter().any(|s| s == name), "{name} is not shown");
    }
}

#[test]
fn greedy_tokens_equal_hugging_face() {
    let golden = Golden::read("tiny-7tok.safetensors");
    let expected = golden.ids("greedy");
    let mut run = Run::new(Reference, TINY, KvType::F32, same);
    assert_eq!(run.greedy(&golden.ids("tokens"), expected.len()), expected);
}

/// The last 8 of 1,024 positions, where a wrong RoPE base or KV position shows. Chunked as a server would.
fn difference_at_1024(run: &mut Run<impl apr_core::backend::Backend>) -> Option<String> {
    let golden = Golden::read("tiny-1024tok-last8.safetensors");
    let (tokens, mut probe) = (golden.ids("tokens"), Recorder::all());
    run.step(&tokens[..1016], 0, 0, &mut Recorder::of(&[]));
    run.step(&tokens[1016..], 1016, 8, &mut probe);
    first_difference(&golden, &probe.seen, BOUND)
}

#[test]
fn the_last_8_of_1024_positions_equal_hugging_face() {
    assert_eq!(difference_at_1024(&mut Run::new(Reference, TINY, KvType::F32, same)), None);
}

fn fault_shows(fault: Fault, at: &str) {
    let found = difference_at_7(&mut Run::new(Faulty(Reference, fault), TINY, KvType::F32, same));
    let found = found.unwrap_or_else(|| panic!("{fault:?} is noticed"));
    assert!(found.contains(at), "{fault:?} shows first at {at}: {found}");
}

#[test]
fn a_dropped_head_norm_shows() {
    fault_shows(Fault::DropHeadNorm, "q_post_rope");
}

#[test]
fn q6_k_read_as_q4_k_shows() {
    fault_shows(Fault::ReadQ6kAsQ4k, "blk.2.qkv_matmul");
}

#[test]
fn swapped_experts_show() {
    fault_shows(Fault::SwapExperts, "moe_expert_gate");
}

#[test]
fn skipped_renormalisation_shows() {
    fault_shows(Fault::SkipRenormalise, "moe_router");
}

#[test]
fn wrong_routings_show() {
    fault_shows(Fault::UniformWeights, "moe_router ");
    fault_shows(Fault::DropTopExpert, "moe_router ");
    fault_shows(Fault::RepeatExpert, "moe_router_indices");
    fault_shows(Fault::WrongExpert, "moe_router_indices");
}

#[test]
fn a_kv_position_off_by_one_shows() {
    fault_shows(Fault::KvOffByOne, "attention");
}

#[test]
fn a_wrong_rope_base_shows_at_position_1000() {
    let mut run = Run::new(Faulty(Reference, Fault::WrongRopeBase), TINY, KvType::F32, same);
    let found = difference_at_1024(&mut run).expect("a wrong RoPE base is noticed");
    assert!(found.contains("post_rope"), "{found}");
}
