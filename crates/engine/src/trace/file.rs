//! A saved trace: the stages of a pass in one safetensors file.
//!
//! The header is written first, from the plan; rows are written to their places as the pass computes them, so memory does not depend on
//! the trace's size. Tensors are named `blk.N.STAGE`, or by the bare stage; the first axis is the saved positions; values are F32, expert
//! ids I32. Format of the container: <https://github.com/huggingface/safetensors>.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use apr_core::stage::{Place, Stage};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// The format's name in the metadata.
const FORMAT: &str = "apr.trace/1";

/// What a trace says about its pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceHeader {
    /// Program and version.
    pub producer: String,
    /// The model's path as it was given.
    pub model: String,
    /// SHA-256 of the model's file in hexadecimal, or empty where it was not computed.
    pub model_sha256: String,
    /// GGUF's name of the architecture.
    pub architecture: String,
    /// All tokens of the pass, decoded ones included.
    pub tokens: Vec<u32>,
    /// How many of them are prompt.
    pub n_prompt: usize,
    /// The saved positions, ascending.
    pub positions: Vec<u32>,
    /// `cpu`, `reference`, `cuda`, `transformers`
    pub device: String,
    /// Instruction set, or empty.
    pub isa: String,
    /// `f32` or `int8`: activations in products with quantized weights.
    pub precision: String,
    /// `f32`, `f16` or `q8_0`
    pub kv: String,
    /// Whether fused ops ran as they are served.
    pub fused: bool,
}

/// What can be wrong with a trace file.
#[derive(Debug, thiserror::Error)]
pub enum TraceFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is no safetensors file: {what}")]
    Container { path: PathBuf, what: String },
    #[error("{path} is no trace of apr: metadata '{key}' is {got}, expected {expected}")]
    Metadata { path: PathBuf, key: &'static str, got: String, expected: &'static str },
    #[error("{path}: tensor '{name}' {what}")]
    Tensor { path: PathBuf, name: String, what: String },
}

/// Writes a trace while its pass runs.
pub struct TraceWriter {
    file: File,
    path: PathBuf,
    /// Where it is written until it is whole.
    partial: PathBuf,
    /// Bytes of the header with its padding.
    header_bytes: usize,
    tensors: BTreeMap<Place, Saved>,
    positions: Vec<u32>,
}

/// A trace on disk, mapped.
pub struct SavedTrace {
    pub path: PathBuf,
    pub header: TraceHeader,
    map: Mmap,
    tensors: BTreeMap<Place, Saved>,
}

/// One tensor of a file.
#[derive(Clone, Debug)]
struct Saved {
    /// Without the axis of positions.
    shape: Vec<usize>,
    dtype: Dtype,
    /// Bytes in the file.
    bytes: Range<usize>,
}

impl Saved {
    fn n_cols(&self) -> usize {
        self.shape.iter().product()
    }

    fn row_bytes(&self) -> usize {
        self.n_cols() * self.dtype.bitsize() / 8
    }
}

impl TraceHeader {
    fn to_json(&self) -> Value {
        json!({
            "format": FORMAT, "producer": self.producer, "model": self.model, "model_sha256": self.model_sha256,
            "architecture": self.architecture, "tokens": json!(self.tokens).to_string(), "n_prompt": self.n_prompt.to_string(),
            "positions": json!(self.positions).to_string(), "device": self.device, "isa": self.isa,
            "precision": self.precision, "kv": self.kv, "fused": self.fused.to_string(),
        })
    }

