//! `apr --gpu` as a process, from the search for the driver to the end of the server: on a stand-in for NVIDIA's driver that runs
//! kernels on the emulation and complains of what the driver would not allow. Kernels are compiled as for a GPU, by NVRTC.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use apr_cuda::compile::Toolchain;
use apr_cuda::nvrtc::Nvrtc;
use serde_json::Value;

#[path = "support/apr.rs"]
mod apr;
#[path = "support/server.rs"]
mod server;

use server::{listening_child, post, rest, signal};

/// A machine that has a GPU, by its environment; none where nothing compiles kernels.
struct Machine {
    cache: PathBuf,
}

/// The machine, its kernels compiled: what each test compares is then what a second start does.
fn machine() -> Option<&'static Machine> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let python_prefixes = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
        let toolchain = Toolchain { python_prefixes, ..Toolchain::default() };
        Nvrtc::find(&toolchain.nvrtc_folders, &toolchain.python_prefixes, None).ok()?;
        let machine = Machine { cache: apr::folder("gpu") };
        let first = machine.run(&["run", &apr::tiny(), "Hello", "-n", "1", "--gpu"]);
        assert!(
            first.err.contains("modules of kernels for this GPU") && first.err.contains("checking this GPU"),
            "{}",
            first.err
        );
        Some(machine)
    });
    if machine.is_none() {
        println!("skipped: needs NVRTC, as in `pip install nvidia-cuda-nvrtc`");
    }
    machine.as_ref()
}

impl Machine {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = apr::command(args);
        command.env("LD_LIBRARY_PATH", apr_cuda_emu::LIBCUDA_FOLDER).env("XDG_CACHE_HOME", &self.cache);
        command
    }

    /// A run that breaks no rule of the driver.
    #[track_caller]
    fn run(&self, args: &[&str]) -> apr::Done {
        finish(self.command(args))
    }
}

#[track_caller]
fn finish(mut command: Command) -> apr::Done {
    let done = apr::finish(command.spawn().expect("apr starts"));
    assert!(!done.err.contains("emulated driver:"), "{}", done.err);
    done
}

#[test]
fn it_is_found_and_answers_as_often_as_it_is_asked() {
    let Some(machine) = machine() else { return };
    let devices = machine.run(&["devices"]);
    assert!(devices.out.contains("cuda 0 (Emulated GPU, sm_90, 17.18 GB, 2 multiprocessors)"), "{}", devices.out);
    // Steps are recorded when they come for the second time: later tokens are of graphs.
    let args = ["run", &apr::tiny(), "Hello", "-n", "24", "--ignore-eos", "--gpu", "--json"];
    let (mut one, mut two) = (machine.run(&args).json(), machine.run(&args).json());
    assert_eq!(one["text"].take(), two["text"].take());
    assert_eq!(one["completion_tokens"], 24, "{one}");
    for more in [["--kv", "q8_0"], ["--n-cpu-moe", "2"]] {
        let done = machine.run(&[&args[..], &more].concat());
        assert_eq!(done.json()["completion_tokens"], 24);
    }
}

#[test]
fn what_is_traced_there_is_what_runs_there_and_what_the_reference_computes() {
    let Some(machine) = machine() else { return };
    let model = apr::tiny();
    let with = |args: &[&str]| machine.run(&[args, &["-p", "Hello"]].concat());
    let diff = with(&["diff", &model, "--device-a", "cuda", "--device-b", "reference"]);
    assert_eq!(diff.code, Some(0), "{diff:?}");
    assert!(diff.out.contains("qwen3moe, cuda, activations int8, KV f16"), "{}", diff.out);
    let ran = with(&["run", &model, "-n", "1", "--gpu", "--ignore-eos", "--raw", "--quiet"]).answer();
    let traced = with(&["trace", &model, "--gpu"]);
    let first = traced.out.lines().find(|line| line.trim_start().starts_with("1. token")).expect("the likeliest token");
    let quoted: String = serde_json::from_str(&first[first.find('"').unwrap()..]).unwrap();
    assert_eq!(quoted, ran, "{first}");
}

#[test]
fn memory_that_is_not_there_is_an_error_before_anything_is_uploaded() {
    let Some(machine) = machine() else { return };
    let mut small = machine.command(&["run", &apr::tiny(), "Hello", "--gpu"]);
    small.env("EMULATED_GPU_BYTES", "6000000");
    finish(small).fails(4, &["the GPU has 6000000 bytes free", "--n-cpu-moe", "--ctx"]);
}

#[test]
fn a_gpu_that_is_lost_ends_the_answer_with_what_was_said_before() {
    let Some(machine) = machine() else { return };
    let mut lost = machine.command(&["run", &apr::tiny(), "Hello", "-n", "64", "--ignore-eos", "--gpu"]);
    lost.env("EMULATED_GPU_LAUNCHES", "600");
    let done = finish(lost);
    assert_eq!(done.code, Some(4), "{done:?}");
    assert!(done.err.contains("error: Emulated GPU failed: an illegal memory access"), "{}", done.err);
    assert!(done.out.len() > 5, "{done:?}");
}

const SERVE: [&str; 5] = ["--gpu", "--port", "0", "--ctx", "512"];

#[test]
fn it_serves_many_at_once_and_leaves_nothing_behind() {
    let Some(machine) = machine() else { return };
    let mut command = machine.command(&[&["serve", "run", &apr::tiny()], &SERVE[..]].concat());
    let (mut child, err, addr) = listening_child(command.spawn().unwrap());
    let ask = |seed: u32| {
        let sampling = format!(r#""temperature":1,"top_k":20,"seed":{seed}"#);
        rest(post(&addr, &format!(r#"{{"prompt":"Hello","max_tokens":9,"ignore_eos":true,{sampling}}}"#)))
    };
    std::thread::scope(|scope| {
        let answers: Vec<_> = (0..3).map(|seed| scope.spawn(move || ask(seed))).collect();
        for answer in answers {
            let answer = answer.join().unwrap();
            assert!(answer.contains(r#""completion_tokens":9"#), "{answer}");
        }
    });
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let said = rest(err);
    assert!(!said.contains("emulated driver:"), "{said}");
}

#[test]
fn a_server_whose_gpu_is_lost_says_so_and_ends() {
    let Some(machine) = machine() else { return };
    let mut command = machine.command(&[&["serve", "run", &apr::tiny()], &SERVE[..]].concat());
    command.env("EMULATED_GPU_LAUNCHES", "600");
    let (mut child, err, addr) = listening_child(command.spawn().unwrap());
    let answer = rest(post(&addr, r#"{"prompt":"Hello","max_tokens":200,"ignore_eos":true}"#));
    let body: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    assert!(body["error"]["message"].as_str().unwrap().starts_with("Emulated GPU failed: an illegal memory"), "{body}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let said = rest(err);
    assert!(said.contains("error: Emulated GPU failed") && said.contains("Start the server again"), "{said}");
    assert!(!said.contains("emulated driver:"), "{said}");
}
