//! The metadata of a file: keys in file order, and getters that check the type.

use std::collections::HashMap;

use super::{Array, GgufError, Value};

/// Keys and their values, in the order of the file; a key occurs once.
///
/// Getters named after a type return `None` for a missing key; their `required_` twins refuse it. Integer getters take
/// any integer type whose value fits; a float, bool or string is taken only as what it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    /// The value of `key`, of whatever type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Appends a key; refuses one that is there already.
    pub(super) fn insert(&mut self, key: String, value: Value) -> Result<(), GgufError> {
        if self.index.contains_key(&key) {
            return Err(GgufError::DuplicateKey { key });
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        Ok(())
    }

    /// An integer from 0 to 2³² − 1, stored as any integer type.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "an integer", |v| {
            v.integer().map(|n| u32::try_from(n).map_err(|_| out_of_range(key, "u32", n.to_string())))
        })
    }

    /// A float, stored as `f32`.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "f32", |v| if let Value::F32(x) = v { Some(Ok(*x)) } else { None })
    }

    /// A bool, stored as `bool`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "bool", |v| if let Value::Bool(b) = v { Some(Ok(*b)) } else { None })
    }

    /// Text.
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "string", |v| if let Value::String(s) = v { Some(Ok(s.as_str())) } else { None })
    }

    /// Integers from 0 to 2³² − 1, stored as an array of any integer type.
    pub fn u32_array(&self, key: &str) -> Result<Option<Vec<u32>>, GgufError> {
        self.integers(key, "u32")
    }

    /// Integers from −2³¹ to 2³¹ − 1, stored as an array of any integer type.
    pub fn i32_array(&self, key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        self.integers(key, "i32")
    }

    /// Floats, stored as an array of `f32`.
    pub fn f32_array(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        self.typed(
            key,
            "array of f32",
            |v| {
                if let Value::Array(Array::F32(a)) = v { Some(Ok(a.as_slice())) } else { None }
            },
        )
    }

    /// Texts, as of a vocabulary.
    pub fn string_array(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "array of string", |v| {
            if let Value::Array(Array::String(a)) = v { Some(Ok(a.as_slice())) } else { None }
        })
    }

    /// [`u32`](Self::u32), refusing a missing key.
    pub fn required_u32(&self, key: &str) -> Result<u32, GgufError> {
        required(key, self.u32(key)?)
    }

    /// [`f32`](Self::f32), refusing a missing key.
    pub fn required_f32(&self, key: &str) -> Result<f32, GgufError> {
        required(key, self.f32(key)?)
    }

    /// [`bool`](Self::bool), refusing a missing key.
    pub fn required_bool(&self, key: &str) -> Result<bool, GgufError> {
        required(key, self.bool(key)?)
    }

    /// [`string`](Self::string), refusing a missing key.
    pub fn required_string(&self, key: &str) -> Result<&str, GgufError> {
        required(key, self.string(key)?)
    }

    /// [`u32_array`](Self::u32_array), refusing a missing key.
    pub fn required_u32_array(&self, key: &str) -> Result<Vec<u32>, GgufError> {
        required(key, self.u32_array(key)?)
    }

    /// [`i32_array`](Self::i32_array), refusing a missing key.
    pub fn required_i32_array(&self, key: &str) -> Result<Vec<i32>, GgufError> {
        required(key, self.i32_array(key)?)
    }

    /// [`f32_array`](Self::f32_array), refusing a missing key.
    pub fn required_f32_array(&self, key: &str) -> Result<&[f32], GgufError> {
        required(key, self.f32_array(key)?)
    }

    /// [`string_array`](Self::string_array), refusing a missing key.
    pub fn required_string_array(&self, key: &str) -> Result<&[String], GgufError> {
        required(key, self.string_array(key)?)
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str, target: &'static str) -> Result<Option<Vec<T>>, GgufError> {
        self.typed(key, "array of integers", |v| {
            let Value::Array(a) = v else { return None };
            let numbers = a.integers()?;
            Some(numbers.map_err(|(i, n)| out_of_range(key, target, format!("{n} at position {i}"))))
        })
    }

    /// What `convert` makes of the value of `key`, `None` from it meaning another type than `expected`.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<Result<T, GgufError>>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || GgufError::WrongType { key: key.into(), expected, got: value.type_name() };
        convert(value).ok_or_else(wrong)?.map(Some)
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, GgufError> {
    value.ok_or_else(|| GgufError::MissingKey { key: key.into() })
}

fn out_of_range(key: &str, expected: &'static str, got: String) -> GgufError {
    GgufError::OutOfRange { key: key.into(), expected, got }
}
