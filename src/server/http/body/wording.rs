//! Rewrites serde's errors about a request in terms of JSON instead of Rust.

/// Returns the error message for the client.
pub(crate) fn plain(problem: &str) -> String {
    let problem = without_position(problem);
    for opening in ["invalid type: ", "invalid value: ", "invalid length "] {
        if let Some(rest) = problem.strip_prefix(opening)
            && let Some((found, expected)) = rest.rsplit_once(", expected ")
        {
            let found = match opening {
                "invalid length " => format!("a length of {found}"),
                _ => in_json(found),
            };
            return format!("it is {found}, expected {}", kind(expected));
        }
    }
    if problem.starts_with("data did not match any variant of untagged enum ") {
        return "it has none of the accepted forms".to_owned();
    }
    if let Some(rest) = problem.strip_prefix("unknown variant ") {
        return format!("it is {}", quoted(rest));
    }
    if let Some(rest) = problem.strip_prefix("duplicate field ") {
        return format!("it has {} twice", quoted(rest));
    }
    if let Some(rest) = problem.strip_prefix("missing field ") {
        return format!("it has no {}", quoted(rest));
    }
    problem.to_owned()
}

/// Removes line and column, which mean little for a body that a program has written.
fn without_position(problem: &str) -> &str {
    match problem.rsplit_once(" at line ") {
        Some((text, place)) if is_position(place) => text,
        _ => problem,
    }
}

fn is_position(place: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let parts = place.split_once(" column ");
    parts.is_some_and(|(line, column)| number(line) && number(column))
}

/// Translates the value that serde has found.
fn in_json(found: &str) -> String {
    let value = |kind: &str| found.strip_prefix(kind);
    if let Some(number) = value("integer ").or_else(|| value("floating point ")) {
        return number.replace('`', "");
    }
    if let Some(truth) = value("boolean ") {
        return truth.replace('`', "");
    }
    if let Some(text) = value("string ") {
        return format!("the string {text}");
    }
    match found {
        "sequence" => "a list".to_owned(),
        "map" | "newtype variant" | "struct variant" => "an object".to_owned(),
        "unit value" | "Option value" => "null".to_owned(),
        found => found.to_owned(),
    }
}

/// Translates what serde has expected.
fn kind(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "an integer, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "an integer".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" | "bool" => "true or false".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "an object".to_owned(),
        "unit" => "null".to_owned(),
        _ if is_type(expected) => "an object".to_owned(),
        expected => expected.to_owned(),
    }
}

/// Returns whether the text names a Rust type.
fn is_type(expected: &str) -> bool {
    let kinds = [
        "struct ",
        "enum ",
        "variant ",
        "internally tagged enum ",
        "adjacently tagged enum ",
        "tuple struct ",
    ];
    kinds.iter().any(|kind| expected.starts_with(kind))
}

/// Writes names in backticks as JSON strings.
fn quoted(names: &str) -> String {
    names.replace('`', "\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    #[derive(Debug, Deserialize)]
    #[allow(dead_code, reason = "read for its errors only")]
    struct Fields {
        count: Option<u32>,
        size: Option<usize>,
        signed: Option<i64>,
        number: Option<f32>,
        flag: Option<bool>,
        text: Option<String>,
        list: Option<Vec<u8>>,
        inner: Option<Box<Fields>>,
        format: Option<Format>,
        either: Option<Either>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case")]
    #[allow(dead_code, reason = "read for its errors only")]
    enum Format {
        Text,
        Schema { schema: Value },
    }

    #[derive(Debug, Deserialize)]
    #[serde(untagged)]
    #[allow(dead_code, reason = "read for its errors only")]
    enum Either {
        One(u32),
        Many(Vec<u32>),
    }

    fn problem<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> String {
        plain(&serde_json::from_str::<T>(body).unwrap_err().to_string())
    }

    #[test]
    fn errors_mention_no_rust_types() {
        for (body, expected) in [
            (
                json!({"count": "x, expected u32"}),
                "it is the string \"x, expected u32\", expected an integer, 0 or more",
            ),
            (
                json!({"count": -1}),
                "it is -1, expected an integer, 0 or more",
            ),
            (
                json!({"size": 1.5}),
                "it is 1.5, expected an integer, 0 or more",
            ),
            (json!({"signed": []}), "it is a list, expected an integer"),
            (json!({"number": {}}), "it is an object, expected a number"),
            (json!({"flag": 1}), "it is 1, expected true or false"),
            (json!({"text": true}), "it is true, expected a string"),
            (
                json!({"list": "x"}),
                "it is the string \"x\", expected a list",
            ),
            (json!({"inner": 5}), "it is 5, expected an object"),
            (json!({"format": 5}), "it is 5, expected an object"),
            (
                json!({"format": {"type": "x"}}),
                "it is \"x\", expected \"text\" or \"schema\"",
            ),
            (
                json!({"format": {"type": "schema"}}),
                "it has no \"schema\"",
            ),
            (json!({"either": "x"}), "it has none of the accepted forms"),
            (json!("x"), "it is the string \"x\", expected an object"),
        ] {
            assert_eq!(problem::<Fields>(&body.to_string()), expected, "{body}");
        }
        let twice = r#"{"count": 1, "count": 2}"#;
        assert_eq!(problem::<Fields>(twice), "it has \"count\" twice");
    }

    #[test]
    fn whatever_is_wrong_no_rust_type_is_named() {
        let values = [
            json!(1),
            json!(-1),
            json!(1.5),
            json!("x"),
            json!(true),
            json!([]),
            json!({}),
            json!([[]]),
        ];
        let names = [
            "count", "size", "signed", "number", "flag", "text", "list", "inner", "format",
            "either",
        ];
        for name in names {
            for value in &values {
                let body = json!({ name: value });
                let Err(error) = serde_json::from_value::<Fields>(body.clone()) else {
                    continue;
                };
                let text = plain(&error.to_string());
                let words = text.split(|c: char| !c.is_alphanumeric());
                for word in words {
                    let rust = [
                        "u8", "u32", "u64", "usize", "i64", "f32", "f64", "struct", "enum",
                        "Fields", "Format", "Either", "sequence", "map", "variant",
                    ];
                    assert!(!rust.contains(&word), "{body}: {text}");
                }
            }
        }
    }
}
