//! Turns a conversation, with its tools and the form of its answer, into a prompt.

use super::legacy_functions;
use super::notices::Notices;
use super::parts::{Calls, Reading};
use super::rendering::Rendering;
use super::structure::Structure;
use super::tools::Tools;
use crate::engine::{Prompt, SubmitError, Truncation};
use crate::sampling::Constraint;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::workers::{Job, Work};
use crate::server::submit::{Length, Tokenization};
use crate::text::reasoning::ReasoningFormat;
use crate::text::{Grammar, GrammarCalls};
use crate::text::{Message, RenderOptions, TextError, Tokenizer};
use std::sync::Arc;

/// A conversation before the chat template makes a prompt of it.
pub(crate) struct Conversation {
    pub messages: Vec<Message>,
    pub tools: Tools,
    pub structure: Option<Structure>,
    pub rendering: Rendering,
    pub hide_reasoning: bool,
    pub fit: Fit,
}

/// What happens to a conversation that is too long.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fit {
    /// It is refused.
    Refuse,
    /// Its tokens are truncated.
    Cut(Truncation),
    /// Messages at the beginning are left out until the prompt has at most this many tokens.
    LeaveOut(usize),
}

/// The prompt and the settings for the engine, and how to read the answers.
pub(crate) struct Prepared {
    pub prompt: Arc<[u32]>,
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether special tokens stay in the answer's text, because marks to look for are among
    /// them.
    pub keep_special: bool,
    pub reading: Reading,
    /// Parts of the request that are not honoured.
    pub notices: Notices,
}

impl Conversation {
    /// Makes the prompt; the request's body had `bytes` bytes. The chat template is run and the
    /// text tokenized once, unless messages must be left out.
    pub async fn prepare(self, app: &Arc<App>, bytes: usize) -> Result<Prepared, ApiError> {
        let compiles = self.structure.is_some() || self.tools.forced();
        let work = Work::on(bytes).and_grammar(compiles);
        let shared = Arc::clone(app);
        let prepare = move |job: &Job| self.prepare_blocking(&shared, job);
        app.workers.run(work, prepare).await
    }

    fn prepare_blocking(self, app: &App, job: &Job) -> Result<Prepared, ApiError> {
        let tokenizer = app.require_tokenizer("a conversation")?;
        let tokenization = Tokenization {
            add_special: self.rendering.add_special,
            length: match self.fit {
                Fit::Refuse => Length::Context,
                Fit::Cut(truncation) => Length::Cut(truncation),
                Fit::LeaveOut(_) => Length::Any,
            },
        };
        let contents = self.messages.iter().map(|message| &*message.content);
        app.check_texts(contents, tokenization.length)
            .map_err(of_messages)?;
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
        let format = app.options.tool_format;
        let format = format.unwrap_or_else(|| template.tool_format());
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
                let calls = self.tools.offered().then_some(GrammarCalls {
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
        let messages = legacy_functions::as_tools(self.messages);
        let opening = forced.as_ref().map_or("", |_| format.forced_opening());
        let options = RenderOptions {
            tools: described,
            tool_format: Some(format),
            // A constrained answer must begin at once, with no reasoning before it.
            close_reasoning: constraint.is_some(),
            answer_prefix: opening.to_owned(),
            ..self.rendering.options
        };
        let marks = ReasoningFormat::detect(source);
        let mut inside_reasoning = false;
        let mut render = |messages: &[Message]| -> Result<Prompt, ApiError> {
            job.check()?;
            let text = template.render(messages, &options).map_err(of_rendering)?;
            inside_reasoning = marks.is_some_and(|marks| marks.is_open(&text));
            Ok(Prompt::Text(text))
        };
        let encode = |prompt| app.encode(job, prompt, tokenization).map_err(of_messages);
        let prompt = match self.fit {
            Fit::Refuse | Fit::Cut(_) => {
                let text = render(&messages)?;
                // The text has replaced the messages, which may be as large.
                drop(messages);
                encode(text)?
            }
            Fit::LeaveOut(room) => {
                let mut write = |messages: &[Message]| encode(render(messages)?);
                fitting(&messages, room, &mut write)?
            }
        };
        let mut reading = Reading {
            reasoning: marks.map(|marks| (marks, inside_reasoning)),
            hide_reasoning: self.hide_reasoning,
            one_call: !self.tools.parallel,
            ..Reading::default()
        };
        if constraint.is_some() {
            reading.reasoning = None;
        }
        if forced.is_some() {
            reading.calls = Calls::Forced(format);
        } else if self.tools.offered() {
            reading.calls = Calls::Allowed(format, self.tools.names().collect());
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
}

/// Names the messages as the field that is wrong.
fn of_messages(error: ApiError) -> ApiError {
    match error.body.param.as_deref() {
        Some("prompt") => error.param("messages"),
        _ => error,
    }
}

fn of_rendering(error: TextError) -> ApiError {
    let field = match error {
        TextError::NothingToContinue | TextError::NotContinued => "continue_final_message",
        _ => "messages",
    };
    ApiError::from(SubmitError::Text(error)).param(field)
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
    write: &mut impl FnMut(&[Message]) -> Result<Arc<[u32]>, ApiError>,
) -> Result<Arc<[u32]>, ApiError> {
    let whole = write(messages)?;
    let is_system = |message: &&Message| matches!(&*message.role, "system" | "developer");
    let kept = messages.iter().take_while(is_system).count();
    // Do not begin with a tool's result whose call has been left out.
    let begins = |index: &usize| !matches!(&*messages[*index].role, "tool" | "function");
    let places: Vec<usize> = (kept + 1..messages.len()).filter(begins).collect();
    if whole.len() <= room {
        return Ok(whole);
    }
    if places.is_empty() {
        return Ok(Truncation::Last(room).cut(&whole).into());
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
    let prompt = from(low)?;
    // If the last message alone is too long, its own beginning is cut off.
    Ok(match prompt.len() <= room {
        true => prompt,
        false => Truncation::Last(room).cut(&prompt).into(),
    })
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
        Calls::Allowed(format, _) => format.tags(),
        Calls::None | Calls::Forced(_) => &[],
    };
    reasoning.any(|mark| special(&mark)) || calls.iter().any(special)
}
