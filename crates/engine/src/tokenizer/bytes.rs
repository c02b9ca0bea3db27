//! The byte alphabet of byte-level BPE: one printable character for each of the 256 bytes.
//!
//! Vocabularies and merges are written in this alphabet (GPT-2's), so that a token of any bytes is a valid string
//! without spaces. Text itself never passes through it here: words are merged as token ids, bytes are looked up once.

/// The printable bytes stand for themselves; the other 68, in order, are the characters from U+0100 on.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The 256 characters of the alphabet, indexed by the byte each stands for.
pub fn alphabet() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte if is_printable(byte) => char::from(byte),
        _ => others.next().expect("68 characters follow U+0100"),
    })
}

/// The way back: character to byte. The alphabet ends at U+0143.
#[derive(Debug)]
pub struct ByteOfChar([Option<u8>; 0x144]);

impl ByteOfChar {
    pub fn new() -> ByteOfChar {
        let mut bytes = [None; 0x144];
        for (byte, c) in alphabet().into_iter().enumerate() {
            bytes[c as usize] = Some(byte as u8);
        }
        ByteOfChar(bytes)
    }

    /// The byte a character stands for; `None` for a character outside the alphabet.
    pub fn get(&self, c: char) -> Option<u8> {
        self.0.get(c as usize).copied().flatten()
    }

    /// The bytes that a token's text stands for. Characters outside the alphabet stand for their own UTF-8: such
    /// text is in no byte-level vocabulary that a trainer wrote, and this way it is still shown.
    pub fn decode(&self, text: &str, out: &mut Vec<u8>) {
        for c in text.chars() {
            match self.get(c) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let back = ByteOfChar::new();
        let alphabet = alphabet();
        for byte in 0..=255u8 {
            assert_eq!(back.get(alphabet[usize::from(byte)]), Some(byte));
        }
        assert_eq!((alphabet[0x20], alphabet[0x0A], alphabet[0xAD]), ('Ġ', 'Ċ', 'Ń'));
        assert_eq!((back.get(' '), back.get('\u{144}'), back.get('字')), (None, None, None));
    }

    #[test]
    fn decode_keeps_foreign_characters() {
        let mut out = Vec::new();
        ByteOfChar::new().decode("Ġa字Ċ", &mut out);
        assert_eq!(out, " a字\n".as_bytes());
    }
}
