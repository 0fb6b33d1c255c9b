//! Filters that format text: for HTML, for URLs, and in lines of limited width.

use super::arguments::Arguments;
use super::operators::percent;
use super::python::{bounded, failed, float, integer, is_space, items, pairs, text};
use minijinja::Error;
use minijinja::value::{Value, ValueKind};

/// Maximum width that a text can be padded to, and maximum count, in characters or lines.
const MAX_WIDTH: usize = 1 << 16;

/// Returns a count of lines or columns, which must be from 1 to [`MAX_WIDTH`].
pub(super) fn positive(value: &Value) -> Result<usize, Error> {
    integer(value)
        .and_then(|count| usize::try_from(count).ok())
        .filter(|count| (1..=MAX_WIDTH).contains(count))
        .ok_or_else(|| failed(format!("a count is {value:?}, expected 1 to {MAX_WIDTH}")))
}

pub(super) fn format(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let mut values = arguments.rest();
    if values.is_empty() {
        values.extend(arguments.all_named());
    }
    percent(&text(value)?, &values).map(Value::from)
}

pub(super) fn replace(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let old = text(&arguments.required("old")?)?;
    let new = text(&arguments.required("new")?)?;
    let count = arguments.integer("count")?;
    super::methods::replaced(&text(value)?, &old, &new, count).map(Value::from)
}

pub(super) fn trim(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let chars = arguments.string("chars")?;
    let text = text(value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).into(),
        None => text.trim_matches(is_space).into(),
    })
}

/// Capitalizes every word. Words begin after white space, hyphens and opening brackets.
pub(super) fn title(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let mut out = String::new();
    let mut begins = true;
    for c in text(value)?.chars() {
        match begins {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        begins = is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    }
    Ok(out.into())
}

pub(super) fn truncate(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let length = arguments.integer("length")?.unwrap_or(255);
    let kill_words = arguments.flag("killwords")?;
    let end = arguments.string("end")?.unwrap_or_else(|| "...".to_owned());
    let leeway = arguments.integer("leeway")?.unwrap_or(5);
    let text = text(value)?;
    let size = |text: &str| i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
    if length < size(&end) || leeway < 0 {
        return Err(failed(
            "truncate needs a length that fits `end`, and a leeway of at least 0",
        ));
    }
    if size(&text) <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let kept = usize::try_from(length - size(&end)).unwrap_or(0);
    let cut: String = text.chars().take(kept).collect();
    let cut = match cut.rsplit_once(' ') {
        Some((whole, _)) if !kill_words => whole,
        _ => &cut,
    };
    Ok(format!("{cut}{end}").into())
}

pub(super) fn center(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let width = arguments.integer("width")?.unwrap_or(80);
    let width = usize::try_from(width).unwrap_or(0).min(MAX_WIDTH);
    Ok(super::methods::centered(&text(value)?, width, ' ').into())
}

pub(super) fn indent(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let width = arguments.next("width")?.unwrap_or_else(|| Value::from(4));
    let first = arguments.flag("first")?;
    let blank = arguments.flag("blank")?;
    let by = match width.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let width = integer(&width).ok_or_else(|| failed("a width must be an integer"))?;
            " ".repeat(usize::try_from(width).unwrap_or(0).min(MAX_WIDTH))
        }
    };
    // A line break at the end begins another line.
    let text = text(value)? + "\n";
    let mut out = String::new();
    for (index, line) in super::methods::lines(&text, false).iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if (index == 0 && first) || (index > 0 && (blank || !line.is_empty())) {
            out.push_str(&by);
        }
        out.push_str(line);
        bounded(out.len())?;
    }
    Ok(out.into())
}

