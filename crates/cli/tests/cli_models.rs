//! What `apr` says about model files: broken and unsupported ones are refused by name with the right exit code, split ones are
//! joined, and nothing in a file steers the terminal.

use std::path::{Path, PathBuf};
use std::process::Command;

use apr_core::gguf::{Array, Value};

#[path = "support/apr.rs"]
mod apr;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

use apr::{Done, apr, fixture, folder};
use model::Model;

/// A small mixture of experts with a chat template.
fn moe() -> Model {
    Model::read(&fixture("arch/qwen3moe-odd.gguf"))
}

#[track_caller]
fn run(path: &Path) -> Done {
    apr(["run".as_ref(), path.as_os_str(), "hi".as_ref(), "-n".as_ref(), "4".as_ref()])
}

/// Writes the model, runs it, and expects that it is refused with exit code 3 and these words.
#[track_caller]
fn refused(model: Model, name: &str, words: &[&str]) {
    let path = model.write(&folder(name), "model.gguf");
    run(&path).fails(3, words);
    apr(["run".as_ref(), path.as_os_str(), "hi".as_ref(), "--device".as_ref(), "reference".as_ref()]).fails(3, words);
}

fn write(folder_name: &str, file: &str, bytes: &[u8]) -> PathBuf {
    let path = folder(folder_name).join(file);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn the_writer_makes_the_fixture_again() {
    let path = moe().write(&folder("rewritten"), "model.gguf");
    assert_eq!(run(&path).answer(), run(fixture("arch/qwen3moe-odd.gguf").as_ref()).answer());
}

#[test]
fn every_architecture_runs_on_every_device() {
    let names = ["qwen3moe-odd", "qwen3", "qwen3-yarn", "qwen2", "llama", "llama3-ropefreqs", "llama-linear"];
    for name in names {
        for device in ["cpu", "reference"] {
            let path = fixture(&format!("arch/{name}.gguf"));
            let args = ["run", &path, "hi", "--raw", "-n", "4", "--ignore-eos", "--device", device, "--json"];
            let report = apr(args).json();
            assert_eq!(report["completion_tokens"], 4, "{name} on {device}");
            assert!(report["device"].as_str().unwrap().starts_with(device), "{name}: {report}");
        }
    }
}

#[test]
fn paths_that_are_no_model() {
    let dir = folder("no_model");
    run(&dir.join("absent.gguf")).fails(1, &["absent.gguf", "No such file"]);
    let done = run(&dir.join("absent.gguf"));
    assert_eq!(done.err.matches("No such file").count(), 1, "the cause is said once: {}", done.err);
    run(&dir).fails(3, &["no_model", "a folder"]);
    run(&write("no_model_empty", "empty.gguf", b"")).fails(3, &["empty.gguf", "empty"]);
    run("/dev/null".as_ref()).fails(3, &["/dev/null", "not a regular file"]);
    let fifo = dir.join("pipe.gguf");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    run(&fifo).fails(3, &["pipe.gguf", "not a regular file"]);
    for command in ["inspect", "tokenize", "bench"] {
        apr([command.as_ref(), dir.join("absent.gguf").as_os_str()]).fails(1, &["absent.gguf", "No such file"]);
    }
}

#[test]
fn other_formats_are_named() {
    let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let safetensors = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat();
    run(&write("safetensors", "m.safetensors", &safetensors)).fails(3, &["safetensors", "GGUF file is needed"]);
    run(&write("apr_file", "m.apr", b"APR\0\x02\0\0\0........................"))
        .fails(3, &["APR", "GGUF file is needed"]);
    run(&write("text_file", "m.gguf", b"<html>404 Not Found</html>")).fails(3, &["not a GGUF file"]);
}

#[test]
fn truncated_files_name_what_is_missing() {
    let bytes = moe().bytes();
    run(&write("cut_data", "m.gguf", &bytes[..bytes.len() - 1])).fails(3, &["m.gguf", "tensor", "attn_k_norm"]);
    run(&write("cut_head", "m.gguf", &bytes[..100])).fails(3, &["ends too early"]);
    run(&write("cut_magic", "m.gguf", &bytes[..3])).fails(3, &["m.gguf"]);
}

#[test]
fn unsupported_architectures_list_the_supported_ones() {
    let all = ["'qwen3_5moe'", "qwen3moe", "qwen3", "qwen2", "llama"];
    refused(moe().string("general.architecture", "qwen3_5moe"), "arch", &all);
    refused(moe().without("general.architecture"), "arch_none", &["general.architecture", "missing"]);
    // Looking inside still works, and says the same at the end.
    let path = moe().string("general.architecture", "qwen3_5moe").write(&folder("arch_inspect"), "m.gguf");
    let done = apr(["inspect".as_ref(), path.as_os_str()]);
    assert_eq!(done.code, Some(3));
    assert!(done.out.contains("blk.0.attn_q.weight") && done.err.contains("'qwen3_5moe'"), "{done:?}");
}

#[test]
fn unsupported_scaling_is_refused() {
    refused(moe().string("qwen3moe.rope.scaling.type", "longrope"), "rope", &["rope.scaling.type", "longrope", "yarn"]);
    let linear = moe().string("qwen3moe.rope.scaling.type", "linear");
    refused(linear, "rope_factor", &["qwen3moe.rope.scaling.factor", "missing"]);
}

#[test]
fn tokenizers_are_never_guessed() {
    refused(moe().string("tokenizer.ggml.pre", "deepseek-v3"), "pre", &["tokenizer.ggml.pre", "deepseek-v3", "qwen2"]);
    refused(moe().without("tokenizer.ggml.pre"), "pre_none", &["tokenizer.ggml.pre", "qwen2"]);
    refused(moe().string("tokenizer.ggml.model", "llama"), "spm", &["tokenizer.ggml.model", "llama", "gpt2"]);
    refused(moe().without("tokenizer.ggml.tokens"), "no_tokens", &["tokenizer.ggml.tokens", "missing"]);
    refused(moe().u32("tokenizer.ggml.eos_token_id", 999_999), "eos", &["eos_token_id", "999999", "272"]);
    let path = moe().without("tokenizer.ggml.pre").write(&folder("pre_tokenize"), "m.gguf");
    apr(["tokenize".as_ref(), path.as_os_str(), "hi".as_ref()]).fails(3, &["tokenizer.ggml.pre"]);
}

#[test]
fn chat_templates_are_checked_at_load() {
    let key = "tokenizer.chat_template";
    refused(moe().string(key, "{% for m in messages %}{{ m"), "template", &["chat template", "line 1"]);
    let path = moe().string(key, "{{ raise_exception('only \x1b[31mroses') }}").write(&folder("raise"), "m.gguf");
    run(&path).fails(3, &["refuses this conversation", "only [31mroses"]);
    let path = moe().string(key, "{% for i in range(99999999) %}{% endfor %}").write(&folder("fuel"), "m.gguf");
    run(&path).fails(3, &["chat template"]);
    let path = moe().without(key).write(&folder("no_template"), "m.gguf");
    run(&path).fails(2, &["no chat template", "--raw"]);
    apr(["run".as_ref(), path.as_os_str(), "hi".as_ref(), "--raw".as_ref(), "-n".as_ref(), "1".as_ref()]).answer();
}

#[test]
fn sampling_defaults_come_from_the_file() {
    let warm = moe().set("general.sampling.temp", Value::F32(1.0)).write(&folder("warm"), "m.gguf");
    let tokens = |args: &[&str]| {
        let args = [&["hi", "-n", "8", "--ignore-eos", "--json"], args].concat().into_iter().map(std::ffi::OsStr::new);
        apr(["run".as_ref(), warm.as_os_str()].into_iter().chain(args)).json()["tokens"].clone()
    };
    assert_ne!(tokens(&["--seed", "1"]), tokens(&["--seed", "2"]));
    assert_eq!(tokens(&["--seed", "1", "--temp", "0"]), tokens(&["--seed", "2", "--temp", "0"]));
    let wild = moe().set("general.sampling.top_p", Value::F32(7.0));
    refused(wild, "wild", &["general.sampling", "top_p is 7"]);
    refused(moe().string("general.sampling.temp", "hot"), "hot", &["general.sampling.temp", "string"]);
}

#[test]
fn tensors_are_held_against_the_metadata() {
    let name = "blk.0.ffn_up_exps.weight";
    refused(moe().without_tensor(name), "missing", &[name, "missing"]);
    refused(moe().without_tensor("token_embd.weight"), "no_embd", &["token_embd.weight", "missing"]);
    refused(moe().with_tensor("blk.0.attn_sinks.weight", &[2]), "extra", &["blk.0.attn_sinks.weight", "not part"]);
    let norm = "blk.0.attn_q_norm.weight";
    refused(moe().without_tensor(norm).with_tensor(norm, &[32]), "shape", &[norm, "[32]", "[64]"]);
    refused(moe().u32("qwen3moe.expert_count", 13), "experts", &["ffn_gate_inp.weight", "12", "13"]);
}

#[test]
fn hyper_parameters_are_checked() {
    let key = |name: &str| format!("qwen3moe.{name}");
    refused(moe().u32(&key("expert_used_count"), 13), "used", &["expert_used_count", "13", "12"]);
    refused(moe().u32(&key("expert_used_count"), 0), "used_0", &["expert_used_count", "0"]);
    refused(moe().u32(&key("attention.head_count"), 0), "heads_0", &["attention.head_count", "is 0"]);
    refused(moe().u32(&key("attention.head_count_kv"), 3), "kv_3", &["attention.head_count_kv", "3"]);
    refused(moe().u32(&key("block_count"), 4_000_000_000), "blocks", &["block_count", "4000000000"]);
    refused(moe().u32(&key("block_count"), 2), "blocks_2", &["blk.1.", "missing"]);
    refused(moe().u32(&key("context_length"), 0), "ctx_0", &["context_length", "0"]);
    refused(moe().without(&key("embedding_length")), "no_embd_key", &["qwen3moe.embedding_length", "missing"]);
    let eps = key("attention.layer_norm_rms_epsilon");
    refused(moe().set(&eps, Value::F32(f32::NAN)), "eps", &["layer_norm_rms_epsilon", "NaN"]);
}

#[test]
fn numbers_that_are_none_are_never_an_answer() {
    // A file may hold them, so that it can be looked into; they are found when the logits are looked at, on whatever way they took. So
    // are finite weights whose products overflow.
    let tensors =
        ["output_norm.weight", "blk.0.ffn_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"];
    for (name, value) in tensors.iter().flat_map(|name| [(name, 3e38), (name, f32::NAN)]) {
        let path = moe().filled(name, value).write(&folder(&format!("overflow_{name}_{value}")), "m.gguf");
        for device in ["cpu", "reference"] {
            let args = ["hi", "-n", "4", "--device", device].map(std::ffi::OsStr::new);
            let done = apr([&["run".as_ref(), path.as_os_str()], &args[..]].concat());
            assert_eq!(done.code, Some(1), "{name} on {device}: {done:?}");
            done.fails(1, &["logit", "not a number", "apr trace"]);
        }
    }
}

#[test]
fn split_models_run_by_any_part() {
    let dir = folder("split");
    let whole = run(fixture("arch/qwen3moe-odd.gguf").as_ref()).answer();
    let [first, second] = moe().write_split(&dir, "model");
    assert_eq!(run(&first).answer(), whole);
    assert_eq!(run(&second).answer(), whole);
    let done = apr(["inspect".as_ref(), second.as_os_str(), "--json".as_ref()]).json();
    assert_eq!((&done["parts"], &done["architecture"]), (&2.into(), &"qwen3moe".into()));

    let alone = dir.join("renamed.gguf");
    std::fs::copy(&first, &alone).unwrap();
    run(&alone).fails(3, &["renamed.gguf", "2 files"]);
    std::fs::remove_file(&second).unwrap();
    run(&first).fails(3, &["model-00002-of-00002.gguf", "missing"]);
    std::fs::create_dir(&second).unwrap();
    run(&first).fails(3, &["model-00002-of-00002.gguf", "a folder"]);
    std::fs::remove_dir(&second).unwrap();
    std::fs::write(&second, std::fs::read(&first).unwrap()).unwrap();
    run(&first).fails(3, &["part 2", "part 1"]);
}

#[test]
fn contexts_that_no_memory_holds_are_refused() {
    let path = moe().u32("qwen3moe.context_length", u32::MAX).write(&folder("memory"), "m.gguf");
    let with_ctx = |n: &str| {
        apr([
            "run".as_ref(),
            path.as_os_str(),
            "hi".as_ref(),
            "-n".as_ref(),
            "1".as_ref(),
            "--ctx".as_ref(),
            n.as_ref(),
        ])
    };
    with_ctx("2000").answer();
    // 256 bytes of keys and values per position, and 8 of their scales.
    with_ctx("4000000000").fails(4, &["--ctx 4000000000", "1056000000000 bytes", "available", "would fit"]);
}

#[test]
fn names_from_a_file_do_not_steer_the_terminal() {
    let hostile = "\x1b]0;owned\x07\x1b[2J\u{9b}31m";
    let strings = Value::Array(Array::String(vec![hostile.to_string(); 2]));
    let model = moe().string("general.name", hostile).set("general.tags", strings).string(&format!("x.{hostile}"), "y");
    let model = model.string("tokenizer.chat_template", &format!("{hostile}{{{{ messages[0].content }}}}"));
    let path = model.clone().write(&folder("escapes"), "m.gguf");
    let done = apr(["inspect".as_ref(), path.as_os_str()]);
    assert!(done.out.contains("]0;owned"), "{}", done.out);
    assert!(!done.out.chars().any(|c| c.is_control() && c != '\n'), "{:?}", done.out);
    let json = apr(["inspect".as_ref(), path.as_os_str(), "--json".as_ref()]);
    assert!(!json.out.chars().any(|c| c.is_control() && c != '\n'), "{:?}", json.out);
    assert_eq!(json.json()["metadata"]["general.name"], hostile, "JSON loses nothing");

    let path = model.string("general.architecture", hostile).write(&folder("escapes_arch"), "m.gguf");
    let done = run(&path);
    assert!(!done.err.chars().any(|c| c.is_control() && c != '\n'), "{:?}", done.err);
    done.fails(3, &["not supported"]);
}

#[cfg(unix)]
#[test]
fn paths_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let path = folder("not_utf8").join(std::ffi::OsStr::from_bytes(b"m\xff.gguf"));
    std::fs::write(&path, moe().bytes()).unwrap();
    run(&path).answer();
    for command in ["inspect", "tokenize"] {
        assert_eq!(apr([command.as_ref(), path.as_os_str()]).code, Some(0), "{command}");
    }
    std::fs::remove_file(&path).unwrap();
    run(&path).fails(1, &["No such file"]);
}
