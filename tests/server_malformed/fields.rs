//! Requests with one field of a wrong type or value.
//!
//! Each is a good request with one field replaced, so that nothing else can be what is
//! refused. Values are JSON texts.

use super::http::post;
use super::{Case, Expected};

/// The fields of a request, as JSON texts.
type Fields = &'static [(&'static str, &'static str)];

/// A route, a request that it answers, and fields with values that it must refuse.
struct Route {
    path: &'static str,
    good: Fields,
    wrong: &'static [(&'static str, &'static [&'static str])],
}

/// What every request for text refuses.
const SAMPLING: &[(&str, &[&str])] = &[
    (
        "temperature",
        &["-0.1", "-1e30", "1e39", "\"hot\"", "true", "[]", "{}"],
    ),
    ("top_p", &["0", "-0.5", "1.01", "1e30", "\"all\"", "[1]"]),
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
        ],
    ),
    ("user", &["5", "[]", "{}"]),
    ("model", &["5", "[]", "{\"id\": \"test-model\"}", "true"]),
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
            ("best_of", &["0", "2", "-1", "\"x\""]),
            ("suffix", &["\"the end\"", "5"]),
        ],
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
                    "[{\"role\": \"user\", \"content\": 5}]",
                    "[{\"role\": \"user\", \"content\": true}]",
                    "[{\"role\": \"user\", \"content\": {\"text\": \"Hi\"}}]",
                    "[{\"role\": \"user\", \"content\": [\"Hi\"]}]",
                    "[{\"role\": \"user\", \"content\": [{\"text\": \"Hi\"}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": 5}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {\"url\": \"x\"}}]}]",
                    "[{\"role\": \"user\", \"content\": [{\"type\": \"input_audio\", \"text\": null}]}]",
                    "[{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"user\", \"content\": 5}]",
                    "[{\"role\": \"user\", \"role\": \"user\", \"content\": \"Hi\"}]",
                ],
            ),
            ("max_completion_tokens", &["0", "-1", "2.5", "\"many\""]),
            ("logprobs", &["1", "5", "\"yes\"", "[]"]),
            ("top_logprobs", &["1", "-1", "21", "1.5", "\"x\""]),
        ],
    },
];

/// Routes that take none of the sampling fields.
const PLAIN_ROUTES: &[Route] = &[
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
    },
];

/// In place of a value: the field is left out.
const MISSING: &str = "";

fn routes() -> impl Iterator<Item = &'static Route> {
    ROUTES.iter().chain(PLAIN_ROUTES)
}

/// A request for each route that nothing is wrong with.
pub fn good() -> impl Iterator<Item = (&'static str, String)> {
    routes().map(|route| (route.path, body(route.good, "", "")))
}

/// One field wrong in each.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for route in routes() {
        let shared = if ROUTES.iter().any(|other| other.path == route.path) {
            SAMPLING
        } else {
            &[]
        };
        for (field, values) in route.wrong.iter().chain(shared) {
            for value in *values {
                let expected = match (route.path, *field, *value) {
                    // Neither of the two, or both.
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

/// The fields with one of them replaced, or left out.
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

/// Prompts that are longer than the context.
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
