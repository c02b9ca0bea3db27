//! Every architecture and form of rotary embedding against Hugging Face transformers, on tiny files of uncommon shapes.

mod support {
    pub mod runs;
}

use apr_core::backend::KvType;
use apr_core::backend::reference::Reference;
use apr_core::hparams::Hparams;
use apr_core::probe::Recorder;
use apr_core::rope::{Pairing, Scaling};
use support::runs::{Golden, Run, first_difference};

/// The first stage of the last two positions that differs.
fn difference(name: &str, change: impl FnOnce(&mut Hparams)) -> Option<String> {
    let golden = Golden::read(&format!("arch/{name}.safetensors"));
    let (tokens, mut probe) = (golden.ids("tokens"), Recorder::all());
    let mut run = Run::new(Reference, &format!("arch/{name}.gguf"), KvType::F32, change);
    run.step(&tokens, 0, 2, &mut probe);
    first_difference(&golden, &probe.seen, 1e-4)
}

fn same(_: &mut Hparams) {}

/// Stages and greedy tokens equal Hugging Face's.
fn agrees(name: &str) {
    assert_eq!(difference(name, same), None, "{name}");
    let golden = Golden::read(&format!("arch/{name}.safetensors"));
    let expected = golden.ids("greedy");
    let mut run = Run::new(Reference, &format!("arch/{name}.gguf"), KvType::F32, same);
    assert_eq!(run.greedy(&golden.ids("tokens"), expected.len()), expected, "{name}: greedy tokens");
}

#[test]
fn qwen3moe_of_12_experts_top_3_one_kv_head_tied_without_rope_base() {
    agrees("qwen3moe-odd");
}

#[test]
fn qwen3_with_head_norms() {
    agrees("qwen3");
}

#[test]
fn qwen3_stretched_by_yarn() {
    agrees("qwen3-yarn");
}

#[test]
fn qwen2_with_biases() {
    agrees("qwen2");
}

#[test]
fn llama_rotating_adjacent_pairs() {
    agrees("llama");
}

#[test]
fn llama_with_frequency_factors() {
    agrees("llama3-ropefreqs");
}

#[test]
fn llama_stretched_linearly() {
    agrees("llama-linear");
}

fn shows(name: &str, change: impl FnOnce(&mut Hparams)) {
    assert!(difference(name, change).is_some(), "{name}: the fault is noticed");
}

#[test]
fn yarn_left_out_shows() {
    shows("qwen3-yarn", |h| h.rope_scaling = Scaling::None);
}

#[test]
fn linear_scaling_left_out_shows() {
    shows("llama-linear", |h| h.rope_scaling = Scaling::None);
}

#[test]
fn llama_rotated_in_halves_shows() {
    shows("llama", |h| h.pairing = Pairing::Halves);
}

#[test]
fn qwen_rotated_in_pairs_shows() {
    shows("qwen3", |h| h.pairing = Pairing::Adjacent);
}

#[test]
fn a_wrong_default_rope_base_shows() {
    shows("qwen3moe-odd", |h| h.rope_base = 1e4);
}
