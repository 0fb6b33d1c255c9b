//! What operators of a server rely on: keys, TLS, origins, ids, timeouts, and a shutdown that
//! loses nothing.

use common::http::{Connection, Reply, answered, exchange, get, post, with_headers};
use common::serve::Serve;
use common::server::{TestServer, null_engine, options, tokenizer};
use common::{api, model, parrot, serve};
use quell::server::{ApiKeys, ServeError, Server, ServerOptions, TlsFiles};
use quell::{Engine, EngineConfig, LoadOptions, SamplingDefaults};
use serde_json::{Value, json};
use sim::SimOptions;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

const COMPLETION: &str = r#"{"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true}"#;

/// The same request as a stream.
fn streamed() -> String {
    COMPLETION.replace("\"max_tokens\"", "\"stream\": true, \"max_tokens\"")
}

fn start(change: impl FnOnce(&mut ServerOptions)) -> TestServer {
    let mut options = options();
    change(&mut options);
    let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
    TestServer::start(engine, options)
}

fn ask(address: SocketAddr, request: &[u8]) -> Reply {
    exchange(address, request).expect("the server answers")
}

#[test]
fn requests_without_a_valid_key_are_refused() {
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
    for header in [
        "Authorization: Bearer one\r\n",
        "Authorization: Bearer two\r\n",
        "X-API-Key: two\r\n",
        "X-API-Key: one\r\nAuthorization: Bearer three\r\n",
        "X-API-Key: three\r\nAuthorization: Bearer one\r\n",
    ] {
        let reply = bring(header);
        assert_eq!(reply.status, 200, "{header:?}: {}", reply.text());
    }
    assert_eq!(bring("X-API-Key: three\r\n").status, 401);
    assert_eq!(bring("X-API-Key: \r\n").status, 401);
    // Without a key, even an unknown path is answered with 401.
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
fn cross_origin_requests_are_served_only_from_allowed_origins() {
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
        // A preflight carries no key.
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
fn a_preflight_allows_all_headers_from_an_allowed_origin() {
    let server = start(|options| options.allowed_origins = vec!["*".to_owned()]);
    let asked = "authorization, content-type, x-api-key, x-stainless-os, openai-organization, \
                 idempotency-key, something-of-next-year";
    let headers = format!(
        "Origin: http://localhost:3000\r\nAccess-Control-Request-Method: POST\r\n\
         Access-Control-Request-Headers: {asked}\r\n"
    );
    let request = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: quell\r\n\r\n";
    let reply = ask(server.address, &with_headers(request.as_bytes(), &headers));
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-headers"), Some(asked));
}

#[test]
fn without_keys_cross_site_requests_are_refused() {
    let server = start(|_| ());
    let plain = String::from_utf8(post("/v1/completions", COMPLETION)).unwrap();
    let send = |request: &str| ask(server.address, request.as_bytes());
    // A page may send these without a preflight: no content type, or one that is not JSON.
    for kind in ["", "Content-Type: text/plain\r\n"] {
        let reply = send(&plain.replace("Content-Type: application/json\r\n", kind));
        assert_eq!(reply.status, 415, "{kind:?}");
    }
    let origin = |origin: &str| plain.replacen("\r\n", &format!("\r\nOrigin: {origin}\r\n"), 1);
    let reply = send(&origin("https://evil.example"));
    assert_eq!(reply.status, 403);
    assert_eq!(reply.json()["error"]["code"], "origin_not_allowed");
    assert_eq!(send(&origin("http://quell")).status, 200);
    // DNS rebinding: the page's own host name resolves to our address.
    let named = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    let reply = send(&named("/v1/engine/snapshot"));
    assert_eq!(reply.status, 403);
    assert_eq!(reply.json()["error"]["code"], "host_not_allowed");
    assert_eq!(send(&named("/health")).status, 200);
    assert_eq!(send(&named("/ready")).status, 200);
}

#[test]
fn priorities_are_limited_by_the_key() {
    let (server, permits) = gated(|options| {
        options.api_keys = ApiKeys::parse("usual\nurgent max-priority=-7");
        options.max_priority = -2;
    });
    let mut open = Vec::new();
    for (key, asked, expected) in [
        ("usual", -1_000_000, -2),
        ("usual", -1, -1),
        ("usual", 5, 5),
        ("urgent", -1_000_000, -7),
        ("urgent", -3, -3),
    ] {
        let priority = format!("\"priority\": {asked}, \"max_tokens\"");
        let body = streamed().replace("\"max_tokens\"", &priority);
        let key = format!("Authorization: Bearer {key}\r\n");
        let mut connection = Connection::open(server.address);
        let request = with_headers(&post("/v1/completions", body), &key);
        connection.send(&request).unwrap();
        assert_eq!(connection.head().unwrap().status, 200);
        open.push((connection, expected));
    }
    // Until now, the first step has waited at the gate while the requests arrived.
    permits.send(()).unwrap();
    let snapshot = server.engine.snapshot();
    drop(permits);
    let snapshot = snapshot.wait().unwrap();
    let priorities: Vec<_> = snapshot.requests.iter().map(|open| open.priority).collect();
    let expected: Vec<_> = open.iter().map(|(_, priority)| *priority).collect();
    assert_eq!(priorities, expected);
}

/// Returns how many tokens of the prompt were cached, according to the answer.
fn cached(reply: &Reply) -> u64 {
    let json = reply.json();
    let details = &json["usage"]["prompt_tokens_details"];
    let cached = details["cached_tokens"].as_u64();
    cached.unwrap_or_else(|| panic!("{}", reply.text()))
}

#[test]
fn cached_prefixes_are_not_shared_between_keys_or_salts() {
    let server = start(|options| options.api_keys = ApiKeys::parse("alice\nmallory"));
    let prompt: Vec<u32> = (0..64).collect();
    let send = |key: &str, salt: &str| {
        let body = format!("{{\"prompt\": {prompt:?}, \"max_tokens\": 1{salt}}}");
        let key = format!("X-API-Key: {key}\r\n");
        ask(
            server.address,
            &with_headers(&post("/v1/completions", body), &key),
        )
    };
    let salt = ", \"cache_salt\": \"pepper\"";
    assert_eq!(cached(&send("alice", "")), 0);
    assert!(cached(&send("alice", "")) > 0);
    assert_eq!(
        cached(&send("mallory", "")),
        0,
        "the cache reveals another key's prompt"
    );
    assert_eq!(cached(&send("alice", salt)), 0);
    assert!(cached(&send("alice", salt)) > 0);
    assert_eq!(cached(&send("mallory", salt)), 0);
    for wrong in [
        "\"\"".to_owned(),
        "5".to_owned(),
        format!("{:?}", "é".repeat(129)),
    ] {
        let reply = send("alice", &format!(", \"cache_salt\": {wrong}"));
        assert_eq!(reply.status, 400, "{wrong}");
        assert_eq!(reply.json()["error"]["param"], "cache_salt", "{wrong}");
    }
    let open = start(|_| ());
    let send = |salt: &str| {
        let body = format!("{{\"prompt\": {prompt:?}, \"max_tokens\": 1{salt}}}");
        cached(&ask(open.address, &post("/v1/completions", body)))
    };
    assert_eq!(send(""), 0);
    assert_eq!(send(salt), 0);
    assert!(send(salt) > 0);
    assert!(
        send("") > 0,
        "without keys, unsalted prompts share cached prefixes"
    );
}

#[test]
fn headers_and_bodies_that_never_end_time_out() {
    let short = Duration::from_millis(200);
    let server = start(|options| options.header_timeout = short);
    let mut slow = Connection::open(server.address);
    // The server may have given up already.
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

/// A timeout that a test can reach.
const SHORT: Duration = Duration::from_millis(200);

/// Opens a connection and uses it once.
fn used(address: SocketAddr) -> Connection {
    // The timeout for the first request's head may be too short for a slow machine.
    loop {
        let mut connection = Connection::open(address);
        let _ = connection.send(&get("/health"));
        if let Some(reply) = connection.reply() {
            assert_eq!(reply.status, 200);
            return connection;
        }
    }
}

#[test]
fn the_header_timeout_does_not_apply_to_idle_connections() {
    let server = start(|options| options.header_timeout = SHORT);
    let mut idle = used(server.address);
    assert!(!idle.answers_within(3 * SHORT), "the connection was closed");
    // An empty line between requests does not start a head either.
    idle.send(b"\r\n").unwrap();
    assert!(!idle.answers_within(3 * SHORT), "the connection was closed");
    idle.send(&get("/health")).unwrap();
    assert_eq!(
        idle.reply().expect("the connection is still open").status,
        200
    );
    // The timeout starts once a head has begun.
    idle.send(b"GET /health HTTP/1.1\r\nHo").unwrap();
    assert!(idle.reply().is_none_or(|reply| reply.status == 408));
}

#[test]
fn a_connection_is_closed_when_idle_for_too_long() {
    let server = start(|options| options.keep_alive_timeout = SHORT);
    let mut idle = used(server.address);
    assert!(idle.reply().is_none());
    // A connection is not idle while its request is being answered.
    assert_eq!(
        ask(server.address, &post("/v1/completions", COMPLETION)).status,
        200
    );
}

/// Starts a server whose steps each wait for a permit, and returns it with the sender of the
/// permits. Dropping the sender lets all steps run.
fn gated(change: impl FnOnce(&mut ServerOptions)) -> (TestServer, std::sync::mpsc::Sender<()>) {
    let (permits, gate) = std::sync::mpsc::channel();
    let sim = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig::default();
    let engine = sim::engine_with_text(sim, config, tokenizer(&model::smollm2()));
    let mut options = options();
    change(&mut options);
    (TestServer::start(engine, options), permits)
}

/// Starts a stream and reads the head of the reply.
fn streaming(address: SocketAddr) -> Connection {
    let mut stream = Connection::open(address);
    stream.send(&post("/v1/completions", streamed())).unwrap();
    assert_eq!(stream.head().expect("an answer").status, 200);
    stream
}

#[test]
fn idle_connections_make_room_for_new_ones() {
    let (server, permits) = gated(|options| {
        options.max_connections = 3;
        options.max_connections_per_address = Some(3);
    });
    let address = server.address;
    let mut stream = streaming(address);
    let mut oldest = used(address);
    let mut newest = used(address);
    let mut new = used(address);
    assert!(oldest.reply().is_none(), "an idle connection is closed");
    for kept in [&mut newest, &mut new] {
        kept.send(&get("/health")).unwrap();
        assert_eq!(kept.reply().expect("it is kept").status, 200);
    }
    // Connections that have not sent anything yet make room too.
    let mut silent: Vec<_> = (0..10).map(|_| Connection::open(address)).collect();
    assert_eq!(ask(address, &get("/health")).status, 200);
    assert!(silent[0].reply().is_none(), "an idle connection is closed");
    drop(permits);
    assert!(events(&mut stream).ends_with("data: [DONE]\n\n"));
}

#[test]
fn connections_per_address_are_limited() {
    let (server, permits) = gated(|options| options.max_connections_per_address = Some(2));
    let address = server.address;
    let mut streams = [streaming(address), streaming(address)];
    let mut third = Connection::open(address);
    let _ = third.send(&get("/health"));
    assert!(third.reply().is_none(), "the connection is refused");
    // There is room for other addresses.
    let socket = socket_from([127, 0, 0, 2], address);
    let mut other = Connection::over(socket);
    other.send(&get("/health")).unwrap();
    assert_eq!(other.reply().expect("an answer").status, 200);
    drop(permits);
    for stream in &mut streams {
        assert!(events(stream).ends_with("data: [DONE]\n\n"));
    }
    // The connections of the finished streams are idle now.
    assert_eq!(ask(address, &get("/health")).status, 200);
}

/// Connects from another loopback address.
fn socket_from(own: [u8; 4], address: SocketAddr) -> std::net::TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let connect = async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((own, 0))).unwrap();
        socket.connect(address).await.unwrap().into_std().unwrap()
    };
    let socket = runtime.block_on(connect);
    socket.set_nonblocking(false).unwrap();
    socket
}

