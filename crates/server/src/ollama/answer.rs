//! Answers as Ollama writes them: one object, or a line for each piece and one with the counts.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use apr_engine::About;
use apr_engine::answer::{Piece, Standing};
use apr_engine::generate::{Finish, Generated};
use serde_json::{Map, Value, json};

use super::models::rfc3339;
use super::nanos;
use crate::errors::{ApiError, ErrorForm};
use crate::job::Whole;
use crate::openai::logprobs::ChatToken;
use crate::openai::tools::{Call, Fields, Outlet};
use crate::sse::Chunks;
use crate::trace;

/// What holds the text of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// `message`
    Chat,
    /// `response`
    Text,
}

/// Writes one answer.
pub(super) struct Lines {
    shape: Shape,
    model: String,
    about: Arc<About>,
    began: Instant,
    outlet: Option<Outlet>,
    /// A call whose arguments still come; they are an object here, and told at once.
    call: Option<Call>,
}

impl Lines {
    pub(super) fn new(shape: Shape, model: String, about: Arc<About>, began: Instant) -> Lines {
        Lines { shape, model, about, began, outlet: None, call: None }
    }

    pub(super) fn answer_by(&mut self, mut outlets: Vec<Outlet>) {
        self.outlet = outlets.pop();
    }

    /// The answer to who asks nothing.
    pub(super) fn loaded(&self) -> Value {
        self.line(Fields::silent(), Vec::new(), json!({"done": true, "done_reason": "load"}))
    }

    /// A whole answer.
    pub(super) fn whole(mut self, whole: Whole) -> Value {
        let mut fields = match &mut self.outlet {
            Some(outlet) => outlet.message(&whole.generated.text),
            None => Fields::silent(),
        };
        let calls = std::mem::take(&mut fields.tool_calls).into_iter().filter_map(object).collect();
        let mut line = self.line(fields, calls, self.counts(&whole.generated));
        if !whole.standings.is_empty() {
            line["logprobs"] = whole.standings.iter().map(|s| self.logprob(s)).collect();
        }
        line
    }

    fn line(&self, fields: Fields, calls: Vec<Value>, end: Value) -> Value {
        let mut line = Map::new();
        line.insert("model".to_string(), self.model.as_str().into());
        line.insert("created_at".to_string(), rfc3339(SystemTime::now()).into());
        let content = fields.content.unwrap_or_default();
        match self.shape {
            Shape::Chat => {
                let mut message = json!({"role": "assistant", "content": content});
                if let Some(thinking) = fields.reasoning_content {
                    message["thinking"] = thinking.into();
                }
                if !calls.is_empty() {
                    message["tool_calls"] = calls.into();
                }
                line.insert("message".to_string(), message);
            }
            Shape::Text => {
                line.insert("response".to_string(), content.into());
                if let Some(thinking) = fields.reasoning_content {
                    line.insert("thinking".to_string(), thinking.into());
                }
            }
        }
        if let Value::Object(end) = end {
            line.extend(end);
        }
        Value::Object(line)
    }

    fn piece_line(&self, fields: Fields, calls: Vec<Value>) -> Value {
        self.line(fields, calls, json!({"done": false}))
    }

    fn counts(&self, g: &Generated) -> Value {
        let reason = match g.finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        };
        let mut counts = json!({
            "done": true,
            "done_reason": reason,
            "total_duration": nanos(self.began.elapsed()),
            "load_duration": 0,
            "prompt_eval_count": g.n_prompt,
            "prompt_eval_duration": nanos(g.prefill),
            "eval_count": g.tokens.len(),
            "eval_duration": nanos(g.decode),
        });
        trace::add(&mut counts, g);
        counts
    }

    fn logprob(&self, standing: &Standing) -> Value {
        serde_json::to_value(ChatToken::new(&self.about, standing)).expect("wire types are JSON")
    }

    /// Lines for what is new of a message.
    fn news(&mut self, news: Vec<Fields>) -> Vec<Value> {
        let mut lines = Vec::new();
        for mut fields in news {
            for part in std::mem::take(&mut fields.tool_calls) {
                match &mut self.call {
                    Some(call) if part.id.is_none() => call.function.arguments.push_str(&part.function.arguments),
                    _ => lines.extend(self.call.replace(part).and_then(object).map(|c| self.call_line(c))),
                }
            }
            if fields.content.is_some() || fields.reasoning_content.is_some() {
                lines.extend(self.call.take().and_then(object).map(|c| self.call_line(c)));
                lines.push(self.piece_line(fields, Vec::new()));
            }
        }
        lines
    }

    fn call_line(&self, call: Value) -> Value {
        self.piece_line(Fields::silent(), vec![call])
    }
}

