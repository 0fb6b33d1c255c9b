//! `quell bench --server`: its counts agree with the server's, and it reports servers that
//! misbehave.

use quell::internals::runner::{NullOptions, NullRunner};
use quell::server::{Server, ServerOptions};
use quell::{Engine, EngineConfig, EngineStats, Tokenizer};
use serde_json::Value;
use sim::{SimOptions, engine};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// An engine behind an HTTP server.
struct Served {
    engine: Engine,
    url: String,
    runtime: Runtime,
}

fn serve(engine: Engine) -> Served {
    let runtime = Runtime::new().unwrap();
    let options = ServerOptions::new("null");
    let server = Server::bind(engine.clone(), options, "127.0.0.1:0".to_owned());
    let server = runtime.block_on(server).unwrap();
    let url = format!("http://{}", server.local_addr());
    runtime.spawn(server.run(std::future::pending()));
    Served {
        engine,
        url,
        runtime,
    }
}

fn null_engine() -> Engine {
    let folder = common::root().join("tests/fixtures/text/folder");
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    let options = NullOptions {
        vocabulary: tokenizer.vocabulary_size(),
        ..NullOptions::default()
    };
    let start = move || NullRunner::start(options);
    Engine::with_runner(EngineConfig::default(), Some(tokenizer), start).unwrap()
}

/// Waits until `done` returns true. Fails with `what` if that takes too long.
fn wait_until(mut done: impl FnMut() -> bool, what: &str) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::yield_now();
    }
}

impl Served {
    /// Waits until the server has noticed that all clients are gone.
    fn unconnected(&self) {
        // Besides one task per connection, one accepts connections and one ends idle sessions.
        let tasks = || self.runtime.metrics().num_alive_tasks();
        wait_until(|| tasks() <= 2, "a connection lives on");
    }

    /// Waits until no request is open and returns the engine's statistics.
    fn idle(&self) -> EngineStats {
        let stats = || self.engine.stats().unwrap();
        wait_until(|| stats().is_idle(), "a request stays open");
        stats()
    }
}

fn bench(url: &str, args: &str) -> Command {
    let mut command = Command::new(common::program::path());
    command.args(["bench", "--server", url, "--format", "json"]);
    command.args(args.split_whitespace());
    for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command.env_remove("QUELL_LOG");
    command
}

