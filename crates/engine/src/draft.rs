//! Guesses the next tokens of a text from the text itself: where its latest tokens occurred before, what followed them may follow again.
//!
//! Answers that quote, edit or summarise their prompt, and code, repeat long runs of it. The idea is prompt lookup decoding (Saxena
//! 2023); a run that reaches the end of the text goes on from its own copy, as in LZ77 (Ziv and Lempel 1977), so that loops are guessed
//! for as long as one likes. Nothing here knows of a model: a guess costs a look into a hash table.

use std::collections::HashMap;

/// Tokens that must agree before what followed them is a guess.
pub const MATCH_MIN: usize = 3;
/// Occurrences that are held against each other, latest first.
const N_CANDIDATE: usize = 32;
/// Tokens up to which occurrences are compared; of those that agree further the latest is as good as any.
const COMPARED_MAX: usize = 64;
/// No such position.
const NONE: u32 = u32::MAX;

/// A text, and where its latest tokens occurred before.
///
/// While the text repeats an earlier run, it stays with that run; when it leaves it, the longest of the latest 32 earlier occurrences of
/// its last [`MATCH_MIN`] tokens is next. A token takes constant time, however long the text is.
#[derive(Clone, Debug, Default)]
pub struct Drafter {
    tokens: Vec<u32>,
    /// Where each run of [`MATCH_MIN`] tokens last ended.
    latest: HashMap<[u32; MATCH_MIN], u32>,
    /// By the position of a run's end: where the same run ended before, or [`NONE`].
    earlier: Vec<u32>,
    source: Option<Source>,
}

/// An earlier run that the end of the text repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// Position after the run: its token is the guess.
    next: usize,
    /// Tokens known to agree.
    length: usize,
}

/// What was guessed of a token before it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// Tokens before it that agreed with the run it was copied from.
    pub length: usize,
    pub was_right: bool,
}

impl Drafter {
    /// Appends a token, and says what had been guessed of it.
    pub fn push(&mut self, token: u32) -> Option<Guess> {
        let before = self.source.take();
        let guess = before.map(|s| Guess { length: s.length, was_right: self.tokens[s.next] == token });
        self.tokens.push(token);
        let run = self.tokens.last_chunk::<MATCH_MIN>().copied();
        let earlier = run.and_then(|run| self.latest.insert(run, (self.tokens.len() - 1) as u32)).unwrap_or(NONE);
        self.earlier.push(earlier);
        self.source = match (before, guess) {
            (Some(s), Some(Guess { was_right: true, .. })) => Some(Source { next: s.next + 1, length: s.length + 1 }),
            _ => self.longest(earlier),
        };
        guess
    }

    /// Tokens that agree with the run that the next tokens are guessed from; `None` where nothing is guessed.
    pub fn length(&self) -> Option<usize> {
        self.source.map(|s| s.length)
    }

    /// The next `n` tokens, if the text goes on as it did before; none where its end is new.
    pub fn draft(&self, n: usize) -> impl Iterator<Item = u32> {
        let from = self.source.map_or(&[][..], |s| &self.tokens[s.next..]);
        from.iter().copied().cycle().take(n)
    }

    /// The longest of the runs that end as the text does, where the latest of them ends at `end`.
    fn longest(&self, mut end: u32) -> Option<Source> {
        let mut best: Option<Source> = None;
        for _ in 0..N_CANDIDATE {
            if end == NONE {
                break;
            }
            let next = end as usize + 1;
            let pairs = self.tokens[..next].iter().rev().zip(self.tokens.iter().rev());
            let length = pairs.take(COMPARED_MAX).take_while(|(a, b)| a == b).count();
            if best.is_none_or(|b| length > b.length) {
                best = Some(Source { next, length });
            }
            if length == COMPARED_MAX {
                break;
            }
            end = self.earlier[end as usize];
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafter(tokens: &[u32]) -> Drafter {
        let mut d = Drafter::default();
        tokens.iter().for_each(|&t| {
            d.push(t);
        });
        d
    }

    fn draft(tokens: &[u32], n: usize) -> Vec<u32> {
        drafter(tokens).draft(n).collect()
    }

    #[test]
    fn nothing_is_guessed_of_what_is_new() {
        for tokens in [&[][..], &[1], &[1, 1, 1], &[1, 2, 3, 4, 5, 6], &[1, 2, 3, 9, 2, 3]] {
            assert_eq!((draft(tokens, 5), drafter(tokens).length()), (vec![], None), "{tokens:?}");
        }
    }

    #[test]
    fn what_followed_follows_again() {
        let text = [7, 1, 2, 3, 4, 5, 6, 8, 1, 2, 3];
        assert_eq!(draft(&text, 4), [4, 5, 6, 8]);
        assert_eq!(drafter(&text).length(), Some(3));
        assert!(draft(&text, 0).is_empty());
    }

    #[test]
    fn a_run_that_reaches_the_end_goes_on_from_its_copy() {
        assert_eq!(draft(&[1, 2, 1, 2, 1], 7), [2, 1, 2, 1, 2, 1, 2]);
        assert_eq!(draft(&[5, 5, 5, 5], 3), [5, 5, 5]);
    }

    #[test]
    fn the_longest_of_several_runs_is_taken_and_of_equals_the_latest() {
        let text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 7, 1, 2, 3, 4];
        assert_eq!(draft(&text, 1), [50], "four tokens agree, of the later run three");
        assert_eq!(drafter(&text).length(), Some(4));
        let text = [8, 2, 3, 4, 50, 9, 2, 3, 4, 60, 7, 2, 3, 4];
        assert_eq!(draft(&text, 1), [60]);
    }

    #[test]
    fn guesses_are_told_when_the_token_comes() {
        let mut d = drafter(&[1, 2, 3, 4, 5, 9, 1, 2, 3]);
        assert_eq!(d.push(4), Some(Guess { length: 3, was_right: true }));
        assert_eq!((d.length(), d.draft(2).collect::<Vec<_>>()), (Some(4), vec![5, 9]));
        assert_eq!(d.push(77), Some(Guess { length: 4, was_right: false }));
        assert_eq!((d.length(), d.push(78)), (None, None));
    }

    #[test]
    fn a_run_that_is_left_makes_room_for_another() {
        let mut d = drafter(&[1, 2, 3, 4, 5, 6, 0, 3, 4, 9, 10, 11, 0, 1, 2, 3, 4]);
        assert_eq!(d.draft(1).collect::<Vec<_>>(), [5]);
        d.push(9);
        assert_eq!((d.length(), d.draft(2).collect::<Vec<_>>()), (Some(3), vec![10, 11]));
    }

    #[test]
    fn a_run_is_followed_however_long_it_is() {
        // Comparing it anew for every token would take minutes.
        assert_eq!(drafter(&vec![1; 1_000_000]).length(), Some(999_999));
    }
}
