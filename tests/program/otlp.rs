//! `quell serve --otlp-endpoint` sends the spans of a request to a collector, as part of the
//! caller's trace.

#![cfg(unix)]

use common::http::{exchange, post};
use common::model;
use common::serve::Serve;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

/// How long a span may take to arrive. The exporter sends a batch every five seconds, and the
/// rest when the server exits.
const PATIENCE: Duration = Duration::from_secs(60);

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Receives the exporter's requests on one connection: the path and the body of each.
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

/// Finds a span of the trace by name and returns its id and its parent's. OTLP's protobuf
/// encodes a span as trace id, span id, parent id and name in this order, each preceded by its
/// tag and length.
fn span(body: &[u8], name: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut begins = vec![0x0a, 16];
    begins.extend(bytes(TRACE));
    let mut called = vec![0x2a, name.len() as u8];
    called.extend(name.as_bytes());
    body.windows(begins.len() + 20 + called.len())
        .find_map(|window| {
            let ids = window
                .strip_prefix(&begins[..])?
                .strip_suffix(&called[..])?;
            let (span, parent) = ids.split_at(10);
            let span = span.strip_prefix(&[0x12, 8])?;
            Some((span.to_vec(), parent.strip_prefix(&[0x22, 8])?.to_vec()))
        })
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
    server.terminate();

    // The server's span and the engine's span below it.
    let mut spans = Vec::new();
    let (http, request) = loop {
        let both = span(&spans, "POST /v1/completions").zip(span(&spans, "request"));
        if let Some(both) = both {
            break both;
        }
        let Ok((path, body)) = posted.recv_timeout(PATIENCE) else {
            panic!("spans are missing: {}", String::from_utf8_lossy(&spans));
        };
        assert_eq!(path, "/v1/traces");
        spans.extend(body);
    };
    let (id, parent) = http;
    assert_eq!(parent, bytes(CALLER));
    assert_eq!(request.1, id);
}
