//! The kernels as machine code of one architecture: compiled before the first request, and kept on disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use crate::nvrtc::{Nvrtc, NvrtcError};

/// Sources of the kernels: a module each.
pub(crate) const SOURCES: [(&str, &str); 12] = [
    ("attention.cu", include_str!("../kernels/attention.cu")),
    ("best.cu", include_str!("../kernels/best.cu")),
    ("decode.cu", include_str!("../kernels/decode.cu")),
    ("experts.cu", include_str!("../kernels/experts.cu")),
    ("matmul_32.cu", include_str!("../kernels/matmul_32.cu")),
    ("matmul_k.cu", include_str!("../kernels/matmul_k.cu")),
    ("matvec.cu", include_str!("../kernels/matvec.cu")),
    ("norm.cu", include_str!("../kernels/norm.cu")),
    ("primitives.cu", include_str!("../kernels/primitives.cu")),
    ("prefill.cu", include_str!("../kernels/prefill.cu")),
    ("route.cu", include_str!("../kernels/route.cu")),
    ("rows.cu", include_str!("../kernels/rows.cu")),
];

/// What they include.
const HEADERS: [(&str, &str); 9] = [
    ("halves.cuh", include_str!("../kernels/halves.cuh")),
    ("heads.cuh", include_str!("../kernels/heads.cuh")),
    ("matmul.cuh", include_str!("../kernels/matmul.cuh")),
    ("matvec.cuh", include_str!("../kernels/matvec.cuh")),
    ("prims.cuh", include_str!("../kernels/prims.cuh")),
    ("q8.cuh", include_str!("../kernels/q8.cuh")),
    ("qtypes.cuh", include_str!("../kernels/qtypes.cuh")),
    ("route.cuh", include_str!("../kernels/route.cuh")),
    ("tiles.cuh", include_str!("../kernels/tiles.cuh")),
];

/// Where the compiler and compiled kernels are looked for, and who is told how far compiling is.
#[derive(Clone, Debug, Default)]
pub struct Toolchain {
    /// Folders that may hold `libnvrtc`.
    pub nvrtc_folders: Vec<PathBuf>,
    /// Folders below which Python keeps packages in `lib/python3.*/site-packages`.
    pub python_prefixes: Vec<PathBuf>,
    /// Where compiled kernels are kept. `None` compiles them every time.
    pub cache: Option<PathBuf>,
    /// Told after each module how many of how many are there.
    pub progress: Option<fn(usize, usize)>,
}

/// Machine code of all modules for an architecture, from the cache where it is there. `driver` is the version of the driver that is to
/// load it, as 13010 for CUDA 13.1.
///
/// # Errors
/// No compiler, or a kernel that it does not compile.
pub fn modules(toolchain: &Toolchain, arch: u32, driver: u32) -> Result<Vec<Vec<u8>>, NvrtcError> {
    let cache = toolchain.cache.as_ref().map(|folder| folder.join(key(arch, driver)));
    if let Some(found) = cache.as_deref().and_then(from_cache) {
        return Ok(found);
    }
    let nvrtc = Nvrtc::find(&toolchain.nvrtc_folders, &toolchain.python_prefixes, Some(driver / 1000))?;
    let n_done = AtomicUsize::new(0);
    let compile = |source| {
        let code = nvrtc.compile(source, &HEADERS, arch);
        let done = n_done.fetch_add(1, Ordering::Relaxed) + 1;
        toolchain.progress.inspect(|progress| progress(done, SOURCES.len()));
        code
    };
    let compiled: Vec<Result<Vec<u8>, NvrtcError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = SOURCES.map(|source| scope.spawn(move || compile(source))).into_iter().collect();
        threads.into_iter().map(|t| t.join().expect("compiling does not panic")).collect()
    });
    let compiled = compiled.into_iter().collect::<Result<Vec<_>, _>>()?;
    if let Some(folder) = cache {
        // Without a cache the next start compiles again, which is slow and nothing worse.
        let _ = keep(&folder, &compiled);
    }
    Ok(compiled)
}

/// The name of the folder of one set of modules.
fn key(arch: u32, driver: u32) -> String {
    format!("sm_{arch}-{}", sources_hash(&driver.to_string()))
}

/// A name for the kernels of this build, other where `more` is.
pub fn sources_hash(more: &str) -> String {
    let mut hash = Sha256::new();
    for (name, text) in SOURCES.iter().chain(&HEADERS) {
        hash.update(name);
        hash.update([0]);
        hash.update(text);
        hash.update([0]);
    }
    hash.update(more);
    hash.finalize()[..12].iter().map(|b| format!("{b:02x}")).collect()
}

/// The modules in a folder, if they are all there and whole.
fn from_cache(folder: &Path) -> Option<Vec<Vec<u8>>> {
    SOURCES.iter().map(|(name, _)| checked(std::fs::read(folder.join(name)).ok()?)).collect()
}

/// What follows a hash, if it is of that hash.
fn checked(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let code = bytes.split_off(bytes.len().min(32));
    (Sha256::digest(&code)[..] == bytes[..]).then_some(code)
}

/// Writes modules into a folder, each behind its hash: a file that was cut off is not taken for whole.
fn keep(folder: &Path, modules: &[Vec<u8>]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for ((name, _), code) in SOURCES.iter().zip(modules) {
        let part = folder.join(format!("{name}.{}", std::process::id()));
        std::fs::write(&part, [&Sha256::digest(code)[..], code].concat())?;
        std::fs::rename(&part, folder.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_modules_come_back_and_damaged_ones_do_not() {
        let folder = std::env::temp_dir().join(format!("apr-cuda-cache-{}", std::process::id()));
        let modules: Vec<Vec<u8>> = (0..SOURCES.len()).map(|i| vec![i as u8; 100 + i]).collect();
        keep(&folder, &modules).unwrap();
        assert_eq!(from_cache(&folder), Some(modules));
        let path = folder.join(SOURCES[1].0);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(from_cache(&folder), None, "one is cut off");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(from_cache(&folder), None, "one is missing");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn every_source_and_header_of_the_folder_is_compiled() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut there: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        let mut known: Vec<String> = SOURCES.iter().chain(&HEADERS).map(|s| s.0.to_string()).collect();
        there.sort();
        known.sort();
        assert_eq!(there, known);
    }

    #[test]
    fn other_architectures_and_drivers_have_other_folders() {
        assert_ne!(key(80, 12080), key(90, 12080));
        assert_ne!(key(90, 12080), key(90, 13000));
        assert_eq!(key(90, 13000), key(90, 13000));
    }

    #[test]
    fn a_compiler_that_is_nowhere_is_asked_for_by_name() {
        let empty = std::env::temp_dir();
        match Nvrtc::find(&[], &[empty], None) {
            Ok(found) => println!("skipped: needs a machine without NVRTC, not {}", found.path.display()),
            Err(e) => {
                let e = e.to_string();
                assert!(e.contains("CUDA toolkit") && e.contains("pip install nvidia-cuda-nvrtc"), "{e}");
            }
        }
    }
}
