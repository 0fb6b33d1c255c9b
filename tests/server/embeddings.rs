//! `POST /v1/embeddings` and echoed prompts with log probabilities, over a real socket.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::http::{Reply, exchange, post};
use common::model;
use common::requests::{idle, prompt};
use common::server::{MODEL, TestServer, null_engine, options, tokenizer};
use quell::EngineConfig;
use quell::internals::runner::{NullOptions, NullRunner};
use serde_json::{Value, json};
use sim::{SimOptions, expected, expected_embedding, logprob};

/// Starts a server whose model computes nothing.
fn null() -> TestServer {
    let engine = null_engine(tokenizer(&model::smollm2()), EngineConfig::default());
    TestServer::start(engine, options())
}

/// Starts a server with a simulated model and a tokenizer.
fn simulated(sim: SimOptions, config: EngineConfig) -> TestServer {
    let engine = sim::engine_with_text(sim, config, tokenizer(&model::smollm2()));
    TestServer::start(engine, options())
}

fn ask(server: &TestServer, path: &str, body: &Value) -> Reply {
    exchange(server.address, &post(path, body.to_string())).expect("the server answers")
}

fn embed(server: &TestServer, body: &Value) -> Value {
    let reply = ask(server, "/v1/embeddings", body);
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

/// Returns the numbers in a JSON list.
fn numbers(list: &Value) -> Vec<f32> {
    let list = list.as_array().unwrap().iter();
    list.map(|value| value.as_f64().unwrap() as f32).collect()
}

fn unit(values: &[f32]) -> Vec<f32> {
    let square = |value: &f32| f64::from(*value) * f64::from(*value);
    let length = values.iter().map(square).sum::<f64>().sqrt();
    let scaled = values.iter().map(|value| f64::from(*value) / length);
    scaled.map(|value| value as f32).collect()
}

#[test]
fn inputs_of_every_form_are_embedded_in_order() {
    let server = simulated(SimOptions::default(), EngineConfig::default());
    let inputs = [prompt(1, 3), prompt(2, 40), prompt(3, 1)];
    let answer = embed(&server, &json!({"model": MODEL, "input": inputs}));
    assert_eq!(
        (&answer["object"], &answer["model"]),
        (&json!("list"), &json!(MODEL))
    );
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 44, "total_tokens": 44})
    );
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), 3);
    for (index, (entry, input)) in data.iter().zip(&inputs).enumerate() {
        assert_eq!(
            (&entry["object"], &entry["index"]),
            (&json!("embedding"), &json!(index))
        );
        let found = numbers(&entry["embedding"]);
        assert_eq!(found, unit(&expected_embedding(input)));
    }
    let one = embed(&server, &json!({"input": inputs[1]}));
    assert_eq!(
        one["data"],
        json!([{"object": "embedding", "index": 0, "embedding": data[1]["embedding"]}])
    );
    idle(&server.engine);

    // The null model, because the simulated model does not know all tokens of the tokenizer.
    let server = null();
    let texts = embed(&server, &json!({"input": ["one two", "three"]}));
    let second = embed(&server, &json!({"input": "three"}));
    assert_eq!(
        texts["data"][1]["embedding"],
        second["data"][0]["embedding"]
    );
    assert_ne!(
        texts["data"][0]["embedding"],
        second["data"][0]["embedding"]
    );
}

#[test]
fn embeddings_support_base64_and_dimensions() {
    let server = simulated(SimOptions::default(), EngineConfig::default());
    let input = prompt(1, 12);
    let ask = |more: Value| {
        let mut body = json!({"input": input});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        embed(&server, &body)["data"][0]["embedding"].clone()
    };
    let whole = numbers(&ask(json!({"encoding_format": "float"})));
    let bytes = STANDARD.decode(ask(json!({"encoding_format": "base64"})).as_str().unwrap());
    let bytes = bytes.unwrap();
    let (words, rest) = bytes.as_chunks::<4>();
    let decoded: Vec<f32> = words.iter().map(|&word| f32::from_le_bytes(word)).collect();
    assert_eq!((&decoded, rest.len()), (&whole, 0));
    let short = numbers(&ask(json!({"dimensions": 3})));
    assert_eq!(short, unit(&expected_embedding(&input)[..3]));
    let as_long = ask(json!({"dimensions": 8, "encoding_format": null, "user": "someone"}));
    assert_eq!(numbers(&as_long), whole);
}

