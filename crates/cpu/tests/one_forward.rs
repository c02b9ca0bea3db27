//! The same numbers however a pass is run, bit for bit on one instruction set: threads, probe, chunking, batch.

#[path = "../../core/tests/support/runs.rs"]
mod runs;

use apr_core::backend::KvType;
use apr_core::backend::reference::Reference;
use apr_core::probe::Recorder;
use apr_core::stage::Stage;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::{Isa, Kernels};
use runs::{Run, relative_rms};

const TINY: &str = "tiny-qwen3moe.gguf";

fn none() -> Recorder {
    Recorder::of(&[])
}

/// A few hundred tokens that visit all experts; enough for several KV tiles.
fn prompt(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % 2000).collect()
}

fn cpu(isa: Isa, n_threads: usize) -> Run<CpuBackend> {
    kv_cpu(isa, n_threads, KvType::F16)
}

fn kv_cpu(isa: Isa, n_threads: usize, kv: KvType) -> Run<CpuBackend> {
    Run::new(CpuBackend::new(n_threads, Some(isa)).unwrap(), TINY, kv, |_| {})
}

fn isas() -> Vec<Isa> {
    let (there, missing): (Vec<_>, Vec<_>) = Isa::ALL.into_iter().partition(|&isa| Kernels::for_isa(isa).is_some());
    missing.iter().for_each(|isa| println!("skipped: needs a CPU with {isa}"));
    there
}

/// All logits of a prompt in one step.
fn whole(mut run: Run<CpuBackend>, tokens: &[u32], probe: &mut Recorder) -> Vec<f32> {
    run.step(tokens, 0, tokens.len(), probe);
    run.logits()
}

fn assert_same(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let differ = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differ, None, "{what}: bitwise the same");
}

#[test]
fn threads_do_not_matter() {
    let tokens = prompt(150, 1);
    for isa in isas() {
        let one = whole(cpu(isa, 1), &tokens, &mut none());
        for n in 2..=4 {
            assert_same(&whole(cpu(isa, n), &tokens, &mut none()), &one, &format!("{isa}, {n} threads"));
        }
    }
}

#[test]
fn a_probe_does_not_matter() {
    let tokens = prompt(70, 2);
    for isa in isas() {
        let (plain, probed) =
            (whole(cpu(isa, 2), &tokens, &mut none()), whole(cpu(isa, 2), &tokens, &mut Recorder::all()));
        assert_same(&probed, &plain, &format!("{isa}"));
    }
}

#[test]
fn chunks_of_a_prefill_and_single_decodes_do_not_matter() {
    let tokens = prompt(140, 3);
    for isa in isas() {
        for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
            let one = whole(kv_cpu(isa, 2, kv), &tokens, &mut none());
            for cuts in [vec![1, 2, 63, 64, 65, 129], vec![64, 128], vec![100], (1..140).collect()] {
                let mut run = kv_cpu(isa, 2, kv);
                let (mut from, mut logits) = (0, Vec::new());
                for to in cuts.iter().copied().chain([140]) {
                    run.step(&tokens[from..to], from, to - from, &mut none());
                    logits.extend(run.logits());
                    from = to;
                }
                assert_same(&logits, &one, &format!("{isa}, {kv}, {} chunks", cuts.len() + 1));
            }
        }
    }
}

/// A long prefill takes a context at once, a decode in parts that threads share.
#[test]
fn parts_of_a_long_context_do_not_matter() {
    let tokens = prompt(1080, 10);
    let last = |isa, n_threads, kv, cut: usize| {
        let mut run = kv_cpu(isa, n_threads, kv);
        run.step(&tokens[..cut], 0, 0, &mut none());
        for at in cut..tokens.len() {
            run.step(&tokens[at..=at], at, 1, &mut none());
        }
        run.logits()
    };
    for isa in isas() {
        for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
            let mut whole = kv_cpu(isa, 2, kv);
            whole.step(&tokens, 0, 1, &mut none());
            let whole = whole.logits();
            for n_threads in if kv == KvType::F16 { 1..=4 } else { 3..=3 } {
                let cut = tokens.len() - n_threads;
                assert_same(&last(isa, n_threads, kv, cut), &whole, &format!("{isa}, {kv}, {n_threads} threads"));
            }
        }
    }
}

