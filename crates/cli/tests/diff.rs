//! `apr diff` on sides that agree, on traces, and on what cannot be compared.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

#[path = "support/apr.rs"]
mod apr;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

use apr::{apr, fixture, folder};
use model::Model;

const TINY: &str = "tiny-qwen3moe.gguf";
const TOKENS: &str = "100,200,300,400,500,600,700";

/// Runs `apr diff` with `--json`.
#[track_caller]
fn diff(args: &[&str]) -> (i32, Value) {
    let all = ["diff"].iter().chain(args).chain(&["--json"]).map(OsStr::new);
    let done = apr(all);
    let report = serde_json::from_str(&done.out).unwrap_or_else(|e| panic!("stdout is one JSON object: {e}: {done:?}"));
    (done.code.expect("no signal ends apr"), report)
}

/// Exit code and stderr of a comparison that cannot be made.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let done = apr(["diff"].iter().chain(args).map(OsStr::new));
    assert_eq!((done.code, done.out.as_str()), (Some(2), ""), "{done:?}");
    done.err
}

/// A golden of Hugging Face transformers with what makes it a trace.
fn golden_trace(dir: &Path, tokens: &str) -> PathBuf {
    let bytes = fs::read(fixture("tiny-7tok.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    header["__metadata__"] = json!({
        "format": "apr.trace/1", "producer": "transformers", "model": fixture(TINY), "model_sha256": "",
        "architecture": "qwen3moe", "tokens": format!("[{tokens}]"), "n_prompt": "7", "positions": "[0,1,2,3,4,5,6]",
        "device": "transformers", "isa": "", "precision": "f32", "kv": "f32", "fused": "false",
    });
    let header = header.to_string();
    let path = dir.join("golden.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + n..]].concat()).unwrap();
    path
}

/// Every ratio of a kind of a report's stages.
fn ratios<'a>(report: &'a Value, mode: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    let stages = report["stages"].as_array().unwrap().iter();
    stages.filter_map(move |s| Some((s["stage"].as_str()?, s[mode]["ratio"].as_f64()?)))
}

#[test]
fn the_cpu_makes_the_noise_it_declares_and_no_more() {
    let (code, report) = diff(&[&fixture(TINY), "--device-b", "reference", "--tokens", TOKENS]);
    assert_eq!((code, &report["verdict"], &report["rule"]), (0, &json!("same"), &json!("ratio")));
    assert_eq!((&report["schema"], &report["mode"]), (&json!("apr.diff/1"), &json!("isolated+free")));
    assert_eq!((&report["a"]["device"], &report["b"]["device"]), (&json!("cpu"), &json!("reference")));
    let products = ["qkv_matmul", "attn_out", "moe_expert_up", "moe_expert_out", "lm_head"];
    let mut n = 0;
    for (stage, ratio) in ratios(&report, "isolated") {
        let bounds = if products.contains(&stage) { 0.8..1.25 } else { 0.0..1.25 };
        assert!(bounds.contains(&ratio), "{stage}: {ratio}");
        n += usize::from(products.contains(&stage));
    }
    assert_eq!(n, 4 * 4 + 1);
    assert_eq!(report["moe"]["n_equal"].as_u64().unwrap() + report["moe"]["n_flipped"].as_u64().unwrap(), 28);
    assert!(report["end"]["mean_kld"].as_f64().unwrap() < 0.01);
}

#[test]
fn any_two_ways_to_run_a_file_agree() {
    for sides in [&["--isa-a", "scalar"][..], &["--unfused-b"], &["--kv-b", "q8_0"], &["--kv-a", "f32", "--unfused-a"]]
    {
        let file = fixture(TINY);
        let args: Vec<&str> = [&[file.as_str()], sides, &["--tokens", TOKENS]].concat();
        let (code, report) = diff(&args);
        assert_eq!((code, &report["first"], &report["rule"]), (0, &Value::Null, &json!("ratio")), "{sides:?}");
    }
    for name in ["qwen3", "qwen2", "llama", "qwen3moe-odd"] {
        let (code, report) =
            diff(&[&fixture(&format!("arch/{name}.gguf")), "--device-a", "reference", "--tokens", "1,2,3,4,5"]);
        assert_eq!((code, &report["first"]), (0, &Value::Null), "{name}");
    }
}

