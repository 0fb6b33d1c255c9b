//! The one way from a conversation to a prompt, which the engine, the server and the program
//! share.

use super::harmony;
use super::instructions::instructs;
use super::message::Message;
use super::reasoning::ReasoningFormat;
use super::template::ChatTemplate;
use super::tools::{ToolFormat, in_words, with_described};
use crate::text::TextError;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::time::SystemTime;

/// Inputs of a rendering other than the messages.
///
/// Construct it with `..RenderOptions::default()`: fields are added in minor releases.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// Whether to end the prompt with the beginning of an answer. True by default.
    pub add_generation_prompt: bool,
    /// Whether to end the prompt with the text of the last message, left open so that the
    /// answer continues it. If so, `add_generation_prompt` has no effect.
    pub continue_final_message: bool,
    /// Tools that the model may call, in the format of OpenAI clients.
    pub tools: Option<Value>,
    /// The format in which a template that does not write tools itself asks for calls. `None`
    /// means [`ChatTemplate::tool_format`].
    pub tool_format: Option<ToolFormat>,
    /// Whether to close the reasoning that the template opens at the end of the prompt, so that
    /// the answer begins at once.
    pub close_reasoning: bool,
    /// Text that the answer begins with. The prompt ends with it.
    pub answer_prefix: String,
    /// Additional variables, such as `enable_thinking`. They override all others.
    pub extra: Map<String, Value>,
    /// Time that `strftime_now` reports, in UTC. `None` means the current time.
    pub now: Option<SystemTime>,
}

impl Default for RenderOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            tool_format: None,
            close_reasoning: false,
            answer_prefix: String::new(),
            extra: Map::new(),
            now: None,
        }
    }
}

impl RenderOptions {
    /// Returns the tools, if there are any.
    pub(super) fn offered(&self) -> Option<&Value> {
        self.tools.as_ref().filter(|tools| !tools.is_null())
    }
}

