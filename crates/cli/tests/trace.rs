//! `apr trace` as its users try it: what it says about a model and a pass, what it saves, and what it refuses.

use std::collections::BTreeMap;
use std::path::Path;

#[path = "support/apr.rs"]
mod apr;

use apr::{Done, apr, command, finish, fixture, folder, tiny};
use apr_core::stats::RowStats;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const SEVEN: &str = "100,200,300,400,500,600,700";
/// Relative RMS within which the reference agrees with Hugging Face.
const BOUND: f64 = 1e-4;

/// `apr trace` on the tiny model.
#[track_caller]
fn trace(args: &[&str]) -> Done {
    apr([&["trace", &tiny()], args].concat())
}

/// A tensor of a safetensors file: shape and values, ids as floats.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let value = |dtype, b: &[u8]| match dtype {
        Dtype::I32 => i32::from_le_bytes(b.try_into().unwrap()) as f32,
        _ => f32::from_le_bytes(b.try_into().unwrap()),
    };
    let read =
        |t: &safetensors::tensor::TensorView<'_>| t.data().chunks_exact(4).map(|b| value(t.dtype(), b)).collect();
    file.iter().map(|(name, t)| (name.to_string(), (t.shape().to_vec(), read(&t)))).collect()
}

fn metadata(path: &Path) -> BTreeMap<String, String> {
    let bytes = std::fs::read(path).unwrap();
    let (_, m) = SafeTensors::read_metadata(&bytes).unwrap();
    m.metadata().clone().unwrap().into_iter().collect()
}

fn golden() -> Tensors {
    tensors(Path::new(&fixture("tiny-7tok.safetensors")))
}

fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum = |f: &dyn Fn(usize) -> f64| (0..b.len()).map(f).sum::<f64>();
    let error = sum(&|i| (f64::from(a[i]) - f64::from(b[i])).powi(2));
    (error / sum(&|i| f64::from(b[i]).powi(2))).sqrt()
}

