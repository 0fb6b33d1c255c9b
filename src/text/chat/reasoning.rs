//! Splits an answer into the model's reasoning and its content.

/// Marks around a model's reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningFormat {
    /// Mark before the reasoning.
    pub open: &'static str,
    /// Mark after the reasoning.
    pub close: &'static str,
}

impl ReasoningFormat {
    /// `<think>…</think>`, used by DeepSeek R1, Qwen3 and most others.
    pub const THINK: Self = Self {
        open: "<think>",
        close: "</think>",
    };

    /// `[THINK]…[/THINK]`, used by Magistral.
    pub const MISTRAL: Self = Self {
        open: "[THINK]",
        close: "[/THINK]",
    };

    /// `<seed:think>…</seed:think>`, used by Seed-OSS.
    pub const SEED: Self = Self {
        open: "<seed:think>",
        close: "</seed:think>",
    };

    /// `<|START_THINKING|>…<|END_THINKING|>`, used by Command R7B and Command A.
    pub const COMMAND_R: Self = Self {
        open: "<|START_THINKING|>",
        close: "<|END_THINKING|>",
    };

    /// `<|channel>thought…<channel|>`, used by Gemma 4.
    pub const GEMMA: Self = Self {
        open: "<|channel>thought",
        close: "<channel|>",
    };

    /// The channel `analysis` of Harmony, which gpt-oss uses. A [`ReasoningSplitter`] only
    /// finds reasoning at the beginning of an answer; [`HarmonyParser`](crate::HarmonyParser)
    /// reads all channels.
    pub const HARMONY: Self = Self {
        open: "<|channel|>analysis<|message|>",
        close: "<|end|>",
    };

    /// Detects the format from the marks in a chat template. Returns `None` if the model is
    /// not known to reason.
    pub fn detect(template_source: &str) -> Option<Self> {
        if template_source.contains(Self::HARMONY.open) {
            return Some(Self::HARMONY);
        }
        [
            Self::THINK,
            Self::MISTRAL,
            Self::SEED,
            Self::COMMAND_R,
            Self::GEMMA,
        ]
        .into_iter()
        .find(|format| template_source.contains(format.close))
    }

    /// Returns whether a prompt with this end has already opened the reasoning.
    pub fn is_open(self, prompt_end: &str) -> bool {
        prompt_end.trim_end().ends_with(self.open)
    }

    /// Returns whether a prompt with this end has already closed the reasoning, so that the
    /// answer has none.
    pub fn is_closed(self, prompt_end: &str) -> bool {
        prompt_end.trim_end().ends_with(self.close)
    }
}

/// Text that a piece of an answer contributes. The reasoning precedes the content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReasoningSplit {
    /// Additional reasoning.
    pub reasoning: String,
    /// Additional content.
    pub content: String,
}

/// Splits an answer into reasoning and content, piece by piece.
///
/// Reasoning is the text between the marks at the beginning of the answer. Marks that come
/// later are content. Line breaks next to a mark belong to the mark. Only text that could
/// still become part of a mark is held back.
#[derive(Clone, Debug)]
pub struct ReasoningSplitter {
    format: ReasoningFormat,
    state: State,
    /// White space at the beginning of the answer, or line breaks in the reasoning, held back.
    space: String,
    /// Beginning of a mark, held back.
    mark: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the opening mark, if there is one.
    Start,
    /// After the opening mark and its line breaks.
    AfterOpen,
    Reasoning,
    /// After the closing mark and its line breaks.
    AfterClose,
    Content,
}

impl ReasoningSplitter {
    /// Creates a splitter for an answer that begins with the opening mark if the model reasons.
    pub fn new(format: ReasoningFormat) -> Self {
        Self {
            format,
            state: State::Start,
            space: String::new(),
            mark: String::new(),
        }
    }

    /// Creates a splitter for an answer that begins with reasoning, because the prompt ends
    /// with the opening mark.
    pub fn inside(format: ReasoningFormat) -> Self {
        Self {
            state: State::AfterOpen,
            ..Self::new(format)
        }
    }

