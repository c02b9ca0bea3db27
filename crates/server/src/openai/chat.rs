//! `POST /v1/chat/completions`.

use std::sync::Arc;

use apr_engine::About;
use apr_engine::answer::{Piece, PromptStep};
use apr_engine::chat_template::ChatInput;
use apr_engine::constraint::Thought;
use apr_engine::generate::{Finish, Generated};
use apr_engine::output_parser::Thinking;
use axum::Json;
use axum::extract::State as Shared;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::inside::{Shown, TokenExperts};
use super::logprobs::{ChatToken, check_scored, n_best_of_prompt, prompt_logprobs};
use super::messages::Conversation;
use super::sampling::{N_BEST_MAX, Sampling, n_best};
use super::tools::{self, Call, Outlet, Tools};
use super::usage::{PromptProgress, Timings, Usage};
use super::{
    Completion, Frame, Head, StreamOptions, check_model, error_event, finish_reason, messages, stop_reason, structured,
};
use crate::errors::ApiError;
use crate::extract::{JsonBody, fields};
use crate::infill::FimTokens;
use crate::job::{self, Answers, Whole};
use crate::model::Model;
use crate::prompt::{self, Prompt};
use crate::sse::{self, Chunks};
use crate::state::{Active, State};
use crate::trace;

/// How a chat is to be answered.
#[derive(Deserialize)]
struct Wire {
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
}

/// The fields that chats have of their own.
#[derive(Deserialize)]
struct Fields {
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    prompt_logprobs: Option<i64>,
    stream: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Begins the assistant's turn at the end of the prompt.
    add_generation_prompt: Option<bool>,
    /// Goes on with a last message of the assistant, instead of answering it.
    continue_final_message: Option<bool>,
}

/// A conversation that can be answered. Other APIs put their requests in OpenAI's form and come here too.
pub(crate) struct Chat {
    pub(crate) prompt: Prompt,
    /// Alternatives that are told of each token.
    pub(crate) n_best: Option<usize>,
    /// The same of each token of the prompt.
    n_best_of_prompt: Option<usize>,
    /// What is to be traced.
    trace: trace::Asked,
    sampling: Sampling,
    tools: Tools,
    begun: String,
}

impl Chat {
    /// Reads a conversation, renders it, and checks that it fits.
    ///
    /// # Errors
    /// A field that is wrong, by its name in OpenAI's form; more tokens than the context holds.
    pub(crate) async fn read(model: &Model, body: JsonBody) -> Result<Chat, ApiError> {
        let chat = Chat::of_any_length(model, body).await?;
        chat.check_fits(model)?;
        Ok(chat)
    }

    /// As [`read`](Self::read), without looking whether it fits.
    pub(crate) async fn of_any_length(model: &Model, body: JsonBody) -> Result<Chat, ApiError> {
        let JsonBody { mut body, room, trace } = body;
        let own: Fields = fields(&body)?;
        let format = structured::read(&body)?;
        let tools = Tools::read(&body)?;
        let mut sampling = Sampling::read(&body, model)?;
        let n_best = own.n_best()?;
        let n_best_of_prompt = n_best_of_prompt(own.prompt_logprobs, own.stream.unwrap_or(false))?;
        let mut conversation = messages::read(body.get_mut("messages").map(Value::take))?;
        let opens = own.opens(&mut conversation)?;
        model.system_lines.leave_out(&mut conversation.messages);
        let about = model.about.clone();
        let kwargs = own.chat_template_kwargs.unwrap_or_default();
        let (begun, declared) = (conversation.begun.clone().unwrap_or_default(), tools.clone());
        let prompt = prompt::elsewhere(move || {
            let mut input =
                ChatInput { kwargs, add_generation_prompt: opens, ..about.chat_input(conversation.messages) };
            declared.tell(about.template.as_ref().map_or("", |t| t.source()), &mut input);
            prompt::chat(&about, &input, conversation.begun.as_deref())
        });
        let mut prompt = prompt.await?;
        prompt.tokens = sampling.keep.of(&model.about, prompt.tokens, sampling.max_tokens)?;
        let template = model.about.template.as_ref().map_or("", |t| t.source());
        sampling.constraint =
            structured::constraint(model, prompt.thought, tools.forms(template, format), &begun).await?;
        drop(room);
        Ok(Chat { prompt, n_best, n_best_of_prompt, trace, sampling, tools, begun })
    }

    /// Refuses a conversation that does not fit.
    ///
    /// # Errors
    /// More tokens than the context holds, with those that are asked for; more than are told how likely they are.
    pub(crate) fn check_fits(&self, model: &Model) -> Result<(), ApiError> {
        prompt::check_fits(&model.about, &self.prompt.tokens, self.sampling.max_tokens)?;
        self.n_best_of_prompt.map_or(Ok(()), |n| check_scored("prompt_logprobs", self.prompt.tokens.len(), n))
    }

