//! The `apr` command as its users try it: what it prints where, which exit code it ends with, what it does with wrong arguments.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

#[path = "support/apr.rs"]
mod apr;

use apr::{Done, apr, apr_reading, command, finish, fixture, tiny};
use serde_json::Value;

/// `apr run` on the tiny model.
#[track_caller]
fn run(args: &[&str]) -> Done {
    apr([&["run", &tiny()], args].concat())
}

/// The keys of an object, in order.
#[track_caller]
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn stdout_is_the_answer_and_stderr_the_rest() {
    let done = run(&["hi", "-n", "4"]);
    let summary = done.err.trim_end().to_string();
    assert_eq!(done.err.lines().count(), 1, "{summary}");
    assert!(summary.starts_with("[prompt 12 tokens") && summary.contains("; ended by length]"), "{summary}");
    // What is drawn may also be the end of the answer.
    let drawn = run(&["hi", "-n", "4", "--temp", "1", "--ignore-eos"]);
    assert!(drawn.err.contains("; ended by length; seed "), "a seed that mattered is told: {}", drawn.err);
    let answer = done.answer();
    assert!(!answer.is_empty() && !answer.contains(['[', '\x1b']), "{answer:?}");
    let quiet = run(&["hi", "-n", "4", "--quiet"]);
    assert_eq!(quiet.err, "");
    assert_eq!(quiet.answer(), answer);
    let report = run(&["hi", "-n", "4", "--json"]);
    assert_eq!(report.err, "");
    assert_eq!(report.json()["text"], answer);
}

