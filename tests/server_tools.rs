//! Tool calls, reasoning, and answers that are held to a form, over HTTP.

#![cfg(feature = "server")]

#[path = "common/api.rs"]
mod api;
#[path = "common/http.rs"]
mod http;
#[path = "common/model.rs"]
mod model;
#[path = "common/parrot.rs"]
mod parrot;
#[path = "common/server.rs"]
mod server;

use api::{ask, events, refused};
use async_openai::types::chat::{
    CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason,
};
use parrot::say;
use quell::{Engine, EngineConfig, LoadOptions, Prompt, Request};
use serde_json::{Value, json};
use server::{TestServer, options};
use std::sync::LazyLock;

const CHAT: &str = "/v1/chat/completions";

/// A template as Qwen3's: Hermes calls, and reasoning that can be switched off.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}\
    <|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n\
    {% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}\
    {% if open_thinking %}<think>\n{% endif %}{% endif %}";

static PARROT: LazyLock<TestServer> =
    LazyLock::new(|| TestServer::start(parrot::engine(TEMPLATE), options()));

static SMOLLM2: LazyLock<TestServer> = LazyLock::new(|| {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load(model::smollm2(), config, LoadOptions::cpu()).unwrap();
    TestServer::start(engine, options())
});

/// A tool whose argument is one of a few words.
fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {
        "name": name,
        "description": "Tells about a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    }})
}

fn told(text: &str, extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": say(text)}]});
    merge(&mut body, extra);
    body
}

fn asked(question: &str, extra: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": 64,
    });
    merge(&mut body, extra);
    body
}

fn merge(body: &mut Value, extra: Value) {
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
}

const CALLS: &str = "I look.\n<tool_call>{\"name\": \"f\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>\
    \n<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>";

#[test]
fn calls_in_an_answer_are_tool_calls() {
    let body = told(CALLS, json!({"tools": [tool("f"), tool("g")]}));
    let answer = ask(PARROT.address, CHAT, &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "I look.");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let said: Vec<_> = calls
        .iter()
        .map(|call| (call["type"].as_str(), &call["function"]))
        .collect();
    let first = json!({"name": "f", "arguments": "{\"city\": \"Paris\"}"});
    let second = json!({"name": "g", "arguments": "{}"});
    assert_eq!(
        said,
        [(Some("function"), &first), (Some("function"), &second)]
    );
    let id = |call: &Value| call["id"].as_str().unwrap().to_owned();
    assert!(id(&calls[0]).starts_with("call_"));
    assert_ne!(id(&calls[0]), id(&calls[1]));
    let typed: CreateChatCompletionResponse = serde_json::from_value(answer).unwrap();
    assert_eq!(
        typed.choices[0].finish_reason,
        Some(FinishReason::ToolCalls)
    );
}

#[test]
fn an_answer_of_calls_alone_has_no_content() {
    let calls = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let answer = ask(
        PARROT.address,
        CHAT,
        &told(calls, json!({"tools": [tool("f")]})),
    );
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
}

#[test]
fn calls_are_streamed_piece_by_piece() {
    let body = told(CALLS, json!({"tools": [tool("f"), tool("g")], "n": 2}));
    let events = events(PARROT.address, CHAT, &body);
    for answer in 0..2 {
        let mut content = String::new();
        let mut calls: Vec<(String, String)> = Vec::new();
        let mut deltas = 0;
        let mut finish = Vec::new();
        for event in &events {
            let typed = serde_json::from_value::<CreateChatCompletionStreamResponse>(event.clone());
            typed.unwrap();
            let choice = &event["choices"][0];
            if choice["index"] != answer {
                continue;
            }
            finish.extend(choice["finish_reason"].as_str());
            let delta = &choice["delta"];
            content.push_str(delta["content"].as_str().unwrap_or(""));
            let Some([call]) = delta["tool_calls"].as_array().map(Vec::as_slice) else {
                continue;
            };
            deltas += 1;
            let function = &call["function"];
            let index = call["index"].as_u64().unwrap() as usize;
            if let Some(id) = call["id"].as_str() {
                assert!(id.starts_with("call_") && call["type"] == "function");
                assert_eq!((index, &function["arguments"]), (calls.len(), &json!("")));
                let name = function["name"].as_str().unwrap().to_owned();
                calls.push((name, String::new()));
            } else {
                assert_eq!(call.get("type"), None);
                assert_eq!(function.get("name"), None);
                assert_eq!(index + 1, calls.len());
                calls[index]
                    .1
                    .push_str(function["arguments"].as_str().unwrap());
            }
        }
        assert_eq!(content, "I look.");
        let expected = [("f", "{\"city\": \"Paris\"}"), ("g", "{}")];
        let expected = expected.map(|(name, text)| (name.to_owned(), text.to_owned()));
        assert_eq!(calls, expected);
        assert!(deltas > 4, "the first call's arguments come in pieces");
        assert_eq!(finish, ["tool_calls"]);
    }
}

