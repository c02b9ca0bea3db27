//! NVIDIA's run-time compiler: where it is found, and the few of its functions that compile a kernel to machine code.
//!
//! Functions and their meaning: the NVRTC manual. It is loaded by path, because `pip` puts it where no loader looks.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;

use libloading::{Library, Symbol};

/// A loaded compiler.
pub struct Nvrtc {
    library: Library,
    /// Where it was found, for people.
    pub path: PathBuf,
    /// Major and minor.
    pub version: (u32, u32),
}

/// Why kernels cannot be compiled.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NvrtcError {
    #[error(
        "NVIDIA's run-time compiler (libnvrtc{}) is not found: install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` \
         (`nvidia-cuda-nvrtc-cu12` for a driver of CUDA 12); looked in {}",
        .newest.map_or(String::new(), |n| format!(" of CUDA {n} or older, as the driver needs")),
        .looked_in.join(", ")
    )]
    NotFound { looked_in: Vec<String>, newest: Option<u32> },
    #[error("NVRTC {}.{} of {path} cannot compile for sm_{arch}; it knows {known}", .version.0, .version.1)]
    Arch { path: String, version: (u32, u32), arch: u32, known: String },
    #[error("NVRTC does not compile {file}: {log}")]
    Compile { file: &'static str, log: String },
    #[error("NVRTC of {path}: {what}")]
    Failed { path: String, what: String },
}

type Program = *mut c_void;

/// File names that the library has, newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Folders below one that Python installs packages into where PyPI's packages put the library.
const IN_PACKAGES: [&str; 3] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cu12/lib"];

/// Folders to look in: those asked for, where toolkits are installed, and where `pip` puts packages below `prefixes`.
fn folders(asked: &[PathBuf], prefixes: &[PathBuf]) -> Vec<PathBuf> {
    let mut all = asked.to_vec();
    all.extend(
        ["/usr/local/cuda/lib64", "/opt/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"].map(PathBuf::from),
    );
    for prefix in prefixes {
        let mut pythons: Vec<PathBuf> = std::fs::read_dir(prefix.join("lib"))
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("python3")))
            .collect();
        pythons.sort();
        for python in pythons.iter().rev() {
            for packages in ["site-packages", "dist-packages"] {
                all.extend(IN_PACKAGES.map(|below| python.join(packages).join(below)));
            }
        }
    }
    all
}

impl Nvrtc {
    /// The first compiler that is found: where the loader looks, then in `asked`, in toolkits, and in Python's packages below
    /// `prefixes`. Compilers of a later generation of CUDA than `newest` are passed over: a driver of that one does not load their code.
    ///
    /// # Errors
    /// None is found, or the one found does not load.
    pub fn find(asked: &[PathBuf], prefixes: &[PathBuf], newest: Option<u32>) -> Result<Nvrtc, NvrtcError> {
        let folders = folders(asked, prefixes);
        let in_folders = folders.iter().flat_map(|folder| NAMES.map(|name| folder.join(name)));
        let there = in_folders.filter(|path| path.is_file());
        let candidates: Vec<PathBuf> = NAMES.map(PathBuf::from).into_iter().chain(there).collect();
        for path in candidates {
            // SAFETY: NVIDIA's library runs no code of its own when it is loaded beyond its initialisers.
            if let Ok(library) = unsafe { Library::new(&path) } {
                let nvrtc = Nvrtc::of(library, path)?;
                if newest.is_none_or(|newest| nvrtc.version.0 <= newest) {
                    return Ok(nvrtc);
                }
            }
        }
        let mut looked_in = vec!["the loader's path".to_string()];
        let exists = |folder: &&PathBuf| folder.is_dir();
        looked_in.extend(folders.iter().filter(exists).map(|f| f.display().to_string()));
        looked_in.extend(prefixes.iter().map(|p| format!("Python's packages in {}", p.display())));
        Err(NvrtcError::NotFound { looked_in, newest })
    }

    fn of(library: Library, path: PathBuf) -> Result<Nvrtc, NvrtcError> {
        let mut nvrtc = Nvrtc { library, path, version: (0, 0) };
        let (mut major, mut minor) = (0, 0);
        nvrtc.check("nvrtcVersion", |f: Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>| {
            // SAFETY: two integers to write to.
            unsafe { f(&mut major, &mut minor) }
        })?;
        nvrtc.version = (major as u32, minor as u32);
        Ok(nvrtc)
    }

