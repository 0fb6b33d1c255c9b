//! Context management.

use crate::driver::codes::{self, Code};
use crate::driver::{
    Driver, Failure, Need, call, current_context, pop_current_context, push_current_context,
    set_current_context,
};
use std::ffi::c_void;

/// Fails unless the handle is a live context.
fn live(driver: &mut Driver, context: u64) -> Result<(), Failure> {
    if driver.contexts.get(context).is_some() {
        return Ok(());
    }
    let text = driver.contexts.explain(context);
    driver.refuse(codes::INVALID_CONTEXT, &text)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut u64) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuCtxGetCurrent", Need::INIT, |driver| unsafe {
        super::put(driver, context, current_context())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: u64) -> Code {
    call("cuCtxSetCurrent", Need::INIT, |driver| {
        if context != 0 {
            live(driver, context)?;
        }
        set_current_context(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: u64) -> Code {
    call("cuCtxPushCurrent_v2", Need::INIT, |driver| {
        live(driver, context)?;
        push_current_context(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut u64) -> Code {
    call("cuCtxPopCurrent_v2", Need::INIT, |driver| {
        let popped = pop_current_context();
        if popped == 0 {
            return driver.refuse(
                codes::INVALID_CONTEXT,
                "no context is current to this thread",
            );
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put_optional(context, popped) };
        Ok(())
    })
}

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn create(
    driver: &mut Driver,
    context: *mut u64,
    flags: u32,
    device: i32,
) -> Result<(), Failure> {
    if !(0..driver.settings.devices).contains(&device) {
        return driver.refuse(
            codes::INVALID_DEVICE,
            &format!("there is no device {device}"),
        );
    }
    let handle = driver.make_context(device, false, flags);
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { super::put(driver, context, handle) }?;
    push_current_context(handle);
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v2(context: *mut u64, flags: u32, device: i32) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuCtxCreate_v2", Need::INIT, |driver| unsafe {
        create(driver, context, flags, device)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v3(
    context: *mut u64,
    _affinity: *mut c_void,
    affinities: i32,
    flags: u32,
    device: i32,
) -> Code {
    call("cuCtxCreate_v3", Need::INIT, |driver| {
        if affinities != 0 {
            return Err(Failure(codes::UNSUPPORTED_EXEC_AFFINITY));
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { create(driver, context, flags, device) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v4(
    context: *mut u64,
    parameters: *mut c_void,
    flags: u32,
    device: i32,
) -> Code {
    call("cuCtxCreate_v4", Need::INIT, |driver| {
        if !parameters.is_null() {
            return Err(Failure(codes::NOT_SUPPORTED));
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { create(driver, context, flags, device) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDestroy_v2(context: u64) -> Code {
    call("cuCtxDestroy_v2", Need::INIT_RELEASE, |driver| {
        live(driver, context)?;
        if driver
            .contexts
            .get(context)
            .is_some_and(|found| found.primary)
        {
            return driver.refuse(
                codes::INVALID_CONTEXT,
                "a primary context is released, not destroyed",
            );
        }
        driver.end_context(context);
        if current_context() == context {
            pop_current_context();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut i32) -> Code {
    call("cuCtxGetDevice", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        let value = driver.contexts.get(context).map_or(0, |found| found.device);
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, device, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetApiVersion(context: u64, version: *mut u32) -> Code {
    call("cuCtxGetApiVersion", Need::INIT, |driver| {
        if context != 0 {
            live(driver, context)?;
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, version, 3020) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSynchronize() -> Code {
    call("cuCtxSynchronize", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        driver.synchronise_context(context)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetFlags(flags: *mut u32) -> Code {
    call("cuCtxGetFlags", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        let value = driver.contexts.get(context).map_or(0, |found| found.flags);
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, flags, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetFlags(flags: u32) -> Code {
    call("cuCtxSetFlags", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        if let Some(found) = driver.contexts.get_mut(context) {
            found.flags = flags;
        }
        Ok(())
    })
}

/// Returns the default value of a limit, by `CUlimit`.
fn default_limit(limit: i32) -> Option<usize> {
    Some(match limit {
        0 => 1024,
        1 => 1 << 20,
        2 => 8 << 20,
        3 => 2,
        4 => 2048,
        5 => 64,
        6 => 0,
        _ => return None,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetLimit(value: *mut usize, limit: i32) -> Code {
    call("cuCtxGetLimit", Need::CONTEXT, |driver| {
        let Some(default) = default_limit(limit) else {
            return Err(Failure(codes::UNSUPPORTED_LIMIT));
        };
        let context = driver.current()?;
        let set = driver
            .contexts
            .get(context)
            .and_then(|found| found.limits.get(&limit).copied());
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, value, set.unwrap_or(default)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetLimit(limit: i32, value: usize) -> Code {
    call("cuCtxSetLimit", Need::CONTEXT, |driver| {
        if default_limit(limit).is_none() {
            return Err(Failure(codes::UNSUPPORTED_LIMIT));
        }
        let context = driver.current()?;
        if let Some(found) = driver.contexts.get_mut(context) {
            found.limits.insert(limit, value);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCacheConfig(config: *mut i32) -> Code {
    call("cuCtxGetCacheConfig", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        let value = driver.contexts.get(context).map_or(0, |found| found.cache);
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, config, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCacheConfig(config: i32) -> Code {
    call("cuCtxSetCacheConfig", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        if let Some(found) = driver.contexts.get_mut(context) {
            found.cache = config;
        }
        Ok(())
    })
}

/// Lowest and highest stream priority.
pub const PRIORITIES: (i32, i32) = (0, -5);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) -> Code {
    call("cuCtxGetStreamPriorityRange", Need::CONTEXT, |_| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put_optional(least, PRIORITIES.0);
            super::put_optional(greatest, PRIORITIES.1);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuProfilerStart() -> Code {
    call("cuProfilerStart", Need::CONTEXT, |_| Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuProfilerStop() -> Code {
    call("cuProfilerStop", Need::CONTEXT, |_| Ok(()))
}
