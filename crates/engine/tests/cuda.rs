//! The CUDA backend under the engine, on the emulation: the same sessions, scheduler and checks as on any device.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use apr_core::probe::Recorder;
use apr_core::stage::Stage;
use apr_cuda::driver::{Description, Driver, DriverError, Launch};
use apr_cuda_emu::Order;
use apr_engine::device::{ConnectError, Cuda, Device};
use apr_engine::generate::{Ends, Request, generate};
use apr_engine::model_file::ModelFile;
use apr_engine::plan::Plan;
use apr_engine::sampler::SamplerConfig;
use apr_engine::session::{Logits, Look, Part, Sequence};
use apr_engine::verify::{Outcome, VerifyOptions, before_first_use, verify};
use apr_engine::{Engine, EngineError, EngineOptions, KvType, Precision};

const EMULATED: Device = Device::Cuda(Cuda::new(|| Ok(apr_cuda_emu::connect(Order::Ascending))));
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");
const REFERENCE: Device = Device::Reference { activations: Precision::F32 };

fn load(device: Device) -> Result<Engine, EngineError> {
    Engine::load(Path::new(TINY), EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(512) })
}

fn request(n: usize) -> Request {
    Request {
        prompt: (100..120).collect(),
        max_tokens: Some(n),
        sampler: SamplerConfig::default(),
        stop: Vec::new(),
        ignore_eos: true,
        show_control: false,
        speculate: true,
        constraint: None,
        n_best: None,
        n_best_of_prompt: None,
        show_progress: false,
        show_experts: false,
        trace: None,
        embed: false,
        ends: Ends::default(),
    }
}

/// Two logits this far apart do not trade places by rounding.
const CLEAR_MARGIN: f32 = 0.1;

/// Logits after each of `tokens`, one step for the first 20 and one for each of the others.
fn logits_after(device: Device, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut session = load(device).unwrap().session;
    let (mut sequence, mut all) = (Sequence::default(), Vec::new());
    for part in [&tokens[..20]].into_iter().chain(tokens[20..].chunks(1)) {
        session.step(&mut [Part { sequence: &mut sequence, tokens: part, logits: Logits::Last }]).unwrap();
        let mut row = Vec::new();
        session.logits(0, &mut row).unwrap();
        all.push(row);
    }
    all
}

#[test]
fn greedy_text_is_that_of_the_reference_but_for_near_ties() {
    let generated = |device| {
        let mut engine = load(device).unwrap();
        generate(&mut engine, &request(24), &AtomicBool::new(false), &mut |_| {}).unwrap()
    };
    let reference = generated(REFERENCE);
    let tokens: Vec<u32> = (100..120).chain(reference.tokens.iter().copied()).collect();
    let (expected, got) = (logits_after(REFERENCE, &tokens), logits_after(EMULATED, &tokens));
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    let mut n_clear = 0;
    for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
        let margin = expected[best(expected)] - expected[best(got)];
        assert!(margin < CLEAR_MARGIN, "token {i}: {} instead of {}, {margin} less likely", best(got), best(expected));
        n_clear += usize::from(margin == 0.0);
    }
    assert!(n_clear >= 20, "{n_clear} of 25 tokens are the same");
    let speculation = generated(EMULATED).speculation;
    assert_eq!(speculation.n_drafted, 0, "guesses are checked in batches, whose sums are in another order");
}

#[test]
fn contracts_hold() {
    let mut engine = load(EMULATED).unwrap();
    assert_eq!((engine.device.kind, engine.device.name.as_str()), ("cuda", "cuda (emulation, sm_0)"));
    let mut broken = Vec::new();
    let report = verify(&mut engine, &VerifyOptions::default(), &mut |result| {
        if result.outcome == Outcome::Failed {
            broken.push(format!("{}: {:?} {}", result.contract.id, result.measure, result.sampled));
        }
    });
    assert!(report.unwrap().passed(), "{broken:#?}");
}

/// Tokens that the model knows.
const N_VOCAB: usize = 2048;

thread_local! {
    /// Bytes that this thread has read from devices like the next.
    static N_READ: Cell<usize> = const { Cell::new(0) };
}

/// A device on which one kernel never runs.
struct Lacking(Arc<dyn Driver>, &'static str);

impl Driver for Lacking {
    fn description(&self) -> &Description {
        self.0.description()
    }
    fn free_bytes(&self) -> Result<u64, DriverError> {
        self.0.free_bytes()
    }
    fn alloc(&self, n_bytes: usize) -> Result<u64, DriverError> {
        self.0.alloc(n_bytes)
    }
    unsafe fn free(&self, at: u64, n_bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.free(at, n_bytes) }
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), DriverError> {
        // SAFETY: the caller's promise.
        unsafe { self.0.write(to, bytes) }
    }
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), DriverError> {
        N_READ.set(N_READ.get() + bytes.len());
        // SAFETY: the caller's promise.
        unsafe { self.0.read(from, bytes) }
    }
    unsafe fn run(&self, launches: &[Launch], step: bool) -> Result<(), DriverError> {
        let rest: Vec<Launch> = launches.iter().filter(|l| l.kernel != self.1).cloned().collect();
        // SAFETY: the caller's promise.
        unsafe { self.0.run(&rest, step) }
    }
}

