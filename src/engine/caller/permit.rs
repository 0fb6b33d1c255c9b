//! The limit on open requests: each open request holds a permit.

use crate::engine::SubmitError;
use crate::engine::sync::Arc;
use crate::engine::sync::atomic::{AtomicUsize, Ordering};

/// A place among the open requests. Dropping it releases the place.
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Permit {
    /// Takes a place, unless `limit` places are taken.
    pub fn acquire(open: &Arc<AtomicUsize>, limit: usize) -> Result<Self, SubmitError> {
        take(open, 1, limit)?;
        Ok(Self(Arc::clone(open)))
    }
}

/// Takes `count` places, either all of them or none.
fn take(open: &AtomicUsize, count: usize, limit: usize) -> Result<(), SubmitError> {
    let taken = open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| {
        taken.checked_add(count).filter(|&all| all <= limit)
    });
    match taken {
        Ok(_) => Ok(()),
        Err(open) => Err(SubmitError::Overloaded { open, limit }),
    }
}

/// Places that are taken together and handed out one by one. Dropping this releases the rest.
pub(crate) struct Places {
    open: Arc<AtomicUsize>,
    left: usize,
}

impl Places {
    /// Takes `count` places, either all of them or none.
    pub fn acquire(
        open: &Arc<AtomicUsize>,
        count: usize,
        limit: usize,
    ) -> Result<Self, SubmitError> {
        if count > limit {
            return Err(SubmitError::TooManyAnswers { count, limit });
        }
        take(open, count, limit)?;
        Ok(Self {
            open: Arc::clone(open),
            left: count,
        })
    }
}

impl Iterator for Places {
    type Item = Permit;

    fn next(&mut self) -> Option<Permit> {
        self.left = self.left.checked_sub(1)?;
        Some(Permit(Arc::clone(&self.open)))
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.open.fetch_sub(self.left, Ordering::AcqRel);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
