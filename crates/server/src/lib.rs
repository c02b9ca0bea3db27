//! HTTP over the engine: the only crate that knows wire types.
//!
//! [`Server`] listens and stops; [`Model`] is what it answers with. A request goes one way: `guard` looks where it comes from,
//! `extract` reads its body, an API (`openai`, `anthropic`) makes requests of the engine of it, `job` submits them, and what comes back is
//! collected into one body or streamed by `sse`. An API is its wire types and two conversions; nothing else knows them.

mod accept;
mod anthropic;
mod blocks;
mod embed;
mod errors;
mod extract;
mod guard;
mod health;
mod infill;
mod job;
mod json_text;
mod keys;
mod llama;
mod metrics;
mod model;
mod names;
mod note;
mod ollama;
mod openai;
mod openapi;
mod page;
mod patience;
mod prompt;
mod routes;
mod server;
mod sse;
mod state;
mod system_lines;
mod tls;
mod trace;

pub use keys::{KeyFileError, Keys};
pub use model::{Model, ModelError, limits};
pub use server::{BindError, RunError, Server};
pub use state::Settings;
pub use system_lines::SystemLines;
pub use tls::{Tls, TlsError};
