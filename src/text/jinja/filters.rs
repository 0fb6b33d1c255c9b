//! The filters of jinja2 that minijinja lacks, or that differ there.

use super::super::python_json::{Style, dumps};
use super::arguments::Arguments;
use super::operators::{add, percent};
use super::python::{
    Tuple, bounded, failed, float, integer, integer_value, is_space, items, pairs, repr, text,
};
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error};
use std::hash::{BuildHasher, RandomState};

/// The widest that a text may be made, and the widest indentation of JSON.
const MAX_WIDTH: usize = 1 << 16;
const MAX_INDENT: i64 = 64;

type Filter = fn(&Value, &mut Arguments) -> Result<Value, Error>;

const FILTERS: [(&str, Filter); 42] = [
    ("capitalize", |value, _| {
        Ok(super::methods::capitalized(&text(value)?).into())
    }),
    ("center", center),
    ("count", length),
    ("dictsort", dictsort),
    ("e", escaped),
    ("escape", escaped),
    ("filesizeformat", file_size),
    ("first", first),
    ("float", to_float),
    ("forceescape", |value, _| {
        Ok(Value::from_safe_string(escape(&text(value)?)))
    }),
    ("format", format),
    ("int", to_integer),
    ("items", to_items),
    ("join", join),
    ("last", last),
    ("length", length),
    ("list", |value, _| Ok(Value::from(items(value)?))),
    ("lower", |value, _| Ok(text(value)?.to_lowercase().into())),
    ("pprint", |value, _| Ok(repr(value)?.into())),
    ("random", random),
    ("replace", replace),
    ("reverse", reverse),
    ("round", round),
    ("string", |value, _| match value.as_str() {
        Some(_) => Ok(value.clone()),
        None => Ok(text(value)?.into()),
    }),
    ("striptags", strip_tags),
    ("sum", sum),
    ("title", title),
    ("tojson", to_json),
    ("trim", trim),
    ("truncate", truncate),
    ("upper", |value, _| Ok(text(value)?.to_uppercase().into())),
    ("urlencode", url_encode),
    ("urlize", urlize),
    ("wordcount", word_count),
    ("xmlattr", xml_attributes),
    // Where minijinja's take what has a length only.
    ("batch", batch),
    ("max", |value, arguments| extreme(value, arguments, true)),
    ("min", |value, arguments| extreme(value, arguments, false)),
    ("abs", absolute),
    ("wordwrap", word_wrap),
    ("slice", slices),
    ("indent", indent),
];

pub(super) fn register(environment: &mut Environment<'_>) {
    for (name, filter) in FILTERS {
        let apply =
            move |value: Value, placed: Rest<Value>, named: Kwargs| -> Result<Value, Error> {
                let mut arguments = Arguments::new(placed.0, named);
                let result = filter(&value, &mut arguments)?;
                arguments.finish()?;
                Ok(result)
            };
        environment.add_filter(name, apply);
    }
}

fn length(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let length = match (value.as_str(), value.kind()) {
        (Some(text), _) => text.chars().count(),
        (None, ValueKind::None | ValueKind::Bool | ValueKind::Number) => {
            let name = super::python::type_name(value);
            return Err(failed(format!("object of type '{name}' has no len()")));
        }
        _ => match value.len() {
            Some(length) => length,
            None => items(value)?.len(),
        },
    };
    Ok(Value::from(length))
}

fn first(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    Ok(match value.as_str() {
        Some(text) => text.chars().next().map(Value::from),
        None => items(value)?.first().cloned(),
    }
    .unwrap_or_default())
}

fn last(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    Ok(match value.as_str() {
        Some(text) => text.chars().next_back().map(Value::from),
        None => items(value)?.last().cloned(),
    }
    .unwrap_or_default())
}