fn report(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

fn run(url: &str, args: &str) -> Value {
    let output = bench(url, args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args}: {errors}");
    report(&output)
}

/// Checks that the exit code is `code` and that stderr is one line that contains each of
/// `parts`.
fn assert_fails(output: &Output, code: i32, parts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// Returns the sum of a field over all measured points.
fn total(report: &Value, pointer: &str) -> u64 {
    let points = report["points"].as_array().unwrap();
    let each = points.iter();
    each.map(|point| point.pointer(pointer).unwrap().as_u64().unwrap())
        .sum()
}

#[test]
fn totals_of_a_closed_loop_equal_the_servers_counters() {
    let served = serve(null_engine());
    let args = "--concurrency 4,1 --requests 20 --prompt 40 --generate 9 --warm-up 0 --seed 7 \
        --vocabulary 1000";
    let report = run(&served.url, args);
    let stats = served.idle();
    assert_eq!(total(&report, "/requests/finished"), 40);
    assert_eq!(stats.outcomes.length, 40);
    assert_eq!(stats.outcomes.accepted, 40);
    assert_eq!(total(&report, "/tokens/output"), 40 * 9);
    assert_eq!(stats.tokens_generated, 40 * 9);
    assert_eq!(total(&report, "/tokens/input"), 40 * 40);
    assert_eq!(stats.prompt_tokens, 40 * 40);
    assert_eq!(stats.prefix_hits, 0, "prompts are random");
    for zero in ["cancelled", "failed", "interrupted", "without_usage"] {
        assert_eq!(total(&report, &format!("/requests/{zero}")), 0, "{zero}");
    }
    for point in report["points"].as_array().unwrap() {
        for latency in ["ttft_ms", "tpot_ms", "e2e_ms", "send_delay_ms"] {
            let spread = &point[latency];
            assert_eq!(spread["count"], 20, "{latency}");
            let value = |name: &str| spread[name].as_f64().unwrap();
            let order = ["p50", "p90", "p95", "p99", "max"].map(value);
            assert!(order.is_sorted(), "{latency}: {order:?}");
            assert!(value("mean") <= value("max"));
        }
        let text_events = point["itl_ms"]["count"].as_u64().unwrap() + 20;
        assert!((20..=180).contains(&text_events), "{text_events}");
        assert!(point["ttft_ms"]["p50"].as_f64() <= point["e2e_ms"]["p50"].as_f64());
        let seconds = point["duration_s"].as_f64().unwrap();
        let rate = point["output_tokens_per_s"].as_f64().unwrap();
        assert!((rate * seconds - 180.0).abs() < 1e-6);
        assert_eq!(point["errors"], serde_json::json!([]));
    }
}

#[test]
fn a_report_contains_everything_needed_to_reproduce_it() {
    let served = serve(null_engine());
    let args = "--rate 2000,500.5 --requests 10 --prompt 32 --generate 3 --shared-prefix 32 \
        --seed 11 --timeout 30 --vocabulary 300";
    let report = run(&format!("{}/v1", served.url), args);
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["server"], format!("{}/", served.url));
    assert_eq!(report["server_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["model"], "null");
    assert_eq!(report["endpoint"], "completions");
    assert_eq!(report["interrupted"], false);
    assert!(report["started_unix_s"].as_u64().unwrap() > 1_700_000_000);
    let expected = serde_json::json!({
        "requests": 10, "rate": [2000.0, 500.5], "concurrency": [], "prompt": 32,
        "generate": 3, "shared_prefix": 32, "vocabulary": 300, "cancel_share": 0.0,
        "warm_up": 1, "seed": 11, "timeout_s": 30.0,
    });
    assert_eq!(report["configuration"], expected);
    assert_eq!(report["points"][0]["rate"], 2000.0);
    assert_eq!(report["points"][1]["rate"], 500.5);
    assert_eq!(report["points"][1]["concurrency"], Value::Null);
    let stats = served.idle();
    // The warm-up request is not part of the report.
    assert_eq!(stats.outcomes.accepted, 21);
    assert_eq!(total(&report, "/requests/finished"), 20);
    assert!(stats.prefix_hits > 0, "the shared beginning is cached");
}

#[test]
fn chat_can_be_measured_and_the_text_report_lists_every_latency() {
    let served = serve(engine_that_chats());
    let args = "--endpoint chat --concurrency 2 --requests 6 --prompt 5 --generate 4";
    let report = run(&served.url, args);
    assert_eq!(total(&report, "/tokens/output"), 24);
    assert_eq!(report["endpoint"], "chat");
    let mut text = Command::new(common::program::path());
    text.args(["bench", "--server", &served.url, "--model", "null"]);
    let output = text.args(args.split_whitespace()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["ttft", "itl", "tpot", "e2e", "2 clients: 6 finished", "p99"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

/// Creates an engine with the fixture's tokenizer and its chat template.
fn engine_that_chats() -> Engine {
    let engine = null_engine();
    let messages = vec![quell::Message::new("user", "hello")];
    let prompt = quell::Prompt::Chat(messages);
    assert!(engine.tokenize(prompt).is_ok(), "no chat template");
    engine
}

#[test]
fn cancelled_requests_end_on_the_server_and_release_their_blocks() {
    let (gate, closed) = channel();
    let options = SimOptions {
        gate: Some(closed),
        ..SimOptions::default()
    };
    // No step has room for a whole prompt, and every step waits for the gate.
    let config = EngineConfig {
        max_batch_tokens: Some(8),
        ..EngineConfig::default()
    };
    let served = serve(engine(options, config));
    let args = "--cancel-share 1 --generate 1 --prompt 64 --concurrency 3 --requests 12 \
        --warm-up 0 --vocabulary 1000";
    let report = run(&served.url, args);
    assert_eq!(total(&report, "/requests/cancelled"), 12);
    assert_eq!(total(&report, "/requests/failed"), 0);
    assert_eq!(total(&report, "/requests/finished"), 0);
    assert_eq!(report["points"][0]["ttft_ms"], Value::Null);
    served.unconnected();
    drop(gate);
    let stats = served.idle();
    assert_eq!(stats.outcomes.cancelled, 12);
    assert_eq!(stats.tokens_generated, 0);
    assert_eq!(stats.blocks.available(), stats.blocks.total);
}

#[test]
fn requests_finish_while_others_are_cancelled() {
    let served = serve(null_engine());
    let args = "--cancel-share 0.5 --generate 20 --prompt 64 --concurrency 8 --requests 60 \
        --warm-up 0 --seed 3 --vocabulary 1000";
    let report = run(&served.url, args);
    let cancelled = total(&report, "/requests/cancelled");
    let finished = total(&report, "/requests/finished");
    assert_eq!(finished + cancelled, 60);
    assert!(cancelled > 0 && finished >= 20, "{finished} finished");
    let stats = served.idle();
    assert_eq!(stats.outcomes.length + stats.outcomes.cancelled, 60);
    assert!(stats.outcomes.length >= finished, "{:?}", stats.outcomes);
    assert_eq!(total(&report, "/tokens/output"), finished * 20);
    let read = total(&report, "/tokens/output_of_cancelled");
    assert!(finished * 20 + read <= stats.tokens_generated);
}

#[test]
fn refused_requests_are_counted_by_kind_and_exit_with_code_1() {
    let served = serve(null_engine());
    // Longer than the context of the null device.
    let args = "--prompt 9000 --generate 2 --concurrency 2 --requests 5";
    let output = bench(&served.url, args).output().unwrap();
    assert_fails(&output, 1, &["the warm-up failed: HTTP 400", "9000"]);
    assert!(output.stdout.is_empty());
    let output = bench(&served.url, &format!("{args} --warm-up 0")).output();
    let output = output.unwrap();
    assert_fails(
        &output,
        1,
        &["5 of 5 requests failed: 5 × HTTP 400", "9000"],
    );
    let errors = &report(&output)["points"][0]["errors"];
    assert_eq!(errors.as_array().unwrap().len(), 1);
    assert_eq!(
        (&errors[0]["kind"], &errors[0]["count"]),
        (&"HTTP 400".into(), &5.into())
    );
    assert!(errors[0]["example"].as_str().unwrap().contains("9000"));
    assert_eq!(total(&report(&output), "/requests/failed"), 5);
}

#[test]
fn a_closed_port_exits_with_one_line_and_code_1() {
    // Bind the port, so that no other process takes it, but do not listen.
    let closed = tokio::net::TcpSocket::new_v4().unwrap();
    closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    for args in ["", "--model m"] {
        let output = bench(&url, args).output().unwrap();
        assert_fails(&output, 1, &[&url, "cannot be reached"]);
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn invalid_command_lines_exit_with_one_line_and_code_2() {
    let url = "http://127.0.0.1:9";
    for (args, part) in [
        ("--threads 2", "--threads"),
        ("--device cpu --kv-cache-mib 3", "--kv-cache-mib"),
        ("--repetitions 2", "--repetitions"),
        ("--rate 0", "--rate is 0"),
        ("--rate nan", "--rate is NaN"),
        ("--rate 1 --concurrency 2", "--concurrency"),
        ("--concurrency 0", "--concurrency"),
        ("--requests 0", "--requests is 0"),
        ("--prompt 0", "--prompt is 0"),
        ("--generate 0", "--generate is 0"),
        ("--shared-prefix 600", "--shared-prefix is 600"),
        ("--cancel-share 1.5", "--cancel-share is 1.5"),
        ("--vocabulary 0", "--vocabulary is 0"),
        ("--timeout -1", "-1"),
        ("--timeout 0", "--timeout is 0"),
        ("--api-key-env QUELL_NO_SUCH_KEY", "QUELL_NO_SUCH_KEY"),
    ] {
        let output = bench(url, args).output().unwrap();
        assert_fails(&output, 2, &[part]);
        assert!(output.stdout.is_empty());
    }
    let output = bench("ftp://x", "").output().unwrap();
    assert_fails(&output, 2, &["ftp://x", "http://"]);
}

/// What a scripted server does after it has read a request. The text is the request's head.
type Answer = dyn Fn(&str, &mut dyn Connection) + Send + Sync;

trait Connection: Read + Write + Send {}
impl<T: Read + Write + Send> Connection for T {}

const MODELS: &str = "HTTP/1.1 200 OK\r\ncontent-length: 24\r\nconnection: close\r\n\r\n\
    {\"data\":[{\"id\":\"fake\"}]}";
const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
    connection: close\r\n\r\n";
const EVENT: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";

/// Starts a server that lists one model and passes every POST request to `answer`.
fn scripted(answer: impl Fn(&str, &mut dyn Connection) + Send + Sync + 'static) -> SocketAddr {
    scripted_over(|stream| Box::new(stream), answer)
}

fn scripted_over(
    wrap: impl Fn(std::net::TcpStream) -> Box<dyn Connection> + Send + 'static,
    answer: impl Fn(&str, &mut dyn Connection) + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer: Arc<Answer> = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = wrap(stream.unwrap());
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let head = read_request(&mut stream);
                if head.starts_with("GET /v1/models ") {
                    let _ = stream.write_all(MODELS.as_bytes());
                } else if head.starts_with("POST ") {
                    answer(&head, &mut stream);
                }
            });
        }
    });
    address
}

/// Reads a whole request and returns its head.
fn read_request(stream: &mut dyn Connection) -> String {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head.push_str(&line);
    }
    let _ = reader.take(length).read_to_end(&mut Vec::new());
    head
}

fn finish(stream: &mut dyn Connection) {
    let _ = write!(
        stream,
        "{STREAM}{EVENT}: a comment\n\n{EVENT}data: [DONE]\n\n"
    );
}

#[test]
fn an_open_loop_sends_on_time_while_answers_are_late() {
    // No request is answered before all of them have arrived.
    let everybody = Barrier::new(12);
    let address = scripted(move |_, stream| {
        everybody.wait();
        finish(stream);
    });
    let args = "--rate 500 --requests 12 --warm-up 0 --timeout 60";
    let report = run(&format!("http://{address}"), args);
    assert_eq!(total(&report, "/requests/finished"), 12);
    // Without usage in the stream, each event counts as one token.
    assert_eq!(total(&report, "/requests/without_usage"), 12);
    assert_eq!(total(&report, "/tokens/output"), 24);
}

#[test]
fn a_closed_loop_has_at_most_one_open_request_per_client() {
    let clients = Barrier::new(3);
    let open = std::sync::atomic::AtomicUsize::new(0);
    let address = scripted(move |_, stream| {
        let order = std::sync::atomic::Ordering::SeqCst;
        let now = open.fetch_add(1, order) + 1;
        if now > 3 {
            // More requests are open than there are clients: end this one without an answer.
            return;
        }
        clients.wait();
        open.fetch_sub(1, order);
        finish(stream);
    });
    let args = "--concurrency 3 --requests 12 --warm-up 0 --timeout 60";
    let report = run(&format!("http://{address}"), args);
    assert_eq!(total(&report, "/requests/finished"), 12);
}

#[test]
fn broken_streams_error_events_and_timeouts_are_distinguished() {
    let number = std::sync::atomic::AtomicUsize::new(0);
    let address = scripted(move |_, stream| {
        let _ = match number.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => write!(stream, "{STREAM}{EVENT}"),
            1 => write!(
                stream,
                "{STREAM}data: {{\"error\":{{\"message\":\"lost\"}}}}\n\n"
            ),
            2 => write!(
                stream,
                "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            ),
            3 => write!(stream, "{STREAM}data: no JSON\n\n"),
            // Keep the stream open until the client gives up.
            4 => stream.read_to_end(&mut Vec::new()).map(|_| ()),
            _ => return finish(stream),
        };
    });
    let args = "--concurrency 1 --requests 6 --warm-up 0 --timeout 20";
    let output = bench(&format!("http://{address}"), args).output().unwrap();
    assert_fails(&output, 1, &["5 of 6 requests failed"]);
    let report = report(&output);
    let errors = report["points"][0]["errors"].as_array().unwrap();
    let kinds: Vec<(&str, u64)> = errors
        .iter()
        .map(|e| (e["kind"].as_str().unwrap(), e["count"].as_u64().unwrap()))
        .collect();
    let expected = [
        ("HTTP 429", 1),
        ("broken stream", 2),
        ("error event", 1),
        ("timeout", 1),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(errors[2]["example"], "lost");
    assert_eq!(total(&report, "/requests/finished"), 1);
}

#[test]
fn the_api_key_from_the_named_variable_is_sent() {
    let (seen, heads) = channel();
    let seen: Sender<String> = seen;
    let address = scripted(move |head, stream| {
        seen.send(head.to_owned()).unwrap();
        finish(stream);
    });
    let args = "--concurrency 1 --requests 1 --warm-up 0 --api-key-env QUELL_TEST_KEY";
    let mut command = bench(&format!("http://{address}"), args);
    let output = command.env("QUELL_TEST_KEY", "hush").output().unwrap();
    assert!(output.status.success());
    let head = heads.try_recv().unwrap();
    assert!(head.contains("authorization: Bearer hush\r\n"), "{head}");
    assert!(head.starts_with("POST /v1/completions "), "{head}");
    let printed = [output.stdout, output.stderr].concat();
    assert!(!String::from_utf8_lossy(&printed).contains("hush"));
}

#[test]
fn a_server_is_reached_over_tls_if_its_certificate_is_trusted() {
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;
    use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned, crypto};
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let wrap = move |stream| -> Box<dyn Connection> {
        let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
        Box::new(StreamOwned::new(connection, stream))
    };
    let address = scripted_over(wrap, |_, stream| finish(stream));
    let url = format!("https://localhost:{}", address.port());
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("cert.pem");
    std::fs::write(&trusted, certified.cert.pem()).unwrap();
    let args = "--concurrency 1 --requests 2";
    let mut command = bench(&url, args);
    let output = command.env("SSL_CERT_FILE", &trusted).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(total(&report(&output), "/requests/finished"), 2);
    let other = rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap();
    std::fs::write(&trusted, other.cert.pem()).unwrap();
    let mut command = bench(&url, args);
    let output = command.env("SSL_CERT_FILE", &trusted).output().unwrap();
    assert_fails(&output, 1, &["cannot be reached"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_closes_the_connections_and_prints_what_was_measured_so_far() {
    let (seen, arrivals) = channel();
    let (closed, ends) = channel();
    let number = std::sync::atomic::AtomicUsize::new(0);
    let address = scripted(move |_, stream| {
        if number.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            return finish(stream);
        }
        let _ = write!(stream, "{STREAM}{EVENT}");
        let _ = stream.flush();
        seen.send(()).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
        closed.send(()).unwrap();
    });
    let args = "--concurrency 2,1 --requests 30 --warm-up 0";
    let mut command = bench(&format!("http://{address}"), args);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // One request has been answered, and two are open.
    let soon = Duration::from_secs(60);
    arrivals.recv_timeout(soon).unwrap();
    arrivals.recv_timeout(soon).unwrap();
    let pid = child.id().to_string();
    let interrupted = Command::new("kill").args(["-INT", &pid]).status();
    assert!(interrupted.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_fails(&output, 130, &["interrupted"]);
    let report = report(&output);
    assert_eq!(report["interrupted"], true);
    assert_eq!(report["points"].as_array().unwrap().len(), 1);
    assert_eq!(total(&report, "/requests/finished"), 1);
    assert_eq!(total(&report, "/requests/interrupted"), 2);
    ends.recv_timeout(soon).unwrap();
    ends.recv_timeout(soon).unwrap();
}
