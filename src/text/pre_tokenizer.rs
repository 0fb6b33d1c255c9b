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
const DEEPSEEK_WORDS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}",
    r"\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}",
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}",
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}",
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}",
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}",
    r"\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}",
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}",
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
    r"]+",
);

/// DeepSeek's Chinese, Japanese and Korean runs.
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

/// Bloom and its kin: words end at white space and at punctuation.
const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";

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
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
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
        &[
            r"\p{N}{1,3}",
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
            DEEPSEEK3,
        ],
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
