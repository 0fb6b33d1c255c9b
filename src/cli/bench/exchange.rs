//! Sends one request to a server and measures the answer.

use super::sse::{EventTooLong, SseParser};
use reqwest::{Client, Response, Url, header};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::fmt;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Maximum number of characters that are quoted from a server's error.
const QUOTED: usize = 200;

/// Where requests go.
#[derive(Debug)]
pub struct Target {
    pub client: Client,
    pub url: Url,
    /// Time limit of a request, from sending it to the end of its answer.
    pub timeout: Duration,
}

/// A request that is ready to be sent.
#[derive(Debug)]
pub struct Job {
    /// The body, as JSON.
    pub body: Vec<u8>,
    /// Number of content events after which the connection is closed. 0 closes it as soon
    /// as the answer begins.
    pub cancel_after: Option<u64>,
}

/// The measurements of one request.
#[derive(Debug)]
pub struct Sample {
    /// When the request was due. Latencies count from here.
    pub due: Instant,
    pub sent: Instant,
    /// When the first and the last content event arrived.
    content: Option<(Instant, Instant)>,
    /// Times between consecutive content events.
    pub gaps: Vec<Duration>,
    /// When the answer ended.
    pub ended: Instant,
    /// Token counts that the server reported.
    pub usage: Option<Usage>,
    pub end: End,
}

/// How a request ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    /// The client closed the connection, as planned.
    Cancelled,
    Failed(Failure),
}

/// Why a request failed.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{kind}: {message}")]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// The server refused the request.
    #[error("HTTP {0}")]
    Status(u16),
    /// The connection could not be established, or was lost before an answer.
    #[error("connection")]
    Connection,
    /// The answer was cut off, or it is not a stream of JSON events.
    #[error("broken stream")]
    BrokenStream,
    /// An event of the answer reports an error.
    #[error("error event")]
    ErrorEvent,
    #[error("timeout")]
    Timeout,
}

/// Token counts that a server reports.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub struct Usage {
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub completion_tokens: u64,
}

impl Sample {
    /// Returns the time until the first content event.
    pub fn first(&self) -> Option<Duration> {
        self.content.map(|(first, _)| first - self.due)
    }

    /// Returns the number of content events.
    pub fn events(&self) -> u64 {
        self.content.map_or(0, |_| self.gaps.len() as u64 + 1)
    }

    /// Returns the number of tokens in the answer, or of content events if the server
    /// reports no count.
    pub fn tokens(&self) -> u64 {
        self.usage
            .map_or_else(|| self.events(), |usage| usage.completion_tokens)
    }

    /// Returns the mean time per token after the first.
    pub fn per_token(&self) -> Option<Duration> {
        let later = u32::try_from(self.tokens().checked_sub(1)?).ok()?;
        let (first, _) = self.content?;
        self.ended.duration_since(first).checked_div(later)
    }
}

impl Failure {
    fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        let message = message.into();
        let short = message.chars().take(QUOTED).collect();
        Self {
            kind,
            message: short,
        }
    }

    fn broken(message: impl Into<String>) -> Self {
        Self::new(FailureKind::BrokenStream, message)
    }
}

impl From<EventTooLong> for Failure {
    fn from(error: EventTooLong) -> Self {
        Self::broken(error.to_string())
    }
}

/// Returns the innermost cause of an error. The layers above it only describe how the
/// client is built.
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().unwrap_or(error).to_string()
}

/// Sends a request that was due at `due` and reads the answer.
pub async fn exchange(target: &Target, job: Job, due: Instant) -> Sample {
    let mut reading = Reading::default();
    let cancel_after = job.cancel_after;
    let sent = Instant::now();
    let talk = async {
        let request = target.client.post(target.url.clone());
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let answer = request.body(job.body).send().await;
        let answer = answer.map_err(|e| Failure::new(FailureKind::Connection, root_cause(&e)))?;
        read(answer, cancel_after, &mut reading).await
    };
    let end = match tokio::time::timeout(target.timeout, talk).await {
        Ok(Ok(end)) => end,
        Ok(Err(failure)) => End::Failed(failure),
        Err(_) => {
            let problem = format!(
                "the answer did not end within {} s",
                target.timeout.as_secs_f64()
            );
            End::Failed(Failure::new(FailureKind::Timeout, problem))
        }
    };
    Sample {
        due,
        sent,
        content: reading.content,
        gaps: reading.gaps,
        ended: reading.done.unwrap_or_else(Instant::now),
        usage: reading.usage,
        end,
    }
}