    fn read(path: &Path, m: &std::collections::HashMap<String, String>) -> Result<TraceHeader, TraceFileError> {
        let get = |key: &'static str| m.get(key).cloned().unwrap_or_default();
        let wrong = |key, expected| TraceFileError::Metadata {
            path: path.to_path_buf(),
            key,
            got: format!("'{}'", get(key)),
            expected,
        };
        if get("format") != FORMAT {
            return Err(wrong("format", FORMAT));
        }
        let ids = |key| serde_json::from_str::<Vec<u32>>(&get(key)).map_err(|_| wrong(key, "a JSON array of numbers"));
        let (tokens, positions) = (ids("tokens")?, ids("positions")?);
        if !positions.is_sorted_by(|a, b| a < b) || positions.last().is_some_and(|&p| p as usize >= tokens.len()) {
            return Err(wrong("positions", "ascending positions of the tokens"));
        }
        let n_prompt = get("n_prompt").parse().ok().filter(|&n| n <= tokens.len());
        Ok(TraceHeader {
            producer: get("producer"),
            model: get("model"),
            model_sha256: get("model_sha256"),
            architecture: get("architecture"),
            n_prompt: n_prompt.ok_or_else(|| wrong("n_prompt", "a number of tokens"))?,
            tokens,
            positions,
            device: get("device"),
            isa: get("isa"),
            precision: get("precision"),
            kv: get("kv"),
            fused: get("fused").parse().map_err(|_| wrong("fused", "true or false"))?,
        })
    }
}

impl TraceWriter {
    /// Begins a trace of the given tensors: place and shape for one position. `n_decode` tokens may be added to the header's when it is
    /// finished; their positions are in `header.positions` already.
    ///
    /// # Errors
    /// A file that cannot be written; the disk being full shows here already, as far as the system tells.
    pub fn create(
        path: &Path,
        header: &TraceHeader,
        n_decode: usize,
        tensors: &[(Place, Vec<usize>)],
    ) -> Result<TraceWriter, TraceFileError> {
        let mut options = File::options();
        TraceWriter::begin(path, header, n_decode, tensors, options.create(true).truncate(true))
    }

    /// As [`create`](Self::create), where nothing may be written over.
    ///
    /// # Errors
    /// A trace of this name that is there, or is being written.
    pub fn create_new(
        path: &Path,
        header: &TraceHeader,
        n_decode: usize,
        tensors: &[(Place, Vec<usize>)],
    ) -> Result<TraceWriter, TraceFileError> {
        if path.exists() {
            return Err(TraceFileError::Io { path: path.to_path_buf(), source: io::ErrorKind::AlreadyExists.into() });
        }
        TraceWriter::begin(path, header, n_decode, tensors, File::options().create_new(true))
    }

    fn begin(
        path: &Path,
        header: &TraceHeader,
        n_decode: usize,
        tensors: &[(Place, Vec<usize>)],
        options: &mut OpenOptions,
    ) -> Result<TraceWriter, TraceFileError> {
        let (mut at, mut places) = (0, BTreeMap::new());
        for (place, shape) in tensors {
            let dtype = if place.stage == Stage::MoeRouterIndices { Dtype::I32 } else { Dtype::F32 };
            let n_bytes = 4 * shape.iter().product::<usize>() * header.positions.len();
            places.insert(*place, Saved { shape: shape.clone(), dtype, bytes: at..at + n_bytes });
            at += n_bytes;
        }
        // Token ids have at most ten digits and a comma each.
        let header_bytes = (header_json(header, &places).len() + 11 * n_decode).next_multiple_of(64);
        let partial = path.with_extension("safetensors.partial");
        let io = |source| TraceFileError::Io { path: partial.clone(), source };
        let file = options.read(true).write(true).open(&partial).map_err(io)?;
        let positions = header.positions.clone();
        let writer = TraceWriter { file, path: path.to_path_buf(), partial, header_bytes, tensors: places, positions };
        // From here on a failure takes the file away again.
        writer.file.set_len((8 + header_bytes + at) as u64).map_err(|source| writer.io(source))?;
        writer.write_header(header)?;
        Ok(writer)
    }

    /// Whether the trace has the tensor.
    pub fn has(&self, place: Place) -> bool {
        self.tensors.contains_key(&place)
    }

    /// Shape of a place's value for one position, where the trace has it.
    pub fn shape(&self, place: Place) -> Option<&[usize]> {
        self.tensors.get(&place).map(|t| t.shape.as_slice())
    }

