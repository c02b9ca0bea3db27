//! A fixture taken apart, so that a test can break one thing in it and write it out again.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::path::{Path, PathBuf};

use apr_core::gguf::{self, Value};
use apr_core::qtype::GgmlType;

use crate::gguf_writer::GgufWriter;

/// A tensor with its bytes; `ne` fastest dimension first.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub qtype: GgmlType,
    pub ne: Vec<u64>,
    pub data: Vec<u8>,
}

/// Metadata and tensors of a model, free to change.
#[derive(Clone)]
pub struct Model {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

impl Model {
    pub fn read(path: &str) -> Model {
        let bytes = std::fs::read(path).expect("the fixture is there");
        let gguf = gguf::parse(&bytes).expect("the fixture is a GGUF file");
        let data = |t: &gguf::TensorInfo| bytes[t.offset as usize..][..t.n_bytes as usize].to_vec();
        let tensor =
            |t: &gguf::TensorInfo| Tensor { name: t.name.clone(), qtype: t.qtype, ne: t.ne.clone(), data: data(t) };
        Model {
            metadata: gguf.metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect(),
            tensors: gguf.tensors.iter().map(tensor).collect(),
        }
    }

    /// Sets a key, in its place where the file has it.
    pub fn set(mut self, key: &str, value: Value) -> Model {
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => self.metadata.push((key.to_string(), value)),
        }
        self
    }

    pub fn string(self, key: &str, value: &str) -> Model {
        self.set(key, Value::String(value.to_string()))
    }

    pub fn u32(self, key: &str, value: u32) -> Model {
        self.set(key, Value::U32(value))
    }

    pub fn without(mut self, key: &str) -> Model {
        let n = self.metadata.len();
        self.metadata.retain(|(k, _)| k != key);
        assert_eq!(self.metadata.len(), n - 1, "the fixture has {key}");
        self
    }

    pub fn without_tensor(mut self, name: &str) -> Model {
        let n = self.tensors.len();
        self.tensors.retain(|t| t.name != name);
        assert_eq!(self.tensors.len(), n - 1, "the fixture has {name}");
        self
    }

    pub fn with_tensor(mut self, name: &str, ne: &[u64]) -> Model {
        let data = vec![0; 4 * ne.iter().product::<u64>() as usize];
        self.tensors.push(Tensor { name: name.to_string(), qtype: GgmlType::F32, ne: ne.to_vec(), data });
        self
    }

    /// Makes every value of an F32 tensor `value`.
    pub fn filled(mut self, name: &str, value: f32) -> Model {
        let t = self.tensors.iter_mut().find(|t| t.name == name).expect("the fixture has the tensor");
        assert_eq!(t.qtype, GgmlType::F32);
        t.data.chunks_exact_mut(4).for_each(|v| v.copy_from_slice(&value.to_le_bytes()));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        add_tensors(add_metadata(GgufWriter::new(), &self.metadata), &self.tensors).bytes()
    }

    pub fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, self.bytes()).expect("a file can be written");
        path
    }

    /// Writes the model as two parts, `NAME-0000X-of-00002.gguf`, the metadata in the first.
    pub fn write_split(&self, folder: &Path, name: &str) -> [PathBuf; 2] {
        let (first, second) = self.tensors.split_at(self.tensors.len() / 2);
        let part = |no: u16, metadata: &[(String, Value)], tensors: &[Tensor]| {
            let writer = GgufWriter::new().split(no, 2, self.tensors.len() as i32);
            let path = folder.join(format!("{name}-{:05}-of-00002.gguf", no + 1));
            std::fs::write(&path, add_tensors(add_metadata(writer, metadata), tensors).bytes()).expect("written");
            path
        };
        [part(0, &self.metadata, first), part(1, &[], second)]
    }
}

fn add_metadata(writer: GgufWriter, metadata: &[(String, Value)]) -> GgufWriter {
    metadata.iter().fold(writer, |w, (key, value)| w.meta(key, value))
}

fn add_tensors(writer: GgufWriter, tensors: &[Tensor]) -> GgufWriter {
    tensors.iter().fold(writer, |w, t| w.tensor(&t.name, t.qtype, &t.ne, t.data.clone()))
}
