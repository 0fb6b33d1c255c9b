//! Prepares JSON schemas for the compiler. Keywords that only describe are dropped, and
//! unsupported keywords are expressed by supported ones as far as possible.

use super::pattern::relaxed;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Formats that the compiler knows. All others are annotations, as JSON Schema specifies.
const FORMATS: [&str; 10] = [
    "date",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "time",
    "uri",
    "uuid",
];

/// Schema drafts that the compiler knows.
const DRAFTS: [&str; 5] = [
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
];

/// Maximum size that rewriting may add to one schema, in bytes.
const MAX_GROWTH: usize = 64 << 10;

/// Maximum number of references to follow in `propertyNames`.
const MAX_REFERENCES: usize = 16;

/// Rewrites a schema for the compiler.
pub(super) struct Rewriter {
    root: Value,
    /// Whether keywords that cannot be enforced may be dropped. If not, they stay, and the
    /// compiler rejects them by name.
    lenient: bool,
    growth: usize,
    /// Dropped keywords that would restrict the answer.
    pub unenforced: BTreeSet<String>,
}

impl Rewriter {
    pub fn new(schema: &Value, lenient: bool) -> Self {
        Self {
            root: schema.clone(),
            lenient,
            growth: 0,
            unenforced: BTreeSet::new(),
        }
    }

    /// Returns the schema in terms that the compiler knows. Its depth must be bounded.
    pub fn rewrite(&mut self) -> Value {
        let mut schema = self.root.clone();
        self.schema(&mut schema);
        schema
    }

    fn mark_unenforced(&mut self, keyword: &str) {
        self.unenforced.insert(keyword.to_owned());
    }

    fn schema(&mut self, schema: &mut Value) {
        let Value::Object(fields) = schema else {
            return;
        };
        self.draft(fields);
        format(fields);
        unique_items(fields);
        self.property_names(fields);
        self.property_counts(fields);
        self.pattern(fields);
        self.pattern_properties(fields);
        for (keyword, value) in fields.iter_mut() {
            match (keyword.as_str(), value) {
                (
                    "additionalItems"
                    | "additionalProperties"
                    | "contains"
                    | "else"
                    | "if"
                    | "items"
                    | "not"
                    | "propertyNames"
                    | "then"
                    | "unevaluatedItems"
                    | "unevaluatedProperties",
                    value @ Value::Object(_),
                ) => self.schema(value),
                ("allOf" | "anyOf" | "items" | "oneOf" | "prefixItems", Value::Array(schemas)) => {
                    schemas.iter_mut().for_each(|schema| self.schema(schema))
                }
                (
                    "$defs" | "definitions" | "dependentSchemas" | "patternProperties"
                    | "properties",
                    Value::Object(schemas),
                ) => schemas.values_mut().for_each(|schema| self.schema(schema)),
                _ => {}
            }
        }
    }

    /// Removes an unknown `$schema` in lenient mode, so that the latest draft applies.
    fn draft(&mut self, fields: &mut Map<String, Value>) {
        let known = |draft: &Value| {
            let draft = draft.as_str().unwrap_or_default();
            DRAFTS.contains(&draft.trim_end_matches('#'))
        };
        if self.lenient && fields.get("$schema").is_some_and(|draft| !known(draft)) {
            fields.shift_remove("$schema");
            self.mark_unenforced("$schema");
        }
    }

    /// Removes look-around from a pattern, or turns it into separate patterns.
    fn pattern(&mut self, fields: &mut Map<String, Value>) {
        let Some(Value::String(pattern)) = fields.get("pattern") else {
            return;
        };
        let Some(relaxed) = relaxed(pattern) else {
            return;
        };
        if !relaxed.exact {
            if !self.lenient {
                return;
            }
            self.mark_unenforced("pattern");
        }
        fields.insert("pattern".to_owned(), relaxed.pattern.into());
        if relaxed.also.is_empty() {
            return;
        }
        let also = relaxed.also.into_iter();
        let also = also.map(|pattern| json!({"type": "string", "pattern": pattern}));
        let also: Vec<Value> = also.collect();
        // A string must match all patterns; other values need not match any.
        let other = ["array", "boolean", "null", "number", "object"];
        let strings = fields.get("type").is_some_and(|kind| kind == "string");
        let all = also.into_iter().map(|schema| match strings {
            true => schema,
            false => json!({"anyOf": [schema, {"type": other}]}),
        });
        match fields.entry("allOf").or_insert_with(|| json!([])) {
            Value::Array(schemas) => schemas.extend(all),
            _ => self.mark_unenforced("pattern"),
        }
    }

