//! Third-party clients against the real server: the official `openai` client, langchain,
//! pydantic-ai, `async-openai`, curl and schemathesis.

#![cfg(unix)]

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    CreateChatCompletionRequest, CreateChatCompletionStreamResponse, FinishReason,
};
use common::clients::{installed, script, succeeds};
use common::model;
use common::parrot;
use common::serve::Serve;
use common::server::{TestServer, options};
use common::small_model::small_model;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::process::Command;

fn server(arguments: &[&str]) -> Serve {
    Serve::start(&model::smollm2(), arguments)
}

#[test]
fn the_official_python_client_gets_what_it_expects() {
    let server = server(&[]);
    let mut client = installed("python");
    succeeds(client.arg(script("openai_client.py")).arg(server.url()));
    server.terminate_when_idle();
}

/// The call has an argument with characters that need quotes in some formats, and a number. The
/// formats are such that no client changes their marks in what a user says, as pydantic-ai does
/// with `<|tool_call>`.
#[test]
fn clients_get_tool_calls_in_the_formats_of_three_templates() {
    let folder = common::root().join("target/references/templates");
    for (template, before, call) in [
        (
            "Qwen3.5-4B",
            "It asks for the weather.\n</think>\n\n",
            "<tool_call>\n<function=weather>\n<parameter=city>\nSão Paulo <1>\n</parameter>\n\
             <parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "GLM-4.6",
            "\n<think>It asks for the weather.</think>\n",
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>São Paulo <1></arg_value>\n\
             <arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        ),
        (
            "MiniMax-M2",
            "It asks for the weather.\n</think>\n\n",
            "<minimax:tool_call>\n<invoke name=\"weather\">\n\
             <parameter name=\"city\">São Paulo <1></parameter>\n\
             <parameter name=\"days\">3</parameter>\n</invoke>\n</minimax:tool_call>",
        ),
    ] {
        let path = folder.join(format!("{template}.jinja"));
        let source = std::fs::read_to_string(path).expect("run scripts/fetch-references");
        let server = TestServer::start(parrot::engine(&source), options());
        let mut client = installed("python");
        let url = format!("http://{}", server.address);
        succeeds(
            client
                .arg(script("tool_clients.py"))
                .args([&*url, before, call]),
        );
    }
}

#[test]
fn lm_eval_recognises_greedy_continuations() {
    let server = server(&[]);
    let mut harness = installed("python");
    // Keep the harness from contacting any other server.
    harness.env("HF_HUB_OFFLINE", "1");
    succeeds(harness.arg(script("lm_eval_client.py")).arg(server.url()));
    server.terminate_when_idle();
}

#[test]
fn curl_gets_what_it_expects() {
    let server = server(&[]);
    succeeds(
        Command::new("bash")
            .arg(script("curl.sh"))
            .arg(server.url()),
    );
    server.terminate_when_idle();
}

/// Sends valid and invalid requests that are generated from the OpenAPI document. The document
/// must describe every answer. Some requests ask for thousands of answers.
#[test]
fn every_answer_conforms_to_the_openapi_document() {
    let model = small_model();
    let server = Serve::start(model.path(), &["--context", "192"]);
    let mut schemathesis = installed("schemathesis");
    schemathesis
        .arg("--config-file")
        .arg(script("schemathesis.toml"))
        .arg("run")
        .arg(format!("{}/openapi.json", server.url()))
        .current_dir(env!("CARGO_TARGET_TMPDIR"));
    succeeds(&mut schemathesis);
    server.terminate_when_idle();
}

/// Returns a client, and the name of the model that it finds.
async fn rust_client(server: &Serve) -> (Client<OpenAIConfig>, String) {
    // async-openai is built without a TLS library, but its HTTP client needs one to be
    // installed.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let config = OpenAIConfig::new()
        .with_api_base(format!("{}/v1", server.url()))
        .with_api_key("unused");
    let client = Client::with_config(config);
    let models = client.models().list().await.unwrap();
    let name = models.data[0].id.clone();
    assert_eq!(client.models().retrieve(&name).await.unwrap().id, name);
    (client, name)
}

/// Converts JSON to the client's own request type, so that it must be able to express the
/// request.
fn typed<T: DeserializeOwned>(request: Value) -> T {
    serde_json::from_value(request).unwrap()
}

fn chat(model: &str, extra: Value) -> CreateChatCompletionRequest {
    let mut request = json!({
        "model": model,
        "messages": [{"role": "user", "content": "Who wrote Hamlet?"}],
        "max_completion_tokens": 16,
        "temperature": 0.0,
    });
    let extra = extra.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(extra);
    typed(request)
}

