//! Answers constrained to a form: `response_format` of OpenAI's API, `text.format` of its
//! responses API, and vLLM's additions.

use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::body::object;
use crate::server::http::workers::{Job, Work};
use crate::text::{
    Grammar, GrammarAnswer, GrammarCalls, GrammarError, GrammarForm, GrammarReasoning,
    SchemaKeywords, Tokenizer,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// The fields of a request that ask for a form of the answer.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct StructureFields {
    #[serde(default, deserialize_with = "object::optional")]
    response_format: Option<Format>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    #[serde(default, deserialize_with = "object::optional")]
    structured_outputs: Option<StructuredOutputs>,
}

/// vLLM's newer names of the `guided_…` fields.
#[derive(Debug, Default, Deserialize)]
struct StructuredOutputs {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
}

/// OpenAI's way to ask for a form.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Format {
    Text,
    JsonObject {
        /// The schema of the object, as in llama.cpp.
        schema: Option<Value>,
    },
    JsonSchema {
        /// The schema in the chat API.
        #[serde(default, deserialize_with = "object::optional")]
        json_schema: Option<Schema>,
        /// The schema in the responses API.
        schema: Option<Value>,
    },
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Schema {
    schema: Option<Value>,
}

/// A form, and the field that asks for it.
#[derive(Clone, Debug)]
pub(crate) struct Structure {
    form: Form,
    field: &'static str,
}

#[derive(Clone, Debug, PartialEq)]
enum Form {
    JsonObject,
    Schema(Value),
    Regex(String),
    Choice(Vec<String>),
    Lark(String),
}

impl Format {
    /// Returns the form that `field` asks for, if any.
    pub fn structure(self, field: &'static str) -> Result<Option<Structure>, ApiError> {
        let form = match self {
            Self::Text => return Ok(None),
            Self::JsonObject {
                schema: Some(schema),
            } if !schema.is_null() => Form::Schema(object(schema)),
            Self::JsonObject { .. } => Form::JsonObject,
            Self::JsonSchema {
                json_schema,
                schema,
            } => {
                let schema = json_schema.and_then(|named| named.schema).or(schema);
                let missing = || {
                    let problem = format!("{field} has no schema, which json_schema requires");
                    ApiError::invalid(problem).param(field)
                };
                Form::Schema(schema.ok_or_else(missing)?)
            }
        };
        Ok(Some(Structure { form, field }))
    }
}

impl StructureFields {
    /// Returns the form that the request asks for. Only one field may ask for a form.
    pub fn structure(self) -> Result<Option<Structure>, ApiError> {
        let form = |form: Option<Form>, field| form.map(|form| Structure { form, field });
        let vllm = self.structured_outputs.unwrap_or_default();
        let json_object = vllm.json_object.unwrap_or(false);
        let asked = [
            self.response_format
                .map_or(Ok(None), |format| format.structure("response_format"))?,
            form(self.guided_json.map(schema), "guided_json"),
            form(self.guided_regex.map(Form::Regex), "guided_regex"),
            form(self.guided_choice.map(Form::Choice), "guided_choice"),
            form(self.guided_grammar.map(Form::Lark), "guided_grammar"),
            form(vllm.json.map(schema), "structured_outputs"),
            form(
                json_object.then_some(Form::JsonObject),
                "structured_outputs",
            ),
            form(vllm.regex.map(Form::Regex), "structured_outputs"),
            form(vllm.choice.map(Form::Choice), "structured_outputs"),
            form(vllm.grammar.map(Form::Lark), "structured_outputs"),
        ];
        let mut asked = asked.into_iter().flatten();
        match (asked.next(), asked.next()) {
            (Some(one), Some(other)) => {
                let problem = match one.field == other.field {
                    true => format!("{} asks for more than one form", one.field),
                    false => format!("{} and {} cannot be combined", one.field, other.field),
                };
                Err(ApiError::invalid(problem).param(other.field))
            }
            (structure, _) => Ok(structure),
        }
    }
}

/// Restricts a schema to objects, unless it already says what its values are.
fn object(mut schema: Value) -> Value {
    const SHAPES: [&str; 5] = ["type", "$ref", "allOf", "anyOf", "oneOf"];
    if let Value::Object(fields) = &mut schema
        && !SHAPES.iter().any(|shape| fields.contains_key(*shape))
    {
        fields.insert("type".to_owned(), "object".into());
    }
    schema
}

/// Returns the form of a schema, which vLLM also accepts as JSON text.
fn schema(schema: Value) -> Form {
    let read = match &schema {
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    };
    Form::Schema(read.unwrap_or(schema))
}

impl Structure {
    /// Returns the form of a JSON schema that `field` asks for.
    pub fn of_schema(schema: Value, field: &'static str) -> Self {
        let form = Form::Schema(schema);
        Self { form, field }
    }

