//! What a request takes is bounded by its body: no body makes the server allocate more than
//! four times its size and 64 MiB, whichever field it is large in, and all of it is given
//! back.

#![cfg(feature = "server")]

#[path = "common/model.rs"]
mod model;
#[path = "common/server.rs"]
mod server;

use quell::EngineConfig;
use serde_json::json;
use server::{TestServer, null_engine, options, tokenizer};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Counts the bytes that are allocated now, and the most that ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn added(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: all memory is the system's; counting touches none of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        added(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there while one is copied to the other.
        added(size);
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// How long the server may take to give everything back.
const PATIENCE: Duration = Duration::from_secs(120);

/// Sends a request and reads its answer into a buffer of this function; gives the status.
fn post(address: SocketAddr, path: &str, body: &[u8]) -> u16 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut buffer = [0; 1 << 14];
    let first = stream.read(&mut buffer).unwrap();
    let status = std::str::from_utf8(&buffer[9..12])
        .unwrap()
        .parse()
        .unwrap();
    assert!(first > 12);
    while stream.read(&mut buffer).unwrap() > 0 {}
    let _ = stream.shutdown(Shutdown::Both);
    status
}

/// A list that is written many times over.
fn repeated(entry: &str, count: usize) -> String {
    let mut list = String::with_capacity(2 + count * (entry.len() + 1));
    list.push('[');
    for index in 0..count {
        if index > 0 {
            list.push(',');
        }
        list.push_str(entry);
    }
    list.push(']');
    list
}

