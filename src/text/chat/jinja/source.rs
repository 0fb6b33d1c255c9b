//! Translates a template's source into what minijinja understands.
//!
//! Operators with a different meaning in Python become function calls, and so do tuples.
//! The `generation` blocks, with which transformers marks the assistant's words for
//! training, become blocks that are always taken. Everything else stays as it is, including
//! line breaks, so that errors name the right line. A call begins with a space, which
//! separates it from a word before it.

use super::operators::{ADD, CONCATENATE, FLOOR_DIVIDE, REMAINDER, TUPLE};

/// Maximum nesting depth of brackets. minijinja rejects anything deeper.
const MAX_DEPTH: usize = 150;

/// Maximum number of tokens in a statement or an expression. minijinja recurses once for
/// each. Real templates have up to fifty.
const MAX_TOKENS: usize = 1000;
/// Maximum number of `elif` branches in a template. minijinja recurses once for each. Real
/// templates have up to twenty.
const MAX_BRANCHES: usize = 500;

/// Error for a statement that is too large for minijinja to process safely.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct TooLarge {
    /// Line of the statement, counted from 1.
    pub(in super::super) line: usize,
}

/// Translates a template for minijinja. Invalid parts are left for minijinja to reject.
pub(in super::super) fn translate(source: &str) -> Result<String, TooLarge> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut branches = 0;
    while let Some(at) = next_tag(rest) {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let written = out.len();
        let length =
            translate_tag(tag, &mut out, &mut branches).map_err(|TooLarge { .. }| {
                let before = &source[..source.len() - tag.len()];
                let line = before.matches('\n').count() + 1;
                TooLarge { line }
            })?;
        let Some(length) = length else {
            out.truncate(written);
            rest = tag;
            break;
        };
        rest = &tag[length..];
    }
    out.push_str(rest);
    Ok(out)
}

/// Returns the offset of the next comment, statement or expression.
fn next_tag(text: &str) -> Option<usize> {
    let opens = |pair: &[u8]| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#');
    text.as_bytes().windows(2).position(opens)
}

/// Translates the tag that `text` begins with and returns its length. Returns `None` if the
/// tag does not end. `branches` counts the `elif` branches of the template.
fn translate_tag(
    text: &str,
    out: &mut String,
    branches: &mut usize,
) -> Result<Option<usize>, TooLarge> {
    if text.starts_with("{#") {
        let end = text.find("#}").map(|at| at + 2);
        out.push_str(&text[..end.unwrap_or(0)]);
        return Ok(end);
    }
    let block = text.starts_with("{%");
    let sign = usize::from(text[2..].starts_with(['-', '+']));
    let start = 2 + sign;
    let closing = if block { "%}" } else { "}}" };
    let Some((tokens, end)) = tokens(text, start, closing)? else {
        return Ok(None);
    };
    let inside = Expression {
        text,
        tokens: &tokens,
    };
    out.push_str(&text[..start]);
    if !block {
        out.push_str(&inside.translated(start, end));
        out.push_str(&text[end..end + close(text, end)]);
        return Ok(Some(end + close(text, end)));
    }
    let word = tokens.first().map_or("", |token| token.text(text));
    *branches += usize::from(word == "elif");
    if *branches > MAX_BRANCHES {
        return Err(TooLarge { line: 0 });
    }
    match word {
        "generation" => out.push_str(" if true "),
        "endgeneration" => out.push_str(" endif "),
        _ => inside.statement(word, start, end, out),
    }
    let after = end + close(text, end);
    out.push_str(&text[end..after]);
    if word != "raw" {
        return Ok(Some(after));
    }
    // Raw text is copied up to its end without being translated.
    let mut at = after;
    loop {
        let Some(tag) = text[at..].find("{%") else {
            return Ok(None);
        };
        at += tag;
        let name = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if name.starts_with("endraw") {
            out.push_str(&text[after..at]);
            return Ok(Some(at));
        }
        at += 2;
    }
}

/// Returns the length of the mark that closes a tag at `end`.
fn close(text: &str, end: usize) -> usize {
    2 + usize::from(text[end..].starts_with(['-', '+']))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Name,
    /// A number or a string.
    Literal,
    Operator,
}

#[derive(Clone, Copy)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

impl Token {
    fn text<'a>(&self, source: &'a str) -> &'a str {
        &source[self.start..self.end]
    }
}

