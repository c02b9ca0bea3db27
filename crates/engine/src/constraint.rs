//! What an answer may be: a JSON schema, a regular expression, a grammar, calls of tools. Tokens that would lead out of it are
//! forbidden before one is sampled, so that an answer which ends by itself is valid, whatever the model's weights.
//!
//! The parsing is `llguidance`'s, over a trie of the file's own vocabulary: an Earley parser over lexemes that are derivatives of
//! regular expressions. Whatever a stranger's grammar may cost is bounded by [`limits`]; one that needs more is refused.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use llguidance::api::{GrammarWithLexer, ParserLimits, StopReason, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Map, Value};
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::output_parser::ToolForm;
use crate::tokenizer::Tokenizer;

mod calls;
mod gbnf;

/// Bytes of a schema, expression or grammar, all alternatives together.
pub const BYTES_MAX: usize = 256 << 10;
/// Brackets within one another, and those of a schema times its references: compiling goes down into them on the stack.
const DEPTH_MAX: usize = 128;
const DEPTH_TIMES_REFS_MAX: usize = 8192;
/// Properties of one object: those that may be left out take time in the square of their number.
const PROPERTIES_MAX: usize = 1000;
/// Expressions that one text may have to match all of. What it takes to compile them grows with the product of their sizes, in time and
/// in memory, and no fuel bounds it.
const ALL_OF_MAX: usize = 8;
/// Characters of what the compiler says: it quotes the lines that it does not like, which may be all that was sent.
const REASON_MAX: usize = 500;
/// Stack for compiling. What is not touched takes no memory.
const STACK_BYTES: usize = 256 << 20;

/// What an answer may be: a thought, then any one of the forms.
#[derive(Clone, Debug)]
pub struct Grammar {
    pub thought: Thought,
    pub forms: Vec<Form>,
}

/// Whether a thought comes before what is constrained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thought {
    None,
    /// The answer may begin with `<think>`.
    May,
    /// The answer begins within one, and has to end it.
    Opened,
}

/// A form of an answer.
#[derive(Clone, Debug)]
pub enum Form {
    /// JSON that a schema allows, without white space between its tokens.
    Json(Value),
    /// A regular expression in the syntax of the crate `regex`, for the whole text.
    Regex(String),
    /// A grammar in Lark's syntax, with the additions of `llguidance`.
    Lark(String),
    /// A grammar in llama.cpp's syntax.
    Gbnf(String),
    /// One of these texts.
    Choice(Vec<String>),
    Calls(Calls),
}

/// Calls of tools.
#[derive(Clone, Debug)]
pub struct Calls {
    pub form: ToolForm,
    /// Those that may be called, as `{"type": "function", "function": {…}}`.
    pub tools: Vec<Value>,
    /// One call at most, where otherwise there may be several.
    pub only_one: bool,
    /// Any text, thoughts too, may stand around calls, and there need be none. Then only tools that say `strict` are held to their
    /// schema. Otherwise the answer is calls of any of the tools and nothing else, and at least one.
    pub amid_text: bool,
}

/// Why an answer cannot be constrained so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    #[error("has {n_bytes} bytes; at most {BYTES_MAX} are taken")]
    TooLarge { n_bytes: usize },
    #[error("has an object of {n_property} properties; at most {PROPERTIES_MAX} are taken")]
    TooManyProperties { n_property: usize },
    #[error("is nested more than {DEPTH_MAX} deep")]
    TooDeep,
    #[error("intersects {n} expressions; at most {ALL_OF_MAX} are taken")]
    TooManyAtOnce { n: usize },
    #[error("{0}")]
    Refused(String),
    #[error("nothing fulfils it: it contradicts itself, or refers to itself without end")]
    Nothing,
    #[error("the text that the answer begins with is not what it asks for")]
    Begun,
}

/// Compiles constraints for one vocabulary.
pub struct Constraints {
    tokenizer: Arc<Tokenizer>,
    /// Made when the first constraint is: the trie of a large vocabulary takes a while.
    factory: OnceLock<ParserFactory>,
}

