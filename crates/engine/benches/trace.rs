//! What looking on costs: a prefill of 512 with and without statistics of every stage at every position, alternating.
//!
//!     cargo bench -p apr-engine --bench trace -- MODEL.gguf

use std::time::Instant;

use apr_engine::device::Device;
use apr_engine::session::{Logits, Look, Part, Sequence};
use apr_engine::trace::stats::{StatsPlan, StatsWatch};
use apr_engine::{Engine, EngineOptions, KvType};

const N_TOKENS: u32 = 512;
/// Pairs of passes that count; one more runs first.
const PAIRS: usize = 9;

fn main() {
    let Some(path) = std::env::args().skip(1).find(|arg| !arg.starts_with("--")) else {
        println!("skipped: needs a model, as in: cargo bench -p apr-engine --bench trace -- MODEL.gguf");
        return;
    };
    let device = Device::Cpu { n_threads: None, isa: None };
    let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: None };
    let mut engine = Engine::load(path.as_ref(), options).expect("the model loads");
    let n_vocab = engine.hparams.n_vocab as u32;
    let tokens: Vec<u32> = (0..N_TOKENS).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) % n_vocab).collect();
    let mut seconds = [Vec::new(), Vec::new()];
    for pair in 0..=PAIRS {
        for watched in [pair % 2 == 0, pair % 2 == 1] {
            let took = pass(&mut engine, &tokens, watched);
            if pair > 0 {
                seconds[usize::from(watched)].push(took);
            }
        }
    }
    let [plain, watched] = seconds.map(|mut s| {
        s.sort_by(f64::total_cmp);
        s[s.len() / 2]
    });
    println!("plain {plain:.3} s, with statistics {watched:.3} s: {:+.1} %", 100.0 * (watched / plain - 1.0));
}

/// Seconds of a pass without logits.
fn pass(engine: &mut Engine, tokens: &[u32], watched: bool) -> f64 {
    let mut sequence = Sequence::default();
    let plan = StatsPlan { positions: 0..N_TOKENS, followed: Vec::new(), unfused: false };
    let mut watch = StatsWatch::new(plan, engine.session.read_bytes(), None);
    let start = Instant::now();
    let mut parts = [Part { sequence: &mut sequence, tokens, logits: Logits::None }];
    let done = match watched {
        true => engine.session.step_watched(&mut parts, Look { watch: &mut watch, unfused: false, feed: None }),
        false => engine.session.step(&mut parts),
    };
    done.expect("the step runs");
    let took = start.elapsed().as_secs_f64();
    engine.session.release(&mut sequence);
    took
}
