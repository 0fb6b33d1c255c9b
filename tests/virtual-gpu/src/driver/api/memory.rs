//! Device memory and pinned host memory: allocations, copies, fills.

use crate::driver::codes::{self, Code};
use crate::driver::memory::{FIRST_ADDRESS, LAST_ADDRESS, Stage};
use crate::driver::queue::{HostSource, Op};
use crate::driver::{Driver, Failure, Need, call, current_context};
use std::ffi::c_void;

/// Returns the bytes in use on the context's device.
fn used(driver: &Driver, context: u64) -> usize {
    let device = driver.contexts.get(context).map(|context| context.device);
    driver
        .memory
        .used(|other| driver.contexts.get(other).map(|context| context.device) == device)
}

fn allocate(driver: &mut Driver, bytes: usize, stage: Stage) -> Result<u64, Failure> {
    if bytes == 0 {
        return driver.refuse(codes::INVALID_VALUE, "an allocation of 0 bytes");
    }
    let context = driver.current()?;
    let fits = |driver: &Driver| {
        let free = driver.settings.memory.saturating_sub(used(driver, context));
        bytes
            .checked_next_multiple_of(512)
            .is_some_and(|padded| padded <= free)
    };
    if !fits(driver) {
        // Run queued frees first, which return their memory.
        driver.run_context(context)?;
    }
    if !fits(driver) {
        return Err(Failure(codes::OUT_OF_MEMORY));
    }
    let Some(address) = driver.memory.allocate(context, bytes, stage) else {
        return Err(Failure(codes::OUT_OF_MEMORY));
    };
    driver.report.peak_memory = driver.report.peak_memory.max(used(driver, context) as u64);
    Ok(address)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Code {
    call("cuMemAlloc_v2", Need::CONTEXT, |driver| {
        driver.forbidden_while_capturing()?;
        let made = allocate(driver, bytes, Stage::Live)?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, address, made) }
    })
}

/// Refused while the stream is captured: graphs cannot contain allocation nodes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: u64) -> Code {
    call("cuMemAllocAsync", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        driver.forbidden_on_captured(stream)?;
        let made = allocate(driver, bytes, Stage::Reserved)?;
        driver.submit(stream, Op::Allocate { address: made })?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, address, made) }
    })
}

/// Fails unless this is the first address of an allocation of the current context.
fn freeable(driver: &mut Driver, address: u64) -> Result<(), Failure> {
    let context = driver.current()?;
    let why = match driver.memory.get(address) {
        Some(found) if found.of_module => format!("{} is freed with its module", found.label),
        Some(found) if found.leaving => format!("{} is freed twice", found.label),
        Some(found) if found.context != context => {
            format!("{} belongs to another context", found.label)
        }
        Some(_) => return Ok(()),
        None => match (
            driver.memory.freed(address),
            driver.memory.containing(address),
        ) {
            (Some(label), _) => format!("{label} is freed twice"),
            (None, Some(found)) => format!(
                "{address:#x} lies within {}, not at its beginning",
                found.label
            ),
            (None, None) => format!("{address:#x} is not an allocation"),
        },
    };
    driver.refuse(codes::INVALID_VALUE, &why)
}

