//! GBNF, the grammars of llama.cpp, rewritten in Lark's syntax. The syntax is that of llama.cpp's `grammars/README.md`.
//!
//! A rule that comes to itself, directly or through others, stays a rule. All others are regular expressions, and so is whatever stands
//! side by side between two that are not: they become lexemes, each of which takes as much text as it can. What is written so always
//! obeys the grammar; but a lexeme that could take the beginning of what comes after a recursive rule does take it.

use std::collections::HashMap;
use std::fmt::Write;

use super::quoted;

/// Part of a rule. A reference is the index of the rule it names.
#[derive(Clone, Debug, PartialEq)]
enum Node {
    Text(String),
    /// A character within ranges, or outside all of them.
    Class {
        is_negated: bool,
        ranges: Vec<(char, char)>,
    },
    Reference(usize),
    Sequence(Vec<Node>),
    AnyOf(Vec<Node>),
    /// At least so many times, and at most.
    Repeated(Box<Node>, u32, Option<u32>),
}

/// A grammar in Lark's syntax that allows what this one does.
///
/// # Errors
/// What is no GBNF, with its line; rules that are missing.
pub(super) fn lark(gbnf: &str) -> Result<String, String> {
    let mut parser = Parser { rest: gbnf, line: 1, names: HashMap::new(), rules: Vec::new() };
    parser.grammar()?;
    let Parser { names, rules, .. } = parser;
    let mut named: Vec<(usize, &str)> = names.iter().map(|(name, index)| (*index, name.as_str())).collect();
    named.sort_unstable();
    let missing = named.iter().find(|(index, _)| rules[*index].is_none());
    if let Some((_, name)) = missing {
        return Err(format!("there is no rule {name:?}"));
    }
    let Some(root) = names.get("root") else { return Err("there is no rule \"root\", which all begins with".into()) };
    let rules: Vec<Node> = rules.into_iter().flatten().collect();
    let mut writer = Writer { is_regular: regular(&rules), lark: String::new(), n_lexeme: 0 };
    let start = writer.within_rule(&Node::Reference(*root));
    writer.define("start", &start);
    for (i, rule) in rules.iter().enumerate() {
        if writer.is_regular[i] {
            let text = writer.within_lexeme(rule);
            writer.define(&format!("RULE{i}"), &text);
        } else {
            let text = writer.within_rule(rule);
            writer.define(&format!("rule{i}"), &text);
        }
    }
    Ok(writer.lark)
}

/// Which rules never come to one that comes to itself: those that are left out one after the other, once all they name are.
fn regular(rules: &[Node]) -> Vec<bool> {
    let mut named_by: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    let mut n_open = vec![0; rules.len()];
    for (i, rule) in rules.iter().enumerate() {
        rule.each_reference(&mut |to| {
            named_by[to].push(i);
            n_open[i] += 1;
        });
    }
    let mut is_regular = vec![false; rules.len()];
    let mut next: Vec<usize> = (0..rules.len()).filter(|i| n_open[*i] == 0).collect();
    while let Some(i) = next.pop() {
        is_regular[i] = true;
        for &by in &named_by[i] {
            n_open[by] -= 1;
            next.extend((n_open[by] == 0).then_some(by));
        }
    }
    is_regular
}

impl Node {
    fn each_reference(&self, f: &mut impl FnMut(usize)) {
        match self {
            Node::Text(_) | Node::Class { .. } => {}
            Node::Reference(to) => f(*to),
            Node::Sequence(parts) | Node::AnyOf(parts) => parts.iter().for_each(|part| part.each_reference(f)),
            Node::Repeated(part, ..) => part.each_reference(f),
        }
    }
}

/// Writes Lark's definitions.
struct Writer {
    /// Of each rule.
    is_regular: Vec<bool>,
    lark: String,
    /// Lexemes that are no rule of their own.
    n_lexeme: usize,
}

impl Writer {
    fn define(&mut self, name: &str, text: &str) {
        writeln!(self.lark, "{name}: {text}").expect("a string takes all text");
    }

    fn is_regular(&self, node: &Node) -> bool {
        let mut is_regular = true;
        node.each_reference(&mut |to| is_regular &= self.is_regular[to]);
        is_regular
    }

