//! Methods of Python's strings, lists and dicts that templates call.

use super::arguments::Arguments;
use super::operators::braces;
use super::python::{Tuple, bounded, failed, float, integer, is_printable, is_space, items, pairs};
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Maximum width that a text can be padded to, in characters.
const MAX_WIDTH: i64 = 1 << 16;

/// Calls a method on a value that does not define it itself.
pub(super) fn call(
    _: &State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let mut given = Arguments::of(arguments)?;
    let result = match value.kind() {
        ValueKind::String if method == "format" => {
            return braces(value.as_str().unwrap_or_default(), arguments).map(Value::from);
        }
        ValueKind::String => of_string(value.as_str().unwrap_or_default(), method, &mut given),
        ValueKind::Map => of_dict(value, method, &mut given),
        ValueKind::Seq | ValueKind::Iterable => of_list(value, method, &mut given),
        ValueKind::Number if method == "is_integer" => Ok(Value::from(
            float(value).is_some_and(|float| float.fract() == 0.0),
        )),
        _ => Err(unknown()),
    }?;
    given.finish()?;
    Ok(result)
}

fn unknown() -> Error {
    Error::from(ErrorKind::UnknownMethod)
}

fn of_dict(value: &Value, method: &str, given: &mut Arguments) -> Result<Value, Error> {
    match method {
        "get" => {
            let key = given.required("key")?;
            let default = given.next("default")?.unwrap_or_else(|| Value::from(()));
            let found = value.as_object().and_then(|object| object.get_value(&key));
            Ok(found.unwrap_or(default))
        }
        "keys" => Ok(Value::from(items(value)?)),
        "values" => Ok(pairs(value)?.into_iter().map(|(_, value)| value).collect()),
        "items" => Ok(pairs(value)?
            .into_iter()
            .map(|(key, value)| Tuple::value([key, value]))
            .collect()),
        "copy" => Ok(value.clone()),
        _ => Err(unknown()),
    }
}

fn of_list(value: &Value, method: &str, given: &mut Arguments) -> Result<Value, Error> {
    match method {
        "count" => {
            let wanted = given.required("value")?;
            let found = items(value)?.into_iter().filter(|item| *item == wanted);
            Ok(Value::from(found.count()))
        }
        "index" => {
            let wanted = given.required("value")?;
            let found = items(value)?.into_iter().position(|item| item == wanted);
            found
                .map(Value::from)
                .ok_or_else(|| failed(format!("{wanted:?} is not in list")))
        }
        "copy" => Ok(value.clone()),
        _ => Err(unknown()),
    }
}