/// Splits a tag into tokens, beginning at `start`. Returns the tokens and the offset of the
/// closing mark, or `None` if there is no closing mark.
fn tokens(
    text: &str,
    start: usize,
    closing: &str,
) -> Result<Option<(Vec<Token>, usize)>, TooLarge> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut depth = 0usize;
    let mut at = start;
    loop {
        let rest = &text[at..];
        let Some(&first) = bytes.get(at) else {
            return Ok(None);
        };
        let signed = rest.strip_prefix(['-', '+']).unwrap_or(rest);
        if depth == 0 && (rest.starts_with(closing) || signed.starts_with(closing)) {
            return Ok(Some((tokens, at)));
        }
        let (kind, length) = match first {
            _ if first.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'\'' | b'"' => (Kind::Literal, string_length(rest).unwrap_or(0)),
            b'0'..=b'9' => (Kind::Literal, number_length(rest)),
            _ if first == b'_' || first.is_ascii_alphabetic() || !first.is_ascii() => {
                let length = rest.find(|c: char| c != '_' && !c.is_alphanumeric());
                (
                    Kind::Name,
                    length.unwrap_or(rest.len()).max(first_length(rest)),
                )
            }
            _ => {
                let two = ["**", "//", "==", "!=", "<=", ">="];
                let pair = two.iter().any(|operator| rest.starts_with(operator));
                (Kind::Operator, 1 + usize::from(pair))
            }
        };
        match first {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' if depth == 0 => return Ok(None),
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        if depth > MAX_DEPTH || length == 0 {
            // Nested too deeply, or an unterminated string.
            return Ok(None);
        }
        if tokens.len() == MAX_TOKENS {
            return Err(TooLarge { line: 0 });
        }
        tokens.push(Token {
            kind,
            start: at,
            end: at + length,
        });
        at += length;
    }
}

fn first_length(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

/// Returns the length of the string literal that `text` begins with.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// Returns the length of the number that `text` begins with.
fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digit_next = bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
        match byte {
            b'_' => {}
            _ if byte.is_ascii_alphanumeric() => {}
            b'.' if digit_next => {}
            b'-' | b'+' if digit_next && matches!(bytes[at - 1], b'e' | b'E') => {}
            _ => break,
        }
        at += 1;
    }
    at
}

/// Part of a tag: some of its tokens.
#[derive(Clone, Copy)]
struct Expression<'a> {
    text: &'a str,
    tokens: &'a [Token],
}

/// Part of an expression between two tokens where it is cut.
struct Piece<'a> {
    inside: Expression<'a>,
    start: usize,
    end: usize,
    /// Operator before the piece.
    before: Option<Token>,
}

impl<'a> Expression<'a> {
    fn part(self, from: usize, to: usize) -> Self {
        Self {
            tokens: &self.tokens[from..to],
            ..self
        }
    }