    /// Part of a rule. What is regular in it becomes one lexeme.
    fn within_rule(&mut self, node: &Node) -> String {
        match node {
            Node::Reference(to) if !self.is_regular[*to] => format!("rule{to}"),
            node if self.is_regular(node) => {
                let text = self.within_lexeme(node);
                let name = format!("LEXEME{}", self.n_lexeme);
                self.n_lexeme += 1;
                self.define(&name, &text);
                name
            }
            Node::Sequence(parts) => {
                let runs = parts.chunk_by(|a, b| self.is_regular(a) && self.is_regular(b)).map(<[Node]>::to_vec);
                let runs: Vec<Vec<Node>> = runs.collect();
                self.all_within_rule(runs.into_iter().map(Node::Sequence), " ")
            }
            Node::AnyOf(parts) => {
                let (lexemes, others): (Vec<Node>, Vec<Node>) = parts.iter().cloned().partition(|p| self.is_regular(p));
                let lexemes = (!lexemes.is_empty()).then_some(Node::AnyOf(lexemes));
                self.all_within_rule(lexemes.into_iter().chain(others), " | ")
            }
            Node::Repeated(part, min, max) => format!("({}){}", self.within_rule(part), times(*min, *max)),
            Node::Text(_) | Node::Class { .. } | Node::Reference(_) => unreachable!("these are regular"),
        }
    }

    fn all_within_rule(&mut self, parts: impl Iterator<Item = Node>, between: &str) -> String {
        let texts: Vec<String> = parts
            .map(|part| match part {
                Node::Sequence(mut parts) if parts.len() == 1 => self.within_rule(&parts.remove(0)),
                part => self.within_rule(&part),
            })
            .collect();
        format!("({})", texts.join(between))
    }

    /// Part of a lexeme.
    fn within_lexeme(&self, node: &Node) -> String {
        let all = |parts: &[Node], between: &str| {
            let texts: Vec<String> = parts.iter().map(|part| self.within_lexeme(part)).collect();
            format!("({})", texts.join(between))
        };
        match node {
            // The delete character is the one that Lark has only escaped.
            Node::Text(text) => quoted(text).replace('\u{7f}', "\\u007f"),
            Node::Class { is_negated, ranges } if ranges.is_empty() => {
                assert!(*is_negated, "a class of nothing is refused when it is read");
                "/(?s:.)/".to_string()
            }
            Node::Class { is_negated, ranges } => {
                let range = |(from, to): &(char, char)| format!("\\x{{{:X}}}-\\x{{{:X}}}", *from as u32, *to as u32);
                let ranges: String = ranges.iter().map(range).collect();
                format!("/[{}{ranges}]/", if *is_negated { "^" } else { "" })
            }
            Node::Reference(to) => format!("RULE{to}"),
            Node::Sequence(parts) if parts.is_empty() => "\"\"".to_string(),
            Node::Sequence(parts) => all(parts, " "),
            Node::AnyOf(parts) => all(parts, " | "),
            Node::Repeated(part, min, max) => format!("({}){}", self.within_lexeme(part), times(*min, *max)),
        }
    }
}

fn times(min: u32, max: Option<u32>) -> String {
    match (min, max) {
        (0, None) => "*".to_string(),
        (1, None) => "+".to_string(),
        (0, Some(1)) => "?".to_string(),
        (min, None) => format!("{{{min},}}"),
        (min, Some(max)) => format!("{{{min},{max}}}"),
    }
}

/// Reads GBNF.
struct Parser<'a> {
    rest: &'a str,
    line: usize,
    /// Indices of rules by their names, those that are only named so far too.
    names: HashMap<String, usize>,
    rules: Vec<Option<Node>>,
}