    /// Compiles the form on a worker thread, because this may take long.
    pub async fn compiled(self, app: &App) -> Result<Grammar, ApiError> {
        let tokenizer = Arc::clone(app.require_tokenizer("a form of the answer")?);
        let keywords = app.options.schema_keywords;
        let compile = move |_: &Job| self.grammar(&tokenizer, keywords, None, None);
        let work = Work::on(0).and_grammar(true);
        app.workers.run(work, compile).await
    }

    /// Compiles the form, which may take long. The answer may have `reasoning` before it, and
    /// with `calls`, it may be tool calls instead.
    pub fn grammar(
        &self,
        tokenizer: &Arc<Tokenizer>,
        keywords: SchemaKeywords,
        reasoning: Option<GrammarReasoning>,
        calls: Option<GrammarCalls<'_>>,
    ) -> Result<Grammar, ApiError> {
        let any = json!({"type": "object"});
        let form = match &self.form {
            Form::JsonObject => GrammarForm::JsonSchema(&any),
            Form::Schema(schema) => GrammarForm::JsonSchema(schema),
            Form::Regex(regex) => GrammarForm::Regex(regex),
            Form::Choice(choices) => GrammarForm::Choice(choices),
            Form::Lark(grammar) => GrammarForm::Lark(grammar),
        };
        let refused = |field: &str, error: GrammarError| {
            ApiError::invalid(format!("{field}: {error}")).param(field)
        };
        let alone = || {
            let grammar = Grammar::new(tokenizer, form, keywords);
            grammar.map_err(|error| refused(self.field, error))
        };
        if calls.is_none() && reasoning.is_none() {
            return alone();
        }
        let answer = GrammarAnswer {
            reasoning,
            form: Some(form),
            calls,
        };
        // If the form alone compiles, the error lies in the tools, if there are any.
        let field = if calls.is_some() { "tools" } else { self.field };
        Grammar::answer(tokenizer, answer, keywords)
            .or_else(|error| alone().and_then(|_| Err(refused(field, error))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(fields: Value) -> Result<Option<Form>, String> {
        let fields: StructureFields =
            serde_json::from_value(fields).map_err(|error| error.to_string())?;
        let structure = fields.structure().map_err(|error| error.body.message)?;
        Ok(structure.map(|structure| structure.form))
    }

    #[test]
    fn every_way_to_ask_is_understood() {
        let schema = json!({"type": "integer"});
        let named = json!({"name": "n", "schema": schema, "strict": true});
        for (fields, expected) in [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": null, "guided_json": null}), None),
            (
                json!({"response_format": {"type": "json_object"}}),
                Some(Form::JsonObject),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": named}}),
                Some(Form::Schema(schema.clone())),
            ),
            (
                json!({"guided_json": schema}),
                Some(Form::Schema(schema.clone())),
            ),
            (
                json!({"guided_json": schema.to_string()}),
                Some(Form::Schema(schema.clone())),
            ),
            (
                json!({"guided_regex": "a+"}),
                Some(Form::Regex("a+".to_owned())),
            ),
            (
                json!({"guided_choice": ["a"]}),
                Some(Form::Choice(vec!["a".to_owned()])),
            ),
            (
                json!({"guided_grammar": "start: \"a\""}),
                Some(Form::Lark("start: \"a\"".to_owned())),
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some(Form::Schema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                Some(Form::JsonObject),
            ),
            (
                json!({"structured_outputs": {"regex": "a+"}}),
                Some(Form::Regex("a+".to_owned())),
            ),
        ] {
            assert_eq!(form(fields.clone()).unwrap(), expected, "{fields}");
        }
        let beside = json!({"type": "json_object", "schema": {"properties": {"a": schema}}});
        let beside = form(json!({"response_format": beside})).unwrap();
        let object = json!({"properties": {"a": schema}, "type": "object"});
        assert_eq!(beside, Some(Form::Schema(object)));
        let flat = json!({"type": "json_schema", "name": "n", "schema": schema});
        let flat: Format = serde_json::from_value(flat).unwrap();
        let structure = flat.structure("text.format").unwrap().unwrap();
        assert_eq!(structure.form, Form::Schema(schema));
    }

    #[test]
    fn two_forms_and_unknown_ones_are_refused() {
        for (fields, problem) in [
            (
                json!({"guided_regex": "a", "response_format": {"type": "json_object"}}),
                "response_format and guided_regex cannot be combined",
            ),
            (
                json!({"structured_outputs": {"regex": "a", "json_object": true}}),
                "structured_outputs asks for more than one form",
            ),
            (
                json!({"response_format": {"type": "xml"}}),
                "unknown variant `xml`",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "no schema",
            ),
        ] {
            let error = form(fields).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
