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
use crate::text::harmony;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::ToolDeclaration;
use crate::text::{Grammar, GrammarAnswer, GrammarCalls, GrammarReasoning};
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
    /// Special tokens that stay in the answer's text, because they are marks to look for.
    pub kept_tokens: Vec<u32>,
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
        require_roles_known(&self.messages, source)?;
        let messages = legacy_functions::as_tools(self.messages);
        let options = RenderOptions {
            tools: described,
            tool_format: Some(format),
            ..self.rendering.options
        };
        let is_continued = options.continue_final_message;
        let marks = ReasoningFormat::detect(source);
        let is_harmony = marks == Some(ReasoningFormat::HARMONY);
        let is_forced = self.tools.forced();
        // Whether the prompt has opened the reasoning, and whether the answer cannot have any.
        let (mut is_open, mut is_closed) = (false, marks.is_none());
        let mut render = |messages: &[Message]| -> Result<Prompt, ApiError> {
            job.check()?;
            let mut text = template.render(messages, &options).map_err(of_rendering)?;
            is_open = marks.is_some_and(|marks| marks.is_open(&text));
            is_closed = is_continued || marks.is_none_or(|marks| marks.is_closed(&text));
            if is_forced && is_closed {
                text.push_str(format.forced_opening());
            }
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

        let tools: Vec<_> = self.tools.schemas().collect();
        let calls = GrammarCalls {
            format,
            tools: &tools,
            several: self.tools.several(),
        };
        // Reasoning that may precede a constrained answer, which begins after it.
        let reasoning = marks.filter(|_| !is_closed);
        let reasoning = reasoning.map(|marks| GrammarReasoning::new(marks, is_open));
        let constraint = match (&self.structure, self.tools.forced_schema(format)) {
            (_, Some(schema)) if reasoning.is_none() => {
                let calls = Structure::of_schema(schema, "tools");
                Some(calls.grammar(tokenizer, keywords, None, None)?)
            }
            (_, Some(_)) => {
                let tools: Vec<_> = self.tools.forced_schemas().collect();
                let answer = GrammarAnswer {
                    reasoning,
                    calls: Some(GrammarCalls {
                        tools: &tools,
                        ..calls
                    }),
                    ..GrammarAnswer::default()
                };
                let grammar = Grammar::answer(tokenizer, answer, keywords);
                let refused = |error| ApiError::invalid(format!("tools: {error}")).param("tools");
                Some(grammar.map_err(refused)?)
            }
            (Some(structure), None) => {
                // The form applies to the answer; the model may call a tool instead.
                let calls = self.tools.offered().then_some(calls);
                Some(structure.grammar(tokenizer, keywords, reasoning, calls)?)
            }
            (None, None) => None,
        };
        let begins_at_once = constraint.is_some() && is_closed;
        let mut reading = Reading {
            reasoning: marks
                .filter(|_| !begins_at_once && !is_harmony)
                .map(|marks| (marks, is_open)),
            harmony: is_harmony.then_some(!is_continued),
            hide_reasoning: self.hide_reasoning,
            one_call: !self.tools.parallel,
            ..Reading::default()
        };
        if is_forced && is_closed {
            reading.harmony = None;
            reading.calls = Calls::Forced(format);
        } else if self.tools.offered() {
            let tools = tools.iter();
            let tools = tools.map(|(name, schema)| ToolDeclaration::new(*name, schema.cloned()));
            reading.calls = Calls::Allowed(format, tools.collect());
        }
        Ok(Prepared {
            prompt,
            constraint: constraint.as_ref().map(Grammar::constraint),
            kept_tokens: special_marks(&reading, tokenizer),
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

/// Returns the marks to look for that are special tokens, which answers usually leave out.
fn special_marks(reading: &Reading, tokenizer: &Tokenizer) -> Vec<u32> {
    let reasoning = reading.reasoning.iter();
    let reasoning = reasoning.flat_map(|(marks, _)| [marks.open, marks.close]);
    let harmony = reading.harmony.iter().flat_map(|_| harmony::MARKS);
    let calls: Vec<&str> = match &reading.calls {
        Calls::Allowed(format, _) => format.marks().collect(),
        Calls::None | Calls::Forced(_) => Vec::new(),
    };
    let mut tokens: Vec<u32> = (reasoning.chain(harmony).chain(calls))
        .flat_map(bracketed)
        .filter_map(|name| tokenizer.id_of(name))
        .filter(|id| tokenizer.is_special(*id))
        .collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Returns the parts of `text` in angle or square brackets, as all special tokens are that mark
/// calls and reasoning. Looking them up costs less than tokenizing the text for each request.
fn bracketed(text: &str) -> impl Iterator<Item = &str> {
    let starts = text.match_indices(['<', '[']);
    starts.flat_map(move |(start, open)| {
        let close = if open == "<" { '>' } else { ']' };
        let ends = text[start..].match_indices(close);
        ends.map(move |(end, _)| &text[start..=start + end])
    })
}

#[cfg(test)]
mod tests {
    use super::bracketed;

    #[test]
    fn special_tokens_are_found_inside_longer_marks() {
        let found = |text, name| bracketed(text).any(|part| part == name);
        let example = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n[TOOL_CALLS][ARGS]";
        for name in [
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "[TOOL_CALLS]",
            "[ARGS]",
        ] {
            assert!(found(example, name), "{name}");
        }
        assert_eq!(bracketed("a > b < c ] d [").count(), 0);
    }
}
