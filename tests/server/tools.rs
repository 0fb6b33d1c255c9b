//! Tool calls, reasoning and structured outputs, over HTTP.

use async_openai::types::chat::{
    CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason,
};
use common::api::{ask, events, refused, send};
use common::parrot::say;
use common::server::{TestServer, options};
use common::{model, parrot};
use quell::{Engine, EngineConfig, LoadOptions, Prompt, Request};
use serde_json::{Value, json};
use std::sync::LazyLock;

const CHAT: &str = "/v1/chat/completions";

/// A template like Qwen3's: Hermes tool calls, and reasoning that can be switched off.
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
    let engine = Engine::load_with(model::smollm2(), config, LoadOptions::cpu()).unwrap();
    TestServer::start(engine, options())
});

/// A tool whose argument is one of two words.
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

fn parrot_body(text: &str, extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": say(text)}]});
    merge(&mut body, extra);
    body
}

fn question_body(question: &str, extra: Value) -> Value {
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
fn calls_in_the_text_become_tool_calls() {
    let body = parrot_body(CALLS, json!({"tools": [tool("f"), tool("g")]}));
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
fn an_answer_with_only_tool_calls_has_no_content() {
    let calls = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let answer = ask(
        PARROT.address,
        CHAT,
        &parrot_body(calls, json!({"tools": [tool("f")]})),
    );
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
}

#[test]
fn tool_calls_are_streamed_incrementally() {
    let body = parrot_body(CALLS, json!({"tools": [tool("f"), tool("g")], "n": 2}));
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
fn tool_calls_are_limited_by_parallel_tool_calls_and_tool_choice() {
    let one = json!({"tools": [tool("f"), tool("g")], "parallel_tool_calls": false});
    let answer = ask(PARROT.address, CHAT, &parrot_body(CALLS, one));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["tool_calls"].as_array().unwrap().len(), 1);
    for none in [
        json!({"tools": [tool("f")], "tool_choice": "none"}),
        json!({}),
    ] {
        let answer = ask(PARROT.address, CHAT, &parrot_body(CALLS, none));
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], CALLS);
        assert_eq!(choice["message"].get("tool_calls"), None);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[test]
fn the_prompt_contains_only_callable_tools() {
    let tokens = |extra: Value| {
        let answer = ask(PARROT.address, CHAT, &parrot_body("a", extra));
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
fn tools_are_described_in_text_if_the_template_does_not_render_them() {
    let template = "{# <｜tool▁calls▁begin｜> #}{% for m in messages %}\
        <|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let server = TestServer::start(parrot::engine(template), options());
    let with_tools = ask(
        server.address,
        CHAT,
        &parrot_body(CALLS, json!({"tools": [tool("f")]})),
    );
    let without = ask(server.address, CHAT, &parrot_body(CALLS, json!({})));
    let calls = &with_tools["choices"][0]["message"]["tool_calls"];
    assert_eq!(calls.as_array().map(Vec::len), Some(2));
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&with_tools) > tokens(&without) + 100);
}

/// Returns the rendered prompt of a conversation.
fn prompt(server: &TestServer, body: &Value) -> String {
    let tokens = &ask(server.address, "/tokenize", body)["tokens"];
    let text = ask(server.address, "/detokenize", &json!({"tokens": tokens}));
    text["prompt"].as_str().unwrap().to_owned()
}

/// A template like those of DeepSeek's distilled models: it renders no tools, but renders calls
/// in its own format, in messages without content.
#[test]
fn a_template_that_renders_calls_but_no_tools_keeps_its_own_format() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
        {% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}\
        <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n\
        ```json\n{{ c.function.arguments | tojson }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>\
        {% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let server = TestServer::start(parrot::engine(template), options());
    let call = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n\
        ```json\n{\"city\": \"Rome\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let history = json!([
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "a", "type": "function",
            "function": {"name": "f", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "21"},
    ]);
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let written = turn("user", "q") + &turn("assistant", call) + &turn("tool", "21");
    let written = format!("{written}<|im_start|>assistant\n");
    assert_eq!(prompt(&server, &json!({"messages": history})), written);
    let body = json!({"messages": history, "tools": [tool("f")]});
    let described = prompt(&server, &body);
    assert!(described.ends_with(&written), "{described}");
    assert!(described.starts_with("<|im_start|>system\nYou have these tools"));
    assert!(described.contains("function<｜tool▁sep｜>tool_name"));
    // Calls in the described format must also be parsed.
    let answer = ask(
        server.address,
        CHAT,
        &parrot_body(call, json!({"tools": [tool("f")]})),
    );
    let calls = &answer["choices"][0]["message"]["tool_calls"];
    assert_eq!(calls[0]["function"]["name"], "f");
}

