//! The `tokenizer.*` metadata of a GGUF file, taken out of the file.

use super::{GgufVocabulary, TextError};
use crate::weights::Gguf;
use crate::weights::gguf::Value;

impl GgufVocabulary {
    /// The tokenizer that a file describes; `None` when it describes none.
    ///
    /// # Errors
    /// When a key has a value of another type than it must have.
    pub fn from_metadata(file: &Gguf) -> Result<Option<Self>, TextError> {
        let keys = Keys(file);
        let Some(model) = keys.text("tokenizer.ggml.model")? else { return Ok(None) };
        Ok(Some(Self {
            model,
            pre: keys.text("tokenizer.ggml.pre")?,
            tokens: keys.list("tokenizer.ggml.tokens", "strings", Value::as_strings)?,
            scores: keys.list("tokenizer.ggml.scores", "32-bit floats", Value::as_f32s)?,
            token_types: keys.list(
                "tokenizer.ggml.token_type",
                "32-bit integers",
                Value::as_i32s,
            )?,
            merges: keys.list("tokenizer.ggml.merges", "strings", Value::as_strings)?,
            bos: keys.id("tokenizer.ggml.bos_token_id")?,
            eos: keys.id("tokenizer.ggml.eos_token_id")?,
            unk: keys.id("tokenizer.ggml.unknown_token_id")?,
            pad: keys.id("tokenizer.ggml.padding_token_id")?,
            eot: keys.id("tokenizer.ggml.eot_token_id")?,
            eom: keys.id("tokenizer.ggml.eom_token_id")?,
            add_bos: keys.flag("tokenizer.ggml.add_bos_token")?,
            add_eos: keys.flag("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: keys.flag("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: keys.flag("tokenizer.ggml.remove_extra_whitespaces")?,
            chat_template: keys.text("tokenizer.chat_template")?,
        }))
    }
}

/// Metadata by key, each with the type that it must have.
struct Keys<'a>(&'a Gguf);

impl<'a> Keys<'a> {
    fn get<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, TextError> {
        let Some(value) = self.0.metadata(key) else { return Ok(None) };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(TextError::MetadataType { key, found: value.type_name(), expected }),
        }
    }

    fn text(&self, key: &'static str) -> Result<Option<String>, TextError> {
        self.get(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    fn flag(&self, key: &'static str) -> Result<Option<bool>, TextError> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn id(&self, key: &'static str) -> Result<Option<u32>, TextError> {
        self.get(key, "a token id", |value| value.as_u64().and_then(|id| u32::try_from(id).ok()))
    }

    fn list<T: Clone + 'a>(
        &self,
        key: &'static str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<&'a [T]>,
    ) -> Result<Vec<T>, TextError> {
        Ok(self.get(key, expected, read)?.map(<[T]>::to_vec).unwrap_or_default())
    }
}
