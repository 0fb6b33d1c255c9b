//! `/v1/responses` over HTTP, parsed with the types of a real client.

use async_openai::types::responses::{OutputItem, Response, ResponseStreamEvent, Status};
use common::api::{ask, events, fetch, refused, send};
use common::http::exchange;
use common::parrot::say;
use common::server::{TestServer, options};
use common::{http, parrot};
use serde_json::{Value, json};
use std::sync::LazyLock;

const RESPONSES: &str = "/v1/responses";

/// A template with Hermes tool calls and reasoning.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call></think>{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}\
    <|im_end|>\n{% endfor %}<|im_start|>assistant\n";

static SERVER: LazyLock<TestServer> =
    LazyLock::new(|| TestServer::start(parrot::engine(TEMPLATE), options()));

fn tool() -> Value {
    json!({
        "type": "function", "name": "f", "description": "d", "strict": true,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    })
}

fn create(body: Value) -> Value {
    ask(SERVER.address, RESPONSES, &body)
}

/// Parses the response with the client's type.
fn typed(response: &Value) -> Response {
    serde_json::from_value(response.clone()).unwrap()
}

fn delete(id: &str) -> http::Reply {
    let request = format!("DELETE {RESPONSES}/{id} HTTP/1.1\r\nHost: quell\r\n\r\n");
    exchange(SERVER.address, request.as_bytes()).expect("the server answers")
}

#[test]
fn a_stored_response_can_be_fetched_until_it_is_deleted() {
    let response = create(json!({
        "input": say("Yes."), "instructions": "Be kind.", "temperature": 0.7,
        "metadata": {"a": "b"}, "max_output_tokens": 50,
    }));
    let read = typed(&response);
    assert_eq!(read.status, Status::Completed);
    assert_eq!(read.output_text().as_deref(), Some("Yes."));
    assert_eq!(read.temperature, Some(0.7));
    assert_eq!(read.max_output_tokens, Some(50));
    assert_eq!(read.metadata.unwrap()["a"], "b");
    let usage = read.usage.unwrap();
    assert!(usage.input_tokens > 0 && usage.output_tokens > 1);
    assert_eq!(usage.total_tokens, usage.input_tokens + usage.output_tokens);
    let details = &response["usage"]["input_tokens_details"];
    let known = |name: &str| details[name].as_u64().unwrap();
    // Only complete blocks of 16 tokens are cached.
    let complete = u64::from(usage.input_tokens) / 16 * 16;
    assert_eq!(
        known("cache_write_tokens"),
        complete - known("cached_tokens").min(complete)
    );
    assert!(read.id.starts_with("resp_"), "{}", read.id);
    assert!(
        response["output"][0]["id"]
            .as_str()
            .unwrap()
            .starts_with("msg_")
    );

    let place = format!("{RESPONSES}/{}", read.id);
    let again = fetch(SERVER.address, &place);
    assert_eq!(again.header("content-type"), Some("application/json"));
    assert_eq!(again.json(), response);
    let deleted = json!({"id": read.id, "object": "response", "deleted": true});
    assert_eq!(delete(&read.id).json(), deleted);
    assert_eq!(fetch(SERVER.address, &place).status, 404);
    assert_eq!(delete(&read.id).status, 404);
}

#[test]
fn a_response_with_store_false_is_not_stored() {
    let response = create(json!({"input": say("Yes."), "store": false}));
    let place = format!("{RESPONSES}/{}", response["id"].as_str().unwrap());
    assert_eq!(fetch(SERVER.address, &place).status, 404);
}

