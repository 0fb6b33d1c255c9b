//! Removes from regular expressions what the compiler cannot follow: look-around, word
//! boundaries, back-references, and syntax that is specific to other languages.

/// A pattern that matches everything that the original pattern matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Relaxed {
    /// Remaining pattern.
    pub pattern: String,
    /// Further patterns that a text must match, from look-aheads at the beginning of the text.
    pub also: Vec<String>,
    /// Whether all of these together match only what the original pattern matches.
    pub exact: bool,
}

/// Empty group that replaces an assertion. It is a group because it may be repeated.
const NOTHING: &str = "(?:)";

/// Removes the assertions and back-references from a pattern. Returns `None` if it has none.
pub(super) fn relaxed(pattern: &str) -> Option<Relaxed> {
    let mut also = Vec::new();
    let mut exact = true;
    let mut kept = String::with_capacity(pattern.len());
    let mut rest = pattern;
    let mut changed = false;
    let alternatives = has_alternatives(pattern);
    while !rest.is_empty() {
        let token = Token::next(rest);
        let (text, after) = rest.split_at(token.length(rest));
        rest = after;
        match token {
            Token::Plain | Token::Class | Token::Escaped => kept.push_str(text),
            Token::Look { ahead, opening } => {
                changed = true;
                let inside = text.get(opening..).unwrap_or_default();
                let inside = inside.strip_suffix(')').unwrap_or(inside);
                // Only at the beginning of the text is it known where the look-ahead starts.
                let first = !alternatives && kept.replace(NOTHING, "") == "^";
                let first = first && relaxed(inside).is_none();
                if ahead && first && !repeated(rest) {
                    also.push(format!("^(?:{inside})"));
                } else {
                    exact = false;
                    kept.push_str(NOTHING);
                }
            }
            Token::Boundary => {
                changed = true;
                exact = false;
                kept.push_str(NOTHING);
            }
            Token::Back => {
                changed = true;
                exact = false;
                kept.push_str("(?s:.*)");
            }
            Token::Any => {
                changed = true;
                kept.push_str("(?s:.)");
            }
            Token::End => {
                changed = true;
                kept.push('$');
            }
        }
    }
    changed.then_some(Relaxed {
        pattern: kept,
        also,
        exact,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// A single character.
    Plain,
    /// A character class in brackets.
    Class,
    /// A character after a backslash.
    Escaped,
    /// `\b` or `\B`.
    Boundary,
    /// `\1` or `\k<name>`.
    Back,
    /// `[^]`, which matches any character in JavaScript.
    Any,
    /// `\Z`, which is the end of the text in Python.
    End,
    /// A look-around group whose content starts after `opening` bytes. `ahead` is true for
    /// a positive look-ahead.
    Look { ahead: bool, opening: usize },
}

impl Token {
    /// Returns the first token of a non-empty pattern.
    fn next(pattern: &str) -> Self {
        for (opening, ahead) in [
            ("(?=", true),
            ("(?!", false),
            ("(?<=", false),
            ("(?<!", false),
        ] {
            if pattern.starts_with(opening) {
                let opening = opening.len();
                return Self::Look { ahead, opening };
            }
        }
        let mut chars = pattern.chars();
        if pattern.starts_with("[^]") {
            return Self::Any;
        }
        match (chars.next(), chars.next()) {
            (Some('['), _) => Self::Class,
            (Some('\\'), Some('b' | 'B')) => Self::Boundary,
            (Some('\\'), Some('1'..='9')) => Self::Back,
            (Some('\\'), Some('k')) if pattern.starts_with("\\k<") => Self::Back,
            (Some('\\'), Some('Z')) => Self::End,
            (Some('\\'), Some(_)) => Self::Escaped,
            _ => Self::Plain,
        }
    }

    /// Returns the length of the token that `pattern` begins with, in bytes.
    fn length(self, pattern: &str) -> usize {
        match self {
            Self::Plain => pattern.chars().next().map_or(0, char::len_utf8),
            Self::Escaped | Self::Boundary | Self::End => {
                let escaped = pattern.chars().nth(1).map_or(0, char::len_utf8);
                1 + escaped
            }
            Self::Back if pattern.starts_with("\\k") => {
                pattern.find('>').map_or(pattern.len(), |end| end + 1)
            }
            Self::Back => {
                let digits = pattern[1..].bytes().take_while(u8::is_ascii_digit);
                1 + digits.count()
            }
            Self::Any => 3,
            Self::Class => class_length(pattern),
            Self::Look { opening, .. } => group_length(pattern, opening),
        }
    }
}

/// Returns the length of the class that a pattern begins with, in bytes.
fn class_length(pattern: &str) -> usize {
    let mut escaped = false;
    // A closing bracket that comes first is part of the class.
    let mut first = true;
    for (place, c) in pattern.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '^' if place == 1 => continue,
            ']' if !first => return place + 1,
            _ => {}
        }
        first = false;
    }
    pattern.len()
}

