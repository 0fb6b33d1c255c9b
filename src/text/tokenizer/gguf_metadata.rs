//! Extracts a tokenizer's description from the metadata of a GGUF file.

use super::{GgufVocabulary, TextError};
use crate::weights::Gguf;
use crate::weights::gguf::Value;

impl GgufVocabulary {
    /// Reads the description of the tokenizer in `file`.
    ///
    /// The types of the values are checked, but not whether the values are consistent.
    ///
    /// # Errors
    /// Returns an error if the file has no tokenizer, or if a value has the wrong type.
    pub fn from_file(file: &Gguf) -> Result<Self, TextError> {
        let read = Metadata(file);
        let model = read.required("tokenizer.ggml.model", "a string", Value::as_str)?;
        let tokens = read.required(
            "tokenizer.ggml.tokens",
            "an array of strings",
            Value::as_strings,
        )?;
        Ok(Self {
            model: model.to_owned(),
            pre: read.text("tokenizer.ggml.pre")?,
            tokens: tokens.to_vec(),
            scores: read
                .optional(
                    "tokenizer.ggml.scores",
                    "an array of float32",
                    Value::as_f32s,
                )?
                .unwrap_or_default()
                .to_vec(),
            token_types: read
                .optional(
                    "tokenizer.ggml.token_type",
                    "an array of int32",
                    Value::as_i32s,
                )?
                .unwrap_or_default()
                .to_vec(),
            merges: read
                .optional(
                    "tokenizer.ggml.merges",
                    "an array of strings",
                    Value::as_strings,
                )?
                .unwrap_or_default()
                .to_vec(),
            bos: read.id("tokenizer.ggml.bos_token_id")?,
            eos: read.id("tokenizer.ggml.eos_token_id")?,
            unk: read.id("tokenizer.ggml.unknown_token_id")?,
            pad: read.id("tokenizer.ggml.padding_token_id")?,
            eot: read.id("tokenizer.ggml.eot_token_id")?,
            eom: read.id("tokenizer.ggml.eom_token_id")?,
            cls: read.id("tokenizer.ggml.cls_token_id")?,
            // The name is misspelt in the files.
            sep: read.id("tokenizer.ggml.seperator_token_id")?,
            add_bos: read.flag("tokenizer.ggml.add_bos_token")?,
            add_eos: read.flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: read.flag("tokenizer.ggml.add_space_prefix")?,
            lowercases: read.flag("tokenizer.ggml.normalizer.lowercase")?,
            remove_extra_whitespaces: read.flag("tokenizer.ggml.remove_extra_whitespaces")?,
            character_map: read
                .optional(
                    "tokenizer.ggml.precompiled_charsmap",
                    "an array of bytes",
                    Value::as_bytes,
                )?
                .unwrap_or_default(),
            chat_template: read.text("tokenizer.chat_template")?,
            tool_use_template: read.text("tokenizer.chat_template.tool_use")?,
        })
    }
}

/// Reads typed values, with errors that name the key.
struct Metadata<'a>(&'a Gguf);

impl<'a> Metadata<'a> {
    fn optional<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        let Some(value) = self.0.metadata(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(TextError::Metadata {
                key,
                found: value.type_name().to_owned(),
                expected,
            }),
        }
    }

    fn required<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T, TextError> {
        self.optional(key, expected, read)?
            .ok_or_else(|| TextError::Metadata {
                key,
                found: "missing".to_owned(),
                expected,
            })
    }

    fn text(&self, key: &'static str) -> Result<Option<String>, TextError> {
        Ok(self
            .optional(key, "a string", Value::as_str)?
            .map(str::to_owned))
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, TextError> {
        self.optional(key, "a bool", Value::as_bool)
    }

    fn id(&self, key: &'static str) -> Result<Option<u32>, TextError> {
        self.optional(key, "a token id", |value| value.as_u64()?.try_into().ok())
    }
}
