//! Writes conversations as prompts in Harmony.

use super::super::clock::strftime;
use super::super::message::Message;
use super::super::python_json::{Style, dumps};
use super::super::render::RenderOptions;
use super::super::template::ChatTemplate;
use super::types;
use super::{CALL, CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE, RETURN, START};
use crate::text::TextError;
use serde_json::Value;
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const IDENTITY: &str = "You are ChatGPT, a large language model trained by OpenAI.";
const CUTOFF: &str = "2024-06";
const CHANNELS: &str = "# Valid channels: analysis, commentary, final. Channel must be included \
                        for every message.";
const CALLS_GO: &str = "\nCalls to these tools must go to the commentary channel: 'functions'.";

/// Returns whether a template writes a plain conversation as [`prompt`] does.
///
/// If so, [`prompt`] takes its place: the template of gpt-oss writes only the first call of a
/// message, quotes the results of tools, and declares some tools differently from what the model
/// was trained on.
pub(in super::super) fn is_harmony(template: &ChatTemplate) -> bool {
    let options = RenderOptions {
        now: Some(UNIX_EPOCH),
        ..RenderOptions::default()
    };
    let conversation = ["user", "assistant", "user"].map(|role| Message::new(role, "m"));
    let expected = prompt(&conversation, None, &options);
    template.source().contains(MESSAGE)
        && template.apply(&conversation, &options).ok() == expected.ok()
}

/// Writes a conversation with these tools as `openai-harmony` does.
///
/// The reasoning of an assistant message is written unless a later message, or the same one, is an
/// answer to the user.
///
/// # Errors
/// Returns [`TextError::TemplateRaised`] for built-in tools, which the engine does not run, for a
/// role that Harmony does not have, and for the result of a call that the conversation does not
/// contain.
pub(in super::super) fn prompt(
    messages: &[Message],
    tools: Option<&Value>,
    options: &RenderOptions,
) -> Result<String, TextError> {
    let raised = |message: String| TextError::TemplateRaised { message };
    if let Some(builtin) = options.extra.get("builtin_tools")
        && !builtin.is_null()
        && builtin.as_array().is_none_or(|tools| !tools.is_empty())
    {
        return Err(raised(format!(
            "builtin_tools is {builtin}, but built-in tools are not supported"
        )));
    }
    let tools: Vec<&Value> = (tools.and_then(Value::as_array).into_iter().flatten())
        .map(|tool| tool.get("function").unwrap_or(tool))
        .collect();
    let mut text = system_message(!tools.is_empty(), options);
    let (instructions, rest) = match messages.split_first() {
        Some((first, rest)) if instructs(first) => (Some(&*first.content), rest),
        _ => (None, messages),
    };
    if instructions.is_some() || !tools.is_empty() {
        text.push_str(&message("developer", &developer(instructions, &tools), END));
    }
    let answers = |message: &Message| message.role == "assistant" && calls(message).is_empty();
    let last_answer = rest.iter().rposition(answers);
    // Names of the tools that were called, with the ids of the calls.
    let mut called: Vec<(Option<&str>, &str)> = Vec::new();
    for (place, one) in rest.iter().enumerate() {
        match &*one.role {
            "user" => text.push_str(&message("user", &one.content, END)),
            "system" | "developer" => {
                let content = developer(Some(&one.content), &[]);
                text.push_str(&message("developer", &content, END));
            }
            "assistant" => {
                let is_last = place + 1 == rest.len() && !options.add_generation_prompt;
                let is_answered = last_answer.is_some_and(|answer| place <= answer) && !is_last;
                if let Some(reasoning) = reasoning(one).filter(|_| !is_answered) {
                    text.push_str(&of_assistant("analysis", reasoning, END));
                }
                let calls = calls(one);
                if calls.is_empty() {
                    let end = if is_last { RETURN } else { END };
                    text.push_str(&of_assistant("final", &one.content, end));
                } else if !one.content.is_empty() {
                    text.push_str(&of_assistant("commentary", &one.content, END));
                }
                for call in calls {
                    let function = call.get("function").unwrap_or(call);
                    let name = function.get("name").and_then(Value::as_str);
                    let name = name.unwrap_or_default();
                    called.push((call.get("id").and_then(Value::as_str), name));
                    let head = format!(
                        "assistant to={FUNCTIONS}{name}{CHANNEL}commentary {CONSTRAIN}json"
                    );
                    text.push_str(&message(&head, &arguments(function), CALL));
                }
            }
            "tool" => {
                let id = one.extra.get("tool_call_id").and_then(Value::as_str);
                let of_call = called.iter().rfind(|(call, _)| id.is_some() && *call == id);
                let name = of_call.or(called.last()).map(|(_, name)| *name);
                let name = name.or_else(|| one.extra.get("name")?.as_str());
                let name = name.ok_or_else(|| {
                    raised("a message has the role tool, but no call comes before it".to_owned())
                })?;
                let head = format!("{FUNCTIONS}{name} to=assistant{CHANNEL}commentary");
                text.push_str(&message(&head, &one.content, END));
            }
            other => {
                return Err(raised(format!(
                    "a message has the role {other:?}, expected \"system\", \"developer\", \
                     \"user\", \"assistant\" or \"tool\""
                )));
            }
        }
    }
    if options.add_generation_prompt && !options.continue_final_message {
        let _ = write!(text, "{START}assistant");
    }
    Ok(text)
}

