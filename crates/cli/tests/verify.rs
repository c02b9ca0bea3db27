//! `apr verify` as its users meet it: what it says of good files and of broken ones, and `apr run --verify`.

#[path = "support/apr.rs"]
mod apr;
#[path = "support/file_faults.rs"]
mod file_faults;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use apr::{apr, fixture, folder, tiny};
use file_faults::{FILE_FAULTS, Shows};
use model::Model;
use serde_json::Value;

fn broken(name: &str, edit: fn(Model) -> Model) -> PathBuf {
    edit(Model::read(&fixture("arch/qwen3moe-odd.gguf"))).write(&folder(&format!("verify_{name}")), "model.gguf")
}

/// Verifies a file: exit code and report.
#[track_caller]
fn verify(path: &Path) -> (Option<i32>, Value) {
    let done = apr(["verify".as_ref(), path.as_os_str(), OsStr::new("--json")]);
    let report = serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("{e}: {done:?}"));
    (done.code, report)
}

#[test]
fn a_good_model_keeps_every_contract() {
    let done = apr(["verify", &tiny()]);
    let lines: Vec<&str> = done.out.lines().collect();
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(lines[0].starts_with("tiny-qwen3moe on cpu ("), "{}", lines[0]);
    assert!(lines[1..lines.len() - 1].iter().all(|line| line.starts_with("✓ FALSIFY-")), "{}", done.out);
    assert!(lines.last().unwrap().contains("contracts hold, 0 broken, 0 skipped"), "{}", done.out);
    assert!(done.out.contains("positions 32..40 and 1024..1032"), "what was sampled is said: {}", done.out);
}

#[test]
fn a_good_model_keeps_every_contract_on_every_instruction_set() {
    for isa in ["scalar", "avx2", "avx-vnni", "avx512-vnni"] {
        let done = apr(["verify", &tiny(), "--isa", isa]);
        if done.err.contains("this CPU lacks the instruction set") {
            println!("skipped: needs a CPU with {isa}");
            continue;
        }
        assert_eq!(done.code, Some(0), "{isa}: {done:?}");
        assert!(done.out.contains(&format!("on cpu ({isa}")), "{}", done.out);
        assert!(done.out.contains("contracts hold, 0 broken, 0 skipped"), "{isa}: {}", done.out);
    }
}

#[test]
fn json_says_what_was_sampled_measured_and_allowed() {
    let report = apr(["verify", &tiny(), "--json"]).json();
    assert_eq!((&report["schema"], &report["verdict"]), (&"apr.verify/1".into(), &"pass".into()));
    assert_eq!(report["model"], "tiny-qwen3moe");
    assert!(report["seconds"].as_f64().unwrap() > 0.0 && report["device"].as_str().unwrap().starts_with("cpu"));
    let contracts = report["contracts"].as_array().unwrap();
    assert!(contracts.len() >= 17, "{}", contracts.len());
    for c in contracts {
        assert_eq!(c["result"], "pass", "{c}");
        assert!(c["id"].as_str().unwrap().starts_with("FALSIFY-") && !c["statement"].as_str().unwrap().is_empty());
        assert!(!c["sampled"].as_str().unwrap().is_empty() && !c["unit"].as_str().unwrap().is_empty(), "{c}");
        assert!(c["measured"].as_f64().unwrap() <= c["bound"].as_f64().unwrap(), "{c}");
        assert!(["reason", "stage", "layer", "position"].iter().all(|key| c[*key].is_null()), "{c}");
    }
}

#[test]
fn every_architecture_kv_type_and_device_keeps_what_applies_to_it() {
    for name in ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"] {
        let path = fixture(&format!("arch/{name}.gguf"));
        for args in [&["--kv", "q8_0"][..], &["--isa", "scalar", "--kv", "f32"], &["--device", "reference", "-c", "64"]]
        {
            let done = apr([&["verify", &path], args].concat());
            assert_eq!(done.code, Some(0), "{name} {args:?}: {}", done.out);
            let skipped = done.out.lines().filter(|line| line.starts_with("– ")).count();
            let expected = if name.contains("moe") { 0 } else { 4 } + if args.contains(&"reference") { 3 } else { 0 };
            assert_eq!(skipped, expected, "{name} {args:?}: {}", done.out);
        }
    }
}

#[test]
fn faults_in_files_are_refused_or_break_their_contracts() {
    for fault in &FILE_FAULTS {
        let path = broken(fault.name, fault.edit);
        match &fault.shows {
            Shows::Refused(words) => apr(["verify".as_ref(), path.as_os_str()]).fails(3, words),
            Shows::Breaks(id, at) => {
                let (code, report) = verify(&path);
                assert_eq!((code, &report["verdict"]), (Some(1), &"fail".into()), "{}", fault.name);
                let failed = report["contracts"].as_array().unwrap().iter().find(|c| c["result"] == "fail").unwrap();
                assert_eq!(failed["id"], *id, "{}: {failed}", fault.name);
                let told = at.map(|_| (failed["stage"].as_str().unwrap(), failed["layer"].as_u64().unwrap()));
                assert_eq!(told, *at, "{}: {failed}", fault.name);
                assert_eq!(at.is_some(), failed["position"].is_u64(), "{}: {failed}", fault.name);
            }
        }
    }
}

#[test]
fn layers_and_positions_of_the_reference_are_chosen() {
    let report = apr(["verify", &tiny(), "--layers", "3,1", "--positions", "500,2", "--json"]).json();
    let last = report["contracts"].as_array().unwrap().last().unwrap();
    assert_eq!(last["id"], "FALSIFY-PRECISION-001");
    let sampled = last["sampled"].as_str().unwrap();
    assert!(sampled.starts_with("positions 2, 500 in layers 1, 3 and at the output"), "{sampled}");
    assert!(last["measured"].as_f64().unwrap() > 0.5, "the device rounds, as it says: {last}");
    apr(["verify", &tiny(), "--layers", "1,4"]).fails(2, &["layer 4", "has 4"]);
    apr(["verify", &tiny(), "--positions", "64", "-c", "64"]).fails(2, &["position 64", "has 64"]);
}

#[test]
fn a_model_that_breaks_a_contract_is_not_asked() {
    let path = broken("run", |m| m.filled("blk.0.ffn_norm.weight", f32::NAN));
    let run =
        |path: &OsStr| apr([OsStr::new("run"), path, "hi".as_ref(), "-n".as_ref(), "4".as_ref(), "--verify".as_ref()]);
    let done = run(path.as_os_str());
    assert!(
        done.err.contains("✗ FALSIFY-FORWARD-004") && done.err.contains("first at blk.0.ffn_norm at position"),
        "{done:?}"
    );
    done.fails(1, &["FALSIFY-FORWARD-004", "finite number", "apr verify"]);

    let done = run(tiny().as_ref());
    assert!(done.err.contains("verifying") && done.err.contains("0 broken"), "{done:?}");
    assert_eq!(done.answer(), apr(["run", &tiny(), "hi", "-n", "4"]).answer(), "the answer is the same");
}

#[test]
fn a_context_too_small_for_anything_is_said() {
    apr(["verify", &tiny(), "-c", "8"]).fails(2, &["16 positions", "8", "--ctx"]);
    assert_eq!(apr(["verify", &tiny(), "-c", "16"]).code, Some(0));
}
