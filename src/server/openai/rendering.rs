//! How a conversation is written as a prompt: the fields that chat completions and `/tokenize`
//! share, and prompts that end inside a message for the answer to continue.

use crate::server::App;
use crate::server::error::ApiError;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The fields of a request that control rendering.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct RenderingFields {
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    add_special_tokens: Option<bool>,
    /// A chat template that replaces the model's.
    chat_template: Option<String>,
    /// Variables of the chat template.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// The template variable `documents`.
    documents: Option<Vec<Map<String, Value>>>,
}

/// How to write a conversation as a prompt.
#[derive(Clone, Debug)]
pub(crate) struct Rendering {
    /// Whether the prompt ends with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends with the text of the last message, which the answer then
    /// continues.
    pub continue_final_message: bool,
    /// Whether the prompt gets the special tokens that the tokenizer puts around a text.
    pub add_special: bool,
    /// Source of a chat template that replaces the model's.
    pub template: Option<String>,
    /// Variables of the template.
    pub variables: Map<String, Value>,
}

impl Default for Rendering {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            add_special: false,
            template: None,
            variables: Map::new(),
        }
    }
}

impl RenderingFields {
    /// Checks the fields together and returns what they ask for.
    pub fn check(self, app: &App) -> Result<Rendering, ApiError> {
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        if continue_final_message && self.add_generation_prompt == Some(true) {
            let problem = "continue_final_message and add_generation_prompt cannot be combined";
            return Err(ApiError::invalid(problem).param("continue_final_message"));
        }
        if self.chat_template.is_some() && !app.options.trust_request_chat_template {
            let problem = "chat_template is accepted only by a server that was started with \
                           --trust-request-chat-template";
            return Err(ApiError::invalid(problem).param("chat_template"));
        }
        let mut variables = self.chat_template_kwargs.unwrap_or_default();
        if let Some(documents) = self.documents {
            let documents = documents.into_iter().map(Value::Object).collect();
            variables.entry("documents").or_insert(documents);
        }
        Ok(Rendering {
            add_generation_prompt: !continue_final_message
                && self.add_generation_prompt.unwrap_or(true),
            continue_final_message,
            add_special: self.add_special_tokens.unwrap_or(false),
            template: self.chat_template,
            variables,
        })
    }
}

impl Rendering {
    /// Refuses documents that the template would not write.
    pub fn require_documents_known(&self, template: &str) -> Result<(), ApiError> {
        if self.variables.contains_key("documents") && !template.contains("documents") {
            let problem = "documents: this model's chat template does not take documents";
            return Err(ApiError::invalid(problem).param("documents"));
        }
        Ok(())
    }
}

/// Cuts a prompt off after the text of its last message, as transformers does, because what the
/// template writes after it would end the message.
pub(crate) fn leave_open(prompt: &mut String, last_message: &str) -> Result<(), ApiError> {
    let refused = |problem: &str| Err(ApiError::invalid(problem).param("continue_final_message"));
    let text = last_message.trim();
    if text.is_empty() {
        return refused("continue_final_message: the last message has no text to continue");
    }
    let Some(begin) = prompt.rfind(text) else {
        return refused(
            "continue_final_message: the chat template does not write the last message unchanged",
        );
    };
    // Keep spaces at the end of the message if the template has kept them.
    let whole = last_message.trim_start();
    let kept = match prompt[begin..].starts_with(whole) {
        true => whole,
        false => text,
    };
    prompt.truncate(begin + kept.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(prompt: &str, last: &str) -> Result<String, String> {
        let mut prompt = prompt.to_owned();
        let cut = leave_open(&mut prompt, last);
        cut.map(|()| prompt).map_err(|error| error.body.message)
    }

    #[test]
    fn a_prompt_ends_with_the_text_that_is_continued() {
        let prompt = "<user>The sea</s>\n<assistant>The sea is</s>\n";
        assert_eq!(
            opened(prompt, "The sea is").unwrap(),
            "<user>The sea</s>\n<assistant>The sea is"
        );
        // The last occurrence counts.
        assert_eq!(opened("<a>x</s><a>x</s>", "x").unwrap(), "<a>x</s><a>x");
        // Spaces are kept only where the template keeps them.
        assert_eq!(opened("<a>x  </s>", " x  ").unwrap(), "<a>x  ");
        assert_eq!(opened("<a>x</s>", " x  ").unwrap(), "<a>x");
    }

    #[test]
    fn a_message_that_cannot_be_continued_is_refused() {
        assert!(opened("<a></s>", " ").unwrap_err().contains("no text"));
        assert!(opened("<a>X</s>", "x").unwrap_err().contains("unchanged"));
    }
}