#[test]
fn json_is_one_object_with_the_documented_keys() {
    let done = apr(["trace", "--json", "--payload", &tiny()]);
    assert!(done.err.contains("What is 2+2?"), "{}", done.err);
    let report = done.json();
    let keys = "schema format architecture num_layers hidden_dim vocab_size num_heads num_kv_heads device precision prompt \
                encoded_tokens positions embedding layers final_norm logits_stats logits decode anomalies time";
    for key in keys.split_whitespace() {
        assert!(report.get(key).is_some(), "{key}");
    }
    assert_eq!((&report["schema"], &report["format"]), (&"apr.trace/1".into(), &"GGUF (qwen3moe)".into()));
    assert_eq!((&report["architecture"], &report["prompt"]), (&"qwen3moe".into(), &"What is 2+2?".into()));
    assert_eq!(
        (&report["num_layers"], &report["hidden_dim"], &report["vocab_size"]),
        (&4.into(), &256.into(), &2048.into())
    );
    let n = report["encoded_tokens"].as_array().unwrap().len();
    assert_eq!(report["positions"], serde_json::json!([n - 1, n]), "the last position, unless told otherwise");
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 4);
    for (i, layer) in layers.iter().enumerate() {
        assert_eq!(layer["layer_idx"], i);
        let first: Vec<&str> = layer.as_object().unwrap().keys().map(String::as_str).take(7).collect();
        assert_eq!(first, ["layer_idx", "attn_norm", "qkv", "attn_out", "ffn_norm", "ffn_out", "output"]);
        for (key, block) in layer.as_object().unwrap().iter().skip(1) {
            check_block(block, key);
        }
        for (name, same) in [("qkv", "qkv_matmul"), ("ffn_out", "moe_ffn_out"), ("output", "post_ffn_residual")] {
            assert_eq!(layer[name], layer[same]);
        }
        assert_eq!((&layer["moe_router"]["count"], &layer["moe_router_logits"]["count"]), (&2.into(), &8.into()));
    }
    ["embedding", "final_norm", "logits_stats"].iter().for_each(|key| check_block(&report[*key], key));
    let top = report["logits"]["top_k"].as_array().unwrap();
    assert_eq!(top.len(), 5);
    assert!(top.is_sorted_by(|a, b| a["logit"].as_f64() >= b["logit"].as_f64()));
    assert!(top.iter().all(|t| t["token_id"].is_u64() && t["text"].is_string()));
    let l2 = report["logits"]["l2_norm"].as_f64().unwrap();
    assert!(l2 > 0.0 && (l2 / report["logits_stats"]["l2"].as_f64().unwrap() - 1.0).abs() < 1e-12);
    assert!(report["time"]["total_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(report["anomalies"], serde_json::json!([]));
}

fn check_block(block: &Value, what: &str) {
    let keys: Vec<&str> = block.as_object().expect(what).keys().map(String::as_str).collect();
    assert_eq!(keys.join(" "), "min max mean std_dev l2 nan_count inf_count zero_count count", "{what}");
    for key in ["min", "max", "mean", "std_dev", "l2"] {
        assert!(block[key].as_f64().is_some_and(f64::is_finite), "{what} {key}: {block}");
    }
    assert_eq!((&block["nan_count"], &block["inf_count"]), (&0.into(), &0.into()), "{what}");
}

#[test]
fn statistics_are_those_of_hugging_face_at_every_stage() {
    let golden = golden();
    let base = ["--device", "reference", "--kv", "f32", "--unfused", "--tokens", SEVEN, "--json", "--positions"];
    for (positions, from, to) in [("all", 0, 7), ("last", 6, 7), ("2..5", 2, 5)] {
        let report = trace(&[&base[..], &[positions]].concat()).json();
        let mut n = 0;
        for (name, (shape, values)) in golden.iter().filter(|(name, _)| !["tokens", "greedy"].contains(&name.as_str()))
        {
            let block = match name.split('.').collect::<Vec<_>>()[..] {
                ["blk", layer, stage] => &report["layers"][layer.parse::<usize>().unwrap()][stage],
                ["lm_head"] => &report["logits_stats"],
                _ => &report[name],
            };
            let cols: usize = shape[1..].iter().product();
            let s = RowStats::of(&values[from * cols..to * cols]);
            assert_eq!(block["count"], s.count, "{name} of {positions}");
            let expected = [s.min.into(), s.max.into(), s.mean(), s.std_dev(), s.l2()];
            for (key, expected) in ["min", "max", "mean", "std_dev", "l2"].iter().zip(expected) {
                let got = block[*key].as_f64().unwrap_or_else(|| panic!("{name} has {key}: {block}"));
                let scale = if *key == "l2" { s.l2() } else { f64::from(s.max.abs().max(s.min.abs())) };
                assert!((got - expected).abs() <= BOUND * scale, "{name} {key} of {positions}: {got}, {expected}");
            }
            n += 1;
        }
        assert!(n > 60, "{n} stages were compared");
    }
}

#[test]
fn saved_tensors_are_those_of_hugging_face() {
    let (golden, dir) = (golden(), folder("trace-saved"));
    let dir_arg = dir.to_str().unwrap();
    let args = ["--device", "reference", "--kv", "f32", "--unfused", "--tokens", SEVEN, "--save-tensor", "all"];
    let done = trace(&[&args[..], &["--save-tensor-dir", dir_arg, "--json"]].concat());
    let path = dir.join("trace.safetensors");
    assert_eq!(done.json()["saved"], path.to_str().unwrap());
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "nothing else is left there");
    let saved = tensors(&path);
    for (name, (shape, values)) in golden.iter().filter(|(name, _)| !["tokens", "greedy"].contains(&name.as_str())) {
        let (got_shape, got) = saved.get(name).unwrap_or_else(|| panic!("{name} is saved"));
        assert_eq!(got_shape, shape, "{name}");
        let error = relative_rms(got, values);
        assert!(error < if name.ends_with("indices") { 1e-12 } else { BOUND }, "{name}: {error}");
    }
    assert!(!saved.contains_key("blk.0.attn_scores"), "scores are saved by name only");
    let m = metadata(&path);
    let expected = [
        ("format", "apr.trace/1"),
        ("architecture", "qwen3moe"),
        ("tokens", "[100,200,300,400,500,600,700]"),
        ("n_prompt", "7"),
        ("positions", "[0,1,2,3,4,5,6]"),
        ("device", "reference"),
        ("isa", ""),
        ("precision", "f32"),
        ("kv", "f32"),
        ("fused", "false"),
    ];
    expected.iter().for_each(|(key, value)| assert_eq!(m[*key], *value, "{key}"));
    assert_eq!((m["model_sha256"].len(), m["model"].as_str()), (64, tiny().as_str()));
}

