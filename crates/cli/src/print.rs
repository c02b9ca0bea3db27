//! Printing: text from strangers is made harmless on a terminal, numbers get units.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use apr_engine::loading::Progress;

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
            bar(Bar::Ended);
        }
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
    bar(Bar::Hidden);
    let _ = writeln!(std::io::stderr(), "{}", harmless(&text.to_string()));
}

/// How long a reading may take before it is worth a word.
const PATIENCE: Duration = Duration::from_millis(500);
/// Characters of a whole bar.
const BAR_WIDTH: usize = 30;

/// The line on the terminal that says how far the reading is.
enum Bar {
    Hidden,
    Shown(String),
    /// The terminal belongs to the answer.
    Ended,
}

static BAR: Mutex<Bar> = Mutex::new(Bar::Hidden);

/// Puts the bar on the terminal or takes it away. Once ended it never comes back.
fn bar(new: Bar) {
    let mut bar = BAR.lock().unwrap_or_else(|e| e.into_inner());
    let mut err = std::io::stderr();
    let _ = match (&*bar, &new) {
        (Bar::Ended, _) => return,
        // To the first column, and erase the line.
        (_, Bar::Shown(text)) => write!(err, "\r\x1b[K{text}").and_then(|()| err.flush()),
        (Bar::Shown(_), _) => write!(err, "\r\x1b[K").and_then(|()| err.flush()),
        (Bar::Hidden, _) => Ok(()),
    };
    *bar = new;
}

/// Shows how far the reading of a model is while something else is done: a bar on a terminal, else a line when it turns out to take a
/// while and one at its end.
pub fn show_reading(progress: Arc<Progress>) {
    if progress.is_done() {
        return;
    }
    let show = move || {
        let (start, is_terminal, mut said) = (Instant::now(), std::io::stderr().is_terminal(), false);
        while !progress.is_done() {
            std::thread::sleep(Duration::from_millis(100));
            if start.elapsed() < PATIENCE || progress.is_done() {
                continue;
            }
            if is_terminal {
                bar(Bar::Shown(bar_text(progress.n_read(), progress.n_bytes(), start.elapsed())));
            } else if !said {
                said = true;
                say(format_args!("reading {} of weights from disk", bytes(progress.n_bytes())));
            }
        }
        if is_terminal {
            bar(Bar::Hidden);
        } else if said {
            let (n, seconds) = (progress.n_read(), start.elapsed().as_secs_f64());
            say(format_args!("read {} in {seconds:.1} s, {}/s", bytes(n), bytes((n as f64 / seconds) as u64)));
        }
    };
    // Without a thread there is no bar, and no reason to fail.
    let _ = std::thread::Builder::new().name("apr-progress".to_string()).spawn(show);
}

/// Puts a line on a terminal until the next one or something said; elsewhere nobody could see it change.
pub fn show_status(text: String) {
    if std::io::stderr().is_terminal() {
        bar(Bar::Shown(text));
    }
}

/// `reading [#####.....] 1.20 GB of 3.46 GB, 1.81 GB/s`
fn bar_text(n: u64, n_all: u64, elapsed: Duration) -> String {
    let full = (n as f64 / n_all.max(1) as f64 * BAR_WIDTH as f64) as usize;
    let (done, open) = ("#".repeat(full), ".".repeat(BAR_WIDTH.saturating_sub(full)));
    let rate = bytes((n as f64 / elapsed.as_secs_f64()) as u64);
    format!("reading [{done}{open}] {} of {}, {rate}/s", bytes(n), bytes(n_all))
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

/// A time in seconds since 1970 as RFC 3339 writes it, in UTC.
pub fn rfc3339(unix_s: u64) -> String {
    let (mut days, second) = (unix_s / 86_400, unix_s % 86_400);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", month + 1, days + 1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_as_long_as_the_share_that_is_read() {
        let at = |n| bar_text(n, 3_000_000_000, Duration::from_secs(2));
        assert_eq!(at(0), format!("reading [{}] 0 B of 3.00 GB, 0 B/s", ".".repeat(30)));
        let third = format!("reading [{}{}] 1.00 GB of 3.00 GB, 500.00 MB/s", "#".repeat(10), ".".repeat(20));
        assert_eq!(at(1_000_000_000), third);
        assert!(at(3_000_000_000).contains(&"#".repeat(30)));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(rfc3339(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
