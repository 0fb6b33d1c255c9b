//! Cuts text into the words that byte pair encoding may merge within.
//!
//! GGUF files name the rule (`tokenizer.ggml.pre`) and leave the rule itself to
//! the reader. The patterns are those of the models' own `tokenizer.json` files.

use super::TextError;
use fancy_regex::{Regex, RegexBuilder};

/// GPT-2's own pattern.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3: contractions in either case, and numbers in groups of three digits.
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2: like Llama 3, but every digit alone.
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 3.5: like Qwen 2, with combining marks kept in words.
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tekken (Mistral): words are cut where upper case begins.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o: Tekken with contractions and groups of three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Seed-Coder.
const SEED_CODER: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Bailing (Ling).
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// DeepSeek V3's last step.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// DeepSeek LLM's words: the cased letters of Latin, Greek, Cyrillic and their kin.
const DEEPSEEK_WORDS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

/// DeepSeek's Chinese, Japanese and Korean runs.
const DEEPSEEK_CJK: &str = "[一-龥\u{0800}-一가-\u{D7FF}]+";

/// Bloom and its kin: words end at white space and at punctuation.
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// One rule: its names, its patterns in order, and what goes with it.
struct Rule {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token is that token, whatever the merges say.
    whole_words: bool,
    /// A prompt begins with the beginning-of-text token unless the file says otherwise.
    add_bos: bool,
}

const fn rule(names: &'static [&'static str], patterns: &'static [&'static str]) -> Rule {
    Rule {
        names,
        patterns,
        whole_words: false,
        add_bos: false,
    }
}

const RULES: &[Rule] = &[
    rule(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    rule(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ],
        &[GPT2],
    ),
    rule(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        &[r"\p{N}", GPT2],
    ),
    Rule {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        patterns: &[LLAMA3],
        whole_words: true,
        add_bos: true,
    },
    rule(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    rule(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    rule(&["qwen35"], &[QWEN35]),
    Rule {
        names: &["tekken"],
        patterns: &[TEKKEN],
        whole_words: true,
        add_bos: true,
    },
    rule(&["gpt-4o", "llama4", "minimax-m2"], &[GPT4O]),
    rule(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            DEEPSEEK_WORDS,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            DEEPSEEK_CJK,
            r"\p{N}+",
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            DEEPSEEK_CJK,
            r"\p{N}",
        ],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense"],
        &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3],
    ),
    rule(
        &["falcon"],
        &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    ),
    rule(&["seed-coder"], &[SEED_CODER]),
    rule(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    rule(&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM]),
    rule(&["viking"], &[BLOOM, r"\p{N}"]),
];

/// How far a pattern may look before it gives up on a text; linear in the text
/// for every pattern above, so that only texts of a hundred megabytes reach it.
const BACKTRACK_LIMIT: usize = 100_000_000;

/// A ready rule.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    patterns: Vec<Regex>,
    /// A word that is a token is that token, whatever the merges say.
    pub(super) whole_words: bool,
    /// Whether prompts begin with the beginning-of-text token by default.
    pub(super) add_bos: bool,
}

impl PreTokenizer {
    /// The rule called `name`.
    ///
    /// # Errors
    /// When no rule is called so; the error names all that there are.
    pub(super) fn named(name: &str) -> Result<Self, TextError> {
        let rule = RULES
            .iter()
            .find(|rule| rule.names.contains(&name))
            .ok_or_else(|| {
                let known: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
                TextError::UnknownPreTokenizer {
                    found: name.to_owned(),
                    known: known.join(", "),
                }
            })?;
        let mut patterns = Vec::with_capacity(rule.patterns.len());
        for pattern in rule.patterns {
            let built = RegexBuilder::new(pattern)
                .backtrack_limit(BACKTRACK_LIMIT)
                .build();
            patterns.push(built.map_err(|error| TextError::Build {
                part: "pre-tokenizer",
                message: error.to_string(),
            })?);
        }
        Ok(Self {
            patterns,
            whole_words: rule.whole_words,
            add_bos: rule.add_bos,
        })
    }

    /// Cuts `text` with each pattern in turn: what matches is a piece, and so
    /// is what lies between two matches. The pieces make up the text.
    pub(super) fn split<'a>(&self, text: &'a str) -> Result<Vec<&'a str>, TextError> {
        let mut pieces = vec![text];
        for pattern in &self.patterns {
            let mut finer = Vec::with_capacity(pieces.len());
            for piece in pieces {
                cut(pattern, piece, &mut finer)?;
            }
            pieces = finer;
        }
        Ok(pieces)
    }
}

/// Appends to `pieces` the parts of `text`, none of them empty.
fn cut<'a>(pattern: &Regex, text: &'a str, pieces: &mut Vec<&'a str>) -> Result<(), TextError> {
    let mut done = 0;
    for found in pattern.find_iter(text) {
        let found = found.map_err(|error| TextError::Encode {
            bytes: text.len(),
            message: error.to_string(),
        })?;
        let parts = [&text[done..found.start()], found.as_str()];
        pieces.extend(parts.into_iter().filter(|part| !part.is_empty()));
        done = found.end();
    }
    if done < text.len() {
        pieces.push(&text[done..]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
        PreTokenizer::named(name).unwrap().split(text).unwrap()
    }

    #[test]
    fn every_named_rule_builds_and_loses_no_text() {
        let text = "It's 12345 o'clock,\r\n  don't\tpanic!!  日本語 ΑΒγ \u{1F469}\u{200D}\u{1F680} <|x|>  ";
        for name in RULES.iter().flat_map(|rule| rule.names) {
            assert_eq!(split(name, text).concat(), text, "{name}");
        }
    }

    #[test]
    fn digits_are_grouped_as_the_model_learned_them() {
        assert_eq!(split("gpt-2", "a 1234"), ["a", " 1234"]);
        assert_eq!(split("smollm", "a 1234"), ["a", " ", "1", "2", "3", "4"]);
        assert_eq!(split("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(split("qwen2", "a 12"), ["a", " ", "1", "2"]);
    }

    #[test]
    fn the_last_space_goes_with_the_word_after_it() {
        assert_eq!(split("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(split("gpt-2", "a \n b  "), ["a", " \n", " b", "  "]);
    }

    #[test]
    fn an_unknown_rule_is_refused_with_the_known_ones() {
        let error = PreTokenizer::named("nonsense").unwrap_err().to_string();
        assert!(
            error.contains("\"nonsense\"") && error.contains("smollm, starcoder"),
            "{error}"
        );
    }
}
