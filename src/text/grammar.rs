//! [`Grammar`]: an answer held to a JSON schema, a regular expression or a grammar.
//!
//! Grammars are compiled and followed by llguidance (Moskal et al., "llguidance:
//! Super-fast Structured Outputs"): an Earley parser over lexemes that are derivatives of
//! regular expressions, which walks a trie of all tokens for the mask of a step.

mod pattern;
mod schema;
mod vocabulary;

use super::Tokenizer;
use super::tools::ToolFormat;
use crate::sampling::{Constraint, ConstraintError};
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::TokEnv;
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use schema::Rewriter;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use thiserror::Error;
use vocabulary::Tokens;

/// What an answer must be, compiled for one tokenizer. Cloning is cheap; give it to any
/// number of requests as their [`constraint`](crate::Request::constraint).
///
/// Compiling takes from under a millisecond to some hundreds for the largest schemas, on
/// the caller's thread; the first grammar of a tokenizer also prepares its vocabulary
/// ([`Grammar::prepare`]).
///
/// # JSON
///
/// Objects are written on one line. After `,` and `:` one space may stand, and there is no
/// other white space: an answer cannot spend its tokens on blanks. Properties come in the
/// order of the schema. A schema keyword that cannot be kept to is refused by name, or left
/// out and named by [`Grammar::unenforced`] ([`Keywords`]), as is `oneOf` of schemas that
/// exclude one another in no obvious way: write `anyOf`. Formats that are not known are
/// annotations. The schema's draft is that of its `$schema`, 2020-12 if it names none; references to other
/// documents are not followed.
///
/// An answer that ends with `length` is the beginning of one that would have been right.
#[derive(Clone)]
pub struct Grammar {
    /// Before the first token. Never used itself.
    start: Arc<Matcher>,
    kind: GrammarKind,
    unenforced: Arc<[String]>,
}

/// What an answer must be.
#[derive(Clone, Copy, Debug)]
pub enum Form<'a> {
    /// JSON of this schema.
    JsonSchema(&'a Value),
    /// A text that this regular expression matches as a whole.
    Regex(&'a str),
    /// A text of this grammar.
    Lark(&'a str),
    /// One of these texts.
    Choice(&'a [String]),
}

/// What becomes of a schema with keywords that cannot be kept to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keywords {
    /// It is refused.
    #[default]
    Strict,
    /// They are left out: the answer may be more than the schema allows.
    Lenient,
}

/// Tools that may be called in place of an answer of a form.
#[derive(Clone, Copy, Debug)]
pub struct Calls<'a> {
    /// How the model writes calls.
    pub format: ToolFormat,
    /// The names of the tools, each with the schema of its parameters.
    pub tools: &'a [(&'a str, Option<&'a Value>)],
    /// Whether an answer may have several calls.
    pub several: bool,
}

/// What a grammar was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrammarKind {
    /// A JSON schema.
    JsonSchema,
    /// A regular expression.
    Regex,
    /// A grammar in Lark's syntax.
    Lark,
    /// A list of texts.
    Choice,
}

impl fmt::Display for GrammarKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::JsonSchema => "JSON schema",
            Self::Regex => "regular expression",
            Self::Lark => "grammar",
            Self::Choice => "list of choices",
        })
    }
}

/// Why there is no grammar.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GrammarError {
    /// It is longer than any that is taken.
    #[error("the {kind} is {bytes} bytes long, but may have at most {limit}")]
    TooLong {
        /// What it was to be made of.
        kind: GrammarKind,
        /// The length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It is nested deeper than any that is taken.
    #[error("the {kind} is nested deeper than the {limit} levels that it may have")]
    TooDeep {
        /// What it was to be made of.
        kind: GrammarKind,
        /// The limit.
        limit: usize,
    },
    /// It is wrong, asks for what is not supported, or takes too much work.
    #[error("the {kind} cannot be used: {reason}")]
    Refused {
        /// What it was to be made of.
        kind: GrammarKind,
        /// What is wrong, in the words of the compiler.
        reason: String,
    },
    /// The tokenizer's vocabulary cannot be prepared.
    #[error("the tokenizer cannot serve grammars: {reason}")]
    Tokenizer {
        /// Why.
        reason: String,
    },
}