    /// Looks a function up and calls it; its result says whether it went well.
    fn check<F>(&self, name: &str, call: impl FnOnce(Symbol<'_, F>) -> c_int) -> Result<(), NvrtcError> {
        let failed = |what: String| NvrtcError::Failed { path: self.path.display().to_string(), what };
        // SAFETY: the type is the manual's for this name.
        let symbol = unsafe { self.library.get(name.as_bytes()) }.map_err(|e| failed(e.to_string()))?;
        match call(symbol) {
            0 => Ok(()),
            code => Err(failed(format!("{name} gave error {code}"))),
        }
    }

    /// Architectures it compiles for, as 90 for sm_90.
    ///
    /// # Errors
    /// The library is not what it should be.
    pub fn archs(&self) -> Result<Vec<u32>, NvrtcError> {
        let mut n = 0;
        self.check("nvrtcGetNumSupportedArchs", |f: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int>| {
            // SAFETY: an integer to write to.
            unsafe { f(&mut n) }
        })?;
        let mut archs = vec![0 as c_int; n as usize];
        self.check("nvrtcGetSupportedArchs", |f: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int>| {
            // SAFETY: room for as many integers as it just said.
            unsafe { f(archs.as_mut_ptr()) }
        })?;
        Ok(archs.into_iter().map(|a| a as u32).collect())
    }

    /// Machine code of a source for an architecture.
    ///
    /// # Errors
    /// An architecture it does not know, or a source that does not compile, with the compiler's words.
    pub fn compile(
        &self,
        (file, source): (&'static str, &str),
        headers: &[(&str, &str)],
        arch: u32,
    ) -> Result<Vec<u8>, NvrtcError> {
        let known = self.archs()?;
        if !known.contains(&arch) {
            let known = known.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
            return Err(NvrtcError::Arch { path: self.path.display().to_string(), version: self.version, arch, known });
        }
        let text = |s: &str| CString::new(s).expect("sources have no zeros");
        let (source, name) = (text(source), text(file));
        let names: Vec<CString> = headers.iter().map(|h| text(h.0)).collect();
        let texts: Vec<CString> = headers.iter().map(|h| text(h.1)).collect();
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let (name_pointers, text_pointers) = (pointers(&names), pointers(&texts));
        let mut program: Program = std::ptr::null_mut();
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        self.check("nvrtcCreateProgram", |f: Symbol<'_, Create>| {
            let n = headers.len() as c_int;
            // SAFETY: strings end with zeros and live through the call, as many as are said.
            unsafe {
                f(&mut program, source.as_ptr(), name.as_ptr(), n, text_pointers.as_ptr(), name_pointers.as_ptr())
            }
        })?;
        let code = self.compiled(program, file, arch);
        self.check("nvrtcDestroyProgram", |f: Symbol<'_, unsafe extern "C" fn(*mut Program) -> c_int>| {
            // SAFETY: the program was made above and is not used again.
            unsafe { f(&mut program) }
        })?;
        code
    }

    fn compiled(&self, program: Program, file: &'static str, arch: u32) -> Result<Vec<u8>, NvrtcError> {
        let options = [format!("--gpu-architecture=sm_{arch}"), "--std=c++17".to_string()];
        let options: Vec<CString> =
            options.into_iter().map(|o| CString::new(o).expect("options have no zeros")).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        let result = self.check("nvrtcCompileProgram", |f: Symbol<'_, Compile>| {
            // SAFETY: the program was just made; strings as above.
            unsafe { f(program, pointers.len() as c_int, pointers.as_ptr()) }
        });
        if result.is_err() {
            let log = self.bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = CStr::from_bytes_until_nul(&log).map_or(String::new(), |l| l.to_string_lossy().into_owned());
            return Err(NvrtcError::Compile { file, log });
        }
        self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    }

    /// What one function of the compiler writes, whose size another tells.
    fn bytes(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, NvrtcError> {
        let mut n = 0usize;
        self.check(size, |f: Symbol<'_, unsafe extern "C" fn(Program, *mut usize) -> c_int>| {
            // SAFETY: a program that exists, and a number to write to.
            unsafe { f(program, &mut n) }
        })?;
        let mut bytes = vec![0u8; n];
        self.check(get, |f: Symbol<'_, unsafe extern "C" fn(Program, *mut c_char) -> c_int>| {
            // SAFETY: room for as many bytes as it just said.
            unsafe { f(program, bytes.as_mut_ptr().cast()) }
        })?;
        Ok(bytes)
    }
}
