//! Requests with one field of a wrong type or value.
//!
//! Each is a valid request with one field replaced, so that only this field can be the reason
//! for a refusal. Values are JSON texts.

use super::{Case, Expected};
use common::http::post;

/// The fields of a request, as JSON texts.
type Fields = &'static [(&'static str, &'static str)];

/// A route, a valid request for it, and fields with values that it must refuse.
struct Route {
    path: &'static str,
    good: Fields,
    wrong: Wrong,
    /// More fields and values to refuse, shared between routes.
    shared: &'static [Wrong],
}

type Wrong = &'static [(&'static str, &'static [&'static str])];

/// Values that every request for text must refuse.
const SAMPLING: Wrong = &[
    (
        "temperature",
        &["-0.1", "-1e30", "1e39", "\"hot\"", "true", "[]", "{}"],
    ),
    ("top_p", &["-0.5", "1.01", "1e30", "\"all\"", "[1]"]),
    ("top_k", &["-2", "4294967296", "1.5", "\"5\"", "[]"]),
    ("min_p", &["-0.1", "1.5", "\"x\"", "{}"]),
    (
        "n",
        &[
            "0",
            "-1",
            "1.5",
            "1000000",
            "18446744073709551616",
            "\"2\"",
            "[]",
        ],
    ),
    (
        "max_tokens",
        &["0", "-1", "2.5", "1e30", "\"many\"", "true", "{}"],
    ),
    ("presence_penalty", &["2.1", "-2.1", "1e39", "\"x\""]),
    ("frequency_penalty", &["2.5", "-9", "\"x\"", "[]"]),
    ("repetition_penalty", &["0", "-1", "1e39", "\"x\""]),
    (
        "logit_bias",
        &[
            "5",
            "\"x\"",
            "[1, 2]",
            "{\"a\": 1}",
            "{\"-1\": 1}",
            "{\"1.5\": 1}",
            "{\"\": 1}",
            "{\"99999999\": 1}",
            "{\"4294967296\": 1}",
            "{\"1\": \"x\"}",
            "{\"1\": null}",
            "{\"1\": 100.5}",
            "{\"1\": -101}",
        ],
    ),
    (
        "seed",
        &["1.5", "\"x\"", "1e40", "99999999999999999999", "[]"],
    ),
    (
        "stop",
        &[
            "\"\"",
            "[\"\"]",
            "[\"a\", \"\"]",
            "5",
            "[5]",
            "[null]",
            "{}",
            "true",
            MANY_STOPS,
        ],
    ),
    (
        "stop_token_ids",
        &["5", "[-1]", "[1.5]", "[4294967296]", "[\"a\"]", "{}"],
    ),
    ("ignore_eos", &["1", "\"yes\"", "[]"]),
    ("stream", &["1", "\"true\"", "[]", "{}"]),
    (
        "stream_options",
        &[
            "5",
            "\"x\"",
            "{\"include_usage\": 1}",
            "{\"include_usage\": \"no\"}",
            "[true]",
        ],
    ),
    ("user", &["5", "[]", "{}"]),
    ("model", &["5", "[]", "{\"id\": \"test-model\"}", "true"]),
];

/// Fields that limit the tokens of an answer or its prompt.
const LIMITS: Wrong = &[
    ("min_tokens", &["-1", "1.5", "\"x\"", "2", "[]"]),
    (
        "bad_words",
        &["5", "\"x\"", "[5]", "[\"\"]", "[\" \"]", "{}"],
    ),
    (
        "allowed_token_ids",
        &["5", "[]", "[-1]", "[1.5]", "[\"a\"]", "[99999999]", "{}"],
    ),
    ("truncate_prompt_tokens", &["0", "-2", "1.5", "\"x\"", "[]"]),
    ("truncation_side", &["\"middle\"", "5"]),
    ("prompt_logprobs", &["-1", "21", "1.5", "\"x\""]),
    ("skip_special_tokens", &["1", "\"yes\""]),
    ("include_stop_str_in_output", &["1", "\"yes\""]),
    ("return_tokens_as_token_ids", &["1"]),
    ("request_id", &["5", "\"\"", "[]"]),
    ("priority", &["1.5", "\"high\"", "4294967296"]),
];

