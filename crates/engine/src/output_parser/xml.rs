//! Calls in Qwen3-Coder's form: tags around a function's name and each argument's value.
//!
//! The form escapes nothing, so a value may hold any text, tags of calls included. Therefore a closing tag ends a value
//! only if what follows confirms it:
//!
//! - `</parameter>`, if the next parameter or the end of the call follows;
//! - `</function>`, where `</parameter>` was forgotten, if the end of the block or another call follows;
//! - `<parameter=KEY>` at the start of a line, where `</parameter>` was forgotten, if the tool declares KEY and the
//!   call has not given it.
//!
//! One line feed is dropped at either end of a value, since the template writes values on lines of their own. All other
//! white space is the value's: editors replace exact text, indentation and all.
//!
//! `</tool_call>` without `</function>` ends a call as well. A key given twice stands twice in the JSON; parsers take
//! the last.

use super::markup::{Miss, Parsed, Reader, first_of};
use super::schema::{Kinds, Tools};
use super::sink::Sink;
use super::{BLOCK, BLOCK_END};

const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// What a step has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    On,
    /// It takes more text.
    Waits,
    Ended,
}

#[derive(Debug)]
pub struct XmlCall {
    index: usize,
    name: String,
    /// Keys of the parameters so far.
    given: Vec<String>,
    /// The value that is being read; between values none.
    value: Option<Value>,
}

#[derive(Debug)]
struct Value {
    json: ValueJson,
    /// Nothing of it has come, not even the line feed that is dropped.
    fresh: bool,
    /// What is held stands at the start of a line.
    line_start: bool,
}

/// A tag between parameters.
enum Inner {
    Parameter(String),
    FunctionEnd,
    BlockEnd,
}

/// `<function=NAME>`, if a parameter or the end of the call follows; reads up to there.
pub fn head(reader: &mut Reader) -> Parsed<String> {
    reader.tag(FUNCTION)?;
    let name = reader.name()?;
    inner(&mut reader.clone())?;
    Ok(name)
}

/// The next tag of a function, after a gap.
fn inner(reader: &mut Reader) -> Parsed<Inner> {
    reader.gap()?;
    first_of(
        reader,
        &[
            &|r| r.tag(PARAMETER).and_then(|()| r.name()).map(Inner::Parameter),
            &|r| r.tag(FUNCTION_END).map(|()| Inner::FunctionEnd),
            &|r| r.tag(BLOCK_END).map(|()| Inner::BlockEnd),
        ],
    )
}

impl XmlCall {
    /// A call of which everything up to the function's name has been read.
    pub fn new(index: usize, name: &str) -> Self {
        Self { index, name: name.to_owned(), given: Vec::new(), value: None }
    }

    /// Takes what it can of `held`.
    pub fn step(&mut self, held: &mut String, ended: bool, tools: &Tools, sink: &mut Sink) -> Moved {
        match self.value.take() {
            Some(value) => self.read_value(value, held, ended, tools, sink),
            None => self.read_tag(held, ended, tools, sink),
        }
    }

    fn read_tag(&mut self, held: &mut String, ended: bool, tools: &Tools, sink: &mut Sink) -> Moved {
        let mut reader = Reader::new(held, ended);
        // A name and a value end only before such a tag.
        let tag = inner(&mut reader).expect("a call's name or value was followed by a tag");
        let taken = reader.taken();
        let first = self.given.is_empty();
        if let Inner::Parameter(key) = tag {
            held.drain(..taken);
            let json = ValueJson::new(tools.parameter(&self.name, &key));
            let comma = if first { "{" } else { "," };
            sink.arguments(self.index, &format!("{comma}\"{}\":{}", escaped(&key), json.opening()));
            self.given.push(key);
            self.value = Some(Value { json, fresh: true, line_start: false });
            return Moved::On;
        }
        if matches!(tag, Inner::FunctionEnd) {
            held.drain(..taken);
        }
        sink.arguments(self.index, if first { "{}" } else { "}" });
        sink.end(self.index, true);
        Moved::Ended
    }

