//! The functions of cuBLASLt that quell calls, from whichever version of the library is
//! installed.
//!
//! They are declared here because cudarc only looks for the libraries up to CUDA 12. The
//! functions, their types and the constants are the same in the headers of CUDA 12.0 to 13.4.

use libloading::Library;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::OnceLock;

/// File names of the library, in the order in which they are tried.
#[cfg(not(windows))]
const FILES: [&str; 3] = ["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"];
#[cfg(windows)]
const FILES: [&str; 2] = ["cublasLt64_13.dll", "cublasLt64_12.dll"];

/// `cublasStatus_t`. It is a number, since a newer library may return values that are not in
/// the header of today.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(super) struct Status(pub(super) c_int);

impl Status {
    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const NOT_SUPPORTED: Self = Self(15);

    pub(super) fn result(self) -> Result<(), Self> {
        if self == Self::SUCCESS {
            Ok(())
        } else {
            Err(self)
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "SUCCESS",
            1 => "NOT_INITIALIZED",
            3 => "ALLOC_FAILED",
            7 => "INVALID_VALUE",
            8 => "ARCH_MISMATCH",
            11 => "MAPPING_ERROR",
            13 => "EXECUTION_FAILED",
            14 => "INTERNAL_ERROR",
            15 => "NOT_SUPPORTED",
            16 => "LICENSE_ERROR",
            number => return write!(f, "status {number}"),
        };
        write!(f, "CUBLAS_STATUS_{name}")
    }
}

