//! Constraints: a grammar, or any other rule, tells the sampler which tokens may come next.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use thiserror::Error;

/// Decides which tokens an answer may continue with. Each answer has a state of its own.
///
/// It is called on the scheduler thread, between the steps of all requests, so its methods
/// should take only microseconds. An error or a panic ends only the request that it belongs
/// to.
pub trait Constraint: fmt::Debug + Send + Sync {
    /// Sets the bit of each token that may come next: bit `t % 32` of `mask[t / 32]` for
    /// token `t`. All bits are clear when it is called. The tokens that end the sequence
    /// must be set if, and only if, the answer may end here.
    ///
    /// # Errors
    /// Returns an error if the constraint cannot decide.
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError>;

    /// Advances the state by one token of the answer. It is not called with a token that
    /// ends the sequence.
    ///
    /// # Errors
    /// Returns an error if the token may not come next, or if the constraint cannot decide
    /// what may follow it.
    fn accept(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// Returns whether nothing but the end may follow. If so, the sequence ends at once.
    fn is_complete(&self) -> bool;

    /// Clones the state, for another answer.
    fn boxed_clone(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        (**self).boxed_clone()
    }
}

/// Why a constraint cannot continue.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the constraint on the answer failed: {0}")]
pub struct ConstraintError(pub String);

/// The constraint of one sequence and the tokens that it allows next.
#[derive(Clone, Debug)]
pub struct ConstraintState {
    constraint: Box<dyn Constraint>,
    /// Empty until it is first needed, so that a waiting sequence takes no memory for it.
    mask: Arc<[u32]>,
    /// Length of the mask in words.
    words: usize,
}

impl ConstraintState {
    /// Creates the state before the first token, for a vocabulary of `vocabulary` tokens.
    pub fn new(constraint: Box<dyn Constraint>, vocabulary: usize) -> Self {
        Self {
            constraint,
            mask: Arc::new([]),
            words: vocabulary.div_ceil(32),
        }
    }

    /// Returns the tokens that were allowed at the last [`ConstraintState::refresh`], one
    /// bit per token. Empty before the first refresh.
    pub fn mask(&self) -> &Arc<[u32]> {
        &self.mask
    }

    /// Computes which tokens may come next. Reuses the memory of the last mask unless it is
    /// still shared.
    ///
    /// # Errors
    /// Returns an error if the constraint fails or panics, or if it allows no token.
    pub fn refresh(&mut self) -> Result<(), ConstraintError> {
        if self.mask.len() != self.words || Arc::get_mut(&mut self.mask).is_none() {
            self.mask = vec![0; self.words].into();
        }
        let constraint = &mut self.constraint;
        let Some(mask) = Arc::get_mut(&mut self.mask) else {
            return Err(ConstraintError("its mask is in use".to_owned()));
        };
        mask.fill(0);
        guarded(|| constraint.mask(mask))?;
        if mask.iter().all(|&word| word == 0) {
            return Err(ConstraintError("it allows no token at all".to_owned()));
        }
        Ok(())
    }

    /// Advances by one token and returns whether the answer is then complete.
    ///
    /// # Errors
    /// Returns an error if the constraint refuses the token or panics.
    pub fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        let constraint = &mut self.constraint;
        guarded(|| {
            constraint.accept(token)?;
            Ok(constraint.is_complete())
        })
    }
}

/// Calls a constraint and turns a panic into an error. The constraint's state is not used
/// after a panic.
fn guarded<T>(call: impl FnOnce() -> Result<T, ConstraintError>) -> Result<T, ConstraintError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|message| (*message).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        let message = message.unwrap_or_else(|| "no message".to_owned());
        Err(ConstraintError(format!("it panicked: {message}")))
    })
}

/// Returns whether a mask allows a token. Tokens beyond its end are forbidden.
pub(super) fn allows(mask: &[u32], token: usize) -> bool {
    let word = mask.get(token / 32);
    word.is_some_and(|word| word >> (token % 32) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Allows only the next number. Fails in a different way at 5, 6 and 7.
    #[derive(Clone, Debug)]
    struct Counting(u32);

    impl Constraint for Counting {
        fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
            match self.0 {
                5 => Ok(()),
                6 => panic!("six"),
                next => {
                    mask[next as usize / 32] |= 1 << (next % 32);
                    Ok(())
                }
            }
        }

        fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
            if token != self.0 {
                return Err(ConstraintError(format!("{token} is not {}", self.0)));
            }
            self.0 += 1;
            Ok(())
        }

        fn is_complete(&self) -> bool {
            assert!(self.0 != 7, "seven");
            self.0 == 3
        }

        fn boxed_clone(&self) -> Box<dyn Constraint> {
            Box::new(self.clone())
        }
    }

    fn state(next: u32) -> ConstraintState {
        ConstraintState::new(Box::new(Counting(next)), 40)
    }

    #[test]
    fn a_state_goes_on_token_by_token_until_it_is_complete() {
        let mut state = state(1);
        assert!(state.mask().is_empty());
        state.refresh().unwrap();
        assert_eq!(state.mask()[..], [1 << 1, 0]);
        assert_eq!(state.accept(1), Ok(false));
        let mut copy = state.clone();
        assert_eq!(copy.accept(2), Ok(true));
        state.refresh().unwrap();
        assert_eq!(state.mask()[..], [1 << 2, 0], "the copy is one of its own");
    }

    #[test]
    fn a_masks_memory_is_reused_unless_the_mask_is_shared() {
        let mut state = state(33);
        state.refresh().unwrap();
        let first = Arc::as_ptr(state.mask());
        state.accept(33).unwrap();
        state.refresh().unwrap();
        assert!(std::ptr::eq(first, Arc::as_ptr(state.mask())));
        let held = Arc::clone(state.mask());
        state.accept(34).unwrap();
        state.refresh().unwrap();
        assert_eq!((held[1], state.mask()[1]), (1 << 2, 1 << 3));
    }

    #[test]
    fn errors_panics_and_masks_without_a_token_are_errors() {
        let text = |result: Result<(), ConstraintError>| result.unwrap_err().to_string();
        assert!(text(state(5).refresh()).contains("no token"));
        assert!(text(state(6).refresh()).contains("panicked: six"));
        assert!(text(state(1).accept(9).map(drop)).contains("9 is not 1"));
        assert!(text(state(6).accept(6).map(drop)).contains("panicked: seven"));
    }

    #[test]
    fn a_mask_allows_what_its_bits_say_and_nothing_behind_its_end() {
        let mask = [1, 1 << 31];
        let allowed: Vec<usize> = (0..100).filter(|&token| allows(&mask, token)).collect();
        assert_eq!(allowed, [0, 63]);
    }
}