#[test]
fn previous_response_id_continues_a_conversation() {
    let first = create(json!({"input": say("One."), "instructions": "Be kind."}));
    let alone = create(json!({"input": say("Two.")}));
    let second = create(json!({"input": say("Two."), "previous_response_id": first["id"]}));
    assert_eq!(second["output"][0]["content"][0]["text"], "Two.");
    assert_eq!(second["previous_response_id"], first["id"]);
    let third = create(json!({
        "input": [{"role": "user", "content": say("Three.")}],
        "previous_response_id": second["id"],
    }));
    let tokens = |response: &Value| response["usage"]["input_tokens"].as_u64().unwrap();
    assert!(tokens(&second) > tokens(&alone));
    assert!(tokens(&third) > tokens(&second));
    // Instructions apply to one response only.
    let instructed = create(json!({
        "input": say("Two."), "previous_response_id": first["id"], "instructions": "Be kind.",
    }));
    assert!(tokens(&instructed) > tokens(&second));

    let unknown = json!({"input": "Hi", "previous_response_id": "resp_0"});
    let error = refused(SERVER.address, RESPONSES, &unknown, 404);
    assert_eq!(error["param"], "previous_response_id");
}

#[test]
fn tool_calls_and_their_results_are_items() {
    let text = "<think>\nHm.\n</think>\n\nI look.\n<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
    let first = create(json!({"input": say(text), "tools": [tool()]}));
    let read = typed(&first);
    let [
        OutputItem::Reasoning(reasoning),
        OutputItem::Message(_),
        OutputItem::FunctionCall(call),
    ] = read.output.as_slice()
    else {
        panic!("three items: {first}");
    };
    assert_eq!(reasoning.content.as_ref().unwrap().len(), 1);
    assert_eq!(first["output"][0]["content"][0]["text"], "Hm.");
    assert_eq!(first["output"][1]["content"][0]["text"], "I look.");
    assert_eq!(
        (call.name.as_str(), call.arguments.as_str()),
        ("f", "{\"a\": 1}")
    );
    let reasoned = &first["usage"]["output_tokens_details"]["reasoning_tokens"];
    let all = first["usage"]["output_tokens"].as_u64().unwrap();
    assert!(
        (1..all).contains(&reasoned.as_u64().unwrap()),
        "{reasoned} of {all}"
    );

    let result = json!({
        "type": "function_call_output", "call_id": call.call_id, "output": say("Done."),
    });
    let second = create(json!({
        "input": [result], "previous_response_id": first["id"], "tools": [tool()],
    }));
    assert_eq!(second["output"][0]["content"][0]["text"], "Done.");
    // The same conversation, sent as a whole instead of stored by the server.
    let mut items = vec![json!({"role": "user", "content": say(text)})];
    items.extend(first["output"].as_array().unwrap().iter().cloned());
    items.push(result);
    let third = create(json!({"input": items, "tools": [tool()], "store": false}));
    assert_eq!(
        third["usage"]["input_tokens"],
        second["usage"]["input_tokens"]
    );
}

#[test]
fn events_follow_the_responses_protocol() {
    let text = "<think>Hm.</think>I look.<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
    let body = json!({"input": say(text), "tools": [tool()]});
    let events = events(SERVER.address, RESPONSES, &body);
    let mut kinds: Vec<&str> = Vec::new();
    let mut deltas = [String::new(), String::new(), String::new()];
    for (number, event) in events.iter().enumerate() {
        serde_json::from_value::<ResponseStreamEvent>(event.clone())
            .unwrap_or_else(|error| panic!("{event}: {error}"));
        assert_eq!(event["sequence_number"], number);
        let kind = event["type"].as_str().unwrap();
        if let Some(delta) = event["delta"].as_str() {
            let place = event["output_index"].as_u64().unwrap() as usize;
            deltas[place].push_str(delta);
        }
        if kinds.last() != Some(&kind) {
            kinds.push(kind);
        }
    }
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(kinds, expected);
    assert_eq!(deltas, ["Hm.", "I look.", "{\"a\": 1}"]);

    let last = &events.last().unwrap()["response"];
    assert_eq!(last["output"].as_array().unwrap().len(), 3);
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(events[0]["response"]["id"], last["id"]);
    let kept = fetch(
        SERVER.address,
        &format!("{RESPONSES}/{}", last["id"].as_str().unwrap()),
    );
    assert_eq!(&kept.json(), last);
}

