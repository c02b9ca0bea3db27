//! Reads a JSON object character by character and says what its outermost level holds.
//!
//! `serde_json` reads whole texts; a call's arguments are to be passed on while they come, and what is malformed is to
//! be known where it is, so that the text behind it is not swallowed. Strings, numbers and literals are left to
//! `serde_json`.

use serde_json::Value;

/// Objects and arrays within one another; clients' parsers commonly refuse more than 128.
const DEPTH_MAX: usize = 100;

/// The text is no JSON object from the last character on.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// What a character has settled. The outermost object's own level is meant throughout.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    Nothing,
    /// It ends a key.
    Key(String),
    /// It ends a value that is a string.
    Text(String),
    /// It stands behind a number or literal and is itself not taken: feed it again.
    Scalar(String),
    /// It opens a value that is an object or array.
    Opened,
    /// It closes such a value.
    Closed,
    /// It closes the outermost object.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    None,
    Text { key: bool, escaped: bool },
    Scalar,
}

#[derive(Debug)]
pub struct Scanner {
    /// What is open, outermost first: objects are true.
    open: Vec<bool>,
    expect: Expect,
    token: Token,
    /// The token's characters so far.
    spelled: String,
}

impl Scanner {
    /// The first character to feed is the object's brace.
    pub fn new() -> Self {
        Self { open: Vec::new(), expect: Expect::Value, token: Token::None, spelled: String::new() }
    }

    /// Takes the next character. Nothing may be fed after [`Seen::Done`] or an error.
    pub fn feed(&mut self, c: char) -> Result<Seen, Malformed> {
        match self.token {
            Token::Text { key, escaped } => self.text(c, key, escaped),
            Token::Scalar if c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.') => {
                self.spelled.push(c);
                Ok(Seen::Nothing)
            }
            Token::Scalar => {
                self.token = Token::None;
                self.expect = Expect::CommaOrEnd;
                let spelled = std::mem::take(&mut self.spelled);
                serde_json::from_str::<Value>(&spelled).map_err(|_| Malformed)?;
                if self.open.len() == 1 { Ok(Seen::Scalar(spelled)) } else { self.structure(c) }
            }
            Token::None => self.structure(c),
        }
    }

    fn text(&mut self, c: char, key: bool, escaped: bool) -> Result<Seen, Malformed> {
        self.spelled.push(c);
        if c < ' ' {
            return Err(Malformed);
        }
        if escaped || c != '"' {
            self.token = Token::Text { key, escaped: !escaped && c == '\\' };
            return Ok(Seen::Nothing);
        }
        let decoded = serde_json::from_str(&self.spelled).map_err(|_| Malformed)?;
        self.spelled.clear();
        self.token = Token::None;
        self.expect = if key { Expect::Colon } else { Expect::CommaOrEnd };
        Ok(match (self.open.len(), key) {
            (1, true) => Seen::Key(decoded),
            (1, false) => Seen::Text(decoded),
            _ => Seen::Nothing,
        })
    }

    fn structure(&mut self, c: char) -> Result<Seen, Malformed> {
        use Expect::*;
        let object = self.open.last() == Some(&true);
        match (self.expect, c) {
            (_, ' ' | '\t' | '\n' | '\r') => return Ok(Seen::Nothing),
            (Value | ValueOrEnd, '"') => self.begin(Token::Text { key: false, escaped: false }, c),
            (Key | KeyOrEnd, '"') => self.begin(Token::Text { key: true, escaped: false }, c),
            (Value | ValueOrEnd, '-' | '0'..='9' | 't' | 'f' | 'n') => self.begin(Token::Scalar, c),
            (Value | ValueOrEnd, '{' | '[') if self.open.len() < DEPTH_MAX => {
                self.open.push(c == '{');
                self.expect = if c == '{' { KeyOrEnd } else { ValueOrEnd };
                return Ok(if self.open.len() == 2 { Seen::Opened } else { Seen::Nothing });
            }
            (KeyOrEnd, '}') | (ValueOrEnd, ']') => return Ok(self.close()),
            (CommaOrEnd, '}') if object => return Ok(self.close()),
            (CommaOrEnd, ']') if !object => return Ok(self.close()),
            (CommaOrEnd, ',') => self.expect = if object { Key } else { Value },
            (Colon, ':') => self.expect = Value,
            _ => return Err(Malformed),
        }
        Ok(Seen::Nothing)
    }

    fn begin(&mut self, token: Token, c: char) {
        self.token = token;
        self.spelled.push(c);
    }

    fn close(&mut self) -> Seen {
        self.open.pop();
        self.expect = Expect::CommaOrEnd;
        match self.open.len() {
            0 => Seen::Done,
            1 => Seen::Closed,
            _ => Seen::Nothing,
        }
    }
}
