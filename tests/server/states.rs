//! Conversations with a model that has recurrent layers, over HTTP and through sessions: a turn
//! computes its new tokens and at most one interval between snapshots again.

use common::api::{ask, fetch};
use common::golden::gguf;
use common::random::Random;
use common::requests::{idle, ids};
use common::serve::Serve;
use quell::{Engine, EngineConfig, LoadOptions, Request, TokenStream};
use serde_json::{Value, json};

/// Tokens between the positions at which snapshots are taken.
const INTERVAL: usize = 64;

/// Tokens that a turn adds, and tokens of its answer.
const TURN: (usize, usize) = (5, 9);

fn engine(kv_cache_bytes: usize, slots: usize) -> Engine {
    let config = EngineConfig {
        kv_cache_bytes: Some(kv_cache_bytes),
        state_slots: Some(slots),
        stream_buffer: 32,
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load_with(gguf("qwen3.5"), config, LoadOptions::cpu()).unwrap()
}

fn tokens(random: &mut Random, count: usize) -> Vec<u32> {
    (0..count).map(|_| 3 + random.below(250) as u32).collect()
}

/// Returns the ids of the tokens of a completion, which names them by their ids.
fn answered(answer: &Value) -> Vec<u32> {
    let names = answer["choices"][0]["logprobs"]["tokens"].as_array();
    let names = names.unwrap_or_else(|| panic!("{answer}")).iter();
    let id = |name: &Value| {
        name.as_str()
            .unwrap()
            .strip_prefix("token_id:")
            .unwrap()
            .parse()
    };
    names.map(|name| id(name).unwrap()).collect()
}

#[test]
fn thirty_turns_over_http_compute_little_more_than_their_new_tokens() {
    let flags = ["--kv-cache-mib", "16", "--state-slots", "16"];
    let server = Serve::start(&gguf("qwen3.5"), &flags);
    let model = fetch(server.address, "/v1/models").json()["data"][0]["id"].clone();
    let mut random = Random(7);
    let (new, answer) = TURN;
    let mut conversation: Vec<u32> = Vec::new();
    for turn in 0..30 {
        let before = conversation.len();
        conversation.extend(tokens(&mut random, new));
        let body = json!({
            "model": model, "prompt": conversation, "max_tokens": answer, "temperature": 0,
            "ignore_eos": true, "logprobs": 0, "return_tokens_as_token_ids": true,
        });
        let reply = ask(server.address, "/v1/completions", &body);
        let cached = &reply["usage"]["prompt_tokens_details"]["cached_tokens"];
        let again = before - cached.as_u64().unwrap() as usize;
        assert!(again <= INTERVAL, "turn {turn}: {again} tokens again");
        let answered = answered(&reply);
        assert_eq!(answered.len(), answer);
        conversation.extend(answered);
    }
    assert!(conversation.len() > 6 * INTERVAL);

    server.wait_until_idle();
    let slots = |state: &str| server.metric(&format!("quell_state_slots{{state=\"{state}\""));
    assert_eq!(slots("free") + slots("cached"), 16.0);
    assert!(slots("cached") >= 1.0);
    let missed = "quell_prefix_cache_misses_total{reason=\"no_snapshot\"";
    assert!(server.metric(missed) > 0.0, "no turn computes tokens again");
}

#[test]
fn thirty_turns_of_a_session_compute_little_more_than_their_new_tokens() {
    let engine = engine(16 << 20, 16);
    let mut random = Random(8);
    let (new, answer) = TURN;
    let session = engine.session();
    let mut before = 0;
    for turn in 0..30 {
        let mut request = Request::new(tokens(&mut random, new))
            .greedy()
            .max_tokens(answer);
        request.ignore_eos = true;
        let done = session
            .generate(request)
            .unwrap()
            .complete_blocking()
            .unwrap();
        let again = before - done.finish.cached_tokens;
        assert!(again <= INTERVAL, "turn {turn}: {again} tokens again");
        before += new + ids(&done).len();
    }
    session.end().wait().unwrap();
    idle(&engine);
}

/// Sixteen requests with a common prefix and unique suffixes, twice: one after the other, where
/// the hits are known, and all at once, where half of them are cancelled at random.
#[test]
fn sixteen_requests_share_their_prefix_and_give_back_all_blocks_and_states() {
    const SLOTS: usize = 40;
    let engine = engine(16 << 20, SLOTS);
    let mut random = Random(9);
    let prefix = tokens(&mut random, 2 * INTERVAL + 10);
    let prompts: Vec<Vec<u32>> = (0..16)
        .map(|_| [prefix.clone(), tokens(&mut random, 20)].concat())
        .collect();
    let start = |prompt: &[u32], count| -> TokenStream {
        let mut request = Request::new(prompt.to_vec()).greedy().max_tokens(count);
        request.ignore_eos = true;
        engine.generate(request).unwrap()
    };
    let mut expected = Vec::new();
    let mut cached = Vec::new();
    for prompt in &prompts {
        let done = start(prompt, 24).complete_blocking().unwrap();
        cached.push(done.finish.cached_tokens);
        expected.push(ids(&done));
    }
    // The first one leaves a snapshot near its end, which is still within the prefix.
    let mut hits = [2 * INTERVAL; 16];
    hits[0] = 0;
    assert_eq!(cached, hits);

    // Those that are cancelled could not end before: they wait for their readers.
    let mut cancelled = [false; 16];
    while cancelled.iter().filter(|cancelled| **cancelled).count() < 8 {
        cancelled[random.below(16)] = true;
    }
    let all = prompts.iter().zip(cancelled);
    let streams: Vec<TokenStream> = all
        .map(|(prompt, cancelled)| start(prompt, if cancelled { 300 } else { 24 }))
        .collect();
    let (mut blocks, mut states) = (0, 0);
    for (index, mut stream) in streams.into_iter().enumerate() {
        if cancelled[index] {
            for _ in 0..1 + random.below(20) {
                stream.next_blocking().unwrap().unwrap();
            }
            let receipt = stream.cancel().wait().unwrap();
            blocks += receipt.blocks_freed;
            states += receipt.states_freed;
        } else {
            let done = stream.complete_blocking().unwrap();
            assert_eq!(ids(&done), expected[index], "request {index}");
        }
    }
    // Each had at least the block of its suffix and its own state.
    assert!(blocks >= 8, "{blocks} blocks");
    assert!(states >= 8, "{states} states");
    let stats = idle(&engine);
    assert_eq!(stats.states.total, SLOTS);
    assert_eq!(
        stats.states.free + stats.states.cached,
        SLOTS,
        "{:?}",
        stats.states
    );
}
