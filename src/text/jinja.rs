//! Jinja as transformers sets it up for chat templates, beyond what minijinja brings.

use super::python_json::dumps;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};

/// The widest indentation that `tojson` grants.
const MAX_INDENT: usize = 64;

/// An environment that behaves like transformers' own, without any template.
pub(super) fn python_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(write_as_python);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment
}

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// `tojson` with the arguments of Python's `json.dumps`.
fn tojson(value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = arguments.get(ignored)?;
    }
    arguments.assert_all_used()?;
    let bad = |error: serde_json::Error| {
        Error::new(
            ErrorKind::BadSerialization,
            "cannot write the value as JSON",
        )
        .with_source(error)
    };
    let value = serde_json::to_value(value).map_err(bad)?;
    dumps(&value, indent.map(|indent| indent.min(MAX_INDENT)))
        .map(Value::from)
        .map_err(bad)
}

/// Prints true, false and none as Python does.
fn write_as_python(
    output: &mut minijinja::Output<'_>,
    state: &minijinja::State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return minijinja::escape_formatter(output, state, value),
    };
    output.write_str(text).map_err(Error::from)
}

/// Makes the `generation` blocks, by which transformers marks the assistant's
/// words for training, into blocks that are always taken.
pub(super) fn without_generation_marks(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        result.push_str(before);
        let sign = tag.len() - tag.trim_start_matches(['-', '+']).len();
        let (sign, body) = tag.split_at(sign.min(1));
        let word = body
            .find("%}")
            .map(|end| body[..end].trim_end_matches(['-', '+']).trim());
        rest = tag;
        let replacement = match word {
            Some("generation") => " if true ",
            Some("endgeneration") => " endif ",
            _ => continue,
        };
        let close = body.find(['-', '+', '%']).unwrap_or(body.len());
        result.push_str(sign);
        result.push_str(replacement);
        rest = &body[close..];
    }
    result.push_str(rest);
    result
}
