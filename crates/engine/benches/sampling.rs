//! What it costs to choose a token for each row of a step, on all threads of the CPU: of whole rows of logits, and of their best.
//!
//!     cargo bench -p apr-engine --bench sampling

use std::hint::black_box;
use std::time::Instant;

use apr_core::backend::Backend;
use apr_cpu::CpuBackend;
use apr_engine::sampler::{Sampler, SamplerConfig};

const N_VOCAB: usize = 151_936;
/// Steps that count; as many run first.
const N_STEPS: usize = 31;

type Tensor = <CpuBackend as Backend>::Tensor;

fn main() {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let backend = CpuBackend::new(n_threads, None).expect("threads start");
    // What Qwen3's authors recommend, with its penalty and without, and greedy.
    let warm = SamplerConfig { temperature: 0.7, top_k: 20, top_p: 0.8, seed: Some(1), ..SamplerConfig::default() };
    let penalized = SamplerConfig { repetition_penalty: 1.05, ..warm.clone() };
    for (name, config) in [("greedy", SamplerConfig::default()), ("top-k 20", warm), ("with a penalty", penalized)] {
        for n_rows in [1, 8, 32] {
            let mut t = backend.tensor(N_VOCAB, &[]);
            backend.write(&mut t, &logits(n_rows)).expect("memory");
            let mut sampler = Sampler::new(config.clone()).expect("a valid configuration");
            (0..64).for_each(|i| sampler.accept(i * 2003));
            let whole = seconds_per_token(n_rows, || of_whole_rows(&backend, &t, &mut sampler));
            let best = seconds_per_token(n_rows, || of_the_best(&backend, &t, &mut sampler));
            let k = sampler.n_wanted(N_VOCAB).expect("few are enough");
            println!("{name}, {n_rows} rows, per token: whole {:.1} us, of {k} {:.1} us", 1e6 * whole, 1e6 * best);
        }
    }
}

fn of_whole_rows(b: &CpuBackend, t: &Tensor, sampler: &mut Sampler) {
    let mut logits = Vec::new();
    for i in 0..b.shape(t).0 {
        b.read_row(t, i, &mut logits).expect("the row is there");
        black_box(sampler.sample(&logits).expect("a token"));
    }
}

fn of_the_best(b: &CpuBackend, t: &Tensor, sampler: &mut Sampler) {
    let k = sampler.n_wanted(N_VOCAB).expect("few are enough");
    let mut best = Vec::new();
    b.best(t, k.next_power_of_two(), &mut best).expect("memory");
    for row in best.chunks(k.next_power_of_two()) {
        black_box(sampler.sample_best(&row[..k]).expect("a token"));
    }
}

/// The median of the steps.
fn seconds_per_token(n_rows: usize, mut step: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..2 * N_STEPS)
        .map(|_| {
            let start = Instant::now();
            step();
            start.elapsed().as_secs_f64() / n_rows as f64
        })
        .skip(N_STEPS)
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[N_STEPS / 2]
}

/// Sums of uniform values, roughly as logits are spread, `[n_rows, N_VOCAB]`.
fn logits(n_rows: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n_rows * N_VOCAB).map(|_| 6.0 * (uniform() + uniform() + uniform() + uniform()) - 12.0).collect()
}
