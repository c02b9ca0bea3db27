//! Answers: a response of output items, whole or as events.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::Piece;
use apr_engine::generate::{Finish, Generated};
use axum::response::sse::Event;
use serde_json::{Value, json};

use crate::blocks::{Block, Blocks, Change};
use crate::errors::ApiError;
use crate::openai::logprobs::ChatToken;
use crate::openai::{given, now};
use crate::sse::Chunks;
use crate::trace;

/// A response without what is made of it.
pub(super) struct Frame(Value);

impl Frame {
    /// The settings of the request are repeated, with what holds where it has none.
    pub(super) fn new(body: &Value, id: String, model: String, created: u64) -> Frame {
        let of = |name: &str, default: Value| given(body, name).cloned().unwrap_or(default);
        let text = given(body, "text").and_then(|text| given(text, "format")).cloned();
        Frame(json!({
            "id": id, "object": "response", "created_at": created, "status": "in_progress", "background": false,
            "error": null, "incomplete_details": null, "instructions": of("instructions", Value::Null),
            "max_output_tokens": of("max_output_tokens", Value::Null), "metadata": of("metadata", json!({})),
            "model": model, "output": [], "parallel_tool_calls": of("parallel_tool_calls", json!(true)),
            "previous_response_id": null, "reasoning": of("reasoning", json!({"effort": null, "summary": null})),
            "store": false, "temperature": of("temperature", Value::Null),
            "text": {"format": text.unwrap_or_else(|| json!({"type": "text"}))},
            "tool_choice": of("tool_choice", json!("auto")), "tools": of("tools", json!([])),
            "top_p": of("top_p", Value::Null), "truncation": "disabled", "usage": null,
        }))
    }

    fn ended(&self, items: &Items, generated: &Generated) -> Value {
        let mut response = self.0.clone();
        response["status"] = status(generated).into();
        if is_cut(generated) {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        } else {
            response["completed_at"] = now().into();
        }
        response["output"] = items.done.clone().into();
        response["usage"] = json!({
            "input_tokens": generated.n_prompt,
            "input_tokens_details": {"cached_tokens": generated.n_cached, "cache_write_tokens": 0},
            "output_tokens": generated.tokens.len(),
            "output_tokens_details": {"reasoning_tokens": items.n_reasoning.min(generated.tokens.len())},
            "total_tokens": generated.n_prompt + generated.tokens.len(),
        });
        trace::add(&mut response, generated);
        response
    }
}

fn is_cut(generated: &Generated) -> bool {
    generated.finish == Finish::Length
}

fn status(generated: &Generated) -> &'static str {
    match is_cut(generated) {
        true => "incomplete",
        false => "completed",
    }
}

/// A whole response, of items that were told all pieces.
pub(super) fn response(frame: &Frame, mut items: Items, generated: &Generated) -> Value {
    items.finish(status(generated));
    frame.ended(&items, generated)
}

/// Output items in the making. What they are told comes out as events.
pub(super) struct Items {
    blocks: Blocks,
    about: Arc<About>,
    /// Ids of items end with this and their index.
    salt: String,
    done: Vec<Value>,
    /// The item that is being made, and its text.
    open: (Block, String),
    /// How likely the tokens of the open item were, where that is asked for, and those whose text has not been told yet.
    logprobs: Vec<Value>,
    waiting: Vec<Value>,
    /// Tokens of reasoning in items that are done.
    n_reasoning: usize,
}

impl Items {
    pub(super) fn new(blocks: Blocks, salt: String, about: Arc<About>) -> Items {
        let (open, logprobs, waiting) = ((Block::Text, String::new()), Vec::new(), Vec::new());
        Items { blocks, about, salt, done: Vec::new(), open, logprobs, waiting, n_reasoning: 0 }
    }

    pub(super) fn push(&mut self, piece: Piece) -> Vec<Value> {
        let told = piece.standing.map(|s| ChatToken::new(&self.about, &s));
        self.waiting.extend(told.map(|token| serde_json::to_value(token).expect("wire types are JSON")));
        let changes = self.blocks.push(&piece.text);
        changes.into_iter().flat_map(|change| self.written(change, "completed")).collect()
    }

    /// The last item has this status; all before are complete.
    fn finish(&mut self, status: &str) -> Vec<Value> {
        let changes = self.blocks.finish();
        let n_end = changes.iter().filter(|c| **c == Change::End).count();
        let mut ends = 0;
        let written = changes.into_iter().flat_map(|change| {
            ends += usize::from(change == Change::End);
            self.written(change, if ends == n_end { status } else { "completed" })
        });
        written.collect()
    }