/// Fields that constrain the form of an answer.
const STRUCTURE: Wrong = &[
    (
        "response_format",
        &[
            "5",
            "\"json_object\"",
            "[]",
            "{}",
            "{\"type\": 5}",
            "{\"type\": \"xml\"}",
            "[\"json_object\"]",
            "[\"json_schema\", {\"schema\": {}}]",
            "{\"type\": \"json_schema\"}",
            "{\"type\": \"json_schema\", \"json_schema\": [{}]}",
            "{\"type\": \"json_schema\", \"json_schema\": null}",
            "{\"type\": \"json_schema\", \"json_schema\": {}}",
            "{\"type\": \"json_schema\", \"json_schema\": {\"schema\": 5}}",
            "{\"type\": \"json_schema\", \"json_schema\": {\"schema\": {\"type\": \"strong\"}}}",
            "{\"type\": \"json_schema\", \"json_schema\": {\"schema\": {\"$ref\": \"#/nowhere\"}}}",
        ],
    ),
    (
        "guided_json",
        &[
            "5",
            "[1]",
            "\"{\"",
            "{\"type\": \"strong\"}",
            "{\"type\": 5}",
            "{\"enum\": []}",
        ],
    ),
    (
        "guided_regex",
        &["5", "[]", "\"(\"", "\"[\"", "\"a{5,2}\"", "\"(?<=a)b\""],
    ),
    ("guided_choice", &["5", "[]", "[5]", "\"a\"", "{}"]),
    (
        "guided_grammar",
        &["5", "\"no grammar at all\"", "\"start: missing\"", "\"\""],
    ),
    (
        "structured_outputs",
        &[
            "5",
            "\"regex\"",
            "[]",
            "[null, true, null, null, null]",
            "{\"regex\": 5}",
            "{\"regex\": \"(\"}",
            "{\"regex\": \"a\", \"json_object\": true}",
            "{\"choice\": []}",
            "{\"json\": {\"type\": \"strong\"}}",
        ],
    ),
];

/// Fields for tools, in the chat API's form.
const TOOLS: Wrong = &[
    (
        "tools",
        &[
            "5",
            "\"search\"",
            "{}",
            "[5]",
            "[\"search\"]",
            "[{}]",
            "[{\"type\": \"function\"}]",
            "[{\"type\": 5}]",
            "[{\"name\": \"f\"}]",
            "[{\"type\": \"function\", \"function\": 5}]",
            "[{\"type\": \"function\", \"function\": {}}]",
            "[{\"type\": \"function\", \"function\": {\"name\": \"\"}}]",
            "[{\"type\": \"function\", \"function\": {\"name\": 5}}]",
            "[{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": 5}}]",
        ],
    ),
    (
        "tool_choice",
        &[
            "5",
            "\"sometimes\"",
            "\"required\"",
            "{}",
            "{\"type\": \"function\"}",
            "{\"type\": \"function\", \"function\": {}}",
            "{\"type\": \"function\", \"function\": {\"name\": \"nobody\"}}",
            "{\"type\": \"function\", \"function\": {\"name\": 5}}",
            "{\"type\": \"web_search\"}",
            "{\"type\": \"allowed_tools\"}",
            "{\"type\": \"allowed_tools\", \"allowed_tools\": {\"mode\": \"maybe\", \"tools\": []}}",
            "{\"type\": \"allowed_tools\", \"allowed_tools\": {\"mode\": \"auto\", \"tools\": [5]}}",
            "{\"type\": \"allowed_tools\", \"allowed_tools\": {\"mode\": \"required\", \"tools\": []}}",
        ],
    ),
    (
        "functions",
        &[
            "5",
            "{}",
            "[5]",
            "[{}]",
            "[{\"name\": 5}]",
            "[{\"name\": \"f\", \"parameters\": 5}]",
        ],
    ),
    (
        "function_call",
        &["5", "\"required\"", "{}", "{\"name\": \"nobody\"}"],
    ),
    ("parallel_tool_calls", &["1", "\"yes\""]),
];

