//! Entry points for fuzzing, which check properties that must hold for every input.

use super::harmony::{HarmonyEvent, HarmonyParser};
use super::reasoning::{ReasoningFormat, ReasoningSplit, ReasoningSplitter};
use super::tools::{ToolDeclaration, ToolEvent, ToolFormat, ToolParser};
use super::{Detokenizer, EncodeOptions, GgufVocabulary, TextError, Tokenizer};
use std::sync::Arc;

/// Builds a tokenizer from untrusted metadata, and encodes and decodes with it.
///
/// Work and memory are proportional to the input.
///
/// # Errors
/// Returns an error for the same reasons as [`GgufVocabulary::into_tokenizer`] and
/// [`Tokenizer::encode`].
///
/// # Panics
/// Panics if an encoded id is outside the vocabulary, if there are fewer tokens than
/// [`Tokenizer::min_tokens`] says, or if decoding token by token gives a different text than
/// decoding all tokens at once. Fuzzing looks for these panics.
pub fn check_vocabulary(
    vocabulary: GgufVocabulary,
    text: &str,
    ids: &[u32],
) -> Result<(), TextError> {
    let tokenizer = Arc::new(vocabulary.into_tokenizer()?);
    for (add_special, parse_special) in [(false, false), (true, true)] {
        let encoded = tokenizer.encode(
            text,
            EncodeOptions {
                add_special,
                parse_special,
            },
        )?;
        let size = tokenizer.vocabulary_size();
        assert!(
            encoded.iter().all(|&id| (id as usize) < size),
            "an id is outside the vocabulary"
        );
        assert!(
            tokenizer.min_tokens([text]) <= encoded.len(),
            "a text has fewer tokens than its bytes need"
        );
        check_decoding(&tokenizer, &encoded);
    }
    check_decoding(&tokenizer, ids);
    Ok(())
}

fn check_decoding(tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
    for skip_special in [false, true] {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        assert_eq!(
            text,
            tokenizer.decode(ids, skip_special),
            "decoding token by token differs from decoding at once"
        );
    }
}

/// Fragments that tool calls, reasoning and Harmony consist of.
#[rustfmt::skip]
const FRAGMENTS: [&str; 64] = [
    "<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]",
    "<function=", "<parameter=", "</parameter>", "</function>", "<seed:tool_call>",
    "</seed:tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<minimax:tool_call>", "<invoke name=\"", "<parameter name=\"", "</invoke>",
    "</minimax:tool_call>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.f:0",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_call_start|>", "<|tool_call>",
    "call:f{a:", "<|\"|>", "<tool_call|>", "<|START_ACTION|>", "<|END_ACTION|>", "<TOOLCALL>",
    "</TOOLCALL>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<|start|>assistant", "<|channel|>", "analysis", "final",
    "commentary to=functions.f", "<|message|>", "<|end|>", "<|call|>", "<think>", "</think>",
    "{\"name\": \"f\", ", "\"arguments\": ", "{\"a\": ", "}", "]", "[f(a=", ")", "'", "\"", "\\",
    ",", ">", "\n", " ", "é",
];

/// Parses an answer with the parser of a format, whole and in pieces.
///
/// The first byte chooses the parser. Each further byte is a fragment of an answer; its highest
/// bit says whether a piece ends before it.
///
/// # Panics
/// Panics if the events depend on the pieces, if they are not those of calls one after the other,
/// or if an answer without calls is not returned as it was. Fuzzing looks for these panics.
pub fn check_answer(bytes: &[u8]) {
    let Some((&chosen, rest)) = bytes.split_first() else {
        return;
    };
    let mut pieces = vec![String::new()];
    for &byte in rest {
        if byte >= 128 {
            pieces.push(String::new());
        }
        if let Some(piece) = pieces.last_mut() {
            piece.push_str(FRAGMENTS[usize::from(byte) % FRAGMENTS.len()]);
        }
    }
    let answer = [pieces.concat()];
    let chosen = usize::from(chosen);
    if let Some(format) = ToolFormat::ALL.get(chosen % (ToolFormat::ALL.len() + 2)) {
        let whole = tool_events(*format, &answer);
        assert_eq!(
            whole,
            tool_events(*format, &pieces),
            "{format:?}: {answer:?}"
        );
        check_calls(&whole);
        if whole
            .iter()
            .all(|event| matches!(event, ToolEvent::Text(_)))
        {
            let text: Vec<_> = answer.into_iter().filter(|text| !text.is_empty()).collect();
            let expected: Vec<_> = text.into_iter().map(ToolEvent::Text).collect();
            assert_eq!(whole, expected, "text is lost");
        }
    } else if chosen.is_multiple_of(2) {
        let (reasoning, events) = harmony_events(&answer);
        let cut = harmony_events(&pieces);
        assert_eq!((&reasoning, &events), (&cut.0, &cut.1), "{answer:?}");
        check_calls(&events);
    } else {
        let whole = reasoning_and_content(&answer);
        assert_eq!(whole, reasoning_and_content(&pieces), "{answer:?}");
    }
}

