//! The input of a response: a text, or items of a conversation.

use super::store::Store;
use crate::server::error::ApiError;
use crate::server::http::auth::Owner;
use crate::text::Message;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Value, json};
use std::fmt;
use uuid::Uuid;

/// The `input` of a request.
#[derive(Clone, Debug)]
pub(super) enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputVisitor)
    }
}

/// Reads the input directly. An untagged enum would copy everything first, and would not refuse
/// a list of numbers at its first element.
struct InputVisitor;

impl<'de> Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or a list of items")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Input, E> {
        Ok(Input::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Input, A::Error> {
        let mut items = Vec::new();
        while let Some(fields) = list.next_element()? {
            items.push(Value::Object(fields));
        }
        Ok(Input::Items(items))
    }
}

impl Input {
    /// Returns the items of the input, with references replaced by the items of the owner's
    /// earlier responses. The items put in may have at most `limit` bytes together.
    pub fn items(self, store: &Store, owner: Owner, limit: usize) -> Result<Vec<Value>, ApiError> {
        let mut items = match self {
            Self::Text(text) => vec![json!({"role": "user", "content": text})],
            Self::Items(items) => items,
        };
        let mut bytes = 0;
        for (index, item) in items.iter_mut().enumerate() {
            let Some(id) = reference(item) else {
                continue;
            };
            let place = || format!("input[{index}]");
            let found = store.item(owner, id).ok_or_else(|| {
                let problem = format!(
                    "{}: there is no item {id:?}, or it has been removed",
                    place()
                );
                let error = ApiError::not_found(problem).param(place());
                error.code("item_not_found")
            })?;
            bytes += found.len();
            if bytes > limit {
                let problem = format!(
                    "{}: the referenced items have more than {limit} bytes in total",
                    place(),
                );
                return Err(ApiError::invalid(problem).param(place()));
            }
            *item = serde_json::from_str(&found).unwrap_or_default();
        }
        Ok(items)
    }
}

/// Returns the id of the item that this one refers to, if it is a reference.
fn reference(item: &Value) -> Option<&str> {
    let id = item.get("id")?.as_str()?;
    match item.get("type") {
        Some(Value::String(kind)) if kind == "item_reference" => Some(id),
        None | Some(Value::Null) if item.get("role").is_none() => Some(id),
        _ => None,
    }
}

/// Appends items to a conversation. They may include items of an answer.
pub(super) fn append_all(items: &[Value], messages: &mut Vec<Message>) -> Result<(), ApiError> {
    for (index, item) in items.iter().enumerate() {
        append(item, messages).map_err(|problem| {
            let place = format!("input[{index}]");
            ApiError::invalid(format!("{place} {problem}")).param(place)
        })?;
    }
    Ok(())
}

/// Returns items in the form in which they are listed: each has an id, a type and a status, and
/// a message's text is a list of parts.
pub(super) fn listed(items: Vec<Value>) -> Vec<Value> {
    let each = items.into_iter().map(|mut item| {
        if let Value::Object(fields) = &mut item {
            let kind = fields.get("type").and_then(Value::as_str);
            let kind = kind.unwrap_or("message").to_owned();
            if fields.get("id").is_none_or(|id| !id.is_string()) {
                let prefix = match kind.as_str() {
                    "message" => "msg",
                    "function_call" => "fc",
                    "function_call_output" => "fco",
                    "reasoning" => "rs",
                    _ => "item",
                };
                fields.insert("id".to_owned(), new_id(prefix).into());
            }
            if kind == "message" {
                let answer = fields.get("role").is_some_and(|role| role == "assistant");
                if let Some(content) = fields.get_mut("content")
                    && let Value::String(text) = content
                {
                    let text = std::mem::take(text);
                    *content = match answer {
                        true => json!([{"type": "output_text", "text": text, "annotations": []}]),
                        false => json!([{"type": "input_text", "text": text}]),
                    };
                }
            }
            fields.insert("type".to_owned(), kind.into());
            fields.entry("status").or_insert_with(|| "completed".into());
        }
        item
    });
    each.collect()
}

/// Returns a new id that begins with `prefix`.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::new_v4().simple())
}