#[test]
fn invalid_embedding_requests_are_refused_with_their_field() {
    let sim = SimOptions {
        context: 20,
        ..SimOptions::default()
    };
    let server = simulated(sim, EngineConfig::default());
    let wrong = |body: Value| {
        let reply = ask(&server, "/v1/embeddings", &body);
        let error = reply.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error", "{}", reply.text());
        (reply.status, error["param"].clone(), error["code"].clone())
    };
    for input in [
        json!([]),
        json!(7),
        json!([1, "two"]),
        json!([[]]),
        json!([1000]),
        json!([-1]),
    ] {
        let (status, param, _) = wrong(json!({"input": input}));
        // For an element of a list, the error names its index too.
        let named = param.as_str().and_then(|param| param.split('[').next());
        assert_eq!((status, named), (400, Some("input")), "{input}: {param}");
    }
    let (status, param, code) = wrong(json!({"input": [prompt(1, 5), prompt(1, 21)]}));
    assert_eq!((status, param), (400, json!("input")));
    assert_eq!(code, "context_length_exceeded");
    for dimensions in [0, 9] {
        let (status, param, _) = wrong(json!({"input": [1], "dimensions": dimensions}));
        assert_eq!((status, param), (400, json!("dimensions")));
    }
    let (status, param, _) = wrong(json!({"input": [1], "encoding_format": "hex"}));
    assert_eq!((status, param), (400, json!("encoding_format")));
    let (status, _, code) = wrong(json!({"input": [1], "model": "another"}));
    assert_eq!((status, code), (404, json!("model_not_found")));
    let (status, ..) = wrong(json!({"model": MODEL}));
    assert_eq!(status, 400);
    // Refused requests leave nothing open.
    idle(&server.engine);
    embed(&server, &json!({"input": prompt(1, 20)}));

    let without = NullOptions {
        embedding: 0,
        ..NullOptions::default()
    };
    let config = EngineConfig::default();
    let engine =
        quell::Engine::with_runner(config, None, move || NullRunner::start(without)).unwrap();
    let server = TestServer::start(engine, options());
    let reply = ask(&server, "/v1/embeddings", &json!({"input": [1]}));
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("model"))
    );
}

#[test]
fn one_request_may_have_more_inputs_than_the_engine_accepts_at_once() {
    let config = EngineConfig {
        max_open_requests: 64,
        ..EngineConfig::default()
    };
    let server = simulated(SimOptions::default(), config);
    let inputs: Vec<Vec<u32>> = (0..300).map(|index| prompt(index, 1 + index % 7)).collect();
    let answer = embed(&server, &json!({"input": inputs}));
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), 300);
    for (entry, input) in data.iter().zip(&inputs) {
        assert_eq!(
            numbers(&entry["embedding"]),
            unit(&expected_embedding(input))
        );
    }
    assert_eq!(idle(&server.engine).outcomes.stopped, 300);
}

/// Returns the choices of a completion twice: from a single answer, and joined from the events
/// of a stream.
fn complete(server: &TestServer, body: &Value) -> (Vec<Value>, Vec<Value>) {
    let reply = ask(server, "/v1/completions", body);
    assert_eq!(reply.status, 200, "{}", reply.text());
    let whole = reply.json()["choices"].as_array().unwrap().clone();
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let reply = ask(server, "/v1/completions", &streamed);
    assert_eq!(reply.status, 200, "{}", reply.text());
    let mut joined: Vec<Value> = Vec::new();
    for line in reply.text().lines() {
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else {
            continue;
        };
        let event: Value = serde_json::from_str(data).unwrap();
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            while joined.len() <= index {
                joined.push(Value::Null);
            }
            append(&mut joined[index], choice);
        }
    }
    (whole, joined)
}

