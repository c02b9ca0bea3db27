//! API keys: who is answered, and who may look inside.
//!
//! Keys come from files, one a line, and are held as digests, so that no message and no dump shows one. What is shown is compared with
//! every one of them in constant time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::errors::ApiError;
use crate::state::State;

/// What may be had without a key: whether the server answers, and the page that asks for one. Nothing of the model and of anyone's
/// requests is there.
const OPEN: [&str; 5] = ["/health", "/v1/health", "/ping", "/", "/favicon.ico"];
const OPEN_BELOW: &str = "/page/";

/// The keys of a server.
#[derive(Clone, Default)]
pub struct Keys {
    /// `None` where everybody is answered.
    api: Option<Vec<[u8; 32]>>,
    admin: Vec<[u8; 32]>,
}

/// Why a file of keys is no good. Messages name lines, and never what is in them.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} holds no key; expected one a line (lines that begin with # are comments)")]
    Empty { path: PathBuf },
    #[error("{path}, line {line}: expected a key of printable ASCII characters without spaces")]
    NoKey { path: PathBuf, line: usize },
}

impl Keys {
    /// Reads the files of those who may ask and of those who may look inside; the latter may ask as well.
    ///
    /// # Errors
    /// A file that cannot be read, holds no key, or holds something that no header could.
    pub fn read(api: Option<&Path>, admin: Option<&Path>) -> Result<Keys, KeyFileError> {
        let admin = admin.map(read).transpose()?.unwrap_or_default();
        Ok(Keys { api: api.map(read).transpose()?, admin })
    }

    /// Whether who sent this may ask.
    fn allow(&self, headers: &HeaderMap) -> bool {
        self.api.as_ref().is_none_or(|api| shown(headers).any(|key| is_one_of(key, api)))
    }

    /// Whether who sent this may look inside. Nobody may where no such key was given.
    pub(crate) fn allow_admin(&self, headers: &HeaderMap) -> bool {
        shown(headers).any(|key| is_one_of(key, &self.admin))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({:?}, {} for admins)", self.api.as_ref().map(Vec::len), self.admin.len())
    }
}

/// Refuses a request without a key, before its body is read.
pub(crate) async fn require(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is_open = is_open(request.method(), request.uri().path());
    match is_open || state.keys().allow(headers) || state.is_admin(headers) {
        true => next.run(request).await,
        false => ApiError::no_key().into_response(),
    }
}

fn is_open(method: &Method, path: &str) -> bool {
    let is_read = [Method::GET, Method::HEAD].contains(method);
    is_read && (OPEN.contains(&path) || path.starts_with(OPEN_BELOW))
}

/// Keys that a request shows, as OpenAI's and as Anthropic's clients do.
fn shown(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get_all(header::AUTHORIZATION).into_iter().filter_map(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
    });
    bearer.chain(headers.get_all("x-api-key").into_iter().map(|value| value.as_bytes().trim_ascii()))
}

fn is_one_of(key: &[u8], keys: &[[u8; 32]]) -> bool {
    let digest: [u8; 32] = Sha256::digest(key).into();
    // All of them are looked at, so that the time tells nothing of which it was.
    keys.iter().fold(Choice::from(0), |found, one| found | one.ct_eq(&digest)).into()
}

fn read(path: &Path) -> Result<Vec<[u8; 32]>, KeyFileError> {
    let io = |source| KeyFileError::Io { path: path.to_path_buf(), source };
    let text = std::fs::read(path).map_err(io)?;
    warn_of_readers(path);
    let mut keys = Vec::new();
    for (i, line) in text.split(|b| *b == b'\n').enumerate() {
        let key = line.trim_ascii();
        if key.is_empty() || key.starts_with(b"#") {
            continue;
        }
        if !key.iter().all(u8::is_ascii_graphic) {
            return Err(KeyFileError::NoKey { path: path.to_path_buf(), line: i + 1 });
        }
        keys.push(Sha256::digest(key).into());
    }
    match keys.is_empty() {
        true => Err(KeyFileError::Empty { path: path.to_path_buf() }),
        false => Ok(keys),
    }
}

/// Says that other users of the machine can read a secret.
pub(crate) fn warn_of_readers(path: &Path) {
    #[cfg(unix)]
    if std::fs::metadata(path).is_ok_and(|m| std::os::unix::fs::MetadataExt::mode(&m) & 0o004 != 0) {
        tracing::warn!("{} can be read by every user of this machine; chmod 600 would keep it secret", path.display());
    }
    #[cfg(not(unix))]
    let _ = path;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Keys, KeyFileError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Keys::read(Some(file.path()), None)
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
    }

    #[test]
    fn a_file_has_a_key_a_line() {
        let keys = read_text("# ours\n\nfirst\r\n  second  \n#third\n").unwrap();
        for (name, value, is_known) in [
            ("authorization", "Bearer first", true),
            ("authorization", "bearer  second", true),
            ("x-api-key", "second", true),
            ("authorization", "first", false),
            ("authorization", "Basic first", false),
            ("authorization", "Bearer", false),
            ("authorization", "Bearer ", false),
            ("x-api-key", "", false),
            ("x-api-key", "firs", false),
            ("x-api-key", "#third", false),
            ("x-other", "first", false),
        ] {
            assert_eq!(keys.allow(&headers(name, value)), is_known, "{name}: {value}");
        }
        assert!(!keys.allow_admin(&headers("x-api-key", "first")));
        assert_eq!(format!("{keys:?}"), "Keys(Some(2), 0 for admins)");
        assert!(Keys::default().allow(&HeaderMap::new()) && !Keys::default().allow_admin(&headers("x-api-key", "")));
    }

    #[test]
    fn a_file_without_keys_is_refused_and_no_message_shows_one() {
        assert!(matches!(read_text("# nothing\n\n"), Err(KeyFileError::Empty { .. })));
        let e = read_text("good\nmy secret\n").unwrap_err().to_string();
        assert!(e.ends_with("line 2: expected a key of printable ASCII characters without spaces"), "{e}");
        assert!(matches!(Keys::read(Some(Path::new("/nowhere/keys")), None), Err(KeyFileError::Io { .. })));
    }

    #[test]
    fn only_what_is_listed_is_open_and_only_to_be_read() {
        for path in ["/health", "/", "/favicon.ico", "/page/app.js"] {
            assert!(is_open(&Method::GET, path) && is_open(&Method::HEAD, path), "{path}");
            assert!(!is_open(&Method::POST, path) && !is_open(&Method::DELETE, path), "{path}");
        }
        for path in ["/health/", "/v1/models", "/page", "//", "/metrics", "/PAGE/app.js"] {
            assert!(!is_open(&Method::GET, path), "{path}");
        }
    }
}
