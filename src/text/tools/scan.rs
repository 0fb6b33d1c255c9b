//! Finds the marks around calls in text that comes a character at a time.

use super::Events;

/// Passes text on, and finds the tags in it that begin calls.
///
/// Held back are the beginning of a tag, and white space, which is dropped next to
/// a call.
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

    /// Takes a character; gives the tag that it completes.
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

    /// Passes on a character that begins no tag.
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

    /// Takes the white space before the call that begins here.
    pub(super) fn take_space(&mut self) -> String {
        std::mem::take(&mut self.space)
    }

    /// The answer is over.
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

/// What a character was to [`Marks`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// White space before a mark, or part of one.
    Part,
    /// The end of this mark.
    Mark(&'static str),
    /// Neither.
    Wrong,
}

/// Reads one of several marks, after white space.
#[derive(Debug, Default)]
pub(super) struct Marks {
    held: String,
}

impl Marks {
    /// Takes a character where one of `marks` should stand.
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

    /// Whether part of a mark was read.
    pub(super) fn in_mark(&self) -> bool {
        !self.held.is_empty()
    }
}
