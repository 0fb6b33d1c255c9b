//! Grammars over small tokenizers: what they allow, and what is refused.

use super::*;
use crate::sampling::ConstraintState;
use crate::text::{EncodeOptions, GgufVocabulary};
use serde_json::json;
use std::time::{Duration, Instant};

/// A byte-level tokenizer of all bytes, a few longer tokens, and two that end an answer.
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
    Arc::new(Tokenizer::from_gguf(vocabulary).unwrap())
}

/// How an answer goes that is exactly `text`.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing may follow it.
    Complete,
    /// It may end here, and go on.
    MayEnd,
    /// It may not end here.
    Beginning,
    /// The byte at this place is forbidden.
    Wrong(usize),
}

/// Feeds a text byte by byte, and looks at every mask.
fn answer(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> Answer {
    let allowed = |mask: &[u32], token: u32| mask[token as usize / 32] >> (token % 32) & 1 == 1;
    let vocabulary = tokenizer.vocabulary_size();
    let mut state = ConstraintState::new(grammar.constraint(), vocabulary);
    let mut complete = false;
    // Where no token is allowed with which the text goes on.
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
fn what_a_schema_says_of_its_own_compilation_is_not_heard() {
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

/// Compiles, and takes a few steps: it ends, well or with an error.
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
    // As of SentencePiece: a space before the first word, and bytes for the rest.
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
    let tokenizer = Arc::new(Tokenizer::from_gguf(vocabulary).unwrap());
    let encoded = tokenizer.encode("ab", EncodeOptions::default()).unwrap();
    assert_eq!(encoded.len(), 1);
    let grammar = Grammar::regex(&tokenizer, "ab|x b").unwrap();
    let mut state = ConstraintState::new(grammar.constraint(), tokenizer.vocabulary_size());
    state.refresh().unwrap();
    let names: Vec<&str> = (0..tokenizer.vocabulary_size() as u32)
        .filter(|id| state.mask()[*id as usize / 32] >> (id % 32) & 1 == 1)
        .filter_map(|id| tokenizer.token_text(id))
        .collect();
    // "x" is no longer used, its byte is; "▁ab" has a space that is not wanted.
    assert_eq!(names, ["<0x61>", "<0x78>", "a", "ab"]);
    assert_eq!(state.accept(tokenizer.id_of("<0x78>").unwrap()), Ok(false));
    assert_eq!(
        state.accept(tokenizer.id_of("\u{2581}").unwrap()),
        Ok(false)
    );
    assert_eq!(state.accept(tokenizer.id_of("b").unwrap()), Ok(true));
}
