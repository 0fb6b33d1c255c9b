//! Goes through the list of request fields: an honoured field has an effect or is checked, a
//! refused one is named in the error, and an accepted one does no harm. Some fields have tests
//! of their own.

use common::api::{ask, events, fetch, refused, send};
use common::http::{exchange, post};
use common::parrot::say;
use common::server::{TestServer, null_engine, options, tokenizer};
use common::{model, parrot, server};
use quell::internals::server::{Neutral, RequestField, Route, Verdict, request_fields};
use quell::{Engine, EngineConfig, LoadOptions};
use serde_json::{Value, json};
use std::sync::LazyLock;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";

static SMOLLM2: LazyLock<TestServer> = LazyLock::new(|| {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        max_context: Some(512),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(model::smollm2(), config, LoadOptions::cpu()).unwrap();
    TestServer::start(engine, options())
});

/// A model that computes nothing, for tests where only the request's fields matter.
static NULL: LazyLock<TestServer> = LazyLock::new(|| {
    let tokenizer = tokenizer(&model::smollm2());
    TestServer::start(null_engine(tokenizer, EngineConfig::default()), options())
});

/// Builds a valid request.
fn good(route: Route) -> Value {
    let user = json!([{"role": "user", "content": "Count from one to ten."}]);
    match route {
        Route::Completions => json!({
            "prompt": "One two three four five six seven eight", "max_tokens": 6,
            "temperature": 0, "seed": 1,
        }),
        Route::Chat => json!({"messages": user, "max_tokens": 6, "temperature": 0, "seed": 1}),
        Route::Responses => json!({
            "input": "Count from one to ten.", "max_output_tokens": 6, "temperature": 0, "seed": 1,
        }),
        Route::Embeddings => json!({"input": "a cat sat on a mat"}),
        Route::Rerank => json!({
            "query": "Where is the cat?", "documents": ["The cat is on the mat.", "It rains."],
        }),
        Route::Score => json!({"text_1": "Where is the cat?", "text_2": "On the mat."}),
        Route::Tokenize => json!({"prompt": "a cat"}),
        Route::Detokenize => json!({"tokens": [504, 905]}),
    }
}

/// Sets fields of a body. A name with a dot is that of a field inside another one.
fn set(body: &mut Value, changes: &Value) {
    for (name, value) in changes.as_object().unwrap() {
        match name.split_once('.') {
            Some((outer, inner)) => {
                if !body[outer].is_object() {
                    body[outer] = json!({});
                }
                body[outer][inner] = value.clone();
            }
            None => body[name] = value.clone(),
        }
    }
}

fn with(route: Route, changes: &[&Value]) -> Value {
    let mut body = good(route);
    changes.iter().for_each(|changes| set(&mut body, changes));
    body
}

fn of_route(route: Route) -> impl Iterator<Item = &'static RequestField> {
    let fields = request_fields().iter();
    fields.filter(move |field| field.routes.contains(&route))
}

fn json_of(neutral: &Neutral) -> Value {
    match *neutral {
        Neutral::False => json!(false),
        Neutral::True => json!(true),
        Neutral::Number(number) if number.fract() == 0.0 => json!(number as i64),
        Neutral::Number(number) => json!(number),
        Neutral::Text(text) => json!(text),
        Neutral::List(texts) => json!(texts),
        Neutral::EmptyObject => json!({}),
    }
}

/// Makes the request a stream if `name` is an option of streams: these are checked only in a
/// stream.
fn streamed(name: &str) -> Value {
    match name.starts_with("stream_options") {
        true => json!({"stream": true}),
        false => json!({}),
    }
}

/// Returns whether the null engine refuses all requests of the route: it has no embeddings, and does
/// not keep to the answers that are allowed.
fn needs_a_model(route: Route) -> bool {
    matches!(route, Route::Embeddings | Route::Rerank | Route::Score)
}

#[test]
fn refused_fields_are_reported_unless_their_value_is_neutral() {
    // The null engine refuses some routes, so its refusal must name another field.
    let answered = |route: Route, body: &Value, name: &str| {
        let reply = send(NULL.address, route.path(), body);
        let other = reply.json()["error"]["param"] != name;
        assert!(
            reply.status == 200 || (needs_a_model(route) && other),
            "{} {body}: {}",
            route.path(),
            reply.text()
        );
    };
    let mut count = 0;
    for route in Route::ALL {
        for field in of_route(route) {
            let Verdict::Refused(neutral) = field.verdict else {
                continue;
            };
            let stream = streamed(field.name);
            let values = [
                json!("asked"),
                json!(7),
                json!(["asked"]),
                json!({"asked": 1}),
            ];
            for value in values {
                let body = with(route, &[&json!({ field.name: value }), &stream]);
                let error = refused(NULL.address, route.path(), &body, 400);
                assert_eq!(error["param"], field.name, "{body}: {error}");
                let message = error["message"].as_str().unwrap();
                assert!(message.starts_with(&format!("{} is not supported", field.name)));
                count += 1;
            }
            let neutral = neutral.iter().map(json_of).chain([Value::Null]);
            for value in neutral {
                let body = with(route, &[&json!({ field.name: value }), &stream]);
                answered(route, &body, field.name);
            }
        }
    }
    assert!(count > 500, "only {count} requests");
}