/// Seventeen strings, one more than is accepted.
const MANY_STOPS: &str = "[\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\",\"p\",\"q\"]";

const ROUTES: &[Route] = &[
    Route {
        path: "/v1/completions",
        good: &[
            ("model", "\"test-model\""),
            ("prompt", "\"Hi\""),
            ("max_tokens", "1"),
        ],
        wrong: &[
            (
                "prompt",
                &[
                    MISSING,
                    "null",
                    "5",
                    "1.5",
                    "true",
                    "{}",
                    "{\"text\": \"Hi\"}",
                    "[]",
                    "[[]]",
                    "[[], []]",
                    "[\"Hi\", 5]",
                    "[5, \"Hi\"]",
                    "[\"Hi\", []]",
                    "[[1, 2], \"\", [[]]]",
                    "[null]",
                    "[true]",
                    "[{}]",
                    "[1.5]",
                    "[-1]",
                    "[49152]",
                    "[4294967295]",
                    "[4294967296]",
                    "[18446744073709551616]",
                    "[[1], [99999999]]",
                    "[[1, [2]]]",
                ],
            ),
            (
                "logprobs",
                &["-1", "21", "4294967296", "1.5", "true", "\"all\""],
            ),
            ("echo", &["1", "\"yes\"", "{}"]),
            ("best_of", &["0", "1000000", "-1", "\"x\""]),
            ("suffix", &["\"the end\"", "5"]),
        ],
        shared: &[SAMPLING, LIMITS, STRUCTURE],
    },
    Route {
        path: "/v1/chat/completions",
        good: &[
            ("model", "\"test-model\""),
            ("messages", "[{\"role\": \"user\", \"content\": \"Hi\"}]"),
            ("max_tokens", "1"),
        ],
        wrong: &[
            (
                "messages",
                &[
                    MISSING,
                    "null",
                    "5",
                    "\"Hi\"",
                    "true",
                    "{}",
                    "{\"role\": \"user\", \"content\": \"Hi\"}",
                    "[]",
                    "[null]",
                    "[5]",
                    "[\"Hi\"]",
                    "[[]]",
                    "[{}]",
                    "[{\"content\": \"Hi\"}]",
                    "[{\"role\": null, \"content\": \"Hi\"}]",
                    "[{\"role\": 5, \"content\": \"Hi\"}]",
                    "[{\"role\": [\"user\"], \"content\": \"Hi\"}]",
                    "[{\"role\": {\"name\": \"user\"}, \"content\": \"Hi\"}]",
                    "[{\"role\": \"villain\", \"content\": \"Hi\"}]",
                    "[{\"role\": \"user\", \"content\": 5}]",
                    "[{\"role\": \"user\", \"content\": true}]",
                    "[{\"role\": \"user\", \"content\": {\"text\": \"Hi\"}}]",
                    "[{\"role\": \"user\", \"content\": [\"Hi\"]}]",
                    "[{\"role\": \"user\", \"content\": [{\"text\": \"Hi\"}]}]",
                    "[{\"role\": \"user\", \"content\": [[\"text\", \"Hi\", null]]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": 5}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {\"url\": \"x\"}}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"input_audio\", \"text\": null}]}]",
                    "[{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"user\", \"content\": 5}]",
                    "[{\"role\": \"user\", \"role\": \"user\", \"content\": \"Hi\"}]",
                ],
            ),
            ("max_completion_tokens", &["0", "-1", "2.5", "\"many\""]),
            ("chat_template_kwargs", &["5", "[]", "\"x\""]),
            ("reasoning_effort", &["5", "[]"]),
            ("include_reasoning", &["1"]),
            ("add_generation_prompt", &["\"no\""]),
            ("continue_final_message", &["\"no\"", "5"]),
            ("chat_template", &["\"x\"", "5"]),
            ("documents", &["5", "[5]", "\"x\""]),
            ("logprobs", &["1", "5", "\"yes\"", "[]"]),
            ("top_logprobs", &["1", "-1", "21", "1.5", "\"x\""]),
        ],
        shared: &[SAMPLING, LIMITS, STRUCTURE, TOOLS],
    },
    Route {
        path: "/v1/responses",
        good: &[
            ("model", "\"test-model\""),
            ("input", "\"Hi\""),
            ("max_output_tokens", "1"),
        ],
        wrong: &[
            (
                "input",
                &[
                    MISSING,
                    "null",
                    "5",
                    "true",
                    "{}",
                    "[]",
                    "[5]",
                    "[\"Hi\"]",
                    "[null]",
                    "[{}]",
                    "[{\"type\": 5}]",
                    "[{\"type\": \"image\"}]",
                    "[{\"role\": 5, \"content\": \"Hi\"}]",
                    "[{\"role\": \"user\", \"content\": 5}]",
                    "[{\"role\": \"user\", \"content\": [\"Hi\"]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"input_image\"}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"input_text\"}]}]",
                    "[{\"type\": \"message\", \"content\": \"Hi\"}]",
                    "[{\"type\": \"function_call\"}]",
                    "[{\"type\": \"function_call\", \"call_id\": \"1\", \"name\": 5, \"arguments\": \"{}\"}]",
                    "[{\"type\": \"function_call_output\", \"output\": \"1\"}]",
                    "[{\"type\": \"item_reference\"}]",
                    "[{\"type\": \"memory\"}]",
                ],
            ),
            ("instructions", &["5", "[]"]),
            ("max_output_tokens", &["0", "-1", "2.5", "\"many\""]),
            ("previous_response_id", &["5", "[]"]),
            ("background", &["true", "5"]),
            ("conversation", &["\"c\"", "{}"]),
            (
                "text",
                &[
                    "5",
                    "{\"format\": 5}",
                    "{\"format\": {\"type\": \"xml\"}}",
                    "{\"format\": {\"type\": \"json_schema\"}}",
                    "{\"format\": {\"type\": \"json_schema\", \"name\": \"n\", \"schema\": {\"type\": \"strong\"}}}",
                ],
            ),
            (
                "reasoning",
                &["5", "\"much\"", "[\"low\"]", "{\"effort\": 5}"],
            ),
            ("metadata", &["5", "[]"]),
            ("store", &["1"]),
            ("include", &["5", "[5]", "[\"everything\"]"]),
            ("top_logprobs", &["-1", "21", "1", "\"x\""]),
            ("truncation", &["\"sometimes\"", "5"]),
            ("stream", &["\"yes\""]),
            ("temperature", &["-1", "\"hot\""]),
            ("top_p", &["-1", "2"]),
            (
                "tools",
                &[
                    "5",
                    "[{\"type\": \"function\"}]",
                    "[{\"type\": 5}]",
                    "[{\"type\": \"function\", \"name\": \"\"}]",
                ],
            ),
            (
                "tool_choice",
                &[
                    "\"sometimes\"",
                    "\"required\"",
                    "{\"type\": \"function\", \"name\": \"nobody\"}",
                ],
            ),
            ("model", &["5"]),
        ],
        shared: &[],
    },
    Route {
        path: "/tokenize",
        good: &[("model", "\"test-model\""), ("prompt", "\"Hi\"")],
        wrong: &[
            ("prompt", &[MISSING, "null", "5", "[]", "{}", "[\"Hi\"]"]),
            (
                "messages",
                &[
                    "[{\"role\": \"user\", \"content\": \"Hi\"}]",
                    "5",
                    "[5]",
                    "\"Hi\"",
                ],
            ),
            ("add_special_tokens", &["1", "\"yes\""]),
            ("model", &["5"]),
        ],
        shared: &[],
    },
    Route {
        path: "/detokenize",
        good: &[("model", "\"test-model\""), ("tokens", "[1, 2]")],
        wrong: &[
            (
                "tokens",
                &[
                    MISSING,
                    "null",
                    "5",
                    "\"Hi\"",
                    "{}",
                    "[\"a\"]",
                    "[-1]",
                    "[1.5]",
                    "[49152]",
                    "[4294967296]",
                    "[[1]]",
                    "[null]",
                ],
            ),
            ("model", &["5"]),
        ],
        shared: &[],
    },
];

