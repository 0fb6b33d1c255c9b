//! The tools of a request, and whether the model must call them.

use crate::server::error::ApiError;
use crate::text::tools::ToolFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The fields of a request that concern tools, in the forms of both the chat API and the
/// responses API.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ToolFields {
    tools: Option<Vec<Offer>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    /// The older name of `tools`. With it, the answer has a `function_call` instead of tool
    /// calls.
    functions: Option<Vec<LegacyFunction>>,
    /// The older name of `tool_choice`.
    function_call: Option<LegacyChoice>,
}

/// An entry of `tools`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
enum Offer {
    Function(Tool),
    /// A tool of a type that this server does not support, such as `web_search`.
    Other(String),
}

/// A function that the model may call.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    name: String,
    parameters: Option<Value>,
    strict: Option<bool>,
    /// The tool in the form that chat templates expect.
    description: Value,
}

/// An entry of `functions`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
struct LegacyFunction(Tool);

/// Whether the model may or must call tools.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "Value")]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
    /// The model may call only these tools, and must call one if `required`.
    Allowed {
        required: bool,
        names: Vec<String>,
    },
}

/// The `function_call` field of a request.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
struct LegacyChoice(ToolChoice);

/// The tools of a request, and how the model may use them.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    list: Vec<Tool>,
    choice: ToolChoice,
    /// Whether an answer may have more than one call.
    pub parallel: bool,
    /// Whether the request uses `functions`, so that the answer has a `function_call`.
    pub legacy: bool,
    /// Types of the request's tools that this server does not support.
    pub skipped: Vec<String>,
}

impl TryFrom<Value> for Offer {
    type Error = String;

    fn try_from(tool: Value) -> Result<Self, String> {
        match tool.get("type") {
            Some(Value::String(kind)) if kind == "function" => Tool::read(tool).map(Self::Function),
            Some(Value::String(kind)) => Ok(Self::Other(kind.clone())),
            _ => Err("a tool has no type, expected one such as \"function\"".to_owned()),
        }
    }
}

impl TryFrom<Value> for LegacyFunction {
    type Error = String;

    fn try_from(function: Value) -> Result<Self, String> {
        let tool = json!({"type": "function", "function": function});
        Tool::read(tool).map(Self)
    }
}

impl Tool {
    fn read(tool: Value) -> Result<Self, String> {
        // In the responses API, the function's fields are in the tool itself.
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
            Some(_) => return Err(format!("the parameters of {name:?} are not a JSON schema")),
        };
        let strict = match tool.get("strict").or_else(|| function.get("strict")) {
            None | Some(Value::Null) => None,
            Some(Value::Bool(strict)) => Some(*strict),
            Some(_) => return Err(format!("strict of {name:?} is neither true nor false")),
        };
        let description = match tool.get("function") {
            Some(_) => tool,
            None => json!({"type": "function", "function": function}),
        };
        Ok(Self {
            name,
            parameters,
            strict,
            description,
        })
    }
}

/// Returns an object without the fields `names` and without fields that are null.
fn without(object: &Value, names: &[&str]) -> Value {
    let fields = object.as_object().into_iter().flatten();
    let kept = fields.filter(|(name, value)| !names.contains(&name.as_str()) && !value.is_null());
    let kept: Map<_, _> = kept
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    kept.into()
}

/// Returns the name of a function in the form of either API.
fn function_name(choice: &Value) -> Option<String> {
    let named = choice.get("function").unwrap_or(choice).get("name")?;
    named.as_str().map(str::to_owned)
}

impl TryFrom<Value> for ToolChoice {
    type Error = String;

    fn try_from(choice: Value) -> Result<Self, String> {
        match (choice.as_str(), choice["type"].as_str()) {
            (Some("none"), _) => return Ok(Self::None),
            (Some("auto"), _) => return Ok(Self::Auto),
            (Some("required"), _) => return Ok(Self::Required),
            (_, Some("function")) => {
                if let Some(name) = function_name(&choice) {
                    return Ok(Self::Named(name));
                }
            }
            (_, Some("allowed_tools")) => return allowed_tools(&choice),
            (_, Some(kind)) => {
                return Err(format!("there are no tools of type {kind:?} to choose"));
            }
            _ => {}
        }
        Err(
            "expected \"none\", \"auto\", \"required\", the name of a function as \
             {\"type\": \"function\", \"function\": {\"name\": …}}, or {\"type\": \
             \"allowed_tools\", …}"
                .to_owned(),
        )
    }
}

