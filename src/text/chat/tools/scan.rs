//! Finds the marks around tool calls in text that arrives one character at a time.

use super::Events;

/// Passes text on, and finds the tags in it that begin calls.
///
/// It holds back the beginning of a tag, and white space, which is dropped next to a call.
#[derive(Debug)]
pub(super) struct TextScanner {
    tags: &'static [&'static str],
    space: String,
    tag: String,
}

impl TextScanner {
    pub(super) fn new(tags: &'static [&'static str]) -> Self {
        Self {
            tags,
            space: String::new(),
            tag: String::new(),
        }
    }

    /// Processes a character. Returns the tag that it completes, if any.
    pub(super) fn push(&mut self, c: char, events: &mut Events) -> Option<&'static str> {
        self.tag.push(c);
        while !self.tags.iter().any(|tag| tag.starts_with(&self.tag)) {
            let c = self.tag.remove(0);
            self.plain(c, events);
            if self.tag.is_empty() {
                return None;
            }
        }
        let found = self.tags.iter().find(|tag| **tag == self.tag).copied();
        if found.is_some() {
            self.tag.clear();
        }
        found
    }

    /// Passes on a character that is not part of a tag.
    pub(super) fn plain(&mut self, c: char, events: &mut Events) {
        if c.is_whitespace() {
            self.space.push(c);
        } else {
            for space in std::mem::take(&mut self.space).chars() {
                events.text(space);
            }
            events.text(c);
        }
    }

    /// Takes the white space before a call.
    pub(super) fn take_space(&mut self) -> String {
        std::mem::take(&mut self.space)
    }

    /// Ends the answer and passes on what was held back, except white space after a call.
    pub(super) fn finish(&mut self, events: &mut Events) {
        for c in std::mem::take(&mut self.tag).chars() {
            self.plain(c, events);
        }
        for space in self.take_space().chars() {
            if !events.after_call {
                events.text(space);
            }
        }
    }
}

/// Meaning of a character to [`Marks`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// White space before a mark, or part of one.
    Part,
    /// End of this mark.
    Mark(&'static str),
    /// Neither.
    Wrong,
}

/// Reads one of several marks, after optional white space.
#[derive(Debug, Default)]
pub(super) struct Marks {
    held: String,
}

impl Marks {
    /// Processes a character where one of `marks` is expected.
    pub(super) fn push(&mut self, c: char, marks: &[&'static str]) -> Found {
        if self.held.is_empty() && c.is_whitespace() {
            return Found::Part;
        }
        self.held.push(c);
        match marks.iter().find(|mark| mark.starts_with(&self.held)) {
            Some(mark) if **mark == self.held => {
                self.held.clear();
                Found::Mark(mark)
            }
            Some(_) => Found::Part,
            None => Found::Wrong,
        }
    }

    /// Returns whether part of a mark was read.
    pub(super) fn in_mark(&self) -> bool {
        !self.held.is_empty()
    }
}