    fn written(&mut self, change: Change, status: &str) -> Vec<Value> {
        match change {
            Change::Begin(block) => {
                self.open = (block, String::new());
                self.logprobs.clear();
                let added = self.event("response.output_item.added", [("item", self.item("in_progress"))]);
                let part = self.part().map(|_| self.part_of(""));
                let part = part.map(|part| self.event("response.content_part.added", self.in_content("part", part)));
                [added].into_iter().chain(part).collect()
            }
            Change::More(text) => {
                self.open.1.push_str(&text);
                let mut logprobs = std::mem::take(&mut self.waiting);
                if self.open.0 != Block::Text {
                    logprobs.clear();
                }
                self.logprobs.extend_from_slice(&logprobs);
                vec![self.text_event("delta", "delta", &text, logprobs)]
            }
            Change::End => {
                let (block, text) = &self.open;
                if *block == Block::Reasoning {
                    self.n_reasoning += self.about.tokenizer.encode_bytes(text.as_bytes(), false).len();
                }
                let name = match self.open.0 {
                    Block::Call { .. } => "arguments",
                    _ => "text",
                };
                // What ends an item is no text; the newest token may have brought the next one's beginning as well.
                self.waiting.drain(..self.waiting.len().saturating_sub(1));
                let mut events = vec![self.text_event("done", name, &self.open.1, self.logprobs.clone())];
                if let Some(part) = self.part() {
                    events.push(self.event("response.content_part.done", self.in_content("part", part)));
                }
                let item = self.item(status);
                events.push(self.event("response.output_item.done", [("item", item.clone())]));
                self.done.push(item);
                events
            }
        }
    }

    fn id(&self) -> String {
        let prefix = match self.open.0 {
            Block::Text => "msg",
            Block::Reasoning => "rs",
            Block::Call { .. } => "fc",
        };
        format!("{prefix}_{}{:02x}", self.salt, self.done.len())
    }

    /// The item as it is.
    fn item(&self, status: &str) -> Value {
        let (id, text) = (self.id(), &self.open.1);
        // What has just been added has no content yet.
        let content: Vec<Value> = self.part().filter(|_| status != "in_progress").into_iter().collect();
        match &self.open.0 {
            Block::Text => {
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Block::Reasoning => {
                json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": content})
            }
            Block::Call { id: call, name } => {
                json!({"id": id, "type": "function_call", "status": status, "call_id": call, "name": name, "arguments": text})
            }
        }
    }

    /// The one part of an item that has any.
    fn part(&self) -> Option<Value> {
        match self.open.0 {
            Block::Call { .. } => None,
            _ => Some(self.part_of(&self.open.1)),
        }
    }

    fn part_of(&self, text: &str) -> Value {
        match self.open.0 {
            Block::Reasoning => json!({"type": "reasoning_text", "text": text}),
            _ => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}),
        }
    }

    /// What is new of the text, or all of it.
    fn text_event(&self, step: &str, name: &'static str, text: &str, logprobs: Vec<Value>) -> Value {
        let text = Value::from(text);
        match self.open.0 {
            Block::Text => {
                let fields = self.in_content(name, text).into_iter().chain([("logprobs", logprobs.into())]);
                self.event(&format!("response.output_text.{step}"), fields)
            }
            Block::Reasoning => self.event(&format!("response.reasoning_text.{step}"), self.in_content(name, text)),
            Block::Call { .. } => {
                let fields = [("item_id", self.id().into()), (name, text)];
                self.event(&format!("response.function_call_arguments.{step}"), fields)
            }
        }
    }

    fn in_content(&self, name: &'static str, value: Value) -> [(&'static str, Value); 3] {
        [("item_id", self.id().into()), ("content_index", json!(0)), (name, value)]
    }

    fn event(&self, kind: &str, fields: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
        let mut event = json!({"type": kind, "output_index": self.done.len()});
        fields.into_iter().for_each(|(name, value)| event[name] = value);
        event
    }
}

/// A response as it comes.
pub(super) struct ResponseChunks {
    frame: Frame,
    items: Items,
    /// Events so far.
    n_event: usize,
}

impl ResponseChunks {
    pub(super) fn new(frame: Frame, items: Items) -> ResponseChunks {
        ResponseChunks { frame, items, n_event: 0 }
    }

    /// Events are named by their type and numbered.
    fn numbered(&mut self, events: Vec<Value>) -> Vec<Event> {
        let number = |mut event: Value| {
            event["sequence_number"] = self.n_event.into();
            self.n_event += 1;
            let name = event["type"].as_str().unwrap_or_default().to_string();
            Event::default().event(name).data(event.to_string())
        };
        events.into_iter().map(number).collect()
    }
}

