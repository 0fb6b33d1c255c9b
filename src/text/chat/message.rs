//! Message of a conversation, in the format of OpenAI clients.

use super::python_json::{Style, dumps};
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::fmt;

/// Message for a chat template.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Message {
    /// Role of the speaker: `system`, `user`, `assistant`, `tool`, or another that the
    /// template knows.
    pub role: String,
    /// Text of the message. Deserialized from a string, from null or a missing field
    /// (empty), or from a list of text parts (joined with line breaks).
    pub content: String,
    /// All other fields, such as `tool_calls`. The template sees them unchanged, except
    /// that the arguments of tool calls are parsed from JSON text, as clients send them,
    /// into objects.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// Creates a message that consists only of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }

    /// Returns the message with the arguments of its tool calls as objects, which most
    /// templates expect. Returns `None` if none of them are JSON text.
    pub(super) fn with_arguments_as_objects(&self) -> Option<Self> {
        let calls = self.extra.get("tool_calls")?.as_array()?;
        let mut calls = calls.clone();
        let mut changed = false;
        for call in &mut calls {
            let Some(arguments) = arguments_of(call) else {
                continue;
            };
            if let Some(object) = arguments.as_str().and_then(object) {
                *arguments = object;
                changed = true;
            }
        }
        changed.then(|| {
            let mut message = self.clone();
            message.extra.insert("tool_calls".to_owned(), calls.into());
            message
        })
    }

    /// Returns the message with the arguments of its tool calls as JSON text, which a few
    /// templates expect.
    pub(super) fn with_arguments_as_text(&self) -> Self {
        let mut message = self.clone();
        let calls = message.extra.get_mut("tool_calls");
        for call in calls.and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(arguments) = arguments_of(call)
                && arguments.is_object()
                && let Ok(text) = dumps(
                    &minijinja::Value::from_serialize(&*arguments),
                    &Style::default(),
                )
            {
                *arguments = text.into();
            }
        }
        message
    }
}

/// Message as a template sees it.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum MessageView<'a> {
    Whole(&'a Message),
    /// Tool calls without text; the content is null.
    OnlyCalls {
        role: &'a str,
        content: (),
        #[serde(flatten)]
        extra: &'a Map<String, Value>,
    },
}

impl Message {
    /// Returns the message as a template sees it. With `null_content`, the content of a
    /// message that has tool calls but no text is null instead of an empty string.
    pub(super) fn view(&self, null_content: bool) -> MessageView<'_> {
        let only_calls = self.content.is_empty() && self.extra.contains_key("tool_calls");
        match null_content && only_calls {
            true => MessageView::OnlyCalls {
                role: &self.role,
                content: (),
                extra: &self.extra,
            },
            false => MessageView::Whole(self),
        }
    }
}

/// Returns the arguments of a tool call, from its `function` field or from the call itself.
fn arguments_of(call: &mut Value) -> Option<&mut Value> {
    let call = call.as_object_mut()?;
    match call.contains_key("function") {
        true => call.get_mut("function")?.get_mut("arguments"),
        false => call.get_mut("arguments"),
    }
}

/// Parses JSON text that holds an object. Empty text counts as an empty object.
fn object(text: &str) -> Option<Value> {
    if text.trim().is_empty() {
        return Some(Map::new().into());
    }
    let value: Value = serde_json::from_str(text).ok()?;
    value.is_object().then_some(value)
}

// Messages are the largest part of most requests. They are deserialized by hand because
// serde's derived code first copies everything for flattened and untagged fields.

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MessageVisitor)
    }
}

struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Message;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a message: an object with a role")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Message, A::Error> {
        let mut role = None;
        let mut content = None;
        let mut extra = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "role" if role.is_some() => return Err(Error::duplicate_field("role")),
                "content" if content.is_some() => return Err(Error::duplicate_field("content")),
                "role" => role = Some(fields.next_value()?),
                "content" => content = Some(fields.next_value::<Content>()?.0),
                _ => {
                    let value = fields.next_value()?;
                    extra.insert(name, value);
                }
            }
        }
        Ok(Message {
            role: role.ok_or_else(|| Error::missing_field("role"))?,
            content: content.unwrap_or_default(),
            extra,
        })
    }
}

