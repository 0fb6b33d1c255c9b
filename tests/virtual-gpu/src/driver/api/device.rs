//! Devices and their attributes.

use crate::driver::codes::{self, Code};
use crate::driver::{Driver, Failure, Need, call, launch};
use std::ffi::c_char;

fn known(driver: &mut Driver, device: i32) -> Result<(), Failure> {
    if (0..driver.settings.devices).contains(&device) {
        return Ok(());
    }
    driver.refuse(
        codes::INVALID_DEVICE,
        &format!("there is no device {device}"),
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> Code {
    call("cuDeviceGetCount", Need::INIT, |driver| {
        let value = driver.settings.devices;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, count, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut i32, ordinal: i32) -> Code {
    call("cuDeviceGet", Need::INIT, |driver| {
        if !(0..driver.settings.devices).contains(&ordinal) {
            return Err(Failure(codes::INVALID_DEVICE));
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, device, ordinal) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) -> Code {
    call("cuDeviceGetName", Need::INIT, |driver| {
        known(driver, device)?;
        if name.is_null() || len < 1 {
            return driver.refuse(codes::INVALID_VALUE, "there is no room for the name");
        }
        let text = driver.settings.name.as_bytes();
        let kept = text.len().min(len as usize - 1);
        // SAFETY: the caller provides room for `len` bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast::<u8>(), kept);
            name.add(kept).write(0);
        }
        Ok(())
    })
}

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn uuid(driver: &mut Driver, to: *mut [u8; 16], device: i32) -> Result<(), Failure> {
    known(driver, device)?;
    let mut value = *b"quell vGPU\0\0\0\0\0\0";
    value[12..].copy_from_slice(&device.to_be_bytes());
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { super::put(driver, to, value) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(to: *mut [u8; 16], device: i32) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuDeviceGetUuid", Need::INIT, |driver| unsafe {
        uuid(driver, to, device)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(to: *mut [u8; 16], device: i32) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuDeviceGetUuid_v2", Need::INIT, |driver| unsafe {
        uuid(driver, to, device)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) -> Code {
    call("cuDeviceTotalMem_v2", Need::INIT, |driver| {
        known(driver, device)?;
        let value = driver.settings.memory;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, bytes, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut i32,
    attribute: i32,
    device: i32,
) -> Code {
    call("cuDeviceGetAttribute", Need::INIT, |driver| {
        known(driver, device)?;
        let Some(found) = attribute_value(driver, attribute, device) else {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown device attribute {attribute}"),
            );
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, value, found) }
    })
}

/// Returns the value of a `CUdevice_attribute`, or 0 for a feature that this device lacks.
/// `None` if the attribute is unknown.
fn attribute_value(driver: &Driver, attribute: i32, device: i32) -> Option<i32> {
    let settings = &driver.settings;
    let shared = |bytes: usize| i32::try_from(bytes).unwrap_or(i32::MAX);
    Some(match attribute {
        1..=3 => 1024,                               // threads per block; its x and y size
        4 => 64,                                     // z dimension of a block
        5 => i32::MAX,                               // x dimension of the grid
        6 | 7 => 65535,                              // y and z dimensions of the grid
        8 => shared(launch::SHARED_DEFAULT),         // shared memory per block
        9 => 65536,                                  // constant memory
        10 => 32,                                    // warp size
        11 => i32::MAX,                              // maximum pitch
        12 | 82 => 65536,                            // registers per block and multiprocessor
        13 => 1_410_000,                             // clock rate in kHz
        14 => 512,                                   // texture alignment
        15 | 31 => 1,                                // overlapping copies, concurrent kernels
        16 => settings.multiprocessors,              // multiprocessors
        34 => device + 1,                            // PCI device ID
        36 => 1_215_000,                             // memory clock rate in kHz
        37 => 5120,                                  // bus width in bits
        38 => 40 << 20,                              // L2 cache in bytes
        39 => settings.threads_per_multiprocessor(), // threads per multiprocessor
        40 => 2,                                     // copy engines
        41 => 1,                                     // unified addressing
        75 => settings.capability.0,                 // compute capability, major
        76 => settings.capability.1,                 // compute capability, minor
        78..=80 => 1,                                // stream priorities, L1 caching
        81 => shared(settings.shared_per_multiprocessor()), // shared memory per multiprocessor
        87 => 2,                                     // ratio of float32 to float64 performance
        97 => shared(settings.shared_optin()),       // opt-in shared memory per block
        106 => settings.blocks_per_multiprocessor(), // blocks per multiprocessor
        111 => 1024,                                 // reserved shared memory per block
        115 => i32::from(settings.memory_pools),     // support for cuMemAllocAsync
        17..=150 => 0,
        _ => return None,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> Code {
    call("cuDeviceCanAccessPeer", Need::INIT, |driver| {
        known(driver, device)?;
        known(driver, peer)?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, can, 0) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut u64, device: i32) -> Code {
    call("cuDevicePrimaryCtxRetain", Need::INIT, |driver| {
        known(driver, device)?;
        let handle = match driver.primary.get(&device) {
            Some((handle, _)) => *handle,
            None => driver.make_context(device, true, 0),
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, context, handle) }?;
        driver.primary.entry(device).or_insert((handle, 0)).1 += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> Code {
    call(
        "cuDevicePrimaryCtxRelease_v2",
        Need::INIT_RELEASE,
        |driver| {
            known(driver, device)?;
            let Some((handle, count)) = driver.primary.get_mut(&device) else {
                return driver.refuse(
                    codes::INVALID_CONTEXT,
                    "the primary context is not retained",
                );
            };
            *count -= 1;
            if *count == 0 {
                let handle = *handle;
                driver.primary.remove(&device);
                driver.end_context(handle);
            }
            Ok(())
        },
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxReset_v2(device: i32) -> Code {
    call("cuDevicePrimaryCtxReset_v2", Need::INIT_RELEASE, |driver| {
        known(driver, device)?;
        if let Some((handle, _)) = driver.primary.remove(&device) {
            driver.end_context(handle);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(
    device: i32,
    flags: *mut u32,
    active: *mut i32,
) -> Code {
    call("cuDevicePrimaryCtxGetState", Need::INIT, |driver| {
        known(driver, device)?;
        let retained = driver.primary.contains_key(&device);
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put(driver, flags, 0)?;
            super::put(driver, active, i32::from(retained))
        }
    })
}
