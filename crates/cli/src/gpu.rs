//! GPUs from the command line: where the environment says that compilers and caches are.

use std::path::PathBuf;
use std::sync::Arc;

use apr_engine::device::{ConnectError, Cuda, Driver, Toolchain, connect_nvidia};

use crate::print::{say, show_status};

/// The first GPU that this process may use.
pub const CUDA: Cuda = Cuda(connect);

fn connect() -> Result<Arc<dyn Driver>, ConnectError> {
    connect_nvidia(0, &toolchain())
}

/// Where `libnvrtc` may be, and where compiled kernels are kept.
pub fn toolchain() -> Toolchain {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = folder("HOME");
    let cache = folder("XDG_CACHE_HOME").or_else(|| home.as_ref().map(|home| home.join(".cache")));
    let prefixes = [folder("VIRTUAL_ENV"), folder("CONDA_PREFIX"), home.map(|home| home.join(".local"))];
    let prefixes = prefixes.into_iter().flatten().chain(["/usr/local", "/usr"].map(PathBuf::from));
    Toolchain {
        nvrtc_folders: ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|n| Some(folder(n)?.join("lib64"))).collect(),
        python_prefixes: prefixes.collect(),
        cache: cache.map(|cache| cache.join("apr").join("kernels")),
        progress: Some(show_progress),
    }
}

/// Kernels are compiled once per GPU, driver and version of `apr`.
fn show_progress(n_done: usize, n: usize) {
    if n_done == n {
        say(format_args!("compiled {n} modules of kernels for this GPU; the next start finds them"));
    } else {
        show_status(format!("compiling kernels for this GPU: {n_done} of {n} modules"));
    }
}
