//! Which backend runs a model: the only place that knows them all.

use std::sync::Arc;

use apr_core::backend::reference::Reference;
use apr_core::backend::rounded::Rounded;
use apr_core::backend::{Backend, BackendError, KV_BLOCK, KvShape, Precision};
use apr_core::hparams::Hparams;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::Isa;
use apr_cuda::CudaBackend;

use crate::diff::op::StageOp;
use crate::engine::EngineError;
use crate::model_file::ModelFile;
use crate::session::{Runner, Session, SessionSettings};
use crate::threads::THREADS_MAX;

pub use crate::threads::default_threads;
pub use apr_cuda::compile::{Toolchain, sources_hash};
pub use apr_cuda::driver::{Description, Driver};
pub use apr_cuda::nvidia::{
    ConnectError, connect as connect_nvidia, devices as nvidia_devices, driver_version as nvidia_driver_version,
};
pub use apr_cuda::nvrtc::Nvrtc;

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The host's cores. `None` takes [`default_threads`], and the fastest instruction set.
    Cpu { n_threads: Option<usize>, isa: Option<Isa> },
    /// The plain reference computation, slow and exact; with `Int8`, exact but for activations that are rounded as that says, which is
    /// the noise that comparisons judge by.
    Reference { activations: Precision },
    /// A CUDA device.
    Cuda(Cuda),
}

/// How a CUDA device is reached. Whoever reads the environment knows where compilers and caches are.
#[derive(Clone, Copy, Debug)]
pub struct Cuda(pub fn() -> Result<Arc<dyn Driver>, ConnectError>);

impl PartialEq for Cuda {
    fn eq(&self, other: &Cuda) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for Cuda {}

/// What a model runs on.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// `cpu`, `cuda` or `reference`
    pub kind: &'static str,
    /// Instruction set of the kernels, where there is a choice.
    pub isa: Option<Isa>,
    /// Threads that compute, where that is the caller's choice.
    pub n_threads: Option<usize>,
    /// For people.
    pub name: String,
}

/// Device memory for activations and while weights are taken apart.
const CUDA_BUFFER_BYTES: u64 = 512 << 20;

/// What can be done with a backend, whichever it is.
trait Task {
    type Out;
    /// Refuses what a device of its own memory, of which so much is free, cannot hold.
    fn fits(&self, _free_bytes: u64) -> Result<(), EngineError> {
        Ok(())
    }
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
        Device::Cuda(Cuda(connect)) => {
            let driver = connect()?;
            let d = driver.description();
            let name = format!("cuda ({}, sm_{})", d.name, d.arch);
            let free_bytes = driver.free_bytes().map_err(|e| ConnectError::Failed(d.name.clone(), e.to_string()))?;
            task.fits(free_bytes)?;
            let info = DeviceInfo { kind: "cuda", isa: None, n_threads: None, name };
            Ok((task.on(CudaBackend::new(driver))?, info))
        }
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

        fn fits(&self, free_bytes: u64) -> Result<(), EngineError> {
            let Load(file, h, settings) = self;
            let (n_head_kv, head_dim) = (h.heads.n_head_kv, h.heads.head_dim);
            let kv = KvShape { n_layer: h.n_layer, n_head_kv, head_dim, kv_type: settings.kv_type };
            let kv_bytes = settings.n_ctx.div_ceil(KV_BLOCK) as u64 * kv.block_bytes() as u64;
            let need = file.file_bytes + kv_bytes + CUDA_BUFFER_BYTES;
            match need <= free_bytes {
                true => Ok(()),
                false => Err(EngineError::GpuMemory {
                    weights: file.file_bytes,
                    n_ctx: settings.n_ctx,
                    kv: kv_bytes,
                    free: free_bytes,
                }),
            }
        }

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