impl ChatTemplate {
    /// Renders the prompt for a conversation.
    ///
    /// What the template does not support is written in a form that it does: the role
    /// `developer` as `system`, several or late system messages as one at the beginning, and
    /// tools, calls and results as plain text. For gpt-oss, the prompt is what OpenAI's library
    /// for Harmony writes. [`ChatTemplate::apply`] leaves all of this out.
    /// The template is run once, unless it fails on tool calls with objects as arguments.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`ChatTemplate::apply`].
    pub fn render(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, TextError> {
        let template = self.variant(options.offered().is_some());
        let (messages, tools) = template.with_tools(template.with_known_fields(messages), options);
        let continued = options
            .continue_final_message
            .then(|| messages.last())
            .flatten();
        let messages = match continued.is_some_and(instructs) {
            // The message that is continued must stay where it is.
            true => messages,
            false => template.instruction_support().merged(messages),
        };
        let mut prompt = match template.is_harmony() {
            true => Self::continued(messages, options, |messages| {
                harmony::prompt(messages, tools, options)
            })?,
            false => template.run(messages, tools, options)?,
        };
        let reasoning = ReasoningFormat::detect(template.source());
        if let Some(marks) = reasoning.filter(|marks| marks.is_open(&prompt))
            && options.close_reasoning
        {
            prompt.push_str(marks.close);
            prompt.push_str("\n\n");
        }
        prompt.push_str(&options.answer_prefix);
        Ok(prompt)
    }

    /// Returns the format in which the model is asked to write tool calls. A template that
    /// knows neither tools nor calls gets both as plain text, which asks for
    /// [`ToolFormat::Hermes`].
    pub fn tool_format(&self) -> ToolFormat {
        match self.knows_tools() || self.knows_calls() {
            true => self.written_format(),
            false => ToolFormat::Hermes,
        }
    }

    /// Returns the messages with the role `developer` replaced by `system`, its older name, if
    /// the template does not know it. Reasoning in the field `reasoning`, which newer clients
    /// send, is also put in `reasoning_content`, which templates read.
    fn with_known_fields<'a>(&self, messages: &'a [Message]) -> Cow<'a, [Message]> {
        let mut messages = Cow::Borrowed(messages);
        let is_newer = |message: &Message| message.role == "developer";
        if messages.iter().any(is_newer) && !self.source().contains("developer") {
            for message in messages.to_mut().iter_mut().filter(|one| is_newer(one)) {
                message.role = "system".to_owned();
            }
        }
        let (newer, known) = ("reasoning", "reasoning_content");
        let is_newer = |message: &Message| {
            message.extra.contains_key(newer) && !message.extra.contains_key(known)
        };
        if messages.iter().any(is_newer) {
            for message in messages.to_mut().iter_mut().filter(|one| is_newer(one)) {
                let reasoning = message.extra.get(newer).cloned();
                let field = reasoning.map(|reasoning| (known.to_owned(), reasoning));
                message.extra.extend(field);
            }
        }
        messages
    }

    /// Returns the messages, with tools and calls in words as far as the template does not
    /// write them, and the tools that it does write.
    fn with_tools<'a, 'b>(
        &self,
        messages: Cow<'a, [Message]>,
        options: &'b RenderOptions,
    ) -> (Cow<'a, [Message]>, Option<&'b Value>) {
        let tools = options.offered();
        let has_calls =
            |message: &Message| message.role == "tool" || message.extra.contains_key("tool_calls");
        if tools.is_none() && !messages.iter().any(has_calls) {
            return (messages, None);
        }
        if self.knows_tools() {
            return (messages, tools);
        }
        if !self.knows_calls() {
            return (in_words(&messages, tools).into(), None);
        }
        let Some(tools) = tools else {
            return (messages, None);
        };
        let format = options.tool_format.unwrap_or_else(|| self.tool_format());
        (with_described(&messages, tools, format).into(), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PLAIN: &str = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}";

    fn render(source: &str, messages: &[Message], options: &RenderOptions) -> String {
        let template = ChatTemplate::new(source, None, None).unwrap();
        template.render(messages, options).unwrap()
    }

    #[test]
    fn a_prompt_ends_where_the_answer_begins() {
        let source = format!("{PLAIN}<think>\n{{# </think> #}}");
        let user = [Message::new("user", "Q")];
        let mut options = RenderOptions::default();
        assert_eq!(render(&source, &user, &options), "[user:Q]<think>\n");
        options.answer_prefix = "Well".to_owned();
        assert_eq!(render(&source, &user, &options), "[user:Q]<think>\nWell");
        options.close_reasoning = true;
        let closed = "<think>\n</think>\n\nWell";
        assert_eq!(
            render(&source, &user, &options),
            format!("[user:Q]{closed}")
        );
        assert_eq!(render(PLAIN, &user, &options), "[user:Q]Well");
    }

    #[test]
    fn reasoning_is_found_under_either_name() {
        let source = "{% for m in messages %}[{{ m.reasoning_content }}]{% endfor %}";
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "assistant", "content": "", "reasoning": "a"},
            {"role": "assistant", "content": "", "reasoning": "b", "reasoning_content": "c"},
        ]))
        .unwrap();
        assert_eq!(
            render(source, &messages, &RenderOptions::default()),
            "[a][c]"
        );
    }

    #[test]
    fn what_a_template_does_not_write_is_put_in_words() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "user", "content": "Q"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "R"},
        ]))
        .unwrap();
        let options = RenderOptions {
            tools: Some(tools.clone()),
            ..RenderOptions::default()
        };
        let expected: String = in_words(&messages, Some(&tools))
            .iter()
            .map(|message| format!("[{}:{}]", message.role, message.content))
            .collect();
        assert_eq!(render(PLAIN, &messages, &options), expected);
        let template = ChatTemplate::new(PLAIN, None, None).unwrap();
        assert_eq!(
            template.apply(&messages, &options).unwrap(),
            "[user:Q][assistant:][tool:R]"
        );
        // A template that writes calls is only told of the tools, in the format asked for.
        let calls = "{% for m in messages %}[{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}]{% endfor %}";
        let told = |tool_format| {
            let options = RenderOptions {
                tool_format,
                ..options.clone()
            };
            render(calls, &messages, &options)
        };
        assert!(told(None).ends_with("[user:Q][assistant:f][tool:R]"));
        assert!(told(None).contains("<tool_call>"), "{}", told(None));
        let mistral = told(Some(ToolFormat::Mistral));
        assert!(mistral.contains("[TOOL_CALLS]"), "{mistral}");
    }
}
