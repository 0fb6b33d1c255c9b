//! Answers of a real model that are constrained to schemas, regular expressions and choices.

use common::model::smollm2;
use common::requests::{idle, ids};
use quell::{
    Engine, EngineConfig, Generation, Grammar, LoadOptions, Message, Outcome, Request,
    SamplingParams, Tokenizer,
};
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

/// All tests share one engine: the requests of one test do not affect another.
static ENGINE: LazyLock<Engine> = LazyLock::new(|| start(EngineConfig::default()));

fn start(config: EngineConfig) -> Engine {
    let config = EngineConfig {
        kv_cache_bytes: Some(256 * 16 * 23_040),
        audit: true,
        ..config
    };
    Engine::load_with(smollm2(), config, LoadOptions::cpu()).unwrap()
}

fn tokenizer(engine: &Engine) -> &Arc<Tokenizer> {
    engine.tokenizer().unwrap()
}

fn chat(text: &str) -> Request {
    Request::new(vec![Message::new("user", text)])
}

/// Greedy sampling, and temperature 1 with a few seeds.
fn samplings() -> Vec<SamplingParams> {
    let sampled = |seed| SamplingParams {
        seed,
        ..SamplingParams::default()
    };
    let mut all = vec![SamplingParams::greedy()];
    all.extend((1..=4).map(sampled));
    all
}

/// Answers one request with each of [`samplings`], all in one batch.
fn answers(request: &Request, grammar: &Grammar) -> Vec<Generation> {
    let streams: Vec<_> = samplings()
        .into_iter()
        .map(|sampling| {
            let request = request.clone().sampling(sampling).constraint(grammar);
            ENGINE.generate(request).unwrap()
        })
        .collect();
    let complete = |stream: quell::TokenStream| stream.complete_blocking().unwrap();
    streams.into_iter().map(complete).collect()
}

fn text(answer: &Generation) -> &str {
    answer.text.as_deref().unwrap()
}

/// Asks for JSON that matches a schema. Returns the values of the complete answers. Answers cut
/// at the length limit must be a prefix of valid JSON.
fn values(schema: &Value, question: &str, max_tokens: usize) -> Vec<Value> {
    let grammar = Grammar::json_schema(tokenizer(&ENGINE), schema).unwrap();
    let request = chat(question).max_tokens(max_tokens);
    let mut values = Vec::new();
    for answer in answers(&request, &grammar) {
        let text = text(&answer);
        let value = serde_json::from_str::<Value>(text);
        match answer.finish.outcome {
            Outcome::Stop => {
                values.push(value.unwrap_or_else(|error| panic!("{error}: {text}")));
            }
            Outcome::Length => {
                let error = value.expect_err("the answer had no end");
                assert!(error.is_eof(), "{error}: {text}");
            }
            other => panic!("{other:?}: {text}"),
        }
    }
    values
}

/// Returns the names of an object's fields.
fn names(value: &Value) -> Vec<&str> {
    let fields = value.as_object().expect("an object");
    fields.keys().map(String::as_str).collect()
}

#[test]
fn objects_have_the_fields_of_their_schema_and_no_other() {
    let schema = json!({
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "city": {"type": "string", "maxLength": 20},
            "mood": {"enum": ["good", "bad", null]},
            "name": {"type": "string", "maxLength": 30},
        },
        "required": ["age", "mood", "name"],
        "additionalProperties": false,
    });
    let values = values(&schema, "Make up a person. Answer in JSON.", 120);
    assert!(values.len() >= 4, "{values:?}");
    for value in &values {
        for name in names(value) {
            assert!(["age", "city", "mood", "name"].contains(&name), "{value}");
        }
        assert!(
            (0..=150).contains(&value["age"].as_i64().unwrap()),
            "{value}"
        );
        let mood = &value["mood"];
        assert!(mood == "good" || mood == "bad" || mood.is_null(), "{value}");
        assert!(names(value).contains(&"mood"));
        assert!(value["name"].as_str().unwrap().chars().count() <= 30);
        if let Some(city) = value.get("city") {
            assert!(city.as_str().unwrap().chars().count() <= 20);
        }
    }
    let first = &values[0];
    assert!(
        values.iter().any(|other| other != first),
        "all seeds give the same answer"
    );
}

