//! `quell serve --otlp-endpoint` sends the spans of a request to a collector, as part of
//! its caller's trace.

#![cfg(all(unix, feature = "otel"))]

#[path = "common/http.rs"]
mod http;
#[path = "common/model.rs"]
mod model;
#[path = "common/serve.rs"]
mod serve;

use http::{exchange, post};
use serve::Serve;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

/// The exporter sends a batch every five seconds, and what is left when the server ends.
const PATIENCE: Duration = Duration::from_secs(60);

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// What the exporter posts on one connection: the path and the body of each request.
fn collect(connection: TcpStream, to: &mpsc::Sender<(String, Vec<u8>)>) -> Option<()> {
    let mut reader = BufReader::new(connection);
    loop {
        let mut length = 0;
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let path = line.split(' ').nth(1)?.to_owned();
        while !line.trim().is_empty() {
            line.clear();
            reader.read_line(&mut line).ok()?;
            let header = line.to_ascii_lowercase();
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        to.send((path, body)).ok()?;
        let accepted = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        reader.get_mut().write_all(accepted).ok()?;
    }
}

fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digits = hexadecimal.as_bytes().chunks(2);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

fn contains(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_spans_of_a_request_reach_the_collector_in_the_callers_trace() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let (to, posted) = mpsc::channel();
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let to = to.clone();
            std::thread::spawn(move || collect(connection, &to));
        }
    });

    let server = Serve::start(&model::smollm2(), &["--otlp-endpoint", &endpoint]);
    let body = r#"{"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true}"#;
    let request = String::from_utf8(post("/v1/completions", body)).unwrap();
    let parent = format!("\r\ntraceparent: 00-{TRACE}-{CALLER}-01\r\n");
    let request = request.replacen("\r\n", &parent, 1);
    let reply = exchange(server.address, request.as_bytes()).unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    server.ends_when_told();

    // Protobuf: ids are their bytes, names are themselves.
    let mut spans = Vec::new();
    let wanted: [&[u8]; 4] = [
        &bytes(TRACE),
        &bytes(CALLER),
        b"POST /v1/completions",
        b"request",
    ];
    while !wanted.iter().all(|part| contains(&spans, part)) {
        let next = posted.recv_timeout(PATIENCE);
        let Ok((path, body)) = next else {
            let missing = wanted.iter().filter(|part| !contains(&spans, part));
            let missing: Vec<_> = missing.map(|part| String::from_utf8_lossy(part)).collect();
            panic!("{missing:?} did not reach the collector");
        };
        assert_eq!(path, "/v1/traces");
        spans.extend(body);
    }
}
