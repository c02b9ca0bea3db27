//! `apr diff --bundle` and `apr replay`: the op behind a fault runs alone and shows it again, and nothing else is taken for a bundle.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

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

use apr::{Done, apr, fixture, folder};
use faults::{Fault, TINY};
use model::Model;

/// Runs `apr diff --bundle` of a fault; the bundle, if one is written, and the end of the run.
fn bundled(dir: &Path, fault: &Fault) -> (PathBuf, Done) {
    let good = fixture(fault.fixture);
    let mut model = Model::read(&good);
    (fault.edit)(&mut model);
    let (bad, bundle) = (model.write(dir, "bad.gguf"), dir.join("fault.bundle"));
    let _ = std::fs::remove_file(&bundle);
    let tokens = fault.tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let (bad, to) = (bad.display().to_string(), bundle.display().to_string());
    let done = apr(["diff", &good, &bad, "--tokens", &tokens, "--json", "--bundle", &to]);
    (bundle, done)
}

/// Runs `apr replay`: its exit code and report.
#[track_caller]
fn replayed(bundle: &Path, device: &str) -> (Option<i32>, Value) {
    let done = apr(["replay", &bundle.display().to_string(), "--device", device, "--json"]);
    let report = serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("stdout is one JSON object: {e}: {done:?}"));
    (done.code, report)
}

/// The faults of these names.
fn faults_named(names: &[&str]) -> Vec<Fault> {
    let found: Vec<Fault> = faults::all().into_iter().filter(|f| names.contains(&f.name)).collect();
    assert_eq!(found.len(), names.len(), "all are in the table");
    found
}

/// Changes the JSON header of a safetensors file.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = std::fs::read(path).expect("the bundle is there");
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).expect("the header is JSON");
    edit(header.as_object_mut().expect("the header is an object"));
    let mut text = header.to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let whole = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + n..]].concat();
    std::fs::write(path, whole).expect("the bundle can be written");
}

/// Puts side A's weights and constants in the place of B's.
fn repair(bundle: &Path) {
    edit_header(bundle, |header| {
        if let Some(good) = header.remove("weight_a") {
            let bad = header.insert("weight".to_string(), good).expect("B has a weight too");
            header.insert("unused".to_string(), bad);
        }
        let metadata = header["__metadata__"].as_object_mut().expect("metadata is an object");
        for (good, bad) in [("op_a", "op"), ("weight_a_type", "weight_type")] {
            if let Some(value) = metadata.remove(good) {
                metadata.insert(bad.to_string(), value);
            }
        }
    });
}

