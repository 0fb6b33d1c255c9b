//! Splits an answer into reasoning, text and tool calls as it arrives.

use crate::text::harmony::{HarmonyEvent, HarmonyParser};
use crate::text::reasoning::{ReasoningFormat, ReasoningSplitter};
use crate::text::tools::{ToolDeclaration, ToolEvent, ToolFormat, ToolParser};
use uuid::Uuid;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Reasoning(String),
    Text(String),
    CallBegin { index: usize, name: String },
    CallArguments { index: usize, delta: String },
    CallEnd,
}

/// How to read the answers to a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// The marks of reasoning, and whether the prompt has already opened it.
    pub reasoning: Option<(ReasoningFormat, bool)>,
    /// Whether the answer is in Harmony, and whether it begins with a header.
    pub harmony: Option<bool>,
    /// Whether to leave the reasoning out.
    pub hide_reasoning: bool,
    pub calls: Calls,
    /// Whether to leave out all calls but the first.
    pub one_call: bool,
}

/// Whether to look for tool calls.
#[derive(Clone, Debug, Default)]
pub(crate) enum Calls {
    #[default]
    None,
    /// The answer may contain calls of these tools, in this format.
    Allowed(ToolFormat, Vec<ToolDeclaration>),
    /// The answer consists of calls only.
    Forced(ToolFormat),
}

/// Splits one answer.
#[derive(Debug)]
pub(crate) struct Parts {
    splitter: Option<ReasoningSplitter>,
    harmony: Option<HarmonyParser>,
    parser: Option<ToolParser>,
    hide_reasoning: bool,
    one_call: bool,
    calls: usize,
}

impl Reading {
    /// Creates the splitter of one answer.
    pub fn parts(&self) -> Parts {
        let splitter = self.reasoning.map(|(format, inside)| match inside {
            true => ReasoningSplitter::inside(format),
            false => ReasoningSplitter::new(format),
        });
        let with_calls = !matches!(self.calls, Calls::None);
        let harmony = self.harmony.map(|has_header| match has_header {
            true => HarmonyParser::new(with_calls),
            false => HarmonyParser::inside_final(with_calls),
        });
        let parser = match &self.calls {
            Calls::None => None,
            Calls::Allowed(format, tools) => Some(ToolParser::new(*format, tools.iter().cloned())),
            Calls::Forced(format) => Some(ToolParser::forced(*format)),
        };
        Parts {
            splitter,
            harmony,
            parser,
            hide_reasoning: self.hide_reasoning,
            one_call: self.one_call,
            calls: 0,
        }
    }
}

