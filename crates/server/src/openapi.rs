//! `GET /openapi.json`: what can be asked of this server, and within which limits, for tools that make clients and tests of it.
//!
//! The document is written by hand, because limits are checked by hand too and no derive knows of them. Tests hold it to the
//! routes, and `clients/test_schema.py` to the answers.

use axum::http::header;
use axum::response::IntoResponse;

/// `GET /openapi.json`.
pub(crate) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], include_str!("../openapi.json"))
}
