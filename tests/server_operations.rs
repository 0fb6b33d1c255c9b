//! What those who run a server rely on: keys, TLS, origins, ids, limits of time, and an
//! end that loses nothing.

#![cfg(feature = "server")]

#[path = "common/http.rs"]
mod http;
#[path = "common/model.rs"]
mod model;
#[path = "common/serve.rs"]
mod serve;
#[path = "common/server.rs"]
mod server;
#[path = "common/sim.rs"]
mod sim;

use http::{Connection, Reply, answered, exchange, get, post};
use quell::EngineConfig;
use quell::server::{ApiKeys, ServeError, Server, ServerOptions, TlsFiles};
use serde_json::Value;
use serve::Serve;
use server::{TestServer, null_engine, options, tokenizer};
use sim::SimOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

const COMPLETION: &str = r#"{"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true}"#;

/// The same as events.
fn streamed() -> String {
    COMPLETION.replace("\"max_tokens\"", "\"stream\": true, \"max_tokens\"")
}

fn start(change: impl FnOnce(&mut ServerOptions)) -> TestServer {
    let mut options = options();
    change(&mut options);
    let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
    TestServer::start(engine, options)
}

/// A request with more headers.
fn with_headers(request: &[u8], headers: &str) -> Vec<u8> {
    let text = String::from_utf8(request.to_vec()).unwrap();
    text.replacen("\r\n", &format!("\r\n{headers}"), 1)
        .into_bytes()
}

fn ask(address: SocketAddr, request: &[u8]) -> Reply {
    exchange(address, request).expect("the server answers")
}

#[test]
fn who_brings_no_key_or_a_wrong_one_is_refused() {
    let server = start(|options| options.api_keys = ApiKeys::parse("one\ntwo"));
    let bring = |header: &str| {
        let request = with_headers(&post("/v1/completions", COMPLETION), header);
        ask(server.address, &request)
    };
    for header in [
        "",
        "Authorization: Bearer three\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Basic one\r\n",
    ] {
        let reply = bring(header);
        assert_eq!(reply.status, 401, "{header:?}");
        assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    }
    for key in ["one", "two"] {
        let reply = bring(&format!("Authorization: Bearer {key}\r\n"));
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    // A wrong address is not told to strangers either.
    assert_eq!(ask(server.address, &get("/v1/nothing")).status, 401);
    for open in ["/health", "/ready"] {
        assert_eq!(ask(server.address, &get(open)).status, 200, "{open}");
    }
}

#[test]
fn a_request_keeps_its_id_or_gets_one() {
    let server = start(|_| ());
    let named = with_headers(&get("/health"), "X-Request-Id: mine-17\r\n");
    let reply = ask(server.address, &named);
    assert_eq!(reply.header("x-request-id"), Some("mine-17"));
    let [first, second] = [(); 2].map(|()| {
        let reply = ask(server.address, &get("/v1/nothing"));
        assert_eq!(reply.status, 404);
        reply.header("x-request-id").unwrap().to_owned()
    });
    assert!(!first.is_empty() && first != second);
}

#[test]
fn pages_of_other_origins_are_served_only_if_they_are_allowed() {
    let preflight = |origin: &str| {
        let headers = format!(
            "Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\
             Access-Control-Request-Headers: content-type\r\n"
        );
        let request = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: quell\r\n\r\n";
        with_headers(request.as_bytes(), &headers)
    };
    let allowed = "access-control-allow-origin";
    let friend = "https://friend.example";
    let server = start(|options| {
        options.allowed_origins = vec![friend.to_owned()];
        // A preflight has no key.
        options.api_keys = ApiKeys::parse("key");
    });
    let reply = ask(server.address, &preflight(friend));
    assert_eq!((reply.status, reply.header(allowed)), (200, Some(friend)));
    let reply = ask(server.address, &preflight("https://stranger.example"));
    assert_eq!(reply.header(allowed), None);
    let closed = start(|_| ());
    assert_eq!(
        ask(closed.address, &preflight(friend)).header(allowed),
        None
    );
}

#[test]
fn headers_and_bodies_that_never_end_are_cut_off() {
    let short = Duration::from_millis(200);
    let server = start(|options| options.header_timeout = short);
    let mut slow = Connection::open(server.address);
    // It may have lost its patience already.
    let _ = slow.send(b"GET /health HTTP/1.1\r\nHost: qu");
    let reply = slow.reply();
    assert!(reply.is_none_or(|reply| reply.status == 408));

    let server = start(|options| options.body_timeout = short);
    let mut slow = Connection::open(server.address);
    let request = post("/v1/completions", COMPLETION);
    slow.send(&request[..request.len() - 5]).unwrap();
    let reply = slow.reply().unwrap();
    assert_eq!(reply.status, 408, "{}", reply.text());
    assert_eq!(answered(server.address, &request).status, 200);
}

/// Files with a certificate for this machine, and its key.
fn certificate(folder: &std::path::Path) -> (TlsFiles, Vec<u8>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = TlsFiles {
        certificate: folder.join("certificate.pem"),
        key: folder.join("key.pem"),
    };
    let pem = made.cert.pem();
    std::fs::write(&files.certificate, &pem).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    (files, pem.into_bytes())
}

#[test]
fn https_is_served_with_the_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (files, pem) = certificate(folder.path());
    let server = start(|options| options.tls = Some(files));
    // Somebody may have installed it already.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(&pem).unwrap()])
        .resolve("localhost", server.address)
        .build()
        .unwrap();
    let url = format!("https://localhost:{}", server.address.port());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let body: Value = serde_json::from_str(COMPLETION).unwrap();
        let request = client.post(format!("{url}/v1/completions")).json(&body);
        request.send().await.unwrap().json::<Value>().await.unwrap()
    });
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    // Who speaks no TLS gets no answer.
    let mut plain = Connection::open(server.address);
    plain.send(&get("/health")).unwrap();
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut plain.socket(), &mut rest);
    assert!(!rest.starts_with(b"HTTP"));
}

