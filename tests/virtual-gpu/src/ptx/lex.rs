//! Splits PTX text into words and punctuation.

use super::ParseError;

/// A token, and its line (counted from 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token<'a> {
    pub kind: Kind,
    pub text: &'a str,
    pub line: u32,
}

/// The kind of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A name, number, directive or opcode with all its dots: `ld.param.u64`, `%tid.x`,
    /// `0f3F800000`.
    Word,
    /// One punctuation character.
    Mark,
    /// Text between quotation marks, without the marks.
    Text,
}

/// Splits `text` into tokens. Comments and white space are dropped.
pub fn tokens(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let mut found = Vec::with_capacity(bytes.len() / 6);
    let (mut at, mut line) = (0, 1u32);
    while at < bytes.len() {
        let byte = bytes[at];
        if byte == b'\n' {
            line += 1;
            at += 1;
        } else if byte.is_ascii_whitespace() || byte == 0 {
            at += 1;
        } else if bytes[at..].starts_with(b"//") {
            at += bytes[at..]
                .iter()
                .position(|&b| b == b'\n')
                .unwrap_or(bytes.len() - at);
        } else if bytes[at..].starts_with(b"/*") {
            let length = text[at..]
                .find("*/")
                .ok_or_else(|| ParseError::new(line, "a comment has no end"))?;
            line += newlines(&bytes[at..at + length]);
            at += length + 2;
        } else if byte == b'"' {
            let length = text[at + 1..]
                .find('"')
                .ok_or_else(|| ParseError::new(line, "a string has no end"))?;
            found.push(Token {
                kind: Kind::Text,
                text: &text[at + 1..at + 1 + length],
                line,
            });
            line += newlines(&bytes[at + 1..at + 1 + length]);
            at += length + 2;
        } else if is_word(byte) {
            let length = word_length(&bytes[at..]);
            found.push(Token {
                kind: Kind::Word,
                text: &text[at..at + length],
                line,
            });
            at += length;
        } else if byte.is_ascii() {
            found.push(Token {
                kind: Kind::Mark,
                text: &text[at..at + 1],
                line,
            });
            at += 1;
        } else {
            return Err(ParseError::new(line, "a character outside ASCII"));
        }
    }
    Ok(found)
}

fn newlines(bytes: &[u8]) -> u32 {
    bytes.iter().filter(|&&b| b == b'\n').count() as u32
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Returns the length of a word. A word continues over `::`, as in `.L1::no_allocate`, but ends
/// at a single colon. A directive, which begins with a dot, ends before the next dot:
/// `.reg.b16` is two words.
fn word_length(bytes: &[u8]) -> usize {
    let mut length = 1;
    while length < bytes.len() {
        if bytes[length..].starts_with(b"::") {
            length += 2;
        } else if is_word(bytes[length]) && !(bytes[length] == b'.' && bytes[0] == b'.') {
            length += 1;
        } else {
            break;
        }
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_split_and_its_lines_are_counted() {
        let found =
            tokens("// note\n@!%p1 ld.global.L1::no_allocate.u32 %r1, [%rd1+-4]; /* a\nb */ $L:")
                .unwrap();
        let texts: Vec<_> = found.iter().map(|t| t.text).collect();
        let expected = [
            "@",
            "!",
            "%p1",
            "ld.global.L1::no_allocate.u32",
            "%r1",
            ",",
            "[",
            "%rd1",
            "+",
            "-",
            "4",
            "]",
            ";",
            "$L",
            ":",
        ];
        assert_eq!(texts, expected);
        assert_eq!((found[0].line, found[13].line), (2, 3));
    }

    #[test]
    fn an_unterminated_comment_is_an_error() {
        assert!(tokens("/* ...").is_err());
        assert!(tokens(".file 1 \"x").is_err());
    }
}