#[test]
fn the_token_limit_makes_a_response_incomplete() {
    let body = json!({"input": say("One, two, three."), "max_output_tokens": 2});
    let response = create(body.clone());
    assert_eq!(typed(&response).status, Status::Incomplete);
    assert_eq!(
        response["incomplete_details"]["reason"],
        "max_output_tokens"
    );
    assert_eq!(response["output"][0]["status"], "incomplete");
    let events = events(SERVER.address, RESPONSES, &body);
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
}

#[test]
fn text_format_constrains_the_answer() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let response = create(json!({"input": say("{\"a\":1}"), "text": {"format": format}}));
    assert_eq!(response["output"][0]["content"][0]["text"], "{\"a\":1}");
    assert_eq!(response["text"]["format"], format);
    assert_eq!(typed(&response).status, Status::Completed);
}

#[test]
fn invalid_requests_are_refused_with_their_field() {
    for (body, field) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": 5}), "input"),
        (json!({"input": [{"type": "item_reference"}]}), "input[0]"),
        (json!({"input": [{"type": "memory"}]}), "input[0]"),
        (json!({"input": "Hi", "background": true}), "background"),
        (
            json!({"input": "Hi", "conversation": "conv_1"}),
            "conversation",
        ),
        (json!({"input": "Hi", "tools": [{"name": "f"}]}), "tools[0]"),
        (
            json!({"input": "Hi", "tool_choice": "required"}),
            "tool_choice",
        ),
        (
            json!({"input": "Hi", "text": {"format": {"type": "xml"}}}),
            "text.format",
        ),
        (
            json!({"input": "Hi", "max_output_tokens": 0}),
            "max_output_tokens",
        ),
        (
            json!({"input": "Hi", "max_output_tokens": 1_000_000}),
            "max_output_tokens",
        ),
        (json!({"input": "a ".repeat(9000)}), "input"),
        (json!({"input": "Hi", "temperature": -1}), "temperature"),
    ] {
        let error = refused(SERVER.address, RESPONSES, &body, 400);
        assert_eq!(error["param"], field, "{error}");
    }
    let other = json!({"input": "Hi", "model": "gpt-5"});
    let error = refused(SERVER.address, RESPONSES, &other, 404);
    assert_eq!(error["code"], "model_not_found");
}

#[test]
fn items_can_be_referenced_and_listed() {
    let first = create(json!({"input": say("One."), "instructions": "Be kind."}));
    let answer = &first["output"][0];
    let place = format!("{RESPONSES}/{}/input_items", first["id"].as_str().unwrap());
    let list = fetch(SERVER.address, &place).json();
    assert_eq!(
        (&list["object"], &list["has_more"]),
        (&json!("list"), &json!(false))
    );
    let [question] = list["data"].as_array().unwrap().as_slice() else {
        panic!("one item: {list}");
    };
    let parts = json!([{"type": "input_text", "text": say("One.")}]);
    assert_eq!(
        (&question["role"], &question["content"]),
        (&json!("user"), &parts)
    );
    assert_eq!(
        (&list["first_id"], &list["last_id"]),
        (&question["id"], &question["id"])
    );

    // The same prompt by reference, by value, and through `previous_response_id`.
    let reference = |item: &Value| json!({"type": "item_reference", "id": item["id"]});
    let again = json!({"role": "user", "content": say("Two.")});
    let by_reference = json!([reference(question), {"id": answer["id"]}, again]);
    let second = create(json!({"input": by_reference}));
    assert_eq!(second["output"][0]["content"][0]["text"], "Two.");
    let by_value = create(json!({"input": [question, answer, again], "store": false}));
    let before = create(json!({"input": [again], "previous_response_id": first["id"]}));
    let tokens = |response: &Value| response["usage"]["input_tokens"].clone();
    assert_eq!(tokens(&second), tokens(&by_value));
    assert_eq!(tokens(&second), tokens(&before));

    let place = format!("{RESPONSES}/{}/input_items", second["id"].as_str().unwrap());
    let page = |query: &str| fetch(SERVER.address, &format!("{place}?{query}"));
    let latest = page("limit=1").json();
    assert_eq!(latest["has_more"], true);
    assert_eq!(latest["data"][0]["content"][0]["text"], say("Two."));
    let after = latest["last_id"].as_str().unwrap();
    let rest = page(&format!("after={after}")).json();
    let ids: Vec<_> = rest["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["id"])
        .collect();
    assert_eq!(ids, [&answer["id"], &question["id"]]);
    let oldest = page("order=asc&limit=1").json();
    assert_eq!(oldest["data"][0]["id"], question["id"]);
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("after=x", "after"),
    ] {
        let reply = page(query);
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!(field))
        );
    }
    assert_eq!(page("order=up").status, 400);

    let deleted = first["id"].as_str().unwrap();
    delete(deleted);
    let gone = json!({"input": [reference(answer), again]});
    let error = refused(SERVER.address, RESPONSES, &gone, 404);
    assert_eq!(
        (&error["param"], &error["code"]),
        (&json!("input[0]"), &json!("item_not_found"))
    );
    let place = format!("{RESPONSES}/{deleted}/input_items");
    assert_eq!(fetch(SERVER.address, &place).status, 404);
}

