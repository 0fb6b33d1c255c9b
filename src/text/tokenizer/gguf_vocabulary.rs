//! Description of a tokenizer in a GGUF file, and the checks that turn it into a
//! [`Tokenizer`].

use super::byte_level::{ByteLevelBpe, token_bytes};
use super::character_map::CharacterMap;
use super::end_tokens::end_tokens;
use super::pre_tokenizer::PreTokenizer;
use super::ranked::{RankedBpe, SpacePrefix};
use super::sentencepiece::{SPACE, ScoredBpe};
use super::special::SpecialTokens;
use super::unigram::Unigram;
use super::vocabulary::{MAX_TOKENS, TokenKind, Vocabulary};
use super::{Frame, Model, PlainModel, Tokenizer};
use crate::text::{ChatTemplate, TextError};

/// `tokenizer.*` metadata of a GGUF file, not yet validated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE by scores),
    /// `gemma4` (SentencePiece BPE by an order of merges), `t5` (SentencePiece unigram) or `bert`
    /// (WordPiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer of a `gpt2` model. `None` means
    /// `default`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: one per token, or empty if the model needs none.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: one per token, or empty if all tokens are normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: `"left right"` entries, highest priority first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.normalizer.lowercase`: whether a `bert` model makes all letters small.
    pub lowercases: Option<bool>,
    /// `tokenizer.ggml.cls_token_id`: the token in front of the texts of a `bert` model.
    pub cls: Option<u32>,
    /// `tokenizer.ggml.seperator_token_id`: the token after them.
    pub sep: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.ggml.precompiled_charsmap`: by what a `t5` model replaces characters. Empty if
    /// it replaces none.
    pub character_map: Vec<u8>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`: the template to use if tools are given.
    pub tool_use_template: Option<String>,
}

/// Kinds of tokenizer that GGUF files contain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenizerKind {
    ByteLevel,
    SentencePiece,
    /// SentencePiece with merges instead of scores.
    Ranked,
    Unigram,
    WordPiece,
}

impl GgufVocabulary {
    /// Builds the tokenizer that the GGUF file describes.
    ///
    /// # Errors
    /// Returns an error if the description is inconsistent, if its chat template does not
    /// parse, or if its tokenizer model or pre-tokenizer is not supported.
    pub fn into_tokenizer(self) -> Result<Tokenizer, TextError> {
        let tokenizer_kind = match self.model.as_str() {
            "gpt2" => TokenizerKind::ByteLevel,
            "llama" => TokenizerKind::SentencePiece,
            "gemma4" => TokenizerKind::Ranked,
            "t5" => TokenizerKind::Unigram,
            "bert" => TokenizerKind::WordPiece,
            other => {
                return Err(TextError::UnknownModel {
                    found: other.to_owned(),
                });
            }
        };
        self.check_lists(tokenizer_kind)?;
        let mut vocabulary = self.vocabulary(tokenizer_kind)?;
        self.check_ids()?;
        if tokenizer_kind == TokenizerKind::WordPiece {
            return self.word_piece(vocabulary);
        }
        let named =
            |id: Option<u32>, name| id.or_else(|| control(&vocabulary, tokenizer_kind, name));
        let (bos, eos) = (named(self.bos, "<s>"), named(self.eos, "</s>"));
        let unknown = self.unk.or_else(|| {
            vocabulary
                .iter()
                .find(|(_, _, kind)| *kind == TokenKind::Unknown)
                .map(|(id, _, _)| id)
        });
        let ends = end_tokens(
            &mut vocabulary,
            [eos, self.eot, self.eom].into_iter().flatten(),
            false,
        );
        let template = match self.chat_template.as_deref() {
            Some(source) => {
                let text = |id: Option<u32>| id.and_then(|id| vocabulary.text(id));
                let template = ChatTemplate::new(source, text(bos), text(eos))?;
                Some(match &self.tool_use_template {
                    Some(source) => template.with_tool_use(source)?,
                    None => template,
                })
            }
            None => None,
        };
        let mut add_bos = matches!(
            tokenizer_kind,
            TokenizerKind::SentencePiece | TokenizerKind::Ranked
        );
        let add_eos = self
            .add_eos
            .unwrap_or(tokenizer_kind == TokenizerKind::Unigram);
        let space_prefix = self.add_space_prefix.unwrap_or(matches!(
            tokenizer_kind,
            TokenizerKind::SentencePiece | TokenizerKind::Unigram
        ));
        let plain = match tokenizer_kind {
            TokenizerKind::ByteLevel => {
                let rule = PreTokenizer::named(self.pre.as_deref().unwrap_or("default"))?;
                add_bos = rule.add_bos;
                PlainModel::ByteLevel(Box::new(ByteLevelBpe::new(
                    &vocabulary,
                    &self.merges,
                    rule,
                    false,
                )?))
            }
            TokenizerKind::SentencePiece => PlainModel::Scored {
                model: ScoredBpe::new(&vocabulary, self.scores, unknown),
                space_prefix,
            },
            TokenizerKind::Ranked => {
                let prefix = match space_prefix {
                    true => SpacePrefix::Always,
                    false => SpacePrefix::Never,
                };
                let model = RankedBpe::new(&vocabulary, &self.merges, prefix, false);
                let model = model.ok_or_else(|| TextError::Build {
                    part: "merges",
                    message: "expected pairs of tokens that make up tokens, and a token for each \
                              byte"
                        .to_owned(),
                })?;
                PlainModel::Ranked(Box::new(model))
            }
            TokenizerKind::Unigram => PlainModel::Unigram {
                model: Unigram::new(&vocabulary, self.scores, unknown),
                map: CharacterMap::read(&self.character_map)?,
                space_prefix,
                merge_spaces: self.remove_extra_whitespaces.unwrap_or(false),
            },
            TokenizerKind::WordPiece => return self.word_piece(vocabulary),
        };
        let frame = Frame {
            before: frame_token("bos", self.add_bos, add_bos, bos)?,
            after: frame_token("eos", self.add_eos, add_eos, eos)?,
        };
        Ok(Tokenizer {
            model: Model::Fragments {
                specials: Box::new(SpecialTokens::of(&vocabulary)?),
                plain,
            },
            strip_leading_space: space_prefix && tokenizer_kind != TokenizerKind::ByteLevel,
            vocabulary,
            bos,
            eos,
            ends,
            frame,
            template,
            #[cfg(feature = "grammar")]
            grammars: std::sync::OnceLock::new(),
        })
    }
}

