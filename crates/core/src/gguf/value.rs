//! The values of metadata: numbers, booleans, text and flat arrays of these.

use std::fmt::Display;

use super::reader::Reader;
use super::{GgufError, MAX_ARRAY, MAX_STRING};

/// A value of one metadata key.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array whose elements are all of one type. Arrays of arrays are refused: no model uses them.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Ids of the value types in a file.
mod id {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

impl Value {
    /// The type as messages name it: `u32`, `string`, `array of i32`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(a) => a.type_name(),
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
        }
    }

    /// The number, for a value of any integer type.
    pub(super) fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::I8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::I16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::I32(n) => Some(n.into()),
            Value::U64(n) => Some(n.into()),
            Value::I64(n) => Some(n.into()),
            Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
        }
    }
}

impl Array {
    /// The type as messages name it: `array of i32`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "array of u8",
            Array::I8(_) => "array of i8",
            Array::U16(_) => "array of u16",
            Array::I16(_) => "array of i16",
            Array::U32(_) => "array of u32",
            Array::I32(_) => "array of i32",
            Array::F32(_) => "array of f32",
            Array::Bool(_) => "array of bool",
            Array::String(_) => "array of string",
            Array::U64(_) => "array of u64",
            Array::I64(_) => "array of i64",
            Array::F64(_) => "array of f64",
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers converted to `T`, for an array of any integer type; the inner error is the position and value of the
    /// first number that `T` cannot hold.
    pub(super) fn integers<T: TryFrom<i128>>(&self) -> Option<Result<Vec<T>, (usize, i128)>> {
        fn convert<S: Copy + Into<i128>, T: TryFrom<i128>>(v: &[S]) -> Result<Vec<T>, (usize, i128)> {
            let one = |(i, &n): (usize, &S)| T::try_from(n.into()).map_err(|_| (i, n.into()));
            v.iter().enumerate().map(one).collect()
        }
        match self {
            Array::U8(v) => Some(convert(v)),
            Array::I8(v) => Some(convert(v)),
            Array::U16(v) => Some(convert(v)),
            Array::I16(v) => Some(convert(v)),
            Array::U32(v) => Some(convert(v)),
            Array::I32(v) => Some(convert(v)),
            Array::U64(v) => Some(convert(v)),
            Array::I64(v) => Some(convert(v)),
            Array::F32(_) | Array::F64(_) | Array::Bool(_) | Array::String(_) => None,
        }
    }
}

/// Reads the type and the value of `key`.
pub(super) fn read(r: &mut Reader, key: &str) -> Result<Value, GgufError> {
    let what: &dyn Display = &format_args!("the value of key {key:?}");
    Ok(match r.u32(what)? {
        id::U8 => Value::U8(r.number(u8::from_le_bytes, what)?),
        id::I8 => Value::I8(r.number(i8::from_le_bytes, what)?),
        id::U16 => Value::U16(r.number(u16::from_le_bytes, what)?),
        id::I16 => Value::I16(r.number(i16::from_le_bytes, what)?),
        id::U32 => Value::U32(r.number(u32::from_le_bytes, what)?),
        id::I32 => Value::I32(r.number(i32::from_le_bytes, what)?),
        id::F32 => Value::F32(r.number(f32::from_le_bytes, what)?),
        id::BOOL => Value::Bool(bool_of(r.number(u8::from_le_bytes, what)?, key)?),
        id::STRING => Value::String(string(r, key, what)?),
        id::ARRAY => Value::Array(array(r, key)?),
        id::U64 => Value::U64(r.number(u64::from_le_bytes, what)?),
        id::I64 => Value::I64(r.number(i64::from_le_bytes, what)?),
        id::F64 => Value::F64(r.number(f64::from_le_bytes, what)?),
        got => return Err(GgufError::ValueType { key: key.into(), got }),
    })
}

fn array(r: &mut Reader, key: &str) -> Result<Array, GgufError> {
    let what: &dyn Display = &format_args!("the array of key {key:?}");
    let element = r.u32(what)?;
    let n = r.u64(what)?;
    // Every element takes at least one byte.
    r.expect_count(&format_args!("elements in {what}"), n, MAX_ARRAY, 1)?;
    Ok(match element {
        id::U8 => Array::U8(r.numbers(n, u8::from_le_bytes, what)?),
        id::I8 => Array::I8(r.numbers(n, i8::from_le_bytes, what)?),
        id::U16 => Array::U16(r.numbers(n, u16::from_le_bytes, what)?),
        id::I16 => Array::I16(r.numbers(n, i16::from_le_bytes, what)?),
        id::U32 => Array::U32(r.numbers(n, u32::from_le_bytes, what)?),
        id::I32 => Array::I32(r.numbers(n, i32::from_le_bytes, what)?),
        id::F32 => Array::F32(r.numbers(n, f32::from_le_bytes, what)?),
        id::BOOL => Array::Bool(r.take(n, what)?.iter().map(|&b| bool_of(b, key)).collect::<Result<_, _>>()?),
        id::STRING => Array::String(strings(r, n, key)?),
        id::U64 => Array::U64(r.numbers(n, u64::from_le_bytes, what)?),
        id::I64 => Array::I64(r.numbers(n, i64::from_le_bytes, what)?),
        id::F64 => Array::F64(r.numbers(n, f64::from_le_bytes, what)?),
        id::ARRAY => return Err(GgufError::NestedArray { key: key.into() }),
        got => return Err(GgufError::ValueType { key: key.into(), got }),
    })
}

fn strings(r: &mut Reader, n: u64, key: &str) -> Result<Vec<String>, GgufError> {
    // A string takes at least its length.
    r.expect_count(&format_args!("strings in the array of key {key:?}"), n, MAX_ARRAY, 8)?;
    (0..n).map(|i| string(r, key, &format_args!("string {i} of the array of key {key:?}"))).collect()
}

fn string(r: &mut Reader, key: &str, what: &dyn Display) -> Result<String, GgufError> {
    let length = r.u64(what)?;
    if length > MAX_STRING {
        return Err(GgufError::StringLength { key: key.into(), got: length, max: MAX_STRING });
    }
    r.utf8(length, what).map(str::to_owned)
}

fn bool_of(byte: u8, key: &str) -> Result<bool, GgufError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        got => Err(GgufError::Bool { key: key.into(), got }),
    }
}