/// Bodies that are large in one way each: what they are, where they go, what they are made
/// of.
fn bodies() -> Vec<(String, &'static str, String)> {
    const CHAT: &str = "/v1/chat/completions";
    const COMPLETIONS: &str = "/v1/completions";
    const RESPONSES: &str = "/v1/responses";
    let text = |mib: usize| "the quick brown fox ".repeat(mib * MIB / 20);
    let escaped = |mib: usize| "\\n\\u0041".repeat(mib * MIB / 8);
    let digits = |mib: usize| "7".repeat(mib * MIB);
    let mut bodies = Vec::new();
    let mut add = |name: &str, path: &'static str, body: String| {
        bodies.push((format!("{path} {name}"), path, body));
    };

    // What all answers of a request share.
    for stop in [1 << 10, 8 << 10, 64 << 10, MIB] {
        let stop = "x".repeat(stop);
        let body = json!({"prompt": vec!["a"; 512], "max_tokens": 1, "stop": [stop]});
        add("prompts × stop", COMPLETIONS, body.to_string());
        let body = json!({"prompt": "a", "n": 128, "max_tokens": 1, "stop": [stop]});
        add("n × stop", COMPLETIONS, body.to_string());
        let body = json!({"prompt": vec!["a"; 512], "max_tokens": 1, "user": stop});
        add("prompts × user", COMPLETIONS, body.to_string());
    }
    let stops: Vec<String> = (0..16).map(|i| format!("{i:x>1000}")).collect();
    for more in [
        json!({"stop": stops}),
        json!({"stop_token_ids": (0..1024).collect::<Vec<_>>()}),
        json!({"stop_token_ids": vec![5; 100_000]}),
        json!({"logit_bias": (0..1000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()}),
        json!({"logit_bias": (0..40_000).map(|i| (i.to_string(), json!(1))).collect::<serde_json::Map<_, _>>()}),
        json!({"guided_regex": "(a|b){1,200}"}),
        json!({"guided_choice": (0..2000).map(|i| format!("{i}")).collect::<Vec<_>>()}),
    ] {
        for (prompts, n) in [(512, 1), (4, 128)] {
            let mut body = json!({"prompt": vec!["a"; prompts], "n": n, "max_tokens": 1});
            let fields = body.as_object_mut().unwrap();
            fields.extend(more.as_object().unwrap().clone());
            let name = more.as_object().unwrap().keys().next().unwrap();
            add(name, COMPLETIONS, body.to_string());
        }
    }
    let long = "7".repeat(1500);
    let body = json!({"prompt": vec![long.as_str(); 8], "n": 64, "max_tokens": 1});
    add("prompts × n", COMPLETIONS, body.to_string());
    let body = json!({"prompt": vec![long.as_str(); 8], "n": 64, "max_tokens": 1, "echo": true});
    add("echo × n", COMPLETIONS, body.to_string());

    // Texts and token ids.
    for (kind, text) in [
        ("words", text(16)),
        ("escapes", escaped(16)),
        ("digits", digits(8)),
    ] {
        add(kind, COMPLETIONS, format!(r#"{{"prompt":"{text}"}}"#));
        add(
            kind,
            CHAT,
            format!(r#"{{"messages":[{{"role":"user","content":"{text}"}}]}}"#),
        );
        add(
            &format!("{kind} as a part"),
            CHAT,
            format!(
                r#"{{"messages":[{{"role":"user","content":[{{"type":"text","text":"{text}"}}]}}]}}"#
            ),
        );
        add(kind, RESPONSES, format!(r#"{{"input":"{text}"}}"#));
        add(
            &format!("{kind} as an item"),
            RESPONSES,
            format!(r#"{{"input":[{{"role":"user","content":"{text}"}}]}}"#),
        );
        add(kind, "/v1/embeddings", format!(r#"{{"input":"{text}"}}"#));
        add(
            kind,
            "/tokenize",
            format!(r#"{{"prompt":"{text}","return_token_strs":true}}"#),
        );
        add(
            &format!("an unknown field of {kind}"),
            CHAT,
            format!(r#"{{"x":"{text}","messages":[]}}"#),
        );
    }
    let run = "a".repeat(MIB);
    add("a run", "/tokenize", format!(r#"{{"prompt":"{run}"}}"#));
    add(
        "a run of spaces",
        "/tokenize",
        format!(r#"{{"prompt":"{}x"}}"#, " ".repeat(MIB)),
    );
    for ids in ["1", "48900"] {
        let ids = repeated(ids, 4 * MIB);
        add("token ids", COMPLETIONS, format!(r#"{{"prompt":{ids}}}"#));
        add(
            "lists of token ids",
            COMPLETIONS,
            format!(r#"{{"prompt":[{ids},[1]]}}"#),
        );
        add(
            "token ids",
            "/v1/embeddings",
            format!(r#"{{"input":{ids}}}"#),
        );
        add("token ids", "/detokenize", format!(r#"{{"tokens":{ids}}}"#));
        add("token ids", RESPONSES, format!(r#"{{"input":{ids}}}"#));
    }

    // Everything that has a form.
    let values = [
        ("numbers", repeated("1", 8 * MIB)),
        ("a few numbers", repeated("1", 100_000)),
        ("empty lists", repeated("[]", 60_000)),
        ("objects", repeated(r#"{"a":1}"#, 40_000)),
        ("many objects", repeated(r#"{"a":1}"#, MIB)),
        ("a text", format!("\"{}\"", text(3))),
        ("a long text", format!("\"{}\"", text(16))),
    ];
    for (kind, value) in values {
        let message = |field: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"x","{field}":{value}}}],"max_tokens":1}}"#
            )
        };
        add(&format!("{kind} in a message"), CHAT, message("more"));
        add(&format!("{kind} as a content"), CHAT, message("content"));
        add(&format!("{kind} as calls"), CHAT, message("tool_calls"));
        for field in [
            "tools",
            "chat_template_kwargs",
            "response_format",
            "guided_json",
            "metadata",
            "stop",
        ] {
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":1,"{field}":{value}}}"#
            );
            add(&format!("{kind} as {field}"), CHAT, body);
        }
        let variables = format!(
            r#"{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":1,"chat_template_kwargs":{{"a":{value}}}}}"#
        );
        add(&format!("{kind} as a variable"), CHAT, variables);
        let tool = format!(
            r#"{{"messages":[{{"role":"user","content":"x"}}],"max_tokens":1,"tools":[{{"type":"function","function":{{"name":"f","description":"d","parameters":{{"type":"object","x":{value}}}}}}}]}}"#
        );
        add(&format!("{kind} in a tool"), CHAT, tool);
        add(
            &format!("{kind} as items"),
            RESPONSES,
            format!(r#"{{"input":{value},"max_output_tokens":1}}"#),
        );
        add(
            &format!("{kind} as metadata"),
            RESPONSES,
            format!(r#"{{"input":"x","max_output_tokens":1,"metadata":{{"a":{value}}}}}"#),
        );
        add(
            &format!("{kind} as prompts"),
            COMPLETIONS,
            format!(r#"{{"prompt":{value},"max_tokens":1}}"#),
        );
        add(
            &format!("{kind} as an id"),
            "/abort_request",
            format!(r#"{{"request_id":{value}}}"#),
        );
    }
    add(
        "many messages",
        CHAT,
        format!(
            r#"{{"messages":{},"max_tokens":1}}"#,
            repeated(r#"{"role":"u"}"#, 43_000)
        ),
    );
    let arguments = format!(r#"{{\"a\":{}}}"#, repeated("1", 500_000));
    add(
        "arguments of calls",
        CHAT,
        format!(
            r#"{{"messages":[{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":"{arguments}"}}}}]}}],"max_tokens":1}}"#
        ),
    );
    add("no JSON", CHAT, repeated("[", 100_000));
    bodies
}

/// The bytes that are allocated once the server has given back what it is going to: it
/// does so on threads of its own, a moment after its answer.
fn settled(limit: usize) -> usize {
    let until = Instant::now() + PATIENCE;
    loop {
        let now = NOW.load(Ordering::Relaxed);
        if now <= limit || Instant::now() > until {
            return now;
        }
        std::thread::yield_now();
    }
}

// The only test of this file: another one would allocate meanwhile.
#[test]
fn no_body_takes_more_than_four_times_its_size_and_64_mib() {
    let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
    let server = TestServer::start(engine, options());
    // What is made once: the tokenizer's grammars, connections, metrics.
    let warm = json!({"prompt": "a", "max_tokens": 1, "guided_regex": "a+"}).to_string();
    assert_eq!(
        post(server.address, "/v1/completions", warm.as_bytes()),
        200
    );
    let bodies = bodies();
    let begun = NOW.load(Ordering::Relaxed);
    let mut answered = 0;
    let mut wrong = Vec::new();
    for (name, path, body) in &bodies {
        let before = settled(begun + 16 * MIB);
        PEAK.store(before, Ordering::Relaxed);
        let status = post(server.address, path, body.as_bytes());
        let held = ["guided_", "response_format"]
            .iter()
            .any(|field| body.contains(field));
        assert!(status != 500 || held, "{name}");
        answered += usize::from(status == 200);
        let grown = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        let limit = 4 * body.len() + 64 * MIB;
        if grown > limit {
            wrong.push(format!(
                "{name}: {:.1} MiB made {} MiB ({status})",
                body.len() as f64 / MIB as f64,
                grown / MIB
            ));
        }
        let left = settled(begun + 32 * MIB);
        assert!(
            left <= begun + 32 * MIB,
            "{name}: {} MiB are left",
            (left - begun) / MIB
        );
    }
    assert!(
        answered > 30,
        "only {answered} of {} were answered",
        bodies.len()
    );
    assert!(wrong.is_empty(), "{:#?}", wrong);
}