/// Finds a control token by name. SentencePiece models may have one that the metadata does
/// not name.
fn control(vocabulary: &Vocabulary, tokenizer_kind: TokenizerKind, name: &str) -> Option<u32> {
    let id = vocabulary
        .id(name)
        .filter(|_| tokenizer_kind != TokenizerKind::ByteLevel)?;
    (vocabulary.kind(id) == TokenKind::Control).then_some(id)
}

/// Returns the token to put around every prompt, or `None` if there is none.
pub(super) fn frame_token(
    name: &'static str,
    explicit: Option<bool>,
    default: bool,
    id: Option<u32>,
) -> Result<Option<u32>, TextError> {
    match (explicit, id) {
        (Some(true), None) => Err(TextError::MissingSpecial { name }),
        (explicit, id) => Ok(id.filter(|_| explicit.unwrap_or(default))),
    }
}

impl GgufVocabulary {
    fn check_lists(&self, tokenizer_kind: TokenizerKind) -> Result<(), TextError> {
        let expected = self.tokens.len();
        if expected == 0 {
            return Err(TextError::EmptyVocabulary);
        }
        if expected > MAX_TOKENS {
            return Err(TextError::VocabularyTooLarge {
                tokens: expected,
                limit: MAX_TOKENS,
            });
        }
        let length = |list, found: usize, may_lack: bool| {
            if found == expected || (found == 0 && may_lack) {
                return Ok(());
            }
            Err(TextError::LengthMismatch {
                list,
                found,
                expected,
            })
        };
        length("token_types", self.token_types.len(), true)?;
        length(
            "scores",
            self.scores.len(),
            matches!(
                tokenizer_kind,
                TokenizerKind::ByteLevel | TokenizerKind::Ranked | TokenizerKind::WordPiece
            ),
        )?;
        match (0u32..)
            .zip(&self.scores)
            .find(|(_, score)| !score.is_finite())
        {
            Some((id, &score)) => Err(TextError::Score { id, score }),
            None => Ok(()),
        }
    }

