//! How the model is told about tools: what its chat template does, and what is said where it does nothing.

use serde_json::Value;

/// The form in which a template asks for calls. The parser reads both; what constrains an answer has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolForm {
    /// Qwen3-Coder's tags.
    Xml,
    /// A JSON object in `<tool_call>`.
    Hermes,
}

impl ToolForm {
    /// The form that a chat template's source shows, or none if it shows neither: such a template leaves tools out, and
    /// [`hermes_system_text`] has to tell of them.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains("<function=") {
            Some(Self::Xml)
        } else if source.contains("<tool_call>") {
            Some(Self::Hermes)
        } else {
            None
        }
    }
}

/// Text for the system message that describes `tools` (OpenAI's objects, written as they are) and asks for calls in
/// Hermes form, for models whose template has no place for tools. It goes behind the user's own system text and an
/// empty line.
pub fn hermes_system_text(tools: &[Value]) -> String {
    let list: String = tools.iter().map(|tool| format!("{tool}\n")).collect();
    format!(
        "# Tools\n\nYou can call functions to help with what the user asks. Each line within <tools></tools> is a JSON \
         object that describes one function:\n<tools>\n{list}</tools>\n\nTo call a function, answer with a JSON object \
         that holds its name and its arguments, within <tool_call></tool_call> tags, one pair of tags per call:\n\
         <tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>"
    )
}
