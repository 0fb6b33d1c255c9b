//! WordPiece vocabularies of GGUF files, as BERT and most embedding models have them.

use super::folder::HuggingFace;
use super::gguf_vocabulary::{GgufVocabulary, frame_token};
use super::sentencepiece::SPACE;
use super::vocabulary::{TokenKind, Vocabulary};
use super::{Model, Tokenizer};
use crate::text::TextError;
use serde_json::{Map, Value, json};

/// Mark in front of pieces that continue a word, in `tokenizer.json` and `vocab.txt`. GGUF files
/// mark the other pieces instead.
const CONTINUES: &str = "##";

/// Number of characters beyond which a word is unknown, as in Hugging Face's BERT.
const MAX_WORD_CHARACTERS: usize = 100;

impl GgufVocabulary {
    /// Builds a WordPiece tokenizer, which the `tokenizers` library runs.
    ///
    /// Old GGUF files do not say whether the model tells capital letters apart. It does if the
    /// vocabulary has any.
    pub(super) fn word_piece(self, vocabulary: Vocabulary) -> Result<Tokenizer, TextError> {
        let is_named = |text: &str, kind| {
            kind != TokenKind::Normal || text.starts_with('[') && text.ends_with(']')
        };
        let mut pieces = Map::new();
        let mut special = Vec::new();
        let mut is_cased = false;
        for (id, text, kind) in vocabulary.iter() {
            let piece = match text.strip_prefix(SPACE) {
                _ if is_named(text, kind) => text.to_owned(),
                Some(begins) => begins.to_owned(),
                None => format!("{CONTINUES}{text}"),
            };
            if kind.is_special() {
                special.push(json!({
                    "id": id, "content": text, "special": true, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }));
            } else if !is_named(text, kind) {
                // Some capitals, such as "ℝ", have no small letter.
                is_cased |= text.to_lowercase() != text;
            }
            pieces.insert(piece, id.into());
        }
        let name = |id: Option<u32>| id.and_then(|id| vocabulary.text(id));
        let unknown = name(self.unk).ok_or(TextError::MissingSpecial { name: "unk" })?;
        let description = json!({
            "version": "1.0",
            "added_tokens": special,
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": self.lowercases.unwrap_or(!is_cased),
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {
                "type": "WordPiece", "unk_token": unknown,
                "continuing_subword_prefix": CONTINUES,
                "max_input_chars_per_word": MAX_WORD_CHARACTERS,
                "vocab": Value::Object(pieces),
            },
        });
        let parsing = serde_json::from_value(description).map_err(|error| TextError::Build {
            part: "word pieces",
            message: error.to_string(),
        })?;
        // Newer files have the token in front of a text under the usual name.
        let cls = self.cls.or(self.bos);
        let sep = self.sep.or(self.eos);
        let eos = self.eos.or(sep);
        Ok(Tokenizer {
            model: Model::HuggingFace(Box::new(HuggingFace::without_frame(parsing))),
            strip_leading_space: true,
            bos: self.bos.or(cls),
            eos,
            ends: eos.into_iter().collect(),
            frame: super::Frame {
                before: frame_token("cls", None, true, cls)?,
                after: frame_token("sep", None, true, sep)?,
            },
            template: None,
            vocabulary,
            #[cfg(feature = "grammar")]
            grammars: std::sync::OnceLock::new(),
        })
    }
}
