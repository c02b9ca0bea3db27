//! NVIDIA's compiler takes every kernel for every architecture that is supported. No GPU is needed for that.

use std::path::PathBuf;

use apr_cuda::compile::{Toolchain, modules};
use apr_cuda::nvrtc::Nvrtc;

const ARCHS: [u32; 6] = [80, 86, 89, 90, 100, 120];

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let python_prefixes = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    let toolchain = Toolchain { python_prefixes, ..Toolchain::default() };
    let find = |newest| Nvrtc::find(&toolchain.nvrtc_folders, &toolchain.python_prefixes, newest);
    let Ok(found) = find(None) else {
        println!("skipped: needs NVRTC, as in `pip install nvidia-cuda-nvrtc`");
        return;
    };
    let driver = found.version.0 * 1000;
    match find(Some(found.version.0 - 1)) {
        Ok(older) => assert!(older.version.0 < found.version.0, "a later one is passed over"),
        Err(e) => assert!(e.to_string().contains("or older, as the driver needs"), "{e}"),
    }
    for arch in ARCHS {
        let code = modules(&toolchain, arch, driver).unwrap_or_else(|e| panic!("sm_{arch}: {e}"));
        assert!(code.iter().all(|module| module.starts_with(b"\x7fELF")), "sm_{arch}: machine code");
    }
    let e = modules(&toolchain, 52, driver).unwrap_err().to_string();
    assert!(e.contains("sm_52") && e.contains("90"), "an architecture it does not know is named: {e}");
}