#[test]
fn without_leave_an_answer_has_one_call_or_none() {
    let one = json!({"tools": [tool("f"), tool("g")], "parallel_tool_calls": false});
    let answer = ask(PARROT.address, CHAT, &told(CALLS, one));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);
    for none in [
        json!({"tools": [tool("f")], "tool_choice": "none"}),
        json!({}),
    ] {
        let answer = ask(PARROT.address, CHAT, &told(CALLS, none));
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], CALLS);
        assert_eq!(choice["message"].get("tool_calls"), None);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[test]
fn the_prompt_has_the_tools_that_may_be_called() {
    let tokens = |extra: Value| {
        let answer = ask(PARROT.address, CHAT, &told("a", extra));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let none = tokens(json!({}));
    assert_eq!(
        tokens(json!({"tools": [tool("f")], "tool_choice": "none"})),
        none
    );
    assert!(tokens(json!({"tools": [tool("f")]})) > none + 50);
}

#[test]
fn a_call_that_the_limit_cuts_off_is_no_reason_to_call() {
    let extra = json!({"tools": [tool("f")], "max_tokens": 30});
    let answer = ask(PARROT.address, CHAT, &told(CALLS, extra));
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "f");
}

#[test]
fn reasoning_is_told_apart_from_the_answer() {
    let thought = "<think>\nHm.\n</think>\n\nYes.";
    for (text, extra) in [
        (thought, json!({})),
        (
            "Hm.\n</think>\n\nYes.",
            json!({"chat_template_kwargs": {"open_thinking": true}}),
        ),
    ] {
        let body = told(text, extra);
        let answer = ask(PARROT.address, CHAT, &body);
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["reasoning_content"], "Hm.");
        assert_eq!(message["content"], "Yes.");
        let (mut reasoning, mut content) = (String::new(), String::new());
        for event in events(PARROT.address, CHAT, &body) {
            let delta = &event["choices"][0]["delta"];
            reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or(""));
            content.push_str(delta["content"].as_str().unwrap_or(""));
        }
        assert_eq!((reasoning.as_str(), content.as_str()), ("Hm.", "Yes."));
    }
    let quiet = told(thought, json!({"include_reasoning": false}));
    let answer = ask(PARROT.address, CHAT, &quiet);
    let message = &answer["choices"][0]["message"];
    assert_eq!(message.get("reasoning_content"), None);
    assert_eq!(message["content"], "Yes.");
    let unthinking = json!({"chat_template_kwargs": {"enable_thinking": false}});
    let answer = ask(PARROT.address, CHAT, &told("Yes.", unthinking));
    assert_eq!(answer["choices"][0]["message"]["content"], "Yes.");
}

#[test]
fn a_forced_call_does_without_reasoning_and_marks() {
    // The prompt has ended the reasoning and begun the call.
    let call = "{\"name\":\"f\",\"arguments\":{\"city\":\"Rome\"}}";
    let extra = json!({
        "tools": [tool("f")], "tool_choice": "required",
        "chat_template_kwargs": {"open_thinking": true},
    });
    let answer = ask(PARROT.address, CHAT, &told(call, extra));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message.get("reasoning_content"), None);
    assert_eq!(message["content"], Value::Null);
    let function = json!({"name": "f", "arguments": "{\"city\":\"Rome\"}"});
    assert_eq!(message["tool_calls"][0]["function"], function);
}

#[test]
fn every_token_has_its_logprob_whatever_part_it_is_of() {
    let extra = json!({"tools": [tool("f")], "logprobs": true, "max_tokens": 20});
    let events = events(PARROT.address, CHAT, &told(CALLS, extra));
    let reported = events.iter().filter_map(|event| {
        let content = event["choices"][0]["logprobs"]["content"].as_array();
        content.map(Vec::len)
    });
    assert_eq!(reported.sum::<usize>(), 20);
}

#[test]
fn special_tokens_are_kept_where_they_are_asked_for() {
    let engine = parrot::engine(TEMPLATE);
    let answer = |keep: bool| {
        let message = quell::Message::new("user", say("a<file_sep>b"));
        let mut request = Request::new(Prompt::Conversation {
            messages: vec![message],
            options: quell::text::RenderOptions::default(),
        });
        request.keep_special = keep;
        let generation = engine.generate(request).unwrap().complete_blocking();
        generation.unwrap().text.unwrap()
    };
    assert_eq!(answer(false), "ab");
    assert_eq!(answer(true), "a<file_sep>b");
}

