//! Response headers that name the parts of a request that were not honoured.

use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;

/// Header with the types of tools that were skipped.
pub(crate) const SKIPPED_TOOLS: HeaderName = HeaderName::from_static("x-quell-skipped-tools");
/// Header with the schema keywords that the answer was not held to.
pub(crate) const UNENFORCED: HeaderName = HeaderName::from_static("x-quell-unenforced");

/// Maximum length of a list in a header, in bytes.
const MAX_LIST_BYTES: usize = 1024;

/// The parts of a request that were not honoured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notices {
    /// Types of tools that this server does not support.
    pub skipped_tools: Vec<String>,
    /// Schema keywords that cannot be enforced.
    pub unenforced: Vec<String>,
}

impl Notices {
    /// Returns the response with the headers that name them.
    pub fn mark(&self, mut response: Response) -> Response {
        for (name, list) in [
            (SKIPPED_TOOLS, &self.skipped_tools),
            (UNENFORCED, &self.unenforced),
        ] {
            if let Some(value) = list_value(list) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

/// Returns the words as a header value, without duplicates and without characters that a header
/// cannot hold.
fn list_value(words: &[String]) -> Option<HeaderValue> {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '$');
    let mut listed: Vec<String> = Vec::new();
    let mut bytes = 0;
    for word in words {
        let word: String = word.chars().filter(plain).take(64).collect();
        if word.is_empty() || listed.contains(&word) {
            continue;
        }
        bytes += word.len() + 2;
        if bytes > MAX_LIST_BYTES {
            break;
        }
        listed.push(word);
    }
    let list = listed.join(", ");
    (!list.is_empty()).then(|| HeaderValue::from_str(&list).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_a_header_whatever_its_words_are() {
        let value = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            list_value(&words).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(value(&[]), None);
        assert_eq!(value(&["\r\n", "é"]), None);
        let list = value(&["custom", "web_search", "custom", "a\r\nb: c"]);
        assert_eq!(list.as_deref(), Some("custom, web_search, abc"));
        let many: Vec<String> = (0..999).map(|index| format!("tool{index}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(value(&many).unwrap().len() <= MAX_LIST_BYTES);
    }
}
