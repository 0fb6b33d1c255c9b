//! The items of a response, and the events that report their progress.

use super::input::new_id;
use crate::server::openai::parts::{Part, call_id};
use crate::server::openai::sse::Events;
use serde_json::{Map, Value, json};

/// Numbers events and sends them, if the response is streamed.
pub(super) struct Feed<'a> {
    events: Option<&'a mut Events>,
    number: &'a mut u64,
}

impl<'a> Feed<'a> {
    pub fn new(events: Option<&'a mut Events>, number: &'a mut u64) -> Self {
        Self { events, number }
    }

    /// Sends an event with these fields.
    pub fn send(&mut self, kind: &'static str, fields: impl FnOnce() -> Value) {
        let Some(events) = &mut self.events else {
            return;
        };
        let mut event = Map::new();
        event.insert("type".to_owned(), kind.into());
        event.insert("sequence_number".to_owned(), (*self.number).into());
        if let Value::Object(fields) = fields() {
            event.extend(fields);
        }
        *self.number += 1;
        events.named(kind, &event);
    }
}

/// The items of a response so far.
#[derive(Debug, Default)]
pub(super) struct Output {
    done: Vec<Value>,
    open: Option<Item>,
    /// Log probabilities of tokens whose text has not arrived yet.
    reports: Vec<Value>,
}

/// An item that is not complete.
#[derive(Debug)]
struct Item {
    id: String,
    kind: Kind,
    /// The text, or the arguments of a call.
    text: String,
    /// The log probabilities of its tokens, if they are reported.
    logprobs: Vec<Value>,
}

#[derive(Debug)]
enum Kind {
    Reasoning,
    Message,
    Call { call_id: String, name: String },
}

impl Item {
    fn new(kind: Kind) -> Self {
        let prefix = match kind {
            Kind::Reasoning => "rs",
            Kind::Message => "msg",
            Kind::Call { .. } => "fc",
        };
        Self {
            id: new_id(prefix),
            kind,
            text: String::new(),
            logprobs: Vec::new(),
        }
    }

    fn is_message(&self) -> bool {
        matches!(self.kind, Kind::Message)
    }

    /// Returns the item with these parts, as clients see it.
    fn json(&self, status: &str, parts: &[Value]) -> Value {
        match &self.kind {
            Kind::Reasoning => json!({
                "id": self.id, "type": "reasoning", "summary": [], "content": parts,
                "status": status,
            }),
            Kind::Message => json!({
                "id": self.id, "type": "message", "status": status, "role": "assistant",
                "content": parts,
            }),
            Kind::Call { call_id, name } => json!({
                "id": self.id, "type": "function_call", "status": status, "call_id": call_id,
                "name": name, "arguments": self.text,
            }),
        }
    }

    /// Returns the item's text part; a call has none.
    fn part(&self) -> Option<Value> {
        match self.kind {
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": self.text})),
            Kind::Message => Some(json!({
                "type": "output_text", "text": self.text, "annotations": [],
                "logprobs": self.logprobs,
            })),
            Kind::Call { .. } => None,
        }
    }
}

impl Output {
    /// Returns the complete items.
    pub fn items(&self) -> &[Value] {
        &self.done
    }

    /// Takes the log probability of the next token. It belongs to the text that arrives next;
    /// tokens of calls and reasoning have none.
    pub fn report(&mut self, logprob: Value) {
        self.reports.push(logprob);
    }

    /// Adds a part of the answer.
    pub fn add(&mut self, part: Part, feed: &mut Feed<'_>) {
        match part {
            Part::Reasoning(text) => {
                if !self.is_open(|kind| matches!(kind, Kind::Reasoning)) {
                    self.begin(Kind::Reasoning, feed);
                }
                self.delta("response.reasoning_text.delta", &text, feed);
            }
            Part::Text(text) => {
                if !self.is_open(|kind| matches!(kind, Kind::Message)) {
                    self.begin(Kind::Message, feed);
                }
                self.delta("response.output_text.delta", &text, feed);
            }
            Part::CallBegin { name, .. } => {
                let call_id = call_id();
                self.begin(Kind::Call { call_id, name }, feed);
            }
            Part::CallArguments { delta, .. } => {
                self.delta("response.function_call_arguments.delta", &delta, feed);
            }
            Part::CallEnd => self.end("completed", feed),
        }
    }

    /// Ends the answer.
    pub fn finish(&mut self, status: &str, feed: &mut Feed<'_>) {
        if self.done.is_empty() && self.open.is_none() {
            // Clients expect a message, so an empty answer becomes an empty message.
            self.begin(Kind::Message, feed);
        }
        if let Some(item) = self.open.as_mut().filter(|item| item.is_message()) {
            // The remaining log probabilities belong to tokens without text.
            item.logprobs.append(&mut self.reports);
        }
        self.end(status, feed);
    }

