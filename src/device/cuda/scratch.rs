//! Memory for intermediate results.

use super::context::Context;
use super::memory::{Buffer, Ptr};
use crate::device::DeviceError;

/// Memory for the intermediate results of one operation. It is reserved for the largest step,
/// but grows if it must, and loses its contents when it grows.
#[derive(Default)]
pub(super) struct Scratch {
    buffer: Option<Buffer>,
    outside_graphs: bool,
}

impl Scratch {
    /// Creates scratch memory that operations of recorded steps do not use.
    pub(super) fn outside_graphs() -> Self {
        Self {
            buffer: None,
            outside_graphs: true,
        }
    }

    /// Returns the address of at least `bytes` uninitialised bytes. Fails if the memory would
    /// have to grow while a graph is being recorded.
    pub(super) fn get(&mut self, context: &Context, bytes: usize) -> Result<Ptr, DeviceError> {
        match &self.buffer {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.ptr()),
            _ => {
                context.refuse_in_capture("allocating scratch memory")?;
                self.buffer = None;
                let buffer = context.allocate(rounded(bytes), "intermediates")?;
                let buffer = match self.outside_graphs {
                    true => buffer.outside_graphs(),
                    false => buffer,
                };
                let ptr = buffer.ptr();
                self.buffer = Some(buffer);
                Ok(ptr)
            }
        }
    }
}

/// Returns the bytes that [`Scratch::get`] allocates for `bytes`.
pub(super) fn rounded(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(256).unwrap_or(usize::MAX)
}