fn of_string(s: &str, method: &str, given: &mut Arguments) -> Result<Value, Error> {
    let all = |holds: fn(char) -> bool| Value::from(!s.is_empty() && s.chars().all(holds));
    let strip = |given: &mut Arguments, start: bool, end: bool| -> Result<Value, Error> {
        let chars = given.string("chars")?;
        let strips = |c: char| match &chars {
            Some(chars) => chars.contains(c),
            None => is_space(c),
        };
        let mut stripped = s;
        if start {
            stripped = stripped.trim_start_matches(strips);
        }
        if end {
            stripped = stripped.trim_end_matches(strips);
        }
        Ok(Value::from(stripped))
    };
    Ok(match method {
        "upper" => s.to_uppercase().into(),
        "lower" => s.to_lowercase().into(),
        "casefold" => s.replace('ß', "ss").to_lowercase().into(),
        "capitalize" => capitalized(s).into(),
        "title" => titled(s).into(),
        "swapcase" => swapped(s).into(),
        "strip" => strip(given, true, true)?,
        "lstrip" => strip(given, true, false)?,
        "rstrip" => strip(given, false, true)?,
        "split" | "rsplit" => {
            let separator = given.string("sep")?;
            let most = given.integer("maxsplit")?.unwrap_or(-1);
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let parts = match separator.as_deref() {
                Some("") => return Err(failed("empty separator")),
                Some(separator) if method == "split" => {
                    s.splitn(most.saturating_add(1), separator).collect()
                }
                Some(separator) => {
                    let parts = s.rsplitn(most.saturating_add(1), separator);
                    let mut parts: Vec<&str> = parts.collect();
                    parts.reverse();
                    parts
                }
                None if method == "split" => words(s, most),
                None => words_from_end(s, most),
            };
            parts.into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let separator = given.required_string("sep")?;
            if separator.is_empty() {
                return Err(failed("empty separator"));
            }
            let parts = match method {
                "partition" => s.split_once(&separator),
                _ => s.rsplit_once(&separator),
            };
            let parts = match parts {
                Some((before, after)) => [before, &separator, after],
                None if method == "partition" => [s, "", ""],
                None => ["", "", s],
            };
            Tuple::value(parts.map(Value::from))
        }
        "splitlines" => {
            let keep = given.flag("keepends")?;
            lines(s, keep).into_iter().map(Value::from).collect()
        }
        "startswith" | "endswith" => {
            let wanted = given.required("prefix")?;
            let Some(part) = range(s, given)? else {
                return Ok(Value::from(false));
            };
            let wanted = match wanted.as_str() {
                Some(_) => vec![wanted],
                None if wanted.kind() == ValueKind::Seq => items(&wanted)?,
                None => {
                    return Err(failed(format!(
                        "{method} takes a string or a tuple of strings"
                    )));
                }
            };
            let holds = |wanted: &Value| {
                wanted.as_str().is_some_and(|wanted| match method {
                    "startswith" => part.starts_with(wanted),
                    _ => part.ends_with(wanted),
                })
            };
            Value::from(wanted.iter().any(holds))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let wanted = given.required_string("sub")?;
            let part = range(s, given)?;
            let found = part.and_then(|part| {
                let at = match method.starts_with('r') {
                    true => part.rfind(&wanted),
                    false => part.find(&wanted),
                }?;
                let offset = part.as_ptr() as usize - s.as_ptr() as usize;
                Some(s[..offset + at].chars().count())
            });
            match found {
                Some(at) => Value::from(at),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(failed("substring not found")),
            }
        }
        "count" => {
            let wanted = given.required_string("sub")?;
            let part = range(s, given)?;
            Value::from(part.map_or(0, |part| match wanted.is_empty() {
                true => part.chars().count() + 1,
                false => part.matches(&wanted).count(),
            }))
        }
        "replace" => {
            let old = given.required_string("old")?;
            let new = given.required_string("new")?;
            replaced(s, &old, &new, given.integer("count")?)?.into()
        }
        "removeprefix" => {
            let prefix = given.required_string("prefix")?;
            s.strip_prefix(&prefix).unwrap_or(s).into()
        }
        "removesuffix" => {
            let suffix = given.required_string("suffix")?;
            s.strip_suffix(&suffix).unwrap_or(s).into()
        }
        "join" => joined(s, &given.required("iterable")?)?.into(),
        "zfill" => {
            let width = width(given)?;
            let sign = usize::from(s.starts_with(['-', '+']));
            let zeros = "0".repeat(width.saturating_sub(s.chars().count()));
            format!("{}{zeros}{}", &s[..sign], &s[sign..]).into()
        }
        "ljust" | "rjust" | "center" => {
            let width = width(given)?;
            let fill = given.string("fillchar")?.unwrap_or_else(|| " ".to_owned());
            let mut chars = fill.chars();
            let (Some(fill), None) = (chars.next(), chars.next()) else {
                return Err(failed(
                    "The fill character must be exactly one character long",
                ));
            };
            if method == "center" {
                return Ok(centered(s, width, fill).into());
            }
            let missing = width.saturating_sub(s.chars().count());
            let filling = String::from(fill).repeat(missing);
            match method {
                "ljust" => format!("{s}{filling}").into(),
                _ => format!("{filling}{s}").into(),
            }
        }
        "expandtabs" => expand_tabs(s, given)?.into(),
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isnumeric" => all(char::is_numeric),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉".contains(c)),
        "isascii" => Value::from(s.is_ascii()),
        "isprintable" => Value::from(s.chars().all(is_printable)),
        "islower" => Value::from(is_lower(s)),
        "isupper" => Value::from(is_upper(s)),
        "istitle" => Value::from(titled(s) == s && s.chars().any(char::is_alphabetic)),
        "isidentifier" => {
            let starts = s.starts_with(|c: char| c == '_' || c.is_alphabetic());
            Value::from(starts && s.chars().all(|c| c == '_' || c.is_alphanumeric()))
        }
        _ => return Err(unknown()),
    })
}

/// Returns the part of `s` between `start` and `end`, which count characters. Returns
/// `None` if the start is after the end.
fn range<'a>(s: &'a str, given: &mut Arguments) -> Result<Option<&'a str>, Error> {
    let (start, end) = (given.integer("start")?, given.integer("end")?);
    if start.is_none() && end.is_none() {
        return Ok(Some(s));
    }
    let length = i64::try_from(s.chars().count()).unwrap_or(i64::MAX);
    let place = |index: i64| match index {
        ..0 => (length + index).max(0),
        _ => index,
    };
    let (start, end) = (
        place(start.unwrap_or(0)),
        place(end.unwrap_or(length)).min(length),
    );
    if start > end {
        return Ok(None);
    }
    let byte = |index: i64| {
        let index = usize::try_from(index).unwrap_or(0);
        s.char_indices().nth(index).map_or(s.len(), |(at, _)| at)
    };
    Ok(Some(&s[byte(start)..byte(end)]))
}

