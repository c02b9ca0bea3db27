//! The web page at `/`: a chat that also looks inside. Its files are part of the program, need nothing from anywhere else, and
//! need no key: what they ask the API for does.
//!
//! The page shows text of strangers (a model's answers), so the policy lets nothing run and nothing load but these files.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::errors::ApiError;
use crate::state::State;

/// Scripts, styles and drawings come from this server; requests and answers go to it and from it; everything else is refused.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct File {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

/// A file of the page, by its name below `/page/`.
macro_rules! file {
    ($name:literal, $kind:literal) => {
        File { name: $name, kind: $kind, text: include_str!(concat!("../page/", $name)) }
    };
}

const INDEX: File = file!("index.html", "text/html; charset=utf-8");
const ICON: File = file!("icon.svg", "image/svg+xml");
const FILES: [File; 13] = [
    file!("style.css", "text/css; charset=utf-8"),
    ICON,
    file!("theme.js", "text/javascript; charset=utf-8"),
    file!("app.js", "text/javascript; charset=utf-8"),
    file!("api.js", "text/javascript; charset=utf-8"),
    file!("dom.js", "text/javascript; charset=utf-8"),
    file!("experts.js", "text/javascript; charset=utf-8"),
    file!("inside.js", "text/javascript; charset=utf-8"),
    file!("markdown.js", "text/javascript; charset=utf-8"),
    file!("run.js", "text/javascript; charset=utf-8"),
    file!("store.js", "text/javascript; charset=utf-8"),
    file!("track.js", "text/javascript; charset=utf-8"),
    file!("view.js", "text/javascript; charset=utf-8"),
];

/// Where the page is.
pub(crate) fn routes() -> Router<Arc<State>> {
    Router::new()
        .route("/", get(async |headers: HeaderMap| respond(&INDEX, &headers)))
        // Browsers ask for this unasked.
        .route("/favicon.ico", get(async |headers: HeaderMap| respond(&ICON, &headers)))
        .route("/page/{name}", get(file))
}

/// `GET /page/NAME`.
async fn file(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    match FILES.iter().find(|f| f.name == name) {
        Some(file) => Ok(respond(file, &headers)),
        None => Err(ApiError::refused(StatusCode::NOT_FOUND, "unknown_path", "the page has no file of this name")),
    }
}

/// A file, or that the browser has it already. It asks every time, so that after an update it does not mix files of two versions.
fn respond(file: &File, asked: &HeaderMap) -> Response {
    let tag = tag(file.text);
    let headers = [
        (CONTENT_TYPE, file.kind),
        (ETAG, &tag),
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
    ];
    let known = asked.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match known.split(',').any(|k| k.trim().trim_start_matches("W/") == tag) {
        true => (StatusCode::NOT_MODIFIED, headers).into_response(),
        false => (headers, file.text).into_response(),
    }
}

fn tag(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}
