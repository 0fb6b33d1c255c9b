//! Turns messages with `function_call` and of the role `function`, which OpenAI's API had
//! before tools, into tool calls and their results, which chat templates know.

use crate::text::Message;
use serde_json::{Map, Value, json};

/// Returns the conversation with function calls turned into tool calls.
pub(crate) fn as_tools(mut messages: Vec<Message>) -> Vec<Message> {
    let mut calls = 0;
    // Name and id of the latest call, to which the next result belongs.
    let mut latest: Option<(String, String)> = None;
    for message in &mut messages {
        if message.role == "function" {
            message.role = "tool".to_owned();
            let name = message.extra.get("name").and_then(Value::as_str);
            let id = match &latest {
                Some((called, id)) if name.is_none_or(|name| name == called) => id.clone(),
                _ => legacy_id(calls),
            };
            (message.extra)
                .entry("tool_call_id")
                .or_insert_with(|| id.into());
        }
        let Some(call) = message.extra.shift_remove("function_call") else {
            continue;
        };
        // Null means that nothing was called.
        if let (Value::Object(function), false) = (call, message.extra.contains_key("tool_calls")) {
            let id = legacy_id(calls);
            calls += 1;
            latest = Some((name_of(&function), id.clone()));
            let call = json!({"id": id, "type": "function", "function": function});
            message.extra.insert("tool_calls".to_owned(), json!([call]));
        }
    }
    messages
}

fn name_of(function: &Map<String, Value>) -> String {
    let name = function.get("name").and_then(Value::as_str);
    name.unwrap_or_default().to_owned()
}

fn legacy_id(index: usize) -> String {
    format!("call_{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_calls_and_results_become_tool_calls_and_results() {
        let read = |messages: Value| -> Vec<Message> { serde_json::from_value(messages).unwrap() };
        let function = |name: &str| json!({"name": name, "arguments": "{}"});
        let legacy = read(json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "function_call": function("f")},
            {"role": "function", "name": "f", "content": "one"},
            {"role": "assistant", "content": "So.", "function_call": null},
            {"role": "assistant", "content": null, "function_call": function("g")},
            {"role": "function", "name": "g", "content": "two"},
        ]));
        let call = |id: &str, name: &str| json!([{"id": id, "type": "function", "function": function(name)}]);
        let expected = read(json!([
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": null, "tool_calls": call("call_0", "f")},
            {"role": "tool", "name": "f", "content": "one", "tool_call_id": "call_0"},
            {"role": "assistant", "content": "So."},
            {"role": "assistant", "content": null, "tool_calls": call("call_1", "g")},
            {"role": "tool", "name": "g", "content": "two", "tool_call_id": "call_1"},
        ]));
        assert_eq!(as_tools(legacy), expected);
    }

    #[test]
    fn other_messages_stay_as_they_are() {
        let messages = vec![Message::new("system", "S"), Message::new("user", "Hi")];
        assert_eq!(as_tools(messages.clone()), messages);
    }
}
