//! GPUs from the command line: where the environment says that compilers and caches are.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use apr_engine::Engine;
use apr_engine::demo;
use apr_engine::device::{ConnectError, Cuda, Driver, Toolchain, connect_nvidia, sources_hash};
use apr_engine::verify::{Outcome, before_first_use};

use crate::failure::{FAILED, Failure};

use crate::print::{say, show_status};

/// The first GPU that this process may use.
pub const CUDA: Cuda = Cuda::new(connect);

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

/// Holds a GPU against the reference before a model is first used on it, with this build. What has passed is written down.
pub fn check_first_use(engine: &mut Engine, model: &Path) -> Result<(), Failure> {
    let record = toolchain().cache.and_then(|kernels| Some(kernels.parent()?.join("checked")));
    let use_of = first_use(model, &engine.device.name)?;
    if record.as_ref().is_some_and(|folder| is_recorded(folder, &use_of)) {
        return Ok(());
    }
    say("checking this GPU against the reference, once for this model; --no-check goes on without");
    let result = before_first_use(engine)?;
    if result.outcome == Outcome::Failed {
        let error = anyhow::anyhow!(
            "{} does not compute what the reference does: {}; it is not used; `apr verify --gpu` says more, `apr diff --device-a \
             cuda --device-b reference` shows where",
            engine.device.name,
            crate::commands::verify::line(&result)
        );
        return Err(Failure { code: FAILED, error });
    }
    if let Some(folder) = record {
        // Without a record the next start checks again, which is slow and nothing worse.
        let _ = write_record(&folder, &use_of);
    }
    Ok(())
}

/// What a check holds for: the file as it is, the device, the kernels.
fn first_use(model: &Path, device: &str) -> std::io::Result<String> {
    if demo::is_meant(model) {
        let mut hash = DefaultHasher::new();
        hash.write(demo::bytes());
        let hash = hash.finish();
        return Ok(format!("demo {hash:016x}\n{device}\n{}\n", sources_hash("")));
    }
    let (path, about) = (std::fs::canonicalize(model)?, std::fs::metadata(model)?);
    let modified = about.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    Ok(format!("{}\n{} bytes, {modified}\n{device}\n{}\n", path.display(), about.len(), sources_hash("")))
}

/// The file that says so, by a name that need not be told apart from all others: the text in it is compared.
fn record_of(folder: &Path, use_of: &str) -> PathBuf {
    let mut hash = DefaultHasher::new();
    use_of.hash(&mut hash);
    folder.join(format!("{:016x}", hash.finish()))
}

fn is_recorded(folder: &Path, use_of: &str) -> bool {
    std::fs::read_to_string(record_of(folder, use_of)).is_ok_and(|text| text == use_of)
}

fn write_record(folder: &Path, use_of: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(record_of(folder, use_of), use_of)
}

/// Kernels are compiled once per GPU, driver and version of `apr`.
fn show_progress(n_done: usize, n: usize) {
    if n_done == n {
        say(format_args!("compiled {n} modules of kernels for this GPU; the next start finds them"));
    } else {
        show_status(format!("compiling kernels for this GPU: {n_done} of {n} modules"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_holds_for_a_file_a_device_and_a_build() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.gguf");
        std::fs::write(&model, "as it was").unwrap();
        let records = folder.path().join("checked");
        let use_of = first_use(&model, "cuda (NVIDIA H200, sm_90)").unwrap();
        assert!(!is_recorded(&records, &use_of));
        write_record(&records, &use_of).unwrap();
        assert!(is_recorded(&records, &use_of));
        assert!(!is_recorded(&records, &first_use(&model, "cuda (NVIDIA L4, sm_89)").unwrap()), "another device");
        std::fs::write(&model, "as it is now").unwrap();
        assert!(!is_recorded(&records, &first_use(&model, "cuda (NVIDIA H200, sm_90)").unwrap()), "another file");
        let demo = first_use("demo".as_ref(), "cuda (NVIDIA H200, sm_90)").unwrap();
        write_record(&records, &demo).unwrap();
        assert!(is_recorded(&records, &demo), "the model in the program has no file");
    }
}