    fn pattern_properties(&mut self, fields: &mut Map<String, Value>) {
        if !self.lenient {
            return;
        }
        let Some(Value::Object(patterns)) = fields.get_mut("patternProperties") else {
            return;
        };
        if patterns.keys().all(|pattern| relaxed(pattern).is_none()) {
            return;
        }
        let each = std::mem::take(patterns).into_iter();
        let mut unenforced = false;
        *patterns = each
            .map(|(pattern, schema)| match relaxed(&pattern) {
                Some(relaxed) => {
                    unenforced |= !relaxed.exact || !relaxed.also.is_empty();
                    (relaxed.pattern, schema)
                }
                None => (pattern, schema),
            })
            .collect();
        if unenforced {
            self.mark_unenforced("patternProperties");
        }
    }

    /// Removes limits on the number of properties that have no effect or cannot be enforced.
    ///
    /// The compiler supports limits if all properties are required. In a closed object it
    /// also supports at least one, or at most one, optional property.
    fn property_counts(&mut self, fields: &mut Map<String, Value>) {
        let count = |name: &str| fields.get(name).and_then(Value::as_u64);
        let (least, most) = (count("minProperties"), count("maxProperties"));
        let Some(Value::Object(properties)) = fields.get("properties") else {
            return;
        };
        let required = fields.get("required").and_then(Value::as_array);
        let required: BTreeSet<&str> = (required.into_iter().flatten())
            .filter_map(Value::as_str)
            .collect();
        let optional = properties.keys().any(|name| !required.contains(&**name));
        let closed = fields.get("additionalProperties") == Some(&Value::Bool(false))
            && !fields.contains_key("patternProperties");
        let given = required.len() as u64;
        let all = properties.len() as u64;
        // A limit that always holds need not be enforced.
        let least = least.filter(|least| *least > given);
        let most = most.filter(|most| !closed || *most < all);
        let one = least.is_none_or(|least| least <= given + 1)
            && most.is_none_or(|most| most == given + 1);
        let countable = !optional || (closed && one);
        for (keyword, limit) in [("minProperties", least), ("maxProperties", most)] {
            let unenforced = limit.is_some() && !countable;
            if limit.is_none() || (unenforced && self.lenient) {
                fields.shift_remove(keyword);
            }
            if unenforced && self.lenient {
                self.mark_unenforced(keyword);
            }
        }
    }

    /// Expresses `propertyNames` by the properties themselves, if possible.
    fn property_names(&mut self, fields: &mut Map<String, Value>) {
        let Some(names) = fields.get("propertyNames") else {
            return;
        };
        let Some(names) = Names::of(&self.root, names) else {
            return;
        };
        let said = match names {
            Names::Any => true,
            Names::List(list) => self.restrict_names_to_list(&list, fields),
            Names::Pattern(pattern) => self.restrict_names_to_pattern(&pattern, fields),
        };
        if said {
            fields.shift_remove("propertyNames");
        }
    }

