//! Splits the text of an answer into content, reasoning and tool calls while it comes.
//!
//! A model writes its reasoning and its calls as tags in plain text, and a piece of that text may end anywhere. The
//! parser holds back what could still become a tag, so that what it gives out is final: the events of an answer,
//! joined, are the same however the text was cut.
//!
//! Two forms of call are read, whichever the template asks for, since models fall from one into the other. What follows
//! `<tool_call>` tells them apart:
//!
//! - Qwen3-Coder's tags: `<function=NAME>`, then `<parameter=KEY>` VALUE `</parameter>` for each argument, then
//!   `</function>` (`xml.rs` says where a value ends, `schema.rs` what type it has);
//! - Hermes, the form of Qwen2.5 and Qwen3: `{"name": NAME, "arguments": {…}}` (`hermes.rs`).
//!
//! `<function=NAME>` without `<tool_call>` begins a call too if NAME is a declared tool: Qwen3-Coder forgets the outer
//! tag, and parsers of other servers allow it.
//!
//! **What is no call is text.** A call begins only when its form is confirmed: in tags when the first parameter or the
//! end follows the name, in Hermes when the name and the start of the arguments are known. Up to there everything is
//! given out as it was written, tags included, if the rest turns out otherwise.
//!
//! **A call is complete or marked.** A call that has begun and then breaks off, because the answer ends or its JSON is
//! malformed, ends with `complete: false`. Its arguments lack the final brace, so they are never valid JSON. Text from
//! the place where it broke is content; tags and JSON around the arguments are markup and given out nowhere.
//!
//! **White space.** Content is the text with calls and reasoning cut out, without white space at the end if a call
//! stood there and at the start if a call or reasoning did. Reasoning has none at either end. White space that nothing
//! was cut beside stays.

use serde_json::Value;

use hermes::{JsonCall, Progress};
use markup::{Miss, Parsed, Reader, first_of};
use sink::Sink;
use xml::XmlCall;

mod hermes;
mod json;
mod markup;
mod prompt;
mod schema;
mod sink;
#[cfg(test)]
mod tests;
mod xml;

pub use prompt::{ToolForm, hermes_system_text};
pub(crate) use schema::{Kinds, Tools};

/// What the parser gives out. Texts and deltas of a kind that follow one another are to be joined; none is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Text for the reader.
    Content(String),
    /// Text from within `<think>…</think>`.
    Reasoning(String),
    /// A call begins. `index` counts the calls of the answer from 0; calls do not interleave.
    ToolCallBegin { index: usize, name: String },
    /// The next piece of the arguments' JSON text. Joined, the pieces of a complete call are one JSON object.
    ToolCallArguments { index: usize, delta: String },
    /// A call ends. If it is not `complete`, its arguments are the beginning of a JSON object and must not be used.
    ToolCallEnd { index: usize, complete: bool },
}

/// What `<think>` means in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// Nothing: the tags are content.
    AsText,
    /// `<think>` at the start of the answer, after white space at most, opens the reasoning.
    Split,
    /// The prompt has opened the block, so the answer begins as reasoning, with or without a tag of its own.
    Opened,
}

impl Thinking {
    /// `Opened` if the rendered `prompt` ends with `<think>`, white space aside, as templates of models that always
    /// think write it; else `Split`.
    pub fn of_prompt(prompt: &str) -> Self {
        if prompt.trim_end().ends_with(THINK) { Self::Opened } else { Self::Split }
    }
}

/// Pieces of an answer's text in, [`Event`]s out. See the module's documentation.
#[derive(Debug)]
pub struct OutputParser {
    tools: Tools,
    state: State,
    /// The answer begins within reasoning.
    opened: bool,
    /// Text outside of calls is reasoning.
    thinking: bool,
    /// Text that has come and is not settled.
    held: String,
    sink: Sink,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space has come; `<think>` may.
    Start,
    Text,
    Xml(XmlCall),
    Json(JsonCall),
    /// A call has ended; its block may be closed, or hold another.
    AfterCall,
}

/// A tag that changes what text means.
enum Tag {
    ThinkEnd,
    /// Up to and with `<function=NAME>`.
    Function(String),
    /// Up to, without, the brace of a JSON object.
    Object,
    BlockEnd,
}

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const BLOCK: &str = "<tool_call>";
const BLOCK_END: &str = "</tool_call>";

impl OutputParser {
    /// A parser for one answer. `tools` are those that the request offers, as `{"type": "function", "function": {…}}`
    /// or as the inner object with `name` and `parameters`; without any, no call is looked for.
    pub fn new(tools: &[Value], thinking: Thinking) -> Self {
        Self {
            tools: Tools::new(tools),
            state: if thinking == Thinking::AsText { State::Text } else { State::Start },
            opened: thinking == Thinking::Opened,
            thinking: false,
            held: String::new(),
            sink: Sink::default(),
        }
    }

    /// Takes the next piece of the answer and gives out what it settles.
    pub fn push(&mut self, text: &str) -> Vec<Event> {
        self.held.push_str(text);
        while self.step(false) {}
        self.sink.take()
    }