/// Text of a message, in any of the forms in which clients send it.
struct Content(String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor).map(Self)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = String;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("content that is a string, null or a list of parts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_string<E: Error>(self, text: String) -> Result<String, E> {
        Ok(text)
    }

    fn visit_unit<E: Error>(self) -> Result<String, E> {
        Ok(String::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<String, A::Error> {
        let mut content = String::new();
        let mut first = true;
        while let Some(part) = parts.next_element::<Part>()? {
            let text = match part {
                Part {
                    kind,
                    text: Some(text),
                    ..
                } if kind == "text" => text,
                // An assistant message from an earlier turn may contain a refusal.
                Part {
                    kind,
                    refusal: Some(text),
                    ..
                } if kind == "refusal" => text,
                Part { kind, .. } => {
                    return Err(Error::custom(format!(
                        "content part has type {kind:?}, expected type \"text\" with a text field"
                    )));
                }
            };
            if !std::mem::take(&mut first) {
                content.push('\n');
            }
            content.push_str(&text);
        }
        Ok(content)
    }
}

/// A part of a message's content.
struct Part {
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PartVisitor)
    }
}

/// Reads a part from an object. serde's derived code would also accept a list.
struct PartVisitor;

impl<'de> Visitor<'de> for PartVisitor {
    type Value = Part;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a part of a message: an object with a type")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Part, A::Error> {
        let (mut kind, mut text, mut refusal) = (None, None, None);
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "type" if kind.is_some() => return Err(Error::duplicate_field("type")),
                "text" if text.is_some() => return Err(Error::duplicate_field("text")),
                "type" => kind = Some(fields.next_value()?),
                "text" => text = fields.next_value()?,
                "refusal" => refusal = fields.next_value()?,
                _ => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Part {
            kind: kind.ok_or_else(|| Error::missing_field("type"))?,
            text,
            refusal,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn content_is_read_from_all_its_forms() {
        let read = |content: Value| {
            serde_json::from_value::<Message>(json!({"role": "user", "content": content}))
                .map(|message| message.content)
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(json!("hi")).unwrap(), "hi");
        assert_eq!(read(json!(null)).unwrap(), "");
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(read(parts).unwrap(), "a\nb");
        let error = read(json!([{"type": "image_url", "image_url": {}}])).unwrap_err();
        assert!(error.contains("\"image_url\""), "{error}");
        let error = read(json!([["text", "a", null]])).unwrap_err();
        assert!(error.contains("expected a part of a message"), "{error}");
        let error = read(json!(5)).unwrap_err();
        assert!(
            error.contains("expected content that is a string"),
            "{error}"
        );
    }

    #[test]
    fn arguments_in_json_text_become_objects() {
        let read = |calls: Value| -> Message {
            serde_json::from_value(json!({"role": "assistant", "tool_calls": calls})).unwrap()
        };
        let text = r#"{"b": 1, "a": {"c": "\""}}"#;
        let message = read(json!([
            {"id": "x", "function": {"name": "f", "arguments": text}},
            {"function": {"name": "g", "arguments": ""}},
            {"name": "h", "arguments": "{}"},
            {"function": {"name": "i", "arguments": "{broken"}},
            {"function": {"name": "j"}},
            "no call",
        ]));
        let changed = message.with_arguments_as_objects().unwrap();
        assert_eq!(
            changed.extra["tool_calls"],
            json!([
                {"id": "x", "function": {"name": "f", "arguments": {"b": 1, "a": {"c": "\""}}}},
                {"function": {"name": "g", "arguments": {}}},
                {"name": "h", "arguments": {}},
                {"function": {"name": "i", "arguments": "{broken"}},
                {"function": {"name": "j"}},
                "no call",
            ])
        );
        assert_eq!(changed.with_arguments_as_objects(), None);
        assert_eq!(Message::new("user", "").with_arguments_as_objects(), None);
    }

    #[test]
    fn unknown_fields_are_kept_in_their_order() {
        let text = r#"{"role":"assistant","content":"","tool_calls":[{"z":1,"a":2}],"name":"x"}"#;
        let message: Message = serde_json::from_str(text).unwrap();
        assert_eq!(message.extra["tool_calls"][0]["z"], 1);
        assert_eq!(serde_json::to_string(&message).unwrap(), text);
        let bare: Message = serde_json::from_str(r#"{"role":"assistant"}"#).unwrap();
        assert_eq!(bare, Message::new("assistant", ""));
    }
}
