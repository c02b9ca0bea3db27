//! Answers as blocks, one after the other: text, reasoning, calls of tools. Anthropic's API and OpenAI's responses write them so,
//! where a chat's message has a field for each.

use crate::openai::tools::{Fields, Outlet};

/// What a block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Text,
    Reasoning,
    /// Of a tool; what follows is the JSON text of its arguments.
    Call {
        id: String,
        name: String,
    },
}

/// What an answer goes on with. Blocks do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Begin(Block),
    More(String),
    End,
}

/// Where the text of an answer goes in, and blocks come out.
pub(crate) struct Blocks {
    outlet: Outlet,
    open: Option<Block>,
}

impl Blocks {
    pub(crate) fn new(outlet: Outlet) -> Blocks {
        Blocks { outlet, open: None }
    }

    /// What a piece of text gives.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Change> {
        let news = self.outlet.push(text);
        self.changes(news)
    }

    /// What had been held back, and the end of the last block.
    pub(crate) fn finish(&mut self) -> Vec<Change> {
        let news = self.outlet.finish();
        let mut changes = self.changes(news);
        changes.extend(self.open.take().map(|_| Change::End));
        changes
    }

    /// All that a whole text gives.
    pub(crate) fn whole(&mut self, text: &str) -> Vec<Change> {
        let mut changes = self.push(text);
        changes.extend(self.finish());
        changes
    }

    /// Whether the answer calls a tool.
    pub(crate) fn has_called(&self) -> bool {
        self.outlet.has_called()
    }

    fn changes(&mut self, news: Vec<Fields>) -> Vec<Change> {
        let mut changes = Vec::new();
        for Fields { content, reasoning_content, tool_calls } in news {
            reasoning_content.into_iter().for_each(|text| self.add(&mut changes, Block::Reasoning, text));
            content.into_iter().for_each(|text| self.add(&mut changes, Block::Text, text));
            for call in tool_calls {
                if let (Some(id), Some(name)) = (call.id, call.function.name) {
                    self.begin(&mut changes, Block::Call { id, name });
                }
                // Only the call that has begun last goes on.
                changes.extend(Some(call.function.arguments).filter(|a| !a.is_empty()).map(Change::More));
            }
        }
        changes
    }

    fn add(&mut self, changes: &mut Vec<Change>, block: Block, text: String) {
        if self.open.as_ref() != Some(&block) {
            self.begin(changes, block);
        }
        changes.push(Change::More(text));
    }

    fn begin(&mut self, changes: &mut Vec<Change>, block: Block) {
        changes.extend(self.open.replace(block.clone()).map(|_| Change::End));
        changes.push(Change::Begin(block));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use apr_engine::output_parser::Thinking;
    use serde_json::json;

    use super::*;
    use crate::openai::tools::Tools;

    /// Blocks of an answer that may call `find`.
    pub(crate) fn blocks() -> Blocks {
        let tool = json!({"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}});
        let tools = Tools::read(&json!({"tools": [tool]})).unwrap();
        Blocks::new(tools.outlet(Thinking::Split, "", "x".into()))
    }

    /// Reasoning, text, and a call.
    pub(crate) const ANSWER: &str = "<think>which?</think>Looking.\n<tool_call>\n<function=find>\n<parameter=what>\na b\n\
                                     </parameter>\n</function>\n</tool_call>";

    fn joined(changes: Vec<Change>) -> Vec<(Block, String)> {
        let mut blocks: Vec<(Block, String)> = Vec::new();
        let mut is_open = false;
        for change in changes {
            match change {
                Change::Begin(block) => {
                    assert!(!std::mem::replace(&mut is_open, true), "blocks do not overlap");
                    blocks.push((block, String::new()));
                }
                Change::More(text) => blocks.last_mut().unwrap().1.push_str(&text),
                Change::End => assert!(std::mem::replace(&mut is_open, false), "what ends has begun"),
            }
        }
        assert!(!is_open, "every block ends");
        blocks
    }

    #[test]
    fn an_answer_is_cut_into_blocks_however_it_comes() {
        let call = Block::Call { id: "call_x_0".into(), name: "find".into() };
        let expected = [
            (Block::Reasoning, "which?".to_string()),
            (Block::Text, "Looking.".to_string()),
            (call, "{\"what\":\"a b\"}".to_string()),
        ];
        let mut whole = blocks();
        assert_eq!(joined(whole.whole(ANSWER)), expected);
        assert!(whole.has_called());
        let mut streamed = blocks();
        let mut changes: Vec<Change> = ANSWER.chars().flat_map(|c| streamed.push(&c.to_string())).collect();
        changes.extend(streamed.finish());
        assert_eq!(joined(changes), expected);
    }

    #[test]
    fn an_answer_without_text_has_no_block() {
        assert_eq!(blocks().whole(""), []);
    }
}