#[test]
fn json_has_the_documented_keys() {
    let report = run(&["hi", "-n", "4", "--seed", "7", "--json"]).json();
    let expected =
        "schema text tokens finish_reason prompt_tokens completion_tokens seed speculation device timings memory";
    assert_eq!(keys(&report).join(" "), expected);
    assert_eq!((&report["schema"], &report["finish_reason"]), (&"apr.run/1".into(), &"length".into()));
    assert_eq!((&report["prompt_tokens"], &report["seed"]), (&12.into(), &7.into()));
    assert_eq!(report["tokens"].as_array().unwrap().len(), 4);
    assert_eq!(keys(&report["speculation"]), ["steps", "drafted", "accepted"]);
    let timings = &report["timings"];
    for key in ["load_s", "prefill_s", "prefill_tok_per_s", "decode_s", "decode_tok_per_s", "read_gb_per_s"] {
        assert!(timings[key].as_f64().unwrap() > 0.0, "{key}: {timings}");
    }
    let file_bytes = std::fs::metadata(tiny()).unwrap().len();
    assert_eq!(report["memory"]["model_bytes"], file_bytes);
    assert!(timings["read_bytes_per_token"].as_u64().unwrap() < file_bytes, "{timings}");
    assert!(report["memory"]["kv_bytes"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn one_seed_is_one_text_at_any_thread_count() {
    let at = |threads, seed| {
        let sampling = ["-n", "12", "--temp", "1", "--seed", seed, "--threads", threads];
        run(&[&["Tell me a story."], &sampling[..]].concat()).answer()
    };
    let text = at("1", "1");
    assert_eq!(text, at("2", "1"));
    assert_eq!(text, at("3", "1"));
    assert_ne!(text, at("1", "2"));
    // A seed that was drawn is said, and repeats the run.
    let drawn = run(&["hi", "-n", "8", "--temp", "1", "--json"]).json();
    let again = run(&["hi", "-n", "8", "--temp", "1", "--json", "--seed", &drawn["seed"].to_string()]).json();
    assert_eq!(drawn["tokens"], again["tokens"]);
    // Greedy needs no seed.
    assert_eq!(run(&["hi", "-n", "8"]).answer(), run(&["hi", "-n", "8", "--temperature", "0"]).answer());
}

#[test]
fn guessed_tokens_change_nothing_but_the_time() {
    // This model hardly repeats itself: penalties that encourage it make it loop.
    let loops = ["--frequency-penalty", "-2", "--presence-penalty", "-2"];
    let report = |args: &[&str]| run(&[&["hi", "-n", "200", "--ignore-eos", "--json"], args].concat()).json();
    for sampling in
        [&loops[..], &["--temp", "0.5", "--seed", "3"], &["--temp", "1", "--seed", "4", "--repeat-penalty", "0.5"]]
    {
        let plain = report(&[sampling, &["--no-speculate"]].concat());
        let guessed = report(sampling);
        for key in ["text", "tokens", "finish_reason"] {
            assert_eq!(guessed[key], plain[key], "{sampling:?}");
        }
        assert!(["steps", "drafted", "accepted"].iter().all(|key| plain["speculation"][key] == 0), "{plain}");
        // Timings count tokens, however many steps they took.
        let timings = &guessed["timings"];
        let n = timings["decode_tok_per_s"].as_f64().unwrap() * timings["decode_s"].as_f64().unwrap();
        assert!((n - 199.0).abs() < 1e-6, "{n} tokens after the first");
    }
    let speculation = report(&loops)["speculation"].clone();
    assert!(
        speculation["steps"].as_u64().unwrap() > 0 && speculation["accepted"].as_u64().unwrap() > 0,
        "{speculation}"
    );
    let summary = run(&[&["hi", "-n", "200", "--ignore-eos"], &loops[..]].concat()).err;
    assert!(summary.contains(" guessed in "), "{summary}");
}

#[test]
fn samplers_act() {
    let greedy = run(&["hi", "-n", "8"]).answer();
    for narrow in [["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "1"]] {
        assert_eq!(run(&[&["hi", "-n", "8", "--temp", "1"], &narrow[..]].concat()).answer(), greedy, "{narrow:?}");
    }
    // This model hardly repeats itself: penalties that encourage it show that they act.
    let distinct = |args: &[&str]| {
        let report = run(&[&["hi", "-n", "40", "--ignore-eos", "--json"], args].concat()).json();
        let tokens = report["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap());
        tokens.collect::<std::collections::BTreeSet<_>>().len()
    };
    let plain = distinct(&[]);
    for args in [["--repeat-penalty", "0.1"], ["--frequency-penalty", "-2"], ["--presence-penalty", "-2"]] {
        assert!(distinct(&args) < plain, "{args:?} makes for fewer different tokens");
    }
    assert_eq!(distinct(&["--repeat-penalty", "0.1", "--repeat-last-n", "0"]), plain);
}

#[test]
fn sampler_values_out_of_range_are_refused() {
    let cases = [
        ("--temp", "-1", "temperature"),
        ("--temp", "nan", "temperature"),
        ("--temp", "1e999", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--top-p", "2", "top_p"),
        ("--min-p", "-0.5", "min_p"),
        ("--top-k", "-5", "--top-k"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--frequency-penalty", "-2.5", "frequency_penalty"),
        ("--presence-penalty", "9", "presence_penalty"),
        ("--seed", "18446744073709551616", "--seed"),
        ("--max-tokens", "-1", "--max-tokens"),
        ("--max-tokens", "many", "--max-tokens"),
    ];
    for (flag, value, word) in cases {
        run(&["hi", flag, value]).fails(2, &[word]);
    }
}

#[test]
fn the_number_of_tokens_is_limited() {
    let of = |args: &[&str]| run(&[&["hi", "--json", "--ignore-eos"], args].concat()).json();
    for args in [["-n", "3"], ["--max-tokens", "3"]] {
        let report = of(&args);
        assert_eq!((&report["completion_tokens"], &report["finish_reason"]), (&3.into(), &"length".into()));
    }
    let none = of(&["-n", "0"]);
    assert_eq!(
        (&none["text"], &none["tokens"], &none["finish_reason"]),
        (&"".into(), &Value::Array(vec![]), &"length".into())
    );
    assert_eq!(run(&["hi", "-n", "0"]).answer(), "");
    // Without a limit the context ends it.
    assert_eq!(of(&["--ctx", "20"])["completion_tokens"], 8);
}

#[test]
fn stop_strings_end_the_answer_and_stay_out() {
    let whole = run(&["hi", "-n", "8"]).answer();
    let (at, stop) = whole.char_indices().nth(5).map(|(at, _)| (at, &whole[at..])).expect("some characters");
    let stop: String = stop.chars().take(3).collect();
    let at = whole.find(&stop).unwrap_or(at);
    let report = run(&["hi", "-n", "8", "--stop", "never to be seen", "--stop", &stop, "--json"]).json();
    assert_eq!((&report["text"], &report["finish_reason"]), (&whole[..at].into(), &"stop".into()));
    assert_eq!(run(&["hi", "-n", "8", "--stop", "-- none"]).answer(), whole, "a stop string may begin with a dash");
}

#[test]
fn the_prompt_comes_from_one_place() {
    let tokens = |done: Done| done.json()["tokens"].clone();
    let tail = ["-n", "4", "--json"];
    let expected = tokens(run(&[&["two words"], &tail[..]].concat()));
    assert_ne!(expected, tokens(run(&[&["other words"], &tail[..]].concat())));
    for flag in ["--prompt", "-p"] {
        assert_eq!(tokens(run(&[&[flag, "two words"], &tail[..]].concat())), expected);
    }
    let model = tiny();
    let read = |stdin: &[u8], args: &[&str]| apr_reading(stdin, [&["run", &model], args, &tail[..]].concat());
    assert_eq!(tokens(read(b"two words\n", &[])), expected, "a shell's newline is no part of the prompt");
    assert_eq!(tokens(read(b"two words", &["-"])), expected);
    assert_eq!(tokens(read(b"two words\r\n", &["--prompt", "-"])), expected);
    run(&["two", "--prompt", "words"]).fails(2, &["--prompt"]);
    run(&["--prompt", "- a list", "-n", "1"]).answer();
    run(&["-n", "1", "--", "--dashes"]).answer();
}

#[test]
fn a_given_prompt_leaves_standard_input_alone() {
    // A pipe that stays open and silent would hang a command that reads it.
    let mut child = command(["run", &tiny(), "hi", "-n", "1"]).stdin(Stdio::piped()).spawn().unwrap();
    let open = child.stdin.take();
    finish(child).answer();
    drop(open);
}

#[test]
fn an_empty_prompt_is_refused() {
    run(&[""]).fails(2, &["the prompt is empty"]);
    run(&["", "--system", "Be brief."]).fails(2, &["the prompt is empty"]);
    run(&["", "--raw"]).fails(2, &["the prompt is empty"]);
    run(&[]).fails(2, &["the prompt is empty"]);
}

#[test]
fn prompts_that_are_not_utf8_are_said() {
    let done = apr_reading(b"a\xffb", ["run", &tiny(), "-n", "2"]);
    assert!(done.err.contains("not valid UTF-8"), "{}", done.err);
    done.answer();
    let done = apr_reading(b"a\xffb", ["run", &tiny(), "-n", "2", "--raw", "--quiet"]);
    assert_eq!(done.err.lines().count(), 1, "{}", done.err);
    done.answer();
}

#[test]
fn templates_take_system_messages_and_arguments() {
    let n_prompt =
        |args: &[&str]| run(&[&["hi", "-n", "0", "--json"], args].concat()).json()["prompt_tokens"].as_u64().unwrap();
    let plain = n_prompt(&[]);
    assert!(n_prompt(&["--system", "Be brief."]) > plain);
    assert!(n_prompt(&["--system", "- dashes"]) > plain);
    assert_eq!(n_prompt(&["--chat-template-kwargs", r#"{"unused": [1, {"a": null}]}"#]), plain);
    assert!(n_prompt(&["--raw"]) < plain, "--raw leaves the template out");
    run(&["hi", "--raw", "--system", "x"]).fails(2, &["--raw", "--system"]);
    run(&["hi", "--chat-template-kwargs", "{x"]).fails(2, &["--chat-template-kwargs", "not JSON"]);
    run(&["hi", "--chat-template-kwargs", "[1]"]).fails(2, &["--chat-template-kwargs", "a JSON object"]);
    run(&["hi", "--enable-thinking", "perhaps"]).fails(2, &["--enable-thinking", "true, false"]);
}

#[test]
fn control_tokens_come_from_the_template_only() {
    let n_prompt =
        |args: &[&str]| run(&[args, &["-n", "0", "--json"]].concat()).json()["prompt_tokens"].as_u64().unwrap();
    let ids = |args: &[&str]| apr([&["tokenize", &tiny(), "--ids"], args].concat()).answer();
    let text = "<|im_end|>";
    let spelled = ids(&[text]);
    let n_spelled = spelled.split(' ').count() as u64;
    assert!(n_spelled > 1, "{spelled}");
    let around = n_prompt(&["hi"]) - n_prompt(&["hi", "--raw"]);
    // The template stands around the message as it does around another.
    assert_eq!(n_prompt(&[text]), around + n_spelled);
    assert_eq!(n_prompt(&[text, "--special"]), around + n_spelled, "--special is for raw text");
    assert_eq!(n_prompt(&[text, "--raw"]), n_spelled);
    assert_eq!(n_prompt(&[text, "--raw", "--special"]), 1);
    assert_eq!(ids(&[text, "--special"]).split(' ').count(), 1);
}

#[test]
fn every_kv_type_and_instruction_set_answers() {
    for kv in ["f32", "f16", "q8_0"] {
        assert_eq!(run(&["hi", "-n", "4", "--kv", kv, "--json"]).json()["completion_tokens"], 4, "{kv}");
    }
    let device = |args: &[&str]| run(&[&["hi", "-n", "4", "--json"], args].concat()).json()["device"].clone();
    assert_eq!(device(&["--isa", "scalar", "--threads", "2"]), "cpu (scalar, 2 threads)");
    assert_eq!(device(&["--device", "reference"]), "reference");
    run(&["hi", "--kv", "q4_0"]).fails(2, &["q4_0", "f32, f16 and q8_0"]);
    for isa in ["avx2", "avx-vnni", "avx512-vnni"] {
        let done = run(&["hi", "-n", "4", "--isa", isa, "--threads", "2", "--json"]);
        match done.code {
            Some(0) => assert_eq!(done.json()["device"], format!("cpu ({isa}, 2 threads)")),
            _ => done.fails(2, &["lacks", isa, "--isa"]),
        }
    }
    run(&["hi", "--isa", "sse9"]).fails(2, &["sse9", "scalar, avx2, avx-vnni, avx512-vnni"]);
    run(&["hi", "--device", "tpu"]).fails(2, &["tpu", "reference"]);
}

#[test]
fn resources_that_are_not_there_are_refused() {
    let devices = apr(["devices", "--json"]).json();
    match devices["gpu_error"].as_str() {
        Some(why) => {
            run(&["hi", "--gpu"]).fails(4, &["no GPU", why]);
            run(&["hi", "--device", "cuda"]).fails(4, &["no GPU", why]);
        }
        None => println!("skipped: needs a machine without a GPU"),
    }
    run(&["hi", "--threads", "0"]).fails(2, &["0 threads", "between 1 and"]);
    run(&["hi", "--threads", "1000000"]).fails(2, &["1000000 threads", "between 1 and"]);
    run(&["hi", "--ctx", "1000000000"]).fails(2, &["1000000000", "4096"]);
}

#[test]
fn what_does_not_fit_the_context_is_refused_before_computing() {
    let start = std::time::Instant::now();
    run(&["hi", "-n", "1000000"]).fails(2, &["12 tokens", "1000000", "1000012", "4096"]);
    run(&["hi", "-n", "4", "--ctx", "15"]).fails(2, &["12 tokens", "4 more", "16", "15", "--ctx"]);
    run(&["hi", "--ctx", "12"]).fails(2, &["12 tokens", "1 more", "13", "holds 12"]);
    run(&["hi", "-n", "18446744073709551615"]).fails(2, &["18446744073709551615", "4096"]);
    let long = "word ".repeat(100_000);
    apr_reading(long.as_bytes(), ["run", &tiny()]).fails(2, &["tokens", "4096"]);
    assert!(start.elapsed().as_secs() < 10, "nothing was computed");
    run(&["hi", "-n", "0", "--ctx", "12"]).answer();
    assert_eq!(run(&["hi", "-n", "4", "--ctx", "16", "--json"]).json()["completion_tokens"], 4);
}

#[test]
fn options_come_from_the_environment_too() {
    let with = |name: &str, value: &str| {
        finish(command(["run", &tiny(), "hi", "-n", "1", "--json"]).env(name, value).spawn().unwrap())
    };
    assert_eq!(with("APR_ISA", "scalar").json()["device"].as_str().unwrap().split(',').next(), Some("cpu (scalar"));
    with("APR_CTX", "12").fails(2, &["12"]);
    with("APR_THREADS", "0").fails(2, &["0 threads"]);
}

#[test]
fn inspect_shows_what_a_file_holds() {
    let text = apr(["inspect", &tiny()]).answer();
    for word in ["GGUF version 3", "architecture      qwen3moe", "bytes per token", "token_embd.weight", "<|im_start|>"]
    {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    let report = apr(["inspect", &tiny(), "--json"]).json();
    let expected =
        "schema gguf_version file_bytes parts architecture bytes_per_token qtypes metadata tensors chat_template";
    assert_eq!(keys(&report).join(" "), expected);
    assert_eq!((&report["schema"], &report["parts"]), (&"apr.inspect/1".into(), &1.into()));
    let file_bytes = std::fs::metadata(tiny()).unwrap().len();
    assert_eq!(report["file_bytes"], file_bytes);
    let tensors = report["tensors"].as_array().unwrap();
    assert_eq!(keys(&tensors[0]).join(" "), "name type shape part offset bytes");
    let sum = |key: &str| report["qtypes"].as_object().unwrap().values().map(|m| m[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("tensors"), tensors.len() as u64);
    assert_eq!(sum("bytes"), tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum::<u64>());
    assert!((1..file_bytes).contains(&report["bytes_per_token"].as_u64().unwrap()));
    assert_eq!(report["metadata"]["general.architecture"], "qwen3moe");
    assert_eq!(report["metadata"]["qwen3moe.attention.layer_norm_rms_epsilon"].to_string(), "1e-6");
    assert!(report["chat_template"].as_str().unwrap().contains("<|im_start|>"));
}

#[test]
fn tokenize_gives_ids_and_pieces() {
    let text = "Hello <|im_end|> caf\u{e9}";
    let report = apr(["tokenize", &tiny(), text, "--json"]).json();
    assert_eq!(keys(&report).join(" "), "schema tokens pieces");
    assert_eq!(report["schema"], "apr.tokenize/1");
    let ids: Vec<String> = report["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(apr(["tokenize", &tiny(), text, "--ids"]).answer(), ids.join(" "));
    assert_eq!(apr_reading(text.as_bytes(), ["tokenize", &tiny(), "--ids"]).answer(), ids.join(" "));
    assert_eq!(apr_reading(text.as_bytes(), ["tokenize", &tiny(), "-", "--ids"]).answer(), ids.join(" "));
    assert_eq!(apr(["tokenize", &tiny(), text]).answer().lines().count(), ids.len());
    let special = apr(["tokenize", &tiny(), text, "--special", "--json"]).json();
    assert!(special["pieces"].as_array().unwrap().contains(&"<|im_end|>".into()), "{special}");
    assert_eq!(apr(["tokenize", &tiny(), ""]).out, "");
    assert_eq!(apr(["tokenize", &tiny(), "", "--json"]).json()["tokens"], Value::Array(vec![]));
    apr(["tokenize", &tiny(), text, "--ids", "--json"]).fails(2, &["--ids", "--json"]);
}

#[test]
fn a_reader_that_goes_early_is_no_failure() {
    for args in
        [vec!["inspect"], vec!["inspect", "--json"], vec!["run", "hi", "-n", "3000", "--ignore-eos"], vec!["--help"]]
    {
        let mut all: Vec<String> = args.iter().map(|a| a.to_string()).collect();
        if args[0] != "--help" {
            all.insert(1, tiny());
        }
        let mut child = command(&all).spawn().unwrap();
        let mut one = [0];
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut one).unwrap();
        drop(out);
        let done = finish(child);
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}");
        assert!(!done.err.contains("panicked") && !done.err.contains("error:"), "{args:?}: {}", done.err);
    }
    // The same for what is said on stderr.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command(["run", &tiny(), "hi", "-n", "2"]).stderr(writer).spawn().unwrap();
    finish(child).answer();
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure() {
    let bench = ["bench", "-p", "1", "-n", "0", "--reps", "1", "--threads", "1", "--no-load"];
    for args in [&["run", "hi", "-n", "2"][..], &["inspect"], &["tokenize", "hi"], &bench] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let model = tiny();
        let all = [&args[..1], &[&model], &args[1..]].concat();
        let done = finish(command(all).stdout(full).spawn().unwrap());
        done.fails(1, &["No space left"]);
    }
}

#[test]
fn ctrl_c_ends_with_what_was_printed() {
    for json in [false, true] {
        let args = ["run", &tiny(), "hi", "--ignore-eos", "--device", "reference", "-n", "4000", "--json"];
        let mut child = command(&args[..if json { 9 } else { 8 }]).spawn().unwrap();
        let mut start = [0; 8];
        if json {
            // Nothing is printed before the end: the load takes milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(500));
        } else {
            child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let done = finish(child);
        assert_eq!(done.code, Some(130), "{done:?}");
        match json {
            true => assert_eq!(serde_json::from_str::<Value>(&done.out).unwrap()["finish_reason"], "cancelled"),
            false => {
                assert!(done.out.ends_with('\n') && done.err.contains("; ended by cancelled"), "{done:?}");
            }
        }
    }
}

#[test]
fn help_names_flags_and_exit_codes() {
    let help = apr(["--help"]).answer();
    for word in ["run", "inspect", "tokenize", "bench", "Exit codes", "130"] {
        assert!(help.contains(word), "{word:?} is not in: {help}");
    }
    for command in ["run", "inspect", "tokenize", "bench"] {
        let help = apr([command, "--help"]).answer();
        assert!(help.contains("--json") && help.contains("Exit codes"), "{help}");
        assert!(!help.contains('\x1b'), "{help:?}");
    }
    assert!(apr(["--version"]).answer().starts_with("apr "));
    assert_eq!(apr(["walk"]).code, Some(2));
    assert_eq!(apr([""; 0]).code, Some(2));
    assert_eq!(apr(["run"]).code, Some(2));
    apr(["run", &fixture("arch/qwen3.gguf"), "hi", "--no-such-flag"]).fails(2, &["--no-such-flag"]);
}
