//! Turns a conversation, with its tools and the form of its answer, into a prompt.

use super::notices::Notices;
use super::parts::{Calls as ReadCalls, Reading};
use super::rendering::{Rendering, leave_open};
use super::structure::Structure;
use super::tools::Tools;
use super::{legacy_functions, system_messages};
use crate::engine::{SubmitError, Truncation};
use crate::sampling::Constraint;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::workers::{GRAMMAR_COST, Job};
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::{ToolFormat, in_words, with_described};
use crate::text::{Calls, Grammar};
use crate::text::{ChatTemplate, EncodeOptions, Message, RenderOptions, TextError, Tokenizer};
use std::sync::Arc;

/// A conversation before the chat template makes a prompt of it.
pub(crate) struct Conversation {
    pub messages: Vec<Message>,
    pub tools: Tools,
    pub structure: Option<Structure>,
    pub rendering: Rendering,
    pub hide_reasoning: bool,
    /// If set, messages at the beginning are left out until the prompt has at most this many
    /// tokens.
    pub truncate_to: Option<usize>,
    /// Whether the prompt may be truncated later.
    pub may_truncate: bool,
}

/// The prompt and the settings for the engine, and how to read the answers.
pub(crate) struct Prepared {
    pub prompt: Vec<u32>,
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether special tokens stay in the answer's text, because marks to look for are among
    /// them.
    pub keep_special: bool,
    pub reading: Reading,
    /// Parts of the request that are not honoured.
    pub notices: Notices,
}

impl Conversation {
    /// Makes the prompt; the request's body had `bytes` bytes. Long work is done on a worker
    /// thread, so that other connections do not wait for it.
    pub async fn prepare(self, app: &Arc<App>, bytes: usize) -> Result<Prepared, ApiError> {
        let compiles = self.structure.is_some() || self.tools.forced();
        let shared = Arc::clone(app);
        let work = move |job: &Job| self.prepare_blocking(&shared, job);
        match compiles {
            true => app.workers.run(bytes + GRAMMAR_COST, work).await,
            false => app.workers.run_if_long(bytes, work).await,
        }
    }

