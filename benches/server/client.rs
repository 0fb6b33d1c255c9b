//! The clients, which run in a child process and report what they received.

use super::arguments::after;
use super::load::{Failure, Load};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Time limit for one stream.
const PATIENCE: Duration = Duration::from_secs(300);

/// Returns a prompt of sixteen tokens, which differs from stream to stream.
pub fn prompt(index: usize) -> Vec<u32> {
    (0..16)
        .map(|position| ((index * 977 + position * 389) % 49_000 + 100) as u32)
        .collect()
}

/// A child process that runs the clients.
pub struct Clients {
    child: Child,
    said: BufReader<ChildStdout>,
}

/// What the clients received.
pub struct Seen {
    pub tokens: usize,
    pub errors: usize,
    pub seconds: f64,
    pub gap_p50_ms: f64,
    pub gap_p99_ms: f64,
}

impl Seen {
    pub fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "errors": self.errors,
            "seconds": self.seconds,
            "event_to_event_ms": { "p50": self.gap_p50_ms, "p99": self.gap_p99_ms },
        })
    }

    /// Returns an error unless every stream was read to its end.
    pub fn without_error(self, load: Load) -> Result<Self, Failure> {
        if self.errors > 0 || self.tokens != load.streams * load.tokens {
            let expected = load.streams * load.tokens;
            let (tokens, errors) = (self.tokens, self.errors);
            return Err(format!("{tokens} tokens, expected {expected}; {errors} errors").into());
        }
        Ok(self)
    }
}

impl Clients {
    pub fn start(address: &str, streams: usize, tokens: usize) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--client", address])
            .args(["--streams", &streams.to_string()])
            .args(["--tokens", &tokens.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let said = child.stdout.take().ok_or("the clients printed nothing")?;
        let said = BufReader::new(said);
        Ok(Self { child, said })
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        Ok(line)
    }

    /// Waits until every stream has begun.
    pub fn all_open(&mut self) -> Result<(), Failure> {
        match self.line()?.as_str() {
            "open\n" => Ok(()),
            other => Err(format!("the clients printed {other:?}").into()),
        }
    }

    /// Waits for the clients to finish and returns what they received.
    pub fn finish(mut self) -> Result<Seen, Failure> {
        let mut last = String::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            last = line;
        }
        if !self.child.wait()?.success() {
            return Err("the clients have failed".into());
        }
        let seen: Value = serde_json::from_str(&last)?;
        let number = |name: &str| seen[name].as_f64().ok_or("a number is missing");
        let gaps = &seen["event_to_event_ms"];
        Ok(Seen {
            tokens: number("tokens")? as usize,
            errors: number("errors")? as usize,
            seconds: number("seconds")?,
            gap_p50_ms: gaps["p50"].as_f64().unwrap_or(f64::NAN),
            gap_p99_ms: gaps["p99"].as_f64().unwrap_or(f64::NAN),
        })
    }
}

/// Runs in the clients' process: opens all streams, reads them, and prints what it received.
pub fn run(address: &str) -> Result<(), Failure> {
    let number = |flag: &str| -> Result<usize, Failure> {
        Ok(after(flag).ok_or("a flag is missing")?.parse()?)
    };
    let (streams, tokens) = (number("--streams")?, number("--tokens")?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let seen = runtime.block_on(async {
        let (begun, mut beginnings) = mpsc::unbounded_channel();
        let started = Instant::now();
        let tasks: Vec<_> = (0..streams)
            .map(|index| {
                let address = address.to_owned();
                let begun = begun.clone();
                tokio::spawn(async move {
                    let one = one(&address, index, tokens, begun);
                    tokio::time::timeout(PATIENCE, one).await
                })
            })
            .collect();
        drop(begun);
        // The loop also ends if streams fail: each failed stream drops its sender.
        let mut open = 0;
        while open < streams && beginnings.recv().await.is_some() {
            open += 1;
        }
        println!("open");
        let mut gaps = Vec::new();
        let (mut read, mut errors) = (0, 0);
        for task in tasks {
            match task.await {
                Ok(Ok(Ok(one))) => {
                    read += one.counted;
                    gaps.extend(one.times.windows(2).map(|pair| pair[1] - pair[0]));
                }
                other => {
                    errors += 1;
                    eprintln!("a stream failed: {other:?}");
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        gaps.sort_unstable();
        let quantile = |share: f64| {
            let index = (gaps.len() as f64 * share) as usize;
            gaps.get(index).copied().unwrap_or_default().as_secs_f64() * 1e3
        };
        Seen {
            tokens: read,
            errors,
            seconds,
            gap_p50_ms: quantile(0.5),
            gap_p99_ms: quantile(0.99),
        }
    });
    println!("{}", seen.json());
    Ok(())
}

/// Result of one stream that was read to its end.
#[derive(Debug)]
struct Read {
    /// Number of tokens according to the server. There can be fewer events than tokens, because
    /// a token that completes no character is held back until the next one.
    counted: usize,
    /// Arrival times of the events.
    times: Vec<Instant>,
}

/// Reads one stream to its end.
async fn one(
    address: &str,
    index: usize,
    tokens: usize,
    begun: mpsc::UnboundedSender<()>,
) -> Result<Read, Failure> {
    let mut stream = TcpStream::connect(address).await?;
    let body = json!({
        "model": "bench",
        "prompt": prompt(index),
        "max_tokens": tokens,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), body.as_bytes()].concat())
        .await?;
    let mut reader = tokio::io::BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    if !line.starts_with("HTTP/1.1 200") {
        return Err(line.into());
    }
    let mut times = Vec::with_capacity(tokens);
    let mut counted = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line).await? == 0 {
            return Err(format!("the stream ends after {} events", times.len()).into());
        }
        let Some(event) = line.strip_prefix("data: ") else {
            continue;
        };
        if event.starts_with("[DONE]") {
            return Ok(Read { counted, times });
        }
        times.push(Instant::now());
        if times.len() == 1 {
            let _ = begun.send(());
        }
        // Only the last event has a usage that is not null.
        if event.contains("\"completion_tokens\"") {
            let event: Value = serde_json::from_str(event)?;
            counted = event["usage"]["completion_tokens"].as_u64().unwrap_or(0) as usize;
        }
    }
}