/// The longest JSON schema without its white space, and list of choices, in bytes.
const MAX_SCHEMA_BYTES: usize = 128 << 10;
/// The longest regular expression and grammar, in bytes.
const MAX_TEXT_BYTES: usize = 32 << 10;
/// The deepest nesting of brackets in any of them.
const MAX_DEPTH: usize = 128;
/// The most properties of one object: what they cost grows with their square.
const MAX_PROPERTIES: usize = 2000;
/// The most patterns of a schema that are looked at one by one when it cannot be compiled.
const MAX_PATTERNS: usize = 64;
/// The number of properties from which on an object is tried before it is answered with.
const LARGE_OBJECT: usize = 200;
/// How many tokens that takes: the brackets and the beginning of a name.
const LOOK_AHEAD: usize = 4;
/// The longest message of the compiler that is passed on, in bytes.
const MAX_REASON: usize = 400;
/// The compiler goes deeper than the text is nested: one call a property, for one.
const COMPILER_STACK: usize = 256 << 20;

/// What compiling and a step may cost at most; beyond it is an error.
fn limits() -> ParserLimits {
    ParserLimits {
        // One or two KiB a state: what a running answer may take.
        max_lexer_states: 20_000,
        // Four for each property that may be left out.
        max_items_in_row: 4 * MAX_PROPERTIES + 2000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Compiles grammars for one tokenizer.
pub(super) struct Compiler(ParserFactory);

impl Compiler {
    fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self, GrammarError> {
        let build = || {
            let tokens: TokEnv = Arc::new(Tokens::new(tokenizer));
            let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| reason(&error))?;
            *factory.limits_mut() = limits();
            factory.quiet();
            Ok(Self(factory))
        };
        // A vocabulary beyond what the trie has room for makes it panic.
        guarded(build).map_err(|reason| GrammarError::Tokenizer { reason })
    }

    /// The one of a tokenizer, made when it is first asked for.
    fn of(tokenizer: &Arc<Tokenizer>) -> Result<&Self, GrammarError> {
        let compiler = tokenizer.grammars.get_or_init(|| Self::new(tokenizer));
        compiler.as_ref().map_err(Clone::clone)
    }

    fn compile(
        &self,
        kind: GrammarKind,
        source: TopLevelGrammar,
    ) -> Result<(Matcher, Vec<String>), GrammarError> {
        let schemas = source.grammars.iter();
        let mut schemas = schemas.filter_map(|grammar| grammar.json_schema.as_ref());
        let large = schemas.any(|schema| most_properties(schema) > Some(LARGE_OBJECT));
        let compile = || {
            let parser = self.0.create_parser(source);
            let mut matcher = Matcher::new(parser);
            // Not for the mask: this finds grammars that no answer satisfies.
            let begins = matcher.compute_mask_or_eos().map(drop);
            begins.map_err(|error| reason(&error))?;
            if large {
                look_ahead(&matcher)?;
            }
            let warnings = matcher.grammar_warnings();
            Ok((matcher, warnings))
        };
        let thread = std::thread::Builder::new()
            .name("quell-grammar".to_owned())
            .stack_size(COMPILER_STACK);
        let compiled = std::thread::scope(|scope| {
            let thread = thread.spawn_scoped(scope, || guarded(compile));
            let thread = thread.map_err(|error| format!("no thread to compile it: {error}"))?;
            thread
                .join()
                .unwrap_or_else(|_| Err("its compiler failed".to_owned()))
        });
        compiled.map_err(|reason| GrammarError::Refused { kind, reason })
    }

    /// The patterns that are regular expressions, but not ones that can be followed.
    fn beyond(&self, patterns: BTreeSet<String>) -> BTreeSet<String> {
        let unfit = |pattern: &String| {
            let source = compilable(json!({"type": "string", "pattern": pattern}), false);
            let source = TopLevelGrammar::from_json_schema(source);
            fancy_regex::Regex::new(pattern).is_ok()
                && self.compile(GrammarKind::JsonSchema, source).is_err()
        };
        patterns
            .into_iter()
            .take(MAX_PATTERNS)
            .filter(unfit)
            .collect()
    }
}

/// Takes the first steps of an answer, where an object with many properties fails that is
/// beyond the limits.
fn look_ahead(matcher: &Matcher) -> Result<(), String> {
    let mut ahead = matcher.deep_clone();
    for _ in 0..LOOK_AHEAD {
        let mask = ahead.compute_mask_or_eos();
        let mask = mask.map_err(|error| reason(&error))?;
        let mut words = mask.as_slice().iter().zip(0u32..);
        let first = words
            .find_map(|(word, place)| (*word != 0).then(|| 32 * place + word.trailing_zeros()));
        let Some(token) = first else {
            break;
        };
        let taken = ahead.consume_token(token);
        taken.map_err(|error| reason(&error))?;
        if ahead.is_stopped() {
            break;
        }
    }
    Ok(())
}

/// The name of the grammar of an answer that is no call.
const ANSWER: &str = "answer";

/// A form, ready to be compiled.
struct Source {
    kind: GrammarKind,
    grammar: GrammarWithLexer,
    /// Keywords that were left out of a schema.
    unheld: BTreeSet<String>,
}

impl Source {
    fn new(form: Form<'_>, keywords: Keywords) -> Result<Self, GrammarError> {
        let (kind, grammar, unheld) = match form {
            Form::JsonSchema(schema) => {
                let kind = GrammarKind::JsonSchema;
                let (schema, unheld) = ready_schema(schema, keywords)?;
                (kind, GrammarWithLexer::from_json_schema(schema), unheld)
            }
            Form::Regex(regex) => {
                let kind = GrammarKind::Regex;
                require_text(kind, regex)?;
                (kind, GrammarWithLexer::from_regex(regex), BTreeSet::new())
            }
            Form::Lark(text) => {
                let kind = GrammarKind::Lark;
                require_text(kind, text)?;
                let grammar = GrammarWithLexer::from_lark(text.to_owned());
                (kind, grammar, BTreeSet::new())
            }
            Form::Choice(choices) => {
                let kind = GrammarKind::Choice;
                require_choices(choices)?;
                let grammar = GrammarWithLexer::from_regex(&alternatives(choices));
                (kind, grammar, BTreeSet::new())
            }
        };
        Ok(Self {
            kind,
            grammar,
            unheld,
        })
    }

    /// Leaves patterns out that cannot be followed, after this `error`; whether there were
    /// any.
    fn relax(&mut self, compiler: &Compiler, error: &GrammarError) -> bool {
        let Some(schema) = &mut self.grammar.json_schema else {
            return false;
        };
        let beyond = compiler.beyond(schema::patterns(schema));
        schema::without_patterns(schema, &beyond);
        if !beyond.is_empty() {
            self.unheld.insert("pattern".to_owned());
        }
        // A name may have one pattern.
        let overlap = error.to_string().contains("are not disjoint");
        if overlap {
            schema::without_overlaps(schema);
            self.unheld.insert("patternProperties".to_owned());
        }
        overlap || !beyond.is_empty()
    }

    /// Whether the schema has a keyword, anywhere.
    fn says(&self, keyword: &str) -> bool {
        let schema = self.grammar.json_schema.as_ref();
        schema.is_some_and(|schema| schema::has_key(schema, keyword))
    }
}

/// A schema that the compiler takes, and what was left out of it.
fn ready_schema(
    schema: &Value,
    keywords: Keywords,
) -> Result<(Value, BTreeSet<String>), GrammarError> {
    let kind = GrammarKind::JsonSchema;
    require_shallow(kind, value_depth(schema))?;
    require_short(kind, schema.to_string().len(), MAX_SCHEMA_BYTES)?;
    let refused = |reason: &str| GrammarError::Refused {
        kind,
        reason: reason.to_owned(),
    };
    let lenient = keywords == Keywords::Lenient;
    let mut rewriter = Rewriter::new(schema, lenient);
    let schema = match rewriter.rewrite() {
        schema @ Value::Object(_) => schema,
        Value::Bool(true) => Value::Object(serde_json::Map::new()),
        Value::Bool(false) => return Err(refused("no JSON value satisfies false")),
        _ => return Err(refused("a schema is an object, true or false")),
    };
    if let Some(properties) = most_properties(&schema).filter(|most| *most > MAX_PROPERTIES) {
        let limit = MAX_PROPERTIES;
        return Err(refused(&format!(
            "an object has {properties} properties, but may have at most {limit}"
        )));
    }
    Ok((compilable(schema, lenient), rewriter.unheld))
}

/// A schema that says how it is to be compiled, in place of what it says of that itself.
fn compilable(mut schema: Value, lenient: bool) -> Value {
    JsonCompileOptions {
        item_separator: ", ?".to_owned(),
        key_separator: ": ?".to_owned(),
        whitespace_flexible: false,
        lenient,
        ..JsonCompileOptions::default()
    }
    .apply_to(&mut schema);
    schema
}

/// The schema keywords that a warning of the compiler says it has not kept to.
fn keywords_of(warning: &str) -> Vec<String> {
    if let Some(keys) = warning.strip_prefix("Unimplemented keys: ") {
        let quoted = keys.split('"').skip(1).step_by(2);
        return quoted.map(str::to_owned).collect();
    }
    let known: &[&str] = match warning {
        warning if warning.starts_with("oneOf ") => &["oneOf"],
        warning if warning.starts_with("Unknown format") => &["format"],
        warning if warning.starts_with("min/maxProperties") => &["minProperties", "maxProperties"],
        _ => &[],
    };
    known.iter().map(|keyword| (*keyword).to_owned()).collect()
}

impl Grammar {
    /// An answer of this form.
    ///
    /// # Errors
    /// When the form is wrong, needs what is not supported, or is too large.
    pub fn new(
        tokenizer: &Arc<Tokenizer>,
        form: Form<'_>,
        keywords: Keywords,
    ) -> Result<Self, GrammarError> {
        let mut source = Source::new(form, keywords)?;
        let compiler = Compiler::of(tokenizer)?;
        let compile = |source: &Source| {
            let grammar = TopLevelGrammar::from_grammar(source.grammar.clone());
            compiler.compile(source.kind, grammar)
        };
        let mut compiled = compile(&source);
        if let Err(error) = &compiled
            && keywords == Keywords::Lenient
            && source.relax(compiler, error)
        {
            compiled = compile(&source);
        }
        Ok(Self::of(source, compiled?))
    }

    /// An answer of this form, or calls of tools in place of it.
    ///
    /// The arguments of calls are of their tool's schema, as far as the format writes them
    /// as JSON and the schema can be kept to.
    ///
    /// # Errors
    /// As for [`Grammar::new`].
    pub fn or_calls(
        tokenizer: &Arc<Tokenizer>,
        form: Form<'_>,
        keywords: Keywords,
        calls: Calls<'_>,
    ) -> Result<Self, GrammarError> {
        let mut source = Source::new(form, keywords)?;
        let compiler = Compiler::of(tokenizer)?;
        let compile = |source: &Source, calls: Calls<'_>| {
            let mut unheld = BTreeSet::new();
            let mark = |text: &str| mark(tokenizer, text);
            let rules = calls.format.call_rules(calls.tools, calls.several, mark);
            let lark = format!("start: @{ANSWER} | calls\n{}", rules.lark);
            let answer = GrammarWithLexer {
                name: Some(ANSWER.to_owned()),
                ..source.grammar.clone()
            };
            let mut grammars = vec![GrammarWithLexer::from_lark(lark), answer];
            for (name, schema) in rules.schemas {
                let (schema, left_out) = ready_schema(&schema, keywords)?;
                unheld.extend(left_out);
                grammars.push(GrammarWithLexer {
                    name: Some(name),
                    json_schema: Some(schema),
                    ..GrammarWithLexer::default()
                });
            }
            let max_tokens = None;
            let grammar = TopLevelGrammar {
                grammars,
                max_tokens,
            };
            let compiled = compiler.compile(source.kind, grammar)?;
            Ok((compiled, unheld))
        };
        let mut compiled = compile(&source, calls);
        if let Err(error) = &compiled
            && keywords == Keywords::Lenient
        {
            // Without its tools it may be one that can be held: arguments of any kind then.
            source.relax(compiler, error);
            let any = json!({"type": "object"});
            let tools: Vec<_> = calls
                .tools
                .iter()
                .map(|(name, _)| (*name, Some(&any)))
                .collect();
            let calls = Calls {
                tools: &tools,
                ..calls
            };
            source.unheld.insert("parameters".to_owned());
            compiled = compile(&source, calls);
        }
        let (compiled, unheld) = compiled?;
        source.unheld.extend(unheld);
        Ok(Self::of(source, compiled))
    }

    fn of(source: Source, (matcher, warnings): (Matcher, Vec<String>)) -> Self {
        let warned = warnings.iter().flat_map(|warning| keywords_of(warning));
        // One warning may be about several keywords. The tools' schemas are not kept.
        let warned = warned.filter(|name| !name.ends_with("Properties") || source.says(name));
        let mut unheld = source.unheld.clone();
        unheld.extend(warned);
        Self {
            start: Arc::new(matcher),
            kind: source.kind,
            unenforced: unheld.into_iter().collect(),
        }
    }

    /// JSON of a schema: an object, or `true` for any JSON.
    ///
    /// # Errors
    /// When the schema is wrong, needs what is not supported, or is too large.
    pub fn json_schema(tokenizer: &Arc<Tokenizer>, schema: &Value) -> Result<Self, GrammarError> {
        Self::new(tokenizer, Form::JsonSchema(schema), Keywords::Strict)
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// When the tokenizer's vocabulary cannot be prepared.
    pub fn json_object(tokenizer: &Arc<Tokenizer>) -> Result<Self, GrammarError> {
        Self::json_schema(tokenizer, &json!({"type": "object"}))
    }

    /// A text that a regular expression matches as a whole, in the syntax of the
    /// [`regex`](https://docs.rs/regex/latest/regex/#syntax) crate. `^` at its beginning
    /// and `$` at its end change nothing; look-around and references are not supported.
    ///
    /// # Errors
    /// When the expression is wrong, needs what is not supported, or is too large.
    pub fn regex(tokenizer: &Arc<Tokenizer>, regex: &str) -> Result<Self, GrammarError> {
        Self::new(tokenizer, Form::Regex(regex), Keywords::Strict)
    }

    /// A text of a grammar in
    /// [llguidance's variant](https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md)
    /// of Lark's syntax; the rule `start` is the whole.
    ///
    /// # Errors
    /// When the grammar is wrong, needs what is not supported, or is too large.
    pub fn lark(tokenizer: &Arc<Tokenizer>, grammar: &str) -> Result<Self, GrammarError> {
        Self::new(tokenizer, Form::Lark(grammar), Keywords::Strict)
    }

    /// One of these texts. Where one begins with another, both are possible.
    ///
    /// # Errors
    /// When there is none, or one is empty, or they are too large together.
    pub fn choice<T: AsRef<str>>(
        tokenizer: &Arc<Tokenizer>,
        choices: &[T],
    ) -> Result<Self, GrammarError> {
        let choices: Vec<String> = choices.iter().map(|one| one.as_ref().to_owned()).collect();
        Self::new(tokenizer, Form::Choice(&choices), Keywords::Strict)
    }

    /// Prepares a tokenizer for grammars, which takes some hundred milliseconds, so that
    /// the first of them is compiled as fast as the next.
    ///
    /// # Errors
    /// When its vocabulary cannot be prepared.
    pub fn prepare(tokenizer: &Arc<Tokenizer>) -> Result<(), GrammarError> {
        Compiler::of(tokenizer).map(drop)
    }

    /// What it was made of.
    pub fn kind(&self) -> GrammarKind {
        self.kind
    }

    /// The schema keywords that answers are not held to.
    pub fn unenforced(&self) -> &[String] {
        &self.unenforced
    }

    /// The constraint on a new answer.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(Following {
            start: Arc::clone(&self.start),
            begun: None,
        })
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Grammar")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl From<&Grammar> for Box<dyn Constraint> {
    fn from(grammar: &Grammar) -> Self {
        grammar.constraint()
    }
}

