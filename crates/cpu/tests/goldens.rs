//! The CPU backend against Hugging Face transformers' float32 forward on the same file.
//!
//! Activations are quantized to 8 bits here, so stages are not compared one by one: judged are the distribution of the next token
//! (median KL over positions; means and maxima are ruled by routing flips at near-ties), the most likely token where the reference is
//! clear about it, and the experts chosen where the reference is clear about them.

#[path = "../../core/tests/support/runs.rs"]
mod runs;

use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::{Backend, KvType};
use apr_core::probe::Recorder;
use apr_core::stage::Stage;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::{Isa, Kernels};
use runs::{Golden, Run, argmax, kl_divergence};

const TINY: &str = "tiny-qwen3moe.gguf";
const GOLDEN: &str = "tiny-1024tok-last128-logits.safetensors";
/// llama.cpp, with one activation scale per 256, has 0.0013 here.
const MEDIAN_KL_MAX: f64 = 0.0008;
/// Two logits this far apart do not trade places by rounding. Where a router's margin is smaller and its choice does flip, the
/// position goes through other experts from there on, and nothing later at that position can be compared.
const CLEAR_MARGIN: f32 = 0.1;
const N_LAYER: usize = 4;
const N_USED: usize = 2;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| {
        let has = Kernels::for_isa(isa).is_some();
        if !has {
            println!("skipped: needs a CPU with {isa}");
        }
        has
    })
}

/// The largest, and the largest beyond the first `k`, of `x`.
fn margin_after(x: &[f32], k: usize) -> f32 {
    let mut sorted = x.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[k - 1] - sorted[k]
}

fn last_128(isa: Isa, kv: KvType) -> (Golden, Recorder) {
    last_128_of(CpuBackend::new(2, Some(isa)).unwrap(), kv)
}

fn last_128_of(backend: impl Backend, kv: KvType) -> (Golden, Recorder) {
    let golden = Golden::read(GOLDEN);
    let (tokens, mut probe) = (golden.ids("tokens"), Recorder::of(&[Stage::LmHead, Stage::MoeRouterIndices]));
    let mut run = Run::new(backend, TINY, kv, |_| {});
    run.step(&tokens[..512], 0, 0, &mut Recorder::of(&[]));
    run.step(&tokens[512..896], 512, 0, &mut Recorder::of(&[]));
    run.step(&tokens[896..], 896, 128, &mut probe);
    (golden, probe)
}

fn median_kl(golden: &Golden, probe: &Recorder) -> f64 {
    let logits = &probe.seen[&(N_LAYER, Stage::LmHead)];
    let expected = golden.get("lm_head").unwrap().chunks_exact(golden.n_cols("lm_head"));
    let mut kl: Vec<f64> = expected.enumerate().map(|(i, e)| kl_divergence(e, logits.row(i))).collect();
    kl.sort_by(f64::total_cmp);
    kl[kl.len() / 2]
}

/// For each of the last 128 positions the layer at which an unclear choice of experts flipped, if one did.
///
/// Panics where a clear choice flipped before that.
fn flips(isa: Isa, golden: &Golden, probe: &Recorder) -> Vec<Option<usize>> {
    let mut flipped = vec![None; 128];
    for il in 0..N_LAYER {
        let router = Stage::MoeRouterLogits.tensor_name(il);
        let n_expert = golden.n_cols(&router);
        let ids = golden.ids(&Stage::MoeRouterIndices.tensor_name(il));
        let seen = &probe.seen[&(il, Stage::MoeRouterIndices)];
        let first = seen.positions.len() - 128;
        for (i, logits) in golden.get(&router).unwrap().chunks_exact(n_expert).enumerate() {
            let mut expected = ids[N_USED * i..N_USED * (i + 1)].to_vec();
            let mut got: Vec<u32> = seen.row(first + i).iter().map(|&id| id as u32).collect();
            expected.sort_unstable();
            got.sort_unstable();
            if got != expected && flipped[i].is_none() {
                let (margin, position) = (margin_after(logits, N_USED), seen.positions[first + i]);
                println!("{isa}: layer {il} position {position}: experts {got:?}, not {expected:?}, margin {margin}");
                assert!(margin < CLEAR_MARGIN, "a choice by {margin} is clear");
                flipped[i] = Some(il);
            }
        }
    }
    flipped
}

