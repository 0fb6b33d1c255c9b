//! Splits text into the words within which byte pair encoding may merge.
//!
//! GGUF files only name the rule (`tokenizer.ggml.pre`) and leave its definition to the
//! reader. The patterns are those of the models' own `tokenizer.json` files, which contain them.
//!
//! Most patterns look ahead: a run of white space before a word matches without its last
//! character, which belongs to the word. A regex engine with look-ahead has to backtrack,
//! and keeps a state for each character of a run of spaces. This part is therefore done by
//! hand, and the rest by automata, whose time and memory are linear in the text.

use crate::text::TextError;
use regex::Regex;
use serde_json::Value;

/// Pattern of GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Pattern of Llama 3: contractions in either case, and numbers in groups of up to three
/// digits.
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Qwen 2: like Llama 3, but each digit is a word of its own.
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Qwen 3.5: like Qwen 2, with combining marks kept in words.
const QWEN35: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Tekken (Mistral): words are split where upper case begins.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of GPT-4o: like Tekken, with contractions and groups of up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Kimi K2: like GPT-4o, with Chinese characters apart.
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Seed-Coder.
const SEED_CODER: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Pattern of Bailing (Ling).
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Pattern of the last step of DeepSeek V3.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Pattern of words in DeepSeek LLM: the cased letters of Latin, Greek, Cyrillic and
/// similar scripts.
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

/// Pattern of Chinese, Japanese and Korean runs in DeepSeek models.
const DEEPSEEK_CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

/// Pattern of Bloom and related models: words end at white space and at punctuation.
const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";

/// Pre-tokenizer rule: its names, and its patterns in the order in which they apply.
struct Rule {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Whether a word that is a token becomes that token without merging.
    whole_words: bool,
    /// Whether a prompt begins with the beginning-of-text token unless the file says otherwise.
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
    Rule {
        names: &["kimi-k2"],
        patterns: &[KIMI],
        whole_words: true,
        add_bos: false,
    },
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

/// End of most patterns: white space before a word matches without its last character.
const WHITE_SPACE: &str = r"|\s+(?!\S)|\s+";

/// Compiled rule.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    patterns: Vec<Pattern>,
    /// Whether a word that is a token becomes that token without merging.
    pub(super) whole_words: bool,
    /// Whether prompts begin with the beginning-of-text token by default.
    pub(super) add_bos: bool,
}

/// Compiled pattern, without its look-ahead.
#[derive(Debug)]
struct Pattern {
    regex: Regex,
    /// Runs of white space that leave their last character to the word after them.
    spaces: Spaces,
}

/// Value of [`Pattern::spaces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spaces {
    /// No runs.
    Whole,
    /// Runs without a line break. Another part of the pattern matches the other runs.
    WithoutLineBreaks,
    /// All runs.
    All,
}

fn compiled(pattern: &str) -> Result<Regex, TextError> {
    Regex::new(pattern).map_err(|error| TextError::Build {
        part: "pre-tokenizer",
        message: error.to_string(),
    })
}

/// Returns whether a pattern contains possessive quantifiers (`?+`, `{2}+`), which
/// [`regex`](Regex) reads as a repetition of a repetition.
fn is_possessive(pattern: &str) -> bool {
    // What the pattern is without escaped characters and the contents of classes.
    let mut outside = String::new();
    let (mut classes, mut characters) = (0usize, pattern.chars());
    while let Some(character) = characters.next() {
        match character {
            '\\' => drop(characters.next()),
            '[' => classes += 1,
            ']' if classes > 0 => {
                classes -= 1;
                outside.push(']');
            }
            other if classes == 0 => outside.push(other),
            _ => {}
        }
    }
    let counts = |(end, _): (usize, &str)| {
        let inside = outside[..end].rsplit_once('{').map(|(_, inside)| inside);
        inside.is_some_and(|inside| inside.chars().all(|c| c.is_ascii_digit() || c == ','))
    };
    ["?+", "*+", "++"].iter().any(|two| outside.contains(two))
        || outside.match_indices("}+").any(counts)
}

