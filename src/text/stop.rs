//! Finds stop strings in text that arrives in pieces, and holds back no more text than
//! necessary.

use std::sync::Arc;

/// Stop strings, prepared for searching.
///
/// Cloning is cheap: all answers that watch for the same strings share one copy, which
/// takes five bytes per byte of the strings.
#[derive(Clone, Debug)]
pub struct StopStrings(Arc<[Pattern]>);

impl StopStrings {
    /// Prepares `stops`. Empty strings never match.
    pub fn new(stops: &[String]) -> Self {
        let mut patterns: Vec<Pattern> = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Pattern::new(index, stop))
            .collect();
        // Of the patterns that complete at the same byte, the first in this order wins.
        patterns.sort_by_key(|pattern| (usize::MAX - pattern.bytes.len(), pattern.index));
        Self(patterns.into())
    }
}

/// Watches an answer for stop strings, across the boundaries of its pieces.
///
/// The stop string that is completed first wins. If several are completed at the same
/// character, the longest wins, then the one given first. The cost is constant per byte of
/// text and stop string (Knuth, Morris and Pratt, 1977).
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: StopStrings,
    /// Number of bytes of each pattern that the text so far ends with.
    progress: Box<[usize]>,
    /// Text that could be the beginning of a stop string.
    held: String,
    matched: Option<usize>,
    /// Whether the returned text includes the stop string that is found.
    include_stop: bool,
}

/// Result of processing a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that may be shown, because no stop string can begin in it. With
    /// [`StopMatcher::include_stop`], it ends with the stop string that was found.
    pub text: String,
    /// Index of the stop string that was found.
    pub matched: Option<usize>,
}

/// One stop string.
#[derive(Debug)]
struct Pattern {
    index: usize,
    bytes: Box<[u8]>,
    /// For each prefix, the length of its longest proper prefix that is also its suffix.
    borders: Box<[u32]>,
}

impl Pattern {
    fn new(index: usize, text: &str) -> Self {
        // Lengths must fit in 32 bits, so only the first 4 GiB of a stop string count.
        let length = text.len().min(u32::MAX as usize);
        let bytes: Box<[u8]> = text.as_bytes()[..length].into();
        let mut borders = vec![0_u32; length].into_boxed_slice();
        let mut border = 0_u32;
        for end in 1..length {
            while border > 0 && bytes[border as usize] != bytes[end] {
                border = borders[border as usize - 1];
            }
            border += u32::from(bytes[border as usize] == bytes[end]);
            borders[end] = border;
        }
        Self {
            index,
            bytes,
            borders,
        }
    }

    /// Processes one byte of text after `progress` bytes have matched. Returns the number
    /// of bytes that match now, which is the whole length when the stop string is complete.
    fn step(&self, mut progress: usize, byte: u8) -> usize {
        while progress > 0 && self.bytes[progress] != byte {
            progress = self.borders[progress - 1] as usize;
        }
        progress + usize::from(self.bytes[progress] == byte)
    }
}

impl StopMatcher {
    /// Creates a matcher for `stops`.
    pub fn new(stops: StopStrings) -> Self {
        Self {
            progress: vec![0; stops.0.len()].into(),
            patterns: stops,
            held: String::new(),
            matched: None,
            include_stop: false,
        }
    }

    /// Sets whether the returned text includes the stop string that is found. Off by default.
    pub fn include_stop(mut self, include: bool) -> Self {
        self.include_stop = include;
        self
    }

    /// Processes the next piece of text. After a stop string was found, returns no more
    /// text and the same `matched` each time.
    pub fn push(&mut self, text: &str) -> StopStep {
        self.take(text, true)
    }

    /// Processes a piece like [`StopMatcher::push`], but ignores stop strings that are
    /// completed within it.
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
        // The last `progress` bytes are the beginning of a stop string, so they start at a
        // character boundary.
        let progress = self.progress.iter().copied().max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - progress);
        StopStep {
            text: std::mem::replace(&mut self.held, held),
            matched: None,
        }
    }

    /// Ends the answer and returns the text that was held back.
    pub fn finish(&mut self) -> String {
        self.progress.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Advances every pattern by one byte. Returns the index and length of the stop string
    /// that wins.
    fn step(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut winner = None;
        for (pattern, progress) in self.patterns.0.iter().zip(&mut self.progress) {
            *progress = pattern.step(*progress, byte);
            if *progress == pattern.bytes.len() {
                winner = winner.or(Some((pattern.index, pattern.bytes.len())));
                *progress = 0;
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
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        StopMatcher::new(StopStrings::new(&stops))
    }

    /// Searches naively. Returns the text before the stop string that is completed first,
    /// and its index.
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
        fn matches_a_naive_search_for_any_chunks(
            stops in proptest::collection::vec("[ab€é]{0,5}", 0..4),
            chunks in proptest::collection::vec("[abcé€]{0,6}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(StopStrings::new(&stops));
            let (mut text, mut matched) = (String::new(), None);
            for chunk in &chunks {
                let step = matcher.push(chunk);
                text.push_str(&step.text);
                matched = step.matched;
                prop_assert!(matched.is_none() || matcher.held.is_empty());
            }
            text.push_str(&matcher.finish());
            prop_assert_eq!((text, matched), naive(&stops, &chunks.concat()));
        }

        #[test]
        fn no_more_is_held_back_than_a_stop_string_could_begin_with(
            stops in proptest::collection::vec("[ab€]{1,5}", 0..4),
            chunks in proptest::collection::vec("[abc€]{0,6}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(StopStrings::new(&stops));
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
    fn the_stop_string_is_included_on_request() {
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
        // The stop string begins in the ignored piece and is completed in this one.
        let step = matcher.push("ab");
        assert_eq!((step.text.as_str(), step.matched), ("", Some(0)));
    }

    #[test]
    fn answers_share_the_prepared_strings_and_nothing_else() {
        let stops = StopStrings::new(&["abcd".to_owned()]);
        let mut first = StopMatcher::new(stops.clone());
        let mut second = StopMatcher::new(stops.clone());
        assert!(Arc::ptr_eq(&first.patterns.0, &second.patterns.0));
        assert_eq!(first.push("abc").text, "");
        assert_eq!(second.push("d").text, "d");
        assert_eq!(first.push("d").matched, Some(0));
        assert_eq!(second.push("abc").matched, None);
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
