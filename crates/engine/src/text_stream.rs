//! Turns the bytes of generated tokens into text that can be printed as it comes.
//!
//! A token is any run of bytes: it may end inside a UTF-8 character, and a stop string may begin in one token and end
//! in a later one. The stream holds back what it cannot yet judge, so that what it gives out is final.

/// Bytes in, printable text out, up to the first stop string.
///
/// The texts given out, joined, are what [`String::from_utf8_lossy`] makes of all bytes, up to where the first stop
/// string begins, however the bytes are cut into pushes.
#[derive(Debug, Clone)]
pub struct TextStream {
    /// The stop strings in the caller's order; empty ones never match.
    stop: Vec<String>,
    /// The start of a UTF-8 character whose end has not come, at most three bytes.
    partial: Vec<u8>,
    /// Decoded text that may still become a stop string.
    held: String,
    stopped: Option<usize>,
}

/// What one push gives out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// Text that is final: print it.
    pub text: String,
    /// Index of the stop string that has been reached. It and what follows it is in no text; later pushes give nothing.
    pub stopped: Option<usize>,
}

impl TextStream {
    /// A stream that ends before the first of the `stop` strings to be complete; of several that one character
    /// completes, before the one that begins first, and of equal beginnings the first in the list.
    pub fn new(stop: Vec<String>) -> Self {
        Self { stop, partial: Vec::new(), held: String::new(), stopped: None }
    }

    /// From now on these strings end it.
    pub fn stop_at(&mut self, stop: Vec<String>) {
        self.stop = stop;
    }

