//! Names of a model: by which of them clients may ask for it.

use apr_engine::About;

/// The names of the one model.
#[derive(Debug)]
pub(crate) struct Names {
    /// What the model is called in answers: the file's name without its ending.
    pub(crate) id: String,
    pub(crate) aliases: Vec<String>,
    /// `general.name` of the file.
    general: Option<String>,
}

impl Names {
    pub(crate) fn of(about: &About, aliases: Vec<String>) -> Names {
        let stem = about.file.path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let general = about.file.gguf.metadata.string("general.name").ok().flatten().map(str::to_string);
        Names { id: without_part(&stem).to_string(), aliases, general }
    }

    /// Whether a client that says `asked` means this model: one of its names, or the beginning of one up to `-`, `.` or `:`, in
    /// capitals or not.
    pub(crate) fn include(&self, asked: &str) -> bool {
        let begins = |name: &str| match name.get(..asked.len()) {
            Some(start) if start.eq_ignore_ascii_case(asked) => {
                let rest = &name[asked.len()..];
                rest.is_empty() || rest.starts_with(['-', '.', ':'])
            }
            _ => false,
        };
        !asked.is_empty() && self.all().any(begins)
    }

    /// As [`include`](Self::include); also with `:latest` at the end, which Ollama's clients add to every name.
    pub(crate) fn include_tagged(&self, asked: &str) -> bool {
        self.include(asked) || asked.strip_suffix(":latest").is_some_and(|name| self.include(name))
    }

    fn all(&self) -> impl Iterator<Item = &str> {
        let others = self.general.iter().chain(&self.aliases).map(String::as_str);
        std::iter::once(self.id.as_str()).chain(others)
    }
}

/// A file's name without `-00001-of-00003`.
fn without_part(stem: &str) -> &str {
    let part = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    match stem.rsplit_once("-of-").and_then(|(start, n)| Some((start.rsplit_once('-')?, n))) {
        Some(((name, i), n)) if part(i) && part(n) => name,
        _ => stem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_be_cut_at_its_joints() {
        let names = Names {
            id: "Qwen3-Coder-30B-A3B-Instruct-Q4_K_M".to_string(),
            aliases: vec!["gpt-4o:latest".to_string()],
            general: Some("Qwen3 Coder".to_string()),
        };
        let yes =
            ["qwen3-coder", "Qwen3", "qwen3-coder-30b-a3b-instruct-q4_k_m", "gpt-4o", "GPT-4O:latest", "qwen3 coder"];
        yes.iter().for_each(|name| assert!(names.include(name), "{name}"));
        let no = ["", "qwen", "qwen3-", "qwen3-code", "gpt-4", "latest", "qwen3-coder-30b-a3b-instruct-q4", "Qwen3 "];
        no.iter().for_each(|name| assert!(!names.include(name), "{name}"));
    }

    #[test]
    fn a_part_is_named_as_the_whole() {
        assert_eq!(without_part("m-Q8_0-00001-of-00003"), "m-Q8_0");
        assert_eq!(without_part("one-of-00003"), "one-of-00003");
        assert_eq!(without_part("a-1-of-2"), "a-1-of-2");
    }
}
