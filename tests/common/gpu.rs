//! The GPU of the tests: the virtual one, or with `QUELL_TEST_GPU=real` a real one.
//!
//! The virtual GPU calls itself `libcuda.so.1`. It is loaded by its path before the
//! driver is looked for, so that whoever asks for the driver finds it loaded already.
//! That it was found, and not a real driver, is checked by the device's name.
#![allow(dead_code)] // each test file uses a part

use cudarc::driver::result;
use libloading::Library;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// What the virtual GPU calls itself.
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

/// The virtual GPU, loaded; `None` on a real one.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        if is_real() {
            return None;
        }
        // Cargo puts the dev-dependency beside the test.
        let folder = std::env::current_exe().unwrap();
        let path = folder.parent().unwrap().join("libvirtual_gpu.so");
        // SAFETY: the library's initialisation does nothing.
        let library = unsafe { Library::new(&path) };
        Some(library.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    });
    library.as_ref()
}

/// Loads the GPU of the tests and checks that it is the one that is meant. Idempotent.
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

/// Only one holder at a time uses the GPU: what it counts is the holder's.
pub struct Gpu {
    _one_at_a_time: MutexGuard<'static, ()>,
}

/// Loads the GPU of the tests and waits for its other users in this process.
pub fn lock() -> Gpu {
    static LOCK: Mutex<()> = Mutex::new(());
    load();
    Gpu {
        // A test that failed holding it has left nothing behind that matters.
        _one_at_a_time: LOCK.lock().unwrap_or_else(|failed| failed.into_inner()),
    }
}
