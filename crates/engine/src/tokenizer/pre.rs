//! Pre-tokenizers: text into the words that BPE merges within.
//!
//! `tokenizer.ggml.pre` names a regular expression that the model was trained with. Each is a scanner by hand here: it
//! looks at a character at most a few times, where a backtracking engine can be made to look without end. `\p{L}`,
//! `\p{N}` and `\p{P}` are Unicode general categories, `\s` is the property White_Space.

use unicode_general_category::{GeneralCategory as Category, get_general_category};

/// Accepted values of `tokenizer.ggml.pre`, as an error lists them.
pub const SUPPORTED: &str = "qwen2, llama-bpe (llama3, llama-v3), smollm, gpt-2, default";

/// A pre-tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pre {
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Qwen2,
    /// Qwen2's expression with `\p{N}{1,3}` in place of `\p{N}`.
    Llama3,
    /// Each `\p{N}` alone, then GPT-2's expression on what lies between.
    Smollm,
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// llama.cpp's expressions for files that name no other, each applied to the pieces of the one before:
    /// ``[\p{P}\$\+<=>\^~\|]+``, GPT-2's, `\p{N}+`, `[0-9][0-9][0-9]`.
    Default,
}

impl Pre {
    /// The pre-tokenizer of a `tokenizer.ggml.pre`; `None` for a name that is not supported.
    pub fn from_name(name: &str) -> Option<Pre> {
        match name {
            "qwen2" => Some(Pre::Qwen2),
            "llama-bpe" | "llama3" | "llama-v3" => Some(Pre::Llama3),
            "smollm" => Some(Pre::Smollm),
            "gpt-2" => Some(Pre::Gpt2),
            "default" => Some(Pre::Default),
            _ => None,
        }
    }

    /// Whether text is brought to NFC before it is cut.
    pub fn normalizes(self) -> bool {
        self == Pre::Qwen2
    }

    /// Whether a word that is a token is that token, whatever the merges would make of it.
    pub fn takes_whole_words(self) -> bool {
        self == Pre::Llama3
    }

    /// Whether a file that does not say so (`tokenizer.ggml.add_bos_token`) wants its BOS in front.
    pub fn adds_bos(self) -> bool {
        self == Pre::Llama3
    }

    /// Cuts `text` into words, in order and without gaps.
    pub fn split(self, text: &str, word: &mut dyn FnMut(&str)) {
        match self {
            Pre::Qwen2 => cut(text, |rest| first_word_qwen2(rest, 1), word),
            Pre::Llama3 => cut(text, |rest| first_word_qwen2(rest, 3), word),
            Pre::Gpt2 => cut(text, first_word_gpt2, word),
            Pre::Smollm => cut(text, first_single_number, &mut |piece| cut(piece, first_word_gpt2, word)),
            Pre::Default => cut(text, |rest| first_run(rest, is_default_punctuation), &mut |piece| {
                cut(piece, first_word_gpt2, &mut |piece| {
                    cut(piece, |rest| first_run(rest, is_number), &mut |piece| {
                        cut(piece, first_three_digits, word);
                    });
                });
            }),
        }
    }
}

/// Hands out the words of `text`; `first` gives the length in bytes of the first word of a text that is not empty.
fn cut(text: &str, first: impl Fn(&str) -> usize, word: &mut dyn FnMut(&str)) {
    let mut rest = text;
    while !rest.is_empty() {
        let (head, tail) = rest.split_at(first(rest));
        word(head);
        rest = tail;
    }
}

/// The first match of Qwen2's expression, with at most `max_numbers` characters of `\p{N}` in a word.
fn first_word_qwen2(text: &str, max_numbers: usize) -> usize {
    if let Some(len) = contraction(text, true) {
        return len;
    }
    let (c, rest) = split_first(text);
    let len = c.len_utf8();
    if is_letter(c) || (!is_newline(c) && !is_number(c) && rest.starts_with(is_letter)) {
        return len + run(rest, is_letter);
    }
    if is_number(c) {
        return text.chars().take(max_numbers).take_while(|&c| is_number(c)).map(char::len_utf8).sum();
    }
    let space = usize::from(c == ' ');
    let symbols = run(&text[space..], is_symbol);
    if symbols > 0 {
        let end = space + symbols;
        return end + run(&text[end..], is_newline);
    }
    let blank = run(text, char::is_whitespace);
    match text[..blank].rfind(is_newline) {
        Some(last) => last + 1,
        None => blank_word(text, blank),
    }
}

/// The first match of GPT-2's expression.
fn first_word_gpt2(text: &str) -> usize {
    if let Some(len) = contraction(text, false) {
        return len;
    }
    let space = usize::from(text.starts_with(' '));
    for class in [is_letter, is_number, is_symbol] {
        let len = run(&text[space..], class);
        if len > 0 {
            return space + len;
        }
    }
    blank_word(text, run(text, char::is_whitespace))
}

/// `\s+(?!\S)|\s+` on a text that starts with `blank` bytes of white space: without the last character, which belongs
/// to the word after it, unless it is the only one or nothing follows.
fn blank_word(text: &str, blank: usize) -> usize {
    let last = text[..blank].chars().next_back().map_or(0, char::len_utf8);
    if blank == text.len() || blank == last { blank } else { blank - last }
}

