//! What API keys see of each other: nothing. What admin keys see: everything but contents.

use common::http::{Connection, Reply, exchange, get, post};
use common::parrot::{self, say};
use common::server::{ENDLESS, TestServer, endless_engine, options};
use quell::server::{ApiKeys, ServerOptions};
use serde_json::{Value, json};
use std::net::SocketAddr;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    <|im_end|>\n{% endfor %}<|im_start|>assistant\n";

fn with_keys() -> ServerOptions {
    ServerOptions {
        api_keys: ApiKeys::parse("root")
            .for_admins()
            .join(ApiKeys::parse("alice\nmallory")),
        ..options()
    }
}

/// Adds a key to a request.
fn signed(key: &str, request: &[u8]) -> Vec<u8> {
    let text = String::from_utf8(request.to_vec()).unwrap();
    let header = format!("\r\nAuthorization: Bearer {key}\r\n");
    text.replacen("\r\n", &header, 1).into_bytes()
}

/// A client with a key.
#[derive(Clone, Copy)]
struct Client {
    address: SocketAddr,
    key: &'static str,
}

impl Client {
    fn exchange(self, request: &[u8]) -> Reply {
        exchange(self.address, &signed(self.key, request)).expect("the server answers")
    }

    fn get(self, path: &str) -> Reply {
        self.exchange(&get(path))
    }

    fn delete(self, path: &str) -> Reply {
        let request = format!("DELETE {path} HTTP/1.1\r\nHost: quell\r\n\r\n");
        self.exchange(request.as_bytes())
    }

    fn post(self, path: &str, body: &Value) -> Reply {
        self.exchange(&post(path, body.to_string()))
    }

    /// Posts a request that is expected to succeed.
    fn ask(self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert!(reply.status < 300, "{body}: {}", reply.text());
        reply.json()
    }

    /// Begins an answer that does not end, and returns its connection and its id.
    fn endless(self, mut body: Value) -> (Connection, String) {
        body["stream"] = true.into();
        body["ignore_eos"] = true.into();
        body["max_tokens"] = ENDLESS.into();
        // Without a tokenizer, there is no text, and only log probabilities make an event.
        body["logprobs"] = 0.into();
        let mut connection = Connection::open(self.address);
        let request = post("/v1/completions", body.to_string());
        connection.send(&signed(self.key, &request)).unwrap();
        assert_eq!(connection.head().unwrap().status, 200);
        let event = String::from_utf8(connection.chunk().unwrap()).unwrap();
        let data = event.lines().find_map(|line| line.strip_prefix("data: "));
        let chunk: Value = serde_json::from_str(data.unwrap()).unwrap();
        (connection, chunk["id"].as_str().unwrap().to_owned())
    }

    fn abort(self, body: &Value) -> usize {
        let done = self.ask("/abort_request", body);
        done["aborted"].as_array().unwrap().len()
    }
}

fn clients(address: SocketAddr) -> [Client; 3] {
    ["alice", "mallory", "root"].map(|key| Client { address, key })
}

/// Asserts that something is answered as if `id` did not exist: like the same request with
/// another id of the same length.
fn assert_unknown(id: &str, ask: impl Fn(&str) -> Reply) {
    let other: String = id
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_ne!(id, other);
    let [of_id, of_other] = [id, &other].map(&ask);
    assert_eq!(of_id.status, 404, "{}", of_id.text());
    assert_eq!(of_other.status, 404, "{}", of_other.text());
    assert_eq!(
        of_id.text().replace(id, "ID"),
        of_other.text().replace(&other, "ID")
    );
}

#[test]
fn a_stored_response_exists_only_for_the_key_it_was_created_with() {
    const RESPONSES: &str = "/v1/responses";
    let server = TestServer::start(parrot::engine(TEMPLATE), with_keys());
    let [alice, mallory, root] = clients(server.address);
    let response = alice.ask(RESPONSES, &json!({"input": say("secret")}));
    let id = response["id"].as_str().unwrap();
    let item = response["output"][0]["id"].as_str().unwrap();
    for client in [mallory, root] {
        assert_unknown(id, |id| client.get(&format!("{RESPONSES}/{id}")));
        assert_unknown(id, |id| {
            client.get(&format!("{RESPONSES}/{id}/input_items"))
        });
        assert_unknown(id, |id| client.delete(&format!("{RESPONSES}/{id}")));
        for path in [RESPONSES, "/v1/responses/input_tokens"] {
            let next = |id: &str| json!({"input": say("x"), "previous_response_id": id});
            assert_unknown(id, |id| client.post(path, &next(id)));
            let refers = |id: &str| json!({"input": [{"type": "item_reference", "id": id}]});
            assert_unknown(item, |item| client.post(path, &refers(item)));
        }
        // Naming the item of another key does not reveal what is in it.
        let guess = json!({"input": [
            {"type": "message", "role": "user", "content": say("guess"), "id": item},
        ]});
        let own = client.ask(RESPONSES, &guess);
        let own = own["id"].as_str().unwrap();
        let listed = client.get(&format!("{RESPONSES}/{own}/input_items"));
        let text = listed.text();
        assert!(text.contains("guess") && !text.contains("secret"), "{text}");
    }
    let place = format!("{RESPONSES}/{id}");
    assert_eq!(alice.get(&place).json(), response);
    let listed = alice.get(&format!("{place}/input_items")).json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    let next = json!({"input": say("more"), "previous_response_id": id});
    assert_eq!(alice.ask(RESPONSES, &next)["previous_response_id"], id);
    let refers = json!({"input": [{"type": "item_reference", "id": item}, {"role": "user", "content": say("y")}]});
    alice.ask(RESPONSES, &refers);
    assert_eq!(alice.delete(&place).status, 200);
    assert_eq!(alice.get(&place).status, 404);
}

