//! HTTP/2 clients that answer every PING but grant no flow-control window: they are alive, but
//! take nothing of their answers.

use super::{cancelled, nothing_is_open, options, slow_engine, until};
use common::http2::{GOAWAY, Http2, RST_STREAM};
use common::server::TestServer;
use quell::EngineConfig;
use std::time::Duration;

#[test]
fn http2_streams_without_a_window_are_cancelled() {
    const LABEL: &str = "windows";
    const CONNECTIONS: usize = 3;
    const STREAMS: usize = 8;
    let mut options = options();
    options.write_timeout = Duration::from_millis(500);
    let (engine, slow) = slow_engine(EngineConfig::default(), LABEL);
    let server = TestServer::start(engine.clone(), options);
    let tokens = engine.max_sequence_tokens() - 100;
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut connection = Http2::open(server.address, Some(0));
            for _ in 0..STREAMS {
                let body = format!(
                    "{{\"prompt\": [7], \"max_tokens\": {tokens}, \"ignore_eos\": true, \"stream\": true}}"
                );
                connection.post("/v1/completions", &body);
            }
            std::thread::spawn(move || {
                let mut resets = 0;
                while resets < STREAMS {
                    match connection.frame() {
                        Some(frame) => resets += usize::from(frame.kind == RST_STREAM),
                        // A PING was answered too late, so the server gave up the whole
                        // connection.
                        None => return None,
                    }
                }
                Some(resets)
            })
        })
        .collect();
    for client in clients {
        let resets = client.join().unwrap();
        assert!(resets.is_none_or(|resets| resets == STREAMS));
    }
    let stats = until(&engine, "no request is open", nothing_is_open);
    assert!(stats.is_idle(), "{stats:?}");
    let (all, disconnected) = cancelled(server.address, LABEL);
    assert_eq!(all, disconnected);
    assert_eq!(stats.outcomes.cancelled, stats.outcomes.accepted);
    drop(slow);
}

#[test]
fn an_idle_http2_connection_is_closed() {
    let mut options = options();
    options.keep_alive_timeout = Duration::from_millis(300);
    let (engine, slow) = slow_engine(EngineConfig::default(), "idle-http2");
    let server = TestServer::start(engine, options);
    let mut connection = Http2::open(server.address, None);
    let body = r#"{"prompt": [7], "max_tokens": 2, "ignore_eos": true}"#;
    connection.post("/v1/completions", body);
    let frames: Vec<_> = std::iter::from_fn(|| connection.frame()).collect();
    assert!(
        frames.iter().any(|frame| frame.kind == GOAWAY),
        "{frames:?}"
    );
    drop(slow);
}
