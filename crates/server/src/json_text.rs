//! Text of a JSON body that every sender gets read: bytes that are no UTF-8 and escapes of half a character become U+FFFD.
//!
//! JSON allows `"\ud83d"` alone, and clients that cut text by UTF-16 units send it; serde_json refuses it, because no Rust string
//! can hold it.

use std::borrow::Cow;

/// A body as text that serde_json reads.
pub(crate) fn readable(body: &[u8]) -> Cow<'_, str> {
    match String::from_utf8_lossy(body) {
        Cow::Borrowed(text) => without_lone_surrogates(text),
        Cow::Owned(text) => Cow::Owned(without_lone_surrogates(&text).into_owned()),
    }
}

/// The same text, with `\ufffd` for every escaped surrogate that has no other half.
fn without_lone_surrogates(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let (mut out, mut copied, mut i) = (String::new(), 0, 0);
    while let Some(backslash) = bytes[i..].iter().position(|b| *b == b'\\') {
        i += backslash;
        let n_escape = match (escaped(bytes, i), escaped(bytes, i + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => 12,
            (Some(0xd800..0xe000), _) => {
                out.push_str(&text[copied..i]);
                out.push_str("\\ufffd");
                copied = i + 6;
                6
            }
            // The character after a backslash is none of its own: `\\` escapes a backslash.
            _ => 2,
        };
        i = (i + n_escape).min(bytes.len());
    }
    match copied {
        0 => Cow::Borrowed(text),
        _ => Cow::Owned(out + &text[copied..]),
    }
}

/// The number that `\uXXXX` at place `i` writes.
fn escaped(bytes: &[u8], i: usize) -> Option<u16> {
    let digits = bytes.get(i..i + 6)?.strip_prefix(b"\\u")?;
    let text = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u16::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn reads(json: &str, expected: &str) {
        let text = readable(json.as_bytes());
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), expected, "{json}");
    }

    #[test]
    fn half_a_character_is_replaced_and_nothing_else() {
        reads(r#""a\ud83d""#, "a\u{fffd}");
        reads(r#""\udc00\ud83d\ude00""#, "\u{fffd}\u{1f600}");
        reads(r#""\ud83d\ud83d\ude00x""#, "\u{fffd}\u{1f600}x");
        reads(r#""\\ud83d \\\ud83d""#, "\\ud83d \\\u{fffd}");
        reads(r#""\u0000\u00e9 é""#, "\0é é");
    }

    #[test]
    fn what_is_well_formed_is_not_copied() {
        assert!(matches!(readable(br#"{"a":"\ud83d\ude00 \\ \n"}"#), Cow::Borrowed(_)));
        assert_eq!(readable(b"\"\xff\""), "\"\u{fffd}\"");
        assert_eq!(readable(b"\"\\"), "\"\\");
        assert_eq!(readable(b"\"\\ud83"), "\"\\ud83");
    }
}
