//! A constraint whose allowed tokens depend on every token that it has accepted, so that a
//! token that it missed, or accepted twice, changes the answer.

use quell::{Constraint, ConstraintError};

/// One token out of this many is allowed.
const PERIOD: u32 = 7;

/// Allows the tokens that are congruent, modulo [`PERIOD`], to the sum of the accepted tokens
/// plus their number.
#[derive(Clone, Debug, Default)]
pub struct Remainders {
    sum: u32,
    count: usize,
    /// Number of tokens after which the answer is complete.
    complete: Option<usize>,
    /// A failure, and the number of accepted tokens at which it happens.
    trouble: Option<(usize, Trouble)>,
}

/// How a constraint fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    MaskFails,
    MaskPanics,
    MaskIsEmpty,
    AcceptFails,
    AcceptPanics,
}

impl Remainders {
    /// A constraint whose answer is complete after this many tokens.
    pub fn complete_with(tokens: usize) -> Self {
        Self {
            complete: Some(tokens),
            ..Self::default()
        }
    }

    /// A constraint that fails after this many tokens.
    pub fn failing(after: usize, trouble: Trouble) -> Self {
        Self {
            trouble: Some((after, trouble)),
            ..Self::default()
        }
    }

    /// Whether `token` is allowed after `tokens`.
    pub fn allow_after(tokens: &[u32], token: u32) -> bool {
        let mut state = Self::default();
        tokens.iter().for_each(|&token| state.push(token));
        state.allows(token)
    }

    /// Whether `token` is allowed next.
    fn allows(&self, token: u32) -> bool {
        token % PERIOD == (self.sum + self.count as u32) % PERIOD
    }

    /// Accepts a token without checking it.
    fn push(&mut self, token: u32) {
        self.sum = (self.sum + token) % PERIOD;
        self.count += 1;
    }

    /// Whether each of these tokens is allowed after the ones before it.
    pub fn allowed(tokens: impl IntoIterator<Item = u32>) -> bool {
        let tokens: Vec<u32> = tokens.into_iter().collect();
        (0..tokens.len()).all(|at| Self::allow_after(&tokens[..at], tokens[at]))
    }

    fn trouble(&self, trouble: Trouble) -> bool {
        self.trouble == Some((self.count, trouble))
    }
}

impl Constraint for Remainders {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        assert!(!self.trouble(Trouble::MaskPanics), "made to panic");
        if self.trouble(Trouble::MaskFails) {
            return Err(ConstraintError("made to fail".to_owned()));
        }
        if self.trouble(Trouble::MaskIsEmpty) {
            return Ok(());
        }
        for token in 0..32 * mask.len() as u32 {
            mask[token as usize / 32] |= u32::from(self.allows(token)) << (token % 32);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        assert!(!self.trouble(Trouble::AcceptPanics), "made to panic");
        if self.trouble(Trouble::AcceptFails) {
            return Err(ConstraintError("made to fail".to_owned()));
        }
        if !self.allows(token) {
            let count = self.count;
            let message = format!("{token} is not allowed after {count} tokens");
            return Err(ConstraintError(message));
        }
        self.push(token);
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.complete == Some(self.count)
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

impl From<Remainders> for Box<dyn Constraint> {
    fn from(constraint: Remainders) -> Self {
        Box::new(constraint)
    }
}