    /// Takes the bytes of a token and gives out the text that they settle.
    pub fn push(&mut self, bytes: &[u8]) -> Delta {
        if self.stopped.is_some() {
            return Delta { text: String::new(), stopped: self.stopped };
        }
        self.partial.extend_from_slice(bytes);
        let mut fresh = String::new();
        let mut rest: &[u8] = &self.partial;
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    fresh.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    fresh.push_str(std::str::from_utf8(valid).expect("checked up to here"));
                    rest = after;
                    // Without a length the bytes are a character's beginning: its end may come.
                    let Some(invalid) = error.error_len() else { break };
                    fresh.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                }
            }
        }
        self.partial = rest.to_vec();
        self.give(&fresh)
    }

    /// Ends the stream: what was held back for a stop string is final, and half a character becomes U+FFFD.
    pub fn finish(&mut self) -> Delta {
        if self.stopped.is_some() {
            return Delta { text: String::new(), stopped: self.stopped };
        }
        let end = if self.partial.is_empty() { "" } else { "\u{FFFD}" };
        self.partial.clear();
        let mut delta = self.give(end);
        if delta.stopped.is_none() {
            delta.text.push_str(&std::mem::take(&mut self.held));
        }
        delta
    }

    /// Appends decoded text and gives out what can no longer be part of a stop string.
    fn give(&mut self, fresh: &str) -> Delta {
        let old = self.held.len();
        self.held.push_str(fresh);
        if let Some((index, start)) = self.first_stop(old) {
            self.held.truncate(start);
            self.stopped = Some(index);
            return Delta { text: std::mem::take(&mut self.held), stopped: self.stopped };
        }
        let kept = self.stop.iter().map(|stop| beginning_at_end(&self.held, stop)).max().unwrap_or(0);
        let after = self.held.split_off(self.held.len() - kept);
        Delta { text: std::mem::replace(&mut self.held, after), stopped: None }
    }

    /// The stop string that is complete first, with the place where it begins. None ends within the first `old` bytes.
    fn first_stop(&self, old: usize) -> Option<(usize, usize)> {
        let matches = self.stop.iter().enumerate().filter(|(_, stop)| !stop.is_empty()).filter_map(|(index, stop)| {
            let mut from = (old + 1).saturating_sub(stop.len());
            while !self.held.is_char_boundary(from) {
                from -= 1;
            }
            let start = from + self.held[from..].find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        matches.min().map(|(_, start, index)| (index, start))
    }
}

/// Length in bytes of the longest end of `text` with which `stop` begins, short of the whole stop string.
fn beginning_at_end(text: &str, stop: &str) -> usize {
    let longest = stop.len().saturating_sub(1).min(text.len());
    (1..=longest).rev().find(|len| text.as_bytes().ends_with(&stop.as_bytes()[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(stop: &[&str]) -> TextStream {
        TextStream::new(stop.iter().map(|s| (*s).to_owned()).collect())
    }

    fn delta(text: &str, stopped: Option<usize>) -> Delta {
        Delta { text: text.to_owned(), stopped }
    }

    #[test]
    fn half_a_character_waits_for_its_end() {
        let mut stream = stops(&[]);
        assert_eq!(stream.push(b"a\xf0\x9f"), delta("a", None));
        assert_eq!(stream.push(b"\x98"), delta("", None));
        assert_eq!(stream.push(b"\x80b"), delta("\u{1F600}b", None));
        assert_eq!(stream.push(b"\xe2\x82"), delta("", None));
        assert_eq!(stream.push(b"x"), delta("\u{FFFD}x", None));
        assert_eq!(stream.push(b"\xff\xc3"), delta("\u{FFFD}", None));
        assert_eq!(stream.finish(), delta("\u{FFFD}", None));
        assert_eq!(stream.finish(), delta("", None));
    }

    #[test]
    fn a_stop_string_is_held_back_and_never_shown() {
        let mut stream = stops(&["</end>", "STOP"]);
        assert_eq!(stream.push(b"one </e"), delta("one ", None));
        assert_eq!(stream.push(b"x ST"), delta("</ex ", None));
        assert_eq!(stream.push(b"STO"), delta("ST", None));
        assert_eq!(stream.push(b"P more"), delta("", Some(1)));
        assert_eq!(stream.push(b"later"), delta("", Some(1)));
        assert_eq!(stream.finish(), delta("", Some(1)));
    }

    #[test]
    fn the_first_complete_stop_string_wins() {
        assert_eq!(stops(&["bcd", "bc", "abc"]).push(b"xabcd"), delta("x", Some(2)));
        assert_eq!(stops(&["b", "b"]).push(b"ab"), delta("a", Some(0)));
        let mut stream = stops(&["", "\n\n"]);
        assert_eq!(stream.push(b"a\n"), delta("a", None));
        assert_eq!(stream.finish(), delta("\n", None));
        let mut accented = stops(&["\u{e9}t\u{e9}"]);
        assert_eq!(accented.push("l'\u{e9}t".as_bytes()), delta("l'", None));
        assert_eq!(accented.push(b"\xc3"), delta("", None));
        assert_eq!(accented.push(b"\xa9!"), delta("", Some(0)));
        assert_eq!(stops(&["\u{FFFD}!"]).push(b"a\xff!"), delta("a", Some(0)));
    }

    /// The definition: decode all, find the stop string that ends first.
    fn expected(bytes: &[u8], stop: &[String]) -> (String, Option<usize>) {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let found = stop.iter().enumerate().filter(|(_, s)| !s.is_empty());
        let found = found.filter_map(|(i, s)| text.find(s.as_str()).map(|at| (at + s.len(), at, i))).min();
        match found {
            Some((_, at, index)) => (text[..at].to_owned(), Some(index)),
            None => (text, None),
        }
    }

    fn fragments() -> impl Strategy<Value = Vec<u8>> {
        let pool = ["a", "b", "ab", "é", "€", "😀", "\u{FFFD}"];
        let known = prop::sample::select(pool.to_vec()).prop_map(|s| s.as_bytes().to_vec());
        let cut = prop::sample::select(vec![vec![0xe2, 0x82], vec![0xf0, 0x9f], vec![0xc3], vec![0xff], vec![0x80]]);
        prop::collection::vec(prop_oneof![4 => known, 1 => cut], 0..40).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_text(
            bytes in fragments(),
            stop in prop::collection::vec("[ab€é\u{FFFD}]{0,4}", 0..4),
            sizes in prop::collection::vec(1usize..6, 1..30),
        ) {
            let mut stream = TextStream::new(stop.clone());
            let (mut text, mut stopped, mut rest) = (String::new(), None, &bytes[..]);
            let mut sizes = sizes.iter().cycle();
            while !rest.is_empty() {
                let size = (*sizes.next().unwrap()).min(rest.len());
                let (chunk, after) = rest.split_at(size);
                rest = after;
                let delta = stream.push(chunk);
                text.push_str(&delta.text);
                stopped = delta.stopped;
                prop_assert!(expected(&bytes, &stop).0.starts_with(&text), "{text:?} shown too early");
            }
            let delta = stream.finish();
            text.push_str(&delta.text);
            stopped = stopped.or(delta.stopped);
            prop_assert_eq!((text, stopped), expected(&bytes, &stop));
        }
    }
}
