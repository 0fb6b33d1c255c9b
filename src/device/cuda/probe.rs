//! Detection of a usable GPU, or of the reason why there is none.
//!
//! cudarc panics if the driver or one of its functions is missing, so all of them are looked up
//! first.

use super::error;
use super::units::Room;
use crate::device::DeviceError;
use cudarc::driver::result;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use cudarc::driver::sys::CUdevice_attribute_enum::*;

/// The lowest CUDA version that a driver must support to read the portable images (PTX ISA
/// 8.4): 12040 is 12.4.
const OLDEST_VERSION: i32 = 12_040;
/// The first driver branch that supports that version.
const OLDEST_DRIVER: &str = "550";
/// The lowest compute capability that the kernels support: 80 is 8.0.
const LOWEST_CAPABILITY: u32 = 80;

/// The driver functions that this device calls.
const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
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
    "cuLaunchKernelEx",
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

/// Returns [`DeviceError::Unavailable`] for GPU `index`, with a one-line reason.
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
    /// Compute capability times ten: 90 is 9.0.
    pub(super) capability: u32,
    /// Bytes of device memory.
    pub(super) memory: usize,
    pub(super) multiprocessors: u32,
    /// Bytes of shared memory per multiprocessor.
    pub(super) shared: u32,
    /// The highest CUDA version that the driver supports: 12040 is 12.4.
    pub(super) driver: i32,
}

impl Found {
    /// Returns what the GPU has room for.
    pub(super) fn room(&self) -> Room {
        Room {
            multiprocessors: self.multiprocessors as usize,
            shared: self.shared as usize,
        }
    }
}

/// Looks for GPU `index`, without creating a context on it.
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
        let reason = format!("the GPU cannot be queried: {}", error::describe(error));
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

/// Converts the error of creating a context on a GPU that was found to
/// [`DeviceError::Unavailable`].
pub(super) fn refused(index: usize, found: &Found, error: DeviceError) -> DeviceError {
    let (name, mebibytes) = (&found.name, found.memory >> 20);
    match error {
        DeviceError::OutOfMemory { .. } => unavailable(
            index,
            format!("{name} has no memory left: other programs hold its {mebibytes} MiB"),
        ),
        DeviceError::Failed { reason, .. } | DeviceError::Lost { reason, .. } => {
            let reason = format!("no context can be created on {name}: {reason}");
            unavailable(index, reason)
        }
        error => error,
    }
}

/// Checks that the driver is installed, complete and recent enough. The error says why not.
fn driver() -> Result<(), String> {
    // SAFETY: loading the driver's library has no side effects.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver (libcuda was not found)".to_owned());
    }
    // SAFETY: the library is present, so this does not panic.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS {
        // SAFETY: the function is only looked up, not called.
        let function = unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) };
        if function.is_err() {
            return Err(format!(
                "the NVIDIA driver is too old: it has no {name}; {OLDEST_DRIVER} or newer is needed"
            ));
        }
    }
    let version = version().map_err(|error| {
        let reason = error::describe(error);
        format!("the version of the NVIDIA driver cannot be queried: {reason}")
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

/// Returns the highest CUDA version that the driver supports: 12040 is 12.4.
fn version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the driver writes one integer to a valid address.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// Returns the number of GPUs. If there are none, returns an error.
fn count() -> Result<i32, String> {
    const NONE: &str = "the NVIDIA driver finds no GPU";
    let no_device = DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE);
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) if count > 0 => Ok(count),
        Ok(_) => Err(NONE.to_owned()),
        Err(error) if error == no_device => Err(NONE.to_owned()),
        Err(error) => {
            let reason = error::describe(error);
            Err(format!("the NVIDIA driver cannot be initialised: {reason}"))
        }
    }
}

fn describe(ordinal: i32) -> Result<Found, DriverError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: the driver returned `device`.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let positive = |number: i32| u32::try_from(number).unwrap_or(0);
    let major = positive(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?);
    let minor = positive(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
    let multiprocessors = positive(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?);
    let shared = CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR;
    let shared = positive(attribute(shared)?);
    Ok(Found {
        device,
        name: result::device::get_name(device)?,
        capability: 10 * major + minor,
        // SAFETY: the driver returned `device`.
        memory: unsafe { result::device::total_mem(device) }?,
        multiprocessors,
        shared,
        driver: version()?,
    })
}
