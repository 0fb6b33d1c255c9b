//! Stores responses, so that clients can retrieve and continue them. A response and its items
//! exist only for their owner: for anybody else, the same ids name nothing.

use crate::server::error::ApiError;
use crate::server::http::auth::Owner;
use crate::text::Message;
use serde_json::Value;
use std::collections::{HashMap, VecDeque, hash_map};
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
    responses: HashMap<Name, Entry>,
    /// The items of all responses and of their inputs.
    items: HashMap<Name, Item>,
    /// The names of the responses, oldest first.
    order: VecDeque<Name>,
    bytes: usize,
}

/// The owner of a response or an item, and its id. Clients choose the ids of some items, so an
/// id alone does not say which one is meant.
type Name = (Owner, String);

/// Returns the name of something that belongs to `owner`.
fn name(owner: Owner, id: &str) -> Name {
    (owner, id.to_owned())
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
    pub fn keep(
        &self,
        owner: Owner,
        id: &str,
        response: &Value,
        conversation: &[Message],
        input: &[Value],
    ) {
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
            if let hash_map::Entry::Vacant(place) = kept.items.entry(name(owner, &item)) {
                let (response, json) = (id.to_owned(), json.into());
                place.insert(Item { response, json });
                entry.items.push(item);
            }
        }
        kept.responses.insert(name(owner, id), entry);
        kept.order.push_back(name(owner, id));
        while kept.order.len() > MAX_RESPONSES || kept.bytes > MAX_BYTES {
            let Some(oldest) = kept.order.pop_front() else {
                return;
            };
            kept.remove(&oldest);
        }
    }

    /// Returns a response as JSON; 404 if it is not stored.
    pub fn response(&self, owner: Owner, id: &str) -> Result<String, ApiError> {
        let kept = self.kept();
        let entry = kept.responses.get(&name(owner, id));
        entry
            .map(|entry| entry.response.clone())
            .ok_or_else(|| missing(id).code("response_not_found"))
    }

    /// Returns an item of its owner as JSON, whichever response it belongs to.
    pub fn item(&self, owner: Owner, id: &str) -> Option<Arc<str>> {
        let kept = self.kept();
        kept.items
            .get(&name(owner, id))
            .map(|item| Arc::clone(&item.json))
    }

    /// Returns the items of a response's input as JSON, each with its id; 404 if the response
    /// is not stored. Items of an earlier response that has been removed are missing.
    pub fn input(&self, owner: Owner, id: &str) -> Result<Vec<(String, Arc<str>)>, ApiError> {
        let kept = self.kept();
        let entry = kept.responses.get(&name(owner, id));
        let entry = entry.ok_or_else(|| missing(id).code("response_not_found"))?;
        let items = entry.input.iter().filter_map(|id| {
            let item = kept.items.get(&name(owner, id))?;
            Some((id.clone(), Arc::clone(&item.json)))
        });
        Ok(items.collect())
    }

    /// Returns the conversation up to and including a response, to be continued.
    pub fn conversation(&self, owner: Owner, id: &str) -> Result<Vec<Message>, ApiError> {
        let conversation = {
            let kept = self.kept();
            let entry = kept.responses.get(&name(owner, id));
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
    pub fn delete(&self, owner: Owner, id: &str) -> Result<(), ApiError> {
        let mut kept = self.kept();
        let place = name(owner, id);
        match kept.remove(&place) {
            true => {
                kept.order.retain(|other| *other != place);
                Ok(())
            }
            false => Err(missing(id).code("response_not_found")),
        }
    }
}

impl Kept {
    fn remove(&mut self, response: &Name) -> bool {
        let Some(entry) = self.responses.remove(response) else {
            return false;
        };
        self.bytes -= entry.bytes;
        let (owner, id) = response;
        for item in entry.items {
            let place = (*owner, item);
            if (self.items.get(&place)).is_some_and(|item| item.response == *id) {
                self.items.remove(&place);
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
        store.keep(
            Owner::default(),
            "x",
            &json!({"id": "x"}),
            &conversation,
            &[],
        );
        assert_eq!(
            store.response(Owner::default(), "x").unwrap(),
            r#"{"id":"x"}"#
        );
        assert_eq!(
            store.conversation(Owner::default(), "x").unwrap(),
            conversation
        );
        store.delete(Owner::default(), "x").unwrap();
        assert!(store.delete(Owner::default(), "x").is_err());
        let error = store.conversation(Owner::default(), "x").unwrap_err();
        assert_eq!(error.status, 404);
        assert_eq!(error.body.code, Some("previous_response_not_found"));
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.order.len()), (0, 0));
    }

    #[test]
    fn the_oldest_are_forgotten_when_there_are_too_many() {
        let store = Store::default();
        for index in 0..MAX_RESPONSES + 2 {
            store.keep(Owner::default(), &index.to_string(), &json!({}), &[], &[]);
        }
        assert!(store.response(Owner::default(), "1").is_err());
        assert!(store.response(Owner::default(), "2").is_ok());
        assert_eq!(store.kept().responses.len(), MAX_RESPONSES);
    }

    #[test]
    fn the_oldest_are_forgotten_when_they_are_too_large() {
        let store = Store::default();
        let large = [Message::new("user", "x".repeat(MAX_BYTES / 2))];
        store.keep(Owner::default(), "a", &json!({}), &large, &[]);
        store.keep(Owner::default(), "b", &json!({}), &large, &[]);
        assert!(store.response(Owner::default(), "a").is_err());
        assert!(store.response(Owner::default(), "b").is_ok());
        let huge = [Message::new("user", "x".repeat(MAX_BYTES))];
        store.keep(Owner::default(), "c", &json!({}), &huge, &[]);
        assert!(
            store.response(Owner::default(), "b").is_ok()
                && store.response(Owner::default(), "c").is_err()
        );
        assert!(store.kept().bytes <= MAX_BYTES);
    }

    #[test]
    fn items_are_found_as_long_as_their_response_is_kept() {
        let store = Store::default();
        let item = |id: &str| json!({"id": id, "type": "message"});
        store.keep(
            Owner::default(),
            "x",
            &json!({"output": [item("b")]}),
            &[],
            &[item("a")],
        );
        // An item that is sent back is still owned by the first response.
        store.keep(
            Owner::default(),
            "y",
            &json!({"output": [item("d")]}),
            &[],
            &[item("b"), item("c")],
        );
        let ids = |response: &str| -> Vec<String> {
            let items = store.input(Owner::default(), response).unwrap();
            items.into_iter().map(|(id, _)| id).collect()
        };
        assert_eq!(
            (ids("x"), ids("y")),
            (vec!["a".into()], vec!["b".into(), "c".into()])
        );
        assert_eq!(
            store.item(Owner::default(), "d").as_deref(),
            Some(&*item("d").to_string())
        );
        store.delete(Owner::default(), "x").unwrap();
        assert!(
            store.item(Owner::default(), "a").is_none()
                && store.item(Owner::default(), "b").is_none()
        );
        assert_eq!(ids("y"), ["c"]);
        assert_eq!(store.input(Owner::default(), "x").unwrap_err().status, 404);
        store.delete(Owner::default(), "y").unwrap();
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.items.len()), (0, 0));
    }

    #[test]
    fn responses_and_items_exist_only_for_their_owner() {
        let store = Store::default();
        let [us, them] = [0, 1].map(|key| Owner::of_key(Some(key)));
        let item = |text: &str| json!({"id": "shared", "type": "message", "content": text});
        let answer = json!({"id": "x", "output": [{"id": "ours"}]});
        store.keep(
            us,
            "x",
            &answer,
            &[Message::new("user", "a")],
            &[item("secret")],
        );
        assert!(store.response(us, "x").is_ok() && store.item(us, "ours").is_some());
        assert!(store.item(them, "ours").is_none());
        for error in [
            store.response(them, "x").unwrap_err(),
            store.input(them, "x").unwrap_err(),
            store.delete(them, "x").unwrap_err(),
            store.conversation(them, "x").unwrap_err(),
        ] {
            assert_eq!(error.status, 404);
        }
        // An item of the same id is another one if it comes from somebody else.
        store.keep(them, "y", &json!({}), &[], &[item("guess")]);
        let listed = store.input(them, "y").unwrap();
        assert_eq!(*listed[0].1, item("guess").to_string());
        store.delete(them, "y").unwrap();
        assert_eq!(
            *store.input(us, "x").unwrap()[0].1,
            item("secret").to_string()
        );
        store.delete(us, "x").unwrap();
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.items.len(), kept.order.len()), (0, 0, 0));
    }
}
