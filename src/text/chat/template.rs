//! Chat templates, which turn a conversation into a prompt of the form that the model was
//! trained on.
//!
//! Templates are Jinja and are run as in transformers: `trim_blocks` and `lstrip_blocks`,
//! loop controls, Python's operators and methods, `raise_exception`, `strftime_now`, and
//! values printed as in Python.

use super::clock::strftime;
use super::harmony;
use super::instructions::InstructionSupport;
use super::jinja::{Raised, python_environment, translate};
use super::message::{Message, MessageView};
use super::render::RenderOptions;
use super::tool_support::ToolSupport;
use super::tools::ToolFormat;
use crate::text::TextError;
use minijinja::Value;
use minijinja::{Environment, Error, ErrorKind};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Maximum number of instructions per rendering. Real templates take some thousands.
const FUEL: u64 = 20_000_000;

/// Maximum length of a prompt, in bytes.
const MAX_PROMPT_BYTES: usize = 256 << 20;

/// Marker appended to the message that is to be continued, so that its end can be found in
/// the prompt. The trailing space shows whether the template trims white space there.
const CONTINUED: &str = "<|quell-continues-here|> ";

/// A model's chat template, parsed and ready to render.
///
/// The number of instructions and the length of the output are limited, so that rendering
/// always ends. The total memory of a template's variables is not limited.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// Source as translated for minijinja.
    translated: String,
    bos: Option<String>,
    eos: Option<String>,
    /// Template to use in place of this one if tools are given.
    tool_use: Option<Box<ChatTemplate>>,
    /// Whether this is such a template, which supports tools whatever [`ToolSupport`] says.
    is_for_tools: bool,
    tool_support: OnceLock<ToolSupport>,
    instruction_support: OnceLock<InstructionSupport>,
    is_harmony: OnceLock<bool>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Parses a template. `bos` and `eos` are the values of its variables `bos_token` and
    /// `eos_token`.
    ///
    /// # Errors
    /// Returns [`TextError::TemplateSyntax`] if the template does not parse.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut environment = python_environment();
        environment.set_fuel(Some(FUEL));
        let translated = translate(source).map_err(|too_large| TextError::TemplateSyntax {
            line: too_large.line,
            message: "a statement or expression is too large".to_owned(),
        })?;
        environment
            .template_from_str(&translated)
            .map_err(|error| TextError::TemplateSyntax {
                line: error.line().unwrap_or(0),
                message: message_of(&error),
            })?;
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Ok(Self {
            environment,
            source: source.to_owned(),
            translated,
            bos: owned(bos),
            eos: owned(eos),
            tool_use: None,
            is_for_tools: false,
            tool_support: OnceLock::new(),
            instruction_support: OnceLock::new(),
            is_harmony: OnceLock::new(),
        })
    }

    /// Parses another template with the same `bos` and `eos`.
    ///
    /// # Errors
    /// Returns [`TextError::TemplateSyntax`] if the template does not parse.
    pub fn with_source(&self, source: &str) -> Result<Self, TextError> {
        Self::new(source, self.bos.as_deref(), self.eos.as_deref())
    }

    /// Adds a second template that is used if tools are given. Models with several
    /// templates call it `tool_use`.
    ///
    /// # Errors
    /// Returns [`TextError::TemplateSyntax`] if the template does not parse.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, TextError> {
        let mut other = Self::new(source, self.bos.as_deref(), self.eos.as_deref())?;
        other.is_for_tools = true;
        self.tool_use = Some(Box::new(other));
        Ok(self)
    }

    /// Returns the template for a conversation with or without tools.
    pub fn variant(&self, with_tools: bool) -> &Self {
        match &self.tool_use {
            Some(tool_use) if with_tools => tool_use,
            _ => self,
        }
    }

    /// Runs the template on a conversation as it is, like `apply_chat_template` of
    /// transformers. Ignores `tool_format`, `close_reasoning` and `answer_prefix`, which
    /// [`ChatTemplate::render`] honours.
    ///
    /// Arguments of tool calls that are JSON text are passed to the template as objects. If the
    /// template fails on objects, they are passed as text, which a few templates expect.
    ///
    /// # Errors
    /// Returns [`TextError::TemplateRaised`] if the template rejects the conversation,
    /// [`TextError::TemplateFailed`] if it fails, [`TextError::TemplateTooExpensive`] if it
    /// exceeds a limit, and, if the last message is to be continued,
    /// [`TextError::NothingToContinue`] if it has no text and [`TextError::NotContinued`] if
    /// its end does not appear in the prompt.
    pub fn apply(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TextError> {
        let template = self.variant(options.offered().is_some());
        template.run(messages.into(), options.offered(), options)
    }

    /// Runs this template itself, not its variant for tools.
    pub(super) fn run(
        &self,
        messages: Cow<'_, [Message]>,
        tools: Option<&serde_json::Value>,
        options: &RenderOptions,
    ) -> Result<String, TextError> {
        let null_content = self.tool_support().null_content;
        let run = |messages: &[Message]| self.render_whole(messages, options, tools, null_content);
        Self::continued(messages, options, run)
    }

    /// Writes a conversation with `write`. If its last message is to be continued, the prompt ends
    /// with the text of that message.
    pub(super) fn continued(
        mut messages: Cow<'_, [Message]>,
        options: &RenderOptions,
        write: impl Fn(&[Message]) -> Result<String, TextError>,
    ) -> Result<String, TextError> {
        if !options.continue_final_message {
            return write(&messages);
        }
        let last = messages.to_mut().last_mut();
        let last = last.filter(|message| !message.content.trim().is_empty());
        let last = last.ok_or(TextError::NothingToContinue)?;
        last.content.push_str(CONTINUED);
        let mut prompt = write(&messages)?;
        let mark = CONTINUED.trim_end();
        let end = prompt.rfind(mark).ok_or(TextError::NotContinued)?;
        let trimmed = !prompt[end..].starts_with(CONTINUED);
        prompt.truncate(end);
        if trimmed {
            prompt.truncate(prompt.trim_end().len());
        }
        Ok(prompt)
    }

    /// Runs this template with these tools. With `null_content`, the content of a message that
    /// has tool calls but no text is null instead of an empty string.
    pub(super) fn render_whole(
        &self,
        messages: &[Message],
        options: &RenderOptions,
        tools: Option<&serde_json::Value>,
        null_content: bool,
    ) -> Result<String, TextError> {
        let has_calls = |message: &Message| message.extra.contains_key("tool_calls");
        if !messages.iter().any(has_calls) {
            return self.render_as_given(messages, options, tools, null_content);
        }
        let with_objects: Vec<Message> = (messages.iter())
            .map(|message| {
                message
                    .with_arguments_as_objects()
                    .unwrap_or_else(|| message.clone())
            })
            .collect();
        let rendered = self.render_as_given(&with_objects, options, tools, null_content);
        let Err(error @ TextError::TemplateFailed { .. }) = rendered else {
            return rendered;
        };
        let as_text: Vec<Message> = (messages.iter())
            .map(Message::with_arguments_as_text)
            .collect();
        self.render_as_given(&as_text, options, tools, null_content)
            .map_err(|_| error)
    }

    fn render_as_given(
        &self,
        messages: &[Message],
        options: &RenderOptions,
        tools: Option<&serde_json::Value>,
        null_content: bool,
    ) -> Result<String, TextError> {
        tracing::trace!(messages = messages.len(), "running a chat template");
        let views: Vec<MessageView<'_>> = messages
            .iter()
            .map(|message| message.view(null_content))
            .collect();
        let now = options.now.unwrap_or_else(SystemTime::now);
        let mut variables: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", Value::from_serialize(views)),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt && !options.continue_final_message),
            ),
            ("tools", Value::from_serialize(tools)),
            ("documents", Value::from(())),
            (
                "strftime_now",
                Value::from_function(move |format: &str| strftime(now, format)),
            ),
        ]);
        for (name, text) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            variables.extend(text.iter().map(|text| (name, Value::from(text.as_str()))));
        }
        for (name, value) in &options.extra {
            variables.insert(name, Value::from_serialize(value));
        }
        let mut prompt = Prompt::default();
        let rendered = self
            .environment
            .template_from_str(&self.translated)
            .and_then(|template| {
                template
                    .render_captured_to(variables, &mut prompt)
                    .map(drop)
            });
        match rendered {
            _ if prompt.overflowed => Err(TextError::TemplateTooExpensive {
                limit: MAX_PROMPT_BYTES as u64,
                unit: "bytes",
            }),
            Ok(()) => String::from_utf8(prompt.bytes).map_err(|error| TextError::TemplateFailed {
                line: 0,
                message: error.to_string(),
            }),
            Err(error) => Err(failure(&error)),
        }
    }

    /// Returns whether the template writes the tools that it is given. If it does not,
    /// [`ChatTemplate::render`] describes them in plain messages.
    pub fn knows_tools(&self) -> bool {
        self.is_for_tools || self.tool_support().tools
    }

    /// Returns whether the template writes tool calls and their results in the model's own
    /// format, which it may do even if it does not write the tools.
    pub fn knows_calls(&self) -> bool {
        self.tool_support().calls
    }

    /// Returns the format in which the template writes calls or, if it does not write them in a
    /// known one, the format that its marks tell.
    pub(super) fn written_format(&self) -> ToolFormat {
        let written = self.tool_support().format;
        written.unwrap_or_else(|| ToolFormat::detect(&self.source))
    }

    /// Returns whether prompts are written in Harmony, by the engine and not by the template.
    pub(super) fn is_harmony(&self) -> bool {
        *self.is_harmony.get_or_init(|| harmony::is_harmony(self))
    }

    fn tool_support(&self) -> &ToolSupport {
        self.tool_support.get_or_init(|| ToolSupport::of(self))
    }

    pub(super) fn instruction_support(&self) -> InstructionSupport {
        let support = &self.instruction_support;
        *support.get_or_init(|| InstructionSupport::of(self))
    }

    /// Returns whether the template reads a variable that it does not set.
    pub(super) fn reads(&self, variable: &str) -> bool {
        (self.environment.template_from_str(&self.translated))
            .is_ok_and(|template| template.undeclared_variables(false).contains(variable))
    }

    /// Returns the template's source.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// Collects a prompt up to the maximum length.