/// Returns which runs of white space the alternatives of `rest` leave to the alternatives of
/// [`WHITE_SPACE`] after them. Finds out by trying all short runs.
fn runs_left_by(rest: &str) -> Result<Spaces, TextError> {
    const LONGEST: u32 = 4;
    let characters = [' ', '\t', '\n', '\r', '\u{a0}', '\u{2028}'];
    let regex = compiled(&format!("^(?:{rest})"))?;
    let (mut all, mut without_line_breaks) = (true, true);
    for length in 1..=LONGEST {
        for number in 0..characters.len().pow(length) {
            let character =
                |place| characters[number / characters.len().pow(place) % characters.len()];
            let run: String = (0..length).map(character).collect();
            let breaks = |text: &str| text.contains(['\r', '\n']);
            let found = regex.find(&run).map(|found| breaks(found.as_str()));
            all &= found.is_none();
            without_line_breaks &= found == breaks(&run).then_some(true);
        }
    }
    match (all, without_line_breaks) {
        (true, _) => Ok(Spaces::All),
        (_, true) => Ok(Spaces::WithoutLineBreaks),
        _ => Err(TextError::Build {
            part: "pre-tokenizer",
            message: format!("{rest:?} matches some of the white space before {WHITE_SPACE:?}"),
        }),
    }
}

impl Pattern {
    /// Compiles a pattern without look-around, except for the end of most patterns,
    /// [`WHITE_SPACE`].
    ///
    /// # Errors
    /// Returns an error if the pattern does not compile or matches the empty string, or if a
    /// part before that end matches runs of white space in a way that
    /// [`trailing_space_bytes`](Self::trailing_space_bytes) would not recognize.
    fn new(pattern: &str) -> Result<Self, TextError> {
        let (text, spaces) = match pattern.strip_suffix(WHITE_SPACE) {
            None => (pattern.to_owned(), Spaces::Whole),
            Some(rest) => (format!(r"{rest}|\s+"), runs_left_by(rest)?),
        };
        let regex = compiled(&text)?;
        let is_empty = |text| regex.find(text).is_some_and(|found| found.is_empty());
        if ["", "a", " "].into_iter().any(is_empty) {
            return Err(TextError::Build {
                part: "pre-tokenizer",
                message: format!("{text:?} matches the empty string"),
            });
        }
        Ok(Self { regex, spaces })
    }

    /// Splits `text` and calls `piece` with each part in order. The parts are the matches
    /// and the text between them; empty parts are skipped.
    fn cut<'a>(
        &self,
        text: &'a str,
        piece: &mut dyn FnMut(&'a str) -> Result<(), TextError>,
    ) -> Result<(), TextError> {
        let mut done = 0;
        while let Some(found) = self.regex.find_at(text, done) {
            let end = found.end() - self.trailing_space_bytes(text, found.start(), found.end());
            if end <= done {
                // Only a safeguard: no pattern matches the empty string.
                break;
            }
            for part in [&text[done..found.start()], &text[found.start()..end]] {
                if !part.is_empty() {
                    piece(part)?;
                }
            }
            done = end;
        }
        match done < text.len() {
            true => piece(&text[done..]),
            false => Ok(()),
        }
    }

    /// Returns the number of bytes at the end of a match that belong to the next word.
    ///
    /// These are the bytes of the last character, if the match is a run of several
    /// white-space characters and a word follows.
    fn trailing_space_bytes(&self, text: &str, start: usize, end: usize) -> usize {
        let found = &text[start..end];
        let last = found.chars().next_back();
        let Some(last) = last.filter(|last| last.is_whitespace() && end < text.len()) else {
            return 0;
        };
        let is_run = match self.spaces {
            Spaces::Whole => return 0,
            Spaces::WithoutLineBreaks => {
                !found.contains(['\r', '\n']) && found.chars().all(char::is_whitespace)
            }
            Spaces::All => found.chars().all(char::is_whitespace),
        };
        match is_run && found.len() > last.len_utf8() {
            true => last.len_utf8(),
            false => 0,
        }
    }
}