/// Writes a certificate for localhost and its key to `folder`. Also returns the certificate as
/// PEM.
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
fn https_is_served_with_the_given_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (files, pem) = certificate(folder.path());
    let server = start(|options| options.tls = Some(files));
    // An error here means that a provider is already installed.
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
    // A client that does not speak TLS gets no answer.
    let mut plain = Connection::open(server.address);
    plain.send(&get("/health")).unwrap();
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut plain.socket(), &mut rest);
    assert!(!rest.starts_with(b"HTTP"));
}

#[test]
fn an_invalid_certificate_or_origin_is_refused_at_startup() {
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
fn an_address_in_use_is_reported() {
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
fn requests_beyond_the_limit_get_429_with_retry_after() {
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
    // The head of its reply shows that the request was accepted.
    open.send(&post("/v1/completions", streamed())).unwrap();
    assert_eq!(open.head().unwrap().status, 200);
    let reply = ask(server.address, &post("/v1/completions", COMPLETION));
    assert_eq!(reply.status, 429, "{}", reply.text());
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    drop(permits);
    assert!(events(&mut open).ends_with("data: [DONE]\n\n"));
}

/// Reads a stream to its end and returns its events.
fn events(connection: &mut Connection) -> String {
    let chunks = std::iter::from_fn(|| connection.chunk());
    String::from_utf8(chunks.flatten().collect()).unwrap()
}

#[test]
fn a_stopping_server_finishes_open_requests_and_refuses_new_ones() {
    let (server, permits) = gated(|_| ());
    let mut stream = streaming(server.address);
    permits.send(()).unwrap();
    let address = server.address;
    assert_eq!(ask(address, &get("/ready")).status, 200);
    let stopping = server.stop();
    let ready = || ask(address, &get("/ready")).status;
    assert!(
        (0..100_000).any(|_| ready() == 503),
        "the server is no longer ready"
    );
    assert_eq!(
        ask(address, &get("/health")).status,
        200,
        "but the server is alive"
    );
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
fn a_stop_signal_ends_the_server_after_its_open_requests() {
    let server = Serve::start(&model::smollm2(), &[]);
    let mut stream = Connection::open(server.address);
    let body = r#"{"prompt": "Once", "max_tokens": 40, "ignore_eos": true, "stream": true}"#;
    stream.send(&post("/v1/completions", body)).unwrap();
    assert_eq!(stream.head().unwrap().status, 200);
    let ending = std::thread::spawn(move || server.terminate());
    let events = events(&mut stream);
    assert!(events.contains("\"finish_reason\":\"length\""), "{events}");
    ending.join().unwrap();
}

/// Starts a stream that lasts longer than the test.
fn long_stream(address: SocketAddr) -> Connection {
    let mut stream = Connection::open(address);
    let body = r#"{"prompt": "Once", "max_tokens": 8000, "ignore_eos": true, "stream": true}"#;
    stream.send(&post("/v1/completions", body)).unwrap();
    assert_eq!(stream.head().unwrap().status, 200);
    stream
}

/// Reads stderr up to a line that contains this text.
fn until(stderr: &mut impl BufRead, text: &str) {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert!(
            stderr.read_line(&mut line).unwrap() > 0,
            "the log never contains {text:?}"
        );
    }
}

#[test]
fn a_second_signal_cancels_open_requests() {
    for (first, second) in [("TERM", "TERM"), ("HUP", "TERM"), ("INT", "HUP")] {
        let mut command = Serve::command(&model::smollm2(), &["--drain-timeout", "100000"]);
        let mut server = Serve::spawn(command.stderr(Stdio::piped()));
        let mut stderr = BufReader::new(server.take_stderr());
        let mut stream = long_stream(server.address);
        server.signal(first);
        until(&mut stderr, "finishing the open requests");
        server.signal(second);
        let ended = server.ended();
        assert!(ended.success(), "{first}, {second}: {ended}");
        let events = events(&mut stream);
        assert!(events.contains("cancelled: shutdown"), "{events}");
    }
}

#[test]
fn sighup_is_ignored_under_nohup() {
    let plain = Serve::command(&model::smollm2(), &[]);
    let mut command = Command::new("nohup");
    command.arg(plain.get_program()).args(plain.get_args());
    let server = Serve::spawn(command.stderr(Stdio::null()));
    server.signal("HUP");
    // If the server had handled the signal, it would be draining by now.
    assert_eq!(ask(server.address, &get("/ready")).status, 200);
    server.terminate();
}

#[test]
fn a_stop_signal_ends_a_server_that_does_not_listen_yet() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    assert!(
        Command::new("mkfifo")
            .arg(&keys)
            .status()
            .unwrap()
            .success()
    );
    for signal in ["TERM", "HUP"] {
        let arguments = ["--api-key-file", keys.to_str().unwrap()];
        let mut command = Serve::command(&model::smollm2(), &arguments);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        // Opening the pipe returns once the server has opened it too; the server then waits for
        // keys.
        let pipe = std::fs::File::options().write(true).open(&keys).unwrap();
        serve::signal(&child, signal);
        let ended = child.wait().unwrap();
        assert!(ended.success(), "{signal}: {ended}");
        drop(pipe);
    }
}

#[test]
fn an_unread_log_does_not_block_requests() {
    let mut command = Serve::command(&model::smollm2(), &["--drain-timeout", "1"]);
    command.env("QUELL_LOG", "trace").stderr(Stdio::piped());
    let mut server = Serve::spawn(&mut command);
    let mut stderr = server.take_stderr();
    let dropped = "quell_log_lines_dropped_total";
    let mut asked = 0;
    while server.metric(dropped) == 0.0 {
        assert_eq!(ask(server.address, &get("/v1/models")).status, 200);
        asked += 1;
        assert!(asked < 100_000, "nothing is dropped");
    }
    // The server still notices that a client disconnects, and frees what its request held.
    drop(long_stream(server.address));
    server.wait_until_idle();
    assert_eq!(ask(server.address, &get("/health")).status, 200);
    // Once it is read again, the log goes on and reports that lines are missing.
    let (found, is_found) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut stderr = BufReader::new(&mut stderr);
        until(&mut stderr, "log lines were dropped");
        found.send(()).unwrap();
        std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    });
    is_found.recv().unwrap();
    server.signal("TERM");
    assert!(server.ended().success());
    reader.join().unwrap();
}

