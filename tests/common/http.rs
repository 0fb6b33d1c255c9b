//! HTTP/1.1 by hand: bytes out, replies in, so that a test can send what no client would.

#![allow(dead_code)] // each test file uses its part

use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long a reply may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A reply, whole.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// The value of a header; the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(header, _)| header == name);
        found.next().map(|(_, value)| value.as_str())
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One connection.
pub struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    pub fn open(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).unwrap())
    }

    pub fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    /// The socket, to set options or to close a side of it.
    pub fn socket(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// Sends bytes. A server may refuse before it has read all of them and close; what
    /// it says is for [`Connection::reply`] to find.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// The next reply; `None` when the server has closed without a further one.
    ///
    /// # Panics
    /// If none comes in time, or what comes is no HTTP.
    pub fn reply(&mut self) -> Option<Reply> {
        let line = self.line()?;
        let status = line.split(' ').nth(1).and_then(|text| text.parse().ok());
        let mut reply = Reply {
            status: status.unwrap_or_else(|| panic!("not a status line: {line:?}")),
            ..Reply::default()
        };
        loop {
            let line = self.line().expect("the headers have an end");
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            let name = name.to_ascii_lowercase();
            reply.headers.push((name, value.trim().to_owned()));
        }
        if reply.status == 100 {
            return self.reply();
        }
        if reply.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                reply.body.extend(chunk);
            }
        } else if let Some(length) = reply.header("content-length") {
            let length: usize = length.parse().unwrap();
            reply.body.resize(length, 0);
            self.reader.read_exact(&mut reply.body).unwrap();
        }
        Some(reply)
    }

    /// The head of a reply, when its body is to be read by [`Connection::chunk`].
    pub fn head(&mut self) -> Option<Reply> {
        let status = self.line()?;
        let status = status.split(' ').nth(1)?.parse().ok()?;
        let mut reply = Reply {
            status,
            ..Reply::default()
        };
        while let Some(line) = self.line() {
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            let name = name.to_ascii_lowercase();
            reply.headers.push((name, value.trim().to_owned()));
        }
        Some(reply)
    }

    /// The next chunk of a chunked body; `None` after the last, or if the server has
    /// closed.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(self.line()?.trim(), 16).ok()?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).ok()?;
        self.line()?;
        (size > 0).then_some(chunk)
    }

    /// Whether something can be read within `time`: a reply, or the end.
    pub fn answers_within(&mut self, time: Duration) -> bool {
        self.socket().set_read_timeout(Some(time)).unwrap();
        let came = match self.reader.fill_buf() {
            Ok(_) => true,
            Err(error) => !matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ),
        };
        self.socket().set_read_timeout(Some(PATIENCE)).unwrap();
        came
    }

    /// A line without its end; `None` if the server has closed or reset.
    fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        match self.reader.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(String::from_utf8_lossy(&line).trim_end().to_owned()),
            Err(error) if is_closed(&error) => None,
            Err(error) => panic!("no reply within {PATIENCE:?}: {error}"),
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
    )
}

/// A POST request with a JSON body.
pub fn post(path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// A GET request.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: quell\r\n\r\n").into_bytes()
}

/// As [`exchange`], where the server's limits of time are so short that this machine may
/// be too slow for them: it is asked again.
pub fn answered(address: SocketAddr, request: &[u8]) -> Reply {
    let until = Instant::now() + PATIENCE;
    loop {
        match exchange(address, request) {
            Some(reply) if reply.status != 408 => return reply,
            late => assert!(Instant::now() < until, "no answer, but {late:?}"),
        }
    }
}

/// Sends one request on a connection of its own, and waits for the reply.
pub fn exchange(address: SocketAddr, request: &[u8]) -> Option<Reply> {
    let mut connection = Connection::open(address);
    let _ = connection.send(request);
    connection.reply()
}
