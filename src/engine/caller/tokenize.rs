//! Turns prompts into tokens, on the caller's thread.

use super::handle::Engine;
use crate::engine::{Prompt, SubmitError};
use crate::text::{EncodeOptions, Message, RenderOptions, Tokenizer};

impl Engine {
    /// Converts a prompt to token ids, as [`Engine::generate`] does.
    ///
    /// # Errors
    ///
    /// Returns an error if the prompt needs a tokenizer or a chat template that the model does
    /// not have, or if it cannot be rendered or tokenized.
    pub fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        self.tokenize_part(prompt, true)
    }

    /// Converts a prompt to token ids, like [`Engine::tokenize`], without copying ids.
    pub(super) fn tokens_of(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            prompt => self.tokenize(&prompt),
        }
    }

    /// Converts a prompt to token ids, like [`Engine::tokenize`]. `first` says that nothing
    /// precedes the prompt in its sequence.
    pub(in crate::engine) fn tokenize_part(
        &self,
        prompt: &Prompt,
        first: bool,
    ) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => {
                let options = EncodeOptions {
                    add_special: first,
                    parse_special: true,
                };
                Ok(self.tokenizer_for("a text prompt")?.encode(text, options)?)
            }
            Prompt::Chat(messages) => {
                self.tokenize_conversation(messages, &RenderOptions::default())
            }
            Prompt::Conversation { messages, options } => {
                self.tokenize_conversation(messages, options)
            }
        }
    }

    fn tokenize_conversation(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<Vec<u32>, SubmitError> {
        let tokenizer = self.tokenizer_for("a conversation")?;
        let template = tokenizer
            .chat_template()
            .ok_or(SubmitError::NoChatTemplate)?;
        let text = template.render(messages, options)?;
        // The template itself writes the special tokens.
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        Ok(tokenizer.encode(&text, options)?)
    }

    pub(super) fn tokenizer_for(
        &self,
        needed_for: &'static str,
    ) -> Result<&Tokenizer, SubmitError> {
        let tokenizer = self.shared.tokenizer.as_deref();
        tokenizer.ok_or(SubmitError::NoTokenizer { needed_for })
    }
}
