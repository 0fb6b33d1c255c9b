//! Slow clients, and clients that send more than one request at a time.

use super::{start, start_with, still_works, still_works_in_time};
use common::http::{Connection, get, post};
use common::requests::idle;
use std::time::Duration;

const GOOD: &str = r#"{"model": "test-model", "prompt": "Hi", "max_tokens": 2}"#;

/// A timeout that a test can reach.
const SHORT: Duration = Duration::from_millis(300);

/// Sends bytes one at a time until the server answers or closes, and returns how many it
/// accepted.
fn drip(connection: &mut Connection, bytes: impl Iterator<Item = u8>) -> usize {
    let mut sent = 0;
    for byte in bytes {
        let gone = connection.send(&[byte]).is_err();
        // Waiting for an answer is also what slows the client down.
        if gone || connection.answers_within(Duration::from_millis(2)) {
            return sent;
        }
        sent += 1;
    }
    sent
}

#[test]
fn headers_that_never_end_time_out() {
    let server = start_with(|options| options.header_timeout = SHORT);
    for sent in [
        "",
        "P",
        "POST /v1/completions HTTP/1.1\r\n",
        "GET /health HTTP/1.1\r\nHost: que",
    ] {
        let mut connection = Connection::open(server.address);
        // The server may have given up already.
        let _ = connection.send(sent.as_bytes());
        let reply = connection.reply();
        assert!(
            reply.is_none_or(|reply| reply.status == 408),
            "after {sent:?}"
        );
    }
    idle(&server.engine);
    still_works_in_time(&server);
}

#[test]
fn headers_sent_byte_by_byte_time_out() {
    let server = start_with(|options| options.header_timeout = SHORT);
    let mut connection = Connection::open(server.address);
    let head = b"GET /health HTTP/1.1\r\nHost: quell\r\nx-slow: "
        .iter()
        .copied();
    let sent = drip(&mut connection, head.chain(std::iter::repeat_n(b'a', 8000)));
    assert!(sent < 8000, "all of it was taken");
    let reply = connection.reply();
    assert!(reply.is_none_or(|reply| reply.status == 408));
    still_works_in_time(&server);
}

#[test]
fn a_body_that_never_ends_times_out() {
    let server = start_with(|options| options.body_timeout = SHORT);
    let whole = post("/v1/completions", GOOD);
    for missing in [1, 20, GOOD.len()] {
        let mut connection = Connection::open(server.address);
        connection.send(&whole[..whole.len() - missing]).unwrap();
        let reply = connection.reply().expect("a refusal");
        assert_eq!(reply.status, 408, "{}", reply.text());
        assert_eq!(reply.json()["error"]["type"], "timeout_error");
    }
    let mut connection = Connection::open(server.address);
    let chunked = "POST /v1/completions HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"mod";
    connection.send(chunked.as_bytes()).unwrap();
    assert_eq!(connection.reply().expect("a refusal").status, 408);
    assert_eq!(idle(&server.engine).outcomes.accepted, 0);
    still_works_in_time(&server);
}

#[test]
fn a_body_sent_byte_by_byte_times_out() {
    let server = start_with(|options| options.body_timeout = SHORT);
    let mut connection = Connection::open(server.address);
    let body = format!("{{\"prompt\": \"{}\"}}", "a".repeat(8000));
    let request = post("/v1/completions", &body);
    let (head, body) = request.split_at(request.len() - body.len());
    connection.send(head).unwrap();
    let sent = drip(&mut connection, body.iter().copied());
    assert!(sent < 8000, "all of it was taken");
    assert_eq!(connection.reply().expect("a refusal").status, 408);
    assert_eq!(idle(&server.engine).outcomes.accepted, 0);
    still_works_in_time(&server);
}

#[test]
fn an_incomplete_body_generates_nothing() {
    let server = start();
    let whole = post("/v1/completions", GOOD);
    let mut connection = Connection::open(server.address);
    connection.send(&whole[..whole.len() - 10]).unwrap();
    connection
        .socket()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    let reply = connection.reply();
    assert!(reply.is_none_or(|reply| reply.status == 400));
    assert_eq!(idle(&server.engine).outcomes.accepted, 0);
    still_works(&server);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = start();
    let good = post("/v1/completions", GOOD);
    let bad = post("/v1/completions", r#"{"model": "test-model", "prompt": 5}"#);
    let broken = post("/v1/completions", "{");
    let requests = [
        &good,
        &bad,
        &get("/nowhere"),
        &broken,
        &good,
        &get("/health"),
    ];
    let mut connection = Connection::open(server.address);
    connection
        .send(&requests.map(Vec::as_slice).concat())
        .unwrap();
    let statuses = requests.map(|_| connection.reply().expect("one reply per request").status);
    assert_eq!(statuses, [200, 400, 404, 400, 200, 200]);
    assert_eq!(idle(&server.engine).outcomes.length, 2);
}

#[test]
fn a_request_with_ambiguous_length_cannot_smuggle_another() {
    let server = start();
    let smuggled = post("/v1/completions", GOOD);
    // By the length, the body includes all that follows. By the chunks, the body is empty.
    let head = |order: [&str; 2]| {
        format!(
            "POST /tokenize HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\n{}{}\r\n0\r\n\r\n",
            order[0], order[1]
        )
    };
    let length = format!("Content-Length: {}\r\n", smuggled.len() + 5);
    let chunked = "Transfer-Encoding: chunked\r\n";
    for order in [[length.as_str(), chunked], [chunked, length.as_str()]] {
        let mut connection = Connection::open(server.address);
        let _ = connection.send(&[head(order).as_bytes(), &smuggled].concat());
        assert_eq!(connection.reply().expect("a refusal").status, 400);
        assert!(connection.reply().is_none(), "a second request was seen");
    }
    assert_eq!(idle(&server.engine).outcomes.accepted, 0);
    still_works(&server);
}

#[test]
fn a_disconnect_cancels_pipelined_requests() {
    let server = start();
    let endless = r#"{"model": "test-model", "prompt": "Hi", "max_tokens": 8000, "stream": true}"#;
    let endless = post("/v1/completions", endless);
    let mut connection = Connection::open(server.address);
    connection.send(&endless.repeat(5)).unwrap();
    assert_eq!(connection.head().expect("a stream").status, 200);
    drop(connection);
    idle(&server.engine);
    still_works(&server);
}