/// Splits a pattern into characters, escapes and classes. Yields the first character of
/// each, the offset of its end, and the number of groups that are open there.
fn pieces(pattern: &str) -> impl Iterator<Item = (char, usize, isize)> {
    let (mut place, mut depth) = (0, 0);
    std::iter::from_fn(move || {
        let rest = &pattern[place..];
        let first = rest.chars().next()?;
        place += match first {
            '[' => class_length(rest),
            '\\' => Token::Escaped.length(rest),
            _ => Token::Plain.length(rest),
        };
        depth += match first {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        Some((first, place, depth))
    })
}

/// Returns the length of the group that a pattern begins with, in bytes. Its content starts
/// after `opening` bytes.
fn group_length(pattern: &str, opening: usize) -> usize {
    let mut inside = pieces(pattern.get(opening..).unwrap_or_default());
    let end = inside.find(|&(_, _, depth)| depth < 0);
    end.map_or(pattern.len(), |(_, end, _)| opening + end)
}

/// Returns whether a pattern consists of alternatives.
fn has_alternatives(pattern: &str) -> bool {
    pieces(pattern).any(|(first, _, depth)| first == '|' && depth == 0)
}

/// Returns whether a quantifier follows, so that what comes before `rest` is repeated or
/// optional.
fn repeated(rest: &str) -> bool {
    rest.starts_with(['?', '*', '+', '{'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pattern: &str) -> Option<(String, Vec<String>, bool)> {
        let relaxed = relaxed(pattern)?;
        Some((relaxed.pattern, relaxed.also, relaxed.exact))
    }

    #[test]
    fn patterns_without_look_around_are_unchanged() {
        for pattern in [
            "",
            "^[a-z]+$",
            r"a\(?=b",
            "[(?=]",
            r"(?:a|b)\\b",
            "(?i)x",
            r"[\b]",
        ] {
            assert_eq!(of(pattern), None, "{pattern}");
        }
    }

    #[test]
    fn what_looks_ahead_from_the_beginning_is_a_pattern_of_its_own() {
        let also = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect();
        assert_eq!(
            of(r"^(?=.*[A-Z])(?=.*\d).{8,}$"),
            Some((
                "^.{8,}$".to_owned(),
                also(&[r"^(?:.*[A-Z])", r"^(?:.*\d)"]),
                true
            ))
        );
        for (pattern, rest) in [
            ("^(?=a)|b", "^(?:)|b"),
            ("(?=a)b", "(?:)b"),
            ("^(?=a)?b", "^(?:)?b"),
            ("^(?=(?!c)a)b", "^(?:)b"),
            ("^a(?=b)", "^a(?:)"),
        ] {
            assert_eq!(
                of(pattern),
                Some((rest.to_owned(), vec![], false)),
                "{pattern}"
            );
        }
    }

    #[test]
    fn library_patterns_keep_their_supported_parts() {
        for (pattern, rest) in [
            // Decimal numbers in pydantic.
            (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", r"^(?:)[+-]?0*\d*\.?\d*$"),
            // E-mail addresses and durations in zod.
            (
                r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
                r"^(?:)(?:)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
            ),
            (
                r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(T(?=\d)(\d+H)?)?)$",
                r"^P(?:(\d+W)|(?:)(?:)(\d+Y)?(T(?:)(\d+H)?)?)$",
            ),
            (r"(?<![a-z(])x(?<=[)])", "(?:)x(?:)"),
            (r"\bword\B", "(?:)word(?:)"),
            (r"(a|b)\1(?<n>c)\k<n>", r"(a|b)(?s:.*)(?<n>c)(?s:.*)"),
        ] {
            assert_eq!(
                of(pattern),
                Some((rest.to_owned(), vec![], false)),
                "{pattern}"
            );
        }
        for (pattern, same) in [(r"^a\Z", "^a$"), ("^[^]*b$", "^(?s:.)*b$")] {
            assert_eq!(of(pattern), Some((same.to_owned(), vec![], true)));
        }
    }

    #[test]
    fn a_broken_pattern_does_no_harm() {
        for pattern in [
            "(?=", "(?!a", "[", "\\", "[^", "[]", "(?=[)", "(?<=(", "\\k<", "((?=é",
        ] {
            let _ = relaxed(pattern);
        }
    }
}
