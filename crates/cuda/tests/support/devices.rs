//! The devices that tests run on: the emulation, and a GPU where there is one.
// Each test binary uses a part of this.
#![allow(dead_code, unused_macros, unused_imports)]

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

/// Makes a backend on the device under test.
pub type Make = fn() -> CudaBackend;

/// On the emulation, its threads in another order every time they wait.
pub fn emulated() -> CudaBackend {
    CudaBackend::new(connect(Order::Shuffled(7)))
}

/// On the GPU, which is there.
pub fn on_gpu() -> CudaBackend {
    CudaBackend::new(gpu().expect("the caller has asked"))
}

/// Makes a test of each function for the emulation, and one for a GPU that is skipped where there is none.
macro_rules! on_every_device {
    ($($name:ident),*) => {
        mod on_the_emulation {
            $(#[test]
            fn $name() {
                super::$name(super::devices::emulated)
            })*
        }
        mod on_a_gpu {
            $(#[test]
            fn $name() {
                if super::devices::gpu().is_some() {
                    super::$name(super::devices::on_gpu)
                }
            })*
        }
    };
}
pub(crate) use on_every_device;
