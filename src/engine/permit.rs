//! The bound on open requests: who is in holds a permit.

use super::SubmitError;
use super::sync::Arc;
use super::sync::atomic::{AtomicUsize, Ordering};

/// A place among the open requests, given back when dropped.
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Permit {
    /// Takes a place, unless `limit` are taken.
    pub fn acquire(open: &Arc<AtomicUsize>, limit: usize) -> Result<Self, SubmitError> {
        let taken = open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
            (count < limit).then_some(count + 1)
        });
        match taken {
            Ok(_) => Ok(Self(Arc::clone(open))),
            Err(open) => Err(SubmitError::Overloaded { open }),
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
