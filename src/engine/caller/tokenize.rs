//! Turns prompts into tokens, on the caller's thread. Each prompt is rendered and tokenized here,
//! once, and its tokens are then shared by everything that needs them.

use super::handle::Engine;
use crate::engine::sync::Arc;
use crate::engine::{Prompt, SubmitError, Truncation};
use crate::text::{EncodeOptions, Message, RenderOptions, Tokenizer};
use std::ops::Deref;

/// The tokens of a prompt, before they are shared.
pub(super) enum PromptTokens {
    /// The prompt was given as tokens.
    Given(Arc<[u32]>),
    /// The tokenizer made them.
    New(Vec<u32>),
}

impl Deref for PromptTokens {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Self::Given(tokens) => tokens,
            Self::New(tokens) => tokens,
        }
    }
}

impl PromptTokens {
    /// Returns the tokens that are kept. Copies them, unless they were given and all are kept.
    pub fn kept(self, truncation: Option<Truncation>) -> Arc<[u32]> {
        let kept = truncation.map_or(&*self, |truncation| truncation.cut(&self));
        match &self {
            Self::Given(tokens) if kept.len() == tokens.len() => Arc::clone(tokens),
            _ => kept.into(),
        }
    }
}

impl Engine {
    /// Converts a prompt to token ids, as [`Engine::generate`] does.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::NoTokenizer`] or [`SubmitError::NoChatTemplate`] if the prompt needs
    /// what the model does not have, and [`SubmitError::Text`] if it cannot be rendered or
    /// tokenized.
    pub fn tokenize(&self, prompt: impl Into<Prompt>) -> Result<Arc<[u32]>, SubmitError> {
        self.prompt_tokens(prompt.into(), true, None)
    }

    /// Converts a pair of texts to token ids for a model that compares them, with the special tokens
    /// around and between them. Where the model tells segments apart, a token of the second text
    /// is given as its id plus the size of the vocabulary.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::NoTokenizer`] if the model has no tokenizer, [`SubmitError::Text`] if a
    /// text cannot be tokenized, and [`SubmitError::UnknownToken`] if the model does not know a
    /// token of its tokenizer.
    pub fn pair_tokens(&self, first: &str, second: &str) -> Result<Vec<u32>, SubmitError> {
        let (segments, vocabulary) = (self.shared.info.segments, self.shared.info.vocabulary);
        let tokenizer = self.tokenizer_for("a pair of texts")?;
        let pair = tokenizer.encode_pair(first, second, segments)?;
        let ids = pair.into_iter().map(|(token, segment)| {
            if token as usize >= vocabulary {
                return Err(SubmitError::UnknownToken { token, vocabulary });
            }
            Ok(token + segment * vocabulary as u32)
        });
        ids.collect()
    }

    /// Converts a prompt to token ids, like [`Engine::tokenize`], and truncates them.
    /// `add_special` says whether a text gets the special tokens that belong around a text.
    pub(crate) fn prompt_tokens(
        &self,
        prompt: Prompt,
        add_special: bool,
        truncation: Option<Truncation>,
    ) -> Result<Arc<[u32]>, SubmitError> {
        Ok(self.encode_prompt(prompt, add_special)?.kept(truncation))
    }

    /// Renders and tokenizes a prompt.
    pub(super) fn encode_prompt(
        &self,
        prompt: Prompt,
        add_special: bool,
    ) -> Result<PromptTokens, SubmitError> {
        let (text, add_special) = match prompt {
            Prompt::Tokens(tokens) => return Ok(PromptTokens::Given(tokens)),
            Prompt::Text(text) => (text, add_special),
            // The template itself writes the special tokens.
            Prompt::Chat(messages) => (self.rendered(&messages, &RenderOptions::default())?, false),
            Prompt::Conversation { messages, options } => {
                (self.rendered(&messages, &options)?, false)
            }
        };
        let options = EncodeOptions {
            add_special,
            parse_special: true,
        };
        let tokenizer = self.tokenizer_for("a text prompt")?;
        Ok(PromptTokens::New(tokenizer.encode(&text, options)?))
    }

    fn rendered(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, SubmitError> {
        let tokenizer = self.tokenizer_for("a conversation")?;
        let template = tokenizer
            .chat_template()
            .ok_or(SubmitError::NoChatTemplate)?;
        Ok(template.render(messages, options)?)
    }

    pub(super) fn tokenizer_for(
        &self,
        needed_for: &'static str,
    ) -> Result<&Tokenizer, SubmitError> {
        let tokenizer = self.shared.tokenizer.as_deref();
        tokenizer.ok_or(SubmitError::NoTokenizer { needed_for })
    }
}
