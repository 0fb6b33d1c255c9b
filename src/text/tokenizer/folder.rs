//! Builds a tokenizer from a Hugging Face folder: `tokenizer.json` and its companion files.

use super::byte_level::{byte_characters, token_bytes};
use super::converted::{self, Description};
use super::end_tokens::end_tokens;
use super::gguf_vocabulary::named_byte;
use super::original;
use super::vocabulary::{MAX_TOKENS, TokenKind, Vocabulary};
use super::{EncodeOptions, Frame, Model, Tokenizer};
use crate::text::{ChatTemplate, TextError};
use crate::weights::{from_python_json, is_lfs_pointer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::OnceLock;

/// Tokenizer of the `tokenizers` crate, with a second copy if plain text is encoded too.
pub(super) struct HuggingFace {
    /// Reads the text of a special token as that token.
    parsing: tokenizers::Tokenizer,
    /// Reads the text of a special token as plain text. Created on first use.
    plain: OnceLock<tokenizers::Tokenizer>,
    /// Whether this tokenizer adds the special tokens for `add_special` itself.
    frames: bool,
    /// Whether tokens may represent fewer bytes than the text has, because normalization
    /// shortens it or tokens absorb the text around them.
    may_shrink: bool,
}

impl HuggingFace {
    /// Creates a tokenizer to which the caller adds the special tokens around a text.
    pub(super) fn without_frame(parsing: tokenizers::Tokenizer) -> Self {
        Self {
            may_shrink: may_shrink(&parsing),
            parsing,
            plain: OnceLock::new(),
            frames: false,
        }
    }

    pub(super) fn may_shrink(&self) -> bool {
        self.may_shrink
    }

    /// Returns whether this tokenizer adds the special tokens around texts itself.
    pub(super) fn frames(&self) -> bool {
        self.frames
    }

    /// Encodes a pair of texts with the special tokens around and between them. Returns each token
    /// with its segment.
    pub(super) fn encode_pair(
        &self,
        first: &str,
        second: &str,
    ) -> Result<Vec<(u32, u32)>, TextError> {
        let encoding = self.parsing.encode_fast((first, second), true);
        let encoding = encoding.map_err(|error| TextError::Encode {
            bytes: first.len() + second.len(),
            message: error.to_string(),
        })?;
        let (ids, segments) = (encoding.get_ids(), encoding.get_type_ids());
        Ok(ids.iter().copied().zip(segments.iter().copied()).collect())
    }

    pub(super) fn encode(
        &self,
        text: &str,
        options: EncodeOptions,
        ids: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let tokenizer = if options.parse_special {
            &self.parsing
        } else {
            self.plain.get_or_init(|| {
                let mut plain = self.parsing.clone();
                plain.set_encode_special_tokens(true);
                plain
            })
        };
        let encoding = tokenizer
            .encode_fast(text, options.add_special && self.frames)
            .map_err(|error| TextError::Encode {
                bytes: text.len(),
                message: error.to_string(),
            })?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

impl Tokenizer {
    /// Returns whether a Hugging Face folder has a file that describes a tokenizer.
    pub fn is_in_folder(dir: &Path) -> bool {
        dir.join("tokenizer.json").exists() || original::file(dir).is_some()
    }

    /// Builds the tokenizer of a Hugging Face folder.
    ///
    /// It is described by `tokenizer.json` or, if there is none, by `tokenizer.model`
    /// (SentencePiece, or tiktoken as in Llama 3), `tiktoken.model` or a file that ends with
    /// `.tiktoken`. `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json`, `config.json`, and `chat_template.jinja` or
    /// `chat_template.json` are read if they exist.
    ///
    /// # Errors
    /// Returns [`TextError::Read`] or [`TextError::File`] if a file cannot be read or parsed,
    /// [`TextError::TemplateSyntax`] if the chat template does not parse, and another
    /// [`TextError`] if the contents are inconsistent or not supported.
    pub fn from_folder(dir: &Path) -> Result<Tokenizer, TextError> {
        if !dir.join("tokenizer.json").exists()
            && let Some(path) = original::file(dir)
        {
            return original::tokenizer(dir, &path);
        }
        let files = Files::read(dir)?;
        let mut parsing = files.tokenizer;
        parsing.with_padding(None);
        parsing
            .with_truncation(None)
            .map_err(|error| TextError::Build {
                part: "truncation",
                message: error.to_string(),
            })?;
        let mut vocabulary = vocabulary(&parsing)?;
        let id_of = |name: &str| -> Option<u32> {
            let text = special_text(&files.config, &files.special, name)?;
            vocabulary.id(text)
        };
        let bos =
            id_of("bos_token").or_else(|| ids(&files.generation, "bos_token_id").first().copied());
        let mut named = ids(&files.generation, "eos_token_id");
        if named.is_empty() {
            named = ids(&files.model, "eos_token_id");
        }
        let eos = id_of("eos_token").or_else(|| named.first().copied());
        named.extend(eos);
        for (name, id) in named
            .iter()
            .map(|&id| ("eos", id))
            .chain(bos.map(|id| ("bos", id)))
        {
            if vocabulary.text(id).is_none() {
                return Err(TextError::SpecialId {
                    name,
                    id,
                    vocabulary: vocabulary.len(),
                });
            }
        }
        let ends = end_tokens(&mut vocabulary, named, true);
        let text = |name| special_text(&files.config, &files.special, name);
        let template = files
            .template
            .map(|sources| {
                let (bos, eos) = (text("bos_token"), text("eos_token"));
                let template = ChatTemplate::new(&sources.default, bos, eos)?;
                match sources.tool_use {
                    Some(source) => template.with_tool_use(&source),
                    None => Ok(template),
                }
            })
            .transpose()?;
        let explicit = explicit_frame(&files.config, bos, eos)?;
        let strip_leading_space = Decoding::of(&parsing)?.strip_leading_space;
        let frame = explicit.or_else(|| converted::frame(&parsing));
        let own = frame.and_then(|_| files.bpe?.convert(&parsing));
        let (model, frame) = match own {
            Some(model) => (model, frame),
            None => {
                let model = HuggingFace {
                    may_shrink: may_shrink(&parsing),
                    parsing,
                    plain: OnceLock::new(),
                    frames: explicit.is_none(),
                };
                (Model::HuggingFace(Box::new(model)), explicit)
            }
        };
        Ok(Tokenizer {
            vocabulary,
            model,
            bos,
            eos,
            ends,
            frame: frame.unwrap_or_default(),
            strip_leading_space,
            template,
            #[cfg(feature = "grammar")]
            grammars: OnceLock::new(),
        })
    }
}

/// Returns whether tokens may represent fewer bytes than the encoded text has.
///
/// This is ruled out only if the tokenizer has no normalizer, splits text into bytes, has a
/// token for every byte, and has no added token that absorbs the white space next to it.
fn may_shrink(tokenizer: &tokenizers::Tokenizer) -> bool {
    let steps = serde_json::to_string(&tokenizer.get_pre_tokenizer()).unwrap_or_default();
    let every_byte = byte_characters().all(|character| {
        let text = character.to_string();
        tokenizer.token_to_id(&text).is_some()
    });
    let mut added = tokenizer.get_added_tokens_decoder().into_values();
    let strips = added.any(|token| token.lstrip || token.rstrip);
    tokenizer.get_normalizer().is_some() || !steps.contains("ByteLevel") || !every_byte || strips
}

/// Contents of the folder's files. A JSON value is null if its file does not exist.
struct Files {
    tokenizer: tokenizers::Tokenizer,
    /// The tokenizer's description, if it is a BPE.
    bpe: Option<Description>,
    config: Value,
    special: Value,
    generation: Value,
    model: Value,
    template: Option<TemplateSources>,
}

/// Chat template of a folder, and the template to use if tools are given.
pub(super) struct TemplateSources {
    pub(super) default: String,
    pub(super) tool_use: Option<String>,
}

impl Files {
    fn read(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read {
            path: path.clone(),
            source,
        })?;
        if is_lfs_pointer(&bytes) {
            return Err(TextError::File {
                path,
                found: "a Git LFS pointer instead of the file".to_owned(),
                expected: "the file itself, which `git lfs pull` fetches",
            });
        }
        let tokenizer =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| TextError::File {
                path,
                found: format!("not readable ({error})"),
                expected: "a tokenizer.json of the tokenizers library",
            })?;
        let config = json(dir, "tokenizer_config.json")?;
        Ok(Self {
            tokenizer,
            bpe: Description::read(&bytes),
            special: json(dir, "special_tokens_map.json")?,
            generation: json(dir, "generation_config.json")?,
            model: json(dir, "config.json")?,
            template: template_source(dir, &config)?,
            config,
        })
    }
}

/// Reads an optional text file. Returns `None` if it does not exist.
fn read(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Reads an optional JSON file. Returns null if it does not exist.
pub(super) fn json(dir: &Path, name: &str) -> Result<Value, TextError> {
    let path = dir.join(name);
    let Some(text) = read(&path)? else {
        return Ok(Value::Null);
    };
    from_python_json(text.as_bytes()).map_err(|error| TextError::File {
        path,
        found: format!("not readable ({error})"),
        expected: "JSON",
    })
}

/// Finds the chat template. A separate file takes precedence over the tokenizer's
/// configuration.
///
/// From a list of templates, this takes the ones named `default` (or else the first) and
/// `tool_use`.
pub(super) fn template_source(
    dir: &Path,
    config: &Value,
) -> Result<Option<TemplateSources>, TextError> {
    if let Some(default) = read(&dir.join("chat_template.jinja"))? {
        let tool_use = read(&dir.join("additional_chat_templates/tool_use.jinja"))?;
        return Ok(Some(TemplateSources { default, tool_use }));
    }
    let file = json(dir, "chat_template.json")?;
    let found = [&file["chat_template"], &config["chat_template"]]
        .into_iter()
        .find(|template| !template.is_null());
    let text = |entry: &Value| entry["template"].as_str().map(str::to_owned);
    let named = |list: &[Value], name: &str| {
        list.iter()
            .find(|entry| entry["name"] == name)
            .and_then(text)
    };
    let sources = match found {
        None => return Ok(None),
        Some(Value::Array(list)) => {
            let default = named(list, "default").or_else(|| list.first().and_then(text));
            default.map(|default| TemplateSources {
                default,
                tool_use: named(list, "tool_use"),
            })
        }
        Some(template) => template.as_str().map(|default| TemplateSources {
            default: default.to_owned(),
            tool_use: None,
        }),
    };
    sources.map(Some).ok_or_else(|| TextError::File {
        path: dir.to_owned(),
        found: "a folder whose chat_template is not a string".to_owned(),
        expected: "a string, or a list of names with templates",
    })
}

/// Returns the text of a special token, which is a string or an object with `content`.
pub(super) fn special_text<'a>(
    config: &'a Value,
    special: &'a Value,
    name: &str,
) -> Option<&'a str> {
    [config, special].into_iter().find_map(|file| {
        let token = &file[name];
        token.as_str().or_else(|| token["content"].as_str())
    })
}