#[tokio::test]
async fn async_openai_chats_and_completes() {
    let server = server(&[]);
    let (client, model) = rust_client(&server).await;
    let answer = client.chat().create(chat(&model, json!({}))).await.unwrap();
    let text = answer.choices[0].message.content.clone().unwrap();
    assert!(text.contains("Shakespeare"), "{text}");
    assert!(answer.usage.unwrap().completion_tokens > 0);

    let request = chat(&model, json!({"stream_options": {"include_usage": true}}));
    let stream = client.chat().create_stream(request).await.unwrap();
    let chunks: Vec<CreateChatCompletionStreamResponse> =
        stream.map(Result::unwrap).collect().await;
    let (last, before) = chunks.split_last().unwrap();
    assert!(last.choices.is_empty() && last.usage.is_some());
    let choices = before.iter().flat_map(|chunk| &chunk.choices);
    let streamed: String = choices
        .filter_map(|choice| choice.delta.content.clone())
        .collect();
    assert_eq!(streamed, text);

    let request = chat(&model, json!({"n": 2, "logprobs": true, "top_logprobs": 2}));
    let answers = client.chat().create(request).await.unwrap();
    assert_eq!(answers.choices.len(), 2);
    let logprobs = answers.choices[1].logprobs.as_ref().unwrap();
    assert_eq!(logprobs.content.as_ref().unwrap()[0].top_logprobs.len(), 2);

    let prompt = json!({"model": model, "prompt": ["One, two,", "A, B,"], "max_tokens": 4});
    let answer = client.completions().create(typed(prompt)).await.unwrap();
    assert_eq!(answer.choices.len(), 2);
    server.terminate_when_idle();
}

#[tokio::test]
async fn async_openai_parses_errors() {
    let server = server(&[]);
    let (client, model) = rust_client(&server).await;
    let refused = |error| match error {
        OpenAIError::ApiError(refusal) => refusal,
        other => panic!("{other:?}"),
    };
    let error = client
        .chat()
        .create(chat("nobody", json!({})))
        .await
        .unwrap_err();
    let refusal = refused(error);
    assert_eq!(refusal.status_code.as_u16(), 404);
    assert_eq!(refusal.api_error.code.as_deref(), Some("model_not_found"));
    let error = client
        .chat()
        .create(chat(&model, json!({"top_p": 7.0})))
        .await
        .unwrap_err();
    let refusal = refused(error);
    assert_eq!(refusal.status_code.as_u16(), 400);
    assert_eq!(refusal.api_error.param.as_deref(), Some("top_p"));
    server.terminate_when_idle();
}

#[tokio::test]
async fn async_openai_calls_tools() {
    let server = server(&[]);
    let (client, model) = rust_client(&server).await;
    let parameters = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": false,
    });
    let function = json!({"name": "get_weather", "parameters": parameters});
    let request = chat(
        &model,
        json!({
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            "max_completion_tokens": 80,
        }),
    );
    let answer = client.chat().create(request).await.unwrap();
    let choice = &answer.choices[0];
    assert_eq!(choice.finish_reason, Some(FinishReason::ToolCalls));
    let calls = serde_json::to_value(&choice.message.tool_calls).unwrap();
    assert_eq!(calls[0]["function"]["name"], "get_weather");
    let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    assert!(arguments["city"].is_string(), "{arguments}");
    server.terminate_when_idle();
}

#[tokio::test]
async fn async_openai_gets_responses_and_embeddings() {
    let server = server(&[]);
    let (client, model) = rust_client(&server).await;
    let request = json!({
        "model": model,
        "input": "Who wrote Hamlet?",
        "max_output_tokens": 16,
        "temperature": 0.0,
    });
    let response = client
        .responses()
        .create(typed(request.clone()))
        .await
        .unwrap();
    let text = response.output_text().unwrap();
    assert!(text.contains("Shakespeare"), "{text}");
    let events = client
        .responses()
        .create_stream(typed(request))
        .await
        .unwrap();
    let events: Vec<_> = events.map(Result::unwrap).collect().await;
    assert!(events.len() > 4, "{events:?}");

    let request = json!({"model": model, "input": ["a cat", "a dog"]});
    let vectors = client.embeddings().create(typed(request)).await.unwrap();
    assert_eq!(vectors.data.len(), 2);
    assert_eq!(vectors.data[0].embedding.len(), 576);
    let request = json!({
        "model": model, "input": ["a cat", "a dog"], "encoding_format": "base64",
    });
    let packed = client
        .embeddings()
        .create_base64(typed(request))
        .await
        .unwrap();
    assert_eq!(packed.data.len(), 2);
    server.terminate_when_idle();
}

// The client's own task must notice the drop while this task waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_stream_of_async_openai_cancels_its_request() {
    let server = server(&[]);
    let (client, model) = rust_client(&server).await;
    // Make the tokens that end an answer all but impossible.
    let never = json!({"0": -100, "2": -100});
    let extra = json!({"max_completion_tokens": 8000, "logit_bias": never});
    let request = chat(&model, extra);
    let mut stream = client.chat().create_stream(request).await.unwrap();
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    server.wait_until_idle();
    let gone = "quell_request_outcomes_total{outcome=\"cancelled\",reason=\"disconnect\"";
    assert_eq!(server.metric(gone), 1.0);
    server.terminate_when_idle();
}
