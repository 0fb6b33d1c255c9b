//! Every way to go away, at every stage of a request, with HTTP/1 and HTTP/2. The server must
//! notice each of them and cancel the request, whatever else the client has sent.

use super::{CUTS, Cut, cancelled, nothing_is_open, options, reset, slow_engine, until};
use common::http::{Connection, get, post};
use common::http2::Http2;
use common::server::TestServer;
use quell::server::{HalfClose, ServerOptions};
use quell::{Engine, EngineConfig, EngineStats};
use std::net::{Shutdown, TcpStream};

/// What an HTTP/1 client sends after its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    Nothing,
    /// An empty line, as some old clients send.
    Line,
    /// Another request.
    Request,
    /// More requests than the server buffers.
    Flood,
}

impl After {
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Line, Self::Request, Self::Flood];

    pub fn bytes(self) -> Vec<u8> {
        match self {
            Self::Nothing => Vec::new(),
            Self::Line => b"\r\n".to_vec(),
            Self::Request => get("/health"),
            Self::Flood => get("/health").repeat(8000),
        }
    }
}

/// A client that waits for its answer.
enum Waiting {
    Http1(Connection),
    Http2(Http2),
}

impl Waiting {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Http1(connection) => connection.socket(),
            Self::Http2(connection) => connection.socket(),
        }
    }

    /// Goes away. Returns the connection if it stays open.
    fn leave(self, cut: Cut) -> Option<Self> {
        match cut {
            Cut::Close => None,
            Cut::Reset => {
                let socket = self.socket().try_clone().unwrap();
                drop(self);
                reset(socket);
                None
            }
            Cut::HalfClose => {
                self.socket().shutdown(Shutdown::Write).unwrap();
                Some(self)
            }
            Cut::Silence => Some(self),
        }
    }
}

/// Stage of a request when its client goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits for other requests to end.
    Queued,
    /// Its prompt is being computed; there is no token yet.
    Prompt,
    /// Tokens are being generated.
    Tokens,
    /// Tokens are being generated but not sent, because they may be part of a stop string.
    HeldBack,
}

/// Builds a request that does not end by itself.
pub fn endless(engine: &Engine, stage: Stage, stream: bool) -> String {
    let tokens = engine.max_sequence_tokens() - 1000;
    let prompt: Vec<u32> = match stage {
        Stage::Prompt => (0..400).collect(),
        _ => vec![7],
    };
    let mut body = serde_json::json!({
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": true,
        "stream": stream,
    });
    if stage == Stage::HeldBack {
        // The simulated model counts up, so this is the text of its next tokens, except for the
        // end.
        let next: Vec<u32> = (8..400).collect();
        let text = engine.tokenizer().unwrap().decode(&next, false);
        body["stop"] = format!("{text}!").into();
    }
    body.to_string()
}

/// Sends a request for each combination of cut, streaming, pipelined data and protocol version.
fn ask_all(server: &TestServer, stage: Stage) -> Vec<(Waiting, Cut)> {
    let address = server.address;
    let mut clients = Vec::new();
    for (cut, stream) in CUTS.into_iter().flat_map(|cut| [(cut, true), (cut, false)]) {
        let body = endless(&server.engine, stage, stream);
        for after in After::ALL {
            let mut connection = Connection::open(address);
            let request = post("/v1/completions", &body);
            connection.send(&[request, after.bytes()].concat()).unwrap();
            clients.push((Waiting::Http1(connection), cut));
        }
        let mut connection = Http2::open(address, None);
        connection.post("/v1/completions", &body);
        clients.push((Waiting::Http2(connection), cut));
    }
    clients
}

fn config(stage: Stage) -> EngineConfig {
    let mut config = EngineConfig::default();
    match stage {
        Stage::Queued => config.max_sequences = 1,
        // It takes seconds until the first token.
        Stage::Prompt => config.max_batch_tokens = Some(1),
        Stage::Tokens | Stage::HeldBack => {}
    }
    config
}

