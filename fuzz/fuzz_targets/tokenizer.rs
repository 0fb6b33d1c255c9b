//! Loads a tokenizer from arbitrary bytes as a GGUF file: it is rejected, or it handles every
//! text and every token ID.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use quell::internals::text::GgufVocabulary;
use quell::internals::text::fuzz::check_vocabulary;
use quell::internals::weights::Gguf;
use std::path::Path;

/// A text that contains something for every kind of tokenizer.
const TEXT: &str = "Hello <s>world</s>  123\n\té漢字👩\u{200D}🚀 <|im_end|> \u{2581}<0x0A>";

fuzz_target!(|bytes: &[u8]| -> Corpus {
    let Ok(file) = Gguf::from_bytes(bytes.to_vec(), Path::new("fuzz.gguf")) else {
        return Corpus::Reject;
    };
    let ids: Vec<u32> = bytes.iter().take(64).map(|&byte| byte.into()).collect();
    if let Ok(vocabulary) = GgufVocabulary::from_file(&file) {
        let _ = check_vocabulary(vocabulary, TEXT, &ids);
    }
    Corpus::Keep
});
