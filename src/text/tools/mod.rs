//! Tool calls: parsed out of an answer as it comes, in the format of the model's
//! own chat template, and written into prompts for templates that know no tools.
//!
//! Each format is a state machine that takes one character at a time, so the
//! borders of the pieces that an answer comes in change nothing.

mod deepseek;
mod forced;
mod granite;
mod hermes;
mod json;
mod llama;
mod mistral;
mod pythonic;
#[cfg(feature = "grammar")]
mod rules;
mod scan;
mod words;

#[cfg(test)]
mod tests;

use scan::TextScanner;
use std::str::FromStr;
use std::sync::Arc;
pub use words::{describe_tools, in_words, with_described};

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// `{"name": …, "parameters": {…}}` as the whole answer, or after
    /// `<|python_tag|>`: Llama 3.1 and later.
    Llama,
    /// `[TOOL_CALLS] [{"name": …, "arguments": {…}}]`, and the later
    /// `[TOOL_CALLS]name[ARGS]{…}`: Mistral.
    Mistral,
    /// `[name(key="value")]` as the whole answer: Llama 3.2 and 4.
    Pythonic,
    /// `<｜tool▁calls▁begin｜>…<｜tool▁calls▁end｜>`: DeepSeek V3, V3.1 and R1.
    DeepSeek,
    /// `<|tool_call|>[{"name": …, "arguments": {…}}]`: Granite 3, Phi 4 mini.
    Granite,
}

/// The name of a tool format that there is none of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tool format is {found:?}, expected one of {}", names(&ToolFormat::ALL))]
pub struct UnknownToolFormat {
    /// The name.
    pub found: String,
}

fn names(formats: &[ToolFormat]) -> String {
    let names: Vec<_> = formats.iter().map(|format| format.name()).collect();
    names.join(", ")
}

