//! Whether there is a GPU that quell can use, and if not, why.
//!
//! cudarc panics where the driver or a function of it is missing: everything is
//! looked for first.

use super::error;
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute_enum::*;

/// The oldest CUDA version of a driver that reads the portable images (PTX ISA 8.4).
const OLDEST_VERSION: i32 = 12_040;
/// The first driver branch of that version.
const OLDEST_DRIVER: &str = "550";
/// The lowest compute capability that the kernels run on: 80 is 8.0.
const LOWEST_CAPABILITY: u32 = 80;

/// The driver's functions that this device calls.
const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// `Unavailable`: one line that says what is missing.
pub(super) fn unavailable(index: usize, reason: impl Into<String>) -> DeviceError {
    DeviceError::Unavailable {
        device: format!("cuda:{index}"),
        reason: reason.into(),
    }
}

/// A usable GPU.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) device: sys::CUdevice,
    pub(super) name: String,
    /// 90 is compute capability 9.0.
    pub(super) capability: u32,
    /// Bytes of its memory.
    pub(super) memory: usize,
    pub(super) multiprocessors: u32,
    /// The newest CUDA version that the driver supports: 12040 is 12.4.
    pub(super) driver: i32,
}

/// Looks for GPU `index`, without making a context.
pub(super) fn find(index: usize) -> Result<Found, DeviceError> {
    driver().map_err(|reason| unavailable(index, reason))?;
    let count = count().map_err(|reason| unavailable(index, reason))?;
    let ordinal = i32::try_from(index).ok().filter(|&ordinal| ordinal < count);
    let ordinal = ordinal.ok_or_else(|| {
        let reason = match count {
            1 => "there is only one GPU, cuda:0".to_owned(),
            count => format!("there are {count} GPUs, cuda:0 to cuda:{}", count - 1),
        };
        unavailable(index, reason)
    })?;
    let found = describe(ordinal).map_err(|error| {
        let reason = format!("the GPU does not answer: {}", error::describe(error));
        unavailable(index, reason)
    })?;
    if found.capability < LOWEST_CAPABILITY {
        let Found {
            name, capability, ..
        } = &found;
        let (major, minor) = (capability / 10, capability % 10);
        return Err(unavailable(
            index,
            format!("{name} has compute capability {major}.{minor}, and 8.0 or higher is needed"),
        ));
    }
    Ok(found)
}

/// `Unavailable` for a GPU that was found, but does not take a context.
pub(super) fn refused(index: usize, found: &Found, error: DeviceError) -> DeviceError {
    let (name, mebibytes) = (&found.name, found.memory >> 20);
    match error {
        DeviceError::OutOfMemory { .. } => unavailable(
            index,
            format!("{name} has no memory left: other programs hold its {mebibytes} MiB"),
        ),
        DeviceError::Failed { reason, .. } | DeviceError::Lost { reason, .. } => {
            unavailable(index, format!("{name} takes no work: {reason}"))
        }
        error => error,
    }
}

/// Looks for the driver.
fn driver() -> Result<(), String> {
    // SAFETY: opening the driver's library has no effect of its own.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver (libcuda was not found)".to_owned());
    }
    // SAFETY: the library is there, so that this does not panic.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS {
        // SAFETY: the function is looked up and not called.
        let function = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
        if function.is_err() {
            return Err(format!(
                "the NVIDIA driver is too old: it has no {name}; {OLDEST_DRIVER} or newer is needed"
            ));
        }
    }
    let version = version().map_err(|error| {
        let reason = error::describe(error);
        format!("the NVIDIA driver does not say its version: {reason}")
    })?;
    if version < OLDEST_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver is too old: it supports CUDA {major}.{minor}, and 12.4 is needed \
             (driver {OLDEST_DRIVER} or newer)"
        ));
    }
    Ok(())
}

/// The newest CUDA version that the driver supports: 12040 is 12.4.
fn version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// How many GPUs there are; not 0.
fn count() -> Result<i32, String> {
    const NONE: &str = "the NVIDIA driver finds no GPU";
    let no_device = DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE);
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) if count > 0 => Ok(count),
        Ok(_) => Err(NONE.to_owned()),
        Err(error) if error == no_device => Err(NONE.to_owned()),
        Err(error) => {
            let reason = error::describe(error);
            Err(format!("the NVIDIA driver does not start: {reason}"))
        }
    }
}

fn describe(ordinal: i32) -> Result<Found, DriverError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` was given by the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let positive = |number: i32| u32::try_from(number).unwrap_or(0);
    let major = positive(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?);
    let minor = positive(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
    let multiprocessors = positive(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?);
    Ok(Found {
        device,
        name: result::device::get_name(device)?,
        capability: 10 * major + minor,
        // SAFETY: `device` was given by the driver.
        memory: unsafe { result::device::total_mem(device) }?,
        multiprocessors,
        driver: version()?,
    })
}