async fn read(
    mut answer: Response,
    cancel_after: Option<u64>,
    reading: &mut Reading,
) -> Result<End, Failure> {
    let status = answer.status();
    if !status.is_success() {
        let said = answer.text().await.unwrap_or_default();
        let kind = FailureKind::Status(status.as_u16());
        return Err(Failure::new(kind, error_message(&said)));
    }
    if cancel_after == Some(0) {
        return Ok(End::Cancelled);
    }
    let mut parser = SseParser::default();
    // Read to the end of the body, so that the connection can be reused.
    loop {
        let bytes = match answer.chunk().await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            // The answer is complete; only the connection cannot be reused.
            Err(_) if reading.done.is_some() => break,
            Err(error) => return Err(Failure::broken(root_cause(&error))),
        };
        let now = Instant::now();
        parser.feed(&bytes, |data| reading.event(data, now))?;
        if reading.done.is_none() && cancel_after.is_some_and(|most| reading.events >= most) {
            return Ok(End::Cancelled);
        }
    }
    match (reading.done, reading.finish_reason) {
        (Some(_), _) | (None, true) => Ok(End::Finished),
        (None, false) => Err(Failure::broken("the answer ended without [DONE]")),
    }
}

/// What has been read of an answer so far.
#[derive(Default)]
struct Reading {
    content: Option<(Instant, Instant)>,
    gaps: Vec<Duration>,
    events: u64,
    usage: Option<Usage>,
    finish_reason: bool,
    /// When `[DONE]` arrived.
    done: Option<Instant>,
}

impl Reading {
    /// Records an event that arrived at `now`.
    fn event(&mut self, data: &[u8], now: Instant) -> Result<(), Failure> {
        if data == b"[DONE]" {
            self.done.get_or_insert(now);
            return Ok(());
        }
        let event: Event = serde_json::from_slice(data).map_err(|error| {
            let data = String::from_utf8_lossy(data);
            Failure::broken(format!("an event is malformed: {error}: {data}"))
        })?;
        if let Some(error) = event.error {
            let message = error["message"].as_str().map(str::to_owned);
            let message = message.unwrap_or_else(|| error.to_string());
            return Err(Failure::new(FailureKind::ErrorEvent, message));
        }
        self.usage = event.usage.or(self.usage);
        self.finish_reason |= event.choices.finish_reason;
        if event.choices.content {
            self.events += 1;
            self.content = match self.content {
                None => Some((now, now)),
                Some((first, last)) => {
                    self.gaps.push(now - last);
                    Some((first, now))
                }
            };
        }
        Ok(())
    }
}

/// Returns the message of a server's error: from OpenAI's error object, or the whole body
/// if it is not one.
fn error_message(body: &str) -> String {
    let object: Option<Value> = serde_json::from_str(body).ok();
    let message = object.and_then(|object| Some(object["error"]["message"].as_str()?.to_owned()));
    message.unwrap_or_else(|| body.trim().to_owned())
}

/// An event of either endpoint. Only what is measured is kept.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Choices,
    usage: Option<Usage>,
    error: Option<Value>,
}