    fn is_open(&self, wanted: impl FnOnce(&Kind) -> bool) -> bool {
        self.open.as_ref().is_some_and(|item| wanted(&item.kind))
    }

    fn begin(&mut self, kind: Kind, feed: &mut Feed<'_>) {
        self.end("completed", feed);
        let (item, place) = (Item::new(kind), self.done.len());
        feed.send(
            "response.output_item.added",
            || json!({"output_index": place, "item": item.json("in_progress", &[])}),
        );
        if let Some(part) = item.part() {
            feed.send("response.content_part.added", || {
                json!({
                    "item_id": item.id, "output_index": place, "content_index": 0, "part": part,
                })
            });
        }
        self.open = Some(item);
    }

    fn delta(&mut self, event: &'static str, text: &str, feed: &mut Feed<'_>) {
        let place = self.done.len();
        let Some(item) = &mut self.open else {
            return;
        };
        item.text.push_str(text);
        let reports = std::mem::take(&mut self.reports);
        if item.is_message() {
            item.logprobs.extend_from_slice(&reports);
        }
        feed.send(event, || {
            let mut fields = json!({"item_id": item.id, "output_index": place, "delta": text});
            if !matches!(item.kind, Kind::Call { .. }) {
                fields["content_index"] = 0.into();
            }
            if item.is_message() {
                fields["logprobs"] = reports.into();
            }
            fields
        });
    }

    /// Completes the open item, if there is one.
    fn end(&mut self, status: &str, feed: &mut Feed<'_>) {
        let place = self.done.len();
        let Some(item) = self.open.take() else {
            return;
        };
        let part = item.part();
        feed.send(
            match item.kind {
                Kind::Reasoning => "response.reasoning_text.done",
                Kind::Message => "response.output_text.done",
                Kind::Call { .. } => "response.function_call_arguments.done",
            },
            || {
                let mut fields = json!({"item_id": item.id, "output_index": place});
                match &item.kind {
                    Kind::Call { name, .. } => {
                        fields["name"] = name.as_str().into();
                        fields["arguments"] = item.text.as_str().into();
                    }
                    kind => {
                        fields["content_index"] = 0.into();
                        fields["text"] = item.text.as_str().into();
                        if matches!(kind, Kind::Message) {
                            fields["logprobs"] = item.logprobs.clone().into();
                        }
                    }
                }
                fields
            },
        );
        if let Some(part) = &part {
            feed.send("response.content_part.done", || {
                json!({
                    "item_id": item.id, "output_index": place, "content_index": 0, "part": part,
                })
            });
        }
        let json = item.json(status, part.as_slice());
        feed.send(
            "response.output_item.done",
            || json!({"output_index": place, "item": json}),
        );
        self.done.push(json);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(parts: Vec<Part>, status: &str) -> (Vec<Value>, u64) {
        let mut events = Events::default();
        let mut number = 0;
        let mut feed = Feed::new(Some(&mut events), &mut number);
        let mut output = Output::default();
        for part in parts {
            output.add(part, &mut feed);
        }
        output.finish(status, &mut feed);
        (output.items().to_vec(), number)
    }

    #[test]
    fn parts_become_items() {
        let begin = |name: &str| Part::CallBegin {
            index: 0,
            name: name.to_owned(),
        };
        let arguments = |delta: &str| Part::CallArguments {
            index: 0,
            delta: delta.to_owned(),
        };
        let (items, events) = output(
            vec![
                Part::Reasoning("a".to_owned()),
                Part::Reasoning("b".to_owned()),
                Part::Text("c".to_owned()),
                begin("f"),
                arguments("{"),
                arguments("}"),
                Part::CallEnd,
                begin("g"),
                arguments("{\"a"),
            ],
            "incomplete",
        );
        let kinds: Vec<_> = items
            .iter()
            .map(|item| item["type"].as_str().unwrap())
            .collect();
        assert_eq!(
            kinds,
            ["reasoning", "message", "function_call", "function_call"]
        );
        assert_eq!(items[0]["content"][0]["text"], "ab");
        assert_eq!(items[1]["content"][0]["text"], "c");
        assert_eq!(items[2]["arguments"], "{}");
        assert_eq!(items[3]["arguments"], "{\"a");
        let statuses: Vec<_> = items
            .iter()
            .map(|item| item["status"].as_str().unwrap())
            .collect();
        assert_eq!(
            statuses,
            ["completed", "completed", "completed", "incomplete"]
        );
        // Five events around each text, three around each call, and one per delta.
        assert_eq!(events, 2 * 5 + 2 * 3 + 6);
    }

    #[test]
    fn an_empty_answer_is_a_message_without_words() {
        let (items, _) = output(Vec::new(), "completed");
        assert_eq!(items.len(), 1);
        assert_eq!(items[0]["content"][0]["text"], "");
    }
}