impl Parser<'_> {
    fn grammar(&mut self) -> Result<(), String> {
        self.skip(true);
        while !self.rest.is_empty() {
            let name = self.name().ok_or_else(|| self.expected("the name of a rule"))?;
            let index = self.index(&name);
            self.skip(false);
            if !self.take("::=") {
                return Err(self.expected("::="));
            }
            if self.rules[index].is_some() {
                return Err(self.wrong(format!("there is a rule {name:?} already")));
            }
            self.skip(true);
            let rule = self.any_of(false)?;
            self.rules[index] = Some(rule);
            if !self.rest.is_empty() && !self.rest.starts_with(['\r', '\n']) {
                return Err(self.expected("the end of the line"));
            }
            self.skip(true);
        }
        Ok(())
    }

    /// Alternatives. Within brackets they go on in the next line, outside where that begins with `|`.
    fn any_of(&mut self, is_nested: bool) -> Result<Node, String> {
        let mut parts = vec![self.sequence(is_nested)?];
        while self.is_next_alternative() {
            self.skip(true);
            self.take("|");
            self.skip(true);
            parts.push(self.sequence(is_nested)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::AnyOf(parts) })
    }

    fn is_next_alternative(&mut self) -> bool {
        let (rest, line) = (self.rest, self.line);
        self.skip(true);
        let is_next = self.rest.starts_with('|');
        (self.rest, self.line) = (rest, line);
        is_next
    }

    fn sequence(&mut self, is_nested: bool) -> Result<Node, String> {
        let mut parts = Vec::new();
        while let Some(first) = self.rest.chars().next() {
            let part = match first {
                '"' => self.text()?,
                '[' => self.class()?,
                '.' => {
                    self.take(".");
                    Node::Class { is_negated: true, ranges: Vec::new() }
                }
                '(' => {
                    self.take("(");
                    self.skip(true);
                    let inner = self.any_of(true)?;
                    self.skip(true);
                    if !self.take(")") {
                        return Err(self.expected(")"));
                    }
                    inner
                }
                '<' | '!' => return Err(self.wrong("tokens are not supported; write their text".to_string())),
                _ => match self.name() {
                    Some(name) => Node::Reference(self.index(&name)),
                    None => break,
                },
            };
            let part = self.repeated(part)?;
            parts.push(part);
            self.skip(is_nested);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Node::Sequence(parts) })
    }

    fn repeated(&mut self, mut part: Node) -> Result<Node, String> {
        loop {
            self.skip(false);
            let (min, max) = match self.rest.chars().next() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => self.bounds()?,
                _ => return Ok(part),
            };
            // The last byte of any of them.
            self.rest = &self.rest[1..];
            part = Node::Repeated(Box::new(part), min, max);
        }
    }

    /// What stands within `{}`, up to the closing bracket.
    fn bounds(&mut self) -> Result<(u32, Option<u32>), String> {
        let wrong = "expected {m}, {m,} or {m,n} with m at most n";
        let Some((inner, _)) = self.rest[1..].split_once('}') else { return Err(self.wrong(wrong.to_string())) };
        let number = |text: &str| text.trim().parse::<u32>().ok();
        let bounds = match inner.split_once(',') {
            None => number(inner).map(|n| (n, Some(n))),
            Some((min, max)) if max.trim().is_empty() => number(min).map(|min| (min, None)),
            Some((min, max)) => number(min).zip(number(max)).map(|(min, max)| (min, Some(max))),
        };
        self.rest = &self.rest[1 + inner.len()..];
        bounds.filter(|(min, max)| max.is_none_or(|max| *min <= max)).ok_or_else(|| self.wrong(wrong.to_string()))
    }

    fn text(&mut self) -> Result<Node, String> {
        self.take("\"");
        let mut text = String::new();
        while !self.take("\"") {
            text.push(self.character("\"")?);
        }
        Ok(Node::Text(text))
    }

    fn class(&mut self) -> Result<Node, String> {
        self.take("[");
        let is_negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            let from = self.character("]")?;
            let is_range = self.rest.starts_with('-') && !self.rest.starts_with("-]") && self.take("-");
            let to = if is_range { self.character("]")? } else { from };
            if to < from {
                return Err(self.wrong(format!("the range {from:?} to {to:?} is backwards")));
            }
            ranges.push((from, to));
        }
        match ranges.is_empty() && !is_negated {
            true => Err(self.wrong("[] is no character at all".to_string())),
            false => Ok(Node::Class { is_negated, ranges }),
        }
    }

    /// A character, which may be escaped, of what ends with `end`.
    fn character(&mut self, end: &str) -> Result<char, String> {
        let mut chars = self.rest.chars();
        let first = chars.next().filter(|c| *c != '\n').ok_or_else(|| self.expected(end))?;
        self.rest = chars.as_str();
        if first != '\\' {
            return Ok(first);
        }
        let kind = chars.next().filter(|c| *c != '\n').ok_or_else(|| self.expected(end))?;
        self.rest = chars.as_str();
        let n_digit = match kind {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            other if other.is_ascii_punctuation() => return Ok(other),
            other => return Err(self.wrong(format!("there is no escape \\{other}"))),
        };
        let digits = self.rest.get(..n_digit).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let read = digits.and_then(|d| char::from_u32(u32::from_str_radix(d, 16).ok()?));
        let read =
            read.ok_or_else(|| self.wrong(format!("\\{kind} needs {n_digit} digits of a character's number")))?;
        self.rest = &self.rest[n_digit..];
        Ok(read)
    }

    fn name(&mut self) -> Option<String> {
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let (name, rest) = self.rest.split_at(self.rest.find(|c| !is_of_name(c)).unwrap_or(self.rest.len()));
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_string())
    }

    fn index(&mut self, name: &str) -> usize {
        let n = self.rules.len();
        let index = *self.names.entry(name.to_string()).or_insert(n);
        if index == n {
            self.rules.push(None);
        }
        index
    }

    fn take(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Goes over spaces and comments, and over ends of lines with `lines`.
    fn skip(&mut self, lines: bool) {
        while let Some(first) = self.rest.chars().next() {
            match first {
                ' ' | '\t' => self.rest = &self.rest[1..],
                '\r' | '\n' if lines => {
                    self.line += usize::from(first == '\n');
                    self.rest = &self.rest[1..];
                }
                '#' => self.rest = &self.rest[self.rest.find(['\r', '\n']).unwrap_or(self.rest.len())..],
                _ => return,
            }
        }
    }

    fn expected(&self, what: &str) -> String {
        let got: String = self.rest.chars().take_while(|c| *c != '\n').take(20).collect();
        self.wrong(format!("expected {what}, got {got:?}"))
    }

    fn wrong(&self, message: String) -> String {
        format!("line {}: {message}", self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_recursive_is_a_lexeme() {
        let all = lark("root ::= ws \"a\\n\\x41\"{2,5} [^a-c\\]\\-x-]* # why\nws ::= (\" \" |\n\t.)?\n").unwrap();
        let expected = "LEXEME0: RULE0\nstart: LEXEME0\n\
            RULE0: (RULE1 (\"a\\nA\"){2,5} (/[^\\x{61}-\\x{63}\\x{5D}-\\x{5D}\\x{2D}-\\x{2D}\\x{78}-\\x{78}\\x{2D}-\\x{2D}]/)*)\n\
            RULE1: ((\" \" | /(?s:.)/))?\n";
        assert_eq!(all, expected);
        let list = lark("root ::= \"[\" ws (root | \"x\" | [0-9]+) ws \"]\"\nws ::= \" \"*").unwrap();
        let expected = "start: rule0\nLEXEME0: (\"[\" RULE1)\nLEXEME1: (\"x\" | (/[\\x{30}-\\x{39}]/)+)\n\
            LEXEME2: (RULE1 \"]\")\nrule0: (LEXEME0 (LEXEME1 | rule0) LEXEME2)\nRULE1: (\" \")*\n";
        assert_eq!(list, expected);
    }

    #[test]
    fn what_is_no_gbnf_is_told_with_its_line() {
        for (gbnf, message) in [
            ("", "there is no rule \"root\""),
            ("a ::= \"x\"", "there is no rule \"root\""),
            ("root ::= one", "there is no rule \"one\""),
            ("root ::= \"a\"\nroot ::= \"b\"", "line 2: there is a rule \"root\" already"),
            ("\n\nroot = \"a\"", "line 3: expected ::=, got \"= \\\"a\\\"\""),
            ("root ::= \"a", "line 1: expected \""),
            ("root ::= [a", "line 1: expected ]"),
            ("root ::= (\"a\"\n", "line 2: expected )"),
            ("root ::= \"a\" )", "line 1: expected the end of the line, got \")\""),
            ("root ::= []", "line 1: [] is no character"),
            ("root ::= [z-a]", "line 1: the range 'z' to 'a' is backwards"),
            ("root ::= \"\\q\"", "line 1: there is no escape \\q"),
            ("root ::= \"\\uD800\"", "line 1: \\u needs 4 digits"),
            ("root ::= \"a\"{2,1}", "line 1: expected {m}"),
            ("root ::= \"a\"{", "line 1: expected {m}"),
            ("root ::= <think>", "line 1: tokens are not supported"),
        ] {
            let e = lark(gbnf).unwrap_err();
            assert!(e.starts_with(message), "{gbnf}: {e}");
        }
    }
}