#[test]
fn the_tool_use_template_is_used_for_conversations_with_tools() {
    let templates = json!([
        {"name": "default", "template": "D{{ messages[0].content }}"},
        {"name": "tool_use", "template": "U{{ tools | length }}{{ messages[0].content }}"},
    ]);
    let server = TestServer::start(parrot::engine_with(templates), options());
    let messages = json!([{"role": "user", "content": "hi"}]);
    let plain = json!({"messages": messages});
    assert_eq!(prompt(&server, &plain), "Dhi");
    let body = json!({"messages": messages, "tools": [tool("f")]});
    assert_eq!(prompt(&server, &body), "U1hi");
    let body = json!({"messages": messages, "tools": [tool("f")], "tool_choice": "none"});
    assert_eq!(prompt(&server, &body), "Dhi");
}

#[test]
fn tokenize_counts_the_tokens_of_a_chat_prompt() {
    for extra in [
        json!({"tools": [tool("f")]}),
        json!({"chat_template_kwargs": {"open_thinking": true}}),
        json!({}),
    ] {
        let body = parrot_body("a", extra);
        let taken = &ask(PARROT.address, CHAT, &body)["usage"]["prompt_tokens"];
        assert_eq!(&ask(PARROT.address, "/tokenize", &body)["count"], taken);
    }
}

#[test]
fn a_truncated_call_finishes_with_length() {
    let extra = json!({"tools": [tool("f")], "max_tokens": 30});
    let answer = ask(PARROT.address, CHAT, &parrot_body(CALLS, extra));
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "f");
}

#[test]
fn reasoning_is_separated_from_the_answer() {
    let thought = "<think>\nHm.\n</think>\n\nYes.";
    for (text, extra) in [
        (thought, json!({})),
        (
            "Hm.\n</think>\n\nYes.",
            json!({"chat_template_kwargs": {"open_thinking": true}}),
        ),
    ] {
        let body = parrot_body(text, extra);
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
    let quiet = parrot_body(thought, json!({"include_reasoning": false}));
    let answer = ask(PARROT.address, CHAT, &quiet);
    let message = &answer["choices"][0]["message"];
    assert_eq!(message.get("reasoning_content"), None);
    assert_eq!(message["content"], "Yes.");
    let unthinking = json!({"chat_template_kwargs": {"enable_thinking": false}});
    let answer = ask(PARROT.address, CHAT, &parrot_body("Yes.", unthinking));
    assert_eq!(answer["choices"][0]["message"]["content"], "Yes.");
}

#[test]
fn a_forced_call_comes_after_the_reasoning_if_there_is_any() {
    let call = "{\"name\": \"f\", \"arguments\": {\"city\": \"Rome\"}}";
    for (thinking, said, reasoning) in [
        // The prompt has already ended the reasoning and begun the call.
        (json!({"enable_thinking": false}), call.to_owned(), None),
        (
            json!({"open_thinking": true}),
            format!("Hm.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"),
            Some("Hm."),
        ),
        (
            json!({}),
            format!("<think>\nHm.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"),
            Some("Hm."),
        ),
        (json!({}), format!("<tool_call>{call}</tool_call>"), None),
    ] {
        let extra = json!({
            "tools": [tool("f")], "tool_choice": "required", "chat_template_kwargs": thinking,
        });
        let answer = ask(PARROT.address, CHAT, &parrot_body(&said, extra));
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["reasoning_content"].as_str(), reasoning, "{said}");
        assert_eq!(message["reasoning"].as_str(), reasoning, "{said}");
        assert_eq!(message["content"], Value::Null, "{said}");
        let function = json!({"name": "f", "arguments": "{\"city\": \"Rome\"}"});
        assert_eq!(message["tool_calls"][0]["function"], function, "{said}");
    }
}

#[test]
fn a_form_applies_after_the_reasoning() {
    let form = json!({"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "integer"},
    }}});
    let answer = ask(
        PARROT.address,
        CHAT,
        &parrot_body("<think>\nTwo?\n</think>\n\n12", form.clone()),
    );
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "Two?");
    assert_eq!(message["content"], "12");
}

