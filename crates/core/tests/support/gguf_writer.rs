//! Writes GGUF files for tests: valid ones by default, broken ones by the hooks whose names start with `raw_`.
//!
//! A test takes it in with `#[path = "support/gguf_writer.rs"] mod gguf_writer;`.
#![allow(dead_code)] // Each test binary uses a part of it.

use apr_core::gguf::{Array, Value};
use apr_core::qtype::GgmlType;

/// Builds a file from metadata and tensors, in the order given. Version 3 and alignment 32 unless told otherwise.
#[derive(Clone)]
pub struct GgufWriter {
    magic: [u8; 4],
    version: u32,
    alignment: usize,
    n_keys: Option<u64>,
    n_tensors: Option<u64>,
    /// Encoded, each with key and type.
    entries: Vec<Vec<u8>>,
    tensors: Vec<RawTensor>,
    /// Bytes of data written so far, padded.
    data_len: usize,
}

/// A tensor as it stands in the file; [`GgufWriter::raw_tensor`] changes it at will.
#[derive(Clone)]
pub struct RawTensor {
    pub name: Vec<u8>,
    pub n_dims: u32,
    pub ne: Vec<u64>,
    pub type_id: u32,
    /// From the start of the data. The bytes of `data` stay where the writer put them.
    pub offset: u64,
    pub data: Vec<u8>,
}

impl GgufWriter {
    pub fn new() -> Self {
        GgufWriter {
            magic: *b"GGUF",
            version: 3,
            alignment: 32,
            n_keys: None,
            n_tensors: None,
            entries: Vec::new(),
            tensors: Vec::new(),
            data_len: 0,
        }
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Lays the tensors out in multiples of `alignment` and says so in the metadata. Goes before the first tensor.
    pub fn alignment(self, alignment: u32) -> Self {
        self.raw_layout(alignment as usize).u32("general.alignment", alignment)
    }

    pub fn meta(self, key: &str, value: &Value) -> Self {
        let (type_id, bytes) = encode(value);
        self.raw_meta([text(key.as_bytes()), type_id.to_le_bytes().to_vec(), bytes].concat())
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.meta(key, &Value::U32(value))
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.meta(key, &Value::F32(value))
    }

    pub fn bool(self, key: &str, value: bool) -> Self {
        self.meta(key, &Value::Bool(value))
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.meta(key, &Value::String(value.into()))
    }

    pub fn array(self, key: &str, value: Array) -> Self {
        self.meta(key, &Value::Array(value))
    }

    pub fn strings(self, key: &str, values: &[&str]) -> Self {
        self.array(key, Array::String(values.iter().map(|s| s.to_string()).collect()))
    }

    /// The three keys of part `no` (from 0) of a model split into `count` files with `n_tensors` tensors together, of
    /// the types that llama.cpp writes.
    pub fn split(self, no: u16, count: u16, n_tensors: i32) -> Self {
        self.meta("split.no", &Value::U16(no))
            .meta("split.count", &Value::U16(count))
            .meta("split.tensors.count", &Value::I32(n_tensors))
    }

    /// A tensor with its bytes; `ne` fastest dimension first.
    pub fn tensor(mut self, name: &str, qtype: GgmlType, ne: &[u64], data: Vec<u8>) -> Self {
        let offset = self.data_len as u64;
        self.data_len += data.len().next_multiple_of(self.alignment);
        self.tensors.push(RawTensor {
            name: name.as_bytes().to_vec(),
            n_dims: ne.len() as u32,
            ne: ne.to_vec(),
            type_id: qtype.id(),
            offset,
            data,
        });
        self
    }

    /// A tensor whose bytes are all zero.
    pub fn zeros(self, name: &str, qtype: GgmlType, ne: &[u64]) -> Self {
        let rows: u64 = ne[1..].iter().product();
        let n_bytes = qtype.row_bytes(ne[0] as usize) * rows as usize;
        self.tensor(name, qtype, ne, vec![0; n_bytes])
    }

    pub fn raw_magic(mut self, magic: [u8; 4]) -> Self {
        self.magic = magic;
        self
    }

    /// The number of keys that the header claims.
    pub fn raw_n_keys(mut self, n: u64) -> Self {
        self.n_keys = Some(n);
        self
    }

    /// The number of tensors that the header claims.
    pub fn raw_n_tensors(mut self, n: u64) -> Self {
        self.n_tensors = Some(n);
        self
    }

    /// Lays the tensors out in multiples of `alignment` without saying so. Goes before the first tensor.
    pub fn raw_layout(mut self, alignment: usize) -> Self {
        assert!(self.tensors.is_empty(), "the layout goes before the first tensor");
        self.alignment = alignment;
        self
    }

    /// An entry of the metadata as bytes: key length, key, type, value.
    pub fn raw_meta(mut self, entry: Vec<u8>) -> Self {
        self.entries.push(entry);
        self
    }

    /// Changes the tensor added last.
    pub fn raw_tensor(mut self, change: impl FnOnce(&mut RawTensor)) -> Self {
        change(self.tensors.last_mut().expect("a tensor was added"));
        self
    }

    /// The bytes before the padding in front of the tensor data.
    pub fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.entries.len() as u64).to_le_bytes());
        out.extend(self.entries.concat());
        for t in &self.tensors {
            out.extend(text(&t.name));
            out.extend(t.n_dims.to_le_bytes());
            out.extend(t.ne.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(t.type_id.to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out
    }

    /// The file. The last tensor ends it, without padding.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        out
    }
}

/// A length and that many bytes: how keys, names and strings are stored.
pub fn text(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

/// Type id and bytes of a value.
fn encode(value: &Value) -> (u32, Vec<u8>) {
    match value {
        Value::U8(n) => (0, n.to_le_bytes().to_vec()),
        Value::I8(n) => (1, n.to_le_bytes().to_vec()),
        Value::U16(n) => (2, n.to_le_bytes().to_vec()),
        Value::I16(n) => (3, n.to_le_bytes().to_vec()),
        Value::U32(n) => (4, n.to_le_bytes().to_vec()),
        Value::I32(n) => (5, n.to_le_bytes().to_vec()),
        Value::F32(n) => (6, n.to_le_bytes().to_vec()),
        Value::Bool(b) => (7, vec![u8::from(*b)]),
        Value::String(s) => (8, text(s.as_bytes())),
        Value::Array(a) => (9, encode_array(a)),
        Value::U64(n) => (10, n.to_le_bytes().to_vec()),
        Value::I64(n) => (11, n.to_le_bytes().to_vec()),
        Value::F64(n) => (12, n.to_le_bytes().to_vec()),
    }
}

/// Element type, count and elements.
fn encode_array(array: &Array) -> Vec<u8> {
    let (type_id, elements): (u32, Vec<u8>) = match array {
        Array::U8(v) => (0, v.clone()),
        Array::I8(v) => (1, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::U16(v) => (2, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::I16(v) => (3, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::U32(v) => (4, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::I32(v) => (5, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::F32(v) => (6, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::Bool(v) => (7, v.iter().map(|&b| u8::from(b)).collect()),
        Array::String(v) => (8, v.iter().flat_map(|s| text(s.as_bytes())).collect()),
        Array::U64(v) => (10, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::I64(v) => (11, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
        Array::F64(v) => (12, v.iter().flat_map(|n| n.to_le_bytes()).collect()),
    };
    [type_id.to_le_bytes().to_vec(), (array.len() as u64).to_le_bytes().to_vec(), elements].concat()
}
