//! Tool calls, which are parsed from an answer while it is generated, and written into
//! prompts for templates that do not support tools.
//!
//! Calls are parsed in the format of the model's own chat template. Each format is a state
//! machine that takes one character at a time, so the result does not depend on the pieces
//! in which an answer arrives.

mod command_r;
mod deepseek;
mod forced;
mod gemma;
mod granite;
mod harmony;
mod hermes;
mod json;
mod kimi;
mod lfm2;
mod llama;
mod mistral;
mod nemotron;
mod pythonic;
#[cfg(feature = "grammar")]
mod rules;
mod scan;
mod tagged;
mod words;
#[cfg(test)]
mod written;

#[cfg(test)]
pub(super) mod tests;

#[cfg(feature = "grammar")]
pub(in crate::text) use rules::CallRules;
use scan::TextScanner;
use serde_json::Value;
use std::str::FromStr;
use std::sync::Arc;
use tagged::TaggedCalls;
#[cfg(any(test, feature = "internals"))]
pub use tagged::json_type;
pub use words::{in_words, with_described};

/// Format in which a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
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
    /// `<TOOLCALL>[{"name": …, "arguments": {…}}]</TOOLCALL>`: Nemotron Nano 2.
    Nemotron,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`:
    /// Qwen 3 Coder, Qwen 3.5, Nemotron 3.
    QwenCoder,
    /// The same within `<seed:tool_call>`: Seed-OSS.
    Seed,
    /// `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`: GLM 4.5 and
    /// later.
    Glm,
    /// `<minimax:tool_call><invoke name="name"><parameter name="key">value</parameter></invoke>…`:
    /// MiniMax M2.
    MiniMax,
    /// `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>` in a
    /// section: Kimi K2.
    Kimi,
    /// `<|tool_call_start|>[name(key="value")]<|tool_call_end|>`: LFM2.
    Lfm2,
    /// `<|tool_call>call:name{key:<|"|>value<|"|>}<tool_call|>`: Gemma 4.
    Gemma,
    /// `<|START_ACTION|>[{"tool_name": …, "parameters": {…}}]<|END_ACTION|>`: Command R7B and
    /// Command A.
    CommandR,
    /// `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}`: gpt-oss. The
    /// whole answer is in Harmony, which [`HarmonyParser`](crate::HarmonyParser) reads.
    Harmony,
}

/// A tool that a model may call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToolDeclaration {
    /// Name of the tool.
    pub name: String,
    /// JSON schema of its arguments, if it declares any.
    pub parameters: Option<Value>,
}

impl ToolDeclaration {
    /// Declares a tool.
    pub fn new(name: impl Into<String>, parameters: Option<Value>) -> Self {
        Self {
            name: name.into(),
            parameters,
        }
    }
}

/// Error for an unknown name of a tool format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tool format is {found:?}, expected one of {}", names(&ToolFormat::ALL))]
#[non_exhaustive]
pub struct UnknownToolFormat {
    /// The unknown name.
    pub found: String,
}

fn names(formats: &[ToolFormat]) -> String {
    let names: Vec<_> = formats.iter().map(|format| format.name()).collect();
    names.join(", ")
}

impl ToolFormat {
    /// All formats.
    pub const ALL: [Self; 16] = [
        Self::Hermes,
        Self::Llama,
        Self::Mistral,
        Self::Pythonic,
        Self::DeepSeek,
        Self::Granite,
        Self::Nemotron,
        Self::QwenCoder,
        Self::Seed,
        Self::Glm,
        Self::MiniMax,
        Self::Kimi,
        Self::Lfm2,
        Self::Gemma,
        Self::CommandR,
        Self::Harmony,
    ];

    /// Returns the format's name, which [`ToolFormat::from_str`] parses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Pythonic => "pythonic",
            Self::DeepSeek => "deepseek",
            Self::Granite => "granite",
            Self::Nemotron => "nemotron",
            Self::QwenCoder => "qwen_coder",
            Self::Seed => "seed",
            Self::Glm => "glm",
            Self::MiniMax => "minimax",
            Self::Kimi => "kimi",
            Self::Lfm2 => "lfm2",
            Self::Gemma => "gemma",
            Self::CommandR => "command_r",
            Self::Harmony => "harmony",
        }
    }

    /// Detects the format that a chat template teaches, from the marks in it. Returns
    /// [`ToolFormat::Hermes`] if there are none, because calls are asked for in that
    /// format where tools are described in words.
    pub fn detect(template_source: &str) -> Self {
        const MARKS: [(&str, ToolFormat); 20] = [
            ("<｜tool▁calls▁begin｜>", ToolFormat::DeepSeek),
            ("<|channel|>commentary", ToolFormat::Harmony),
            ("[TOOL_CALLS]", ToolFormat::Mistral),
            ("<|tool_call|>", ToolFormat::Granite),
            ("<TOOLCALL>", ToolFormat::Nemotron),
            ("<seed:tool_call>", ToolFormat::Seed),
            ("<minimax:tool_call>", ToolFormat::MiniMax),
            ("<arg_key>", ToolFormat::Glm),
            ("<parameter=", ToolFormat::QwenCoder),
            ("<|tool_calls_section_begin|>", ToolFormat::Kimi),
            ("<|tool_call_start|>", ToolFormat::Lfm2),
            // LFM2's first templates leave the calls to the client.
            ("<|tool_list_start|>", ToolFormat::Lfm2),
            ("<|tool_call>", ToolFormat::Gemma),
            ("<|START_ACTION|>", ToolFormat::CommandR),
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

    /// Returns an example call of a tool `tool_name` in this format, to show to a model.
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
            Self::Nemotron => {
                r#"<TOOLCALL>[{"name": "tool_name", "arguments": {"key": "value"}}]</TOOLCALL>"#
            }
            Self::QwenCoder => {
                "<tool_call>\n<function=tool_name>\n<parameter=key>\nvalue\n</parameter>\n\
                 </function>\n</tool_call>"
            }
            Self::Seed => {
                "<seed:tool_call>\n<function=tool_name>\n<parameter=key>value</parameter>\n\
                 </function>\n</seed:tool_call>"
            }
            Self::Glm => {
                "<tool_call>tool_name\n<arg_key>key</arg_key>\n<arg_value>value</arg_value>\n\
                 </tool_call>"
            }
            Self::MiniMax => {
                "<minimax:tool_call>\n<invoke name=\"tool_name\">\n\
                 <parameter name=\"key\">value</parameter>\n</invoke>\n</minimax:tool_call>"
            }
            Self::Kimi => {
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.tool_name:0\
                 <|tool_call_argument_begin|>{\"key\": \"value\"}<|tool_call_end|>\
                 <|tool_calls_section_end|>"
            }
            Self::Lfm2 => r#"<|tool_call_start|>[tool_name(key="value")]<|tool_call_end|>"#,
            Self::Gemma => r#"<|tool_call>call:tool_name{key:<|"|>value<|"|>}<tool_call|>"#,
            Self::CommandR => {
                "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"tool_name\", \
                 \"parameters\": {\"key\": \"value\"}}\n]<|END_ACTION|>"
            }
            Self::Harmony => {
                "<|channel|>commentary to=functions.tool_name <|constrain|>json<|message|>\
                 {\"key\": \"value\"}<|call|>"
            }
        }
    }

    /// Returns the marks that begin calls anywhere in an answer. Those that are special
    /// tokens must be kept in the answer's text.
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => hermes::TAGS,
            Self::Llama => llama::TAGS,
            Self::Mistral => mistral::TAGS,
            Self::Pythonic => pythonic::TAGS,
            Self::DeepSeek => deepseek::TAGS,
            Self::Granite => granite::TAGS,
            Self::Nemotron => nemotron::TAGS,
            Self::QwenCoder => tagged::QWEN_CODER_TAGS,
            Self::Seed => tagged::SEED_TAGS,
            Self::Glm => tagged::GLM_TAGS,
            Self::MiniMax => tagged::MINIMAX_TAGS,
            Self::Kimi => kimi::TAGS,
            Self::Lfm2 => lfm2::TAGS,
            Self::Gemma => gemma::TAGS,
            Self::CommandR => command_r::TAGS,
            Self::Harmony => harmony::TAGS,
        }
    }

    /// Returns texts that contain all marks of the format.
    #[cfg(feature = "server")]
    pub(crate) fn marks(self) -> impl Iterator<Item = &'static str> {
        let newer = match self {
            Self::Mistral => mistral::NEWER_MARKS,
            _ => &[],
        };
        (self.tags().iter().chain(newer).copied()).chain([self.example()])
    }

    /// Returns the character that begins calls without a mark at the beginning of an answer.
    fn bare(self) -> Option<char> {
        match self {
            Self::Llama => Some('{'),
            Self::Pythonic => Some('['),
            _ => None,
        }
    }

    /// Creates the state machine that reads the calls of `tools` after `tag`, or calls without a
    /// tag if that is `None`.
    fn calls(self, tag: Option<&str>, tools: &Arc<[ToolDeclaration]>) -> Box<dyn Calls> {
        let bare = || tag.is_none().then(|| Arc::clone(tools));
        let tagged = |tags| TaggedCalls::after(tag.unwrap_or_default(), tags, tools);
        match self {
            Self::Hermes => Box::new(hermes::calls()),
            Self::Llama => Box::new(llama::calls(bare())),
            Self::Mistral => Box::new(mistral::MistralCalls::default()),
            Self::Pythonic => Box::new(pythonic::PythonicCalls::new(pythonic::CLOSES, bare())),
            Self::DeepSeek => Box::new(deepseek::calls()),
            Self::Granite => Box::new(granite::calls()),
            Self::Nemotron => Box::new(nemotron::calls()),
            Self::QwenCoder => Box::new(tagged(&tagged::QWEN_CODER)),
            Self::Seed => Box::new(tagged(&tagged::SEED)),
            Self::Glm => Box::new(tagged(&tagged::GLM)),
            Self::MiniMax => Box::new(tagged(&tagged::MINIMAX)),
            Self::Kimi => Box::new(kimi::calls()),
            Self::Lfm2 => Box::new(lfm2::calls()),
            Self::Gemma => Box::new(gemma::GemmaCalls::default()),
            Self::CommandR => Box::new(command_r::calls()),
            Self::Harmony => Box::new(harmony::calls()),
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

/// Event from parsing a piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToolEvent {
    /// Text that is not part of a call.
    Text(String),
    /// A call begins.
    CallBegin {
        /// Index among the answer's calls, from 0.
        index: usize,
        /// Name of the tool, as the model wrote it.
        name: String,
    },
    /// More of a call's arguments. All of them, concatenated, are the JSON text that the
    /// model wrote, which is a valid object if it wrote one.
    CallArguments {
        /// Index of the call.
        index: usize,
        /// Text to append to the arguments.
        delta: String,
    },
    /// A call ends. There is no such event for a call that the end of the answer cuts off.
    CallEnd {
        /// Index of the call.
        index: usize,
    },
}

/// Collects events and merges adjacent ones of the same kind.
#[derive(Debug, Default)]
struct Events {
    list: Vec<ToolEvent>,
    calls: usize,
    /// Whether a call, and not text, came last.
    after_call: bool,
    /// Whether what was read is part of a call and will not become text.
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

/// Meaning of one character to a state machine that reads calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Part of the calls, which continue.
    More,
    /// Last character of the calls.
    End,
    /// Not part of the calls. What was read and not committed is text.
    NotCalls,
}

/// State machine that reads the calls of one format, from after their tag to their end.
trait Calls: Send {
    /// Processes a character.
    fn push(&mut self, c: char, events: &mut Events) -> Step;

    /// Returns whether a call is complete and only its frame may follow. If the answer ends
    /// in this state, uncommitted characters are dropped and do not become text.
    fn framing(&self) -> bool;
}

/// Parses the tool calls in an answer, piece by piece.
///
/// White space between text and a call is dropped. Text that looks like a call but is not
/// one is returned as text, as soon as that is certain. A call is announced once its name
/// is known. Its arguments are streamed as the model writes them, except in
/// [`ToolFormat::Pythonic`], [`ToolFormat::Lfm2`] and [`ToolFormat::Gemma`], where each call is
/// returned as a whole, and except for arguments between tags that are not text, which are
/// returned one by one.
pub struct ToolParser {
    format: ToolFormat,
    tools: Arc<[ToolDeclaration]>,
    scanner: TextScanner,
    calls: Option<Box<dyn Calls>>,
    /// Characters that `calls` has read and not committed.
    raw: String,
    /// Whether a character other than white space was seen.
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
    /// Creates a parser for an answer of a model that was given `tools`. Their names
    /// distinguish a call without a mark from an answer that looks like one. If `tools` is
    /// empty, every name is accepted. Their schemas say which arguments are text, if the format
    /// writes text without quotes.
    pub fn new(format: ToolFormat, tools: impl IntoIterator<Item = ToolDeclaration>) -> Self {
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

    /// Creates a parser for an answer that follows [`ToolFormat::forced_schema`] and
    /// contains nothing but calls in JSON.
    pub fn forced(format: ToolFormat) -> Self {
        Self {
            calls: Some(Box::new(json::JsonCalls::new(&[], None))),
            ..Self::new(format, [])
        }
    }

    /// Processes the next piece of the answer.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        for c in text.chars() {
            self.take(c);
        }
        std::mem::take(&mut self.events.list)
    }

    /// Ends the answer and returns the events for what was held back.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        if self.calls.take().is_some_and(|calls| calls.framing()) {
            self.raw.clear();
        }
        self.give_up();
        self.scanner.finish(&mut self.events);
        std::mem::take(&mut self.events.list)
    }

    /// Returns the number of calls that have begun.
    #[cfg(test)]
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
            Step::NotCalls => {
                self.calls = None;
                if committed {
                    self.raw.clear();
                }
                if framing {
                    // Part of one mark may be the beginning of another.
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
            self.calls = Some(self.format.calls(None, &self.tools));
            self.take(c);
        } else if let Some(tag) = self.scanner.push(c, &mut self.events) {
            self.raw = self.scanner.take_space();
            self.raw.push_str(tag);
            self.calls = Some(self.format.calls(Some(tag), &self.tools));
        }
    }

    /// Emits what was taken for a call as text.
    fn give_up(&mut self) {
        for c in std::mem::take(&mut self.raw).chars() {
            self.scanner.plain(c, &mut self.events);
        }
    }
}