fn to_json(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let mut style = Style {
        ensure_ascii: arguments.flag("ensure_ascii")?,
        ..Style::default()
    };
    if let Some(indent) = arguments.next("indent")?.filter(|value| !value.is_none()) {
        let spaces = |count: i128| {
            let count = i64::try_from(count)
                .unwrap_or(MAX_INDENT)
                .clamp(0, MAX_INDENT);
            " ".repeat(usize::try_from(count).unwrap_or(0))
        };
        style.indent = match integer(&indent) {
            Some(count) => Some(spaces(count)),
            None => Some(text(&indent)?.chars().take(MAX_WIDTH).collect()),
        };
        style.separators.0 = ",".to_owned();
    }
    if let Some(pair) = arguments
        .next("separators")?
        .filter(|value| !value.is_none())
    {
        style.separators = match items(&pair)?.as_slice() {
            [item, key] => (text(item)?, text(key)?),
            _ => return Err(failed("separators are two strings")),
        };
    }
    style.sort_keys = arguments.flag("sort_keys")?;
    dumps(value, &style).map(Value::from)
}

fn join(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let between = arguments.string("d")?.unwrap_or_default();
    let attribute = arguments
        .next("attribute")?
        .filter(|value| !value.is_none());
    let mut joined = String::new();
    for (index, item) in items(value)?.iter().enumerate() {
        if index > 0 {
            joined.push_str(&between);
        }
        let item = match &attribute {
            Some(attribute) => attribute_of(item, attribute)?,
            None => item.clone(),
        };
        joined.push_str(&text(&item)?);
        bounded(joined.len())?;
    }
    Ok(joined.into())
}

/// An item's attribute: a name, a path with dots, or a number.
fn attribute_of(item: &Value, attribute: &Value) -> Result<Value, Error> {
    let Some(path) = attribute.as_str() else {
        return item.get_item(attribute);
    };
    path.split('.')
        .try_fold(item.clone(), |value, part| match part.parse::<usize>() {
            Ok(index) => value.get_item_by_index(index),
            Err(_) => value.get_attr(part),
        })
}

fn to_items(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
        ValueKind::Map => Ok(pairs(value)?
            .into_iter()
            .map(|(key, value)| Tuple::value([key, value]))
            .collect()),
        _ => Err(failed("Can only get item pairs from a mapping.")),
    }
}

fn dictsort(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let exact = arguments.flag("case_sensitive")?;
    let by = arguments.string("by")?.unwrap_or_else(|| "key".to_owned());
    let reverse = arguments.flag("reverse")?;
    let by_value = match by.as_str() {
        "key" => false,
        "value" => true,
        _ => return Err(failed("You can only sort by either \"key\" or \"value\"")),
    };
    let mut pairs = pairs(value)?;
    pairs.sort_by_cached_key(|(key, value)| {
        let sorted = if by_value { value } else { key };
        match sorted.as_str() {
            Some(text) if !exact => Value::from(text.to_lowercase()),
            _ => sorted.clone(),
        }
    });
    if reverse {
        pairs.reverse();
    }
    Ok(pairs
        .into_iter()
        .map(|(key, value)| Tuple::value([key, value]))
        .collect())
}

fn to_integer(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let default = arguments.next("default")?.unwrap_or_else(|| Value::from(0));
    let base = arguments.integer("base")?.unwrap_or(10);
    if let Some(integer) = integer(value) {
        return Ok(integer_value(integer));
    }
    let truncated = |float: f64| {
        // Beyond 2^127 a conversion would not keep the number.
        (float.abs() < 1e38).then(|| integer_value(float.trunc() as i128))
    };
    let read = match value.as_str() {
        Some(text) => {
            let plain = text.trim().replace('_', "").to_lowercase();
            let (sign, digits) = match plain.strip_prefix('-') {
                Some(digits) => (-1, digits),
                None => (1, plain.strip_prefix('+').unwrap_or(&plain)),
            };
            let prefix = match base {
                2 => "0b",
                8 => "0o",
                16 => "0x",
                _ => "",
            };
            let digits = digits.strip_prefix(prefix).unwrap_or(digits);
            let radix = u32::try_from(base)
                .ok()
                .filter(|base| (2..=36).contains(base));
            radix
                .filter(|_| !digits.starts_with(['-', '+']))
                .and_then(|radix| i128::from_str_radix(digits, radix).ok())
                .map(|integer| integer_value(sign * integer))
                .or_else(|| plain.parse().ok().and_then(truncated))
        }
        None => float(value).and_then(truncated),
    };
    Ok(read.unwrap_or(default))
}