fn width(given: &mut Arguments) -> Result<usize, Error> {
    let width = given.required("width")?;
    let width = integer(&width).ok_or_else(|| failed("a width must be an integer"))?;
    let width = width.clamp(0, i128::from(MAX_WIDTH));
    Ok(usize::try_from(width).unwrap_or(0))
}

/// Splits a text into words at white space. After `most` splits, the rest is the last word.
fn words(s: &str, most: usize) -> Vec<&str> {
    let mut rest = s.trim_start_matches(is_space);
    let mut words = Vec::new();
    while !rest.is_empty() {
        let end = match words.len() == most {
            true => None,
            false => rest.find(is_space),
        };
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        words.push(word);
        rest = after.trim_start_matches(is_space);
    }
    words
}

fn words_from_end(s: &str, most: usize) -> Vec<&str> {
    let mut rest = s.trim_end_matches(is_space);
    let mut words = Vec::new();
    while !rest.is_empty() {
        let begin = match words.len() == most {
            true => None,
            false => rest.char_indices().rev().find(|(_, c)| is_space(*c)),
        };
        let at = begin.map_or(0, |(at, c)| at + c.len_utf8());
        let (before, word) = rest.split_at(at);
        words.push(word);
        rest = before.trim_end_matches(is_space);
    }
    words.reverse();
    words
}

/// Splits a text into lines at every line boundary that Python recognizes.
pub(super) fn lines(s: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some(at) = rest.find(ends) {
        let end = match rest[at..].starts_with("\r\n") {
            true => at + 2,
            false => at + rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

pub(super) fn replaced(s: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let count = usize::try_from(count.unwrap_or(-1)).unwrap_or(usize::MAX);
    let most = s.len() / old.len().max(1) + 1;
    bounded(
        s.len()
            .saturating_add(most.min(count).saturating_mul(new.len())),
    )?;
    Ok(s.replacen(old, new, count))
}

/// Joins strings with `s` between them. As in Python, all items must be strings.
fn joined(s: &str, iterable: &Value) -> Result<String, Error> {
    let mut joined = String::new();
    for (index, item) in items(iterable)?.iter().enumerate() {
        let item = item.as_str().ok_or_else(|| {
            let name = super::python::type_name(item);
            failed(format!(
                "sequence item {index}: expected str instance, {name} found"
            ))
        })?;
        if index > 0 {
            joined.push_str(s);
        }
        joined.push_str(item);
        bounded(joined.len())?;
    }
    Ok(joined)
}

pub(super) fn capitalized(s: &str) -> String {
    let mut chars = s.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.collect::<String>() + &chars.as_str().to_lowercase()
}

/// Writes letters that follow a letter in lower case, and all other letters in upper case.
fn titled(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut inside = false;
    for c in s.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = c.is_alphabetic();
    }
    out
}

fn swapped(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c.is_uppercase() {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

pub(super) fn is_lower(s: &str) -> bool {
    s.chars().any(char::is_lowercase) && !s.chars().any(char::is_uppercase)
}

pub(super) fn is_upper(s: &str) -> bool {
    s.chars().any(char::is_uppercase) && !s.chars().any(char::is_lowercase)
}

/// Returns whether a character is a decimal digit of any script (Unicode category Nd).
fn is_decimal(c: char) -> bool {
    static DECIMAL: std::sync::LazyLock<Option<fancy_regex::Regex>> =
        std::sync::LazyLock::new(|| fancy_regex::Regex::new(r"\p{Nd}").ok());
    let text = c.encode_utf8(&mut [0; 4]).to_owned();
    c.is_ascii_digit()
        || (!c.is_ascii()
            && (DECIMAL.as_ref()).is_some_and(|decimal| decimal.is_match(&text).unwrap_or(false)))
}

pub(super) fn centered(s: &str, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(s.chars().count());
    let left = missing / 2 + (missing & width & 1);
    let fill = |count: usize| String::from(fill).repeat(count);
    format!("{}{s}{}", fill(left), fill(missing - left))
}

fn expand_tabs(s: &str, given: &mut Arguments) -> Result<String, Error> {
    let size = given.integer("tabsize")?.unwrap_or(8).clamp(0, 64);
    let size = usize::try_from(size).unwrap_or(0);
    let (mut out, mut column) = (String::new(), 0);
    for c in s.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
        bounded(out.len())?;
    }
    Ok(out)
}
