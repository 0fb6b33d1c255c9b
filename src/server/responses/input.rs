//! What a response answers: a text, or items of a conversation.

use super::super::error::ApiError;
use crate::text::Message;
use serde::Deserialize;
use serde_json::{Value, json};

/// The `input` of a request.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of items")]
pub(super) enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl Input {
    /// Appends it to a conversation. The items of an answer may be among it.
    pub fn append_to(self, messages: &mut Vec<Message>) -> Result<(), ApiError> {
        match self {
            Self::Text(text) => messages.push(Message::new("user", text)),
            Self::Items(items) => {
                for (index, item) in items.iter().enumerate() {
                    append(item, messages).map_err(|problem| {
                        let place = format!("input[{index}]");
                        ApiError::invalid(format!("{place} {problem}")).param(place)
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// Appends one item; says what is wrong with it.
fn append(item: &Value, messages: &mut Vec<Message>) -> Result<(), String> {
    let text = |name: &str| match item.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        _ => Err(format!("has no {name}, or one that is no string")),
    };
    let kind = match item.get("type") {
        None if item.get("role").is_some() => "message",
        _ => text("type")?,
    };
    match kind {
        "message" => messages.push(Message::new(text("role")?, content(item.get("content"))?)),
        "function_call" => {
            let call = json!({
                "id": text("call_id")?,
                "type": "function",
                "function": {"name": text("name")?, "arguments": text("arguments")?},
            });
            // Calls belong to the answer that they are part of.
            if messages.last().is_none_or(|last| last.role != "assistant") {
                messages.push(Message::new("assistant", ""));
            }
            if let Some(last) = messages.last_mut() {
                let calls = last.extra.entry("tool_calls").or_insert_with(|| json!([]));
                if let Value::Array(calls) = calls {
                    calls.push(call);
                }
            }
        }
        "function_call_output" => {
            let mut message = Message::new("tool", content(item.get("output"))?);
            let id = text("call_id")?.into();
            message.extra.insert("tool_call_id".to_owned(), id);
            messages.push(message);
        }
        // What the model thought then is not shown to it again.
        "reasoning" => {}
        kind => {
            return Err(format!(
                "has type {kind:?}, expected \"message\", \"function_call\", \
                 \"function_call_output\" or \"reasoning\""
            ));
        }
    }
    Ok(())
}

/// The text of a message or of a call's output.
fn content(content: Option<&Value>) -> Result<String, String> {
    let parts = match content {
        None | Some(Value::Null) => return Ok(String::new()),
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err("has content that is no text and no list of parts".to_owned()),
    };
    let texts = parts.iter().map(|part| {
        let field = match part.get("type").and_then(Value::as_str) {
            Some("input_text" | "output_text" | "text") => "text",
            Some("refusal") => "refusal",
            kind => {
                let kind = kind.unwrap_or("no type");
                return Err(format!(
                    "has a part of type {kind:?}, expected \"input_text\""
                ));
            }
        };
        let text = part.get(field).and_then(Value::as_str);
        text.ok_or_else(|| format!("has a part without {field}"))
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(input: Value) -> Result<Vec<Message>, String> {
        let input: Input = serde_json::from_value(input).map_err(|error| error.to_string())?;
        let mut messages = Vec::new();
        let appended = input.append_to(&mut messages);
        appended.map_err(|error| error.body.message)?;
        Ok(messages)
    }

    #[test]
    fn items_become_messages() {
        let messages = read(json!([
            {"role": "user", "content": "Hi"},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"},
            ]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call", "call_id": "c3", "name": "h", "arguments": "{}"},
        ]))
        .unwrap();
        let call = |id: &str, name: &str| {
            let function = json!({"name": name, "arguments": "{}"});
            json!({"id": id, "type": "function", "function": function})
        };
        let expected: Vec<Message> = serde_json::from_value(json!([
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "I look.",
             "tool_calls": [call("c1", "f"), call("c2", "g")]},
            {"role": "tool", "content": "one", "tool_call_id": "c1"},
            {"role": "assistant", "content": "", "tool_calls": [call("c3", "h")]},
        ]))
        .unwrap();
        assert_eq!(messages, expected);
        assert_eq!(read(json!("Hi")).unwrap(), [Message::new("user", "Hi")]);
    }

    #[test]
    fn wrong_items_are_named() {
        for (input, problem) in [
            (json!(5), "expected a text or a list of items"),
            (json!([{"role": "user"}, {}]), "input[1] has no type"),
            (
                json!([{"type": "item_reference", "id": "x"}]),
                "\"item_reference\"",
            ),
            (
                json!([{"type": "function_call", "call_id": "c", "name": "f"}]),
                "has no arguments",
            ),
            (
                json!([{"role": "user", "content": [{"type": "input_image"}]}]),
                "input[0] has a part of type \"input_image\"",
            ),
            (
                json!([{"role": "user", "content": 5}]),
                "no text and no list",
            ),
        ] {
            let error = read(input).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
