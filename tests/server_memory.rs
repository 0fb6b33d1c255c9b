//! Measures how much memory `quell serve` takes for a request, whatever it contains, and
//! whether it gives the memory back. Linux only, because the kernel records the peak.
#![cfg(target_os = "linux")]

use common::http::{exchange, get, post};
use common::model;
use common::process::Process;
use common::serve::Serve;
use common::small_model::small_model;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use quell::internals::server::{Route, request_fields};
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Memory that a request may take in addition to four times its body, and that may remain
/// afterwards.
const ALLOWANCE: usize = 64 << 20;

/// How long the allocator may keep memory that is no longer used.
const PATIENCE: Duration = Duration::from_secs(60);

const WORDS: &str = "the quick brown fox jumps over the lazy dog ";

/// A name for a kind of value, and a function that builds such a value of about this many
/// bytes.
type Shape = (&'static str, fn(usize) -> Value);

/// Kinds of values: those that fields take, and those that take the most memory per byte.
const SHAPES: &[Shape] = &[
    ("words", |bytes| words(bytes).into()),
    ("one letter", |bytes| "x".repeat(bytes).into()),
    ("escapes", |bytes| "\u{1}".repeat(bytes / 6).into()),
    ("an expression", |bytes| "(a|b)".repeat(bytes / 5).into()),
    ("an expression of repetitions", |bytes| {
        "(a{1,99}){1,99}".repeat(bytes / 15).into()
    }),
    ("tiny texts", |bytes| list(bytes, &json!("a"))),
    ("2048 texts", |bytes| vec![words(bytes / 2048); 2048].into()),
    ("four texts", |bytes| vec![words(bytes / 4); 4].into()),
    ("choices", choices),
    ("integers", |bytes| list(bytes, &json!(1))),
    ("fractions", |bytes| list(bytes, &json!(0.5))),
    ("nothings", |bytes| list(bytes, &Value::Null)),
    ("lists of one", |bytes| list(bytes, &json!([1]))),
    ("token prompts", |bytes| {
        vec![vec![1; bytes / 128]; 64].into()
    }),
    ("nested lists", |bytes| {
        let nested = (0..60).fold(json!(1), |inner, _| json!([inner]));
        list(bytes, &nested)
    }),
    ("names", |bytes| {
        object(bytes / 12, |index| (format!("n{index}"), json!(1)))
    }),
    ("a bias of tokens", |bytes| {
        object((bytes / 9).min(49_000), |index| {
            (index.to_string(), json!(1))
        })
    }),
    ("messages", |bytes| {
        list(bytes, &json!({"role": "user", "content": "a"}))
    }),
    (
        "a long message",
        |bytes| json!([{"role": "user", "content": words(bytes)}]),
    ),
    ("long messages", |bytes| {
        vec![json!({"role": "user", "content": words(bytes / 64)}); 64].into()
    }),
    ("a message of parts", |bytes| {
        let parts = list(bytes, &json!({"type": "text", "text": "a"}));
        json!([{"role": "user", "content": parts}])
    }),
    ("a call", |bytes| {
        let arguments = json!({"a": words(bytes)}).to_string();
        calls(vec![call(&arguments)])
    }),
    ("a call with many arguments", |bytes| {
        calls(vec![call(&list(bytes, &json!(1)).to_string())])
    }),
    ("calls", |bytes| {
        calls(vec![call("{\"a\":[1,2,3]}"); bytes / 90])
    }),
    ("tools", |bytes| {
        let parameters = json!({"type": "object", "properties": {"a": {"type": "string"}}});
        let function = json!({"name": "f", "description": "a", "parameters": parameters});
        list(bytes, &json!({"type": "function", "function": function}))
    }),
    ("a long tool", |bytes| {
        let function = json!({"name": "f", "description": words(bytes), "parameters": {}});
        json!([{"type": "function", "function": function}])
    }),
    (
        "a schema of properties",
        |bytes| json!({"type": "object", "properties": properties(bytes)}),
    ),
    ("a form of properties", |bytes| {
        form(&json!({"type": "object", "properties": properties(bytes)}))
    }),
    ("a form of choices", |bytes| {
        form(&json!({"enum": choices(bytes)}))
    }),
    ("a form of one long choice", |bytes| {
        form(&json!({"enum": [words(bytes)]}))
    }),
    ("a form with a pattern", |bytes| {
        form(&json!({"type": "string", "pattern": "(a|b)".repeat(bytes / 5)}))
    }),
];

fn words(bytes: usize) -> String {
    let mut text = WORDS.repeat(bytes / WORDS.len() + 1);
    text.truncate(bytes);
    text
}

fn list(bytes: usize, item: &Value) -> Value {
    let length = item.to_string().len() + 1;
    vec![item.clone(); (bytes / length).max(1)].into()
}

fn choices(bytes: usize) -> Value {
    let choices = (0..bytes / 9).map(|index| format!("c{index}"));
    choices.collect::<Vec<_>>().into()
}

fn object(length: usize, entry: impl Fn(usize) -> (String, Value)) -> Value {
    (0..length).map(entry).collect::<Map<_, _>>().into()
}

fn properties(bytes: usize) -> Value {
    let text = json!({"type": "string"});
    object(bytes / 25, |index| (format!("p{index}"), text.clone()))
}

fn form(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
}

fn call(arguments: &str) -> Value {
    json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}})
}

