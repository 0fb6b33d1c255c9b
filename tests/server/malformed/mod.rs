//! A corpus of bad requests: each gets the right refusal, and none reaches the device.
//! Afterwards the engine's statistics are unchanged and a valid request is answered.

mod bodies;
mod fields;
mod protocol;
mod slow;

use common::http::{Connection, Reply, answered, exchange, post};
use common::requests::idle;
use common::server::TestServer;
use common::{model, server};
use quell::EngineConfig;
use quell::server::ServerOptions;

/// Limit on the bytes of a body. Small, so that the tests need not send much.
const BODY_LIMIT: usize = 1 << 20;

/// A bad request and the expected outcome.
pub struct Case {
    /// What is wrong with the request.
    pub name: String,
    /// All bytes that are sent.
    pub sent: Vec<u8>,
    pub expected: Expected,
}

/// Expected outcome of a bad request.
#[derive(Clone, Debug)]
pub enum Expected {
    /// This status with OpenAI's error object, in which `param` names this field or one inside
    /// it and `code` is this code. `None` accepts anything.
    Refused {
        status: u16,
        param: Option<String>,
        code: Option<&'static str>,
    },
    /// This status. The body may be empty, because HTTP itself is broken.
    Status(u16),
    /// One of these statuses, depending on what the server notices first.
    OneOf([u16; 2]),
    /// No reply: the server closes the connection.
    Closed,
}

impl Expected {
    /// Expects 400 for the body as a whole.
    pub fn bad_body() -> Self {
        Self::refused(400)
    }

    /// Expects an error object that need not name a field.
    pub fn refused(status: u16) -> Self {
        Self::Refused {
            status,
            param: None,
            code: None,
        }
    }

    /// Expects 400 for a field.
    pub fn bad_field(field: &str) -> Self {
        Self::Refused {
            status: 400,
            param: Some(field.to_owned()),
            code: None,
        }
    }

    /// Returns what is wrong with a reply, or `None` if it is as expected.
    fn complaint(&self, reply: Option<&Reply>) -> Option<String> {
        let Some(reply) = reply else {
            return (!matches!(self, Self::Closed)).then(|| "the connection was closed".to_owned());
        };
        let told = format!("{} {}", reply.status, reply.text());
        let wrong = match self {
            Self::Closed => true,
            Self::Status(status) => reply.status != *status,
            Self::OneOf(statuses) => !statuses.contains(&reply.status),
            Self::Refused {
                status,
                param,
                code,
            } => {
                let error = &reply.json()["error"];
                let named = error["param"].as_str().unwrap_or("");
                let inside = |field: &String| {
                    let rest = named.strip_prefix(field.as_str());
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
                };
                reply.status != *status
                    || error["message"].as_str().is_none_or(str::is_empty)
                    || error["message"].as_str().is_some_and(names_a_type)
                    || !error["type"].is_string()
                    || !param.as_ref().is_none_or(inside)
                    || code.is_some_and(|code| error["code"] != code)
            }
        };
        wrong.then_some(told)
    }
}

/// Whether a message contains the name of a Rust type or another term that only Rust code uses.
fn names_a_type(message: &str) -> bool {
    let rust = [
        "u8", "u32", "u64", "usize", "i32", "i64", "f32", "f64", "struct", "enum", "tuple",
        "variant", "variants", "newtype", "sequence", "map", "Option",
    ];
    let mut words = message.split(|c: char| !c.is_alphanumeric());
    words.any(|word| rust.contains(&word))
}

/// Starts a server with an engine that computes nothing.
fn start() -> TestServer {
    start_with(|_| ())
}

fn start_with(change: impl FnOnce(&mut ServerOptions)) -> TestServer {
    let engine = server::null_engine(
        server::tokenizer(&model::smollm2()),
        EngineConfig::default(),
    );
    let mut options = server::options();
    options.max_body_bytes = BODY_LIMIT;
    change(&mut options);
    TestServer::start(engine, options)
}

/// Checks that every case has the expected outcome, that no request is left open, and that the
/// server still works.
fn all_are_refused(server: &TestServer, cases: &[Case]) {
    let before = server.engine.stats().unwrap().outcomes;
    let mut wrong = Vec::new();
    for case in cases {
        let mut connection = Connection::open(server.address);
        // The server may refuse the request and close before all of it is sent.
        let _ = connection.send(&case.sent);
        let reply = match case.expected {
            // These cases include the end of the stream: nothing more may come.
            Expected::Closed => {
                let _ = connection.socket().shutdown(std::net::Shutdown::Write);
                connection.reply()
            }
            _ => connection.reply(),
        };
        if let Some(found) = case.expected.complaint(reply.as_ref()) {
            wrong.push(format!(
                "{}: expected {:?}, got {found}",
                case.name, case.expected
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
    assert_eq!(
        idle(&server.engine).outcomes,
        before,
        "a bad request was accepted"
    );
    still_works(server);
}

/// Checks that a valid request is answered.
fn still_works(server: &TestServer) {
    let reply = exchange(server.address, &good()).unwrap();
    is_answer(server, &reply);
}

/// Like [`still_works`], for a server with short timeouts.
fn still_works_in_time(server: &TestServer) {
    let reply = answered(server.address, &good());
    is_answer(server, &reply);
}

fn good() -> Vec<u8> {
    let body = r#"{"model": "test-model", "prompt": "Hi", "max_tokens": 3}"#;
    post("/v1/completions", body)
}

fn is_answer(server: &TestServer, reply: &Reply) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(reply.json()["usage"]["completion_tokens"], 3);
    idle(&server.engine);
}

#[test]
fn a_wrong_field_is_refused_with_its_name() {
    let server = start();
    for (path, body) in fields::good() {
        let reply = exchange(server.address, &post(path, &body)).unwrap();
        assert_eq!(reply.status, 200, "{path} {body}: {}", reply.text());
    }
    all_are_refused(&server, &fields::cases());
}

#[test]
fn a_body_that_cannot_be_read_is_refused() {
    all_are_refused(&start(), &bodies::cases());
}

#[test]
fn broken_http_is_refused() {
    all_are_refused(&start(), &protocol::cases());
}

#[test]
fn the_corpus_has_at_least_two_hundred_distinct_requests() {
    let cases = [fields::cases(), bodies::cases(), protocol::cases()];
    let mut sent: Vec<_> = cases.iter().flatten().map(|case| &case.sent).collect();
    let all = sent.len();
    sent.sort_unstable();
    sent.dedup();
    assert_eq!(sent.len(), all, "some are the same");
    assert!(all >= 200, "{all} bad requests");
}
