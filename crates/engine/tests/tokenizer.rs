//! The tokenizer against Hugging Face `tokenizers` on Qwen3's vocabulary, and what it promises beyond that: no CONTROL
//! token from content, near-linear time, refusals that name what is wrong.

use std::io::Read;
use std::sync::LazyLock;
use std::time::Instant;

use apr_engine::tokenizer::{Piece, Tokenizer, TokenizerError, Vocab};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};
use tokenizers::{NormalizedString, Normalizer};
use unicode_normalization::UnicodeNormalization;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/");

const IM_START: u32 = 151644;
const IM_END: u32 = 151645;
const THINK: u32 = 151667;

/// Qwen3's tokenizer.json.
static QWEN3: LazyLock<Value> = LazyLock::new(|| {
    let packed = std::fs::read(format!("{FIXTURES}qwen3-tokenizer.json.xz")).unwrap();
    let mut json = Vec::new();
    lzma_rust2::XzReader::new(packed.as_slice(), false).read_to_end(&mut json).unwrap();
    serde_json::from_slice(&json).unwrap()
});

/// What a GGUF of Qwen3 holds, with another pre-tokenizer's name.
fn vocab(pre: &str) -> Vocab {
    let model = &QWEN3["model"];
    let ids = model["vocab"].as_object().unwrap();
    let added = QWEN3["added_tokens"].as_array().unwrap();
    let mut tokens = vec![String::new(); ids.len() + added.len()];
    let mut types = vec![1; tokens.len()];
    for (text, id) in ids {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    for token in added {
        let id = token["id"].as_u64().unwrap() as usize;
        tokens[id] = token["content"].as_str().unwrap().to_owned();
        types[id] = if token["special"].as_bool().unwrap() { 3 } else { 4 };
    }
    let merge = |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    Vocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types: Some(types),
        merges: model["merges"].as_array().unwrap().iter().map(merge).collect(),
        bos: Some(151643),
        eos: Some(IM_END),
        pad: Some(151643),
        add_bos: Some(false),
        ..Vocab::default()
    }
}

/// The oracle: Qwen3's vocabulary behind the pre-tokenizer that models with this `pre` have on Hugging Face.
fn oracle(pre: &str) -> tokenizers::Tokenizer {
    let mut json = QWEN3.clone();
    let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex});
    let stages = match pre {
        "qwen2" => return tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap(),
        "gpt-2" => json!([byte_level(true)]),
        "smollm" => json!([{"type": "Digits", "individual_digits": true}, byte_level(true)]),
        "llama-bpe" => {
            let regex = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            json["model"]["ignore_merges"] = json!(true);
            json!([{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, byte_level(false)])
        }
        _ => unreachable!("no oracle for {pre}"),
    };
    json["normalizer"] = Value::Null;
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": stages});
    tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
}

struct Pair {
    ours: Tokenizer,
    oracle: tokenizers::Tokenizer,
}

impl Pair {
    fn new(pre: &str) -> Pair {
        Pair { ours: Tokenizer::new(vocab(pre)).unwrap(), oracle: oracle(pre) }
    }

    /// (ours, the oracle's) tokens of a text in which CONTROL tokens are matched.
    fn ids(&self, text: &str) -> (Vec<u32>, Vec<u32>) {
        let oracle = self.oracle.encode_fast(text, false).unwrap();
        (self.ours.encode_text(text, true), oracle.get_ids().to_vec())
    }
}

static QWEN2: LazyLock<Pair> = LazyLock::new(|| Pair::new("qwen2"));
static LLAMA: LazyLock<Pair> = LazyLock::new(|| Pair::new("llama-bpe"));
static SMOLLM: LazyLock<Pair> = LazyLock::new(|| Pair::new("smollm"));
static GPT2: LazyLock<Pair> = LazyLock::new(|| Pair::new("gpt-2"));

fn pairs() -> [(&'static str, &'static Pair); 4] {
    [("qwen2", &*QWEN2), ("llama-bpe", &*LLAMA), ("smollm", &*SMOLLM), ("gpt-2", &*GPT2)]
}

