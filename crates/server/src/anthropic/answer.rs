//! Answers: a message of content blocks, whole or as events.

use apr_engine::answer::Piece;
use apr_engine::generate::{Finish, Generated};
use axum::response::sse::Event;
use serde_json::{Value, json};

use crate::blocks::{Block, Blocks, Change};
use crate::errors::{ApiError, ErrorForm};
use crate::sse::Chunks;
use crate::trace;

/// What is known of an answer before it begins.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) n_prompt: usize,
    /// As the client asked for.
    pub(super) max_tokens: Option<usize>,
}

impl Head {
    fn message(&self, content: Vec<Value>, stop: &Value, usage: Value) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop["stop_reason"], "stop_sequence": stop["stop_sequence"], "usage": usage,
        })
    }
}

/// A whole answer.
pub(super) fn message(head: &Head, blocks: &mut Blocks, generated: &Generated) -> Value {
    let mut content: Vec<Value> = Vec::new();
    let mut text = String::new();
    for change in blocks.whole(&generated.text) {
        match change {
            Change::Begin(block) => content.push(begun(&block)),
            Change::More(more) => text.push_str(&more),
            Change::End => {
                let text = std::mem::take(&mut text);
                let block = content.last_mut().expect("a block ends that has begun");
                match block["type"].as_str() {
                    Some("thinking") => block["thinking"] = text.into(),
                    Some("text") => block["text"] = text.into(),
                    // A call that the limit cut off has no input yet; clients see by `stop_reason` that it must not be used.
                    _ => block["input"] = serde_json::from_str(&text).unwrap_or_else(|_| json!({})),
                }
            }
        }
    }
    let mut message = head.message(content, &stop(head, generated, blocks.has_called()), usage(generated));
    trace::add(&mut message, generated);
    message
}

/// A block without its content.
fn begun(block: &Block) -> Value {
    match block {
        Block::Text => json!({"type": "text", "text": ""}),
        // Nothing is signed here, and nobody checks.
        Block::Reasoning => json!({"type": "thinking", "thinking": "", "signature": ""}),
        Block::Call { id, name } => json!({"type": "tool_use", "id": id, "name": name, "input": {}}),
    }
}

/// Why an answer ended.
fn stop(head: &Head, generated: &Generated, has_called: bool) -> Value {
    let is_cut_short = head.max_tokens.is_some_and(|max| generated.tokens.len() < max);
    let (reason, sequence) = match (generated.finish, &generated.stopped) {
        (Finish::Stop, _) if has_called => ("tool_use", None),
        (Finish::Stop, Some(text)) => ("stop_sequence", Some(text)),
        (Finish::Length, _) if is_cut_short => ("model_context_window_exceeded", None),
        (Finish::Length, _) => ("max_tokens", None),
        (Finish::Stop | Finish::Cancelled, _) => ("end_turn", None),
    };
    json!({"stop_reason": reason, "stop_sequence": sequence})
}