#[test]
fn arrays_and_nested_objects_fit_their_schema() {
    let schema = json!({
        "$defs": {
            "part": {"type": ["boolean", "null"]},
            "item": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z]{1,10}$"},
                    "price": {"type": "number", "minimum": 0, "maximum": 99, "multipleOf": 0.5},
                    "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
                },
                "required": ["name", "price", "parts"],
                "additionalProperties": false,
            },
        },
        "type": "array",
        "items": {"$ref": "#/$defs/item"},
        "minItems": 2,
        "maxItems": 3,
    });
    fn check(item: &Value) {
        assert_eq!(names(item), ["name", "price", "parts"]);
        let name = item["name"].as_str().unwrap();
        assert!((1..=10).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase()));
        let price = item["price"].as_f64().unwrap();
        assert!((0.0..=99.0).contains(&price) && (2.0 * price).fract() == 0.0);
        let parts = item["parts"].as_array().unwrap();
        assert!(parts.len() <= 2);
        assert!(parts.iter().all(|part| part.is_boolean() || part.is_null()));
    }
    let values = values(&schema, "List things that you can buy, in JSON.", 150);
    assert!(!values.is_empty());
    for value in &values {
        let items = value.as_array().unwrap();
        assert!((2..=3).contains(&items.len()), "{value}");
        items.iter().for_each(check);
    }
}

#[test]
fn any_of_yields_one_of_its_alternatives() {
    let schema = json!({
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "point"}, "at": {"type": "integer"}},
                "required": ["kind", "at"],
                "additionalProperties": false,
            },
            {"type": "boolean"},
        ],
    });
    let values = values(&schema, "A point, or yes or no?", 60);
    assert!(!values.is_empty());
    for value in &values {
        let point = value["kind"] == "point" && value["at"].is_i64() && names(value).len() == 2;
        assert!(value.is_boolean() || point, "{value}");
    }
}

#[test]
fn json_object_yields_an_object_or_its_beginning() {
    let grammar = Grammar::json_object(tokenizer(&ENGINE)).unwrap();
    let request = chat("Describe a cat as JSON.").max_tokens(60);
    for answer in answers(&request, &grammar) {
        let value = serde_json::from_str::<Value>(text(&answer));
        match answer.finish.outcome {
            Outcome::Stop => assert!(value.unwrap().is_object(), "{}", text(&answer)),
            _ => assert!(value.unwrap_err().is_eof() && text(&answer).starts_with('{')),
        }
        assert!(!text(&answer).contains("  \n"), "{}", text(&answer));
    }
}

#[test]
fn choice_yields_one_of_its_texts() {
    let choices = ["yes", "no", "I do not know", "I do"];
    let grammar = Grammar::choice(tokenizer(&ENGINE), &choices).unwrap();
    for answer in answers(&chat("Is the sky blue?"), &grammar) {
        assert_eq!(answer.finish.outcome, Outcome::Stop);
        assert!(choices.contains(&text(&answer)), "{:?}", text(&answer));
    }
}

#[test]
fn regex_yields_a_matching_answer() {
    let grammar = Grammar::regex(tokenizer(&ENGINE), "^[0-9]{4}-(0[1-9]|1[0-2])$").unwrap();
    for answer in answers(&chat("When was the moon landing?"), &grammar) {
        assert_eq!(answer.finish.outcome, Outcome::Stop);
        let (year, month) = text(&answer).split_once('-').unwrap();
        assert!(year.len() == 4 && year.bytes().all(|b| b.is_ascii_digit()));
        assert!((1..=12).contains(&month.parse::<u32>().unwrap()) && month.len() == 2);
    }
}

#[test]
fn lark_yields_an_answer_of_its_grammar() {
    let source = "start: \"(\" NUMBER (\"+\" NUMBER)* \")\"\nNUMBER: /[1-9][0-9]?/";
    let grammar = Grammar::lark(tokenizer(&ENGINE), source).unwrap();
    for answer in answers(&chat("A sum?").max_tokens(40), &grammar) {
        let text = text(&answer)
            .strip_prefix('(')
            .expect("the answer begins with a bracket");
        if answer.finish.outcome == Outcome::Stop {
            let sum = text.strip_suffix(')').unwrap();
            let numbers = sum.split('+').map(|part| part.parse::<u32>().unwrap());
            assert!(numbers.into_iter().all(|number| (1..100).contains(&number)));
        }
    }
}

