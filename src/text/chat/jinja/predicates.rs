//! Tests of jinja2 (`x is …`) that minijinja lacks or implements differently.

use super::methods::{is_lower, is_upper};
use super::python::text;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error};

pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_test("sequence", |value: &Value| is_iterable(value));
    environment.add_test("iterable", |value: &Value| is_iterable(value));
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("float", |value: &Value| {
        value.kind() == ValueKind::Number && !value.is_integer()
    });
    environment.add_test("callable", |value: &Value| {
        matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
    });
    environment.add_test("lower", |value: &Value| -> Result<bool, Error> {
        Ok(is_lower(&text(value)?))
    });
    environment.add_test("upper", |value: &Value| -> Result<bool, Error> {
        Ok(is_upper(&text(value)?))
    });
}

/// Returns whether a `for` loop can iterate over a value. Except for generators, such a
/// value also has a length and items in Python, and is therefore a sequence.
fn is_iterable(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Undefined
            | ValueKind::String
            | ValueKind::Bytes
            | ValueKind::Seq
            | ValueKind::Iterable
            | ValueKind::Map
    )
}