/// The template of gpt-oss, as llama.cpp is tested with it.
static HARMONY: LazyLock<TestServer> = LazyLock::new(|| {
    let path = common::root().join("target/references/templates/openai-gpt-oss-120b.jinja");
    let template = std::fs::read_to_string(path).expect("run scripts/fetch-references");
    TestServer::start(parrot::engine(&template), options())
});

#[test]
fn an_answer_in_harmony_is_taken_apart_whole_and_streamed() {
    let thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant";
    let call =
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"city\":\"Rome\"}";
    let tools = json!({"tools": [tool("f")]});
    let required = json!({"tools": [tool("f")], "tool_choice": "required"});
    let json = json!({"response_format": {"type": "json_object"}});
    for (said, extra, content, has_call) in [
        (
            format!("{thought}<|channel|>final<|message|>Yes."),
            json!({}),
            Some("Yes."),
            false,
        ),
        (format!("{thought}{call}"), tools.clone(), None, true),
        (format!("{thought}{call}"), required, None, true),
        (
            format!("{thought}<|channel|>final<|message|>{{\"a\":1}}"),
            json,
            Some("{\"a\":1}"),
            false,
        ),
        // The reasoning breaks off, and the rest has no channel.
        (format!("{thought}Well."), tools, Some("Well."), false),
    ] {
        let body = parrot_body(&said, extra.clone());
        let answer = ask(HARMONY.address, CHAT, &body);
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["reasoning_content"], "Hm.", "{said}");
        assert_eq!(message["content"].as_str(), content, "{said}");
        let function = json!({"name": "f", "arguments": "{\"city\":\"Rome\"}"});
        let called = &message["tool_calls"][0]["function"];
        assert_eq!(*called == function, has_call, "{said}: {called}");
        let finish = if has_call { "tool_calls" } else { "stop" };
        assert_eq!(answer["choices"][0]["finish_reason"], finish, "{said}");

        let [mut reasoning, mut streamed, mut arguments] = [const { String::new() }; 3];
        for event in events(HARMONY.address, CHAT, &body) {
            let delta = &event["choices"][0]["delta"];
            let add = |text: &mut String, more: &Value| *text += more.as_str().unwrap_or("");
            add(&mut reasoning, &delta["reasoning_content"]);
            add(&mut streamed, &delta["content"]);
            add(
                &mut arguments,
                &delta["tool_calls"][0]["function"]["arguments"],
            );
        }
        assert_eq!(reasoning, "Hm.", "{said}");
        assert_eq!(streamed, content.unwrap_or(""), "{said}");
        assert_eq!(arguments.is_empty(), !has_call, "{said}");
    }
    let builtin = json!({"chat_template_kwargs": {"builtin_tools": ["python"]}});
    let error = refused(HARMONY.address, CHAT, &parrot_body("", builtin), 400);
    assert!(error.to_string().contains("builtin_tools"), "{error}");
}

#[test]
fn every_token_has_a_logprob_including_those_of_tool_calls() {
    let extra = json!({"tools": [tool("f")], "logprobs": true, "max_tokens": 20});
    let events = events(PARROT.address, CHAT, &parrot_body(CALLS, extra));
    let reported = events.iter().filter_map(|event| {
        let content = event["choices"][0]["logprobs"]["content"].as_array();
        content.map(Vec::len)
    });
    assert_eq!(reported.sum::<usize>(), 20);
}

#[test]
fn special_tokens_are_kept_if_requested() {
    let engine = parrot::engine(TEMPLATE);
    let answer = |keep: bool| {
        let message = quell::Message::new("user", say("a<file_sep>b"));
        let mut request = Request::new(Prompt::Conversation {
            messages: vec![message],
            options: quell::RenderOptions::default(),
        });
        request.keep_special = keep;
        let generation = engine.generate(request).unwrap().complete_blocking();
        generation.unwrap().text.unwrap()
    };
    assert_eq!(answer(false), "ab");
    assert_eq!(answer(true), "a<file_sep>b");
}