/// Reads a choice of allowed tools, which is flat in the responses API and nested in the chat
/// API.
fn allowed_tools(choice: &Value) -> Result<ToolChoice, String> {
    let fields = choice.get("allowed_tools").unwrap_or(choice);
    let required = match fields["mode"].as_str() {
        Some("auto") => false,
        Some("required") => true,
        _ => return Err("allowed_tools needs a mode, \"auto\" or \"required\"".to_owned()),
    };
    let Some(tools) = fields["tools"].as_array() else {
        return Err("allowed_tools needs a list of tools".to_owned());
    };
    if tools.iter().any(|tool| !tool["type"].is_string()) {
        return Err("allowed_tools has a tool without a type".to_owned());
    }
    // Tools of other types are never offered, so there is nothing to allow.
    let functions = tools.iter().filter(|tool| tool["type"] == "function");
    let names = functions.map(|tool| {
        let missing = || "allowed_tools has a function without a name".to_owned();
        function_name(tool).ok_or_else(missing)
    });
    Ok(ToolChoice::Allowed {
        required,
        names: names.collect::<Result<_, _>>()?,
    })
}

impl TryFrom<Value> for LegacyChoice {
    type Error = String;

    fn try_from(choice: Value) -> Result<Self, String> {
        match (choice.as_str(), choice["name"].as_str()) {
            (Some("none"), _) => Ok(Self(ToolChoice::None)),
            (Some("auto"), _) => Ok(Self(ToolChoice::Auto)),
            (_, Some(name)) => Ok(Self(ToolChoice::Named(name.to_owned()))),
            _ => Err("expected \"none\", \"auto\" or {\"name\": …}".to_owned()),
        }
    }
}

/// Writes the choice in the form of the responses API.
impl Serialize for ToolChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let function = |name: &String| json!({"type": "function", "name": name});
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Auto => serializer.serialize_str("auto"),
            Self::Required => serializer.serialize_str("required"),
            Self::Named(name) => function(name).serialize(serializer),
            Self::Allowed { required, names } => json!({
                "type": "allowed_tools",
                "mode": if *required { "required" } else { "auto" },
                "tools": names.iter().map(function).collect::<Vec<_>>(),
            })
            .serialize(serializer),
        }
    }
}

impl ToolFields {
    /// Checks the fields, and that the tools that must be called exist.
    pub fn check(self) -> Result<Tools, ApiError> {
        if self.functions.is_some() && self.tools.is_some() {
            let problem = "tools and functions, its older name, cannot be combined";
            return Err(ApiError::invalid(problem).param("functions"));
        }
        if self.function_call.is_some() && self.tool_choice.is_some() {
            let problem = "tool_choice and function_call, its older name, cannot be combined";
            return Err(ApiError::invalid(problem).param("function_call"));
        }
        let legacy = self.functions.is_some();
        let (mut list, mut skipped) = (Vec::new(), Vec::new());
        for offer in self.tools.unwrap_or_default() {
            match offer {
                Offer::Function(tool) => list.push(tool),
                Offer::Other(kind) => skipped.push(kind),
            }
        }
        list.extend((self.functions.into_iter().flatten()).map(|function| function.0));
        if !skipped.is_empty() {
            tracing::warn!(types = ?skipped, "skipped tools of types that are not supported");
        }
        let field = match self.function_call {
            Some(_) => "function_call",
            None => "tool_choice",
        };
        let choice = self.function_call.map(|choice| choice.0);
        let choice = match (choice.or(self.tool_choice), list.is_empty()) {
            (None, true) => ToolChoice::None,
            (None, false) => ToolChoice::Auto,
            (Some(choice), _) => choice,
        };
        let tools = Tools {
            list,
            choice,
            // An answer with a `function_call` has room for only one call.
            parallel: !legacy && self.parallel_tool_calls.unwrap_or(true),
            legacy,
            skipped,
        };
        match tools.missing() {
            None => Ok(tools),
            Some(problem) => Err(ApiError::invalid(format!("{field}: {problem}")).param(field)),
        }
    }
}