impl Chunks for ResponseChunks {
    fn begin(&mut self) -> Vec<Event> {
        let event = |kind: &str| json!({"type": kind, "response": self.frame.0});
        let events = vec![event("response.created"), event("response.in_progress")];
        self.numbered(events)
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Event> {
        let events = self.items.push(piece);
        self.numbered(events)
    }

    fn end(&mut self, _: usize, generated: Generated) -> Vec<Event> {
        let status = status(&generated);
        let mut events = self.items.finish(status);
        let response = self.frame.ended(&self.items, &generated);
        events.push(json!({"type": format!("response.{status}"), "response": response}));
        self.numbered(events)
    }

    fn finish(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        let mut response = self.frame.0.clone();
        response["status"] = "failed".into();
        response["error"] = json!({"code": "server_error", "message": e.message});
        let error = json!({"type": "error", "code": e.code, "message": e.message, "param": e.param});
        self.numbered(vec![error, json!({"type": "response.failed", "response": response})])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use apr_engine::device::Device;
    use apr_engine::generate::GenerateError;
    use apr_engine::{Engine, EngineOptions, KvType};
    use axum::body::to_bytes;

    use super::*;
    use crate::blocks::tests::{ANSWER, blocks};
    use crate::job::Event as Told;
    use crate::job::tests::{answers, generated};
    use crate::sse;

    fn items() -> Items {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
        let device = Device::Cpu { n_threads: Some(1), isa: None };
        let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(64) };
        Items::new(blocks(), "a".into(), Engine::load(&path, options).unwrap().about)
    }

    fn whole(generated: &Generated) -> Value {
        let mut items = items();
        items.push(Piece { token: None, text: generated.text.clone(), standing: None, experts: None });
        response(&frame(), items, generated)
    }

    fn frame() -> Frame {
        Frame::new(&json!({"temperature": 0.5}), "resp_a".into(), "m".into(), 1)
    }

    #[test]
    fn a_response_has_an_item_for_each_thing() {
        let response = whole(&generated(ANSWER));
        let expected = json!([
            {"id": "rs_a00", "type": "reasoning", "status": "completed", "summary": [],
             "content": [{"type": "reasoning_text", "text": "which?"}]},
            {"id": "msg_a01", "type": "message", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "Looking.", "annotations": [], "logprobs": []}]},
            {"id": "fc_a02", "type": "function_call", "status": "completed", "call_id": "call_x_0", "name": "find",
             "arguments": "{\"what\":\"a b\"}"},
        ]);
        assert_eq!(response["output"], expected);
        assert_eq!((&response["status"], &response["temperature"]), (&json!("completed"), &json!(0.5)));
        assert_eq!((&response["usage"]["input_tokens"], &response["usage"]["total_tokens"]), (&json!(3), &json!(4)));
        assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 1, "at most all there are");
    }

    #[test]
    fn what_the_limit_cut_off_is_incomplete() {
        let cut = Generated { finish: Finish::Length, ..generated("<think>x</think>Look") };
        let response = whole(&cut);
        assert_eq!(response["status"], "incomplete");
        assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
        let statuses: Vec<&Value> = response["output"].as_array().unwrap().iter().map(|i| &i["status"]).collect();
        assert_eq!(statuses, ["completed", "incomplete"]);
    }

    async fn events(told: Vec<(usize, Told)>) -> Vec<Value> {
        let chunks = ResponseChunks::new(frame(), items());
        let response = sse::respond(answers(1, told), chunks, Duration::from_secs(60)).await.unwrap();
        let body = String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap();
        let read = |(i, event): (usize, &str)| {
            let (name, data) = event.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap()));
            assert_eq!(data["sequence_number"], i);
            data
        };
        body.split_terminator("\n\n").enumerate().map(read).collect()
    }

    fn pieces() -> Vec<(usize, Told)> {
        let piece = |c: char| Told::Piece(Piece { token: None, text: c.to_string(), standing: None, experts: None });
        ANSWER.chars().map(|c| (0, piece(c))).collect()
    }

    #[tokio::test]
    async fn events_build_what_the_whole_response_has() {
        let mut told = pieces();
        told.push((0, Told::End(Ok(generated(ANSWER)))));
        let events = events(told).await;
        let mut kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
        kinds.dedup();
        let expected = "created in_progress output_item.added content_part.added reasoning_text.delta reasoning_text.done \
                        content_part.done output_item.done output_item.added content_part.added output_text.delta \
                        output_text.done content_part.done output_item.done output_item.added \
                        function_call_arguments.delta function_call_arguments.done output_item.done completed";
        let expected: Vec<String> = expected.split(' ').map(|k| format!("response.{k}")).collect();
        assert_eq!(kinds, expected);
        let done = events.iter().filter(|e| e["type"] == "response.output_item.done").map(|e| e["item"].clone());
        let last = events.last().unwrap();
        assert_eq!(last["response"]["output"], Value::Array(done.collect()));
        let whole = whole(&generated(ANSWER));
        assert_eq!(last["response"]["output"], whole["output"]);
        let deltas = |kind: &str| -> String {
            events.iter().filter(|e| e["type"] == kind).map(|e| e["delta"].as_str().unwrap()).collect()
        };
        assert_eq!(deltas("response.output_text.delta"), "Looking.");
        assert_eq!(deltas("response.function_call_arguments.delta"), "{\"what\":\"a b\"}");
    }

    #[tokio::test]
    async fn a_failure_in_the_middle_is_told() {
        let mut told = pieces();
        told.push((0, Told::End(Err(GenerateError::Stopped))));
        let events = events(told).await;
        let [.., error, failed] = &events[..] else { panic!("{events:?}") };
        assert_eq!((&error["type"], &failed["type"]), (&json!("error"), &json!("response.failed")));
        assert_eq!(failed["response"]["status"], "failed");
    }
}