    /// Restricts the property names of an object to a list. Returns whether this was possible.
    fn restrict_names_to_list(&mut self, list: &[String], fields: &mut Map<String, Value>) -> bool {
        let Some(own) = own_properties(fields) else {
            return false;
        };
        let other = fields
            .get("additionalProperties")
            .unwrap_or(&Value::Bool(true));
        let bytes = other.to_string().len().saturating_mul(list.len());
        self.growth = self.growth.saturating_add(bytes);
        if self.growth > MAX_GROWTH || !requires_only(fields, |name| list.contains(name)) {
            return false;
        }
        let listed = |name: &String| list.contains(name);
        let mut properties: Map<String, Value> = own
            .iter()
            .filter(|(name, _)| listed(name))
            .map(|(name, schema)| (name.clone(), schema.clone()))
            .collect();
        if other != &Value::Bool(false) {
            for name in list {
                if !properties.contains_key(name) {
                    properties.insert(name.clone(), other.clone());
                }
            }
        }
        fields.insert("properties".to_owned(), properties.into());
        fields.insert("additionalProperties".to_owned(), false.into());
        true
    }

    /// Restricts the property names of an object to a pattern. Returns whether this was
    /// possible.
    fn restrict_names_to_pattern(
        &mut self,
        pattern: &str,
        fields: &mut Map<String, Value>,
    ) -> bool {
        let Some(own) = own_properties(fields) else {
            return false;
        };
        let Ok(regex) = fancy_regex::Regex::new(pattern) else {
            return false;
        };
        // If matching exceeds the limits of the engine, the name counts as not matching.
        let fits = |name: &String| regex.is_match(name).unwrap_or(false);
        if !requires_only(fields, fits) {
            return false;
        }
        let mut unenforced = false;
        let pattern = match relaxed(pattern) {
            None => pattern.to_owned(),
            Some(_) if !self.lenient => return false,
            Some(relaxed) => {
                unenforced = !relaxed.exact || !relaxed.also.is_empty();
                relaxed.pattern
            }
        };
        if unenforced {
            self.mark_unenforced("propertyNames");
        }
        let kept = own.iter().filter(|(name, _)| fits(name));
        let kept: Map<_, _> = kept
            .map(|(name, schema)| (name.clone(), schema.clone()))
            .collect();
        let other = fields.get("additionalProperties").cloned();
        let other = other.unwrap_or(Value::Bool(true));
        fields.insert("properties".to_owned(), kept.into());
        fields.insert("additionalProperties".to_owned(), false.into());
        if other != Value::Bool(false) {
            let patterns = json!({pattern: other});
            fields.insert("patternProperties".to_owned(), patterns);
        }
        true
    }
}

/// Property names that `propertyNames` allows.
enum Names {
    Any,
    List(Vec<String>),
    Pattern(String),
}

impl Names {
    /// Returns the names that `schema` allows, or `None` if they cannot be determined.
    fn of(root: &Value, schema: &Value) -> Option<Self> {
        let mut schema = schema;
        for _ in 0..MAX_REFERENCES {
            let Some(reference) = schema.get("$ref") else {
                break;
            };
            schema = root.pointer(reference.as_str()?.strip_prefix('#')?)?;
        }
        let fields = match schema {
            Value::Bool(true) => return Some(Self::Any),
            Value::Object(fields) => fields,
            _ => return None,
        };
        const DESCRIBES: [&str; 6] = [
            "$comment",
            "default",
            "description",
            "examples",
            "format",
            "title",
        ];
        let mut said = Vec::new();
        for (keyword, value) in fields {
            match keyword.as_str() {
                // Names are always strings.
                "type" if value == "string" => {}
                "format" if FORMATS.iter().any(|format| value == format) => return None,
                keyword if DESCRIBES.contains(&keyword) => {}
                keyword => said.push((keyword, value)),
            }
        }
        match said.as_slice() {
            [] => Some(Self::Any),
            [("const", Value::String(name))] => Some(Self::List(vec![name.clone()])),
            [("enum", Value::Array(names))] => {
                // Values other than strings cannot be names.
                let names = names.iter().filter_map(Value::as_str);
                Some(Self::List(names.map(str::to_owned).collect()))
            }
            [("pattern", Value::String(pattern))] => Some(Self::Pattern(pattern.clone())),
            lengths => {
                let (mut least, mut most) = (0, None);
                for (keyword, value) in lengths {
                    match *keyword {
                        "minLength" => least = value.as_u64()?,
                        "maxLength" => most = Some(value.as_u64()?),
                        _ => return None,
                    }
                }
                let most = most.map(|most| most.to_string()).unwrap_or_default();
                Some(Self::Pattern(format!("^(?s:.{{{least},{most}}})$")))
            }
        }
    }
}

