//! Checks how complex a JSON body is before it is parsed.
//!
//! In memory, a text takes as many bytes as in the body, and a list of token ids four bytes per
//! id. Everything else takes a multiple of its bytes: `[1,1,1]` as JSON values is sixteen times
//! as large, and a chat template sees a copy of it. The number of values is therefore limited,
//! and so is the number of bytes that are neither texts nor token ids.

use crate::server::error::ApiError;
use std::ops::Range;

/// Maximum number of values and field names in a body, not counting token ids.
const MAX_VALUES: usize = 128 << 10;

/// Maximum number of bytes of a body that are neither texts nor token ids: tools, arguments of
/// calls, schemas, template variables and the like.
const MAX_STRUCTURE: usize = 4 << 20;

/// Deepest nesting of lists and objects that is accepted. The parser itself refuses deeper
/// values only in fields that it knows.
const MAX_DEPTH: usize = 128;

/// What a top-level field of the body may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    /// A text, a list of texts, token ids, or items with contents: `prompt`, `input`,
    /// `messages`.
    Texts,
    /// Token ids only.
    TokenIds,
    Other,
}

impl Field {
    /// Returns what the top-level field `name` may hold.
    fn named(name: &[u8]) -> Self {
        match name {
            b"prompt" | b"input" | b"messages" => Self::Texts,
            b"tokens" | b"stop_token_ids" | b"allowed_token_ids" => Self::TokenIds,
            _ => Self::Other,
        }
    }
}

/// The state of a scan through a body.
struct Scan<'a> {
    body: &'a [u8],
    at: usize,
    /// The objects (`true`) and lists (`false`) that enclose `at`, outermost first.
    open: Vec<bool>,
    /// Whether a string at this place would be a field name.
    name_next: bool,
    /// The top-level field that contains `at`.
    field: Field,
    /// Whether `at` is in the content of a message or an item.
    in_content: bool,
    /// Whether the next value is a text within such a content.
    in_text: bool,
    /// Whether the next value, if it is a text, is JSON that is parsed later.
    is_json: bool,
    values: usize,
    /// Bytes of texts and token ids, which do not count as structure.
    plain: usize,
}

/// Refuses a body that would take much more memory than it has bytes. A body that is not JSON
/// passes, because the parser reports what is wrong with it.
pub(crate) fn check(body: &[u8]) -> Result<(), ApiError> {
    let mut scan = Scan {
        body,
        at: 0,
        open: Vec::new(),
        name_next: false,
        field: Field::Other,
        in_content: false,
        in_text: false,
        is_json: false,
        values: 0,
        plain: 0,
    };
    while scan.at < body.len() {
        scan.step();
        if scan.open.len() > MAX_DEPTH {
            let problem =
                format!("the body has lists and objects nested more than {MAX_DEPTH} levels deep");
            return Err(ApiError::invalid(problem).code("request_too_complex"));
        }
        if scan.values > MAX_VALUES {
            let problem = format!(
                "the body has more than {MAX_VALUES} values and field names, not counting token ids"
            );
            return Err(ApiError::invalid(problem).code("request_too_complex"));
        }
    }
    let structure = body.len() - scan.plain;
    if structure > MAX_STRUCTURE {
        let problem = format!(
            "the body has {structure} bytes that are neither texts of prompts and messages nor \
             token ids, but may have at most {MAX_STRUCTURE}"
        );
        return Err(ApiError::invalid(problem).code("request_too_complex"));
    }
    Ok(())
}

