//! Chat templates: a conversation into the prompt that the model was trained on.
//!
//! Templates are Jinja, run as transformers runs them: `trim_blocks` and
//! `lstrip_blocks`, loop controls, Python's string methods, `raise_exception`,
//! `strftime_now`, and JSON as Python writes it.

use super::TextError;
use super::clock::strftime;
use super::jinja::{Raised, python_environment, without_generation_marks};
use super::message::Message;
use minijinja::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::Map;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::io::{self, Write};
use std::time::SystemTime;

/// How many instructions a rendering may take; real ones take some thousands.
const FUEL: u64 = 20_000_000;

/// How long a prompt may get, in bytes.
const MAX_PROMPT_BYTES: usize = 256 << 20;

/// A model's chat template, parsed and ready.
///
/// A rendering is bounded in instructions and in what it writes, so that it
/// ends whatever the template says. What a template holds in variables while it
/// runs is not bounded.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: Option<String>,
    eos: Option<String>,
}

/// What a template is given besides the messages.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// End the prompt with the beginning of an answer. True by default.
    pub add_generation_prompt: bool,
    /// The tools that the model may call, as OpenAI clients write them.
    pub tools: Option<serde_json::Value>,
    /// More variables, such as `enable_thinking`. They win over all others.
    pub extra: Map<String, serde_json::Value>,
    /// The time that `strftime_now` tells, in UTC; the present by default.
    pub now: Option<SystemTime>,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            tools: None,
            extra: Map::new(),
            now: None,
        }
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Parses a template. `bos` and `eos` are the texts that it knows as
    /// `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`TextError::TemplateSyntax`] when it does not parse.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut environment = python_environment();
        environment.set_fuel(Some(FUEL));
        let source = without_generation_marks(source);
        environment
            .template_from_str(&source)
            .map_err(|error| TextError::TemplateSyntax {
                line: error.line().unwrap_or(0),
                message: message_of(&error),
            })?;
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Ok(Self {
            environment,
            source,
            bos: owned(bos),
            eos: owned(eos),
        })
    }

    /// Another template over the same `bos` and `eos`.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_source(&self, source: &str) -> Result<Self, TextError> {
        Self::new(source, self.bos.as_deref(), self.eos.as_deref())
    }

    /// The prompt for a conversation.
    ///
    /// Arguments of tool calls that are JSON text reach the template as objects, and
    /// as they are when it fails on those: a few templates expect text.
    ///
    /// # Errors
    /// [`TextError::TemplateRaised`] when the template refuses the conversation,
    /// [`TextError::TemplateFailed`] when it fails, and
    /// [`TextError::TemplateTooExpensive`] when it exceeds its limits.
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TextError> {
        let changed: Vec<_> = messages
            .iter()
            .map(Message::with_arguments_as_objects)
            .collect();
        if changed.iter().all(Option::is_none) {
            return self.render_as_given(messages, options);
        }
        let with_objects: Vec<Message> = (changed.into_iter().zip(messages))
            .map(|(changed, message)| changed.unwrap_or_else(|| message.clone()))
            .collect();
        match self.render_as_given(&with_objects, options) {
            Err(error @ TextError::TemplateFailed { .. }) => {
                self.render_as_given(messages, options).map_err(|_| error)
            }
            rendered => rendered,
        }
    }

    fn render_as_given(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TextError> {
        let now = options.now.unwrap_or_else(SystemTime::now);
        let mut variables: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", Value::from_serialize(messages)),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
            ("tools", Value::from_serialize(&options.tools)),
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
            .template_from_str(&self.source)
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

    /// Whether the template writes the tools that it is given. Where it does not,
    /// [`tools::in_words`](super::tools::in_words) does.
    pub fn knows_tools(&self) -> bool {
        self.source.contains("tools")
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }
}

/// Collects a prompt up to its limit.
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
        ChatTemplate::new(source, Some("<s>"), None)?.render(messages, &RenderOptions::default())
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
    fn python_habits_work() {
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