#[test]
fn accepted_fields_may_have_any_value() {
    for route in Route::ALL {
        let accepted = of_route(route).filter(|field| field.verdict == Verdict::Accepted);
        for field in accepted {
            let stream = streamed(field.name);
            for value in [json!(true), json!("high"), json!(["a"])] {
                let body = with(route, &[&json!({ field.name: value }), &stream]);
                let reply = send(NULL.address, route.path(), &body);
                let error = &reply.json()["error"];
                assert!(
                    reply.status == 200 || needs_a_model(route),
                    "{body}: {}",
                    reply.text()
                );
                assert_ne!(error["param"], field.name, "{body}");
            }
        }
    }
}

/// How a test sees that a field is honoured.
enum Evidence {
    /// Two requests are sent, one with the first changes and one with both. The check is
    /// applied to their answers.
    Shows(Value, Value, fn(&Seen) -> bool),
    /// This value must be refused, and the error must name the field.
    Wrong(Value),
}

/// The answers without and with a field.
struct Seen {
    before: Value,
    after: Value,
}

fn text(answer: &Value) -> &str {
    let choice = &answer["choices"][0];
    let texts = [
        &choice["text"],
        &choice["message"]["content"],
        &answer["output"][0]["content"][0]["text"],
    ];
    texts.iter().find_map(|text| text.as_str()).unwrap_or("")
}

fn tokens(answer: &Value, names: [&str; 2]) -> u64 {
    let usage = &answer["usage"];
    names
        .iter()
        .find_map(|name| usage[name].as_u64())
        .unwrap_or(u64::MAX)
}

fn prompt_tokens(answer: &Value) -> u64 {
    match answer["count"].as_u64() {
        Some(count) => count,
        None => tokens(answer, ["prompt_tokens", "input_tokens"]),
    }
}

fn answer_tokens(answer: &Value) -> u64 {
    tokens(answer, ["completion_tokens", "output_tokens"])
}

impl Seen {
    fn same_text(&self) -> bool {
        !text(&self.after).is_empty() && text(&self.before) == text(&self.after)
    }

    fn other_text(&self) -> bool {
        text(&self.before) != text(&self.after)
    }

    fn longer_prompt(&self) -> bool {
        prompt_tokens(&self.after) > prompt_tokens(&self.before)
    }

    fn shorter_prompt(&self) -> bool {
        prompt_tokens(&self.after) < prompt_tokens(&self.before)
    }

    fn says(&self, wanted: &str) -> bool {
        !text(&self.before).contains(wanted) && text(&self.after).contains(wanted)
    }
}

/// Token ids of the model: the marks at the beginning and the end of a turn.
const BEGIN_OF_TURN: u32 = 1;
const END_OF_TURN: u32 = 2;

