//! The CUDA backend on the emulation against Hugging Face transformers' float32 forward on the same files.
//!
//! Activations are quantized to 8 bits here as on the CPU, so the same is judged: the distribution of the next token, the most likely
//! token where the reference is clear about it, and greedy continuations.

#[path = "support/devices.rs"]
mod devices;
#[path = "../../core/tests/support/runs.rs"]
mod runs;

use apr_core::backend::KvType;
use apr_core::backend::{Backend, Precision};
use apr_core::probe::Recorder;
use apr_core::stage::Stage;
use devices::Make;
use runs::{Golden, Run, kl_divergence};

const TINY: &str = "tiny-qwen3moe.gguf";
/// As the CPU backend's, whose activations have the same precision.
const MEDIAN_KL_MAX: f64 = 0.0008;
const N_LAYER: usize = 4;

/// Median KL from the golden over its last positions.
fn median_kl(backend: impl Backend, kv: KvType) -> f64 {
    let golden = Golden::read("tiny-1024tok-last128-logits.safetensors");
    let (tokens, mut probe) = (golden.ids("tokens"), Recorder::of(&[Stage::LmHead]));
    let mut run = Run::new(backend, TINY, kv, |_| {});
    run.step(&tokens[..512], 0, 0, &mut Recorder::of(&[]));
    run.step(&tokens[512..896], 512, 0, &mut Recorder::of(&[]));
    run.step(&tokens[896..], 896, 128, &mut probe);
    let logits = &probe.seen[&(N_LAYER, Stage::LmHead)];
    let expected = golden.get("lm_head").unwrap().chunks_exact(golden.n_cols("lm_head"));
    let mut kl: Vec<f64> = expected.enumerate().map(|(i, e)| kl_divergence(e, logits.row(i))).collect();
    kl.sort_by(f64::total_cmp);
    kl[kl.len() / 2]
}

fn the_next_token_is_distributed_as_in_float32(cuda: Make) {
    assert_eq!(cuda().precision(), Precision::Int8);
    let kl = median_kl(cuda(), KvType::F16);
    println!("median KL {kl:.6}");
    assert!(kl <= MEDIAN_KL_MAX, "median KL {kl}, bound {MEDIAN_KL_MAX}");
}

/// Tiny files of every architecture, of widths that no block of 256 divides.
const ARCHITECTURES: [&str; 7] =
    ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"];

fn every_architecture_continues_as_in_float32(cuda: Make) {
    for name in ARCHITECTURES {
        let golden = Golden::read(&format!("arch/{name}.safetensors"));
        let (tokens, greedy) = (golden.ids("tokens"), golden.ids("greedy"));
        let mut run = Run::new(cuda(), &format!("arch/{name}.gguf"), KvType::F16, |_| {});
        run.step(&tokens, 0, 2, &mut Recorder::of(&[]));
        let n_vocab = golden.n_cols("lm_head");
        for (got, expected) in run.logits().chunks(n_vocab).zip(golden.get("lm_head").unwrap().chunks(n_vocab)) {
            let kl = kl_divergence(expected, got);
            assert!(kl <= 0.002, "{name}: KL {kl}");
        }
        let mut run = Run::new(cuda(), &format!("arch/{name}.gguf"), KvType::F16, |_| {});
        assert_eq!(run.greedy(&tokens, greedy.len()), greedy, "{name}: greedy tokens");
    }
}

devices::on_every_device!(the_next_token_is_distributed_as_in_float32, every_architecture_continues_as_in_float32);