impl Parts {
    /// Takes the next piece of the answer and returns the parts in it.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        if let Some(harmony) = &mut self.harmony {
            let events = harmony.push(text);
            self.harmony_events(events, &mut parts);
            return parts;
        }
        let content = match &mut self.splitter {
            None => text.to_owned(),
            Some(splitter) => {
                let split = splitter.push(text);
                self.reasoning(split.reasoning, &mut parts);
                split.content
            }
        };
        self.content(&content, &mut parts);
        parts
    }

    /// Ends the answer and returns the text that was held back in case it began a mark.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        if let Some(harmony) = &mut self.harmony {
            let events = harmony.finish();
            self.harmony_events(events, &mut parts);
            return parts;
        }
        if let Some(splitter) = &mut self.splitter {
            let split = splitter.finish();
            self.reasoning(split.reasoning, &mut parts);
            self.content(&split.content, &mut parts);
        }
        if let Some(parser) = &mut self.parser {
            let events = parser.finish();
            self.events(events, &mut parts);
        }
        parts
    }

    /// Returns all parts of a complete answer.
    pub fn all(mut self, text: &str) -> Vec<Part> {
        let mut parts = self.push(text);
        parts.extend(self.finish());
        parts
    }

    /// Returns whether the model is reasoning.
    pub fn in_reasoning(&self) -> bool {
        match &self.harmony {
            Some(harmony) => harmony.in_reasoning(),
            None => (self.splitter.as_ref()).is_some_and(ReasoningSplitter::in_reasoning),
        }
    }

    /// Returns how many calls have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    fn reasoning(&self, text: String, parts: &mut Vec<Part>) {
        if !text.is_empty() && !self.hide_reasoning {
            parts.push(Part::Reasoning(text));
        }
    }

    fn content(&mut self, text: &str, parts: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        match &mut self.parser {
            None => parts.push(Part::Text(text.to_owned())),
            Some(parser) => {
                let events = parser.push(text);
                self.events(events, parts);
            }
        }
    }

    fn harmony_events(&mut self, events: Vec<HarmonyEvent>, parts: &mut Vec<Part>) {
        for event in events {
            match event {
                HarmonyEvent::Reasoning(text) => self.reasoning(text, parts),
                HarmonyEvent::Answer(event) => self.event(event, parts),
            }
        }
    }

    fn events(&mut self, events: Vec<ToolEvent>, parts: &mut Vec<Part>) {
        for event in events {
            self.event(event, parts);
        }
    }

    fn event(&mut self, event: ToolEvent, parts: &mut Vec<Part>) {
        parts.push(match event {
            ToolEvent::Text(text) => Part::Text(text),
            ToolEvent::CallBegin { index, .. }
            | ToolEvent::CallArguments { index, .. }
            | ToolEvent::CallEnd { index }
                if self.one_call && index > 0 =>
            {
                return;
            }
            ToolEvent::CallBegin { index, name } => {
                self.calls += 1;
                Part::CallBegin { index, name }
            }
            ToolEvent::CallArguments { index, delta } => Part::CallArguments { index, delta },
            ToolEvent::CallEnd { .. } => Part::CallEnd,
        });
    }
}

/// Returns a new id for a call, by which its result refers to it.
pub(crate) fn call_id() -> String {
    format!("call_{}", Uuid::new_v4().simple())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "<think>\nHm.\n</think>\n\nSo:\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";

    fn reading() -> Reading {
        Reading {
            reasoning: Some((ReasoningFormat::THINK, false)),
            calls: Calls::Allowed(ToolFormat::Hermes, vec![ToolDeclaration::new("f", None)]),
            ..Reading::default()
        }
    }

    fn call(index: usize, arguments: &str) -> [Part; 3] {
        [
            Part::CallBegin {
                index,
                name: "f".to_owned(),
            },
            Part::CallArguments {
                index,
                delta: arguments.to_owned(),
            },
            Part::CallEnd,
        ]
    }

    #[test]
    fn reasoning_text_and_calls_are_taken_apart() {
        let mut expected = vec![
            Part::Reasoning("Hm.".to_owned()),
            Part::Text("So:".to_owned()),
        ];
        expected.extend(call(0, "{}"));
        expected.extend(call(1, "{\"a\": 1}"));
        assert_eq!(reading().parts().all(ANSWER), expected);
    }

    #[test]
    fn reasoning_and_further_calls_are_left_out_when_asked() {
        let reading = Reading {
            hide_reasoning: true,
            one_call: true,
            ..reading()
        };
        let mut parts = reading.parts();
        let mut expected = vec![Part::Text("So:".to_owned())];
        expected.extend(call(0, "{}"));
        assert_eq!(parts.push(ANSWER), expected);
        assert_eq!(parts.finish(), []);
        assert_eq!(parts.calls(), 1);
    }

    #[test]
    fn without_marks_to_look_for_text_is_passed_on() {
        let parts = Reading::default().parts().all(ANSWER);
        assert_eq!(parts, [Part::Text(ANSWER.to_owned())]);
    }

    #[test]
    fn reasoning_that_the_prompt_opened_is_continued() {
        let reading = Reading {
            reasoning: Some((ReasoningFormat::THINK, true)),
            ..Reading::default()
        };
        let mut parts = reading.parts();
        assert!(parts.in_reasoning());
        let expected = [Part::Reasoning("a".to_owned()), Part::Text("b".to_owned())];
        assert_eq!(parts.push("a</think>b"), expected);
        assert!(!parts.in_reasoning());
    }
}
