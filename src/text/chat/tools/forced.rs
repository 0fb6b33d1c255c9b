//! Answers that must be tool calls: how they begin, and the JSON schema of the rest.

use super::ToolFormat;
use serde_json::{Map, Value, json};

impl ToolFormat {
    /// Returns the text to append to a prompt whose answer must be tool calls, so that the
    /// model writes them in their usual place.
    pub fn forced_opening(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>\n",
            Self::Mistral => "[TOOL_CALLS]",
            Self::Granite => "<|tool_call|>",
            Self::Nemotron => "<TOOLCALL>",
            Self::CommandR => "<|START_ACTION|>",
            // Some of these formats are not JSON, which is what the answer must be.
            _ => "",
        }
    }

    /// Returns the JSON schema of an answer that must call one of `tools`, which are given
    /// with the schemas of their parameters.
    ///
    /// The answer is one call. If `several` are wanted and the format writes them as a
    /// list, it is a list of at least one call. [`ToolParser::forced`] parses the answer.
    ///
    /// [`ToolParser::forced`]: super::ToolParser::forced
    pub fn forced_schema<'a>(
        self,
        tools: impl IntoIterator<Item = (&'a str, Option<&'a Value>)>,
        several: bool,
    ) -> Value {
        let (name_key, arguments) = match self {
            Self::Llama => ("name", "parameters"),
            Self::CommandR => ("tool_name", "parameters"),
            _ => ("name", "arguments"),
        };
        let mut definitions = Map::new();
        let mut calls = Vec::new();
        for (index, (name, parameters)) in tools.into_iter().enumerate() {
            let place = format!("parameters{index}");
            calls.push(json!({
                "type": "object",
                "properties": {
                    name_key: {"const": name},
                    arguments: {"$ref": format!("#/$defs/{place}")},
                },
                "required": [name_key, arguments],
                "additionalProperties": false,
            }));
            definitions.insert(place.clone(), embedded(parameters, &place));
        }
        let call = match calls.len() {
            1 => calls.swap_remove(0),
            _ => json!({"anyOf": calls}),
        };
        let mut schema = match (several, self) {
            (false, _) | (true, Self::Hermes | Self::Llama) => call,
            (true, _) => json!({"type": "array", "items": call, "minItems": 1}),
        };
        if let Value::Object(schema) = &mut schema {
            schema.insert("$defs".to_owned(), definitions.into());
        }
        schema
    }
}

/// Returns the schema of a tool's arguments.
#[cfg(feature = "grammar")]
pub(super) fn arguments(parameters: Option<&Value>) -> Value {
    closed(parameters).unwrap_or_else(no_arguments)
}

fn no_arguments() -> Value {
    json!({"type": "object", "properties": {}, "additionalProperties": false})
}

/// Returns the schema of a tool's parameters, for use as the definition `place` of another
/// schema.
fn embedded(parameters: Option<&Value>, place: &str) -> Value {
    let Some(mut schema) = closed(parameters) else {
        return no_arguments();
    };
    move_references(&mut schema, place);
    schema
}

/// Returns the schema of a tool's parameters, which allows no undeclared ones. Returns
/// `None` if nothing is declared.
fn closed(parameters: Option<&Value>) -> Option<Value> {
    let mut parameters = parameters?.as_object()?.clone();
    parameters.shift_remove("$schema");
    parameters.shift_remove("$id");
    if parameters.is_empty() {
        return None;
    }
    const COMPOSED: [&str; 6] = [
        "$ref",
        "allOf",
        "anyOf",
        "oneOf",
        "patternProperties",
        "additionalProperties",
    ];
    if !COMPOSED.iter().any(|key| parameters.contains_key(*key)) {
        // Arguments are an object with the declared parameters and no others.
        parameters.entry("type").or_insert("object".into());
        if parameters.contains_key("properties") {
            parameters.insert("additionalProperties".to_owned(), false.into());
        }
    }
    Some(Value::Object(parameters))
}

/// Adjusts the references within a schema that becomes the definition `place`.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(reference) if key == "$ref" => {
                        if let Some(path) = reference.strip_prefix('#') {
                            *reference = format!("#/$defs/{place}{path}");
                        }
                    }
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(values) => {
            for value in values {
                move_references(value, place);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_call_is_an_object_of_the_tools_name_and_parameters() {
        let parameters = json!({
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}, "$ref": {"type": "string"}},
            "$defs": {"A": {"type": "integer"}},
        });
        let schema = ToolFormat::Hermes.forced_schema([("f", Some(&parameters))], true);
        let expected = json!({
            "type": "object",
            "properties": {
                "name": {"const": "f"},
                "arguments": {"$ref": "#/$defs/parameters0"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": false,
            "$defs": {"parameters0": {
                "type": "object",
                "properties": {
                    "a": {"$ref": "#/$defs/parameters0/$defs/A"},
                    "$ref": {"type": "string"},
                },
                "$defs": {"A": {"type": "integer"}},
                "additionalProperties": false,
            }},
        });
        assert_eq!(schema, expected);
    }

    #[test]
    fn several_tools_and_calls_are_alternatives_and_lists() {
        let any = json!({"anyOf": [{"type": "object"}]});
        let tools = [("f", None), ("g", Some(&any))];
        let schema = ToolFormat::Mistral.forced_schema(tools, true);
        assert_eq!(
            (&schema["type"], &schema["minItems"]),
            (&json!("array"), &json!(1))
        );
        let calls = schema["items"]["anyOf"].as_array().unwrap();
        let names: Vec<_> = calls
            .iter()
            .map(|call| &call["properties"]["name"]["const"])
            .collect();
        assert_eq!(names, ["f", "g"]);
        assert_eq!(
            schema["$defs"]["parameters0"]["additionalProperties"],
            false
        );
        assert_eq!(schema["$defs"]["parameters1"], any);
        let one = ToolFormat::Llama.forced_schema([("f", None)], true);
        assert_eq!(one["required"], json!(["name", "parameters"]));
    }
}