/// Waits for queued work that uses the memory, as a real driver does. Nothing guarantees that
/// wait, so such queued work is reported as a violation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> Code {
    call("cuMemFree_v2", Need::RELEASE, |driver| {
        freeable(driver, address)?;
        let context = driver.current()?;
        driver.forbidden_while_capturing()?;
        driver.report.synchronisations += 1;
        let users = driver.users_of(context, address);
        let reserved = driver
            .memory
            .get(address)
            .is_some_and(|found| found.stage == Stage::Reserved);
        let ran = if reserved {
            driver.run_context(context)
        } else {
            driver.run(context, users)
        };
        driver.memory.free(address);
        ran
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeAsync(address: u64, stream: u64) -> Code {
    call("cuMemFreeAsync", Need::RELEASE, |driver| {
        freeable(driver, address)?;
        let context = driver.current()?;
        if driver
            .memory
            .get(address)
            .is_some_and(|found| !found.ordered)
        {
            return driver.refuse(
                codes::INVALID_VALUE,
                "the memory is not from cuMemAllocAsync",
            );
        }
        if let Err(failure) = driver.sound(context) {
            driver.memory.free(address);
            return Err(failure);
        }
        let stream = driver.resolve_stream(stream)?;
        driver.forbidden_on_captured(stream)?;
        if let Some(found) = driver.memory.get_mut(address) {
            // The memory stays valid until the free runs.
            found.leaving = true;
        }
        driver.submit(stream, Op::Free { address })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    call("cuMemGetInfo_v2", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        let all = driver.settings.memory;
        let left = all.saturating_sub(used(driver, context));
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put(driver, free, left)?;
            super::put(driver, total, all)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut u64,
    bytes: *mut usize,
    address: u64,
) -> Code {
    call("cuMemGetAddressRange_v2", Need::CONTEXT, |driver| {
        let Some((start, len)) = driver
            .memory
            .containing(address)
            .map(|found| (found.base, found.len))
        else {
            return driver.refuse(
                codes::NOT_FOUND,
                &format!("{address:#x} lies in no allocation"),
            );
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put_optional(base, start);
            super::put_optional(bytes, len);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    address: *mut *mut c_void,
    bytes: usize,
    flags: u32,
) -> Code {
    call("cuMemHostAlloc", Need::CONTEXT, |driver| {
        if bytes == 0 || flags > 7 {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("{bytes} bytes with flags {flags:#x}"),
            );
        }
        driver.forbidden_while_capturing()?;
        let context = driver.current()?;
        let Some(made) = driver.host.allocate(context, bytes, flags) else {
            return Err(Failure(codes::OUT_OF_MEMORY));
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, address, made as *mut c_void) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { cuMemHostAlloc(address, bytes, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(
    address: *mut c_void,
    bytes: usize,
    flags: u32,
) -> Code {
    call("cuMemHostRegister_v2", Need::CONTEXT, |driver| {
        let context = driver.current()?;
        if address.is_null() || bytes == 0 {
            return driver.refuse(codes::INVALID_VALUE, "no memory is passed");
        }
        if !driver
            .host
            .register(context, address as usize, bytes, flags)
        {
            return driver.refuse(
                codes::HOST_MEMORY_ALREADY_REGISTERED,
                "the memory is pinned already",
            );
        }
        Ok(())
    })
}

fn unpin(driver: &mut Driver, address: usize, registered: bool) -> Result<(), Failure> {
    let context = driver.current()?;
    let Some((owner, len, by_register)) = driver
        .host
        .get(address)
        .map(|p| (p.context, p.len, p.registered))
    else {
        let code = if registered {
            codes::HOST_MEMORY_NOT_REGISTERED
        } else {
            codes::INVALID_VALUE
        };
        return driver.refuse(
            code,
            &format!("{address:#x} is not pinned memory (already freed?)"),
        );
    };
    if owner != context || by_register != registered {
        let text = format!(
            "pinned memory {address:#x} was made in another context or by another function"
        );
        return driver.refuse(codes::INVALID_VALUE, &text);
    }
    driver.forbidden_while_capturing()?;
    driver.report.synchronisations += 1;
    let label = format!("pinned host memory {address:#x} ({len} bytes)");
    let users = driver.users(context, &label, |op| op.uses_host(address, len));
    let ran = driver.run(context, users);
    driver.host.free(address);
    ran
}

/// Waits like `cuMemFree_v2`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> Code {
    call("cuMemFreeHost", Need::RELEASE, |driver| {
        unpin(driver, address as usize, false)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: *mut c_void) -> Code {
    call("cuMemHostUnregister", Need::RELEASE, |driver| {
        unpin(driver, address as usize, true)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetFlags(flags: *mut u32, address: *mut c_void) -> Code {
    call("cuMemHostGetFlags", Need::CONTEXT, |driver| {
        let Some(value) = driver
            .host
            .overlapping(address as usize, 1)
            .map(|(_, found)| found.flags)
        else {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("{address:p} is not pinned memory"),
            );
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, flags, value) }
    })
}

/// Serves these values of `CUpointer_attribute`: context, memory type, device and host pointer,
/// start and size of the range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    data: *mut c_void,
    attribute: i32,
    address: u64,
) -> Code {
    const MEMORY_TYPE: i32 = 2;
    call("cuPointerGetAttribute", Need::CONTEXT, |driver| {
        let device = driver
            .memory
            .containing(address)
            .map(|found| (found.context, found.base, found.len));
        let host = driver
            .host
            .overlapping(address as usize, 1)
            .map(|(at, p)| (p.context, at as u64, p.len));
        let Some((context, base, len)) = device.or(host) else {
            return Err(Failure(codes::INVALID_VALUE));
        };
        let value = match attribute {
            1 => context,
            MEMORY_TYPE => 2 - u64::from(device.is_none()),
            3 if device.is_some() => address,
            4 if device.is_none() => address,
            11 => base,
            12 => len as u64,
            _ => return Err(Failure(codes::NOT_SUPPORTED)),
        };
        // SAFETY: the caller's pointer is valid, as the CUDA driver API requires; the memory
        // type is a 32-bit number.
        unsafe {
            match attribute {
                MEMORY_TYPE => super::put(driver, data.cast::<u32>(), value as u32),
                _ => super::put(driver, data.cast::<u64>(), value),
            }
        }
    })
}

/// Fails if this cannot be the address of host memory.
fn host_address(driver: &mut Driver, address: usize) -> Result<(), Failure> {
    if address == 0 {
        return driver.refuse(codes::INVALID_VALUE, "the host address is null");
    }
    if (FIRST_ADDRESS..LAST_ADDRESS).contains(&(address as u64)) {
        return driver.refuse(
            codes::INVALID_VALUE,
            &format!("host address {address:#x} is a device address"),
        );
    }
    Ok(())
}

/// Returns whether host memory is pinned. Partly pinned memory counts as pinned and is refused
/// when the copy is queued.
fn is_pinned(driver: &Driver, address: usize, len: usize) -> bool {
    driver.host.overlapping(address, len).is_some()
}

/// Queues a copy to the device. Pinned memory is read when the copy runs, pageable memory
/// immediately.
///
/// With `wait`, a copy from pinned memory has run when this returns. A copy from pageable
/// memory has not: as the CUDA manual says, the call waits for the stream first and returns as
/// soon as the bytes have been taken. Non-blocking streams may run before that copy.
///
/// # Safety
/// `from` must be readable for `len` bytes and, if it is pinned, stay so until the copy has
/// run.
unsafe fn to_device(
    driver: &mut Driver,
    to: u64,
    from: usize,
    len: usize,
    stream: u64,
    wait: bool,
) -> Result<(), Failure> {
    let stream = driver.resolve_stream(stream)?;
    if wait {
        driver.forbidden_while_capturing()?;
    }
    if len == 0 {
        return Ok(());
    }
    host_address(driver, from)?;
    let pinned = is_pinned(driver, from, len);
    let from = if pinned {
        HostSource::Pinned(from)
    } else {
        // A graph would read the memory at launch, and nothing keeps it alive until then.
        driver.forbidden_on_captured(stream)?;
        driver.check_op(&Op::Fill {
            to,
            value: 0,
            unit: 1,
            count: len,
        })?;
        // SAFETY: guaranteed by the caller.
        HostSource::Snapshot(unsafe { std::slice::from_raw_parts(from as *const u8, len) }.into())
    };
    if wait && !pinned {
        driver.synchronise_stream(stream)?;
    }
    driver.submit(stream, Op::HostToDevice { to, from, len })?;
    if wait && pinned {
        driver.synchronise_stream(stream)
    } else {
        Ok(())
    }
}

/// Queues a copy to the host. A copy to pageable memory always waits, as with a real driver.
///
/// # Safety
/// `to` must be writable for `len` bytes and, if it is pinned, stay so until the copy has run.
unsafe fn to_host(
    driver: &mut Driver,
    to: usize,
    from: u64,
    len: usize,
    stream: u64,
    wait: bool,
) -> Result<(), Failure> {
    let stream = driver.resolve_stream(stream)?;
    if wait {
        driver.forbidden_while_capturing()?;
    }
    if len == 0 {
        return Ok(());
    }
    host_address(driver, to)?;
    let op = Op::DeviceToHost { to, from, len };
    if is_pinned(driver, to, len) {
        driver.submit(stream, op)?;
        return if wait {
            driver.synchronise_stream(stream)
        } else {
            Ok(())
        };
    }
    driver.forbidden_on_captured(stream)?;
    driver.forbidden_while_capturing()?;
    driver.check_op(&Op::Fill {
        to: from,
        value: 0,
        unit: 1,
        count: len,
    })?;
    driver.report.synchronisations += 1;
    let node = driver.enqueue(stream, op, Vec::new())?;
    driver.run(current_context(), vec![node])
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, len: usize) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuMemcpyHtoD_v2", Need::CONTEXT, |driver| unsafe {
        to_device(driver, to, from as usize, len, 0, true)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    len: usize,
    stream: u64,
) -> Code {
    call("cuMemcpyHtoDAsync_v2", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { to_device(driver, to, from as usize, len, stream, false) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, len: usize) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuMemcpyDtoH_v2", Need::CONTEXT, |driver| unsafe {
        to_host(driver, to as usize, from, len, 0, true)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    len: usize,
    stream: u64,
) -> Code {
    call("cuMemcpyDtoHAsync_v2", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { to_host(driver, to as usize, from, len, stream, false) }
    })
}

fn on_device(
    driver: &mut Driver,
    to: u64,
    from: u64,
    len: usize,
    stream: u64,
) -> Result<(), Failure> {
    let stream = driver.resolve_stream(stream)?;
    if len == 0 {
        return Ok(());
    }
    if to < from.saturating_add(len as u64) && from < to.saturating_add(len as u64) {
        return driver.refuse(codes::INVALID_VALUE, "the two sides of the copy overlap");
    }
    driver.submit(stream, Op::DeviceToDevice { to, from, len })
}

/// Does not wait, like a real driver for copies within the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) -> Code {
    call("cuMemcpyDtoD_v2", Need::CONTEXT, |driver| {
        driver.forbidden_while_capturing()?;
        on_device(driver, to, from, len, 0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: u64) -> Code {
    call("cuMemcpyDtoDAsync_v2", Need::CONTEXT, |driver| {
        on_device(driver, to, from, len, stream)
    })
}

fn is_device(address: u64) -> bool {
    (FIRST_ADDRESS..LAST_ADDRESS).contains(&address)
}

/// # Safety
/// Any host address among `to` and `from` must be valid for `len` bytes.
unsafe fn either(
    driver: &mut Driver,
    to: u64,
    from: u64,
    len: usize,
    stream: u64,
    wait: bool,
) -> Result<(), Failure> {
    match (is_device(to), is_device(from)) {
        (true, true) => on_device(driver, to, from, len, stream),
        // SAFETY: guaranteed by the caller.
        (true, false) => unsafe { to_device(driver, to, from as usize, len, stream, wait) },
        // SAFETY: guaranteed by the caller.
        (false, true) => unsafe { to_host(driver, to as usize, from, len, stream, wait) },
        (false, false) => driver.refuse(codes::INVALID_VALUE, "a copy from host to host"),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy(to: u64, from: u64, len: usize) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuMemcpy", Need::CONTEXT, |driver| unsafe {
        either(driver, to, from, len, 0, true)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: u64) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuMemcpyAsync", Need::CONTEXT, |driver| unsafe {
        either(driver, to, from, len, stream, false)
    })
}

fn fill(
    driver: &mut Driver,
    to: u64,
    value: u32,
    unit: usize,
    count: usize,
    stream: u64,
) -> Result<(), Failure> {
    let stream = driver.resolve_stream(stream)?;
    if count == 0 {
        return Ok(());
    }
    if !to.is_multiple_of(unit as u64) || unit.checked_mul(count).is_none() {
        return driver.refuse(
            codes::INVALID_VALUE,
            &format!("{count} units of {unit} bytes at {to:#x}"),
        );
    }
    driver.submit(
        stream,
        Op::Fill {
            to,
            value,
            unit,
            count,
        },
    )
}

macro_rules! fills {
    ($($name:ident, $name_async:ident, $value:ty, $unit:literal;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(to: u64, value: $value, count: usize) -> Code {
                call(stringify!($name), Need::CONTEXT, |driver| {
                    driver.forbidden_while_capturing()?;
                    fill(driver, to, value.into(), $unit, count, 0)
                })
            }

            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name_async(to: u64, value: $value, count: usize, stream: u64) -> Code {
                call(stringify!($name_async), Need::CONTEXT, |driver| {
                    fill(driver, to, value.into(), $unit, count, stream)
                })
            }
        )*
    };
}

fills! {
    cuMemsetD8_v2, cuMemsetD8Async, u8, 1;
    cuMemsetD16_v2, cuMemsetD16Async, u16, 2;
    cuMemsetD32_v2, cuMemsetD32Async, u32, 4;
}
