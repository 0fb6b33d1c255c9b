//! Entry points for fuzzing: what must hold for every input, however hostile.

use super::{Detokenizer, EncodeOptions, GgufVocabulary, TextError, Tokenizer};
use std::sync::Arc;

/// Builds a tokenizer from untrusted metadata and works with it.
///
/// Returns the error of a description that was refused. Work and memory are in
/// proportion to the input.
///
/// # Errors
/// As [`Tokenizer::from_gguf`].
///
/// # Panics
/// When a token has an id outside the vocabulary, or when text that comes token
/// by token is not the text of all tokens. That is what fuzzing looks for.
pub fn check_vocabulary(
    vocabulary: GgufVocabulary,
    text: &str,
    ids: &[u32],
) -> Result<(), TextError> {
    let tokenizer = Arc::new(Tokenizer::from_gguf(vocabulary)?);
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
            "pieces are not the whole"
        );
    }
}