    fn prepare_blocking(mut self, app: &App, job: &Job) -> Result<Prepared, ApiError> {
        let tokenizer = app.require_tokenizer("a conversation")?;
        if !self.is_cut() {
            let contents = self.messages.iter().map(|message| message.content.len());
            let bytes = app.check_text_bytes(contents.sum());
            bytes.map_err(|error| error.param("messages"))?;
        }
        let request_template = match &self.rendering.template {
            None => None,
            Some(source) => Some(tokenizer.template_from(source).map_err(|error| {
                ApiError::from(SubmitError::Text(error)).param("chat_template")
            })?),
        };
        let template = request_template
            .as_ref()
            .or(tokenizer.chat_template())
            .ok_or(SubmitError::NoChatTemplate)?;
        let described = self.tools.described();
        let template = template.variant(described.is_some());
        let source = template.source();
        self.rendering.require_documents_known(source)?;
        let format = app.options.tool_format.unwrap_or_else(|| {
            // A template that knows neither gets tools and calls as plain text, which asks for
            // this format.
            match template.knows_tools() || template.knows_calls() {
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
                // The form applies to the answer; the model may call a tool instead.
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

        job.check()?;
        require_roles_known(&self.messages, source)?;
        self.messages = legacy_functions::as_tools(self.messages);
        if !source.contains("developer") {
            // The template does not know OpenAI's newer name of the role.
            for message in &mut self.messages {
                if message.role == "developer" {
                    message.role = "system".to_owned();
                }
            }
        }
        let mut opening = Opening {
            marks: ReasoningFormat::detect(source),
            // A constrained answer must begin at once, with no reasoning before it.
            close_reasoning: constraint.is_some(),
            call: forced.as_ref().map(|_| format.forced_opening()),
            inside_reasoning: false,
        };
        let mut write = |messages: &[Message]| {
            self.tokens_of(app, job, template, messages, format, &mut opening)
        };
        let prompt = match self.truncate_to {
            None => write(&self.messages)?,
            Some(room) => fitting(&self.messages, room, &mut write)?,
        };
        let mut reading = Reading {
            reasoning: opening.marks.map(|marks| (marks, opening.inside_reasoning)),
            hide_reasoning: self.hide_reasoning,
            one_call: !self.tools.parallel,
            ..Reading::default()
        };
        if constraint.is_some() {
            reading.reasoning = None;
        }
        if forced.is_some() {
            reading.calls = ReadCalls::Forced(format);
        } else if self.tools.offered() {
            reading.calls = ReadCalls::Allowed(format, self.tools.names().collect());
        }
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

    /// Returns whether a prompt that is too long is truncated rather than refused.
    fn is_cut(&self) -> bool {
        self.may_truncate || self.truncate_to.is_some()
    }

    /// Returns the prompt for these messages.
    fn tokens_of(
        &self,
        app: &App,
        job: &Job,
        template: &ChatTemplate,
        messages: &[Message],
        format: ToolFormat,
        opening: &mut Opening,
    ) -> Result<Vec<u32>, ApiError> {
        job.check()?;
        let tokenizer = app.require_tokenizer("a conversation")?;
        let described = self.tools.described();
        let mut options = RenderOptions {
            add_generation_prompt: self.rendering.add_generation_prompt,
            extra: self.rendering.variables.clone(),
            ..RenderOptions::default()
        };
        let changed = if template.knows_tools() {
            options.tools = described;
            None
        } else if template.knows_calls() {
            described.map(|tools| with_described(messages, &tools, format))
        } else {
            Some(in_words(messages, described.as_ref()))
        };
        let messages = changed.as_deref().unwrap_or(messages);
        let of_messages =
            |error: TextError| ApiError::from(SubmitError::Text(error)).param("messages");
        let mut text =
            system_messages::render(template, messages, &options).map_err(of_messages)?;
        if self.rendering.continue_final_message {
            let last = messages.last().map_or("", |message| &message.content);
            leave_open(&mut text, last)?;
        }
        opening.write(&mut text);
        drop((changed, options));
        job.check()?;
        if !self.is_cut() {
            let bytes = app.check_text_bytes(text.len());
            bytes.map_err(|error| error.param("messages"))?;
        }
        // The template writes the special tokens itself.
        let options = EncodeOptions {
            add_special: self.rendering.add_special,
            parse_special: true,
        };
        tokenizer.encode(&text, options).map_err(of_messages)
    }
}

/// The text that follows the rendered conversation in the prompt, so that the answer begins in
/// the right place.
struct Opening {
    marks: Option<ReasoningFormat>,
    close_reasoning: bool,
    call: Option<&'static str>,
    /// Whether the template has opened the answer's reasoning.
    inside_reasoning: bool,
}

impl Opening {
    fn write(&mut self, text: &mut String) {
        let open = self.marks.filter(|marks| marks.is_open(text));
        self.inside_reasoning = open.is_some();
        if let (Some(marks), true) = (open, self.close_reasoning) {
            text.push_str(marks.close);
            text.push_str("\n\n");
        }
        text.push_str(self.call.unwrap_or(""));
    }
}

/// Roles that are passed to every template, which may still refuse them.
const ROLES: [&str; 6] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
];

/// Refuses roles that neither OpenAI's API nor the template names.
fn require_roles_known(messages: &[Message], template: &str) -> Result<(), ApiError> {
    for (index, message) in messages.iter().enumerate() {
        let role = message.role.as_str();
        let named = |quote: char| template.contains(&format!("{quote}{role}{quote}"));
        if role.is_empty() || (!ROLES.contains(&role) && !named('\'') && !named('"')) {
            let field = format!("messages[{index}].role");
            let problem = format!(
                "{field} is {role:?}, expected \"system\", \"developer\", \"user\", \
                 \"assistant\", \"tool\", or a role that the model's chat template names"
            );
            return Err(ApiError::invalid(problem).param(field));
        }
    }
    Ok(())
}

/// Returns the prompt for as many of the last messages as fit in `room` tokens. System messages
/// at the beginning and the last message always stay.
fn fitting(
    messages: &[Message],
    room: usize,
    write: &mut impl FnMut(&[Message]) -> Result<Vec<u32>, ApiError>,
) -> Result<Vec<u32>, ApiError> {
    let mut whole = write(messages)?;
    let is_system = |message: &&Message| matches!(&*message.role, "system" | "developer");
    let kept = messages.iter().take_while(is_system).count();
    // Do not begin with a tool's result whose call has been left out.
    let begins = |index: &usize| !matches!(&*messages[*index].role, "tool" | "function");
    let places: Vec<usize> = (kept + 1..messages.len()).filter(begins).collect();
    if whole.len() <= room {
        return Ok(whole);
    }
    if places.is_empty() {
        Truncation::Last(room).cut(&mut whole);
        return Ok(whole);
    }
    let mut from = |place: usize| {
        let (system, rest) = (&messages[..kept], &messages[places[place]..]);
        write(&[system, rest].concat())
    };
    // Fewer messages never make a longer prompt, so a binary search finds the first place that
    // fits.
    let (mut low, mut high) = (0, places.len() - 1);
    while low < high {
        let middle = (low + high) / 2;
        match from(middle)?.len() <= room {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    let mut prompt = from(low)?;
    // If the last message alone is too long, its own beginning is cut off.
    Truncation::Last(room).cut(&mut prompt);
    Ok(prompt)
}

/// Returns whether a mark to look for is a special token, which answers usually leave out.
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