/// `cudaDataType_t`.
pub(super) type DataType = c_int;
pub(super) const FLOAT32: DataType = 0;
pub(super) const FLOAT16: DataType = 2;
pub(super) const BFLOAT16: DataType = 14;
/// `CUBLAS_COMPUTE_32F`: products are added in float32.
pub(super) const COMPUTE_FLOAT32: c_int = 68;
/// `CUBLAS_OP_T`. A static, since the library reads it through a pointer.
pub(super) static TRANSPOSED: i32 = 1;
/// `CUBLASLT_MATMUL_DESC_TRANSA`, a 32-bit integer: how the first matrix is used.
pub(super) const TRANSPOSE_FIRST: c_int = 3;
/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`, a `size_t`.
pub(super) const MOST_WORKSPACE: c_int = 1;

/// What a `cublasLtHandle_t` points to.
pub(super) enum Instance {}
/// What a `cublasLtMatmulDesc_t` points to.
pub(super) enum Product {}
/// What a `cublasLtMatrixLayout_t` points to.
pub(super) enum Layout {}
/// What a `cublasLtMatmulPreference_t` points to.
pub(super) enum Preference {}

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Proposal {
    pub(super) algorithm: Algorithm,
    workspace: usize,
    pub(super) state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

impl Proposal {
    /// To be overwritten by the library.
    pub(super) const EMPTY: Self = Self {
        algorithm: Algorithm([0; 8]),
        workspace: 0,
        state: Status::NOT_SUPPORTED,
        waves: 0.0,
        reserved: [0; 4],
    };
}

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($type:ty),* $(,)?);)*) => {
        /// The loaded functions.
        pub(super) struct CublasLt {
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> Status,)*
        }

        impl CublasLt {
            /// Looks up the functions in a library, which the caller keeps loaded.
            fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the types are those in cublasLt.h.
                    $($name: *unsafe { library.get($symbol)? },)*
                })
            }
        }
    };
}

functions! {
    create = b"cublasLtCreate\0": fn(*mut *mut Instance);
    destroy = b"cublasLtDestroy\0": fn(*mut Instance);
    create_product = b"cublasLtMatmulDescCreate\0": fn(*mut *mut Product, c_int, DataType);
    set_product = b"cublasLtMatmulDescSetAttribute\0":
        fn(*mut Product, c_int, *const c_void, usize);
    destroy_product = b"cublasLtMatmulDescDestroy\0": fn(*mut Product);
    create_layout = b"cublasLtMatrixLayoutCreate\0":
        fn(*mut *mut Layout, DataType, u64, u64, i64);
    destroy_layout = b"cublasLtMatrixLayoutDestroy\0": fn(*mut Layout);
    create_preference = b"cublasLtMatmulPreferenceCreate\0": fn(*mut *mut Preference);
    set_preference = b"cublasLtMatmulPreferenceSetAttribute\0":
        fn(*mut Preference, c_int, *const c_void, usize);
    destroy_preference = b"cublasLtMatmulPreferenceDestroy\0": fn(*mut Preference);
    // The layouts are those of A, B, C and D; then the number of results wanted, the results,
    // and how many there are.
    propose = b"cublasLtMatmulAlgoGetHeuristic\0": fn(
        *mut Instance, *mut Product, *mut Layout, *mut Layout, *mut Layout, *mut Layout,
        *mut Preference, c_int, *mut Proposal, *mut c_int,
    );
    // D = α A B + β C: the product, α, A and B with their layouts, β, C and D with theirs, the
    // algorithm, the workspace with its size, and the stream.
    multiply = b"cublasLtMatmul\0": fn(
        *mut Instance, *mut Product, *const c_void, *const c_void, *mut Layout,
        *const c_void, *mut Layout, *const c_void, *const c_void, *mut Layout,
        *mut c_void, *mut Layout, *const Algorithm, *mut c_void, usize, *mut c_void,
    );
}

impl CublasLt {
    /// Returns the library, which is loaded on first use and stays loaded. Fails with the
    /// reasons why no file can be loaded, as one line.
    pub(super) fn get() -> Result<&'static Self, String> {
        static LOADED: OnceLock<CublasLt> = OnceLock::new();
        if let Some(loaded) = LOADED.get() {
            return Ok(loaded);
        }
        let (library, functions) = load(&FILES)?;
        // Code that runs at the end of the process may be in it.
        std::mem::forget(library);
        Ok(LOADED.get_or_init(|| functions))
    }
}

/// Loads the first of `files` that has the functions.
fn load(files: &[impl AsRef<str>]) -> Result<(Library, CublasLt), String> {
    let mut problems = Vec::new();
    for file in files.iter().map(AsRef::as_ref) {
        // SAFETY: the files are named as NVIDIA's library, whose initialisation has no
        // requirements.
        let opened = unsafe { Library::new(file) };
        let found = opened.and_then(|library| {
            let functions = CublasLt::of(&library)?;
            Ok((library, functions))
        });
        match found {
            Ok(found) => return Ok(found),
            Err(error) => problems.push(format!("{file}: {}", one_line(&error))),
        }
    }
    Err(problems.join("; "))
}

/// Returns the loader's message, which often begins with the name of the file, on one line.
fn one_line(error: &libloading::Error) -> String {
    error.to_string().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Puts the virtual GPU's stand-in for cuBLASLt into `folder` under a name.
    fn install(folder: &Path, name: &str) {
        let test = std::env::current_exe().expect("the test has a path");
        let library = test.with_file_name("libvirtual_gpu.so");
        std::os::unix::fs::symlink(library, folder.join(name)).expect("a link is made");
    }

    /// Returns the files that are tried, in `folder` alone.
    fn files(folder: &Path) -> Vec<String> {
        let path = |file: &&str| folder.join(file).display().to_string();
        FILES.iter().map(path).collect()
    }

    #[test]
    fn the_library_of_cuda_12_and_of_cuda_13_is_found() {
        for name in ["libcublasLt.so", "libcublasLt.so.12", "libcublasLt.so.13"] {
            let folder = tempfile::tempdir().expect("a folder is made");
            install(folder.path(), name);
            let found = load(&files(folder.path()));
            assert!(found.is_ok(), "{name}: {:?}", found.err());
        }
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_all_files() {
        let folder = tempfile::tempdir().expect("a folder is made");
        let reason = load(&files(folder.path())).err().expect("there is none");
        for file in files(folder.path()) {
            assert!(reason.contains(&file), "{file}: {reason}");
        }
        assert!(!reason.contains('\n'), "{reason}");
    }

    #[test]
    fn a_file_without_the_functions_is_passed_over() {
        let folder = tempfile::tempdir().expect("a folder is made");
        let broken = folder.path().join("libcublasLt.so");
        std::fs::write(&broken, "not a library").expect("a file is written");
        let reason = load(&files(folder.path())).err().expect("none is usable");
        assert!(reason.contains("libcublasLt.so: "), "{reason}");
        install(folder.path(), "libcublasLt.so.12");
        assert!(load(&files(folder.path())).is_ok());
    }

    #[test]
    fn a_status_is_shown_by_name_even_if_it_is_unknown() {
        assert_eq!(Status(3).to_string(), "CUBLAS_STATUS_ALLOC_FAILED");
        assert_eq!(Status(99).to_string(), "status 99");
        assert_eq!(Status::NOT_SUPPORTED.result(), Err(Status(15)));
    }
}
