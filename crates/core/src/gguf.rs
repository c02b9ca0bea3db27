//! Reads GGUF files, versions 2 and 3: metadata and where each tensor lies.
//!
//! A model file comes from the network, so nothing in it is believed: arithmetic is checked, every length is held
//! against the bytes left before anything is allocated, and a tensor lies inside the file and apart from the others.
//! What is refused is refused by name. The format is the GGUF specification of ggml (`docs/gguf.md`), little-endian.
//!
//! [`parse`] takes one file as bytes (usually a memory map), [`join`] makes one model of the parts of a split one.
//! Whether the metadata describes a model that can run is for the hyper-parameters to check.

mod error;
mod metadata;
mod reader;
mod split;
mod value;

use std::collections::HashSet;
use std::fmt;

pub use error::GgufError;
pub use metadata::Metadata;
pub use split::{join, split_names};
pub use value::{Array, Value};

use crate::qtype::GgmlType;
use reader::Reader;

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_NAME: u64 = 63;
const MAX_KEY: u64 = 65_535;
const MAX_DIMS: u32 = 4;
/// Largest header that a safetensors file may have; tells its length prefix from chance.
const MAX_SAFETENSORS_HEADER: u64 = 100_000_000;

/// Bounds on what a damaged count may cost in a file that is large enough to hide it. Published models stay below
/// them by a factor of ten or more: dozens of keys, under 20 000 tensors, vocabularies under a million.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_STRING: u64 = 64 << 20;
const MAX_ARRAY: u64 = 1 << 26;

/// The fewest bytes an entry can take: length, one byte of key, type, one byte of value.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
/// The fewest bytes a tensor's description can take: length, one byte of name, dimension count, one dimension, type,
/// offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// One GGUF file, or after [`join`] all parts of a split one.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// What the offsets of tensors are multiples of, in bytes: a power of two, 8 or more.
    pub alignment: u64,
    pub metadata: Metadata,
    /// In the order of the file, and for joined files of the parts.
    pub tensors: Vec<TensorInfo>,
}

/// Where a tensor lies, of what type and shape it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub qtype: GgmlType,
    /// Weights per dimension as ggml orders them, the fastest first; 1 to 4 of them, each at least 1. A matrix that
    /// maps `n` inputs to `m` outputs is `[n, m]`, and its rows of `n` weights are whole blocks.
    pub ne: Vec<u64>,
    /// Which of the split files holds it, counted from 0; 0 in a model of one file.
    pub part: usize,
    /// Bytes from the start of that file.
    pub offset: u64,
    pub n_bytes: u64,
}

impl Gguf {
    /// The tensor of this name, if the model has it.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Reads one whole GGUF file. Tensor data is located, not read.
///
/// A part of a split model parses like any other file and lacks the tensors of the other parts: give even a single
/// file to [`join`], which refuses an incomplete model.
pub fn parse(bytes: &[u8]) -> Result<Gguf, GgufError> {
    let mut r = Reader::new(bytes);
    let version = header(&mut r)?;
    let n_tensors = r.u64(&"the number of tensors")?;
    let n_keys = r.u64(&"the number of metadata keys")?;
    r.expect_count(&"tensors", n_tensors, MAX_TENSORS, MIN_TENSOR_BYTES)?;
    r.expect_count(&"metadata keys", n_keys, MAX_KEYS, MIN_KEY_BYTES)?;

    let metadata = read_metadata(&mut r, n_keys)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = read_tensors(&mut r, n_tensors, alignment)?;
    locate(&mut tensors, r.position(), bytes.len() as u64, alignment)?;
    Ok(Gguf { version, alignment, metadata, tensors })
}

/// Checks magic and version, and returns the version.
fn header(r: &mut Reader) -> Result<u32, GgufError> {
    let bytes = r.bytes();
    if bytes.is_empty() {
        return Err(GgufError::Empty);
    }
    if let Some(other) = other_format(bytes) {
        return Err(other);
    }
    // A file cut inside the magic is truncated; one that differs before its end is something else.
    let start = &bytes[..bytes.len().min(MAGIC.len())];
    if !MAGIC.starts_with(start) {
        return Err(GgufError::NotGguf { start: start.escape_ascii().to_string() });
    }
    r.take(4, &"the magic \"GGUF\"")?;
    let version = r.u32(&"the version")?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(GgufError::Version1),
        // Versions are small, so one whose low half is empty was written with the bytes the other way round.
        v if v != 0 && v & 0xffff == 0 => Err(GgufError::BigEndian { version: v.swap_bytes() }),
        got => Err(GgufError::Version { got }),
    }
}

/// The refusal of a file in one of the formats that are easily taken for GGUF.
fn other_format(bytes: &[u8]) -> Option<GgufError> {
    if bytes.starts_with(b"APR") {
        return Some(GgufError::Apr);
    }
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let safetensors = u64::from_le_bytes(*length) <= MAX_SAFETENSORS_HEADER && rest.starts_with(b"{");
    safetensors.then_some(GgufError::Safetensors)
}