fn evidence(route: Route, name: &str) -> Option<Evidence> {
    use Evidence::{Shows, Wrong};
    let none = json!({});
    let hot = json!({"temperature": 5});
    let tool = match route {
        Route::Responses => {
            json!({"type": "function", "name": "look_it_up", "parameters": {"type": "object"}})
        }
        _ => {
            json!({"type": "function", "function": {"name": "look_it_up", "parameters": {"type": "object"}}})
        }
    };
    let dialogue = json!([
        {"role": "user", "content": "Write a poem"}, {"role": "assistant", "content": "The sea is"},
    ]);
    let conversation = match route {
        Route::Tokenize => json!({"prompt": null, "messages": dialogue}),
        Route::Chat => json!({"messages": dialogue}),
        _ => none.clone(),
    };
    let only = |token: u32| json!({"allowed_token_ids": [token]});
    let beside = |changes: Value| {
        let mut all = conversation.clone();
        set(&mut all, &changes);
        all
    };
    let answers = matches!(
        name,
        "stop" | "min_tokens" | "include_stop_str_in_output" | "bad_words"
    );
    let word = match answers {
        true => text(&ask(SMOLLM2.address, route.path(), &good(route))).to_owned(),
        false => String::new(),
    };
    let begin: String = word.chars().take(4).collect();
    Some(match name {
        "model" => Wrong(json!({"model": "another"})),
        "prompt" => Shows(
            none,
            json!({"prompt": "One two three four five six seven eight nine ten and so on"}),
            Seen::longer_prompt,
        ),
        "messages" if route == Route::Tokenize => Shows(none, conversation, Seen::longer_prompt),
        "messages" => Shows(none, conversation, Seen::longer_prompt),
        "input" => Shows(
            none,
            json!({"input": "Count from one to ten, and then from ten to one, on and on."}),
            Seen::longer_prompt,
        ),
        "instructions" => Shows(
            none,
            json!({"instructions": "Always answer in rhymes that are long and hard to follow, and never stop before the end of the page, whatever the reader says about them."}),
            Seen::longer_prompt,
        ),
        "previous_response_id" => {
            let first = ask(SMOLLM2.address, route.path(), &good(route));
            Shows(
                none,
                json!({"previous_response_id": first["id"]}),
                Seen::longer_prompt,
            )
        }
        "tokens" => Shows(none, json!({"tokens": [504]}), |seen| {
            seen.before != seen.after
        }),
        "add_special_tokens" => Wrong(json!({"add_special_tokens": "yes"})),
        "add_generation_prompt" => Shows(
            conversation,
            json!({"add_generation_prompt": false}),
            Seen::shorter_prompt,
        ),
        "continue_final_message" => Shows(
            conversation,
            json!({"continue_final_message": true}),
            Seen::shorter_prompt,
        ),
        "chat_template" => Wrong(beside(json!({"chat_template": "x"}))),
        "chat_template_kwargs" if route == Route::Responses => Shows(
            none,
            json!({"chat_template_kwargs": {"add_generation_prompt": false}}),
            Seen::shorter_prompt,
        ),
        "chat_template_kwargs" => Shows(
            conversation,
            json!({"chat_template_kwargs": {"add_generation_prompt": false}}),
            Seen::shorter_prompt,
        ),
        "documents" if route != Route::Rerank => {
            Wrong(beside(json!({"documents": [{"title": "a", "text": "b"}]})))
        }
        "reasoning_effort" => Wrong(json!({"reasoning_effort": 5})),
        "reasoning.effort" => Wrong(json!({"reasoning.effort": 5})),
        "verbosity" => Wrong(json!({"verbosity": 5})),
        "text.verbosity" => Wrong(json!({"text.verbosity": 5})),
        "include_reasoning" => Wrong(json!({"include_reasoning": "no"})),
        "truncate_prompt_tokens" => Shows(none, json!({"truncate_prompt_tokens": 3}), |seen| {
            prompt_tokens(&seen.after) == 3
        }),
        "truncation_side" => Shows(
            json!({"truncate_prompt_tokens": 3}),
            json!({"truncation_side": "right"}),
            |seen| seen.other_text() || seen.before["data"] != seen.after["data"],
        ),
        "truncation" => Wrong(json!({"truncation": "sometimes"})),
        "temperature" => Shows(none, hot, Seen::other_text),
        "top_p" => Shows(none, json!({"temperature": 5, "top_p": 0}), Seen::same_text),
        "top_k" => Shows(none, json!({"temperature": 5, "top_k": 1}), Seen::same_text),
        "min_p" => Shows(none, json!({"temperature": 5, "min_p": 1}), Seen::same_text),
        "repetition_penalty" => Wrong(json!({"repetition_penalty": 0})),
        "presence_penalty" => Wrong(json!({"presence_penalty": 9})),
        "frequency_penalty" => Wrong(json!({"frequency_penalty": 9})),
        "logit_bias" => Shows(none, json!({"logit_bias": {"28": 100}}), Seen::other_text),
        "seed" => Shows(hot, json!({"seed": 2}), Seen::other_text),
        "bad_words" => {
            let first = word.split_whitespace().next().unwrap_or("");
            Shows(none, json!({"bad_words": [first]}), Seen::other_text)
        }
        "allowed_token_ids" => Shows(none, only(28), Seen::other_text),
        "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
            Shows(none, json!({ name: 2 }), |seen| {
                answer_tokens(&seen.after) == 2
            })
        }
        "min_tokens" => Shows(json!({"stop": begin}), json!({"min_tokens": 6}), |seen| {
            answer_tokens(&seen.before) < 6 && answer_tokens(&seen.after) == 6
        }),
        "stop" => Shows(none, json!({"stop": begin}), |seen| {
            answer_tokens(&seen.after) < 6
        }),
        "stop_token_ids" => Shows(only(28), json!({"stop_token_ids": [28]}), |seen| {
            answer_tokens(&seen.after) == 1
        }),
        "include_stop_str_in_output" => Shows(
            json!({"stop": begin}),
            json!({"include_stop_str_in_output": true}),
            |seen| text(&seen.before).is_empty() && text(&seen.after).chars().count() == 4,
        ),
        "ignore_eos" => Shows(only(END_OF_TURN), json!({"ignore_eos": true}), |seen| {
            answer_tokens(&seen.before) == 1 && answer_tokens(&seen.after) == 6
        }),
        "skip_special_tokens" => Shows(
            only(BEGIN_OF_TURN),
            json!({"skip_special_tokens": false}),
            |seen| seen.says("<|im_start|>"),
        ),
        "response_format" => Shows(
            none,
            json!({"response_format": {"type": "json_object"}}),
            |seen| seen.says("{"),
        ),
        "text.format" => Shows(
            none,
            json!({"text.format": {"type": "json_object"}}),
            |seen| seen.says("{"),
        ),
        "structured_outputs" => Shows(
            none,
            json!({"structured_outputs": {"choice": ["zebra"]}}),
            |seen| seen.says("zebra"),
        ),
        "guided_json" => Shows(none, json!({"guided_json": {"enum": ["zebra"]}}), |seen| {
            seen.says("zebra")
        }),
        "guided_regex" => Shows(none, json!({"guided_regex": "zebra"}), |seen| {
            seen.says("zebra")
        }),
        "guided_choice" => Shows(none, json!({"guided_choice": ["zebra"]}), |seen| {
            seen.says("zebra")
        }),
        "guided_grammar" => Shows(
            none,
            json!({"guided_grammar": "start: \"zebra\""}),
            |seen| seen.says("zebra"),
        ),
        "tools" if route == Route::Tokenize => {
            Shows(conversation, json!({"tools": [tool]}), Seen::longer_prompt)
        }
        "tools" => Shows(none, json!({"tools": [tool]}), Seen::longer_prompt),
        "functions" => Shows(
            conversation,
            json!({"functions": [tool["function"]]}),
            Seen::longer_prompt,
        ),
        "function_call" => Wrong(beside(json!({"function_call": "sometimes"}))),
        "tool_choice" => Wrong(beside(json!({"tool_choice": "sometimes"}))),
        "parallel_tool_calls" => Wrong(beside(json!({"parallel_tool_calls": "yes"}))),
        "n" => Shows(none, json!({"n": 2}), |seen| {
            seen.after["choices"].as_array().unwrap().len() == 2
        }),
        "best_of" => Shows(none, json!({"best_of": 3}), |seen| {
            answer_tokens(&seen.after) == 18 && seen.after["choices"].as_array().unwrap().len() == 1
        }),
        "echo" => Shows(none, json!({"echo": true}), |seen| {
            seen.says("One two three")
        }),
        "logprobs" if route == Route::Chat => Shows(none, json!({"logprobs": true}), |seen| {
            seen.after["choices"][0]["logprobs"].is_object()
        }),
        "logprobs" => Shows(none, json!({"logprobs": 0}), |seen| {
            seen.after["choices"][0]["logprobs"].is_object()
        }),
        "top_logprobs" if route == Route::Responses => Shows(
            json!({"include": ["message.output_text.logprobs"]}),
            json!({"top_logprobs": 2}),
            |seen| {
                seen.after["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]
                    .as_array()
                    .unwrap()
                    .len()
                    == 2
            },
        ),
        "top_logprobs" => Shows(
            json!({"logprobs": true}),
            json!({"top_logprobs": 2}),
            |seen| {
                seen.after["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
                    .as_array()
                    .unwrap()
                    .len()
                    == 2
            },
        ),
        "include" => Shows(
            none,
            json!({"include": ["message.output_text.logprobs"]}),
            |seen| {
                let logprobs = |answer: &Value| {
                    answer["output"][0]["content"][0]["logprobs"]
                        .as_array()
                        .unwrap()
                        .len()
                };
                logprobs(&seen.before) == 0 && logprobs(&seen.after) == 6
            },
        ),
        "prompt_logprobs" => Shows(none, json!({"prompt_logprobs": 1}), |seen| {
            let of = |answer: &Value| {
                answer["prompt_logprobs"]
                    .as_array()
                    .or(answer["choices"][0]["prompt_logprobs"].as_array())
                    .map(Vec::len)
            };
            of(&seen.before).is_none()
                && of(&seen.after) == Some(prompt_tokens(&seen.after) as usize)
        }),
        "return_tokens_as_token_ids" => {
            let logprobs = if route == Route::Chat {
                json!({"logprobs": true})
            } else {
                json!({"logprobs": 1})
            };
            Shows(
                logprobs,
                json!({"return_tokens_as_token_ids": true}),
                |seen| {
                    let logprobs = &seen.after["choices"][0]["logprobs"];
                    let name = logprobs["tokens"][0]
                        .as_str()
                        .or(logprobs["content"][0]["token"].as_str());
                    name.unwrap().starts_with("token_id:")
                },
            )
        }
        "stream" => Wrong(json!({"stream": "yes"})),
        "stream_options.include_usage" => Wrong(json!({"stream_options.include_usage": "yes"})),
        "stream_options.continuous_usage_stats" => {
            Wrong(json!({"stream_options.continuous_usage_stats": 1}))
        }
        "store" => Wrong(json!({"store": "yes"})),
        "user" => Wrong(json!({"user": 5})),
        "priority" => Wrong(json!({"priority": "high"})),
        "cache_salt" => Wrong(json!({"cache_salt": ""})),
        "request_id" => Shows(none, json!({"request_id": "mine"}), |seen| {
            seen.after["id"].as_str().unwrap().ends_with("-mine")
        }),
        "session_id" => Wrong(json!({"session_id": "nobody"})),
        "metadata" => Shows(none, json!({"metadata": {"a": "b"}}), |seen| {
            seen.after["metadata"]["a"] == "b"
        }),
        "prompt_name" => Wrong(json!({"prompt_name": "query"})),
        "query" => Shows(
            none,
            json!({"query": "Where is the cat, and what is it doing there?"}),
            Seen::longer_prompt,
        ),
        "documents" if route == Route::Rerank => Shows(
            none,
            json!({"documents": [{"text": "It rains."}]}),
            |seen| {
                let results = seen.after["results"].as_array().unwrap();
                results.len() == 1 && results[0]["document"]["text"] == "It rains."
            },
        ),
        "top_n" => Shows(none, json!({"top_n": 1}), |seen| {
            seen.after["results"].as_array().unwrap()[..]
                == seen.before["results"].as_array().unwrap()[..1]
        }),
        "return_documents" => Shows(none, json!({"return_documents": false}), |seen| {
            let shown = |answer: &Value| answer["results"][0].get("document").is_some();
            shown(&seen.before) && !shown(&seen.after)
        }),
        "text_1" => Shows(
            none,
            json!({"text_1": "Where is the cat, and what is it doing there?"}),
            Seen::longer_prompt,
        ),
        "text_2" => Shows(
            none,
            json!({"text_2": ["On the mat.", "It rains."]}),
            |seen| seen.after["data"].as_array().unwrap().len() == 2,
        ),
        "max_tokens_per_doc" => Shows(none, json!({"max_tokens_per_doc": 1}), Seen::shorter_prompt),
        "instruction" => Shows(
            none,
            json!({"instruction": "Find what rhymes"}),
            Seen::shorter_prompt,
        ),
        "dimensions" => Shows(none, json!({"dimensions": 3}), |seen| {
            seen.after["data"][0]["embedding"].as_array().unwrap().len() == 3
        }),
        "encoding_format" => Shows(none, json!({"encoding_format": "base64"}), |seen| {
            seen.after["data"][0]["embedding"].is_string()
        }),
        "return_token_strs" => Shows(none, json!({"return_token_strs": true}), |seen| {
            seen.after["token_strs"].is_array()
        }),
        _ => return None,
    })
}

#[test]
fn honoured_fields_have_an_effect_or_are_checked() {
    let mut wrong = Vec::new();
    for route in Route::ALL {
        let honoured = of_route(route).filter(|field| field.verdict == Verdict::Honoured);
        for field in honoured {
            let place = format!("{} {}", route.path(), field.name);
            match evidence(route, field.name) {
                None => wrong.push(format!("{place}: nothing shows that it is honoured")),
                Some(Evidence::Wrong(changes)) => {
                    let body = with(route, &[&changes]);
                    let reply = send(SMOLLM2.address, route.path(), &body);
                    let error = reply.json()["error"].clone();
                    let named = error["param"]
                        .as_str()
                        .unwrap_or("")
                        .starts_with(field.name);
                    if !matches!(reply.status, 400 | 404) || !named {
                        wrong.push(format!("{place}: {} {error}", reply.status));
                    }
                }
                Some(Evidence::Shows(setup, changes, shows)) => {
                    let seen = Seen {
                        before: ask(SMOLLM2.address, route.path(), &with(route, &[&setup])),
                        after: ask(
                            SMOLLM2.address,
                            route.path(),
                            &with(route, &[&setup, &changes]),
                        ),
                    };
                    if !shows(&seen) {
                        wrong.push(format!("{place}: {} | {}", seen.before, seen.after));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// lm-eval's `local-completions` takes a continuation as greedy if the log probability of each
/// of its tokens equals the largest of the top log probabilities, compared as numbers.
#[test]
fn top_log_probabilities_are_written_like_the_chosen_ones() {
    for logprobs in [0, 1, 5] {
        let body = json!({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "logprobs": logprobs, "echo": true});
        let reply = send(SMOLLM2.address, COMPLETIONS, &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let lists = &reply.json()["choices"][0]["logprobs"];
        let chosen = lists["token_logprobs"].as_array().unwrap();
        let names = lists["tokens"].as_array().unwrap();
        let top = lists["top_logprobs"].as_array().unwrap();
        assert_eq!(chosen.len(), top.len());
        assert!(chosen[0].is_null() && top[0].is_null());
        let prompt = reply.json()["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
        let mut greedy = 0;
        for place in 1..chosen.len() {
            let top = top[place].as_object().unwrap();
            let name = names[place].as_str().unwrap();
            assert_eq!(top[name], chosen[place], "{name:?} of {top:?}");
            assert!(top.len() >= logprobs.max(1) && top.len() <= logprobs + 1);
            let largest = top
                .values()
                .map(|value| value.as_f64().unwrap())
                .fold(f64::MIN, f64::max);
            if place >= prompt {
                assert_eq!(largest, chosen[place].as_f64().unwrap());
                greedy += 1;
            }
        }
        assert_eq!(greedy, 8);
        // Compare the numbers as they are written, before parsing.
        let raw = reply.text();
        let begin = raw.find("\"token_logprobs\":[").unwrap();
        let written = raw[begin..].split(['[', ',', ']']).nth(2).unwrap();
        assert!(raw.matches(written).count() >= 2, "{written} is there once");
    }
}

#[test]
fn continue_final_message_leaves_the_last_message_open() {
    let body = json!({
        "messages": [{"role": "user", "content": "Write a poem"}, {"role": "assistant", "content": "The sea is "}],
        "add_generation_prompt": false, "continue_final_message": true,
    });
    let tokens = ask(SMOLLM2.address, "/tokenize", &body);
    let prompt = ask(
        SMOLLM2.address,
        "/detokenize",
        &json!({"tokens": tokens["tokens"]}),
    );
    let prompt = prompt["prompt"].as_str().unwrap();
    assert!(
        prompt.ends_with("<|im_start|>assistant\nThe sea is "),
        "{prompt:?}"
    );
    let mut asked = body.clone();
    set(&mut asked, &json!({"max_tokens": 4, "temperature": 0}));
    let answer = ask(SMOLLM2.address, CHAT, &asked);
    assert_eq!(answer["usage"]["prompt_tokens"], tokens["count"]);
    // The answer must equal a completion of the same tokens.
    let same = ask(
        SMOLLM2.address,
        COMPLETIONS,
        &json!({"prompt": tokens["tokens"], "max_tokens": 4, "temperature": 0}),
    );
    assert_eq!(text(&answer), text(&same));
    for (change, field) in [
        (
            json!({"add_generation_prompt": true}),
            "continue_final_message",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": ""}]}),
            "continue_final_message",
        ),
    ] {
        let mut wrong = body.clone();
        set(&mut wrong, &change);
        assert_eq!(refused(SMOLLM2.address, CHAT, &wrong, 400)["param"], field);
    }
}

#[test]
fn a_chat_template_in_a_request_is_used_only_if_trusted() {
    let mut options = options();
    options.trust_request_chat_template = true;
    let server = TestServer::start(parrot::engine("{{ messages[0].content }}"), options);
    let template = format!(
        "{{% for m in messages %}}{}{{% endfor %}}",
        say("of the request")
    );
    let body = json!({"messages": [{"role": "user", "content": say("of the model")}]});
    assert_eq!(text(&ask(server.address, CHAT, &body)), "of the model");
    let mut own = body.clone();
    set(&mut own, &json!({"chat_template": template}));
    assert_eq!(text(&ask(server.address, CHAT, &own)), "of the request");
    set(&mut own, &json!({"chat_template": "{% for %}"}));
    let error = refused(server.address, CHAT, &own, 400);
    assert_eq!(error["param"], "chat_template", "{error}");
}

#[test]
fn the_operators_chat_template_replaces_the_models() {
    let mut tokenizer = tokenizer(&model::smollm2());
    let template = "{{ bos_token }}|{% for m in messages %}{{ m.content }}{% endfor %}";
    tokenizer.set_chat_template(template).unwrap();
    assert!(tokenizer.set_chat_template("{% for %}").is_err());
    let server = TestServer::start(null_engine(tokenizer, EngineConfig::default()), options());
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let tokens = ask(server.address, "/tokenize", &body);
    let body = json!({"tokens": tokens["tokens"]});
    let prompt = ask(server.address, "/detokenize", &body);
    assert_eq!(prompt["prompt"], "<|im_start|>|Hi");
}

#[test]
fn documents_reach_a_template_that_renders_them() {
    let template = "{{ messages[0].content }}{% for d in documents %}{{ d.text }}{% endfor %}";
    let server = TestServer::start(parrot::engine(template), options());
    let body = json!({
        "messages": [{"role": "user", "content": "See:"}],
        "documents": [{"title": "t", "text": say("the document")}],
    });
    assert_eq!(text(&ask(server.address, CHAT, &body)), "the document");
}

#[test]
fn roles_unknown_to_the_api_and_the_template_are_refused() {
    let template =
        "{% for m in messages %}{% if m.role == 'critic' %}{{ m.content }}{% endif %}{% endfor %}";
    let server = TestServer::start(parrot::engine(template), options());
    let body = |role: &str| json!({"messages": [{"role": role, "content": say("I see.")}]});
    assert_eq!(text(&ask(server.address, CHAT, &body("critic"))), "I see.");
    for role in ["villain", "User", ""] {
        let error = refused(server.address, CHAT, &body(role), 400);
        assert_eq!(error["param"], "messages[0].role", "{error}");
    }
}

#[test]
fn refusal_parts_of_earlier_answers_are_rendered_as_text() {
    let server = TestServer::start(
        parrot::engine("{% for m in messages %}{{ m.content }}{% endfor %}"),
        options(),
    );
    let parts = json!([{"type": "refusal", "refusal": say("I cannot.")}]);
    let body = json!({"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}, {"role": "user", "content": "Why?"},
    ]});
    assert_eq!(text(&ask(server.address, CHAT, &body)), "I cannot.");
}

#[test]
fn integers_may_be_written_as_floats() {
    for (route, changes) in [
        (
            Route::Completions,
            json!({"max_tokens": 2.0, "n": 1.0, "seed": 3.0, "top_k": -1.0, "prompt": [504.0, 905]}),
        ),
        (
            Route::Chat,
            json!({"max_tokens": 2.0, "priority": 0.0, "stop_token_ids": [5.0]}),
        ),
        (Route::Responses, json!({"max_output_tokens": 2.0})),
    ] {
        let answer = ask(NULL.address, route.path(), &with(route, &[&changes]));
        assert_eq!(answer_tokens(&answer), 2, "{answer}");
    }
    let text = ask(
        NULL.address,
        "/detokenize",
        &json!({"tokens": [504.0, 905]}),
    );
    assert_eq!(
        text,
        ask(NULL.address, "/detokenize", &json!({"tokens": [504, 905]}))
    );
}

#[test]
fn continuous_usage_stats_adds_usage_to_every_event() {
    for route in [Route::Completions, Route::Chat] {
        let options =
            json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
        let mut all = events(SMOLLM2.address, route.path(), &with(route, &[&options]));
        let last = all.pop().unwrap();
        assert_eq!(last["usage"]["completion_tokens"], 6);
        let counts: Vec<u64> = all.iter().map(answer_tokens).collect();
        assert!(
            counts.is_sorted() && counts.last() == Some(&6),
            "{counts:?}"
        );
        for event in &all {
            assert_eq!(
                event["usage"]["prompt_tokens"],
                last["usage"]["prompt_tokens"]
            );
        }
        let whole = with(
            route,
            &[&json!({"stream_options": {"include_usage": true}})],
        );
        let error = refused(SMOLLM2.address, route.path(), &whole, 400);
        assert_eq!(error["param"], "stream_options");
    }
}

#[test]
fn best_of_returns_the_likeliest_answers() {
    let base = json!({"temperature": 1.5, "max_tokens": 8, "logprobs": 0});
    let all = ask(
        SMOLLM2.address,
        COMPLETIONS,
        &with(Route::Completions, &[&base, &json!({"n": 4})]),
    );
    let best = ask(
        SMOLLM2.address,
        COMPLETIONS,
        &with(Route::Completions, &[&base, &json!({"n": 2, "best_of": 4})]),
    );
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs
            .iter()
            .map(|value| value.as_f64().unwrap())
            .sum::<f64>()
            / logprobs.len().max(1) as f64
    };
    let mut ranked: Vec<&Value> = all["choices"].as_array().unwrap().iter().collect();
    ranked.sort_by(|one, other| mean(other).total_cmp(&mean(one)));
    let chosen = best["choices"].as_array().unwrap();
    assert_eq!(chosen.len(), 2);
    for (index, choice) in chosen.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], ranked[index]["text"]);
    }
    assert_eq!(best["usage"], all["usage"]);
    let streamed = with(
        Route::Completions,
        &[&json!({"best_of": 2, "stream": true})],
    );
    assert_eq!(
        refused(SMOLLM2.address, COMPLETIONS, &streamed, 400)["param"],
        "best_of"
    );
}

#[test]
fn log_probabilities_are_in_the_parts_and_the_events_of_a_response() {
    let include = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let body = with(Route::Responses, &[&include]);
    let whole = ask(SMOLLM2.address, RESPONSES, &body);
    let part = &whole["output"][0]["content"][0];
    let logprobs = part["logprobs"].as_array().unwrap();
    let joined: String = logprobs
        .iter()
        .map(|entry| entry["token"].as_str().unwrap())
        .collect();
    assert_eq!(joined, part["text"].as_str().unwrap());
    for entry in logprobs {
        assert_eq!(
            entry["top_logprobs"][0]["logprob"], entry["logprob"],
            "greedy: {entry}"
        );
    }
    let all = events(SMOLLM2.address, RESPONSES, &body);
    let of = |kind: &str| {
        all.iter()
            .filter(|event| event["type"] == kind)
            .collect::<Vec<_>>()
    };
    let deltas = of("response.output_text.delta");
    let told: Vec<Value> = deltas
        .iter()
        .flat_map(|event| event["logprobs"].as_array().unwrap().clone())
        .collect();
    assert_eq!(&told, logprobs);
    assert_eq!(
        of("response.output_text.done")[0]["logprobs"],
        part["logprobs"]
    );
    for (changes, field) in [
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"include": ["everything"]}), "include"),
    ] {
        let body = with(Route::Responses, &[&changes]);
        assert_eq!(
            refused(SMOLLM2.address, RESPONSES, &body, 400)["param"],
            field
        );
    }
}

#[test]
fn truncation_auto_drops_the_oldest_turns() {
    let turn = |number: usize| {
        json!([
            {"role": "user", "content": format!("Question {number}: {}", "why ".repeat(60))},
            {"role": "assistant", "content": format!("Answer {number}")},
        ])
    };
    let mut input: Vec<Value> = vec![json!({"role": "system", "content": "Be brief."})];
    (0..12).for_each(|number| input.extend(turn(number).as_array().unwrap().clone()));
    input.push(json!({"role": "user", "content": "And now?"}));
    let body = json!({"input": input, "max_output_tokens": 4, "temperature": 0});
    let error = refused(SMOLLM2.address, RESPONSES, &body, 400);
    assert_eq!(error["code"], "context_length_exceeded");
    let mut auto = body.clone();
    set(&mut auto, &json!({"truncation": "auto"}));
    let answer = ask(SMOLLM2.address, RESPONSES, &auto);
    assert_eq!(answer["truncation"], "auto");
    let used = prompt_tokens(&answer);
    // As much as possible is kept: less than the length of one turn is left unused.
    assert!(used <= 508 && used > 508 - 90, "{used}");
    // A single message that is too long loses its own beginning.
    let long = json!({"input": "why ".repeat(3000), "max_output_tokens": 4, "truncation": "auto"});
    assert_eq!(prompt_tokens(&ask(SMOLLM2.address, RESPONSES, &long)), 508);
}

#[test]
fn context_overflow_is_reported_in_openais_words() {
    let ids: Vec<u32> = vec![504; 600];
    for (route, changes) in [
        (Route::Completions, json!({"prompt": ids})),
        (Route::Completions, json!({"max_tokens": 5000})),
        (
            Route::Chat,
            json!({"messages": [{"role": "user", "content": "why ".repeat(600)}]}),
        ),
        (Route::Chat, json!({"max_tokens": 5000})),
        (Route::Responses, json!({"input": "why ".repeat(600)})),
        (Route::Embeddings, json!({"input": ids})),
    ] {
        let error = refused(
            SMOLLM2.address,
            route.path(),
            &with(route, &[&changes]),
            400,
        );
        assert_eq!(error["code"], "context_length_exceeded", "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("this model's maximum context length is 512 tokens"),
            "{message}"
        );
    }
}

#[test]
fn a_compressed_body_is_refused_with_its_encoding() {
    let body = good(Route::Completions).to_string();
    for (header, status) in [("gzip", 415), ("br, identity", 415), ("identity", 200)] {
        let request = String::from_utf8(post(COMPLETIONS, &body)).unwrap();
        let line = format!("\r\nContent-Encoding: {header}\r\n");
        let reply = exchange(NULL.address, request.replacen("\r\n", &line, 1).as_bytes()).unwrap();
        assert_eq!(reply.status, status, "{header}: {}", reply.text());
        if status == 415 {
            let error = reply.json()["error"]["message"]
                .as_str()
                .unwrap()
                .to_owned();
            assert!(error.contains(&header[..2]), "{error}");
        }
    }
}

#[test]
fn tokenizer_info_and_models_with_a_trailing_slash_are_served() {
    let info = fetch(SMOLLM2.address, "/tokenizer_info").json();
    assert_eq!(info["eos_token"], "<|im_end|>");
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
    assert_eq!(info["model_max_length"], 512);
    let models = fetch(SMOLLM2.address, "/v1/models").json();
    assert_eq!(fetch(SMOLLM2.address, "/v1/models/").json(), models);
    assert_eq!(models["data"][0]["id"], server::MODEL);
}

#[test]
fn token_filters_are_refused_together_with_structured_outputs() {
    for changes in [
        json!({"bad_words": ["x"]}),
        json!({"allowed_token_ids": [28]}),
    ] {
        let form = json!({"guided_choice": ["a", "b"]});
        for route in [Route::Completions, Route::Chat] {
            let error = refused(
                NULL.address,
                route.path(),
                &with(route, &[&form, &changes]),
                400,
            );
            let field = changes.as_object().unwrap().keys().next().unwrap();
            assert_eq!(error["param"], field.as_str());
        }
    }
    // With `min_tokens`, a complete answer still ends.
    let body = with(
        Route::Completions,
        &[&json!({"guided_choice": ["zebra"], "min_tokens": 6})],
    );
    assert_eq!(text(&ask(SMOLLM2.address, COMPLETIONS, &body)), "zebra");
}