#[test]
fn a_model_that_must_call_a_tool_does() {
    let tools = json!({"tools": [tool("get_weather"), tool("get_time")]});
    for (choice, names) in [
        (json!("required"), ["get_weather", "get_time"].as_slice()),
        (
            json!({"type": "function", "function": {"name": "get_time"}}),
            &["get_time"],
        ),
    ] {
        let mut body = asked("What is the weather in Paris?", tools.clone());
        body["tool_choice"] = choice;
        let answer = ask(SMOLLM2.address, CHAT, &body);
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let [call] = choice["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .as_slice()
        else {
            panic!("one call: {choice}");
        };
        let name = call["function"]["name"].as_str().unwrap();
        assert!(names.contains(&name), "{name}");
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let read: Value = serde_json::from_str(arguments).unwrap();
        assert!(read == json!({"city": "Paris"}) || read == json!({"city": "Rome"}));

        let streamed: String = events(SMOLLM2.address, CHAT, &body)
            .iter()
            .filter_map(|event| {
                let call = &event["choices"][0]["delta"]["tool_calls"][0];
                Some(call["function"]["arguments"].as_str()?.to_owned())
            })
            .collect();
        assert_eq!(streamed, arguments);
    }
}

#[test]
fn an_answer_has_the_form_that_was_asked_for() {
    let schema = json!({
        "type": "object",
        "properties": {
            "capital": {"type": "string", "enum": ["Paris", "Rome"]},
            "people": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["capital", "people"],
        "additionalProperties": false,
    });
    let text = |extra: Value| {
        let body = asked("What is the capital of France?", extra);
        let answer = ask(SMOLLM2.address, CHAT, &body);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let named = json!({"name": "answer", "schema": schema, "strict": true});
    for extra in [
        json!({"response_format": {"type": "json_schema", "json_schema": named}}),
        json!({"guided_json": schema}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        let read: Value = serde_json::from_str(&text(extra)).unwrap();
        assert!(
            ["Paris", "Rome"].contains(&read["capital"].as_str().unwrap()),
            "{read}"
        );
        assert!(
            (0..100).contains(&read["people"].as_i64().unwrap()),
            "{read}"
        );
    }
    let chosen = text(json!({"guided_choice": ["Lyon", "Nice"]}));
    assert!(["Lyon", "Nice"].contains(&chosen.as_str()), "{chosen}");
    let digits = text(json!({"guided_regex": "[0-9]{4}"}));
    assert!(
        digits.len() == 4 && digits.parse::<u32>().is_ok(),
        "{digits}"
    );
    let drawn = text(json!({"guided_grammar": "start: \"x\" \"y\"+ \"z\""}));
    assert!(drawn.starts_with("xy") && drawn.ends_with('z'), "{drawn}");
}

#[test]
fn a_conversation_with_calls_and_results_goes_on() {
    let body = json!({
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": null, "tool_calls": [{
                "id": "call_1", "type": "function",
                "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"},
            }]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees, rain"},
        ],
        "tools": [tool("get_weather")],
        "temperature": 0.0,
        "max_tokens": 8,
    });
    let answer = ask(SMOLLM2.address, CHAT, &body);
    assert_eq!(answer["usage"]["completion_tokens"], 8);
}

#[test]
fn requests_that_make_no_sense_are_refused_by_field() {
    let bad_schema = json!({"name": "x", "schema": {"type": "nonsense"}});
    for (extra, field) in [
        (json!({"tool_choice": "required"}), "tool_choice"),
        (
            json!({"tools": [tool("f")], "tool_choice": "sometimes"}),
            "tool_choice",
        ),
        (
            json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice",
        ),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0]"),
        (json!({"tools": 5}), "tools"),
        (
            json!({"response_format": {"type": "xml"}}),
            "response_format.type",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": bad_schema}}),
            "response_format",
        ),
        (json!({"guided_regex": "("}), "guided_regex"),
        (json!({"guided_choice": []}), "guided_choice"),
        (
            json!({"guided_regex": "a", "guided_choice": ["a"]}),
            "guided_choice",
        ),
        (
            json!({"structured_outputs": {"grammar": "nonsense"}}),
            "structured_outputs",
        ),
    ] {
        let error = refused(PARROT.address, CHAT, &told("a", extra.clone()), 400);
        assert_eq!(error["param"], field, "{extra}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}
