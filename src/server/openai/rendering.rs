//! The fields that say how a conversation is written as a prompt, which chat completions and
//! `/tokenize` share.

use crate::server::App;
use crate::server::error::ApiError;
use crate::text::RenderOptions;
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
#[derive(Clone, Debug, Default)]
pub(crate) struct Rendering {
    /// What the request asks of the template.
    pub options: RenderOptions,
    /// Whether the prompt gets the special tokens that the tokenizer puts around a text.
    pub add_special: bool,
    /// Source of a chat template that replaces the model's.
    pub template: Option<String>,
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
            options: RenderOptions {
                add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
                continue_final_message,
                extra: variables,
                ..RenderOptions::default()
            },
            add_special: self.add_special_tokens.unwrap_or(false),
            template: self.chat_template,
        })
    }
}

impl Rendering {
    /// Refuses documents that the template would not write.
    pub fn require_documents_known(&self, template: &str) -> Result<(), ApiError> {
        if self.options.extra.contains_key("documents") && !template.contains("documents") {
            let problem = "documents: this model's chat template does not take documents";
            return Err(ApiError::invalid(problem).param("documents"));
        }
        Ok(())
    }
}
