//! Tokens that are matched on the text itself, before it is cut into words: CONTROL and USER_DEFINED ones.
//!
//! A sorted list and a binary search per byte do what a trie would, without its memory: a file may declare a hundred
//! thousand such tokens.

use std::ops::Range;

/// The special tokens of a vocabulary.
#[derive(Debug)]
pub struct SpecialTokens {
    /// Sorted by text, no text twice, none empty.
    tokens: Vec<Special>,
    /// Where in `tokens` those that start with a byte are.
    by_first_byte: Vec<Range<usize>>,
}

#[derive(Debug)]
struct Special {
    text: Box<[u8]>,
    id: u32,
    control: bool,
}

impl SpecialTokens {
    /// From (text, id, whether it is a CONTROL token). Of two with one text the first counts; empty ones do not.
    pub fn new<'a>(tokens: impl Iterator<Item = (&'a str, u32, bool)>) -> SpecialTokens {
        let mut tokens: Vec<Special> = tokens
            .filter(|(text, ..)| !text.is_empty())
            .map(|(text, id, control)| Special { text: text.as_bytes().into(), id, control })
            .collect();
        tokens.sort_by(|a, b| a.text.cmp(&b.text));
        tokens.dedup_by(|later, first| later.text == first.text);
        let all = 0..tokens.len();
        let by_first_byte = (0..=255).map(|byte| narrow(&tokens, all.clone(), 0, byte)).collect();
        SpecialTokens { tokens, by_first_byte }
    }

    /// The matches in `text`, left to right and the longest at each place, as (place, id). CONTROL tokens match only
    /// within the ranges `control`, which are sorted, disjoint and not adjacent.
    pub fn matches<'a>(
        &'a self,
        text: &'a str,
        control: &'a [Range<usize>],
    ) -> impl Iterator<Item = (Range<usize>, u32)> + 'a {
        let bytes = text.as_bytes();
        let mut spans = control.iter().peekable();
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < bytes.len() {
                let from = at;
                at += 1;
                if self.by_first_byte[usize::from(bytes[from])].is_empty() {
                    continue;
                }
                while spans.next_if(|span| span.end <= from).is_some() {}
                let control_end = spans.peek().filter(|span| span.start <= from).map_or(from, |span| span.end);
                if let Some((len, id)) = self.longest(&bytes[from..], control_end - from) {
                    at = from + len;
                    return Some((from..at, id));
                }
            }
            None
        })
    }

    /// The longest token that `text` starts with, of the CONTROL tokens only those of at most `control_len` bytes.
    fn longest(&self, text: &[u8], control_len: usize) -> Option<(usize, u32)> {
        let mut found = None;
        let mut left = self.by_first_byte[usize::from(text[0])].clone();
        for len in 1..=text.len() {
            // What is left shares its first `len` bytes with the text, so the shortest, if it ends here, comes first.
            if let Some(token) = self.tokens[left.clone()].first().filter(|token| token.text.len() == len) {
                if !token.control || len <= control_len {
                    found = Some((len, token.id));
                }
                left.start += 1;
            }
            if left.is_empty() || len == text.len() {
                break;
            }
            left = narrow(&self.tokens, left, len, text[len]);
        }
        found
    }
}

/// Of the tokens in `range`, which share their first `at` bytes and are all longer, those with `byte` next.
fn narrow(tokens: &[Special], range: Range<usize>, at: usize, byte: u8) -> Range<usize> {
    let within = &tokens[range.clone()];
    let start = within.partition_point(|token| token.text[at] < byte);
    let end = within.partition_point(|token| token.text[at] <= byte);
    range.start + start..range.start + end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> SpecialTokens {
        SpecialTokens::new(
            [("<a>", 1, true), ("<a>b", 2, false), ("<a>bc", 3, true), ("", 4, true), ("<a>", 5, true)].into_iter(),
        )
    }

    fn found(text: &str, control: &[Range<usize>]) -> Vec<(Range<usize>, u32)> {
        tokens().matches(text, control).collect()
    }

    #[test]
    fn longest_at_the_leftmost_place() {
        let whole = std::slice::from_ref(&(0..99));
        assert_eq!(found("x<a>bcd<a>", whole), [(1..6, 3), (7..10, 1)]);
        assert_eq!(found("x<a>bxd", whole), [(1..5, 2)]);
        assert_eq!(found("<<a><a", whole), [(1..4, 1)]);
        assert_eq!(found("", whole), []);
    }

    #[test]
    fn control_only_within_its_ranges() {
        assert_eq!(found("<a> <a>", &[]), []);
        assert_eq!(found("<a> <a>", std::slice::from_ref(&(4..7))), [(4..7, 1)]);
        assert_eq!(found("<a> <a>", &[0..2, 3..6]), []);
        assert_eq!(found("<a>bc<a>", &[0..4, 5..8]), [(0..4, 2), (5..8, 1)]);
    }
}
