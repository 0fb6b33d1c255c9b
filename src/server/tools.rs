//! The tools of a request: what there is to call, and whether it must be called.

use super::error::ApiError;
use crate::text::tools::ToolFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The fields of a request that are about tools, in the shapes of both the chat and the
/// responses API.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ToolFields {
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
}

/// A function that the model may call.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) struct Tool {
    name: String,
    parameters: Option<Value>,
    /// As chat templates expect it.
    description: Value,
}

/// Whether tools are to be called.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "Value")]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

/// The tools of a request and how they are to be used.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    list: Vec<Tool>,
    choice: ToolChoice,
    /// More than one call in an answer.
    pub parallel: bool,
}

impl TryFrom<Value> for Tool {
    type Error = String;

    fn try_from(tool: Value) -> Result<Self, String> {
        let kind = tool.get("type").and_then(Value::as_str);
        if kind != Some("function") {
            let kind = kind.unwrap_or("no type");
            return Err(format!("a tool is {kind:?}, expected \"function\""));
        }
        // The responses API has the function's fields in the tool itself.
        let function = match tool.get("function") {
            Some(function) => function.clone(),
            None => without(&tool, &["type", "strict"]),
        };
        let name = match function.get("name") {
            Some(Value::String(name)) if !name.is_empty() => name.clone(),
            _ => return Err("a tool has no name".to_owned()),
        };
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => None,
            Some(parameters @ Value::Object(_)) => Some(parameters.clone()),
            Some(_) => return Err(format!("the parameters of {name:?} are no JSON schema")),
        };
        let description = match tool.get("function") {
            Some(_) => tool,
            None => json!({"type": "function", "function": function}),
        };
        Ok(Self {
            name,
            parameters,
            description,
        })
    }
}

/// An object without some of its fields, and without those that are null.
fn without(object: &Value, names: &[&str]) -> Value {
    let fields = object.as_object().into_iter().flatten();
    let kept = fields.filter(|(name, value)| !names.contains(&name.as_str()) && !value.is_null());
    let kept: Map<_, _> = kept
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    kept.into()
}

impl TryFrom<Value> for ToolChoice {
    type Error = String;

    fn try_from(choice: Value) -> Result<Self, String> {
        let named = choice.get("function").unwrap_or(&choice).get("name");
        match (choice.as_str(), choice["type"].as_str(), named) {
            (Some("none"), ..) => Ok(Self::None),
            (Some("auto"), ..) => Ok(Self::Auto),
            (Some("required"), ..) => Ok(Self::Required),
            (_, Some("function"), Some(Value::String(name))) => Ok(Self::Named(name.clone())),
            _ => Err(
                "expected \"none\", \"auto\", \"required\", or the name of a function as \
                 {\"type\": \"function\", \"function\": {\"name\": …}}"
                    .to_owned(),
            ),
        }
    }
}

/// As the responses API reports it.
impl Serialize for ToolChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Auto => serializer.serialize_str("auto"),
            Self::Required => serializer.serialize_str("required"),
            Self::Named(name) => json!({"type": "function", "name": name}).serialize(serializer),
        }
    }
}

impl ToolFields {
    /// Checks that the tools that must be called are there.
    pub fn check(self) -> Result<Tools, ApiError> {
        let list = self.tools.unwrap_or_default();
        let choice = match (self.tool_choice, list.is_empty()) {
            (None, true) => ToolChoice::None,
            (None, false) => ToolChoice::Auto,
            (Some(choice), _) => choice,
        };
        let problem = match &choice {
            ToolChoice::Required if list.is_empty() => "there are no tools to call".to_owned(),
            ToolChoice::Named(name) if !list.iter().any(|tool| tool.name == *name) => {
                format!("there is no tool {name:?}")
            }
            _ => {
                return Ok(Tools {
                    list,
                    choice,
                    parallel: self.parallel_tool_calls.unwrap_or(true),
                });
            }
        };
        Err(ApiError::invalid(format!("tool_choice: {problem}")).param("tool_choice"))
    }
}