    /// Writes the rows of `values` whose positions are saved; `positions` ascend.
    ///
    /// # Errors
    /// What the system says, as when the disk is full.
    pub fn write(&mut self, place: Place, positions: &[u32], values: &[f32]) -> Result<(), TraceFileError> {
        let Some(saved) = self.tensors.get(&place) else { return Ok(()) };
        let n = saved.n_cols();
        assert_eq!(values.len(), positions.len() * n, "{place}: rows of {n} values");
        let mut bytes = Vec::new();
        let mut rows = positions.iter().zip(values.chunks_exact(n.max(1))).peekable();
        while let Some((&first, row)) = rows.next() {
            let Ok(at) = self.positions.binary_search(&first) else { continue };
            bytes.clear();
            encode(saved.dtype, row, &mut bytes);
            // Rows that follow each other in the file are written together.
            let mut n_rows = 1;
            while let Some((_, row)) = rows.next_if(|(p, _)| self.positions.get(at + n_rows) == Some(p)) {
                encode(saved.dtype, row, &mut bytes);
                n_rows += 1;
            }
            let offset = 8 + self.header_bytes + saved.bytes.start + at * saved.row_bytes();
            self.write_at(&bytes, offset)?;
        }
        Ok(())
    }

    /// Ends the trace: writes the final header, which may name decoded tokens, and gives the file its name. Where the header has fewer
    /// positions than were planned, the first ones, the file has no others.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(mut self, header: &TraceHeader) -> Result<PathBuf, TraceFileError> {
        assert!(self.positions.starts_with(&header.positions), "the positions that were planned, or the first of them");
        if header.positions.len() < self.positions.len() {
            self.shorten(header.positions.len()).map_err(|source| self.io(source))?;
        }
        self.write_header(header)?;
        self.file.sync_data().map_err(|source| self.io(source))?;
        std::fs::rename(&self.partial, &self.path).map_err(|source| self.io(source))?;
        Ok(self.path.clone())
    }

    /// Keeps the first `n` positions of every tensor, moving each towards the front of the file.
    fn shorten(&mut self, n: usize) -> io::Result<()> {
        const PIECE: usize = 1 << 20;
        let (mut file, start, mut at) = (&self.file, 8 + self.header_bytes, 0);
        let mut piece = Vec::new();
        let mut in_order: Vec<&mut Saved> = self.tensors.values_mut().collect();
        in_order.sort_by_key(|t| t.bytes.start);
        for saved in in_order {
            let kept = saved.bytes.start..saved.bytes.start + n * saved.row_bytes();
            let moved = at..at + kept.len();
            for done in (0..kept.len()).step_by(PIECE).filter(|_| moved != kept) {
                piece.resize(PIECE.min(kept.len() - done), 0);
                file.seek(SeekFrom::Start((start + kept.start + done) as u64))?;
                file.read_exact(&mut piece)?;
                file.seek(SeekFrom::Start((start + moved.start + done) as u64))?;
                file.write_all(&piece)?;
            }
            at = moved.end;
            saved.bytes = moved;
        }
        file.set_len((start + at) as u64)?;
        self.positions.truncate(n);
        Ok(())
    }

    fn write_header(&self, header: &TraceHeader) -> Result<(), TraceFileError> {
        let mut bytes = header_json(header, &self.tensors).into_bytes();
        assert!(bytes.len() <= self.header_bytes, "the header has room for the decoded tokens it was told of");
        // The format pads with blanks.
        bytes.resize(self.header_bytes, b' ');
        let whole = [&(self.header_bytes as u64).to_le_bytes()[..], &bytes].concat();
        self.write_at(&whole, 0)
    }

    fn write_at(&self, bytes: &[u8], offset: usize) -> Result<(), TraceFileError> {
        let mut file = &self.file;
        let written = file.seek(SeekFrom::Start(offset as u64)).and_then(|_| file.write_all(bytes));
        written.map_err(|source| self.io(source))
    }

    fn io(&self, source: io::Error) -> TraceFileError {
        TraceFileError::Io { path: self.partial.clone(), source }
    }
}

impl Drop for TraceWriter {
    /// A trace that was not finished leaves no file.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

fn header_json(header: &TraceHeader, tensors: &BTreeMap<Place, Saved>) -> String {
    let mut map = Map::new();
    map.insert("__metadata__".to_string(), header.to_json());
    for (place, saved) in tensors {
        let shape: Vec<usize> = [header.positions.len()].into_iter().chain(saved.shape.iter().copied()).collect();
        let dtype = if saved.dtype == Dtype::I32 { "I32" } else { "F32" };
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [saved.bytes.start, saved.bytes.end]});
        map.insert(place.to_string(), entry);
    }
    Value::Object(map).to_string()
}