/// Appends one item. The error says what is wrong with it.
fn append(item: &Value, messages: &mut Vec<Message>) -> Result<(), String> {
    let text = |name: &str| match item.get(name) {
        Some(Value::String(text)) => Ok(text.as_str()),
        _ => Err(format!("has no {name}, or one that is not a string")),
    };
    let kind = match item.get("type") {
        None | Some(Value::Null) if item.get("role").is_some() => "message",
        _ => text("type")?,
    };
    match kind {
        // A call of a tool with free-text input, made on a server that has such tools.
        "custom_tool_call" => {
            let arguments = json!({"input": text("input")?}).to_string();
            append_call(text("call_id")?, text("name")?, &arguments, messages);
        }
        "message" => messages.push(Message::new(text("role")?, content(item.get("content"))?)),
        "function_call" => {
            append_call(
                text("call_id")?,
                text("name")?,
                text("arguments")?,
                messages,
            );
        }
        "function_call_output" | "custom_tool_call_output" => {
            let mut message = Message::new("tool", content(item.get("output"))?);
            let id = text("call_id")?.into();
            message.extra.insert("tool_call_id".to_owned(), id);
            messages.push(message);
        }
        // References with an id have been replaced, so this one has none.
        "item_reference" => drop(text("id")?),
        // Earlier reasoning is not shown to the model again. Neither are the actions of other
        // servers' tools: their results are part of the answers that followed.
        "reasoning" => {}
        kind if HOSTED.contains(&kind) => {
            tracing::debug!(kind, "skipped an item of a tool that is not supported");
        }
        kind => {
            return Err(format!(
                "has type {kind:?}, expected \"message\", \"function_call\", \
                 \"function_call_output\", \"item_reference\" or \"reasoning\""
            ));
        }
    }
    Ok(())
}

/// Items of tools that run on OpenAI's servers.
const HOSTED: [&str; 9] = [
    "code_interpreter_call",
    "computer_call",
    "file_search_call",
    "image_generation_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "web_search_call",
];

/// Appends a call to the answer that it is part of.
fn append_call(id: &str, name: &str, arguments: &str, messages: &mut Vec<Message>) {
    let call = json!({
        "id": id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    });
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

/// Returns the text of a message or of a call's output.
fn content(content: Option<&Value>) -> Result<String, String> {
    let parts = match content {
        None | Some(Value::Null) => return Ok(String::new()),
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err("has content that is neither a text nor a list of parts".to_owned()),
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
        let items = input.items(&Store::default(), Owner::default(), 1000);
        let appended = items.and_then(|items| append_all(&items, &mut messages));
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
                json!([{"role": "user", "content": "a"}, {"type": "item_reference", "id": "x"}]),
                "input[1]: there is no item \"x\"",
            ),
            (
                json!([{"type": "memory", "id": "x"}]),
                "has type \"memory\"",
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
                "neither a text nor a list",
            ),
        ] {
            let error = read(input).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn items_of_tools_of_another_server_do_no_harm() {
        let messages = read(json!([
            {"role": "user", "content": "Hi"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "a\n"},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        ]))
        .unwrap();
        let roles: Vec<_> = messages.iter().map(|message| &*message.role).collect();
        assert_eq!(roles, ["user", "assistant", "tool"]);
        let call = &messages[1].extra["tool_calls"][0]["function"];
        assert_eq!(
            call,
            &json!({"name": "patch", "arguments": "{\"input\":\"a\\n\"}"})
        );
    }

    #[test]
    fn references_are_the_items_that_they_refer_to_within_limits() {
        let store = Store::default();
        let answer = json!({"type": "message", "id": "msg_1", "role": "assistant", "content": "A"});
        store.keep(
            Owner::default(),
            "r",
            &json!({"output": [answer]}),
            &[],
            &[],
        );
        let input = |count: usize| {
            let mut items = vec![json!({"type": "item_reference", "id": "msg_1"}); count];
            items.push(json!({"id": "msg_1"}));
            Input::Items(items)
        };
        let bytes = answer.to_string().len();
        let items = input(1).items(&store, Owner::default(), 2 * bytes).unwrap();
        assert_eq!(items, [answer.clone(), answer]);
        let error = input(1)
            .items(&store, Owner::default(), 2 * bytes - 1)
            .unwrap_err();
        assert_eq!(error.body.param.as_deref(), Some("input[1]"));
        assert_eq!(error.status, 400);
        store.delete(Owner::default(), "r").unwrap();
        let error = input(0)
            .items(&store, Owner::default(), 2 * bytes)
            .unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.body.code),
            (404, Some("item_not_found"))
        );
    }

    #[test]
    fn listed_items_have_ids_types_and_parts() {
        let items = listed(vec![
            json!({"role": "user", "content": "Hi"}),
            json!({"type": "message", "id": "msg_1", "role": "assistant", "content": "Yes"}),
            json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
        ]);
        assert!(items[0]["id"].as_str().unwrap().starts_with("msg_"));
        assert_eq!(items[0]["type"], "message");
        assert_eq!(
            items[0]["content"],
            json!([{"type": "input_text", "text": "Hi"}])
        );
        assert_eq!(items[1]["id"], "msg_1");
        assert_eq!(items[1]["content"][0]["type"], "output_text");
        assert!(items[2]["id"].as_str().unwrap().starts_with("fc_"));
        assert!(items.iter().all(|item| item["status"] == "completed"));
    }
}
