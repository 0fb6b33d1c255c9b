//! JSON schemas made ready for the compiler: what only describes is left out, and what the
//! compiler has no words for is said in those that it has, as far as that goes.

use super::pattern::relaxed;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// The formats that the compiler knows. All others are annotations, as JSON Schema has it.
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

/// The drafts that the compiler knows.
const DRAFTS: [&str; 5] = [
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
];

/// The most that one schema may grow by what is said in other words, in bytes.
const MAX_GROWTH: usize = 64 << 10;

/// How many references to names are followed.
const MAX_REFERENCES: usize = 16;

/// Rewrites a schema.
pub(super) struct Rewriter {
    root: Value,
    /// Whether what cannot be held may be left out. If not, it stays, and the compiler
    /// refuses it by name.
    lenient: bool,
    growth: usize,
    /// The keywords that were left out though they say something.
    pub unheld: BTreeSet<String>,
}

impl Rewriter {
    pub fn new(schema: &Value, lenient: bool) -> Self {
        Self {
            root: schema.clone(),
            lenient,
            growth: 0,
            unheld: BTreeSet::new(),
        }
    }

    /// The schema in words that the compiler knows. Its depth must be bounded.
    pub fn rewrite(&mut self) -> Value {
        let mut schema = self.root.clone();
        self.schema(&mut schema);
        schema
    }

    fn unheld(&mut self, keyword: &str) {
        self.unheld.insert(keyword.to_owned());
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

    /// A dialect of its own is read as the latest draft.
    fn draft(&mut self, fields: &mut Map<String, Value>) {
        let known = |draft: &Value| {
            let draft = draft.as_str().unwrap_or_default();
            DRAFTS.contains(&draft.trim_end_matches('#'))
        };
        if self.lenient && fields.get("$schema").is_some_and(|draft| !known(draft)) {
            fields.shift_remove("$schema");
            self.unheld("$schema");
        }
    }

    /// Looking around is left out of a pattern, or made into patterns of their own.
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
            self.unheld("pattern");
        }
        fields.insert("pattern".to_owned(), relaxed.pattern.into());
        if relaxed.also.is_empty() {
            return;
        }
        let also = relaxed.also.into_iter();
        let also = also.map(|pattern| json!({"type": "string", "pattern": pattern}));
        let also: Vec<Value> = also.collect();
        // A string has all patterns; what is no string has none.
        let other = ["array", "boolean", "null", "number", "object"];
        let strings = fields.get("type").is_some_and(|kind| kind == "string");
        let all = also.into_iter().map(|schema| match strings {
            true => schema,
            false => json!({"anyOf": [schema, {"type": other}]}),
        });
        match fields.entry("allOf").or_insert_with(|| json!([])) {
            Value::Array(schemas) => schemas.extend(all),
            _ => self.unheld("pattern"),
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
        let mut unheld = false;
        *patterns = each
            .map(|(pattern, schema)| match relaxed(&pattern) {
                Some(relaxed) => {
                    unheld |= !relaxed.exact || !relaxed.also.is_empty();
                    (relaxed.pattern, schema)
                }
                None => (pattern, schema),
            })
            .collect();
        if unheld {
            self.unheld("patternProperties");
        }
    }

    /// The compiler counts no properties that may be left out, but for one of several.
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
        // What is always so need not be counted.
        let least = least.filter(|least| *least > given);
        let most = most.filter(|most| !closed || *most < all);
        let one = least.is_none_or(|least| least <= given + 1)
            && most.is_none_or(|most| most == given + 1);
        let countable = !optional || (closed && one);
        for (keyword, limit) in [("minProperties", least), ("maxProperties", most)] {
            let unheld = limit.is_some() && !countable;
            if limit.is_none() || (unheld && self.lenient) {
                fields.shift_remove(keyword);
            }
            if unheld && self.lenient {
                self.unheld(keyword);
            }
        }
    }

    /// Says which names an object's properties may have by the properties themselves.
    fn property_names(&mut self, fields: &mut Map<String, Value>) {
        let Some(names) = fields.get("propertyNames") else {
            return;
        };
        let Some(names) = Names::of(&self.root, names) else {
            return;
        };
        let said = match names {
            Names::Any => true,
            Names::List(list) => self.named(&list, fields),
            Names::Pattern(pattern) => self.patterned(&pattern, fields),
        };
        if said {
            fields.shift_remove("propertyNames");
        }
    }

    /// An object whose properties have names out of a list.
    fn named(&mut self, list: &[String], fields: &mut Map<String, Value>) -> bool {
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

    /// An object whose properties have names of a pattern.
    fn patterned(&mut self, pattern: &str, fields: &mut Map<String, Value>) -> bool {
        let Some(own) = own_properties(fields) else {
            return false;
        };
        let Ok(regex) = fancy_regex::Regex::new(pattern) else {
            return false;
        };
        // Too hard to tell counts as no.
        let fits = |name: &String| regex.is_match(name).unwrap_or(false);
        if !requires_only(fields, fits) {
            return false;
        }
        let mut unheld = false;
        let pattern = match relaxed(pattern) {
            None => pattern.to_owned(),
            Some(_) if !self.lenient => return false,
            Some(relaxed) => {
                unheld = !relaxed.exact || !relaxed.also.is_empty();
                relaxed.pattern
            }
        };
        if unheld {
            self.unheld("propertyNames");
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

/// The names that `propertyNames` leaves.
enum Names {
    Any,
    List(Vec<String>),
    Pattern(String),
}

impl Names {
    /// `None` if they cannot be told.
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
                // All names are strings.
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
                // What is no string is no name.
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

/// The properties that a schema describes itself; `None` if it does so by patterns, too.
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

/// Whether all names that a schema requires are such.
fn requires_only(fields: &Map<String, Value>, fits: impl Fn(&String) -> bool) -> bool {
    let required = fields.get("required").and_then(Value::as_array);
    let mut required = required.into_iter().flatten();
    required.all(|name| match name {
        Value::String(name) => fits(name),
        _ => false,
    })
}

/// Formats that are not known say nothing that could be held.
fn format(fields: &mut Map<String, Value>) {
    let known = |format: &Value| FORMATS.iter().any(|known| format == known);
    if fields
        .get("format")
        .is_some_and(|format| format.is_string() && !known(format))
    {
        fields.shift_remove("format");
    }
}

/// Items are unique where there are no two of them.
fn unique_items(fields: &mut Map<String, Value>) {
    let Some(Value::Bool(unique)) = fields.get("uniqueItems") else {
        return;
    };
    let most = fields.get("maxItems").and_then(Value::as_u64);
    if !unique || most.is_some_and(|most| most < 2) {
        fields.shift_remove("uniqueItems");
    }
}

/// All patterns of a schema, each once.
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

/// Leaves these patterns out of a schema.
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

/// Leaves several patterns of an object's names out where they may overlap.
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

/// Whether an object anywhere in a value has this key.
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
