//! `apr bench`: its tests by name, their figures in the table and in JSON, and what cannot be measured.

use serde_json::Value;

#[path = "support/apr.rs"]
mod apr;

use apr::{apr, fixture, folder, tiny};

/// Runs one thread and one repetition, and reads the JSON.
#[track_caller]
fn bench(args: &[&str]) -> Value {
    apr([&["bench", &tiny(), "--json", "--reps", "1", "--threads", "1"], args].concat()).json()
}

fn names(report: &Value) -> Vec<&str> {
    let results = report["results"].as_array().expect("results are a list");
    results.iter().map(|r| r["test"].as_str().expect("a test has a name")).collect()
}

#[track_caller]
fn number(of: &Value, name: &str) -> f64 {
    let x = of[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {of}"));
    assert!(x.is_finite() && x >= 0.0, "{name} in {of}");
    x
}

#[test]
fn every_depth_runs_every_prompt_and_every_decode() {
    let report = bench(&["-p", "8,16", "-n", "2,0", "-d", "0,64", "-b", "1,3"]);
    let expected = ["pp8", "pp16", "tg2", "tg2b3", "pp8@d64", "pp16@d64", "tg2@d64", "tg2b3@d64", "load"];
    assert_eq!(names(&report), expected);
    assert_eq!(names(&bench(&["-p", "0", "-n", "0"])), ["load"]);
    assert_eq!(names(&bench(&["-p", "4", "-n", "0", "--no-load"])), ["pp4"]);
}

#[test]
fn figures_follow_from_what_was_measured() {
    let report = bench(&["-p", "8", "-n", "4", "-d", "16", "--kv", "q8_0"]);
    assert_eq!(report["schema"], "apr.bench/2");
    assert_eq!(
        (&report["threads"], &report["kv"], &report["model"]),
        (&1.into(), &"q8_0".into(), &"tiny-qwen3moe".into())
    );
    let date = report["date"].as_str().unwrap();
    assert!(date.len() == 20 && date.starts_with("20") && date.ends_with('Z'), "{date}");
    for name in ["cpu", "arch", "os"] {
        assert!(!report["machine"][name].as_str().unwrap().is_empty(), "{report}");
    }
    assert!(number(&report["machine"], "memory_bytes") > 1e6 && number(&report["machine"], "cpus") >= 1.0);
    for r in &report["results"].as_array().unwrap()[..2] {
        let limits = &r["limits"];
        let close = |name: &str, expected: f64| {
            let got = number(r, name);
            assert!(expected > 0.0 && (got / expected - 1.0).abs() < 1e-6, "{name} is {got}, expected {expected}: {r}");
        };
        let tok_per_s = number(r, "tok_per_s");
        close("gb_per_s", number(r, "read_bytes_per_token") * tok_per_s / 1e9);
        close("gmac_per_s", number(r, "mac_per_token") * tok_per_s / 1e9);
        close("share_of_read", number(r, "gb_per_s") / number(limits, "read_gb_per_s"));
        close("share_of_int8", number(r, "gmac_per_s") / number(limits, "int8_gmac_per_s"));
        close("mac_per_cycle_per_core", number(r, "gmac_per_s") / number(limits, "clock_ghz"));
        let bandwidth = number(r, "share_of_read") > number(r, "share_of_int8");
        assert_eq!(r["bound_by"], if bandwidth { "bandwidth" } else { "compute" }, "{r}");
    }
    // A layer of the tiny model: q, k, v, o; router; gate, up and down of the experts that a token uses.
    assert_eq!(number(&report, "head_weights"), 2048.0 * 256.0);
    assert_eq!(number(&report, "active_weights"), 4.0 * 788_480.0);
    let decode = &report["results"][1];
    let attention = number(decode, "mac_per_token") - 4.0 * 788_480.0 - 2048.0 * 256.0;
    // Positions 17 to 20 of four layers and eight heads of 64, scores and values.
    assert_eq!(attention, 2.0 * 4.0 * 512.0 * (17.0 + 18.0 + 19.0 + 20.0) / 4.0);
}

#[test]
fn sequences_that_decode_together_share_what_they_read() {
    let report = bench(&["-p", "0", "-n", "8", "-b", "1,8", "--no-load"]);
    assert_eq!(names(&report), ["tg8", "tg8b8"]);
    let bytes = |i: usize| number(&report["results"][i], "read_bytes_per_token");
    // Eight tokens of one step read every matrix once, and no expert twice; but they are not all the same token, which would make it
    // an eighth.
    assert!(bytes(1) < 0.6 * bytes(0), "{} and {} bytes per token", bytes(0), bytes(1));
    assert!(bytes(1) > 0.15 * bytes(0), "{} and {} bytes per token", bytes(0), bytes(1));
    let macs = |i: usize| number(&report["results"][i], "mac_per_token");
    assert_eq!(macs(0), macs(1), "a token is as much work in company as alone");
}

#[test]
fn the_load_test_is_a_process_of_its_own() {
    let report = bench(&["-p", "0", "-n", "0", "--ctx", "64", "--isa", "scalar"]);
    let load = &report["results"][0];
    let seconds = number(load, "seconds");
    assert!(seconds > 1e-4 && seconds < 30.0, "{load}");
    // The file is mapped: what a token needs of its 5.6 MB, and the program itself.
    let peak = number(load, "peak_rss_bytes");
    assert!(peak > 3e6 && peak < 200e6, "{load}");
    assert_eq!(report["limits"], Value::Null, "nothing was held against them");
    // What the process says when it fails, with its exit code: the context holds one token, and two are asked for.
    apr(["bench", &tiny(), "-p", "0", "-n", "0", "--ctx", "1"]).fails(2, &["the load test's process", "--ctx"]);
}

#[test]
fn the_table_has_a_line_per_test() {
    let args = ["bench", &tiny(), "-p", "4", "-n", "2", "--reps", "1", "--threads", "1"];
    let text = apr(args).answer();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 6, "{text}");
    let starts =
        ["tiny-qwen3moe, 5.56 MB, on cpu (", "test ", "pp4 ", "tg2 ", "load ", "this machine with 1 thread: reads "];
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line:?} starts with {start:?}");
    }
    for word in ["tok/s", "MB/token", "GB/s", "MAC/cycle", "of read", "of int8", "bound by"] {
        assert!(lines[1].contains(word), "{word:?} in {:?}", lines[1]);
    }
    assert!(lines[2].contains(" % ") && lines[4].contains(" s ") && lines[4].contains("peak memory "), "{text}");
}