    fn word(self, index: usize) -> &'a str {
        self.tokens
            .get(index)
            .map_or("", |token| token.text(self.text))
    }

    /// Translates a statement that begins with `word`. `start` and `end` are the byte
    /// offsets of its content.
    fn statement(self, word: &str, start: usize, end: usize, out: &mut String) {
        let names_only = ["include", "import", "from", "extends", "block", "raw"];
        let target_ends = match word {
            _ if names_only.contains(&word) => None,
            "for" => self.position(|inside, at| inside.word(at) == "in"),
            "set" => self.position(|inside, at| inside.word(at) == "="),
            "call" if self.word(1) == "(" => {
                let rest = self.part(2, self.tokens.len());
                rest.position_of_close().map(|at| at + 2)
            }
            _ => Some(0),
        };
        let Some(from) = target_ends.filter(|&at| at < self.tokens.len()) else {
            out.push_str(&self.text[start..end]);
            return;
        };
        let border = self.tokens[from].end;
        out.push_str(&self.text[start..border]);
        let rest = self.part(from + 1, self.tokens.len());
        out.push_str(&rest.translated(border, end));
    }

    /// Returns the index of the first token outside of brackets for which `found` holds.
    fn position(self, found: impl Fn(Self, usize) -> bool) -> Option<usize> {
        let mut depth = 0usize;
        for at in 0..self.tokens.len() {
            match self.word(at) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ if depth == 0 && found(self, at) => return Some(at),
                _ => {}
            }
        }
        None
    }

    /// Cuts the expression at the tokens outside of brackets for which `cuts` holds.
    fn cut(self, start: usize, end: usize, cuts: impl Fn(Self, usize) -> bool) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let (mut first, mut from, mut before) = (0, start, None);
        let mut offset = 0;
        while let Some(found) = self
            .part(offset, self.tokens.len())
            .position(|_, at| cuts(self, offset + at))
        {
            let at = offset + found;
            let token = self.tokens[at];
            pieces.push(Piece {
                inside: self.part(first, at),
                start: from,
                end: token.start,
                before,
            });
            (first, from, before) = (at + 1, token.end, Some(token));
            offset = at + 1;
        }
        pieces.push(Piece {
            inside: self.part(first, self.tokens.len()),
            start: from,
            end,
            before,
        });
        pieces
    }

    /// Translates a list of expressions with keywords, commas and comparisons between them.
    fn translated(self, start: usize, end: usize) -> String {
        let mut out = String::new();
        for piece in self.cut(start, end, Self::separates) {
            if let Some(token) = piece.before {
                out.push_str(token.text(self.text));
            }
            out.push_str(&piece.inside.sum(piece.start, piece.end));
        }
        out
    }

    /// Returns whether a token separates expressions and is not part of one.
    fn separates(self, at: usize) -> bool {
        const OPERATORS: [&str; 9] = [",", "=", ":", "==", "!=", "<", ">", "<=", ">="];
        const WORDS: [&str; 7] = ["and", "or", "not", "if", "else", "in", "recursive"];
        let word = self.word(at);
        match self.tokens[at].kind {
            Kind::Operator => OPERATORS.contains(&word),
            Kind::Literal => false,
            Kind::Name => {
                let before = at.checked_sub(1).map_or("", |before| self.word(before));
                // `is not`, `is in`, and fields or filters with these names.
                let part = matches!(before, "is" | "." | "|")
                    || (before == "not" && at > 1 && self.word(at - 2) == "is");
                !part && WORDS.contains(&word)
            }
        }
    }

    /// Returns whether the token before `at` ends an operand, so that an operator at `at`
    /// is binary.
    fn after_operand(self, at: usize) -> bool {
        at > 0
            && match self.tokens[at - 1].kind {
                Kind::Name | Kind::Literal => true,
                Kind::Operator => matches!(self.word(at - 1), ")" | "]" | "}"),
            }
    }

    fn sum(self, start: usize, end: usize) -> String {
        let cuts = |inside: Self, at: usize| {
            matches!(inside.word(at), "+" | "-") && inside.after_operand(at)
        };
        let mut sum = String::new();
        // Whether a call that adds operands is still open.
        let mut open = false;
        for (index, piece) in self.cut(start, end, cuts).into_iter().enumerate() {
            let operand = piece.inside.joined(piece.start, piece.end);
            let operator = piece.before.map_or("", |token| token.text(self.text));
            if operator == "+" {
                sum = match open {
                    true => format!("{sum},{operand}"),
                    false => format!(" {ADD}({sum},{operand}"),
                };
                open = true;
                continue;
            }
            if open {
                sum.push(')');
                open = false;
            }
            if index > 0 {
                sum.push_str(operator);
            }
            sum.push_str(&operand);
        }
        if open {
            sum.push(')');
        }
        sum
    }

    fn joined(self, start: usize, end: usize) -> String {
        let operands: Vec<String> = self
            .cut(start, end, |inside, at| inside.word(at) == "~")
            .into_iter()
            .map(|piece| piece.inside.product(piece.start, piece.end))
            .collect();
        match operands.as_slice() {
            [operand] => operand.clone(),
            operands => format!(" {CONCATENATE}({})", operands.join(",")),
        }
    }

    fn product(self, start: usize, end: usize) -> String {
        let cuts = |inside: Self, at: usize| {
            matches!(inside.word(at), "*" | "/" | "//" | "%") && inside.after_operand(at)
        };
        let mut product = String::new();
        for piece in self.cut(start, end, cuts) {
            let operand = piece.inside.operand(piece.start, piece.end);
            product = match piece.before.map(|token| token.text(self.text)) {
                None => operand,
                Some("%") => format!(" {REMAINDER}({product},{operand})"),
                Some("//") => format!(" {FLOOR_DIVIDE}({product},{operand})"),
                Some(operator) => format!("{product}{operator}{operand}"),
            };
        }
        product
    }

    /// Translates an operand, which has no operators outside of brackets.
    fn operand(self, start: usize, end: usize) -> String {
        let mut out = String::new();
        let mut written = start;
        let mut at = 0;
        while at < self.tokens.len() {
            let token = self.tokens[at];
            if !matches!(token.text(self.text), "(" | "[" | "{") {
                at += 1;
                continue;
            }
            let Some(length) = self.part(at + 1, self.tokens.len()).position_of_close() else {
                break;
            };
            let last = at + 1 + length;
            let inside = self.part(at + 1, last);
            let content = inside.translated(token.end, self.tokens[last].start);
            let comma = inside
                .position(|inside, at| inside.word(at) == ",")
                .is_some();
            let group = token.text(self.text) == "(" && !self.after_operand(at);
            out.push_str(&self.text[written..token.start]);
            if group && (comma || inside.tokens.is_empty()) {
                out.push_str(&format!(" {TUPLE}([{content}])"));
            } else {
                out.push_str(token.text(self.text));
                out.push_str(&content);
                out.push_str(self.word(last));
            }
            written = self.tokens[last].end;
            at = last + 1;
        }
        out.push_str(&self.text[written..end]);
        out
    }

    /// Returns the index of the bracket that closes the one right before the first token.
    fn position_of_close(self) -> Option<usize> {
        let mut depth = 0usize;
        for at in 0..self.tokens.len() {
            match self.word(at) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" if depth == 0 => return Some(at),
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
        }
        None
    }
}
