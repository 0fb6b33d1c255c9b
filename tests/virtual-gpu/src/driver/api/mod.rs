//! The functions that `libcuda.so.1` exports, grouped as in the manual of the CUDA driver API.
//! Each is a thin wrapper around [`super::Driver`].
//!
//! # Safety
//! All functions take pointers as described by the CUDA driver API: a pointer that is not null
//! must be valid for what the API reads or writes through it. Handles and device addresses may
//! have any value, since they are looked up.

#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

pub mod context;
pub mod device;
pub mod error;
pub mod event;
pub mod graph;
pub mod launch;
pub mod memory;
pub mod module;
pub mod stream;
pub mod unsupported;

use super::{Driver, Failure, codes};
use std::ffi::{CStr, c_char};

/// Writes a result through a pointer that must not be null.
///
/// # Safety
/// `to` must be null or valid for writing.
unsafe fn put<T>(driver: &mut Driver, to: *mut T, value: T) -> Result<(), Failure> {
    if to.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "the pointer for the result is null");
    }
    // SAFETY: not null, and valid as the caller guarantees.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a result through a pointer if it is not null.
///
/// # Safety
/// `to` must be null or valid for writing.
unsafe fn put_optional<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: not null, and valid as the caller guarantees.
        unsafe { to.write(value) };
    }
}

/// Returns the text of a C string.
///
/// # Safety
/// `text` must be null or a C string.
unsafe fn text(driver: &mut Driver, text: *const c_char) -> Result<String, Failure> {
    if text.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "a name is null");
    }
    // SAFETY: not null, and a C string as the caller guarantees.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => driver.refuse(codes::INVALID_VALUE, "a name is not UTF-8"),
    }
}
