//! Converts text to token ids and back, for every kind of tokenizer.

mod byte_level;
mod character_map;
mod converted;
mod detokenize;
mod end_tokens;
mod folder;
mod gguf_metadata;
mod gguf_vocabulary;
mod merges;
mod original;
mod pre_tokenizer;
mod ranked;
mod sentencepiece;
mod sentencepiece_file;
mod special;
mod tiktoken;
mod unigram;
pub(super) mod vocabulary;
mod word_piece;

#[cfg(test)]
pub(super) mod tests;

pub use detokenize::Detokenizer;
pub use gguf_vocabulary::GgufVocabulary;

#[cfg(feature = "grammar")]
use crate::text::grammar::{Compiler, GrammarError};
use crate::text::{ChatTemplate, TextError};
use byte_level::ByteLevelBpe;
use character_map::CharacterMap;
use detokenize::Utf8Assembler;
use folder::HuggingFace;
use ranked::{Place, RankedBpe};
use sentencepiece::{SPACE, ScoredBpe};
use special::{Fragment, SpecialTokens};
use std::fmt;
#[cfg(feature = "grammar")]
use std::sync::OnceLock;
use unigram::Unigram;
use vocabulary::Vocabulary;

/// Options of [`Tokenizer::encode`].
///
/// Construct it with `..EncodeOptions::default()`: fields are added in minor releases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Whether to put the tokens around the text that the model expects there, such as the
    /// beginning-of-text token. A rendered chat template usually contains them already.
    pub add_special: bool,
    /// Whether to read the text of a control token as that token. If not, it is read as
    /// plain text, which is the right choice for user input.
    pub parse_special: bool,
}

/// A model's tokenizer. It can be shared freely between threads.
pub struct Tokenizer {
    pub(super) vocabulary: Vocabulary,
    model: Model,
    bos: Option<u32>,
    eos: Option<u32>,
    /// All tokens that end an answer, sorted by id.
    ends: Vec<u32>,
    frame: Frame,
    /// Whether the tokenizer adds the space before the first word, so that decoding removes it.
    strip_leading_space: bool,
    template: Option<ChatTemplate>,
    /// Compiler of grammars for this tokenizer, created on first use.
    #[cfg(feature = "grammar")]
    pub(super) grammars: OnceLock<Result<Compiler, GrammarError>>,
}

/// Tokens that `add_special` puts around a text.
#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    before: Option<u32>,
    after: Option<u32>,
}

/// How a tokenizer turns text into tokens.
enum Model {
    /// A `tokenizer.json` that is left to the `tokenizers` library, which finds the special
    /// tokens itself.
    HuggingFace(Box<HuggingFace>),
    /// Special tokens are found first, and the text between them is encoded as plain text.
    Fragments {
        specials: Box<SpecialTokens>,
        plain: PlainModel,
    },
}