/// A constraint on one answer, and how far the answer is. A clone has nothing in common with it.
pub struct Constraint {
    matcher: Matcher,
    /// Logits of which only those that are allowed are left.
    masked: Vec<f32>,
}

impl Clone for Constraint {
    fn clone(&self) -> Self {
        Constraint { matcher: self.matcher.deep_clone(), masked: Vec::new() }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

/// What a grammar may cost. Compiling stays below some hundred milliseconds, the mask of a token below some ten, and a constraint's
/// memory below some ten megabytes.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

impl Constraints {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Constraints {
        Constraints { tokenizer, factory: OnceLock::new() }
    }

    /// Compiles a grammar; `begun` is how the answer begins, written by somebody else. It may take most of a second.
    ///
    /// # Errors
    /// A grammar that is malformed, asks for what is not supported, or would cost too much; an answer that begins otherwise.
    pub fn compile(&self, grammar: &Grammar, begun: &str) -> Result<Constraint, ConstraintError> {
        let grammar = grammar.compose()?;
        let compiled = with_stack(|| self.factory().create_parser(grammar));
        let parser = compiled.map_err(|e| refused(&e))?.map_err(|e| refused(&e))?;
        let mut constraint = Constraint { matcher: Matcher::new(Ok(parser)), masked: Vec::new() };
        let tokens = self.tokenizer.encode_text(begun, false);
        match constraint.matcher.try_consume_tokens(&tokens) {
            Ok(n) if n == tokens.len() && !constraint.is_complete() => {}
            Ok(_) => return Err(ConstraintError::Begun),
            Err(e) => return Err(refused(&e)),
        }
        // What nothing can be written for shows at the first token.
        constraint.matcher.compute_mask_or_eos().map_err(|e| refused(&e))?;
        Ok(constraint)
    }

    /// Makes what all constraints share, which takes a while for a large vocabulary and is done once.
    pub fn prepare(&self) {
        self.factory();
    }

    fn factory(&self) -> &ParserFactory {
        self.factory.get_or_init(|| {
            let env: TokEnv = Arc::new(Vocabulary::new(self.tokenizer.clone()));
            let abilities = InferenceCapabilities { ff_tokens: true, ..InferenceCapabilities::default() };
            let slices = SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&env, abilities, &slices).expect("the slices are regular expressions");
            factory.quiet();
            *factory.limits_mut() = limits();
            factory
        })
    }
}

/// Does something on a thread with much stack.
///
/// # Errors
/// A system that does not start one.
fn with_stack<T: Send>(f: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("constraint".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, f)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

impl Constraint {
    /// The logits of the tokens that may come next; those of others are negative infinity, unless they are not numbers. With
    /// `goes_on` the answer ends only where nothing else may come.
    ///
    /// # Errors
    /// A step that would cost too much.
    pub(crate) fn mask(&mut self, logits: &[f32], goes_on: bool) -> Result<&[f32], ConstraintError> {
        let mut allowed = self.matcher.compute_mask_or_eos().map_err(|e| refused(&e))?;
        if goes_on {
            let env = self.matcher.tok_env().map_err(|e| refused(&e))?;
            let mut others = allowed.clone();
            env.tok_trie().eos_tokens().iter().for_each(|&t| others.disallow_token(t));
            if !others.is_zero() {
                allowed = others;
            }
        }
        self.masked.clear();
        self.masked.extend_from_slice(logits);
        for (token, logit) in self.masked.iter_mut().enumerate() {
            let is_allowed = token < allowed.len() && allowed.is_allowed(token as TokenId);
            // What is not a number is for the sampler to find.
            if !is_allowed && logit.is_finite() {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(&self.masked)
    }

    /// Takes a token that was allowed.
    ///
    /// # Errors
    /// A step that would cost too much.
    pub(crate) fn advance(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token).map_err(|e| refused(&e))
    }

    /// Whether nothing more may come.
    pub(crate) fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }

    /// How many of these tokens may come, one after the other.
    pub(crate) fn n_allowed(&mut self, tokens: &[u32]) -> usize {
        self.matcher.validate_tokens(tokens).unwrap_or(0)
    }
}

impl Grammar {
    /// One grammar that refers to one for each form.
    fn compose(&self) -> Result<TopLevelGrammar, ConstraintError> {
        let mut grammars = vec![GrammarWithLexer::default()];
        let mut n_bytes = 0;
        for form in &self.forms {
            n_bytes += form.n_bytes();
            grammars.push(form.grammar()?);
        }
        if n_bytes > BYTES_MAX {
            return Err(ConstraintError::TooLarge { n_bytes });
        }
        // Thoughts are text like any other there.
        let thought = match self.forms[..] {
            [Form::Calls(Calls { amid_text: true, .. })] => Thought::None,
            _ => self.thought,
        };
        let names = (0..self.forms.len()).map(|i| format!("form{i}"));
        let any_of: Vec<String> = names.clone().map(|name| format!("@{name}")).collect();
        grammars[1..].iter_mut().zip(names).for_each(|(grammar, name)| grammar.name = Some(name));
        if let (Thought::None, 2) = (thought, grammars.len()) {
            grammars.swap_remove(0);
        } else {
            let before = match thought {
                Thought::None => "",
                Thought::May => "(\"<think>\" thought)? ",
                Thought::Opened => "thought ",
            };
            let thought = "thought: inner GAP?\ninner[suffix=\"</think>\"]: /(?s:.*)/\nGAP: /[ \\n]{1,4}/\n";
            let thought = if before.is_empty() { "" } else { thought };
            grammars[0] = GrammarWithLexer::from_lark(format!("start: {before}({})\n{thought}", any_of.join(" | ")));
        }
        Ok(TopLevelGrammar { grammars, max_tokens: None })
    }
}

impl Form {
    fn n_bytes(&self) -> usize {
        match self {
            Form::Json(schema) => schema.to_string().len(),
            Form::Regex(text) | Form::Lark(text) | Form::Gbnf(text) => text.len(),
            // As they are written: an empty text is not for nothing.
            Form::Choice(texts) => texts.iter().map(|text| quoted(text).len()).sum(),
            Form::Calls(calls) => {
                let of_tool =
                    |t: &Value| t["function"]["name"].to_string().len() + t["function"]["parameters"].to_string().len();
                calls.tools.iter().map(of_tool).sum()
            }
        }
    }

    fn grammar(&self) -> Result<GrammarWithLexer, ConstraintError> {
        // What is larger than all forms together may be is not worth a look.
        let n_bytes = self.n_bytes();
        if n_bytes > BYTES_MAX {
            return Err(ConstraintError::TooLarge { n_bytes });
        }
        match self {
            Form::Json(schema) => Ok(GrammarWithLexer::from_json_schema(compact(schema)?)),
            Form::Regex(regex) => {
                check_depth(regex)?;
                Ok(GrammarWithLexer::from_regex(regex))
            }
            Form::Lark(lark) => {
                check_depth(lark)?;
                check_all_of(lark)?;
                Ok(GrammarWithLexer::from_lark(lark.clone()))
            }
            Form::Gbnf(gbnf) => {
                check_depth(gbnf)?;
                Ok(GrammarWithLexer::from_lark(gbnf::lark(gbnf).map_err(ConstraintError::Refused)?))
            }
            Form::Choice(texts) => Ok(GrammarWithLexer::from_lark(format!("start: {}\n", any_text(texts)))),
            Form::Calls(calls) => Ok(GrammarWithLexer::from_lark(calls.lark()?)),
        }
    }
}

/// Texts as alternatives of a rule.
fn any_text<T: AsRef<str>>(texts: &[T]) -> String {
    texts.iter().map(|text| quoted(text.as_ref())).collect::<Vec<_>>().join(" | ")
}

/// A text as Lark writes it.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// A schema that is compiled to JSON without white space.
fn compact(schema: &Value) -> Result<Value, ConstraintError> {
    with_options(schema, &JsonCompileOptions { whitespace_flexible: false, ..JsonCompileOptions::default() })
}

/// A schema with what `llguidance` reads its options from.
fn with_options(schema: &Value, options: &JsonCompileOptions) -> Result<Value, ConstraintError> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => Value::Object(Map::new()),
        Value::Bool(false) => {
            return Err(ConstraintError::Refused("the schema is false, which nothing is".to_string()));
        }
        other => {
            let message = format!("a JSON schema is an object, this is {other:.100}");
            return Err(ConstraintError::Refused(message));
        }
    };
    let size = Size::of(&schema, 1);
    if size.depth * size.n_ref > DEPTH_TIMES_REFS_MAX {
        return Err(ConstraintError::TooDeep);
    }
    let n = all_of(&schema);
    if n > ALL_OF_MAX {
        return Err(ConstraintError::TooManyAtOnce { n });
    }
    if size.n_property > PROPERTIES_MAX {
        return Err(ConstraintError::TooManyProperties { n_property: size.n_property });
    }
    forget_unknown_formats(&mut schema);
    options.apply_to(&mut schema);
    Ok(schema)
}

