//! What Hugging Face's Jinja environment has and minijinja has not: Python's JSON, string methods, white space and dates.
//!
//! Known to differ still: `'%s' % x` is an error (the `format` filter and method work), and a list or object written out
//! without `tojson` spells floats with exponents and unprintable characters as Rust does.

use std::fmt::{self, Write};
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// The error behind `raise_exception(message)`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Raised(pub String);

/// The environment of transformers' `apply_chat_template`: blocks trimmed, nothing escaped, loop controls, Python's
/// `tojson`, and the string methods that templates call.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_debug(false);
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, _, value| {
        match text(value) {
            Some(text) => out.write_str(&text),
            None => write!(out, "{value}"),
        }
        .map_err(Error::from)
    });
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let raised = Raised(message.to_string());
        Err(Error::new(ErrorKind::InvalidOperation, raised.0.clone()).with_source(raised))
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| text(value).map_or_else(|| value.clone(), Value::from));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("trim", |value: &Value, chars: Option<&str>| {
        Value::from(strip(&value.to_string(), chars, true, true))
    });
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
    });
    environment
}

/// A JSON value as the template sees it; objects keep their order.
pub fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(on) => Value::from(*on),
        serde_json::Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => Value::from(number),
            (_, Some(number)) => Value::from(number),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, item)| (name.as_str(), value(item))))
        }
    }
}

/// `str(value)` where minijinja's own text is not Python's.
fn text(value: &Value) -> Option<String> {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => None,
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).ok().map(|number| float(number, false))
        }
        _ => Some(value.to_string()),
    }
}

/// `repr` of a Python float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16. JSON spells
/// what is not finite in its own way.
fn float(number: f64, json: bool) -> String {
    if number.is_nan() {
        return if json { "NaN" } else { "nan" }.to_owned();
    }
    if number.is_infinite() {
        let name = if json { "Infinity" } else { "inf" };
        return format!("{}{name}", if number < 0.0 { "-" } else { "" });
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("a float in scientific notation has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent of a float is an integer");
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None => Ok(value.try_iter()?.count()),
    }
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip(text: &str, chars: Option<&str>, start: bool, end: bool) -> String {
    let cut = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(cut) } else { text };
    if end { text.trim_end_matches(cut) } else { text }.to_owned()
}

/// Python's methods; those that minijinja-contrib has alike are left to it.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(Value::from(strip(text, chars, name != "rstrip", name != "lstrip")))
        }
        "split" if args.is_empty() => {
            Ok(text.split(is_space).filter(|word| !word.is_empty()).map(Value::from).collect())
        }
        "rsplit" => {
            let (separator, most): (&str, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most + 1);
            let mut parts: Vec<&str> = text.rsplitn(most, separator).collect();
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]);
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// How `json.dumps` was asked to write.
struct Json {
    ascii: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
    sort: bool,
}

/// transformers' `tojson`: `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut options = [Value::UNDEFINED, Value::UNDEFINED, Value::UNDEFINED, Value::UNDEFINED];
    for (position, name) in ["ensure_ascii", "indent", "separators", "sort_keys"].into_iter().enumerate() {
        options[position] = match positional.get(position) {
            Some(given) => given.clone(),
            None => kwargs.get::<Option<Value>>(name)?.unwrap_or(Value::UNDEFINED),
        };
    }
    kwargs.assert_all_used()?;
    let [ascii, indent, separators, sort] = options;
    let indent = match indent.as_str() {
        Some(indent) => Some(indent.to_owned()),
        None if indent.is_undefined() || indent.is_none() => None,
        None => Some(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
    };
    let (comma, colon) = match separators.is_undefined() || separators.is_none() {
        true => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        false => (separators.get_item(&Value::from(0))?.to_string(), separators.get_item(&Value::from(1))?.to_string()),
    };
    let json = Json { ascii: ascii.is_true(), indent, comma, colon, sort: sort.is_true() };
    let mut out = String::new();
    json.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > 200 {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested more than 200 deep"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&scalar(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.container(['{', '}'], &keys, depth, out, |key, out| {
                    self.string(&scalar(key)?, out);
                    out.push_str(&self.colon);
                    self.write(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(['[', ']'], &items, depth, out, |item, out| self.write(item, depth + 1, out))?;
            }
            kind => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a value of type {kind}")));
            }
        }
        Ok(())
    }

    fn container(
        &self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (position, value) in items.iter().enumerate() {
            if position > 0 {
                out.push_str(&self.comma);
            }
            self.line(depth + 1, out);
            item(value, out)?;
        }
        if !items.is_empty() {
            self.line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\x08' => out.push_str("\\b"),
                '\x0c' => out.push_str("\\f"),
                _ if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("writing to a string succeeds");
                    }
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A number, string, boolean or none as `json.dumps` writes it as a key (without quotes).
fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::String => value.to_string(),
        ValueKind::Bool => if value.is_true() { "true" } else { "false" }.to_owned(),
        ValueKind::None => "null".to_owned(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => float(f64::try_from(value.clone())?, true),
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a key of type {kind}"))),
    })
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The function `strftime_now(format)` for a fixed time, in UTC, so that a prompt does not depend on the machine's zone.
pub fn strftime_now(now: SystemTime) -> Value {
    let seconds = match now.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => after.as_secs() as i64,
        Err(before) => -(before.duration().as_secs() as i64),
    };
    Value::from_function(move |format: &str| {
        let mut out = String::new();
        match strftime(seconds, format, &mut out) {
            Ok(()) => Ok(out),
            Err(fmt::Error) => Err(Error::new(
                ErrorKind::InvalidOperation,
                format!(
                    "strftime_now: {format:?} holds a directive other than %Y %m %d %e %b %B %a %A %H %I %M %S %p %y %j %%"
                ),
            )),
        }
    })
}

fn strftime(seconds: i64, format: &str, out: &mut String) -> fmt::Result {
    let (days, clock) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(days + 3).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next().ok_or(fmt::Error)? {
            'Y' => write!(out, "{year}")?,
            'y' => write!(out, "{:02}", year.rem_euclid(100))?,
            'm' => write!(out, "{month:02}")?,
            'd' => write!(out, "{day:02}")?,
            'e' => write!(out, "{day:2}")?,
            'j' => write!(out, "{:03}", days - days_from_new_year(year) + 1)?,
            'B' => out.push_str(month_name),
            'b' => out.push_str(&month_name[..3]),
            'A' => out.push_str(weekday),
            'a' => out.push_str(&weekday[..3]),
            'H' => write!(out, "{hour:02}")?,
            'I' => write!(out, "{:02}", (hour + 11) % 12 + 1)?,
            'M' => write!(out, "{minute:02}")?,
            'S' => write!(out, "{second:02}")?,
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            '%' => out.push('%'),
            _ => return Err(fmt::Error),
        }
    }
    Ok(())
}

/// Days from 1970-01-01 to the first of January of `year` (proleptic Gregorian).
fn days_from_new_year(year: i64) -> i64 {
    let past = year - 1;
    past * 365 + past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400) - 719_162
}

/// Year, month and day of the day `days` after 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    let mut year = 1970 + days.div_euclid(366);
    while days_from_new_year(year + 1) <= days {
        year += 1;
    }
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let mut day = days - days_from_new_year(year);
    let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}
