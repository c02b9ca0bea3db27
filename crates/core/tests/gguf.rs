//! The GGUF reader against hand-made files, whole and broken, and against random damage: what is wrong is refused by
//! name, and nothing panics. The broken files are the cases of llama.cpp's own test of its reader, and more.

#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::time::{Duration, Instant};

use apr_core::gguf::{Array, Gguf, Value, join, parse, split_names};
use apr_core::qtype::GgmlType;
use gguf_writer::{GgufWriter, text};
use proptest::prelude::*;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

/// A file with a value of every type and tensors of three types.
fn sample() -> GgufWriter {
    every_value().into_iter().fold(GgufWriter::new(), |w, (key, value)| w.meta(key, &value)).also_tensors()
}

fn every_value() -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::String("qwen3moe".into())),
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-2_000_000_000)),
        ("f32", Value::F32(1e-6)),
        ("bool", Value::Bool(true)),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f64", Value::F64(1e-300)),
        ("array.u8", Value::Array(Array::U8(vec![1, 2]))),
        ("array.i8", Value::Array(Array::I8(vec![-1, 2]))),
        ("array.u16", Value::Array(Array::U16(vec![1, 60_000]))),
        ("array.i16", Value::Array(Array::I16(vec![-1, 2]))),
        ("array.u32", Value::Array(Array::U32(vec![1, u32::MAX]))),
        ("array.i32", Value::Array(Array::I32(vec![-1, 2]))),
        ("array.f32", Value::Array(Array::F32(vec![0.5, -2.0]))),
        ("array.bool", Value::Array(Array::Bool(vec![true, false]))),
        ("array.string", Value::Array(Array::String(vec!["Ġthe".into(), String::new()]))),
        ("array.u64", Value::Array(Array::U64(vec![u64::MAX]))),
        ("array.i64", Value::Array(Array::I64(vec![i64::MIN]))),
        ("array.f64", Value::Array(Array::F64(vec![]))),
    ]
}

trait AlsoTensors {
    fn also_tensors(self) -> Self;
}

impl AlsoTensors for GgufWriter {
    fn also_tensors(self) -> Self {
        self.tensor("norm.weight", GgmlType::F32, &[3], vec![1; 12])
            .zeros("output.weight", GgmlType::Q4_K, &[256, 3])
            .zeros("experts.weight", GgmlType::Q8_0, &[32, 2, 2])
    }
}

/// One F32 tensor `t` of 8 weights, whose description `change` breaks.
fn one_tensor(change: impl FnOnce(&mut gguf_writer::RawTensor)) -> Vec<u8> {
    GgufWriter::new().zeros("t", GgmlType::F32, &[8]).raw_tensor(change).bytes()
}

/// An entry whose key is `key`, with these bytes after it.
fn entry(key: &str, rest: &[&[u8]]) -> Vec<u8> {
    [text(key.as_bytes()), rest.concat()].concat()
}

/// A file of this one entry and enough bytes behind it to keep the end of the file out of the matter.
fn one_entry(entry: Vec<u8>) -> Vec<u8> {
    let mut bytes = GgufWriter::new().raw_meta(entry).bytes();
    bytes.extend([0; 64]);
    bytes
}

/// Asserts that the file is refused with a message that has all of `parts`.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    assert_message(parse(bytes), parts);
}