#[test]
fn a_device_that_computes_something_else_is_found_out_before_its_first_use() {
    let check = |connect| before_first_use(&mut load(Device::Cuda(Cuda::new(connect))).unwrap()).unwrap();
    let sound = check(|| Ok(apr_cuda_emu::connect(Order::Ascending)));
    assert_eq!(sound.outcome, Outcome::Passed, "{:?}", sound.measure);
    for faulty in [
        check(|| Ok(Arc::new(Lacking(apr_cuda_emu::connect(Order::Ascending), "add")))),
        check(|| Ok(Arc::new(Lacking(apr_cuda_emu::connect(Order::Ascending), "norm_rope")))),
        check(|| Ok(Arc::new(Lacking(apr_cuda_emu::connect(Order::Ascending), "weighted_sum")))),
    ] {
        assert_eq!(faulty.outcome, Outcome::Failed, "{:?}", faulty.measure);
    }
}

#[test]
fn greedy_tokens_cost_a_few_bytes_each() {
    let whole = || -> Result<Arc<dyn Driver>, ConnectError> {
        Ok(Arc::new(Lacking(apr_cuda_emu::connect(Order::Ascending), "none")))
    };
    let mut engine = load(Device::Cuda(Cuda::new(whole))).unwrap();
    let mut read_by = |request: Request| {
        let before = N_READ.get();
        generate(&mut engine, &request, &AtomicBool::new(false), &mut |_| {}).unwrap();
        N_READ.get() - before
    };
    assert_eq!(read_by(request(12)) - read_by(request(4)), 8 * 8, "an index and a value per token");
    let warm = SamplerConfig { temperature: 1.0, ..SamplerConfig::default() };
    let drawn = read_by(Request { sampler: warm, ..request(4) });
    assert_eq!(drawn, 4 * 4 * N_VOCAB, "whoever draws gets all logits");
}

#[test]
fn a_model_that_is_too_large_for_the_gpu_is_refused_before_it_is_uploaded() {
    let small = Device::Cuda(Cuda::new(|| Ok(apr_cuda_emu::connect_with(Order::Ascending, 1 << 20))));
    let e = load(small).err().expect("a mebibyte is too little");
    assert!(
        e.is_resource() && e.to_string().contains("1048576 bytes free") && e.to_string().contains("--ctx 512"),
        "{e}"
    );
}

/// The emulation with the experts of the first `n` layers on the CPU.
fn sharing(n: usize) -> Device {
    let connect = || Ok(apr_cuda_emu::connect(Order::Ascending));
    Device::Cuda(Cuda { n_cpu_moe: Some(n), n_threads: Some(2), ..Cuda::new(connect) })
}

/// Layers of the model.
const N_LAYER: usize = 4;

#[test]
fn experts_on_the_cpu_give_the_same_text_and_keep_the_contracts() {
    let text =
        |n| generate(&mut load(sharing(n)).unwrap(), &request(16), &AtomicBool::new(false), &mut |_| {}).unwrap();
    let alone = text(0);
    for n in [1, N_LAYER] {
        let mut engine = load(sharing(n)).unwrap();
        let plan = engine.device.plan.unwrap();
        assert_eq!((plan.n_host_layer, plan.weight_bytes + plan.host_bytes), (n, engine.file.file_bytes));
        assert!(engine.device.name.contains(&format!("2 threads: experts of {n} layers")), "{}", engine.device.name);
        let report = verify(&mut engine, &VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.passed(), "{n} layers: {:?}", report.broken().map(|r| r.contract.id).collect::<Vec<_>>());
        assert_eq!(text(n).tokens, alone.tokens, "{n} layers");
    }
    assert_eq!(load(sharing(99)).unwrap().device.plan.unwrap().n_host_layer, N_LAYER, "more than all are all");
}

/// Logits after a step of some tokens and of one more, with a recorder looking on or without.
fn logits_watched(engine: &mut Engine, watch: Option<(&mut Recorder, bool)>) -> Vec<f32> {
    let (session, mut sequence, mut row) = (&mut engine.session, Sequence::default(), Vec::new());
    let mut watch = watch;
    for tokens in [&(200..230).collect::<Vec<u32>>()[..], &[7]] {
        let parts = &mut [Part { sequence: &mut sequence, tokens, logits: Logits::Last }];
        match &mut watch {
            Some((watch, unfused)) => {
                session.step_watched(parts, Look { watch: *watch, unfused: *unfused, feed: None }).unwrap()
            }
            None => session.step(parts).unwrap(),
        }
    }
    session.logits(0, &mut row).unwrap();
    session.release(&mut sequence);
    row
}

