//! Limits on tokens: which are allowed, which sequences are banned, and how many must come
//! before the end.

use super::constraint::{Constraint, ConstraintError};
use std::collections::VecDeque;
use std::sync::Arc;

/// Limits on the tokens of an answer, in addition to a [`Constraint`].
///
/// Construct it with `..TokenLimits::default()`: fields are added in minor releases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenLimits {
    /// Minimum number of tokens before an end token may come or a stop string takes effect.
    /// A [`Constraint`] that allows nothing but the end takes precedence.
    pub min_tokens: usize,
    /// The only tokens that may come, end tokens included; all if `None`.
    pub allowed: Option<Arc<[u32]>>,
    /// Banned sequences of tokens. The last token of one is forbidden if the answer ends
    /// with the tokens before it.
    pub banned: Arc<[Vec<u32>]>,
}

impl TokenLimits {
    /// Returns whether these limits have no effect on an answer.
    pub fn is_empty(&self) -> bool {
        self.min_tokens == 0 && self.allowed.is_none() && self.banned.is_empty()
    }

    /// Returns whether tokens are excluded for the whole answer, which may leave a
    /// [`Constraint`] with no token to choose.
    pub fn exclude_tokens(&self) -> bool {
        self.allowed.is_some() || !self.banned.is_empty()
    }

    /// Creates the constraint that holds an answer to these limits and to `inner`. The
    /// vocabulary has `vocabulary` tokens, and the tokens in `ends` end the answer.
    pub(crate) fn constraint(
        &self,
        inner: Option<Box<dyn Constraint>>,
        vocabulary: usize,
        ends: Arc<[u32]>,
    ) -> Box<dyn Constraint> {
        let longest = self.banned.iter().map(Vec::len).max().unwrap_or(0);
        let mut base = vec![0; vocabulary.div_ceil(32)];
        match &self.allowed {
            Some(allowed) => allowed.iter().for_each(|&token| set(&mut base, token)),
            None => (0..vocabulary as u32).for_each(|token| set(&mut base, token)),
        }
        Box::new(Limited {
            inner,
            base: base.into(),
            banned: Arc::clone(&self.banned),
            recent: VecDeque::with_capacity(longest),
            remembered: longest.saturating_sub(1),
            removed: Vec::with_capacity(ends.len()),
            ends,
            missing: self.min_tokens,
        })
    }
}

/// The state of an answer under [`TokenLimits`].
#[derive(Clone, Debug)]
struct Limited {
    inner: Option<Box<dyn Constraint>>,
    /// The tokens that are allowed at all, one bit per token.
    base: Arc<[u32]>,
    banned: Arc<[Vec<u32>]>,
    /// Last tokens of the answer, newest at the back.
    recent: VecDeque<u32>,
    /// Number of last tokens that the banned sequences need.
    remembered: usize,
    ends: Arc<[u32]>,
    /// End tokens that were removed from the mask. Kept between calls to reuse its memory.
    removed: Vec<u32>,
    /// Number of tokens that must still come before an end token may.
    missing: usize,
}

impl Limited {
    /// Returns whether the answer ends with these tokens.
    fn ends_with(&self, tokens: &[u32]) -> bool {
        let start = self.recent.len().checked_sub(tokens.len());
        start.is_some_and(|start| self.recent.range(start..).eq(tokens))
    }

    /// Forbids the end tokens, unless no other token is allowed.
    fn forbid_ends(&mut self, mask: &mut [u32]) {
        self.removed.clear();
        for &end in self.ends.iter() {
            if clear(mask, end) {
                self.removed.push(end);
            }
        }
        if mask.iter().all(|&word| word == 0) {
            self.removed.iter().for_each(|&end| set(mask, end));
        }
    }
}