#[test]
fn a_key_cancels_only_its_own_requests_and_an_admin_key_all() {
    let server = TestServer::start(endless_engine(), with_keys());
    let [alice, mallory, root] = clients(server.address);
    let number = |label: &str| {
        let snapshot = server.engine.snapshot().wait().unwrap();
        let mut open = snapshot.requests.into_iter();
        let request = open.find(|open| open.label.as_deref() == Some(label));
        request.expect("the request is open").id.as_u64()
    };
    let (_alice, id) = alice.endless(json!({"prompt": [1, 2]}));
    let (_mallory, theirs) = mallory.endless(json!({"prompt": [3, 4]}));
    let foreign = number(&id);
    for wrong in [
        json!(id),
        json!(foreign),
        json!(foreign.to_string()),
        json!("cmpl-0"),
    ] {
        let done = mallory.ask("/abort_request", &json!({"request_id": wrong}));
        assert_eq!(done, json!({"aborted": []}), "{wrong}");
    }
    assert_eq!(mallory.abort(&json!({"abort_all": true})), 1);
    assert_eq!(mallory.abort(&json!({"request_id": theirs})), 0);
    assert_eq!(
        number(&id),
        foreign,
        "the request of the other key is still open"
    );
    assert_eq!(alice.abort(&json!({"request_id": foreign})), 1);

    let (_alice, id) = alice.endless(json!({"prompt": [1, 2]}));
    let (_mallory, _) = mallory.endless(json!({"prompt": [3, 4]}));
    assert_eq!(root.abort(&json!({"request_id": id})), 1);
    assert_eq!(root.abort(&json!({"abort_all": true})), 1);
    let snapshot = server.engine.snapshot().wait().unwrap();
    assert!(snapshot.requests.is_empty());
}

#[test]
fn a_session_exists_only_for_the_key_that_opened_it() {
    const SESSIONS: &str = "/v1/sessions";
    let server = TestServer::start(endless_engine(), with_keys());
    let [alice, mallory, root] = clients(server.address);
    let session = alice.ask(SESSIONS, &json!({}));
    let id = session["id"].as_str().unwrap();
    let place = format!("{SESSIONS}/{id}");
    let stop = |client: Client, id: &str, mode: &str| {
        client.post(&format!("{SESSIONS}/{id}/stop"), &json!({"mode": mode}))
    };
    let turn = |client: Client, id: &str| {
        let body = json!({"prompt": [5], "max_tokens": 3, "session_id": id});
        client.post("/v1/completions", &body)
    };
    let listed = |client: Client| -> Vec<Value> {
        let list = client.get(SESSIONS).json();
        let each = list["data"].as_array().unwrap();
        each.iter().map(|session| session["id"].clone()).collect()
    };
    assert_eq!(turn(alice, id).status, 200);
    let (_turn, _) = alice.endless(json!({"prompt": [6], "session_id": id}));
    assert_unknown(id, |id| turn(mallory, id));
    assert_unknown(id, |id| mallory.get(&format!("{SESSIONS}/{id}")));
    assert_unknown(id, |id| mallory.delete(&format!("{SESSIONS}/{id}")));
    for mode in ["keep", "rewind"] {
        assert_unknown(id, |id| stop(mallory, id, mode));
    }
    assert_eq!(listed(mallory), Vec::<Value>::new());
    let state = alice.get(&place).json();
    assert_eq!(state["generating"], true, "{state}");
    assert_eq!(listed(alice), [json!(id)]);
    // An admin sees and ends sessions, and cannot continue them.
    assert_unknown(id, |id| turn(root, id));
    assert_eq!(listed(root), [json!(id)]);
    assert_eq!(root.get(&place).json()["id"], id);
    assert_eq!(stop(root, id, "rewind").status, 200);
    assert_eq!(alice.get(&place).json()["generating"], false);
    assert_eq!(root.delete(&place).status, 200);
    assert_eq!(alice.get(&place).status, 404);
}

#[test]
fn the_snapshot_needs_an_admin_key_and_names_the_owner_of_each_request() {
    let server = TestServer::start(endless_engine(), with_keys());
    let [alice, mallory, root] = clients(server.address);
    let (_alice, id) = alice.endless(json!({"prompt": [1, 2], "user": "team"}));
    let (_mallory, _) = mallory.endless(json!({"prompt": [1, 2], "user": "team"}));
    for path in ["/v1/engine/snapshot", "/v1/engine/snapshot?stream=true"] {
        for client in [alice, mallory] {
            let reply = client.get(path);
            assert_eq!(reply.status, 403, "{}", reply.text());
            assert_eq!(reply.json()["error"]["code"], "admin_key_required");
        }
    }
    let snapshot = root.get("/v1/engine/snapshot").json();
    let requests = snapshot["requests"].as_array().unwrap();
    let [of_alice, of_mallory] = &requests[..] else {
        panic!("{snapshot}");
    };
    assert_eq!(
        (&of_alice["label"], &of_alice["owner"]),
        (&json!(id), &json!(1))
    );
    assert_eq!(of_mallory["owner"], 2);
    assert_ne!(
        of_alice["tenant"], of_mallory["tenant"],
        "they share no tenant"
    );
    // Totals of the whole server need no key.
    assert_ne!(
        exchange(server.address, &get("/metrics")).unwrap().status,
        401
    );
    let open = TestServer::start(endless_engine(), options());
    let reply = exchange(open.address, &get("/v1/engine/snapshot")).unwrap();
    assert_eq!(reply.status, 200, "without keys, everybody sees everything");
}