#[test]
fn the_next_token_is_distributed_as_in_float32() {
    for isa in isas() {
        let (golden, probe) = last_128(isa, KvType::F16);
        let kl = median_kl(&golden, &probe);
        println!("{isa}: median KL {kl:.6}");
        assert!(kl <= MEDIAN_KL_MAX, "{isa}: median KL {kl}, bound {MEDIAN_KL_MAX}");
        let flipped = flips(isa, &golden, &probe);
        assert!(flipped.iter().flatten().count() <= 6, "flips are rare: {flipped:?}");
        let logits = &probe.seen[&(N_LAYER, Stage::LmHead)];
        let expected = golden.get("lm_head").unwrap().chunks_exact(golden.n_cols("lm_head"));
        let clear = |i: usize, e: &[f32]| flipped[i].is_none() && margin_after(e, 1) >= CLEAR_MARGIN;
        for (i, e) in expected.enumerate().filter(|(i, e)| clear(*i, e)) {
            assert_eq!(
                argmax(logits.row(i)),
                argmax(e),
                "{isa}: most likely token at position {}",
                logits.positions[i]
            );
        }
    }
}

/// What the bound lets pass is rounding: faults that leave fluent text are beyond it.
#[test]
fn a_fault_is_outside_the_bound() {
    for fault in [Fault::SkipRenormalise, Fault::UniformWeights, Fault::DropHeadNorm, Fault::SwapExperts] {
        let (golden, probe) = last_128_of(Faulty(CpuBackend::new(2, None).unwrap(), fault), KvType::F16);
        let kl = median_kl(&golden, &probe);
        println!("{fault:?}: median KL {kl:.6}");
        assert!(kl > 5.0 * MEDIAN_KL_MAX, "{fault:?}: median KL {kl}, bound {MEDIAN_KL_MAX}");
    }
}

#[test]
fn every_kv_type_keeps_the_distribution() {
    for isa in isas() {
        for kv in [KvType::F32, KvType::Q8_0] {
            let (golden, probe) = last_128(isa, kv);
            let kl = median_kl(&golden, &probe);
            println!("{isa}, {kv}: median KL {kl:.6}");
            assert!(kl <= MEDIAN_KL_MAX, "{isa}, {kv}: median KL {kl}, bound {MEDIAN_KL_MAX}");
        }
    }
}

#[test]
fn every_stage_that_is_shown_exists() {
    let golden = Golden::read("tiny-7tok.safetensors");
    let backend = CpuBackend::new(1, None).unwrap();
    let stages: Vec<Stage> = Stage::all().filter(|&s| backend.shows(s)).collect();
    let mut probe = Recorder::all();
    Run::new(backend, TINY, KvType::F16, |_| {}).step(&golden.ids("tokens"), 0, 7, &mut probe);
    let dense_only = |s: Stage| s.name().starts_with("ffn_") && s != Stage::FfnNorm || s == Stage::QkvBias;
    for stage in stages.into_iter().filter(|&s| !dense_only(s)) {
        assert!(probe.seen.keys().any(|k| k.1 == stage), "{} is shown", stage.name());
    }
    assert!(probe.seen.keys().all(|k| !dense_only(k.1)), "no stage of a dense block in a model of experts");
}

/// Tiny files of every architecture, of widths that no block of 256 divides.
const ARCHITECTURES: [&str; 7] =
    ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"];

#[test]
fn every_architecture_continues_as_in_float32() {
    for isa in isas() {
        for name in ARCHITECTURES {
            let golden = Golden::read(&format!("arch/{name}.safetensors"));
            let (tokens, greedy) = (golden.ids("tokens"), golden.ids("greedy"));
            let backend = || CpuBackend::new(2, Some(isa)).unwrap();
            let mut run = Run::new(backend(), &format!("arch/{name}.gguf"), KvType::F16, |_| {});
            run.step(&tokens, 0, 2, &mut Recorder::of(&[]));
            let n_vocab = golden.n_cols("lm_head");
            for (got, expected) in run.logits().chunks(n_vocab).zip(golden.get("lm_head").unwrap().chunks(n_vocab)) {
                let kl = kl_divergence(expected, got);
                assert!(kl <= 0.002, "{isa} {name}: KL {kl}");
            }
            let mut run = Run::new(backend(), &format!("arch/{name}.gguf"), KvType::F16, |_| {});
            assert_eq!(run.greedy(&tokens, greedy.len()), greedy, "{isa} {name}: greedy tokens");
        }
    }
}
