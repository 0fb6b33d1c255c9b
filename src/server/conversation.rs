//! A conversation with tools and a form for its answer, as a prompt.

use super::App;
use super::error::ApiError;
use super::notices::Notices;
use super::parts::{Calls as ReadCalls, Reading};
use super::structure::Structure;
use super::tools::Tools;
use super::{legacy, system_messages};
use crate::engine::SubmitError;
use crate::sampling::Constraint;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::{ToolFormat, in_words};
use crate::text::{Calls, Grammar};
use crate::text::{EncodeOptions, Message, RenderOptions, Tokenizer};
use serde_json::{Map, Value};
use std::sync::Arc;

/// What a model is asked, before its template makes a prompt of it.
pub(crate) struct Conversation {
    pub messages: Vec<Message>,
    pub tools: Tools,
    pub structure: Option<Structure>,
    /// Variables of the template.
    pub variables: Map<String, Value>,
    pub add_generation_prompt: bool,
    pub hide_reasoning: bool,
}

/// What the engine is asked, and how its answers are read.
pub(crate) struct Prepared {
    pub prompt: Vec<u32>,
    pub constraint: Option<Box<dyn Constraint>>,
    /// Marks that are special tokens are looked for in the answer.
    pub keep_special: bool,
    pub reading: Reading,
    /// What is not honoured of it.
    pub notices: Notices,
}

impl Conversation {
    /// Makes the prompt. What takes long is done on a thread of its own, so that other
    /// connections do not wait for it.
    pub async fn prepare(self, app: &Arc<App>) -> Result<Prepared, ApiError> {
        let forced = self.tools.forced();
        let bytes: usize = (self.messages.iter().map(|message| message.content.len())).sum();
        if !forced && self.structure.is_none() && bytes <= super::LONG_PROMPT {
            return self.prepare_here(app);
        }
        let app = Arc::clone(app);
        let prepared = tokio::task::spawn_blocking(move || self.prepare_here(&app)).await;
        prepared.map_err(|_| ApiError::unavailable("the server is being stopped"))?
    }

    fn prepare_here(self, app: &App) -> Result<Prepared, ApiError> {
        let tokenizer = app.require_tokenizer("a conversation")?;
        let template = tokenizer
            .chat_template()
            .ok_or(SubmitError::NoChatTemplate)?;
        let source = template.source();
        let format = app.options.tool_format.unwrap_or_else(|| {
            // Where tools are described in words, those ask for this format.
            match template.knows_tools() {
                true => ToolFormat::detect(source),
                false => ToolFormat::Hermes,
            }
        });
        let keywords = app.options.schema_keywords;
        let forced = self.tools.forced_schema(format);
        let constraint = match (&forced, &self.structure) {
            (Some(schema), _) => {
                let calls = Structure::of_schema(schema.clone(), "tools");
                Some(calls.grammar(tokenizer, keywords, None)?)
            }
            (None, Some(structure)) => {
                // The form is that of an answer; the model may call a tool before it.
                let tools: Vec<_> = self.tools.schemas().collect();
                let calls = self.tools.offered().then_some(Calls {
                    format,
                    tools: &tools,
                    several: self.tools.parallel,
                });
                Some(structure.grammar(tokenizer, keywords, calls)?)
            }
            (None, None) => None,
        };

        let described = self.tools.described();
        let mut options = RenderOptions {
            add_generation_prompt: self.add_generation_prompt,
            extra: self.variables,
            ..RenderOptions::default()
        };
        let mut messages = legacy::as_tools(self.messages);
        if !source.contains("developer") {
            // OpenAI's newer name of it.
            for message in &mut messages {
                if message.role == "developer" {
                    message.role = "system".to_owned();
                }
            }
        }
        if template.knows_tools() {
            options.tools = described;
        } else {
            messages = in_words(&messages, described.as_ref());
        }
        let mut text = system_messages::render(template, &messages, &options)
            .map_err(|error| ApiError::from(SubmitError::Text(error)).param("messages"))?;

        let marks = ReasoningFormat::detect(source);
        let mut reading = Reading {
            reasoning: marks.map(|marks| (marks, marks.is_open(&text))),
            hide_reasoning: self.hide_reasoning,
            one_call: !self.tools.parallel,
            ..Reading::default()
        };
        if constraint.is_some() {
            // What is held to a form is the answer, with no reasoning before it.
            if let Some((marks, true)) = reading.reasoning.take() {
                text.push_str(marks.close);
                text.push_str("\n\n");
            }
        }
        if forced.is_some() {
            text.push_str(format.forced_opening());
            reading.calls = ReadCalls::Forced(format);
        } else if self.tools.offered() {
            reading.calls = ReadCalls::Allowed(format, self.tools.names().collect());
        }
        // The template writes the special tokens itself.
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let prompt = tokenizer
            .encode(&text, options)
            .map_err(|error| ApiError::from(SubmitError::Text(error)).param("messages"))?;
        Ok(Prepared {
            prompt,
            constraint: constraint.as_ref().map(Grammar::constraint),
            keep_special: has_special_marks(&reading, tokenizer),
            reading,
            notices: Notices {
                skipped_tools: self.tools.skipped,
                unenforced: (constraint.as_ref())
                    .map_or_else(Vec::new, |grammar| grammar.unenforced().to_vec()),
            },
        })
    }
}

/// Whether a mark that is looked for is a special token, which text usually leaves out.
fn has_special_marks(reading: &Reading, tokenizer: &Tokenizer) -> bool {
    let special = |mark: &&str| {
        let id = tokenizer.id_of(mark);
        id.is_some_and(|id| tokenizer.is_special(id))
    };
    let reasoning = reading.reasoning.iter();
    let mut reasoning = reasoning.flat_map(|(marks, _)| [marks.open, marks.close]);
    let calls = match &reading.calls {
        ReadCalls::Allowed(format, _) => format.tags(),
        ReadCalls::None | ReadCalls::Forced(_) => &[],
    };
    reasoning.any(|mark| special(&mark)) || calls.iter().any(special)
}
