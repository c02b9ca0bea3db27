//! The chat template of a model file: its own Jinja source, rendered as Hugging Face's `apply_chat_template` renders it.
//!
//! A rendered prompt mixes text of the template (which may write control tokens such as `<|im_end|>`) with text of
//! strangers (which must never become one). [`ChatTemplate::render`] therefore returns pieces:
//! [`RenderedPiece::Control`] is exactly one control token that the *template* wrote, [`RenderedPiece::Text`] is
//! everything else, in which a tokenizer must not look for control tokens. Joined, the pieces are byte for byte what
//! the template renders.
//!
//! # How the two are told apart, and why it is right
//!
//! The template is marked, not the messages. Each control token spelled whole in the template's raw text or in one of
//! its string literals is replaced by one private-use character that occurs neither in the source nor in any string of
//! the input (fresh for each rendering); `bos_token` and `eos_token` are passed as such characters. So:
//!
//! - A mark in the output comes from the template, because the input holds none. Content cannot forge one, whatever it
//!   spells and wherever it is put: not whole, not split over two messages, not completed by the template's own text
//!   (a tool argument named `|im_end|` between the `<` and `>` that Qwen3-Coder's template writes).
//! - The input reaches the template unchanged, so its own tests and cuts of content (`'</think>' in content`,
//!   `split`, `startswith`, slices, `tojson`, `length`) compute what they compute in Hugging Face.
//! - Literals that the template only compares with content (beside `==`, `!=` or `in`, or the first argument of
//!   `split`, `startswith`, `replace` and the like) stay unmarked, so that they still find control-token text there.
//! - What is left is checked, not assumed: the unmarked template is rendered too, and where the marked rendering,
//!   unmarked, is not equal to it (a template that compares content with a control token through a variable, or
//!   measures one), the result is [`TemplateError::Marks`] and not a guess.
//!
//! Some templates write a control token around a role (`'<|' + message.role + '|>'`). The ends are marked as well, and
//! the three together are a control token where the middle is one of a fixed list of role names. Any other token that
//! a template assembles from parts comes out as text.

mod marks;
mod python;

use std::io;
use std::time::SystemTime;

use minijinja::{Environment, ErrorKind, Value};

use marks::{Assignment, MarkedSource};

/// VM instructions that one rendering may take: some hundred times a long tool conversation, about a second of work.
const FUEL: u64 = 20_000_000;
/// Bytes that one rendering may write.
const MAX_OUTPUT: usize = 64 << 20;
/// Nested macro calls, includes and recursive loops.
const RECURSION: usize = 200;
const NAME: &str = "chat_template";

/// A parsed chat template together with the control tokens of its vocabulary.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    control_tokens: Vec<String>,
    marked: MarkedSource,
    environment: Environment<'static>,
}

/// What a template is rendered with; the names are those that Hugging Face passes.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// The conversation: objects with `role`, `content`, `tool_calls` and whatever else the template reads.
    pub messages: Vec<serde_json::Value>,
    /// Tool descriptions (`{"type": "function", "function": {…}}`); `tools` is none without them.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Ends the prompt with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// `enable_thinking`; undefined in the template where it is `None`.
    pub enable_thinking: Option<bool>,
    /// Further variables (`chat_template_kwargs`); the fields of this struct win over equal names.
    pub kwargs: serde_json::Map<String, serde_json::Value>,
    /// Text of the beginning-of-sequence token, empty where the model has none.
    pub bos_token: String,
    /// Text of the end-of-sequence token, empty where the model has none.
    pub eos_token: String,
    /// The time that `strftime_now` formats, in UTC; `None` reads the system clock.
    pub now: Option<SystemTime>,
}

/// A part of a rendered prompt. Adjacent texts are merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenderedPiece {
    /// The text of exactly one control token, written by the template.
    Control(String),
    /// Text to tokenize without control tokens, whatever it spells: content, and the template's ordinary text.
    Text(String),
}

/// Why a template cannot be parsed or rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("the chat template does not parse, line {line}: {detail}")]
    Syntax { line: usize, detail: String },
    /// The template itself refused the conversation (`raise_exception`); the message is the template's.
    #[error("the chat template refuses this conversation: {0}")]
    Raised(String),
    #[error("the chat template fails at line {line}: {detail}")]
    Render { line: usize, detail: String },
    #[error("the chat template ran for more than {FUEL} instructions and was stopped; it loops too long")]
    Fuel,
    #[error("the chat template wrote more than {MAX_OUTPUT} bytes and was stopped")]
    OutputTooLong,
    /// See the module's documentation.
    #[error(
        "the chat template inspects content for a control token in a way that cannot be followed safely, and this \
         conversation holds such text; remove control-token text from the messages"
    )]
    Marks,
    #[error(
        "the conversation uses every private-use character of Unicode, so that none is left to mark control tokens"
    )]
    NoMarks,
}

