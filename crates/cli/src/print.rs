//! Printing: text from strangers is made harmless on a terminal, numbers get units.

use std::fmt::Display;
use std::io::{IsTerminal, Write};

/// Standard output for text of a model: control characters that could steer a terminal are dropped where one is listening.
pub struct ModelOut {
    out: std::io::Stdout,
    is_terminal: bool,
}

impl ModelOut {
    pub fn new() -> ModelOut {
        let out = std::io::stdout();
        let is_terminal = out.is_terminal();
        ModelOut { out, is_terminal }
    }

    /// Writes a piece and makes it visible at once.
    pub fn write(&mut self, text: &str) -> std::io::Result<()> {
        let mut out = self.out.lock();
        if self.is_terminal {
            out.write_all(harmless(text).as_bytes())?
        } else {
            out.write_all(text.as_bytes())?
        }
        out.flush()
    }
}

/// Says something to whoever runs the command. That nobody listens is no reason to fail.
pub fn say(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{}", harmless(&text.to_string()));
}

/// A JSON value on one line, with every control character escaped: JSON itself asks that of those below space only, and a terminal
/// obeys those from U+0080 on as well.
pub fn one_line(value: &serde_json::Value) -> String {
    let mut line = String::new();
    for c in value.to_string().chars() {
        match c {
            '\u{7f}'..='\u{9f}' => line.push_str(&format!("\\u{:04x}", c as u32)),
            c => line.push(c),
        }
    }
    line
}

/// Text without control characters, newline and tab excepted.
pub fn harmless(text: &str) -> String {
    text.chars().filter(|&c| c == '\n' || c == '\t' || !c.is_control()).collect()
}

/// Bytes as a person reads them, in powers of ten.
pub fn bytes(n: u64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.iter().find(|(unit, _)| n as f64 >= *unit) {
        Some((unit, name)) => format!("{:.2} {name}", n as f64 / unit),
        None => format!("{n} B"),
    }
}

/// The command as it was typed, for reports.
pub fn command_line() -> String {
    let quoted = |arg: String| match arg.chars().all(|c| c.is_ascii_alphanumeric() || "-_./,:=+%@".contains(c)) {
        true if !arg.is_empty() => arg,
        _ => format!("'{}'", arg.replace('\'', r"'\''")),
    };
    let args = std::env::args_os().skip(1).map(|arg| quoted(arg.to_string_lossy().into_owned()));
    std::iter::once("apr".to_string()).chain(args).collect::<Vec<_>>().join(" ")
}

/// A number for JSON, which has no infinity: what is beyond all numbers is null.
pub fn number(x: f64) -> serde_json::Value {
    serde_json::json!(x.is_finite().then_some(x))
}