#[test]
fn layers_positions_and_decoded_tokens_choose_what_is_saved() {
    let dir = folder("trace-chosen");
    let dir_arg = dir.to_str().unwrap();
    // The command as the documents have it, in that order, for a model of more layers.
    let stages = "moe_router,moe_ffn_out";
    let done = apr([
        &["trace", "--json", "--payload", "--save-tensor", stages, "--save-tensor-layers", "1..48"][..],
        &["--save-tensor-dir", dir_arg, &tiny(), "--tokens", SEVEN, "--decode", "3", "--positions", "5..7"],
        &["--device", "reference"],
    ]
    .concat());
    assert!(done.err.contains("note: --save-tensor-layers 1..48") && done.err.contains("1..4"), "{}", done.err);
    let report = done.json();
    let steps = report["decode"].as_array().unwrap();
    let decoded: Vec<u64> = steps.iter().map(|s| s["token_id"].as_u64().unwrap()).collect();
    assert_eq!(decoded, [169, 123, 1442], "the greedy tokens of Hugging Face");
    assert!(steps.iter().all(|s| s["text"].is_string() && s["top_k"][0]["token_id"].is_u64()));
    assert_eq!(steps[0]["top_k"][0]["token_id"], 123, "what follows a step's token");
    steps[2]["layers"].as_array().unwrap().iter().for_each(|layer| check_block(&layer["output"], "output"));
    let path = dir.join("trace.safetensors");
    let saved = tensors(&path);
    let names: Vec<&str> = saved.keys().map(String::as_str).collect();
    let of = |layer| [format!("blk.{layer}.moe_ffn_out"), format!("blk.{layer}.moe_router")];
    assert_eq!(names, (1..4).flat_map(of).collect::<Vec<_>>());
    assert_eq!(saved["blk.1.moe_router"].0, [5, 2]);
    let sums = saved["blk.3.moe_router"].1.chunks_exact(2).map(|w| w[0] + w[1]);
    sums.for_each(|sum| assert!((sum - 1.0).abs() < 1e-6, "every saved row was written: {sum}"));
    let m = metadata(&path);
    assert_eq!((m["positions"].as_str(), m["n_prompt"].as_str()), ("[5,6,7,8,9]", "7"));
    assert_eq!(m["tokens"], "[100,200,300,400,500,600,700,169,123,1442]");
}

#[test]
fn scores_of_attention_are_saved_by_name() {
    let dir = folder("trace-scores");
    let args = ["--device", "reference", "--tokens", "100,200,300", "--decode", "2", "--save-tensor", "attn_softmax"];
    trace(&[&args[..], &["--save-tensor-dir", dir.to_str().unwrap()]].concat()).answer();
    let saved = tensors(&dir.join("trace.safetensors"));
    let (shape, values) = &saved["blk.2.attn_softmax"];
    assert_eq!(shape, &[5, 4, 5], "positions, heads, positions to attend to");
    for (i, row) in values.chunks_exact(5).enumerate() {
        let own = i / 4;
        assert!(
            (row[..=own].iter().sum::<f32>() - 1.0).abs() < 1e-5 && row[own + 1..].iter().all(|&p| p == 0.0),
            "{row:?}"
        );
    }
}