    /// Returns whether the next text is reasoning, as far as is known.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::AfterOpen | State::Reasoning)
    }

    /// Processes the next piece of the answer.
    pub fn push(&mut self, text: &str) -> ReasoningSplit {
        let mut split = ReasoningSplit::default();
        for (place, c) in text.char_indices() {
            if self.state == State::Content {
                split.content.push_str(&text[place..]);
                break;
            }
            self.take(c, &mut split);
        }
        split
    }

    /// Ends the answer and returns the text that was held back.
    pub fn finish(&mut self) -> ReasoningSplit {
        let mut held = std::mem::take(&mut self.space);
        held.push_str(&std::mem::take(&mut self.mark));
        let mut split = ReasoningSplit::default();
        match self.state {
            State::Start => split.content = held,
            _ => split.reasoning = held,
        }
        split
    }

    fn take(&mut self, c: char, split: &mut ReasoningSplit) {
        match self.state {
            State::Start => self.take_start(c, split),
            State::AfterOpen | State::AfterClose if c == '\n' => {}
            State::AfterOpen | State::Reasoning => {
                self.state = State::Reasoning;
                self.take_reasoning(c, split);
            }
            State::AfterClose | State::Content => {
                self.state = State::Content;
                split.content.push(c);
            }
        }
    }

    fn take_start(&mut self, c: char, split: &mut ReasoningSplit) {
        if self.mark.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return;
        }
        self.mark.push(c);
        if self.mark == self.format.open {
            self.state = State::AfterOpen;
            self.space.clear();
            self.mark.clear();
        } else if !self.format.open.starts_with(&self.mark) {
            *split = self.finish();
            self.state = State::Content;
        }
    }

    fn take_reasoning(&mut self, c: char, split: &mut ReasoningSplit) {
        self.mark.push(c);
        while !self.format.close.starts_with(&self.mark) {
            let c = self.mark.remove(0);
            if c == '\n' {
                self.space.push(c);
            } else {
                split.reasoning.push_str(&self.space);
                split.reasoning.push(c);
                self.space.clear();
            }
        }
        if self.mark == self.format.close {
            self.state = State::AfterClose;
            self.space.clear();
            self.mark.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tools::tests::{pieces, recorded};
    use super::*;
    use proptest::prelude::*;

    /// Returns the reasoning and the content of an answer that arrives in these pieces.
    fn split<'a>(
        mut splitter: ReasoningSplitter,
        pieces: impl IntoIterator<Item = &'a str>,
    ) -> (String, String) {
        let mut whole = ReasoningSplit::default();
        let mut add = |split: ReasoningSplit| {
            whole.reasoning.push_str(&split.reasoning);
            whole.content.push_str(&split.content);
        };
        for piece in pieces {
            add(splitter.push(piece));
        }
        add(splitter.finish());
        (whole.reasoning, whole.content)
    }

    fn think() -> ReasoningSplitter {
        ReasoningSplitter::new(ReasoningFormat::THINK)
    }

    #[test]
    fn recorded_answers_are_split_as_by_smg_and_dynamo() {
        let formats = [
            ReasoningFormat::THINK,
            ReasoningFormat::MISTRAL,
            ReasoningFormat::COMMAND_R,
            ReasoningFormat::GEMMA,
        ];
        let answers = recorded("reasoning");
        for format in formats {
            let answers = answers
                .iter()
                .filter(|answer| answer["open"] == format.open);
            assert_ne!(answers.clone().count(), 0, "{}", format.open);
            for answer in answers {
                let text = answer["answer"].as_str().unwrap();
                let (reasoning, content) = split(ReasoningSplitter::new(format), [text]);
                assert_eq!(answer["reasoning"], reasoning.trim(), "{text}");
                assert_eq!(answer["content"], content.trim(), "{text}");
            }
        }
    }

    #[test]
    fn reasoning_is_split_from_content() {
        let cases = [
            (
                "<think>\nWhy?\n\nSo.\n</think>\n\nYes.\n",
                "Why?\n\nSo.",
                "Yes.\n",
            ),
            ("\n<think>a</think>b", "a", "b"),
            ("<think>\n\n</think>\n\nYes", "", "Yes"),
            (" no <think>a</think>", "", " no <think>a</think>"),
            (
                "<think>a</think>b<think>c</think>",
                "a",
                "b<think>c</think>",
            ),
            ("<think>a </thin k> < b", "a </thin k> < b", ""),
            ("<think>cut\n</thi", "cut\n</thi", ""),
            ("<thi", "", "<thi"),
            ("\n ", "", "\n "),
            ("<think>é</think>ü", "é", "ü"),
        ];
        for (answer, reasoning, content) in cases {
            let expected = (reasoning.to_owned(), content.to_owned());
            assert_eq!(split(think(), [answer]), expected, "{answer:?}");
            assert_eq!(split(think(), answer.split("")), expected, "{answer:?}");
        }
    }

    #[test]
    fn a_prompt_that_ends_with_the_mark_begins_the_reasoning() {
        let after = |prompt| match ReasoningFormat::THINK.is_open(prompt) {
            true => ReasoningSplitter::inside(ReasoningFormat::THINK),
            false => think(),
        };
        let open = "<|im_start|>assistant\n<think>\n";
        let expected = ("a".to_owned(), "b".to_owned());
        assert_eq!(split(after(open), ["a\n</think>\n\nb"]), expected);
        let closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n";
        let expected = (String::new(), "a".to_owned());
        assert_eq!(split(after(closed), ["a"]), expected);
    }

    #[test]
    fn nothing_is_held_back_that_cannot_become_a_mark() {
        let mut splitter = think();
        assert_eq!(splitter.push("<thi"), ReasoningSplit::default());
        assert_eq!(splitter.push("nk>a <").reasoning, "a ");
        assert_eq!(splitter.push("b").reasoning, "<b");
        assert_eq!(splitter.push("</think>c<").content, "c<");
    }

    #[test]
    fn a_template_tells_whether_its_model_reasons() {
        let detect = ReasoningFormat::detect;
        assert_eq!(
            detect("{{ content.split('</think>') }}"),
            Some(ReasoningFormat::THINK)
        );
        assert_eq!(
            detect("'[THINK]' + t + '[/THINK]'"),
            Some(ReasoningFormat::MISTRAL)
        );
        assert_eq!(
            detect("'<|channel|>analysis<|message|>' + m.thinking"),
            Some(ReasoningFormat::HARMONY)
        );
        assert_eq!(
            detect("'<|channel>thought\\n<channel|>'"),
            Some(ReasoningFormat::GEMMA)
        );
        assert_eq!(detect("{{ messages }}"), None);
    }

    proptest! {
        #[test]
        fn pieces_change_nothing_and_no_text_is_lost(
            words in proptest::collection::vec(
                prop_oneof![
                    Just("<think>"), Just("</think>"), Just("</"), Just("<th"), Just("\n"),
                    Just(" "), Just("a"), Just("é"),
                ],
                0..12,
            ),
            cuts in proptest::collection::vec(any::<bool>(), 100),
            inside: bool,
        ) {
            let start = || match inside {
                true => ReasoningSplitter::inside(ReasoningFormat::THINK),
                false => think(),
            };
            let answer = words.concat();
            let pieces = pieces(&answer, &cuts);
            let (reasoning, content) = split(start(), [answer.as_str()]);
            let cut = split(start(), pieces.iter().map(String::as_str));
            prop_assert_eq!(&cut, &(reasoning.clone(), content.clone()));

            // Apart from white space next to marks, no text is lost.
            let visible = |text: &str| text.replace(['\n', ' '], "");
            let (mut open, mut rest) = ("", visible(&answer));
            if !inside && let Some(after) = rest.strip_prefix("<think>") {
                (open, rest) = ("<think>", after.to_owned());
            }
            if inside || !open.is_empty() {
                let (before, after) = rest.split_once("</think>").unwrap_or((&rest, ""));
                prop_assert_eq!(visible(&reasoning), before);
                prop_assert_eq!(visible(&content), after);
            } else {
                prop_assert_eq!(reasoning, "");
                prop_assert_eq!(content, answer);
            }
        }
    }
}