const CORPUS: &[&str] = &[
    "",
    " ",
    "   ",
    "\n",
    "Hello world. It's a TEST, isn't it? THEY'LL'VE we'd I'M it'ſ",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let x: Vec<_> = (0..10).map(|i| i * 2).collect();\r\n\tprintln!(\"{x:?}\");\n}\n\n\n",
    "def f(a, *args, **kw):\n    \"\"\"doc\"\"\"\n    return {k: v for k, v in kw.items() if v != 0x1F}\n",
    "SELECT * FROM t WHERE a<>'x''y' -- c\n/* z */;#!/bin/sh\n$(ls | wc -l) && echo \"${HOME}\" >> ~/.log 2>&1",
    "日本語のテキスト、中文文本。한국어 텍스트! ｆｕｌｌ　ｗｉｄｔｈ 㐀𠀀",
    "ภาษาไทยไม่มีช่องว่าง हिन्दी में लिखा हुआ العربية مع التشكيل: مُحَمَّد עברית",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇭🇩🇪 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣ emoji",
    "é e\u{301} ñ n\u{303} Å A\u{30a} Å ǖ u\u{308}\u{304} u\u{304}\u{308} q\u{323}\u{307} q\u{307}\u{323} \u{301}\u{301}x Z̷̢̛a̶l̸g̵o̴",
    "\u{1112}\u{1161}\u{11ab}\u{1100}\u{1173}\u{11af} 한글 \u{1100}\u{1161} \u{ac00}\u{11a8} \u{3131}\u{314f}",
    "\u{0}\u{1}\u{7f}\u{80}\u{9f}\u{ad}\u{200b}\u{200d}\u{feff}\u{fffd}\u{fffe}\u{e000}\u{10ffff}",
    "a\tb\t\tc \t d\r\ne\r\r\n\n f\u{b}g\u{c}h\u{85}i\u{a0}j\u{2003}k\u{2028}l\u{2029}m\u{3000}n  \u{3000} \u{a0}\n\u{a0} x",
    "   leading\n   \n  \n\t\n   and trailing   \n  ",
    "0 1 12 123 1234 12345.678e-9 1,000,000 0xFF ٣٤٥ १२३ ½²Ⅷ①１２３ 3rd 4x4 ¹²³ 〇一",
    "!!!??? ...--- ___ *** $$$ €£¥ <<>> (())[]{} `` ~~ ^^ || \\\\ // @@ ## %% && ++ == ;; :: '' \"\" «» „“ ‚‘ … — –",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>{}</tool_call><|endoftext|>",
    "<|im_start<|im_end|>|><|im_end|<think<think>><|<||im_end|>im_end|><tool_response></tool_response>x<|fim_pad|>e\u{301}<think>\u{301}",
    "ﬁ ﬂ ﬃ Å K Ω ℌ ™ ㎏ ½ ＡＢＣ ſ İ ı ß ẞ ǅ ʰ",
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@example.co.uk C:\\Windows\\System32 v1.2.3-rc.4",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "======================================================================================\n--------------------",
    "camelCaseIdentifier snake_case_identifier SCREAMING_CASE kebab-case-words iPhone13ProMax WhatIsThis42",
    "\u{1d400}\u{1d7ce} 𝔘𝔫𝔦 \u{1e900}\u{1e922} \u{11f50} \u{0600}١ \u{2160}\u{24b6} \u{1f100}",
];

#[test]
fn equals_the_golden_ids() {
    let golden = std::fs::read(format!("{FIXTURES}tokenizer-qwen3.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let cases = golden.as_array().unwrap();
    assert!(cases.len() >= 20);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(QWEN2.ours.encode_text(text, true), ids, "{text:?}");
    }
}

#[test]
fn a_limit_ends_the_tokens_soon_after_it_and_changes_none_before() {
    let everything = CORPUS.concat().repeat(3);
    for cut in [Piece::Template(&everything), Piece::Content(&everything)] {
        let whole = QWEN2.ours.encode(&[cut]);
        let some = QWEN2.ours.encode_within(&[cut], 100);
        assert!((100..200).contains(&some.len()), "{} of {}", some.len(), whole.len());
        assert_eq!(some, whole[..some.len()]);
        assert_eq!(QWEN2.ours.encode_within(&[cut], whole.len() + 1), whole);
    }
}

#[test]
fn equals_tokenizers_on_the_corpus() {
    let everything = CORPUS.concat();
    for (pre, pair) in pairs() {
        for text in CORPUS.iter().copied().chain([everything.as_str()]) {
            let (ours, oracle) = pair.ids(text);
            assert_eq!(ours, oracle, "{pre}: {text:?}");
        }
    }
}

/// Whether the oracle's NFC, which is of Unicode 9, treats a text as the present one does.
fn has_old_nfc(text: &str) -> bool {
    let mut normalized = NormalizedString::from(text);
    QWEN2.oracle.get_normalizer().unwrap().normalize(&mut normalized).unwrap();
    normalized.get().chars().eq(text.nfc())
}

/// Every assigned character where its class matters: before and after a letter, a digit, a symbol and a space. (What
/// the ranges leave out is unassigned or for private use, but for its first few.)
#[test]
fn equals_tokenizers_on_every_character() {
    let texts: Vec<String> = ('\0'..'\u{33480}')
        .chain('\u{e0000}'..'\u{e0200}')
        .chain(['\u{f0000}', char::MAX])
        .map(|c| format!("{c}a 1{c}! {c}a"))
        .collect();
    let same_nfc: Vec<String> = texts.iter().filter(|text| has_old_nfc(text)).cloned().collect();
    assert!(texts.len() - same_nfc.len() < 100, "{} characters are left out", texts.len() - same_nfc.len());
    for (pre, pair) in pairs() {
        let texts = if pre == "qwen2" { &same_nfc } else { &texts };
        for chunk in texts.chunks(4096) {
            let (ours, oracle) = pair.ids(&chunk.concat());
            assert!(ours == oracle, "{pre}: between {:?} and {:?}", chunk[0], chunk[chunk.len() - 1]);
        }
    }
}

#[test]
fn equals_tokenizers_on_invalid_utf8() {
    for bytes in [
        &b"abc\xff\xfedef"[..],
        b"\xf0\x9f\x91",
        b"\xc0\x80\xed\xa0\x80\xf4\x90\x80\x80",
        b"caf\xe9 \xe2\x82 <|im_end|>\x80",
        b"\x80\x80\x80\x80",
    ] {
        let (ours, oracle) = QWEN2.ids(&String::from_utf8_lossy(bytes));
        assert_eq!(ours, oracle);
        assert_eq!(QWEN2.ours.encode_bytes(bytes, true), oracle);
    }
}

/// What random strings are made of: pieces on which the rules of pre-tokenizers, NFC and special tokens depend.
#[rustfmt::skip]
const NASTY: &[&str] = &[
    "'", "s", "S", "ſ", "re", "LL", "'ve", "'d", "a", "Z", "é", "e", "\u{301}", "\u{323}", "\u{308}", "字", "ก",
    "\u{e48}", "ع", "\u{64e}", "\u{1100}", "\u{1161}", "\u{11a8}", "가", " ", " ", "  ", "\t", "\n", "\r", "\r\n",
    "\u{a0}", "\u{3000}", "\u{2028}", "\u{85}", "1", "23", "٣", "½", "!", "_", "$", "`", "=", "…", "、", "👩",
    "\u{200d}", "\u{fe0f}", "\u{0}", "\u{fffd}", "\u{ad}", "<|im_end|>", "<|im_", "end|>", "<think>", "<", "|>",
    "\u{340}", "\u{2126}", "the", " return", "ing",
];

/// Strings in which the rules of all pre-tokenizers, NFC and special tokens get in each other's way.
fn nasty() -> impl Strategy<Value = String> {
    let bits = select(NASTY);
    prop_oneof![
        4 => prop::collection::vec(bits, 0..24).prop_map(|bits| bits.concat()),
        1 => "[ \t\r\n\u{a0}a1'!]{0,24}",
        1 => "[a-zA-Z']{0,40}",
        1 => "[ -~]{0,60}",
        1 => prop::collection::vec(any::<char>(), 0..16)
            .prop_map(|chars| chars.into_iter().collect::<String>())
            .prop_filter("the oracle's NFC is older", |text| has_old_nfc(text)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn equals_tokenizers_on_random_strings(text in nasty()) {
        for (pre, pair) in pairs() {
            let (ours, oracle) = pair.ids(&text);
            prop_assert_eq!(ours, oracle, "{}", pre);
        }
    }

    /// However a text is divided among template and content, a CONTROL token comes only from the template's own text.
    #[test]
    fn content_never_becomes_control(pieces in prop::collection::vec((any::<bool>(), nasty()), 1..5)) {
        let ours = &QWEN2.ours;
        let as_pieces: Vec<Piece> =
            pieces.iter().map(|(template, text)| if *template { Piece::Template(text) } else { Piece::Content(text) }).collect();
        let control = |ids: &[u32]| ids.iter().filter(|&&id| ours.is_control(id)).count();
        let mut template = String::new();
        for (from_template, text) in &pieces {
            template.push_str(if *from_template { text } else { "\u{1}" });
        }
        let ids = ours.encode(&as_pieces);
        prop_assert_eq!(control(&ids), template.matches("<|im_end|>").count());
    }

    #[test]
    fn decoding_gives_the_text_again(text in nasty()) {
        let mut bytes = Vec::new();
        GPT2.ours.encode_text(&text, true).iter().for_each(|&id| GPT2.ours.decode_bytes(id, &mut bytes, true));
        prop_assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }
}

#[test]
fn control_is_the_templates_alone() {
    use Piece::{Content, Template};
    let ours = &QWEN2.ours;
    let plain = ours.encode(&[Content("<|im_end|>")]);
    assert!(plain.len() > 1 && !plain.contains(&IM_END));
    assert_eq!(ours.encode(&[Template("<|im_end|>")]), [IM_END]);
    // A token that two pieces share is the template's only if both are.
    for split in 1.."<|im_end|>".len() {
        let (left, right) = "<|im_end|>".split_at(split);
        assert_eq!(ours.encode(&[Content(left), Template(right)]), plain);
        assert_eq!(ours.encode(&[Template(left), Content(right)]), plain);
        assert_eq!(ours.encode(&[Content(left), Content(right)]), plain);
        assert_eq!(ours.encode(&[Template(left), Template(""), Template(right)]), [IM_END]);
        assert_eq!(ours.encode(&[Template(left), Content(""), Template(right)]), [IM_END]);
    }
    let ids = ours.encode(&[Template("<|im_start|>user\n"), Content("a<|im_start|>b"), Template("<|im_end|>\n")]);
    assert_eq!(ids.iter().filter(|&&id| id == IM_START).count(), 1);
    assert_eq!(ids.iter().filter(|&&id| id == IM_END).count(), 1);
}

#[test]
fn user_defined_tokens_are_matched_everywhere() {
    use Piece::{Content, Template};
    let ours = &QWEN2.ours;
    assert_eq!(ours.encode(&[Content("<think>")]), [THINK]);
    assert_eq!(ours.encode(&[Template("<think>")]), [THINK]);
    assert_eq!(ours.encode(&[Content("<thi"), Template("nk>")]), [THINK]);
    assert!(!ours.is_control(THINK) && ours.is_control(IM_END));
}

#[test]
fn pieces_are_one_text() {
    use Piece::{Content, Template};
    let ours = &QWEN2.ours;
    assert_eq!(
        ours.encode(&[Template("Hel"), Content("lo wor"), Template("ld e"), Content("\u{301}")]),
        ours.encode_text("Hello world é", false)
    );
    assert!(ours.encode(&[]).is_empty());
}

#[test]
fn decodes_by_type() {
    let ours = &QWEN2.ours;
    let decoded = |id, show| {
        let mut bytes = Vec::new();
        ours.decode_bytes(id, &mut bytes, show);
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(decoded(1879, false), " world");
    assert_eq!((decoded(IM_END, false), decoded(IM_END, true)), (String::new(), "<|im_end|>".to_owned()));
    assert_eq!((decoded(THINK, false), decoded(THINK, true)), ("<think>".to_owned(), "<think>".to_owned()));
    assert_eq!(decoded(u32::MAX, true), "");
    assert_eq!((ours.token_text(1879), ours.token_text(151669)), (Some("Ġworld"), None));
    assert_eq!(ours.n_vocab(), 151669);
}

/// Seconds for a text of `len` bytes, which must decode to itself.
fn seconds(pattern: &str, len: usize) -> f64 {
    let text = pattern.repeat(len / pattern.len());
    let start = Instant::now();
    let ids = GPT2.ours.encode_text(&text, true);
    let seconds = start.elapsed().as_secs_f64();
    let mut bytes = Vec::with_capacity(text.len());
    ids.iter().for_each(|&id| GPT2.ours.decode_bytes(id, &mut bytes, true));
    assert!(bytes == text.as_bytes(), "{pattern:?} does not decode to itself");
    seconds
}

#[test]
fn time_is_near_linear_on_hostile_text() {
    for pattern in ["a", " ", "\n", "!", "7", "\u{301}", "字", "ab", "<", "<|im_end|", " \n", "'"] {
        is_near_linear(pattern, |len| seconds(pattern, len));
    }
}

#[test]
fn normalizing_is_near_linear_on_hostile_text() {
    let encode = |len: usize| {
        // Two classes of marks in turn: all of them must be put in order.
        let text = "\u{301}\u{323}".repeat(len / 4);
        let start = Instant::now();
        assert!(!QWEN2.ours.encode_text(&text, true).is_empty());
        start.elapsed().as_secs_f64()
    };
    is_near_linear("combining marks", encode);
}

/// Eight times the text takes far less than the 64 times as long that a quadratic step would take. A busy machine can only make
/// a run slower, so one good pair of three shows it.
fn is_near_linear(what: &str, seconds: impl Fn(usize) -> f64) {
    let mut pairs = Vec::new();
    while pairs.len() < 3 {
        let (short, long) = (seconds(1 << 20), seconds(8 << 20));
        if long < 24.0 * short.max(0.01) {
            return;
        }
        pairs.push((short, long));
    }
    panic!("{what:?}: seconds for 1 MiB and 8 MiB: {pairs:?}");
}

/// A vocabulary of the 256 bytes (the alphabet in order of character), then `more`, with their types.
fn small(pre: &str, more: &[(&str, i32)], merges: &[&str]) -> Vocab {
    let printable = |c: &char| matches!(*c, '!'..='~' | '¡'..='¬' | '®'..='ÿ' | 'Ā'..='Ń');
    let mut tokens: Vec<String> = ('\0'..='Ń').filter(printable).map(String::from).collect();
    assert_eq!(tokens.len(), 256);
    let mut types = vec![1; 256];
    tokens.extend(more.iter().map(|(text, _)| text.to_string()));
    types.extend(more.iter().map(|(_, kind)| kind));
    Vocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types: Some(types),
        merges: merges.iter().map(|merge| merge.to_string()).collect(),
        ..Vocab::default()
    }
}

fn refusal(vocab: Vocab) -> String {
    Tokenizer::new(vocab).expect_err("this vocabulary is to be refused").to_string()
}

#[test]
fn refusals_name_what_is_wrong() {
    let good = || small("gpt-2", &[("ab", 1)], &["a b"]);
    assert!(Tokenizer::new(good()).is_ok());
    let cases: Vec<(Vocab, &[&str])> = vec![
        (Vocab { model: "llama".into(), ..good() }, &["tokenizer.ggml.model", "\"llama\"", "gpt2"]),
        (
            Vocab { pre: None, ..good() },
            &["tokenizer.ggml.pre", "missing", "qwen2", "smollm", "llama-bpe", "gpt-2", "default"],
        ),
        (Vocab { pre: Some("tekken".into()), ..good() }, &["tokenizer.ggml.pre", "\"tekken\"", "qwen2", "smollm"]),
        (Vocab { tokens: vec![], ..good() }, &["tokenizer.ggml.tokens", "0 tokens"]),
        (Vocab { token_types: Some(vec![1; 9]), ..good() }, &["tokenizer.ggml.token_type", "9", "257"]),
        (small("gpt-2", &[("ab", 7)], &[]), &["token 256", "\"ab\"", "7"]),
        (Vocab { eos: Some(257), ..good() }, &["tokenizer.ggml.eos_token_id", "257"]),
        (Vocab { pad: Some(u32::MAX), ..good() }, &["tokenizer.ggml.padding_token_id", "4294967295"]),
        (Vocab { add_bos: Some(true), ..good() }, &["tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"]),
        (Vocab { add_eos: Some(true), ..good() }, &["tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id"]),
        (small("gpt-2", &[("ab", 1)], &["a b", "ab"]), &["merges[1]", "\"ab\""]),
        (small("gpt-2", &[("ab", 1)], &["a "]), &["merges[0]", "\"a \""]),
        (small("gpt-2", &[("ab", 1)], &["a bc"]), &["merges[0]", "\"a bc\"", "\"bc\" is not"]),
        (small("gpt-2", &[("ab", 1)], &["b a"]), &["merges[0]", "\"b a\"", "\"ba\" is not"]),
    ];
    for (vocab, parts) in cases {
        let message = refusal(vocab);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}

#[test]
fn a_missing_byte_needs_an_unknown_token() {
    let without_a = |unk| {
        let mut vocab = small("gpt-2", &[("<unk>", 2), ("bb", 1)], &["b b"]);
        let a = vocab.tokens.iter().position(|token| token == "a").unwrap();
        vocab.tokens[a] = "spare".into();
        Vocab { unk, ..vocab }
    };
    assert_eq!(Tokenizer::new(without_a(None)).unwrap_err(), TokenizerError::MissingByte { byte: b'a', letter: 'a' });
    let tokenizer = Tokenizer::new(without_a(Some(256))).unwrap();
    assert_eq!(tokenizer.encode_text("abba", false), [256, 257, 256]);
}

#[test]
fn end_of_turn_has_every_end_of_the_file() {
    assert_eq!(QWEN2.ours.end_of_turn(), [151643, IM_END]);
    let more = [("<|eot_id|>", 3), ("</s>", 1), ("x", 3), ("y", 3), ("z", 3), ("<|end|>", 4), ("<|im_end|>", 3)];
    let vocab = Vocab { eos: Some(260), eot: Some(258), eom: Some(259), ..small("gpt-2", &more, &[]) };
    assert_eq!(Tokenizer::new(vocab).unwrap().end_of_turn(), [256, 258, 259, 260, 262]);
}

#[test]
fn bos_is_added_as_the_file_or_its_family_says() {
    let with = |pre: &str, bos, add_bos| Tokenizer::new(Vocab { bos, add_bos, ..small(pre, &[], &[]) }).unwrap();
    assert!(with("llama-bpe", Some(1), None).add_bos() && with("llama3", Some(1), None).add_bos());
    assert!(!with("llama-v3", Some(1), Some(false)).add_bos() && !with("llama-bpe", None, None).add_bos());
    assert!(!with("qwen2", Some(1), None).add_bos() && with("qwen2", Some(1), Some(true)).add_bos());
    assert_eq!(with("qwen2", Some(1), None).bos(), Some(1));
}

#[test]
fn merges_make_no_control_token() {
    let tokenizer = Tokenizer::new(small("gpt-2", &[("ab", 3), ("abc", 1)], &["a b", "ab c"])).unwrap();
    let plain = tokenizer.encode_text("abc", false);
    assert_eq!(plain.len(), 3);
    assert_eq!(tokenizer.encode_text("abc", true)[0], 256);
    // Where a word that is a token is that token, a CONTROL or USER_DEFINED text is still no word.
    let tokenizer = Tokenizer::new(small("llama-bpe", &[("xyz", 3), ("uvw", 1)], &[])).unwrap();
    assert_eq!((tokenizer.encode_text("xyz", false).len(), tokenizer.encode_text("uvw", false)), (3, vec![257]));
}

#[test]
fn odd_vocabularies_load() {
    // The same text twice, an empty special token, a byte that calls itself CONTROL, and no types at all.
    let twice = small("gpt-2", &[("ab", 1), ("ab", 1), ("ab", 3), ("", 3), ("", 4)], &["a b", "a b"]);
    assert_eq!(Tokenizer::new(twice).unwrap().encode_text("ab", false), [256]);
    let mut byte = small("gpt-2", &[], &[]);
    byte.token_types.as_mut().unwrap()[0] = 3;
    let byte = Tokenizer::new(byte).unwrap();
    assert_eq!(byte.encode_text("!", false), [0]);
    assert!(!byte.is_control(0));
    let untyped = Vocab { token_types: None, eos: Some(256), ..small("gpt-2", &[("<e>", 1), ("<f>", 1)], &[]) };
    let untyped = Tokenizer::new(untyped).unwrap();
    assert!(untyped.is_control(256) && !untyped.is_control(257));
    assert_eq!(untyped.encode_text("<e>", true), [256]);
}
