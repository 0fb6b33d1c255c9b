//! Harmony, the format of gpt-oss.
//!
//! A conversation is a list of messages: `<|start|>`, a header, `<|message|>`, text, and a mark
//! that ends the message. The header of an answer's message names a channel (`analysis` for the
//! reasoning, `commentary` for calls and what is said about them, `final` for the answer), and the
//! recipient of a call. The reference is OpenAI's library `openai-harmony`.

mod prompt;
mod types;

pub(super) use prompt::{is_harmony, prompt};

use super::tools::ToolEvent;
use serde::de::IgnoredAny;

/// Begins a message.
pub(super) const START: &str = "<|start|>";
/// Begins the name of the channel in a header.
pub(super) const CHANNEL: &str = "<|channel|>";
/// Ends a header and begins the text of its message.
pub(super) const MESSAGE: &str = "<|message|>";
/// Begins the form of the text in a header.
pub(super) const CONSTRAIN: &str = "<|constrain|>";
/// Ends a message that others may follow.
pub(super) const END: &str = "<|end|>";
/// Ends a call, and with it the answer.
pub(super) const CALL: &str = "<|call|>";
/// Ends the last message of an answer.
pub(super) const RETURN: &str = "<|return|>";

/// All marks.
pub(crate) const MARKS: [&str; 7] = [START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN];

/// Maximum length of a header, in bytes. What is longer is text.
const MAX_HEADER_BYTES: usize = 512;

/// Prefix of the recipients that are tools of the request.
pub(super) const FUNCTIONS: &str = "functions.";

/// Begins a message of the model.
const ROLE: &str = "<|start|>assistant";

/// Before the recipient in a header.
const RECIPIENT: &str = "to=";

/// Between messages of the same kind.
const SEPARATOR: &str = "\n\n";

/// Event from parsing a piece of an answer in Harmony.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HarmonyEvent {
    /// Text of the channel `analysis`.
    Reasoning(String),
    /// Text of the other channels, and calls.
    Answer(ToolEvent),
}

/// Parses an answer in Harmony, piece by piece. Its special tokens must be in the text.
///
/// No answer is an error: a message without a known channel is text, and so is what stands between
/// messages. Several messages of reasoning, or of text, are separated by an empty line. Calls are
/// messages to `functions.` and a name, whatever their channel; their arguments are passed on as
/// the model writes them.
#[derive(Debug)]
pub struct HarmonyParser {
    state: State,
    /// Whether messages to tools are calls and not text.
    with_calls: bool,
    /// What may be the beginning of a mark.
    held: String,
    calls: usize,
    /// Arguments of the last call.
    arguments: String,
    /// Whether the next character of the message is its first.
    is_first: bool,
    has_reasoning: bool,
    has_text: bool,
    events: Vec<HarmonyEvent>,
}

#[derive(Debug)]
enum State {
    /// Where a header may begin.
    Outside,
    /// In a header, which begins with a mark.
    Header(String),
    Message(Kind),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Text,
    Call,
}

impl HarmonyParser {
    /// Creates a parser for an answer that begins with a header. Unless `with_calls`, calls are
    /// text.
    pub fn new(with_calls: bool) -> Self {
        Self {
            state: State::Outside,
            with_calls,
            held: String::new(),
            calls: 0,
            arguments: String::new(),
            is_first: true,
            has_reasoning: false,
            has_text: false,
            events: Vec::new(),
        }
    }

    /// Creates a parser for an answer that begins within the text of the channel `final`, because
    /// the prompt ends there.
    pub fn inside_final(with_calls: bool) -> Self {
        Self {
            state: State::Message(Kind::Text),
            ..Self::new(with_calls)
        }
    }

