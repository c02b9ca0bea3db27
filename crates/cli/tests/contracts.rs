//! The contracts in `contracts/*.yaml` are more than words: their tests and faults exist, and `apr verify` checks those it says it does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use apr_core::backend::faulty::Fault;
use apr_engine::verify::CONTRACTS;
use serde::Deserialize;

#[path = "support/file_faults.rs"]
mod file_faults;
#[path = "../../core/tests/support/gguf_writer.rs"]
mod gguf_writer;
#[path = "support/model.rs"]
mod model;

/// A contract as its file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Contract {
    id: String,
    statement: String,
    /// The claim as a formula.
    equation: String,
    tolerance: String,
    /// `path/of/source.rs::function`, from the root.
    tests: Vec<String>,
    /// A variant of `Fault`, or the name of a fault in files, that turns one of the tests red.
    fault: String,
    /// Whether `apr verify` checks it too.
    runtime: bool,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// All contracts with the names of their files.
fn contracts() -> Vec<(String, Contract)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(root().join("contracts")).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).unwrap();
        let contracts: Vec<Contract> = serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(!contracts.is_empty(), "{file} has contracts");
        all.extend(contracts.into_iter().map(|c| (file.clone(), c)));
    }
    all.sort_by(|a, b| a.1.id.cmp(&b.1.id));
    assert!(all.len() >= 20, "the contracts are found: {}", all.len());
    all
}

/// The text of a test function, from its attribute to its closing brace; `None` where there is no such test, or it is ignored.
fn test_body(source: &str, name: &str) -> Option<String> {
    let lines: Vec<&str> = source.lines().collect();
    let is_fn = |line: &&str| line.trim_start().strip_prefix("fn ").is_some_and(|l| l.starts_with(&format!("{name}(")));
    let at = lines.iter().position(is_fn)?;
    let indent = lines[at].len() - lines[at].trim_start().len();
    let attributes = lines[..at].iter().rev().take_while(|l| l.trim_start().starts_with(['#', '/']));
    let attributes: Vec<&str> = attributes.map(|l| l.trim()).collect();
    if !attributes.contains(&"#[test]") || attributes.iter().any(|a| a.trim_start_matches("#[").starts_with("ignore")) {
        return None;
    }
    let close = format!("{}}}", " ".repeat(indent));
    let n = lines[at..].iter().position(|l| **l == close)?;
    Some(lines[at..=at + n].join("\n"))
}

/// The bodies of a contract's tests.
fn bodies(c: &Contract) -> Vec<String> {
    let body = |test: &String| {
        let (path, name) = test.split_once("::").unwrap_or_else(|| panic!("{}: '{test}' is no path::test", c.id));
        let source = fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{}: {path}: {e}", c.id));
        test_body(&source, name).unwrap_or_else(|| panic!("{}: {path} has no test {name} that runs", c.id))
    };
    c.tests.iter().map(body).collect()
}

#[test]
fn contracts_are_complete_and_lie_where_their_ids_say() {
    let mut ids = BTreeSet::new();
    for (file, c) in contracts() {
        assert!(ids.insert(c.id.clone()), "{} occurs once", c.id);
        let stem = file.strip_suffix(".yaml").unwrap_or_else(|| panic!("{file} is a .yaml file"));
        let rest = c.id.strip_prefix(&format!("FALSIFY-{}-", stem.to_uppercase()));
        let is_number = rest.is_some_and(|n| n.len() == 3 && n.chars().all(|d| d.is_ascii_digit()));
        assert!(is_number, "{}: ids in {file} are FALSIFY-{}-001 and so on", c.id, stem.to_uppercase());
        for (key, value) in [("statement", &c.statement), ("equation", &c.equation), ("tolerance", &c.tolerance)] {
            assert!(!value.trim().is_empty(), "{}: {key} is empty", c.id);
        }
        assert!(!c.tests.is_empty(), "{} has tests", c.id);
    }
}

#[test]
fn named_tests_exist_and_run() {
    // The log of a test run names a test's file below its crate, so two crates may not share a file and a name.
    let mut crates: BTreeMap<(String, String), String> = BTreeMap::new();
    for (_, c) in contracts() {
        assert_eq!(bodies(&c).len(), c.tests.iter().collect::<BTreeSet<_>>().len(), "{}: each test once", c.id);
        for test in &c.tests {
            let (path, name) = test.split_once("::").unwrap();
            let (krate, file) = path.strip_prefix("crates/").and_then(|p| p.split_once('/')).unwrap();
            if file.starts_with("tests/") {
                let other = crates.insert((file.to_string(), name.to_string()), krate.to_string());
                assert!(other.is_none_or(|o| o == krate), "{}: another crate has {file}::{name} too", c.id);
            }
        }
    }
}

#[test]
fn faults_exist_and_are_planted_in_a_test() {
    for (_, c) in contracts() {
        let in_pass = Fault::named(&c.fault).is_some();
        let in_file = file_faults::FILE_FAULTS.iter().any(|f| f.name == c.fault);
        assert!(in_pass || in_file, "{}: {} is no fault of core/backend/faulty.rs or of file_faults.rs", c.id, c.fault);
        // A test names the fault, or goes through a table that holds it.
        let table = if in_file { "FILE_FAULTS" } else { "in CONTRACTS.iter()" };
        let in_table = in_file || c.runtime;
        let plants = |body: &String| {
            let named = format!("Fault::{}", c.fault);
            body.match_indices(&named)
                .any(|(i, _)| !body[i + named.len()..].starts_with(|ch: char| ch.is_alphanumeric()))
                || (in_table && body.contains(table))
        };
        assert!(bodies(&c).iter().any(plants), "{}: none of its tests plants {}", c.id, c.fault);
    }
}

#[test]
fn what_is_checked_on_models_is_what_the_contracts_say() {
    let of_files: BTreeMap<String, (String, String)> =
        contracts().into_iter().filter(|(_, c)| c.runtime).map(|(_, c)| (c.id, (c.statement, c.fault))).collect();
    let of_code: BTreeMap<String, (String, String)> =
        CONTRACTS.iter().map(|c| (c.id.to_string(), (c.statement.to_string(), c.fault.to_string()))).collect();
    assert_eq!(of_files, of_code, "left: contracts with `runtime: true`, right: the table of apr verify");
    assert_eq!(of_code.len(), CONTRACTS.len(), "ids of the table are unique");
}

#[test]
fn a_test_is_found_only_where_it_runs() {
    // In halves, as no source here may have the attribute.
    let ignored = ["    #[ign", "ore]\n"].concat();
    let source = format!(
        "#[test]\nfn a() {{\n    x();\n}}\n\nfn b() {{\n}}\nmod t {{\n    #[test]\n{ignored}    fn c() {{\n    }}\n}}\n"
    );
    assert_eq!(test_body(&source, "a").as_deref(), Some("fn a() {\n    x();\n}"));
    for name in ["b", "c", "d", "x"] {
        assert_eq!(test_body(&source, name), None, "{name}");
    }
}
