//! Collects events: joins neighbours of a kind, numbers the calls, and trims text beside what was cut out of it.

use super::Event;

#[derive(Debug, Default)]
pub struct Sink {
    events: Vec<Event>,
    content: Trimmed,
    reasoning: Trimmed,
    calls: usize,
}

/// White space that is not settled, of one kind of text.
#[derive(Debug, Default)]
struct Trimmed {
    pending: String,
    /// Text other than white space has been given out.
    started: bool,
    /// Something was cut out since.
    cut: bool,
}

impl Trimmed {
    /// What can be given out now that `text` has come: all up to its last character that is no white space.
    fn take(&mut self, text: &str) -> String {
        let solid = text.trim_end();
        if solid.is_empty() {
            self.pending.push_str(text);
            return String::new();
        }
        let before = std::mem::take(&mut self.pending) + solid;
        self.pending.push_str(&text[solid.len()..]);
        let trim = self.cut && !self.started;
        self.started = true;
        self.cut = false;
        if trim { before.trim_start().to_owned() } else { before }
    }
}

impl Sink {
    /// Text outside of calls.
    pub fn text(&mut self, thinking: bool, text: &str) {
        if thinking {
            // Reasoning is trimmed whatever stands beside it.
            self.reasoning.cut |= !self.reasoning.started;
            let text = self.reasoning.take(text);
            self.push(Event::Reasoning(text));
        } else {
            let text = self.content.take(text);
            self.push(Event::Content(text));
        }
    }

    /// Something that is no content stands here.
    pub fn cut_content(&mut self) {
        self.content.cut = true;
    }

    /// White space at the end of the reasoning goes.
    pub fn end_reasoning(&mut self) {
        self.reasoning.pending.clear();
    }

    /// A call begins; gives its index.
    pub fn begin(&mut self, name: &str) -> usize {
        let index = self.calls;
        self.calls += 1;
        self.cut_content();
        self.push(Event::ToolCallBegin { index, name: name.to_owned() });
        index
    }

    pub fn arguments(&mut self, index: usize, delta: &str) {
        self.push(Event::ToolCallArguments { index, delta: delta.to_owned() });
    }

    pub fn end(&mut self, index: usize, complete: bool) {
        self.push(Event::ToolCallEnd { index, complete });
    }

    /// The answer is over: white space that nothing was cut beside is content.
    pub fn finish(&mut self) {
        self.reasoning.pending.clear();
        let end = std::mem::take(&mut self.content.pending);
        if !self.content.cut {
            self.push(Event::Content(end));
        }
    }

    /// The events since the last take.
    pub fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    fn push(&mut self, event: Event) {
        match (self.events.last_mut(), event) {
            (_, Event::Content(text) | Event::Reasoning(text) | Event::ToolCallArguments { delta: text, .. })
                if text.is_empty() => {}
            (Some(Event::Content(last)), Event::Content(text)) => last.push_str(&text),
            (Some(Event::Reasoning(last)), Event::Reasoning(text)) => last.push_str(&text),
            (Some(Event::ToolCallArguments { index: at, delta: last }), Event::ToolCallArguments { index, delta })
                if *at == index =>
            {
                last.push_str(&delta)
            }
            (_, event) => self.events.push(event),
        }
    }
}