#[test]
fn single_decodes_do_not_matter_in_any_architecture() {
    for isa in isas() {
        for name in ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"] {
            let make =
                || Run::new(CpuBackend::new(2, Some(isa)).unwrap(), &format!("arch/{name}.gguf"), KvType::Q8_0, |_| {});
            let tokens: Vec<u32> = (0..70).map(|i| i * 7 % 250).collect();
            let one = whole(make(), &tokens, &mut none());
            let (mut run, mut logits) = (make(), Vec::new());
            for (i, token) in tokens.iter().enumerate() {
                run.step(std::slice::from_ref(token), i, 1, &mut none());
                logits.extend(run.logits());
            }
            assert_same(&logits, &one, &format!("{isa} {name}"));
        }
    }
}

#[test]
fn rows_without_logits_do_not_matter() {
    let tokens = prompt(90, 4);
    for isa in isas() {
        let all = whole(cpu(isa, 2), &tokens, &mut none());
        let mut run = cpu(isa, 2);
        run.step(&tokens, 0, 1, &mut none());
        assert_same(&run.last_logits(), &all[89 * 2048..], &format!("{isa}"));
    }
}

#[test]
fn a_user_in_a_batch_gets_what_a_user_alone_gets() {
    let (a, b, c) = (prompt(70, 5), prompt(33, 6), prompt(130, 7));
    for isa in isas() {
        let alone: Vec<Vec<f32>> = [&a, &b, &c].iter().map(|t| whole(cpu(isa, 1), t, &mut none())).collect();
        let mut run = cpu(isa, 2);
        // Two prefills, then a decode of the first beside a prefill chunk of the third and the rest of the second.
        run.step_many(&[(0, &a[..69], 0, 0), (2, &c[..100], 0, 0)], &mut none());
        run.step_many(&[(1, &b, 0, 1), (0, &a[69..], 69, 1), (2, &c[100..], 100, 1)], &mut none());
        let together = run.logits();
        for (i, alone) in [&alone[1], &alone[0], &alone[2]].into_iter().enumerate() {
            let got = &together[i * 2048..(i + 1) * 2048];
            assert_same(got, &alone[alone.len() - 2048..], &format!("{isa}, row {i}"));
        }
    }
}

#[test]
fn fused_and_unfused_agree() {
    let tokens = prompt(40, 8);
    for isa in isas() {
        let fused = whole(cpu(isa, 2), &tokens, &mut none());
        let mut unfused = cpu(isa, 2);
        unfused.step_unfused(&tokens, &mut none());
        let error = relative_rms(&unfused.logits(), &fused);
        assert!(error <= 1e-5, "{isa}: relative RMS {error:e}");
    }
}

/// Where a router hardly prefers one expert to another, rounding may choose, and the row goes through other weights from there on:
/// such rows are few, and all others agree.
#[test]
fn instruction_sets_agree() {
    let tokens = prompt(40, 9);
    let run = |isa| {
        let mut routed = Recorder::of(&[Stage::MoeRouterIndices]);
        (whole(cpu(isa, 2), &tokens, &mut routed), routed)
    };
    let (scalar, expected) = run(Isa::Scalar);
    for isa in isas() {
        let (logits, routed) = run(isa);
        let differs = |row: &usize| routed.seen.iter().any(|(at, seen)| seen.row(*row) != expected.seen[at].row(*row));
        let others: Vec<usize> = (0..tokens.len()).filter(differs).collect();
        assert!(others.len() <= 2, "{isa}: other experts in rows {others:?}");
        let of_row = |logits: &[f32], row: usize| logits[row * 2048..(row + 1) * 2048].to_vec();
        let same = |logits: &[f32]| -> Vec<f32> {
            (0..tokens.len()).filter(|row| !others.contains(row)).flat_map(|row| of_row(logits, row)).collect()
        };
        let error = relative_rms(&same(&logits), &same(&scalar));
        assert!(error <= 2e-2, "{isa}: relative RMS {error:e}");
    }
}

#[test]
fn the_reference_gives_the_same_however_it_is_chunked() {
    let tokens = prompt(70, 10);
    let reference = || Run::new(Reference, TINY, KvType::F16, |_| {});
    let (mut whole, mut parts) = (reference(), reference());
    whole.step(&tokens, 0, 1, &mut none());
    parts.step(&tokens[..65], 0, 0, &mut none());
    parts.step(&tokens[65..], 65, 1, &mut none());
    assert_same(&parts.last_logits(), &whole.last_logits(), "reference");
}