    /// Asks for at most so many tokens, or for as many as the context has room for.
    pub(crate) fn limit(&mut self, model: &Model, max_tokens: usize) {
        let n_left = model.about.n_ctx.saturating_sub(self.prompt.tokens.len());
        self.sampling.max_tokens = Some(max_tokens.min(n_left));
    }

    /// Reads `prompt`, which goes to the model as it is, control tokens and all, and so does its answer to the client. With a `suffix`
    /// both are text, and the answer is what is between them.
    ///
    /// # Errors
    /// As [`of_any_length`](Self::of_any_length); a suffix for a model that knows no text between two texts.
    pub(crate) async fn read_text(model: &Model, body: JsonBody) -> Result<Chat, ApiError> {
        let JsonBody { body, room, trace } = body;
        let own: Fields = fields(&body)?;
        let format = structured::read(&body)?;
        let mut sampling = Sampling::read(&body, model)?;
        let n_best = own.n_best()?;
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_string();
        let (before, after) = (text("prompt"), text("suffix"));
        let infill = (!after.is_empty()).then(|| FimTokens::of(&model.about, "suffix")).transpose()?;
        infill.iter().for_each(|fim| sampling.ends.tokens.extend(&fim.ends));
        let about = model.about.clone();
        let tokens = prompt::elsewhere(move || {
            let Some(fim) = infill else { return Ok(about.text_tokens(before.as_bytes(), true)) };
            let [before, after] = [before, after].map(|text| about.tokenizer.encode_text(&text, false));
            Ok(fim.prompt(&about, &[], [&before, &after, &[]]))
        });
        let prompt = Prompt { tokens: tokens.await?, thinking: Thinking::AsText, thought: Thought::None };
        sampling.constraint = structured::constraint(model, prompt.thought, format.into_iter().collect(), "").await?;
        drop(room);
        let tools = Tools::read(&Value::Null)?;
        let begun = String::new();
        Ok(Chat { prompt, n_best, n_best_of_prompt: None, trace, sampling, tools, begun })
    }

    /// Begins to answer; each answer's text goes through its outlet.
    ///
    /// # Errors
    /// More answers than there are places.
    pub(crate) fn submit(
        self,
        state: &State,
        model: &Model,
        active: Active,
    ) -> Result<(Answers, Vec<Outlet>), ApiError> {
        let mut requests: Vec<_> = self.sampling.requests(&self.prompt.tokens, self.n_best).collect();
        // All answers have one prompt.
        requests.iter_mut().take(1).for_each(|first| first.n_best_of_prompt = self.n_best_of_prompt);
        self.trace.put_in(&mut requests)?;
        let answers = job::submit(&state.settings, (model, active), requests)?;
        let outlet = |_| self.tools.outlet(self.prompt.thinking, &self.begun, state.unique());
        Ok((answers, (0..self.sampling.n).map(outlet).collect()))
    }
}

impl Fields {
    /// Whether the assistant's turn begins at the end of the prompt. A last message that is not to be gone on with becomes one of the
    /// conversation.
    fn opens(&self, conversation: &mut Conversation) -> Result<bool, ApiError> {
        let opens = self.add_generation_prompt;
        if (opens, self.continue_final_message) == (Some(true), Some(true)) {
            let message = "cannot be together with add_generation_prompt: the turn has begun";
            return Err(ApiError::field("continue_final_message", message));
        }
        if !self.continue_final_message.unwrap_or(opens != Some(false)) {
            let said = conversation.begun.take().map(|text| json!({"role": "assistant", "content": text}));
            conversation.messages.extend(said);
        }
        Ok(opens != Some(false) || conversation.begun.is_some())
    }

    fn n_best(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(ApiError::field("top_logprobs", "needs logprobs to be true")),
            (true, n) => n_best("top_logprobs", n.unwrap_or(0), N_BEST_MAX).map(Some),
        }
    }
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<Logprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    apr_experts: Option<Vec<TokenExperts>>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    /// Null where tools are called and nothing else is said.
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
    refusal: Option<String>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChunkChoice<D> {
    index: usize,
    delta: D,
    #[serde(flatten)]
    told: Told,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
}