#[test]
fn input_tokens_can_be_counted_in_advance() {
    let first = create(json!({"input": say("One.")}));
    for body in [
        json!({"input": say("Two.")}),
        json!({"input": say("Two."), "instructions": "Be kind.", "tools": [tool()]}),
        json!({"input": say("Two."), "previous_response_id": first["id"]}),
    ] {
        let count = ask(SERVER.address, "/v1/responses/input_tokens", &body);
        assert_eq!(count["object"], "response.input_tokens");
        assert_eq!(count["input_tokens"], create(body)["usage"]["input_tokens"]);
    }
    let error = refused(
        SERVER.address,
        "/v1/responses/input_tokens",
        &json!({}),
        400,
    );
    assert_eq!(error["param"], "input");
}

/// A request like those of Codex.
#[test]
fn unsupported_tools_are_skipped_and_reported() {
    let shell = json!({
        "type": "function", "name": "shell", "description": "Runs a command", "strict": true,
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "array", "items": {"type": "string"}}},
            "required": ["command"], "additionalProperties": false,
        },
    });
    let patch = json!({
        "type": "custom", "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"},
    });
    let call =
        "<tool_call>{\"name\": \"shell\", \"arguments\": {\"command\": [\"ls\"]}}</tool_call>";
    let body = json!({
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Read only."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": say(call)}]},
        ],
        "tools": [shell, patch, {"type": "web_search", "external_web_access": true}],
        "tool_choice": "auto", "parallel_tool_calls": false, "store": false,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"},
    });
    let reply = send(SERVER.address, RESPONSES, &body);
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(
        reply.header("x-quell-skipped-tools"),
        Some("custom, web_search")
    );
    let response = reply.json();
    assert_eq!(response["output"][0]["name"], "shell");
    assert_eq!(response["tools"], json!([shell]));
    assert_eq!(response["text"]["verbosity"], "low");
    let mut streamed = body;
    streamed["stream"] = true.into();
    let reply = send(SERVER.address, RESPONSES, &streamed);
    assert_eq!(
        reply.header("x-quell-skipped-tools"),
        Some("custom, web_search")
    );

    let allowed = json!({
        "type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "shell"}],
    });
    let call = "<tool_call>{\"name\":\"shell\",\"arguments\":{\"command\":[]}}</tool_call>";
    let response =
        create(json!({"input": say(call), "tools": [tool(), shell], "tool_choice": allowed}));
    assert_eq!(response["output"][0]["name"], "shell");
    assert_eq!(response["tool_choice"], allowed);
}

#[test]
fn an_answer_with_a_text_format_may_be_a_tool_call() {
    let schema = json!({"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema});
    let with = |text: &str| {
        create(json!({"input": say(text), "tools": [tool()], "text": {"format": format}}))
    };
    let call = with("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>");
    assert_eq!(call["output"][0]["type"], "function_call");
    assert_eq!(call["output"][0]["arguments"], "{\"a\": 1}");
    let text = with("{\"b\": 1}");
    assert_eq!(text["output"][0]["content"][0]["text"], "{\"b\": 1}");
}