fn instructs(message: &Message) -> bool {
    matches!(&*message.role, "system" | "developer")
}

fn message(head: &str, content: &str, end: &str) -> String {
    format!("{START}{head}{MESSAGE}{content}{end}")
}

fn of_assistant(channel: &str, content: &str, end: &str) -> String {
    message(&format!("assistant{CHANNEL}{channel}"), content, end)
}

fn system_message(has_tools: bool, options: &RenderOptions) -> String {
    let variable = |name: &str| options.extra.get(name).and_then(Value::as_str);
    let identity = variable("model_identity").unwrap_or(IDENTITY);
    let effort = variable("reasoning_effort").unwrap_or("medium");
    let now = options.now.unwrap_or_else(SystemTime::now);
    let date = strftime(now, "%Y-%m-%d");
    let calls_go = if has_tools { CALLS_GO } else { "" };
    let content = format!(
        "{identity}\nKnowledge cutoff: {CUTOFF}\nCurrent date: {date}\n\nReasoning: {effort}\n\n\
         {CHANNELS}{calls_go}"
    );
    message("system", &content, END)
}

/// Returns the text of a developer message.
fn developer(instructions: Option<&str>, tools: &[&Value]) -> String {
    let instructions = instructions.map(|text| format!("# Instructions\n\n{text}"));
    let tools = (!tools.is_empty()).then(|| types::section(tools.iter().copied()));
    let sections: Vec<_> = instructions.into_iter().chain(tools).collect();
    sections.join("\n\n")
}

fn calls(message: &Message) -> &[Value] {
    let calls = message.extra.get("tool_calls").and_then(Value::as_array);
    calls.map_or(&[], Vec::as_slice)
}

fn reasoning(message: &Message) -> Option<&str> {
    ["reasoning_content", "reasoning", "thinking"]
        .into_iter()
        .find_map(|field| message.extra.get(field)?.as_str())
        .filter(|text| !text.is_empty())
}

