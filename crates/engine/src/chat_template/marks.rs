//! Marks for control tokens: finds them in a template's source, swaps them for private-use characters, and turns a
//! rendered text back into pieces. The parent module says why this is right.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{RenderedPiece, TemplateError};

/// Role names around which a template may assemble a control token.
const ROLES: [&str; 8] = ["system", "user", "assistant", "tool", "developer", "function", "observation", "ipython"];
/// Methods and filters whose first argument is text to look for.
const SEARCHES: [&str; 16] = [
    "split",
    "rsplit",
    "startswith",
    "endswith",
    "replace",
    "find",
    "rfind",
    "index",
    "count",
    "strip",
    "lstrip",
    "rstrip",
    "removeprefix",
    "removesuffix",
    "partition",
    "trim",
];
const FIRST_MARK: u32 = 0xF0000;

/// What one private-use character of the marked template stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Mark {
    /// A whole control token.
    Token(String),
    /// The text before the role in a control token that holds a role name.
    Open(String),
    /// The text after the role.
    Close(String),
}

#[derive(Debug)]
enum Edit {
    Mark(Mark),
    /// Other text in place of a keyword that minijinja does not know.
    Keyword(&'static str),
}

/// A template's source and where in it control tokens are written.
#[derive(Debug)]
pub struct MarkedSource {
    source: String,
    /// In order of position, without overlap.
    edits: Vec<(Range<usize>, Edit)>,
}

/// One rendering's characters for the marks of a source.
#[derive(Debug)]
pub struct Assignment<'a> {
    source: &'a MarkedSource,
    chars: HashMap<Mark, char>,
    marks: HashMap<char, Mark>,
}

impl MarkedSource {
    /// Finds what to mark in `source`. Tokens that are empty or begin or end in white space are left alone: Jinja's
    /// white space control would cut them where it does not cut a mark.
    pub fn new(source: &str, control_tokens: &[String]) -> Self {
        let mut tokens: Vec<&str> =
            control_tokens.iter().map(String::as_str).filter(|t| !t.is_empty() && t.trim() == *t).collect();
        tokens.sort_by_key(|token| std::cmp::Reverse(token.len()));
        let (opens, closes) = role_frames(&tokens);
        tokens.retain(|token| source.contains(token));
        let mut scan = Scan { source, literals: Vec::new(), edits: Vec::new() };
        scan.run();
        let Scan { literals, mut edits, .. } = scan;
        for literal in literals {
            mark_literal(source, literal, &tokens, &opens, &closes, &mut edits);
        }
        edits.sort_by_key(|(range, _)| range.start);
        Self { source: source.to_owned(), edits }
    }

    /// No part of the source spells a control token.
    pub fn is_unmarked(&self) -> bool {
        !self.edits.iter().any(|(_, edit)| matches!(edit, Edit::Mark(_)))
    }

    /// The source to render without marks.
    pub fn plain(&self) -> String {
        self.write(|range, _| self.source[range].to_owned())
    }

    fn write(&self, mut mark: impl FnMut(Range<usize>, &Mark) -> String) -> String {
        let mut text = String::with_capacity(self.source.len());
        let mut at = 0;
        for (range, edit) in &self.edits {
            text.push_str(&self.source[at..range.start]);
            match edit {
                Edit::Mark(what) => text.push_str(&mark(range.clone(), what)),
                Edit::Keyword(keyword) => text.push_str(keyword),
            }
            at = range.end;
        }
        text.push_str(&self.source[at..]);
        text
    }
}

impl<'a> Assignment<'a> {
    /// Gives each mark of `source`, and each token of `ends`, a character that neither the source nor the input holds.
    /// `input` reports the input's private-use characters.
    pub fn new(
        source: &'a MarkedSource,
        ends: &[&str],
        input: impl FnOnce(&mut dyn FnMut(char)),
    ) -> Result<Self, TemplateError> {
        let mut taken = HashSet::new();
        input(&mut |c| {
            taken.insert(c);
        });
        private_use(&source.source, &mut |c| {
            taken.insert(c);
        });
        let mut free =
            (FIRST_MARK..=0x10_FFFD).filter_map(char::from_u32).filter(|c| is_mark(*c) && !taken.contains(c));
        let in_source = source.edits.iter().filter_map(|(_, edit)| match edit {
            Edit::Mark(mark) => Some(mark.clone()),
            Edit::Keyword(_) => None,
        });
        let mut chars = HashMap::new();
        for mark in in_source.chain(ends.iter().map(|end| Mark::Token((*end).to_owned()))) {
            if let Entry::Vacant(entry) = chars.entry(mark) {
                entry.insert(free.next().ok_or(TemplateError::NoMarks)?);
            }
        }
        let marks = chars.iter().map(|(mark, c)| (*c, mark.clone())).collect();
        Ok(Self { source, chars, marks })
    }