/// Stands for a missing value: the field is left out.
const MISSING: &str = "";

/// Returns a valid request for each route.
pub fn good() -> impl Iterator<Item = (&'static str, String)> {
    ROUTES
        .iter()
        .map(|route| (route.path, body(route.good, "", "")))
}

/// Returns the bad requests, each with one wrong field.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for route in ROUTES {
        let shared = route.shared.iter().copied().flatten();
        for (field, values) in route.wrong.iter().chain(shared) {
            for value in *values {
                let expected = match (route.path, *field, *value) {
                    // With both fields, the error names `prompt`.
                    ("/tokenize", "messages", "[{\"role\": \"user\", \"content\": \"Hi\"}]") => {
                        Expected::bad_field("prompt")
                    }
                    _ => Expected::bad_field(field),
                };
                cases.push(case(route, field, value, expected));
            }
        }
        for name in [
            "\"\"",
            "\"no-such-model\"",
            "\"TEST-MODEL\"",
            "\"test-model \"",
        ] {
            let expected = Expected::Refused {
                status: 404,
                param: Some("model".to_owned()),
                code: Some("model_not_found"),
            };
            cases.push(case(route, "model", name, expected));
        }
    }
    cases.extend(too_long());
    cases.push(Case {
        name: "an unknown previous response".to_owned(),
        sent: post(
            "/v1/responses",
            r#"{"input": "Hi", "previous_response_id": "resp_nothing"}"#,
        ),
        expected: Expected::Refused {
            status: 404,
            param: Some("previous_response_id".to_owned()),
            code: Some("previous_response_not_found"),
        },
    });
    cases
}