/// What is told of the tokens of a chunk.
#[derive(Default, Serialize)]
struct Told {
    logprobs: Option<Logprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    apr_experts: Option<TokenExperts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// What a stream begins with.
#[derive(Serialize)]
struct Begin {
    role: &'static str,
    /// Null: nothing is said yet, and it may be that nothing will be.
    content: Option<String>,
}

/// Answers a conversation.
pub(crate) async fn create(Shared(state): Shared<Arc<State>>, body: JsonBody) -> Result<Response, ApiError> {
    let (model, active) = state.begin()?;
    let wire: Wire = fields(&body.body)?;
    check_model(&model, wire.model.as_deref())?;
    let is_stream = wire.stream.unwrap_or(false);
    StreamOptions::check(wire.stream_options.as_ref(), is_stream)?;
    let chat = Chat::read(&model, body).await?;
    let show_tokens = chat.sampling.show_tokens;
    let shown = Shown { logprobs: chat.n_best.is_some(), experts: chat.sampling.show_experts, tokens: show_tokens };
    let (n_prompt, n_best_of_prompt) = (chat.prompt.tokens.len(), chat.n_best_of_prompt);
    let prompt_token_ids = show_tokens.then(|| chat.prompt.tokens.clone());
    let (answers, outlets) = chat.submit(&state, &model, active)?;
    if is_stream {
        let head = Head::new(&state, &model, "chatcmpl", "chat.completion.chunk");
        let frame = Frame { prompt_token_ids, ..Frame::new(head, &model, wire.stream_options, n_prompt) };
        let chunks = ChatChunks { frame, outlets, show_tokens, n_prompt };
        return sse::respond(answers, chunks, state.settings.keep_alive).await;
    }
    let whole = answers.whole().await?;
    let head = Head::new(&state, &model, "chatcmpl", "chat.completion");
    let prompt_logprobs = n_best_of_prompt.map(|n| prompt_logprobs(&model.about, &whole[0].of_prompt, n));
    let completion = completion(head, &model.about, whole, outlets, shown);
    Ok(Json(Completion { prompt_token_ids, prompt_logprobs, ..completion }).into_response())
}

fn completion(head: Head, about: &About, whole: Vec<Whole>, outlets: Vec<Outlet>, shown: Shown) -> Completion<Choice> {
    let mut usage = Usage::default();
    whole.iter().enumerate().for_each(|(i, w)| usage.add(&w.generated, i == 0));
    let timings = Timings::of(&whole[0].generated);
    let apr_trace = trace::of(&whole[0].generated);
    let logprobs = |w: &Whole| Logprobs { content: w.standings.iter().map(|s| ChatToken::new(about, s)).collect() };
    let choice = |(index, (w, mut outlet)): (usize, (Whole, Outlet))| {
        let tools::Fields { content, reasoning_content, tool_calls } = outlet.message(&w.generated.text);
        let content = content.or_else(|| tool_calls.is_empty().then(String::new));
        Choice {
            index,
            logprobs: shown.logprobs.then(|| logprobs(&w)),
            apr_experts: shown.experts(w.experts),
            finish_reason: why_ended(&w.generated, &outlet),
            stop_reason: stop_reason(&w.generated),
            token_ids: shown.tokens.then_some(w.generated.tokens),
            message: Message { role: "assistant", content, reasoning_content, tool_calls, refusal: None },
        }
    };
    let choices = whole.into_iter().zip(outlets).enumerate().map(choice).collect();
    Completion { head, choices, usage, timings, prompt_token_ids: None, prompt_logprobs: None, apr_trace }
}

fn why_ended(generated: &Generated, outlet: &Outlet) -> &'static str {
    match generated.finish {
        Finish::Stop if outlet.has_called() => "tool_calls",
        other => finish_reason(other),
    }
}

/// A chat's answers as they come.
struct ChatChunks {
    frame: Frame,
    /// One per answer.
    outlets: Vec<Outlet>,
    show_tokens: bool,
    n_prompt: usize,
}

impl ChatChunks {
    fn delta(&self, index: usize, delta: impl Serialize, told: Told) -> Event {
        self.frame.chunk(ChunkChoice { index, delta, told, finish_reason: None, stop_reason: None })
    }
}

impl Told {
    fn is_something(&self) -> bool {
        self.logprobs.is_some() || self.apr_experts.is_some() || self.token_ids.is_some()
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self) -> Vec<Event> {
        let begin = |index| {
            let delta = Begin { role: "assistant", content: None };
            self.frame.first(ChunkChoice {
                index,
                delta,
                told: Told::default(),
                finish_reason: None,
                stop_reason: None,
            })
        };
        (0..self.outlets.len()).map(begin).collect()
    }

