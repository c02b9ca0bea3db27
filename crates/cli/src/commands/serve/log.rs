//! What a server says on stderr: a line for every request and some of its own, as text or as JSON.

use std::io;

use clap::ArgAction;
use tracing::Level;

use crate::print;

/// What is logged, and how.
#[derive(clap::Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Form of the lines on stderr: text or json
    #[arg(long, env = "APR_LOG_FORMAT", default_value = "text", value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: String,
    /// Log requests to /health and /metrics too; twice: also what connections do
    #[arg(long, short, action = ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Log no requests but those that failed by the server's own fault
    #[arg(long, short)]
    quiet: bool,
}

impl LogArgs {
    /// From now on it is logged. Control characters of strangers come out escaped.
    pub fn start(&self) {
        let level = match (self.quiet, self.verbose) {
            (true, _) => Level::WARN,
            (false, 0) => Level::INFO,
            (false, 1) => Level::DEBUG,
            _ => Level::TRACE,
        };
        let lines = tracing_subscriber::fmt().with_max_level(level).with_writer(|| Stderr).with_ansi(false);
        // Where stderr is closed there is nobody to be told of that.
        let lines = lines.with_target(false).log_internal_errors(false);
        match self.is_json() {
            true => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
            false => lines.init(),
        }
    }

    /// Says something that is always said: a line of its own in text, an event in JSON.
    pub fn say(&self, text: std::fmt::Arguments<'_>) {
        match self.is_json() {
            true => print::say(serde_json::json!({"level": "INFO", "message": text.to_string()})),
            false => print::say(text),
        }
    }

    fn is_json(&self) -> bool {
        self.log_format == "json"
    }
}

/// stderr, shared with the bar that shows how far the reading is.
struct Stderr;

impl io::Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        print::say(String::from_utf8_lossy(line).trim_end());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