#[test]
fn hugging_face_agrees_with_the_reference_and_with_the_cpu() {
    let trace = golden_trace(&folder("diff_golden"), TOKENS);
    let trace = trace.to_str().unwrap();
    let (code, report) = diff(&[&fixture(TINY), trace, "--device", "reference", "--kv", "f32"]);
    assert_eq!((code, &report["first"], &report["mode"]), (0, &Value::Null, &json!("free")));
    assert!(report["notes"][0].as_str().unwrap().contains("free-running only"));
    let (code, report) = diff(&[&fixture(TINY), trace]);
    assert_eq!((code, &report["first"]), (0, &Value::Null));
    for (stage, ratio) in ratios(&report, "free") {
        assert!(ratio < 1.5, "{stage}: {ratio}");
    }
    // The sides may be given in any order.
    assert_eq!(diff(&[trace, &fixture(TINY)]).0, 0);
    assert_eq!(diff(&[trace, trace]).1["rule"], "bits");
}

#[test]
fn a_condition_takes_the_place_of_the_verdict() {
    let file = fixture(TINY);
    let with = |condition: &str| diff(&[&file, "--device-b", "reference", "--tokens", TOKENS, "--fail-on", condition]);
    assert_eq!(with("mean_kld>0.0000001").0, 1);
    assert_eq!(with("mean_kld>0.1,ratio>2").0, 0);
    assert_eq!(with("same_top_p<100.5").0, 1);
}

#[test]
fn the_page_and_the_text_say_what_was_found() {
    let page = folder("diff_page").join("diff.html");
    let file = fixture(TINY);
    let args = ["diff", &file, "--kv-b", "f32", "--prompt", "Hello", "--html", page.to_str().unwrap()];
    let done = apr(args.map(OsStr::new));
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.out.contains("\nsame (") && done.out.contains("moe_router_logits"), "{}", done.out);
    assert!(fs::read_to_string(page).unwrap().contains("apr.diff/1"));
}

#[test]
fn what_cannot_be_compared_is_refused_with_exit_code_2() {
    let (file, dir) = (fixture(TINY), folder("diff_refused"));
    let trace = golden_trace(&dir, TOKENS);
    let trace = trace.to_str().unwrap();
    assert!(refused(&[&file, "--tokens", "1"]).contains("would run as A does"));
    assert!(refused(&[&file, &file]).contains("--prompt or --tokens"));
    assert!(refused(&[&file, &file, "--prompt", ""]).contains("prompt is empty"));
    assert!(refused(&[&file, "nothing.gguf", "--tokens", "1"]).contains("nothing.gguf"));
    assert!(refused(&[&file, &file, "--tokens", "1,x"]).contains("'x'"));
    assert!(refused(&[&file, &file, "--tokens", "99999"]).contains("99999"));
    assert!(refused(&[&file, trace, "--tokens", "1,2"]).contains("tokens differ"));
    assert!(refused(&[&file, &fixture("tokenizer-qwen3.json"), "--tokens", "1"]).contains("no safetensors file"));
    assert!(refused(&[&file, &fixture("tiny-7tok.safetensors"), "--tokens", "1"]).contains("no trace of apr"));
    let other = golden_trace(&folder("diff_other"), "1,200,300,400,500,600,700");
    assert!(refused(&[trace, other.to_str().unwrap()]).contains("tokens differ"));
    assert!(refused(&[&file, "--kv-b", "f32", "--tokens", "1", "--threshold", "0"]).contains("--threshold"));
    assert!(refused(&[&file, "--kv-b", "f32", "--tokens", "1", "--fail-on", "kld>1"]).contains("mean_kld"));
}

#[test]
fn models_of_another_make_are_compared_as_far_as_they_go() {
    let [qwen3, qwen2, odd] = ["qwen3", "qwen2", "qwen3moe-odd"].map(|name| fixture(&format!("arch/{name}.gguf")));
    let (code, report) = diff(&[&qwen3, &qwen2, "--tokens", "1,2,3"]);
    assert_eq!((code, &report["first"]["stage"], &report["first"]["mode"]), (1, &json!("embedding"), &json!("shape")));
    assert_eq!(report["mode"], "free");
    let one_sided = report["culprits"].as_array().unwrap().iter().find(|c| c["stage"] == "qkv_bias").unwrap();
    assert_eq!(one_sided["why"], "only B computes this");
    assert_eq!(diff(&[&qwen3, &odd, "--tokens", "1,2,3"]).0, 1);
}