    fn prompt(&mut self, index: usize, step: PromptStep) -> Vec<Event> {
        let (delta, told) = (tools::Fields::default(), Told::default());
        let choice = ChunkChoice { index, delta, told, finish_reason: None, stop_reason: None };
        vec![self.frame.progress(choice, PromptProgress::of(&step, self.n_prompt))]
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Vec<Event> {
        self.frame.count(&piece);
        let logprobs = piece.standing.map(|s| Logprobs { content: vec![ChatToken::new(&self.frame.about, &s)] });
        let token_ids = piece.token.filter(|_| self.show_tokens).map(|token| vec![token]);
        let mut told = Told { logprobs, apr_experts: piece.experts.map(TokenExperts::from), token_ids };
        let mut news = self.outlets[index].push(&piece.text);
        if news.is_empty() && told.is_something() {
            news.push(tools::Fields::silent());
        }
        news.into_iter().map(|fields| self.delta(index, fields, std::mem::take(&mut told))).collect()
    }

    fn end(&mut self, index: usize, generated: Generated) -> Vec<Event> {
        self.frame.end(&generated, index == 0);
        let news = self.outlets[index].finish();
        let mut events: Vec<Event> =
            news.into_iter().map(|fields| self.delta(index, fields, Told::default())).collect();
        let finish_reason = Some(why_ended(&generated, &self.outlets[index]));
        let delta = tools::Fields::default();
        let (told, stop_reason) = (Told::default(), stop_reason(&generated));
        events.push(self.frame.last(ChunkChoice { index, delta, told, finish_reason, stop_reason }));
        events
    }

    fn finish(&mut self) -> Vec<Event> {
        self.frame.finish()
    }

    fn error(&mut self, e: &ApiError) -> Vec<Event> {
        vec![error_event(e)]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use apr_engine::{Engine, EngineOptions, KvType, device::Device};
    use axum::body::to_bytes;

    use super::*;
    use crate::job::Event as Told;
    use crate::job::tests::{answers, generated, whole};

    fn about() -> Arc<About> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-qwen3moe.gguf");
        let device = Device::Cpu { n_threads: Some(1), isa: None };
        Engine::load(&path, EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(64) }).unwrap().about
    }

    const ANSWER: &str = "<think>which?</think>Looking.\n<tool_call>\n<function=find>\n<parameter=what>\na b\n</parameter>\n\
                          </function>\n</tool_call>";

    fn outlet() -> Outlet {
        let tool = json!({"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}});
        Tools::read(&json!({"tools": [tool]})).unwrap().outlet(Thinking::Split, "", "x".into())
    }

    fn head() -> Head {
        Head { id: "1".into(), object: "o", created: 1, model: "m".into(), system_fingerprint: "f" }
    }

    #[test]
    fn a_call_is_a_field_of_the_message() {
        let whole = whole(ANSWER);
        let shown = Shown { logprobs: false, experts: false, tokens: false };
        let completion = completion(head(), &about(), vec![whole], vec![outlet()], shown);
        let choice = &serde_json::to_value(completion).unwrap()["choices"][0];
        let function = json!({"name": "find", "arguments": "{\"what\":\"a b\"}"});
        let expected = json!({"role": "assistant", "content": "Looking.", "reasoning_content": "which?", "refusal": null,
            "tool_calls": [{"id": "call_x_0", "type": "function", "function": function}]});
        assert_eq!(choice["message"], expected);
        assert_eq!(choice["finish_reason"], "tool_calls");
    }

    #[tokio::test]
    async fn a_call_comes_in_pieces() {
        let piece = |c: char| Told::Piece(Piece { token: None, text: c.to_string(), standing: None, experts: None });
        let mut events: Vec<(usize, Told)> = ANSWER.chars().map(|c| (0, piece(c))).collect();
        events.push((0, Told::End(Ok(generated(ANSWER)))));
        let usage = Usage::default();
        let frame = Frame {
            head: head(),
            about: about(),
            usage,
            with_usage: false,
            running: None,
            timings: None,
            prompt_token_ids: None,
            trace: None,
        };
        let chunks = ChatChunks { frame, outlets: vec![outlet()], show_tokens: false, n_prompt: 3 };
        let response = sse::respond(answers(1, events), chunks, Duration::from_secs(60)).await.unwrap();
        let body = String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap();
        let data = body.lines().filter_map(|line| line.strip_prefix("data: {"));
        let choices: Vec<Value> = data
            .map(|rest| serde_json::from_str::<Value>(&format!("{{{rest}")).unwrap()["choices"][0].take())
            .collect();
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": null}));
        let joined = |path: &str| -> String {
            choices.iter().filter_map(|c| c["delta"].pointer(path)?.as_str().map(str::to_string)).collect()
        };
        assert_eq!((joined("/reasoning_content"), joined("/content")), ("which?".into(), "Looking.".into()));
        assert_eq!(
            (joined("/tool_calls/0/id"), joined("/tool_calls/0/function/name")),
            ("call_x_0".into(), "find".into())
        );
        assert_eq!(joined("/tool_calls/0/function/arguments"), "{\"what\":\"a b\"}");
        assert_eq!(choices.last().unwrap()["finish_reason"], "tool_calls");
        assert!(body.ends_with("data: [DONE]\n\n"));
    }
}