#[test]
fn a_required_tool_call_is_made() {
    let tools = json!({"tools": [tool("get_weather"), tool("get_time")]});
    for (choice, names) in [
        (json!("required"), ["get_weather", "get_time"].as_slice()),
        (
            json!({"type": "function", "function": {"name": "get_time"}}),
            &["get_time"],
        ),
    ] {
        let mut body = question_body("What is the weather in Paris?", tools.clone());
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
fn structured_outputs_constrain_the_answer() {
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
        let body = question_body("What is the capital of France?", extra);
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
fn a_conversation_with_tool_calls_and_results_continues() {
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
fn invalid_requests_are_refused_with_their_field() {
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
        (json!({"tools": [{"name": "f"}]}), "tools[0]"),
        (
            json!({"tools": [tool("f")], "tool_choice": {"type": "custom", "name": "f"}}),
            "tool_choice",
        ),
        (
            json!({"tools": [tool("f")], "functions": [{"name": "g"}]}),
            "functions",
        ),
        (
            json!({"functions": [{"name": "g"}], "function_call": {"name": "f"}}),
            "function_call",
        ),
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
        let error = refused(PARROT.address, CHAT, &parrot_body("a", extra.clone()), 400);
        assert_eq!(error["param"], field, "{extra}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}

const ONE_CALL: &str =
    "<tool_call>{\"name\": \"f\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>";

#[test]
fn an_answer_with_a_response_format_may_be_a_tool_call() {
    let schema = json!({
        "type": "object", "properties": {"answer": {"type": "string"}},
        "required": ["answer"], "additionalProperties": false,
    });
    let named = json!({"name": "answer", "schema": schema, "strict": true});
    let form = json!({"type": "json_schema", "json_schema": named});
    let with = |text: &str, choice: &str| {
        let extra = json!({
            "tools": [tool("f")], "tool_choice": choice, "response_format": form,
        });
        parrot_body(text, extra)
    };
    let answer = ask(PARROT.address, CHAT, &with(ONE_CALL, "auto"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], Value::Null);
    let function = json!({"name": "f", "arguments": "{\"city\": \"Paris\"}"});
    assert_eq!(choice["message"]["tool_calls"][0]["function"], function);
    let streamed: String = events(PARROT.address, CHAT, &with(ONE_CALL, "auto"))
        .iter()
        .filter_map(|event| {
            let call = &event["choices"][0]["delta"]["tool_calls"][0];
            Some(call["function"]["arguments"].as_str()?.to_owned())
        })
        .collect();
    assert_eq!(streamed, "{\"city\": \"Paris\"}");

    let text = "{\"answer\": \"It is sunny.\"}";
    for choice in ["auto", "none"] {
        let answer = ask(PARROT.address, CHAT, &with(text, choice));
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["message"]["content"], text);
        assert_eq!(choice["message"].get("tool_calls"), None);
    }
    // A required call is not constrained by the format of text.
    let call = "<tool_call>{\"name\":\"f\",\"arguments\":{\"city\":\"Rome\"}}</tool_call>";
    let answer = ask(PARROT.address, CHAT, &with(call, "required"));
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    // The constraint rules out anything that is neither a call nor of the format.
    let reply = send(PARROT.address, CHAT, &with("It is sunny.", "auto"));
    assert_eq!(reply.status, 500, "{}", reply.text());
}

#[test]
fn a_model_may_call_a_tool_despite_a_response_format() {
    // After several turns with calls, the model calls again unless the format forbids it.
    let turn = |city: &str, id: &str| {
        let arguments = json!({"city": city}).to_string();
        let function = json!({"name": "get_weather", "arguments": arguments});
        [
            json!({"role": "user", "content": format!("Weather in {city}?")}),
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": id, "type": "function", "function": function},
            ]}),
            json!({"role": "tool", "tool_call_id": id, "content": "sunny"}),
            json!({"role": "assistant", "content": format!("It is sunny in {city}.")}),
        ]
    };
    let mut messages: Vec<Value> = Vec::new();
    for (city, id) in [
        ("Paris", "c1"),
        ("Rome", "c2"),
        ("Paris", "c3"),
        ("Rome", "c4"),
    ] {
        messages.extend(turn(city, id));
    }
    messages.push(json!({"role": "user", "content": "Weather in Paris?"}));
    let schema = json!({"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]});
    let mut body = json!({
        "messages": messages, "tools": [tool("get_weather")], "temperature": 0, "max_tokens": 60,
    });
    let free = ask(SMOLLM2.address, CHAT, &body);
    let called =
        |answer: &Value| answer["choices"][0]["message"]["tool_calls"][0]["function"].clone();
    assert_eq!(called(&free)["name"], "get_weather", "{free}");
    body["response_format"] =
        json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
    let held = ask(SMOLLM2.address, CHAT, &body);
    assert_eq!(called(&held)["name"], "get_weather", "{held}");
    let arguments = called(&held)["arguments"].as_str().unwrap().to_owned();
    let city = serde_json::from_str::<Value>(&arguments).unwrap()["city"].clone();
    assert!(city == "Paris" || city == "Rome", "{arguments}");
}

#[test]
fn unsupported_tools_are_skipped_and_reported() {
    let custom = json!({"type": "custom", "custom": {"name": "apply_patch"}});
    let tools = json!([tool("f"), custom, {"type": "web_search"}]);
    for stream in [false, true] {
        let body = parrot_body(ONE_CALL, json!({"tools": tools, "stream": stream}));
        let reply = send(PARROT.address, CHAT, &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let skipped = reply.header("x-quell-skipped-tools");
        assert_eq!(skipped, Some("custom, web_search"));
        assert!(reply.text().contains("\"tool_calls\""));
    }
    let only = parrot_body("Hi.", json!({"tools": [custom]}));
    let answer = ask(PARROT.address, CHAT, &only);
    assert_eq!(answer["choices"][0]["message"]["content"], "Hi.");
    let usual = send(
        PARROT.address,
        CHAT,
        &parrot_body("Hi.", json!({"tools": [tool("f")]})),
    );
    assert_eq!(usual.header("x-quell-skipped-tools"), None);
}

#[test]
fn only_allowed_tools_can_be_called() {
    let allowed = |mode: &str| {
        json!({
            "tools": [tool("f"), tool("g")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {
                "mode": mode, "tools": [{"type": "function", "function": {"name": "g"}}],
            }},
        })
    };
    let tokens = |extra: Value| {
        let answer = ask(PARROT.address, CHAT, &parrot_body("a", extra));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(
        tokens(allowed("auto")),
        tokens(json!({"tools": [tool("g")]}))
    );
    let call = "<tool_call>{\"name\":\"g\",\"arguments\":{\"city\":\"Rome\"}}</tool_call>";
    let answer = ask(
        PARROT.address,
        CHAT,
        &parrot_body(call, allowed("required")),
    );
    let called = &answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"];
    assert_eq!(called, "g");
    let other = call.replace("\"g\"", "\"f\"");
    let reply = send(
        PARROT.address,
        CHAT,
        &parrot_body(&other, allowed("required")),
    );
    assert_eq!(reply.status, 500, "{}", reply.text());
}

#[test]
fn the_legacy_functions_api_works() {
    let function = tool("f")["function"].clone();
    let two = format!("{ONE_CALL}\n{ONE_CALL}");
    let body = parrot_body(&two, json!({"functions": [function]}));
    let answer = ask(PARROT.address, CHAT, &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "function_call");
    let message = &choice["message"];
    assert_eq!(message.get("tool_calls"), None);
    assert_eq!(message["content"], Value::Null);
    let call = json!({"name": "f", "arguments": "{\"city\": \"Paris\"}"});
    assert_eq!(message["function_call"], call);

    let (mut name, mut arguments, mut finish) = (String::new(), String::new(), Vec::new());
    for event in events(PARROT.address, CHAT, &body) {
        let choice = &event["choices"][0];
        assert_eq!(choice["delta"].get("tool_calls"), None);
        let delta = &choice["delta"]["function_call"];
        name.push_str(delta["name"].as_str().unwrap_or(""));
        arguments.push_str(delta["arguments"].as_str().unwrap_or(""));
        finish.extend(choice["finish_reason"].as_str().map(str::to_owned));
    }
    assert_eq!(
        (name.as_str(), arguments.as_str()),
        ("f", "{\"city\": \"Paris\"}")
    );
    assert_eq!(finish, ["function_call"]);

    // The prompt is the same as with `tools`, and so is that of a longer conversation.
    let tokens = |body: &Value| ask(PARROT.address, "/tokenize", body)["count"].clone();
    let with_tools = parrot_body(&two, json!({"tools": [tool("f")]}));
    assert_eq!(tokens(&body), tokens(&with_tools));
    let goes_on = |answer: Value, result: Value| {
        let user = json!({"role": "user", "content": "Weather?"});
        json!({"messages": [user, answer, result]})
    };
    let legacy = goes_on(
        json!({"role": "assistant", "content": null, "function_call": call}),
        json!({"role": "function", "name": "f", "content": "sunny"}),
    );
    let newer = goes_on(
        json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_0", "type": "function", "function": call},
        ]}),
        json!({"role": "tool", "tool_call_id": "call_0", "content": "sunny"}),
    );
    assert_eq!(tokens(&legacy), tokens(&newer));

    let forced = json!({"functions": [function], "function_call": {"name": "f"}});
    let call = "<tool_call>{\"name\":\"f\",\"arguments\":{\"city\":\"Rome\"}}</tool_call>";
    let answer = ask(PARROT.address, CHAT, &parrot_body(call, forced));
    let called = &answer["choices"][0]["message"]["function_call"];
    assert_eq!(called["arguments"], "{\"city\":\"Rome\"}");
}

#[test]
fn unenforced_schema_keywords_are_reported_or_refused() {
    let schema = json!({"type": "array", "items": {"type": "integer"}, "uniqueItems": true});
    let form = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let body = parrot_body("[1, 1]", json!({"response_format": form}));
    let legacy_body = json!({"prompt": say("[1, 1]"), "guided_json": schema});
    for (path, body) in [(CHAT, &body), ("/v1/completions", &legacy_body)] {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let reply = send(PARROT.address, path, &body);
            assert_eq!(reply.status, 200, "{}", reply.text());
            assert_eq!(reply.header("x-quell-unenforced"), Some("uniqueItems"));
        }
    }
    let mut parameters = tool("f");
    parameters["function"]["parameters"]["properties"]["city"]["not"] = json!({"const": "Rome"});
    let call = "<tool_call>{\"name\":\"f\",\"arguments\":{\"city\":\"Rome\"}}</tool_call>";
    let forced = json!({"tools": [parameters], "tool_choice": "required"});
    let reply = send(PARROT.address, CHAT, &parrot_body(call, forced));
    assert_eq!(reply.header("x-quell-unenforced"), Some("not"));

    let mut strict = options();
    strict.schema_keywords = quell::SchemaKeywords::Strict;
    let strict = TestServer::start(parrot::engine(TEMPLATE), strict);
    let error = refused(strict.address, CHAT, &body, 400);
    assert_eq!(error["param"], "response_format");
    assert!(
        error["message"].as_str().unwrap().contains("uniqueItems"),
        "{error}"
    );
}

#[test]
fn json_object_format_accepts_a_schema() {
    let schema = json!({"properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false});
    let form = json!({"response_format": {"type": "json_object", "schema": schema}});
    let answer = ask(
        PARROT.address,
        CHAT,
        &parrot_body("{\"a\": 1}", form.clone()),
    );
    assert_eq!(answer["choices"][0]["message"]["content"], "{\"a\": 1}");
    let reply = send(PARROT.address, CHAT, &parrot_body("{\"b\": 1}", form));
    assert_eq!(reply.status, 500, "{}", reply.text());
}

/// A template that accepts one system message, which must come first, and no unknown roles.
const STRICT_TEMPLATE: &str = "{%- for m in messages %}{%- if m.role == 'system' %}\
    {%- if not loop.first %}{{- raise_exception('System message must be at the beginning.') }}{%- endif %}\
    {{- '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}\
    {%- elif m.role in ['user', 'assistant'] %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {%- else %}{{- raise_exception('Unexpected message role.') }}{%- endif %}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

#[test]
fn instructions_reach_a_strict_template_as_one_system_message() {
    let server = TestServer::start(parrot::engine(STRICT_TEMPLATE), options());
    let one = |role: &str, text: &str| json!({"role": role, "content": text});
    let (user, last) = (one("user", "Q"), one("user", &say("Yes.")));
    let answered = one("assistant", "A");
    let prompt = |messages: &Value| {
        let count = ask(server.address, "/tokenize", &json!({"messages": messages}));
        let tokens = json!({"tokens": count["tokens"]});
        let text = ask(server.address, "/detokenize", &tokens);
        text["prompt"].as_str().unwrap().to_owned()
    };
    for messages in [
        json!([one("system", "S1"), one("system", "S2"), last]),
        json!([one("system", "S1"), one("developer", "S2"), last]),
        json!([
            user,
            answered,
            one("developer", "S1"),
            one("system", "S2"),
            last
        ]),
        json!([
            one("system", "S1"),
            user,
            answered,
            one("system", "S2"),
            last
        ]),
    ] {
        let answer = ask(server.address, CHAT, &json!({"messages": messages}));
        assert_eq!(answer["choices"][0]["message"]["content"], "Yes.");
        let text = prompt(&messages);
        assert!(text.contains("S1\n\nS2"), "{text}");
        assert_eq!(text.matches("system").count(), 1, "{text}");
    }
}
