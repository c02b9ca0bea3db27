//! What the declared tools say about their parameters: the JSON types that a value written as bare text may have.

use std::collections::HashMap;

use serde_json::Value;

/// `$ref`, `anyOf` and the like within one another; a schema may refer to itself.
const DEPTH_MAX: usize = 8;

/// The tools of a request by name.
#[derive(Debug, Default)]
pub struct Tools(HashMap<String, Tool>);

#[derive(Debug)]
struct Tool {
    parameters: HashMap<String, Kinds>,
    /// What `additionalProperties` says of the rest.
    others: Kinds,
}

/// A set of JSON types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kinds(u8);

impl Tools {
    /// Reads tools with or without the outer `function`. What has no name is passed over, as it cannot be called.
    pub fn new(tools: &[Value]) -> Self {
        let inner = tools.iter().map(|tool| tool.get("function").unwrap_or(tool));
        let named = inner.filter_map(|tool| Some((tool.get("name")?.as_str()?.to_owned(), Tool::new(tool))));
        Self(named.collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn declares(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn has_parameter(&self, tool: &str, key: &str) -> bool {
        self.0.get(tool).is_some_and(|tool| tool.parameters.contains_key(key))
    }

    /// The types of a parameter; a string where the tool or the parameter is not declared.
    pub fn parameter(&self, tool: &str, key: &str) -> Kinds {
        self.0.get(tool).map_or(Kinds::TEXT, |tool| tool.parameters.get(key).copied().unwrap_or(tool.others))
    }
}

impl Tool {
    fn new(tool: &Value) -> Self {
        let schema = tool.get("parameters").unwrap_or(&Value::Null);
        let kinds = |part: &Value| Kinds::of_schema(part, schema).or_text();
        let properties = schema.get("properties").and_then(Value::as_object);
        Self {
            parameters: properties.into_iter().flatten().map(|(key, part)| (key.clone(), kinds(part))).collect(),
            others: schema.get("additionalProperties").map_or(Kinds::TEXT, kinds),
        }
    }
}

impl Kinds {
    pub const TEXT: Self = Self(1);
    pub const TEXT_OR_NULL: Self = Self(1 | 2);
    const NULL: Self = Self(2);
    const BOOLEAN: Self = Self(4);
    const INTEGER: Self = Self(8);
    const NUMBER: Self = Self(16);
    const OBJECT: Self = Self(32);
    const ARRAY: Self = Self(64);

    pub fn only_text(self) -> bool {
        self == Self::TEXT
    }

    pub fn allow_text(self) -> bool {
        self.has(Self::TEXT)
    }

    pub fn text_or_null(self) -> bool {
        self == Self::TEXT_OR_NULL
    }

    /// The JSON of a value that was written as bare text.
    ///
    /// - `null`, or Python's `None`, is null where the schema allows null or no string, in any case of letters.
    /// - JSON is taken as it is written, where it has a type that the schema allows, or where no string is allowed: a
    ///   wrong type then is the model's, and better seen than hidden in a string. White space around it is dropped.
    /// - `True` and `False` are the booleans where those are allowed: templates in Jinja write them so.
    /// - All else is a string, white space included.
    pub fn json(self, text: &str) -> String {
        let word = text.trim();
        let lower = word.to_ascii_lowercase();
        let text_allowed = self.has(Self::TEXT);
        if (self.has(Self::NULL) || !text_allowed) && matches!(&*lower, "null" | "none") {
            return "null".to_owned();
        }
        if self.has(Self::BOOLEAN) && matches!(&*lower, "true" | "false") {
            return lower;
        }
        match serde_json::from_str::<Value>(word) {
            Ok(value) if !text_allowed || self.allows(&value) => word.to_owned(),
            _ => Value::from(text).to_string(),
        }
    }

    fn has(self, kinds: Self) -> bool {
        self.0 & kinds.0 != 0
    }

    fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn or_text(self) -> Self {
        if self == Self::default() { Self::TEXT } else { self }
    }

    /// Whether a value is of one of these types, strings aside: bare text with quotes is a string with quotes.
    fn allows(self, value: &Value) -> bool {
        let whole = value.as_f64().is_some_and(|number| number.fract() == 0.0);
        match value {
            Value::String(_) => false,
            Value::Number(_) if whole => self.has(Self::INTEGER.and(Self::NUMBER)),
            _ => self.has(Self::of_value(value)),
        }
    }

    fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) => Self::NUMBER,
            Value::String(_) => Self::TEXT,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    /// The types that a schema allows; none where it says nothing about them. `root` is what `$ref` points into.
    fn of_schema(schema: &Value, root: &Value) -> Self {
        Self::gather(schema, root, DEPTH_MAX)
    }

    fn gather(schema: &Value, root: &Value, depth: usize) -> Self {
        if depth == 0 {
            return Self::default();
        }
        let list = |key: &str| schema.get(key).and_then(Value::as_array).into_iter().flatten();
        let parts = ["anyOf", "oneOf", "allOf"].into_iter().flat_map(list);
        let target = schema.get("$ref").and_then(Value::as_str).and_then(|at| root.pointer(at.strip_prefix('#')?));
        let mut kinds = parts.chain(target).fold(Self::default(), |all, s| all.and(Self::gather(s, root, depth - 1)));
        kinds = match schema.get("type") {
            Some(Value::String(name)) => kinds.and(Self::of_name(name)),
            Some(Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).map(Self::of_name).fold(kinds, Self::and)
            }
            _ => list("enum").chain(schema.get("const")).map(Self::of_value).fold(kinds, Self::and),
        };
        if schema.get("nullable") == Some(&Value::Bool(true)) { kinds.or_text().and(Self::NULL) } else { kinds }
    }

    /// The type of a name, which clients do not always take from JSON Schema.
    fn of_name(name: &str) -> Self {
        match name.to_ascii_lowercase().as_str() {
            "null" => Self::NULL,
            "boolean" | "bool" => Self::BOOLEAN,
            "integer" | "int" | "long" => Self::INTEGER,
            "number" | "float" | "double" => Self::NUMBER,
            "object" | "dict" | "map" => Self::OBJECT,
            "array" | "list" => Self::ARRAY,
            _ => Self::TEXT,
        }
    }
}
