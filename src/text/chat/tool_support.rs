//! Detects how a chat template handles tools, by rendering it with probes.

use super::message::Message;
use super::render::RenderOptions;
use super::template::ChatTemplate;
use super::tools::ToolFormat;
use serde_json::{Value, json};

/// Names to look for in a rendered prompt. No template contains them itself.
const TOOL: &str = "quell_probe_tool";
const CALLED: &str = "quell_probe_call";
const RESULT: &str = "quell_probe_result";
const KEY: &str = "quell_probe_key";

/// How a template handles tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ToolSupport {
    /// Whether it writes the tools that it is given.
    pub(super) tools: bool,
    /// Whether it writes the tool calls of a conversation and their results.
    pub(super) calls: bool,
    /// Whether it recognizes a message that consists only of tool calls by its null content.
    pub(super) null_content: bool,
    /// The format in which it writes calls, if that is a known one.
    pub(super) format: Option<ToolFormat>,
}

impl ToolSupport {
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let tools = writes_tools(template);
        let [empty, null] = [false, true].map(|null| with_call(template, null));
        let nones = |prompt: &str| prompt.matches("None").count();
        let null_content = match (&empty, &null) {
            // Some templates print null content like any other value, as `None`.
            (Some(empty), Some(null)) => empty != null && nones(empty) == nones(null),
            (_, null) => null.is_some(),
        };
        Self {
            tools,
            calls: empty.is_some() || null.is_some(),
            null_content,
            format: empty.or(null).as_deref().and_then(written_format),
        }
    }
}

fn writes_tools(template: &ChatTemplate) -> bool {
    let tools = json!([{"type": "function", "function": {
        "name": TOOL,
        "description": "d",
        "parameters": {"type": "object", "properties": {}, "required": []},
    }}]);
    let options = RenderOptions::default();
    let user = Message::new("user", "u");
    let conversations = [
        vec![user.clone()],
        vec![Message::new("system", "s"), user.clone()],
        vec![
            Message::new("system", "s"),
            user.clone(),
            Message::new("assistant", "a"),
            user,
        ],
    ];
    let mut rendered = false;
    for conversation in conversations {
        if let Ok(prompt) = template.render_whole(&conversation, &options, Some(&tools), false) {
            rendered = true;
            if prompt.contains(TOOL) {
                return true;
            }
        }
    }
    // A template that rejects these plain conversations is judged by the variables it reads.
    !rendered && template.reads("tools")
}

/// Renders a prompt with a call and its result. Returns `None` unless the template writes both.
fn with_call(template: &ChatTemplate, null_content: bool) -> Option<String> {
    let message = |role: &str, content: &str, extra: Value| Message {
        extra: extra.as_object().cloned().unwrap_or_default(),
        ..Message::new(role, content)
    };
    // Mistral's templates demand ids of this form. Arguments are text, as clients send them.
    let call = json!({"id": "probe0001", "type": "function", "function": {
        "name": CALLED, "arguments": json!({KEY: "v"}).to_string(),
    }});
    let conversation = [
        Message::new("user", "u"),
        message("assistant", "", json!({"tool_calls": [call]})),
        message(
            "tool",
            RESULT,
            json!({"tool_call_id": "probe0001", "name": CALLED}),
        ),
    ];
    let options = RenderOptions::default();
    let prompt = template.render_whole(&conversation, &options, None, null_content);
    prompt
        .ok()
        .filter(|prompt| prompt.contains(CALLED) && prompt.contains(RESULT))
}

