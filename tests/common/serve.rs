//! Runs the real server: `quell serve` in its own process.

use crate::http::{exchange, get};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the server may take to become idle.
const PATIENCE: Duration = Duration::from_secs(60);

/// `quell serve` with a model on the CPU. The process is killed when this is dropped.
pub struct Serve {
    pub address: SocketAddr,
    child: Child,
}

impl Serve {
    /// Starts the server on a free port. `arguments` are added after the model.
    pub fn start(model: &Path, arguments: &[&str]) -> Self {
        Self::spawn(&mut Self::command(model, arguments))
    }

    /// Builds the command that [`Serve::start`] runs.
    pub fn command(model: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(crate::program::path());
        command
            .args(["serve", "--device", "cpu", "--port", "0", "--model"])
            .arg(model)
            .args(arguments)
            .env_remove("QUELL_LOG");
        command
    }

    /// Runs a command that starts a server, and waits until it listens.
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let address = line.trim().rsplit("http://").next();
        let address = address.and_then(|address| address.parse().ok());
        let Some(address) = address else {
            let _ = child.kill();
            panic!("the server printed {line:?}, expected its address");
        };
        Self { address, child }
    }

    /// Id of the server's process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the value of the first metric whose line starts with `beginning`.
    pub fn metric(&self, beginning: &str) -> f64 {
        let metrics = exchange(self.address, &get("/metrics")).unwrap().text();
        let line = metrics.lines().find(|line| line.starts_with(beginning));
        let line = line.unwrap_or_else(|| panic!("no {beginning} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until no request runs or waits, and no block is held.
    pub fn wait_until_idle(&self) {
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

    /// Waits until the server is idle, then sends SIGTERM and checks that it exits
    /// successfully.
    pub fn terminate_when_idle(self) {
        self.wait_until_idle();
        self.terminate();
    }

    /// Sends SIGTERM and checks that the server exits successfully.
    pub fn terminate(mut self) {
        self.signal("TERM");
        let ended = self.ended();
        assert!(ended.success(), "{ended}");
    }

    /// Sends a signal to the server.
    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Waits until the server has exited.
    pub fn ended(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Takes the server's stderr. The command must have a pipe there.
    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().unwrap()
    }
}

/// Sends a signal to a process.
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
