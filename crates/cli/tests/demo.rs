//! The model that is part of the program: every command finds it where nothing has been downloaded, and what it says is English.

use std::fs;

#[path = "support/apr.rs"]
mod apr;

use apr::{apr, command, finish, folder};

/// Runs a command in an empty folder.
fn alone(name: &str, args: &[&str]) -> apr::Done {
    finish(command(args).current_dir(folder(name)).spawn().expect("apr starts"))
}

#[test]
fn every_command_finds_it_anywhere() {
    let in_folder = |args: &[&str]| alone("demo_anywhere", args);
    assert_eq!(in_folder(&["inspect", "demo", "--json"]).json()["architecture"], "qwen3moe");
    assert!(!in_folder(&["tokenize", "demo", "Once upon a time", "--ids"]).answer().is_empty());
    assert_eq!(
        in_folder(&["run", "demo", "Once upon a time", "-n", "8", "--ignore-eos", "--json"]).json()["completion_tokens"],
        8
    );
    in_folder(&["bench", "demo", "-p", "16", "-n", "4", "-r", "1", "--json"]).json();
    assert_eq!(in_folder(&["trace", "demo", "--prompt", "Once upon a time"]).code, Some(0));
    in_folder(&["serve", "plan", "demo", "--json"]).json();
    assert_eq!(in_folder(&["verify", "demo", "--json", "--layers", "4", "--positions", "1"]).code, Some(0));
}

#[test]
fn a_saved_trace_knows_its_model() {
    let dir = folder("demo_trace");
    let in_dir = |args: &[&str]| finish(command(args).current_dir(&dir).spawn().expect("apr starts"));
    let prompt = ["--prompt", "Once upon a time"];
    let done =
        in_dir(&[&["trace", "demo", "--save-tensor", "all", "--save-tensor-dir", "saved"], &prompt[..]].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
    let done = in_dir(&["diff", "saved", "demo"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let done = in_dir(&[&["diff", "demo", "--device-b", "reference"], &prompt[..]].concat());
    assert_eq!(done.code, Some(0), "{done:?}");
}

#[test]
fn a_file_of_its_name_needs_a_path() {
    let dir = folder("demo_file");
    fs::write(dir.join("demo"), "no model").unwrap();
    let run = |model| finish(command(["run", model, "hi", "-n", "1"]).current_dir(&dir).spawn().expect("apr starts"));
    let done = run("demo");
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("the file of that name is ./demo"), "{}", done.err);
    run("./demo").fails(3, &["./demo"]);
    assert!(apr(["run", "--help"]).answer().contains("./demo"), "the help says so");
}

/// Most words that it makes are words, and turns end.
#[test]
fn it_answers_in_english_and_stops() {
    let heldout = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/demo-model/heldout.txt");
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_ascii_alphabetic()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
    };
    let known: std::collections::HashSet<String> = words(&fs::read_to_string(heldout).unwrap()).into_iter().collect();
    let (mut n_known, mut n, mut n_stopped) = (0, 0, 0);
    for seed in ["1", "2", "3", "4"] {
        let report =
            alone("demo_english", &["run", "demo", "Once upon a time", "-n", "400", "--seed", seed, "--json"]).json();
        let answer = words(report["text"].as_str().unwrap());
        (n_known, n) = (n_known + answer.iter().filter(|w| known.contains(*w)).count(), n + answer.len());
        n_stopped += usize::from(report["finish_reason"] == "stop");
    }
    println!("{n_known} of {n} words are in the held-out text, {n_stopped} of 4 answers end by themselves");
    assert!(n >= 40 && n_known * 10 >= n * 6, "{n_known} of {n} words are known");
    assert!(n_stopped >= 2, "{n_stopped} of 4 answers end by themselves");
}
