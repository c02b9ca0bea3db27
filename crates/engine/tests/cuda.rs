//! The CUDA backend under the engine, on the emulation: the same sessions, scheduler and checks as on any device.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use apr_cuda::driver::{Description, Driver, DriverError, Launch};
use apr_cuda_emu::Order;
use apr_engine::device::{ConnectError, Cuda, Device};
use apr_engine::generate::{Ends, Request, generate};
use apr_engine::sampler::SamplerConfig;
use apr_engine::session::{Logits, Part, Sequence};
use apr_engine::verify::{Outcome, VerifyOptions, before_first_use, verify};
use apr_engine::{Engine, EngineError, EngineOptions, KvType, Precision};

const EMULATED: Device = Device::Cuda(Cuda(|| Ok(apr_cuda_emu::connect(Order::Ascending))));
const REFERENCE: Device = Device::Reference { activations: Precision::F32 };

fn load(device: Device) -> Result<Engine, EngineError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
    Engine::load(&path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(512) })
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
    let check = |connect| before_first_use(&mut load(Device::Cuda(Cuda(connect))).unwrap()).unwrap();
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
fn a_model_that_is_too_large_for_the_gpu_is_refused_before_it_is_uploaded() {
    let small = Device::Cuda(Cuda(|| Ok(apr_cuda_emu::connect_with(Order::Ascending, 1 << 20))));
    let e = load(small).err().expect("a mebibyte is too little");
    assert!(
        e.is_resource() && e.to_string().contains("1048576 bytes free") && e.to_string().contains("--ctx 512"),
        "{e}"
    );
}

#[test]
fn a_gpu_that_is_not_there_is_a_missing_resource() {
    let e = load(Device::Cuda(Cuda(|| Err(ConnectError::NoDriver)))).err().expect("there is no driver");
    assert!(e.is_resource() && e.to_string().contains("libcuda"), "{e}");
}
