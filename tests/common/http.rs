//! Hand-written HTTP/1.1, so that a test can send what no client library would.

use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long a reply may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// A complete reply.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    /// Header names are in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// Returns the value of a header. `name` is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(header, _)| header == name);
        found.next().map(|(_, value)| value.as_str())
    }

    /// Returns the body as JSON, or null if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A client connection.
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

    /// The socket, to set options or to shut down one direction.
    pub fn socket(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// Sends bytes. A server may refuse a request and close before it has read all of it; use
    /// [`Connection::reply`] to read what it answered.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// Reads the next reply. Returns `None` if the server closes without sending another one.
    ///
    /// # Panics
    /// If no reply comes in time, or if it is not HTTP.
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

    /// Reads the head of a reply, for callers that read the body with [`Connection::chunk`].
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

    /// Reads the next chunk of a chunked body. Returns `None` after the last one, or if the
    /// server has closed.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(self.line()?.trim(), 16).ok()?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk).ok()?;
        self.line()?;
        (size > 0).then_some(chunk)
    }

    /// Whether something can be read within `time`: a reply, or the end of the stream.
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

    /// Reads a line, without its line ending. Returns `None` if the server has closed or reset
    /// the connection.
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

/// Builds a POST request with a JSON body.
pub fn post(path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: quell\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Adds headers to a request. Each ends with a line break.
pub fn with_headers(request: &[u8], headers: &str) -> Vec<u8> {
    let text = String::from_utf8(request.to_vec()).unwrap();
    text.replacen("\r\n", &format!("\r\n{headers}"), 1)
        .into_bytes()
}

/// Builds a GET request.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: quell\r\n\r\n").into_bytes()
}

/// Like [`exchange`], but asks again while the server times out. For servers whose time limits
/// are so short that a slow machine may miss them.
pub fn answered(address: SocketAddr, request: &[u8]) -> Reply {
    let until = Instant::now() + PATIENCE;
    loop {
        match exchange(address, request) {
            Some(reply) if reply.status != 408 => return reply,
            late => assert!(Instant::now() < until, "no answer, but {late:?}"),
        }
    }
}

/// Sends one request on its own connection and waits for the reply.
pub fn exchange(address: SocketAddr, request: &[u8]) -> Option<Reply> {
    let mut connection = Connection::open(address);
    let _ = connection.send(request);
    connection.reply()
}
