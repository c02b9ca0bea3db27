//! Which backend runs a model: the only place that knows them all.

use std::sync::Arc;

use apr_core::backend::reference::Reference;
use apr_core::backend::rounded::Rounded;
use apr_core::backend::{Backend, BackendError, Precision};
use apr_core::hparams::Hparams;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::Isa;
use apr_cuda::CudaBackend;

use crate::diff::op::StageOp;
use crate::engine::EngineError;
use crate::model_file::ModelFile;
use crate::offload::{GpuPlan, HostLayers};
use crate::session::{self, Session, SessionSettings};
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

/// How a CUDA device is reached, and what it leaves to the host.
#[derive(Clone, Copy, Debug)]
pub struct Cuda {
    /// Whoever reads the environment knows where compilers and caches are.
    pub connect: fn() -> Result<Arc<dyn Driver>, ConnectError>,
    /// Layers whose experts the host's cores compute, the first ones; `None` takes as few as it takes for the model to fit.
    pub n_cpu_moe: Option<usize>,
    /// Of those cores, as for [`Device::Cpu`].
    pub n_threads: Option<usize>,
    pub isa: Option<Isa>,
}

impl Cuda {
    /// A device that is reached this way, by its defaults.
    pub const fn new(connect: fn() -> Result<Arc<dyn Driver>, ConnectError>) -> Cuda {
        Cuda { connect, n_cpu_moe: None, n_threads: None, isa: None }
    }
}

impl PartialEq for Cuda {
    fn eq(&self, other: &Cuda) -> bool {
        let of = |c: &Cuda| (c.n_cpu_moe, c.n_threads, c.isa);
        std::ptr::fn_addr_eq(self.connect, other.connect) && of(self) == of(other)
    }
}

impl Eq for Cuda {}

/// What a model runs on.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// `cpu`, `cuda` or `reference`
    pub kind: &'static str,
    /// Instruction set of the kernels, where there is a choice; of a GPU none, whoever computes some of its experts.
    pub isa: Option<Isa>,
    /// Threads that compute, where that is the caller's choice.
    pub n_threads: Option<usize>,
    /// For people.
    pub name: String,
    /// Where a model's weights were put, of a GPU.
    pub plan: Option<GpuPlan>,
}

/// What can be done with a backend, whichever it is.
trait Task {
    type Out;
    /// Plans what goes where on a device of its own memory, of which so much is free, and refuses what that cannot hold.
    fn plan(&self, _free_bytes: u64, _n_cpu_moe: Option<usize>) -> Result<Option<GpuPlan>, EngineError> {
        Ok(None)
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
            let backend = cpu(n_threads, isa)?;
            let name = format!("cpu ({}, {} threads)", backend.isa(), backend.n_threads());
            let (isa, n_threads) = (Some(backend.isa()), Some(backend.n_threads()));
            let info = DeviceInfo { kind: "cpu", isa, n_threads, name, plan: None };
            Ok((task.on(backend)?, info))
        }
        Device::Reference { activations: Precision::F32 } => {
            let name = "reference".to_string();
            let info = DeviceInfo { kind: "reference", isa: None, n_threads: None, name, plan: None };
            Ok((task.on(Reference)?, info))
        }
        Device::Reference { activations: Precision::Int8 } => {
            let name = "reference, activations rounded to 8 bits".to_string();
            let info = DeviceInfo { kind: "reference", isa: None, n_threads: None, name, plan: None };
            Ok((task.on(Rounded(Reference))?, info))
        }
        Device::Cuda(device) => {
            let (driver, free_bytes) = connect(device)?;
            let d = driver.description();
            let plan = task.plan(free_bytes, device.n_cpu_moe)?;
            let gpu = format!("{}, sm_{}", d.name, d.arch);
            let backend = CudaBackend::new(driver);
            let info = |name| DeviceInfo { kind: "cuda", isa: None, n_threads: None, name, plan };
            match plan.map_or(device.n_cpu_moe.unwrap_or(0), |p| p.n_host_layer) {
                0 => Ok((task.on(backend)?, info(format!("cuda ({gpu})")))),
                n => {
                    let host = cpu(device.n_threads, device.isa)?;
                    let (isa, n_threads) = (host.isa(), host.n_threads());
                    let name = format!("cuda ({gpu}) and cpu ({isa}, {n_threads} threads: experts of {n} layers)");
                    Ok((task.on(backend.with_host(Box::new(HostLayers::new(host, n))))?, info(name)))
                }
            }
        }
    }
}

/// Reaches a GPU, and says how many bytes of its memory are free.
fn connect(device: Cuda) -> Result<(Arc<dyn Driver>, u64), EngineError> {
    let driver = (device.connect)()?;
    let name = || driver.description().name.clone();
    let free_bytes = driver.free_bytes().map_err(|e| ConnectError::Failed(name(), e.to_string()))?;
    Ok((driver, free_bytes))
}

/// The host's cores as a backend.
fn cpu(n_threads: Option<usize>, isa: Option<Isa>) -> Result<CpuBackend, EngineError> {
    let n_threads = n_threads.unwrap_or_else(default_threads);
    if n_threads == 0 || n_threads > THREADS_MAX {
        return Err(EngineError::Threads { got: n_threads, max: THREADS_MAX });
    }
    Ok(CpuBackend::new(n_threads, isa)?)
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

        fn plan(&self, free_bytes: u64, n_cpu_moe: Option<usize>) -> Result<Option<GpuPlan>, EngineError> {
            GpuPlan::new(self.0, self.1, self.2, free_bytes, n_cpu_moe).map(Some)
        }

        fn on<B>(self, backend: B) -> Result<Self::Out, EngineError>
        where
            B: Backend + Send + 'static,
            B::Tensor: Send,
            B::Ids: Send,
            B::Weight: Send,
            B::KvCache: Send,
        {
            Ok(session::load(backend, self.0, self.1, self.2)?)
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

/// What of a model would go where on a GPU, from the model's header; `None` on a device that computes in the machine's memory.
///
/// # Errors
/// A GPU that cannot be used, or that the model does not fit.
pub(crate) fn gpu_plan(
    device: Device,
    file: &ModelFile,
    h: &Hparams,
    settings: SessionSettings,
) -> Result<Option<GpuPlan>, EngineError> {
    let Device::Cuda(device) = device else { return Ok(None) };
    let (_, free_bytes) = connect(device)?;
    GpuPlan::new(file, h, settings, free_bytes, device.n_cpu_moe).map(Some)
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
