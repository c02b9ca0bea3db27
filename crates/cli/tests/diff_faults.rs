//! `apr diff` finds every fault of the table: stage, layer, expert, tensor, row and block.

use std::path::Path;

use serde_json::Value;

#[path = "support/apr.rs"]
mod apr;
#[path = "support/edit.rs"]
mod edit;
#[path = "support/faults.rs"]
mod faults;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

use apr::{apr, fixture, folder};
use faults::{Fault, Place, TINY};
use model::Model;

/// Exit code and report of `apr diff`.
#[track_caller]
fn diff(good: &Path, bad: &Path, tokens: &[u32]) -> (i32, Value) {
    let tokens = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let (diff, flag, json) = ("diff".as_ref(), "--tokens".as_ref(), "--json".as_ref());
    let done = apr([diff, good.as_os_str(), bad.as_os_str(), flag, tokens.as_ref(), json]);
    let report = serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("stdout is one JSON object: {e}: {done:?}"));
    (done.code.expect("no signal ends apr"), report)
}

/// Runs every fault of a group and expects that each is found.
#[track_caller]
fn found(group: &str, faults: Vec<Fault>) {
    let (dir, mut wrong) = (folder(&format!("diff_{group}")), Vec::new());
    for fault in faults {
        let good = fixture(fault.fixture);
        let mut model = Model::read(&good);
        (fault.edit)(&mut model);
        let bad = model.write(&dir, "bad.gguf");
        let (code, report) = diff(good.as_ref(), &bad, &fault.tokens);
        wrong.extend(mismatches(&fault, code, &report).iter().map(|what| format!("{}: {what}", fault.name)));
    }
    assert!(wrong.is_empty(), "{} mismatches\n  {}", wrong.len(), wrong.join("\n  "));
}

/// Where a report is not what the table says.
fn mismatches(f: &Fault, code: i32, report: &Value) -> Vec<String> {
    let first = &report["first"];
    let mut out = Vec::new();
    let mut check = |what: &str, right: bool, expected: String| {
        if !right {
            out.push(format!("{what}: expected {expected}, first is {first}"));
        }
    };
    check("exit code", code == 1, format!("1, got {code}"));
    check("verdict", report["verdict"] == "differs", format!("differs, got {}", report["verdict"]));
    check("stage", first["stage"] == f.first.stage, f.first.stage.into());
    check("layer", first["layer"].as_u64() == f.first.layer.map(|l| l as u64), format!("{:?}", f.first.layer));
    let mode = if !f.reached {
        "weights"
    } else if f.reshaped {
        "shape"
    } else {
        "isolated"
    };
    check("mode", first["mode"] == mode, mode.into());
    let tensor = first["tensor"].as_str();
    check("tensor", f.reshaped || tensor == f.first.tensor.as_deref(), format!("{:?}", f.first.tensor));
    let number = |key: &str| first[key].as_u64().map(|n| n as usize);
    let expert = match f.first.stage {
        // A row of the router is an expert.
        "moe_router_logits" => number("expert") == number("row"),
        _ => number("expert").map_or(f.first.experts.is_empty(), |e| f.first.experts.contains(&e)),
    };
    check("expert", expert, format!("{:?}", f.first.experts));
    let inside = |key: &str, range: &Option<std::ops::Range<usize>>| {
        range.as_ref().is_none_or(|range| number(key).is_some_and(|n| range.contains(&n)))
    };
    check("row", inside("row", &f.first.rows), format!("{:?}", f.first.rows));
    check("super-block", inside("super_block", &f.first.blocks), format!("{:?}", f.first.blocks));
    check("position", f.position.is_none_or(|p| number("position") == Some(p)), format!("{:?}", f.position));

    let mut keys: Vec<_> = list(&report["metadata"]).iter().map(|m| m["key"].as_str().unwrap_or_default()).collect();
    keys.sort_unstable();
    let mut expected = f.keys.clone();
    expected.sort_unstable();
    check("metadata keys", keys == expected, format!("{expected:?}, got {keys:?}"));
    if f.reached && !f.reshaped {
        out.extend(culprits(f, report));
    }
    out
}

/// The places that must be among the culprits and are not, and the other way round.
fn culprits(f: &Fault, report: &Value) -> Vec<String> {
    let same = |p: &Place, c: &Value| c["stage"] == p.stage && c["layer"].as_u64() == p.layer.map(|l| l as u64);
    let named: Vec<&Value> = list(&report["culprits"]).iter().collect();
    let missing = f.others.iter().filter(|p| !named.iter().any(|c| same(p, c)));
    let places = || [&f.first].into_iter().chain(&f.others);
    let innocent = named.iter().filter(|c| !places().any(|p| same(p, c)));
    let missing = missing.map(|p| format!("{} of layer {:?} is no culprit", p.stage, p.layer));
    missing.chain(innocent.map(|c| format!("an innocent culprit: {c}"))).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn a_copy_is_the_same() {
    let dir = folder("diff_copy");
    for (name, tokens) in [(TINY, faults::many()), ("arch/qwen2.gguf", vec![1, 2, 3])] {
        let copy = Model::read(&fixture(name)).write(&dir, "copy.gguf");
        let (code, report) = diff(fixture(name).as_ref(), &copy, &tokens);
        assert_eq!((code, &report["verdict"], &report["first"]), (0, &Value::from("same"), &Value::Null));
        assert!(list(&report["culprits"]).is_empty() && list(&report["metadata"]).is_empty());
        assert_eq!(report["end"]["max_kld"].as_f64(), Some(0.0));
    }
}

#[test]
fn a_name_is_told_and_is_no_fault() {
    let renamed = Model::read(&fixture(TINY)).string("general.name", "another").write(&folder("diff_name"), "b.gguf");
    let (code, report) = diff(fixture(TINY).as_ref(), &renamed, &[1, 2, 3]);
    assert_eq!((code, &report["verdict"]), (0, &Value::from("same")), "{report}");
    assert_eq!(report["metadata"][0]["key"], "general.name", "{report}");
    assert_eq!(report["metadata"][0]["b"], "another", "{report}");
}

#[test]
fn faults_of_attention_are_found() {
    found("projections", faults::projections());
}

#[test]
fn faults_of_norms_are_found() {
    found("norms", faults::norms());
}

#[test]
fn faults_of_routers_are_found() {
    found("routers", faults::routers());
}

#[test]
fn faults_of_experts_are_found() {
    found("experts", faults::experts());
}

#[test]
fn faults_of_the_embedding_and_the_head_are_found() {
    found("ends", faults::ends());
}

#[test]
fn tensors_of_another_type_are_found() {
    found("types", faults::types());
}

#[test]
fn faults_of_metadata_are_found() {
    found("metadata", faults::metadata());
}

#[test]
fn faults_of_dense_models_are_found() {
    found("dense", faults::dense());
}

#[test]
fn several_faults_are_told_apart() {
    found("several", faults::several());
}

#[test]
fn faults_that_no_token_meets_are_found_in_the_weights() {
    found("unreached", faults::unreached());
}
