//! Broken HTTP: request lines, headers, lengths, chunks, methods and routes.

use super::{Case, Expected};

const GOOD: &str = r#"{"model": "test-model", "prompt": "Hi", "max_tokens": 1}"#;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, sent: Vec<u8>, expected: Expected| {
        cases.push(Case {
            name: name.to_owned(),
            sent,
            expected,
        });
    };
    for (name, line) in request_lines() {
        let sent = [line, b"\r\nHost: quell\r\n\r\n".as_slice()].concat();
        add(name, sent, Expected::Status(400));
    }
    for (name, sent) in not_http() {
        add(name, sent, Expected::Status(400));
    }
    for (name, header) in bad_headers() {
        let sent = [
            b"GET /health HTTP/1.1\r\nHost: quell\r\n".as_slice(),
            header,
            b"\r\n\r\n",
        ]
        .concat();
        add(name, sent, Expected::Status(400));
    }
    for (name, hosts) in hosts() {
        for line in ["GET /health", "POST /v1/completions", "GET /nowhere"] {
            let sent = format!("{line} HTTP/1.1\r\n{hosts}\r\n").into_bytes();
            add(&format!("{line} with {name}"), sent, Expected::refused(400));
        }
    }
    for (name, headers) in lengths() {
        add(name, post_with(headers, GOOD), Expected::Status(400));
    }
    for (name, chunks) in chunks() {
        let sent = post_with("Transfer-Encoding: chunked\r\n", chunks);
        add(name, sent, Expected::refused(400));
    }
    for (name, sent) in floods() {
        add(name, sent, Expected::Status(431));
    }
    let long = format!(
        "GET /{} HTTP/1.1\r\nHost: quell\r\n\r\n",
        "a".repeat(100_000)
    );
    add(
        "an address of 100,000 bytes",
        long.into_bytes(),
        // The server's limit on headers may be exceeded before it recognises an address.
        Expected::OneOf([414, 431]),
    );
    for path in UNKNOWN {
        let sent = format!("GET {path} HTTP/1.1\r\nHost: quell\r\n\r\n");
        add(
            &format!("the route {path}"),
            sent.into_bytes(),
            Expected::refused(404),
        );
    }
    for (method, path) in WRONG_METHODS {
        let sent = format!("{method} {path} HTTP/1.1\r\nHost: quell\r\nContent-Length: 0\r\n\r\n");
        add(
            &format!("{method} {path}"),
            sent.into_bytes(),
            Expected::refused(405),
        );
    }
    for (name, sent) in cut_off() {
        add(name, sent, Expected::Closed);
    }
    cases
}

/// Builds a completion request with these headers added, and with this body as it is.
fn post_with(headers: &str, body: &str) -> Vec<u8> {
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\n{headers}\r\n{body}"
    )
    .into_bytes()
}

fn request_lines() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("a version to come", b"GET /health HTTP/3.0"),
        ("a version that never was", b"GET /health HTTP/1.9x"),
        ("another protocol", b"GET /health FTP/1.1"),
        ("lower case http", b"GET /health http/1.1"),
        ("no address", b"GET  HTTP/1.1"),
        ("a space in the address", b"GET /he alth HTTP/1.1"),
        ("a tab for a space", b"GET\t/health\tHTTP/1.1"),
        ("a NUL in the address", b"GET /health\0 HTTP/1.1"),
        ("a NUL in the method", b"GE\0T /health HTTP/1.1"),
        ("a control character in the address", b"GET /\x01 HTTP/1.1"),
        ("brackets for a method", b"<GET> /health HTTP/1.1"),
        ("a method of bad UTF-8", b"\xff\xfe /health HTTP/1.1"),
        ("an address without a slash", b"GET health\\..\\x HTTP/1.1"),
        ("a scheme and nothing else", b"GET http:// HTTP/1.1"),
    ]
}

fn not_http() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("a word", b"hello\r\n\r\n".to_vec()),
        ("HTTP/0.9", b"GET /health\r\n\r\n".to_vec()),
        ("JSON without HTTP", format!("{GOOD}\r\n\r\n").into_bytes()),
        (
            "a greeting of TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and so on\r\n\r\n".to_vec(),
        ),
        ("a greeting of SSH", b"SSH-2.0-OpenSSH_9.7\r\n\r\n".to_vec()),
        ("a line of SMTP", b"EHLO quell.example\r\n\r\n".to_vec()),
        ("a command of Redis", b"*1\r\n$4\r\nPING\r\n\r\n".to_vec()),
        ("zeros", vec![0; 64]),
        (
            "bytes of every kind",
            (128..=255).chain(*b"\r\n\r\n").collect(),
        ),
        ("spaces", b"     \r\n\r\n".to_vec()),
    ]
}

fn bad_headers() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("a header without a colon", b"x-broken"),
        ("a header without a name", b": value"),
        ("a space before the colon", b"x-a : value"),
        ("a space in a header's name", b"x a: value"),
        ("a NUL in a header's name", b"x\0a: value"),
        ("a NUL in a header's value", b"x-a: val\0ue"),
        ("a bell in a header's value", b"x-a: val\x07ue"),
        ("a DEL in a header's value", b"x-a: val\x7fue"),
        ("a lone carriage return in a value", b"x-a: val\rue"),
        ("a header in bad UTF-8", b"\xc3\xa9: value"),
        (
            "a header that goes on in the next line",
            b"x-a: one\r\n two",
        ),
        ("parentheses in a header's name", b"x(a): value"),
    ]
}