impl PreTokenizer {
    /// Compiles the rule called `name`.
    ///
    /// # Errors
    /// Returns an error that lists all known names if there is no such rule.
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
        let patterns = rule.patterns.iter().map(|pattern| Pattern::new(pattern));
        Ok(Self {
            patterns: patterns.collect::<Result<_, _>>()?,
            whole_words: rule.whole_words,
            add_bos: rule.add_bos,
        })
    }

    /// Builds the rule that the `pre_tokenizer` of a `tokenizer.json` describes. Returns `None`
    /// if it does anything else than to cut the text at the matches of patterns and to write
    /// its bytes as characters at last.
    pub(super) fn from_json(description: &Value, whole_words: bool) -> Option<Self> {
        let steps = match &description["pretokenizers"] {
            Value::Array(steps) if description["type"] == "Sequence" => steps.as_slice(),
            _ => std::slice::from_ref(description),
        };
        let (last, steps) = steps.split_last()?;
        if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
            return None;
        }
        let mut patterns = Vec::new();
        for step in steps {
            let pattern = match step["type"].as_str()? {
                "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
                    let pattern = &step["pattern"];
                    let text = pattern["String"].as_str().map(regex::escape);
                    text.or_else(|| Some(pattern["Regex"].as_str()?.to_owned()))?
                }
                "Digits" => match step["individual_digits"].as_bool()? {
                    true => r"\p{N}".to_owned(),
                    false => r"\p{N}+".to_owned(),
                },
                _ => return None,
            };
            if is_possessive(&pattern) {
                return None;
            }
            patterns.push(Pattern::new(&pattern).ok()?);
        }
        // The library's default is to use the pattern.
        if last["use_regex"].as_bool().unwrap_or(true) {
            patterns.push(Pattern::new(GPT2).ok()?);
        }
        Some(Self {
            patterns,
            whole_words,
            add_bos: false,
        })
    }

    /// Splits `text` with each pattern in turn and calls `piece` with the pieces in order.
    /// Matches and the text between them are pieces, so that the pieces together make up
    /// the text.
    ///
    /// # Errors
    /// Returns only errors from `piece`.
    pub(super) fn split<'a>(
        &self,
        text: &'a str,
        piece: &mut dyn FnMut(&'a str) -> Result<(), TextError>,
    ) -> Result<(), TextError> {
        cut_with(&self.patterns, text, piece)
    }
}

fn cut_with<'a>(
    patterns: &[Pattern],
    text: &'a str,
    piece: &mut dyn FnMut(&'a str) -> Result<(), TextError>,
) -> Result<(), TextError> {
    match patterns {
        [] => piece(text),
        [pattern] => pattern.cut(text, piece),
        [pattern, finer @ ..] => pattern.cut(text, &mut |part| cut_with(finer, part, piece)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn pieces<'a>(rule: &PreTokenizer, text: &'a str) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        let mut push = |piece| {
            pieces.push(piece);
            Ok(())
        };
        rule.split(text, &mut push).unwrap();
        pieces
    }

    fn split<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
        pieces(&PreTokenizer::named(name).unwrap(), text)
    }

    /// Rule with the patterns of the models' own files, run by an engine with look-ahead.
    struct Original(Vec<fancy_regex::Regex>);

    impl Original {
        fn of(rule: &Rule) -> Self {
            let patterns = rule.patterns.iter();
            Self(
                patterns
                    .map(|p| fancy_regex::Regex::new(p).unwrap())
                    .collect(),
            )
        }

        fn split<'a>(&self, text: &'a str) -> Vec<&'a str> {
            let mut pieces = vec![text];
            for pattern in &self.0 {
                let mut finer = Vec::new();
                for piece in pieces {
                    let mut done = 0;
                    for found in pattern.find_iter(piece) {
                        let found = found.unwrap();
                        finer.push(&piece[done..found.start()]);
                        finer.push(found.as_str());
                        done = found.end();
                    }
                    finer.push(&piece[done..]);
                }
                finer.retain(|piece| !piece.is_empty());
                pieces = finer;
            }
            pieces
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn every_rule_cuts_as_its_patterns_do(
            text in "([ \t\r\n\u{a0}\u{2028}\u{3000}]{0,4}(\\PC{0,4}|[a-zA-ZßΑβ漢\u{301}]{1,4}|'(s|LL|m)|[0-9]{1,5}|[.,!?…。/]{1,3})){0,8}[ \n]{0,3}",
        ) {
            for (rule, ours, original) in READY.iter() {
                prop_assert_eq!(
                    pieces(ours, &text), original.split(&text),
                    "{} of {:?}", rule.names[0], text
                );
            }
        }
    }

    /// All rules in both implementations.
    static READY: LazyLock<Vec<(&Rule, PreTokenizer, Original)>> = LazyLock::new(|| {
        let ready = |rule: &'static Rule| {
            let ours = PreTokenizer::named(rule.names[0]).unwrap();
            (rule, ours, Original::of(rule))
        };
        RULES.iter().map(ready).collect()
    });

    #[test]
    fn a_run_of_a_million_characters_is_cut() {
        for (run, after) in [("a", " b"), (" ", "x")] {
            let text = run.repeat(1_000_000) + after;
            for (rule, ours, _) in READY.iter() {
                let mut length = 0;
                let mut add = |piece: &str| {
                    length += piece.len();
                    Ok(())
                };
                ours.split(&text, &mut add).unwrap();
                assert_eq!(length, text.len(), "{}", rule.names[0]);
            }
        }
        assert_eq!(split("gpt-2", &(" ".repeat(1_000_000) + "x")).len(), 2);
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