#[derive(Default)]
struct Prompt {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Write for Prompt {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_PROMPT_BYTES {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn message_of(error: &Error) -> String {
    error.detail().map_or_else(
        || error.kind().to_string(),
        |detail| format!("{}: {detail}", error.kind()),
    )
}

fn failure(error: &Error) -> TextError {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return TextError::TemplateRaised {
                message: message.clone(),
            };
        }
        cause = inner.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TextError::TemplateTooExpensive {
            limit: FUEL,
            unit: "instructions",
        };
    }
    TextError::TemplateFailed {
        line: error.line().unwrap_or(0),
        message: message_of(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::{Duration, UNIX_EPOCH};

    fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
        ChatTemplate::new(source, Some("<s>"), None)?.apply(messages, &RenderOptions::default())
    }

    fn user() -> [Message; 1] {
        [Message::new("user", " Hi <b> ")]
    }

    #[test]
    fn blocks_leave_no_lines_behind() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\nU:{{ m.content | trim }}\n  {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source, &user()).unwrap(), "U:Hi <b>\nend");
    }

    #[test]
    fn python_methods_and_literals_work() {
        let source = "{{ messages[0]['content'].strip().upper() }}|{{ 'a,b'.split(',')[-1] }}|{{ true }} {{ none }} {{ missing }}|{{ bos_token }}{{ eos_token }}|{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}|{{ messages[0].content.startswith(' H') }}";
        assert_eq!(
            render(source, &user()).unwrap(),
            "HI <B>|b|True None |<s>|013|True"
        );
    }