/// What a schema takes to compile.
#[derive(Default)]
struct Size {
    depth: usize,
    n_ref: usize,
    /// Of the largest object.
    n_property: usize,
}

impl Size {
    fn of(schema: &Value, depth: usize) -> Size {
        let (n_ref, n_property, parts): (_, _, Vec<&Value>) = match schema {
            Value::Object(fields) => {
                (usize::from(fields.contains_key("$ref")), fields.len(), fields.values().collect())
            }
            Value::Array(parts) => (0, 0, parts.iter().collect()),
            _ => (0, 0, Vec::new()),
        };
        parts.into_iter().map(|part| Size::of(part, depth + 1)).fold(Size { depth, n_ref, n_property }, |a, b| Size {
            depth: a.depth.max(b.depth),
            n_ref: a.n_ref + b.n_ref,
            n_property: a.n_property.max(b.n_property),
        })
    }
}

/// Expressions that one text may have to match all of, or more: where nothing joins schemas there are those of one, otherwise
/// all that stand under properties of the same name, whoever refers to them.
fn all_of(schema: &Value) -> usize {
    let (mut n_of, mut is_joined) = (BTreeMap::new(), false);
    count_expressions(schema, "", &mut n_of, &mut is_joined);
    let of_any = n_of.remove("").unwrap_or(0);
    if is_joined { of_any + n_of.into_values().max().unwrap_or(0) } else { 1 }
}