    /// Returns whether the next text is reasoning, as far as is known.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Message(Kind::Reasoning))
    }

    /// Processes the next piece of the answer.
    pub fn push(&mut self, text: &str) -> Vec<HarmonyEvent> {
        for c in text.chars() {
            self.held.push(c);
            while !MARKS.iter().any(|mark| mark.starts_with(&self.held)) {
                let c = self.held.remove(0);
                self.take(c);
            }
            if let Some(mark) = MARKS.iter().find(|mark| **mark == self.held) {
                self.held.clear();
                self.mark(mark);
            }
        }
        std::mem::take(&mut self.events)
    }

    /// Ends the answer and returns the events for what was held back. A header that the end cuts
    /// off is dropped. A call has ended if its arguments are complete, because the mark that ends
    /// it also ends the answer and is not part of its text.
    pub fn finish(&mut self) -> Vec<HarmonyEvent> {
        for c in std::mem::take(&mut self.held).chars() {
            self.take(c);
        }
        match &self.state {
            State::Header(header) if RECIPIENT.starts_with(&**header) => self.header_is_text(),
            State::Message(Kind::Call)
                if serde_json::from_str::<IgnoredAny>(&self.arguments).is_ok() =>
            {
                self.end();
            }
            _ => {}
        }
        self.state = State::Outside;
        std::mem::take(&mut self.events)
    }

    /// Processes a character that is not part of a mark.
    fn take(&mut self, c: char) {
        match &mut self.state {
            State::Outside if c.is_whitespace() => {}
            State::Outside => {
                self.state = State::Header(c.into());
                self.require_header();
            }
            State::Header(header) => {
                header.push(c);
                self.require_header();
            }
            State::Message(Kind::Reasoning) => {
                let separate = std::mem::take(&mut self.is_first) && self.has_reasoning;
                self.has_reasoning = true;
                self.reasoning(if separate { SEPARATOR } else { "" }, c);
            }
            State::Message(Kind::Text) => {
                let separate = std::mem::take(&mut self.is_first) && self.has_text;
                self.has_text = true;
                self.text(if separate { SEPARATOR } else { "" }, c);
            }
            State::Message(Kind::Call) => {
                self.arguments.push(c);
                self.call_arguments(c.encode_utf8(&mut [0; 4]));
            }
        }
    }

    /// Turns what was taken for a header into text once it cannot be one.
    fn require_header(&mut self) {
        let State::Header(header) = &self.state else {
            return;
        };
        let may_begin = |header: &str| {
            let header = header.trim_start();
            MARKS.iter().any(|mark| header.starts_with(mark))
                || header.starts_with(RECIPIENT)
                || RECIPIENT.starts_with(header)
        };
        let is_header = header
            .strip_prefix(ROLE)
            .map_or_else(|| may_begin(header), may_begin);
        if !is_header || header.len() > MAX_HEADER_BYTES {
            self.header_is_text();
        }
    }

    fn header_is_text(&mut self) {
        let State::Header(mut text) = std::mem::replace(&mut self.state, State::Outside) else {
            return;
        };
        // The marks themselves are no text.
        if let Some(rest) = text.strip_prefix(ROLE) {
            text = rest.to_owned();
        }
        for mark in MARKS {
            text = text.replace(mark, "");
        }
        self.begin(Kind::Text);
        for c in text.chars() {
            self.take(c);
        }
    }

    fn mark(&mut self, mark: &str) {
        match (&mut self.state, mark) {
            (State::Header(header), MESSAGE) => {
                let header = std::mem::take(header);
                let kind = self.read_header(&header);
                self.begin(kind);
            }
            (State::Header(header), CHANNEL | CONSTRAIN) => header.push_str(mark),
            (_, START | CHANNEL) => {
                self.end();
                self.state = State::Header(mark.to_owned());
            }
            (State::Outside, MESSAGE) => self.begin(Kind::Text),
            (_, END | CALL | RETURN) => {
                self.end();
                self.state = State::Outside;
            }
            // Marks that have no meaning where they stand.
            _ => {}
        }
    }

    /// Returns the kind of the message with this header, and announces a call.
    fn read_header(&mut self, header: &str) -> Kind {
        let recipient = header.rsplit_once(RECIPIENT).map(|(_, recipient)| {
            let end = recipient.find(|c: char| c.is_whitespace() || c == '<');
            &recipient[..end.unwrap_or(recipient.len())]
        });
        let channel = header.rsplit_once(CHANNEL).map_or("", |(_, channel)| {
            let channel = channel.trim_start();
            let end = channel.find(|c: char| !c.is_ascii_alphabetic());
            &channel[..end.unwrap_or(channel.len())]
        });
        let tool = recipient.and_then(|recipient| recipient.strip_prefix(FUNCTIONS));
        match tool {
            Some(name) if self.with_calls && !name.is_empty() => {
                let event = ToolEvent::CallBegin {
                    index: self.calls,
                    name: name.to_owned(),
                };
                self.answer(event);
                self.calls += 1;
                self.arguments.clear();
                Kind::Call
            }
            _ if channel == "analysis" => Kind::Reasoning,
            _ => Kind::Text,
        }
    }

    fn begin(&mut self, kind: Kind) {
        self.state = State::Message(kind);
        self.is_first = true;
    }

    fn end(&mut self) {
        if !matches!(self.state, State::Message(Kind::Call)) {
            return;
        }
        if self.arguments.trim().is_empty() {
            self.call_arguments("{}");
        }
        let index = self.calls.saturating_sub(1);
        self.answer(ToolEvent::CallEnd { index });
    }

    fn reasoning(&mut self, before: &str, c: char) {
        if !matches!(self.events.last(), Some(HarmonyEvent::Reasoning(_))) {
            self.events.push(HarmonyEvent::Reasoning(String::new()));
        }
        if let Some(HarmonyEvent::Reasoning(text)) = self.events.last_mut() {
            text.push_str(before);
            text.push(c);
        }
    }

    fn text(&mut self, before: &str, c: char) {
        let is_text =
            |event: &HarmonyEvent| matches!(event, HarmonyEvent::Answer(ToolEvent::Text(_)));
        if !self.events.last().is_some_and(is_text) {
            self.answer(ToolEvent::Text(String::new()));
        }
        if let Some(HarmonyEvent::Answer(ToolEvent::Text(text))) = self.events.last_mut() {
            text.push_str(before);
            text.push(c);
        }
    }

    fn call_arguments(&mut self, text: &str) {
        if let Some(HarmonyEvent::Answer(ToolEvent::CallArguments { delta, .. })) =
            self.events.last_mut()
        {
            delta.push_str(text);
            return;
        }
        let index = self.calls.saturating_sub(1);
        let delta = text.to_owned();
        self.answer(ToolEvent::CallArguments { index, delta });
    }

    fn answer(&mut self, event: ToolEvent) {
        self.events.push(HarmonyEvent::Answer(event));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tools::tests::pieces;
    use super::*;
    use proptest::prelude::*;

    /// Formats events briefly: `[reasoning]`, `"text"`, `name(arguments)`, and `name(arguments` if
    /// cut off.
    fn show(events: &[HarmonyEvent]) -> String {
        let mut shown = String::new();
        let mut last = None;
        for event in events {
            let kind = std::mem::discriminant(event);
            match event {
                HarmonyEvent::Reasoning(text) if last == Some(kind) => {
                    shown.truncate(shown.len() - 1);
                    shown.push_str(&format!("{text}]"));
                }
                HarmonyEvent::Reasoning(text) => shown.push_str(&format!(" [{text}]")),
                HarmonyEvent::Answer(ToolEvent::Text(text)) => {
                    match shown.ends_with('"') {
                        true => shown.truncate(shown.len() - 1),
                        false => shown.push_str(" \""),
                    }
                    shown.push_str(&format!("{text}\""));
                }
                HarmonyEvent::Answer(ToolEvent::CallBegin { name, .. }) => {
                    shown.push_str(&format!(" {name}("));
                }
                HarmonyEvent::Answer(ToolEvent::CallArguments { delta, .. }) => {
                    shown.push_str(delta);
                }
                HarmonyEvent::Answer(ToolEvent::CallEnd { .. }) => shown.push(')'),
            }
            last = Some(kind);
        }
        shown.trim_start().to_owned()
    }

    fn parse<'a>(mut parser: HarmonyParser, pieces: impl IntoIterator<Item = &'a str>) -> String {
        let mut events = Vec::new();
        for piece in pieces {
            events.extend(parser.push(piece));
        }
        events.extend(parser.finish());
        show(&events)
    }

    #[test]
    fn channels_are_told_apart() {
        let cases = [
            (
                "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
                "[Hm.] \"Yes.\"",
            ),
            (
                "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>analysis<|message|>B<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}",
                "[A] \"I look.\" [\n\nB] f({\"a\": 1})",
            ),
            // As the template writes a call, with the mark that ends it, and without arguments.
            (
                " to=functions.f<|channel|>commentary json<|message|>{\"a\":1}<|call|>",
                "f({\"a\":1})",
            ),
            (
                "<|channel|>commentary to=functions.f<|message|><|call|>",
                "f({})",
            ),
            (
                "<|channel|>analysis to=functions.f code<|message|>{}",
                "f({})",
            ),
            // Cut off in a header, in the reasoning, and in arguments.
            (
                "<|channel|>analysis<|message|>Hm.<|end|><|start|>assis",
                "[Hm.]",
            ),
            ("<|channel|>analysis<|message|>Hm <", "[Hm <]"),
            (
                "<|channel|>commentary to=functions.f<|message|>{\"a\": ",
                "f({\"a\": ",
            ),
            (
                "<|channel|>final<|message|>a<|end|>\n<|start|>assistant<|channel|>final<|message|>b",
                "\"a\n\nb\"",
            ),
        ];
        for (answer, expected) in cases {
            assert_eq!(
                parse(HarmonyParser::new(true), [answer]),
                expected,
                "{answer}"
            );
            let cut = parse(HarmonyParser::new(true), answer.split(""));
            assert_eq!(cut, expected, "by characters: {answer}");
        }
        let inside = parse(HarmonyParser::inside_final(true), ["So: 1<|return|>"]);
        assert_eq!(inside, "\"So: 1\"");
    }

    #[test]
    fn what_is_not_harmony_is_text() {
        let cases = [
            ("Hello <b>you</b>", "\"Hello <b>you</b>\""),
            ("to be", "\"to be\""),
            ("to", "\"to\""),
            ("<|message|>Yes", "\"Yes\""),
            ("<|channel|>other<|message|>Yes", "\"Yes\""),
            ("<|channel|>final<|channel|>analysis<|message|>Hm", "[Hm]"),
            // The end of a message, or the recipient, is missing.
            (
                "<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>final<|message|>Yes",
                "[Hm] \"Yes\"",
            ),
            (
                "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Yes",
                "[Hm] \"Yes\"",
            ),
            ("<|channel|>commentary to=functions.<|message|>{}", "\"{}\""),
            (
                "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant Well <b>",
                "[Hm] \" Well <b>\"",
            ),
            // A tool that was not offered.
            (
                "<|channel|>analysis to=python code<|message|>1+1<|call|>",
                "[1+1]",
            ),
            ("<|end|>Yes<|call|>No", "\"Yes\n\nNo\""),
        ];
        for (answer, expected) in cases {
            assert_eq!(
                parse(HarmonyParser::new(true), [answer]),
                expected,
                "{answer}"
            );
        }
        let call = "<|channel|>commentary to=functions.f<|message|>{}";
        assert_eq!(parse(HarmonyParser::new(false), [call]), "\"{}\"");
        let long = format!("<|channel|>{}", "a".repeat(2 * MAX_HEADER_BYTES));
        let expected = format!("\"{}\"", "a".repeat(2 * MAX_HEADER_BYTES));
        assert_eq!(parse(HarmonyParser::new(true), [&*long]), expected);
    }

    proptest! {
        #[test]
        fn pieces_change_nothing_and_no_text_is_lost(
            words in proptest::collection::vec(
                prop_oneof![
                    proptest::sample::select(&MARKS),
                    proptest::sample::select(&[
                        "analysis", "final", "commentary", " to=functions.f", "assistant", "x", "{",
                        "}", "<", "<|", "é", " ", "\n",
                    ]),
                ],
                0..20,
            ),
            cuts in proptest::collection::vec(any::<bool>(), 300),
            with_calls: bool,
        ) {
            let answer = words.concat();
            let pieces = pieces(&answer, &cuts);
            let whole = parse(HarmonyParser::new(with_calls), [answer.as_str()]);
            let cut = parse(HarmonyParser::new(with_calls), pieces.iter().map(String::as_str));
            prop_assert_eq!(&cut, &whole);
            // What stands between a header and the next mark is there once.
            let texts = answer.split(MESSAGE).skip(1);
            let expected: usize = texts
                .map(|text| {
                    let end = MARKS.iter().filter_map(|mark| text.find(mark)).min();
                    text[..end.unwrap_or(text.len())].matches('x').count()
                })
                .sum();
            prop_assert!(whole.matches('x').count() >= expected, "{} from {}", whole, answer);
            prop_assert!(whole.matches('x').count() <= answer.matches('x').count());
        }
    }
}