impl Tools {
    /// Whether tools are to be called.
    pub fn choice(&self) -> &ToolChoice {
        &self.choice
    }

    /// Whether the model may call any.
    pub fn offered(&self) -> bool {
        self.choice != ToolChoice::None && !self.list.is_empty()
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.list.iter().map(|tool| tool.name.clone())
    }

    /// The tools as a chat template expects them, if the model may call any.
    pub fn described(&self) -> Option<Value> {
        let each = self.list.iter().map(|tool| tool.description.clone());
        self.offered().then(|| each.collect())
    }

    /// The tools as the responses API reports them.
    pub fn reported(&self) -> Value {
        let each = self.list.iter().map(|tool| {
            let mut reported = json!({
                "type": "function",
                "name": tool.name,
                "description": null,
                "parameters": tool.parameters,
                "strict": false,
            });
            reported["description"] = tool.description["function"]["description"].clone();
            reported
        });
        each.collect()
    }

    /// The JSON schema of the answer, if it must be a call.
    pub fn forced_schema(&self, format: ToolFormat) -> Option<Value> {
        let wanted = |tool: &&Tool| match &self.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        };
        let several = match &self.choice {
            ToolChoice::None | ToolChoice::Auto => return None,
            ToolChoice::Required => self.parallel,
            ToolChoice::Named(_) => false,
        };
        let tools = self.list.iter().filter(wanted);
        let tools = tools.map(|tool| (tool.name.as_str(), tool.parameters.as_ref()));
        Some(format.forced_schema(tools, several))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fields: Value) -> Result<Tools, String> {
        let fields: ToolFields =
            serde_json::from_value(fields).map_err(|error| error.to_string())?;
        fields.check().map_err(|error| error.body.message)
    }

    #[test]
    fn tools_of_both_apis_are_read() {
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        let chat = json!({"type": "function", "function": function});
        let flat = json!({
            "type": "function", "name": "f", "description": "d",
            "parameters": {"type": "object"}, "strict": true,
        });
        for tool in [&chat, &flat] {
            let tools = check(json!({"tools": [tool]})).unwrap();
            assert_eq!(tools.described(), Some(json!([chat])));
            assert_eq!(tools.choice(), &ToolChoice::Auto);
            assert_eq!(tools.reported()[0]["parameters"], json!({"type": "object"}));
            assert_eq!(tools.forced_schema(ToolFormat::Hermes), None);
        }
        let none = check(json!({"tools": [chat], "tool_choice": "none"})).unwrap();
        assert_eq!(none.described(), None);
        assert!(!check(json!({"tools": []})).unwrap().offered());
    }

    #[test]
    fn a_named_choice_forces_that_tool_alone() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        for choice in [
            json!({"type": "function", "function": {"name": "g"}}),
            json!({"type": "function", "name": "g"}),
        ] {
            let fields = json!({"tools": [tool("f"), tool("g")], "tool_choice": choice});
            let schema = check(fields).unwrap().forced_schema(ToolFormat::Granite);
            assert_eq!(schema.unwrap()["properties"]["name"]["const"], "g");
        }
        let fields = json!({"tools": [tool("f"), tool("g")], "tool_choice": "required"});
        let schema = check(fields)
            .unwrap()
            .forced_schema(ToolFormat::Granite)
            .unwrap();
        assert_eq!(schema["items"]["anyOf"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        for (fields, problem) in [
            (json!({"tool_choice": "required"}), "no tools to call"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "function", "name": "x"}}),
                "no tool \"x\"",
            ),
            (
                json!({"tools": [tool], "tool_choice": "maybe"}),
                "expected \"none\"",
            ),
            (json!({"tools": [{"type": "web_search"}]}), "\"web_search\""),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "no name",
            ),
            (
                json!({"tools": [{"type": "function", "name": "f", "parameters": 1}]}),
                "no JSON schema",
            ),
        ] {
            let error = check(fields).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