#[test]
fn constrained_requests_change_no_token_of_others() {
    let grammar = Grammar::json_object(tokenizer(&ENGINE)).unwrap();
    let free = |seed| {
        let sampling = SamplingParams {
            seed,
            temperature: 0.8,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        chat("Tell me of the sea.")
            .max_tokens(40)
            .sampling(sampling)
    };
    let tokens = |stream: quell::TokenStream| stream.complete_blocking().unwrap().tokens;
    let alone: Vec<_> = (0..3)
        .map(|seed| tokens(ENGINE.generate(free(seed)).unwrap()))
        .collect();
    let held = |seed| free(seed).constraint(&grammar);
    let own = tokens(ENGINE.generate(held(7)).unwrap());
    let streams: Vec<_> = (0..3)
        .flat_map(|seed| [ENGINE.generate(held(7)), ENGINE.generate(free(seed))])
        .map(Result::unwrap)
        .collect();
    let beside: Vec<_> = streams.into_iter().map(tokens).collect();
    for (index, pair) in beside.chunks(2).enumerate() {
        assert_eq!(pair[0], own);
        assert_eq!(pair[1], alone[index]);
    }
    // The reported log probabilities are those of the model itself, for forbidden tokens too.
    assert!(own.iter().any(|token| token.top[0].0 != token.id));
}

#[test]
fn each_sample_of_a_request_has_its_own_grammar_state() {
    let schema = json!({
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["n"],
        "additionalProperties": false,
    });
    let grammar = Grammar::json_schema(tokenizer(&ENGINE), &schema).unwrap();
    let request = chat("A number?").max_tokens(40).constraint(&grammar);
    let streams = ENGINE.generate_samples(request.clone(), 6).unwrap();
    let mut numbers = Vec::new();
    for (seed, stream) in streams.into_iter().enumerate() {
        let answer = stream.complete_blocking().unwrap();
        let value: Value = serde_json::from_str(text(&answer)).unwrap();
        numbers.push(value["n"].as_i64().unwrap());
        let mut alone = request.clone();
        alone.sampling.seed = seed as u64;
        let alone = ENGINE.generate(alone).unwrap().complete_blocking().unwrap();
        assert_eq!(ids(&alone), ids(&answer));
    }
    numbers.dedup();
    assert!(numbers.len() > 1, "{numbers:?}");
}

#[test]
fn a_grammar_that_may_end_is_ended_by_an_end_token() {
    let grammar = Grammar::regex(tokenizer(&ENGINE), "[A-Z][a-z ,]+\\.( [A-Z][a-z ,]+\\.)*");
    let grammar = grammar.unwrap();
    let ends = tokenizer(&ENGINE).end_tokens();
    let mut ended = 0;
    for answer in answers(&chat("Say hello.").max_tokens(80), &grammar) {
        let last = answer.tokens.last().unwrap().id;
        let stopped = answer.finish.outcome == Outcome::Stop;
        assert_eq!(stopped, ends.contains(&last), "{}", text(&answer));
        assert!(
            !stopped || text(&answer).ends_with('.'),
            "{}",
            text(&answer)
        );
        ended += usize::from(stopped);
    }
    assert!(ended > 0, "no answer was complete");
}

#[test]
fn preemption_and_cancellation_change_no_constrained_answer() {
    let config = EngineConfig {
        kv_cache_bytes: Some(16 * 16 * 23_040),
        prefix_cache: false,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(smollm2(), config, LoadOptions::cpu()).unwrap();
    let grammar = Grammar::json_object(tokenizer(&engine)).unwrap();
    let request = |seed| {
        let sampling = SamplingParams {
            seed,
            ..SamplingParams::default()
        };
        let request = chat("Some JSON, please.").max_tokens(48);
        request.sampling(sampling).constraint(&grammar)
    };
    let alone: Vec<_> = (0..6)
        .map(|seed| engine.generate(request(seed)).unwrap())
        .map(|stream| ids(&stream.complete_blocking().unwrap()))
        .collect();
    let streams: Vec<_> = (0..6)
        .map(|seed| engine.generate(request(seed)).unwrap())
        .collect();
    // Its priority protects it from preemption, so it holds blocks when it is cancelled.
    let mut cancelled = engine.generate(request(6).priority(1)).unwrap();
    cancelled.next_blocking().unwrap().unwrap();
    assert!(cancelled.cancel().wait().unwrap().blocks_freed > 0);
    for (stream, alone) in streams.into_iter().zip(&alone) {
        assert_eq!(&ids(&stream.complete_blocking().unwrap()), alone);
    }
    let stats = idle(&engine);
    assert!(stats.preemptions > 0, "nothing was preempted");
}