fn check_disconnects_at(stage: Stage, label: &str) {
    let options = options();
    let (engine, slow) = slow_engine(config(stage), label);
    let server = TestServer::start(engine.clone(), options);
    let occupant = (stage == Stage::Queued).then(|| {
        let mut occupant = Connection::open(server.address);
        let body = endless(&engine, stage, false);
        occupant.send(&post("/v1/completions", body)).unwrap();
        until(&engine, "the first runs", |stats| stats.running == 1);
        occupant
    });
    let others = usize::from(occupant.is_some());

    let clients = ask_all(&server, stage);
    let gone = clients.len();
    let there = |stats: &EngineStats| {
        stats.open == gone + others
            && match stage {
                Stage::Queued => stats.waiting == gone,
                Stage::Prompt => stats.running > 0,
                Stage::Tokens | Stage::HeldBack => stats.tokens_generated >= 8 * gone as u64,
            }
    };
    until(&engine, "all requests have reached the stage", there);
    let leave = |(client, cut): (Waiting, Cut)| client.leave(cut);
    let stayed: Vec<_> = clients.into_iter().filter_map(leave).collect();
    assert!(!stayed.is_empty());
    until(&engine, "their requests have ended", |stats| {
        stats.open == others && stats.closing == 0
    });
    drop(occupant);
    let stats = until(&engine, "no request is open", nothing_is_open);
    assert!(stats.is_idle(), "{stats:?}");
    assert_eq!(stats.outcomes.accepted, (gone + others) as u64, "{stats:?}");
    let disconnected = cancelled(server.address, label).1;
    assert_eq!(disconnected, (gone + others) as u64, "{stats:?}");
    drop(slow);
}

#[test]
fn a_disconnect_while_queued_cancels_the_request() {
    check_disconnects_at(Stage::Queued, "leave-queued");
}

#[test]
fn a_disconnect_before_the_first_token_cancels_the_request() {
    check_disconnects_at(Stage::Prompt, "leave-prompt");
}

#[test]
fn a_disconnect_during_generation_cancels_the_request() {
    check_disconnects_at(Stage::Tokens, "leave-tokens");
}

#[test]
fn a_disconnect_while_text_is_held_back_cancels_the_request() {
    check_disconnects_at(Stage::HeldBack, "leave-held-back");
}

/// Cuts clients whose `body` keeps the server busy before it submits a request to the engine.
/// One more client stays and must get an answer.
fn check_disconnects_before_submission(path: &str, body: &str, label: &str) {
    let (engine, slow) = slow_engine(EngineConfig::default(), label);
    let server = TestServer::start(engine.clone(), options());
    let mut stayed = Vec::new();
    for cut in CUTS {
        for after in [After::Nothing, After::Line] {
            let mut connection = Connection::open(server.address);
            let request = post(path, body);
            connection.send(&[request, after.bytes()].concat()).unwrap();
            stayed.extend(Waiting::Http1(connection).leave(cut));
        }
    }
    let mut patient = Connection::open(server.address);
    patient.send(&post(path, body)).unwrap();
    let head = patient.head().expect("an answer");
    assert_eq!(head.status, 200);
    patient.chunk().expect("an event");
    drop(patient);
    until(&engine, "no request is open", nothing_is_open);
    // Once the server has ended, nothing can submit a request any more.
    drop(server);
    let stats = until(&engine, "no request is open", nothing_is_open);
    assert!(stats.is_idle(), "{stats:?}");
    // The simulated model does not know the grammar and may violate it.
    let ended = stats.outcomes.cancelled + stats.outcomes.failed;
    assert_eq!(ended, stats.outcomes.accepted, "{stats:?}");
    drop(slow);
}

#[test]
fn a_disconnect_during_tokenization_leaves_nothing_open() {
    let text = "Once upon a time there was a number. ".repeat(20_000);
    let body = serde_json::json!({
        "messages": [{"role": "user", "content": text}],
        "ignore_eos": true,
        "max_tokens": 500_000,
        "stream": true,
    });
    check_disconnects_before_submission(
        "/v1/chat/completions",
        &body.to_string(),
        "leave-tokenizing",
    );
}