    /// The template with its marks.
    pub fn source(&self) -> String {
        self.source.write(|_, mark| self.chars[mark].to_string())
    }

    /// The mark of `token`, or its own text where it has none.
    pub fn token(&self, token: &str) -> String {
        let token = token.to_owned();
        match self.chars.get(&Mark::Token(token.clone())) {
            Some(mark) => mark.to_string(),
            None => token,
        }
    }

    /// Splits a text that the marked template rendered into pieces.
    pub fn resolve(&self, output: &str, is_control: &dyn Fn(&str) -> bool) -> Vec<RenderedPiece> {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = output;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            let token = match self.marks.get(&c) {
                None => {
                    text.push(c);
                    continue;
                }
                Some(Mark::Token(token)) => token.clone(),
                Some(Mark::Open(open)) => match self.framed_role(open, rest, is_control) {
                    Some((token, after)) => {
                        rest = after;
                        token
                    }
                    None => {
                        text.push_str(open);
                        continue;
                    }
                },
                Some(Mark::Close(close)) => {
                    text.push_str(close);
                    continue;
                }
            };
            if !text.is_empty() {
                pieces.push(RenderedPiece::Text(std::mem::take(&mut text)));
            }
            pieces.push(RenderedPiece::Control(token));
        }
        if !text.is_empty() {
            pieces.push(RenderedPiece::Text(text));
        }
        pieces
    }

    /// The control token that `open`, a role name and a closing mark at the start of `rest` make together, and what
    /// follows it.
    fn framed_role<'t>(
        &self,
        open: &str,
        rest: &'t str,
        is_control: &dyn Fn(&str) -> bool,
    ) -> Option<(String, &'t str)> {
        ROLES.iter().find_map(|role| {
            let after = rest.strip_prefix(role)?;
            let closing = after.chars().next()?;
            let Some(Mark::Close(close)) = self.marks.get(&closing) else { return None };
            let token = format!("{open}{role}{close}");
            is_control(&token).then(|| (token, &after[closing.len_utf8()..]))
        })
    }
}

/// Reports the private-use characters of the two planes from which marks are taken.
pub fn private_use(text: &str, found: &mut dyn FnMut(char)) {
    text.chars().filter(|c| is_mark(*c)).for_each(found);
}

fn is_mark(c: char) -> bool {
    c as u32 >= FIRST_MARK && (c as u32 & 0xFFFF) <= 0xFFFD
}

/// The texts before and after a role name in the control tokens that hold one, longest first.
fn role_frames<'t>(tokens: &[&'t str]) -> (Vec<&'t str>, Vec<&'t str>) {
    let (mut opens, mut closes) = (Vec::new(), Vec::new());
    for token in tokens {
        for role in ROLES {
            if let Some((open, close)) = token.split_once(role)
                && !open.is_empty()
                && !close.is_empty()
            {
                opens.push(open);
                closes.push(close);
            }
        }
    }
    for frames in [&mut opens, &mut closes] {
        frames.sort_by_key(|frame| (std::cmp::Reverse(frame.len()), *frame));
        frames.dedup();
    }
    (opens, closes)
}

/// Marks the control tokens in one literal, the first and longest at each place, and role frames at its ends.
fn mark_literal(
    source: &str,
    literal: Range<usize>,
    tokens: &[&str],
    opens: &[&str],
    closes: &[&str],
    edits: &mut Vec<(Range<usize>, Edit)>,
) {
    let (mut start, mut end) = (literal.start, literal.end);
    let text = &source[literal];
    if let Some(close) = closes.iter().find(|close| text.starts_with(**close)) {
        edits.push((start..start + close.len(), Edit::Mark(Mark::Close((*close).to_owned()))));
        start += close.len();
    }
    if let Some(open) = opens.iter().find(|open| source[start..end].ends_with(**open)) {
        edits.push((end - open.len()..end, Edit::Mark(Mark::Open((*open).to_owned()))));
        end -= open.len();
    }
    while let Some(c) = source[start..end].chars().next() {
        match tokens.iter().find(|token| source[start..end].starts_with(**token)) {
            Some(token) => {
                edits.push((start..start + token.len(), Edit::Mark(Mark::Token((*token).to_owned()))));
                start += token.len();
            }
            None => start += c.len_utf8(),
        }
    }
}