impl Constraint for Limited {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        match &mut self.inner {
            None => mask.copy_from_slice(&self.base),
            Some(inner) => {
                inner.mask(mask)?;
                for (word, base) in mask.iter_mut().zip(self.base.iter()) {
                    *word &= base;
                }
            }
        }
        for banned in self.banned.iter() {
            if let Some((&last, before)) = banned.split_last()
                && self.ends_with(before)
            {
                clear(mask, last);
            }
        }
        if self.missing > 0 {
            self.forbid_ends(mask);
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        if let Some(inner) = &mut self.inner {
            inner.accept(token)?;
        }
        self.missing = self.missing.saturating_sub(1);
        if self.remembered > 0 {
            if self.recent.len() == self.remembered {
                self.recent.pop_front();
            }
            self.recent.push_back(token);
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.is_complete())
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Sets a token's bit. Does nothing for a token outside the mask.
fn set(mask: &mut [u32], token: u32) {
    if let Some(word) = mask.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

/// Clears a token's bit and returns whether it was set.
fn clear(mask: &mut [u32], token: u32) -> bool {
    let Some(word) = mask.get_mut(token as usize / 32) else {
        return false;
    };
    let bit = 1 << (token % 32);
    let was_set = *word & bit != 0;
    *word &= !bit;
    was_set
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: usize = 40;

    fn constraint(limits: &TokenLimits, ends: &[u32]) -> Box<dyn Constraint> {
        limits.constraint(None, VOCABULARY, ends.into())
    }

    fn allowed(constraint: &mut Box<dyn Constraint>) -> Vec<u32> {
        let mut mask = vec![0; VOCABULARY.div_ceil(32)];
        constraint.mask(&mut mask).unwrap();
        let bits = (0..mask.len() as u32 * 32)
            .filter(|bit| mask[*bit as usize / 32] >> (bit % 32) & 1 == 1);
        bits.collect()
    }

    #[test]
    fn no_end_token_comes_before_the_least_number_of_tokens() {
        let limits = TokenLimits {
            min_tokens: 2,
            ..TokenLimits::default()
        };
        let mut constraint = constraint(&limits, &[3, 39]);
        for _ in 0..2 {
            let allowed = allowed(&mut constraint);
            assert_eq!(allowed.len(), VOCABULARY - 2);
            assert!(!allowed.contains(&3) && !allowed.contains(&39));
            constraint.accept(7).unwrap();
        }
        assert_eq!(
            allowed(&mut constraint),
            (0..VOCABULARY as u32).collect::<Vec<_>>()
        );
    }

    #[test]
    fn only_allowed_tokens_come_and_the_end_is_one_of_them() {
        let limits = TokenLimits {
            allowed: Some([5, 33, 1000].into()),
            ..TokenLimits::default()
        };
        assert_eq!(allowed(&mut constraint(&limits, &[3])), [5, 33]);
        // If only end tokens are allowed, one may come before the minimum.
        let limits = TokenLimits {
            min_tokens: 5,
            allowed: Some([3].into()),
            ..TokenLimits::default()
        };
        assert_eq!(allowed(&mut constraint(&limits, &[3])), [3]);
    }

    #[test]
    fn the_last_token_of_a_banned_sequence_is_forbidden_after_the_others() {
        let banned = [vec![4], vec![1, 2, 3], vec![2, 6], vec![]];
        let limits = TokenLimits {
            banned: banned.into(),
            ..TokenLimits::default()
        };
        let mut constraint = constraint(&limits, &[]);
        let forbidden = |constraint: &mut Box<dyn Constraint>| {
            let allowed = allowed(constraint);
            (0..VOCABULARY as u32)
                .filter(|token| !allowed.contains(token))
                .collect::<Vec<_>>()
        };
        for (token, expected) in [
            (1, vec![4]),
            (2, vec![3, 4, 6]),
            (1, vec![4]),
            (1, vec![4]),
            (2, vec![3, 4, 6]),
            (9, vec![4]),
        ] {
            constraint.accept(token).unwrap();
            assert_eq!(forbidden(&mut constraint), expected, "after {token}");
        }
        // A copy does not affect the original.
        constraint.accept(1).unwrap();
        let mut copy = constraint.clone();
        copy.accept(2).unwrap();
        assert_eq!(forbidden(&mut copy), [3, 4, 6]);
        assert_eq!(forbidden(&mut constraint), [4]);
    }

    /// Allows two tokens, then nothing but the end.
    #[derive(Clone, Debug)]
    struct Two(usize);

    impl Constraint for Two {
        fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
            match self.0 {
                2 => set(mask, 3),
                _ => (0..8).for_each(|token| set(mask, token)),
            }
            Ok(())
        }

        fn accept(&mut self, _: u32) -> Result<(), ConstraintError> {
            self.0 += 1;
            Ok(())
        }

        fn is_complete(&self) -> bool {
            self.0 == 2
        }

        fn boxed_clone(&self) -> Box<dyn Constraint> {
            Box::new(self.clone())
        }
    }

    #[test]
    fn a_constraint_is_kept_to_and_its_end_wins() {
        let limits = TokenLimits {
            min_tokens: 9,
            banned: [vec![5]].into(),
            ..TokenLimits::default()
        };
        let mut constraint = limits.constraint(Some(Box::new(Two(0))), VOCABULARY, [3].into());
        assert_eq!(allowed(&mut constraint), [0, 1, 2, 4, 6, 7]);
        constraint.accept(0).unwrap();
        assert!(!constraint.is_complete());
        constraint.accept(0).unwrap();
        assert!(constraint.is_complete());
        assert_eq!(allowed(&mut constraint), [3]);
    }
}