fn case(route: &Route, field: &str, value: &str, expected: Expected) -> Case {
    let shown: String = value.chars().take(60).collect();
    Case {
        name: format!("{} with {field} {shown}", route.path),
        sent: post(route.path, body(route.good, field, value)),
        expected,
    }
}

/// Builds a body from the fields, with one of them replaced or left out.
fn body(good: Fields, field: &str, value: &str) -> String {
    let kept = good.iter().filter(|(name, _)| *name != field);
    let replaced = [(field, value)];
    let replaced = replaced.iter().filter(|(_, value)| *value != MISSING);
    let all = kept.chain(replaced);
    let all: Vec<_> = all
        .map(|(name, value)| format!("{name:?}: {value}"))
        .collect();
    format!("{{{}}}", all.join(", "))
}

/// Returns requests with prompts longer than the context.
fn too_long() -> Vec<Case> {
    let ids = vec!["7"; 9000].join(",");
    let words = "word ".repeat(9000);
    let bodies = [
        ("/v1/completions", "prompt", format!("[{ids}]")),
        ("/v1/completions", "prompt", format!("[[1, 2], [{ids}]]")),
        ("/v1/completions", "prompt", format!("{words:?}")),
        (
            "/v1/chat/completions",
            "messages",
            format!("[{{\"role\": \"user\", \"content\": {words:?}}}]"),
        ),
    ];
    let each = bodies.into_iter().map(|(path, field, value)| Case {
        name: format!("{path} with a {field} that is too long"),
        sent: post(
            path,
            format!("{{\"model\": \"test-model\", \"{field}\": {value}}}"),
        ),
        expected: Expected::Refused {
            status: 400,
            param: Some(field.to_owned()),
            code: Some("context_length_exceeded"),
        },
    });
    each.collect()
}