pub(super) fn word_wrap(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let width = positive(&arguments.next("width")?.unwrap_or_else(|| Value::from(79)))?;
    let break_long = arguments
        .next("break_long_words")?
        .is_none_or(|flag| flag.is_true());
    let between = arguments
        .string("wrapstring")?
        .unwrap_or_else(|| "\n".to_owned());
    let mut wrapped: Vec<String> = Vec::new();
    for line in super::methods::lines(&text(value)?, false) {
        let mut current = String::new();
        for word in line.split(' ').filter(|word| !word.is_empty()) {
            let mut word: Vec<char> = word.chars().collect();
            let used = current.chars().count();
            if used > 0 && used + 1 + word.len() > width {
                wrapped.push(std::mem::take(&mut current));
            } else if used > 0 {
                current.push(' ');
            }
            while break_long && word.len() > width {
                wrapped.push(word.drain(..width).collect());
            }
            current.extend(word);
        }
        wrapped.push(current);
    }
    Ok(wrapped.join(&between).into())
}

pub(super) fn word_count(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let text = text(value)?;
    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

pub(super) fn file_size(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let binary = arguments.flag("binary")?;
    let bytes = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => float(value),
    };
    let bytes = bytes.ok_or_else(|| failed("a size must be a number"))?;
    let (base, units) = match binary {
        true => (
            1024.0,
            ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"],
        ),
        false => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
    };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc()).into());
    }
    let mut size = bytes;
    let mut unit = units[0];
    for next in units {
        size /= base;
        unit = next;
        if size < base {
            break;
        }
    }
    Ok(format!("{size:.1} {unit}").into())
}

/// Escapes text for HTML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

pub(super) fn escaped(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    match value.is_safe() {
        true => Ok(value.clone()),
        false => Ok(Value::from_safe_string(escape(&text(value)?))),
    }
}

/// Removes tags and comments, and leaves one space between words.
pub(super) fn strip_tags(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let text = text(value)?;
    let mut rest = text.as_str();
    let mut out = String::new();
    while let Some(open) = rest.find('<') {
        out.push_str(&rest[..open]);
        let tag = &rest[open..];
        let end = match tag.starts_with("<!--") {
            true => tag.find("-->").map(|at| at + 3),
            false => tag.find('>').map(|at| at + 1),
        };
        let Some(end) = end else {
            rest = tag;
            break;
        };
        rest = &tag[end..];
    }
    out.push_str(rest);
    let words: Vec<&str> = out
        .split(is_space)
        .filter(|word| !word.is_empty())
        .collect();
    Ok(words.join(" ").into())
}

pub(super) fn url_encode(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let quote = |value: &Value, keep: &[u8], space: &str| -> Result<String, Error> {
        let mut out = String::new();
        for &byte in text(value)?.as_bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                    out.push(char::from(byte));
                }
                _ if keep.contains(&byte) => out.push(char::from(byte)),
                b' ' => out.push_str(space),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        Ok(out)
    };
    let pair = |key: &Value, value: &Value| -> Result<String, Error> {
        Ok(format!(
            "{}={}",
            quote(key, b"", "+")?,
            quote(value, b"", "+")?
        ))
    };
    let pairs: Vec<String> = match value.kind() {
        ValueKind::Map => (pairs(value)?.iter())
            .map(|(key, value)| pair(key, value))
            .collect::<Result<_, _>>()?,
        ValueKind::Seq | ValueKind::Iterable => (items(value)?.iter())
            .map(|item| pair(&item.get_item_by_index(0)?, &item.get_item_by_index(1)?))
            .collect::<Result<_, _>>()?,
        _ => return quote(value, b"/", "%20").map(Value::from),
    };
    Ok(pairs.join("&").into())
}

pub(super) fn xml_attributes(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let space = arguments
        .next("autospace")?
        .is_none_or(|flag| flag.is_true());
    let mut attributes = Vec::new();
    for (key, value) in pairs(value)? {
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let key = text(&key)?;
        if key.contains(|c: char| is_space(c) || matches!(c, '/' | '>' | '=')) {
            return Err(failed(format!(
                "Invalid character in attribute name: {key:?}"
            )));
        }
        attributes.push(format!("{}=\"{}\"", escape(&key), escape(&text(&value)?)));
    }
    let joined = attributes.join(" ");
    Ok(match space && !joined.is_empty() {
        true => format!(" {joined}").into(),
        false => joined.into(),
    })
}