fn calls(calls: Vec<Value>) -> Value {
    json!([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}])
}

/// Builds a valid request.
fn small(route: Route) -> Value {
    match route {
        Route::Completions => json!({"prompt": "a", "max_tokens": 1}),
        Route::Chat => json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        Route::Responses => json!({"input": "a", "max_output_tokens": 1}),
        Route::Embeddings => json!({"input": "a"}),
        Route::Rerank => json!({"query": "a", "documents": ["b"]}),
        Route::Score => json!({"text_1": "a", "text_2": "b"}),
        Route::Tokenize => json!({"prompt": "a"}),
        Route::Detokenize => json!({"tokens": [1]}),
    }
}

/// A request with one large field.
#[derive(Clone, Debug)]
struct Large {
    route: Route,
    field: &'static str,
    shape: usize,
    bytes: usize,
    /// Number of prompts, where the route takes several.
    prompts: usize,
    answers: usize,
    streamed: bool,
}

impl Large {
    fn body(&self) -> Vec<u8> {
        let mut body = small(self.route);
        if self.route == Route::Completions && self.prompts > 1 {
            body["prompt"] = vec!["a"; self.prompts].into();
        }
        if matches!(self.route, Route::Completions | Route::Chat) && self.answers > 1 {
            body["n"] = self.answers.into();
        }
        if self.streamed {
            body["stream"] = true.into();
        }
        let value = SHAPES[self.shape].1(self.bytes);
        match self.field.split_once('.') {
            Some((outer, inner)) => body[outer] = json!({inner: value}),
            None => body[self.field] = value,
        }
        body.to_string().into_bytes()
    }
}

/// Generates requests with any field of any route and any kind of value.
fn any_large() -> impl Strategy<Value = Large> {
    let fields: Vec<_> = (request_fields().iter())
        .flat_map(|field| field.routes.iter().map(|&route| (route, field.name)))
        .collect();
    let bytes = prop_oneof![
        4 => 20usize << 10..300 << 10,
        2 => 300usize << 10..4 << 20,
        1 => 4usize << 20..24 << 20,
    ];
    let prompts = prop_oneof![2 => Just(1usize), 1 => Just(16), 1 => Just(2048)];
    let answers = prop_oneof![3 => Just(1usize), 1 => Just(2), 1 => Just(128)];
    let field = prop::sample::select(fields);
    let values = (
        field,
        0..SHAPES.len(),
        bytes,
        prompts,
        answers,
        any::<bool>(),
    );
    values.prop_map(
        |((route, field), shape, bytes, prompts, answers, streamed)| Large {
            route,
            field,
            shape,
            bytes,
            prompts,
            answers,
            streamed,
        },
    )
}

/// A server, and how much memory it takes at rest and while it computes as many sequences at
/// once as it can.
struct Loaded {
    server: Serve,
    process: Process,
    at_work: usize,
    at_rest: usize,
}

