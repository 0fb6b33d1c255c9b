//! Grammar rules for answers that consist of tool calls, in the format in which the model
//! writes calls by itself.

use super::ToolFormat;
use super::tagged::types;
use serde_json::{Value, json};
use std::fmt::Write;

/// Grammar rules in Lark's syntax that define `calls`, and the schemas that they refer to.
#[derive(Default)]
pub(in crate::text) struct CallRules {
    pub lark: String,
    /// JSON schemas with the names of their grammars.
    pub schemas: Vec<(String, Value)>,
}

/// Rules for values in Python's syntax.
const PYTHON_VALUES: &str = r#"
py_value: PY_STRING | PY_NUMBER | "True" | "False" | "None" | py_list | py_dict
py_list: "[" "]" | "[" py_value ("," " "? py_value)* "]"
py_dict: "{" "}" | "{" py_item ("," " "? py_item)* "}"
py_item: PY_STRING ":" " "? py_value
PY_STRING: /"([^"\\\n]|\\.)*"/ | /'([^'\\\n]|\\.)*'/
PY_NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"#;

impl ToolFormat {
    /// Returns the rules for one call, or for `several` calls, of `tools`. `mark` returns
    /// the terminal of a mark, which may be a special token.
    pub(in crate::text) fn call_rules(
        self,
        tools: &[(&str, Option<&Value>)],
        several: bool,
        mark: impl Fn(&str) -> String,
    ) -> CallRules {
        let more = |call: &str| match several {
            true => format!("({call})*"),
            false => String::new(),
        };
        let mut schemas = Vec::new();
        let mut lark;
        match self {
            Self::Hermes => {
                let (open, close) = (mark("<tool_call>"), mark("</tool_call>"));
                let more = more("\"\\n\"? call");
                lark =
                    format!("calls: call {more}\ncall: {open} \"\\n\"? @call \"\\n\"? {close}\n");
                schemas.push(("call".to_owned(), self.forced_schema(tools.to_vec(), false)));
            }
            Self::Llama => {
                let (tag, more) = (mark("<|python_tag|>"), more("\";\" \" \"? @call"));
                lark = format!("calls: {tag}? @call {more}\n");
                schemas.push(("call".to_owned(), self.forced_schema(tools.to_vec(), false)));
            }
            Self::Granite => {
                let (tag, other) = (mark("<|tool_call|>"), mark("<tool_call>"));
                let (close, more) = (mark("<|/tool_call|>"), more("\",\" \" \"? @call"));
                lark =
                    format!("calls: tag \"[\" @call {more} \"]\" {close}?\ntag: {tag} | {other}\n");
                schemas.push(("call".to_owned(), self.forced_schema(tools.to_vec(), false)));
            }
            Self::Mistral => {
                let (tag, arguments) = (mark("[TOOL_CALLS]"), mark("[ARGS]"));
                let list = more("\",\" \" \"? @call");
                let single = more("single");
                lark = format!(
                    "calls: {tag} \" \"? \"[\" @call {list} \"]\" | single {single}\n\
                     single: {tag} named\nnamed: "
                );
                schemas.push(("call".to_owned(), self.forced_schema(tools.to_vec(), false)));
                each(tools, &mut lark, &mut schemas, |name, schema| {
                    format!("{} {arguments} @{schema}", literal(name))
                });
            }
            Self::DeepSeek => {
                let begin = mark("<｜tool▁call▁begin｜>");
                let end = mark("<｜tool▁call▁end｜>");
                let separator = mark("<｜tool▁sep｜>");
                let (all, over) = (mark("<｜tool▁calls▁begin｜>"), mark("<｜tool▁calls▁end｜>"));
                let more = more("\"\\n\"? call");
                lark = format!(
                    "calls: {all} call {more} {over}\ncall: {begin} (named | block) {end}\n\
                     block: \"function\" {separator} blocked \"\\n```\"\nblocked: "
                );
                each(tools, &mut lark, &mut schemas, |name, schema| {
                    format!("{} @{schema}", literal(&format!("{name}\n```json\n")))
                });
                lark.push_str("named: ");
                each(tools, &mut lark, &mut schemas, |name, schema| {
                    format!("{} {separator} @{schema}", literal(name))
                });
            }
            Self::QwenCoder | Self::Seed | Self::Glm | Self::MiniMax => {
                let frame = TaggedFrame::of(self);
                let [open, close] = frame.calls.map(mark);
                let [before, after] = frame.around.map(literal);
                let (each_call, around) = match self {
                    // All calls are in one frame.
                    Self::MiniMax => (more("call"), String::new()),
                    _ => (String::new(), more("\"\\n\"? framed")),
                };
                lark = format!(
                    "calls: framed {around}\nframed: {open} {before} call {each_call} {after} {close}\n"
                );
                tagged_rules(&frame, tools, &mut lark, &mut schemas);
            }
            Self::Kimi => {
                let (all, over) = (
                    mark("<|tool_calls_section_begin|>"),
                    mark("<|tool_calls_section_end|>"),
                );
                let (begin, end) = (mark("<|tool_call_begin|>"), mark("<|tool_call_end|>"));
                let (arguments, more) = (mark("<|tool_call_argument_begin|>"), more("call"));
                lark =
                    format!("calls: {all} call {more} {over}\ncall: {begin} named {end}\nnamed: ");
                each(tools, &mut lark, &mut schemas, |name, schema| {
                    let id = literal(&format!("functions.{name}:"));
                    format!("{id} /[0-9]+/ {arguments} @{schema}")
                });
            }
            Self::Harmony => {
                let (channel, constrain) = (mark("<|channel|>"), mark("<|constrain|>"));
                let message = mark("<|message|>");
                // The mark that ends a call ends the answer, so there is only one.
                lark = format!(
                    "calls: {channel} \"commentary to=functions.\" named\n\
                     head_end: \" \" {constrain} \"json\" {message}\nnamed: "
                );
                each(tools, &mut lark, &mut schemas, |name, schema| {
                    format!("{} head_end @{schema}", literal(name))
                });
            }
            Self::CommandR | Self::Nemotron => {
                let [open, close] = match self {
                    Self::CommandR => ["<|START_ACTION|>", "<|END_ACTION|>"],
                    _ => ["<TOOLCALL>", "</TOOLCALL>"],
                };
                let (open, close) = (mark(open), mark(close));
                let more = more("\",\" \" \"? @call");
                lark = format!("calls: {open} \"[\" @call {more} \"]\" {close}\n");
                schemas.push(("call".to_owned(), self.forced_schema(tools.to_vec(), false)));
            }
            Self::Gemma => {
                let (open, close) = (mark("<|tool_call>"), mark("<tool_call|>"));
                let more = more("call");
                lark = format!("calls: call {more}\ncall: {open} named {close}\nnamed: ");
                let open = |name: &str| format!("call:{name}{{");
                with_keys(
                    tools,
                    &mut lark,
                    open,
                    "\",\"",
                    "\"}\"",
                    "\":\" gemma_value",
                );
                let quote = mark(GEMMA_QUOTE);
                let text = match quote.starts_with('"') {
                    true => format!("{quote} gemma_rest\ngemma_rest[suffix={quote}]: /(?s:.*)/"),
                    false => format!("{quote} /(?s:.*)/ {quote}"),
                };
                let _ = writeln!(lark, "gemma_text: {text}");
                lark.push_str(GEMMA_VALUES);
            }
            Self::Pythonic | Self::Lfm2 => {
                let more = more("\",\" \" \"? call");
                let [open, close] = match self {
                    Self::Lfm2 => ["<|tool_call_start|>", "<|tool_call_end|>"].map(mark),
                    _ => [String::new(), String::new()],
                };
                lark = format!("calls: {open} \"[\" call {more} \"]\" {close}\ncall: ");
                let open = |name: &str| format!("{name}(");
                with_keys(
                    tools,
                    &mut lark,
                    open,
                    "\",\" \" \"?",
                    "\")\"",
                    "\"=\" py_value",
                );
                lark.push_str(PYTHON_VALUES);
            }
        }
        CallRules { lark, schemas }
    }
}

