//! A client that goes away cancels its requests. The tests cut hundreds of connections in every
//! way and at every moment, and check that the engine's statistics return to what they were.

mod tls;
mod variants;
mod windows;

use common::http::{Connection, exchange, get, post};
use common::server::TestServer;
use common::{model, server};
use quell::internals::cache::BlockId;
use quell::internals::runner::{NullOptions, NullRunner, Runner, StepOutput};
use quell::internals::schedule::{Sequences, StepPlan};
use quell::server::{Metrics, ServerOptions};
use quell::{DeviceError, Engine, EngineConfig, EngineStats, LoadError, LoadOptions};
use std::net::{Shutdown, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::net::TcpSocket;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Duration of a step: long enough for a client to go away in the middle.
const STEP: Duration = Duration::from_millis(5);

/// A runner that computes nothing, but takes time for it.
struct SlowRunner {
    runner: NullRunner,
    /// Nothing is ever sent on this channel. Once it is closed, steps take no time.
    open: mpsc::Receiver<()>,
}

impl Runner for SlowRunner {
    fn depth(&self) -> usize {
        self.runner.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        self.runner.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        let _ = self.open.recv_timeout(STEP);
        self.runner.collect()
    }

    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.runner.poison(blocks)
    }
}

/// Creates an engine with a [`SlowRunner`], and the sender that keeps it slow. Its requests
/// never end by themselves, because the context is longer than any test needs.
fn slow_engine(config: EngineConfig, label: &str) -> (Engine, mpsc::Sender<()>) {
    let (slow, open) = mpsc::channel();
    let tokenizer = server::tokenizer(&model::smollm2());
    let options = NullOptions {
        vocabulary: tokenizer.vocabulary_size(),
        context_tokens: 1 << 20,
        cache_blocks: 1 << 17,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        metrics_label: Some(label.to_owned()),
        // Only a lost connection may cancel a request.
        slow_consumer_deadline: None,
        ..config
    };
    let make = move || {
        let runner = NullRunner::new(options);
        let info = runner.info();
        let runner = SlowRunner { runner, open };
        Ok::<_, LoadError>((Box::new(runner) as Box<dyn Runner>, info))
    };
    let engine = Engine::with_runner(config, Some(tokenizer), make).unwrap();
    (engine, slow)
}

/// Polls the scheduler thread until `is` returns true.
fn until(engine: &Engine, what: &str, is: impl Fn(&EngineStats) -> bool) -> EngineStats {
    let patience = Instant::now() + PATIENCE;
    loop {
        let stats = engine.stats().unwrap();
        if is(&stats) {
            return stats;
        }
        assert!(Instant::now() < patience, "{what}: {stats:?}");
    }
}

fn nothing_is_open(stats: &EngineStats) -> bool {
    stats.open == 0 && stats.closing == 0
}

/// How a client goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// Closes the connection.
    Close,
    /// Resets the connection.
    Reset,
    /// Shuts down its sending side, and stays connected.
    HalfClose,
    /// Stops reading, and stays connected.
    Silence,
}

const CUTS: [Cut; 3] = [Cut::Close, Cut::Reset, Cut::HalfClose];

/// A client with an open request.
struct Client {
    connection: Connection,
    cut: Cut,
}

impl Client {
    /// Asks for an answer that never ends by itself.
    fn ask(server: &TestServer, index: usize, stream: bool, cut: Cut) -> Self {
        let address = server.address;
        let mut connection = match cut {
            Cut::Silence => with_little_memory(address),
            _ => Connection::open(address),
        };
        let tokens = server.engine.max_sequence_tokens() - 100;
        let fields =
            format!("\"stream\": {stream}, \"ignore_eos\": true, \"max_tokens\": {tokens}");
        let request = if index.is_multiple_of(2) {
            let body = format!("{{\"prompt\": \"Number {index}\", {fields}}}");
            post("/v1/completions", body)
        } else {
            let messages = format!("[{{\"role\": \"user\", \"content\": \"Number {index}\"}}]");
            post(
                "/v1/chat/completions",
                format!("{{\"messages\": {messages}, {fields}}}"),
            )
        };
        connection.send(&request).unwrap();
        Self { connection, cut }
    }

    /// Reads the first events of a stream.
    fn read(&mut self, events: usize) {
        let head = self.connection.head().expect("an answer");
        assert_eq!(head.status, 200);
        let mut read = 0;
        while read < events {
            let event = self.connection.chunk().expect("an event");
            // Skip comments, which only keep the connection alive.
            read += usize::from(event.starts_with(b"data: "));
        }
    }

