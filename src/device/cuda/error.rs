//! Conversion of CUDA driver errors to [`DeviceError`]s.

use crate::device::DeviceError;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;
use std::cell::{Cell, OnceCell};

/// The name of this device in errors.
pub(super) const DEVICE: &str = "cuda";

/// Returns [`DeviceError::Failed`] with the given reason.
pub(super) fn failed(operation: &'static str, reason: impl Into<String>) -> DeviceError {
    DeviceError::Failed {
        device: DEVICE,
        operation,
        reason: reason.into(),
    }
}

/// Returns [`DeviceError::Unsupported`]: `what` was requested, `expected` says what is
/// accepted.
pub(super) fn unsupported(what: impl Into<String>, expected: impl Into<String>) -> DeviceError {
    DeviceError::Unsupported {
        device: DEVICE,
        what: what.into(),
        expected: expected.into(),
    }
}

/// Returns [`DeviceError::OutOfMemory`] for `bytes` bytes of `what`.
pub(super) fn out_of_memory(bytes: usize, what: &str) -> DeviceError {
    DeviceError::OutOfMemory {
        device: DEVICE,
        bytes,
        what: what.to_owned(),
    }
}

/// Converts the driver's out-of-memory error to `None`.
pub(super) fn none_if_out_of_memory<T>(
    allocated: Result<T, DriverError>,
) -> Result<Option<T>, DriverError> {
    match allocated {
        Ok(allocated) => Ok(Some(allocated)),
        Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns [`DeviceError::Failed`] unless `holds`.
pub(super) fn require(
    holds: bool,
    operation: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), DeviceError> {
    if holds {
        Ok(())
    } else {
        Err(failed(operation, reason()))
    }
}

/// Converts the reason of a failed check to [`DeviceError::Failed`].
pub(super) fn require_ok(
    operation: &'static str,
    checked: Result<(), String>,
) -> Result<(), DeviceError> {
    checked.map_err(|reason| failed(operation, reason))
}

/// Returns CUDA's name and text for an error: `CUDA_ERROR_INVALID_VALUE, invalid argument`.
pub(super) fn describe(error: DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy());
    match text {
        Ok(text) => format!("{:?}, {text}", error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Returns whether an error leaves the context unusable, so that every later call fails too.
fn is_sticky(error: DriverError) -> bool {
    use CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_SYSTEM_NOT_READY
            | CUDA_ERROR_UNKNOWN
    )
}

/// Error state of one context. The results of all driver calls pass through here.
#[derive(Default)]
pub(super) struct ErrorState {
    lost: OnceCell<DeviceError>,
    cleanup: Cell<u64>,
}

impl ErrorState {
    /// Returns the first sticky error as `Err`, if there was one.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        match self.lost.get() {
            Some(lost) => Err(lost.clone()),
            None => Ok(()),
        }
    }

    /// Converts the error of a driver call. A sticky error marks the device as lost.
    pub(super) fn convert(&self, operation: &'static str, error: DriverError) -> DeviceError {
        let reason = describe(error);
        if !is_sticky(error) {
            return failed(operation, reason);
        }
        let lost = self.lost.get_or_init(|| {
            tracing::error!(operation, %reason, "the CUDA device is lost");
            DeviceError::Lost {
                device: DEVICE,
                operation,
                reason,
            }
        });
        lost.clone()
    }

    /// Logs and counts an error during clean-up, which no caller receives. Once the device is
    /// lost, every clean-up fails; such errors are counted, but logged at debug level only.
    pub(super) fn cleanup(&self, operation: &'static str, outcome: Result<(), DriverError>) {
        if let Err(error) = outcome {
            self.cleanup.set(self.cleanup.get() + 1);
            let was_lost = self.lost.get().is_some();
            let error = self.convert(operation, error);
            if was_lost {
                tracing::debug!(operation, %error, "cleaning up after a lost CUDA device");
            } else {
                tracing::error!(operation, %error, "could not release a CUDA resource");
            }
        }
    }

    /// Returns the number of errors during clean-up so far.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn cleanup_errors(&self) -> u64 {
        self.cleanup.get()
    }
}
