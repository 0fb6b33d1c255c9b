//! The real server: `quell serve` in a process of its own.

#![allow(dead_code)] // each test file uses its part

use super::http::{exchange, get};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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
        let mut child = Command::new(env!("CARGO_BIN_EXE_quell"))
            .args(["serve", "--device", "cpu", "--port", "0", "--model"])
            .arg(model)
            .args(arguments)
            .env_remove("QUELL_LOG")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
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
        let pid = self.child.id().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(told.success());
        let ended = self.child.wait().unwrap();
        assert!(ended.success(), "{ended}");
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
