//! Calls of tools as a grammar, in the form that a model's template asks for, with arguments that the tools' schemas allow.
//!
//! In Hermes form a call is JSON, and its arguments are the tool's schema. In Qwen3-Coder's form each argument stands alone: what is
//! no string is JSON, a string is bare text, of which this file writes the schema's bounds as regular expressions. A text never holds
//! a tag at which the parser of answers might take it to end.
//!
//! Amid text a call begins wherever the parser of answers would find one: at `<tool_call>`, and in tags at `<function=` as well. What
//! follows there is a call by the grammar, so that text in which a model quotes these tags becomes one.

use std::fmt::Write;

use llguidance::{JsonCompileOptions, regex_to_lark};
use serde_json::{Value, json};

use super::{Calls, ConstraintError, compact, quoted, with_options};
use crate::output_parser::{Kinds, ToolForm, Tools};

/// `$ref`, `anyOf` and the like within one another.
const DEPTH_MAX: usize = 16;
/// What begins a call, and what begins it in tags; and what ends it there.
const BLOCK: &str = "<tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
/// What ends an argument.
const PARAMETER_END: &str = "\n</parameter>\n";

impl Calls {
    /// The grammar in Lark's syntax.
    ///
    /// # Errors
    /// Parameters that the form has no way to write, or whose schema this file cannot follow.
    pub(super) fn lark(&self) -> Result<String, ConstraintError> {
        let names: Vec<String> = (0..self.tools.len()).map(|i| format!("call{i}")).collect();
        let mut lark = format!("{}tool: {}\n", self.start(), names.join(" | "));
        for (name, tool) in names.iter().zip(&self.tools) {
            let function = &tool["function"];
            let tool_name = function["name"].as_str().unwrap_or_default();
            let nothing = json!({"type": "object", "properties": {}, "additionalProperties": false});
            let parameters = match &function["parameters"] {
                Value::Null => &nothing,
                given => given,
            };
            let is_held = !self.amid_text || function["strict"] == true;
            let rules = match self.form {
                ToolForm::Hermes if is_held => hermes(name, tool_name, parameters),
                ToolForm::Hermes => hermes(name, tool_name, &json!({"type": "object"})),
                ToolForm::Xml if is_held => xml(name, tool_name, function, parameters),
                ToolForm::Xml => Ok(any_xml(name, tool_name)),
            };
            lark += &rules.map_err(|e| match e {
                ConstraintError::Refused(why) => ConstraintError::Refused(format!("the tool {tool_name:?}: {why}")),
                other => other,
            })?;
        }
        Ok(lark)
    }