    #[test]
    fn tools_are_written_as_python_writes_json() {
        let options = RenderOptions {
            tools: Some(json!([{"type": "function", "a": {"z": 1, "b": "<é>"}}])),
            ..RenderOptions::default()
        };
        let template = ChatTemplate::new(
            "{% for tool in tools %}{{ tool | tojson }}{{ tool.a | tojson(indent=2) }}{% endfor %}",
            None,
            None,
        );
        assert_eq!(
            template.unwrap().render(&[], &options).unwrap(),
            "{\"type\": \"function\", \"a\": {\"z\": 1, \"b\": \"<é>\"}}{\n  \"z\": 1,\n  \"b\": \"<é>\"\n}"
        );
    }

    #[test]
    fn extra_fields_and_variables_reach_the_template() {
        let message =
            serde_json::from_value(json!({"role": "assistant", "tool_calls": [{"id": "x7"}]}));
        let mut options = RenderOptions {
            add_generation_prompt: false,
            ..RenderOptions::default()
        };
        options
            .extra
            .insert("enable_thinking".to_owned(), json!(false));
        options.now = Some(UNIX_EPOCH + Duration::from_secs(86_400));
        let source = "{{ messages[0].tool_calls[0].id }} {{ enable_thinking is false }} {{ add_generation_prompt }} {{ strftime_now('%d %b %Y') }} {{ tools is none }}";
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(
            template.render(&[message.unwrap()], &options).unwrap(),
            "x7 True False 02 Jan 1970 True"
        );
    }