impl ToolFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [
        Self::Hermes,
        Self::Llama,
        Self::Mistral,
        Self::Pythonic,
        Self::DeepSeek,
        Self::Granite,
    ];

    /// The format's name, which [`ToolFormat::from_str`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Pythonic => "pythonic",
            Self::DeepSeek => "deepseek",
            Self::Granite => "granite",
        }
    }

    /// The format that a chat template teaches, by the marks that it mentions.
    /// [`ToolFormat::Hermes`] when it mentions none: that is the format in which
    /// [`describe_tools`] asks for calls.
    pub fn detect(template_source: &str) -> Self {
        const MARKS: [(&str, ToolFormat); 9] = [
            ("<｜tool▁calls▁begin｜>", ToolFormat::DeepSeek),
            ("[TOOL_CALLS]", ToolFormat::Mistral),
            ("<|tool_call|>", ToolFormat::Granite),
            ("<tool_call>", ToolFormat::Hermes),
            ("func_name1(", ToolFormat::Pythonic),
            ("<|python_tag|>", ToolFormat::Llama),
            ("<|python_start|>", ToolFormat::Llama),
            (r#""parameters": "#, ToolFormat::Llama),
            (r#"\"parameters\": "#, ToolFormat::Llama),
        ];
        MARKS
            .iter()
            .find(|(mark, _)| template_source.contains(mark))
            .map_or(Self::Hermes, |(_, format)| *format)
    }

    /// A call of a tool `tool_name` in this format, as an example for a model.
    fn example(self) -> &'static str {
        match self {
            Self::Hermes => {
                "<tool_call>\n{\"name\": \"tool_name\", \"arguments\": {\"key\": \"value\"}}\n</tool_call>"
            }
            Self::Llama => r#"{"name": "tool_name", "parameters": {"key": "value"}}"#,
            Self::Mistral => {
                r#"[TOOL_CALLS] [{"name": "tool_name", "arguments": {"key": "value"}}]"#
            }
            Self::Pythonic => r#"[tool_name(key="value")]"#,
            Self::DeepSeek => {
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_name\n\
                 ```json\n{\"key\": \"value\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            }
            Self::Granite => {
                r#"<|tool_call|>[{"name": "tool_name", "arguments": {"key": "value"}}]"#
            }
        }
    }

    /// The marks that begin calls anywhere in an answer. Where they are special tokens,
    /// the answer's text must keep those.
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => hermes::TAGS,
            Self::Llama => llama::TAGS,
            Self::Mistral => mistral::TAGS,
            Self::Pythonic => pythonic::TAGS,
            Self::DeepSeek => deepseek::TAGS,
            Self::Granite => granite::TAGS,
        }
    }

    /// What begins calls at the beginning of an answer.
    fn bare(self) -> Option<char> {
        match self {
            Self::Llama => Some('{'),
            Self::Pythonic => Some('['),
            Self::Hermes | Self::Mistral | Self::DeepSeek | Self::Granite => None,
        }
    }

    /// The machine that reads calls, after a tag or, with the tools that there are,
    /// without one.
    fn calls(self, bare: Option<Arc<[String]>>) -> Box<dyn Calls> {
        match self {
            Self::Hermes => Box::new(hermes::calls()),
            Self::Llama => Box::new(llama::calls(bare)),
            Self::Mistral => Box::new(mistral::MistralCalls::default()),
            Self::Pythonic => Box::new(pythonic::PythonicCalls::new(bare)),
            Self::DeepSeek => Box::new(deepseek::DeepSeekCalls::default()),
            Self::Granite => Box::new(granite::calls()),
        }
    }
}

impl FromStr for ToolFormat {
    type Err = UnknownToolFormat;

    fn from_str(name: &str) -> Result<Self, UnknownToolFormat> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| UnknownToolFormat {
            found: name.to_owned(),
        })
    }
}

/// What a piece of an answer brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text that is no part of a call.
    Text(String),
    /// A call begins.
    CallBegin {
        /// Its place among the answer's calls, from 0.
        index: usize,
        /// The tool's name, as the model wrote it.
        name: String,
    },
    /// More of a call's arguments. All of them, put together, are the JSON text that
    /// the model wrote: a valid object if it wrote one.
    CallArguments {
        /// The call.
        index: usize,
        /// The text.
        delta: String,
    },
    /// A call is over. A call that the end of the answer cut off has no such event.
    CallEnd {
        /// The call.
        index: usize,
    },
}

/// Where events are gathered; neighbours of the same kind become one.
#[derive(Debug, Default)]
struct Events {
    list: Vec<ToolEvent>,
    calls: usize,
    /// The last thing that came was a call.
    after_call: bool,
    /// What was read is part of a call, and will not become text.
    committed: bool,
}

impl Events {
    fn text(&mut self, c: char) {
        self.after_call = false;
        if let Some(ToolEvent::Text(text)) = self.list.last_mut() {
            text.push(c);
        } else {
            self.list.push(ToolEvent::Text(c.into()));
        }
    }

    fn begin(&mut self, name: &str) {
        self.committed = true;
        self.list.push(ToolEvent::CallBegin {
            index: self.calls,
            name: name.to_owned(),
        });
        self.calls += 1;
    }

    fn arguments(&mut self, text: &str) {
        self.committed = true;
        if let Some(ToolEvent::CallArguments { delta, .. }) = self.list.last_mut() {
            delta.push_str(text);
        } else if !text.is_empty() {
            self.list.push(ToolEvent::CallArguments {
                index: self.calls.saturating_sub(1),
                delta: text.to_owned(),
            });
        }
    }

    fn end(&mut self) {
        self.committed = true;
        self.after_call = true;
        self.list.push(ToolEvent::CallEnd {
            index: self.calls.saturating_sub(1),
        });
    }
}

/// What one character was to a machine that reads calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Part of the calls, which go on.
    More,
    /// The last of the calls.
    End,
    /// No part of the calls. What was read and is not committed is text.
    Over,
}

/// Reads the calls of one format, from behind their tag to their end.
trait Calls: Send {
    /// Takes a character.
    fn push(&mut self, c: char, events: &mut Events) -> Step;

    /// Whether a call is complete and only its frame may follow: were the answer to
    /// end here, what is not committed would be no text.
    fn framing(&self) -> bool;
}

/// Parses the tool calls out of an answer, piece by piece.
///
/// White space between text and a call belongs to neither, and is dropped. What
/// looks like a call and is none comes out as text, as soon as that is certain. A
/// call is announced when its name is known; what follows is streamed as the model
/// writes it, except in [`ToolFormat::Pythonic`], whose calls come one at a time.
pub struct ToolParser {
    format: ToolFormat,
    tools: Arc<[String]>,
    scanner: TextScanner,
    calls: Option<Box<dyn Calls>>,
    /// What `calls` has read and not committed to.
    raw: String,
    /// Something other than white space was seen.
    begun: bool,
    events: Events,
}

impl std::fmt::Debug for ToolParser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ToolParser")
            .field("format", &self.format)
            .field("in_calls", &self.calls.is_some())
            .field("raw", &self.raw)
            .finish_non_exhaustive()
    }
}

impl ToolParser {
    /// A parser for an answer of a model that was told of `tools`. Their names tell
    /// a call that has no mark from an answer that looks like one; with none given,
    /// every name will do.
    pub fn new(format: ToolFormat, tools: impl IntoIterator<Item = String>) -> Self {
        Self {
            format,
            tools: tools.into_iter().collect(),
            scanner: TextScanner::new(format.tags()),
            calls: None,
            raw: String::new(),
            begun: false,
            events: Events::default(),
        }
    }

    /// A parser for an answer that [`ToolFormat::forced_schema`] has made: nothing but
    /// calls in JSON.
    pub fn forced(format: ToolFormat) -> Self {
        Self {
            calls: Some(Box::new(json::JsonCalls::new(&[], None))),
            ..Self::new(format, [])
        }
    }

    /// Takes the next piece of the answer.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        for c in text.chars() {
            self.take(c);
        }
        std::mem::take(&mut self.events.list)
    }

    /// The answer is over: gives what was held back after all.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        if self.calls.take().is_some_and(|calls| calls.framing()) {
            self.raw.clear();
        }
        self.give_up();
        self.scanner.finish(&mut self.events);
        std::mem::take(&mut self.events.list)
    }

    /// How many calls have begun.
    pub fn calls(&self) -> usize {
        self.events.calls
    }

    fn take(&mut self, c: char) {
        let Some(calls) = &mut self.calls else {
            self.take_text(c);
            return;
        };
        let framing = calls.framing();
        let step = calls.push(c, &mut self.events);
        let committed = std::mem::take(&mut self.events.committed);
        match step {
            Step::More if !committed => self.raw.push(c),
            Step::More => self.raw.clear(),
            Step::End => {
                self.calls = None;
                self.raw.clear();
            }
            Step::Over => {
                self.calls = None;
                if committed {
                    self.raw.clear();
                }
                if framing {
                    // Half a mark may be half of another.
                    for c in std::mem::take(&mut self.raw).chars() {
                        self.take_text(c);
                    }
                } else {
                    self.give_up();
                }
                self.take(c);
            }
        }
    }

    fn take_text(&mut self, c: char) {
        let first = !self.begun && !c.is_whitespace();
        self.begun |= first;
        if first && self.format.bare() == Some(c) {
            self.raw = self.scanner.take_space();
            self.calls = Some(self.format.calls(Some(Arc::clone(&self.tools))));
            self.take(c);
        } else if let Some(tag) = self.scanner.push(c, &mut self.events) {
            self.raw = self.scanner.take_space();
            self.raw.push_str(tag);
            self.calls = Some(self.format.calls(None));
        }
    }

    /// What was taken for a call is text.
    fn give_up(&mut self) {
        for c in std::mem::take(&mut self.raw).chars() {
            self.scanner.plain(c, &mut self.events);
        }
    }
}