    fn check_ids(&self) -> Result<(), TextError> {
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unk", self.unk),
            ("pad", self.pad),
            ("eot", self.eot),
            ("eom", self.eom),
            ("cls", self.cls),
            ("sep", self.sep),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= self.tokens.len()) {
                return Err(TextError::SpecialId {
                    name,
                    id,
                    vocabulary: self.tokens.len(),
                });
            }
        }
        Ok(())
    }

    fn vocabulary(&self, tokenizer_kind: TokenizerKind) -> Result<Vocabulary, TextError> {
        let mut vocabulary = Vocabulary::default();
        for (id, text) in (0u32..).zip(&self.tokens) {
            let kind = match self.token_types.get(id as usize) {
                None | Some(1) => TokenKind::Normal,
                Some(2) => TokenKind::Unknown,
                Some(3) => TokenKind::Control,
                Some(4) => TokenKind::UserDefined,
                Some(5) => TokenKind::Unused,
                Some(6) => TokenKind::Byte,
                Some(&found) => return Err(TextError::TokenType { id, found }),
            };
            let bytes = match kind {
                TokenKind::Byte => {
                    let byte = named_byte(text).ok_or_else(|| TextError::ByteToken {
                        id,
                        text: text.clone(),
                    })?;
                    vec![byte]
                }
                TokenKind::Normal | TokenKind::Unused
                    if tokenizer_kind == TokenizerKind::ByteLevel =>
                {
                    token_bytes(text)
                }
                TokenKind::Normal | TokenKind::Unused => text.replace(SPACE, " ").into_bytes(),
                _ => text.clone().into_bytes(),
            };
            vocabulary.push(text, kind, &bytes)?;
        }
        Ok(vocabulary)
    }
}

/// Returns the byte that a token text `<0x00>` to `<0xFF>` names.
pub(super) fn named_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hexadecimal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::EncodeOptions;

    /// A vocabulary of all bytes, some characters, and what their merges make.
    fn ranked() -> GgufVocabulary {
        let mut tokens: Vec<String> = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>"]
            .map(str::to_owned)
            .to_vec();
        let mut token_types = vec![3, 3, 3, 2, 4];
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        token_types.extend([6; 256]);
        let characters = ["▁", "\n", "a", "b", "c"];
        let merged = ["▁▁", "\n\n", "ab", "▁ab", "▁abc", "bc"];
        tokens.extend(characters.into_iter().chain(merged).map(str::to_owned));
        token_types.resize(tokens.len(), 1);
        // "b c" comes first, so that the merges decide and not the lengths of tokens.
        let merges = ["▁ ▁", "\n \n", "b c", "a b", "▁ ab", "▁ab c"];
        GgufVocabulary {
            model: "gemma4".to_owned(),
            tokens,
            token_types,
            merges: merges.map(str::to_owned).to_vec(),
            bos: Some(2),
            eos: Some(1),
            ..GgufVocabulary::default()
        }
    }

    /// Gemma 4 has the token `>▁</`.
    #[test]
    fn a_merge_across_a_space_is_found_wherever_the_text_has_it() {
        let mut vocabulary = ranked();
        vocabulary.tokens.extend(["▁c", "b▁c"].map(str::to_owned));
        vocabulary.token_types.extend([1; 2]);
        vocabulary.merges.extend(["▁ c", "b ▁c"].map(str::to_owned));
        let tokenizer = vocabulary.into_tokenizer().unwrap();
        let encode = |text: &str| {
            let ids = tokenizer.encode(text, EncodeOptions::default()).unwrap();
            let texts = ids.iter().map(|id| tokenizer.token_text(*id).unwrap());
            texts.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(encode("ab c"), ["ab", "▁c"], "\"a b\" comes first");
        assert_eq!(encode("bb c"), ["b", "b▁c"]);
        assert_eq!(encode("b  c"), ["b", "▁▁", "c"]);
        assert_eq!(encode("a c b c"), ["a", "▁c", "▁", "b▁c"]);
    }

    #[test]
    fn a_sentencepiece_model_with_merges_needs_no_scores() {
        let tokenizer = ranked().into_tokenizer().unwrap();
        let id = |text: &str| tokenizer.id_of(text).unwrap();
        let encode = |text: &str| {
            let options = EncodeOptions {
                add_special: true,
                parse_special: true,
            };
            tokenizer.encode(text, options).unwrap()
        };
        assert_eq!(encode(" ab"), [2, id("▁ab")]);
        assert_eq!(encode("abc"), [2, id("a"), id("bc")]);
        assert_eq!(encode("  a\n\n"), [2, id("▁▁"), id("a"), id("\n\n")]);
        // A character without a token becomes its bytes.
        assert_eq!(encode("é"), [2, id("<0xC3>"), id("<0xA9>")]);
        assert_eq!(encode("<|turn>a"), [2, id("<|turn>"), id("a")]);
        let text = "  ab\n\né abc";
        let ids = encode(text);
        assert_eq!(tokenizer.decode(&ids[1..], true), text);
    }

    #[test]
    fn a_sentencepiece_model_with_merges_needs_a_token_for_each_byte() {
        let mut vocabulary = ranked();
        vocabulary.tokens[5] = "zero".to_owned();
        vocabulary.token_types[5] = 1;
        let error = vocabulary.into_tokenizer().unwrap_err().to_string();
        assert!(error.contains("a token for each byte"), "{error}");
    }
}
