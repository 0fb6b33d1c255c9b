//! Errors of operations whose operands do not fit together.

use crate::device::DeviceError;

/// Returns [`DeviceError::Failed`] unless `holds`.
pub(super) fn require(
    holds: bool,
    operation: &'static str,
    reason: impl FnOnce() -> String,
) -> Result<(), DeviceError> {
    if holds {
        return Ok(());
    }
    Err(DeviceError::Failed {
        device: "cpu",
        operation,
        reason: reason(),
    })
}

/// Turns the reason of a failed check into [`DeviceError::Failed`].
pub(super) fn require_ok(
    operation: &'static str,
    checked: Result<(), String>,
) -> Result<(), DeviceError> {
    checked.or_else(|reason| require(false, operation, || reason))
}