#[test]
fn a_disconnect_during_grammar_compilation_leaves_nothing_open() {
    let properties: serde_json::Map<String, serde_json::Value> = (0..400)
        .map(|index| {
            let kind = serde_json::json!({"type": "string", "pattern": "[a-z]{3,30}[0-9]{2,20}"});
            (format!("property_{index}"), kind)
        })
        .collect();
    let required: Vec<&String> = properties.keys().collect();
    let schema = serde_json::json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    });
    let body = serde_json::json!({
        "prompt": [7],
        "max_tokens": 500_000,
        "stream": true,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "large", "schema": schema},
        },
    });
    check_disconnects_before_submission("/v1/completions", &body.to_string(), "leave-compiling");
}

fn finishing() -> ServerOptions {
    let mut options = options();
    options.half_close = HalfClose::Finish;
    options
}

#[test]
fn a_half_closed_connection_is_answered_if_half_close_is_finish() {
    let (engine, slow) = slow_engine(EngineConfig::default(), "half-closed");
    let server = TestServer::start(engine, finishing());
    for stream in [true, false] {
        for after in [After::Nothing, After::Line] {
            let mut connection = Connection::open(server.address);
            let body = format!(
                "{{\"prompt\": [7], \"max_tokens\": 20, \"ignore_eos\": true, \"stream\": {stream}}}"
            );
            let request = post("/v1/completions", body);
            connection.send(&[request, after.bytes()].concat()).unwrap();
            connection.socket().shutdown(Shutdown::Write).unwrap();
            let reply = connection.reply().expect("an answer");
            assert_eq!(reply.status, 200, "{}", reply.text());
            let text = reply.text();
            assert!(text.contains("\"finish_reason\":\"length\""), "{text}");
        }
    }
    drop(slow);
}

#[test]
fn a_half_closed_connection_ends_when_its_client_disconnects() {
    const LABEL: &str = "half-closed-then-gone";
    let (engine, slow) = slow_engine(EngineConfig::default(), LABEL);
    let server = TestServer::start(engine.clone(), finishing());
    // After a close, the client's system answers the next event of a stream with a reset. An
    // answer that is not streamed sends nothing, so its client must reset the connection
    // itself.
    let mut gone = 0;
    for (stream, resets) in [(true, false), (true, true), (false, true)] {
        for after in After::ALL {
            let mut connection = Connection::open(server.address);
            let request = post("/v1/completions", endless(&engine, Stage::Tokens, stream));
            connection.send(&[request, after.bytes()].concat()).unwrap();
            gone += 1;
            until(&engine, "the request is accepted", |stats| {
                stats.outcomes.accepted == gone
            });
            let stayed = Waiting::Http1(connection).leave(Cut::HalfClose);
            let cut = if resets { Cut::Reset } else { Cut::Close };
            assert!(stayed.unwrap().leave(cut).is_none());
        }
    }
    let stats = until(&engine, "no request is open", nothing_is_open);
    assert!(stats.is_idle(), "{stats:?}");
    assert_eq!(cancelled(server.address, LABEL), (gone, gone));
    drop(slow);
}

#[test]
fn pipelined_requests_are_answered_or_the_connection_is_closed() {
    let (engine, slow) = slow_engine(EngineConfig::default(), "ahead");
    let server = TestServer::start(engine, options());
    let body = r#"{"prompt": [7], "max_tokens": 20, "ignore_eos": true}"#;
    let first = post("/v1/completions", body);
    let mut few = Connection::open(server.address);
    few.send(&[first.clone(), get("/health").repeat(3)].concat())
        .unwrap();
    for _ in 0..4 {
        assert_eq!(few.reply().expect("one reply per request").status, 200);
    }
    // All replies must be complete and in order. A client that still sends when the server
    // closes may lose replies that it has not read yet.
    loop {
        let mut many = Connection::open(server.address);
        let _ = many.send(&[first.clone(), After::Flood.bytes()].concat());
        let Some(answer) = many.reply() else { continue };
        assert_eq!(answer.json()["object"], "text_completion");
        while let Some(reply) = many.reply() {
            assert!(matches!(reply.status, 200 | 400), "{}", reply.text());
        }
        break;
    }
    drop(slow);
}