fn encode(dtype: Dtype, row: &[f32], out: &mut Vec<u8>) {
    match dtype {
        Dtype::I32 => row.iter().for_each(|&v| out.extend_from_slice(&(v as i32).to_le_bytes())),
        _ => row.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
    }
}

impl SavedTrace {
    /// Opens a trace, written by `apr` or by anything that keeps to its format.
    ///
    /// # Errors
    /// What is no trace, or has tensors that do not fit its positions.
    pub fn open(path: &Path) -> Result<SavedTrace, TraceFileError> {
        let io = |source| TraceFileError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only. Another process that truncates the file while it is mapped breaks this, as with a model's
        // file.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let container = |e: safetensors::SafeTensorError| TraceFileError::Container {
            path: path.to_path_buf(),
            what: e.to_string(),
        };
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map).map_err(container)?;
        let empty = std::collections::HashMap::new();
        let header = TraceHeader::read(path, metadata.metadata().as_ref().unwrap_or(&empty))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let Some(place) = Place::parse(&name) else { continue };
            let wrong = |what: String| TraceFileError::Tensor { path: path.to_path_buf(), name: name.clone(), what };
            if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::I32 | Dtype::I64) {
                return Err(wrong(format!("has type {:?}, expected F32, F16, BF16, I32 or I64", info.dtype)));
            }
            if info.shape.len() < 2 || info.shape[0] != header.positions.len() {
                let n = header.positions.len();
                return Err(wrong(format!(
                    "has shape {:?}, expected one row for each of the {n} positions",
                    info.shape
                )));
            }
            if info.shape.contains(&0) && !header.positions.is_empty() {
                return Err(wrong(format!("has shape {:?}, expected values at every position", info.shape)));
            }
            let start = 8 + header_bytes;
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            tensors.insert(place, Saved { shape: info.shape[1..].to_vec(), dtype: info.dtype, bytes });
        }
        Ok(SavedTrace { path: path.to_path_buf(), header, map, tensors })
    }

    /// The saved places, in order of computation.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.tensors.keys().copied()
    }

    /// Shape of a place's value for one position.
    pub fn shape(&self, place: Place) -> Option<&[usize]> {
        self.tensors.get(&place).map(|t| t.shape.as_slice())
    }

    /// Copies the value at one of the saved positions; false where the trace does not have it.
    pub fn read(&self, place: Place, position: u32, out: &mut Vec<f32>) -> bool {
        out.clear();
        let (Some(t), Ok(row)) = (self.tensors.get(&place), self.header.positions.binary_search(&position)) else {
            return false;
        };
        let n = t.row_bytes();
        let bytes = &self.map[t.bytes.start + row * n..t.bytes.start + (row + 1) * n];
        let word = |b: &[u8]| [b[0], b[1], b[2], b[3]];
        match t.dtype {
            Dtype::F16 => out.extend(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
            Dtype::BF16 => out.extend(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            Dtype::I32 => out.extend(bytes.chunks_exact(4).map(|b| i32::from_le_bytes(word(b)) as f32)),
            // Ids fit the lower half.
            Dtype::I64 => out.extend(bytes.chunks_exact(8).map(|b| i32::from_le_bytes(word(b)) as f32)),
            _ => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(word(b)))),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(tokens: &[u32], positions: &[u32]) -> TraceHeader {
        TraceHeader {
            producer: "test".to_string(),
            architecture: "qwen3moe".to_string(),
            tokens: tokens.to_vec(),
            n_prompt: 3,
            positions: positions.to_vec(),
            device: "cpu".to_string(),
            precision: "int8".to_string(),
            kv: "f16".to_string(),
            fused: true,
            ..TraceHeader::default()
        }
    }

    #[test]
    fn rows_go_to_their_places_and_decoded_tokens_into_the_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.safetensors");
        let (norm, ids) = (Place::new(1, Stage::AttnNorm), Place::new(1, Stage::MoeRouterIndices));
        let plan = [(norm, vec![2]), (ids, vec![2])];
        let mut w = TraceWriter::create(&path, &header(&[5, 6, 7], &[1, 2, 3]), 1, &plan).unwrap();
        w.write(norm, &[0, 1, 2], &[0.0, 0.0, 1.0, 1.5, 2.0, f32::NAN]).unwrap();
        w.write(ids, &[3], &[7.0, 3.0]).unwrap();
        w.write(Place::new(0, Stage::AttnNorm), &[3], &[1.0, 1.0]).unwrap();
        assert!(!path.exists(), "a trace that is not whole has no name");
        w.finish(&header(&[5, 6, 7, 4_000_000_000], &[1, 2, 3])).unwrap();
        let t = SavedTrace::open(&path).unwrap();
        assert_eq!(t.header, header(&[5, 6, 7, 4_000_000_000], &[1, 2, 3]));
        assert_eq!(t.places().collect::<Vec<_>>(), [norm, ids]);
        let mut row = Vec::new();
        assert!(t.read(norm, 1, &mut row) && row == [1.0, 1.5]);
        assert!(t.read(norm, 2, &mut row) && row[1].is_nan());
        assert!(t.read(ids, 3, &mut row) && row == [7.0, 3.0]);
        assert!(!t.read(ids, 0, &mut row) && !t.read(Place::new(0, Stage::AttnNorm), 1, &mut row));
    }

    #[test]
    fn a_trace_that_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(TraceWriter::create(&dir.path().join("t.safetensors"), &header(&[1, 2, 3], &[0]), 0, &[]).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_trace_that_ends_early_has_the_positions_that_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.safetensors");
        let places = [Place::new(0, Stage::Embedding), Place::new(0, Stage::AttnNorm), Place::new(1, Stage::AttnNorm)];
        let plan = places.map(|place| (place, vec![3]));
        let mut w = TraceWriter::create_new(&path, &header(&[5, 6, 7], &[0, 1, 2, 3, 4, 5]), 4, &plan).unwrap();
        let refused = TraceWriter::create_new(&path, &header(&[5, 6, 7], &[0]), 0, &plan);
        assert!(refused.is_err(), "it is being written");
        let row = |i: usize, p: u32| vec![(10 * i) as f32 + p as f32; 3];
        for (i, place) in places.into_iter().enumerate() {
            w.write(place, &[0, 1, 2, 3], &(0..4).flat_map(|p| row(i, p)).collect::<Vec<_>>()).unwrap();
        }
        w.finish(&header(&[5, 6, 7, 8], &[0, 1, 2, 3])).unwrap();
        assert!(TraceWriter::create_new(&path, &header(&[5, 6, 7], &[0]), 0, &plan).is_err(), "it is there");
        let t = SavedTrace::open(&path).unwrap();
        assert_eq!(t.header, header(&[5, 6, 7, 8], &[0, 1, 2, 3]));
        let mut got = Vec::new();
        for (i, place) in places.into_iter().enumerate() {
            for p in 0..4 {
                assert!(t.read(place, p, &mut got) && got == row(i, p), "{place} at {p}");
            }
        }
    }

    #[test]
    fn what_is_no_trace_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            SavedTrace::open(&path).err().unwrap().to_string()
        };
        assert!(refused(b"GGUF....").contains("no safetensors file"));
        let file = |header: Value, n: usize| {
            let header = header.to_string();
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; n]].concat()
        };
        assert!(refused(&file(json!({}), 0)).contains("metadata 'format'"));
        let mut meta = header(&[1, 2, 3], &[0, 2]).to_json();
        let tensor = json!({"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]});
        let message = refused(&file(json!({"__metadata__": meta, "embedding": tensor}), 8));
        assert!(message.contains("'embedding'") && message.contains("2 positions"), "{message}");
        let empty = json!({"dtype": "F32", "shape": [2, 0], "data_offsets": [0, 0]});
        let message = refused(&file(json!({"__metadata__": meta, "lm_head": empty}), 0));
        assert!(message.contains("'lm_head'") && message.contains("[2, 0]"), "{message}");
        meta["positions"] = json!("[2,0]");
        assert!(refused(&file(json!({"__metadata__": meta}), 0)).contains("'positions'"));
    }
}
