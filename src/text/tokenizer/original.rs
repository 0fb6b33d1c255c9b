//! Builds the tokenizer of a folder without `tokenizer.json` from the file that the model was
//! trained with: a model of SentencePiece, or a vocabulary of tiktoken.

use super::folder::{ids, json, special_text, template_source};
use super::vocabulary::MAX_TOKENS;
use super::{GgufVocabulary, Tokenizer, sentencepiece_file, tiktoken};
use crate::text::TextError;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// How the types of tokens are numbered in a [`GgufVocabulary`].
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Values of `model_type` in `config.json`, with the rule by which their vocabulary of tiktoken
/// splits text. The vocabulary does not say.
const RULES: [(&str, &str); 8] = [
    ("kimi", "kimi-k2"),
    ("deepseek_v3", "kimi-k2"),
    ("qwen3_5", "qwen35"),
    ("qwen", "qwen2"),
    ("llama", "llama-bpe"),
    ("gpt_oss", "gpt-4o"),
    ("chatglm", "chatglm-bpe"),
    ("glm4", "chatglm-bpe"),
];

/// Returns the file that describes the tokenizer of a folder without `tokenizer.json`, if there is
/// one.
pub(super) fn file(dir: &Path) -> Option<PathBuf> {
    let named = ["tokenizer.model", "tiktoken.model"].map(|name| dir.join(name));
    named.into_iter().find(|path| path.exists()).or_else(|| {
        let entries = std::fs::read_dir(dir).ok()?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut found = paths.filter(|path| path.extension().is_some_and(|end| end == "tiktoken"));
        found.next()
    })
}

/// Builds the tokenizer that `path` describes, with the settings of the folder's other files.
///
/// # Errors
/// Returns an error for the same reasons as [`Tokenizer::from_folder`].
pub(super) fn tokenizer(dir: &Path, path: &Path) -> Result<Tokenizer, TextError> {
    let bytes = std::fs::read(path).map_err(|source| TextError::Read {
        path: path.to_owned(),
        source,
    })?;
    let config = json(dir, "tokenizer_config.json")?;
    let special = json(dir, "special_tokens_map.json")?;
    let generation = json(dir, "generation_config.json")?;
    let model = json(dir, "config.json")?;
    let mut description = match tiktoken::is_tiktoken(&bytes) {
        true => tiktoken::read(&bytes, path, rule(&model)?)?,
        false => sentencepiece_file::read(&bytes, path)?,
    };
    add_tokens(&mut description, added(dir, &config)?)?;
    let id_of = |name: &str| {
        let text = special_text(&config, &special, name)?;
        let place = description.tokens.iter().position(|token| token == text)?;
        u32::try_from(place).ok()
    };
    let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
    let mut ends = ids(&generation, "eos_token_id");
    if ends.is_empty() {
        ends = ids(&model, "eos_token_id");
    }
    ends.retain(|id| Some(*id) != eos);
    let mut ends = ends.into_iter();
    description.bos = bos.or(description.bos);
    description.eos = eos.or_else(|| ends.next()).or(description.eos);
    (description.eot, description.eom) = (ends.next(), ends.next());
    description.add_bos = config["add_bos_token"].as_bool();
    description.add_eos = config["add_eos_token"].as_bool();
    if let Some(sources) = template_source(dir, &config)? {
        description.chat_template = Some(sources.default);
        description.tool_use_template = sources.tool_use;
    }
    description.into_tokenizer()
}

/// Returns the rule by which a vocabulary of tiktoken splits text.
fn rule(model: &Value) -> Result<&'static str, TextError> {
    let kind = model["model_type"].as_str().unwrap_or_default();
    let known = RULES.iter().find(|(prefix, _)| kind.starts_with(prefix));
    known
        .map(|(_, rule)| *rule)
        .ok_or_else(|| TextError::Unsupported {
            part: "vocabulary of tiktoken",
            found: format!("that of a model of the type {kind:?}"),
            expected: "that of a Kimi, DeepSeek V3, Qwen, Llama, gpt-oss or GLM model, or a \
                       tokenizer.json, which says how text is split",
        })
}

/// Returns the tokens that a folder adds to the model's own: their texts by id, and whether they
/// are special.
fn added(dir: &Path, config: &Value) -> Result<BTreeMap<u32, (String, bool)>, TextError> {
    let mut added = BTreeMap::new();
    let file = json(dir, "added_tokens.json")?;
    for (text, id) in file.as_object().into_iter().flatten() {
        if let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            added.insert(id, (text.clone(), false));
        }
    }
    let decoder = config["added_tokens_decoder"].as_object();
    for (id, token) in decoder.into_iter().flatten() {
        if let (Ok(id), Some(text)) = (id.parse(), token["content"].as_str()) {
            let special = token["special"].as_bool().unwrap_or(false);
            added.insert(id, (text.to_owned(), special));
        }
    }
    Ok(added)
}

/// Adds tokens to a description. Ids between that have no token get one that no text contains.
fn add_tokens(
    description: &mut GgufVocabulary,
    added: BTreeMap<u32, (String, bool)>,
) -> Result<(), TextError> {
    let tokens = added.last_key_value().map_or(0, |(id, _)| *id as usize + 1);
    if tokens > MAX_TOKENS {
        let limit = MAX_TOKENS;
        return Err(TextError::VocabularyTooLarge { tokens, limit });
    }
    let known = description.tokens.len();
    let (types, has_scores) = (&mut description.token_types, !description.scores.is_empty());
    types.resize(known, NORMAL);
    for id in known..tokens {
        description.tokens.push(format!("<|unused_{id}|>"));
        types.push(UNUSED);
        if has_scores {
            description.scores.push(0.0);
        }
    }
    for (id, (text, special)) in added {
        let id = id as usize;
        // A token of the model itself is only marked as special.
        if id < known && !special {
            continue;
        }
        types[id] = if special { CONTROL } else { USER_DEFINED };
        description.tokens[id] = text;
    }
    Ok(())
}