impl Scan<'_> {
    /// Scans one value, field name or punctuation mark.
    fn step(&mut self) {
        match self.body[self.at] {
            b'"' => self.string(),
            mark @ (b'{' | b'[') => {
                self.values += 1;
                self.open.push(mark == b'{');
                self.name_next = mark == b'{';
                self.at += 1;
            }
            b'}' | b']' => {
                self.open.pop();
                self.name_next = false;
                self.at += 1;
            }
            b',' => {
                self.name_next = self.open.last().copied().unwrap_or(false);
                self.at += 1;
            }
            b':' | b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
            _ => self.scalar(),
        }
    }

    fn string(&mut self) {
        let inside = self.string_at(self.at + 1);
        self.at = inside.end + 1;
        let depth = self.open.len();
        if std::mem::take(&mut self.name_next) {
            self.values += 1;
            let name = &self.body[inside];
            self.is_json = matches!(name, b"arguments" | b"guided_json" | b"json");
            match depth {
                1 => self.field = Field::named(name),
                3 => self.in_content = matches!(name, b"content" | b"output"),
                5 => self.in_text = name == b"text",
                _ => {}
            }
            return;
        }
        self.values += 1;
        if std::mem::take(&mut self.is_json) {
            let commas = self.body[inside.clone()]
                .iter()
                .filter(|&&byte| byte == b',');
            self.values += commas.count();
        }
        let is_text = match (self.field, depth) {
            (Field::Texts, 1 | 2) => true,
            // A text of a message or an item.
            (Field::Texts, 3) => self.in_content && self.open[2],
            // A text of a part of its content.
            (Field::Texts, 5) => self.in_content && self.in_text && self.open[4],
            _ => false,
        };
        if is_text {
            self.plain += inside.len();
        }
    }

    /// Returns the range inside the string that begins at `start`, up to its closing quote.
    fn string_at(&self, start: usize) -> Range<usize> {
        let mut end = start;
        while let Some(&byte) = self.body.get(end) {
            match byte {
                b'"' => break,
                b'\\' => end += 2,
                _ => end += 1,
            }
        }
        start..end.min(self.body.len())
    }

    /// Scans a number or a literal.
    fn scalar(&mut self) {
        let start = self.at;
        let ends = |byte: &u8| matches!(byte, b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t');
        let rest = &self.body[start..];
        let length = rest.iter().position(ends).unwrap_or(rest.len()).max(1);
        self.at += length;
        let in_list = self.open.last() == Some(&false) && matches!(self.open.len(), 2 | 3);
        let is_token = in_list && self.field != Field::Other && rest[0].is_ascii_digit();
        if is_token {
            // Including the comma.
            self.plain += length + usize::from(self.at < self.body.len());
        } else {
            self.values += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn checked(body: &Value) -> Result<(), String> {
        check(body.to_string().as_bytes()).map_err(|error| error.body.message)
    }

    #[test]
    fn texts_and_token_ids_may_be_as_long_as_the_body() {
        let text = "a \"word\"\n".repeat(MAX_STRUCTURE / 4);
        let ids = vec![7; MAX_VALUES + 1];
        let part = json!({"type": "text", "text": text});
        for body in [
            json!({"prompt": text}),
            json!({"prompt": [text, "b"]}),
            json!({"prompt": ids}),
            json!({"input": [ids, [1]]}),
            json!({"input": text}),
            json!({"tokens": ids}),
            json!({"messages": [{"role": "user", "content": text}]}),
            json!({"messages": [{"role": "user", "content": [part]}]}),
            json!({"input": [{"type": "function_call_output", "output": text}]}),
        ] {
            assert_eq!(checked(&body), Ok(()), "{:.80}", body.to_string());
        }
    }

    #[test]
    fn what_is_large_elsewhere_is_refused() {
        let text = "a".repeat(MAX_STRUCTURE + 1);
        let message = |message: Value| json!({"messages": [message]});
        for body in [
            json!({"user": text}),
            json!({"tools": [{"type": "function", "function": {"description": text}}]}),
            json!({"chat_template_kwargs": {"messages": [{"content": text}]}}),
            json!({"metadata": {"content": text}}),
            message(json!({"role": text})),
            message(json!({"role": "user", "name": text, "content": "x"})),
            message(json!({"tool_calls": [{"function": {"arguments": text}}]})),
            message(json!({"content": [{"type": "text", "image": text}]})),
        ] {
            let problem = checked(&body).unwrap_err();
            assert!(problem.contains("neither texts"), "{problem}");
        }
        let many = vec![1; MAX_VALUES + 1];
        for body in [
            json!({"logprobs": many}),
            json!({"guided_json": serde_json::to_string(&many).unwrap()}),
            message(json!({"tool_calls": [{"function": {
                "arguments": json!({"a": many}).to_string(),
            }}]})),
            message(json!({"role": "user", "more": many})),
            json!({"prompt": vec![vec![-1]; MAX_VALUES]}),
            json!({"prompt": vec![[""; 0]; MAX_VALUES]}),
            json!({"input": vec![json!({}); MAX_VALUES]}),
        ] {
            let problem = checked(&body).unwrap_err();
            assert!(problem.contains("values and field names"), "{problem}");
        }
    }

    #[test]
    fn what_is_no_json_is_for_the_parser() {
        for body in ["", "\"", "\"\\", "[", "}", "{]", "nul", "\u{1}", "{\"a\""] {
            assert!(check(body.as_bytes()).is_ok(), "{body:?}");
        }
    }

    #[test]
    fn a_deeply_nested_value_does_not_hide_what_follows_it() {
        let nested = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
        let large = "a".repeat(MAX_STRUCTURE + 1);
        // The body itself is one level.
        let body = format!(r#"{{"x": {}, "user": "{large}"}}"#, nested(MAX_DEPTH - 1));
        let problem = check(body.as_bytes()).unwrap_err().body.message;
        assert!(problem.contains("neither texts"), "{problem}");
        for body in [
            format!(r#"{{"x": {}, "user": "{large}"}}"#, nested(MAX_DEPTH)),
            format!(r#"{{"x": {}}}"#, nested(MAX_DEPTH)),
            "[".repeat(1 << 20),
        ] {
            let problem = check(body.as_bytes()).unwrap_err().body.message;
            assert!(problem.contains("levels deep"), "{problem}");
        }
    }

    proptest::proptest! {
        #[test]
        fn every_body_is_scanned_to_its_end(
            body in "[\\[\\]{}:,\"\\\\ a1.-]{0,64}",
        ) {
            proptest::prop_assert!(check(body.as_bytes()).is_ok());
        }
    }
}
