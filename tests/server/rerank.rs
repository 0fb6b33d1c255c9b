//! `POST /v1/rerank` and `POST /v1/score` with a cross-encoder, with an embedding model, and with a
//! model that answers yes or no.

use common::api::{ask, refused};
use common::embedding::{expected, fixture, largest_difference};
use common::http::{exchange, post, with_headers};
use common::model;
use common::requests::idle;
use common::server::{TestServer, null_engine, options, tokenizer};
use quell::server::{ApiKeys, ServerOptions};
use quell::{Engine, EngineConfig, LoadOptions};
use serde_json::{Value, json};
use std::path::Path;

fn serve(path: &Path) -> TestServer {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, LoadOptions::cpu()).unwrap();
    TestServer::start(engine, options())
}

const QUERY: &str = "where is the cat ?";

/// What a generating model is told first.
const SYSTEM: &str = "Judge whether the Document meets the requirements based on the Query and the \
                      Instruct provided. Note that the answer can only be \"yes\" or \"no\".";

fn numbers(list: &Value) -> Vec<f32> {
    let list = list.as_array().unwrap().iter();
    list.map(|value| value.as_f64().unwrap() as f32).collect()
}

/// Returns the index and the score of each result of a ranking, in order.
fn ranking(answer: &Value) -> Vec<(usize, f32)> {
    let results = answer["results"].as_array().unwrap().iter();
    let one = |result: &Value| {
        let index = result["index"].as_u64().unwrap() as usize;
        (index, result["relevance_score"].as_f64().unwrap() as f32)
    };
    results.map(one).collect()
}

#[test]
fn a_cross_encoder_scores_pairs_like_sentence_transformers() {
    let server = serve(&fixture("bert-classifier"));
    let all = expected(&fixture("bert-classifier/expected_scores.json"));
    let texts: Vec<&str> = all.iter().map(|one| one.text.as_str()).collect();
    let scores: Vec<f32> = all.iter().map(|one| one.values[0]).collect();
    let body = json!({"query": QUERY, "documents": texts});
    for path in ["/v1/rerank", "/v2/rerank", "/rerank"] {
        let answer = ask(server.address, path, &body);
        let found = ranking(&answer);
        assert_eq!(found.len(), 4);
        assert!(found.is_sorted_by(|a, b| a.1 >= b.1));
        for (place, (index, score)) in found.into_iter().enumerate() {
            assert!((score - scores[index]).abs() < 1e-5, "{path}: {answer}");
            assert_eq!(answer["results"][place]["document"]["text"], texts[index]);
        }
        assert!(answer["usage"]["total_tokens"].as_u64().unwrap() > 40);
    }
    for path in ["/v1/score", "/score"] {
        let answer = ask(
            server.address,
            path,
            &json!({"text_1": QUERY, "text_2": texts}),
        );
        let data = answer["data"].as_array().unwrap().iter();
        let found: Vec<f32> = data
            .map(|one| one["score"].as_f64().unwrap() as f32)
            .collect();
        assert!(largest_difference(&found, &scores) < 1e-5);
    }
    let pairs = json!({"text_1": [QUERY, QUERY], "text_2": [texts[2], texts[0]]});
    let answer = ask(server.address, "/v1/score", &pairs);
    let second = answer["data"][1]["score"].as_f64().unwrap() as f32;
    assert!((second - scores[0]).abs() < 1e-5);
    let best = ask(
        server.address,
        "/v1/rerank",
        &json!({"query": QUERY, "documents": texts, "top_n": 1}),
    );
    assert_eq!(ranking(&best).len(), 1);
    idle(&server.engine);
}

#[test]
fn requests_that_a_cross_encoder_cannot_answer_are_refused() {
    let server = serve(&fixture("bert-classifier"));
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let pair = json!({"query": QUERY, "documents": ["it rains"]});
    let mut instructed = pair.clone();
    instructed["instruction"] = json!("find cats");
    let mut unnamed = pair.clone();
    unnamed["max_tokens_per_doc"] = json!(0);
    for (path, body, field) in [
        ("/v1/embeddings", json!({"input": "the cat"}), "model"),
        ("/v1/completions", json!({"prompt": "the cat"}), "model"),
        ("/v1/rerank", instructed, "instruction"),
        ("/v1/rerank", unnamed, "max_tokens_per_doc"),
        (
            "/v1/rerank",
            json!({"query": QUERY, "documents": []}),
            "documents",
        ),
        (
            "/v1/score",
            json!({"text_1": ["a", "b"], "text_2": ["c"]}),
            "text_1",
        ),
        ("/v1/score", json!({"text_1": "a", "text_2": []}), "text_2"),
    ] {
        let error = refused(server.address, path, &body, 400);
        assert_eq!(error["param"], field, "{path}: {error}");
    }
    let long = json!({"query": QUERY, "documents": ["the cat sat on the mat ".repeat(30)]});
    let error = refused(server.address, "/v1/rerank", &long, 400);
    assert_eq!(error["code"], "context_length_exceeded", "{error}");
    let mut cut = long;
    cut["max_tokens_per_doc"] = json!(6);
    let score = ranking(&ask(server.address, "/v1/rerank", &cut))[0].1;
    let short = json!({"query": QUERY, "documents": ["the cat sat on the mat"]});
    assert_eq!(
        ranking(&ask(server.address, "/v1/rerank", &short))[0].1,
        score
    );
    refused(server.address, "/v1/chat/completions", &chat, 400);
    idle(&server.engine);
}

