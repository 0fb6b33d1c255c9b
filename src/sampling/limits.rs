//! Limits on single tokens: which may come at all, which sequences may not, and how many
//! must come before the end.

use super::constraint::{Constraint, ConstraintError};
use std::collections::VecDeque;
use std::sync::Arc;

/// Which tokens an answer may be made of, beside what a [`Constraint`] says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenLimits {
    /// No end token comes, and no stop string counts, before so many tokens. A
    /// [`Constraint`] that allows nothing but the end wins.
    pub min_tokens: usize,
    /// Only these tokens may come; all if `None`. End tokens count as any other.
    pub allowed: Option<Arc<[u32]>>,
    /// Sequences of tokens that may not come: the last token of one is forbidden where the
    /// answer ends with those before it.
    pub banned: Arc<[Vec<u32>]>,
}

impl TokenLimits {
    /// Whether they leave an answer as it is.
    pub fn is_empty(&self) -> bool {
        self.min_tokens == 0 && self.allowed.is_none() && self.banned.is_empty()
    }

    /// Whether tokens are excluded for the whole of the answer, which may leave a
    /// [`Constraint`] without any.
    pub fn exclude_tokens(&self) -> bool {
        self.allowed.is_some() || !self.banned.is_empty()
    }

    /// The constraint that holds an answer to these limits and to `inner`, over a
    /// vocabulary of so many tokens of which `ends` end the answer.
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
    /// The tokens that may come at all, a bit each.
    base: Arc<[u32]>,
    banned: Arc<[Vec<u32>]>,
    /// The last tokens of the answer, the newest at the back.
    recent: VecDeque<u32>,
    /// How many of them are needed.
    remembered: usize,
    ends: Arc<[u32]>,
    /// End tokens that were taken out of the mask; kept for its memory.
    removed: Vec<u32>,
    /// Tokens that must come before an end token may.
    missing: usize,
}

impl Limited {
    /// Whether the answer ends with these tokens.
    fn ends_with(&self, tokens: &[u32]) -> bool {
        let start = self.recent.len().checked_sub(tokens.len());
        start.is_some_and(|start| self.recent.range(start..).eq(tokens))
    }

    /// Forbids the end tokens, unless nothing else is allowed.
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

/// Sets a token's bit; one outside the mask has none.
fn set(mask: &mut [u32], token: u32) {
    if let Some(word) = mask.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

/// Clears a token's bit; whether it was set.
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
        // Where nothing else may come, the end may, however early.
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
        // A copy goes its own way.
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
