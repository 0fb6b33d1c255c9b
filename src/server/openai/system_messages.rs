//! Merges system messages for chat templates that accept only one, at the beginning.
//!
//! OpenAI's API accepts any number of system and developer messages at any place. Many
//! templates refuse a second or a late one, and others silently leave it out. For those, all of
//! them are merged into one leading system message, as in vLLM and litellm.

use crate::text::{ChatTemplate, Message, RenderOptions, TextError};

/// Renders a conversation. If the template refuses its instructions or does not write them all,
/// they are merged first.
///
/// # Errors
/// Returns the template's error for the unmerged conversation.
pub(crate) fn render(
    template: &ChatTemplate,
    messages: &[Message],
    options: &RenderOptions,
) -> Result<String, TextError> {
    let rendered = template.render(messages, options);
    if let Ok(text) = &rendered
        && has_all(text, messages)
    {
        return rendered;
    }
    let Some(merged) = merged(messages) else {
        return rendered;
    };
    match (template.render(&merged, options), rendered) {
        (Ok(text), Err(_)) => Ok(text),
        // A template that leaves text out in both cases does so on purpose.
        (Ok(text), Ok(_)) if has_all(&text, messages) => Ok(text),
        (_, rendered) => rendered,
    }
}

fn instructs(message: &Message) -> bool {
    matches!(message.role.as_str(), "system" | "developer")
}

/// Returns whether a prompt contains the text of every instruction.
fn has_all(prompt: &str, messages: &[Message]) -> bool {
    let mut instructions = messages.iter().filter(|message| instructs(message));
    instructions.all(|message| prompt.contains(message.content.trim()))
}

/// Returns the conversation with all instructions in one leading system message, or `None` if
/// it has that form already or has no instructions.
fn merged(messages: &[Message]) -> Option<Vec<Message>> {
    let mut instructions = messages.iter().filter(|message| instructs(message));
    let first = instructions.next()?;
    let leading = messages.first().is_some_and(|one| one.role == "system");
    let mut leader = Message {
        role: "system".to_owned(),
        ..first.clone()
    };
    let mut merged = false;
    for message in instructions {
        merged = true;
        if !leader.content.is_empty() && !message.content.is_empty() {
            leader.content.push_str("\n\n");
        }
        leader.content.push_str(&message.content);
    }
    if leading && !merged {
        return None;
    }
    let rest = messages.iter().filter(|message| !instructs(message));
    Some(std::iter::once(leader).chain(rest.cloned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Accepts a system message only at the beginning, and refuses other roles.
    const STRICT: &str = "{%- for m in messages %}{%- if m.role == 'system' %}\
        {%- if not loop.first %}{{- raise_exception('System message must be at the beginning.') }}{%- endif %}\
        {{- '[S:' + m.content + ']' }}\
        {%- elif m.role == 'user' or m.role == 'assistant' %}{{- '[' + m.role[:1] + ':' + m.content + ']' }}\
        {%- else %}{{- raise_exception('Unexpected message role.') }}{%- endif %}{%- endfor %}";

    /// Writes only a leading system message, and leaves out whatever it does not know.
    const FORGETFUL: &str = "{%- if messages[0].role == 'system' %}{{- '[S:' + messages[0].content + ']' }}{%- endif %}\
        {%- for m in messages %}{%- if m.role == 'user' or m.role == 'assistant' %}\
        {{- '[' + m.role[:1] + ':' + m.content + ']' }}{%- endif %}{%- endfor %}";

    fn rendered(source: &str, messages: &[(&str, &str)]) -> Result<String, TextError> {
        let messages: Vec<_> = messages
            .iter()
            .map(|(role, content)| Message::new(*role, *content))
            .collect();
        let template = ChatTemplate::new(source, None, None).unwrap();
        render(&template, &messages, &RenderOptions::default())
    }

    #[test]
    fn instructions_are_merged_where_the_template_takes_one() {
        for source in [STRICT, FORGETFUL] {
            for (messages, expected) in [
                (
                    &[("system", "1"), ("system", "2"), ("user", "Q")][..],
                    "[S:1\n\n2][u:Q]",
                ),
                (
                    &[("system", "1"), ("developer", "2"), ("user", "Q")],
                    "[S:1\n\n2][u:Q]",
                ),
                (
                    &[
                        ("user", "Q"),
                        ("assistant", "A"),
                        ("developer", "1"),
                        ("user", "R"),
                    ],
                    "[S:1][u:Q][a:A][u:R]",
                ),
                (
                    &[
                        ("system", "1"),
                        ("user", "Q"),
                        ("assistant", "A"),
                        ("system", "2"),
                        ("user", "R"),
                    ],
                    "[S:1\n\n2][u:Q][a:A][u:R]",
                ),
                (&[("developer", "1"), ("user", "Q")], "[S:1][u:Q]"),
                (&[("system", "1"), ("user", "Q")], "[S:1][u:Q]"),
            ] {
                assert_eq!(rendered(source, messages).unwrap(), expected);
            }
        }
    }

    #[test]
    fn instructions_stay_where_they_are_if_the_template_takes_them() {
        let source = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}";
        let messages = [
            ("system", "1"),
            ("user", "Q"),
            ("system", "2"),
            ("developer", "3"),
        ];
        assert_eq!(
            rendered(source, &messages).unwrap(),
            "[system:1][user:Q][system:2][developer:3]"
        );
    }

    #[test]
    fn a_template_that_refuses_for_another_reason_is_heard() {
        let error = rendered(STRICT, &[("system", "1"), ("pirate", "Arr")]).unwrap_err();
        assert!(
            error.to_string().contains("Unexpected message role."),
            "{error}"
        );
        let source = "{{ raise_exception('No.') }}";
        let error = rendered(source, &[("user", "Q"), ("system", "1")]).unwrap_err();
        assert!(error.to_string().contains("No."), "{error}");
    }
}