impl Loaded {
    fn start(model: &Path) -> Self {
        let arguments = ["--kv-cache-mib", "64", "--threads", "1"];
        let mut command = Serve::command(model, &arguments);
        let server = Serve::spawn(command.env("QUELL_LOG", "error"));
        let process = Process::with_id(server.id());
        process.forget_peak();
        let many = json!({"prompt": vec!["a"; 2048], "max_tokens": 2});
        let long = json!({"prompt": words(4000), "max_tokens": 2});
        for body in [many, long] {
            let sent = post("/v1/completions", body.to_string());
            assert_eq!(exchange(server.address, &sent).unwrap().status, 200);
        }
        Self {
            at_work: process.memory("VmHWM"),
            at_rest: process.memory("VmRSS"),
            process,
            server,
        }
    }

    /// Returns the peak memory while `requests` are answered, beyond what the server takes
    /// anyway, and the result of `requests`.
    fn peak_memory_of<T>(&self, requests: impl FnOnce(SocketAddr) -> T) -> (usize, T) {
        self.process.forget_peak();
        let before = self.process.memory("VmRSS").max(self.at_work);
        let answered = requests(self.server.address);
        let peak = self.process.memory("VmHWM");
        (peak.saturating_sub(before), answered)
    }

    /// Waits until the server holds no more than before all requests plus the allowance.
    fn assert_memory_is_released(self) {
        let until = Instant::now() + PATIENCE;
        let before = self.at_rest;
        loop {
            let now = self.process.memory("VmRSS");
            if now <= before + ALLOWANCE {
                return self.server.terminate_when_idle();
            }
            assert!(
                Instant::now() < until,
                "memory grew from {before} to {now} bytes"
            );
            // The allocator returns memory only while it is in use, so send it some work.
            exchange(self.server.address, &get("/health")).unwrap();
        }
    }
}

#[test]
fn no_request_takes_much_more_than_four_times_its_body() {
    // Many of the requests have thousands of answers.
    let model = small_model();
    let loaded = Loaded::start(model.path());
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let served = Cell::new(0);
    let checked = TestRunner::new(config).run(&any_large(), |large| {
        let body = large.body();
        let sent = post(large.route.path(), &body);
        let (taken, reply) = loaded.peak_memory_of(|address| exchange(address, &sent));
        let reply = reply.expect("every request is answered");
        served.set(served.get() + usize::from(reply.status == 200));
        let limit = 4 * body.len() + ALLOWANCE;
        prop_assert!(
            taken <= limit,
            "{} in {} bytes: {taken} bytes taken, {limit} allowed",
            SHAPES[large.shape].0,
            body.len(),
        );
        Ok(())
    });
    checked.unwrap();
    assert!(served.get() > 0, "some of them are served");
    loaded.assert_memory_is_released();
}

/// Sends eight equal requests at once, and checks how much memory the server takes.
fn burst(loaded: &Loaded, path: &str, body: &Value) {
    const AT_ONCE: usize = 8;
    let sent = &post(path, body.to_string());
    let (taken, ()) = loaded.peak_memory_of(|address| {
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| exchange(address, sent).expect("it is answered"));
            }
        });
    });
    let limit = AT_ONCE * 4 * sent.len() + ALLOWANCE;
    assert!(
        taken <= limit,
        "{path}: {taken} bytes taken, {limit} allowed"
    );
}

#[test]
fn memory_is_released_after_many_large_concurrent_requests() {
    let loaded = Loaded::start(&model::smollm2());
    let size = 13 << 20;
    let message = json!([{"role": "user", "content": words(size)}]);
    let bursts = [
        (
            "/v1/chat/completions",
            json!({"messages": message, "max_tokens": 1}),
        ),
        (
            "/v1/responses",
            json!({"input": message, "max_output_tokens": 1}),
        ),
        ("/tokenize", json!({"prompt": words(size)})),
        ("/detokenize", json!({"tokens": vec![1234; size / 5]})),
    ];
    for (path, body) in &bursts {
        burst(&loaded, path, body);
    }
    loaded.assert_memory_is_released();
}

#[test]
fn the_tokenizer_of_a_folder_takes_no_more_memory() {
    let model = small_model();
    let loaded = Loaded::start(model.path());
    burst(&loaded, "/tokenize", &json!({"prompt": words(13 << 20)}));
    loaded.assert_memory_is_released();
}
