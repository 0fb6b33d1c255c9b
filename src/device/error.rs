//! Errors of devices.

use thiserror::Error;

/// Error of a device operation.
#[derive(Debug, Error, Clone)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device cannot be used on this machine at all.
    #[error("device '{device}' cannot be used: {reason}")]
    Unavailable {
        /// Name of the device as on the command line, for example `cuda:0`.
        device: String,
        /// What is missing.
        reason: String,
    },
    /// The model or an option needs something that this device does not support.
    #[error("the {device} device does not support {what}; {expected}")]
    Unsupported {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// What was asked for.
        what: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The device could not allocate memory.
    #[error("the {device} device could not allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Number of bytes requested.
        bytes: usize,
        /// What the memory was for.
        what: String,
    },
    /// An operation failed. Its results must not be used.
    #[error("the {device} device failed in {operation}: {reason}")]
    Failed {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Name of the operation.
        operation: &'static str,
        /// Error message of the device.
        reason: String,
    },
    /// The device can no longer be used.
    #[error("the {device} device was lost during {operation}: {reason}")]
    Lost {
        /// `cpu` or `cuda`.
        device: &'static str,
        /// Name of the operation that detected the loss.
        operation: &'static str,
        /// Error message of the device.
        reason: String,
    },
}
