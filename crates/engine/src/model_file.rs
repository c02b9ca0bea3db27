//! A model on disk: its parts mapped into memory, parsed, and what its tensors cost to read.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use apr_core::backend::Storage;
use apr_core::gguf::{self, Gguf, GgufError};
use apr_core::hparams::{Hparams, HparamsError};
use sha2::{Digest, Sha256};

use crate::demo;
use crate::mapping::Mapping;

/// An opened model: metadata, tensor directory and the mapped bytes.
pub struct ModelFile {
    /// The file that was asked for.
    pub path: PathBuf,
    pub gguf: Gguf,
    /// The mapped parts, in the order that [`TensorInfo::part`](apr_core::gguf::TensorInfo) counts.
    pub parts: Vec<Arc<dyn Storage>>,
    /// The same.
    pub(crate) mappings: Vec<Arc<Mapping>>,
    /// Bytes of all parts.
    pub file_bytes: u64,
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is {what}, expected a GGUF file")]
    NotAFile { path: PathBuf, what: &'static str },
    #[error("{path}: {source}")]
    Gguf { path: PathBuf, source: GgufError },
    #[error("{path} is missing: the model is split into {n_parts} files, which must lie in one folder")]
    PartMissing { path: PathBuf, n_parts: usize },
}

impl ModelFile {
    /// Opens a model; the parts of a split one are found beside it, whichever part is named. The bare name `demo` is the
    /// [demo model](crate::demo).
    ///
    /// # Errors
    /// What cannot be read, is no GGUF, or is an incomplete set of parts, with the file's name.
    pub fn open(path: &Path) -> Result<ModelFile, OpenError> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let paths = match gguf::split_names(name) {
            Some(names) => names.iter().map(|n| path.with_file_name(n)).collect(),
            None => vec![path.to_path_buf()],
        };
        let (mut parsed, mut mappings) = (Vec::new(), Vec::new());
        for part in &paths {
            let map = Arc::new(map(part, paths.len())?);
            let bytes = (*map).as_ref();
            parsed.push(gguf::parse(bytes).map_err(|source| OpenError::Gguf { path: part.clone(), source })?);
            mappings.push(map);
        }
        let file_bytes = mappings.iter().map(|map| (**map).as_ref().len() as u64).sum();
        let parts = mappings.iter().map(|map| map.clone() as Arc<dyn Storage>).collect();
        // A single file goes the same way: one part of a split model renamed is refused there.
        let gguf = gguf::join(parsed).map_err(|source| OpenError::Gguf { path: path.to_path_buf(), source })?;
        Ok(ModelFile { path: path.to_path_buf(), gguf, parts, mappings, file_bytes })
    }

    /// The model's hyper-parameters.
    ///
    /// # Errors
    /// See [`Hparams::from_gguf`].
    pub fn hparams(&self) -> Result<Hparams, HparamsError> {
        Hparams::from_gguf(&self.gguf)
    }

    /// SHA-256 of the file in hexadecimal, of a split model's parts one after the other. Reads every byte.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        self.parts.iter().for_each(|part| hash.update((**part).as_ref()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Bytes of weights that one decoded token reads: everything but the embedding table (of which it reads one row, unless the
    /// table is the output matrix too), and of the experts those that a token uses.
    pub fn bytes_per_token(&self, h: &Hparams) -> u64 {
        let tied = self.gguf.tensor("output.weight").is_none();
        let share = |name: &str, n_bytes: u64| match &h.experts {
            _ if name == "token_embd.weight" && !tied => n_bytes / h.n_vocab as u64,
            Some(e) if name.ends_with("_exps.weight") => n_bytes / e.n_expert as u64 * e.n_expert_used as u64,
            _ => n_bytes,
        };
        self.gguf.tensors.iter().map(|t| share(&t.name, t.n_bytes)).sum()
    }
}

fn map(path: &Path, n_parts: usize) -> Result<Mapping, OpenError> {
    if demo::is_meant(path) {
        return Ok(Mapping::embedded(demo::bytes()));
    }
    let io = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound if n_parts > 1 => OpenError::PartMissing { path: path.to_path_buf(), n_parts },
        _ => OpenError::Io { path: path.to_path_buf(), source },
    };
    let kind = std::fs::metadata(path).map_err(io)?;
    let what = if kind.is_dir() { "a folder" } else { "not a regular file" };
    if !kind.is_file() {
        return Err(OpenError::NotAFile { path: path.to_path_buf(), what });
    }
    if kind.len() == 0 {
        return Err(OpenError::NotAFile { path: path.to_path_buf(), what: "empty" });
    }
    let file = File::open(path).map_err(io)?;
    Mapping::new(&file).map_err(io)
}