fn count_expressions<'a>(schema: &'a Value, name: &'a str, n_of: &mut BTreeMap<&'a str, usize>, is_joined: &mut bool) {
    let fields = match schema {
        Value::Object(fields) => fields,
        Value::Array(parts) => return parts.iter().for_each(|part| count_expressions(part, name, n_of, is_joined)),
        _ => return,
    };
    let is_text = |key: &str| fields.get(key).is_some_and(Value::is_string);
    let n = usize::from(is_text("pattern")) + usize::from(is_text("format"));
    *n_of.entry(name).or_default() += n;
    let joins = |key: &str| fields.get(key).is_some_and(|v| v.as_array().is_none_or(|parts| parts.len() > 1));
    let refers = ["allOf", "anyOf", "oneOf", "$ref"].iter().any(|key| fields.contains_key(*key));
    let says_more = ["pattern", "format", "properties", "items", "prefixItems", "additionalProperties"];
    *is_joined |= joins("allOf") || refers && says_more.iter().any(|key| fields.contains_key(*key));
    for (key, part) in fields {
        match (key.as_str(), part) {
            ("properties", Value::Object(of)) => {
                of.iter().for_each(|(name, part)| count_expressions(part, name, n_of, is_joined));
            }
            // They may be any property's.
            ("additionalProperties" | "patternProperties", part) => count_expressions(part, "", n_of, is_joined),
            (_, part) => count_expressions(part, name, n_of, is_joined),
        }
    }
}

