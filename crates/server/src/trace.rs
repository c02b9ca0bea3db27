//! `x-apr-trace`: who may have a request traced, and what its answer tells of that.
//!
//! The header says `stats`, `save`, or `save=` and names of stages. A trace shows what a prompt made of the model, so that it takes a
//! key of the administrators; it slows everybody's steps, and a saved one fills disks.

use std::path::PathBuf;

use apr_engine::generate::{Generated, Request};
use apr_engine::stage::Stage;
use apr_engine::trace::json::{global, layers};
use apr_engine::trace::served::{SaveAsk, ServedTrace, TraceAsk};
use axum::http::request::Parts;
use axum::http::{HeaderName, StatusCode};
use serde_json::{Value, json};

use crate::errors::ApiError;
use crate::guard::RequestId;
use crate::state::State;

const HEADER: HeaderName = HeaderName::from_static("x-apr-trace");

/// What a request's header asks to have traced, which mostly is nothing.
#[derive(Debug, Default)]
pub(crate) struct Asked(Option<TraceAsk>);

impl Asked {
    /// Reads it from the head of a request.
    ///
    /// # Errors
    /// No administrator's key, and what says nothing that can be traced.
    pub(crate) fn read(parts: &Parts, state: &State) -> Result<Asked, ApiError> {
        let Some(value) = parts.headers.get(HEADER) else { return Ok(Asked(None)) };
        if !state.is_admin(&parts.headers) {
            let message = "x-apr-trace looks into the pass, which takes a key of the server's --admin-key-file; send it as \
                           Authorization: Bearer KEY";
            return Err(ApiError::refused(StatusCode::FORBIDDEN, "admin_key_required", message));
        }
        let id = parts.extensions.get::<RequestId>().map_or("", |id| id.0.as_str());
        Ok(Asked(Some(read(&String::from_utf8_lossy(value.as_bytes()), id, state)?)))
    }

    /// Refuses it where no answer is generated.
    ///
    /// # Errors
    /// Anything that was asked.
    pub(crate) fn refuse(&self) -> Result<(), ApiError> {
        match self.0 {
            None => Ok(()),
            Some(_) => {
                let message = "x-apr-trace: this request generates no answer, so that there is nothing to trace";
                Err(ApiError::invalid("invalid_trace", message))
            }
        }
    }

    /// Has the one request that answers traced.
    ///
    /// # Errors
    /// More than one.
    pub(crate) fn put_in(self, requests: &mut [Request]) -> Result<(), ApiError> {
        match (self.0, requests) {
            (None, _) => Ok(()),
            (ask, [one]) => {
                one.trace = ask;
                Ok(())
            }
            (_, all) => {
                let message = format!("x-apr-trace traces one answer; {} are asked for", all.len());
                Err(ApiError::invalid("too_many_answers", message))
            }
        }
    }
}

fn read(value: &str, id: &str, state: &State) -> Result<TraceAsk, ApiError> {
    let wrong = |what: String| ApiError::invalid("invalid_trace", format!("x-apr-trace: {what}"));
    let (what, names) = value.split_once('=').map_or((value, None), |(what, names)| (what, Some(names)));
    match (what.trim(), names) {
        ("stats", None) => Ok(TraceAsk::default()),
        ("save", names) => {
            let stages = names.map(|names| names.split(',').map(Stage::parse).collect::<Result<Vec<Stage>, _>>());
            let stages = stages.transpose().map_err(|e| wrong(e.to_string()))?;
            let Some(dir) = &state.settings.trace_dir else {
                return Err(wrong("this server saves no traces; start it with --trace-dir DIR".to_string()));
            };
            let (path, max_bytes) = (dir.join(file_name(id)), state.settings.trace_bytes);
            Ok(TraceAsk { save: Some(SaveAsk { path, stages, max_bytes }) })
        }
        _ => Err(wrong(format!("expected stats, save, or save=STAGE,STAGE, got {value:?}"))),
    }
}

/// The file of a request's trace. An id that a client chose may hold anything but a path.
fn file_name(id: &str) -> PathBuf {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    format!("{}.safetensors", id.chars().map(safe).collect::<String>()).into()
}

/// What is told of an answer's trace, where it has one.
pub(crate) fn of(generated: &Generated) -> Option<Value> {
    generated.trace.as_deref().map(told)
}

/// Adds it to an answer, or to the last event of one that is streamed.
pub(crate) fn add(answer: &mut Value, generated: &Generated) {
    if let Some(trace) = of(generated) {
        answer["apr_trace"] = trace;
    }
}

/// A trace by the names of `apr trace --json`.
fn told(trace: &ServedTrace) -> Value {
    let (h, s) = (&trace.header, &trace.stats);
    let (path, error) = match &trace.saved {
        None => (None, None),
        Some(Ok(path)) => (Some(path.display().to_string()), None),
        Some(Err(e)) => (None, Some(format!("the trace was not saved: {e}"))),
    };
    json!({
        "schema": "apr.trace/1",
        "architecture": h.architecture, "device": h.device, "isa": h.isa, "precision": h.precision, "kv": h.kv,
        "fused": h.fused,
        "encoded_tokens": h.tokens, "n_prompt": h.n_prompt,
        "positions": [0, h.positions.len()],
        "embedding": global(s, Stage::Embedding),
        "layers": layers(s),
        "final_norm": global(s, Stage::FinalNorm),
        "logits_stats": global(s, Stage::LmHead),
        "saved": path, "error": error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_s_id_is_a_file_s_name_and_no_path() {
        for (id, name) in [
            ("req-0a1f", "req-0a1f"),
            ("../../etc/passwd", "______etc_passwd"),
            ("/abs\\olute:x", "_abs_olute_x"),
            ("..", "__"),
        ] {
            assert_eq!(file_name(id), PathBuf::from(format!("{name}.safetensors")));
        }
    }
}