/// Appends a piece of a streamed choice to the pieces before it.
fn append(choice: &mut Value, piece: &Value) {
    if choice.is_null() {
        *choice = piece.clone();
        return;
    }
    let text = [&choice["text"], &piece["text"]].map(|text| text.as_str().unwrap());
    choice["text"] = json!(text.concat());
    choice["finish_reason"] = piece["finish_reason"].clone();
    let Some(lists) = piece["logprobs"].as_object() else {
        return;
    };
    if choice["logprobs"].is_null() {
        choice["logprobs"] = piece["logprobs"].clone();
        return;
    }
    for (name, list) in lists {
        let all = choice["logprobs"][name].as_array_mut().unwrap();
        all.extend(list.as_array().unwrap().iter().cloned());
    }
}

#[test]
fn an_echoed_prompt_has_log_probabilities_except_for_its_first_token() {
    let server = simulated(SimOptions::default(), EngineConfig::default());
    let input = prompt(1, 9);
    let text = server.engine.tokenizer().unwrap();
    for max_tokens in [0, 4] {
        let (whole, streamed) = complete(
            &server,
            &json!({
                "prompt": input, "echo": true, "logprobs": 0, "max_tokens": max_tokens,
                "ignore_eos": true, "temperature": 0
            }),
        );
        assert_eq!(whole, streamed, "{max_tokens} tokens");
        let [choice] = whole.as_slice() else {
            panic!("one answer was asked for");
        };
        let all = [input.clone(), expected(&input, max_tokens)].concat();
        assert_eq!(choice["text"], text.decode(&all, false));
        assert_eq!(choice["finish_reason"], "length");
        let lists = &choice["logprobs"];
        let list = |name: &str| lists[name].as_array().unwrap();
        let names: Vec<&str> = list("tokens")
            .iter()
            .map(|name| name.as_str().unwrap())
            .collect();
        assert_eq!(names.len(), all.len());
        let mut offset = 0;
        for (index, name) in names.iter().enumerate() {
            assert_eq!(list("text_offset")[index], offset);
            offset += name.chars().count();
            let found = &list("token_logprobs")[index];
            if index == 0 {
                assert!(found.is_null() && list("top_logprobs")[0].is_null());
            } else if index < input.len() {
                let expected = logprob(input[..index].iter().copied(), input[index]);
                assert_eq!(found.as_f64().unwrap() as f32, expected);
                // The reported top tokens always include the token itself.
                assert_eq!(list("top_logprobs")[index], json!({*name: found}));
            }
        }
    }
    idle(&server.engine);
}

#[test]
fn every_answer_echoes_its_own_prompt() {
    let server = null();
    let body = json!({
        "prompt": [[700, 701, 702], [900]], "n": 2, "echo": true, "logprobs": 2,
        "max_tokens": 1, "ignore_eos": true
    });
    let (whole, streamed) = complete(&server, &body);
    assert_eq!(whole, streamed);
    assert_eq!(whole.len(), 4);
    for (index, choice) in whole.iter().enumerate() {
        let lists = &choice["logprobs"];
        let count = if index < 2 { 3 } else { 1 };
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(lists[name].as_array().unwrap().len(), count + 1, "{name}");
        }
        assert!(lists["token_logprobs"][0].is_null());
        for top in lists["top_logprobs"].as_array().unwrap().iter().skip(1) {
            assert_eq!(top.as_object().unwrap().len(), 2);
        }
    }
    assert_eq!(whole[0]["logprobs"], whole[1]["logprobs"]);

    // `max_tokens` of 0 is allowed with an echo, but not without one.
    let body = json!({"prompt": [700, 701], "echo": true, "max_tokens": 0});
    let (whole, streamed) = complete(&server, &body);
    assert_eq!(whole, streamed);
    assert!(whole[0]["logprobs"].is_null());
    let tokenizer = server.engine.tokenizer().unwrap();
    assert_eq!(whole[0]["text"], tokenizer.decode(&[700, 701], false));
    let reply = ask(
        &server,
        "/v1/completions",
        &json!({"prompt": [1], "max_tokens": 0}),
    );
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("max_tokens"))
    );
    idle(&server.engine);
}
