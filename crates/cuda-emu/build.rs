//! Compiles the kernels as C++, over the emulation's primitives.

use std::path::{Path, PathBuf};

fn main() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda/kernels");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(&kernels)
        .expect("the kernels are in ../cuda/kernels")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    sources.push("src/faults.cu".into());
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    // One source for all: what nothing refers to would be dropped from a library, and kernels are found through a list.
    let whole: String = ["#include \"emulation.cpp\"\n".to_string()]
        .into_iter()
        .chain(sources.iter().map(|path| {
            let path = std::path::absolute(path).expect("a path");
            format!("#include \"{}\"\n", path.display())
        }))
        .collect();
    let whole_path = out.join("kernels.cpp");
    std::fs::write(&whole_path, whole).expect("OUT_DIR is writable");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .extra_warnings(false)
        .flag("-Wno-unused-function")
        .flag("-fno-strict-aliasing")
        .flag("-ffp-contract=off")
        .include("src")
        .include(&kernels)
        .file(whole_path)
        .compile("apr_cuda_emulation");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed={}", kernels.display());
}