impl Tools {
    /// Returns what is wrong with the choice, if it asks for a tool that does not exist.
    fn missing(&self) -> Option<String> {
        let has = |name: &String| self.list.iter().any(|tool| tool.name == *name);
        let names = match &self.choice {
            ToolChoice::Named(name) => std::slice::from_ref(name),
            ToolChoice::Allowed { names, .. } => names.as_slice(),
            _ => &[],
        };
        if let Some(name) = names.iter().find(|name| !has(name)) {
            return Some(format!("there is no tool {name:?}"));
        }
        let must = matches!(
            self.choice,
            ToolChoice::Required | ToolChoice::Allowed { required: true, .. }
        );
        let none = self.usable().next().is_none();
        (must && none).then(|| "there are no tools to call".to_owned())
    }

    /// Returns the choice that the request makes between the tools.
    pub fn choice(&self) -> &ToolChoice {
        &self.choice
    }

    /// Returns the tools that the model may call.
    fn usable(&self) -> impl Iterator<Item = &Tool> {
        self.list.iter().filter(|tool| match &self.choice {
            ToolChoice::None => false,
            ToolChoice::Auto | ToolChoice::Required | ToolChoice::Named(_) => true,
            ToolChoice::Allowed { names, .. } => names.contains(&tool.name),
        })
    }

    /// Returns whether there are tools that the model may call.
    pub fn offered(&self) -> bool {
        self.usable().next().is_some()
    }

    /// Returns the names of the tools that the model may call, each with the schema of the tool's
    /// parameters.
    pub fn schemas(&self) -> impl Iterator<Item = (&str, Option<&Value>)> {
        self.usable()
            .map(|tool| (tool.name.as_str(), tool.parameters.as_ref()))
    }

    /// Returns the tools in the form that chat templates expect, or `None` if the model may
    /// call none.
    pub fn described(&self) -> Option<Value> {
        let each = self.usable().map(|tool| tool.description.clone());
        self.offered().then(|| each.collect())
    }

    /// Returns the tools in the form in which the responses API reports them.
    pub fn reported(&self) -> Value {
        let each = self.list.iter().map(|tool| {
            let mut reported = json!({
                "type": "function",
                "name": tool.name,
                "description": null,
                "parameters": tool.parameters,
                "strict": tool.strict.unwrap_or(false),
            });
            reported["description"] = tool.description["function"]["description"].clone();
            reported
        });
        each.collect()
    }

    /// Returns whether the answer must be a call.
    pub fn forced(&self) -> bool {
        match &self.choice {
            ToolChoice::None | ToolChoice::Auto => false,
            ToolChoice::Required | ToolChoice::Named(_) => true,
            ToolChoice::Allowed { required, .. } => *required,
        }
    }

    /// Returns the JSON schema of the answer, if it must be a call.
    pub fn forced_schema(&self, format: ToolFormat) -> Option<Value> {
        let forced = self.forced();
        forced.then(|| format.forced_schema(self.forced_schemas(), self.several()))
    }

