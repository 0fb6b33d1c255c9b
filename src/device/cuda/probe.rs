//! Whether there is a GPU that quell can use, and if not, why.

use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::sys;

/// `Unavailable`: one line that says what is missing.
pub(super) fn unavailable(device: usize, reason: impl Into<String>) -> DeviceError {
    DeviceError::Unavailable {
        device: format!("cuda:{device}"),
        reason: reason.into(),
    }
}

/// A usable GPU.
pub(super) struct Found {
    pub(super) device: sys::CUdevice,
    pub(super) name: String,
    /// 90 is compute capability 9.0.
    pub(super) capability: u32,
    pub(super) memory: usize,
    pub(super) multiprocessors: u32,
}

/// Looks for device `index`.
pub(super) fn find(index: usize) -> Result<Found, DeviceError> {
    // SAFETY: loads the driver's library, which has no other effect.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(index, "there is no NVIDIA driver"));
    }
    let failed = |error| unavailable(index, super::error::describe(error));
    result::init().map_err(failed)?;
    let device = result::device::get(index as i32).map_err(failed)?;
    let attribute = |attribute| {
        // SAFETY: `device` was given by the driver.
        unsafe { result::device::get_attribute(device, attribute) }.map_err(failed)
    };
    use sys::CUdevice_attribute_enum::*;
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(Found {
        device,
        name: result::device::get_name(device).map_err(failed)?,
        capability: (10 * major + minor) as u32,
        // SAFETY: `device` was given by the driver.
        memory: unsafe { result::device::total_mem(device) }.map_err(failed)?,
        multiprocessors: multiprocessors as u32,
    })
}
