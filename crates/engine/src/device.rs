//! Which backend runs a model: the only place that knows them all.

use apr_core::backend::reference::Reference;
use apr_core::backend::rounded::Rounded;
use apr_core::backend::{Backend, BackendError, Precision};
use apr_core::hparams::Hparams;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::Isa;

use crate::diff::op::StageOp;
use crate::engine::EngineError;
use crate::model_file::ModelFile;
use crate::session::{Runner, Session, SessionSettings};
use crate::threads::THREADS_MAX;

pub use crate::threads::default_threads;

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The host's cores. `None` takes [`default_threads`], and the fastest instruction set.
    Cpu { n_threads: Option<usize>, isa: Option<Isa> },
    /// The plain reference computation, slow and exact; with `Int8`, exact but for activations that are rounded as that says, which is
    /// the noise that comparisons judge by.
    Reference { activations: Precision },
    /// A CUDA device.
    Gpu,
}

/// What a model runs on.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// `cpu` or `reference`
    pub kind: &'static str,
    /// Instruction set of the kernels, where there is a choice.
    pub isa: Option<Isa>,
    /// Threads that compute, where that is the caller's choice.
    pub n_threads: Option<usize>,
    /// For people.
    pub name: String,
}

/// What can be done with a backend, whichever it is.
trait Task {
    type Out;
    fn on<B>(self, backend: B) -> Result<Self::Out, EngineError>
    where
        B: Backend + Send + 'static,
        B::Tensor: Send,
        B::Ids: Send,
        B::Weight: Send,
        B::KvCache: Send;
}

/// Makes a device's backend and does something with it.
fn with_backend<T: Task>(device: Device, task: T) -> Result<(T::Out, DeviceInfo), EngineError> {
    match device {
        Device::Cpu { n_threads, isa } => {
            let n_threads = n_threads.unwrap_or_else(default_threads);
            if n_threads == 0 || n_threads > THREADS_MAX {
                return Err(EngineError::Threads { got: n_threads, max: THREADS_MAX });
            }
            let backend = CpuBackend::new(n_threads, isa)?;
            let name = format!("cpu ({}, {} threads)", backend.isa(), backend.n_threads());
            let info = DeviceInfo { kind: "cpu", isa: Some(backend.isa()), n_threads: Some(backend.n_threads()), name };
            Ok((task.on(backend)?, info))
        }
        Device::Reference { activations: Precision::F32 } => {
            let info = DeviceInfo { kind: "reference", isa: None, n_threads: None, name: "reference".to_string() };
            Ok((task.on(Reference)?, info))
        }
        Device::Reference { activations: Precision::Int8 } => {
            let name = "reference, activations rounded to 8 bits".to_string();
            let info = DeviceInfo { kind: "reference", isa: None, n_threads: None, name };
            Ok((task.on(Rounded(Reference))?, info))
        }
        Device::Gpu => Err(EngineError::NoGpu),
    }
}

/// Loads the model's weights into a device.
pub(crate) fn open(
    device: Device,
    file: &ModelFile,
    h: &Hparams,
    settings: SessionSettings,
) -> Result<(Box<dyn Session>, DeviceInfo), EngineError> {
    struct Load<'a>(&'a ModelFile, &'a Hparams, SessionSettings);
    impl Task for Load<'_> {
        type Out = Box<dyn Session>;
        fn on<B>(self, backend: B) -> Result<Self::Out, EngineError>
        where
            B: Backend + Send + 'static,
            B::Tensor: Send,
            B::Ids: Send,
            B::Weight: Send,
            B::KvCache: Send,
        {
            Ok(Box::new(Runner::load(backend, self.0, self.1, self.2)?))
        }
    }
    with_backend(device, Load(file, h, settings))
}

/// Computes ops on a device: what each gives, and the device's precision of activations.
pub(crate) fn run_ops(device: Device, ops: &[&StageOp]) -> Result<(Vec<Vec<f32>>, Precision, DeviceInfo), EngineError> {
    struct Run<'a>(&'a [&'a StageOp]);
    impl Task for Run<'_> {
        type Out = (Vec<Vec<f32>>, Precision);
        fn on<B: Backend>(self, backend: B) -> Result<Self::Out, EngineError> {
            let results: Result<_, BackendError> = self.0.iter().map(|op| op.run(&backend)).collect();
            Ok((results?, backend.precision()))
        }
    }
    let ((results, precision), info) = with_backend(device, Run(ops))?;
    Ok((results, precision, info))
}

/// What a device is called and runs on this machine.
///
/// # Errors
/// A device or instruction set that this machine lacks, or threads that it does not start.
pub fn info(device: Device) -> Result<DeviceInfo, EngineError> {
    struct Nothing;
    impl Task for Nothing {
        type Out = ();
        fn on<B: Backend>(self, _: B) -> Result<(), EngineError> {
            Ok(())
        }
    }
    Ok(with_backend(device, Nothing)?.1)
}