/// Returns the token ids in a field that holds a number or a list of numbers.
pub(super) fn ids(file: &Value, name: &str) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match &file[name] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// Returns the tokens to put around a prompt according to `add_bos_token` and
/// `add_eos_token`.
///
/// Only the tokenizer classes listed here use these settings, in place of what `tokenizer.json`
/// says. Returns `None` for other classes, or if neither setting is present.
fn explicit_frame(
    config: &Value,
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<Option<Frame>, TextError> {
    let class = config["tokenizer_class"].as_str().unwrap_or_default();
    let heeds = ["Llama", "CodeLlama", "Gemma"].iter().any(|family| {
        class
            .strip_prefix(family)
            .is_some_and(|rest| rest.starts_with("Tokenizer"))
    });
    let (before, after) = (
        config["add_bos_token"].as_bool(),
        config["add_eos_token"].as_bool(),
    );
    if !heeds || (before.is_none() && after.is_none()) {
        return Ok(None);
    }
    let token = |wanted: bool, id: Option<u32>, name| match (wanted, id) {
        (true, None) => Err(TextError::MissingSpecial { name }),
        (wanted, id) => Ok(id.filter(|_| wanted)),
    };
    Ok(Some(Frame {
        before: token(before.unwrap_or(true), bos, "bos")?,
        after: token(after.unwrap_or(false), eos, "eos")?,
    }))
}

/// Collects all tokens with their bytes, ordered by id.
fn vocabulary(tokenizer: &tokenizers::Tokenizer) -> Result<Vocabulary, TextError> {
    let decoding = Decoding::of(tokenizer)?;
    let mut by_id: BTreeMap<u32, String> = BTreeMap::new();
    for (text, id) in tokenizer.get_vocab(true) {
        by_id
            .entry(id)
            .and_modify(|first| *first = first.clone().min(text.clone()))
            .or_insert(text);
    }
    let added = tokenizer.get_added_tokens_decoder();
    by_id.extend(added.iter().map(|(id, token)| (*id, token.content.clone())));
    let size = by_id.last_key_value().map_or(0, |(id, _)| *id as usize + 1);
    if size == 0 {
        return Err(TextError::EmptyVocabulary);
    }
    if size > MAX_TOKENS {
        return Err(TextError::VocabularyTooLarge {
            tokens: size,
            limit: MAX_TOKENS,
        });
    }
    let mut vocabulary = Vocabulary::default();
    for (id, text) in by_id {
        while vocabulary.len() < id as usize {
            vocabulary.push("", TokenKind::Absent, b"")?;
        }
        match added.get(&id) {
            Some(token) => {
                let kind = if token.special {
                    TokenKind::Control
                } else {
                    TokenKind::UserDefined
                };
                vocabulary.push(&text, kind, text.as_bytes())?
            }
            None => vocabulary.push(&text, TokenKind::Normal, &decoding.bytes(&text))?,
        };
    }
    Ok(vocabulary)
}

/// Settings of the decoder in `tokenizer.json`, as far as models differ in them.
#[derive(Default)]
struct Decoding {
    byte_level: bool,
    byte_fallback: bool,
    /// Text that stands for a space.
    space: Option<String>,
    /// Mark in front of tokens that continue a word. A space precedes all others.
    continues: Option<String>,
    strip_leading_space: bool,
}

const DECODERS: &str = "ByteLevel, Metaspace, WordPiece, or a Sequence of Replace, ByteFallback, \
                        Fuse and Strip, for spaces";

impl Decoding {
    fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self, TextError> {
        let decoder =
            serde_json::to_value(tokenizer.get_decoder()).map_err(|error| TextError::Build {
                part: "decoder",
                message: error.to_string(),
            })?;
        let mut decoding = Self::default();
        let steps = match &decoder["decoders"] {
            Value::Array(steps) if decoder["type"] == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(&decoder),
        };
        for step in steps {
            decoding.add(step)?;
        }
        Ok(decoding)
    }

    fn add(&mut self, step: &Value) -> Result<(), TextError> {
        let unsupported = || TextError::Unsupported {
            part: "decoder",
            found: step.to_string(),
            expected: DECODERS,
        };
        match step["type"].as_str() {
            Some("ByteLevel") => self.byte_level = true,
            Some("ByteFallback") => self.byte_fallback = true,
            Some("Fuse") => {}
            Some("Metaspace") => {
                self.space = step["replacement"].as_str().map(str::to_owned);
                self.strip_leading_space = step["prepend_scheme"] != "never";
            }
            Some("WordPiece") => {
                let prefix = step["prefix"].as_str().ok_or_else(unsupported)?;
                self.continues = Some(prefix.to_owned());
                self.strip_leading_space = true;
            }
            Some("Replace") if step["content"] == " " => {
                let pattern = step["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                self.space = Some(pattern.to_owned());
            }
            Some("Strip") if step["content"] == " " && step["stop"] == 0 => {
                match step["start"].as_u64() {
                    Some(0) => {}
                    Some(1) => self.strip_leading_space = true,
                    _ => return Err(unsupported()),
                }
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    fn bytes(&self, text: &str) -> Vec<u8> {
        if self.byte_level {
            return token_bytes(text);
        }
        if let Some(mark) = &self.continues {
            return match text.strip_prefix(mark.as_str()) {
                Some(rest) => rest.as_bytes().to_vec(),
                None => format!(" {text}").into_bytes(),
            };
        }
        match named_byte(text) {
            Some(byte) if self.byte_fallback => vec![byte],
            _ => match &self.space {
                Some(space) => text.replace(space.as_str(), " ").into_bytes(),
                None => text.as_bytes().to_vec(),
            },
        }
    }
}
