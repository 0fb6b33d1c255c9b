//! The functions that `libcuda.so.1` exports, grouped as the driver's manual groups
//! them. Each is a few lines over [`super::Driver`].
//!
//! # Safety
//! All of them take the pointers that the CUDA driver API describes: a pointer that is
//! not null must be valid for what the API says is read or written through it. Handles
//! and device addresses can be anything, they are looked up.

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
/// `to` is null or valid for writing.
unsafe fn put<T>(driver: &mut Driver, to: *mut T, value: T) -> Result<(), Failure> {
    if to.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "the pointer for the result is null");
    }
    // SAFETY: not null, and valid by the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes a result through a pointer if it is not null.
///
/// # Safety
/// `to` is null or valid for writing.
unsafe fn put_optional<T>(to: *mut T, value: T) {
    if !to.is_null() {
        // SAFETY: not null, and valid by the caller's promise.
        unsafe { to.write(value) };
    }
}

/// The text of a C string.
///
/// # Safety
/// `text` is null or a C string.
unsafe fn text(driver: &mut Driver, text: *const c_char) -> Result<String, Failure> {
    if text.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "a name is null");
    }
    // SAFETY: not null, and a C string by the caller's promise.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => driver.refuse(codes::INVALID_VALUE, "a name is not UTF-8"),
    }
}
