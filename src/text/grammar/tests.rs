//! Tests of grammars over small tokenizers: what they allow, and what is rejected.

use super::answer::mark;
use super::*;
use crate::sampling::ConstraintState;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::{ToolDeclaration, ToolParser};
use crate::text::{EncodeOptions, GgufVocabulary};
use serde_json::json;
use std::time::{Duration, Instant};

/// Creates a byte-level tokenizer with all bytes, a few longer tokens, two tokens that end
/// an answer, and another special token.
fn tokenizer() -> Arc<Tokenizer> {
    let alphabet: Vec<u32> = (33..127).chain(161..173).chain(174..256).collect();
    let hidden = 256..256 + 256 - alphabet.len() as u32;
    let letters = alphabet.into_iter().chain(hidden);
    let mut tokens: Vec<String> = letters
        .filter_map(char::from_u32)
        .map(String::from)
        .collect();
    let mut token_types = vec![1; tokens.len()];
    let mut merges = Vec::new();
    for (left, right) in [
        ("t", "r"),
        ("tr", "u"),
        ("tru", "e"),
        (":", "Ġ"),
        ("{", "\""),
    ] {
        tokens.push(format!("{left}{right}"));
        token_types.push(1);
        merges.push(format!("{left} {right}"));
    }
    for special in ["<|endoftext|>", "<|im_end|>", "<|tool|>"] {
        tokens.push(special.to_owned());
        token_types.push(3);
    }
    let id = |text: &str| tokens.iter().position(|token| token == text);
    let eos = id("<|endoftext|>").and_then(|id| u32::try_from(id).ok());
    let vocabulary = GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        eos,
        tokens,
        merges,
        token_types,
        ..GgufVocabulary::default()
    };
    Arc::new(vocabulary.into_tokenizer().unwrap())
}

/// State of an answer whose text so far is given.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing may follow the text.
    Complete,
    /// The answer may end here, or continue.
    MayEnd,
    /// The answer may not end here.
    Beginning,
    /// The byte at this index is forbidden.
    Wrong(usize),
}