/// No host, or more than one: a proxy on the way could take the request for another host's.
fn hosts() -> Vec<(&'static str, &'static str)> {
    vec![
        ("no host", ""),
        ("two hosts", "Host: quell\r\nHost: other\r\n"),
        ("the same host twice", "Host: quell\r\nhost: quell\r\n"),
    ]
}

/// Invalid or contradictory lengths. Two parties must never disagree about where one request
/// ends and the next one begins.
fn lengths() -> Vec<(&'static str, &'static str)> {
    vec![
        ("a negative length", "Content-Length: -5\r\n"),
        ("a length with a plus", "Content-Length: +56\r\n"),
        ("a word for a length", "Content-Length: all\r\n"),
        ("an empty length", "Content-Length: \r\n"),
        (
            "a length beyond all numbers",
            "Content-Length: 99999999999999999999999\r\n",
        ),
        ("a hexadecimal length", "Content-Length: 0x38\r\n"),
        ("a length with a fraction", "Content-Length: 56.0\r\n"),
        ("two lengths in one header", "Content-Length: 56, 5\r\n"),
        (
            "two lengths in two headers",
            "Content-Length: 56\r\nContent-Length: 5\r\n",
        ),
        ("an unknown encoding", "Transfer-Encoding: gzip\r\n"),
        (
            "an encoding that is almost chunked",
            "Transfer-Encoding: xchunked\r\n",
        ),
        (
            "chunked, but not last",
            "Transfer-Encoding: chunked, gzip\r\n",
        ),
        ("identity", "Transfer-Encoding: identity\r\n"),
        (
            "a length of bytes and an unknown encoding",
            "Content-Length: 56\r\nTransfer-Encoding: cow\r\n",
        ),
    ]
}

fn chunks() -> Vec<(&'static str, &'static str)> {
    vec![
        ("a chunk size that is none", "zz\r\n{}\r\n0\r\n\r\n"),
        ("an empty chunk size", "\r\n{}\r\n0\r\n\r\n"),
        ("a negative chunk size", "-1\r\n{}\r\n0\r\n\r\n"),
        (
            "a chunk size beyond all numbers",
            "fffffffffffffffff1\r\n{}\r\n0\r\n\r\n",
        ),
        (
            "a chunk that is longer than it says",
            "1\r\n{}\r\n0\r\n\r\n",
        ),
        (
            "a chunk that is shorter than it says",
            "9\r\n{}\r\n0\r\n\r\nGET",
        ),
        ("a chunk size with 0x", "0x2\r\n{}\r\n0\r\n\r\n"),
        ("a chunk size and a space within", "1 0\r\n{}\r\n0\r\n\r\n"),
        ("a chunk without line ends", "2{}0"),
        ("chunks that hold no JSON", "2\r\n{{\r\n0\r\n\r\n"),
        ("no chunk but the last", "0\r\n\r\n"),
        ("nonsense for a trailer", "2\r\n{}\r\n0\r\n\0\r\n\r\n"),
    ]
}

fn floods() -> Vec<(&'static str, Vec<u8>)> {
    let head = "GET /health HTTP/1.1\r\nHost: quell\r\n";
    let many: String = (0..10_000)
        .map(|index| format!("x-{index}: 1\r\n"))
        .collect();
    let same = "cookie: a=b\r\n".repeat(5_000);
    vec![
        ("10,000 headers", format!("{head}{many}\r\n").into_bytes()),
        (
            "5,000 times the same header",
            format!("{head}{same}\r\n").into_bytes(),
        ),
        (
            "a header of a megabyte",
            format!("{head}x-a: {}\r\n\r\n", "a".repeat(1 << 20)).into_bytes(),
        ),
        (
            "a header's name of a megabyte",
            format!("{head}{}: 1\r\n\r\n", "a".repeat(1 << 20)).into_bytes(),
        ),
    ]
}

/// Paths that do not exist.
const UNKNOWN: [&str; 20] = [
    "/v1",
    "/v1/",
    "/v2/completions",
    "/v1/completion",
    "/V1/COMPLETIONS",
    "//v1/models",
    "/v1//models",
    "/v1/models/no-such-model",
    "/v1/models/test-model/",
    "/v1/models/%00",
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/models/%e2%98%83",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/v1/%63hat/completion%73x",
    "/.env",
    "/index.php?x=%27%20OR%201=1",
    "/health;x=1",
    "/health%00",
    "/v1/files",
];

const WRONG_METHODS: [(&str, &str); 16] = [
    ("GET", "/v1/completions"),
    ("GET", "/v1/chat/completions"),
    ("PUT", "/v1/chat/completions"),
    ("DELETE", "/v1/completions"),
    ("PATCH", "/v1/completions"),
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/test-model"),
    ("POST", "/health"),
    ("POST", "/ready"),
    ("PUT", "/metrics"),
    ("GET", "/tokenize"),
    ("GET", "/detokenize"),
    ("TRACE", "/health"),
    ("BREW", "/health"),
    ("get", "/health"),
    ("OPTIONS", "/v1/completions"),
];

/// Requests that end before they are complete: no client is left to answer.
fn cut_off() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("nothing at all", Vec::new()),
        ("half a method", b"PO".to_vec()),
        (
            "a request line",
            b"POST /v1/completions HTTP/1.1\r\n".to_vec(),
        ),
        (
            "half a header",
            b"POST /v1/completions HTTP/1.1\r\nContent-Le".to_vec(),
        ),
    ]
}
