//! Stores responses, so that clients can retrieve and continue them.

use crate::server::error::ApiError;
use crate::text::Message;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Maximum number of responses that are stored; the oldest is removed first.
const MAX_RESPONSES: usize = 1024;

/// Maximum size of the stored responses in bytes.
const MAX_BYTES: usize = 64 << 20;

/// The latest responses, kept in memory.
#[derive(Debug, Default)]
pub(crate) struct Store(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    responses: HashMap<String, Entry>,
    /// The items of all responses and of their inputs, by id.
    items: HashMap<String, Item>,
    /// The ids of the responses, oldest first.
    order: VecDeque<String>,
    bytes: usize,
}

/// A response, with each part as JSON.
#[derive(Debug)]
struct Entry {
    response: String,
    /// The conversation before the response, and the response, as messages.
    conversation: String,
    /// The ids of the items of its input, in order.
    input: Vec<String>,
    /// The ids of all items that the response owns.
    items: Vec<String>,
    bytes: usize,
}

/// An item, and the id of the response that owns it.
#[derive(Debug)]
struct Item {
    response: String,
    json: Arc<str>,
}

impl Store {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a response with the items of its input, and removes the oldest responses if a
    /// limit is exceeded.
    pub fn keep(&self, id: &str, response: &Value, conversation: &[Message], input: &[Value]) {
        let output = response.get("output").and_then(Value::as_array);
        let output = output.map_or(&[][..], Vec::as_slice);
        let named = |items: &[Value]| -> Vec<(String, String)> {
            let named = items.iter().filter_map(|item| {
                let id = item.get("id")?.as_str()?;
                Some((id.to_owned(), item.to_string()))
            });
            named.collect()
        };
        let (input, output) = (named(input), named(output));
        let mut entry = Entry {
            response: response.to_string(),
            conversation: serde_json::to_string(conversation).unwrap_or_default(),
            input: input.iter().map(|(id, _)| id.clone()).collect(),
            items: Vec::new(),
            bytes: 0,
        };
        let items = input.iter().chain(&output);
        let items: usize = items.map(|(id, json)| 4 * id.len() + json.len()).sum();
        entry.bytes = entry.response.len() + entry.conversation.len() + items;
        if entry.bytes > MAX_BYTES {
            return;
        }
        let mut kept = self.kept();
        kept.bytes += entry.bytes;
        for (item, json) in input.into_iter().chain(output) {
            // An item that a client sends back still belongs to the response that had it first.
            if !kept.items.contains_key(&item) {
                let (response, json) = (id.to_owned(), json.into());
                kept.items.insert(item.clone(), Item { response, json });
                entry.items.push(item);
            }
        }
        kept.responses.insert(id.to_owned(), entry);
        kept.order.push_back(id.to_owned());
        while kept.order.len() > MAX_RESPONSES || kept.bytes > MAX_BYTES {
            let Some(oldest) = kept.order.pop_front() else {
                return;
            };
            kept.remove(&oldest);
        }
    }

    /// Returns a response as JSON; 404 if it is not stored.
    pub fn response(&self, id: &str) -> Result<String, ApiError> {
        let kept = self.kept();
        let entry = kept.responses.get(id);
        entry
            .map(|entry| entry.response.clone())
            .ok_or_else(|| missing(id).code("response_not_found"))
    }

    /// Returns an item as JSON, whichever response it belongs to.
    pub fn item(&self, id: &str) -> Option<Arc<str>> {
        let kept = self.kept();
        kept.items.get(id).map(|item| Arc::clone(&item.json))
    }

    /// Returns the items of a response's input as JSON, each with its id; 404 if the response
    /// is not stored. Items of an earlier response that has been removed are missing.
    pub fn input(&self, id: &str) -> Result<Vec<(String, Arc<str>)>, ApiError> {
        let kept = self.kept();
        let entry = kept.responses.get(id);
        let entry = entry.ok_or_else(|| missing(id).code("response_not_found"))?;
        let items = entry.input.iter().filter_map(|id| {
            let item = kept.items.get(id)?;
            Some((id.clone(), Arc::clone(&item.json)))
        });
        Ok(items.collect())
    }