/// How plain text is turned into tokens.
enum PlainModel {
    ByteLevel(Box<ByteLevelBpe>),
    Ranked(Box<RankedBpe>),
    Scored {
        model: ScoredBpe,
        space_prefix: bool,
    },
    Unigram {
        model: Unigram,
        map: Option<CharacterMap>,
        space_prefix: bool,
        merge_spaces: bool,
    },
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary.len())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("end_tokens", &self.ends)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Encodes `text` as token ids.
    ///
    /// Text that the vocabulary cannot represent becomes the unknown token, or is dropped
    /// if there is none.
    ///
    /// # Errors
    /// Returns [`TextError::Encode`] if a word exceeds the length limit of merging (1.5 million
    /// bytes or characters), or if the `tokenizers` library fails on the text.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        tracing::trace!(bytes = text.len(), "tokenizing a text");
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special {
            ids.extend(self.frame.before);
        }
        match &self.model {
            Model::HuggingFace(model) => model.encode(text, options, &mut ids)?,
            Model::Fragments { specials, plain } => {
                let mut place = Place::Start;
                for fragment in specials.split(text, options.parse_special) {
                    match fragment {
                        Fragment::Token(id) => ids.push(id),
                        Fragment::Text(text) => self.encode_plain(plain, text, place, &mut ids)?,
                    }
                    place = Place::AfterSpecial;
                }
            }
        }
        if options.add_special {
            ids.extend(self.frame.after);
        }
        Ok(ids)
    }

    /// Encodes a pair of texts for a model that compares them, with the special tokens around and
    /// between them. Returns the tokens, each with its segment, which is below `segments`.
    ///
    /// # Errors
    /// Returns the same errors as [`Tokenizer::encode`].
    pub fn encode_pair(
        &self,
        first: &str,
        second: &str,
        segments: usize,
    ) -> Result<Vec<(u32, u32)>, TextError> {
        let last = segments.saturating_sub(1) as u32;
        if let Model::HuggingFace(model) = &self.model
            && model.frames()
        {
            let mut pair = model.encode_pair(first, second)?;
            pair.iter_mut()
                .for_each(|(_, segment)| *segment = (*segment).min(last));
            return Ok(pair);
        }
        let mut pair = Vec::new();
        // As in Hugging Face's tokenizers, which add the tokens around texts themselves.
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        pair.extend(self.frame.before.map(|id| (id, 0)));
        pair.extend(self.encode(first, options)?.into_iter().map(|id| (id, 0)));
        pair.extend(self.frame.after.map(|id| (id, 0)));
        // RoBERTa and its kin, which have no word pieces, tell texts apart by a second mark.
        let is_word_piece = matches!(self.model, Model::HuggingFace(_));
        let mark = self.frame.after.filter(|_| !is_word_piece);
        pair.extend(mark.map(|id| (id, 0)));
        let second = self.encode(second, options)?.into_iter();
        pair.extend(second.chain(self.frame.after).map(|id| (id, last.min(1))));
        Ok(pair)
    }

    /// Encodes a text that continues another one.
    #[cfg(feature = "grammar")]
    pub(super) fn encode_inside(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        match &self.model {
            Model::HuggingFace(model) => model.encode(text, EncodeOptions::default(), &mut ids)?,
            Model::Fragments { specials, plain } => {
                for fragment in specials.split(text, false) {
                    match fragment {
                        Fragment::Token(id) => ids.push(id),
                        Fragment::Text(text) => {
                            self.encode_plain(plain, text, Place::Inside, &mut ids)?;
                        }
                    }
                }
            }
        }
        Ok(ids)
    }

    /// Appends the tokens of a text without special tokens.
    fn encode_plain(
        &self,
        plain: &PlainModel,
        text: &str,
        place: Place,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        match plain {
            PlainModel::ByteLevel(model) => model.encode(text, ids)?,
            PlainModel::Ranked(model) => model.encode(text, place, ids)?,
            PlainModel::Scored {
                model,
                space_prefix,
            } => {
                let prefix = if *space_prefix && place != Place::Inside {
                    SPACE
                } else {
                    ""
                };
                let text = format!("{prefix}{}", text.replace(' ', SPACE));
                model.encode(&self.vocabulary, &text, ids);
            }
            PlainModel::Unigram {
                model,
                map,
                space_prefix,
                merge_spaces,
            } => {
                let mut words = match map {
                    Some(map) => map.apply(text),
                    None => text.to_owned(),
                };
                if *merge_spaces {
                    words = single_spaces(&words);
                }
                let spaced = (*space_prefix || *merge_spaces) && words.contains(|c| c != ' ');
                let prefix = if spaced { SPACE } else { "" };
                let text = format!("{prefix}{}", words.replace(' ', SPACE));
                model.encode(&self.vocabulary, &text, ids);
            }
        }
        Ok(())
    }

    /// Decodes `ids` to text. If `skip_special`, special tokens are left out.
    ///
    /// Invalid UTF-8 and ids without a token become U+FFFD. The space that a SentencePiece
    /// model puts before the first word is removed, as in transformers.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut assembler = self.assembler();
        let mut text = String::new();
        for &id in ids {
            self.decode_step(&mut assembler, id, skip_special, &mut text);
        }
        assembler.finish(&mut text);
        text
    }

    /// Recovers the text of a prompt from its `ids`. Special tokens are included, except
    /// for those that [`encode`](Self::encode) puts around a text.
    pub fn decode_prompt(&self, ids: &[u32]) -> String {
        let around = EncodeOptions {
            add_special: true,
            parse_special: false,
        };
        let frame = self.encode("", around).unwrap_or_default();
        let text = (0..=frame.len()).rev().find_map(|before| {
            let (before, after) = frame.split_at(before);
            ids.strip_prefix(before)?.strip_suffix(after)
        });
        self.decode(text.unwrap_or(ids), false)
    }

    /// Creates the state for [`decode_step`](Self::decode_step).
    fn assembler(&self) -> Utf8Assembler {
        Utf8Assembler::new(self.strip_leading_space)
    }

    /// Appends to `text` the characters that `id` completes.
    fn decode_step(
        &self,
        assembler: &mut Utf8Assembler,
        id: u32,
        skip_special: bool,
        text: &mut String,
    ) {
        if skip_special && self.is_special(id) {
            return;
        }
        let unknown = char::REPLACEMENT_CHARACTER
            .encode_utf8(&mut [0; 4])
            .to_owned();
        assembler.push(
            self.vocabulary.bytes(id).unwrap_or(unknown.as_bytes()),
            text,
        );
    }

    /// Returns the bytes that a token represents, which may be part of a character. Returns
    /// `None` for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.bytes(id)
    }

    /// Returns a number of tokens that a text with all these parts has at least. This takes far
    /// less time than tokenizing it.
    ///
    /// Returns 0 if there is no such bound, because runs of text may become one token, or
    /// spaces may be merged.
    pub fn min_tokens<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> usize {
        let bytes = parts.into_iter().map(|part| match &self.model {
            Model::HuggingFace(model) if model.may_shrink() => 0,
            Model::HuggingFace(_) => part.len(),
            Model::Fragments { specials, .. } if specials.absorb_spaces() => 0,
            Model::Fragments { plain, .. } => match plain {
                PlainModel::ByteLevel(model) => model.represented_bytes(part),
                PlainModel::Ranked(_) => spaced_bytes(part),
                PlainModel::Scored { model, .. } if model.writes_every_byte() => spaced_bytes(part),
                PlainModel::Scored { .. } | PlainModel::Unigram { .. } => 0,
            },
        });
        // No token stands for more bytes than the longest one.
        bytes.sum::<usize>().div_ceil(self.vocabulary.longest())
    }

    /// Returns the name of a token in the vocabulary, or `None` for an id without a token.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocabulary.text(id)
    }

    /// Returns the token whose name in the vocabulary is `text`.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.vocabulary.id(text)
    }

    /// Returns the number of ids; every token's id is below it. The model may have more logits.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// Returns whether a token controls the model and is not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.kind(id).is_special()
    }

    /// Returns the beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Returns the end-of-text token that the model names first. See
    /// [`end_tokens`](Self::end_tokens) for all tokens that end an answer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Returns all tokens that end an answer, sorted by id: those that the model names, and
    /// those with a well-known name such as `<|im_end|>`.
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }

    /// Returns the model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Parses a chat template for this model's tokens, to use in place of its own.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`ChatTemplate::new`].
    pub fn template_from(&self, source: &str) -> Result<ChatTemplate, TextError> {
        match &self.template {
            Some(template) => template.with_source(source),
            None => {
                let text = |id: Option<u32>| self.token_text(id?);
                ChatTemplate::new(source, text(self.bos), text(self.eos))
            }
        }
    }

    /// Replaces the chat template, or sets one if the model has none.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`ChatTemplate::new`].
    pub fn set_chat_template(&mut self, source: &str) -> Result<(), TextError> {
        self.template = Some(self.template_from(source)?);
        Ok(())
    }
}

/// Returns the length of `text` in bytes if SentencePiece's space has one byte, as in tokens.
fn spaced_bytes(text: &str) -> usize {
    text.len() - text.matches(SPACE).count() * (SPACE.len() - 1)
}

/// Returns `text` with runs of spaces collapsed to one space, and no spaces at either end.
fn single_spaces(text: &str) -> String {
    text.split(' ')
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}
