//! The demo model: that it is worth what its documentation says, and that this engine computes what Hugging Face transformers does.
//!
//! `tools/demo-model/evaluate.py` wrote the expectations: `results.json` and, of the quantized weights in float32, `golden.json`.

use std::fs;
use std::path::{Path, PathBuf};

use apr_engine::device::Device;
use apr_engine::session::{Logits, Part, Sequence};
use apr_engine::{Engine, EngineOptions, KvType, Precision};
use serde_json::Value;

/// Tokens between two `<|endoftext|>`, as the tool cuts the text.
const WINDOW: usize = 512;
/// What the CPU backend is held to on the tiny model's golden, whose weights are random.
const MEDIAN_KL_MAX: f64 = 0.0008;
/// Two logits this far apart do not trade places by rounding.
const CLEAR_MARGIN: f64 = 0.1;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(name: &str) -> String {
    fs::read_to_string(root().join("tools/demo-model").join(name)).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_str(&text(name)).unwrap()
}

fn demo(device: Device) -> Engine {
    Engine::load("demo".as_ref(), EngineOptions { device, kv_type: KvType::F16, n_ctx: None }).unwrap()
}

fn cpu() -> Engine {
    demo(Device::Cpu { n_threads: Some(2), isa: None })
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&v| f64::from(v - max).exp()).sum();
    logits.iter().map(|&v| f64::from(v - max) - sum.ln()).collect()
}

/// Log probabilities of the next token at every position.
fn log_probs(engine: &mut Engine, tokens: &[u32]) -> Vec<Vec<f64>> {
    let mut sequence = Sequence::default();
    engine.session.step(&mut [Part { sequence: &mut sequence, tokens, logits: Logits::All }]).unwrap();
    let mut logits = Vec::new();
    let row = |i| {
        engine.session.logits(i, &mut logits).unwrap();
        log_softmax(&logits)
    };
    let rows = (0..tokens.len()).map(row).collect();
    engine.session.release(&mut sequence);
    rows
}

/// Perplexity of the held-out text, and how many tokens it has.
fn perplexity(engine: &mut Engine) -> (f64, usize) {
    let start = engine.tokenizer.encode_bytes(b"<|endoftext|>", true);
    let tokens = engine.tokenizer.encode_bytes(text("heldout.txt").as_bytes(), false);
    let mut surprise = 0.0;
    for window in tokens.chunks(WINDOW) {
        let with_start = [&start, window].concat();
        let rows = log_probs(engine, &with_start[..window.len()]);
        surprise -= rows.iter().zip(window).map(|(row, &next)| row[next as usize]).sum::<f64>();
    }
    ((surprise / tokens.len() as f64).exp(), tokens.len())
}

#[test]
fn quantized_it_is_nearly_as_good_as_in_float32() {
    let results = json("results.json");
    let expected = |key: &str| results[key].as_f64().unwrap();
    let (got, n_tokens) = perplexity(&mut cpu());
    println!("perplexity {got:.3}; in float32 {:.3}", expected("perplexity_f32"));
    assert_eq!(n_tokens as u64, results["tokens"].as_u64().unwrap(), "the tokenizer is Hugging Face's");
    assert!(got <= 1.03 * expected("perplexity_f32"), "perplexity {got}, in float32 {}", expected("perplexity_f32"));
    let same = got / expected("perplexity_q4_k_m");
    assert!((same - 1.0).abs() <= 0.003, "{same} times Hugging Face's on the same weights");
    assert!(results["held_out"]["bits_per_byte"].as_f64().unwrap() <= 2.3);
}

/// KL divergence of `row` from a golden that tells the most likely tokens: all others count as one.
fn divergence(ids: &[Value], logprobs: &[Value], row: &[f64]) -> f64 {
    let (mut kl, mut rest, mut rest_got) = (0.0, 1.0, 1.0);
    for (id, expected) in ids.iter().zip(logprobs) {
        let (expected, got) = (expected.as_f64().unwrap(), row[id.as_u64().unwrap() as usize]);
        kl += expected.exp() * (expected - got);
        rest -= expected.exp();
        rest_got -= got.exp();
    }
    kl + if rest > 1e-4 { rest * (rest / rest_got).ln() } else { 0.0 }
}

/// The divergence at each position of the golden's first windows, in ascending order; panics where the most likely token is another one
/// and the golden is clear about it.
fn divergences(engine: &mut Engine, n_windows: usize) -> Vec<f64> {
    let mut all = Vec::new();
    for window in &json("golden.json").as_array().unwrap()[..n_windows] {
        let list = |key: &str| window[key].as_array().unwrap().clone();
        let tokens: Vec<u32> = list("tokens").iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let rows = log_probs(engine, &tokens);
        for ((at, ids), logprobs) in list("positions").iter().zip(list("ids")).zip(list("logprobs")) {
            let (row, ids) = (&rows[at.as_u64().unwrap() as usize], ids.as_array().unwrap());
            let logprobs = logprobs.as_array().unwrap();
            all.push(divergence(ids, logprobs, row));
            if logprobs[0].as_f64().unwrap() - logprobs[1].as_f64().unwrap() >= CLEAR_MARGIN {
                let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                assert_eq!(best as u64, ids[0].as_u64().unwrap(), "most likely token at position {at}");
            }
        }
    }
    assert_eq!(all.len(), 8 * n_windows);
    all.sort_by(f64::total_cmp);
    all
}

#[test]
fn the_next_token_is_distributed_as_by_hugging_face() {
    let on_cpu = divergences(&mut cpu(), 8);
    let reference = divergences(&mut demo(Device::Reference { activations: Precision::F32 }), 2);
    println!("median KL {:.2e}, largest {:.2e}; reference: largest {:.2e}", on_cpu[32], on_cpu[63], reference[15]);
    assert!(on_cpu[32] <= MEDIAN_KL_MAX, "median KL {}", on_cpu[32]);
    assert!(reference[15] <= 1e-4, "the reference differs by a KL of {}", reference[15]);
}

#[test]
fn the_documentation_tells_the_measured_figures() {
    let (results, page) = (json("results.json"), fs::read_to_string(root().join("docs/demo-model.md")).unwrap());
    let float = |value: &Value| value.as_f64().unwrap();
    let row = |name: &str, bits: &str, of: &Value, suffix: &str| {
        let key = |key: &str| float(&of[format!("{key}{suffix}")]);
        let figures = (key("median_kl"), key("mean_kl"), key("perplexity"));
        format!("| {name} | {bits} | {:.5} | {:.5} | {:.2} |", figures.0, figures.1, figures.2)
    };
    let mut rows = vec![row("Q4_K_M (the file)", "4.9", &results, "_q4_k_m")];
    for of in results["quant_types"].as_array().unwrap() {
        rows.push(row(of["type"].as_str().unwrap(), &format!("{:.1}", float(&of["bits"])), of, ""));
    }
    let missing: Vec<_> = rows.iter().filter(|row| !page.contains(*row)).collect();
    assert!(missing.is_empty(), "docs/demo-model.md lacks\n{}", rows.join("\n"));
    let bits = format!("{:.2} bits per byte", float(&results["held_out"]["bits_per_byte"]));
    assert!(page.contains(&bits), "docs/demo-model.md lacks {bits}");
    assert!(fs::read_to_string(root().join("README.md")).unwrap().contains(&bits), "the README lacks {bits}");
}