    #[test]
    fn arguments_reach_a_template_as_it_expects_them() {
        let message: Message = serde_json::from_value(json!({
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\":1}"}}],
        }))
        .unwrap();
        let conversation = [Message::new("user", "Hi"), message];
        let as_object = "{{ messages[1].tool_calls[0].function.arguments | tojson }}";
        assert_eq!(render(as_object, &conversation).unwrap(), "{\"a\": 1}");
        let as_text = "{{ '=' + messages[1].tool_calls[0].function.arguments }}";
        assert_eq!(render(as_text, &conversation).unwrap(), "={\"a\":1}");
        let mut conversation = conversation;
        conversation[1].extra["tool_calls"][0]["function"]["arguments"] = json!({"a": 1});
        assert_eq!(render(as_object, &conversation).unwrap(), "{\"a\": 1}");
        assert_eq!(render(as_text, &conversation).unwrap(), "={\"a\": 1}");
    }

    #[test]
    fn a_model_with_two_templates_takes_the_one_for_tools_with_tools() {
        let template = ChatTemplate::new("D", None, Some("E"))
            .and_then(|template| template.with_tool_use("U{{ tools | length }}{{ eos_token }}"))
            .unwrap();
        let mut options = RenderOptions::default();
        assert_eq!(template.render(&user(), &options).unwrap(), "D");
        options.tools = Some(json!(null));
        assert_eq!(template.render(&user(), &options).unwrap(), "D");
        options.tools = Some(json!([{"type": "function"}]));
        assert_eq!(template.render(&user(), &options).unwrap(), "U1E");
        assert_eq!(
            template.variant(true).source(),
            "U{{ tools | length }}{{ eos_token }}"
        );
        assert!(matches!(
            ChatTemplate::new("D", None, None)
                .unwrap()
                .with_tool_use("{% if"),
            Err(TextError::TemplateSyntax { .. })
        ));
    }

    #[test]
    fn the_last_message_is_left_open_where_it_is_to_be_continued() {
        let options = RenderOptions {
            continue_final_message: true,
            ..RenderOptions::default()
        };
        let conversation = [
            Message::new("user", "Sure, the"),
            Message::new("assistant", " Sure, the "),
        ];
        let open = |source: &str| {
            let template = ChatTemplate::new(source, None, None).unwrap();
            template.render(&conversation, &options)
        };
        let around = |content: &str| {
            format!(
                "{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {content} }}}}</s>\n{{% endfor %}}\
                 {{% if add_generation_prompt %}}<assistant>{{% endif %}}"
            )
        };
        assert_eq!(
            open(&around("m.content")).unwrap(),
            "<user>Sure, the</s>\n<assistant> Sure, the "
        );
        assert_eq!(
            open(&around("m.content | trim")).unwrap(),
            "<user>Sure, the</s>\n<assistant>Sure, the"
        );
        assert!(matches!(
            open("{{ messages[0].content }}"),
            Err(TextError::NotContinued)
        ));
        let template = ChatTemplate::new(&around("m.content"), None, None).unwrap();
        for nothing in [&[][..], &[Message::new("assistant", " \n")]] {
            let refused = template.render(nothing, &options);
            assert!(matches!(refused, Err(TextError::NothingToContinue)));
        }
    }

    #[test]
    fn generation_marks_for_training_are_ignored() {
        let source = "{% generation %}\na{%- endgeneration -%}\n b{% if add_generation_prompt %}c{% endif %}";
        assert_eq!(render(source, &[]).unwrap(), "abc");
    }

    #[test]
    fn what_a_template_raises_reaches_the_caller() {
        let source = "{% macro check(m) %}{% if m.role == 'user' %}{{ raise_exception('No users, ' ~ m.role) }}{% endif %}{% endmacro %}{{ check(messages[0]) }}";
        let error = render(source, &user()).unwrap_err();
        assert!(
            matches!(&error, TextError::TemplateRaised { message } if message == "No users, user"),
            "{error}"
        );
    }

    #[test]
    fn a_broken_template_is_refused_with_its_line() {
        let error = ChatTemplate::new("a\n{% for %}", None, None).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateSyntax { line: 2, .. }),
            "{error}"
        );
        let error = render("a\n\n{{ messages[0].none.none }}", &user()).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateFailed { line: 3, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_template_cannot_run_or_write_without_end() {
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let error = render(nested, &[]).unwrap_err();
        assert!(
            matches!(
                error,
                TextError::TemplateTooExpensive {
                    unit: "instructions",
                    ..
                }
            ),
            "{error}"
        );
        let wide =
            "{% set s = 'xxxxxxxxxx' * 100000 %}{% for a in range(999) %}{{ s }}{% endfor %}";
        let error = render(wide, &[]).unwrap_err();
        assert!(
            matches!(error, TextError::TemplateTooExpensive { unit: "bytes", .. }),
            "{error}"
        );
        let recursive = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
        assert!(render(recursive, &[]).is_err());
    }
}