/// Feeds a text byte by byte and checks every mask.
fn answer(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> Answer {
    let allowed = |mask: &[u32], token: u32| mask[token as usize / 32] >> (token % 32) & 1 == 1;
    let vocabulary = tokenizer.vocabulary_size();
    let mut state = ConstraintState::new(grammar.constraint(), vocabulary);
    let mut complete = false;
    // First position where no allowed token continues the text.
    let mut stuck = None;
    for (at, byte) in text.bytes().enumerate() {
        assert!(!complete, "it is complete before byte {at} of {text}");
        state.refresh().unwrap();
        let goes_on = (0..vocabulary as u32)
            .filter(|&id| allowed(state.mask(), id) && !tokenizer.is_special(id))
            .filter_map(|id| tokenizer.token_bytes(id))
            .any(|bytes| text.as_bytes()[at..].starts_with(bytes));
        stuck = stuck.or((!goes_on).then_some(at));
        let single = (0..vocabulary as u32)
            .find(|&id| tokenizer.token_bytes(id) == Some(&[byte]))
            .unwrap();
        match state.accept(single) {
            Ok(done) => complete = done,
            Err(_) => return Answer::Wrong(at),
        }
    }
    if !complete {
        state.refresh().unwrap();
    }
    let ends: Vec<bool> = tokenizer
        .end_tokens()
        .iter()
        .map(|&end| complete || allowed(state.mask(), end))
        .collect();
    assert_eq!(ends.len(), 2);
    assert_eq!(ends[0], ends[1], "all end tokens, or none");
    if ends[0] {
        assert_eq!(stuck, None, "{text}: no token may come there");
    }
    if complete {
        return Answer::Complete;
    }
    match ends[0] {
        true => Answer::MayEnd,
        false => Answer::Beginning,
    }
}

fn schema(schema: Value) -> Result<Grammar, GrammarError> {
    Grammar::json_schema(&tokenizer(), &schema)
}

#[test]
fn json_of_a_schema_is_allowed_and_nothing_else() {
    let tokenizer = tokenizer();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let grammar = Grammar::json_schema(&tokenizer, &schema).unwrap();
    let answer = |text| answer(&tokenizer, &grammar, text);
    for whole in [
        r#"{"name":"x","age":7}"#,
        r#"{"name": "é\n\u0007", "age": 130}"#,
        r#"{"name":"","age":0,"tags":["a","b"]}"#,
        r#"{"name":"","age":0, "tags": []}"#,
    ] {
        assert_eq!(answer(whole), Answer::Complete, "{whole}");
    }
    assert_eq!(answer(r#"{"name":"x""#), Answer::Beginning);
    for (wrong, at) in [
        (r#" {"#, 0),
        (r#"{ "#, 1),
        (r#"{"age":7"#, 2),
        (r#"{"name":  "x""#, 9),
        (r#"{"name":7"#, 8),
        (r#"{"name":"x"}"#, 11),
        (r#"{"name":"x","age":131"#, 20),
        (r#"{"name":"x","age":7,"more":1}"#, 21),
        (r#"{"name":"x","age":7,"tags":["a","b","a"]}"#, 35),
    ] {
        assert_eq!(answer(wrong), Answer::Wrong(at), "{wrong}");
    }
}

#[test]
fn a_number_may_end_where_it_may_go_on() {
    let tokenizer = tokenizer();
    let grammar = Grammar::json_schema(&tokenizer, &json!({"type": "integer"})).unwrap();
    assert_eq!(answer(&tokenizer, &grammar, "-"), Answer::Beginning);
    assert_eq!(answer(&tokenizer, &grammar, "-12"), Answer::MayEnd);
}

#[test]
fn a_json_object_is_any_object_without_room_for_blanks() {
    let tokenizer = tokenizer();
    let grammar = Grammar::json_object(&tokenizer).unwrap();
    let answer = |text| answer(&tokenizer, &grammar, text);
    for whole in ["{}", r#"{"a": [1, -2.5e3, {"b":null}], "c": "true"}"#] {
        assert_eq!(answer(whole), Answer::Complete);
    }
    assert_eq!(answer("[1]"), Answer::Wrong(0));
    for blanks in [
        "{ ",
        "{\n",
        r#"{"a" "#,
        r#"{"a":  "#,
        r#"{"a": 1 "#,
        r#"{"a": 1,  "#,
    ] {
        assert_eq!(
            answer(blanks),
            Answer::Wrong(blanks.len() - 1),
            "{blanks:?}"
        );
    }
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    let tokenizer = tokenizer();
    for regex in ["[0-9]{3}-x?", "^[0-9]{3}-x?$"] {
        let grammar = Grammar::regex(&tokenizer, regex).unwrap();
        let answer = |text| answer(&tokenizer, &grammar, text);
        assert_eq!(answer("123"), Answer::Beginning);
        assert_eq!(answer("123-"), Answer::MayEnd);
        assert_eq!(answer("123-x"), Answer::Complete);
        assert_eq!(answer("12a"), Answer::Wrong(2));
    }
    let slash = Grammar::regex(&tokenizer, r"a/\$\n").unwrap();
    assert_eq!(answer(&tokenizer, &slash, "a/$\n"), Answer::Complete);
}

#[test]
fn a_choice_is_one_of_its_texts_also_where_one_begins_another() {
    let tokenizer = tokenizer();
    let choices = ["yes", "yes, sure", "no.*", "\"Ü\"\n"];
    let grammar = Grammar::choice(&tokenizer, &choices).unwrap();
    let answer = |text| answer(&tokenizer, &grammar, text);
    assert_eq!(answer("yes"), Answer::MayEnd);
    for whole in &choices[1..] {
        assert_eq!(answer(whole), Answer::Complete);
    }
    assert_eq!(answer("ye"), Answer::Beginning);
    assert_eq!(answer("no way"), Answer::Wrong(2));
    assert_eq!(grammar.kind(), GrammarKind::Choice);
}

#[test]
fn a_grammar_is_followed_and_can_name_a_special_token() {
    let tokenizer = tokenizer();
    let source = r#"
        start: sum
        sum: term | sum "+" term
        term: NUMBER | "(" sum ")"
        NUMBER: /[0-9]+/
    "#;
    let grammar = Grammar::lark(&tokenizer, source).unwrap();
    assert_eq!(answer(&tokenizer, &grammar, "(1+(2+33))"), Answer::MayEnd);
    assert_eq!(answer(&tokenizer, &grammar, "(1+(2+33"), Answer::Beginning);
    assert_eq!(answer(&tokenizer, &grammar, "1+2"), Answer::MayEnd);
    assert_eq!(answer(&tokenizer, &grammar, "1++"), Answer::Wrong(2));

    let grammar = Grammar::lark(&tokenizer, r#"start: <|tool|> "x""#).unwrap();
    let tool = tokenizer.id_of("<|tool|>").unwrap();
    let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
    state.refresh().unwrap();
    let bits: u32 = state.mask().iter().map(|word| word.count_ones()).sum();
    assert_eq!(bits, 1);
    assert!(!state.accept(tool).unwrap());
    assert_eq!(answer(&tokenizer, &grammar, "<|tool|>"), Answer::Wrong(0));
}

#[test]
fn an_answer_shares_no_state_with_another_of_the_same_grammar() {
    let tokenizer = tokenizer();
    let grammar = Grammar::regex(&tokenizer, "[ab]{4}").unwrap();
    let vocabulary = tokenizer.vocabulary_size();
    let mut first = ConstraintState::new(grammar.constraint(), vocabulary);
    let id = |text| tokenizer.id_of(text).unwrap();
    assert!(!first.accept(id("a")).unwrap());
    let mut copy = first.clone();
    assert!(first.accept(id("c")).is_err());
    for last in [false, false, true] {
        assert_eq!(copy.accept(id("b")), Ok(last));
    }
    let mut again = ConstraintState::new(grammar.constraint(), vocabulary);
    assert!(!again.accept(id("b")).unwrap());
}

#[test]
fn what_a_schema_cannot_have_is_refused_by_name() {
    for (wrong, name) in [
        (json!({"type": "strnig"}), "strnig"),
        (
            json!({"type": "object", "dependentRequired": {"a": ["b"]}}),
            "dependentRequired",
        ),
        (json!({"not": {"type": "string"}}), "not"),
        (json!({"type": "string", "pattern": "("}), "("),
        (
            json!({"$ref": "https://example.org/schema.json"}),
            "example.org",
        ),
        (
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            "minimum",
        ),
        (json!({"enum": []}), "empty"),
        (
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
            "no token",
        ),
        (json!(7), "object"),
        (json!(false), "false"),
    ] {
        let error = schema(wrong.clone()).unwrap_err();
        assert!(matches!(error, GrammarError::Refused { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(name), "{wrong}: {text}");
        assert!(text.len() < 500 && !text.contains("backtrace"), "{text}");
    }
    let tokenizer = tokenizer();
    for regex in ["(", "a(?=b)", r"(a)\1", "a^b"] {
        assert!(Grammar::regex(&tokenizer, regex).is_err(), "{regex}");
    }
    for lark in ["", "start: nothing", "start: \"a", "a: \"b\""] {
        assert!(Grammar::lark(&tokenizer, lark).is_err(), "{lark}");
    }
    assert!(Grammar::choice::<&str>(&tokenizer, &[]).is_err());
    assert!(Grammar::choice(&tokenizer, &["a", ""]).is_err());
}

#[test]
fn compile_options_in_a_schema_are_ignored() {
    let flexible = json!({"type": "object", "x-guidance": {"whitespace_flexible": true}});
    let grammar = schema(flexible).unwrap();
    assert_eq!(answer(&tokenizer(), &grammar, "{ "), Answer::Wrong(1));
}

#[test]
fn what_is_too_long_or_nested_too_deep_is_refused_before_it_is_compiled() {
    let tokenizer = tokenizer();
    let mut deep = json!({"type": "string"});
    for _ in 0..MAX_DEPTH {
        deep = json!({"items": deep});
    }
    let too_deep = |result: Result<Grammar, GrammarError>| {
        assert!(
            matches!(result, Err(GrammarError::TooDeep { .. })),
            "{result:?}"
        );
    };
    let too_long = |result: Result<Grammar, GrammarError>| {
        assert!(
            matches!(result, Err(GrammarError::TooLong { .. })),
            "{result:?}"
        );
    };
    too_deep(Grammar::json_schema(&tokenizer, &deep));
    too_long(schema(json!({"description": "x".repeat(MAX_SCHEMA_BYTES)})));
    too_deep(Grammar::regex(&tokenizer, &"(".repeat(MAX_DEPTH + 1)));
    too_long(Grammar::regex(&tokenizer, &"a".repeat(MAX_TEXT_BYTES + 1)));
    let names = (0..=MAX_PROPERTIES).map(|index| (format!("p{index}"), json!({})));
    let names: serde_json::Map<String, Value> = names.collect();
    let error = schema(json!({"properties": names})).unwrap_err();
    assert!(error.to_string().contains("2001 properties"), "{error}");
    too_long(Grammar::choice(&tokenizer, &vec!["abc"; MAX_SCHEMA_BYTES]));
    assert!(Grammar::regex(&tokenizer, &r"\(".repeat(MAX_DEPTH + 1)).is_ok());
}

/// Checks that compiling a grammar and taking a few steps ends, with or without an error.
fn survives(what: &str, compile: impl FnOnce(&Arc<Tokenizer>) -> Result<Grammar, GrammarError>) {
    let tokenizer = tokenizer();
    Grammar::prepare(&tokenizer).unwrap();
    let began = Instant::now();
    let grammar = match compile(&tokenizer) {
        Ok(grammar) => grammar,
        Err(error) => {
            println!("{what}: {error} after {:?}", began.elapsed());
            return;
        }
    };
    let (mut worst, compiled) = (Duration::ZERO, began.elapsed());
    let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
    let mut steps = 0;
    let end = loop {
        let began = Instant::now();
        if let Err(error) = state.refresh() {
            break error.to_string();
        }
        let allowed = |&id: &u32| state.mask()[id as usize / 32] >> (id % 32) & 1 == 1;
        let ids = 0..tokenizer.vocabulary_size() as u32;
        let token = ids
            .clone()
            .filter(allowed)
            .find(|id| !tokenizer.is_special(*id));
        let Some(token) = token else {
            break "it may only end".to_owned();
        };
        match state.accept(token) {
            Ok(false) if steps < 60 => steps += 1,
            other => break format!("{other:?}"),
        }
        worst = worst.max(began.elapsed());
    };
    println!("{what}: {compiled:?}, {steps} steps, {worst:?} the longest, {end}");
}

#[test]
fn hostile_grammars_end_with_an_answer_or_an_error() {
    let names = |count: usize| (0..count).map(|index| format!("p{index}"));
    survives("many optional properties", |tokenizer| {
        let properties: serde_json::Map<String, Value> = names(MAX_PROPERTIES)
            .map(|name| (name, json!({})))
            .collect();
        Grammar::json_schema(
            tokenizer,
            &json!({"properties": properties, "type": "object"}),
        )
    });
    survives("a product of choices", |tokenizer| {
        let any: Vec<Value> = names(12)
            .map(|name| json!({"properties": {name: {"type": "string"}}}))
            .collect();
        let all: Vec<Value> = (0..12).map(|_| json!({"anyOf": any})).collect();
        Grammar::json_schema(tokenizer, &json!({"allOf": all}))
    });
    survives("references in a circle", |tokenizer| {
        let schema = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
        Grammar::json_schema(tokenizer, &schema)
    });
    survives("a chain of references", |tokenizer| {
        let next = |index: usize| json!({"$ref": format!("#/$defs/d{}", index + 1)});
        let mut definitions: serde_json::Map<String, Value> = (0..3000)
            .map(|index| (format!("d{index}"), next(index)))
            .collect();
        definitions.insert("d3000".to_owned(), json!({"type": "null"}));
        Grammar::json_schema(
            tokenizer,
            &json!({"$ref": "#/$defs/d0", "$defs": definitions}),
        )
    });
    survives("a long string", |tokenizer| {
        let schema = json!({"type": "string", "minLength": 1_000_000_000});
        Grammar::json_schema(tokenizer, &schema)
    });
    survives("a long array", |tokenizer| {
        let items =
            json!({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000});
        Grammar::json_schema(tokenizer, &items)
    });
    survives("nested arrays", |tokenizer| {
        let mut schema = json!({"type": "null"});
        for _ in 0..60 {
            schema = json!({"type": "array", "items": schema, "minItems": 2, "maxItems": 90});
        }
        Grammar::json_schema(tokenizer, &schema)
    });
    survives("a large enumeration", |tokenizer| {
        let names: Vec<String> = names(14_000).collect();
        Grammar::json_schema(tokenizer, &json!({"enum": names}))
    });
    for regex in [
        "((a{1,1000}){1,1000}){1,1000}",
        "(a|b)*a(a|b){30}",
        "(a*)*b",
        "(.*a){20}",
        r"(\w+\s?)*\d{900}",
        r"[\p{L}]{1,500}[\p{N}]{1,500}",
    ] {
        survives(regex, |tokenizer| Grammar::regex(tokenizer, regex));
    }
    survives("nested groups", |tokenizer| {
        let regex = format!("{}a{}", "(b|".repeat(120), ")*".repeat(120));
        Grammar::regex(tokenizer, &regex)
    });
    survives("a long alternation", |tokenizer| {
        let names: Vec<String> = names(14_000).collect();
        Grammar::choice(tokenizer, &names)
    });
    survives("a chain of rules", |tokenizer| {
        let rule = |index: usize| format!("r{index}: r{} | \"a\"\n", index + 1);
        let rules: String = (0..1200).map(rule).collect();
        Grammar::lark(tokenizer, &format!("start: r0\n{rules}r1200: \"b\"\n"))
    });
    survives("a chain of terminals", |tokenizer| {
        let rule = |index: usize| format!("T{index}: T{} \"a\"\n", index + 1);
        let rules: String = (0..1200).map(rule).collect();
        Grammar::lark(tokenizer, &format!("start: T0\n{rules}T1200: \"b\"\n"))
    });
    survives("an ambiguous grammar", |tokenizer| {
        Grammar::lark(tokenizer, "start: e\ne: e e | e e e | \"a\" | \"\"\n")
    });
    survives("rules in a circle", |tokenizer| {
        Grammar::lark(tokenizer, "start: a\na: b\nb: a\n")
    });
}

#[test]
fn a_scored_tokenizer_with_bytes_and_unused_tokens_serves_grammars_too() {
    // As in SentencePiece: a space before the first word, and bytes for everything else.
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut token_types = vec![2, 3, 3];
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
    }
    for (piece, kind) in [
        ("\u{2581}", 1),
        ("a", 1),
        ("ab", 1),
        ("\u{2581}ab", 1),
        ("b", 1),
        ("x", 5),
    ] {
        tokens.push(piece.to_owned());
        token_types.push(kind);
    }
    let vocabulary = GgufVocabulary {
        model: "llama".to_owned(),
        scores: (0..tokens.len()).map(|index| -(index as f32)).collect(),
        bos: Some(1),
        eos: Some(2),
        tokens,
        token_types,
        ..GgufVocabulary::default()
    };
    let tokenizer = Arc::new(vocabulary.into_tokenizer().unwrap());
    let encoded = tokenizer.encode("ab", EncodeOptions::default()).unwrap();
    assert_eq!(encoded.len(), 1);
    let grammar = Grammar::regex(&tokenizer, "ab|x b").unwrap();
    let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
    state.refresh().unwrap();
    let names: Vec<&str> = (0..tokenizer.vocabulary_size() as u32)
        .filter(|id| state.mask()[*id as usize / 32] >> (id % 32) & 1 == 1)
        .filter_map(|id| tokenizer.token_text(id))
        .collect();
    // "x" is unused, so its byte is allowed. "▁ab" begins with a space, which is not allowed.
    assert_eq!(names, ["<0x61>", "<0x78>", "a", "ab"]);
    assert_eq!(state.accept(tokenizer.id_of("<0x78>").unwrap()), Ok(false));
    assert_eq!(
        state.accept(tokenizer.id_of("\u{2581}").unwrap()),
        Ok(false)
    );
    assert_eq!(state.accept(tokenizer.id_of("b").unwrap()), Ok(true));
}

/// Compiles a grammar from a schema, and drops what cannot be enforced.
fn lenient(schema: &Value) -> Grammar {
    let form = GrammarForm::JsonSchema(schema);
    Grammar::new(&tokenizer(), form, SchemaKeywords::Lenient)
        .unwrap_or_else(|error| panic!("{schema}: {error}"))
}

fn all(grammar: &Grammar) -> Vec<&str> {
    grammar.unenforced().iter().map(String::as_str).collect()
}

#[test]
fn formats_that_are_not_known_are_annotations() {
    let tokenizer = tokenizer();
    for format in [
        "password",
        "path",
        "json-string",
        "byte",
        "uri-reference",
        "regex",
    ] {
        let text = json!({"type": "string", "format": format, "maxLength": 5});
        let text = schema(json!({"anyOf": [text, {"type": "integer", "format": "int32"}]}));
        let grammar = text.unwrap();
        assert!(grammar.unenforced().is_empty());
        assert_eq!(answer(&tokenizer, &grammar, "\"a/b\\n\""), Answer::Complete);
        assert_eq!(answer(&tokenizer, &grammar, "\"abcdef"), Answer::Wrong(6));
    }
    let date = schema(json!({"type": "string", "format": "date"})).unwrap();
    assert_eq!(answer(&tokenizer, &date, "\"2026-02-30"), Answer::Wrong(9));
    // A property called `format` is an ordinary property.
    let named = json!({"properties": {"format": {"type": "string", "enum": ["zip"]}}, "required": ["format"]});
    let named = schema(named).unwrap();
    assert_eq!(
        answer(&tokenizer, &named, "{\"format\":\"zip\"}"),
        Answer::Complete
    );
    assert_eq!(
        answer(&tokenizer, &named, "{\"format\":1"),
        Answer::Wrong(10)
    );
}

#[test]
fn unenforceable_keywords_are_reported_or_rejected() {
    let tokenizer = tokenizer();
    for (wanted, names, right) in [
        (
            json!({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": true}),
            &["uniqueItems"][..],
            "[1, 1]",
        ),
        (
            json!({"type": "integer", "not": {"const": 3}}),
            &["not"],
            "3",
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "null"}}, "dependentRequired": {"a": ["b"]}, "additionalProperties": false}),
            &["dependentRequired"],
            "{\"a\":null}",
        ),
        (
            json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
            &["oneOf"],
            "1.5",
        ),
        (
            json!({"type": "string", "pattern": "^(?!b)[ab]{2}$"}),
            &["pattern"],
            "\"ba\"",
        ),
        (
            json!({"type": "string", "pattern": r"^([ab])\1$"}),
            &["pattern"],
            "\"abb\"",
        ),
        (
            json!({"type": "object", "patternProperties": {"^a": {"type": "null"}, "b$": {"type": "null"}}}),
            &["patternProperties"],
            "{\"ab\":null}",
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "minProperties": 1}),
            &["minProperties"],
            "{\"b\":null}",
        ),
        (
            json!({"$schema": "https://spec.openapis.org/oas/3.1/dialect/base", "type": "null"}),
            &["$schema"],
            "null",
        ),
    ] {
        let grammar = lenient(&wanted);
        assert_eq!(all(&grammar), names, "{wanted}");
        let end = answer(&tokenizer, &grammar, right);
        assert!(
            matches!(end, Answer::Complete | Answer::MayEnd),
            "{wanted}: {end:?}"
        );
        let refused = schema(wanted.clone());
        assert!(
            matches!(refused, Err(GrammarError::Refused { .. })),
            "{wanted}"
        );
    }
    // The rest of the schema is enforced.
    let list = lenient(&json!({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": true}));
    assert_eq!(answer(&tokenizer, &list, "[3"), Answer::Wrong(1));
    let address = lenient(
        &json!({"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)[a-z.]+@[a-z]+\.[a-z]{2,}$"}),
    );
    assert_eq!(all(&address), ["pattern"]);
    assert_eq!(
        answer(&tokenizer, &address, "\"a.b@c.de\""),
        Answer::Complete
    );
    assert_eq!(answer(&tokenizer, &address, "\"a.b@c\""), Answer::Wrong(6));
    // An invalid schema is still rejected.
    for wrong in [
        json!({"type": "strnig"}),
        json!({"pattern": "("}),
        json!({"enum": []}),
    ] {
        let refused = Grammar::new(
            &tokenizer,
            GrammarForm::JsonSchema(&wrong),
            SchemaKeywords::Lenient,
        );
        assert!(
            matches!(refused, Err(GrammarError::Refused { .. })),
            "{wrong}"
        );
    }
}

#[test]
fn keywords_that_can_be_rewritten_are_enforced() {
    let tokenizer = tokenizer();
    for (wanted, right, wrong) in [
        (
            json!({"type": "array", "items": {"type": "null"}, "uniqueItems": true, "maxItems": 1}),
            "[null]",
            ("[null,", 5),
        ),
        (
            json!({"type": "array", "items": {"type": "null"}, "uniqueItems": false, "maxItems": 2}),
            "[null,null]",
            ("[1", 1),
        ),
        (
            // Two look-aheads at the beginning of the text, as used for passwords.
            json!({"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d)[A-Za-z0-9]{3,6}$"}),
            "\"aB3\"",
            ("\"ab3\"", 4),
        ),
        (
            json!({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "null"}}),
            "{\"x\":null,\"y\":null}",
            ("{\"x\":1", 5),
        ),
        (
            json!({"type": "object", "propertyNames": {"pattern": "^[a-c]$"}, "additionalProperties": {"type": "null"}}),
            "{\"c\":null,\"a\":null}",
            ("{\"d", 2),
        ),
        (
            json!({"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "additionalProperties": {"type": "null"}}),
            "{\"abc\":null}",
            ("{\"a\"", 3),
        ),
        (
            json!({
                "type": "object",
                "propertyNames": {"$ref": "#/$defs/Name"},
                "additionalProperties": {"type": "null"},
                "$defs": {"Name": {"type": "string", "enum": ["left", "right"], "title": "Name"}},
            }),
            "{\"right\":null}",
            ("{\"top", 2),
        ),
        (
            json!({"type": "object", "properties": {"a": {"const": 1}, "z": {"const": 2}}, "propertyNames": {"enum": ["a", "b"]}}),
            "{\"a\":1,\"b\":[]}",
            ("{\"z", 2),
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "minProperties": 1, "additionalProperties": false}),
            "{\"a\":null,\"b\":null}",
            ("{}", 1),
        ),
        (
            json!({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "required": ["a"], "minProperties": 1, "maxProperties": 2, "additionalProperties": false}),
            "{\"a\":null,\"b\":null}",
            ("{\"b", 2),
        ),
        (
            json!({"type": "object", "properties": {"a1": {"const": 1}, "z": {"const": 2}}, "propertyNames": {"pattern": r"\d"}, "required": ["a1"]}),
            "{\"a1\":1,\"2\":3}",
            ("{\"z", 2),
        ),
    ] {
        for grammar in [lenient(&wanted), schema(wanted.clone()).unwrap()] {
            assert_eq!(all(&grammar), [""; 0], "{wanted}");
            assert_eq!(
                answer(&tokenizer, &grammar, right),
                Answer::Complete,
                "{wanted}"
            );
            let (wrong, at) = wrong;
            assert_eq!(
                answer(&tokenizer, &grammar, wrong),
                Answer::Wrong(at),
                "{wanted}"
            );
        }
    }
}

#[test]
fn a_schema_of_many_properties_can_be_answered_to_its_end() {
    let tokenizer = tokenizer();
    for required in [true, false] {
        let names = (0..1500).map(|index| format!("p{index}"));
        let properties: serde_json::Map<String, Value> = names
            .clone()
            .map(|name| (name, json!({"type": "null"})))
            .collect();
        let mut wanted = json!({
            "type": "object", "properties": properties, "additionalProperties": false,
        });
        let written = match required {
            true => {
                wanted["required"] = names.clone().collect();
                names.collect::<Vec<_>>()
            }
            false => ["p0", "p750", "p1499"].map(str::to_owned).to_vec(),
        };
        let fields: Vec<String> = written
            .iter()
            .map(|name| format!("\"{name}\":null"))
            .collect();
        let text = format!("{{{}}}", fields.join(","));
        let grammar = schema(wanted).unwrap();
        let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
        let mut complete = false;
        for (at, byte) in text.bytes().enumerate() {
            // Every mask can be computed, but that takes long.
            if at < 40 || at + 40 > text.len() || at % 1000 == 0 {
                state
                    .refresh()
                    .unwrap_or_else(|error| panic!("at {at}: {error}"));
            }
            let single = (0..tokenizer.vocabulary_size() as u32)
                .find(|&id| tokenizer.token_bytes(id) == Some(&[byte]));
            complete = (state.accept(single.unwrap()))
                .unwrap_or_else(|error| panic!("at {at} of {}: {error}", text.len()));
        }
        assert!(complete);
    }
}

#[test]
fn too_large_objects_are_rejected_when_compiled() {
    let object = |first: usize| {
        let names = (first..first + 1200).map(|index| (format!("p{index}"), json!({})));
        let properties: serde_json::Map<String, Value> = names.collect();
        json!({"type": "object", "properties": properties, "additionalProperties": false})
    };
    let objects: Vec<Value> = (0..4).map(|index| object(1200 * index)).collect();
    let error = schema(json!({"anyOf": objects})).unwrap_err();
    assert!(matches!(error, GrammarError::Refused { .. }), "{error}");
    assert!(schema(object(0)).is_ok());
}

/// Compiles a grammar for JSON of this schema or calls.
fn or_called(
    tokenizer: &Arc<Tokenizer>,
    form: &Value,
    keywords: SchemaKeywords,
    calls: GrammarCalls<'_>,
) -> Result<Grammar, GrammarError> {
    let wanted = GrammarAnswer {
        form: Some(GrammarForm::JsonSchema(form)),
        calls: Some(calls),
        ..GrammarAnswer::default()
    };
    Grammar::answer(tokenizer, wanted, keywords)
}

fn or_calls(format: ToolFormat, several: bool) -> (Arc<Tokenizer>, Grammar) {
    let tokenizer = tokenizer();
    let form = json!({
        "type": "object", "properties": {"answer": {"type": "string"}},
        "required": ["answer"], "additionalProperties": false,
    });
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "days": {"type": "integer"},
            "note": {"type": "string"},
        },
        "required": ["city"],
    });
    let calls = GrammarCalls {
        format,
        tools: &[("weather", Some(&parameters)), ("now", None)],
        several,
    };
    let grammar = or_called(&tokenizer, &form, SchemaKeywords::Strict, calls);
    (tokenizer, grammar.unwrap())
}

#[test]
fn an_answer_of_a_form_may_be_calls_instead_in_every_format() {
    let mut tested = Vec::new();
    for (format, calls, wrong) in [
        (
            ToolFormat::Hermes,
            &[
                "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>",
                "<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>",
                "<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>",
            ][..],
            "<tool_call>{\"name\":\"other",
        ),
        (
            ToolFormat::Llama,
            &[
                "{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}",
                "<|python_tag|>{\"name\":\"now\",\"parameters\":{}}",
                "{\"name\":\"now\",\"parameters\":{}}; {\"name\":\"now\",\"parameters\":{}}",
            ],
            "{\"name\":\"other",
        ),
        (
            ToolFormat::Mistral,
            &[
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}]",
                "[TOOL_CALLS][{\"name\":\"now\",\"arguments\":{}}, {\"name\":\"now\",\"arguments\":{}}]",
                "[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\", \"days\": 2}",
                "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}",
            ],
            "[TOOL_CALLS]other",
        ),
        (
            ToolFormat::Granite,
            &[
                "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}]",
                "<tool_call>[{\"name\":\"now\",\"arguments\":{}}]",
            ],
            "<tool_call>[]",
        ),
        (
            ToolFormat::DeepSeek,
            &[
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Rome\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            ],
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>other",
        ),
        (
            ToolFormat::Pythonic,
            &[
                "[weather(city=\"Rome\", days=2)]",
                "[weather(city='Paris'), now()]",
                "[weather(city=[True, None, {'a': -1.5}])]",
            ],
            "[weather(town",
        ),
        (
            ToolFormat::Lfm2,
            &[
                "<|tool_call_start|>[weather(city=\"Rome\", days=2)]<|tool_call_end|>",
                "<|tool_call_start|>[now(), now()]<|tool_call_end|>",
            ],
            "[now()]",
        ),
        (
            ToolFormat::QwenCoder,
            &[
                "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=note>\n1 < 2\n</para\n</parameter>\n</function>\n</tool_call>",
                "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
            ],
            "<tool_call>\n<function=weather>\n<parameter=days>\ntwo",
        ),
        (
            ToolFormat::Seed,
            &[
                "<seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n</seed:tool_call>",
                "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
            ],
            "<seed:tool_call>\n<function=weather>\n<parameter=city>London",
        ),
        (
            ToolFormat::Glm,
            &[
                "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>note</arg_key>\n<arg_value>\"a\" <b></arg_value>\n</tool_call>",
                "<tool_call>now\n</tool_call>\n<tool_call>now\n</tool_call>",
            ],
            "<tool_call>weather\n<arg_key>town",
        ),
        (
            ToolFormat::MiniMax,
            &[
                "<minimax:tool_call>\n<invoke name=\"weather\">\n<parameter name=\"city\">Rome</parameter>\n<parameter name=\"note\">a\nb</parameter>\n</invoke>\n</minimax:tool_call>",
                "<minimax:tool_call>\n<invoke name=\"now\">\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
            ],
            "<minimax:tool_call>\n<invoke name=\"other",
        ),
        (
            ToolFormat::Kimi,
            &[
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"city\": \"Rome\"}<|tool_call_end|><|tool_calls_section_end|>",
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            ],
            "<|tool_calls_section_begin|><|tool_call_begin|>now",
        ),
        (
            ToolFormat::Gemma,
            &[
                "<|tool_call>call:weather{city:<|\"|>Rome<|\"|>,days:2}<tool_call|>",
                "<|tool_call>call:weather{note:<|\"|>a <| \"b\" <|\"|>}<tool_call|>",
                "<|tool_call>call:now{}<tool_call|><|tool_call>call:now{}<tool_call|>",
            ],
            "<|tool_call>call:weather{town",
        ),
        (
            ToolFormat::Harmony,
            &[
                "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Rome\"}",
                "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}",
            ],
            "<|channel|>commentary to=functions.other",
        ),
        (
            ToolFormat::Nemotron,
            &[
                "<TOOLCALL>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}]</TOOLCALL>",
            ],
            "<TOOLCALL>[]",
        ),
        (
            ToolFormat::CommandR,
            &[
                "<|START_ACTION|>[{\"tool_name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}]<|END_ACTION|>",
                "<|START_ACTION|>[{\"tool_name\":\"now\",\"parameters\":{}}, {\"tool_name\":\"now\",\"parameters\":{}}]<|END_ACTION|>",
            ],
            "<|START_ACTION|>[]",
        ),
    ] {
        tested.push(format);
        let (tokenizer, grammar) = or_calls(format, true);
        let answer = |text: &str| answer(&tokenizer, &grammar, text);
        for text in calls.iter().chain(&["{\"answer\": \"It is sunny.\"}"]) {
            let end = answer(text);
            assert!(
                matches!(end, Answer::Complete | Answer::MayEnd),
                "{format:?} {text}: {end:?}"
            );
            // The parser finds the same calls and no others.
            let tools = ["weather", "now"].map(|name| ToolDeclaration::new(name, None));
            let mut parser = ToolParser::new(format, tools);
            parser.push(text);
            parser.finish();
            let found = text.matches("now").count() + text.matches("weather").count();
            assert_eq!(parser.calls(), found, "{format:?} {text}");
        }
        assert!(
            matches!(answer(wrong), Answer::Wrong(_)),
            "{format:?} {wrong}"
        );
        assert!(matches!(answer("It is"), Answer::Wrong(0)));
        assert!(matches!(answer("{\"answer\": 1"), Answer::Wrong(_)));
    }
    assert_eq!(tested.len(), ToolFormat::ALL.len(), "{tested:?}");
}

#[test]
fn only_one_call_is_allowed_unless_several() {
    let (tokenizer, grammar) = or_calls(ToolFormat::Hermes, false);
    let call = "<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>";
    assert_eq!(answer(&tokenizer, &grammar, call), Answer::Complete);
}

#[test]
fn calls_whose_mark_is_a_special_token_begin_with_it() {
    let tokenizer = tokenizer();
    let rules = ToolFormat::Hermes.call_rules(&[("f", None)], true, |text| {
        assert!(text.contains("tool_call"));
        mark(&tokenizer, "<|tool|>")
    });
    let tool = tokenizer.id_of("<|tool|>").unwrap();
    assert!(
        rules.lark.contains(&format!("<[{tool}]>")),
        "{}",
        rules.lark
    );
}

#[test]
fn a_tool_whose_schema_is_beyond_the_compiler_may_be_called_with_anything() {
    let tokenizer = tokenizer();
    let beyond = json!({"type": "object", "properties": {"a": {"$ref": "https://example.org/x"}}});
    let form = json!({"type": "integer"});
    let with = |keywords| {
        let tools = [("f", Some(&beyond))];
        let calls = GrammarCalls {
            several: true,
            ..GrammarCalls::new(ToolFormat::Hermes, &tools)
        };
        or_called(&tokenizer, &form, keywords, calls)
    };
    assert!(with(SchemaKeywords::Strict).is_err());
    let grammar = with(SchemaKeywords::Lenient).unwrap();
    assert_eq!(all(&grammar), ["parameters"]);
    let call = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\": [1]}}</tool_call>";
    assert_eq!(answer(&tokenizer, &grammar, call), Answer::MayEnd);
    assert_eq!(answer(&tokenizer, &grammar, "12"), Answer::MayEnd);
    let bad = json!({"type": "strnig"});
    let calls = GrammarCalls {
        format: ToolFormat::Hermes,
        tools: &[("f", None)],
        several: true,
    };
    let refused = or_called(&tokenizer, &bad, SchemaKeywords::Lenient, calls);
    assert!(refused.unwrap_err().to_string().contains("strnig"));
}

#[test]
fn a_form_that_is_relaxed_leaves_the_schemas_of_the_tools_in_force() {
    let tokenizer = tokenizer();
    let form = json!({"type": "string", "pattern": "^(?!b)[ab]{2}$"});
    let parameters = json!({
        "type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false,
    });
    let calls = GrammarCalls {
        format: ToolFormat::Hermes,
        tools: &[("f", Some(&parameters))],
        several: true,
    };
    let grammar = or_called(&tokenizer, &form, SchemaKeywords::Lenient, calls).unwrap();
    assert_eq!(all(&grammar), ["pattern"]);
    let call = |arguments: &str| {
        let call = format!("<tool_call>{{\"name\":\"f\",\"arguments\":{arguments}}}</tool_call>");
        answer(&tokenizer, &grammar, &call)
    };
    assert_eq!(call("{\"a\": 1}"), Answer::MayEnd);
    assert!(matches!(call("{\"a\": [1]}"), Answer::Wrong(_)));
    assert_eq!(answer(&tokenizer, &grammar, "\"bb\""), Answer::Complete);
}

#[test]
fn reasoning_may_precede_an_answer_that_is_constrained() {
    let tokenizer = tokenizer();
    let form = json!({"type": "integer"});
    let after = |format: ReasoningFormat, is_open: bool, calls| {
        let wanted = GrammarAnswer {
            reasoning: Some(GrammarReasoning::new(format, is_open)),
            form: Some(GrammarForm::JsonSchema(&form)),
            calls,
        };
        Grammar::answer(&tokenizer, wanted, SchemaKeywords::Strict).unwrap()
    };
    let ends = |answer: Answer| matches!(answer, Answer::Complete | Answer::MayEnd);
    for format in [
        ReasoningFormat::THINK,
        ReasoningFormat::GEMMA,
        ReasoningFormat::COMMAND_R,
    ] {
        let ReasoningFormat { open, close } = format;
        let may = after(format, false, None);
        for text in [
            format!("{open}\nWhy < 7?\n{close}\n\n12"),
            format!("{open}{close}12"),
            "12".to_owned(),
        ] {
            assert!(ends(answer(&tokenizer, &may, &text)), "{text}");
        }
        for text in [
            format!("{open}a{close}\n\nb"),
            format!("{open}a{close}\n\n\n\n\n1"),
            "Well".to_owned(),
            format!("a{close}1"),
        ] {
            let found = answer(&tokenizer, &may, &text);
            assert!(matches!(found, Answer::Wrong(_)), "{text}: {found:?}");
        }
        let opened = after(format, true, None);
        assert!(ends(answer(&tokenizer, &opened, &format!("Hm. {close}12"))));
        assert!(!ends(answer(&tokenizer, &opened, "12")));
    }

    // A closing mark that is a special token.
    let special = ReasoningFormat {
        open: "<think>",
        close: "<|tool|>",
    };
    let grammar = after(special, false, None);
    let is_followed = |text: &str| {
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
        let mut tokens = tokenizer.encode(text, options).unwrap().into_iter();
        tokens.all(|token| state.refresh().is_ok() && state.accept(token).is_ok())
    };
    assert!(is_followed("<think>\nWhy < 7?\n<|tool|>\n\n12"));
    assert!(is_followed("12"));
    assert!(!is_followed("<think>Hm<|tool|>No"));
    assert!(!is_followed("1<|tool|>2"));

    let tools = [("now", None)];
    let calls = GrammarCalls::new(ToolFormat::Harmony, &tools);
    let harmony = after(ReasoningFormat::HARMONY, false, Some(calls));
    let thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant";
    let call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}";
    let number = "<|channel|>final<|message|>12";
    for text in [
        number.to_owned(),
        call.to_owned(),
        format!("{thought}{number}"),
        format!("{thought}{thought}{call}"),
    ] {
        assert!(ends(answer(&tokenizer, &harmony, &text)), "{text}");
    }
    for text in [
        "12",
        "<|channel|>final<|message|>No",
        "<|channel|>commentary<|message|>",
    ] {
        let found = answer(&tokenizer, &harmony, text);
        assert!(matches!(found, Answer::Wrong(_)), "{text}: {found:?}");
    }
    let nothing = Grammar::answer(&tokenizer, GrammarAnswer::default(), SchemaKeywords::Strict);
    assert!(
        nothing
            .unwrap_err()
            .to_string()
            .contains("neither a form nor tools")
    );
}
