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
        .pic(true)
        .include("src")
        .include(&kernels)
        .file(whole_path)
        .compile("apr_cuda_emulation");
    link_libcuda(&out);
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed={}", kernels.display());
}

/// Links the stand-in for the driver, a library that programs load as `libcuda.so`, with all of the emulation in it. It has a folder of
/// its own: `cargo test` puts those of libraries in the loader's path, and only who asks for the stand-in is to find it.
fn link_libcuda(out: &Path) {
    let folder = out.join("driver");
    std::fs::create_dir_all(&folder).expect("OUT_DIR is writable");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(1).pic(true).cargo_metadata(false);
    let objects = build.file("src/libcuda.cpp").compile_intermediates();
    let linked = build
        .get_compiler()
        .to_command()
        .args(["-shared", "-Wl,-Bsymbolic", "-o"])
        .arg(folder.join("libcuda.so"))
        .args(objects)
        .arg("-Wl,--whole-archive")
        .arg(out.join("libapr_cuda_emulation.a"))
        .arg("-Wl,--no-whole-archive")
        .status();
    assert!(linked.is_ok_and(|status| status.success()), "the C++ compiler links a shared library");
}
