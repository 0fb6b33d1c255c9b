//! Writes tools as declarations in TypeScript, as `openai-harmony` does.

use serde_json::{Map, Value};
use std::fmt::Write;

/// Returns the section of a developer message that declares `tools`.
pub(super) fn section<'a>(tools: impl Iterator<Item = &'a Value>) -> String {
    let mut text = "# Tools\n\n## functions\n\nnamespace functions {\n\n".to_owned();
    for tool in tools {
        let field = |name: &str| tool.get(name).unwrap_or(&Value::Null);
        comment("", field("description"), &mut text);
        let name = field("name").as_str().unwrap_or_default();
        let parameters = match field("parameters") {
            Value::Null => "()".to_owned(),
            schema => format!("(_: {})", type_of(schema, "")),
        };
        let _ = writeln!(text, "type {name} = {parameters} => any;\n");
    }
    text.push_str("} // namespace functions");
    text
}

/// Writes each line of a description as a comment.
fn comment(indent: &str, description: &Value, text: &mut String) {
    for line in description.as_str().unwrap_or_default().lines() {
        let _ = writeln!(text, "{indent}// {line}");
    }
}

/// Returns the type that a JSON schema describes.
fn type_of(schema: &Value, indent: &str) -> String {
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        let mut text = String::new();
        for variant in variants {
            let _ = write!(text, "\n{indent} | {}", variant_of(variant, indent));
            push_remarks(variant, description_of(variant), &mut text);
        }
        return text;
    }
    let named = |name: &str| if name == "integer" { "number" } else { name }.to_owned();
    match schema.get("type") {
        Some(Value::Array(types)) if !types.is_empty() => {
            let names = types.iter().filter_map(Value::as_str).map(named);
            names.collect::<Vec<_>>().join(" | ")
        }
        Some(Value::String(name)) => match &**name {
            "object" => object(schema, indent),
            "array" => match schema.get("items") {
                Some(items) => format!("{}[]", type_of(items, indent)),
                None => "Array<any>".to_owned(),
            },
            "string" => {
                let values = schema.get("enum").and_then(Value::as_array);
                let values = values.into_iter().flatten().filter_map(Value::as_str);
                let values: Vec<_> = values.map(|value| format!("\"{value}\"")).collect();
                match values.is_empty() {
                    true => "string".to_owned(),
                    false => values.join(" | "),
                }
            }
            "number" | "integer" => "number".to_owned(),
            "boolean" => "boolean".to_owned(),
            _ => "any".to_owned(),
        },
        _ => "any".to_owned(),
    }
}

/// Returns the type of one of several schemas, or of a property.
fn nullable(schema: &Value, indent: &str) -> String {
    let mut text = type_of(schema, indent);
    if schema.get("nullable") == Some(&Value::Bool(true)) && !text.contains("null") {
        text.push_str(" | null");
    }
    text
}

fn variant_of(schema: &Value, indent: &str) -> String {
    nullable(schema, &format!("{indent}   "))
}

fn description_of(schema: &Value) -> Option<&str> {
    schema.get("description")?.as_str()
}

/// Returns what a comment says of the default, if there is one.
fn default_of(schema: &Value) -> Option<String> {
    let has_enum = schema
        .get("enum")
        .and_then(Value::as_array)
        .is_some_and(|values| !values.is_empty());
    Some(match schema.get("default")? {
        Value::String(text) if has_enum => format!("default: {text}"),
        Value::String(text) => format!("default: \"{text}\""),
        value => format!("default: {value}"),
    })
}

/// Appends a description and the default as a comment at the end of a line.
fn push_remarks(schema: &Value, description: Option<&str>, text: &mut String) {
    let description = description.map(str::to_owned);
    let remarks: Vec<_> = description.into_iter().chain(default_of(schema)).collect();
    if !remarks.is_empty() {
        let _ = write!(text, " // {}", remarks.join(" "));
    }
}

fn object(schema: &Value, indent: &str) -> String {
    let mut text = String::new();
    if let Some(description) = description_of(schema) {
        let _ = writeln!(text, "{indent}// {description}");
    }
    text.push_str("{\n");
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object);
    let required = schema.get("required").and_then(Value::as_array);
    for (key, property) in properties.unwrap_or(&none) {
        let is_required = required.is_some_and(|names| names.iter().any(|name| name == key));
        let optional = if is_required { "" } else { "?" };
        if let Some(title) = property.get("title").and_then(Value::as_str) {
            let _ = writeln!(text, "{indent}// {title}\n{indent}//");
        }
        let variants = property.get("oneOf").and_then(Value::as_array);
        let description = description_of(property);
        if let (None, Some(description)) = (variants, description) {
            let _ = writeln!(text, "{indent}// {description}");
        }
        let examples = property.get("examples").and_then(Value::as_array);
        if let Some(examples) = examples.filter(|examples| !examples.is_empty()) {
            let _ = writeln!(text, "{indent}// Examples:");
            for example in examples.iter().filter_map(Value::as_str) {
                let _ = writeln!(text, "{indent}// - \"{example}\"");
            }
        }
        let Some(variants) = variants else {
            let written = nullable(property, &format!("{indent}    "));
            let _ = write!(text, "{indent}{key}{optional}: {written},");
            push_remarks(property, None, &mut text);
            text.push('\n');
            continue;
        };
        let first = variants.first().and_then(description_of);
        let above = description.filter(|description| first != Some(description));
        if let Some(description) = above {
            let _ = writeln!(text, "{indent}// {description}");
        }
        if let Some(default) = default_of(property) {
            let _ = writeln!(text, "{indent}// {default}");
        }
        let _ = writeln!(text, "{indent}{key}{optional}:");
        for (place, variant) in variants.iter().enumerate() {
            let _ = write!(text, "{indent} | {}", variant_of(variant, indent));
            let remark = description_of(variant)
                .filter(|remark| Some(*remark) != description)
                .filter(|_| place > 0 || above.is_none());
            push_remarks(variant, remark, &mut text);
            text.push('\n');
        }
        let _ = writeln!(text, "{indent},");
    }
    let _ = write!(text, "{indent}}}");
    text
}