impl ChatTemplate {
    /// Parses `source`, the file's `tokenizer.chat_template`. `control_tokens` holds the text of every CONTROL token
    /// of the vocabulary (not USER_DEFINED ones: those are matched in any text).
    pub fn parse(source: &str, control_tokens: &[String]) -> Result<Self, TemplateError> {
        let marked = MarkedSource::new(source, control_tokens);
        let mut environment = python::environment();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.add_template_owned(NAME, marked.plain()).map_err(describe)?;
        Ok(Self { source: source.to_owned(), control_tokens: control_tokens.to_vec(), marked, environment })
    }

    /// The template as the file has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation; the pieces joined are the text that Hugging Face renders.
    pub fn render(&self, input: &ChatInput) -> Result<Vec<RenderedPiece>, TemplateError> {
        let now = input.now.unwrap_or_else(SystemTime::now);
        let plain = self.environment.get_template(NAME).map_err(describe)?;
        let truth = write(&plain, context(input, &input.bos_token, &input.eos_token, now))?;
        let ends: Vec<&str> =
            [&*input.bos_token, &*input.eos_token].into_iter().filter(|end| self.is_control(end)).collect();
        if self.marked.is_unmarked() && ends.is_empty() {
            return Ok(text_pieces(truth));
        }
        let marks = Assignment::new(&self.marked, &ends, |c| input_holds(input, c))?;
        let source = marks.source();
        let marked = self.environment.template_from_named_str(NAME, &source).map_err(describe)?;
        let bos = marks.token(&input.bos_token);
        let eos = marks.token(&input.eos_token);
        let output = match write(&marked, context(input, &bos, &eos, now)) {
            Ok(output) => output,
            // The unmarked template rendered: the marks alone made it fail.
            Err(_) => return Err(TemplateError::Marks),
        };
        let pieces = marks.resolve(&output, &|text| self.is_control(text));
        if joined(&pieces) != truth {
            return Err(TemplateError::Marks);
        }
        Ok(pieces)
    }

    fn is_control(&self, text: &str) -> bool {
        self.control_tokens.iter().any(|token| token == text)
    }
}

impl RenderedPiece {
    /// The text of the piece, of either kind.
    pub fn text(&self) -> &str {
        match self {
            RenderedPiece::Control(text) | RenderedPiece::Text(text) => text,
        }
    }
}

fn text_pieces(text: String) -> Vec<RenderedPiece> {
    if text.is_empty() { Vec::new() } else { vec![RenderedPiece::Text(text)] }
}

fn joined(pieces: &[RenderedPiece]) -> String {
    pieces.iter().map(RenderedPiece::text).collect()
}

/// The variables a template sees.
fn context(input: &ChatInput, bos: &str, eos: &str, now: SystemTime) -> Value {
    let list = |items: &[serde_json::Value]| items.iter().map(python::value).collect::<Value>();
    let mut variables = vec![("bos_token", Value::from(bos)), ("eos_token", Value::from(eos))];
    variables.extend(input.kwargs.iter().map(|(name, value)| (name.as_str(), python::value(value))));
    variables.extend([
        ("messages", list(&input.messages)),
        ("tools", input.tools.as_deref().map_or(Value::from(()), list)),
        ("add_generation_prompt", Value::from(input.add_generation_prompt)),
        ("strftime_now", python::strftime_now(now)),
    ]);
    variables.extend(input.enable_thinking.map(|on| ("enable_thinking", Value::from(on))));
    Value::from_pairs(variables)
}

/// Calls `found` with every character of the input that could be taken for a mark.
fn input_holds(input: &ChatInput, found: &mut dyn FnMut(char)) {
    fn walk(value: &serde_json::Value, found: &mut dyn FnMut(char)) {
        match value {
            serde_json::Value::String(text) => marks::private_use(text, found),
            serde_json::Value::Array(items) => items.iter().for_each(|item| walk(item, found)),
            serde_json::Value::Object(fields) => fields.iter().for_each(|(name, item)| {
                marks::private_use(name, found);
                walk(item, found);
            }),
            _ => {}
        }
    }
    input.messages.iter().chain(input.tools.iter().flatten()).chain(input.kwargs.values()).for_each(|v| walk(v, found));
    input.kwargs.keys().for_each(|name| marks::private_use(name, found));
    marks::private_use(&input.bos_token, found);
    marks::private_use(&input.eos_token, found);
}

fn write(template: &minijinja::Template<'_, '_>, context: Value) -> Result<String, TemplateError> {
    let mut output = Capped(Vec::new());
    match template.render_captured_to(context, &mut output) {
        Ok(_) => Ok(String::from_utf8(output.0).expect("a template writes UTF-8")),
        Err(error) => Err(describe(error)),
    }
}

/// Holds what a template writes and refuses more than [`MAX_OUTPUT`] bytes.
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn describe(error: minijinja::Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<python::Raised>() {
            return TemplateError::Raised(raised.0.clone());
        }
        if let Some(inner) = inner.downcast_ref::<io::Error>()
            && inner.kind() == io::ErrorKind::FileTooLarge
        {
            return TemplateError::OutputTooLong;
        }
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return TemplateError::Fuel;
        }
        cause = inner.source();
    }
    let line = error.line().unwrap_or(0);
    let detail = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.kind() {
        ErrorKind::SyntaxError => TemplateError::Syntax { line, detail },
        _ => TemplateError::Render { line, detail },
    }
}
