//! Prompts: tokens of conversations and texts, and whether they fit. Rendering and tokenizing take a while for long texts, so this
//! runs on threads that may be kept busy.

use apr_engine::About;
use apr_engine::chat_template::{ChatInput, RenderedPiece};
use apr_engine::constraint::Thought;
use apr_engine::generate::GenerateError;
use apr_engine::output_parser::Thinking;

use crate::errors::ApiError;

/// Does what takes a while on a thread where nobody waits for it.
///
/// # Errors
/// What it gives, or a panic in it.
pub(crate) async fn elsewhere<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let panicked = |_| ApiError::engine("internal_error", "the prompt could not be made");
    tokio::task::spawn_blocking(f).await.map_err(panicked)?
}

/// A conversation as tokens.
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    /// Whether the answer begins in the middle of a thought.
    pub(crate) thinking: Thinking,
    /// Whether a thought comes before what an answer is held to.
    pub(crate) thought: Thought,
}

/// The prompt of a conversation. With `begun` the assistant's answer begins with that text, and goes on from there.
///
/// # Errors
/// What the template refuses.
pub(crate) fn chat(about: &About, input: &ChatInput, begun: Option<&str>) -> Result<Prompt, ApiError> {
    let template = about.template.as_ref().ok_or(apr_engine::EngineError::NoTemplate)?;
    let rendered = template.render(input)?;
    let texts = rendered.iter().map(|piece| match piece {
        RenderedPiece::Control(text) | RenderedPiece::Text(text) => text.as_str(),
    });
    let text = texts.collect::<String>();
    let thinking = Thinking::of_prompt(&text);
    let thought = match thinking {
        Thinking::Opened => Thought::Opened,
        // The template of a model that may think knows the tag; a thought that it has closed was there to leave it out.
        _ if template.source().contains("<think>") && !text.trim_end().ends_with("</think>") => Thought::May,
        _ => Thought::None,
    };
    Ok(Prompt { tokens: about.rendered_tokens(&rendered, begun), thinking, thought })
}

/// Refuses what can never be answered, before it waits for anything.
///
/// # Errors
/// No token at all, or more than the context holds together with those asked for.
pub(crate) fn check_fits(about: &About, prompt: &[u32], max_tokens: Option<usize>) -> Result<(), ApiError> {
    let (n_prompt, n_ctx) = (prompt.len(), about.n_ctx);
    // An answer without a limit needs room for one token at least.
    let max_tokens = max_tokens.unwrap_or(1);
    if n_prompt == 0 {
        return Err(GenerateError::EmptyPrompt.into());
    }
    if n_prompt.saturating_add(max_tokens) > n_ctx {
        return Err(GenerateError::ContextOverflow { n_prompt, max_tokens, n_ctx }.into());
    }
    Ok(())
}