/// Returns the properties that a schema declares by name. Returns `None` if it also
/// declares properties by pattern.
fn own_properties(fields: &Map<String, Value>) -> Option<Map<String, Value>> {
    if fields.contains_key("patternProperties") {
        return None;
    }
    match fields.get("properties") {
        None => Some(Map::new()),
        Some(Value::Object(properties)) => Some(properties.clone()),
        Some(_) => None,
    }
}

/// Returns whether `fits` holds for all names that a schema requires.
fn requires_only(fields: &Map<String, Value>, fits: impl Fn(&String) -> bool) -> bool {
    let required = fields.get("required").and_then(Value::as_array);
    let mut required = required.into_iter().flatten();
    required.all(|name| match name {
        Value::String(name) => fits(name),
        _ => false,
    })
}

/// Removes an unknown format, which is only an annotation.
fn format(fields: &mut Map<String, Value>) {
    let known = |format: &Value| FORMATS.iter().any(|known| format == known);
    if fields
        .get("format")
        .is_some_and(|format| format.is_string() && !known(format))
    {
        fields.shift_remove("format");
    }
}

/// Removes `uniqueItems` if it is false or if there can be at most one item.
fn unique_items(fields: &mut Map<String, Value>) {
    let Some(Value::Bool(unique)) = fields.get("uniqueItems") else {
        return;
    };
    let most = fields.get("maxItems").and_then(Value::as_u64);
    if !unique || most.is_some_and(|most| most < 2) {
        fields.shift_remove("uniqueItems");
    }
}

/// Returns all patterns in a schema.
pub(super) fn patterns(schema: &Value) -> BTreeSet<String> {
    let (mut patterns, mut todo) = (BTreeSet::new(), vec![schema]);
    while let Some(value) = todo.pop() {
        match value {
            Value::Array(values) => todo.extend(values),
            Value::Object(fields) => {
                if let Some(Value::String(pattern)) = fields.get("pattern") {
                    patterns.insert(pattern.clone());
                }
                todo.extend(fields.values());
            }
            _ => {}
        }
    }
    patterns
}

/// Removes the given patterns from a schema.
pub(super) fn without_patterns(schema: &mut Value, left_out: &BTreeSet<String>) {
    match schema {
        Value::Array(values) => {
            for value in values {
                without_patterns(value, left_out);
            }
        }
        Value::Object(fields) => {
            let out = |pattern: &str| left_out.contains(pattern);
            if (fields.get("pattern").and_then(Value::as_str)).is_some_and(out) {
                fields.shift_remove("pattern");
            }
            for value in fields.values_mut() {
                without_patterns(value, left_out);
            }
        }
        _ => {}
    }
}

/// Removes `patternProperties` with several patterns, because these may overlap.
pub(super) fn without_overlaps(schema: &mut Value) {
    match schema {
        Value::Array(values) => values.iter_mut().for_each(without_overlaps),
        Value::Object(fields) => {
            let several = fields.get("patternProperties").and_then(Value::as_object);
            if several.is_some_and(|patterns| patterns.len() > 1) {
                fields.shift_remove("patternProperties");
            }
            fields.values_mut().for_each(without_overlaps);
        }
        _ => {}
    }
}

/// Returns whether any object in a value has this key.
pub(super) fn has_key(value: &Value, key: &str) -> bool {
    let mut todo = vec![value];
    while let Some(value) = todo.pop() {
        match value {
            Value::Array(values) => todo.extend(values),
            Value::Object(fields) if fields.contains_key(key) => return true,
            Value::Object(fields) => todo.extend(fields.values()),
            _ => {}
        }
    }
    false
}
