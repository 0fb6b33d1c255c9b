//! SentencePiece's own model files (`tokenizer.model`), which are protocol buffers.
//!
//! The fields and their numbers are those of `sentencepiece_model.proto`. Fields that do not decide
//! token ids are left out.

use super::GgufVocabulary;
use crate::text::TextError;
use prost::Message;
use std::path::Path;

/// `ModelProto`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Model {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    pub normalizer: Option<Normalizer>,
}

/// `ModelProto.SentencePiece`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Piece {
    #[prost(string, tag = "1")]
    pub text: String,
    #[prost(float, tag = "2")]
    pub score: f32,
    /// The types are numbered as in GGUF files.
    #[prost(int32, optional, tag = "3")]
    pub kind: Option<i32>,
}

/// `TrainerSpec`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Trainer {
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub whitespace_as_suffix: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    pub unk: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    pub bos: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    pub eos: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pub pad: Option<i32>,
}

/// `NormalizerSpec`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    pub character_map: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub add_space_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
}

const UNIGRAM: i32 = 1;
const BPE: i32 = 2;
const NORMAL: i32 = 1;

/// Describes the tokenizer in the bytes of a `tokenizer.model`.
///
/// # Errors
/// Returns [`TextError::File`] if the bytes are not such a file, and [`TextError::Unsupported`] for
/// models of words or characters, and for BPEs that replace characters.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<GgufVocabulary, TextError> {
    let model = Model::decode(bytes).map_err(|error| TextError::File {
        path: path.to_owned(),
        found: format!("not readable ({error})"),
        expected: "a model of SentencePiece, or a vocabulary of tiktoken",
    })?;
    let trainer = model.trainer.unwrap_or_default();
    let normalizer = model.normalizer.unwrap_or_default();
    let unsupported = |part, found: String, expected| TextError::Unsupported {
        part,
        found,
        expected,
    };
    let kind = match trainer.model_type.unwrap_or(UNIGRAM) {
        UNIGRAM => "t5",
        BPE => "llama",
        other => {
            let expected = "1 (unigram) or 2 (BPE)";
            return Err(unsupported("model_type", other.to_string(), expected));
        }
    };
    let character_map = normalizer.character_map.unwrap_or_default();
    if kind == "llama" && !character_map.is_empty() {
        let found = "a precompiled_charsmap".to_owned();
        let expected = "one that changes no characters, since this is a BPE";
        return Err(unsupported("normalizer", found, expected));
    }
    if normalizer.escape_whitespaces == Some(false) || trainer.whitespace_as_suffix == Some(true) {
        let found = "one that keeps spaces, or puts them after words".to_owned();
        let expected = "one that writes ▁ for a space and puts it before words";
        return Err(unsupported("normalizer", found, expected));
    }
    // A negative id means that there is no such token. The defaults are those of the format.
    let id = |id: Option<i32>, default: i32| u32::try_from(id.unwrap_or(default)).ok();
    Ok(GgufVocabulary {
        model: kind.to_owned(),
        scores: model.pieces.iter().map(|piece| piece.score).collect(),
        token_types: (model.pieces.iter())
            .map(|piece| piece.kind.unwrap_or(NORMAL))
            .collect(),
        tokens: model.pieces.into_iter().map(|piece| piece.text).collect(),
        unk: id(trainer.unk, 0),
        bos: id(trainer.bos, 1),
        eos: id(trainer.eos, 2),
        pad: id(trainer.pad, -1),
        add_space_prefix: Some(normalizer.add_space_prefix.unwrap_or(true)),
        remove_extra_whitespaces: Some(normalizer.remove_extra_whitespaces.unwrap_or(true)),
        character_map,
        ..GgufVocabulary::default()
    })
}