fn read_metadata(r: &mut Reader, n_keys: u64) -> Result<Metadata, GgufError> {
    let mut metadata = Metadata::default();
    for i in 1..=n_keys {
        let what = format_args!("metadata key {i} of {n_keys}");
        let length = r.u64(&what)?;
        if length == 0 || length > MAX_KEY {
            return Err(GgufError::KeyLength { number: i, got: length });
        }
        let key = r.utf8(length, &what)?.to_owned();
        let value = value::read(r, &key)?;
        metadata.insert(key, value)?;
    }
    Ok(metadata)
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(n)) if n >= 8 && n.is_power_of_two() => Ok(n.into()),
        Some(&Value::U32(n)) => Err(GgufError::Alignment { got: n }),
        Some(v) => Err(GgufError::WrongType { key: KEY.into(), expected: "u32", got: v.type_name() }),
    }
}

/// Reads the descriptions of the tensors; their offsets still count from the start of the data.
fn read_tensors(r: &mut Reader, n_tensors: u64, alignment: u64) -> Result<Vec<TensorInfo>, GgufError> {
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for i in 1..=n_tensors {
        let what = format_args!("the name of tensor {i} of {n_tensors}");
        let length = r.u64(&what)?;
        if length == 0 || length > MAX_NAME {
            return Err(GgufError::NameLength { number: i, got: length });
        }
        let name = r.utf8(length, &what)?;
        if !names.insert(name) {
            return Err(GgufError::DuplicateTensor { tensor: name.into() });
        }
        tensors.push(read_tensor(r, name, alignment)?);
    }
    Ok(tensors)
}

/// Reads what follows a tensor's name.
fn read_tensor(r: &mut Reader, name: &str, alignment: u64) -> Result<TensorInfo, GgufError> {
    let what: &dyn fmt::Display = &format_args!("the description of tensor {name:?}");
    let tensor = || name.to_owned();
    let n_dims = r.u32(what)?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(GgufError::DimCount { tensor: tensor(), got: n_dims });
    }
    let ne = (0..n_dims).map(|_| r.u64(what)).collect::<Result<Vec<u64>, _>>()?;
    let id = r.u32(what)?;
    let offset = r.u64(what)?;

    if let Some(&got) = ne.iter().find(|&&n| n == 0 || n > i64::MAX as u64) {
        return Err(GgufError::Dim { tensor: tensor(), ne, got });
    }
    let qtype = GgmlType::from_id(id).ok_or_else(|| GgufError::TensorType {
        tensor: tensor(),
        id,
        name: GgmlType::name_of_id(id).unwrap_or("no type known to ggml"),
    })?;
    if ne[0] % qtype.block_len() as u64 != 0 {
        return Err(GgufError::PartialBlock { tensor: tensor(), qtype, got: ne[0] });
    }
    let n_bytes = tensor_bytes(qtype, &ne).ok_or_else(|| GgufError::TooLarge { tensor: tensor(), ne: ne.clone() })?;
    if offset % alignment != 0 {
        return Err(GgufError::Misaligned { tensor: tensor(), offset, alignment });
    }
    Ok(TensorInfo { name: tensor(), qtype, ne, part: 0, offset, n_bytes })
}

/// Bytes of a tensor whose rows are whole blocks, or `None` when weights or bytes are more than an `i64` counts.
fn tensor_bytes(qtype: GgmlType, ne: &[u64]) -> Option<u64> {
    let n = ne.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= i64::MAX as u64)?;
    let blocks = n / qtype.block_len() as u64;
    blocks.checked_mul(qtype.block_bytes() as u64).filter(|&b| b <= i64::MAX as u64)
}

/// Makes offsets count from the start of the file, and checks that every tensor lies inside it and apart from the
/// others. The data starts at the first multiple of `alignment` from `header_end`.
fn locate(tensors: &mut [TensorInfo], header_end: u64, file_len: u64, alignment: u64) -> Result<(), GgufError> {
    let start = header_end.next_multiple_of(alignment);
    // Where a too large sum saturates it lies beyond any file, which the checks below refuse.
    let packed = tensors.iter().fold(0u64, |sum, t| sum.saturating_add(t.n_bytes.next_multiple_of(alignment)));
    let mut missing = 0;
    let mut first_cut = None;
    for t in tensors.iter_mut() {
        let end = t.offset.saturating_add(start).saturating_add(t.n_bytes);
        if end > file_len {
            // Where all tensors packed one after the other end before this one begins, its offset is wrong; else the
            // file is too short.
            if t.offset >= packed {
                let TensorInfo { name, offset, n_bytes, .. } = t.clone();
                return Err(GgufError::Outside { tensor: name, offset, n_bytes, file_len });
            }
            missing = missing.max(end - file_len);
            first_cut.get_or_insert_with(|| t.name.clone());
        }
        t.offset = t.offset.saturating_add(start);
    }
    if let Some(name) = first_cut {
        return Err(GgufError::Truncated { what: format!("the data of tensor {name:?}"), missing });
    }

    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].n_bytes > pair[1].offset {
            return Err(GgufError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() });
        }
    }
    Ok(())
}