#[test]
fn a_server_exits_even_if_its_log_is_unread() {
    let mut command = Serve::command(&model::smollm2(), &[]);
    command.env("QUELL_LOG", "trace").stderr(Stdio::piped());
    let mut server = Serve::spawn(&mut command);
    let stderr = server.take_stderr();
    while server.metric("quell_log_lines_dropped_total") == 0.0 {}
    server.signal("TERM");
    let ended = server.ended();
    assert!(ended.success(), "{ended}");
    drop(stderr);
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
        let mut command = Command::new(common::program::path());
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
    // The error shows which of the wrong values is used.
    write("model = \"none.gguf\"\nmax-body-mib = 'file'");
    assert!(serve(&[], None).contains("'file'"));
    assert!(serve(&[], Some("variable")).contains("'variable'"));
    let flag = ["--max-body-mib", "flag"];
    assert!(serve(&flag, Some("variable")).contains("'flag'"));
    write("max-boddy-mib = 1");
    assert!(serve(&[], None).contains("\"max-boddy-mib\""));
    write("model = ");
    assert!(serve(&[], None).contains("is not valid TOML"));
    write("model = \"none.gguf\"\nmax-connections = 0");
    assert!(serve(&[], None).contains("--max-connections is 0"));
}

#[test]
fn sampling_defaults_of_the_model_apply_to_requests() {
    let tiny = common::root().join("tests/fixtures/golden/tiny/llama");
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny.join(name), copy.path().join(name)).unwrap();
    }
    let settings = r#"{"do_sample": true, "temperature": 0.9, "top_k": 1}"#;
    std::fs::write(copy.path().join("generation_config.json"), settings).unwrap();
    let config = EngineConfig {
        kv_cache_bytes: Some(8 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(copy.path(), config, LoadOptions::cpu()).unwrap();
    let server = TestServer::start(engine, options());
    let answer = |fields: &str| {
        let body = format!(
            r#"{{"prompt": [126, 36, 304], "max_tokens": 24, "ignore_eos": true, "logprobs": 1{fields}}}"#
        );
        let reply = ask(server.address, &post("/v1/completions", &body));
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["choices"][0]["logprobs"]["token_logprobs"].clone()
    };
    let greedy = answer(r#", "temperature": 0"#);
    assert_eq!(answer(""), greedy);
    assert_eq!(
        answer(r#", "temperature": 5"#),
        greedy,
        "top_k is the model's"
    );
    assert_ne!(answer(r#", "temperature": 5, "top_k": -1"#), greedy);
}

#[test]
fn the_models_own_limit_on_new_tokens_applies_to_requests_that_set_none() {
    const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let start = |limit| {
        let mut defaults = SamplingDefaults::default();
        defaults.max_tokens = Some(limit);
        TestServer::start(parrot::engine_with_defaults(TEMPLATE, defaults), options())
    };
    let words = parrot::say("one two three four five six seven eight");
    let server = start(3);
    let chat = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": words}]});
        let fields = fields.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let answer = api::ask(server.address, "/v1/chat/completions", &body);
        let reason = answer["choices"][0]["finish_reason"].clone();
        (answer["usage"]["completion_tokens"].clone(), reason)
    };
    assert_eq!(chat(json!({})), (json!(3), json!("length")));
    assert_eq!(
        chat(json!({"max_tokens": null})),
        (json!(3), json!("length"))
    );
    assert_eq!(chat(json!({"max_tokens": 2})), (json!(2), json!("length")));
    assert_eq!(chat(json!({"max_tokens": 500})).1, "stop");
    assert_eq!(chat(json!({"min_tokens": 5})), (json!(5), json!("length")));
    let answer = api::ask(server.address, "/v1/responses", &json!({"input": words}));
    assert_eq!(answer["usage"]["output_tokens"], 3);
    // Completions have a default of their own, as in OpenAI's API.
    let body = json!({"prompt": words});
    let answer = api::ask(server.address, "/v1/completions", &body);
    assert!(
        answer["usage"]["completion_tokens"].as_u64() > Some(3),
        "{answer}"
    );
    // A limit beyond the context is no reason to refuse a request.
    let server = start(1_000_000);
    let body = json!({"messages": [{"role": "user", "content": words}]});
    let answer = api::ask(server.address, "/v1/chat/completions", &body);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}