#[test]
fn the_pass_that_is_traced_is_the_pass_that_answers() {
    let run = apr(["run", &tiny(), "--raw", "two words", "-n", "6", "--ignore-eos", "--json", "--temp", "0"]).json();
    for more in [&[][..], &["--unfused"], &["--positions", "all"], &["--threads", "1"]] {
        let report = trace(&[&["--prompt", "two words", "--decode", "6", "--json"], more].concat()).json();
        let steps = report["decode"].as_array().unwrap().iter();
        assert_eq!(Value::Array(steps.map(|s| s["token_id"].clone()).collect()), run["tokens"], "{more:?}");
    }
    let chat = trace(&["--chat", "hi", "--json"]).json()["encoded_tokens"].as_array().unwrap().len();
    assert_eq!(chat as u64, apr(["run", &tiny(), "hi", "-n", "0", "--json"]).json()["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn text_has_a_line_per_stage_and_layer() {
    let text = trace(&["--tokens", SEVEN, "--decode", "2"]).answer();
    for word in [
        "qwen3moe",
        "embedding",
        "layer 3/4 [OK]",
        "  moe_router_logits",
        "final_norm",
        "L2",
        "position 8",
        "nothing odd",
    ] {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert_eq!(text.matches("\n  post_ffn_residual ").count(), 4);
    assert!(!text.contains("moe_expert_gate"), "inside a fused op");
    assert!(trace(&["--tokens", SEVEN, "--unfused"]).answer().contains("\n  moe_expert_gate "));
}

/// A copy of the tiny model in which all bytes of the tensors that `which` names are set.
fn altered(name: &str, which: impl Fn(&str) -> bool) -> String {
    let mut bytes = std::fs::read(tiny()).unwrap();
    let report = apr(["inspect", &tiny(), "--json"]).json();
    for t in report["tensors"].as_array().unwrap().iter().filter(|t| which(t["name"].as_str().unwrap())) {
        let at = t["offset"].as_u64().unwrap() as usize;
        bytes[at..at + t["bytes"].as_u64().unwrap() as usize].fill(0xFF);
    }
    let path = folder(name).join("altered.gguf");
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn metadata_alone_reads_no_weights() {
    let garbage = altered("trace-garbage", |_| true);
    let report = apr(["trace", &garbage, "--json"]).json();
    assert_eq!((&report["schema"], &report["num_layers"]), (&"apr.trace-meta/1".into(), &4.into()));
    let stages = report["stages"].as_array().unwrap();
    let of = |name: &str| stages.iter().find(|s| s["stage"] == name).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(
        (&of("moe_expert_out")["shape"], &of("moe_expert_out")["per_layer"]),
        (&serde_json::json!([2, 256]), &true.into())
    );
    assert_eq!(of("attn_scores")["shape"], serde_json::json!([4, "n_kv"]));
    assert!(!stages.iter().any(|s| s["stage"] == "ffn_gate" || s["stage"] == "qkv_bias"));
    let layers = report["layers"].as_array().unwrap();
    let weights = |v: &Value| v["parameters"].as_u64().unwrap();
    assert_eq!(layers.len(), 4);
    assert!(
        weights(&layers[0]) > 0
            && layers.iter().map(weights).sum::<u64>() < report["summary"]["total_parameters"].as_u64().unwrap()
    );
    assert_eq!(layers[2]["tensors"][0]["name"].as_str().unwrap().split('.').nth(1), Some("2"));
    let text = apr(["trace", &garbage]).answer();
    for word in ["moe_router_indices", "4 x n_kv", "--payload"] {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    apr(["trace", &fixture("tokenizer-qwen3.json")]).fails(3, &["tokenizer-qwen3.json"]);
}

#[test]
fn values_that_are_not_finite_are_found_and_null_in_json() {
    let bad = altered("trace-nan", |name| name == "blk.1.ffn_norm.weight");
    let report = apr(["trace", &bad, "--tokens", SEVEN, "--json"]).json();
    let first = &report["anomalies"][0];
    assert_eq!((&first["kind"], &first["stage"]), (&"not_finite".into(), &"ffn_norm".into()));
    assert_eq!((&first["layer"], &first["position"]), (&1.into(), &6.into()));
    let block = &report["layers"][1]["ffn_norm"];
    assert_eq!(block["nan_count"], 256);
    ["min", "max", "mean", "std_dev", "l2"].iter().for_each(|key| assert!(block[*key].is_null(), "{key}: {block}"));
    assert!(report["logits"]["l2_norm"].is_null() && report["logits"]["top_k"] == serde_json::json!([]));
    check_block(&report["layers"][1]["attn_out"], "what comes before");
    let all = apr(["trace", &bad, "--tokens", SEVEN, "--json", "--positions", "2..5"]).json();
    assert_eq!(all["anomalies"][0]["position"], 2);
    let text = apr(["trace", &bad, "--tokens", SEVEN]).answer();
    assert!(text.contains("layer 1/4 [NOT FINITE]") && text.contains("blk.1.ffn_norm at position 6"), "{text}");
    apr(["trace", &bad, "--tokens", SEVEN, "--decode", "1"]).fails(1, &["position 6", "--decode"]);
}

#[test]
fn every_architecture_is_traced() {
    let (dir, mut n) = (folder("trace-architectures"), 0);
    for entry in std::fs::read_dir(fixture("arch")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let (model, html) = (path.to_str().unwrap(), dir.join("page.html"));
        let saved = ["--save-tensor", "all", "--save-tensor-dir", dir.to_str().unwrap()];
        let args = ["--tokens", "1,2,3,4,5", "--decode", "2", "--unfused", "--json", "--html", html.to_str().unwrap()];
        let report = apr([&["trace", model], &args[..], &saved].concat()).json();
        let layer = &report["layers"][0];
        ["qkv", "ffn_out", "output"].iter().for_each(|key| check_block(&layer[*key], &format!("{model} {key}")));
        if !layer["qkv_bias"].is_null() {
            assert_eq!(layer["qkv"], layer["qkv_bias"]);
            assert_ne!(layer["qkv"], layer["qkv_matmul"]);
        }
        assert_eq!(tensors(&dir.join("trace.safetensors"))["lm_head"].0[0], 7);
        apr(["trace", model]).answer();
        apr(["trace", model, "--tokens", "1,2"]).answer();
        n += 1;
    }
    assert!(n >= 7, "{n} files");
}

#[test]
fn the_page_holds_what_it_shows() {
    let html = folder("trace-page").join("page.html");
    trace(&["--tokens", SEVEN, "--decode", "2", "--html", html.to_str().unwrap()]).answer();
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.len() < 5_000_000);
    let (_, rest) = page.split_once("type=\"application/json\" id=\"data\">").expect("the page holds its data");
    let data: Value = serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap();
    let len = |v: &Value| v.as_array().unwrap_or_else(|| panic!("an array: {v}")).len();
    assert_eq!((&data["schema"], &data["run"]["positions"]), (&"apr.trace-page/1".into(), &"0..7".into()));
    assert_eq!((len(&data["tokens"]), len(&data["layers"]), len(&data["logits"]["top"])), (9, 4, 10));
    for key in ["rms", "attn_share", "ffn_share", "cosine"] {
        assert!(len(&data["residual"][key]) == 4 && data["residual"][key][3].as_f64().unwrap() > 0.0, "{key}");
    }
    let load = data["experts"]["load"][1].as_array().unwrap();
    assert_eq!(load.iter().map(|n| n.as_u64().unwrap()).sum::<u64>(), 14, "two of seven tokens each");
    assert!(
        data["experts"]["entropy"][0].as_f64().unwrap() <= 3.0
            && data["experts"]["imbalance"][0].as_f64().unwrap() >= 1.0
    );
    let m = &data["margin"][2];
    assert!(m["min"].as_f64() <= m["median"].as_f64() && m["median"].as_f64() <= m["p90"].as_f64(), "{m}");
    // After the last layer the lens sees what the model says.
    assert_eq!(data["lens"][3]["top"][0]["id"], data["logits"]["top"][0]["id"]);
    assert_eq!(data["lens"][3]["entropy"], data["logits"]["entropy"]);
    assert_eq!((len(&data["position_rms"]["positions"]), len(&data["position_rms"]["rms"][0])), (7, 7));
    let stage = &data["time"]["stages"].as_array().unwrap()[2];
    assert!(stage["ms"].as_f64().unwrap() > 0.0 && stage["bytes"].as_u64().unwrap() > 0, "{stage}");
    assert!(data["time"]["machine_gb_per_s"].as_f64().unwrap() > 0.0 && len(&data["time"]["layers_ms"]) == 4);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let long = (0..5000).map(|_| "1").collect::<Vec<_>>().join(",");
    let cases: [(&[&str], &[&str]); 19] = [
        (&["--save-tensor", "moe_routr"], &["unknown stage 'moe_routr'", "moe_router_indices"]),
        (&["--save-tensor", "attn_norm,,attn_out"], &["is empty"]),
        (&["--save-tensor", "ffn_gate"], &["no stage 'ffn_gate'", "moe_ffn_out"]),
        (&["--save-tensor", "moe_expert_gate"], &["'moe_expert_gate'", "--unfused"]),
        (&["--save-tensor", "attn_scores", "--unfused"], &["'attn_scores'", "--device reference"]),
        (&["--save-tensor", "attn_norm", "--save-tensor-layers", "4..8"], &["4..8", "4 layers"]),
        (&["--save-tensor", "attn_norm", "--save-tensor-layers", "3..3"], &["3..3", "empty"]),
        (&["--save-tensor", "attn_norm", "--save-tensor-layers", "5..2"], &["5..2", "empty"]),
        (&["--save-tensor", "attn_norm", "--save-tensor-layers", "3"], &["A..B"]),
        (&["--save-tensor-layers", "0..3"], &["--save-tensor"]),
        (&["--save-tensor-dir", "x"], &["--save-tensor"]),
        (&["--positions", "7..9", "--tokens", SEVEN], &["7..9", "7 positions"]),
        (&["--positions", "first"], &["first", "last, or all"]),
        (&["--tokens", "1,2,x"], &["'x'"]),
        (&["--tokens", "1,2048"], &["2048", "vocabulary"]),
        (&["--tokens", "1", "--prompt", "hi"], &["--prompt"]),
        (&["--prompt", ""], &["the prompt is empty"]),
        (&["--chat", ""], &["the prompt is empty"]),
        (&["--tokens", &long], &["5000", "4096"]),
    ];
    for (args, words) in cases {
        trace(args).fails(2, words);
    }
    trace(&["--tokens", SEVEN, "--decode", "5000"]).fails(2, &["7 tokens", "5000", "4096"]);
    apr(["trace", "nowhere.gguf"]).fails(1, &["nowhere.gguf"]);
}

#[test]
fn a_file_that_cannot_be_written_leaves_nothing() {
    let dir = folder("trace-full");
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec \"$0\" trace \"$1\" --tokens {SEVEN} --save-tensor all --save-tensor-dir \"$2\""
    );
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_apr"), &tiny(), dir.to_str().unwrap()]);
    shell.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    finish(shell.spawn().unwrap()).fails(4, &["trace.safetensors"]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
    let file = dir.join("file");
    std::fs::write(&file, "").unwrap();
    trace(&["--save-tensor", "all", "--save-tensor-dir", file.to_str().unwrap()]).fails(1, &["file"]);
    trace(&["--html", dir.join("no/page.html").to_str().unwrap()]).fails(1, &["page.html"]);
}

#[test]
fn without_a_folder_the_model_names_it() {
    let dir = folder("trace-default");
    let mut trace = command(["trace", &tiny(), "--save-tensor", "embedding"]);
    finish(trace.current_dir(&dir).spawn().unwrap()).answer();
    let saved = tensors(&dir.join("tiny-qwen3moe-trace/trace.safetensors"));
    assert_eq!(saved.keys().collect::<Vec<_>>(), ["embedding"]);
}