/// The English contractions that both expressions start with. `any_case` is Unicode's simple case folding, by which
/// the long s is an s too.
fn contraction(text: &str, any_case: bool) -> Option<usize> {
    let rest = text.strip_prefix('\'')?;
    let fold = |c: char| match c {
        'ſ' if any_case => 's',
        c if any_case => c.to_ascii_lowercase(),
        c => c,
    };
    let mut chars = rest.chars();
    let first = chars.next()?;
    match (fold(first), chars.next().map(fold)) {
        ('s' | 't' | 'm' | 'd', _) => Some(1 + first.len_utf8()),
        ('r' | 'v', Some('e')) | ('l', Some('l')) => Some(3),
        _ => None,
    }
}

/// One `\p{N}`, or everything before the next one.
fn first_single_number(text: &str) -> usize {
    let (c, _) = split_first(text);
    if is_number(c) { c.len_utf8() } else { run(text, |c| !is_number(c)) }
}

/// A run of characters that are all of a class, or all not.
fn first_run(text: &str, class: fn(char) -> bool) -> usize {
    let inside = class(split_first(text).0);
    run(text, |c| class(c) == inside)
}

/// Three ASCII digits, or everything before the next three.
fn first_three_digits(text: &str) -> usize {
    let three = |at: &[u8]| at.iter().all(u8::is_ascii_digit);
    match text.as_bytes().windows(3).position(three) {
        Some(0) => 3,
        Some(at) => at,
        None => text.len(),
    }
}

/// The length in bytes of the run of `class` that `text` starts with.
fn run(text: &str, class: impl Fn(char) -> bool) -> usize {
    text.find(|c| !class(c)).unwrap_or(text.len())
}

fn split_first(text: &str) -> (char, &str) {
    let mut chars = text.chars();
    let c = chars.next().expect("a word starts with a character");
    (c, chars.as_str())
}

fn is_newline(c: char) -> bool {
    c == '\r' || c == '\n'
}

/// `\p{L}`
fn is_letter(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_alphabetic();
    }
    matches!(
        get_general_category(c),
        Category::UppercaseLetter
            | Category::LowercaseLetter
            | Category::TitlecaseLetter
            | Category::ModifierLetter
            | Category::OtherLetter
    )
}

/// `\p{N}`
fn is_number(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_digit();
    }
    matches!(get_general_category(c), Category::DecimalNumber | Category::LetterNumber | Category::OtherNumber)
}

/// `[^\s\p{L}\p{N}]`
fn is_symbol(c: char) -> bool {
    !c.is_whitespace() && !is_letter(c) && !is_number(c)
}

/// ``[\p{P}\$\+<=>\^~\|]``: all of ASCII's punctuation but the grave accent.
fn is_default_punctuation(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_punctuation() && c != '`';
    }
    matches!(
        get_general_category(c),
        Category::ConnectorPunctuation
            | Category::DashPunctuation
            | Category::OpenPunctuation
            | Category::ClosePunctuation
            | Category::InitialPunctuation
            | Category::FinalPunctuation
            | Category::OtherPunctuation
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(pre: Pre, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        pre.split(text, &mut |word| words.push(word.to_owned()));
        words
    }

    #[test]
    fn qwen2_by_hand() {
        for (text, expected) in [
            ("", &[][..]),
            ("Hello world", &["Hello", " world"]),
            ("I'M it'ſo 'll", &["I", "'M", " it", "'ſ", "o", " '", "ll"]),
            ("a1234", &["a", "1", "2", "3", "4"]),
            ("x == y;\r\n\n  z", &["x", " ==", " y", ";\r\n\n", " ", " z"]),
            (" \n \t\tz", &[" \n", " \t", "\tz"]),
            ("end   ", &["end", "   "]),
            ("\u{a0}b \u{3000}!", &["\u{a0}b", " ", "\u{3000}", "!"]),
        ] {
            assert_eq!(words(Pre::Qwen2, text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_others_differ_where_they_should() {
        assert_eq!(words(Pre::Llama3, "a12345 678"), ["a", "123", "45", " ", "678"]);
        assert_eq!(
            words(Pre::Gpt2, "it's IT'S 1234 !?\n\n x"),
            ["it", "'s", " IT", "'", "S", " 1234", " !?", "\n\n", " x"]
        );
        assert_eq!(words(Pre::Smollm, "a  12 b²"), ["a", "  ", "1", "2", " b", "²"]);
    }

    #[test]
    fn default_cuts_four_times() {
        for (text, expected) in [
            // Punctuation stands alone, also within and before words, so contractions are cut like the rest.
            ("Hello, (world)!", &["Hello", ",", " ", "(", "world", ")!"][..]),
            ("don't 'll", &["don", "'", "t", " ", "'", "ll"]),
            // Symbols that are no punctuation keep GPT-2's leading space; the grave accent is one.
            ("a €5 `b` ©", &["a", " €", "5", " `", "b", "`", " ©"]),
            ("a $<=>^~|+b", &["a", " ", "$<=>^~|+", "b"]),
            ("、。字", &["、。", "字"]),
            // Numbers leave their space behind and are cut by threes from the left.
            (" 12345678", &[" ", "123", "456", "78"]),
            ("1234５678x", &["123", "4５", "678", "x"]),
            ("a  \n b", &["a", "  \n", " b"]),
        ] {
            assert_eq!(words(Pre::Default, text), expected, "{text:?}");
        }
    }

    #[test]
    fn words_are_the_text_again() {
        let text = "a'S  \r\n\t１２3x́ \u{85}\u{2028}字、'ſ' '\u{200d}…  ";
        for pre in [Pre::Qwen2, Pre::Llama3, Pre::Smollm, Pre::Gpt2, Pre::Default] {
            let words = words(pre, text);
            assert_eq!(words.concat(), text);
            assert!(words.iter().all(|word| !word.is_empty()), "{pre:?}");
        }
    }
}
