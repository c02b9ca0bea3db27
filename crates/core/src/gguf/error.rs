//! Why a GGUF file is refused. Names from the file are quoted and escaped, so that a hostile one cannot steer the
//! terminal that shows the message.

use thiserror::Error;

use super::{MAX_DIMS, MAX_KEY, MAX_NAME};
use crate::qtype::GgmlType;

/// Why a file is refused, or a metadata key is not what the model needs.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum GgufError {
    #[error("the file is empty: download it again")]
    Empty,
    #[error("this is not a GGUF file: it starts with \"{start}\", expected \"GGUF\"")]
    NotGguf { start: String },
    #[error("this is a safetensors file, but a GGUF file is needed: convert it, or download the model as GGUF")]
    Safetensors,
    #[error("this is an APR file, but a GGUF file is needed: download the model as GGUF")]
    Apr,
    #[error("GGUF version 1 is not supported, only 2 and 3 are: download a newer conversion of the model")]
    Version1,
    #[error(
        "this is a big-endian GGUF file (version {version}), and only little-endian ones are supported: download the \
         little-endian conversion of the model"
    )]
    BigEndian { version: u32 },
    #[error("GGUF version {got} is not supported, only 2 and 3 are")]
    Version { got: u32 },
    #[error(
        "the file ends too early: {missing} bytes are missing for {what}; it is truncated or damaged, so download it \
         again"
    )]
    Truncated { what: String, missing: u64 },
    #[error("the file claims {got} {what}, at most {max} are supported: it is damaged")]
    TooMany { what: String, got: u64, max: u64 },

    #[error("the name of metadata key {number} has {got} bytes, expected 1 to {MAX_KEY}: the file is damaged")]
    KeyLength { number: u64, got: u64 },
    #[error("{what} is not valid UTF-8 from byte {at} on")]
    NotUtf8 { what: String, at: usize },
    #[error("metadata key {key:?} occurs twice")]
    DuplicateKey { key: String },
    #[error("metadata key {key:?} has the unknown value type {got}, expected 0 to 12")]
    ValueType { key: String, got: u32 },
    #[error("metadata key {key:?} is an array of arrays, which is not supported")]
    NestedArray { key: String },
    #[error("metadata key {key:?} has the byte {got} as a bool, expected 0 or 1")]
    Bool { key: String, got: u8 },
    #[error("metadata key {key:?} has a string of {got} bytes, at most {max} are supported: the file is damaged")]
    StringLength { key: String, got: u64, max: u64 },
    #[error("metadata key \"general.alignment\" is {got}, expected a power of two of at least 8")]
    Alignment { got: u32 },

    #[error("metadata key {key:?} is missing")]
    MissingKey { key: String },
    #[error("metadata key {key:?} is of type {got}, expected {expected}")]
    WrongType { key: String, expected: &'static str, got: &'static str },
    #[error("metadata key {key:?} is {got}, which is not in the range of {expected}")]
    OutOfRange { key: String, expected: &'static str, got: String },

    #[error("the name of tensor {number} has {got} bytes, expected 1 to {MAX_NAME}")]
    NameLength { number: u64, got: u64 },
    #[error("tensor {tensor:?} occurs twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor {tensor:?} has {got} dimensions, expected 1 to {MAX_DIMS}")]
    DimCount { tensor: String, got: u32 },
    #[error("tensor {tensor:?} of shape {ne:?} has a dimension of {got}, expected 1 to {max}", max = i64::MAX)]
    Dim { tensor: String, ne: Vec<u64>, got: u64 },
    #[error("tensor {tensor:?} of shape {ne:?} is larger than {max} weights or bytes", max = i64::MAX)]
    TooLarge { tensor: String, ne: Vec<u64> },
    #[error("tensor {tensor:?} has type {id} ({name}), which is not supported; supported are {types}", types = readable())]
    TensorType { tensor: String, id: u32, name: &'static str },
    #[error(
        "tensor {tensor:?} has rows of {got} weights, but {qtype} stores blocks of {block}",
        block = qtype.block_len()
    )]
    PartialBlock { tensor: String, qtype: GgmlType, got: u64 },
    #[error("tensor {tensor:?} starts at offset {offset}, expected a multiple of the alignment {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor {tensor:?} of {n_bytes} bytes starts at offset {offset} of the data, outside the file of {file_len} \
         bytes: the file is damaged, so download it again"
    )]
    Outside { tensor: String, offset: u64, n_bytes: u64, file_len: u64 },
    #[error("the data of tensors {first:?} and {second:?} overlap")]
    Overlap { first: String, second: String },

    #[error("a model needs at least one file")]
    NoParts,
    #[error("part {part} of {of}: {error}")]
    SplitPart { part: usize, of: usize, error: Box<GgufError> },
    #[error("the model is split into {expected} files, got {got}: put all of them into one folder")]
    SplitCount { expected: u32, got: usize },
    #[error("the file given as part {part} says that it is part {got}: was it renamed?")]
    SplitOrder { part: usize, got: u64 },
    #[error("part {part} belongs to another model: its metadata key {key:?} differs from that of part 1")]
    SplitOther { part: usize, key: String },
    #[error("tensor {tensor:?} is in part {first} and in part {second}: these parts do not belong together")]
    SplitDuplicate { tensor: String, first: usize, second: usize },
    #[error("the parts announce {expected} tensors and hold {got}: they do not belong together")]
    SplitTensorCount { expected: u32, got: usize },
}

fn readable() -> String {
    GgmlType::ALL.map(GgmlType::name).join(", ")
}
