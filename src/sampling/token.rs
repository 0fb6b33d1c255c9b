//! Chosen tokens: one [`Token`], and the [`TokenRun`] that a step adds to a sequence.

use smallvec::SmallVec;
use std::ops::Deref;

/// A generated token, or a token of the prompt whose log probability was requested.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Token {
    /// The token's id.
    pub id: u32,
    /// Log probability under the model's unmodified logits; 0 if it was not requested.
    pub logprob: f32,
    /// The likeliest tokens at this position with their log probabilities, likeliest first, as
    /// many as were requested.
    pub top: Vec<(u32, f32)>,
}

impl Token {
    /// Creates a token without log probabilities.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            ..Self::default()
        }
    }

    /// Creates a token with its log probability.
    #[cfg(any(test, feature = "internals"))]
    pub fn with_logprob(id: u32, logprob: f32) -> Self {
        Self {
            logprob,
            ..Self::new(id)
        }
    }
}

/// The tokens that one step adds to a sequence, in order. It dereferences to a slice.
///
/// A run usually has a single token, and then it allocates no memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRun(SmallVec<[Token; 1]>);

impl TokenRun {
    /// Returns the ids of the tokens.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = u32> {
        self.0.iter().map(|token| token.id)
    }

    /// Removes the last token and returns it.
    pub fn pop(&mut self) -> Option<Token> {
        self.0.pop()
    }

    /// Keeps the first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        self.0.truncate(length);
    }
}

impl Deref for TokenRun {
    type Target = [Token];

    fn deref(&self) -> &[Token] {
        &self.0
    }
}

impl From<Token> for TokenRun {
    fn from(token: Token) -> Self {
        Self(SmallVec::from_buf([token]))
    }
}

impl FromIterator<Token> for TokenRun {
    fn from_iter<I: IntoIterator<Item = Token>>(tokens: I) -> Self {
        Self(tokens.into_iter().collect())
    }
}

impl IntoIterator for TokenRun {
    type Item = Token;
    type IntoIter = smallvec::IntoIter<[Token; 1]>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a TokenRun {
    type Item = &'a Token;
    type IntoIter = std::slice::Iter<'a, Token>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

/// The tokens that were chosen in one step, in the order of their rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Indices of the tokens, in ascending order, whose unmodified logits were not all finite.
    /// The model's computation has failed there, and the token is meaningless.
    pub not_finite: Vec<usize>,
}

impl From<Vec<Token>> for Samples {
    fn from(tokens: Vec<Token>) -> Self {
        Self {
            tokens,
            not_finite: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_the_order_of_its_tokens_and_can_be_cut() {
        let mut run: TokenRun = (5..9).map(Token::new).collect();
        assert_eq!(run.ids().collect::<Vec<_>>(), [5, 6, 7, 8]);
        assert_eq!(run.pop(), Some(Token::new(8)));
        run.truncate(1);
        assert_eq!(run, TokenRun::from(Token::new(5)));
        assert_eq!(run.len(), 1);
        run.truncate(0);
        assert!(run.is_empty() && run.pop().is_none());
    }
}
