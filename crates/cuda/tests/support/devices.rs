//! The devices that tests run on: the emulation, and a GPU where there is one.
// Each test binary uses a part of this.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use apr_cuda::CudaBackend;
use apr_cuda::compile::Toolchain;
use apr_cuda::driver::Driver;
use apr_cuda::nvidia;
use apr_cuda_emu::{Order, connect};

/// The first GPU. Where there is none the test says so.
pub fn gpu() -> Option<Arc<dyn Driver>> {
    static GPU: OnceLock<Option<Arc<dyn Driver>>> = OnceLock::new();
    GPU.get_or_init(|| {
        if let Err(e) = nvidia::devices() {
            println!("skipped: needs an NVIDIA GPU ({e})");
            return None;
        }
        let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from);
        let python_prefixes = prefixes.chain(["/usr/local".into(), "/usr".into()]).collect();
        let toolchain = Toolchain { python_prefixes, ..Toolchain::default() };
        Some(nvidia::connect(0, &toolchain).expect("a GPU that is there can be used"))
    })
    .clone()
}

/// The emulation with its threads in this order, and the GPU.
pub fn backends(order: Order) -> Vec<(&'static str, CudaBackend)> {
    let emulated = ("emulation", CudaBackend::new(connect(order)));
    [emulated].into_iter().chain(gpu().map(|driver| ("gpu", CudaBackend::new(driver)))).collect()
}
