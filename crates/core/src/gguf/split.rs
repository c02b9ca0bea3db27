//! Split models: several files `name-00001-of-00003.gguf`, each a GGUF file with some of the tensors.

use std::collections::HashMap;

use super::{Gguf, GgufError, TensorInfo};

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// More files than any published model has; a name that asks for more is a mistake.
const MAX_PARTS: usize = 1024;

/// The names of all parts, given the name of any of them: `x-00002-of-00003.gguf` gives three names. `None` when the
/// name is not of that form, counts no or more than 1024 parts, or is of a part beyond the count.
pub fn split_names(file_name: &str) -> Option<Vec<String>> {
    let stem = file_name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, no) = rest.rsplit_once('-')?;
    let number = |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse::<usize>().ok())?;
    let (no, count) = (number(no)?, number(count)?);
    let plausible = !prefix.is_empty() && (1..=count).contains(&no) && count <= MAX_PARTS;
    plausible.then(|| (1..=count).map(|i| format!("{prefix}-{i:05}-of-{count:05}.gguf")).collect())
}

/// Makes one model of its parts, given in order; a model of one file passes unchanged.
///
/// The metadata is that of the first part. [`TensorInfo::part`] is the position in `parts`. Refused are missing,
/// surplus or misplaced parts and parts that do not belong together.
pub fn join(parts: Vec<Gguf>) -> Result<Gguf, GgufError> {
    let n_parts = parts.len();
    let mut parts = parts.into_iter();
    let Some(mut model) = parts.next() else { return Err(GgufError::NoParts) };
    // Tools that merge parts leave a count of 0 behind.
    if n_parts == 1 && model.metadata.u32(COUNT)?.is_none_or(|n| n <= 1) {
        return Ok(model);
    }
    let n_tensors = check_part(&model, &model, 0, n_parts)?;
    for (i, part) in parts.enumerate() {
        let i = i + 1;
        check_part(&part, &model, i, n_parts)?;
        model.tensors.extend(part.tensors.into_iter().map(|t| TensorInfo { part: i, ..t }));
    }

    let mut seen = HashMap::new();
    for t in &model.tensors {
        if let Some(first) = seen.insert(t.name.as_str(), t.part) {
            return Err(GgufError::SplitDuplicate { tensor: t.name.clone(), first: first + 1, second: t.part + 1 });
        }
    }
    if model.tensors.len() as u64 != u64::from(n_tensors) {
        return Err(GgufError::SplitTensorCount { expected: n_tensors, got: model.tensors.len() });
    }
    Ok(model)
}

/// Holds part `i` against the number of files and against the first part; returns the tensor count it announces.
fn check_part(part: &Gguf, first: &Gguf, i: usize, n_parts: usize) -> Result<u32, GgufError> {
    let m = &part.metadata;
    let in_part = |e| GgufError::SplitPart { part: i + 1, of: n_parts, error: Box::new(e) };
    let count = m.required_u32(COUNT).map_err(in_part)?;
    let no = m.required_u32(NO).map_err(in_part)?;
    let n_tensors = m.required_u32(TENSORS).map_err(in_part)?;
    for (key, value) in m.iter() {
        // These two describe a file, all others the model.
        let own = key == NO || key == "general.alignment";
        let differs = first.metadata.get(key).is_some_and(|v| v != value);
        if differs && !own {
            return Err(GgufError::SplitOther { part: i + 1, key: key.into() });
        }
    }
    if count as usize != n_parts {
        return Err(GgufError::SplitCount { expected: count, got: n_parts });
    }
    if no as usize != i {
        return Err(GgufError::SplitOrder { part: i + 1, got: u64::from(no) + 1 });
    }
    Ok(n_tensors)
}
