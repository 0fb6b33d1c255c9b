//! Entry points for fuzzing, which check properties that must hold for every input.

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
            model in prop_oneof![Just("gpt2"), Just("llama"), Just("t5"), Just("")],
            pre in prop_oneof![Just(None), Just(Some("llama-bpe".to_owned())), Just(Some("?".to_owned()))],
            tokens in proptest::collection::btree_set(hostile_token(), 0..12),
            types in proptest::collection::vec(1..7i32, 12),
            all_normal in any::<bool>(),
            scores in proptest::collection::vec(prop_oneof![any::<f32>(), -5.0..0.0f32, Just(0.0)], 12),
            merges in proptest::collection::vec("[ab]{1,2} [abĠ]{1,2}", 0..2),
            ids in proptest::collection::vec(proptest::option::weighted(0.3, 0..13u32), 6),
            flags in proptest::collection::vec(proptest::option::of(any::<bool>()), 4),
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
                bos: ids[0], eos: ids[1], unk: ids[2], pad: ids[3], eot: ids[4], eom: ids[5],
                add_bos: flags[0],
                add_eos: flags[1],
                add_space_prefix: flags[2],
                remove_extra_whitespaces: flags[3],
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
    }
}
