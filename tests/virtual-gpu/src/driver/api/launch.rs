//! Launches of kernels and host functions.

use super::module::buffer_bytes;
use crate::driver::codes::{self, Code};
use crate::driver::launch::{KernelLaunch, gather_parameters};
use crate::driver::queue::{HostFunction, Op};
use crate::driver::{Driver, Failure, Need, call};
use crate::ptx::Launch;
use std::ffi::c_void;
use std::sync::Arc;

const EXTRA_END: usize = 0;
const EXTRA_POINTER: usize = 1;
const EXTRA_SIZE: usize = 2;

/// Returns the parameters of a launch as bytes, from one of the two ways to pass them.
///
/// # Safety
/// `pointers` and `extra` must be valid, as the CUDA driver API requires of `kernelParams` and
/// `extra`.
unsafe fn parameters(
    driver: &mut Driver,
    function: u64,
    pointers: *const *mut c_void,
    extra: *const *mut c_void,
) -> Result<Vec<u8>, Failure> {
    if extra.is_null() {
        let gathered = match driver.kernel(function)?.kernel() {
            // SAFETY: guaranteed by the caller.
            Some(kernel) => unsafe { gather_parameters(kernel, pointers) },
            None => Err("the kernel is gone".to_owned()),
        };
        return gathered.or_else(|text| driver.refuse(codes::INVALID_VALUE, &text));
    }
    if !pointers.is_null() {
        return driver.refuse(codes::INVALID_VALUE, "parameters are passed in two ways");
    }
    let (mut from, mut len) = (std::ptr::null::<u8>(), 0);
    let mut at = 0;
    loop {
        // SAFETY: the caller guarantees that the list ends with `EXTRA_END`.
        let key = unsafe { extra.add(at).read() } as usize;
        if key == EXTRA_END {
            break;
        }
        // SAFETY: as above; each key except the last is followed by a value.
        let value = unsafe { extra.add(at + 1).read() };
        match key {
            EXTRA_POINTER => from = value.cast(),
            // SAFETY: guaranteed by the caller.
            EXTRA_SIZE => len = unsafe { value.cast::<usize>().read() },
            _ => {
                return driver.refuse(
                    codes::INVALID_VALUE,
                    &format!("unknown key {key} of extra parameters"),
                );
            }
        }
        at += 2;
    }
    let wanted = buffer_bytes(driver, function)?;
    if from.is_null() || len != wanted {
        let text = format!("{len} bytes of parameters are passed; the kernel has {wanted}");
        return driver.refuse(codes::INVALID_VALUE, &text);
    }
    // SAFETY: guaranteed by the caller.
    Ok(unsafe { std::slice::from_raw_parts(from, len) }.to_vec())
}

/// # Safety
/// `pointers` and `extra` must be valid, as the CUDA driver API requires of `kernelParams` and
/// `extra`.
unsafe fn launch(
    driver: &mut Driver,
    function: u64,
    (mut launch, overlaps): (Launch, bool),
    stream: u64,
    pointers: *const *mut c_void,
    extra: *const *mut c_void,
) -> Result<(), Failure> {
    let stream = driver.resolve_stream(stream)?;
    // SAFETY: guaranteed by the caller.
    launch.parameters = unsafe { parameters(driver, function, pointers, extra) }?;
    let most_shared = driver.settings.shared_optin();
    match KernelLaunch::new(driver.kernel(function)?, launch, most_shared) {
        Ok(mut launch) => {
            launch.overlaps = overlaps;
            driver.submit(stream, Op::Kernel(Arc::new(launch)))
        }
        Err(text) => driver.refuse(codes::INVALID_VALUE, &text),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: u64,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared: u32,
    stream: u64,
    pointers: *const *mut c_void,
    extra: *const *mut c_void,
) -> Code {
    call("cuLaunchKernel", Need::CONTEXT, |driver| {
        let what = Launch {
            grid: [grid_x, grid_y, grid_z],
            block: [block_x, block_y, block_z],
            dynamic_shared: shared as usize,
            parameters: Vec::new(),
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { launch(driver, function, (what, false), stream, pointers, extra) }
    })
}

/// `CUlaunchAttribute`.
#[repr(C)]
pub struct Attribute {
    pub id: i32,
    pub pad: [u8; 4],
    pub value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct Configuration {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: u32,
    pub stream: u64,
    pub attributes: *const Attribute,
    pub count: u32,
}

/// Fails if an attribute asks for a feature that this device lacks.
fn check_attribute(driver: &mut Driver, attribute: &Attribute) -> Result<(), Failure> {
    const COOPERATIVE: i32 = 2;
    const CLUSTER_DIMENSION: i32 = 4;
    match attribute.id {
        COOPERATIVE if attribute.value[0] != 0 => Err(Failure(codes::NOT_SUPPORTED)),
        CLUSTER_DIMENSION if attribute.value[..3] != [1, 1, 1] => {
            Err(Failure(codes::NOT_SUPPORTED))
        }
        0..=16 => Ok(()),
        id => driver.refuse(
            codes::INVALID_VALUE,
            &format!("unknown launch attribute {id}"),
        ),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    configuration: *const Configuration,
    function: u64,
    pointers: *const *mut c_void,
    extra: *const *mut c_void,
) -> Code {
    call("cuLaunchKernelEx", Need::CONTEXT, |driver| {
        // SAFETY: null is checked; otherwise valid, as the CUDA driver API requires.
        let Some(configuration) = (unsafe { configuration.as_ref() }) else {
            return driver.refuse(codes::INVALID_VALUE, "the configuration is null");
        };
        const PROGRAMMATIC_STREAM_SERIALIZATION: i32 = 6;
        let mut overlaps = false;
        for at in 0..configuration.count as usize {
            // SAFETY: the array has `count` valid entries, as the CUDA driver API requires.
            let attribute = unsafe { &*configuration.attributes.add(at) };
            check_attribute(driver, attribute)?;
            if attribute.id == PROGRAMMATIC_STREAM_SERIALIZATION {
                overlaps = attribute.value[0] != 0;
            }
        }
        let what = Launch {
            grid: configuration.grid,
            block: configuration.block,
            dynamic_shared: configuration.shared as usize,
            parameters: Vec::new(),
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            launch(
                driver,
                function,
                (what, overlaps),
                configuration.stream,
                pointers,
                extra,
            )
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: u64,
    function: Option<HostFunction>,
    data: *mut c_void,
) -> Code {
    call("cuLaunchHostFunc", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        match function {
            Some(function) => driver.submit(
                stream,
                Op::Host {
                    function,
                    data: data as usize,
                },
            ),
            None => driver.refuse(codes::INVALID_VALUE, "the function is null"),
        }
    })
}
