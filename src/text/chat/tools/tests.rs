//! Tests of every format, on whole answers and on answers that arrive one character at a time.

use super::written::{MARKS, Segment, any_segment, any_string, declared, written};
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Returns the events of an answer that arrives in these pieces, with adjacent events of
/// the same kind merged.
fn parse<'a>(mut parser: ToolParser, pieces: impl IntoIterator<Item = &'a str>) -> Vec<ToolEvent> {
    let mut all = Vec::new();
    let mut add = |events: Vec<ToolEvent>| {
        for event in events {
            match (all.last_mut(), event) {
                (Some(ToolEvent::Text(text)), ToolEvent::Text(more)) => text.push_str(&more),
                (
                    Some(ToolEvent::CallArguments { index, delta }),
                    ToolEvent::CallArguments {
                        index: same,
                        delta: more,
                    },
                ) if *index == same => delta.push_str(&more),
                (_, event) => all.push(event),
            }
        }
    };
    for piece in pieces {
        add(parser.push(piece));
    }
    add(parser.finish());
    all
}

fn parser(format: ToolFormat) -> ToolParser {
    let tools = ["f", "get_weather"].map(|name| ToolDeclaration::new(name, None));
    ToolParser::new(format, tools)
}

/// Formats events briefly: `"text"`, `name(arguments)`, and `name(arguments` if cut off.
fn show(events: &[ToolEvent]) -> String {
    let mut shown = String::new();
    let mut calls = 0;
    for event in events {
        match event {
            ToolEvent::Text(text) => shown.push_str(&format!(" {text:?}")),
            ToolEvent::CallBegin { index, name } => {
                assert_eq!(*index, calls, "calls are counted");
                calls += 1;
                shown.push_str(&format!(" {name}("));
            }
            ToolEvent::CallArguments { index, delta } => {
                assert_eq!(index + 1, calls, "arguments belong to the last call");
                shown.push_str(delta);
            }
            ToolEvent::CallEnd { index } => {
                assert_eq!(index + 1, calls, "the last call ends");
                shown.push(')');
            }
        }
    }
    shown.trim_start().to_owned()
}

/// Checks the events of each answer, in the format of [`show`].
fn check(format: ToolFormat, cases: &[(&str, &str)]) {
    for (answer, expected) in cases {
        let whole = show(&parse(parser(format), [*answer]));
        assert_eq!(&whole, expected, "{format:?}: {answer}");
        let characters = show(&parse(parser(format), answer.split("")));
        assert_eq!(&characters, expected, "{format:?}, by characters: {answer}");
    }
}