#[test]
fn a_device_that_counts_no_bytes_leaves_them_out() {
    let report = bench(&["-p", "0", "-n", "1", "--no-load", "--device", "reference"]);
    let r = &report["results"][0];
    for name in ["gb_per_s", "read_bytes_per_token", "share_of_read", "bound_by"] {
        assert_eq!(r[name], Value::Null, "{r}");
    }
    assert_eq!(report["isa"], Value::Null);
    assert!(number(r, "gmac_per_s") > 0.0);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        apr([&["bench", &tiny()], args].concat()).fails(code, words);
    };
    refused(&["--reps", "0"], 2, &["--reps", "at least 1"]);
    refused(&["-b", "1,0"], 2, &["-b", "at least 1"]);
    refused(&["-p", "0", "-n", "0", "--no-load"], 2, &["-p", "-n", "nothing to measure"]);
    refused(&["-p", "5000"], 2, &["pp5000", "5000", "4096", "--ctx"]);
    refused(&["-p", "0", "-n", "97", "-d", "0,4000"], 2, &["tg97@d4000", "4097", "4096"]);
    refused(&["-p", "0", "-n", "4000", "-b", "100000000"], 4, &["tg4000b100000000", "bytes"]);
    for list in ["1,,2", "x", "-1", ""] {
        let done = apr(["bench", &tiny(), &format!("-p={list}")]);
        assert_eq!((done.code, done.out.as_str()), (Some(2), ""), "{list:?}: {}", done.err);
    }
    let broken = folder("bench_broken").join("broken.gguf");
    std::fs::write(&broken, &std::fs::read(fixture("tiny-qwen3moe.gguf")).unwrap()[..5000]).unwrap();
    apr(["bench".as_ref(), broken.as_os_str()]).fails(3, &["broken.gguf"]);
}