    /// Goes away. Returns the connection if it stays open.
    fn leave(self) -> Option<Connection> {
        let socket = self.connection.socket();
        match self.cut {
            Cut::Close => None,
            Cut::Reset => {
                let socket = socket.try_clone().unwrap();
                drop(self.connection);
                reset(socket);
                None
            }
            Cut::HalfClose => {
                socket.shutdown(Shutdown::Write).unwrap();
                Some(self.connection)
            }
            Cut::Silence => Some(self.connection),
        }
    }
}

/// Resets a connection: closing the last handle of a socket with zero linger sends a reset.
fn reset(socket: std::net::TcpStream) {
    socket.set_nonblocking(true).unwrap();
    let runtime = runtime();
    let _inside = runtime.enter();
    let socket = tokio::net::TcpStream::from_std(socket).unwrap();
    socket.set_zero_linger().unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Opens a connection with a small receive buffer.
fn with_little_memory(address: SocketAddr) -> Connection {
    let connect = async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(address).await.unwrap().into_std().unwrap()
    };
    let stream = runtime().block_on(connect);
    stream.set_nonblocking(false).unwrap();
    Connection::over(stream)
}

/// Returns how many requests of the engine with this label `/metrics` counts as cancelled: in
/// all, and because of a disconnect.
fn cancelled(address: SocketAddr, label: &str) -> (u64, u64) {
    let metrics = exchange(address, &get("/metrics")).unwrap().text();
    let ours = metrics.lines().filter(|line| {
        line.starts_with("quell_request_outcomes_total")
            && line.contains(&format!("\"{label}\""))
            && line.contains("outcome=\"cancelled\"")
    });
    let mut counts = (0, 0);
    for line in ours {
        let (_, count) = line.rsplit_once(' ').unwrap();
        let count: u64 = count.parse().unwrap();
        counts.0 += count;
        counts.1 += if line.contains("reason=\"disconnect\"") {
            count
        } else {
            0
        };
    }
    counts
}

fn options() -> ServerOptions {
    let mut options = server::options();
    options.metrics = Some(Metrics::install().unwrap());
    options
}

/// Checks I12, and that every request was counted as cancelled by a disconnect.
fn check_all_cancelled(server: &TestServer, label: &str, before: &EngineStats, gone: usize) {
    let stats = server.engine.stats().unwrap();
    assert!(stats.is_idle(), "{stats:?}");
    assert_eq!(stats.blocks.total, before.blocks.total);
    assert_eq!(stats.blocks.referenced + stats.blocks.deferred, 0);
    assert_eq!(stats.outcomes.accepted, gone as u64, "{stats:?}");
    assert_eq!(stats.outcomes.cancelled, gone as u64, "{stats:?}");
    assert_eq!(cancelled(server.address, label), (gone as u64, gone as u64));
}

#[test]
fn disconnects_of_five_hundred_clients_leave_nothing_open() {
    const RUNNING: usize = 200;
    const WAITING: usize = 300;
    const LABEL: &str = "five-hundred";
    let options = options();
    let config = EngineConfig {
        max_sequences: RUNNING,
        ..EngineConfig::default()
    };
    let (engine, slow) = slow_engine(config, LABEL);
    let before = engine.stats().unwrap();
    let server = TestServer::start(engine.clone(), options);

    // As many requests as can run at once: streams in progress, and answers sent as a whole.
    let mut running: Vec<Client> = (0..RUNNING)
        .map(|index| Client::ask(&server, index, index % 5 != 0, CUTS[index % 3]))
        .collect();
    until(&engine, "all run", |stats| stats.running == RUNNING);
    until(&engine, "every request has a token", |stats| {
        stats.tokens_generated >= 8 * RUNNING as u64
    });
    let streaming = running.iter_mut().enumerate();
    for (_, client) in streaming.filter(|(index, _)| index % 5 != 0) {
        client.read(4);
    }
    // These requests get no token, because the running ones never end.
    let waiting: Vec<Client> = (0..WAITING)
        .map(|index| Client::ask(&server, index, index % 3 != 0, CUTS[index / 3 % 3]))
        .collect();
    let full = until(&engine, "all other requests wait", |stats| {
        stats.waiting == WAITING
    });
    assert_eq!((full.running, full.open), (RUNNING, RUNNING + WAITING));
    assert!(full.blocks.referenced >= RUNNING, "{full:?}");

    let clients = waiting.into_iter().chain(running);
    let stayed: Vec<_> = clients.filter_map(Client::leave).collect();
    assert!(!stayed.is_empty());
    until(&engine, "no request is open", nothing_is_open);
    check_all_cancelled(&server, LABEL, &before, RUNNING + WAITING);
    drop(slow);
}