/// Returns the format of the call in a prompt.
fn written_format(prompt: &str) -> Option<ToolFormat> {
    let (before, after) = prompt.split_at(prompt.find(CALLED)?);
    let after = after[CALLED.len()..].trim_start();
    let parameter = format!("<parameter={KEY}>");
    if before.ends_with("<function=") && after.contains(&parameter) {
        return Some(match before.contains("<seed:tool_call>") {
            true => ToolFormat::Seed,
            false => ToolFormat::QwenCoder,
        });
    }
    if before.ends_with("<tool_call>") && after.starts_with("<arg_key>") {
        return Some(ToolFormat::Glm);
    }
    // What comes before the name, from where the calls begin.
    const BEGINNINGS: [(&str, &str, ToolFormat); 13] = [
        (
            "<minimax:tool_call>",
            "<invoke name=\"",
            ToolFormat::MiniMax,
        ),
        ("<|tool_call_begin|>", "functions.", ToolFormat::Kimi),
        ("<|tool_call_start|>", "[", ToolFormat::Lfm2),
        ("<|tool_call>", "call:", ToolFormat::Gemma),
        (
            "<|START_ACTION|>",
            "\"tool_name\": \"",
            ToolFormat::CommandR,
        ),
        (
            "Action:\n```json",
            "\"tool_name\": \"",
            ToolFormat::CommandR,
        ),
        ("<|start|>", " to=functions.", ToolFormat::Harmony),
        ("<｜tool▁call▁begin｜>", "", ToolFormat::DeepSeek),
        ("[TOOL_CALLS]", "", ToolFormat::Mistral),
        ("<|tool_call|>", "\"name\": \"", ToolFormat::Granite),
        ("<TOOLCALL>", "\"name\": \"", ToolFormat::Nemotron),
        ("<tool_call>", "\"name\": \"", ToolFormat::Hermes),
        ("<|python_tag|>", "\"name\": \"", ToolFormat::Llama),
    ];
    let found = BEGINNINGS
        .iter()
        .find(|(mark, name, _)| before.contains(mark) && before.ends_with(name));
    found.map(|(_, _, format)| *format)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool_support(source: &str) -> ToolSupport {
        ToolSupport::of(&ChatTemplate::new(source, None, None).unwrap())
    }

    const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    const CALLS: &str = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}\
                         {{ c.function.name }}{% endfor %}{% endfor %}";

    #[test]
    fn a_template_that_only_says_tools_does_not_know_them() {
        let none = ToolSupport::default();
        assert_eq!(tool_support(PLAIN), none);
        assert_eq!(tool_support(&format!("{{# no tools here #}}{PLAIN}")), none);
        assert_eq!(tool_support(&format!("You have no tools.{PLAIN}")), none);
        assert_eq!(tool_support(&format!("{{% set tools = 1 %}}{PLAIN}")), none);
        assert_eq!(
            tool_support(&format!("{{% if tools %}}!{{% endif %}}{PLAIN}")),
            none
        );
    }

    #[test]
    fn tools_and_calls_are_known_each_by_itself() {
        let tools = ToolSupport {
            tools: true,
            ..ToolSupport::default()
        };
        assert_eq!(
            tool_support(&format!("{{{{ tools | tojson }}}}{PLAIN}")),
            tools
        );
        // Tools written elsewhere than at the beginning, and only with a system prompt.
        let late =
            "{% for m in messages %}{% if m.role == 'system' %}{{ tools }}{% endif %}{% endfor %}";
        assert_eq!(tool_support(late), tools);
        let calls = ToolSupport {
            calls: true,
            ..ToolSupport::default()
        };
        assert_eq!(tool_support(CALLS), calls);
        let both = tool_support(&format!("{{{{ tools }}}}{CALLS}"));
        assert!(both.tools && both.calls && !both.null_content);
    }

    #[test]
    fn calls_that_need_a_null_content_are_found() {
        let source = format!(
            "{{% if messages[1] and messages[1].content is none %}}{CALLS}{{% else %}}{PLAIN}{{% endif %}}"
        );
        let found = tool_support(&source);
        assert!(found.calls && found.null_content && !found.tools);
        let template = ChatTemplate::new(&source, None, None).unwrap();
        let call = json!([{"function": {"name": "f", "arguments": "{}"}}]);
        let mut conversation = [Message::new("user", "u"), Message::new("assistant", "")];
        conversation[1].extra.insert("tool_calls".to_owned(), call);
        let rendered = template.render(&conversation, &RenderOptions::default());
        assert_eq!(rendered.unwrap(), "uNonef");
    }

    #[test]
    fn a_null_content_is_not_shown_to_a_template_that_would_print_it() {
        assert!(!tool_support(CALLS).null_content);
        let told_apart = CALLS.replace(
            "{{ m.content }}",
            "{% if m.content is not none %}[{{ m.content }}]{% endif %}",
        );
        assert!(tool_support(&told_apart).null_content);
    }

    #[test]
    fn a_template_that_always_refuses_is_taken_at_its_word() {
        let refuses = "{{ raise_exception('no') }}";
        assert!(!tool_support(refuses).tools);
        assert!(tool_support(&format!("{refuses}{{{{ tools }}}}")).tools);
    }
}
