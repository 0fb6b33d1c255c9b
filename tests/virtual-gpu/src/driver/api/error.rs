//! Initialisation, the driver version, and names of errors.

use crate::driver::codes::{self, Code};
use crate::driver::{Failure, Need, call};
use std::ffi::{CStr, c_char};

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn give(code: Option<&'static CStr>, to: *mut *const c_char) -> Code {
    if to.is_null() {
        return codes::INVALID_VALUE;
    }
    let text = code.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: not null, and valid as the caller guarantees.
    unsafe { to.write(text) };
    if text.is_null() {
        codes::INVALID_VALUE
    } else {
        codes::SUCCESS
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: Code, name: *mut *const c_char) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { give(codes::name(error), name) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: Code, text: *mut *const c_char) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { give(codes::description(error), text) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> Code {
    call("cuDriverGetVersion", Need::NOTHING, |driver| {
        let value = driver.settings.driver;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, version, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: u32) -> Code {
    call("cuInit", Need::NOTHING, |driver| {
        if flags != 0 {
            return driver.refuse(codes::INVALID_VALUE, "flags are not 0");
        }
        if driver.settings.devices < 1 {
            return Err(Failure(codes::NO_DEVICE));
        }
        driver.initialised = true;
        Ok(())
    })
}