#[test]
fn an_embedding_model_puts_its_own_prompts_before_texts_and_ranks_by_the_cosine() {
    let server = serve(&fixture("bert"));
    let all = expected(&fixture("bert/expected_queries.json"));
    let texts: Vec<&str> = all.iter().map(|one| one.text.as_str()).collect();
    let embed = |purpose: Option<&str>| -> Vec<Vec<f32>> {
        let body = json!({"input": texts, "prompt_name": purpose});
        let answer = ask(server.address, "/v1/embeddings", &body);
        let data = answer["data"].as_array().unwrap().iter();
        data.map(|one| numbers(&one["embedding"])).collect()
    };
    let (queries, documents) = (embed(Some("query")), embed(None));
    for (found, one) in queries.iter().zip(&all) {
        assert!(
            largest_difference(found, &one.values) < 1e-5,
            "{}",
            one.text
        );
    }
    assert!(largest_difference(&queries[0], &documents[0]) > 1e-3);
    assert_eq!(embed(Some("document")), documents);
    let error = json!({"input": texts, "prompt_name": "passage"});
    let error = refused(server.address, "/v1/embeddings", &error, 400);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("document, query")
    );
    // An id of the second segment is not one that a client may send.
    let error = json!({"input": [2, 100, 3]});
    let error = refused(server.address, "/v1/embeddings", &error, 400);
    assert_eq!(error["param"], "input", "{error}");
    let answer = ask(
        server.address,
        "/v1/rerank",
        &json!({"query": texts[2], "documents": texts}),
    );
    for (index, score) in ranking(&answer) {
        let products = queries[2].iter().zip(&documents[index]);
        let cosine: f32 = products.map(|(a, b)| a * b).sum();
        assert!((score - cosine).abs() < 1e-5);
    }
    idle(&server.engine);
}

#[test]
fn a_generating_model_is_asked_for_yes_or_no_and_shares_the_beginning_of_its_prompts() {
    let server = serve(&model::smollm2());
    let documents = [
        "The cat is on the mat.",
        "It rains.",
        "The cat is on the mat.",
    ];
    let body = json!({"query": "Where is the cat?", "documents": documents, "instruction": "Find answers."});
    let before = server.engine.stats().unwrap().prefix_hits;
    let mut found = ranking(&ask(server.address, "/v1/rerank", &body));
    found.sort_by_key(|(index, _)| *index);
    assert!(server.engine.stats().unwrap().prefix_hits > before);
    assert_eq!(found[0].1, found[2].1);
    assert_ne!(found[0].1, found[1].1);
    // The probability of "yes" where only the two answers are allowed.
    let question = "<Instruct>: Find answers.\n<Query>: Where is the cat?\n<Document>: It rains.";
    let tokenizer = server.engine.tokenizer().unwrap();
    let likely = |word: &str| {
        let token = tokenizer.id_of(word).unwrap();
        let body = json!({
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "max_tokens": 1, "allowed_token_ids": [token], "logprobs": true, "ignore_eos": true,
        });
        let answer = ask(server.address, "/v1/chat/completions", &body);
        answer["choices"][0]["logprobs"]["content"][0]["logprob"]
            .as_f64()
            .unwrap()
    };
    let (yes, no) = (likely("yes"), likely("no"));
    let expected = 1.0 / (1.0 + (no - yes).exp());
    assert!(
        (f64::from(found[1].1) - expected).abs() < 2e-2,
        "{found:?} {expected}"
    );
    idle(&server.engine);
}

/// The prompts of a generating model are those that Qwen3-Reranker was trained with.
#[test]
fn the_chat_template_of_qwen3_writes_the_prompts_of_its_reranker() {
    let path = common::root().join("target/references/templates/Qwen-Qwen3-0.6B.jinja");
    let template = std::fs::read_to_string(path).expect("run scripts/fetch-references");
    let mut tokenizer = tokenizer(&model::smollm2());
    tokenizer.set_chat_template(&template).unwrap();
    let server = TestServer::start(null_engine(tokenizer, EngineConfig::default()), options());
    let question = "<Instruct>: Find answers.\n<Query>: Where is it?\n<Document>: Here.";
    let messages =
        json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]);
    let body = json!({"messages": messages, "chat_template_kwargs": {"enable_thinking": false}});
    let tokens = ask(server.address, "/tokenize", &body)["tokens"].clone();
    let text = ask(server.address, "/detokenize", &json!({"tokens": tokens}));
    let expected = format!(
        "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n\
         <|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    assert_eq!(text["prompt"], expected);
}

/// A key has one part of the prefix cache, whichever route its requests use.
#[test]
fn requests_for_scores_share_the_cached_prefixes_of_their_key() {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(model::smollm2(), config, LoadOptions::cpu()).unwrap();
    let with_keys = ServerOptions {
        api_keys: ApiKeys::parse("alice\nmallory"),
        ..options()
    };
    let server = TestServer::start(engine, with_keys);
    let question = "<Instruct>: Find answers.\n<Query>: Where is it?\n<Document>: Here.";
    let chat = json!({
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "max_tokens": 1,
    });
    let rank =
        json!({"query": "Where is it?", "documents": ["Here."], "instruction": "Find answers."});
    let hits = |key: &str, path: &str, body: &Value| {
        let before = server.engine.stats().unwrap().prefix_hits;
        let key = format!("X-API-Key: {key}\r\n");
        let request = with_headers(&post(path, body.to_string()), &key);
        let reply = exchange(server.address, &request).unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
        server.engine.stats().unwrap().prefix_hits - before
    };
    assert_eq!(hits("alice", "/v1/chat/completions", &chat), 0);
    assert_eq!(hits("mallory", "/v1/rerank", &rank), 0);
    assert!(hits("alice", "/v1/rerank", &rank) > 32);
}