/// Walks a Jinja source for the places where it holds text: raw data and string literals.
struct Scan<'a> {
    source: &'a str,
    literals: Vec<Range<usize>>,
    edits: Vec<(Range<usize>, Edit)>,
}

impl Scan<'_> {
    fn run(&mut self) {
        let mut at = 0;
        while at < self.source.len() {
            let open = self.find(at, &["{{", "{%", "{#"]);
            self.literals.push(at..open);
            at = match self.source.get(open..open + 2) {
                Some("{#") => self.find(open + 2, &["#}"]) + 2,
                Some(opening) => self.code(open + 2, if opening == "{{" { "}}" } else { "%}" }),
                None => self.source.len(),
            };
        }
    }

    /// Where the first of `patterns` begins at or after `at`; the end of the source where there is none.
    fn find(&self, at: usize, patterns: &[&str]) -> usize {
        let Some(rest) = self.source.get(at..) else { return self.source.len() };
        patterns.iter().filter_map(|p| rest.find(p)).min().map_or(self.source.len(), |found| at + found)
    }

    /// Walks one `{{ … }}` or `{% … %}` from behind its opening and returns where the data behind it begins.
    fn code(&mut self, mut at: usize, closing: &str) -> usize {
        // The three tokens before the current one, latest first.
        let mut before = [""; 3];
        let mut depth = 0usize;
        let mut first = true;
        while let Some(c) = self.source[at..].chars().next() {
            if depth == 0 && self.source[at..].starts_with(closing) {
                return at + closing.len();
            }
            let end = match c {
                '"' | '\'' => self.string_end(at + 1, c),
                _ => at + token_len(&self.source[at..]),
            };
            let token = &self.source[at..end];
            match c {
                '"' | '\'' if !self.is_compared(before, end) => self.literals.push(at + 1..(end - 1).max(at + 1)),
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if first && closing == "%}" && c.is_alphabetic() {
                first = false;
                match token {
                    "raw" => return self.raw(end),
                    // Hugging Face's extension that records the assistant's text; it renders its body.
                    "generation" => self.edits.push((at..end, Edit::Keyword("with"))),
                    "endgeneration" => self.edits.push((at..end, Edit::Keyword("endwith"))),
                    _ => {}
                }
            }
            if !c.is_whitespace() {
                before = [token, before[0], before[1]];
            }
            at = end;
        }
        self.source.len()
    }

    /// Notes the data of a raw block and returns where its end tag begins.
    fn raw(&mut self, at: usize) -> usize {
        let data = (self.find(at, &["%}"]) + 2).min(self.source.len());
        let mut end = self.find(data, &["{%"]);
        while end < self.source.len() {
            if self.source[end + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw") {
                break;
            }
            end = self.find(end + 2, &["{%"]);
        }
        self.literals.push(data..end);
        end
    }

    /// The position behind the closing quote of a string whose text begins at `at`.
    fn string_end(&self, at: usize, quote: char) -> usize {
        let mut escaped = false;
        for (offset, c) in self.source[at..].char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == quote => return at + offset + 1,
                _ => {}
            }
        }
        self.source.len()
    }

    /// Whether the string literal behind the tokens `before` and ahead of `end` is text to look for.
    fn is_compared(&self, before: [&str; 3], end: usize) -> bool {
        let next = self.source[end..].trim_start();
        let word = &next[..token_len(next)];
        matches!(before[0], "==" | "!=" | "in")
            || matches!(word, "==" | "!=" | "in")
            || (word == "not" && next[3..].trim_start().starts_with("in"))
            || (before[0] == "(" && matches!(before[2], "." | "|") && SEARCHES.contains(&before[1]))
    }
}

/// Length in bytes of the name, number, comparison or single character that `code` begins with.
fn token_len(code: &str) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    match code.chars().next() {
        None => 0,
        Some(c) if word(c) => code.find(|c| !word(c)).unwrap_or(code.len()),
        Some(_) if code.starts_with("==") || code.starts_with("!=") => 2,
        Some(c) => c.len_utf8(),
    }
}
