//! Answers as models write them: calls with any arguments, in every format, and text between
//! them. The comparison with other parsers, in `tests/oracles`, includes this file.

use proptest::prelude::*;
use quell::internals::text::tools::json_type;
use quell::{ToolDeclaration, ToolFormat};
use serde_json::{Value, json};

/// A call, or text between calls.
#[derive(Clone, Debug)]
pub enum Segment {
    Text(String),
    Call(String, Value),
}

/// Parts of strings that confuse a parser: quotes, brackets and marks of the formats.
pub const MARKS: &[&str] = &[
    "a",
    "é",
    " ",
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "'",
    "\n",
    "\u{1}",
    "```",
    "</tool_call>",
    "<tool_call>",
    "[TOOL_CALLS]",
    "<｜tool▁call▁end｜>",
];

pub fn any_string(parts: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::collection::vec(proptest::sample::select(parts), 0..5)
        .prop_map(|parts| parts.concat())
}

/// Generates values whose strings and keys consist of these parts.
fn any_value(parts: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(json!(-1.5e-7)),
        any_string(parts).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::vec((any_string(parts), inner), 0..3)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Generates a call whose strings consist of these parts, or text with parts of marks.
pub fn any_segment(parts: &'static [&'static str]) -> impl Strategy<Value = Segment> {
    const WORDS: &[&str] = &[
        "So",
        "a < b",
        "<tool",
        "<｜tool▁",
        "[TOOL_",
        "<|",
        "{",
        "[x]",
        "é",
        "f(a=1)",
        "</tool_",
    ];
    let text = proptest::collection::vec(proptest::sample::select(WORDS), 1..4)
        .prop_map(|words| Segment::Text(words.join(" ") + "."));
    let arguments = proptest::collection::vec(("[a-z_]{1,3}", any_value(parts)), 0..3)
        .prop_map(|fields| Value::Object(fields.into_iter().collect()));
    let call = ("[a-z_]{1,8}", arguments).prop_map(|(name, value)| Segment::Call(name, value));
    prop_oneof![text, call]
}

/// Writes a value in Python's syntax.
fn python(value: &Value) -> String {
    let list = |values: Vec<String>| values.join(", ");
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => {
            let escaped = text.replace('\\', "\\\\").replace('\'', "\\'");
            format!("'{}'", escaped.replace('\n', "\\n"))
        }
        Value::Array(values) => format!("[{}]", list(values.iter().map(python).collect())),
        Value::Object(fields) => {
            let field = |(key, value): (&String, _)| {
                format!("{}: {}", python(&key.as_str().into()), python(value))
            };
            format!("{{{}}}", list(fields.iter().map(field).collect()))
        }
    }
}

/// Writes a value in Gemma's syntax.
fn gemma(value: &Value, quoted_keys: bool) -> String {
    let text = |text: &str| format!("<|\"|>{text}<|\"|>");
    match value {
        Value::String(value) => text(value),
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(|value| gemma(value, true)).collect();
            format!("[{}]", values.join(","))
        }
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| {
                let key = if quoted_keys { text(key) } else { key.clone() };
                format!("{key}:{}", gemma(value, true))
            };
            let fields: Vec<_> = fields.iter().map(field).collect();
            format!("{{{}}}", fields.join(","))
        }
        other => other.to_string(),
    }
}

/// Declares a tool whose arguments have the types of these.
pub fn declared(name: &str, arguments: &Value) -> ToolDeclaration {
    let property =
        |(key, value): (&String, &Value)| (key.clone(), json!({"type": json_type(value)}));
    let properties: serde_json::Map<_, _> = arguments
        .as_object()
        .unwrap()
        .iter()
        .map(property)
        .collect();
    ToolDeclaration::new(
        name,
        Some(json!({"type": "object", "properties": properties})),
    )
}

/// Writes a call as a model does.
pub fn written(format: ToolFormat, name: &str, arguments: &Value) -> String {
    let json = match format {
        ToolFormat::Llama => json!({"name": name, "parameters": arguments}),
        ToolFormat::CommandR => {
            json!({"tool_call_id": "0", "tool_name": name, "parameters": arguments})
        }
        _ => json!({"name": name, "arguments": arguments}),
    };
    let each = |argument: &dyn Fn(&str, &str) -> String| -> String {
        let fields = arguments.as_object().unwrap().iter();
        let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
        fields
            .map(|(key, value)| argument(key, &text(value)))
            .collect()
    };
    match format {
        ToolFormat::QwenCoder => {
            let arguments = each(&|key, text| format!("<parameter={key}>\n{text}\n</parameter>\n"));
            format!("<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>")
        }
        ToolFormat::Seed => {
            let arguments = each(&|key, text| format!("<parameter={key}>{text}</parameter>\n"));
            format!(
                "<seed:tool_call>\n<function={name}>\n{arguments}</function>\n</seed:tool_call>"
            )
        }
        ToolFormat::Glm => {
            let arguments = each(&|key, text| {
                format!("<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n")
            });
            format!("<tool_call>{name}\n{arguments}</tool_call>")
        }
        ToolFormat::MiniMax => {
            let arguments =
                each(&|key, text| format!("<parameter name=\"{key}\">{text}</parameter>\n"));
            format!(
                "<minimax:tool_call>\n<invoke name=\"{name}\">{arguments}</invoke>\n</minimax:tool_call>"
            )
        }
        ToolFormat::Kimi => format!(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:3<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>"
        ),
        ToolFormat::Gemma => {
            format!(
                "<|tool_call>call:{name}{}<tool_call|>",
                gemma(arguments, false)
            )
        }
        ToolFormat::CommandR => format!("<|START_ACTION|>[\n    {json}\n]<|END_ACTION|>"),
        ToolFormat::Harmony => format!(
            "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
        ),
        ToolFormat::Nemotron => format!("<TOOLCALL>[{json}]</TOOLCALL>"),
        ToolFormat::Hermes => format!("<tool_call>\n{json}\n</tool_call>"),
        ToolFormat::Llama => format!("<|python_tag|>{json}"),
        ToolFormat::Mistral => format!("[TOOL_CALLS] [{json}]"),
        ToolFormat::Granite => format!("<|tool_call|>[{json}]"),
        ToolFormat::DeepSeek => format!(
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
        ToolFormat::Pythonic | ToolFormat::Lfm2 => {
            let fields = arguments.as_object().unwrap().iter();
            let fields: Vec<_> = fields
                .map(|(key, value)| format!("{key}={}", python(value)))
                .collect();
            let fields = fields.join(", ");
            match format {
                ToolFormat::Lfm2 => {
                    format!("<|tool_call_start|>[{name}({fields})]<|tool_call_end|>")
                }
                _ => format!("<|python_start|>[{name}({fields})]<|python_end|>"),
            }
        }
        // Outside the crate, there may be formats that are not known here.
        #[allow(unreachable_patterns)]
        _ => panic!("nothing writes {format:?}"),
    }
}
