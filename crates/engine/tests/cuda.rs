//! The CUDA backend under the engine, on the emulation: the same sessions, scheduler and checks as on any device.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use apr_engine::device::{ConnectError, Cuda, Device};
use apr_engine::generate::{Ends, Request, generate};
use apr_engine::sampler::SamplerConfig;
use apr_engine::verify::{Outcome, VerifyOptions, verify};
use apr_engine::{Engine, EngineError, EngineOptions, KvType, Precision};

const EMULATED: Device = Device::Cuda(Cuda(|| Ok(apr_cuda_emu::connect(apr_cuda_emu::Order::Ascending))));
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

#[test]
fn greedy_text_is_that_of_the_reference() {
    let text = |device| {
        let mut engine = load(device).unwrap();
        generate(&mut engine, &request(24), &AtomicBool::new(false), &mut |_| {}).unwrap()
    };
    let (cuda, reference) = (text(EMULATED), text(REFERENCE));
    assert_eq!(cuda.tokens, reference.tokens);
    assert_eq!(cuda.speculation.n_drafted, 0, "guesses are checked in batches, whose sums are in another order");
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

#[test]
fn a_model_that_is_too_large_for_the_gpu_is_refused_before_it_is_uploaded() {
    let small = Device::Cuda(Cuda(|| Ok(apr_cuda_emu::connect_with(apr_cuda_emu::Order::Ascending, 1 << 20))));
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
