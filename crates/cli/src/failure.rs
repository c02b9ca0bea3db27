//! Exit codes: every error of the engine has one.

use std::io;

use apr_engine::bench::BenchError;
use apr_engine::diff::DiffError;
use apr_engine::diff::bundle::BundleError;
use apr_engine::generate::GenerateError;
use apr_engine::model_file::OpenError;
use apr_engine::sampler::SamplerError;
use apr_engine::session::StepError;
use apr_engine::trace::TraceError;
use apr_engine::trace::file::TraceFileError;
use apr_engine::verify::VerifyError;
use apr_engine::{BackendError, EngineError};
use apr_server::{BindError, KeyFileError, ModelError, RunError, TlsError};

/// The command could not do what was asked.
pub const FAILED: u8 = 1;
/// Wrong arguments.
pub const USAGE: u8 = 2;
/// Bad or unsupported model file.
pub const MODEL: u8 = 3;
/// Not enough memory, no such device or one that fails, or a port in use.
pub const RESOURCE: u8 = 4;
/// Stopped by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// How a command ended well.
pub enum Done {
    Ok,
    /// Two sides differ, or something that must hold does not.
    Differs,
    Interrupted,
}

/// An error and the exit code it leads to.
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

/// What a command returns.
pub type Result<T> = std::result::Result<T, Failure>;

/// A mistake in the arguments that the parser cannot see.
pub fn usage(message: impl std::fmt::Display) -> Failure {
    Failure { code: USAGE, error: anyhow::anyhow!("{message}") }
}

/// Whether an error is the end of whoever reads our output.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

impl From<EngineError> for Failure {
    fn from(e: EngineError) -> Failure {
        let code = match &e {
            e if e.is_resource() => RESOURCE,
            e if e.is_usage() => USAGE,
            EngineError::Open(open) => open_code(open),
            _ => MODEL,
        };
        Failure { code, error: e.into() }
    }
}

impl From<OpenError> for Failure {
    fn from(e: OpenError) -> Failure {
        Failure { code: open_code(&e), error: e.into() }
    }
}

/// A path that cannot be read is the caller's mistake; a file that is no good model is the file's; and one that there is no room to
/// map, as under a limit on address space, is the machine's.
fn open_code(e: &OpenError) -> u8 {
    match e {
        OpenError::Io { source, .. } if source.kind() == io::ErrorKind::OutOfMemory => RESOURCE,
        OpenError::Io { .. } => FAILED,
        _ => MODEL,
    }
}

impl From<GenerateError> for Failure {
    fn from(e: GenerateError) -> Failure {
        Failure { code: generate_code(&e), error: e.into() }
    }
}

fn generate_code(e: &GenerateError) -> u8 {
    match e {
        GenerateError::EmptyPrompt
        | GenerateError::ContextOverflow { .. }
        | GenerateError::Trace(_)
        | GenerateError::Constraint(_) => USAGE,
        GenerateError::Memory { .. } => RESOURCE,
        GenerateError::Sampler(SamplerError::NotFinite { .. } | SamplerError::NothingLeft { .. }) => FAILED,
        GenerateError::Busy { .. } | GenerateError::NoEmbedding => FAILED,
        GenerateError::Stopped | GenerateError::Failed => FAILED,
        GenerateError::Sampler(_) => USAGE,
        GenerateError::Step(e) => step_code(e),
    }
}

impl From<BindError> for Failure {
    fn from(e: BindError) -> Failure {
        let code = match &e {
            BindError::InUse { .. } => RESOURCE,
            BindError::Address { .. } => USAGE,
            BindError::Threads(_) => FAILED,
        };
        Failure { code, error: e.into() }
    }
}

impl From<KeyFileError> for Failure {
    fn from(e: KeyFileError) -> Failure {
        let code = match &e {
            KeyFileError::Io { .. } => FAILED,
            KeyFileError::Empty { .. } | KeyFileError::NoKey { .. } => USAGE,
        };
        Failure { code, error: e.into() }
    }
}

impl From<TlsError> for Failure {
    fn from(e: TlsError) -> Failure {
        let code = match &e {
            TlsError::Io { .. } => FAILED,
            TlsError::Pem { .. } | TlsError::Unusable { .. } => USAGE,
        };
        Failure { code, error: e.into() }
    }
}

impl From<ModelError> for Failure {
    fn from(e: ModelError) -> Failure {
        match e {
            ModelError::Engine(e) => e.into(),
            e => Failure { code: FAILED, error: e.into() },
        }
    }
}

impl From<RunError> for Failure {
    /// A service manager starts again what fails so.
    fn from(e: RunError) -> Failure {
        Failure { code: FAILED, error: e.into() }
    }
}

impl From<TraceError> for Failure {
    fn from(e: TraceError) -> Failure {
        let code = match &e {
            TraceError::Generate(e) => generate_code(e),
            TraceError::NoToken { .. } => FAILED,
            TraceError::File(TraceFileError::Io { source, .. }) if is_full(source) => RESOURCE,
            TraceError::File(_) => FAILED,
        };
        Failure { code, error: e.into() }
    }
}

/// Whether a file cannot be written for lack of room.
fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

impl From<BundleError> for Failure {
    /// As with diff(1), whatever keeps an op from being run or compared.
    fn from(e: BundleError) -> Failure {
        Failure { code: USAGE, error: e.into() }
    }
}

impl From<BenchError> for Failure {
    fn from(e: BenchError) -> Failure {
        let code = match &e {
            BenchError::Context { .. } => USAGE,
            BenchError::Memory { .. } => RESOURCE,
            BenchError::Step(e) => step_code(e),
            BenchError::Sampler(_) => FAILED,
        };
        Failure { code, error: e.into() }
    }
}

impl From<StepError> for Failure {
    fn from(e: StepError) -> Failure {
        Failure { code: step_code(&e), error: e.into() }
    }
}

impl From<VerifyError> for Failure {
    fn from(e: VerifyError) -> Failure {
        match e {
            VerifyError::Step(e) | VerifyError::Reference(DiffError::Step(e)) => e.into(),
            VerifyError::Engine(e) | VerifyError::Reference(DiffError::Engine(e)) => e.into(),
            VerifyError::Reference(e) => Failure { code: FAILED, error: e.into() },
            e => Failure { code: USAGE, error: e.into() },
        }
    }
}

fn step_code(e: &StepError) -> u8 {
    match e {
        StepError::ContextFull { .. } | StepError::Token { .. } | StepError::OtherCache { .. } => USAGE,
        StepError::Backend(BackendError::OutOfMemory { .. } | BackendError::Device { .. }) => RESOURCE,
        StepError::Backend(_) => MODEL,
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        Failure { code: FAILED, error: e.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_there_is_no_room_to_map_is_no_failure_of_the_file() {
        let open =
            |kind: io::ErrorKind| Failure::from(OpenError::Io { path: "model.gguf".into(), source: kind.into() }).code;
        assert_eq!(open(io::ErrorKind::OutOfMemory), RESOURCE);
        assert_eq!(open(io::ErrorKind::PermissionDenied), FAILED);
    }
}
