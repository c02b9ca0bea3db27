//! Text to token ids and back: the byte-level BPE that a GGUF file describes in its `tokenizer.ggml.*` keys.
//!
//! It gives what Hugging Face `tokenizers` gives for the tokenizer that the file was converted from, with one thing
//! more: text from outside (a chat message) is marked as [`Piece::Content`], in which no CONTROL token is ever found.
//! The stages of a text are one file each: [`special`] finds the tokens that stand for themselves, [`pre`] cuts what
//! lies between into words, [`bpe`] merges each word's bytes, [`bytes`] is the alphabet that vocabularies are written in.

mod bpe;
mod bytes;
mod pre;
mod special;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use thiserror::Error;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use bpe::{Bpe, Merge, Workspace};
use bytes::ByteOfChar;
use pre::Pre;
use special::SpecialTokens;

/// CONTROL tokens with these texts end a turn even where no key of the file names them.
const END_TEXTS: [&str; 14] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
];

/// A vocabulary as the file has it; each field is the value of one `tokenizer.ggml.*` key.
#[derive(Clone, Debug, Default)]
pub struct Vocab {
    /// `model`: must be `gpt2`.
    pub model: String,
    /// `pre`: names the pre-tokenizer.
    pub pre: Option<String>,
    /// `tokens`, indexed by id. Written in the byte alphabet, those that are CONTROL or USER_DEFINED as plain text.
    pub tokens: Vec<String>,
    /// `token_type`, indexed by id: 1 NORMAL, 2 UNKNOWN, 3 CONTROL, 4 USER_DEFINED, 5 UNUSED, 6 BYTE. Without it all
    /// are NORMAL but the ones below, which are CONTROL.
    pub token_types: Option<Vec<i32>>,
    /// `merges`, first rank first: two tokens with a space between.
    pub merges: Vec<String>,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`
    pub eos: Option<u32>,
    /// `eot_token_id`
    pub eot: Option<u32>,
    /// `eom_token_id`
    pub eom: Option<u32>,
    /// `unknown_token_id`
    pub unk: Option<u32>,
    /// `padding_token_id`
    pub pad: Option<u32>,
    /// `add_bos_token`
    pub add_bos: Option<bool>,
    /// `add_eos_token`
    pub add_eos: Option<bool>,
}

/// A stretch of a prompt, by who wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// From the chat template: CONTROL and USER_DEFINED tokens are matched.
    Template(&'a str),
    /// From a message: only USER_DEFINED tokens are matched, the text of a CONTROL token is plain text.
    Content(&'a str),
}

/// Why a vocabulary is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TokenizerError {
    #[error("tokenizer.ggml.model is {0}; supported: \"gpt2\" (byte-level BPE)")]
    Model(String),
    #[error(
        "tokenizer.ggml.pre is missing, and text cannot be cut into words without it; supported: {}",
        pre::SUPPORTED
    )]
    PreMissing,
    #[error("tokenizer.ggml.pre is {0}, which is not supported; supported: {list}", list = pre::SUPPORTED)]
    Pre(String),
    #[error("tokenizer.ggml.tokens has {0} tokens; expected between 1 and 2147483647")]
    Size(usize),
    #[error("tokenizer.ggml.token_type has {got} entries; expected {expected}, one for each of tokenizer.ggml.tokens")]
    TypeCount { expected: usize, got: usize },
    #[error("tokenizer.ggml.token_type of token {id} ({token}) is {got}; expected 1 to 6")]
    Type { id: usize, token: String, got: i32 },
    #[error("{key} is {id}; expected an id below {n_vocab}, the number of tokens")]
    SpecialId { key: &'static str, id: u32, n_vocab: usize },
    #[error("{flag} is true, but the file has no {key}")]
    MissingId { flag: &'static str, key: &'static str },
    #[error(
        "tokenizer.ggml.tokens has no token for byte 0x{byte:02X} ('{letter}' in the byte alphabet), and the file has no \
         tokenizer.ggml.unknown_token_id to stand for it"
    )]
    MissingByte { byte: u8, letter: char },
    #[error("tokenizer.ggml.merges[{index}] is {merge}; expected two tokens with a space between")]
    MergeForm { index: usize, merge: String },
    #[error("tokenizer.ggml.merges[{index}] is {merge}, but {missing} is not in tokenizer.ggml.tokens")]
    MergeToken { index: usize, merge: String, missing: String },
}

/// A byte-level BPE tokenizer. Cheap to share: encoding and decoding borrow it.
#[derive(Debug)]
pub struct Tokenizer {
    pre: Pre,
    texts: Vec<String>,
    kinds: Vec<Kind>,
    byte_of_char: ByteOfChar,
    special: SpecialTokens,
    bpe: Bpe,
    /// NORMAL tokens by their bytes, where a word that is a token needs no merges.
    whole_words: Option<HashMap<Box<[u8]>, u32>>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    end_of_turn: Vec<u32>,
}

/// What a token type means here. BYTE is NORMAL: in this kind of vocabulary a byte is a token like others. UNKNOWN is
/// CONTROL: it stands for no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Control,
    UserDefined,
    Unused,
}

impl Tokenizer {
    /// Checks a vocabulary and builds its tables.
    ///
    /// Of tokens with the same text the first NORMAL one is what merges make. A merge that would make a CONTROL token
    /// is left out, so that no content can spell one; a token that stands for a single byte is never CONTROL.
    pub fn new(vocab: Vocab) -> Result<Tokenizer, TokenizerError> {
        if vocab.model != "gpt2" {
            return Err(TokenizerError::Model(shown(&vocab.model)));
        }
        let name = vocab.pre.as_deref().ok_or(TokenizerError::PreMissing)?;
        let pre = Pre::from_name(name).ok_or_else(|| TokenizerError::Pre(shown(name)))?;
        check_ids(&vocab)?;
        let mut kinds = kinds(&vocab)?;

        let ids = ids_by_text(&vocab.tokens, &kinds);
        let byte_ids = byte_ids(&ids, vocab.unk.is_some())?;
        for id in byte_ids.into_iter().flatten() {
            if kinds[id as usize] == Kind::Control {
                kinds[id as usize] = Kind::Normal;
            }
        }
        let mut merges = merges(&vocab.merges, &ids)?;
        merges.retain(|merge| kinds[merge.result as usize] != Kind::Control);
        let lens = vocab.tokens.iter().map(|text| text.chars().count() as u32).collect();
        let bpe = Bpe::new(lens, byte_ids, merges, vocab.unk);

        let byte_of_char = ByteOfChar::new();
        let whole_words = pre.takes_whole_words().then(|| whole_words(&vocab.tokens, &kinds, &byte_of_char));
        let special = vocab.tokens.iter().zip(0..).zip(&kinds).filter_map(|((text, id), kind)| match kind {
            Kind::Control => Some((text.as_str(), id, true)),
            Kind::UserDefined => Some((text.as_str(), id, false)),
            Kind::Normal | Kind::Unused => None,
        });
        Ok(Tokenizer {
            pre,
            special: SpecialTokens::new(special),
            bpe,
            whole_words,
            byte_of_char,
            bos: vocab.bos,
            eos: vocab.eos,
            pad: vocab.pad,
            add_bos: vocab.add_bos.unwrap_or(pre.adds_bos() && vocab.bos.is_some()),
            add_eos: vocab.add_eos.unwrap_or(false),
            end_of_turn: end_of_turn(&vocab, &kinds),
            texts: vocab.tokens,
            kinds,
        })
    }

    /// The tokens of a prompt. The pieces are one text: words, merges and USER_DEFINED tokens may span a border; a
    /// CONTROL token is found only where all of its text is the template's. Adds no BOS and no EOS.
    ///
    /// A word (a run that the pre-tokenizer does not cut) must be shorter than 4 GiB.
    pub fn encode(&self, pieces: &[Piece<'_>]) -> Vec<u32> {
        self.encode_within(pieces, usize::MAX)
    }

    /// As [`encode`](Tokenizer::encode) where there are fewer than `n_max` tokens; where there are more, it stops soon after so many.
    pub fn encode_within(&self, pieces: &[Piece<'_>], n_max: usize) -> Vec<u32> {
        let mut template: Vec<Range<usize>> = Vec::new();
        let mut len = 0;
        for piece in pieces {
            match piece {
                Piece::Content(text) => len += text.len(),
                Piece::Template(text) => {
                    match template.last_mut().filter(|last| last.end == len) {
                        Some(last) => last.end += text.len(),
                        None => template.push(len..len + text.len()),
                    }
                    len += text.len();
                }
            }
        }
        let texts = pieces.iter().map(|piece| match *piece {
            Piece::Template(text) | Piece::Content(text) => text,
        });
        match pieces {
            [Piece::Template(text) | Piece::Content(text)] => self.encode_joined(text, &template, n_max),
            _ => self.encode_joined(&texts.collect::<String>(), &template, n_max),
        }
    }

    /// The tokens of one text, in which CONTROL tokens are matched only with `parse_control`.
    pub fn encode_text(&self, text: &str, parse_control: bool) -> Vec<u32> {
        self.encode(&[if parse_control { Piece::Template(text) } else { Piece::Content(text) }])
    }

    /// Like [`Tokenizer::encode_text`] for bytes from outside. What is not UTF-8 is read as U+FFFD, by the rules of
    /// [`String::from_utf8_lossy`].
    pub fn encode_bytes(&self, text: &[u8], parse_control: bool) -> Vec<u32> {
        self.encode_text(&String::from_utf8_lossy(text), parse_control)
    }

    fn encode_joined(&self, text: &str, template: &[Range<usize>], n_max: usize) -> Vec<u32> {
        let mut out = Vec::new();
        let mut workspace = self.bpe.workspace();
        let mut at = 0;
        for (place, id) in self.special.matches(text, template) {
            self.encode_plain(&text[at..place.start], &mut workspace, &mut out, n_max);
            if out.len() >= n_max {
                return out;
            }
            out.push(id);
            at = place.end;
        }
        self.encode_plain(&text[at..], &mut workspace, &mut out, n_max);
        out
    }

    /// Text without special tokens: normalized, cut, merged. Merging is what takes long, and ends with `n_max` tokens.
    fn encode_plain(&self, text: &str, workspace: &mut Workspace, out: &mut Vec<u32>, n_max: usize) {
        let text = if self.pre.normalizes() { to_nfc(text) } else { Cow::Borrowed(text) };
        self.pre.split(&text, &mut |word| {
            if out.len() >= n_max {
                return;
            }
            let whole = self.whole_words.as_ref().and_then(|words| words.get(word.as_bytes()));
            match whole {
                Some(&id) => out.push(id),
                None => self.bpe.encode(word.as_bytes(), workspace, out),
            }
        });
    }

    /// Appends the bytes of one token to `out`; a character may be spread over several tokens. CONTROL tokens have
    /// none unless `show_control`; nor has an id past the vocabulary, which a padded output matrix can give.
    pub fn decode_bytes(&self, id: u32, out: &mut Vec<u8>, show_control: bool) {
        let Some(text) = self.token_text(id) else { return };
        match self.kinds[id as usize] {
            Kind::Normal | Kind::Unused => self.byte_of_char.decode(text, out),
            Kind::UserDefined => out.extend_from_slice(text.as_bytes()),
            Kind::Control if show_control => out.extend_from_slice(text.as_bytes()),
            Kind::Control => {}
        }
    }

    /// What one token says, for people: half a character is U+FFFD, CONTROL tokens are spelled out.
    pub fn piece(&self, id: u32) -> String {
        let mut bytes = Vec::new();
        self.decode_bytes(id, &mut bytes, true);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A token as the file writes it; `None` for an id past the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// Whether a token is CONTROL (or UNKNOWN): no text of a message is ever this token.
    pub fn is_control(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Control)
    }

    /// The number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.texts.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that fills up batches.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether a prompt starts with [`Tokenizer::bos`], which is then there.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether a text to embed or to train on ends with [`Tokenizer::eos`], which is then there.
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// Every token after which the model has nothing more to say, in ascending order: the file's EOS, EOT and EOM,
    /// and CONTROL tokens whose text is a well-known end.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }
}

/// The file's ids of special tokens, with their keys.
fn special_ids(vocab: &Vocab) -> impl Iterator<Item = (&'static str, u32)> {
    [
        ("tokenizer.ggml.bos_token_id", vocab.bos),
        ("tokenizer.ggml.eos_token_id", vocab.eos),
        ("tokenizer.ggml.eot_token_id", vocab.eot),
        ("tokenizer.ggml.eom_token_id", vocab.eom),
        ("tokenizer.ggml.unknown_token_id", vocab.unk),
        ("tokenizer.ggml.padding_token_id", vocab.pad),
    ]
    .into_iter()
    .filter_map(|(key, id)| Some((key, id?)))
}

fn check_ids(vocab: &Vocab) -> Result<(), TokenizerError> {
    let n_vocab = vocab.tokens.len();
    if n_vocab == 0 || n_vocab > i32::MAX as usize {
        return Err(TokenizerError::Size(n_vocab));
    }
    if let Some((key, id)) = special_ids(vocab).find(|&(_, id)| id as usize >= n_vocab) {
        return Err(TokenizerError::SpecialId { key, id, n_vocab });
    }
    if vocab.add_bos == Some(true) && vocab.bos.is_none() {
        let (flag, key) = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id");
        return Err(TokenizerError::MissingId { flag, key });
    }
    if vocab.add_eos == Some(true) && vocab.eos.is_none() {
        let (flag, key) = ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id");
        return Err(TokenizerError::MissingId { flag, key });
    }
    Ok(())
}

fn kinds(vocab: &Vocab) -> Result<Vec<Kind>, TokenizerError> {
    let Some(types) = &vocab.token_types else {
        let mut kinds = vec![Kind::Normal; vocab.tokens.len()];
        special_ids(vocab).for_each(|(_, id)| kinds[id as usize] = Kind::Control);
        return Ok(kinds);
    };
    if types.len() != vocab.tokens.len() {
        return Err(TokenizerError::TypeCount { expected: vocab.tokens.len(), got: types.len() });
    }
    let kind = |(id, &got): (usize, &i32)| match got {
        1 | 6 => Ok(Kind::Normal),
        2 | 3 => Ok(Kind::Control),
        4 => Ok(Kind::UserDefined),
        5 => Ok(Kind::Unused),
        _ => Err(TokenizerError::Type { id, token: shown(&vocab.tokens[id]), got }),
    };
    types.iter().enumerate().map(kind).collect()
}

fn ids_by_text<'a>(tokens: &'a [String], kinds: &[Kind]) -> HashMap<&'a str, u32> {
    let mut ids = HashMap::with_capacity(tokens.len());
    let of_kind =
        |normal: bool| (0u32..).zip(tokens).filter(move |&(id, _)| (kinds[id as usize] == Kind::Normal) == normal);
    for (id, text) in of_kind(true).chain(of_kind(false)) {
        ids.entry(text.as_str()).or_insert(id);
    }
    ids
}

fn byte_ids(ids: &HashMap<&str, u32>, has_unk: bool) -> Result<[Option<u32>; 256], TokenizerError> {
    let letters = bytes::alphabet();
    let byte_ids = letters.map(|letter| ids.get(letter.encode_utf8(&mut [0; 4]) as &str).copied());
    match byte_ids.iter().position(Option::is_none) {
        Some(byte) if !has_unk => Err(TokenizerError::MissingByte { byte: byte as u8, letter: letters[byte] }),
        _ => Ok(byte_ids),
    }
}

/// Finds the tokens of each merge. Spaces are not in the byte alphabet, so the first one is the border.
fn merges(merges: &[String], ids: &HashMap<&str, u32>) -> Result<Vec<Merge>, TokenizerError> {
    let mut joined = String::new();
    let mut resolve = |(index, merge): (usize, &String)| {
        let parts = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
        let (left, right) = parts.ok_or_else(|| TokenizerError::MergeForm { index, merge: shown(merge) })?;
        joined.clear();
        joined.extend([left, right]);
        let id = |text: &str| {
            let missing = || TokenizerError::MergeToken { index, merge: shown(merge), missing: shown(text) };
            ids.get(text).copied().ok_or_else(missing)
        };
        Ok(Merge { left: id(left)?, right: id(right)?, result: id(&joined)? })
    };
    merges.iter().enumerate().map(&mut resolve).collect()
}

fn whole_words(tokens: &[String], kinds: &[Kind], byte_of_char: &ByteOfChar) -> HashMap<Box<[u8]>, u32> {
    let mut words = HashMap::with_capacity(tokens.len());
    for ((text, id), _) in tokens.iter().zip(0..).zip(kinds).filter(|(_, kind)| **kind == Kind::Normal) {
        let bytes: Option<Box<[u8]>> = text.chars().map(|c| byte_of_char.get(c)).collect();
        if let Some(bytes) = bytes {
            words.entry(bytes).or_insert(id);
        }
    }
    words
}

fn end_of_turn(vocab: &Vocab, kinds: &[Kind]) -> Vec<u32> {
    let by_text = (0u32..).zip(&vocab.tokens).zip(kinds);
    let by_text = by_text.filter(|((_, text), kind)| **kind == Kind::Control && END_TEXTS.contains(&text.as_str()));
    let by_key = [vocab.eos, vocab.eot, vocab.eom].into_iter().flatten();
    let mut ends: Vec<u32> = by_text.map(|((id, _), _)| id).chain(by_key).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

fn to_nfc(text: &str) -> Cow<'_, str> {
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => Cow::Borrowed(text),
        IsNormalized::No | IsNormalized::Maybe => Cow::Owned(text.nfc().collect()),
    }
}

/// A string of the file in quotes and of a length that a message can bear.
fn shown(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}
