//! Rules about the source itself: what keeps the shape of the project while many hands change it.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a function, from its signature to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file.
const FILE_LINES_MAX: usize = 900;
/// Straight-line code that reads better long: the forward passes and the kernels.
const LONG_FUNCTIONS_IN: [&str; 3] = ["crates/core/src/models/", "crates/cpu/src/avx2/", "crates/cpu/src/scalar/"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Every Rust source of the workspace: path from the root, text.
fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join("crates"), &mut paths);
    let name = |p: &Path| p.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
    let mut all: Vec<_> = paths.iter().map(|p| (name(p), fs::read_to_string(p).unwrap())).collect();
    all.sort();
    assert!(all.len() > 30, "the sources are found");
    all
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/") || path.contains("/benches/")
}

fn offenders(find: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
    sources().iter().filter_map(|(path, text)| find(path, text).map(|what| format!("{path}: {what}"))).collect()
}

#[track_caller]
fn none(rule: &str, offenders: Vec<String>) {
    assert!(offenders.is_empty(), "{rule}\n  {}", offenders.join("\n  "));
}

#[test]
fn a_model_file_has_one_forward() {
    let models: Vec<_> = sources().into_iter().filter(|(p, _)| p.starts_with("crates/core/src/models/")).collect();
    assert!(models.len() >= 2, "model files are found");
    for (path, text) in models {
        let n = text.matches("fn forward").count();
        let expected = usize::from(!path.ends_with("/parts.rs"));
        assert_eq!(n, expected, "{path} has {n} functions that start with 'forward', expected {expected}");
        assert_eq!(text.matches("fn forward<").count(), expected, "{path}: its forward is called forward");
    }
}

#[test]
fn only_one_file_chooses_by_features() {
    let found = offenders(|path, text| {
        let bad = text.contains("cfg(feature") && !path.ends_with("engine/src/device.rs") && !path.ends_with("tidy.rs");
        bad.then(|| "cfg(feature".to_string())
    });
    none("devices are chosen in engine/src/device.rs only", found);
}

#[test]
fn only_the_command_reads_the_environment() {
    let found = offenders(|path, text| {
        let bad = ["env::var", "env::vars", "option_env!"].into_iter().find(|b| text.contains(b));
        bad.filter(|_| !path.starts_with("crates/cli/") && !path.ends_with("build.rs") && !is_test(path))
            .map(str::to_string)
    });
    none("options travel as values; only crates/cli reads the environment", found);
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!(", "unimplemented!(", "TODO", "FIXME", "#[ignore", "dbg!("];
    let found = offenders(|path, text| {
        let bad = words.into_iter().find(|w| text.contains(w));
        bad.filter(|_| !path.ends_with("tidy.rs")).map(str::to_string)
    });
    none("no stubs, no skipped tests", found);
}

#[test]
fn files_open_with_what_they_are() {
    none(
        "a file opens with //!",
        offenders(|_, text| (!text.starts_with("//!")).then(|| text.lines().next().unwrap_or_default().to_string())),
    );
}

#[test]
fn files_stay_small() {
    none(
        "a file holds one idea",
        offenders(|_, text| {
            let n = text.lines().count();
            (n > FILE_LINES_MAX).then(|| format!("{n} lines, at most {FILE_LINES_MAX}"))
        }),
    );
}

#[test]
fn functions_fit_on_a_screen() {
    let found = offenders(|path, text| {
        let long = LONG_FUNCTIONS_IN.iter().any(|long| path.starts_with(long));
        let too_long = functions(text).into_iter().find(|f| !long && f.1 > FUNCTION_LINES_MAX);
        too_long.map(|(name, n)| format!("{name} has {n} lines"))
    });
    none(&format!("functions have at most {FUNCTION_LINES_MAX} lines"), found);
}

/// Names and lengths of the functions of a formatted source: from `fn` to the closing brace at the same indentation.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let is_fn = ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "unsafe fn ", "pub unsafe fn "]
            .iter()
            .any(|start| code.starts_with(start));
        if !is_fn || code.ends_with(';') {
            continue;
        }
        let close = format!("{}}}", " ".repeat(indent));
        if let Some(n) = lines[i..].iter().position(|l| **l == close) {
            out.push((code.split('(').next().unwrap_or(code).to_string(), n + 1));
        }
    }
    out
}

#[test]
fn the_repository_names_no_machine() {
    // Spelled in halves so that this file does not offend.
    let words =
        [["/ro", "ot/"], ["/wo", "rk/"], ["crates", ".io"], ["pypi", ".org"], ["python", "hosted"]].map(|w| w.concat());
    none(
        "sources name no registry host and no path of a machine",
        offenders(|_, text| words.iter().find(|w| text.contains(w.as_str())).cloned()),
    );
}

#[test]
fn fixtures_stay_small() {
    fn size(dir: &Path) -> u64 {
        let bytes = |e: fs::DirEntry| if e.path().is_dir() { size(&e.path()) } else { e.metadata().unwrap().len() };
        fs::read_dir(dir).unwrap().map(|e| bytes(e.unwrap())).sum()
    }
    let n = size(&root().join("fixtures"));
    assert!(n <= 10_000_000, "fixtures have {n} bytes, at most 10 MB");
}