    /// Returns the tools of which one must be called, with the schemas of their parameters.
    pub fn forced_schemas(&self) -> impl Iterator<Item = (&str, Option<&Value>)> {
        let wanted = |tool: &&Tool| match &self.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        };
        let tools = self.usable().filter(wanted);
        tools.map(|tool| (tool.name.as_str(), tool.parameters.as_ref()))
    }

    /// Returns whether an answer may contain several calls.
    pub fn several(&self) -> bool {
        self.parallel && !matches!(self.choice, ToolChoice::Named(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(tools: &Tools) -> Vec<&str> {
        tools.schemas().map(|(name, _)| name).collect()
    }

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
    fn invalid_tools_are_refused_with_a_reason() {
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
            (json!({"tools": [{"name": "f"}]}), "no type"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "web_search"}}),
                "no tools of type \"web_search\"",
            ),
            (
                json!({"tools": [tool], "tool_choice": {
                    "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}],
                }}),
                "no tool \"g\"",
            ),
            (
                json!({"tools": [tool], "tool_choice": {
                    "type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}],
                }}),
                "no tools to call",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "allowed_tools", "tools": []}}),
                "needs a mode",
            ),
            (
                json!({"tools": [tool], "functions": [{"name": "f"}]}),
                "cannot be combined",
            ),
            (
                json!({"functions": [{"name": "f"}], "function_call": {"name": "g"}}),
                "function_call: there is no tool \"g\"",
            ),
            (
                json!({"tools": [{"type": "function", "name": "f", "strict": "yes"}]}),
                "strict of \"f\"",
            ),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "no name",
            ),
            (
                json!({"tools": [{"type": "function", "name": "f", "parameters": 1}]}),
                "not a JSON schema",
            ),
        ] {
            let error = check(fields).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn tools_of_other_types_are_skipped_and_named() {
        let tools = check(json!({"tools": [
            {"type": "function", "name": "shell", "strict": true},
            {"type": "custom", "name": "apply_patch", "format": {"type": "text"}},
            {"type": "web_search", "external_web_access": true},
        ]}))
        .unwrap();
        assert_eq!(names(&tools), ["shell"]);
        assert_eq!(tools.skipped, ["custom", "web_search"]);
        assert_eq!(tools.reported()[0]["strict"], true);
        assert_eq!(tools.reported().as_array().map(Vec::len), Some(1));
        let none = check(json!({"tools": [{"type": "mcp"}]})).unwrap();
        assert_eq!((none.offered(), none.choice()), (false, &ToolChoice::None));
    }

    #[test]
    fn only_the_allowed_tools_may_be_called() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let flat = |name: &str| json!({"type": "function", "name": name});
        let list = [tool("f"), tool("g"), tool("h")];
        let chat = |mode: &str| {
            json!({"type": "allowed_tools", "allowed_tools": {
                "mode": mode, "tools": [tool("h"), {"type": "web_search"}, tool("f")],
            }})
        };
        let auto = check(json!({"tools": list, "tool_choice": chat("auto")})).unwrap();
        assert_eq!(names(&auto), ["f", "h"]);
        assert_eq!(auto.described(), Some(json!([tool("f"), tool("h")])));
        assert_eq!(auto.forced_schema(ToolFormat::Granite), None);
        let must = check(json!({"tools": list, "tool_choice": chat("required")})).unwrap();
        let schema = must.forced_schema(ToolFormat::Granite).unwrap();
        assert_eq!(schema["items"]["anyOf"].as_array().unwrap().len(), 2);
        let choice = json!({
            "type": "allowed_tools", "mode": "auto", "tools": [flat("g")],
        });
        let fields = json!({"tools": list, "tool_choice": choice});
        let responses = check(fields).unwrap();
        assert_eq!(names(&responses), ["g"]);
        assert_eq!(serde_json::to_value(responses.choice()).unwrap(), choice);
        assert_eq!(responses.reported().as_array().unwrap().len(), 3);
    }

    #[test]
    fn functions_are_tools_by_their_older_name() {
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        let tools = check(json!({"functions": [function]})).unwrap();
        let described = json!([{"type": "function", "function": function}]);
        assert_eq!(tools.described(), Some(described));
        assert!(tools.legacy && !tools.parallel);
        assert_eq!(tools.choice(), &ToolChoice::Auto);
        for (choice, expected) in [
            (json!("none"), ToolChoice::None),
            (json!("auto"), ToolChoice::Auto),
            (json!({"name": "f"}), ToolChoice::Named("f".to_owned())),
        ] {
            let fields = json!({"functions": [function], "function_call": choice});
            assert_eq!(check(fields).unwrap().choice(), &expected);
        }
    }
}
