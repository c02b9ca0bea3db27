//! Fields whose meaning is not there yet. To ignore one would be to answer something else than what was asked.

use serde_json::Value;

use super::given;
use crate::errors::ApiError;

/// Refuses a request that needs what is not there.
pub(super) fn refuse(body: &Value) -> Result<(), ApiError> {
    let not_yet = |param: &str, what: &str| Err(ApiError::unsupported(param, format_args!("{what} not supported yet")));
    match given(body, "response_format") {
        Some(format) if format.get("type").is_none_or(|kind| kind != "text") => {
            not_yet("response_format", "formats other than {\"type\": \"text\"} are")
        }
        _ => Ok(()),
    }
}
