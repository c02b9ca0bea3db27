//! Runs the `apr` binary as a user does, with a deadline so that a hang fails the test instead of stopping the suite.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How a run ended.
#[derive(Debug)]
pub struct Done {
    /// Exit code; `None` where a signal ended it.
    pub code: Option<i32>,
    /// Standard output; half a character in it fails the test.
    pub out: String,
    pub err: String,
}

impl Done {
    /// The answer of a run that must succeed, without the newline that ends it.
    #[track_caller]
    pub fn answer(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out.strip_suffix('\n').expect("the answer ends with a newline").to_string()
    }

    /// Standard output of a run that must succeed, as exactly one line with one JSON object.
    #[track_caller]
    pub fn json(self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert_eq!(self.out.matches('\n').count(), 1, "one line: {}", self.out);
        serde_json::from_str(&self.out).expect("stdout is one JSON object")
    }

    /// A run that must fail: this exit code, nothing on stdout, and one `error:` that holds all the words.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        assert_eq!(self.err.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
    }
}

/// The command, without options from the environment.
pub fn command(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apr"));
    let is_ours = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("APR_");
    std::env::vars_os().map(|(name, _)| name).filter(is_ours).for_each(|name| _ = command.env_remove(name));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `apr` with an empty standard input.
#[track_caller]
pub fn apr(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Done {
    finish(command(args).spawn().expect("apr starts"))
}

/// Runs `apr` with `stdin` on standard input.
#[track_caller]
pub fn apr_reading(stdin: &[u8], args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Done {
    let mut child = command(args).stdin(Stdio::piped()).spawn().expect("apr starts");
    // A command that fails early does not read all of it.
    let _ = child.stdin.take().expect("stdin is piped").write_all(stdin);
    finish(child)
}

/// Waits for the end of a run.
#[track_caller]
pub fn finish(mut child: Child) -> Done {
    let out = child.stdout.take().map(collect);
    let err = child.stderr.take().map(collect);
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().expect("a child can be killed");
            panic!("apr still runs after 60 s");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.map_or(Vec::new(), |r| r.join().expect("the reader does not panic"));
        String::from_utf8(bytes).expect("apr writes whole characters")
    };
    Done { code: status.code(), out: text(out), err: text(err) }
}

fn collect(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe can be read");
        bytes
    })
}

/// A file of `fixtures/`.
pub fn fixture(name: &str) -> String {
    format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The tiny model with a ChatML template: random weights, greedy unless told otherwise.
pub fn tiny() -> String {
    fixture("tiny-qwen3moe.gguf")
}

/// An empty folder of this name for a test's files.
pub fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if path.exists() {
        std::fs::remove_dir_all(&path).expect("the folder of an earlier run can be removed");
    }
    std::fs::create_dir_all(&path).expect("a folder can be made");
    path
}
