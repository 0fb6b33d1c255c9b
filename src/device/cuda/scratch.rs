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
    zeroed: bool,
}

impl Scratch {
    /// Creates scratch memory that operations of recorded steps do not use.
    pub(super) fn outside_graphs() -> Self {
        Self {
            outside_graphs: true,
            ..Self::default()
        }
    }

    /// Creates scratch memory that is filled with zeros when it is allocated. Operations leave
    /// zeros in it.
    pub(super) fn zeroed() -> Self {
        Self {
            zeroed: true,
            ..Self::default()
        }
    }

    /// Returns the address of at least `bytes` bytes, uninitialised unless they are zeroed. Fails
    /// if the memory would have to grow while a graph is being recorded.
    pub(super) fn get(&mut self, context: &Context, bytes: usize) -> Result<Ptr, DeviceError> {
        match &self.buffer {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.ptr()),
            _ => {
                context.refuse_in_capture("allocating scratch memory")?;
                self.buffer = None;
                let buffer = match self.zeroed {
                    true => context.allocate_zeroed(rounded(bytes), "intermediates")?,
                    false => context.allocate(rounded(bytes), "intermediates")?,
                };
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
