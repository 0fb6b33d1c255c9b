//! Sends requests to a server under test and parses its answers.

use crate::http::{Reply, exchange, get, post};
use serde_json::Value;
use std::net::SocketAddr;

/// Posts a request and returns the answer. Panics unless the status is 200.
pub fn ask(address: SocketAddr, path: &str, body: &Value) -> Value {
    let reply = send(address, path, body);
    assert_eq!(reply.status, 200, "{body}: {}", reply.text());
    reply.json()
}

/// Posts a request, expects this error status and returns the `error` object.
pub fn refused(address: SocketAddr, path: &str, body: &Value, status: u16) -> Value {
    let reply = send(address, path, body);
    assert_eq!(reply.status, status, "{body}: {}", reply.text());
    reply.json()["error"].clone()
}

/// Posts a streaming request and returns the data of its events, without the final `[DONE]`.
pub fn events(address: SocketAddr, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = true.into();
    let reply = send(address, path, &body);
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let text = reply.text();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

pub fn send(address: SocketAddr, path: &str, body: &Value) -> Reply {
    exchange(address, &post(path, body.to_string())).expect("the server answers")
}

pub fn fetch(address: SocketAddr, path: &str) -> Reply {
    exchange(address, &get(path)).expect("the server answers")
}
