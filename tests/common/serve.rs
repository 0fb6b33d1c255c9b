//! The real server: `quell serve` in a process of its own.

#![allow(dead_code)] // each test file uses its part

use super::http::{exchange, get};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the server may take to fall idle.
const PATIENCE: Duration = Duration::from_secs(60);

/// `quell serve` over a model on the CPU; it is killed when it is dropped.
pub struct Serve {
    pub address: SocketAddr,
    child: Child,
}

impl Serve {
    /// Starts it on a free port, with these arguments beside the model.
    pub fn start(model: &Path, arguments: &[&str]) -> Self {
        Self::spawn(&mut Self::command(model, arguments))
    }

    /// What starts it so.
    pub fn command(model: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quell"));
        command
            .args(["serve", "--device", "cpu", "--port", "0", "--model"])
            .arg(model)
            .args(arguments)
            .env_remove("QUELL_LOG");
        command
    }

    /// Runs a command that starts it, and waits until it listens.
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let address = line.trim().rsplit("http://").next();
        let address = address.and_then(|address| address.parse().ok());
        let Some(address) = address else {
            let _ = child.kill();
            panic!("the server says {line:?}, expected where it listens");
        };
        Self { address, child }
    }

    /// The number of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The value of a metric whose line begins like this.
    pub fn metric(&self, beginning: &str) -> f64 {
        let metrics = exchange(self.address, &get("/metrics")).unwrap().text();
        let line = metrics.lines().find(|line| line.starts_with(beginning));
        let line = line.unwrap_or_else(|| panic!("no {beginning} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until nothing runs, waits or holds a block.
    pub fn falls_idle(&self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let held = [
                self.metric("quell_num_requests_running"),
                self.metric("quell_num_requests_waiting"),
                self.metric("quell_kv_blocks{state=\"active\""),
                self.metric("quell_kv_blocks{state=\"deferred\""),
            ];
            if held == [0.0; 4] {
                return;
            }
            assert!(Instant::now() < until, "running, waiting, blocks: {held:?}");
        }
    }

    /// Nothing is left; and told to stop, it stops.
    pub fn ends_with_nothing_held(self) {
        self.falls_idle();
        self.ends_when_told();
    }

    /// Told to stop, it finishes what it has and stops.
    pub fn ends_when_told(mut self) {
        self.signal("TERM");
        let ended = self.ended();
        assert!(ended.success(), "{ended}");
    }

    /// Sends it a signal.
    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Waits until it has ended.
    pub fn ended(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// What it writes to stderr, if its command has a pipe there.
    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().unwrap()
    }
}

/// Sends a process a signal.
pub fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let kill = Command::new("kill")
        .args([&format!("-{name}"), &pid])
        .status();
    assert!(kill.unwrap().success());
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