/// What the choices of an event contain, all together.
#[derive(Default)]
struct Choices {
    content: bool,
    finish_reason: bool,
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of choices")
            }

            fn visit_unit<E>(self) -> Result<Choices, E> {
                Ok(Choices::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices, A::Error> {
                let mut all = Choices::default();
                while let Some(choice) = list.next_element::<Choice>()? {
                    all.content |=
                        choice.text.0 || choice.delta.is_some_and(|d| d.says_something());
                    all.finish_reason |= choice.finish_reason.0;
                }
                Ok(all)
            }
        }
        from.deserialize_any(List)
    }
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Filled,
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Filled,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    content: Filled,
    #[serde(default)]
    reasoning_content: Filled,
    #[serde(default)]
    reasoning: Filled,
    #[serde(default)]
    tool_calls: Filled,
}

impl Delta {
    fn says_something(&self) -> bool {
        self.content.0 || self.reasoning_content.0 || self.reasoning.0 || self.tool_calls.0
    }
}

/// Whether a field is a string, list or object that is not empty. The contents are not
/// kept.
#[derive(Clone, Copy, Default)]
struct Filled(bool);

impl<'de> Deserialize<'de> for Filled {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Anything;
        impl<'de> Visitor<'de> for Anything {
            type Value = Filled;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a text, a list or null")
            }

            fn visit_str<E>(self, text: &str) -> Result<Filled, E> {
                Ok(Filled(!text.is_empty()))
            }

            fn visit_unit<E>(self) -> Result<Filled, E> {
                Ok(Filled(false))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Filled, A::Error> {
                let mut filled = false;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    filled = true;
                }
                Ok(Filled(filled))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Filled, A::Error> {
                let mut filled = false;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    filled = true;
                }
                Ok(Filled(filled))
            }
        }
        from.deserialize_any(Anything)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(events: &[&str]) -> (Reading, Result<(), Failure>) {
        let mut reading = Reading::default();
        let begin = Instant::now();
        let mut number = 0;
        let result = events.iter().try_for_each(|event| {
            number += 1;
            reading.event(event.as_bytes(), begin + Duration::from_millis(number * 10))
        });
        (reading, result)
    }

    #[test]
    fn content_of_both_endpoints_is_timed_and_everything_else_is_not() {
        let (reading, result) = read_all(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"hm"},"logprobs":null}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":"yes \u2603"}}]}"#,
            r#"{"choices":[{"text":"more","finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}}"#,
            "[DONE]",
        ]);
        result.unwrap();
        assert_eq!(reading.events, 4);
        assert_eq!(reading.gaps, [Duration::from_millis(10); 3]);
        assert!(reading.finish_reason && reading.done.is_some());
        let usage = reading.usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (7, 5));
    }

    #[test]
    fn an_event_that_is_an_error_fails_the_request_with_its_message() {
        let (_, result) = read_all(&[r#"{"error":{"message":"the device is lost","code":null}}"#]);
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, FailureKind::ErrorEvent);
        assert_eq!(failure.message, "the device is lost");
        for wrong in ["{", "[]", r#"{"choices":3}"#, "\u{fffd}"] {
            let failure = read_all(&[wrong]).1.unwrap_err();
            assert_eq!(failure.kind, FailureKind::BrokenStream, "{wrong}");
        }
        assert!(read_all(&[r#"{"choices":null}"#]).1.is_ok());
    }

    #[test]
    fn latencies_count_from_when_the_request_was_due() {
        let due = Instant::now();
        let after = |ms| due + Duration::from_millis(ms);
        let sample = Sample {
            due,
            sent: after(5),
            content: Some((after(30), after(70))),
            gaps: vec![Duration::from_millis(20); 2],
            ended: after(80),
            usage: Some(Usage {
                prompt_tokens: 2,
                completion_tokens: 6,
            }),
            end: End::Finished,
        };
        assert_eq!(sample.first(), Some(Duration::from_millis(30)));
        assert_eq!((sample.events(), sample.tokens()), (3, 6));
        // (80 − 30) / (6 − 1)
        assert_eq!(sample.per_token(), Some(Duration::from_millis(10)));
        let uncounted = Sample {
            usage: None,
            ..sample
        };
        assert_eq!(uncounted.per_token(), Some(Duration::from_millis(25)));
    }
}