/// Checks that each call begins, gets arguments and ends before the next one begins.
fn check_calls(events: &[ToolEvent]) {
    let (mut begun, mut ended) = (0, 0);
    for event in events {
        match event {
            ToolEvent::Text(_) => {}
            ToolEvent::CallBegin { index, .. } => {
                assert_eq!(
                    (*index, ended),
                    (begun, begun),
                    "a call begins within another"
                );
                begun += 1;
            }
            ToolEvent::CallArguments { index, .. } => assert_eq!(index + 1, begun),
            ToolEvent::CallEnd { index } => {
                assert_eq!((*index, ended + 1), (ended, begun), "a call ends twice");
                ended += 1;
            }
        }
    }
}

/// Appends events, with adjacent ones of the same kind merged.
fn append(all: &mut Vec<ToolEvent>, events: impl IntoIterator<Item = ToolEvent>) {
    for event in events {
        match (all.last_mut(), event) {
            (Some(ToolEvent::Text(text)), ToolEvent::Text(more)) => text.push_str(&more),
            (
                Some(ToolEvent::CallArguments { delta, .. }),
                ToolEvent::CallArguments { delta: more, .. },
            ) => delta.push_str(&more),
            (_, event) => all.push(event),
        }
    }
}

fn tool_events(format: ToolFormat, pieces: &[String]) -> Vec<ToolEvent> {
    let mut parser = ToolParser::new(format, [ToolDeclaration::new("f", None)]);
    let mut all = Vec::new();
    for piece in pieces {
        append(&mut all, parser.push(piece));
    }
    append(&mut all, parser.finish());
    all
}

fn harmony_events(pieces: &[String]) -> (String, Vec<ToolEvent>) {
    let mut parser = HarmonyParser::new(true);
    let (mut reasoning, mut all) = (String::new(), Vec::new());
    let mut add = |events: Vec<HarmonyEvent>| {
        for event in events {
            match event {
                HarmonyEvent::Reasoning(text) => reasoning.push_str(&text),
                HarmonyEvent::Answer(event) => append(&mut all, [event]),
            }
        }
    };
    for piece in pieces {
        add(parser.push(piece));
    }
    add(parser.finish());
    (reasoning, all)
}

fn reasoning_and_content(pieces: &[String]) -> (String, String) {
    let mut splitter = ReasoningSplitter::new(ReasoningFormat::THINK);
    let (mut reasoning, mut content) = (String::new(), String::new());
    let mut add = |split: ReasoningSplit| {
        reasoning.push_str(&split.reasoning);
        content.push_str(&split.content);
    };
    for piece in pieces {
        add(splitter.push(piece));
    }
    add(splitter.finish());
    (reasoning, content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::any_text;
    use proptest::prelude::*;

    fn hostile_token() -> impl Strategy<Value = String> {
        prop_oneof![
            "[abĠ▁é ]{0,4}",
            "<0x[0-9A-F]{1,2}>",
            Just("<|end|>".to_owned()),
            Just("<|call|>".to_owned()),
            Just("<s>".to_owned()),
            any::<String>(),
        ]
    }

    prop_compose! {
        fn hostile_vocabulary()(
            model in prop_oneof![Just("gpt2"), Just("llama"), Just("t5"), Just("bert"), Just("")],
            pre in prop_oneof![Just(None), Just(Some("llama-bpe".to_owned())), Just(Some("?".to_owned()))],
            tokens in proptest::collection::btree_set(hostile_token(), 0..12),
            types in proptest::collection::vec(1..7i32, 12),
            all_normal in any::<bool>(),
            scores in proptest::collection::vec(prop_oneof![any::<f32>(), -5.0..0.0f32, Just(0.0)], 12),
            merges in proptest::collection::vec("[ab]{1,2} [abĠ]{1,2}", 0..2),
            ids in proptest::collection::vec(proptest::option::weighted(0.3, 0..13u32), 8),
            flags in proptest::collection::vec(proptest::option::of(any::<bool>()), 4),
            character_map in proptest::collection::vec(any::<u8>(), 0..3),
            chat_template in proptest::option::weighted(0.1, "[{}% a-z+~()]{0,9}"),
            tool_use_template in proptest::option::weighted(0.1, "[{}% a-z+~()]{0,9}"),
        ) -> GgufVocabulary {
            let count = tokens.len();
            GgufVocabulary {
                model: model.to_owned(),
                pre,
                scores: scores.into_iter().take(count).collect(),
                token_types: if all_normal { Vec::new() } else { types[..count].to_vec() },
                tokens: tokens.into_iter().collect(),
                merges: if model == "gpt2" { merges } else { Vec::new() },
                bos: ids[0], eos: ids[1], unk: ids[2], pad: ids[3], eot: ids[4], eom: ids[5], cls: ids[6],
                sep: ids[7],
                add_bos: flags[0],
                add_eos: flags[1],
                add_space_prefix: flags[2],
                remove_extra_whitespaces: flags[3],
                character_map,
                lowercases: flags[3],
                chat_template,
                tool_use_template,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_description_makes_a_tokenizer_panic(
        vocabulary in hostile_vocabulary(),
        text in any_text(),
        ids in proptest::collection::vec(prop_oneof![0..14u32, any::<u32>()], 0..20),
    ) {
        let _ = check_vocabulary(vocabulary, &text, &ids);
    }

    #[test]
    fn no_answer_is_read_differently_in_pieces(
        bytes in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        check_answer(&bytes);
    }
    }
}