#[test]
fn a_tensor_that_one_file_lacks_is_the_difference() {
    let name = "blk.2.attn_q_norm.weight";
    let bad = Model::read(&fixture(TINY)).without_tensor(name).write(&folder("diff_lacks"), "bad.gguf");
    let (good, bad) = (fixture(TINY), bad.to_str().unwrap().to_string());
    for (a, b, side) in [(&good, &bad, "B"), (&bad, &good, "A")] {
        let (code, report) = diff(&[a, b, "--tokens", "1,2,3"]);
        let first = &report["first"];
        assert_eq!(
            (code, &first["stage"], &first["layer"], &first["tensor"]),
            (1, &json!("q_post_rope"), &json!(2), &json!(name))
        );
        assert!(first["why"].as_str().unwrap().starts_with(&format!("{side} cannot be loaded: tensor")), "{first}");
    }
    assert!(refused(&[&bad, &bad, "--kv-b", "f32", "--tokens", "1"]).contains("is missing"));
}

/// The tiny model with the first seven of its eight experts.
fn seven_experts() -> Model {
    let mut model = Model::read(&fixture(TINY)).u32("qwen3moe.expert_count", 7);
    for t in model.tensors.iter_mut().filter(|t| t.name.contains("_exps.") || t.name.contains("ffn_gate_inp")) {
        *t.ne.last_mut().unwrap() = 7;
        t.data.truncate(t.data.len() / 8 * 7);
    }
    model
}

#[test]
fn another_number_of_experts_is_a_finding_and_no_panic() {
    let other = seven_experts().write(&folder("diff_seven"), "b.gguf");
    let tokens: Vec<String> = (0..30).map(|i| (11 + 67 * i).to_string()).collect();
    for (a, b) in [(fixture(TINY), other.to_str().unwrap()), (other.display().to_string(), &fixture(TINY))] {
        let (code, report) = diff(&[&a, b, "--tokens", &tokens.join(",")]);
        let first = &report["first"];
        assert_eq!(
            (code, &first["stage"], &first["mode"]),
            (1, &json!("moe_router_logits"), &json!("shape")),
            "{first}"
        );
        assert!(first["why"].as_str().unwrap().contains("qwen3moe.expert_count"), "{first}");
        assert!(report["moe"]["n_flipped"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_tensor_stored_as_another_type_is_named_though_its_values_are_the_same() {
    let mut model = Model::read(&fixture(TINY));
    let t = model.tensors.iter_mut().find(|t| t.name == "blk.2.ffn_down_exps.weight").unwrap();
    let mut values = vec![0.0; t.ne.iter().product::<u64>() as usize];
    apr_core::qtype::dequantize_row(t.qtype, &t.data, &mut values);
    t.data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    t.qtype = apr_core::qtype::GgmlType::F32;
    let other = model.write(&folder("diff_type"), "b.gguf");
    let (code, report) = diff(&[&fixture(TINY), other.to_str().unwrap(), "--tokens", TOKENS]);
    let first = &report["first"];
    assert_eq!((code, &first["tensor"]), (1, &json!("blk.2.ffn_down_exps.weight")), "{first}");
    assert_eq!(first["why"], "the tensor is Q6_K in A and F32 in B");
}

#[test]
fn long_metadata_is_told_by_its_first_difference() {
    let mut model = Model::read(&fixture(TINY));
    let tokens = model.metadata.iter_mut().find(|(key, _)| key == "tokenizer.ggml.tokens").unwrap();
    if let apr_core::gguf::Value::Array(apr_core::gguf::Array::String(tokens)) = &mut tokens.1 {
        tokens.swap(1000, 1001);
    }
    let other = model.write(&folder("diff_tokens"), "b.gguf");
    let (_, report) = diff(&[&fixture(TINY), other.to_str().unwrap(), "--tokens", "1,2"]);
    assert!(report["metadata"][0]["a"].as_str().unwrap().starts_with("element 1000: "), "{}", report["metadata"]);
}

#[test]
fn options_for_a_side_that_has_run_already_are_refused() {
    let trace = golden_trace(&folder("diff_options"), TOKENS);
    let (trace, file) = (trace.to_str().unwrap(), fixture(TINY));
    assert!(refused(&[trace]).contains("would run as A does"));
    assert!(refused(&[trace, "--device-b", "reference"]).contains("saved trace, which cannot be run"));
    assert!(refused(&[trace, &file, "--kv-a", "f32"]).contains("options for side a"));
}
