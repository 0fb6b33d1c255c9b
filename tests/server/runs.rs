//! Answers whose steps have several tokens: one event per step, with the text and the log
//! probabilities of all its tokens, and the same answer as with one token per step.

use common::api::{ask, events};
use common::parrot::{engine_with_runs, say};
use common::server::{TestServer, options};
use serde_json::{Value, json};

const TEMPLATE: &str = "{% if tools %}<tool_call></think>{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    <|im_start|>assistant\n";
const TEXT: &str = "The sun rises in the east and sets in the west.";

fn server(run: usize) -> TestServer {
    TestServer::start(engine_with_runs(TEMPLATE, run), options())
}

/// Sums up the events of an answer: its text, the number of tokens with log probabilities in
/// each event that has any, the reason of its end, and the tokens that were counted.
fn summary(events: &[Value]) -> (String, Vec<usize>, Vec<String>, u64) {
    let (mut text, mut reported, mut reasons, mut counted) = (String::new(), vec![], vec![], 0);
    for event in events {
        counted = event["usage"]["completion_tokens"]
            .as_u64()
            .unwrap_or(counted);
        for choice in event["choices"].as_array().unwrap() {
            let piece = choice["delta"]["content"].as_str();
            text += piece.or(choice["text"].as_str()).unwrap_or_default();
            let lists = &choice["logprobs"];
            let tokens = lists["content"].as_array().or(lists["tokens"].as_array());
            reported.extend(tokens.map(Vec::len).filter(|count| *count > 0));
            reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
        }
    }
    (text, reported, reasons, counted)
}

#[test]
fn an_event_of_a_stream_has_all_tokens_of_its_step() {
    for (path, body) in [
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": say(TEXT)}], "logprobs": true}),
        ),
        (
            "/v1/completions",
            json!({"prompt": say(TEXT), "logprobs": 0, "max_tokens": 100}),
        ),
    ] {
        let single = server(1);
        let expected = ask(single.address, path, &body);
        let answer = &expected["choices"][0];
        let tokens = expected["usage"]["completion_tokens"].as_u64().unwrap();
        for run in [1, 2, 3, 7] {
            let server = server(run);
            let whole = ask(server.address, path, &body);
            for part in ["message", "text", "logprobs", "finish_reason"] {
                assert_eq!(whole["choices"][0][part], answer[part], "runs of {run}");
            }
            assert_eq!(whole["usage"], expected["usage"], "runs of {run}");
            let mut streamed = body.clone();
            streamed["stream_options"] = json!({"include_usage": true});
            let events = events(server.address, path, &streamed);
            let (text, reported, reasons, counted) = summary(&events);
            assert_eq!((text.as_str(), counted), (TEXT, tokens), "runs of {run}");
            assert_eq!(reasons, ["stop"]);
            // The token that ends the answer is not reported.
            let visible = tokens as usize - 1;
            let mut runs = vec![run; visible / run];
            runs.extend(Some(visible % run).filter(|rest| *rest > 0));
            assert_eq!(reported, runs);
        }
    }
}

#[test]
fn usage_counts_the_tokens_so_far_with_every_event() {
    let server = server(3);
    let events = events(
        server.address,
        "/v1/completions",
        &json!({
            "prompt": say(TEXT), "max_tokens": 7,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        }),
    );
    let counted = events
        .iter()
        .map(|event| &event["usage"]["completion_tokens"]);
    let mut counted: Vec<u64> = counted.filter_map(Value::as_u64).collect();
    counted.dedup();
    assert_eq!(counted, [3, 6, 7]);
}

#[test]
fn a_stop_string_within_a_step_cuts_the_event() {
    let server = server(50);
    let body = json!({
        "prompt": say(TEXT), "stop": ["east"], "logprobs": 0, "max_tokens": 100,
        "stream_options": {"include_usage": true},
    });
    let (text, reported, reasons, counted) =
        summary(&events(server.address, "/v1/completions", &body));
    assert_eq!(text, "The sun rises in the ");
    assert_eq!(reasons, ["stop"]);
    assert_eq!(reported, [counted as usize]);
    assert!(counted < 40, "{counted}");
}

/// Each token of a step belongs either to the reasoning or to the answer.
#[test]
fn a_step_may_contain_the_end_of_the_reasoning() {
    let text = "<think>Hm, let me think.</think>I look.";
    let body = json!({
        "input": say(text), "include": ["message.output_text.logprobs"],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    });
    let response = |run| {
        let server = server(run);
        let response = ask(server.address, "/v1/responses", &body);
        (response["output"].clone(), response["usage"].clone())
    };
    let without_ids = |output: &Value| {
        let items = output.as_array().unwrap().iter();
        let content = items.map(|item| item["content"].clone());
        content.collect::<Vec<_>>()
    };
    let (output, usage) = response(1);
    assert_eq!(output.as_array().unwrap().len(), 2, "{output}");
    assert!(usage["output_tokens_details"]["reasoning_tokens"].as_u64() > Some(2));
    assert_ne!(output[1]["content"][0]["logprobs"], json!([]));
    for run in [2, 3, 5, 50] {
        let (found, found_usage) = response(run);
        assert_eq!(without_ids(&found), without_ids(&output), "runs of {run}");
        assert_eq!(found_usage, usage, "runs of {run}");
    }
}
