//! Finds stop strings in text that comes in pieces, and holds back no more than it must.

/// Watches an answer for stop strings, across the borders of its pieces.
///
/// The stop string that is complete first wins; of two that are complete at the
/// same character the longer one, then the one given first. Each byte of text
/// costs a constant time a stop string (Knuth, Morris and Pratt, 1977).
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// The text that a stop string could still begin with.
    held: String,
    matched: Option<usize>,
    /// Whether the stop string that is found is part of the text.
    include_stop: bool,
}

/// What a piece of text brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that is certainly before any stop string; may be shown.
    pub text: String,
    /// The stop string that was found, by its place in the list.
    pub matched: Option<usize>,
}

/// One stop string and how much of it the text so far ends with.
#[derive(Clone, Debug)]
struct Pattern {
    index: usize,
    bytes: Vec<u8>,
    /// For each prefix, the length of its longest proper prefix that it ends with.
    borders: Vec<usize>,
    progress: usize,
}

impl Pattern {
    fn new(index: usize, text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for end in 1..bytes.len() {
            while border > 0 && bytes[border] != bytes[end] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[border] == bytes[end]);
            borders[end] = border;
        }
        Self {
            index,
            bytes,
            borders,
            progress: 0,
        }
    }

    /// Takes one byte of text; true when the stop string is complete.
    fn step(&mut self, byte: u8) -> bool {
        while self.progress > 0 && self.bytes[self.progress] != byte {
            self.progress = self.borders[self.progress - 1];
        }
        self.progress += usize::from(self.bytes[self.progress] == byte);
        self.progress == self.bytes.len()
    }
}

impl StopMatcher {
    /// Watches for `stops`. Empty ones are never found.
    pub fn new(stops: Vec<String>) -> Self {
        let mut patterns: Vec<Pattern> = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Pattern::new(index, stop))
            .collect();
        // The first that is complete wins, so longer ones are asked first.
        patterns.sort_by_key(|pattern| (usize::MAX - pattern.bytes.len(), pattern.index));
        Self {
            patterns,
            held: String::new(),
            matched: None,
            include_stop: false,
        }
    }

    /// Whether the stop string that is found is part of the text; it is not by default.
    pub fn include_stop(mut self, include: bool) -> Self {
        self.include_stop = include;
        self
    }

    /// Takes the next piece of text. After a stop string was found nothing more
    /// comes, and the same `matched` each time.
    pub fn push(&mut self, text: &str) -> StopStep {
        self.take(text, true)
    }

    /// As [`StopMatcher::push`], but stop strings that are complete within this piece do
    /// not count.
    pub fn push_through(&mut self, text: &str) -> StopStep {
        self.take(text, false)
    }

    fn take(&mut self, text: &str, counts: bool) -> StopStep {
        if self.matched.is_some() {
            return StopStep {
                text: String::new(),
                matched: self.matched,
            };
        }
        let seen = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if let (Some((index, length)), true) = (self.step(byte), counts) {
                self.matched = Some(index);
                let mut text = std::mem::take(&mut self.held);
                let kept = if self.include_stop { length } else { 0 };
                text.truncate(seen + offset + 1 + kept - length);
                return StopStep {
                    text,
                    matched: self.matched,
                };
            }
        }
        // A stop string begins with a whole character, so this is a border of one.
        let progress = self
            .patterns
            .iter()
            .map(|pattern| pattern.progress)
            .max()
            .unwrap_or(0);
        let held = self.held.split_off(self.held.len() - progress);
        StopStep {
            text: std::mem::replace(&mut self.held, held),
            matched: None,
        }
    }

    /// The end of the answer: the text that was held back after all.
    pub fn finish(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.progress = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// Whether text is held back.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Advances every pattern; the place and length of the one to win.
    fn step(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut winner = None;
        for pattern in &mut self.patterns {
            if pattern.step(byte) && winner.is_none() {
                winner = Some((pattern.index, pattern.bytes.len()));
            }
            if pattern.progress == pattern.bytes.len() {
                pattern.progress = 0;
            }
        }
        winner
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|stop| stop.to_string()).collect())
    }

    /// The text before the stop string that is complete first, and which it is.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let found = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| {
                    !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes())
                })
                .max_by_key(|(index, stop)| (stop.len(), usize::MAX - index));
            if let Some((index, stop)) = found {
                return (text[..end - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn the_result_is_the_naive_searchs_whatever_the_chunks(
            stops in proptest::collection::vec("[ab€é]{0,5}", 0..4),
            chunks in proptest::collection::vec("[abcé€]{0,6}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            let (mut text, mut matched) = (String::new(), None);
            for chunk in &chunks {
                let step = matcher.push(chunk);
                text.push_str(&step.text);
                matched = step.matched;
                prop_assert!(matched.is_none() || !matcher.is_holding());
            }
            text.push_str(&matcher.finish());
            prop_assert_eq!((text, matched), naive(&stops, &chunks.concat()));
        }

        #[test]
        fn no_more_is_held_back_than_a_stop_string_could_begin_with(
            stops in proptest::collection::vec("[ab€]{1,5}", 0..4),
            chunks in proptest::collection::vec("[abc€]{0,6}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            let (mut pushed, mut shown) = (String::new(), String::new());
            for chunk in &chunks {
                pushed.push_str(chunk);
                let step = matcher.push(chunk);
                shown.push_str(&step.text);
                if step.matched.is_some() {
                    break;
                }
                let held = &pushed[shown.len()..];
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
            }
        }
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_cut_off() {
        let mut matcher = matcher(&["\nUser:", "###"]);
        assert_eq!(
            matcher.push("Hello"),
            StopStep {
                text: "Hello".into(),
                matched: None
            }
        );
        assert_eq!(
            matcher.push(" you\nUs"),
            StopStep {
                text: " you".into(),
                matched: None
            }
        );
        assert_eq!(
            matcher.push("er: hi"),
            StopStep {
                text: String::new(),
                matched: Some(0)
            }
        );
        assert_eq!(
            matcher.push("more"),
            StopStep {
                text: String::new(),
                matched: Some(0)
            }
        );
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn a_stop_string_is_kept_if_it_is_to_be() {
        let mut matcher = matcher(&["END"]).include_stop(true);
        assert_eq!(matcher.push("aE").text, "a");
        let found = StopStep {
            text: "END".into(),
            matched: Some(0),
        };
        assert_eq!(matcher.push("ND more"), found);
        assert_eq!(matcher.push("x").text, "");
    }

    #[test]
    fn stop_strings_that_do_not_count_are_text_and_later_ones_count() {
        let mut matcher = matcher(&["aa"]);
        assert_eq!(matcher.push_through("xaay").matched, None);
        assert_eq!(matcher.push_through("a").text, "");
        // It began where it did not count, and is complete where it does.
        let step = matcher.push("ab");
        assert_eq!((step.text.as_str(), step.matched), ("", Some(0)));
    }

    #[test]
    fn text_that_only_began_like_a_stop_string_is_given_back() {
        let mut matcher = matcher(&["abcd"]);
        assert_eq!(matcher.push("xab").text, "x");
        assert_eq!(matcher.push("cx").text, "abcx");
        assert_eq!(matcher.push("abc").text, "");
        assert_eq!(matcher.finish(), "abc");
    }
}
