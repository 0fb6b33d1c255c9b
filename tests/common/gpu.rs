//! The GPU that the tests use: the virtual one, or a real one with `QUELL_TEST_GPU=real`.
//!
//! The virtual GPU's library names itself `libcuda.so`. It is loaded by its path before
//! anything looks for the driver, so that a later search for the driver finds it already
//! loaded. The device's name shows whether the virtual GPU or a real driver was found.

use cudarc::driver::result;
use libloading::Library;
use std::ffi::{CStr, CString, c_char};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Device name of the virtual GPU.
const NAME: &str = "quell virtual GPU";

/// Whether the tests run on a real GPU.
pub fn is_real() -> bool {
    match std::env::var("QUELL_TEST_GPU") {
        Ok(kind) if kind == "real" => true,
        Ok(kind) if !kind.is_empty() && kind != "virtual" => {
            panic!("QUELL_TEST_GPU is '{kind}', but must be real or virtual")
        }
        _ => false,
    }
}

/// The loaded virtual GPU, or `None` on a real one.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        if is_real() {
            return None;
        }
        // Cargo puts the dev-dependency next to the test's executable.
        let folder = std::env::current_exe().unwrap();
        let path = folder.parent().unwrap().join("libvirtual_gpu.so");
        // SAFETY: the library's initialisation does nothing.
        let library = unsafe { Library::new(&path) };
        Some(library.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    });
    library.as_ref()
}

/// Loads the tests' GPU and checks that it is the one that was asked for. Idempotent.
pub fn load() {
    static CHECKED: OnceLock<()> = OnceLock::new();
    CHECKED.get_or_init(|| {
        library();
        result::init().expect("the tests need a GPU, virtual or real");
        let device = result::device::get(0).unwrap();
        let name = result::device::get_name(device).unwrap();
        assert_eq!(name != NAME, is_real(), "the tests run on '{name}'");
    });
}

/// Exclusive use of the GPU within this process, so that all that the GPU counts belongs to the
/// holder.
///
/// When it is dropped, the virtual GPU must have seen no violation (a leak is one).
pub struct Gpu {
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// Loads the tests' GPU and waits for its other users in this process. The virtual GPU is
/// reset: its counts start at zero.
pub fn lock() -> Gpu {
    static LOCK: Mutex<()> = Mutex::new(());
    load();
    // A test that failed while it held the lock has left no state that matters.
    let guard = LOCK.lock().unwrap_or_else(|failed| failed.into_inner());
    let gpu = Gpu {
        _one_at_a_time: guard,
    };
    if library().is_some() {
        gpu.reset();
    }
    gpu
}

/// Compute capability of the virtual GPU, unless the environment names another: one whose kernels
/// can overlap, and whose images hold more than those for 8.0. The tests that run the program use
/// 8.0.
const CAPABILITY: &str = "9.0";

fn symbol<F: Copy>(library: &Library, name: &str) -> F {
    // SAFETY: the callers name the functions and their types as the virtual GPU declares them.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    *found.unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn text(value: &str) -> CString {
    CString::new(value).unwrap()
}

/// Functions that only the virtual GPU has. All of them panic on a real one.
impl Gpu {
    fn library(&self) -> &'static Library {
        library().expect("this needs the virtual GPU")
    }

    fn texts(&self, function: &str) -> Vec<String> {
        type Function = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        let function = symbol::<Function>(self.library(), function);
        let mut buffer = vec![0u8; 1 << 20];
        // SAFETY: the buffer has the length that is passed.
        unsafe { function(buffer.as_mut_ptr().cast(), buffer.len()) };
        let text = CStr::from_bytes_until_nul(&buffer).unwrap();
        let lines = text.to_str().unwrap().lines();
        lines.map(str::to_owned).collect()
    }

    /// Changes a setting of the virtual GPU until the next [`lock`].
    pub fn set(&self, key: &str, value: &str) {
        type Function = unsafe extern "C" fn(*const c_char, *const c_char) -> i32;
        let function = symbol::<Function>(self.library(), "vgpu_set");
        let (key, value) = (text(key), text(value));
        // SAFETY: both are C strings.
        let refused = unsafe { function(key.as_ptr(), value.as_ptr()) };
        assert_eq!(refused, 0, "{key:?} = {value:?}");
    }

    /// Makes the `nth` call (counted from 1, from now on) of a driver function fail once.
    pub fn fail(&self, function: &str, nth: u64, code: i32) {
        type Function = unsafe extern "C" fn(*const c_char, u64, i32, u64);
        let fail = symbol::<Function>(self.library(), "vgpu_fail");
        let function = text(function);
        // SAFETY: the name is a C string.
        unsafe { fail(function.as_ptr(), nth, code, 1) };
    }

    /// Number of requested failures that have not happened yet.
    pub fn waiting_failures(&self) -> u64 {
        let waiting =
            symbol::<unsafe extern "C" fn() -> u64>(self.library(), "vgpu_waiting_failures");
        // SAFETY: the virtual GPU declares the function with this type.
        unsafe { waiting() }
    }

    /// Resets counts and settings, but not what is allocated.
    pub fn reset(&self) {
        // SAFETY: the virtual GPU declares the function with this type.
        unsafe { symbol::<unsafe extern "C" fn()>(self.library(), "vgpu_reset")() };
        if std::env::var_os("VGPU_COMPUTE_CAPABILITY").is_none() {
            self.set("compute_capability", CAPABILITY);
        }
    }

    /// Returns one of the virtual GPU's counts: `synchronisations`, `graph_launches`, …
    pub fn statistic(&self, name: &str) -> u64 {
        type Function = unsafe extern "C" fn(*const c_char) -> u64;
        let statistic = symbol::<Function>(self.library(), "vgpu_statistic");
        let value = text(name);
        // SAFETY: the name is a C string.
        let value = unsafe { statistic(value.as_ptr()) };
        assert_ne!(value, u64::MAX, "there is no statistic {name}");
        value
    }

    /// Driver functions that were called, with the number of calls.
    pub fn calls(&self) -> Vec<(String, u64)> {
        let parse = |line: &String| {
            let (name, count) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), count.parse().unwrap())
        };
        self.texts("vgpu_calls").iter().map(parse).collect()
    }

    /// The launches that ran while the setting `count` was on: a line of JSON for each. Those
    /// counted so far are forgotten.
    pub fn take_launches(&self) -> Vec<String> {
        let launches = self.texts("vgpu_launches");
        // SAFETY: the virtual GPU declares the function with this type.
        unsafe {
            symbol::<unsafe extern "C" fn()>(self.library(), "vgpu_forget_launches")();
        }
        launches
    }

    /// What the program did that a program must not do.
    pub fn violations(&self) -> Vec<String> {
        self.texts("vgpu_violations")
    }

    /// What was allocated or created and not released.
    pub fn leaks(&self) -> Vec<String> {
        self.texts("vgpu_leaks")
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if library().is_some() && !std::thread::panicking() {
            let violations = self.violations();
            assert!(violations.is_empty(), "violations: {violations:#?}");
        }
    }
}