    fn read_value(
        &mut self,
        mut value: Value,
        held: &mut String,
        ended: bool,
        tools: &Tools,
        sink: &mut Sink,
    ) -> Moved {
        if value.fresh && !held.is_empty() {
            value.fresh = false;
            value.line_start = held.starts_with('\n');
            held.drain(..usize::from(value.line_start));
        }
        let mut from = 0;
        let mut safe = held.len();
        while let Some(at) = held[from..].find('<').map(|i| from + i) {
            let line_start = held[..at].chars().next_back().map_or(value.line_start, |c| c == '\n');
            match self.value_end(Reader::new(&held[at..], ended), line_start, tools) {
                Ok(len) => {
                    let text = &held[..at];
                    let text = text.strip_suffix('\n').unwrap_or(text);
                    sink.arguments(self.index, &(value.json.take(text) + &value.json.finish()));
                    held.drain(..at + len);
                    return Moved::On;
                }
                Err(Miss::Partial) => {
                    safe = at;
                    break;
                }
                Err(Miss::No) => from = at + 1,
            }
        }
        if ended {
            sink.arguments(self.index, &(value.json.take(held) + &value.json.cut()));
            sink.end(self.index, false);
            held.clear();
            return Moved::Ended;
        }
        // The last line feed may be the one that is dropped.
        safe -= usize::from(held[..safe].ends_with('\n'));
        value.line_start &= safe == 0;
        sink.arguments(self.index, &value.json.take(&held[..safe]));
        held.drain(..safe);
        self.value = Some(value);
        Moved::Waits
    }

    /// Whether a value ends before the `<` at the reader's place; gives the bytes of its own closing tag.
    fn value_end(&self, reader: Reader, line_start: bool, tools: &Tools) -> Parsed<usize> {
        let next_parameter = |r: &mut Reader| {
            r.tag(PARAMETER)?;
            let key = r.name()?;
            let new = line_start && tools.has_parameter(&self.name, &key) && !self.given.contains(&key);
            if new { Ok(0) } else { Err(Miss::No) }
        };
        let confirmed_end = |r: &mut Reader| {
            r.tag(FUNCTION_END)?;
            r.gap()?;
            first_of(r, &[&|r| r.tag(BLOCK_END), &|r| r.tag(FUNCTION), &|r| r.tag(BLOCK)]).map(|()| 0)
        };
        let own_end = |r: &mut Reader| {
            r.tag(PARAMETER_END)?;
            inner(r).map(|_| PARAMETER_END.len())
        };
        first_of(&mut reader.clone(), &[&own_end, &confirmed_end, &next_parameter])
    }
}

/// Writes a value's text as JSON of the type that the schema declares.
#[derive(Debug)]
enum ValueJson {
    /// A string, passed on as it comes.
    Text,
    /// A string or null, until the text tells.
    TextOrNull(String),
    /// Another type: the text so far.
    Typed(Kinds, String),
}

impl ValueJson {
    fn new(kinds: Kinds) -> Self {
        if kinds.only_text() {
            Self::Text
        } else if kinds.text_or_null() {
            Self::TextOrNull(String::new())
        } else {
            Self::Typed(kinds, String::new())
        }
    }

    fn opening(&self) -> &'static str {
        if matches!(self, Self::Text) { "\"" } else { "" }
    }

    /// Takes text of the value and gives the JSON that it settles.
    fn take(&mut self, text: &str) -> String {
        match self {
            Self::Text => escaped(text),
            Self::TextOrNull(so_far) => {
                so_far.push_str(text);
                if may_be_null(so_far) {
                    return String::new();
                }
                let json = format!("\"{}", escaped(so_far));
                *self = Self::Text;
                json
            }
            Self::Typed(_, so_far) => {
                so_far.push_str(text);
                String::new()
            }
        }
    }

    /// The rest of the JSON, all text having been taken.
    fn finish(&self) -> String {
        match self {
            Self::Text => "\"".to_owned(),
            Self::TextOrNull(text) => Kinds::TEXT_OR_NULL.json(text),
            Self::Typed(kinds, text) => kinds.json(text),
        }
    }

    /// What shows the text that was taken when its end is missing: a string that does not end, so that the arguments
    /// are not valid, whatever the text holds.
    fn cut(&self) -> String {
        match self {
            Self::Text => String::new(),
            Self::TextOrNull(text) | Self::Typed(_, text) => format!("\"{}", escaped(text)),
        }
    }
}

/// Whether a text that begins so may mean null. White space around the word is bounded, as gaps are.
fn may_be_null(text: &str) -> bool {
    let word = text.trim().to_ascii_lowercase();
    text.len() <= 64 && ["null", "none"].iter().any(|null| null.starts_with(&word))
}

/// The inside of a JSON string.
fn escaped(text: &str) -> String {
    let json = serde_json::Value::from(text).to_string();
    json[1..json.len() - 1].to_owned()
}
