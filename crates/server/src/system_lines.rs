//! Lines of system messages that change from request to request, as a date or a billing header: left out where whoever runs the server
//! says so, because what follows them cannot share what was computed of it.

use std::sync::atomic::{AtomicU64, Ordering};

use regex::RegexSet;
use serde_json::Value;

/// Which lines are left out, and how many were.
#[derive(Debug, Default)]
pub struct SystemLines {
    lines: RegexSet,
    n_dropped: AtomicU64,
}

impl SystemLines {
    /// Lines in which one of these regular expressions is found.
    ///
    /// # Errors
    /// What is no regular expression.
    pub fn matching(patterns: &[String]) -> Result<SystemLines, regex::Error> {
        Ok(SystemLines { lines: RegexSet::new(patterns)?, ..SystemLines::default() })
    }

    /// Lines that were left out so far.
    pub fn n_dropped(&self) -> u64 {
        self.n_dropped.load(Ordering::Relaxed)
    }

    /// Leaves them out of a conversation's system messages; what others say stays as it is.
    pub(crate) fn leave_out(&self, messages: &mut [Value]) {
        if self.lines.is_empty() {
            return;
        }
        for message in messages.iter_mut().filter(|m| m["role"] == "system") {
            if let Some(Value::String(text)) = message.get_mut("content") {
                *text = self.without(text);
            }
        }
    }

    fn without(&self, text: &str) -> String {
        let is_kept = |line: &&str| !self.lines.is_match(line.trim_end_matches(['\r', '\n']));
        let kept: Vec<&str> = text.split_inclusive('\n').filter(is_kept).collect();
        let n = text.split_inclusive('\n').count() - kept.len();
        self.n_dropped.fetch_add(n as u64, Ordering::Relaxed);
        kept.concat()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_lines_of_system_messages_that_match_are_left_out() {
        let patterns = ["^x-billing: ".to_string(), r"^Today is \d".to_string()];
        let lines = SystemLines::matching(&patterns).unwrap();
        let mut messages = [
            json!({"role": "system", "content": "x-billing: 17\nBe brief.\r\nToday is 5 May.\r\nOn x-billing: say no.\nToday is fine"}),
            json!({"role": "user", "content": "x-billing: mine"}),
        ];
        lines.leave_out(&mut messages);
        assert_eq!(messages[0]["content"], "Be brief.\r\nOn x-billing: say no.\nToday is fine");
        assert_eq!(messages[1]["content"], "x-billing: mine");
        assert_eq!(lines.n_dropped(), 2);
        assert!(SystemLines::matching(&["(".to_string()]).is_err());
    }
}
