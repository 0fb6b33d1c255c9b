//! Runs a server inside the test's own process.

use quell::internals::runner::{ModelFiles, NullOptions, NullRunner};
use quell::server::{Server, ServerOptions};
use quell::{Engine, EngineConfig, Tokenizer};
use std::net::SocketAddr;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// Model name of a server under test.
pub const MODEL: &str = "test-model";

/// Settings of a server under test. The timeouts are so long that no test reaches them, even on
/// a busy machine; a test of a timeout sets its own.
pub fn options() -> ServerOptions {
    let long = Duration::from_secs(600);
    let mut options = ServerOptions::new(MODEL);
    options.body_timeout = long;
    options.header_timeout = long;
    options.keep_alive_timeout = long;
    options.write_timeout = long;
    options.drain_timeout = long;
    options
}

/// Reads the tokenizer of a model file.
pub fn tokenizer(model: &Path) -> Tokenizer {
    let mut files = ModelFiles::open(model).unwrap();
    files.take_tokenizer().expect("the model has a tokenizer")
}

/// Creates an engine that computes nothing, with a tokenizer. Its invariants are checked after
/// every step.
pub fn null_engine(tokenizer: Tokenizer, config: EngineConfig) -> Engine {
    let options = NullOptions {
        vocabulary: tokenizer.vocabulary_size(),
        cache_blocks: 4096,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        audit: true,
        ..config
    };
    Engine::with_runner(config, Some(tokenizer), move || NullRunner::start(options)).unwrap()
}

/// More tokens than a test will wait for.
pub const ENDLESS: usize = 2_000_000;

/// Creates an engine without a tokenizer that computes nothing and never ends an answer by
/// itself. Its invariants are checked after every step.
pub fn endless_engine() -> Engine {
    let null = NullOptions {
        context_tokens: 2 * ENDLESS,
        cache_blocks: 4096,
        block_tokens: 4096,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        audit: true,
        ..EngineConfig::default()
    };
    Engine::with_runner(config, None, move || NullRunner::start(null)).unwrap()
}

/// A running server. When it is dropped, the server and all its connections end.
pub struct TestServer {
    /// Address that the server listens on.
    pub address: SocketAddr,
    /// The engine that it serves.
    pub engine: Engine,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    /// Serves `engine` on a free port of the loopback interface.
    pub fn start(engine: Engine, options: ServerOptions) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let (report, started) = std::sync::mpsc::channel();
        let served = engine.clone();
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let any = SocketAddr::from(([127, 0, 0, 1], 0));
                let server = Server::bind(served, options, any).await.unwrap();
                report.send(server.local_addr()).unwrap();
                let stopped = async {
                    let _ = stopped.await;
                };
                server.run(stopped).await;
            });
        };
        let thread = std::thread::spawn(serve);
        Self {
            address: started.recv().expect("the server starts"),
            engine,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl TestServer {
    /// Tells the server to stop, without waiting for it.
    pub fn stop(mut self) -> Stopping {
        drop(self.stop.take());
        Stopping(self)
    }
}

/// A server that was told to stop.
pub struct Stopping(TestServer);

impl Stopping {
    /// Waits until the server has ended.
    pub fn join(self) {
        drop(self.0);
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the server has panicked");
        }
    }
}
