//! Bodies that are not JSON, not the expected JSON, or not a valid body at all.

use super::{BODY_LIMIT, Case, Expected};
use common::http::post;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, sent: Vec<u8>, expected: Expected| {
        cases.push(Case {
            name: name.to_owned(),
            sent,
            expected,
        });
    };
    for (name, body) in texts() {
        add(name, post(COMPLETIONS, body), Expected::bad_body());
    }
    for (name, body) in bytes() {
        add(name, post(COMPLETIONS, body), Expected::bad_body());
    }
    for (name, body) in truncated() {
        add(&name, post(CHAT, body), Expected::bad_body());
    }
    for (name, body) in nested() {
        add(&name, post(CHAT, body), Expected::bad_body());
    }
    for (name, kind) in content_types() {
        add(
            name,
            with_headers(&format!("Content-Type: {kind}\r\n"), GOOD),
            Expected::refused(415),
        );
    }
    add(
        "no content type",
        with_headers("", GOOD),
        Expected::refused(415),
    );
    for (name, sent) in too_large() {
        add(name, sent, Expected::refused(413));
    }
    cases
}

const GOOD: &str = r#"{"model": "test-model", "prompt": "Hi", "max_tokens": 1}"#;

/// Builds a completion request with these headers in place of `Content-Type`.
fn with_headers(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: quell\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn texts() -> Vec<(&'static str, String)> {
    let plain = [
        ("nothing", ""),
        ("spaces", "   \n\t "),
        ("null", "null"),
        ("true", "true"),
        ("a number", "5"),
        ("a string", "\"Hi\""),
        ("an empty list", "[]"),
        (
            "a list of requests",
            r#"[{"model": "test-model", "prompt": "Hi"}]"#,
        ),
        ("a word", "hello"),
        ("a form", "prompt=Hi&max_tokens=1"),
        ("XML", "<request><prompt>Hi</prompt></request>"),
        ("YAML", "prompt: Hi\nmax_tokens: 1\n"),
        ("single quotes", "{'prompt': 'Hi'}"),
        ("no quotes", "{prompt: \"Hi\"}"),
        ("a comma at the end", r#"{"prompt": "Hi",}"#),
        ("a comma at the end of a list", r#"{"prompt": ["Hi",]}"#),
        ("no comma", r#"{"prompt": "Hi" "max_tokens": 1}"#),
        ("two colons", r#"{"prompt":: "Hi"}"#),
        ("a comment", "{\"prompt\": \"Hi\" /* greeting */}"),
        (
            "a comment to the end of the line",
            "{\"prompt\": \"Hi\" // greeting\n}",
        ),
        ("two requests", r#"{"prompt": "Hi"}{"prompt": "Hi"}"#),
        (
            "a request a line",
            "{\"prompt\": \"Hi\"}\n{\"prompt\": \"Hi\"}\n",
        ),
        ("something after it", r#"{"prompt": "Hi"} x"#),
        ("a brace too many", r#"{"prompt": "Hi"}}"#),
        ("a bracket for a brace", r#"{"prompt": "Hi"]"#),
        ("NaN", r#"{"prompt": "Hi", "temperature": NaN}"#),
        ("Infinity", r#"{"prompt": "Hi", "temperature": Infinity}"#),
        (
            "minus infinity",
            r#"{"prompt": "Hi", "temperature": -Infinity}"#,
        ),
        (
            "a number beyond all",
            r#"{"prompt": "Hi", "temperature": 1e400}"#,
        ),
        (
            "minus a number beyond all",
            r#"{"prompt": "Hi", "temperature": -1e400}"#,
        ),
        (
            "a hexadecimal number",
            r#"{"prompt": "Hi", "max_tokens": 0x10}"#,
        ),
        (
            "a number with a leading zero",
            r#"{"prompt": "Hi", "max_tokens": 01}"#,
        ),
        (
            "a number with a plus",
            r#"{"prompt": "Hi", "max_tokens": +1}"#,
        ),
        (
            "a number that ends in a point",
            r#"{"prompt": "Hi", "temperature": 1.}"#,
        ),
        (
            "a number that begins with a point",
            r#"{"prompt": "Hi", "temperature": .5}"#,
        ),
        (
            "a number without digits",
            r#"{"prompt": "Hi", "temperature": -}"#,
        ),
        (
            "an exponent without digits",
            r#"{"prompt": "Hi", "temperature": 1e}"#,
        ),
        ("a capital True", r#"{"prompt": "Hi", "stream": True}"#),
        ("undefined", r#"{"prompt": "Hi", "stream": undefined}"#),
        ("a field twice", r#"{"prompt": "Hi", "prompt": "Ho"}"#),
        ("another field twice", r#"{"prompt": "Hi", "n": 1, "n": 1}"#),
        ("a number for a name", r#"{5: "Hi"}"#),
        ("a line break in a string", "{\"prompt\": \"Hi\nHo\"}"),
        ("a NUL in a string", "{\"prompt\": \"Hi\0\"}"),
        (
            "a control character in a string",
            "{\"prompt\": \"Hi\u{1}\"}",
        ),
        ("a NUL after the end", "{\"prompt\": \"Hi\"}\0"),
        ("a byte order mark", "\u{feff}{\"prompt\": \"Hi\"}"),
        ("an escape that is none", r#"{"prompt": "\x41"}"#),
        ("half an escape", r#"{"prompt": "\u12"}"#),
        ("half a surrogate pair", r#"{"prompt": "\ud800"}"#),
        (
            "the wrong half of a surrogate pair",
            r#"{"prompt": "\udc00"}"#,
        ),
        (
            "a surrogate pair in the wrong order",
            r#"{"prompt": "\udc00\ud800"}"#,
        ),
    ];
    let mut texts: Vec<_> = plain.map(|(name, text)| (name, text.to_owned())).into();
    let digits = "9".repeat(100_000);
    texts.push((
        "a hundred thousand digits",
        format!("{{\"prompt\": \"Hi\", \"max_tokens\": {digits}}}"),
    ));
    let name = "a".repeat(500_000);
    texts.push(("a long name and no value", format!("{{\"{name}\"}}")));
    texts.push(("a string without an end", format!("{{\"prompt\": \"{name}")));
    texts
}

/// Builds a body whose prompt is a string of these bytes.
fn prompt_of(bytes: &[u8]) -> Vec<u8> {
    [b"{\"prompt\": \"", bytes, b"\"}"].concat()
}

fn bytes() -> Vec<(&'static str, Vec<u8>)> {
    let utf16 =
        |order: fn(u16) -> [u8; 2]| GOOD.encode_utf16().flat_map(order).collect::<Vec<u8>>();
    vec![
        ("a lone continuation byte", prompt_of(b"\x80")),
        ("a byte that UTF-8 never has", prompt_of(b"\xff")),
        ("half a character", prompt_of(b"\xe2\x82")),
        ("a slash written too long", prompt_of(b"\xc0\xaf")),
        ("a surrogate in UTF-8", prompt_of(b"\xed\xa0\x80")),
        ("a character beyond Unicode", prompt_of(b"\xf4\x90\x80\x80")),
        ("a NUL written too long", prompt_of(b"\xc0\x80")),
        (
            "Latin-1",
            prompt_of(
                "caf\u{e9}"
                    .chars()
                    .map(|c| c as u8)
                    .collect::<Vec<_>>()
                    .as_slice(),
            ),
        ),
        ("UTF-16, low byte first", utf16(u16::to_le_bytes)),
        ("UTF-16, high byte first", utf16(u16::to_be_bytes)),
        ("zeros", vec![0; 1000]),
        ("gzip", vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xab, 0x56]),
        ("all bytes", (0..=255).collect()),
        ("a name in bad UTF-8", b"{\"pro\xffmpt\": \"Hi\"}".to_vec()),
    ]
}

/// Prefixes of a valid request, of increasing length.
fn truncated() -> Vec<(String, String)> {
    let whole = r#"{"model": "test-model", "messages": [{"role": "user", "content": "H\u00e9"}], "temperature": 0.5, "stop": ["x"]}"#;
    let cuts = (1..whole.len()).step_by(4);
    cuts.map(|cut| {
        (
            format!("the first {cut} bytes of a request"),
            whole[..cut].to_owned(),
        )
    })
    .collect()
}

/// Bodies that are nested much deeper than any valid request.
fn nested() -> Vec<(String, String)> {
    const DEPTH: usize = 10_000;
    let (open, close) = ("[".repeat(DEPTH), "]".repeat(DEPTH));
    let objects = "{\"a\":".repeat(DEPTH);
    let ends = "}".repeat(DEPTH);
    let message = |extra: &str| {
        format!(
            "{{\"model\": \"test-model\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hi\", \"x\": {extra}}}]}}"
        )
    };
    let named = [
        ("lists", format!("{open}{close}")),
        ("lists without an end", open.clone()),
        ("ends of lists", close.clone()),
        ("objects", format!("{objects}1{ends}")),
        ("objects without an end", objects.clone()),
        ("lists and objects", "[{\"a\":".repeat(DEPTH)),
        (
            "lists as messages",
            format!("{{\"model\": \"test-model\", \"messages\": {open}{close}}}"),
        ),
        ("lists in a message", message(&format!("{open}{close}"))),
        (
            "objects in a message",
            message(&format!("{objects}1{ends}")),
        ),
        (
            "lists as a stop string",
            format!("{{\"messages\": [{{\"role\": \"user\"}}], \"stop\": {open}{close}}}"),
        ),
        (
            "objects as biases",
            format!("{{\"messages\": [{{\"role\": \"user\"}}], \"logit_bias\": {objects}1{ends}}}"),
        ),
        (
            "lists without an end in a field that is ignored",
            format!("{{\"x\": {open}"),
        ),
    ];
    named
        .into_iter()
        .map(|(name, body)| (format!("ten thousand {name}"), body))
        .collect()
}

fn content_types() -> [(&'static str, &'static str); 7] {
    [
        ("a form", "application/x-www-form-urlencoded"),
        ("a form in parts", "multipart/form-data; boundary=x"),
        ("plain text", "text/plain"),
        ("text as JSON", "text/json"),
        ("bytes", "application/octet-stream"),
        ("a media type that is none", ";;;"),
        ("an empty media type", ""),
    ]
}

fn too_large() -> Vec<(&'static str, Vec<u8>)> {
    let prompt = "a".repeat(BODY_LIMIT);
    let body = format!("{{\"prompt\": \"{prompt}\"}}");
    let head = |headers: &str| {
        format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\n{headers}\r\n"
        )
    };
    let chunks = format!(
        "{}10000\r\n{}\r\n",
        head("Transfer-Encoding: chunked\r\n"),
        "a".repeat(1 << 16)
    );
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(1 << 16));
    vec![
        ("a body over the limit", post(COMPLETIONS, &body)),
        (
            "a body over the limit, of spaces",
            post(CHAT, " ".repeat(BODY_LIMIT + 1)),
        ),
        (
            "a terabyte that is only promised",
            head("Content-Length: 1099511627776\r\n").into_bytes(),
        ),
        (
            "as much as a number can promise",
            head("Content-Length: 9223372036854775807\r\n").into_bytes(),
        ),
        (
            "a body over the limit in chunks",
            [chunks.as_bytes(), chunk.repeat(16).as_bytes()].concat(),
        ),
        (
            "one chunk over the limit",
            format!(
                "{}200000\r\n{}",
                head("Transfer-Encoding: chunked\r\n"),
                "a".repeat(1 << 21)
            )
            .into_bytes(),
        ),
    ]
}