#[track_caller]
fn assert_message<T: std::fmt::Debug, E: std::fmt::Display>(result: Result<T, E>, parts: &[&str]) {
    let message = match result {
        Ok(value) => panic!("expected a refusal with {parts:?}, got {value:?}"),
        Err(e) => e.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

#[test]
fn every_value_and_tensor_comes_back() {
    let bytes = sample().bytes();
    let gguf = parse(&bytes).unwrap();
    assert_eq!((gguf.version, gguf.alignment), (3, 32));
    let got: Vec<(&str, Value)> = gguf.metadata.iter().map(|(k, v)| (k, v.clone())).collect();
    assert_eq!(got, every_value());

    let facts: Vec<_> = gguf.tensors.iter().map(|t| (t.name.as_str(), t.qtype, t.ne.as_slice(), t.n_bytes)).collect();
    let expected: [(&str, GgmlType, &[u64], u64); 3] = [
        ("norm.weight", GgmlType::F32, &[3], 12),
        ("output.weight", GgmlType::Q4_K, &[256, 3], 3 * 144),
        ("experts.weight", GgmlType::Q8_0, &[32, 2, 2], 4 * 34),
    ];
    assert_eq!(facts, expected);
    let norm = gguf.tensor("norm.weight").unwrap();
    assert_eq!(bytes[norm.offset as usize..][..12], [1; 12]);
    assert_eq!(gguf.tensor("experts.weight").unwrap().offset + 4 * 34, bytes.len() as u64);
    assert!(gguf.tensor("absent").is_none());
}

#[test]
fn version_2_is_read_as_version_3() {
    let v2 = parse(&sample().version(2).bytes()).unwrap();
    assert_eq!(v2.version, 2);
    assert_eq!(Gguf { version: 3, ..v2 }, parse(&sample().bytes()).unwrap());
}

#[test]
fn a_file_without_tensors_needs_no_padding() {
    let gguf = parse(&GgufWriter::new().string("a", "b").bytes()).unwrap();
    assert!(gguf.tensors.is_empty());
    assert!(parse(&GgufWriter::new().bytes()).unwrap().metadata.iter().next().is_none());
}

#[test]
fn a_custom_alignment_is_followed() {
    for alignment in [8, 64, 4096] {
        let bytes = GgufWriter::new().alignment(alignment).also_tensors().bytes();
        let gguf = parse(&bytes).unwrap();
        assert_eq!(gguf.alignment, u64::from(alignment));
        assert!(gguf.tensors.iter().all(|t| t.offset % gguf.alignment == 0));
        assert_eq!(bytes[gguf.tensors[0].offset as usize..][..12], [1; 12]);
    }
}

#[test]
fn an_empty_file_is_refused() {
    refused(b"", &["empty", "download it again"]);
}

#[test]
fn a_bad_magic_is_refused() {
    refused(&sample().raw_magic(*b"FUGG").bytes(), &["not a GGUF file", "\"FUGG\"", "expected \"GGUF\""]);
    refused(b"\x1b[2", &["not a GGUF file", r"\x1b[2"]);
}

#[test]
fn other_formats_are_refused_by_name() {
    let header = br#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    refused(&text(header), &["safetensors", "GGUF file is needed"]);
    refused(b"APR\0aaaaaaaa", &["APR file", "GGUF file is needed"]);
    refused(b"APRNaaaaaaaa", &["APR file", "GGUF file is needed"]);
}

#[test]
fn other_versions_are_refused_by_name() {
    refused(&sample().version(1).bytes(), &["version 1 is not supported", "only 2 and 3"]);
    refused(&sample().version(4).bytes(), &["version 4 is not supported", "only 2 and 3"]);
    refused(&sample().version(0).bytes(), &["version 0 is not supported"]);
    refused(&sample().version(3u32.swap_bytes()).bytes(), &["big-endian", "version 3"]);
}

#[test]
fn counts_are_held_against_the_file() {
    refused(&sample().raw_n_tensors(u64::MAX).bytes(), &["18446744073709551615 tensors", "at most"]);
    refused(&sample().raw_n_keys(u64::MAX).bytes(), &["18446744073709551615 metadata keys", "at most"]);
    refused(&sample().raw_n_tensors(60_000).bytes(), &["60000 tensors", "bytes are missing", "download it again"]);
    refused(&sample().raw_n_keys(60_000).bytes(), &["60000 metadata keys", "bytes are missing", "download it again"]);
}

#[test]
fn a_key_needs_a_plausible_length() {
    let broken = |length: u64| one_entry([length.to_le_bytes().to_vec(), vec![b'a'; 70_000]].concat());
    refused(&broken(u64::MAX), &["metadata key 1", "18446744073709551615 bytes", "expected 1 to 65535"]);
    refused(&broken(65_536), &["metadata key 1", "65536 bytes", "expected 1 to 65535"]);
    refused(&broken(0), &["metadata key 1", "0 bytes"]);
    assert!(parse(&GgufWriter::new().u32(&"k".repeat(65_535), 1).bytes()).is_ok());
}

#[test]
fn a_key_and_its_text_are_utf8() {
    let key = [text(b"\xff\xfe"), 4u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
    refused(&one_entry(key), &["metadata key 1 of 1", "not valid UTF-8"]);
    let string = entry("name", &[&8u32.to_le_bytes(), &text(b"abc\xff")]);
    refused(&one_entry(string), &["\"name\"", "not valid UTF-8 from byte 3"]);
    let tokens = [&9u32.to_le_bytes()[..], &8u32.to_le_bytes(), &2u64.to_le_bytes(), &text(b"ok"), &text(b"\xc4")];
    refused(&one_entry(entry("tokens", &tokens)), &["string 1", "\"tokens\"", "not valid UTF-8"]);
}

#[test]
fn an_unknown_value_type_is_refused() {
    refused(&one_entry(entry("k", &[&13u32.to_le_bytes()])), &["\"k\"", "unknown value type 13", "0 to 12"]);
    refused(&one_entry(entry("k", &[&u32::MAX.to_le_bytes()])), &["\"k\"", "unknown value type 4294967295"]);
    let array = entry("k", &[&9u32.to_le_bytes(), &13u32.to_le_bytes(), &0u64.to_le_bytes()]);
    refused(&one_entry(array), &["\"k\"", "unknown value type 13"]);
}

#[test]
fn nested_arrays_are_refused() {
    let nested = entry("k", &[&9u32.to_le_bytes(), &9u32.to_le_bytes(), &1u64.to_le_bytes()]);
    refused(&one_entry(nested), &["\"k\"", "array of arrays"]);
}

#[test]
fn lengths_of_values_are_held_against_the_file() {
    let string = |n: u64| one_entry(entry("k", &[&8u32.to_le_bytes(), &n.to_le_bytes()]));
    refused(&string(u64::MAX), &["\"k\"", "string of 18446744073709551615 bytes"]);
    refused(&string(1000), &["\"k\"", "936 bytes are missing", "download it again"]);
    for element in 0..=12u32 {
        let array = |n: u64| one_entry(entry("k", &[&9u32.to_le_bytes(), &element.to_le_bytes(), &n.to_le_bytes()]));
        refused(&array(u64::MAX), &["\"k\"", "18446744073709551615 elements", "at most"]);
        refused(&array(1 << 25), &["\"k\"", "bytes are missing", "download it again"]);
    }
}

#[test]
fn a_bool_is_0_or_1() {
    refused(&one_entry(entry("k", &[&7u32.to_le_bytes(), &[2]])), &["\"k\"", "byte 2 as a bool"]);
    let array = entry("k", &[&9u32.to_le_bytes(), &7u32.to_le_bytes(), &2u64.to_le_bytes(), &[1, 255]]);
    refused(&one_entry(array), &["\"k\"", "byte 255 as a bool"]);
}

#[test]
fn a_duplicate_key_is_refused() {
    refused(&sample().u32("u8", 1).bytes(), &["\"u8\"", "occurs twice"]);
}

#[test]
fn an_alignment_is_a_power_of_two_of_at_least_8() {
    for bad in [13, 0, 4, u32::MAX] {
        let bytes = GgufWriter::new().u32("general.alignment", bad).bytes();
        refused(&bytes, &["\"general.alignment\"", &format!("is {bad},"), "power of two"]);
    }
    let u64_typed = GgufWriter::new().meta("general.alignment", &Value::U64(32)).bytes();
    refused(&u64_typed, &["\"general.alignment\"", "of type u64", "expected u32"]);
}

#[test]
fn a_tensor_name_has_1_to_63_bytes() {
    refused(&one_tensor(|t| t.name = vec![b'n'; 64]), &["the name of tensor 1", "64 bytes", "1 to 63"]);
    refused(&one_tensor(|t| t.name.clear()), &["the name of tensor 1", "0 bytes", "1 to 63"]);
    refused(&one_tensor(|t| t.name = vec![0xff]), &["the name of tensor 1 of 1", "not valid UTF-8"]);
    assert!(parse(&one_tensor(|t| t.name = vec![b'n'; 63])).is_ok());
}

#[test]
fn a_duplicate_tensor_name_is_refused() {
    refused(&sample().zeros("norm.weight", GgmlType::F32, &[8]).bytes(), &["\"norm.weight\"", "occurs twice"]);
}

#[test]
fn a_tensor_has_1_to_4_dimensions() {
    let with_dims = |n: u32| {
        one_tensor(move |t| {
            t.n_dims = n;
            t.ne = vec![1; n as usize];
        })
    };
    refused(&with_dims(5), &["\"t\"", "5 dimensions", "1 to 4"]);
    refused(&with_dims(0), &["\"t\"", "0 dimensions", "1 to 4"]);
    assert!(parse(&with_dims(4)).is_ok());
}

#[test]
fn a_dimension_is_at_least_1_and_an_i64() {
    refused(&one_tensor(|t| t.ne = vec![u64::MAX]), &["\"t\"", "dimension of 18446744073709551615"]);
    refused(&one_tensor(|t| t.ne = vec![0]), &["\"t\"", "dimension of 0"]);
}

#[test]
fn a_shape_beyond_64_bits_is_refused() {
    let huge = 4 * i32::MAX as u64;
    let broken = |ne: Vec<u64>| {
        one_tensor(move |t| {
            t.n_dims = ne.len() as u32;
            t.ne = ne;
        })
    };
    refused(&broken(vec![huge; 4]), &["\"t\"", "8589934588, 8589934588", "larger than"]);
    // The weights fit into 63 bits, their bytes do not.
    refused(&broken(vec![1 << 62]), &["\"t\"", "larger than"]);
    // Both fit, and no file holds them.
    refused(&broken(vec![huge]), &["\"t\"", "34359738320 bytes are missing"]);
}

#[test]
fn an_unreadable_type_is_refused_by_name() {
    refused(&one_tensor(|t| t.type_id = 16), &["\"t\"", "type 16 (IQ2_XXS)", "supported are F32, F16, BF16, Q4_0"]);
    refused(&one_tensor(|t| t.type_id = u32::MAX), &["\"t\"", "type 4294967295", "no type known", "MXFP4"]);
}

#[test]
fn rows_are_whole_blocks() {
    let half = one_tensor(|t| t.type_id = GgmlType::Q4_K.id());
    refused(&half, &["\"t\"", "rows of 8 weights", "Q4_K stores blocks of 256"]);
}

#[test]
fn an_offset_is_aligned_and_inside_the_file() {
    refused(&one_tensor(|t| t.offset = u64::MAX), &["\"t\"", "18446744073709551615", "multiple of the alignment 32"]);
    refused(&one_tensor(|t| t.offset = 4), &["\"t\"", "offset 4,", "multiple of the alignment 32"]);
    for far in [u64::MAX - 31, 1 << 40, 32] {
        refused(&one_tensor(|t| t.offset = far), &["\"t\"", &format!("offset {far} "), "outside the file"]);
    }
}

#[test]
fn a_layout_that_differs_from_the_alignment_is_refused() {
    let tensors = |w: GgufWriter| w.zeros("a", GgmlType::F32, &[8]).zeros("b", GgmlType::F32, &[8]);
    let bytes = tensors(GgufWriter::new().u32("general.alignment", 64)).bytes();
    refused(&bytes, &["\"b\"", "offset 32", "alignment 64"]);
    let bytes = tensors(GgufWriter::new().raw_layout(16)).raw_tensor(|t| t.offset = 48).bytes();
    refused(&bytes, &["\"b\"", "offset 48", "alignment 32"]);
}

#[test]
fn tensors_that_overlap_are_refused() {
    let w = GgufWriter::new().zeros("a", GgmlType::F32, &[16]).zeros("b", GgmlType::F32, &[16]);
    refused(&w.clone().raw_tensor(|t| t.offset = 32).bytes(), &["\"a\"", "\"b\"", "overlap"]);
    refused(&w.raw_tensor(|t| t.offset = 0).bytes(), &["overlap"]);
}

#[test]
fn a_truncated_file_tells_how_much_is_missing() {
    let bytes = sample().bytes();
    let cut = &bytes[..bytes.len() - 1];
    refused(cut, &["1 bytes are missing", "\"experts.weight\"", "download it again"]);
    // The last tensor is gone and 32 bytes of the one before it, whose padding is 16 bytes.
    let cut = &bytes[..bytes.len() - 136 - 16 - 32];
    refused(cut, &["184 bytes are missing", "\"output.weight\"", "download it again"]);
    for n in 1..bytes.len() {
        refused(&bytes[..n], &["missing", "download it again"]);
    }
}

#[test]
fn names_are_escaped_in_messages() {
    refused(&one_tensor(|t| (t.name, t.offset) = (b"\x1b[2J".to_vec(), 4)), &[r"\u{1b}[2J"]);
}

#[test]
fn getters_convert_without_loss() {
    let gguf = parse(&sample().bytes()).unwrap();
    let m = &gguf.metadata;
    assert_eq!(m.u32("u8").unwrap(), Some(200));
    assert_eq!(m.u32("u16").unwrap(), Some(60_000));
    assert_eq!(m.required_u32("u32").unwrap(), 4_000_000_000);
    assert_eq!(m.u32("absent").unwrap(), None);
    assert_eq!(m.required_f32("f32").unwrap(), 1e-6);
    assert!(m.required_bool("bool").unwrap());
    assert_eq!(m.required_string("general.architecture").unwrap(), "qwen3moe");
    assert_eq!(m.required_u32_array("array.u16").unwrap(), [1, 60_000]);
    assert_eq!(m.required_i32_array("array.i8").unwrap(), [-1, 2]);
    assert_eq!(m.required_f32_array("array.f32").unwrap(), [0.5, -2.0]);
    assert_eq!(m.required_string_array("array.string").unwrap(), ["Ġthe", ""]);

    assert_message(m.u32("i8"), &["\"i8\"", "-100", "range of u32"]);
    assert_message(m.u32("u64"), &["\"u64\"", "18446744073709551615", "range of u32"]);
    assert_message(m.u32_array("array.i16"), &["\"array.i16\"", "-1 at position 0", "range of u32"]);
    assert_message(m.i32_array("array.u32"), &["\"array.u32\"", "4294967295 at position 1", "range of i32"]);
}

#[test]
fn getters_name_the_key_and_both_types() {
    let gguf = parse(&sample().bytes()).unwrap();
    let m = &gguf.metadata;
    assert_message(m.u32("f32"), &["\"f32\"", "of type f32", "expected an integer"]);
    assert_message(m.u32("bool"), &["\"bool\"", "of type bool", "expected an integer"]);
    assert_message(m.f32("f64"), &["\"f64\"", "of type f64", "expected f32"]);
    assert_message(m.bool("u8"), &["\"u8\"", "of type u8", "expected bool"]);
    assert_message(m.string("array.string"), &["of type array of string", "expected string"]);
    assert_message(m.u32_array("u32"), &["\"u32\"", "of type u32", "expected array of integers"]);
    assert_message(m.i32_array("array.f32"), &["of type array of f32", "expected array of integers"]);
    assert_message(m.f32_array("array.f64"), &["of type array of f64", "expected array of f32"]);
    assert_message(m.string_array("array.u8"), &["of type array of u8", "expected array of string"]);
    let missing: &[&str] = &["\"no.such\"", "missing"];
    assert_message(m.required_u32("no.such"), missing);
    assert_message(m.required_f32("no.such"), missing);
    assert_message(m.required_bool("no.such"), missing);
    assert_message(m.required_string("no.such"), missing);
    assert_message(m.required_u32_array("no.such"), missing);
    assert_message(m.required_i32_array("no.such"), missing);
    assert_message(m.required_f32_array("no.such"), missing);
    assert_message(m.required_string_array("no.such"), missing);
}

/// Part `no` of `count`, holding one tensor.
fn part(no: u16, count: u16, n_tensors: i32, tensor: &str) -> GgufWriter {
    let w = GgufWriter::new().split(no, count, n_tensors);
    let w = if no == 0 { w.string("general.architecture", "qwen3moe") } else { w };
    w.zeros(tensor, GgmlType::F32, &[8])
}

fn join_all(parts: &[GgufWriter]) -> Result<Gguf, String> {
    let parts = parts.iter().map(|w| parse(&w.bytes()).unwrap()).collect();
    join(parts).map_err(|e| e.to_string())
}

#[test]
fn parts_are_joined() {
    let parts = [part(0, 3, 3, "a"), part(1, 3, 3, "b"), part(2, 3, 3, "c")];
    let model = join_all(&parts).unwrap();
    assert_eq!(model.metadata, parse(&parts[0].bytes()).unwrap().metadata);
    let tensors: Vec<_> = model.tensors.iter().map(|t| (t.name.as_str(), t.part)).collect();
    assert_eq!(tensors, [("a", 0), ("b", 1), ("c", 2)]);
    for (i, t) in model.tensors.iter().enumerate() {
        assert_eq!(t.offset, parse(&parts[i].bytes()).unwrap().tensors[0].offset);
    }
}

#[test]
fn a_single_file_is_joined_to_itself() {
    let whole = parse(&sample().bytes()).unwrap();
    assert_eq!(join(vec![whole.clone()]).unwrap(), whole);
    assert!(join_all(&[part(0, 1, 1, "a")]).is_ok());
    assert!(join_all(&[part(0, 0, 1, "a")]).is_ok(), "merged from parts, and says so by a count of 0");
    assert!(join_all(&[part(0, 2, 2, "a")]).is_err(), "one part of two");
    assert_message(join(Vec::new()), &["at least one file"]);
}

#[test]
fn missing_and_misplaced_parts_are_refused() {
    let [a, b, c] = [part(0, 3, 3, "a"), part(1, 3, 3, "b"), part(2, 3, 3, "c")];
    assert_message(join_all(std::slice::from_ref(&a)), &["split into 3 files, got 1"]);
    assert_message(join_all(&[a.clone(), b.clone()]), &["split into 3 files, got 2"]);
    assert_message(join_all(&[a.clone(), b.clone(), c.clone(), part(3, 3, 3, "d")]), &["split into 3 files, got 4"]);
    assert_message(join_all(&[a.clone(), c.clone(), b.clone()]), &["given as part 2", "says that it is part 3"]);
    assert_message(join_all(&[a.clone(), b, a]), &["given as part 3", "says that it is part 1"]);
    assert_message(join_all(&[sample(), c]), &["part 1 of 2", "\"split.count\" is missing"]);
}

#[test]
fn parts_of_another_model_are_refused() {
    let [a, b] = [part(0, 2, 2, "a"), part(1, 2, 2, "b")];
    assert_message(join_all(&[a.clone(), part(1, 5, 2, "b")]), &["part 2", "another model", "\"split.count\""]);
    assert_message(join_all(&[a.clone(), part(1, 2, 9, "b")]), &["part 2", "another model", "\"split.tensors.count\""]);
    let llama = b.clone().string("general.architecture", "llama");
    assert_message(join_all(&[a.clone(), llama]), &["part 2", "another model", "\"general.architecture\""]);
    assert_message(join_all(&[a.clone(), part(1, 2, 2, "a")]), &["\"a\"", "in part 1 and in part 2"]);
    let surplus = b.zeros("c", GgmlType::F32, &[8]);
    assert_message(join_all(&[a.clone(), surplus]), &["announce 2 tensors and hold 3"]);
    assert_message(join_all(&[a, GgufWriter::new()]), &["part 2 of 2", "\"split.count\" is missing"]);
    let negative = [part(0, 2, -1, "a"), part(1, 2, -1, "b")];
    assert_message(join_all(&negative), &["part 1 of 2", "\"split.tensors.count\" is -1"]);
}

#[test]
fn any_part_names_them_all() {
    let names = ["x-00001-of-00003.gguf", "x-00002-of-00003.gguf", "x-00003-of-00003.gguf"];
    for name in names {
        assert_eq!(split_names(name).unwrap(), names);
    }
    assert_eq!(split_names("a-of-b-00001-of-00001.gguf").unwrap(), ["a-of-b-00001-of-00001.gguf"]);
    assert_eq!(split_names("x-00001-of-01024.gguf").unwrap().len(), 1024);
    let others = [
        "x.gguf",
        "x-00001-of-00003",
        "x-1-of-3.gguf",
        "x-00000-of-00003.gguf",
        "x-00004-of-00003.gguf",
        "x-00001-of-00000.gguf",
        "x-00001-of-01025.gguf",
        "x-00001-of-99999.gguf",
        "x-+0001-of-00003.gguf",
        "x-00001-of-000003.gguf",
        "x-٠٠٠٠١-of-00003.gguf",
        "-00001-of-00003.gguf",
        "",
    ];
    for name in others {
        assert_eq!(split_names(name), None, "{name:?}");
    }
}

#[test]
fn the_tiny_model_is_read() {
    let bytes = std::fs::read(FIXTURE).unwrap();
    let model = join(vec![parse(&bytes).unwrap()]).unwrap();
    let m = &model.metadata;
    assert_eq!(m.required_string("general.architecture").unwrap(), "qwen3moe");
    assert_eq!(m.required_u32("qwen3moe.block_count").unwrap(), 4);
    assert_eq!(m.required_string_array("tokenizer.ggml.tokens").unwrap().len(), 2048);
    assert_eq!(m.required_i32_array("tokenizer.ggml.token_type").unwrap().len(), 2048);
    assert_eq!(model.tensors.len(), 51);
    assert_eq!(model.tensor("blk.0.ffn_gate_exps.weight").unwrap().ne, [256, 256, 8]);
    assert_eq!(model.tensor("blk.0.ffn_down_exps.weight").unwrap().qtype, GgmlType::Q4_K);
    let output = model.tensor("output.weight").unwrap();
    assert_eq!((output.qtype, output.offset + output.n_bytes), (GgmlType::Q6_K, bytes.len() as u64));
    let count = |qtype| model.tensors.iter().filter(|t| t.qtype == qtype).count();
    let mix = [GgmlType::F32, GgmlType::Q4_K, GgmlType::Q6_K].map(count);
    assert_eq!(mix, [21, 25, 5]);
}

/// A way to damage a file; positions wrap around its length.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Truncate(usize),
    Splice(usize, u64),
    Overwrite(usize, u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    let numbers = prop_oneof![
        any::<u64>(),
        0..1024u64,
        (0..64u32, -2..=2i64).prop_map(|(bit, delta)| (1u64 << bit).wrapping_add_signed(delta)),
    ];
    prop_oneof![
        4 => (any::<usize>(), 1..=u8::MAX).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        1 => any::<usize>().prop_map(Damage::Truncate),
        2 => (any::<usize>(), numbers.clone()).prop_map(|(at, n)| Damage::Splice(at, n)),
        4 => (any::<usize>(), numbers).prop_map(|(at, n)| Damage::Overwrite(at, n)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let len = bytes.len().max(1);
    match *damage {
        Damage::Flip(at, mask) => bytes.iter_mut().skip(at % len).take(1).for_each(|b| *b ^= mask),
        Damage::Truncate(at) => bytes.truncate(at % len),
        Damage::Splice(at, n) => {
            let at = (at % len).min(bytes.len());
            bytes.splice(at..at, n.to_le_bytes());
        }
        Damage::Overwrite(at, n) => {
            bytes.iter_mut().skip(at % len).zip(n.to_le_bytes()).for_each(|(b, new)| *b = new);
        }
    }
}

/// What holds for every accepted file, whoever made it.
fn assert_sound(gguf: &Gguf, file_len: usize) {
    let mut spans: Vec<(u64, u64)> = gguf.tensors.iter().map(|t| (t.offset, t.offset + t.n_bytes)).collect();
    spans.sort_unstable();
    assert!(spans.iter().all(|s| s.0 % gguf.alignment == 0 && s.0 < s.1 && s.1 <= file_len as u64));
    assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0));
    for t in &gguf.tensors {
        let rows: u64 = t.ne[1..].iter().product();
        assert_eq!(t.n_bytes, t.qtype.row_bytes(t.ne[0] as usize) as u64 * rows);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_refused_without_panic(damages in prop::collection::vec(damage(), 1..6)) {
        let mut bytes = part(0, 1, 4, "first").also_tensors().strings("tokens", &["a", "Ġb", ""]).bytes();
        damages.iter().for_each(|d| apply(&mut bytes, d));
        let start = Instant::now();
        let result = parse(&bytes);
        // A machine that pauses for a second does so once, a slow input is slow again.
        let is_prompt = start.elapsed() < Duration::from_secs(1) || {
            let start = Instant::now();
            let _ = parse(&bytes);
            start.elapsed() < Duration::from_secs(1)
        };
        prop_assert!(is_prompt);
        match result {
            Ok(gguf) => {
                assert_sound(&gguf, bytes.len());
                let _ = join(vec![gguf]);
            }
            Err(e) => prop_assert!(!e.to_string().is_empty()),
        }
    }
}
