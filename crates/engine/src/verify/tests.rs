//! Every contract that is checked on models holds on the fixtures, and breaks under its fault.

use std::path::Path;

use apr_core::backend::faulty::{Fault, Faulty};
use apr_core::backend::reference::Reference;
use apr_core::backend::{Backend, KvType};
use apr_core::hparams::Hparams;
use apr_cpu::CpuBackend;

use super::*;
use crate::engine::tokenizer_of;
use crate::model_file::ModelFile;
use crate::session::Runner;

/// What every contract comes to on a model of which `make(n_threads)` makes the backends.
fn results<B>(name: &str, make: impl Fn(usize) -> B) -> Vec<CheckResult>
where
    B: Backend + Send + 'static,
    B::Tensor: Send,
    B::Ids: Send,
    B::Weight: Send,
    B::KvCache: Send,
{
    let file = ModelFile::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)).unwrap();
    let hparams: Hparams = file.hparams().unwrap();
    let settings = SessionSettings { kv_type: KvType::F16, n_ctx: 256 };
    let mut session = Runner::load(make(2), &file, &hparams, settings).unwrap();
    let mut load = || Ok(Box::new(Runner::load(make(1), &file, &hparams, settings).unwrap()) as Box<dyn Session>);
    let mut subject = Subject {
        session: &mut session,
        hparams: &hparams,
        gguf: &file.gguf,
        tokenizer: &tokenizer_of(&file.gguf.metadata).unwrap(),
        reload: Some((1, &mut load)),
    };
    let mut results = Vec::new();
    checks::run(&mut subject, &mut |r| results.push(r)).unwrap();
    results
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
    ] {
        let results = results("tiny-qwen3moe.gguf", |n| Faulty(cpu(n), fault));
        let result = results.iter().find(|r| r.contract.id == id).unwrap();
        assert_eq!(result.at.map(|at| at.to_string()).as_deref(), Some(at), "{fault:?}");
    }
}

#[test]
fn a_dropped_expert_is_no_routing() {
    let results = results("tiny-qwen3moe.gguf", |n| Faulty(cpu(n), Fault::DropTopExpert));
    assert_eq!(broken(&results), ["FALSIFY-MOE-ROUTER-004"]);
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
