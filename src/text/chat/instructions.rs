//! Merges system messages for chat templates that accept only one, at the beginning.
//!
//! OpenAI's API accepts any number of system and developer messages at any place. Many
//! templates refuse a second or a late one, and others silently leave it out. For those, all of
//! them are merged into one leading system message, as in vLLM and litellm. How a template
//! treats them is found out once, by rendering it with probes.

use super::message::Message;
use super::render::RenderOptions;
use super::template::ChatTemplate;
use std::borrow::Cow;

/// Texts to look for in a rendered prompt. No template contains them itself.
const FIRST: &str = "quell_probe_first";
const SECOND: &str = "quell_probe_second";

/// Where a template takes system messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InstructionSupport {
    /// One at the beginning.
    leading: bool,
    /// Several at the beginning.
    several: bool,
    /// One behind other messages.
    late: bool,
    /// One at the beginning, and another one behind other messages.
    leading_and_late: bool,
}

impl InstructionSupport {
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let system = |text: &str| Message::new("system", text);
        let user = || Message::new("user", "u");
        let assistant = || Message::new("assistant", "a");
        let takes = |messages: &[Message]| {
            let prompt = template.render_whole(messages, &RenderOptions::default(), None, false);
            let mut instructions = messages.iter().filter(|message| instructs(message));
            prompt.is_ok_and(|prompt| instructions.all(|message| prompt.contains(&message.content)))
        };
        Self {
            leading: takes(&[system(FIRST), user()]),
            several: takes(&[system(FIRST), system(SECOND), user()]),
            late: takes(&[user(), assistant(), system(FIRST), user()]),
            leading_and_late: takes(&[system(FIRST), user(), assistant(), system(SECOND), user()]),
        }
    }

    /// Returns the conversation with all instructions in one leading system message, if the
    /// template takes that but not the instructions as they are.
    pub(super) fn merged<'a>(self, messages: Cow<'a, [Message]>) -> Cow<'a, [Message]> {
        let leading = messages.iter().take_while(|one| instructs(one)).count();
        let all = messages.iter().filter(|one| instructs(one)).count();
        let taken = match (leading, all - leading) {
            (0 | 1, 0) => return messages,
            (_, 0) => self.several,
            (0, 1) => self.late,
            (0, _) => self.late && self.leading_and_late,
            (1, _) => self.leading_and_late,
            (_, _) => self.several && self.leading_and_late,
        };
        match taken || !self.leading {
            true => messages,
            false => merged(&messages).into(),
        }
    }
}

/// Returns whether a message tells the model what to do, in either of the two roles for that.
pub(super) fn instructs(message: &Message) -> bool {
    matches!(message.role.as_str(), "system" | "developer")
}

/// Returns the conversation with all instructions in one leading system message.
fn merged(messages: &[Message]) -> Vec<Message> {
    let mut instructions = messages.iter().filter(|message| instructs(message));
    let mut leader = Message {
        role: "system".to_owned(),
        ..instructions.next().cloned().unwrap_or_default()
    };
    for message in instructions {
        if !leader.content.is_empty() && !message.content.is_empty() {
            leader.content.push_str("\n\n");
        }
        leader.content.push_str(&message.content);
    }
    let rest = messages.iter().filter(|message| !instructs(message));
    std::iter::once(leader).chain(rest.cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::TextError;

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
        template.render(&messages, &RenderOptions::default())
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
            "[system:1][user:Q][system:2][system:3]"
        );
        let source = format!("{source}{{# developer #}}");
        assert_eq!(
            rendered(&source, &messages).unwrap(),
            "[system:1][user:Q][system:2][developer:3]"
        );
    }

    #[test]
    fn instructions_are_merged_before_a_message_that_is_continued() {
        let template = ChatTemplate::new(STRICT, None, None).unwrap();
        let options = RenderOptions {
            continue_final_message: true,
            ..RenderOptions::default()
        };
        let mut messages = ["system", "system", "user", "assistant"]
            .map(|role| Message::new(role, role[..1].to_owned()))
            .to_vec();
        let rendered = template.render(&messages, &options);
        assert_eq!(rendered.unwrap(), "[S:s\n\ns][u:u][a:a");
        // What is continued is not moved.
        messages.push(Message::new("system", "more"));
        assert!(template.render(&messages, &options).is_err());
    }

    #[test]
    fn a_template_that_takes_one_late_instruction_gets_several_merged() {
        // The last one replaces those before it.
        let source = "{%- set ns = namespace(s='') %}{%- for m in messages %}\
            {%- if m.role == 'system' %}{%- set ns.s = m.content %}{%- endif %}{%- endfor %}\
            {{- '[S:' + ns.s + ']' }}{%- for m in messages %}{%- if m.role != 'system' %}\
            {{- '[' + m.role[:1] + ':' + m.content + ']' }}{%- endif %}{%- endfor %}";
        for (messages, expected) in [
            (&[("user", "Q"), ("system", "1")][..], "[S:1][u:Q]"),
            (
                &[("user", "Q"), ("system", "1"), ("system", "2")],
                "[S:1\n\n2][u:Q]",
            ),
            (
                &[("system", "1"), ("user", "Q"), ("system", "2")],
                "[S:1\n\n2][u:Q]",
            ),
        ] {
            assert_eq!(rendered(source, messages).unwrap(), expected);
        }
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