#[test]
fn hermes_calls_are_read() {
    let cases = [
        ("Just text. \n", r#""Just text. \n""#),
        (
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>",
            r#"f({"a": 1})"#,
        ),
        (
            "I look.\n\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{\"b\":[]}}</tool_call> \nDone.",
            r#""I look." f({}) g({"b":[]}) " \nDone.""#,
        ),
        // Braces, quotes and marks in strings.
        (
            r#"<tool_call>{"name":"f","arguments":{"a":"}\"{</tool_call>\\","b":{"c":[{}]}}}</tool_call>"#,
            r#"f({"a":"}\"{</tool_call>\\","b":{"c":[{}]}})"#,
        ),
        // Other keys, another order, and a name with escapes.
        (
            r#"<tool_call>{"id":[7],"arguments":{"a":1},"type":"function","name":"\u0066"}</tool_call>"#,
            r#"f({"a":1})"#,
        ),
        // Arguments as a string, as null, and missing.
        (
            r#"<tool_call>{"name":"f","arguments":"{\"a\":1}"}</tool_call>"#,
            r#"f({"a":1})"#,
        ),
        (
            r#"<tool_call>{"name":"f","arguments":null}</tool_call>"#,
            "f({})",
        ),
        (r#"<tool_call>{"name":"f"}</tool_call>"#, "f({})"),
        // The closing mark is missing or cut off, or a brace is missing.
        (r#"<tool_call>{"name":"f","arguments":{}}"#, "f({})"),
        (r#"<tool_call>{"name":"f","arguments":{}}</tool_"#, "f({})"),
        (
            "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}\n</tool_call>",
            "f({\"a\":1}) \"</tool_call>\"",
        ),
        (
            r#"<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g"}"#,
            "f({}) g({})",
        ),
    ];
    check(ToolFormat::Hermes, &cases);
}

#[test]
fn a_call_that_is_cut_off_has_no_end() {
    let cases = [
        (
            r#"<tool_call>{"name":"f","arguments":{"a": "b"#,
            r#"f({"a": "b"#,
        ),
        (
            r#"<tool_call>{"name":"f","arguments":{"a":1}, "#,
            r#"f({"a":1}"#,
        ),
        // Text that is cut off before the call is announced stays text.
        (
            r#"a <tool_call>{"name":"f""#,
            r#""a <tool_call>{\"name\":\"f\"""#,
        ),
        ("a <tool_", r#""a <tool_""#),
    ];
    check(ToolFormat::Hermes, &cases);
}

#[test]
fn what_is_no_call_is_text() {
    let cases = [
        (
            "<tool_call>f(1)</tool_call>",
            r#""<tool_call>f(1)</tool_call>""#,
        ),
        (r#"<tool_call>{"name":1}"#, r#""<tool_call>{\"name\":1}""#),
        (
            r#"<tool_call>{"arguments":{}}"#,
            r#""<tool_call>{\"arguments\":{}}""#,
        ),
        (
            "<tool_call>{\"name\": <tool_call>{\"name\":\"f\"}",
            "\"<tool_call>{\\\"name\\\":\" f({})",
        ),
        (
            r#"<tool_call>{"name":"f","arguments":{"a":]}}"#,
            r#"f({"a":) "]}}""#,
        ),
    ];
    check(ToolFormat::Hermes, &cases);
}

#[test]
fn llama_calls_are_read() {
    let cases = [
        (
            r#"{"name": "f", "parameters": {"a": "b"}}"#,
            r#"f({"a": "b"})"#,
        ),
        (
            " \n{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}; {\"name\": \"get_weather\", \"parameters\": {}}",
            "f({}) get_weather({})",
        ),
        (
            r#"<|python_tag|>{"name": "other", "parameters": {}}"#,
            "other({})",
        ),
        (
            r#"So: <|python_tag|>{"name": "f", "arguments": {}} and"#,
            r#""So:" f({}) " and""#,
        ),
        (
            r#"<|python_start|>{"name": "f", "parameters": {}}<|python_end|>"#,
            "f({})",
        ),
        // JSON answers that are not calls, because of their keys, their name or their
        // arguments.
        (
            r#"{"city": "Paris", "name": "f"}"#,
            r#""{\"city\": \"Paris\", \"name\": \"f\"}""#,
        ),
        (
            r#"{"name": "Paris", "parameters": {}}"#,
            r#""{\"name\": \"Paris\", \"parameters\": {}}""#,
        ),
        (r#"{"name": "f"}"#, r#""{\"name\": \"f\"}""#),
        (
            r#"[{"name": "f", "parameters": {}}]"#,
            r#""[{\"name\": \"f\", \"parameters\": {}}]""#,
        ),
        (
            r#"See {"name": "f", "parameters": {}}"#,
            r#""See {\"name\": \"f\", \"parameters\": {}}""#,
        ),
        ("<|python_tag|>print(1)", r#""<|python_tag|>print(1)""#),
    ];
    check(ToolFormat::Llama, &cases);
}

#[test]
fn an_answer_in_json_is_not_held_back() {
    let mut parser = parser(ToolFormat::Llama);
    assert_eq!(parser.push("{\"ci"), []);
    let text = |text: &str| vec![ToolEvent::Text(text.to_owned())];
    assert_eq!(parser.push("ty\": "), text("{\"city\":"));
    assert_eq!(parser.push("1"), text(" 1"));
}

#[test]
fn mistral_calls_are_read() {
    let cases = [
        (
            r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}, "id": "x"}]"#,
            r#"f({"a": [1]}) g({})"#,
        ),
        (
            r#"[TOOL_CALLS]f[ARGS]{"a": {"b": "}"}}[TOOL_CALLS]g[ARGS]{}"#,
            r#"f({"a": {"b": "}"}}) g({})"#,
        ),
        (
            r#"Hm.[TOOL_CALLS]get-it.v2[CALL_ID]a1B[ARGS]{}"#,
            r#""Hm." get-it.v2({})"#,
        ),
        (r#"[TOOL_CALLS]f{"a": 1}"#, r#"f({"a": 1})"#),
        (r#"[TOOL_CALLS] [{"name": "f", "arguments": {}}, "#, "f({})"),
        (
            r#"[TOOL_CALLS] [{"name": "f", "arguments": {}}, 3]"#,
            r#"f({}) ", 3]""#,
        ),
        ("[TOOL_CALLS] []", r#""[TOOL_CALLS] []""#),
        ("[TOOL_CALLS]f[ARGS]no", r#""[TOOL_CALLS]f[ARGS]no""#),
        ("[TOOL_CALLS]not a name{}", r#""[TOOL_CALLS]not a name{}""#),
        ("[TOOL_CALLS]f[CALL_", r#""[TOOL_CALLS]f[CALL_""#),
    ];
    check(ToolFormat::Mistral, &cases);
}

#[test]
fn pythonic_calls_are_read() {
    let cases = [
        (
            r#"[f(a="x", b=[1, -2.5, (True,)], c={'d': None}), get_weather()]"#,
            r#"f({"a": "x", "b": [1, -2.5, [true]], "c": {"d": null}}) get_weather({})"#,
        ),
        (
            r#"<|python_start|>[other(a='it\'s "x"\n' "\u00e9\q", b=1_000, c=.5,)]<|python_end|>"#,
            r#"other({"a": "it's \"x\"\né\\q", "b": 1000, "c": 0.5})"#,
        ),
        (r#"[f(a=")]}", b='(')]"#, r#"f({"a": ")]}", "b": "("})"#),
        (r#"[f(a=1), g(b=2)] ok"#, r#"f({"a": 1}) ", g(b=2)] ok""#),
        ("[1] is a source.", r#""[1] is a source.""#),
        ("[other(a=1)]", r#""[other(a=1)]""#),
        ("[f(1)]", r#""[f(1)]""#),
        ("[f(a=b)]", r#""[f(a=b)]""#),
        ("[f(a=[1)]", r#""[f(a=[1)]""#),
        ("[f(a=1", r#""[f(a=1""#),
        ("[f(a=1), ", r#"f({"a": 1})"#),
        ("See [f(a=1)]", r#""See [f(a=1)]""#),
    ];
    check(ToolFormat::Pythonic, &cases);
}

#[test]
fn literals_nested_without_end_are_text() {
    let deep = format!("[f(a={}1{})]", "[".repeat(100_000), "]".repeat(100_000));
    let events = parse(parser(ToolFormat::Pythonic), [deep.as_str()]);
    assert_eq!(events, [ToolEvent::Text(deep)]);
}

#[test]
fn deepseek_calls_are_read() {
    let cases = [
        (
            "Hm.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": {}}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            r#""Hm." f({"a": {}}) g({})"#,
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            r#"f({"a": 1}) g({})"#,
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁cal",
            r#"f({"a": 1})"#,
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\"",
            r#"f({"a""#,
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f {}",
            r#""<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f {}""#,
        ),
        ("<｜tool▁calls▁begin｜>no", r#""<｜tool▁calls▁begin｜>no""#),
    ];
    check(ToolFormat::DeepSeek, &cases);
}

#[test]
fn granite_calls_are_read() {
    let cases = [
        (
            r#"<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]"#,
            r#"f({"a": 1}) g({})"#,
        ),
        (
            r#"<tool_call>[{"arguments": {"a": 1}, "name": "f"}]"#,
            r#"f({"a": 1})"#,
        ),
        (
            r#"Hm. <|tool_call|>[{"name": "f"}]<|/tool_call|>"#,
            r#""Hm." f({})"#,
        ),
        ("<|tool_call|>no", r#""<|tool_call|>no""#),
    ];
    check(ToolFormat::Granite, &cases);
}

#[test]
fn arguments_are_streamed_as_they_come() {
    let mut parser = parser(ToolFormat::Hermes);
    assert_eq!(parser.push("<tool_call>{\"name\": \"f\", \"arg"), []);
    let begin = ToolEvent::CallBegin {
        index: 0,
        name: "f".to_owned(),
    };
    let arguments = |delta: &str| ToolEvent::CallArguments {
        index: 0,
        delta: delta.to_owned(),
    };
    let events = parser.push("uments\": {\"a");
    assert_eq!(events, [begin, arguments("{\"a")]);
    assert_eq!(parser.push("\": "), [arguments("\": ")]);
    let end = ToolEvent::CallEnd { index: 0 };
    assert_eq!(parser.push("1}}\n"), [arguments("1}"), end]);
    assert_eq!(parser.finish(), []);
    assert_eq!(parser.calls(), 1);
}

#[test]
fn forced_answers_are_calls_in_every_format() {
    for format in ToolFormat::ALL {
        let several = r#"[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": {}}]"#;
        for (answer, expected) in [
            (several, r#"f({"a": 1}) g({})"#),
            (r#"{"name": "f", "parameters": {}}"#, "f({})"),
            (r#"{"name": "f", "arguments": {"a"#, r#"f({"a"#),
        ] {
            let events = parse(ToolParser::forced(format), answer.split(""));
            assert_eq!(show(&events), expected, "{format:?}");
        }
    }
}

/// A tool with arguments of several types.
fn typed(format: ToolFormat) -> ToolParser {
    let parameters = json!({"type": "object", "properties": {
        "text": {"type": "string"},
        "number": {"type": "integer"},
        "list": {"type": "array", "items": {"type": "string"}},
        "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "choice": {"enum": ["1", "2"]},
    }});
    ToolParser::new(format, [ToolDeclaration::new("f", Some(parameters))])
}

#[test]
fn arguments_between_tags_have_the_types_that_the_tool_declares() {
    let read = |format, answer: &str| {
        let whole = show(&parse(typed(format), [answer]));
        let characters = show(&parse(typed(format), answer.split("")));
        assert_eq!(characters, whole, "{answer}");
        whole
    };
    let value = |key: &str, text: &str| {
        let call = format!("<function=f>\n<parameter={key}>\n{text}\n</parameter>\n</function>");
        read(
            ToolFormat::QwenCoder,
            &format!("<tool_call>\n{call}\n</tool_call>"),
        )
    };
    for (key, text, expected) in [
        ("text", "12", "\"12\""),
        ("text", "\n a\"b\\\n", r#""\n a\"b\\\n""#),
        ("text", "", "\"\""),
        ("text", "if a < b:\n  </para", r#""if a < b:\n  </para""#),
        ("number", "12", "12"),
        ("number", " 12 ", "12"),
        ("number", "twelve", "\"twelve\""),
        ("list", "[\"a\"]", "[\"a\"]"),
        ("list", "['a', None]", "[\"a\", null]"),
        ("flag", "True", "true"),
        ("flag", "false", "false"),
        ("maybe", "None", "null"),
        ("maybe", "null", "null"),
        ("maybe", "7", "\"7\""),
        ("either", "7", "7"),
        ("either", "7a", "\"7a\""),
        ("either", "true", "\"true\""),
        ("choice", "1", "\"1\""),
        ("undeclared", "{\"a\": 1}", "{\"a\": 1}"),
        ("undeclared", "some text", "\"some text\""),
        ("undeclared", "007", "\"007\""),
    ] {
        assert_eq!(
            value(key, text),
            format!("f({{\"{key}\": {expected}}})"),
            "{text:?}"
        );
    }
}

#[test]
fn calls_between_tags_are_read_in_the_ways_models_write_them() {
    check(
        ToolFormat::QwenCoder,
        &[
            // Without the outer tags, several calls, and text around them.
            (
                "I look.\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
                r#""I look." f({"a": "x"})"#,
            ),
            (
                "<tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n\n</parameter>\n</function>\n</tool_call>",
                r#"f({}) get_weather({"a": 1, "b": ""})"#,
            ),
            (
                "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n<function=f>\n</function>\n</tool_call> Done.",
                r#"f({"a": 1}) f({}) " Done.""#,
            ),
            // Cut off by the length limit.
            ("<tool_call>\n<function=f>\n<parameter=a>\n1", r#"f({"a": "#),
            (
                "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</func",
                r#"f({"a": 1"#,
            ),
            ("<tool_call>\n<func", "\"<tool_call>\\n<func\""),
            // Something else than a call, and something else within one.
            ("<tool_call> is a tag", "\"<tool_call> is a tag\""),
            ("<function=no name>", "\"<function=no name>\""),
            (
                "<function=f>\noops</function>",
                "f({}) \"\\noops</function>\"",
            ),
        ],
    );
    check(
        ToolFormat::Glm,
        &[
            (
                "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n</tool_call>",
                r#"f({"a": "x y"})"#,
            ),
            (
                "<tool_call>f<arg_key>a</arg_key><arg_value>[1]</arg_value></tool_call><tool_call>get_weather</tool_call>",
                r#"f({"a": [1]}) get_weather({})"#,
            ),
            ("<tool_call>f\n<arg_key>a</arg_key>", "f({"),
            ("<tool_call><b>", "\"<tool_call><b>\""),
        ],
    );
    check(
        ToolFormat::MiniMax,
        &[(
            "Hm.\n<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"a\">x</parameter>\n</invoke>\n<invoke name=\"get_weather\">\n</invoke>\n</minimax:tool_call>",
            r#""Hm." f({"a": "x"}) get_weather({})"#,
        )],
    );
    check(
        ToolFormat::Seed,
        &[(
            "<seed:tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</seed:tool_call>",
            r#"f({"a": "\nx\n"})"#,
        )],
    );
}

#[test]
fn calls_of_kimi_lfm2_gemma_and_command_r_are_read() {
    check(
        ToolFormat::Kimi,
        &[
            (
                "So:<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\": 1}<|tool_call_end|><|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
                r#""So:" f({"a": 1}) get_weather({})"#,
            ),
            (
                "<|tool_calls_section_begin|><|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|>",
                "f({})",
            ),
        ],
    );
    check(
        ToolFormat::Lfm2,
        &[(
            "<|tool_call_start|>[f(a='x', b={\"c\": true}), get_weather()]<|tool_call_end|>Done",
            r#"f({"a": "x", "b": {"c": true}}) get_weather({}) "Done""#,
        )],
    );
    check(
        ToolFormat::Gemma,
        &[
            (
                "<|tool_call>call:f{a:<|\"|>x, {y}<|\"|>,b:[1,true,<|\"|><tool_call|><|\"|>],c:{d:null}}<tool_call|><|tool_call>call:get_weather{}<tool_call|>",
                r#"f({"a": "x, {y}", "b": [1, true, "<tool_call|>"], "c": {"d": null}}) get_weather({})"#,
            ),
            (
                "<|tool_call>call:f{a:bare text}",
                r#"f({"a": "bare text"})"#,
            ),
            (
                "<|tool_call>call:f{a}<tool_call|>",
                r#""<|tool_call>call:f{a}<tool_call|>""#,
            ),
        ],
    );
    check(
        ToolFormat::CommandR,
        &[
            (
                "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {\"a\": 1}},\n    {\"tool_call_id\": \"1\", \"tool_name\": \"get_weather\", \"parameters\": {}}\n]<|END_ACTION|>",
                r#"f({"a": 1}) get_weather({})"#,
            ),
            (
                "Action: ```json\n[\n    {\n        \"tool_name\": \"f\",\n        \"parameters\": {}\n    }\n]```",
                "f({})",
            ),
        ],
    );
}

#[test]
fn the_example_of_every_format_is_a_call_in_it() {
    for format in ToolFormat::ALL {
        let parser = ToolParser::new(format, [ToolDeclaration::new("tool_name", None)]);
        let events = parse(parser, format.example().split(""));
        let shown = show(&events);
        assert!(shown.starts_with("tool_name({"), "{format:?}: {shown}");
        assert!(shown.contains(r#""key": "value""#), "{format:?}: {shown}");
    }
}

#[test]
fn formats_are_detected_by_the_marks_of_their_templates() {
    let cases = [
        ("'<tool_call>\\n{\"name\": '", ToolFormat::Hermes),
        ("{{ '[TOOL_CALLS]' }}", ToolFormat::Mistral),
        ("<|python_tag|>", ToolFormat::Llama),
        (r#"'{"name": ' ~ '"parameters": '"#, ToolFormat::Llama),
        (
            "[func_name1(params_name1=params_value1)] <|python_start|>",
            ToolFormat::Pythonic,
        ),
        (
            "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'",
            ToolFormat::DeepSeek,
        ),
        (
            "only with <|tool_call|> and <tool_call>",
            ToolFormat::Granite,
        ),
        (
            "<tool_call>\\n<function=f>\\n<parameter=a>",
            ToolFormat::QwenCoder,
        ),
        (
            "<seed:tool_call>\\n<function=f>\\n<parameter=a>",
            ToolFormat::Seed,
        ),
        ("<tool_call>{name}\\n<arg_key>", ToolFormat::Glm),
        ("<minimax:tool_call>", ToolFormat::MiniMax),
        ("<|tool_calls_section_begin|>", ToolFormat::Kimi),
        ("<|tool_list_start|>", ToolFormat::Lfm2),
        ("'<|tool_call>call:'", ToolFormat::Gemma),
        ("<|START_ACTION|>[", ToolFormat::CommandR),
        ("{{ messages }}", ToolFormat::Hermes),
    ];
    for (source, format) in cases {
        assert_eq!(ToolFormat::detect(source), format, "{source}");
    }
    for format in ToolFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    let error = "hermès".parse::<ToolFormat>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "tool format is \"hermès\", expected one of hermes, llama, mistral, pythonic, deepseek, granite, nemotron, qwen_coder, seed, glm, minimax, kimi, lfm2, gemma, command_r, harmony"
    );
}

/// Returns the recorded answers that have this field.
pub(in super::super) fn recorded(field: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/answers.jsonl");
    let lines = std::fs::read_to_string(path).unwrap();
    let answers = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    answers
        .filter(|answer: &Value| answer.get(field).is_some())
        .collect()
}

#[test]
fn recorded_answers_are_read_as_by_smg_and_dynamo() {
    let mut formats = BTreeSet::new();
    for answer in recorded("calls") {
        let format: ToolFormat = answer["format"].as_str().unwrap().parse().unwrap();
        formats.insert(format.name());
        let declare = |tool: &Value| {
            let name = tool[0].as_str().unwrap();
            ToolDeclaration::new(name, Some(tool[1].clone()))
        };
        let tools = answer["tools"].as_array().unwrap().iter().map(declare);
        let (mut text, mut calls) = (String::new(), Vec::new());
        let mut arguments = String::new();
        let answer_text = answer["answer"].as_str().unwrap();
        for event in parse(ToolParser::new(format, tools), [answer_text]) {
            match event {
                ToolEvent::Text(more) => text.push_str(&more),
                ToolEvent::CallBegin { name, .. } => calls.push(json!([name])),
                ToolEvent::CallArguments { delta, .. } => arguments.push_str(&delta),
                ToolEvent::CallEnd { .. } => {
                    let value: Value = serde_json::from_str(&arguments).unwrap();
                    calls
                        .last_mut()
                        .unwrap()
                        .as_array_mut()
                        .unwrap()
                        .push(value);
                    arguments.clear();
                }
            }
        }
        text.retain(|c| !c.is_whitespace());
        assert_eq!(json!(text), answer["text"], "{answer_text}");
        assert_eq!(json!(calls), answer["calls"], "{answer_text}");
    }
    let without_peer = ["granite", "harmony", "lfm2", "seed"];
    for format in ToolFormat::ALL {
        let name = format.name();
        assert_ne!(
            formats.contains(name),
            without_peer.contains(&name),
            "{name}"
        );
    }
}

fn any_format() -> impl Strategy<Value = ToolFormat> {
    proptest::sample::select(&ToolFormat::ALL)
}

/// Splits `text` before each character whose entry in `cuts`, repeated as needed, is true.
pub(in super::super) fn pieces(text: &str, cuts: &[bool]) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for (c, cut) in text.chars().zip(cuts.iter().cycle()) {
        if *cut {
            pieces.push(String::new());
        }
        pieces.last_mut().unwrap().push(c);
    }
    pieces
}

proptest! {
    #[test]
    fn what_a_model_writes_comes_back_in_any_pieces(
        format in any_format(),
        segments in proptest::collection::vec(any_segment(MARKS), 0..6),
        space in proptest::sample::select(&["", " ", "\n\n"]),
        cuts in proptest::collection::vec(any::<bool>(), 1..40),
    ) {
        let mut answer = String::new();
        let (mut expected, mut tools) = (Vec::new(), Vec::new());
        let mut calls = 0;
        let mut text = false;
        for segment in &segments {
            match segment {
                // Two texts in a row would be read as one.
                Segment::Text(_) if text => continue,
                Segment::Text(words) => {
                    answer.push_str(words);
                    expected.push((None, Value::from(words.as_str())));
                    text = true;
                }
                Segment::Call(name, arguments) => {
                    let name = format!("{name}{calls}");
                    answer.push_str(space);
                    answer.push_str(&written(format, &name, arguments));
                    answer.push_str(["", "\n"][calls % 2]);
                    tools.push(declared(&name, arguments));
                    expected.push((Some(name), arguments.clone()));
                    calls += 1;
                    text = false;
                }
            }
        }
        let parser = || ToolParser::new(format, tools.clone());
        let whole = parse(parser(), [answer.as_str()]);
        let cut = pieces(&answer, &cuts);
        prop_assert_eq!(&parse(parser(), cut.iter().map(String::as_str)), &whole);

        let mut found: Vec<(Option<String>, Value)> = Vec::new();
        let mut arguments = String::new();
        for event in whole {
            match event {
                ToolEvent::Text(text) => found.push((None, text.trim().into())),
                ToolEvent::CallBegin { name, .. } => found.push((Some(name), Value::Null)),
                ToolEvent::CallArguments { delta, .. } => arguments.push_str(&delta),
                ToolEvent::CallEnd { .. } => {
                    let value = serde_json::from_str(&arguments).unwrap();
                    found.last_mut().unwrap().1 = value;
                    arguments.clear();
                }
            }
        }
        prop_assert_eq!(found, expected, "{}", answer);
    }

    #[test]
    fn any_text_gives_the_same_in_any_pieces_and_is_not_lost(
        format in any_format(),
        fragments in proptest::collection::vec(
            prop_oneof![
                proptest::sample::select(&[
                    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]",
                    "[ARGS]", "<|python_start|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
                    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "{\"name\":\"f\",", "\"arguments\":",
                    "\"parameters\": {\"a\":", "f(a=", "{", "}", "}}", "[", "]", ")", ",", ";", "\"",
                    "\\", "'", " ", "\n", "f", "1", "```", "é", "<function=", "<parameter=", ">",
                    "</parameter>", "</function>", "<seed:tool_call>", "</seed:tool_call>",
                    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<minimax:tool_call>",
                    "<invoke name=\"", "<parameter name=\"", "</invoke>", "</minimax:tool_call>",
                    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.f:0",
                    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_call_start|>",
                    "<|tool_call>", "call:f{a:", "<|\"|>", "<tool_call|>", "<|START_ACTION|>",
                    "<|END_ACTION|>", "\"tool_name\":", "<TOOLCALL>", "</TOOLCALL>", "Action: ```json",
                    "<|channel|>", "<|start|>", "commentary to=functions.", "f <|message|>", "<|call|>",
                ]).prop_map(str::to_owned),
                any_string(MARKS),
            ],
            0..15,
        ),
        cuts in proptest::collection::vec(any::<bool>(), 1..40),
    ) {
        let answer = fragments.concat();
        let whole = parse(parser(format), [answer.as_str()]);
        let cut = pieces(&answer, &cuts);
        prop_assert_eq!(&parse(parser(format), cut.iter().map(String::as_str)), &whole);
        if whole.iter().all(|event| matches!(event, ToolEvent::Text(_))) {
            let text = Some(answer).filter(|answer| !answer.is_empty());
            prop_assert_eq!(whole, text.map(ToolEvent::Text).into_iter().collect::<Vec<_>>());
        }
    }
}