/// Half-open connections: the server can tell that the client has gone only because it takes no
/// more data.
#[test]
fn a_client_that_stops_reading_is_disconnected() {
    const SILENT: usize = 12;
    const LABEL: &str = "silent";
    let mut options = options();
    // Long events soon fill the buffers between server and client, which hold a few megabytes.
    options.model_name = "m".repeat(8000);
    options.write_timeout = Duration::from_millis(200);
    let (engine, slow) = slow_engine(EngineConfig::default(), LABEL);
    let before = engine.stats().unwrap();
    let server = TestServer::start(engine.clone(), options);
    let mut clients: Vec<Client> = (0..SILENT)
        .map(|index| Client::ask(&server, index, true, Cut::Silence))
        .collect();
    // Some clients may be cut off before others have connected.
    until(&engine, "all requests are accepted", |stats| {
        stats.outcomes.accepted == SILENT as u64
    });
    until(&engine, "every request has a token", |stats| {
        stats.tokens_generated >= 8 * SILENT as u64
    });
    for client in &mut clients {
        client.read(2);
    }
    let stayed: Vec<_> = clients.into_iter().filter_map(Client::leave).collect();
    assert_eq!(stayed.len(), SILENT);
    let after = until(&engine, "no request is open", nothing_is_open);
    assert!(after.tokens_generated > before.tokens_generated);
    check_all_cancelled(&server, LABEL, &before, SILENT);
    drop(slow);
}

#[test]
fn a_disconnect_cancels_embeddings() {
    const INPUTS: usize = 60;
    const LABEL: &str = "embeddings";
    // With one token per step, it would take minutes to compute all inputs.
    let config = EngineConfig {
        max_batch_tokens: Some(1),
        ..EngineConfig::default()
    };
    let (engine, slow) = slow_engine(config, LABEL);
    let server = TestServer::start(engine.clone(), options());
    let mut connection = Connection::open(server.address);
    let inputs: Vec<Vec<usize>> = (0..INPUTS).map(|index| vec![index; 500]).collect();
    let body = format!("{{\"input\": {inputs:?}}}");
    connection.send(&post("/v1/embeddings", body)).unwrap();
    until(&engine, "all requests are accepted", |stats| {
        stats.outcomes.accepted == INPUTS as u64
    });
    drop(connection);
    let after = until(&engine, "no request is open", nothing_is_open);
    assert!(after.outcomes.cancelled > 0, "{after:?}");
    assert_eq!(
        after.outcomes.stopped + after.outcomes.cancelled,
        INPUTS as u64
    );
    assert_eq!(after.blocks.referenced + after.blocks.deferred, 0);
    drop(slow);
}

#[test]
fn disconnects_with_a_real_model_leave_nothing_open() {
    const CLIENTS: usize = 64;
    const LABEL: &str = "real";
    let options = options();
    let config = EngineConfig {
        kv_cache_bytes: Some(256 << 20),
        max_sequences: 32,
        metrics_label: Some(LABEL.to_owned()),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(model::smollm2(), config, LoadOptions::cpu()).unwrap();
    let before = engine.stats().unwrap();
    let server = TestServer::start(engine.clone(), options);
    let mut clients: Vec<Client> = Vec::new();
    // The first half runs. The second half is sent once all of the first half is open, and
    // waits.
    for half in [0..CLIENTS / 2, CLIENTS / 2..CLIENTS] {
        let ask = |index| Client::ask(&server, index, index % 4 != 0, CUTS[index % 3]);
        clients.extend(half.clone().map(ask));
        until(&engine, "all requests have arrived", |stats| {
            stats.open == half.end
        });
    }
    let streaming = clients.iter_mut().take(32).enumerate();
    for (_, client) in streaming.filter(|(index, _)| index % 4 != 0) {
        client.read(2);
    }
    let held = engine.stats().unwrap();
    assert!(held.running > 0 && held.blocks.referenced > 0, "{held:?}");
    let stayed: Vec<_> = clients.into_iter().filter_map(Client::leave).collect();
    assert!(!stayed.is_empty());
    until(&engine, "no request is open", nothing_is_open);
    check_all_cancelled(&server, LABEL, &before, CLIENTS);
}