impl From<Grammar> for Box<dyn Constraint> {
    fn from(grammar: Grammar) -> Self {
        grammar.constraint()
    }
}

/// How far an answer has come in its grammar. It shares nothing that changes with other
/// answers: neither can what one costs fall on another, nor its failure.
struct Following {
    /// Before the first token; shared by the answers that wait.
    start: Arc<Matcher>,
    /// A state of its own, once it has begun.
    begun: Option<Matcher>,
}

impl Following {
    fn begun(&mut self) -> &mut Matcher {
        self.begun.get_or_insert_with(|| self.start.deep_clone())
    }
}

impl fmt::Debug for Following {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Following").finish_non_exhaustive()
    }
}

impl Constraint for Following {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        let allowed = self.begun().compute_mask_or_eos();
        let allowed = allowed.map_err(|error| ConstraintError(reason(&error)))?;
        for (word, allowed) in mask.iter_mut().zip(allowed.as_slice()) {
            *word = *allowed;
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        let accepted = self.begun().consume_token(token);
        accepted.map_err(|error| ConstraintError(reason(&error)))
    }

    fn is_complete(&self) -> bool {
        let matcher = self.begun.as_ref().unwrap_or(&self.start);
        matcher.is_stopped() && matcher.stop_reason().is_ok()
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            start: Arc::clone(&self.start),
            begun: self.begun.as_ref().map(Matcher::deep_clone),
        })
    }
}