/// Anthropic's counts: tokens that were there already are none of `input_tokens`.
fn usage(generated: &Generated) -> Value {
    json!({
        "input_tokens": generated.n_prompt.saturating_sub(generated.n_cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generated.n_cached,
        "output_tokens": generated.tokens.len(),
    })
}

/// An answer as it comes.
pub(super) struct MessageChunks {
    head: Head,
    blocks: Blocks,
    /// The block that is open or was last, and its index.
    block: Block,
    n_block: usize,
    /// The last event.
    stop: Value,
}

impl MessageChunks {
    pub(super) fn new(head: Head, blocks: Blocks) -> MessageChunks {
        MessageChunks { head, blocks, block: Block::Text, n_block: 0, stop: json!({"type": "message_stop"}) }
    }

    fn events(&mut self, changes: Vec<Change>) -> Vec<Event> {
        changes.into_iter().flat_map(|change| self.written(change)).collect()
    }

    fn written(&mut self, change: Change) -> Vec<Event> {
        let delta =
            |index: usize, delta: Value| event(&json!({"type": "content_block_delta", "index": index, "delta": delta}));
        match change {
            Change::Begin(block) => {
                let content = begun(&block);
                self.block = block;
                self.n_block += 1;
                let index = self.n_block - 1;
                vec![event(&json!({"type": "content_block_start", "index": index, "content_block": content}))]
            }
            Change::More(text) => {
                let more = match self.block {
                    Block::Text => json!({"type": "text_delta", "text": text}),
                    Block::Reasoning => json!({"type": "thinking_delta", "thinking": text}),
                    Block::Call { .. } => json!({"type": "input_json_delta", "partial_json": text}),
                };
                vec![delta(self.n_block - 1, more)]
            }
            Change::End => {
                let index = self.n_block - 1;
                let signature = (self.block == Block::Reasoning)
                    .then(|| delta(index, json!({"type": "signature_delta", "signature": ""})));
                let stop = event(&json!({"type": "content_block_stop", "index": index}));
                signature.into_iter().chain([stop]).collect()
            }
        }
    }
}

impl Chunks for MessageChunks {
    fn begin(&mut self) -> Vec<Event> {
        // How much of the prompt is there already is told at the end, when it is known.
        let usage = json!({
            "input_tokens": self.head.n_prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        });
        let message = self.head.message(Vec::new(), &Value::Null, usage);
        vec![event(&json!({"type": "message_start", "message": message}))]
    }

    fn piece(&mut self, _: usize, piece: Piece) -> Vec<Event> {
        let changes = self.blocks.push(&piece.text);
        self.events(changes)
    }

    fn end(&mut self, _: usize, generated: Generated) -> Vec<Event> {
        let changes = self.blocks.finish();
        let mut events = self.events(changes);
        let stop = stop(&self.head, &generated, self.blocks.has_called());
        events.push(event(&json!({"type": "message_delta", "delta": stop, "usage": usage(&generated)})));
        trace::add(&mut self.stop, &generated);
        events
    }

    fn finish(&mut self) -> Vec<Event> {
        vec![event(&self.stop)]
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![event(&ErrorForm::Anthropic.body(e, None))]
    }

    fn alive(&self) -> Option<Event> {
        Some(event(&json!({"type": "ping"})))
    }
}

/// An event that is named by its type.
fn event(value: &Value) -> Event {
    let name = value["type"].as_str().unwrap_or_default();
    Event::default().event(name).data(value.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::to_bytes;

    use super::*;
    use crate::blocks::tests::{ANSWER, blocks};
    use crate::job::Event as Told;
    use crate::job::tests::{answers, generated, pending};
    use crate::sse;

    fn head() -> Head {
        Head { id: "msg_1".into(), model: "m".into(), n_prompt: 3, max_tokens: Some(9) }
    }

    #[test]
    fn a_message_has_a_block_for_each_thing() {
        let message = message(&head(), &mut blocks(), &generated(ANSWER));
        let expected = json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
            "content": [
                {"type": "thinking", "thinking": "which?", "signature": ""},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "call_x_0", "name": "find", "input": {"what": "a b"}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1},
        });
        assert_eq!(message, expected);
    }

    #[test]
    fn every_end_has_its_reason() {
        let why = |finish, stopped: Option<&str>, n_token, has_called| {
            let tokens = vec![1; n_token];
            let generated = Generated { finish, stopped: stopped.map(str::to_string), tokens, ..generated("") };
            stop(&head(), &generated, has_called)
        };
        let expected = |reason: &str, sequence: Option<&str>| json!({"stop_reason": reason, "stop_sequence": sequence});
        assert_eq!(why(Finish::Stop, None, 2, false), expected("end_turn", None));
        assert_eq!(why(Finish::Stop, Some("X"), 2, false), expected("stop_sequence", Some("X")));
        assert_eq!(why(Finish::Stop, Some("X"), 2, true), expected("tool_use", None));
        assert_eq!(why(Finish::Length, None, 9, true), expected("max_tokens", None));
        assert_eq!(why(Finish::Length, None, 8, false), expected("model_context_window_exceeded", None));
    }

    #[test]
    fn cached_tokens_are_counted_apart() {
        let usage = usage(&Generated { n_prompt: 10, n_cached: 8, ..generated("") });
        assert_eq!((&usage["input_tokens"], &usage["cache_read_input_tokens"]), (&json!(2), &json!(8)));
    }

    #[tokio::test]
    async fn events_come_in_anthropics_order() {
        let piece = |c: char| Told::Piece(Piece { token: None, text: c.to_string(), standing: None, experts: None });
        let mut told: Vec<(usize, Told)> = ANSWER.chars().map(|c| (0, piece(c))).collect();
        told.push((0, Told::End(Ok(generated(ANSWER)))));
        let chunks = MessageChunks::new(head(), blocks());
        let response = sse::respond(answers(1, told), chunks, Duration::from_secs(60)).await.unwrap();
        let body = String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap();
        let (mut kinds, mut joined): (Vec<String>, String) = Default::default();
        for event in body.split_terminator("\n\n") {
            let (name, data) = event.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap()));
            let kind = [&data["type"], &data["content_block"]["type"], &data["delta"]["type"], &data["index"]];
            let kind = kind.iter().filter(|v| !v.is_null()).map(ToString::to_string).collect::<Vec<_>>().join(" ");
            let kind = kind.replace('"', "");
            if kinds.last() != Some(&kind) {
                kinds.push(kind);
            }
            joined += data["delta"]["partial_json"].as_str().unwrap_or_default();
        }
        let expected = [
            "message_start",
            "content_block_start thinking 0",
            "content_block_delta thinking_delta 0",
            "content_block_delta signature_delta 0",
            "content_block_stop 0",
            "content_block_start text 1",
            "content_block_delta text_delta 1",
            "content_block_stop 1",
            "content_block_start tool_use 2",
            "content_block_delta input_json_delta 2",
            "content_block_stop 2",
            "message_delta",
            "message_stop",
        ];
        assert_eq!(kinds, expected);
        assert_eq!(joined, "{\"what\":\"a b\"}");
    }

    #[tokio::test]
    async fn a_silent_stream_pings() {
        let chunks = MessageChunks::new(head(), blocks());
        let (silent, _sender) = pending(1);
        let response = sse::respond(silent, chunks, Duration::from_millis(20)).await.unwrap();
        let mut body = response.into_body();
        let mut seen = String::new();
        while !seen.contains("event: ping\ndata: {\"type\":\"ping\"}\n\n") {
            let frame = http_body_util::BodyExt::frame(&mut body).await.unwrap().unwrap();
            seen += std::str::from_utf8(frame.data_ref().unwrap()).unwrap();
        }
        assert!(seen.starts_with("event: message_start\n"));
    }
}