/// Formats of strings that are kept to.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Drops formats that nobody knows: by the specification they say nothing, and generators of schemas write them.
fn forget_unknown_formats(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("format").and_then(Value::as_str).is_some_and(|f| !FORMATS.contains(&f)) {
                fields.remove("format");
            }
            let values = ["const", "enum", "default", "examples"];
            let inner = fields.iter_mut().filter(|(key, _)| !values.contains(&key.as_str()));
            inner.for_each(|(_, part)| forget_unknown_formats(part));
        }
        Value::Array(parts) => parts.iter_mut().for_each(forget_unknown_formats),
        _ => {}
    }
}

/// Refuses brackets within brackets that would exhaust the stack. Those in strings count too, which harms nobody.
fn check_depth(text: &str) -> Result<(), ConstraintError> {
    let (mut depth, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        most = most.max(depth);
    }
    if most > DEPTH_MAX { Err(ConstraintError::TooDeep) } else { Ok(()) }
}

/// Refuses more intersections than one text can be held to. Those in strings count too, and where schemas are joined all their patterns.
fn check_all_of(lark: &str) -> Result<(), ConstraintError> {
    // A schema within may write its words otherwise.
    let n_pattern = ["\"pattern\"", "\"format\"", "\\u"].iter().map(|word| lark.matches(word).count()).sum();
    let n = 1 + lark.matches('&').count().max(if lark.contains("%json") { n_pattern } else { 0 });
    if n > ALL_OF_MAX { Err(ConstraintError::TooManyAtOnce { n }) } else { Ok(()) }
}

/// What the compiler says, without what is only of use to its authors.
fn refused(e: &impl fmt::Display) -> ConstraintError {
    let text = format!("{e:#}");
    // The compiler has no word of its own for it but the name.
    if text.contains(&format!("{:?}", StopReason::NoExtensionBias)) {
        return ConstraintError::Nothing;
    }
    let text = text.split("\n<").next().unwrap_or_default().trim();
    match text.char_indices().nth(REASON_MAX) {
        Some((end, _)) => ConstraintError::Refused(format!("{}…", &text[..end])),
        None => ConstraintError::Refused(text.to_string()),
    }
}

/// The file's vocabulary, as `llguidance` asks for it.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl Vocabulary {
    fn new(tokenizer: Arc<Tokenizer>) -> Vocabulary {
        let word = |id: u32| {
            let mut bytes = Vec::new();
            tokenizer.decode_bytes(id, &mut bytes, false);
            bytes
        };
        let mut words: Vec<Vec<u8>> = (0..tokenizer.n_vocab() as u32).map(word).collect();
        let mut ends = tokenizer.end_of_turn().to_vec();
        if ends.is_empty() {
            // A token that no logits have ends what otherwise could not end.
            ends.push(words.len() as u32);
            words.push(Vec::new());
        }
        // Ends of turns are no text, whatever the file says of their type.
        ends.iter().for_each(|&id| words[id as usize].clear());
        let info = TokRxInfo::new(words.len() as u32, ends[0]);
        Vocabulary { trie: TokTrie::from(&info, &words).with_eos_tokens(&ends), tokenizer }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let of_text = |text: &str| self.tokenizer.encode_text(text, false);
        let tokens = self.trie.tokenize_with_greedy_fallback(bytes, of_text);
        // A tokenizer may normalize its text, but what is forced are these bytes.
        if self.trie.decode_raw(&tokens) == bytes { tokens } else { self.trie.greedy_tokenize(bytes) }
    }
}

#[cfg(test)]
mod tests;
