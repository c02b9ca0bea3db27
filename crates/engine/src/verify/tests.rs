//! Every contract that is checked on models holds on the fixtures, and breaks under its fault.

use std::path::Path;

use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::reference::Reference;
use apr_core::backend::{Backend, KvType};
use apr_cpu::CpuBackend;

use super::*;
use crate::engine::EngineOptions;
use crate::session;

/// What every contract comes to on a model of which `make(n_threads)` makes the backends.
fn results<B>(name: &str, make: impl Fn(usize) -> B) -> Vec<CheckResult>
where
    B: Backend + Send + 'static,
    B::Tensor: Send,
    B::Ids: Send,
    B::Weight: Send,
    B::KvCache: Send,
{
    let device = Device::Cpu { n_threads: Some(2), isa: None };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    let mut engine = Engine::load(&path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(256) }).unwrap();
    let load = |file: &ModelFile, h: &Hparams, settings: SessionSettings, n: usize| {
        Ok(session::load(make(n), file, h, settings)?)
    };
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 256 };
    engine.session = load(&engine.file, &engine.hparams, settings, 2).unwrap();
    run(&mut engine, &VerifyOptions::default(), &load, &mut |_| {}).unwrap().results
}

fn cpu(n_threads: usize) -> CpuBackend {
    CpuBackend::new(n_threads, None).unwrap()
}

fn broken(results: &[CheckResult]) -> Vec<&'static str> {
    results.iter().filter(|r| r.outcome == Outcome::Failed).map(|r| r.contract.id).collect()
}

#[test]
fn contracts_hold_and_are_reported_in_order() {
    let results = results("tiny-qwen3moe.gguf", cpu);
    for r in &results {
        println!("{} {:?} {:?} {}", r.contract.id, r.outcome, r.measure, r.sampled);
        assert_eq!(r.outcome, Outcome::Passed, "{r:?}");
        assert!(!r.sampled.is_empty() && r.measure.is_some() && r.at.is_none(), "{r:?}");
    }
    let ids: Vec<_> = results.iter().map(|r| r.contract.id).collect();
    assert_eq!(ids, CONTRACTS.each_ref().map(|c| c.id));
}

#[test]
fn every_fault_breaks_its_contract() {
    for contract in CONTRACTS.iter() {
        let Some(fault) = Fault::named(contract.fault) else { continue };
        let results = results("tiny-qwen3moe.gguf", |n| Faulty(cpu(n), fault));
        println!("{fault:?} breaks {:?}", broken(&results));
        let result = results.iter().find(|r| r.contract.id == contract.id).unwrap();
        assert_eq!(result.outcome, Outcome::Failed, "{fault:?} must break {}: {result:?}", contract.id);
        assert!(result.at.is_some(), "{fault:?}: where {} breaks is told", contract.id);
    }
}

#[test]
fn where_a_contract_breaks_is_told() {
    for (fault, id, at) in [
        (Fault::KeepAllRows, "FALSIFY-FORWARD-003", "blk.3.attn_out at position 0"),
        (Fault::NanInAttention, "FALSIFY-FORWARD-004", "blk.0.attention at position 0"),
        (Fault::WrongExpert, "FALSIFY-MOE-ROUTER-003", "blk.0.moe_router_indices at position 0"),
        (Fault::ForgetEarlierSteps, "FALSIFY-BATCHING-002", "blk.0.attention at position 32"),
        (Fault::DecodeDiffers, "FALSIFY-BATCHING-003", "blk.0.attention at position 32"),
        (Fault::NeighbourLeaks, "FALSIFY-BATCHING-004", "blk.0.attention at position 32"),
        (Fault::FusedDiffers, "FALSIFY-TRACE-002", "blk.0.moe_ffn_out at position 0"),
        (Fault::WrongRopeBase, "FALSIFY-PRECISION-001", "blk.0.q_post_rope at position 1"),
    ] {
        let results = results("tiny-qwen3moe.gguf", |n| Faulty(cpu(n), fault));
        let result = results.iter().find(|r| r.contract.id == id).unwrap();
        assert_eq!(result.at.map(|at| at.to_string()).as_deref(), Some(at), "{fault:?}");
    }
}

#[test]
fn a_dropped_expert_is_no_routing() {
    let results = results("tiny-qwen3moe.gguf", |n| Faulty(cpu(n), Fault::DropTopExpert));
    assert_eq!(broken(&results), ["FALSIFY-MOE-ROUTER-004", "FALSIFY-PRECISION-001"]);
}

#[test]
fn every_architecture_and_the_reference_hold_what_applies_to_them() {
    for name in ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"] {
        let path = format!("arch/{name}.gguf");
        for results in [results(&path, cpu), results(&path, |_| Reference)] {
            assert_eq!(broken(&results), Vec::<&str>::new(), "{name}");
            let skipped = results.iter().filter(|r| matches!(r.outcome, Outcome::Skipped(_))).count();
            assert!(skipped <= 5, "{name}: {results:?}");
        }
    }
}
