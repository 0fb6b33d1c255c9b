//! Filters of jinja2 that minijinja lacks or implements differently.

use super::super::python_json::{Style, dumps};
use super::arguments::Arguments;
use super::operators::add;
use super::python::{
    Tuple, bounded, failed, float, integer, integer_value, items, pairs, repr, text,
};
use super::text_filters::{
    center, escape, escaped, file_size, format, indent, positive, replace, strip_tags, title, trim,
    truncate, url_encode, word_count, word_wrap, xml_attributes,
};
use super::urlize::urlize;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error};
use std::hash::{BuildHasher, RandomState};

/// Maximum indentation of JSON, in characters.
const MAX_INDENT: usize = 64;

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
    // The filters of minijinja accept only values with a length.
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
            let count = usize::try_from(count.max(0)).unwrap_or(MAX_INDENT);
            " ".repeat(count.min(MAX_INDENT))
        };
        style.indent = match integer(&indent) {
            Some(count) => Some(spaces(count)),
            None => Some(text(&indent)?.chars().take(MAX_INDENT).collect()),
        };
        style.separators.0 = ",".to_owned();
    }
    if let Some(pair) = arguments
        .next("separators")?
        .filter(|value| !value.is_none())
    {
        style.separators = match items(&pair)?.as_slice() {
            [item, key] => (text(item)?, text(key)?),
            _ => return Err(failed("separators must be two strings")),
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

/// Looks up an attribute of an item, which is a name, a path with dots, or a number.
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
        // Larger numbers do not fit in an `i128`.
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
        // Rounds to the nearest number, and to the even one of two that are equally near.
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
            .ok_or_else(|| failed("the resulting integer is too large")),
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