/// A mark of a call in a grammar: a special token, which no text has, or its text.
fn mark(tokenizer: &Tokenizer, text: &str) -> String {
    match tokenizer.id_of(text).filter(|id| tokenizer.is_special(*id)) {
        Some(id) => format!("<[{id}]>"),
        None => Value::from(text).to_string(),
    }
}

/// An error's message in one line, without what only its makers understand: notes in
/// angle brackets after it, such as the trace of a panic.
fn reason(error: &impl fmt::Display) -> String {
    let text = format!("{error:#}");
    let end = text.find("\n<").unwrap_or(text.len());
    let text = text[..end].split_whitespace().collect::<Vec<_>>().join(" ");
    match text.as_str() {
        "NoExtensionBias" => "no token can come next".to_owned(),
        _ if text.len() > MAX_REASON => {
            let end = text.floor_char_boundary(MAX_REASON);
            format!("{} …", &text[..end])
        }
        _ => text,
    }
}

/// Calls what may panic; its panic is an error.
fn guarded<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|message| (*message).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Err(message.unwrap_or_else(|| "it panicked".to_owned()))
    })
}

fn require_short(kind: GrammarKind, bytes: usize, limit: usize) -> Result<(), GrammarError> {
    if bytes > limit {
        return Err(GrammarError::TooLong { kind, bytes, limit });
    }
    Ok(())
}

