//! Tools described in plain words, for chat templates that do not support them.

use super::super::python_json::{Style, dumps};
use super::ToolFormat;
use crate::text::Message;
use serde_json::{Map, Value, json};

/// Returns the part of a system prompt that describes `tools`, a list in the format of
/// OpenAI clients, to a model whose template does not.
///
/// It lists the tools and says how to call them, in the format
/// [`ToolFormat::Hermes`](super::ToolFormat::Hermes).
pub fn describe_tools(tools: &Value) -> String {
    format!(
        "{}\nTo use a tool, answer with its name and its arguments as JSON, like this:\n{}\n\
         Its result then comes between <tool_response> and </tool_response>. \
         Answer directly when no tool helps.",
        list_tools(tools),
        ToolFormat::Hermes.example(),
    )
}

/// Lists the tools, one per line.
fn list_tools(tools: &Value) -> String {
    let mut text = String::from("You have these tools, one JSON description a line:\n<tools>\n");
    for tool in tools.as_array().into_iter().flatten() {
        text.push_str(&one_line(tool));
        text.push('\n');
    }
    text.push_str("</tools>");
    text
}

/// Returns a conversation with the tools described in its system message, for a template
/// that writes calls and results itself. The description asks for calls in `format`.
pub fn with_described(messages: &[Message], tools: &Value, format: ToolFormat) -> Vec<Message> {
    let mut messages = messages.to_vec();
    let text = format!(
        "{}\nTo use a tool, answer with its name and its arguments as JSON, like this:\n{}\n\
         Answer directly when no tool helps.",
        list_tools(tools),
        format.example(),
    );
    add_to_system(&mut messages, tools, text);
    messages
}

/// Adds a description of `tools` to the system message, if there are any tools.
fn add_to_system(messages: &mut Vec<Message>, tools: &Value, text: String) {
    if tools.as_array().is_none_or(Vec::is_empty) {
        return;
    }
    match messages.first_mut() {
        Some(first) if first.role == "system" => {
            first.content.push_str("\n\n");
            first.content.push_str(&text);
        }
        _ => messages.insert(0, Message::new("system", text)),
    }
}

/// Converts a conversation with tools to plain messages. The tools are described in the
/// system message, calls are written into the assistant messages that made them, and their
/// results become user messages.
pub fn in_words(messages: &[Message], tools: Option<&Value>) -> Vec<Message> {
    let mut plain: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for message in messages {
        let result = message.role == "tool";
        let message = match message.role.as_str() {
            "tool" => {
                let text = format!("<tool_response>\n{}\n</tool_response>", message.content);
                // Some templates require that user and assistant messages alternate.
                if let (true, Some(last)) = (after_result, plain.last_mut()) {
                    last.content.push('\n');
                    last.content.push_str(&text);
                    continue;
                }
                Message::new("user", text)
            }
            "assistant" => with_calls(message),
            _ => message.clone(),
        };
        after_result = result;
        plain.push(message);
    }
    if let Some(tools) = tools {
        add_to_system(&mut plain, tools, describe_tools(tools));
    }
    plain
}

/// Returns an assistant message with its calls written into its text.
fn with_calls(message: &Message) -> Message {
    let mut message = message
        .with_arguments_as_objects()
        .unwrap_or_else(|| message.clone());
    let Some(Value::Array(calls)) = message.extra.remove("tool_calls") else {
        return message;
    };
    for call in &calls {
        let function = call.get("function").unwrap_or(call);
        let field = |name: &str| function.get(name).cloned();
        let call = json!({
            "name": field("name").unwrap_or_default(),
            "arguments": field("arguments").unwrap_or_else(|| Map::new().into()),
        });
        if !message.content.is_empty() {
            message.content.push('\n');
        }
        let text = format!("<tool_call>\n{}\n</tool_call>", one_line(&call));
        message.content.push_str(&text);
    }
    message
}

fn one_line(value: &Value) -> String {
    let written = dumps(&minijinja::Value::from_serialize(value), &Style::default());
    written.unwrap_or_else(|_| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(messages: Value) -> Vec<Message> {
        serde_json::from_value(messages).unwrap()
    }

    #[test]
    fn a_conversation_with_tools_becomes_plain_messages() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let messages = read(json!([
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}},
                {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": "two"},
        ]));
        let plain = in_words(&messages, Some(&tools));
        let system = format!("Be kind.\n\n{}", describe_tools(&tools));
        let calls = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                     <tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
        let results =
            "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>";
        let expected = [
            Message::new("system", system),
            Message::new("user", "Hi"),
            Message::new("assistant", calls),
            Message::new("user", results),
        ];
        assert_eq!(plain, expected);
    }

    #[test]
    fn tools_are_described_one_a_line() {
        let tools = json!([
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "g"}},
        ]);
        let plain = in_words(
            &read(json!([{"role": "user", "content": "Hi"}])),
            Some(&tools),
        );
        assert_eq!(plain.len(), 2);
        assert_eq!(
            (plain[0].role.as_str(), &plain[0].content),
            ("system", &describe_tools(&tools))
        );
        let lines = plain[0]
            .content
            .lines()
            .filter(|line| line.starts_with("{\"type\""));
        assert_eq!(
            lines.collect::<Vec<_>>(),
            [
                r#"{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}"#,
                r#"{"type": "function", "function": {"name": "g"}}"#,
            ]
        );
        assert!(plain[0].content.contains("<tool_call>\n{\"name\": "));
    }

    #[test]
    fn a_history_in_the_models_own_format_stays_and_tools_are_described() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let messages = read(json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "one"},
        ]));
        let described = with_described(&messages, &tools, ToolFormat::DeepSeek);
        assert_eq!(described[1..], messages);
        let system = &described[0].content;
        assert!(system.contains(r#"{"type": "function", "function": {"name": "f"}}"#));
        assert!(
            system.contains("function<｜tool▁sep｜>tool_name"),
            "{system}"
        );
        assert!(!system.contains("tool_response"), "{system}");
        assert_eq!(
            with_described(&messages, &json!([]), ToolFormat::Hermes),
            messages
        );
    }

    #[test]
    fn without_tools_nothing_is_described() {
        let messages = read(json!([{"role": "user", "content": "Hi"}]));
        assert_eq!(in_words(&messages, None), messages);
        assert_eq!(in_words(&messages, Some(&json!([]))), messages);
    }
}
