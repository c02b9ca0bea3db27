//! The same pass however it is run: bit for bit in any order of threads, twice, and with somebody looking on; within rounding however
//! it is cut into steps, whoever else is in the batch, and unfused.

#[path = "support/devices.rs"]
mod devices;
#[path = "../../core/tests/support/runs.rs"]
mod runs;

use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::reference::Reference;
use apr_core::backend::{Backend, KvType};
use apr_core::probe::Recorder;
use apr_cuda::CudaBackend;
use apr_cuda_emu::{Order, connect};
use devices::Make;
use runs::{Run, kl_divergence, relative_rms};

const TINY: &str = "tiny-qwen3moe.gguf";
const N_VOCAB: usize = 2048;
/// Sums in another order, and what rounding activations makes of it.
const CUT_MAX: f64 = 2e-2;

fn none() -> Recorder {
    Recorder::of(&[])
}

fn prompt(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % 2000).collect()
}

fn run(backend: CudaBackend) -> Run<CudaBackend> {
    Run::new(backend, TINY, KvType::F16, |_| {})
}

fn ordered(order: Order) -> Run<CudaBackend> {
    run(CudaBackend::new(connect(order)))
}

fn whole<B: Backend>(mut run: Run<B>, tokens: &[u32], probe: &mut Recorder) -> Vec<f32> {
    run.step(tokens, 0, tokens.len(), probe);
    run.logits()
}

fn assert_same(a: &[f32], b: &[f32], what: &str) {
    let differ = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!((a.len(), differ), (b.len(), None), "{what}: bitwise the same");
}

#[test]
fn orders_of_threads_and_a_probe_do_not_matter() {
    let tokens = prompt(70, 1);
    let once = whole(ordered(Order::Ascending), &tokens, &mut none());
    for order in [Order::Ascending, Order::Descending, Order::Shuffled(1), Order::Shuffled(2)] {
        assert_same(&whole(ordered(order), &tokens, &mut none()), &once, &format!("{order:?}"));
    }
    assert_same(&whole(ordered(Order::Ascending), &tokens, &mut Recorder::all()), &once, "with a probe");
}

#[test]
fn decodes_do_not_depend_on_the_order_of_threads() {
    let tokens = prompt(9, 2);
    let of = |order| {
        let mut run = ordered(order);
        tokens.iter().enumerate().for_each(|(i, token)| run.step(std::slice::from_ref(token), i, 1, &mut none()));
        run.last_logits()
    };
    let once = of(Order::Ascending);
    for order in [Order::Descending, Order::Shuffled(5)] {
        assert_same(&of(order), &once, &format!("{order:?}"));
    }
}

fn chunks_of_a_prefill_and_other_users_are_within_rounding(cuda: Make) {
    let (a, b) = (prompt(66, 3), prompt(20, 4));
    let alone = whole(run(cuda()), &a, &mut none());
    let last = &alone[alone.len() - N_VOCAB..];
    let mut cut = run(cuda());
    cut.step(&a[..64], 0, 0, &mut none());
    cut.step(&a[64..65], 64, 0, &mut none());
    cut.step(&a[65..], 65, 1, &mut none());
    let error = relative_rms(&cut.last_logits(), last);
    assert!(error <= CUT_MAX, "in three steps: relative RMS {error:e}");
    let mut together = run(cuda());
    together.step_many(&[(0, &a[..60], 0, 0)], &mut none());
    together.step_many(&[(1, &b, 0, 1), (0, &a[60..], 60, 1)], &mut none());
    let error = relative_rms(&together.last_logits(), last);
    assert!(error <= CUT_MAX, "beside another: relative RMS {error:e}");
}

fn the_same_steps_give_the_same_bits_with_and_without_a_probe(cuda: Make) {
    let tokens = prompt(50, 7);
    let once = |probe: &mut Recorder| {
        let mut run = run(cuda());
        run.step(&tokens[..45], 0, 0, probe);
        // The same shape again and again: a device records such a step and replays it.
        for (i, token) in tokens.iter().enumerate().skip(45) {
            run.step(std::slice::from_ref(token), i, 1, probe);
        }
        run.last_logits()
    };
    let first = once(&mut none());
    assert_same(&once(&mut none()), &first, "again");
    assert_same(&once(&mut Recorder::all()), &first, "with a probe");
}

fn fused_and_unfused_agree(cuda: Make) {
    let tokens = prompt(20, 5);
    let fused = whole(run(cuda()), &tokens, &mut none());
    let mut unfused = run(cuda());
    unfused.step_unfused(&tokens, &mut none());
    let error = relative_rms(&unfused.logits(), &fused);
    assert!(error <= 1e-5, "relative RMS {error:e}");
}

/// Median KL of a backend's next tokens from the reference's.
fn median_kl(backend: impl Backend) -> f64 {
    let tokens = prompt(40, 6);
    let expected = whole(Run::new(Reference, TINY, KvType::F16, |_| {}), &tokens, &mut none());
    let got = whole(Run::new(backend, TINY, KvType::F16, |_| {}), &tokens, &mut none());
    let rows = expected.chunks_exact(N_VOCAB).zip(got.chunks_exact(N_VOCAB));
    let mut kl: Vec<f64> = rows.map(|(e, g)| kl_divergence(e, g)).collect();
    kl.sort_by(f64::total_cmp);
    kl[kl.len() / 2]
}

/// Faults that leave fluent text are far from what rounding does.
fn faults_of_routing_are_far_outside_rounding(cuda: Make) {
    let sound = median_kl(cuda());
    println!("sound: median KL {sound:.6}");
    assert!(sound <= 0.0016, "median KL {sound}");
    for fault in [Fault::SkipRenormalise, Fault::UniformWeights, Fault::DropHeadNorm, Fault::SwapExperts] {
        let kl = median_kl(Faulty(cuda(), fault));
        println!("{fault:?}: median KL {kl:.6}");
        assert!(kl > 5.0 * sound, "{fault:?}: median KL {kl}, sound {sound}");
    }
}

devices::on_every_device!(
    chunks_of_a_prefill_and_other_users_are_within_rounding,
    the_same_steps_give_the_same_bits_with_and_without_a_probe,
    fused_and_unfused_agree,
    faults_of_routing_are_far_outside_rounding
);
