//! Matching tags in text whose end may not have come yet.

/// Bytes of white space that may stand between two tags. It bounds what is held back.
const GAP_MAX: usize = 256;
/// Bytes that a function's or a parameter's name may have in a tag.
const NAME_MAX: usize = 256;

/// Why a thing is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Miss {
    /// Whatever comes, it is not.
    No,
    /// The text ends within it.
    Partial,
}

pub type Parsed<T> = Result<T, Miss>;

/// Reads tags from the start of a text.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    text: &'a str,
    at: usize,
    ended: bool,
}

impl<'a> Reader<'a> {
    /// Nothing comes after `text` if it has `ended`, so that nothing in it is partial.
    pub fn new(text: &'a str, ended: bool) -> Self {
        Self { text, at: 0, ended }
    }

    /// Bytes that have been read.
    pub fn taken(&self) -> usize {
        self.at
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn miss(&self, partial: bool) -> Miss {
        if partial && !self.ended { Miss::Partial } else { Miss::No }
    }

    pub fn tag(&mut self, tag: &str) -> Parsed<()> {
        if !self.rest().starts_with(tag) {
            return Err(self.miss(tag.starts_with(self.rest())));
        }
        self.at += tag.len();
        Ok(())
    }

    /// White space, none included.
    pub fn gap(&mut self) -> Parsed<()> {
        let rest = self.rest();
        let len = rest.bytes().position(|b| !matches!(b, b' ' | b'\t' | b'\n' | b'\r')).unwrap_or(rest.len());
        if len > GAP_MAX {
            return Err(Miss::No);
        }
        self.at += len;
        Ok(())
    }

    /// What stands between `=` and `>`, on one line and without `<`; white space around it is dropped.
    pub fn name(&mut self) -> Parsed<String> {
        let rest = self.rest();
        let Some(len) = rest.find(['>', '<', '\n', '\r']) else {
            return Err(self.miss(rest.len() <= NAME_MAX));
        };
        let name = rest[..len].trim();
        if len > NAME_MAX || !rest[len..].starts_with('>') || name.is_empty() {
            return Err(Miss::No);
        }
        self.at += len + 1;
        Ok(name.to_owned())
    }
}

/// Something that may stand at a reader's place.
pub type Alternative<'r, 'a, T> = &'r dyn Fn(&mut Reader<'a>) -> Parsed<T>;

/// The first alternative that is there or may still be. No two may begin alike beyond where one of them is decided.
pub fn first_of<'a, T>(reader: &mut Reader<'a>, alternatives: &[Alternative<'_, 'a, T>]) -> Parsed<T> {
    for alternative in alternatives {
        let mut ahead = reader.clone();
        match alternative(&mut ahead) {
            Err(Miss::No) => {}
            found => {
                *reader = ahead;
                return found;
            }
        }
    }
    Err(Miss::No)
}