    /// Rules of the whole answer, which refer to a `tool` for what of a call is the tool's own.
    fn start(&self) -> String {
        let head = match self.form {
            ToolForm::Hermes => "\n",
            ToolForm::Xml => "\n<function=",
        };
        let (begin, head, end) = (quoted(BLOCK), quoted(head), quoted("\n</tool_call>"));
        if !self.amid_text {
            let more = if self.only_one { "" } else { " (\"\\n\" call)*" };
            return format!("start: call{more}\ncall: {begin} {head} tool {end}\n");
        }
        // Qwen3-Coder forgets the outer tag at times.
        let bare = match self.form {
            ToolForm::Hermes => "",
            ToolForm::Xml => " | until_function tool",
        };
        let start = if self.only_one { "start: call | TEXT?" } else { "start: call* TEXT?" };
        let text = |least| format!("/(?s:.{least})/ & ~/(?s:.*)({BLOCK}|{FUNCTION})(?s:.*)/");
        format!(
            "{start}\ncall: until_block {head} tool {end}{bare}\n\
             until_block[suffix={begin}]: BEFORE\nuntil_function[suffix={}]: BEFORE\n\
             BEFORE: {}\nTEXT: {}\n",
            quoted(FUNCTION),
            text('*'),
            text('+'),
        )
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T, ConstraintError> {
    Err(ConstraintError::Refused(why.into()))
}

/// Rules of what a call as JSON has of its own, spaced as the templates space it.
fn hermes(rule: &str, tool: &str, parameters: &Value) -> Result<String, ConstraintError> {
    let options = JsonCompileOptions {
        whitespace_flexible: false,
        item_separator: ", ".to_string(),
        key_separator: ": ".to_string(),
        ..JsonCompileOptions::default()
    };
    let mut schema = with_options(parameters, &options)?;
    // Arguments are an object, which a schema may leave unsaid.
    if let Some(fields) = schema.as_object_mut()
        && !fields.contains_key("type")
    {
        fields.insert("type".to_string(), "object".into());
    }
    let head = quoted(&format!("{{\"name\": {}, \"arguments\": ", Value::from(tool)));
    Ok(format!("{rule}: {head} {rule}_arguments \"}}\"\n{rule}_arguments: %json {schema}\n"))
}

/// Rules of what a call as tags has of its own, from its name on, with any arguments.
fn any_xml(rule: &str, tool: &str) -> String {
    let (head, end) = (quoted(&format!("{tool}>")), quoted(FUNCTION_END));
    format!("{rule}: {head} {rule}_rest\n{rule}_rest[suffix={end}]: /(?s:.*)/\n")
}

/// The same with arguments that a schema allows.
fn xml(rule: &str, tool: &str, function: &Value, parameters: &Value) -> Result<String, ConstraintError> {
    check_tag(tool)?;
    check_keywords(parameters)?;
    let required = parameters.get("required").and_then(Value::as_array);
    let is_required = |key: &str| required.is_some_and(|list| list.iter().any(|k| k == key));
    let properties = parameters.get("properties").and_then(Value::as_object);
    if let Some(Value::String(missing)) =
        required.into_iter().flatten().find(|k| properties.is_none_or(|p| !p.contains_key(k.as_str().unwrap_or(""))))
    {
        return refuse(format!("{missing:?} is required and not among the properties"));
    }
    let mut call = format!("{rule}: {}", quoted(&format!("{tool}>\n")));
    let mut rules = String::new();
    for (i, (key, schema)) in properties.into_iter().flatten().enumerate() {
        check_tag(key)?;
        let (parameter, maybe) = (format!("{rule}_{i}"), if is_required(key) { "" } else { "?" });
        _ = write!(call, " {parameter}{maybe}");
        let kinds = Tools::new(std::slice::from_ref(function)).parameter(tool, key);
        let mut value =
            Argument { root: parameters, kinds, rule: &parameter, any_of: Vec::new(), rules: String::new() };
        value.add(schema, DEPTH_MAX)?;
        let head = quoted(&format!("<parameter={key}>\n"));
        _ = writeln!(rules, "{parameter}: {head} ({})\n{}", value.any_of.join(" | "), value.rules);
    }
    Ok(format!("{call} {}\n{rules}", quoted(FUNCTION_END)))
}

/// Names stand in tags, which escape nothing.
fn check_tag(name: &str) -> Result<(), ConstraintError> {
    match name.contains(['<', '>', '\n', '\r']) || name.trim() != name || name.is_empty() {
        true => refuse(format!("the name {name:?} cannot be written in the form of calls that this model uses")),
        false => Ok(()),
    }
}

/// Refuses what a schema says of an object as a whole; its properties are followed one by one.
fn check_keywords(parameters: &Value) -> Result<(), ConstraintError> {
    const OF_THE_WHOLE: [&str; 16] = [
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "const",
        "enum",
        "minProperties",
        "maxProperties",
        "patternProperties",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedProperties",
    ];
    match OF_THE_WHOLE.iter().find(|key| parameters.get(**key).is_some()) {
        Some(key) => {
            refuse(format!("{key} at the top of parameters is not supported in the form of calls that this model uses"))
        }
        None if parameters.get("type").is_some_and(|t| t != "object") => refuse("parameters are an object"),
        None => Ok(()),
    }
}

/// The value of one argument in tags.
struct Argument<'a> {
    /// What `$ref` points into.
    root: &'a Value,
    /// What the parser of answers makes of the value's text.
    kinds: Kinds,
    rule: &'a str,
    /// What the value may be, each with the end of the argument.
    any_of: Vec<String>,
    /// Rules that those refer to.
    rules: String,
}

impl Argument<'_> {
    fn add(&mut self, schema: &Value, depth: usize) -> Result<(), ConstraintError> {
        if !self.kinds.allow_text() {
            return self.add_json(schema);
        }
        if depth == 0 {
            return refuse("its schema refers to itself where a text may be");
        }
        if let Some(at) = schema.get("$ref") {
            let target = at.as_str().and_then(|at| self.root.pointer(at.strip_prefix('#')?));
            return match target {
                Some(target) => self.add(target, depth - 1),
                None => refuse(format!("$ref {at} points to nothing in the parameters")),
            };
        }
        if let Some(Value::Array(parts)) = schema.get("anyOf") {
            return parts.iter().try_for_each(|part| self.add(part, depth - 1));
        }
        if let Some(key) = ["oneOf", "allOf", "not", "if"].iter().find(|key| schema.get(**key).is_some()) {
            return refuse(format!("{key} is not supported where an argument may be a text"));
        }
        match (schema.get("enum"), schema.get("const"), schema.get("type")) {
            (Some(Value::Array(values)), _, _) => values.iter().try_for_each(|v| self.add_constant(v)),
            (_, Some(value), _) => self.add_constant(value),
            (_, _, Some(Value::Array(types))) => types.iter().try_for_each(|t| self.add_type(schema, t)),
            (_, _, Some(one)) => self.add_type(schema, one),
            (_, _, None) => self.add_text(schema),
        }
    }

