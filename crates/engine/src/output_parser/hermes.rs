//! Calls in Hermes form: a JSON object with `name` and `arguments`.
//!
//! The keys come in any order; others are passed over. `arguments` is an object, or an object's JSON text as a string;
//! absent, null and the empty string mean no arguments. An object that follows the name is passed on as it is written,
//! while it comes; one that precedes the name, and a string, when the call ends. JSON is read strictly: a raw line feed
//! in a string, single quotes or a missing brace make it malformed.

use serde_json::Value;

use super::json::{Malformed, Scanner, Seen};
use super::schema::Tools;
use super::sink::Sink;

/// Where a call stands when its step ends.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// It takes more text.
    Waits,
    Ended,
    /// It is malformed or over too early: give it up.
    Broken,
}

#[derive(Debug)]
pub struct JsonCall {
    scanner: Scanner,
    /// What stood before the object, to be text if it is no call.
    opener: String,
    /// The object's text so far, until the call begins.
    raw: String,
    /// Only a declared tool may be called.
    declared_only: bool,
    begun: Option<usize>,
    name: Option<String>,
    key: String,
    /// A value for `arguments` has begun.
    given: bool,
    /// The characters come from within the object of arguments.
    inside: bool,
    /// JSON of the arguments that has not been passed on; its last character is, only when the call is complete.
    pending: String,
}

impl JsonCall {
    /// `opener` is the text before the object's brace.
    pub fn new(opener: String, declared_only: bool) -> Self {
        Self {
            scanner: Scanner::new(),
            opener,
            raw: String::new(),
            declared_only,
            begun: None,
            name: None,
            key: String::new(),
            given: false,
            inside: false,
            pending: String::new(),
        }
    }

    /// Takes what it can of `held`; what is left there does not belong to the call.
    pub fn step(&mut self, held: &mut String, ended: bool, tools: &Tools, sink: &mut Sink) -> Progress {
        let text = std::mem::take(held);
        for (at, c) in text.char_indices() {
            match self.feed(c, tools, sink) {
                Ok(false) => {}
                Ok(true) => {
                    held.push_str(&text[at + c.len_utf8()..]);
                    return Progress::Ended;
                }
                Err(Malformed) => {
                    held.push_str(&text[at..]);
                    return Progress::Broken;
                }
            }
        }
        if ended { Progress::Broken } else { Progress::Waits }
    }

    /// Ends a call that cannot be finished. If it has not begun, gives its text: what stood before the object, and the
    /// object so far.
    pub fn give_up(self, sink: &mut Sink) -> (String, String) {
        match self.begun {
            Some(index) => {
                sink.end(index, false);
                (String::new(), String::new())
            }
            None => (self.opener, self.raw),
        }
    }

    /// Takes a character; true if it closes the call.
    fn feed(&mut self, c: char, tools: &Tools, sink: &mut Sink) -> Result<bool, Malformed> {
        let mut seen = self.scanner.feed(c)?;
        if let Seen::Scalar(value) = seen {
            match &*self.key {
                "name" => return Err(Malformed),
                "arguments" if value != "null" => return Err(Malformed),
                _ => seen = self.scanner.feed(c)?,
            }
        }
        let (name, arguments) = (self.key == "name", self.key == "arguments");
        match &seen {
            Seen::Key(key) => self.take_key(key)?,
            Seen::Text(text) if name && !text.is_empty() => self.name = Some(text.clone()),
            Seen::Text(text) if arguments => self.pending = decoded(text)?,
            Seen::Opened if arguments && c == '{' => {
                self.inside = true;
                if self.name.is_some() {
                    self.begin(tools, sink)?;
                }
            }
            Seen::Text(_) | Seen::Opened if name || arguments => return Err(Malformed),
            Seen::Done => {
                let index = self.begin(tools, sink)?;
                let rest = std::mem::take(&mut self.pending);
                sink.arguments(index, if rest.is_empty() { "{}" } else { &rest });
                sink.end(index, true);
                return Ok(true);
            }
            _ => {}
        }
        self.keep(c, seen == Seen::Closed, sink);
        Ok(false)
    }

    fn take_key(&mut self, key: &str) -> Result<(), Malformed> {
        let again = (key == "name" && self.name.is_some()) || (key == "arguments" && self.given);
        if again {
            return Err(Malformed);
        }
        self.given |= key == "arguments";
        key.clone_into(&mut self.key);
        Ok(())
    }

    /// The index of the call, which begins now if it has not. It takes a name that may be called.
    fn begin(&mut self, tools: &Tools, sink: &mut Sink) -> Result<usize, Malformed> {
        if let Some(index) = self.begun {
            return Ok(index);
        }
        let name = self.name.as_ref().filter(|name| !self.declared_only || tools.declares(name)).ok_or(Malformed)?;
        let index = sink.begin(name);
        self.begun = Some(index);
        self.raw.clear();
        Ok(index)
    }

    /// Keeps a character for the arguments, and for the text in case this is no call.
    fn keep(&mut self, c: char, closes: bool, sink: &mut Sink) {
        if self.inside {
            self.pending.push(c);
        }
        match self.begun {
            // The brace that ends the arguments waits for the call's own.
            Some(index) if self.inside && !closes => sink.arguments(index, &std::mem::take(&mut self.pending)),
            Some(_) => {}
            None => self.raw.push(c),
        }
        if closes {
            self.inside = false;
        }
    }
}

/// Arguments that were written as a string.
fn decoded(text: &str) -> Result<String, Malformed> {
    match serde_json::from_str::<Value>(text) {
        _ if text.trim().is_empty() => Ok(String::new()),
        Ok(Value::Object(_)) => Ok(text.to_owned()),
        _ => Err(Malformed),
    }
}