fn require_shallow(kind: GrammarKind, depth: usize) -> Result<(), GrammarError> {
    let limit = MAX_DEPTH;
    if depth > limit {
        return Err(GrammarError::TooDeep { kind, limit });
    }
    Ok(())
}

fn require_choices(choices: &[String]) -> Result<(), GrammarError> {
    let kind = GrammarKind::Choice;
    let refused = |reason: &str| {
        Err(GrammarError::Refused {
            kind,
            reason: reason.to_owned(),
        })
    };
    if choices.is_empty() {
        return refused("it is empty, but must have at least one text");
    }
    if choices.iter().any(String::is_empty) {
        return refused("a text is empty, but must have at least one character");
    }
    let bytes = choices.iter().map(String::len).sum();
    require_short(kind, bytes, MAX_SCHEMA_BYTES)
}

fn require_text(kind: GrammarKind, text: &str) -> Result<(), GrammarError> {
    require_short(kind, text.len(), MAX_TEXT_BYTES)?;
    require_shallow(kind, bracket_depth(text))
}

/// How deep the arrays and objects of a value are nested.
fn value_depth(value: &Value) -> usize {
    let (mut deepest, mut todo) = (0, vec![(value, 1)]);
    while let Some((value, depth)) = todo.pop() {
        deepest = deepest.max(depth);
        match value {
            Value::Array(values) => todo.extend(values.iter().map(|value| (value, depth + 1))),
            Value::Object(fields) => todo.extend(fields.values().map(|value| (value, depth + 1))),
            _ => {}
        }
    }
    deepest
}

