//! Responses that are kept, so that clients can ask for them again and go on from them.

use super::super::error::ApiError;
use crate::text::Message;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Responses that are kept at most; the oldest goes first.
const MAX_RESPONSES: usize = 1024;

/// Their size at most, in bytes.
const MAX_BYTES: usize = 64 << 20;

/// Keeps the latest responses, in memory.
#[derive(Debug, Default)]
pub(crate) struct Store(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    responses: HashMap<String, Entry>,
    /// From the oldest on; some may be deleted.
    order: VecDeque<String>,
    bytes: usize,
}

/// A response, both parts as JSON.
#[derive(Debug)]
struct Entry {
    response: String,
    /// What came before the response, and the response, as messages.
    conversation: String,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.response.len() + self.conversation.len()
    }
}

impl Store {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a response, and forgets the oldest while there is too much.
    pub fn keep(&self, id: &str, response: &Value, conversation: &[Message]) {
        let entry = Entry {
            response: response.to_string(),
            conversation: serde_json::to_string(conversation).unwrap_or_default(),
        };
        if entry.bytes() > MAX_BYTES {
            return;
        }
        let mut kept = self.kept();
        kept.bytes += entry.bytes();
        kept.responses.insert(id.to_owned(), entry);
        kept.order.push_back(id.to_owned());
        while kept.order.len() > MAX_RESPONSES || kept.bytes > MAX_BYTES {
            let Some(oldest) = kept.order.pop_front() else {
                return;
            };
            kept.remove(&oldest);
        }
    }

    /// A response as JSON; 404 when it is not there.
    pub fn response(&self, id: &str) -> Result<String, ApiError> {
        let kept = self.kept();
        let entry = kept.responses.get(id);
        entry
            .map(|entry| entry.response.clone())
            .ok_or_else(|| missing(id).code("response_not_found"))
    }

    /// The conversation that goes on from a response.
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

    /// Forgets a response.
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
        let entry = self.responses.remove(id);
        self.bytes -= entry.as_ref().map_or(0, Entry::bytes);
        entry.is_some()
    }
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("there is no response {id:?}, or no longer"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_response_is_kept_until_it_is_deleted() {
        let store = Store::default();
        let conversation = [Message::new("user", "a"), Message::new("assistant", "b")];
        store.keep("x", &json!({"id": "x"}), &conversation);
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
            store.keep(&index.to_string(), &json!({}), &[]);
        }
        assert!(store.response("1").is_err());
        assert!(store.response("2").is_ok());
        assert_eq!(store.kept().responses.len(), MAX_RESPONSES);
    }

    #[test]
    fn the_oldest_are_forgotten_when_they_are_too_large() {
        let store = Store::default();
        let large = [Message::new("user", "x".repeat(MAX_BYTES / 2))];
        store.keep("a", &json!({}), &large);
        store.keep("b", &json!({}), &large);
        assert!(store.response("a").is_err());
        assert!(store.response("b").is_ok());
        let huge = [Message::new("user", "x".repeat(MAX_BYTES))];
        store.keep("c", &json!({}), &huge);
        assert!(store.response("b").is_ok() && store.response("c").is_err());
        assert!(store.kept().bytes <= MAX_BYTES);
    }
}