#[test]
fn every_kind_of_op_shows_its_fault_alone() {
    let (dir, mut wrong, mut kinds) = (folder("replay_faults"), Vec::new(), BTreeSet::new());
    for fault in faults::all().into_iter().filter(|f| !f.reshaped) {
        let (bundle, done) = bundled(&dir, &fault);
        assert_eq!(done.code, Some(1), "{}: {done:?}", fault.name);
        assert!(done.err.contains("is there again"), "{}: {}", fault.name, done.err);
        for device in ["cpu", "reference"] {
            let (code, report) = replayed(&bundle, device);
            let stage = &report["about"]["stage"];
            if code != Some(1) || report["verdict"] != "reproduces" || stage != fault.first.stage {
                wrong.push(format!("{} on {device}: {code:?} {report}", fault.name));
            }
            kinds.insert(report["op"].as_str().unwrap_or_default().to_string());
        }
    }
    assert!(wrong.is_empty(), "{} mismatches\n  {}", wrong.len(), wrong.join("\n  "));
    let expected = ["bias", "embedding", "expert_product", "head_norm_rope", "norm", "product"];
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn with_the_good_weights_nothing_is_there() {
    let dir = folder("replay_good");
    let names = [
        "halves of every byte of attn_q exchanged",
        "an expert's down projection x 1.02",
        "a scale of the LM head NaN",
        "RoPE base x 10",
        "final norm scaled",
        "Q bias dropped",
        "an embedding row x 1.1",
    ];
    for fault in faults_named(&names) {
        let (bundle, _) = bundled(&dir, &fault);
        repair(&bundle);
        for (device, most) in [("cpu", 1.5), ("reference", 0.1)] {
            let (code, report) = replayed(&bundle, device);
            assert_eq!((code, &report["verdict"]), (Some(0), &"does_not_reproduce".into()), "{}: {report}", fault.name);
            assert!(report["ratio"].as_f64().is_some_and(|r| r < most), "{} on {device}: {report}", fault.name);
        }
    }
}

#[test]
fn saved_traces_give_bundles_too() {
    let dir = folder("replay_traces");
    let fault = &faults_named(&["halves of every byte of attn_q exchanged"])[0];
    let mut model = Model::read(&fixture(TINY));
    (fault.edit)(&mut model);
    let (good, bad) = (fixture(TINY), model.write(&dir, "bad.gguf").display().to_string());
    let traced = |model: &str, name: &str| {
        let to = dir.join(name).display().to_string();
        let done = apr(["trace", model, "--tokens", "7,60,113,166", "--save-tensor", "all", "--save-tensor-dir", &to]);
        assert_eq!(done.code, Some(0), "{done:?}");
        to
    };
    let (good_trace, bad_trace) = (traced(&good, "good"), traced(&bad, "bad"));
    let bundle = dir.join("bundle");
    let differs = |a: &str, b: &str| {
        let _ = std::fs::remove_file(&bundle);
        let done = apr(["diff", a, b, "--bundle", &bundle.display().to_string()]);
        assert_eq!(done.code, Some(1), "{done:?}");
        done
    };
    for (a, b) in [(&good_trace, &bad), (&good, &bad_trace), (&good_trace, &bad_trace)] {
        differs(a, b);
        let (code, report) = replayed(&bundle, "cpu");
        assert_eq!((&report["about"]["stage"], &report["about"]["layer"]), (&"qkv_matmul".into(), &"3".into()));
        assert_eq!(code, Some(1), "{a} {b}: {report}");
    }
    for trace in [&good_trace, &bad_trace] {
        edit_header(&Path::new(trace).join("trace.safetensors"), |h| h["__metadata__"]["model"] = "gone".into());
    }
    assert!(differs(&good_trace, &bad_trace).err.contains("name their model with --model"));
}

#[test]
fn text_tells_where_what_and_whether() {
    let dir = folder("replay_text");
    let (bundle, _) = bundled(&dir, &faults_named(&["a scale of an expert's down NaN"])[0]);
    let done = apr(["replay", &bundle.display().to_string(), "--isa", "scalar"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    for words in [
        "stage moe_expert_out, layer 1",
        "expert 7, tensor blk.1.ffn_down_exps.weight, row 31, super block 0",
        "ran expert_product with 256 x 256 weights of Q4_K on cpu (scalar",
        "no numbers: 0 expected, 1 got",
        "\nreproduces: ",
    ] {
        assert!(done.out.contains(words), "{words:?} is not in {}", done.out);
    }
}

#[test]
fn where_there_is_nothing_to_replay_no_file_is_written() {
    let dir = folder("replay_nothing");
    let to = dir.join("bundle").display().to_string();
    let copy = Model::read(&fixture(TINY)).write(&dir, "copy.gguf").display().to_string();
    let done = apr(["diff", &fixture(TINY), &copy, "--tokens", "1,2", "--bundle", &to]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("no bundle: nothing differs"), "{}", done.err);
    for fault in faults::all().into_iter().filter(|f| f.reshaped) {
        let (bundle, done) = bundled(&dir, &fault);
        assert!(done.code == Some(1) && !bundle.exists(), "{done:?}");
        assert!(done.err.contains("so there is no result to compare"), "{}", done.err);
    }
    assert!(!Path::new(&to).exists());
}

#[test]
fn what_is_no_bundle_is_refused_by_name() {
    let dir = folder("replay_broken");
    let (good, _) = bundled(&dir, &faults_named(&["a scale of attn_q zeroed"])[0]);
    let bad = dir.join("broken.bundle");
    let name = bad.display().to_string();
    let refused = |words: &[&str]| apr(["replay", &name]).fails(2, words);
    refused(&["broken.bundle", "No such file"]);
    let whole = std::fs::read(&good).expect("the bundle is there");
    for n in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&bad, &whole[..n]).expect("a file can be written");
        refused(&["is no bundle"]);
    }
    let change = |edit: &dyn Fn(&mut Map<String, Value>), words: &[&str]| {
        std::fs::write(&bad, &whole).expect("a file can be written");
        edit_header(&bad, edit);
        refused(words);
    };
    let set = |key: &'static str, value: &'static str, words: &[&str]| {
        change(&|header| header["__metadata__"][key] = value.into(), words);
    };
    set("format", "apr.trace/1", &["'format'", "apr.bundle/1"]);
    set("rule", "guess", &["'rule'", "'guess'"]);
    set("stage", "nowhere", &["'stage'"]);
    set("weight_type", "Q9_K", &["'weight_type'", "'Q9_K'"]);
    set("weight_type", "Q6_K", &["'weight'", "blocks of 210"]);
    set("weight_type", "Q8_0", &["'weight'"]);
    set("op", "{", &["'op'", "JSON"]);
    set("op", "{\"kind\":\"teleport\"}", &["'op'", "name of an op"]);
    set("op", "{\"kind\":\"norm\",\"eps\":-1}", &["cannot be computed", "eps"]);
    set("op", "{\"kind\":\"norm\",\"eps\":1e-6}", &["cannot be computed", "expected 256 floats"]);
    set("op", "{\"kind\":\"attention\",\"n_head\":1,\"n_head_kv\":1,\"head_dim\":64,\"kv\":\"f16\"}", &["'input.q'"]);
    set("op", "{\"kind\":\"route_ids\",\"n_used\":4}", &["'input.logits'"]);
    set("op", "{\"kind\":\"silu\"}", &["takes no weight"]);
    change(&|header| header["input.x"]["shape"] = json!([2, 128]), &["cannot be computed"]);
    change(&|header| header["expected"]["shape"] = json!([2, 256]), &["'expected'", "[512]"]);
    change(&|header| header["got_a"]["shape"] = json!([1, 512]), &["'got_a'"]);
    change(&|header| drop(header.insert("weight_b".to_string(), header["weight"].clone())), &["is no bundle"]);
    let rename = |from: &'static str, words: &[&str]| {
        change(
            &|header| {
                let tensor = header.remove(from).expect("the tensor is there");
                header.insert("unused".to_string(), tensor);
            },
            words,
        );
    };
    rename("input.x", &["'input.x'", "is missing"]);
    rename("weight", &["needs a weight"]);
    rename("expected", &["'expected'", "is missing"]);
    apr(["replay", &fixture(TINY)]).fails(2, &["is no bundle"]);
}
