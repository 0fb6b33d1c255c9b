//! Memory for intermediate results.

use super::context::Context;
use super::memory::{Buffer, Ptr};
use crate::device::DeviceError;

/// Memory for the intermediate results of one operation. It grows as needed and loses its
/// contents when it grows.
#[derive(Default)]
pub(super) struct Scratch(Option<Buffer>);

impl Scratch {
    /// Returns the address of at least `bytes` uninitialised bytes. Fails if the memory would
    /// have to grow while a graph is being recorded.
    pub(super) fn get(&mut self, context: &Context, bytes: usize) -> Result<Ptr, DeviceError> {
        match &self.0 {
            Some(buffer) if buffer.bytes() >= bytes => Ok(buffer.ptr()),
            _ => {
                context.refuse_in_capture("allocating scratch memory")?;
                self.0 = None;
                let buffer = context.allocate(bytes.next_multiple_of(256), "intermediates")?;
                let ptr = buffer.ptr();
                self.0 = Some(buffer);
                Ok(ptr)
            }
        }
    }
}