    /// Returns the conversation up to and including a response, to be continued.
    pub fn conversation(&self, id: &str) -> Result<Vec<Message>, ApiError> {
        let conversation = {
            let kept = self.kept();
            let entry = kept.responses.get(id);
            entry.map(|entry| entry.conversation.clone())
        };
        conversation
            .and_then(|json| serde_json::from_str(&json).ok())
            .ok_or_else(|| {
                missing(id)
                    .param("previous_response_id")
                    .code("previous_response_not_found")
            })
    }

    /// Removes a response.
    pub fn delete(&self, id: &str) -> Result<(), ApiError> {
        let mut kept = self.kept();
        match kept.remove(id) {
            true => {
                kept.order.retain(|other| other != id);
                Ok(())
            }
            false => Err(missing(id).code("response_not_found")),
        }
    }
}

impl Kept {
    fn remove(&mut self, id: &str) -> bool {
        let Some(entry) = self.responses.remove(id) else {
            return false;
        };
        self.bytes -= entry.bytes;
        for item in entry.items {
            if self
                .items
                .get(&item)
                .is_some_and(|item| item.response == id)
            {
                self.items.remove(&item);
            }
        }
        true
    }
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!(
        "there is no response {id:?}, or it has been removed"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_response_is_kept_until_it_is_deleted() {
        let store = Store::default();
        let conversation = [Message::new("user", "a"), Message::new("assistant", "b")];
        store.keep("x", &json!({"id": "x"}), &conversation, &[]);
        assert_eq!(store.response("x").unwrap(), r#"{"id":"x"}"#);
        assert_eq!(store.conversation("x").unwrap(), conversation);
        store.delete("x").unwrap();
        assert!(store.delete("x").is_err());
        let error = store.conversation("x").unwrap_err();
        assert_eq!(error.status, 404);
        assert_eq!(error.body.code, Some("previous_response_not_found"));
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.order.len()), (0, 0));
    }

    #[test]
    fn the_oldest_are_forgotten_when_there_are_too_many() {
        let store = Store::default();
        for index in 0..MAX_RESPONSES + 2 {
            store.keep(&index.to_string(), &json!({}), &[], &[]);
        }
        assert!(store.response("1").is_err());
        assert!(store.response("2").is_ok());
        assert_eq!(store.kept().responses.len(), MAX_RESPONSES);
    }

    #[test]
    fn the_oldest_are_forgotten_when_they_are_too_large() {
        let store = Store::default();
        let large = [Message::new("user", "x".repeat(MAX_BYTES / 2))];
        store.keep("a", &json!({}), &large, &[]);
        store.keep("b", &json!({}), &large, &[]);
        assert!(store.response("a").is_err());
        assert!(store.response("b").is_ok());
        let huge = [Message::new("user", "x".repeat(MAX_BYTES))];
        store.keep("c", &json!({}), &huge, &[]);
        assert!(store.response("b").is_ok() && store.response("c").is_err());
        assert!(store.kept().bytes <= MAX_BYTES);
    }

    #[test]
    fn items_are_found_as_long_as_their_response_is_kept() {
        let store = Store::default();
        let item = |id: &str| json!({"id": id, "type": "message"});
        store.keep("x", &json!({"output": [item("b")]}), &[], &[item("a")]);
        // An item that is sent back is still owned by the first response.
        store.keep(
            "y",
            &json!({"output": [item("d")]}),
            &[],
            &[item("b"), item("c")],
        );
        let ids = |response: &str| -> Vec<String> {
            let items = store.input(response).unwrap();
            items.into_iter().map(|(id, _)| id).collect()
        };
        assert_eq!(
            (ids("x"), ids("y")),
            (vec!["a".into()], vec!["b".into(), "c".into()])
        );
        assert_eq!(store.item("d").as_deref(), Some(&*item("d").to_string()));
        store.delete("x").unwrap();
        assert!(store.item("a").is_none() && store.item("b").is_none());
        assert_eq!(ids("y"), ["c"]);
        assert_eq!(store.input("x").unwrap_err().status, 404);
        store.delete("y").unwrap();
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.items.len()), (0, 0));
    }
}