    fn add_type(&mut self, schema: &Value, one: &Value) -> Result<(), ConstraintError> {
        if one == "string" {
            return self.add_text(schema);
        }
        let mut schema = schema.clone();
        schema["type"] = one.clone();
        self.add_json(&schema)
    }

    fn add_constant(&mut self, value: &Value) -> Result<(), ConstraintError> {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        check_text(&text)?;
        self.any_of.push(quoted(&format!("{text}{PARAMETER_END}")));
        Ok(())
    }

    fn add_json(&mut self, schema: &Value) -> Result<(), ConstraintError> {
        let mut schema = compact(schema)?;
        for key in ["$defs", "definitions"] {
            if let (Some(defs), None) = (self.root.get(key), schema.get(key)) {
                schema[key] = defs.clone();
            }
        }
        self.any_of.push(format!("%json {schema} {}", quoted(PARAMETER_END)));
        Ok(())
    }

    fn add_text(&mut self, schema: &Value) -> Result<(), ConstraintError> {
        let name = format!("{}_{}", self.rule, self.any_of.len());
        let terminal = name.to_ascii_uppercase();
        let mut regexes = vec!["(?s:.*)".to_string()];
        let (least, most) = (schema.get("minLength"), schema.get("maxLength"));
        if least.is_some() || most.is_some() {
            let bound = |n: Option<&Value>| n.map_or(String::new(), Value::to_string);
            let least = least.map_or("0".to_string(), |n| bound(Some(n)));
            regexes.push(format!("(?s:.{{{least},{}}})", bound(most)));
        }
        if let Some(pattern) = schema.get("pattern") {
            regexes.push(whole(pattern)?);
        }
        if !self.kinds.only_text() && !self.kinds.text_or_null() {
            // What looks like JSON would be taken for it.
            regexes.push("(?s:[^\\s\"\\[{0-9+-].*)".to_string());
        }
        let all: Vec<String> = regexes.iter().map(|r| format!("/{}/", regex_to_lark(r, "dw"))).collect();
        let tags = "~/(?s:.*)(<\\/parameter>|<\\/function>|<parameter=)(?s:.*)/";
        let end = quoted(PARAMETER_END);
        _ = write!(self.rules, "{name}[suffix={end}]: {terminal}\n{terminal}: {} & {tags}\n", all.join(" & "));
        self.any_of.push(name);
        Ok(())
    }
}

fn check_text(text: &str) -> Result<(), ConstraintError> {
    match ["</parameter>", "</function>", "<parameter="].iter().any(|tag| text.contains(tag)) {
        true => refuse(format!("the text {text:?} cannot be written in the form of calls that this model uses")),
        false => Ok(()),
    }
}

/// A pattern as an expression for a whole text. One that is not anchored at both ends, or only in some of its alternatives, would
/// take rewriting.
fn whole(pattern: &Value) -> Result<String, ConstraintError> {
    let text = pattern.as_str().unwrap_or_default();
    match text.strip_prefix('^').and_then(|t| t.strip_suffix('$')) {
        Some(inner) if !inner.ends_with('\\') && !inner.contains('|') => Ok(inner.to_string()),
        _ => refuse(format!(
            "the pattern {pattern} has to begin with ^, end with $ and have no | where an argument is a text"
        )),
    }
}