fn to_float(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let default = arguments
        .next("default")?
        .unwrap_or_else(|| Value::from(0.0));
    let read = match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok(),
        None => float(value),
    };
    Ok(read.map_or(default, Value::from))
}

fn round(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let precision = arguments
        .integer("precision")?
        .unwrap_or(0)
        .clamp(-300, 300);
    let method = arguments.string("method")?;
    let number = float(value).ok_or_else(|| failed("round needs a number"))?;
    let scale = 10f64.powi(i32::try_from(precision).unwrap_or(0));
    match method.as_deref().unwrap_or("common") {
        "common" if integer(value).is_some() && precision >= 0 => Ok(value.clone()),
        "common" if integer(value).is_some() => {
            let rounded = (number * scale).round_ties_even() * scale.recip();
            Ok(integer_value(rounded as i128))
        }
        // The nearest, and the even one of two that are as near.
        "common" => Ok(Value::from(match usize::try_from(precision) {
            Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
            Err(_) => (number * scale).round_ties_even() / scale,
        })),
        "ceil" => Ok(Value::from((number * scale).ceil() / scale)),
        "floor" => Ok(Value::from((number * scale).floor() / scale)),
        _ => Err(failed("method must be common, ceil or floor")),
    }
}

fn absolute(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    match (integer(value), float(value)) {
        (Some(integer), _) => integer
            .checked_abs()
            .map(integer_value)
            .ok_or_else(|| failed("an integer is too large")),
        (None, Some(float)) => Ok(Value::from(float.abs())),
        (None, None) => Err(failed("abs needs a number")),
    }
}

fn sum(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let attribute = arguments
        .next("attribute")?
        .filter(|value| !value.is_none());
    let start = arguments.next("start")?.unwrap_or_else(|| Value::from(0));
    items(value)?
        .iter()
        .try_fold(start, |sum, item| match &attribute {
            Some(attribute) => add(&sum, &attribute_of(item, attribute)?),
            None => add(&sum, item),
        })
}

fn extreme(value: &Value, arguments: &mut Arguments, largest: bool) -> Result<Value, Error> {
    let exact = arguments.flag("case_sensitive")?;
    let attribute = arguments
        .next("attribute")?
        .filter(|value| !value.is_none());
    let mut best: Option<(Value, Value)> = None;
    for item in items(value)? {
        let key = match &attribute {
            Some(attribute) => attribute_of(&item, attribute)?,
            None => item.clone(),
        };
        let key = match key.as_str() {
            Some(text) if !exact => Value::from(text.to_lowercase()),
            _ => key,
        };
        let better = match &best {
            Some((kept, _)) if largest => key > *kept,
            Some((kept, _)) => key < *kept,
            None => true,
        };
        if better {
            best = Some((key, item));
        }
    }
    Ok(best.map(|(_, item)| item).unwrap_or_default())
}

fn batch(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let count = arguments.required("linecount")?;
    let fill = arguments.next("fill_with")?.filter(|fill| !fill.is_none());
    let count = positive(&count)?;
    let lines = items(value)?;
    Ok(lines
        .chunks(count)
        .map(|line| {
            let mut line = line.to_vec();
            if let Some(fill) = &fill {
                line.resize(count, fill.clone());
            }
            Value::from(line)
        })
        .collect())
}

fn slices(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let count = positive(&arguments.required("slices")?)?;
    let fill = arguments.next("fill_with")?.filter(|fill| !fill.is_none());
    let all = items(value)?;
    let (each, more) = (all.len() / count, all.len() % count);
    let mut rest = all.as_slice();
    let mut slices = Vec::new();
    for index in 0..count {
        let (slice, after) = rest.split_at(each + usize::from(index < more));
        let mut slice = slice.to_vec();
        slice.extend(fill.iter().filter(|_| index >= more).cloned());
        slices.push(Value::from(slice));
        rest = after;
    }
    Ok(Value::from(slices))
}

/// A count of lines or columns.
fn positive(value: &Value) -> Result<usize, Error> {
    integer(value)
        .and_then(|count| usize::try_from(count).ok())
        .filter(|count| (1..=MAX_WIDTH).contains(count))
        .ok_or_else(|| failed(format!("a count is {value:?}, expected 1 to {MAX_WIDTH}")))
}

