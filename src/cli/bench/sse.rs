//! Incremental parser of server-sent events.

use thiserror::Error;

/// Maximum size of one event in bytes.
const MAX_EVENT: usize = 16 << 20;

/// An event that is too long.
#[derive(Debug, Error)]
#[error("an event has more than {MAX_EVENT} bytes")]
pub struct EventTooLong;

/// Parses a stream of server-sent events that arrives in arbitrary pieces, and gives the
/// data of each event as defined in section 9.2 of the WHATWG HTML standard. Skips event
/// names, ids and comments.
#[derive(Debug, Default)]
pub struct SseParser {
    /// The beginning of a line that is not complete yet.
    line: Vec<u8>,
    /// The data lines of the current event so far.
    data: Vec<u8>,
    has_data: bool,
    /// The last byte was CR, so an LF that follows belongs to it.
    after_cr: bool,
    /// The first line has been read, so no byte order mark can follow.
    begun: bool,
}

impl SseParser {
    /// Parses the next piece and passes the data of each event that it completes to
    /// `on_event`. Stops at the first error of `on_event` and returns it.
    pub fn feed<E: From<EventTooLong>>(
        &mut self,
        mut bytes: &[u8],
        mut on_event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (line, rest) = bytes.split_at(end);
            bytes = match rest {
                [b'\r', b'\n', rest @ ..] => rest,
                [b'\r'] => {
                    self.after_cr = true;
                    &[]
                }
                [_, rest @ ..] => rest,
                [] => rest,
            };
            if self.line.is_empty() {
                self.end_line(line, &mut on_event)?;
            } else {
                let mut whole = std::mem::take(&mut self.line);
                whole.extend_from_slice(line);
                self.end_line(&whole, &mut on_event)?;
                // Reuse the memory.
                whole.clear();
                self.line = whole;
            }
        }
        self.line.extend_from_slice(bytes);
        self.check_length(0).map_err(E::from)
    }

    /// Handles a complete line, without its line ending.
    fn end_line<E: From<EventTooLong>>(
        &mut self,
        mut line: &[u8],
        on_event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.begun {
            self.begun = true;
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            let complete = std::mem::take(&mut self.has_data);
            let handled = if complete {
                on_event(&self.data)
            } else {
                Ok(())
            };
            self.data.clear();
            return handled;
        }
        let colon = line.iter().position(|&byte| byte == b':');
        let (name, value) = line.split_at(colon.unwrap_or(line.len()));
        if name == b"data" {
            let value = value.strip_prefix(b":").unwrap_or(value);
            let value = value.strip_prefix(b" ").unwrap_or(value);
            self.check_length(value.len())?;
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        }
        Ok(())
    }

    fn check_length(&self, more: usize) -> Result<(), EventTooLong> {
        if self.line.len() + self.data.len() + more > MAX_EVENT {
            return Err(EventTooLong);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the events of a stream that arrives in these pieces.
    fn events<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut parser = SseParser::default();
        let mut found = Vec::new();
        for piece in pieces {
            let read = parser.feed(piece, |data| {
                found.push(String::from_utf8(data.to_vec()).unwrap());
                Ok::<_, EventTooLong>(())
            });
            read.unwrap();
        }
        found
    }

    const STREAM: &str = "\u{feff}data: one\r\n\r\n: a comment\n\nevent: name\ndata:two\n\
        data:  lines\r\rid: 7\ndata\n\nnothing: here\n\ndatax: no\n\ndata: grün ☃\n\n\r\n\
        data: [DONE]\n\ndata: without an end";

    const EVENTS: [&str; 5] = ["one", "two\n lines", "", "grün ☃", "[DONE]"];

    #[test]
    fn a_stream_has_the_same_events_in_any_two_or_three_pieces() {
        let bytes = STREAM.as_bytes();
        assert_eq!(events([bytes]), EVENTS);
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(events(pieces), EVENTS, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn a_stream_has_the_same_events_in_pieces_of_any_length() {
        for length in 1..STREAM.len() {
            assert_eq!(events(STREAM.as_bytes().chunks(length)), EVENTS, "{length}");
        }
    }

    #[test]
    fn every_way_to_end_a_line_gives_the_same_events() {
        for end in ["\n", "\r\n", "\r"] {
            let stream = STREAM.replace("\r\n", "\n").replace('\r', "\n");
            let stream = stream.replace('\n', end);
            for length in 1..stream.len() {
                assert_eq!(events(stream.as_bytes().chunks(length)), EVENTS, "{end:?}");
            }
        }
    }

    #[test]
    fn an_event_without_an_end_is_an_error_before_it_fills_the_memory() {
        let mut parser = SseParser::default();
        let piece = vec![b'x'; 1 << 20];
        let read = (0..=16).try_for_each(|_| parser.feed(&piece, |_| Ok::<_, EventTooLong>(())));
        assert!(read.is_err());
        let mut parser = SseParser::default();
        let line = [b"data:".as_slice(), &piece, b"\n"].concat();
        let read = (0..=16).try_for_each(|_| parser.feed(&line, |_| Ok::<_, EventTooLong>(())));
        assert!(read.is_err());
    }

    #[test]
    fn an_error_of_the_reader_is_passed_on() {
        #[derive(Debug, PartialEq)]
        struct Enough;
        impl From<EventTooLong> for Enough {
            fn from(_: EventTooLong) -> Self {
                Self
            }
        }
        let mut parser = SseParser::default();
        let read = parser.feed(b"data: 1\n\ndata: 2\n\n", |_| Err(Enough));
        assert_eq!(read, Err(Enough));
    }
}