/// The quote of Gemma 4.
const GEMMA_QUOTE: &str = "<|\"|>";

/// Rules for values in Gemma 4's syntax.
const GEMMA_VALUES: &str = r#"
gemma_value: gemma_text | PY_NUMBER | "true" | "false" | "null" | gemma_list | gemma_object
gemma_list: "[" "]" | "[" gemma_value ("," gemma_value)* "]"
gemma_object: "{" "}" | "{" gemma_item ("," gemma_item)* "}"
gemma_item: /[A-Za-z_][A-Za-z0-9_ -]*/ ":" gemma_value
PY_NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"#;

/// Text around the parts of calls between tags.
struct TaggedFrame {
    /// The marks around the calls.
    calls: [&'static str; 2],
    /// Text after the first mark, and before the second.
    around: [&'static str; 2],
    name: [&'static str; 2],
    key: [&'static str; 2],
    value_close: &'static str,
    call_close: &'static str,
}

impl TaggedFrame {
    fn of(format: ToolFormat) -> Self {
        let qwen = Self {
            calls: ["<tool_call>", "</tool_call>"],
            around: ["\n", "\n"],
            name: ["<function=", ">\n"],
            key: ["<parameter=", ">\n"],
            value_close: "\n</parameter>\n",
            call_close: "</function>",
        };
        match format {
            ToolFormat::Seed => Self {
                calls: ["<seed:tool_call>", "</seed:tool_call>"],
                key: ["<parameter=", ">"],
                value_close: "</parameter>\n",
                ..qwen
            },
            ToolFormat::MiniMax => Self {
                calls: ["<minimax:tool_call>", "</minimax:tool_call>"],
                around: ["\n", ""],
                name: ["<invoke name=\"", "\">\n"],
                key: ["<parameter name=\"", "\">"],
                value_close: "</parameter>\n",
                call_close: "</invoke>\n",
            },
            ToolFormat::Glm => Self {
                around: ["", ""],
                name: ["", "\n"],
                key: ["<arg_key>", "</arg_key>\n<arg_value>"],
                value_close: "</arg_value>\n",
                call_close: "",
                ..qwen
            },
            _ => qwen,
        }
    }
}

/// Writes the rule of a call between tags. Arguments that are not text conform to their schemas.
fn tagged_rules(
    frame: &TaggedFrame,
    tools: &[(&str, Option<&Value>)],
    lark: &mut String,
    schemas: &mut Vec<(String, Value)>,
) {
    let (close, call_close) = (literal(frame.value_close), literal(frame.call_close));
    let each: Vec<_> = (0..tools.len()).map(|tool| format!("tool{tool}")).collect();
    let _ = writeln!(lark, "call: {}", each.join(" | "));
    let _ = writeln!(lark, "text[suffix={close}]: /(?s:.*)/");
    for (index, (name, parameters)) in tools.iter().enumerate() {
        let [before, after] = frame.name;
        let head = literal(&format!("{before}{name}{after}"));
        let _ = writeln!(lark, "tool{index}: {head} (arg{index})* {call_close}");
        let properties = parameters.and_then(|schema| schema.get("properties"));
        let properties = properties.and_then(Value::as_object);
        let mut arguments = Vec::new();
        for (place, (key, schema)) in properties.into_iter().flatten().enumerate() {
            let types = types(schema);
            let texts = schema.get("enum").and_then(Value::as_array);
            let texts: Option<Vec<&str>> =
                texts.and_then(|values| values.iter().map(Value::as_str).collect());
            let value = match (texts, types) {
                (Some(texts), _) if !texts.is_empty() => {
                    let texts: Vec<_> = texts.into_iter().map(literal).collect();
                    format!("({}) {close}", texts.join(" | "))
                }
                (_, Some(types)) if !types.contains("string") => {
                    let rule = format!("value{index}_{place}");
                    let mut schema = schema.clone();
                    if let (Some(definitions), Value::Object(fields)) = (
                        parameters.and_then(|schema| schema.get("$defs")),
                        &mut schema,
                    ) {
                        fields.entry("$defs").or_insert_with(|| definitions.clone());
                    }
                    schemas.push((rule.clone(), schema));
                    format!("@{rule} {close}")
                }
                _ => "text".to_owned(),
            };
            let [before, after] = frame.key;
            arguments.push(format!(
                "{} {value}",
                literal(&format!("{before}{key}{after}"))
            ));
        }
        if arguments.is_empty() && parameters.is_some_and(|schema| schema.get("type").is_none()) {
            let [before, after] = frame.key.map(literal);
            arguments.push(format!("{before} /[A-Za-z_][A-Za-z0-9_.-]*/ {after} text"));
        }
        match arguments.is_empty() {
            // Nothing is declared, so there are no arguments.
            true => *lark = lark.replace(&format!("(arg{index})* "), ""),
            false => {
                let _ = writeln!(lark, "arg{index}: {}", arguments.join(" | "));
            }
        }
    }
}

/// Writes the alternatives of a rule, one per tool, and adds the schemas of their arguments
/// unless they are there already.
fn each(
    tools: &[(&str, Option<&Value>)],
    lark: &mut String,
    schemas: &mut Vec<(String, Value)>,
    alternative: impl Fn(&str, &str) -> String,
) {
    for (index, (name, parameters)) in tools.iter().enumerate() {
        let schema = format!("arguments{index}");
        if index > 0 {
            lark.push_str(" | ");
        }
        lark.push_str(&alternative(name, &schema));
        if !schemas.iter().any(|(name, _)| *name == schema) {
            schemas.push((schema, super::forced::arguments(*parameters)));
        }
    }
    lark.push('\n');
}

/// Writes the alternatives of a rule, one per tool, for calls with the names of their arguments,
/// and the rules of the arguments. A call begins with the text `open(name)` and ends with the
/// terminal `close`; arguments have `comma` between them, and `value` after their names.
fn with_keys(
    tools: &[(&str, Option<&Value>)],
    lark: &mut String,
    open: impl Fn(&str) -> String,
    comma: &str,
    close: &str,
    value: &str,
) {
    for (index, (name, _)) in tools.iter().enumerate() {
        let or = if index > 0 { " | " } else { "" };
        let open = literal(&open(name));
        let _ = write!(
            lark,
            "{or}{open} (arg{index} ({comma} arg{index})*)? {close}"
        );
    }
    lark.push('\n');
    for (index, (_, parameters)) in tools.iter().enumerate() {
        let names = parameter_names(*parameters);
        let _ = writeln!(lark, "arg{index}: ({names}) {value}");
    }
}

/// Returns the names of a tool's parameters as alternatives. Any name is allowed if none
/// are declared.
fn parameter_names(parameters: Option<&Value>) -> String {
    let properties = parameters.and_then(|schema| schema.get("properties"));
    let names = properties.and_then(Value::as_object);
    let names: Vec<_> = (names.into_iter().flatten())
        .map(|(name, _)| literal(name))
        .collect();
    match names.is_empty() {
        true => "/[A-Za-z_][A-Za-z0-9_]*/".to_owned(),
        false => names.join(" | "),
    }
}

/// Returns a text as a terminal.
fn literal(text: &str) -> String {
    json!(text).to_string()
}