/// Returns the arguments of a call as JSON text, as the client sent them.
fn arguments(function: &Value) -> String {
    match function.get("arguments") {
        Some(Value::String(text)) if !text.trim().is_empty() => text.clone(),
        Some(value @ Value::Object(_)) => {
            let value = minijinja::Value::from_serialize(value);
            dumps(&value, &Style::default()).unwrap_or_default()
        }
        _ => "{}".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tools::ToolEvent;
    use super::super::{HarmonyEvent, HarmonyParser};
    use super::*;
    use serde::Deserialize;
    use serde_json::json;
    use std::path::Path;
    use std::time::Duration;

    /// A conversation, and the prompt that `openai-harmony` makes of it
    /// (`tests/clients/harmony_prompts.py`).
    #[derive(Deserialize)]
    struct Case {
        messages: Vec<Message>,
        tools: Option<Value>,
        reasoning_effort: Option<String>,
        text: String,
    }

    fn cases() -> Vec<Case> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/harmony.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn options() -> RenderOptions {
        RenderOptions {
            // 2 January 2026.
            now: Some(UNIX_EPOCH + Duration::from_secs(1_767_312_000)),
            ..RenderOptions::default()
        }
    }

    #[test]
    fn prompts_equal_those_of_openais_library() {
        let cases = cases();
        assert_eq!(cases.len(), 200);
        for case in cases {
            let mut options = options();
            let effort = case.reasoning_effort.map(Value::from);
            (options.extra).extend(effort.map(|effort| ("reasoning_effort".to_owned(), effort)));
            let written = prompt(&case.messages, case.tools.as_ref(), &options).unwrap();
            assert_eq!(written, case.text);
        }
    }

    /// Returns what an answer of these parts gives to a parser.
    fn read(answer: &str) -> (String, String, Vec<(String, String)>) {
        let mut parser = HarmonyParser::new(true);
        let mut events = parser.push(answer);
        events.extend(parser.finish());
        let (mut reasoning, mut text) = (String::new(), String::new());
        let mut calls: Vec<(String, String)> = Vec::new();
        for event in events {
            match event {
                HarmonyEvent::Reasoning(more) => reasoning += &more,
                HarmonyEvent::Answer(ToolEvent::Text(more)) => text += &more,
                HarmonyEvent::Answer(ToolEvent::CallBegin { name, .. }) => {
                    calls.push((name, String::new()));
                }
                HarmonyEvent::Answer(ToolEvent::CallArguments { index, delta }) => {
                    calls[index].1 += &delta;
                }
                HarmonyEvent::Answer(ToolEvent::CallEnd { .. }) => {}
            }
        }
        (reasoning, text, calls)
    }

    #[test]
    fn answers_as_they_are_written_are_read_back() {
        let begin = format!("{START}assistant");
        let mut compared = 0;
        for case in cases() {
            let assistant = case.messages.iter().filter(|one| one.role == "assistant");
            for one in assistant {
                let mut one = one.clone();
                // Harmony has no place for several calls and reasoning after an answer.
                let conversation = [Message::new("user", "u"), one.clone()];
                let options = RenderOptions {
                    add_generation_prompt: false,
                    ..options()
                };
                let written = prompt(&conversation, None, &options).unwrap();
                let (_, answer) = written.split_once(&begin).unwrap();
                let (reasoning, text, calls) = read(answer);
                let expected = one.extra.remove("reasoning_content").unwrap_or(json!(""));
                assert_eq!(json!(reasoning), expected, "{answer}");
                assert_eq!(text, one.content, "{answer}");
                let expected: Vec<_> = super::calls(&one)
                    .iter()
                    .map(|call| {
                        let field = |name: &str| call["function"][name].as_str().unwrap();
                        (field("name").to_owned(), field("arguments").to_owned())
                    })
                    .collect();
                assert_eq!(calls, expected, "{answer}");
                compared += 1;
            }
        }
        assert!(compared > 300, "{compared}");
    }

    #[test]
    fn what_harmony_does_not_have_is_refused() {
        let user = Message::new("user", "u");
        let refused = |messages: &[Message], options: &RenderOptions| {
            prompt(messages, None, options).unwrap_err().to_string()
        };
        let mut builtin = options();
        (builtin.extra).insert("builtin_tools".to_owned(), json!(["browser"]));
        let error = refused(std::slice::from_ref(&user), &builtin);
        assert!(error.contains("builtin_tools is [\"browser\"]"), "{error}");
        let error = refused(&[user.clone(), Message::new("critic", "c")], &options());
        assert!(error.contains("role \"critic\""), "{error}");
        let error = refused(&[user, Message::new("tool", "r")], &options());
        assert!(error.contains("no call comes before it"), "{error}");
    }

    #[test]
    fn only_a_template_that_writes_harmony_is_replaced() {
        let system = system_message(
            false,
            &RenderOptions {
                now: Some(UNIX_EPOCH),
                ..options()
            },
        );
        let source = system.replace("1970-01-01", "{{ strftime_now('%Y-%m-%d') }}")
            + "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}\
               <|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}\
               <|start|>assistant";
        let template = |source: &str| ChatTemplate::new(source, None, None).unwrap();
        assert!(is_harmony(&template(&source)));
        assert!(!is_harmony(&template(&source.replace("ChatGPT", "Quell"))));
        assert!(!is_harmony(&template("{{ messages }}")));
        let mut continued = options();
        continued.continue_final_message = true;
        let conversation = [Message::new("user", "u"), Message::new("assistant", "So")];
        let prompt = template(&source).render(&conversation, &continued).unwrap();
        assert!(
            prompt.ends_with("<|start|>assistant<|channel|>final<|message|>So"),
            "{prompt}"
        );
    }
}
