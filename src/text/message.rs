//! One message of a conversation, as OpenAI clients write it.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// A message for a chat template.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what the template knows.
    pub role: String,
    /// What is said. Read from a string, from null or nothing (empty), or from a
    /// list of text parts (joined with line breaks).
    #[serde(default, deserialize_with = "content")]
    pub content: String,
    /// All else, such as `tool_calls`; the template sees it unchanged.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A message that is only text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            extra: Map::new(),
        }
    }
}

/// The ways in which clients write text.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "content must be a string, null or a list of parts"
)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
    Nothing(()),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

fn content<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let parts = match Content::deserialize(deserializer)? {
        Content::Text(text) => return Ok(text),
        Content::Nothing(()) => return Ok(String::new()),
        Content::Parts(parts) => parts,
    };
    let texts: Vec<String> = parts
        .into_iter()
        .map(|part| match part {
            Part {
                kind,
                text: Some(text),
            } if kind == "text" => Ok(text),
            Part { kind, .. } => Err(serde::de::Error::custom(format!(
                "content part has type {kind:?}, expected \"text\" with a text"
            ))),
        })
        .collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
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
        let error = read(json!(5)).unwrap_err();
        assert!(error.contains("must be a string"), "{error}");
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