/// A call with its arguments as an object; one that broke off is none.
fn object(call: Call) -> Option<Value> {
    let arguments: Map<String, Value> = serde_json::from_str(&call.function.arguments).ok()?;
    Some(json!({"id": call.id, "function": {"name": call.function.name, "arguments": arguments}}))
}

impl Chunks<Value> for Lines {
    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Value> {
        let news = self.outlet.as_mut().map(|o| o.push(&piece.text)).unwrap_or_default();
        let mut lines = self.news(news);
        if let Some(standing) = &piece.standing {
            if lines.is_empty() {
                lines.push(self.piece_line(Fields::silent(), Vec::new()));
            }
            lines[0]["logprobs"] = json!([self.logprob(standing)]);
        }
        lines
    }

    fn end(&mut self, _: usize, generated: Generated) -> Vec<Value> {
        let news = self.outlet.as_mut().map(Outlet::finish).unwrap_or_default();
        let mut lines = self.news(news);
        lines.extend(self.call.take().and_then(object).map(|c| self.call_line(c)));
        lines.push(self.line(Fields::silent(), Vec::new(), self.counts(&generated)));
        lines
    }

    fn finish(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Value> {
        vec![ErrorForm::Ollama.body(e, None)]
    }

    fn alive(&self) -> Option<Value> {
        Some(self.piece_line(Fields::silent(), Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use apr_engine::output_parser::Thinking;
    use apr_engine::{Engine, EngineOptions, KvType, device::Device};

    use super::*;
    use crate::job::Event;
    use crate::job::tests::{generated, pending, whole};
    use crate::openai::tools::Tools;

    fn lines() -> Lines {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
        let device = Device::Cpu { n_threads: Some(1), isa: None };
        let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(64) };
        let about = Engine::load(&path, options).unwrap().about;
        let mut lines = Lines::new(Shape::Chat, "m".to_string(), about, Instant::now());
        let tool = json!({"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}});
        let tools = Tools::read(&json!({"tools": [tool]})).unwrap();
        lines.answer_by(vec![tools.outlet(Thinking::Split, "", "x".into())]);
        lines
    }

    const CALLS: &str = "<think>which?</think>Looking.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                         <tool_call>\n{\"name\": \"find\", \"arguments\": {\"b\": [2]}}\n</tool_call>";

    /// Calls' arguments, reasoning and content of messages.
    fn told(messages: &[Value]) -> (Vec<Value>, String, String) {
        let joined = |name: &str| messages.iter().filter_map(|m| m[name].as_str()).collect::<String>();
        let calls = messages.iter().filter_map(|m| m["tool_calls"].as_array()).flatten();
        (calls.map(|c| c["function"]["arguments"].clone()).collect(), joined("thinking"), joined("content"))
    }

    #[test]
    fn calls_have_objects_and_come_whole() {
        let expected = (vec![json!({"a": 1}), json!({"b": [2]})], "which?".to_string(), "Looking.".to_string());
        let whole = lines().whole(whole(CALLS));
        assert_eq!(told(&[whole["message"].clone()]), expected);
        let mut lines = lines();
        let piece = |c: char| Piece { token: None, text: c.to_string(), standing: None, experts: None };
        let mut streamed: Vec<Value> = CALLS.chars().flat_map(|c| lines.piece(0, piece(c))).collect();
        streamed.extend(lines.end(0, generated(CALLS)));
        let messages: Vec<Value> = streamed.iter().map(|l| l["message"].clone()).collect();
        assert_eq!(told(&messages), expected);
    }

    #[tokio::test]
    async fn a_silent_stream_has_lines_that_say_nothing() {
        let (answers, sender) = pending(1);
        let response = crate::sse::respond_lines(answers, lines(), Duration::from_millis(20)).await.unwrap();
        let mut body = response.into_body();
        let mut seen = String::new();
        while seen.lines().count() < 2 {
            let frame = http_body_util::BodyExt::frame(&mut body).await.unwrap().unwrap();
            seen += std::str::from_utf8(frame.data_ref().unwrap()).unwrap();
        }
        sender.send((0, Event::End(Ok(generated("Hi."))))).unwrap();
        drop(sender);
        let rest = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        seen += std::str::from_utf8(&rest).unwrap();
        let lines: Vec<Value> = seen.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &lines[..2] {
            assert_eq!((&line["message"]["content"], &line["done"]), (&json!(""), &json!(false)), "{line}");
        }
        assert_eq!(lines.iter().filter(|l| l["done"] == true).count(), 1, "it ends as any other: {seen}");
    }

    #[test]
    fn a_call_that_breaks_off_is_none() {
        let text = "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"a\": \"b";
        let whole = lines().whole(whole(text));
        assert_eq!(told(&[whole["message"].clone()]).0, [] as [Value; 0]);
    }
}
