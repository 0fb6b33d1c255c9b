//! Grammar rules for answers that consist of tool calls, in the format in which the model
//! writes calls by itself.

use super::ToolFormat;
use serde_json::{Value, json};
use std::fmt::Write;

/// Grammar rules in Lark's syntax that define `calls`, and the schemas that they refer to.
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
            Self::Pythonic => {
                let more = more("\",\" \" \"? call");
                lark = format!("calls: \"[\" call {more} \"]\"\ncall: ");
                for (index, (name, _)) in tools.iter().enumerate() {
                    let or = if index > 0 { " | " } else { "" };
                    let open = literal(&format!("{name}("));
                    let _ = write!(
                        lark,
                        "{or}{open} (arg{index} (\",\" \" \"? arg{index})*)? \")\""
                    );
                }
                lark.push('\n');
                for (index, (_, parameters)) in tools.iter().enumerate() {
                    let names = parameter_names(*parameters);
                    let _ = writeln!(lark, "arg{index}: ({names}) \"=\" py_value");
                }
                lark.push_str(PYTHON_VALUES);
            }
        }
        CallRules { lark, schemas }
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