#[test]
fn a_certificate_or_an_origin_that_is_none_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = certificate(folder.path());
    let mut broken = files.clone();
    broken.key = folder.path().join("missing.pem");
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "no PEM").unwrap();
    let bind = |change: &dyn Fn(&mut ServerOptions)| {
        let mut options = options();
        change(&mut options);
        let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        runtime
            .block_on(Server::bind(engine, options, any))
            .unwrap_err()
    };
    let error = bind(&|options| options.tls = Some(broken.clone()));
    assert!(error.to_string().contains("missing.pem"), "{error}");
    let error = bind(&|options| {
        options.tls = Some(TlsFiles {
            certificate: empty.clone(),
            ..files.clone()
        });
    });
    assert!(error.to_string().contains("no certificate"), "{error}");
    let error = bind(&|options| options.allowed_origins = vec!["friend".to_owned()]);
    assert!(matches!(error, ServeError::Origin { .. }), "{error}");
}

#[test]
fn an_address_in_use_is_named() {
    let first = start(|_| ());
    let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error = runtime
        .block_on(Server::bind(engine, options(), first.address))
        .unwrap_err();
    assert!(
        error.to_string().contains(&first.address.to_string()),
        "{error}"
    );
}

#[test]
fn more_requests_than_are_accepted_are_told_to_come_back() {
    let (permits, gate) = std::sync::mpsc::channel();
    let sim = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_open_requests: 1,
        ..EngineConfig::default()
    };
    let engine = sim::engine_with_text(sim, config, tokenizer(&model::smollm2()));
    let server = TestServer::start(engine, options());
    let mut open = Connection::open(server.address);
    // Its answer begins when the request is taken.
    open.send(&post("/v1/completions", streamed())).unwrap();
    assert_eq!(open.head().unwrap().status, 200);
    let reply = ask(server.address, &post("/v1/completions", COMPLETION));
    assert_eq!(reply.status, 429, "{}", reply.text());
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    drop(permits);
    assert!(events(&mut open).ends_with("data: [DONE]\n\n"));
}

/// The data of the events of a stream that is read to its end.
fn events(connection: &mut Connection) -> String {
    let chunks = std::iter::from_fn(|| connection.chunk());
    String::from_utf8(chunks.flatten().collect()).unwrap()
}

#[test]
fn a_server_that_stops_finishes_what_it_has_and_says_that_it_takes_no_more() {
    let (permits, gate) = std::sync::mpsc::channel();
    let sim = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig::default();
    let engine = sim::engine_with_text(sim, config, tokenizer(&model::smollm2()));
    let server = TestServer::start(engine, options());
    let mut stream = Connection::open(server.address);
    stream.send(&post("/v1/completions", streamed())).unwrap();
    assert_eq!(stream.head().unwrap().status, 200);
    permits.send(()).unwrap();
    let address = server.address;
    assert_eq!(ask(address, &get("/ready")).status, 200);
    let stopping = server.stop();
    let ready = || ask(address, &get("/ready")).status;
    assert!(
        (0..100_000).any(|_| ready() == 503),
        "it is not ready any more"
    );
    assert_eq!(ask(address, &get("/health")).status, 200, "but it lives");
    let late = ask(address, &post("/v1/completions", COMPLETION));
    assert_eq!(late.status, 503);
    assert_eq!(late.header("retry-after"), Some("5"));
    assert_eq!(late.header("connection"), Some("close"));
    drop(permits);
    let events = events(&mut stream);
    assert!(events.contains("\"finish_reason\":\"length\""), "{events}");
    assert!(events.ends_with("data: [DONE]\n\n"), "{events}");
    stopping.join();
}

#[test]
fn a_server_that_is_told_to_stop_ends_by_itself() {
    let server = Serve::start(&model::smollm2(), &[]);
    let mut stream = Connection::open(server.address);
    let body = r#"{"prompt": "Once", "max_tokens": 40, "ignore_eos": true, "stream": true}"#;
    stream.send(&post("/v1/completions", body)).unwrap();
    assert_eq!(stream.head().unwrap().status, 200);
    let ending = std::thread::spawn(move || server.ends_when_told());
    let events = events(&mut stream);
    assert!(events.contains("\"finish_reason\":\"length\""), "{events}");
    ending.join().unwrap();
}

#[test]
fn settings_come_from_the_flag_then_the_environment_then_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("quell.toml");
    let write = |text: &str| {
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    let serve = |arguments: &[&str], variable: Option<&str>| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_quell"));
        command
            .args(["serve", "--config"])
            .arg(&path)
            .args(arguments);
        command.env_remove("QUELL_MAX_BODY_MIB");
        command.envs(variable.map(|value| ("QUELL_MAX_BODY_MIB", value)));
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    };
    // A wrong value shows which of them counts.
    write("model = \"none.gguf\"\nmax-body-mib = 'file'");
    assert!(serve(&[], None).contains("'file'"));
    assert!(serve(&[], Some("variable")).contains("'variable'"));
    let flag = ["--max-body-mib", "flag"];
    assert!(serve(&flag, Some("variable")).contains("'flag'"));
    write("max-boddy-mib = 1");
    assert!(serve(&[], None).contains("\"max-boddy-mib\""));
    write("model = ");
    assert!(serve(&[], None).contains("is no TOML"));
    write("model = \"none.gguf\"\nmax-connections = 0");
    assert!(serve(&[], None).contains("--max-connections is 0"));
}