    /// Ends the answer: what was held back is text or the end of a broken call. Nothing is to be pushed after it.
    pub fn finish(&mut self) -> Vec<Event> {
        while self.step(true) {}
        self.sink.finish();
        self.sink.take()
    }

    /// Goes on by one state; false when it takes more text to go on.
    fn step(&mut self, ended: bool) -> bool {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start => self.start(ended),
            State::Text => self.text(ended),
            State::AfterCall => self.after_call(ended),
            State::Xml(call) => self.xml(call, ended),
            State::Json(call) => self.json(call, ended),
        }
    }

    fn start(&mut self, ended: bool) -> bool {
        let mut reader = Reader::new(&self.held, ended);
        match reader.gap().and_then(|()| reader.tag(THINK)) {
            Ok(()) => {
                self.held.drain(..reader.taken());
                self.thinking = true;
            }
            Err(Miss::Partial) => {
                self.state = State::Start;
                return false;
            }
            Err(Miss::No) => self.thinking = self.opened,
        }
        if self.thinking {
            self.sink.cut_content();
        }
        true
    }

    fn text(&mut self, ended: bool) -> bool {
        let mut from = 0;
        while let Some(at) = self.held[from..].find('<').map(|i| from + i) {
            let mut reader = Reader::new(&self.held[at..], ended);
            match self.tag(&mut reader) {
                Ok(tag) => {
                    let end = at + reader.taken();
                    self.sink.text(self.thinking, &self.held[..at]);
                    self.enter(tag, at..end);
                    return true;
                }
                Err(Miss::Partial) => {
                    self.sink.text(self.thinking, &self.held[..at]);
                    self.held.drain(..at);
                    return false;
                }
                Err(Miss::No) => from = at + 1,
            }
        }
        self.sink.text(self.thinking, &self.held);
        self.held.clear();
        false
    }

    /// The tag at the reader's place in text. Within reasoning only calls of declared tools count, since a model that
    /// thinks about calls quotes their tags.
    fn tag(&self, reader: &mut Reader) -> Parsed<Tag> {
        let known = |name: String| if self.tools.declares(&name) { Ok(Tag::Function(name)) } else { Err(Miss::No) };
        first_of(
            reader,
            &[
                &|r| if self.thinking { r.tag(THINK_END).map(|()| Tag::ThinkEnd) } else { Err(Miss::No) },
                &|r| if self.tools.is_empty() { Err(Miss::No) } else { r.tag(BLOCK).and_then(|()| self.call(r)) },
                &|r| if self.tools.is_empty() { Err(Miss::No) } else { xml::head(r).and_then(known) },
            ],
        )
    }

    /// The start of a call within a block, after a gap.
    fn call(&self, reader: &mut Reader) -> Parsed<Tag> {
        reader.gap()?;
        let allowed = |name: String| {
            if self.thinking && !self.tools.declares(&name) { Err(Miss::No) } else { Ok(Tag::Function(name)) }
        };
        first_of(reader, &[&|r| xml::head(r).and_then(allowed), &|r| r.clone().tag("{").map(|()| Tag::Object)])
    }

    fn after_call(&mut self, ended: bool) -> bool {
        let mut reader = Reader::new(&self.held, ended);
        let tag = first_of(
            &mut reader,
            &[&|r| r.gap().and_then(|()| r.tag(BLOCK_END)).map(|()| Tag::BlockEnd), &|r| self.call(r)],
        );
        match tag {
            Ok(tag) => {
                let end = reader.taken();
                self.enter(tag, 0..end);
                true
            }
            Err(Miss::Partial) => {
                self.state = State::AfterCall;
                false
            }
            Err(Miss::No) => true,
        }
    }

    /// Goes on behind a tag, which stands at `range` of the held text.
    fn enter(&mut self, tag: Tag, range: std::ops::Range<usize>) {
        match tag {
            Tag::ThinkEnd => {
                self.thinking = false;
                self.sink.end_reasoning();
            }
            Tag::Function(name) => self.state = State::Xml(XmlCall::new(self.sink.begin(&name), &name)),
            Tag::Object => {
                let opener = self.held[range.clone()].to_owned();
                self.state = State::Json(JsonCall::new(opener, self.thinking));
            }
            Tag::BlockEnd => {}
        }
        self.held.drain(..range.end);
    }

    fn xml(&mut self, mut call: XmlCall, ended: bool) -> bool {
        let moved = call.step(&mut self.held, ended, &self.tools, &mut self.sink);
        match moved {
            xml::Moved::On | xml::Moved::Waits => self.state = State::Xml(call),
            xml::Moved::Ended => self.state = State::AfterCall,
        }
        !matches!(moved, xml::Moved::Waits)
    }

    fn json(&mut self, mut call: JsonCall, ended: bool) -> bool {
        match call.step(&mut self.held, ended, &self.tools, &mut self.sink) {
            Progress::Waits => {
                self.state = State::Json(call);
                false
            }
            Progress::Ended => {
                self.state = State::AfterCall;
                true
            }
            Progress::Broken => {
                let (opener, rest) = call.give_up(&mut self.sink);
                self.sink.text(self.thinking, &opener);
                self.held.insert_str(0, &rest);
                true
            }
        }
    }
}
