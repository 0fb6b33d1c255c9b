//! Each prompt is rendered once and tokenized once, whatever the request asks for.
//!
//! There is one test in this file because the subscriber is global.

use common::server::{TestServer, options};
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{Engine, EngineConfig, Message, Prompt, Request, Tokenizer};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Writes tools and calls itself.
const KNOWING: &str = "{% if tools %}[tools:{{ tools | tojson }}]{% endif %}\
    {% for m in messages %}[{{ m.role }}:{{ m.content }}\
    {% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}]{% endfor %}\
    {% if add_generation_prompt %}[assistant:{% endif %}";

/// Knows neither tools nor more than one system message, which must come first.
const PLAIN: &str = "{% for m in messages %}\
    {% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}\
    [{{ m.role }}:{{ m.content }}]{% endfor %}";

static RENDERED: AtomicUsize = AtomicUsize::new(0);
static TOKENIZED: AtomicUsize = AtomicUsize::new(0);

/// Counts the runs of chat templates and the texts that are tokenized.
struct Counter;

/// Reads how many bytes a text has.
#[derive(Default)]
struct Bytes(u64);

impl Visit for Bytes {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "bytes" {
            self.0 = value;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl Subscriber for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("quell::text::")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut bytes = Bytes::default();
        event.record(&mut bytes);
        match event.metadata().target() {
            "quell::text::chat::template" => RENDERED.fetch_add(1, Ordering::SeqCst),
            // The empty text shows which special tokens belong around a text.
            "quell::text::tokenizer" => {
                TOKENIZED.fetch_add(bytes.0.min(1) as usize, Ordering::SeqCst)
            }
            target => panic!("an event of {target}"),
        };
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Returns how often a template was run and a text tokenized since the last call.
fn counts() -> (usize, usize) {
    (
        RENDERED.swap(0, Ordering::SeqCst),
        TOKENIZED.swap(0, Ordering::SeqCst),
    )
}

fn serve(template: &str) -> TestServer {
    let fixture = common::root().join("tests/fixtures/text/folder");
    let mut tokenizer = Tokenizer::from_folder(&fixture).unwrap();
    tokenizer.set_chat_template(template).unwrap();
    let template = tokenizer.chat_template().unwrap();
    // Templates are probed when they are first used.
    let probe = [Message::new("system", "S"), Message::new("system", "T")];
    let _ = template.render(&probe, &Default::default());
    template.knows_tools();
    let null = NullOptions {
        vocabulary: tokenizer.vocabulary_size(),
        // Room for the long texts, of which the fixture's tokenizer makes many tokens.
        context_tokens: 1 << 15,
        cache_blocks: 4096,
        ..NullOptions::default()
    };
    let config = EngineConfig::default();
    let engine = Engine::with_runner(config, Some(tokenizer), move || NullRunner::start(null));
    let server = TestServer::start(engine.unwrap(), options());
    counts();
    server
}

/// Returns the beginning of a body.
fn short(body: &Value) -> String {
    body.to_string().chars().take(200).collect()
}

/// Returns `body` with more fields.
fn with(body: &Value, more: Value) -> Value {
    let mut body = body.clone();
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Long enough to be handed over to a worker thread.
fn long() -> String {
    "A few words. ".repeat(2000)
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {}});
    json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
}

/// Requests with a conversation, and the status that they have.
fn conversations() -> Vec<(&'static str, Value, u16)> {
    let chat = json!({"messages": [message("user", "Hi")], "max_tokens": 1});
    let answer = json!({"input": "Hi", "max_output_tokens": 1});
    let call = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
    ]});
    let history = json!([
        message("user", "Hi"), call, {"role": "tool", "tool_call_id": "1", "content": "one"},
    ]);
    let instructed = json!([
        message("system", "S"),
        message("user", "Hi"),
        message("assistant", "Ho"),
        message("developer", "T"),
        message("user", "Ha"),
    ]);
    let open = json!([message("user", "Hi"), message("assistant", "The sea is ")]);
    const CHAT: &str = "/v1/chat/completions";
    let chats = [
        json!({}),
        json!({"stream": true}),
        json!({"n": 3}),
        json!({"prompt_logprobs": 1}),
        json!({"logprobs": true, "top_logprobs": 2}),
        json!({"truncate_prompt_tokens": 3}),
        json!({"messages": [message("user", &long())], "truncate_prompt_tokens": 3}),
        json!({"messages": [message("user", &long())]}),
        json!({"messages": open, "continue_final_message": true}),
        json!({"messages": instructed}),
        json!({"messages": history}),
        json!({"messages": history, "tools": tools()}),
        json!({"tools": tools(), "tool_choice": "none"}),
        json!({"add_special_tokens": true, "reasoning_effort": "low"}),
    ];
    let mut all: Vec<_> = chats.map(|more| (CHAT, with(&chat, more), 200)).into();
    // The model that computes nothing does not keep to a form.
    let forms = [
        json!({"tools": tools(), "tool_choice": "required"}),
        json!({"tools": tools(), "response_format": {"type": "json_object"}}),
        json!({"response_format": {"type": "json_object"}}),
    ];
    all.extend(forms.map(|more| (CHAT, with(&chat, more), 500)));
    let responses = [
        json!({}),
        json!({"instructions": "Be brief."}),
        json!({"truncation": "auto"}),
        json!({"store": false, "stream": true}),
    ];
    all.extend(responses.map(|more| ("/v1/responses", with(&answer, more), 200)));
    all.extend([
        ("/v1/responses/input_tokens", answer, 200),
        ("/tokenize", json!({"messages": history, "tools": tools()}), 200),
        (
            "/tokenize",
            json!({"messages": [message("user", "Hi")], "tools": tools(), "tool_choice": "required"}),
            200,
        ),
        // Refused because it is too long: by its bytes, or by its tokens.
        (CHAT, with(&chat, json!({"max_tokens": 1 << 20})), 400),
    ]);
    all
}

