//! Operators that have another meaning in Python than in minijinja.
//!
//! [`translate`](super::source::translate) turns them into calls of these functions.

use super::python::{
    Tuple, bounded, failed, float, integer, integer_value, items, text, type_name,
};
use super::text_filters::escape;
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, FormatStyle, format_filter};

pub(super) const ADD: &str = "__add";
pub(super) const CONCATENATE: &str = "__concatenate";
pub(super) const REMAINDER: &str = "__remainder";
pub(super) const FLOOR_DIVIDE: &str = "__floor_divide";
pub(super) const TUPLE: &str = "__tuple";

pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_function(ADD, |operands: Rest<Value>| add_all(&operands));
    environment.add_function(CONCATENATE, |operands: Rest<Value>| concatenate(&operands));
    environment.add_function(REMAINDER, |a: Value, b: Value| remainder(&a, &b));
    environment.add_function(FLOOR_DIVIDE, |a: Value, b: Value| floor_divide(&a, &b));
    environment.add_function(TUPLE, |items: Vec<Value>| Tuple::value(items));
}

/// Evaluates `a + b + …`.
fn add_all(operands: &[Value]) -> Result<Value, Error> {
    if operands
        .iter()
        .all(|value| value.as_str().is_some() && !value.is_safe())
    {
        let length = operands
            .iter()
            .filter_map(Value::as_str)
            .map(str::len)
            .sum();
        bounded(length)?;
        let texts: Vec<&str> = operands.iter().filter_map(Value::as_str).collect();
        return Ok(Value::from(texts.concat()));
    }
    let Some((first, rest)) = operands.split_first() else {
        return Ok(Value::UNDEFINED);
    };
    rest.iter()
        .try_fold(first.clone(), |sum, next| add(&sum, next))
}

/// Evaluates `a + b`.
pub(super) fn add(a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(left), Some(right)) = (a.as_str(), b.as_str()) {
        return if a.is_safe() || b.is_safe() {
            joined_safely(&[a.clone(), b.clone()])
        } else {
            bounded(left.len() + right.len())?;
            Ok(Value::from([left, right].concat()))
        };
    }
    if let (Some(a), Some(b)) = (integer(a), integer(b)) {
        let sum = a.checked_add(b);
        return sum
            .map(integer_value)
            .ok_or_else(|| failed("the resulting integer is too large"));
    }
    if let (Some(a), Some(b)) = (float(a), float(b)) {
        return Ok(Value::from(a + b));
    }
    let is_list = |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    if is_list(a) && is_list(b) {
        let both = Tuple::is(a) && Tuple::is(b);
        let mut sum = items(a)?;
        sum.extend(items(b)?);
        // `items` enforces the limit on a list's length.
        let sum = items(&Value::from(sum))?;
        return Ok(if both {
            Tuple::value(sum)
        } else {
            Value::from(sum)
        });
    }
    Err(unsupported("+", a, b))
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    if a.is_undefined() || b.is_undefined() {
        return Error::new(
            ErrorKind::UndefinedError,
            format!("an operand of {operator} is undefined"),
        );
    }
    let (left, right) = (type_name(a), type_name(b));
    failed(match operator {
        "+" if a.as_str().is_some() => {
            format!("can only concatenate str (not \"{right}\") to str")
        }
        _ => format!("unsupported operand types for {operator}: '{left}' and '{right}'"),
    })
}

/// Evaluates `a ~ b ~ …`, whose result is plain text even if an operand is markup.
fn concatenate(operands: &[Value]) -> Result<Value, Error> {
    let mut joined = String::new();
    for operand in operands {
        match operand.as_str() {
            Some(text) => joined.push_str(text),
            None => joined.push_str(&text(operand)?),
        }
        bounded(joined.len())?;
    }
    Ok(Value::from(joined))
}

/// Joins markup and plain text, and escapes the plain text.
fn joined_safely(operands: &[Value]) -> Result<Value, Error> {
    let mut joined = String::new();
    for operand in operands {
        let text = text(operand)?;
        match operand.is_safe() {
            true => joined.push_str(&text),
            false => joined.push_str(&escape(&text)),
        }
        bounded(joined.len())?;
    }
    Ok(Value::from_safe_string(joined))
}

/// Evaluates `a % b`: a remainder with the divisor's sign, or printf-style formatting if
/// `a` is text.
fn remainder(a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(form) = a.as_str() {
        let arguments = match Tuple::is(b) {
            true => items(b)?,
            false => vec![b.clone()],
        };
        return percent(form, &arguments).map(Value::from);
    }
    if let (Some(a), Some(b)) = (integer(a), integer(b)) {
        let remainder = a.checked_rem(b).ok_or_else(by_zero)?;
        let other_sign = remainder != 0 && (remainder < 0) != (b < 0);
        return Ok(integer_value(remainder + if other_sign { b } else { 0 }));
    }
    if let (Some(a), Some(b)) = (float(a), float(b)) {
        if b == 0.0 {
            return Err(by_zero());
        }
        let remainder = a % b;
        let other_sign = remainder != 0.0 && (remainder < 0.0) != (b < 0.0);
        return Ok(Value::from(remainder + if other_sign { b } else { 0.0 }));
    }
    Err(unsupported("%", a, b))
}

/// Evaluates `a // b`.
fn floor_divide(a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (integer(a), integer(b)) {
        let quotient = a.checked_div(b).ok_or_else(by_zero)?;
        let down = a % b != 0 && (a < 0) != (b < 0);
        return Ok(integer_value(quotient - i128::from(down)));
    }
    if let (Some(a), Some(b)) = (float(a), float(b)) {
        return match b == 0.0 {
            true => Err(by_zero()),
            false => Ok(Value::from((a / b).floor())),
        };
    }
    Err(unsupported("//", a, b))
}

fn by_zero() -> Error {
    failed("division by zero")
}

/// Formats a text with `%` placeholders.
pub(super) fn percent(form: &str, arguments: &[Value]) -> Result<String, Error> {
    format_filter(FormatStyle::Printf, form, &printed(arguments, true)?)
}

/// Formats a text with `{}` placeholders.
pub(super) fn braces(form: &str, arguments: &[Value]) -> Result<String, Error> {
    format_filter(FormatStyle::StrFormat, form, &printed(arguments, false)?)
}

/// Prepares the arguments of a format: values that Python prints in its own way become text.
fn printed(arguments: &[Value], keep_dicts: bool) -> Result<Vec<Value>, Error> {
    let printed = |value: &Value| match value.kind() {
        ValueKind::Map if value.is_kwargs() || (keep_dicts && arguments.len() == 1) => {
            Ok(value.clone())
        }
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::None => {
            text(value).map(Value::from)
        }
        _ => Ok(value.clone()),
    };
    arguments.iter().map(printed).collect()
}