fn reverse(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.chars().rev().collect::<String>().into());
    }
    let mut items = items(value)?;
    items.reverse();
    Ok(Value::from(items))
}

fn random(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let items = items(value)?;
    let number = RandomState::new().hash_one(0) as usize;
    Ok(match items.len() {
        0 => Value::UNDEFINED,
        length => items[number % length].clone(),
    })
}

fn format(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let mut values = arguments.rest();
    if values.is_empty() {
        values.extend(arguments.all_named());
    }
    percent(&text(value)?, &values).map(Value::from)
}

fn replace(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let old = text(&arguments.required("old")?)?;
    let new = text(&arguments.required("new")?)?;
    let count = arguments.integer("count")?;
    super::methods::replaced(&text(value)?, &old, &new, count).map(Value::from)
}

fn trim(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let chars = arguments.string("chars")?;
    let text = text(value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).into(),
        None => text.trim_matches(is_space).into(),
    })
}

/// Every word with a capital: words begin after white space, hyphens and brackets.
fn title(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
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

fn truncate(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let length = arguments.integer("length")?.unwrap_or(255);
    let kill_words = arguments.flag("killwords")?;
    let end = arguments.string("end")?.unwrap_or_else(|| "...".to_owned());
    let leeway = arguments.integer("leeway")?.unwrap_or(5);
    let text = text(value)?;
    let size = |text: &str| i64::try_from(text.chars().count()).unwrap_or(i64::MAX);
    if length < size(&end) || leeway < 0 {
        return Err(failed("truncate needs a length for its end, and a leeway"));
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

fn center(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let width = arguments.integer("width")?.unwrap_or(80);
    let width = usize::try_from(width).unwrap_or(0).min(MAX_WIDTH);
    Ok(super::methods::centered(&text(value)?, width, ' ').into())
}

fn indent(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let width = arguments.next("width")?.unwrap_or_else(|| Value::from(4));
    let first = arguments.flag("first")?;
    let blank = arguments.flag("blank")?;
    let by = match width.as_str() {
        Some(text) => text.to_owned(),
        None => {
            let width = integer(&width).ok_or_else(|| failed("a width is an integer"))?;
            " ".repeat(usize::try_from(width).unwrap_or(0).min(MAX_WIDTH))
        }
    };
    // A line break at the end begins one more line.
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

fn word_wrap(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
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

fn word_count(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let text = text(value)?;
    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

fn file_size(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
    let binary = arguments.flag("binary")?;
    let bytes = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => float(value),
    };
    let bytes = bytes.ok_or_else(|| failed("a size is a number"))?;
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

/// Text for HTML.
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

fn escaped(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    match value.is_safe() {
        true => Ok(value.clone()),
        false => Ok(Value::from_safe_string(escape(&text(value)?))),
    }
}

/// Text without tags and comments, and with one space between words.
fn strip_tags(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
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

fn url_encode(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
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

/// Web addresses as links: those with a scheme or `www.` and a top-level domain.
fn urlize(value: &Value, _: &mut Arguments) -> Result<Value, Error> {
    let text = text(value)?;
    let mut out = String::new();
    for word in text.split_inclusive(is_space) {
        let bare = word.trim_end_matches(is_space);
        let host = bare
            .trim_start_matches("https://")
            .trim_start_matches("http://");
        let host = host.split(['/', '?', '#', ':']).next().unwrap_or_default();
        let labels: Vec<&str> = host.split('.').collect();
        let known = bare.len() > host.len() || host.starts_with("www.");
        let domain = labels.last().is_some_and(|last| {
            labels.len() > 1 && last.len() > 1 && last.bytes().all(|b| b.is_ascii_alphabetic())
        });
        let named = labels.iter().all(|label| !label.is_empty());
        if !(known && domain && named) {
            out.push_str(&escape(word));
            continue;
        }
        let scheme = if bare.starts_with("www.") {
            "https://"
        } else {
            ""
        };
        let shown = escape(bare);
        out.push_str(&format!(
            "<a href=\"{scheme}{shown}\" rel=\"noopener\">{shown}</a>"
        ));
        out.push_str(&word[bare.len()..]);
    }
    Ok(out.into())
}

fn xml_attributes(value: &Value, arguments: &mut Arguments) -> Result<Value, Error> {
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
