//! Hand-written HTTP/2, so that a test can grant flow-control windows as no client library
//! would.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long a frame may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Frame types (RFC 9113, section 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;

/// Flags. END_STREAM marks the last frame of a stream, ACK an answer to PING or SETTINGS.
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame from the server.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A client connection.
pub struct Http2 {
    socket: TcpStream,
    next: u32,
}

impl Http2 {
    /// Connects and sends the preface and SETTINGS. `window` is the initial window of each
    /// stream, or `None` for the protocol's default.
    pub fn open(address: SocketAddr, window: Option<u32>) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut connection = Self { socket, next: 1 };
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        connection.socket.write_all(preface).unwrap();
        let mut settings = Vec::new();
        if let Some(window) = window {
            // SETTINGS_INITIAL_WINDOW_SIZE
            settings.extend(4_u16.to_be_bytes());
            settings.extend(window.to_be_bytes());
        }
        connection.send(SETTINGS, 0, 0, &settings);
        connection
    }

    /// The socket, to close it or to shut down one direction.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Sends a frame. Errors are ignored: if the server has gone, [`Http2::frame`] reports it.
    pub fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        let _ = self.socket.write_all(&frame);
    }

    /// Posts a JSON body and returns the stream's number.
    pub fn post(&mut self, path: &str, body: &str) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut headers = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("content-type", "application/json"),
        ] {
            // A literal field without indexing (RFC 7541, section 6.2.2).
            headers.push(0);
            for text in [name, value] {
                assert!(text.len() < 127, "{text}");
                headers.push(text.len() as u8);
                headers.extend(text.bytes());
            }
        }
        self.send(HEADERS, END_HEADERS, stream, &headers);
        self.send(DATA, END_STREAM, stream, body.as_bytes());
        stream
    }

    /// Reads the next frame, and acknowledges it if it is a PING or SETTINGS. Returns `None` if
    /// the server has closed the connection.
    ///
    /// # Panics
    /// If no frame comes in time.
    pub fn frame(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.read(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.read(&mut payload)?;
        let frame = Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        };
        if frame.flags & ACK == 0 {
            match frame.kind {
                PING => self.send(PING, ACK, 0, &frame.payload),
                SETTINGS => self.send(SETTINGS, ACK, 0, &[]),
                _ => {}
            }
        }
        Some(frame)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Option<()> {
        match self.socket.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(error) => {
                let late = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
                assert!(
                    !late.contains(&error.kind()),
                    "no frame within {PATIENCE:?}"
                );
                None
            }
        }
    }
}