#[test]
fn what_the_cpu_computes_of_a_gpus_step_can_be_seen() {
    let mut engine = load(sharing(2)).unwrap();
    let alone = logits_watched(&mut engine, None);
    let (mut fused, mut unfused) = (Recorder::all(), Recorder::all());
    assert!(logits_watched(&mut engine, Some((&mut fused, false))) == alone, "bitwise the same with a probe");
    let plain = logits_watched(&mut engine, Some((&mut unfused, true)));
    let largest = alone.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(plain.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 0.02 * largest), "and nearly so unfused");
    for stage in [Stage::MoeExpertUp, Stage::MoeExpertSwigl, Stage::MoeExpertOut, Stage::MoeFfnOut] {
        let (a, b) = (&fused.seen[&(0, stage)], &unfused.seen[&(0, stage)]);
        let largest = b.values.iter().fold(0f32, |m, v| m.max(v.abs()));
        let is_close = a.values.iter().zip(&b.values).all(|(a, b)| (a - b).abs() < 0.02 * largest);
        assert!(a.values.len() == b.values.len() && is_close, "{}", stage.name());
    }
}

#[test]
fn a_gpu_that_is_too_small_leaves_as_few_experts_to_the_cpu_as_it_takes() {
    static TOTAL: AtomicU64 = AtomicU64::new(0);
    let connect = || Ok(apr_cuda_emu::connect_with(Order::Ascending, TOTAL.load(Ordering::Relaxed)));
    let whole = load(EMULATED).unwrap().device.plan.unwrap();
    let need = whole.weight_bytes + whole.kv_bytes + whole.buffer_bytes;
    let of_two = load(sharing(2)).unwrap().device.plan.unwrap().host_bytes;
    let of_all = load(sharing(N_LAYER)).unwrap().device.plan.unwrap().host_bytes;
    for (total, n) in [(need, 0), (need - 1, 1), (need - of_two, 2), (need - of_two - 1, 3), (need - of_all, N_LAYER)] {
        TOTAL.store(total, Ordering::Relaxed);
        let plan = load(Device::Cuda(Cuda::new(connect))).unwrap().device.plan.unwrap();
        assert_eq!((plan.n_host_layer, plan.free_bytes), (n, total));
    }
    TOTAL.store(need - 1, Ordering::Relaxed);
    let e = load(Device::Cuda(Cuda { n_cpu_moe: Some(0), ..Cuda::new(connect) })).err().expect("none were asked for");
    assert!(e.is_resource() && e.to_string().contains("--n-cpu-moe"), "{e}");
    TOTAL.store(need - of_all - 1, Ordering::Relaxed);
    let e = load(Device::Cuda(Cuda::new(connect))).err().expect("the rest does not fit either");
    assert!(matches!(e, EngineError::GpuMemory { .. }), "{e}");
}

#[test]
fn a_server_on_a_gpu_is_planned_with_the_memory_of_the_gpu() {
    static TOTAL: AtomicU64 = AtomicU64::new(0);
    let device =
        || Device::Cuda(Cuda::new(|| Ok(apr_cuda_emu::connect_with(Order::Ascending, TOTAL.load(Ordering::Relaxed)))));
    let file = ModelFile::open(Path::new(TINY)).unwrap();
    let h = file.hparams().unwrap();
    let plan = |n_parallel| Plan::new(device(), &file, &h, (KvType::F16, Some(256)), n_parallel);
    TOTAL.store(8 << 30, Ordering::Relaxed);
    let whole = plan(3).unwrap();
    let gpu = whole.gpu.unwrap();
    assert_eq!((whole.available_bytes, gpu.n_host_layer), (Some(8 << 30), 0));
    assert_eq!((whole.weight_bytes, whole.kv_bytes), (file.file_bytes, 3 * whole.context_bytes));
    assert!(whole.check().is_ok() && whole.spilled_bytes() == 0);
    TOTAL.store(whole.weight_bytes + whole.context_bytes + whole.buffer_bytes - 1, Ordering::Relaxed);
    let part = plan(3).unwrap();
    assert_eq!(part.gpu.unwrap().n_host_layer, 1, "the experts of a layer stay behind");
    assert!(part.weight_bytes < whole.weight_bytes && part.kv_bytes < whole.kv_bytes && part.spilled_bytes() == 0);
    TOTAL.store(1 << 20, Ordering::Relaxed);
    let e = plan(1).unwrap_err();
    assert!(matches!(e, EngineError::GpuMemory { .. }) && e.is_resource(), "{e}");
}

#[test]
fn a_gpu_that_is_not_there_is_a_missing_resource() {
    let e = load(Device::Cuda(Cuda::new(|| Err(ConnectError::NoDriver)))).err().expect("there is no driver");
    assert!(e.is_resource() && e.to_string().contains("libcuda"), "{e}");
}