#[test]
fn each_prompt_is_rendered_and_tokenized_once() {
    tracing::subscriber::set_global_default(Counter).unwrap();
    let sent = |server: &TestServer, path: &str, body: &Value, status: u16| {
        let reply = common::api::send(server.address, path, body);
        assert_eq!(
            reply.status,
            status,
            "{path} {}: {}",
            short(body),
            reply.text()
        );
        reply
    };
    for template in [KNOWING, PLAIN] {
        let server = serve(template);
        for (path, body, status) in conversations() {
            sent(&server, path, &body, status);
            assert_eq!(counts(), (1, 1), "{path} {}", short(&body));
        }
        let first = sent(
            &server,
            "/v1/responses",
            &json!({"input": "Hi", "max_output_tokens": 1}),
            200,
        );
        counts();
        let next = json!({
            "input": "Ho", "max_output_tokens": 1, "previous_response_id": first.json()["id"],
        });
        sent(&server, "/v1/responses", &next, 200);
        assert_eq!(counts(), (1, 1));
        // Only a conversation that does not fit is rendered again, to find what fits.
        let long = json!({
            "input": vec![message("user", &"It is me. ".repeat(8)); 2000],
            "max_output_tokens": 1, "truncation": "auto",
        });
        sent(&server, "/v1/responses", &long, 200);
        let (rendered, tokenized) = counts();
        assert!((2..=13).contains(&rendered), "rendered {rendered} times");
        assert_eq!(tokenized, rendered);
    }

    let server = serve(KNOWING);
    let session = sent(&server, "/v1/sessions", &json!({}), 201);
    let session = &session.json()["id"];
    let completion = json!({"prompt": "Hi", "max_tokens": 1});
    for (path, body, expected) in [
        ("/v1/completions", completion.clone(), (0, 1)),
        (
            "/v1/completions",
            with(&completion, json!({"prompt": long()})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"n": 3, "best_of": 4})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"echo": true})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(
                &completion,
                json!({"echo": true, "logprobs": 1, "max_tokens": 0}),
            ),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"prompt_logprobs": 1})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"truncate_prompt_tokens": 1})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"add_special_tokens": false})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"prompt": ["a", "b", [3]]})),
            (0, 2),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"prompt": [1, 2]})),
            (0, 0),
        ),
        (
            "/v1/completions",
            with(&completion, json!({"session_id": session})),
            (0, 1),
        ),
        (
            "/v1/completions",
            with(
                &completion,
                json!({"session_id": session, "add_special_tokens": false}),
            ),
            (0, 1),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [message("user", "Hi")], "max_tokens": 1, "session_id": session}),
            (1, 1),
        ),
        ("/v1/embeddings", json!({"input": ["a", "b", [3]]}), (0, 2)),
        (
            "/v1/embeddings",
            json!({"input": "a b c", "truncate_prompt_tokens": 1}),
            (0, 1),
        ),
        ("/tokenize", json!({"prompt": long()}), (0, 1)),
    ] {
        sent(&server, path, &body, 200);
        assert_eq!(counts(), expected, "{path} {}", short(&body));
    }

    let engine = &server.engine;
    let request = || Request::new(vec![Message::new("user", "Hi")]).max_tokens(1);
    drop(engine.generate(request()).unwrap());
    assert_eq!(counts(), (1, 1));
    drop(engine.generate_samples(request(), 3).unwrap());
    assert_eq!(counts(), (1, 1));
    let prompts = vec![Prompt::from("a"), Prompt::from("b")];
    drop(engine.generate_prompts(request(), prompts, 2).unwrap());
    assert_eq!(
        counts(),
        (0, 2),
        "the prompt of the request itself is ignored"
    );
    drop(engine.session().generate(request()).unwrap());
    assert_eq!(counts(), (1, 1));
    let tokens = engine
        .tokenize(Prompt::Chat(vec![Message::new("user", "Hi")]))
        .unwrap();
    assert_eq!(counts(), (1, 1));
    drop(engine.generate(Request::new(tokens)).unwrap());
    assert_eq!(counts(), (0, 0));
}