/// The number of members of the largest object in a schema, but for lists of definitions.
fn most_properties(schema: &Value) -> Option<usize> {
    let (mut most, mut todo) = (None, vec![(schema, false)]);
    while let Some((value, definitions)) = todo.pop() {
        match value {
            Value::Array(values) => todo.extend(values.iter().map(|value| (value, false))),
            Value::Object(fields) => {
                if !definitions {
                    most = most.max(Some(fields.len()));
                }
                let is_list = |name: &str| matches!(name, "$defs" | "definitions");
                todo.extend(fields.iter().map(|(name, value)| (value, is_list(name))));
            }
            _ => {}
        }
    }
    most
}

/// How deep the brackets of a text are nested; those in strings count, too.
fn bracket_depth(text: &str) -> usize {
    let (mut deepest, mut depth) = (0usize, 0usize);
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            // What is escaped is no bracket.
            b'\\' => drop(bytes.next()),
            b'(' | b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// A regular expression for one of these texts.
fn alternatives(choices: &[String]) -> String {
    let mut regex = String::new();
    for (index, choice) in choices.iter().enumerate() {
        if index > 0 {
            regex.push('|');
        }
        for character in choice.chars() {
            if character.is_ascii_alphanumeric() {
                regex.push(character);
            } else {
                regex.push_str(&format!("\\x{{{:X}}}", u32::from(character)));
            }
        }
    }
    regex
}

#[cfg(test)]
mod tests;
