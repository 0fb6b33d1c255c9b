//! [`Grammar`] restricts an answer to a JSON schema, a regular expression or a grammar.
//!
//! llguidance compiles and follows the grammars (Moskal et al., "llguidance: Super-fast
//! Structured Outputs"). It is an Earley parser over lexemes, which it matches with
//! derivatives of regular expressions. In each step it walks a trie of all tokens to
//! compute the token mask.

mod answer;
mod pattern;
mod schema;
mod vocabulary;

use super::Tokenizer;
use super::tools::ToolFormat;
use crate::sampling::{Constraint, ConstraintError};
pub use answer::{GrammarAnswer, GrammarReasoning};
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

/// What an answer must look like, compiled for one tokenizer. Cloning is cheap. One grammar
/// can be the [`constraint`](crate::Request::constraint) of any number of requests.
///
/// Compiling blocks the calling thread, from less than a millisecond to some hundred
/// milliseconds for the largest schemas. The first grammar of a tokenizer also prepares its
/// vocabulary ([`Grammar::prepare`]).
///
/// # JSON
/// Objects are written on one line. One space is allowed after `,` and `:`, and no other
/// white space, so that an answer cannot spend its tokens on blanks. Properties come in the
/// order of the schema.
///
/// A schema keyword that cannot be enforced is rejected by name, or dropped and reported by
/// [`Grammar::unenforced`], as [`SchemaKeywords`] says. The same holds for a `oneOf` whose
/// schemas are not obviously exclusive; use `anyOf` instead. Unknown formats are
/// annotations. The draft is the one that `$schema` names, or 2020-12 if it names none.
/// References to other documents are not followed.
///
/// An answer that ends with the finish reason `length` is the beginning of a valid answer.
#[derive(Clone)]
pub struct Grammar {
    /// State before the first token. It is only cloned, never advanced.
    start: Arc<Matcher>,
    kind: GrammarKind,
    unenforced: Arc<[String]>,
}

/// Form that an answer must have.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum GrammarForm<'a> {
    /// JSON that conforms to this schema.
    JsonSchema(&'a Value),
    /// Text that this regular expression matches as a whole.
    Regex(&'a str),
    /// Text of this grammar, in Lark's syntax.
    Lark(&'a str),
    /// One of these texts.
    Choice(&'a [String]),
}

/// How to treat schema keywords that cannot be enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SchemaKeywords {
    /// The schema is rejected.
    #[default]
    Strict,
    /// The keywords are dropped, so that an answer may violate them.
    Lenient,
}

/// Tools that the model may call instead of giving an answer of the required form.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct GrammarCalls<'a> {
    /// Format in which the model writes calls.
    pub format: ToolFormat,
    /// Names of the tools, each with the schema of its parameters.
    pub tools: &'a [(&'a str, Option<&'a Value>)],
    /// Whether an answer may contain several calls.
    pub several: bool,
}

impl<'a> GrammarCalls<'a> {
    /// Allows one call of any of `tools`, written in `format`. Each tool is its name, with the
    /// schema of its parameters. Set `several` to allow more calls.
    pub fn new(format: ToolFormat, tools: &'a [(&'a str, Option<&'a Value>)]) -> Self {
        Self {
            format,
            tools,
            several: false,
        }
    }
}

/// Kind of source that a grammar is compiled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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

/// Error from compiling a grammar.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GrammarError {
    /// The source is longer than the limit.
    #[error("the {kind} is {bytes} bytes long, but may have at most {limit}")]
    TooLong {
        /// Kind of source.
        kind: GrammarKind,
        /// Length of the source, in bytes.
        bytes: usize,
        /// Maximum length, in bytes.
        limit: usize,
    },
    /// The source is nested more deeply than the limit.
    #[error("the {kind} is nested more than {limit} levels deep")]
    TooDeep {
        /// Kind of source.
        kind: GrammarKind,
        /// Maximum depth.
        limit: usize,
    },
    /// The source is invalid, uses an unsupported feature, or takes too much work.
    #[error("the {kind} cannot be used: {reason}")]
    Refused {
        /// Kind of source.
        kind: GrammarKind,
        /// What is wrong, in the compiler's words.
        reason: String,
    },
    /// The tokenizer's vocabulary cannot be prepared.
    #[error("the tokenizer cannot be used with grammars: {reason}")]
    Tokenizer {
        /// Reason.
        reason: String,
    },
}

/// Maximum length of a JSON schema without its white space, and of a list of choices, in bytes.
const MAX_SCHEMA_BYTES: usize = 128 << 10;
/// Maximum length of a regular expression or grammar, in bytes.
const MAX_TEXT_BYTES: usize = 32 << 10;
/// Maximum nesting depth of brackets in any source.
const MAX_DEPTH: usize = 128;
/// Maximum number of properties per object. Their cost grows with the square of the number.
const MAX_PROPERTIES: usize = 2000;
/// Maximum number of patterns to test one by one when a schema does not compile.
const MAX_PATTERNS: usize = 64;
/// Objects with more properties than this are checked with [`look_ahead`].
const LARGE_OBJECT: usize = 200;
/// Number of tokens to look ahead: the brackets and the beginning of a property name.
const LOOK_AHEAD: usize = 4;
/// Maximum length of a compiler message that is passed on, in bytes.
const MAX_REASON: usize = 400;
/// Stack size of the compiler thread, in bytes. The compiler recurses more deeply than the
/// source is nested, for example once per property.
const COMPILER_STACK: usize = 256 << 20;

/// Returns the limits on the cost of compiling and of a step. Exceeding one is an error.
fn limits() -> ParserLimits {
    ParserLimits {
        // Each state takes one or two KiB, so this bounds the memory of a running answer.
        max_lexer_states: 20_000,
        // Four for each optional property.
        max_items_in_row: 4 * MAX_PROPERTIES + 2000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// A compiled grammar, with the compiler's warnings.
type Compiled = (Matcher, Vec<String>);

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
        // Building the trie panics if the vocabulary does not fit.
        catch_panic(build).map_err(|reason| GrammarError::Tokenizer { reason })
    }

    /// Returns the compiler of a tokenizer, created on first use.
    fn of(tokenizer: &Arc<Tokenizer>) -> Result<&Self, GrammarError> {
        let compiler = tokenizer.grammars.get_or_init(|| Self::new(tokenizer));
        compiler.as_ref().map_err(Clone::clone)
    }

    fn compile(
        &self,
        kind: GrammarKind,
        source: TopLevelGrammar,
    ) -> Result<Compiled, GrammarError> {
        let schemas = source.grammars.iter();
        let mut schemas = schemas.filter_map(|grammar| grammar.json_schema.as_ref());
        let large = schemas.any(|schema| most_properties(schema) > Some(LARGE_OBJECT));
        let compile = || {
            let parser = self.0.create_parser(source);
            let mut matcher = Matcher::new(parser);
            // The mask is not used. Computing it finds grammars that no answer satisfies.
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
            let thread = thread.spawn_scoped(scope, || catch_panic(compile));
            let thread =
                thread.map_err(|error| format!("cannot start the compiler thread: {error}"))?;
            thread
                .join()
                .unwrap_or_else(|_| Err("the compiler thread failed".to_owned()))
        });
        compiled.map_err(|reason| GrammarError::Refused { kind, reason })
    }

    /// Returns the patterns that are valid regular expressions but that the compiler cannot
    /// follow.
    fn unsupported_patterns(&self, patterns: BTreeSet<String>) -> BTreeSet<String> {
        let unfit = |pattern: &String| {
            let source = with_compile_options(json!({"type": "string", "pattern": pattern}), false);
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

/// Takes the first steps of an answer, so that an object with too many properties fails now
/// rather than during generation.
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

/// A form, prepared for compilation.
struct Source {
    kind: GrammarKind,
    grammar: GrammarWithLexer,
    /// Schema keywords that were dropped.
    unenforced: BTreeSet<String>,
}

impl Source {
    fn new(form: GrammarForm<'_>, keywords: SchemaKeywords) -> Result<Self, GrammarError> {
        let (kind, grammar, unenforced) = match form {
            GrammarForm::JsonSchema(schema) => {
                let kind = GrammarKind::JsonSchema;
                let (schema, unenforced) = prepare_schema(schema, keywords)?;
                (kind, GrammarWithLexer::from_json_schema(schema), unenforced)
            }
            GrammarForm::Regex(regex) => {
                let kind = GrammarKind::Regex;
                require_text(kind, regex)?;
                (kind, GrammarWithLexer::from_regex(regex), BTreeSet::new())
            }
            GrammarForm::Lark(text) => {
                let kind = GrammarKind::Lark;
                require_text(kind, text)?;
                let grammar = GrammarWithLexer::from_lark(text.to_owned());
                (kind, grammar, BTreeSet::new())
            }
            GrammarForm::Choice(choices) => {
                let kind = GrammarKind::Choice;
                require_choices(choices)?;
                let grammar = GrammarWithLexer::from_regex(&alternatives(choices));
                (kind, grammar, BTreeSet::new())
            }
        };
        Ok(Self {
            kind,
            grammar,
            unenforced,
        })
    }

    /// Returns the source of an answer without a form.
    fn empty() -> Self {
        Self {
            kind: GrammarKind::JsonSchema,
            grammar: GrammarWithLexer::default(),
            unenforced: BTreeSet::new(),
        }
    }

    /// Compiles the source with `compile`. If that fails and keywords may be left out, compiles it again
    /// without those that the compiler does not support.
    fn compiled<T>(
        &mut self,
        compiler: &Compiler,
        keywords: SchemaKeywords,
        compile: impl Fn(&Self) -> Result<T, GrammarError>,
    ) -> Result<T, GrammarError> {
        match compile(self) {
            Err(error) if keywords == SchemaKeywords::Lenient && self.relax(compiler, &error) => {
                compile(self)
            }
            outcome => outcome,
        }
    }

    /// Drops patterns that the compiler cannot follow, after compilation failed with
    /// `error`. Returns whether it dropped any.
    fn relax(&mut self, compiler: &Compiler, error: &GrammarError) -> bool {
        let Some(schema) = &mut self.grammar.json_schema else {
            return false;
        };
        let unsupported = compiler.unsupported_patterns(schema::patterns(schema));
        schema::without_patterns(schema, &unsupported);
        if !unsupported.is_empty() {
            self.unenforced.insert("pattern".to_owned());
        }
        // The compiler allows only one matching pattern per property name.
        let overlap = error.to_string().contains("are not disjoint");
        if overlap {
            schema::without_overlaps(schema);
            self.unenforced.insert("patternProperties".to_owned());
        }
        overlap || !unsupported.is_empty()
    }

    /// Returns whether the schema has a keyword anywhere.
    fn has_keyword(&self, keyword: &str) -> bool {
        let schema = self.grammar.json_schema.as_ref();
        schema.is_some_and(|schema| schema::has_key(schema, keyword))
    }
}

/// Returns the schema in a form that the compiler accepts, and the keywords dropped from it.
fn prepare_schema(
    schema: &Value,
    keywords: SchemaKeywords,
) -> Result<(Value, BTreeSet<String>), GrammarError> {
    let kind = GrammarKind::JsonSchema;
    require_shallow(kind, value_depth(schema))?;
    require_short(kind, schema.to_string().len(), MAX_SCHEMA_BYTES)?;
    let refused = |reason: &str| GrammarError::Refused {
        kind,
        reason: reason.to_owned(),
    };
    let lenient = keywords == SchemaKeywords::Lenient;
    let mut rewriter = Rewriter::new(schema, lenient);
    let schema = match rewriter.rewrite() {
        schema @ Value::Object(_) => schema,
        Value::Bool(true) => Value::Object(serde_json::Map::new()),
        Value::Bool(false) => return Err(refused("no JSON value satisfies false")),
        _ => return Err(refused("a schema must be an object, true or false")),
    };
    if let Some(properties) = most_properties(&schema).filter(|most| *most > MAX_PROPERTIES) {
        let limit = MAX_PROPERTIES;
        return Err(refused(&format!(
            "an object has {properties} properties, but may have at most {limit}"
        )));
    }
    Ok((with_compile_options(schema, lenient), rewriter.unenforced))
}

/// Sets the compile options in a schema, which override any that the schema has itself.
fn with_compile_options(mut schema: Value, lenient: bool) -> Value {
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

/// Returns the schema keywords that a compiler warning reports as not enforced.
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
    /// Compiles a grammar for answers of this form.
    ///
    /// # Errors
    /// Returns [`GrammarError::TooLong`] or [`GrammarError::TooDeep`] if the source exceeds a
    /// limit on its size, [`GrammarError::Refused`] if it is invalid, uses an unsupported feature
    /// or takes too much work, and [`GrammarError::Tokenizer`] if the tokenizer's vocabulary
    /// cannot be prepared.
    pub fn new(
        tokenizer: &Arc<Tokenizer>,
        form: GrammarForm<'_>,
        keywords: SchemaKeywords,
    ) -> Result<Self, GrammarError> {
        let mut source = Source::new(form, keywords)?;
        let compiler = Compiler::of(tokenizer)?;
        let compile = |source: &Source| {
            let grammar = TopLevelGrammar::from_grammar(source.grammar.clone());
            compiler.compile(source.kind, grammar)
        };
        let compiled = source.compiled(compiler, keywords, compile)?;
        Ok(Self::of(source, compiled))
    }

    fn of(source: Source, (matcher, warnings): Compiled) -> Self {
        let warned = warnings.iter().flat_map(|warning| keywords_of(warning));
        // One warning covers `minProperties` and `maxProperties`, so report only those that
        // the schema uses. The schemas of the tools are not available here.
        let warned =
            warned.filter(|name| !name.ends_with("Properties") || source.has_keyword(name));
        let mut unenforced = source.unenforced.clone();
        unenforced.extend(warned);
        Self {
            start: Arc::new(matcher),
            kind: source.kind,
            unenforced: unenforced.into_iter().collect(),
        }
    }

    /// Compiles a grammar for JSON that conforms to a schema: an object, or `true` for any
    /// JSON.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`Grammar::new`].
    pub fn json_schema(tokenizer: &Arc<Tokenizer>, schema: &Value) -> Result<Self, GrammarError> {
        Self::new(
            tokenizer,
            GrammarForm::JsonSchema(schema),
            SchemaKeywords::Strict,
        )
    }

    /// Compiles a grammar for any JSON object.
    ///
    /// # Errors
    /// Returns [`GrammarError::Tokenizer`] if the tokenizer's vocabulary cannot be prepared.
    pub fn json_object(tokenizer: &Arc<Tokenizer>) -> Result<Self, GrammarError> {
        Self::json_schema(tokenizer, &json!({"type": "object"}))
    }

    /// Compiles a grammar for texts that a regular expression matches as a whole.
    ///
    /// The syntax is that of the [`regex`](https://docs.rs/regex/latest/regex/#syntax)
    /// crate. `^` at the beginning and `$` at the end have no effect. Look-around and
    /// back-references are not supported.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`Grammar::new`].
    pub fn regex(tokenizer: &Arc<Tokenizer>, regex: &str) -> Result<Self, GrammarError> {
        Self::new(tokenizer, GrammarForm::Regex(regex), SchemaKeywords::Strict)
    }

    /// Compiles a grammar in
    /// [llguidance's variant](https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md)
    /// of Lark's syntax. The rule `start` matches the whole answer.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`Grammar::new`].
    pub fn lark(tokenizer: &Arc<Tokenizer>, grammar: &str) -> Result<Self, GrammarError> {
        Self::new(
            tokenizer,
            GrammarForm::Lark(grammar),
            SchemaKeywords::Strict,
        )
    }

    /// Compiles a grammar for one of these texts. If one text begins with another, both are
    /// possible.
    ///
    /// # Errors
    /// Returns [`GrammarError::Refused`] if there are no texts or one of them is empty, and
    /// otherwise an error for the same reasons as [`Grammar::new`].
    pub fn choice<T: AsRef<str>>(
        tokenizer: &Arc<Tokenizer>,
        choices: &[T],
    ) -> Result<Self, GrammarError> {
        let choices: Vec<String> = choices.iter().map(|one| one.as_ref().to_owned()).collect();
        Self::new(
            tokenizer,
            GrammarForm::Choice(&choices),
            SchemaKeywords::Strict,
        )
    }

    /// Prepares a tokenizer for grammars, which takes some hundred milliseconds, so that
    /// its first grammar compiles as fast as later ones.
    ///
    /// # Errors
    /// Returns [`GrammarError::Tokenizer`] if the tokenizer's vocabulary cannot be prepared.
    pub fn prepare(tokenizer: &Arc<Tokenizer>) -> Result<(), GrammarError> {
        Compiler::of(tokenizer).map(drop)
    }

    /// Returns the kind of source that the grammar was compiled from.
    pub fn kind(&self) -> GrammarKind {
        self.kind
    }

    /// Returns the schema keywords that are not enforced.
    pub fn unenforced(&self) -> &[String] {
        &self.unenforced
    }

    /// Creates the constraint for a new answer.
    pub fn constraint(&self) -> Box<dyn Constraint> {
        Box::new(GrammarState {
            start: Arc::clone(&self.start),
            state: None,
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

/// Position of one answer in its grammar. It shares no mutable state with other answers, so
/// that neither the cost nor the failure of one affects another.
struct GrammarState {
    /// State before the first token, shared by all answers without a token.
    start: Arc<Matcher>,
    /// State of this answer, once it has a token.
    state: Option<Matcher>,
}

impl GrammarState {
    fn state(&mut self) -> &mut Matcher {
        self.state.get_or_insert_with(|| self.start.deep_clone())
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("GrammarState")
            .finish_non_exhaustive()
    }
}

impl Constraint for GrammarState {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        let allowed = self.state().compute_mask_or_eos();
        let allowed = allowed.map_err(|error| ConstraintError(reason(&error)))?;
        for (word, allowed) in mask.iter_mut().zip(allowed.as_slice()) {
            *word = *allowed;
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        let accepted = self.state().consume_token(token);
        accepted.map_err(|error| ConstraintError(reason(&error)))
    }

    fn is_complete(&self) -> bool {
        let matcher = self.state.as_ref().unwrap_or(&self.start);
        matcher.is_stopped() && matcher.stop_reason().is_ok()
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(Self {
            start: Arc::clone(&self.start),
            state: self.state.as_ref().map(Matcher::deep_clone),
        })
    }
}

/// Formats an error in one line of limited length. Drops the notes in angle brackets after
/// the message, such as the trace of a panic, which only the compiler's authors understand.
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

/// Runs a call that may panic, and turns its panic into an error.
fn catch_panic<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<&str>()
            .map(|message| (*message).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Err(message.unwrap_or_else(|| "the compiler panicked".to_owned()))
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
        return refused("it is empty, expected at least one choice");
    }
    if choices.iter().any(String::is_empty) {
        return refused("a choice is empty, expected at least one character");
    }
    let bytes = choices.iter().map(String::len).sum();
    require_short(kind, bytes, MAX_SCHEMA_BYTES)
}

fn require_text(kind: GrammarKind, text: &str) -> Result<(), GrammarError> {
    require_short(kind, text.len(), MAX_TEXT_BYTES)?;
    require_shallow(kind, bracket_depth(text))
}

/// Returns the nesting depth of the arrays and objects in a value.
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

/// Returns the number of members of the largest object in a schema, not counting lists of
/// definitions.
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

/// Returns the nesting depth of the brackets in a text. Brackets in strings count too.
fn bracket_depth(text: &str) -> usize {
    let (mut deepest, mut depth) = (0usize, 0usize);
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            // An escaped character is not a bracket.
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

/// Builds a regular expression that matches one of these texts.
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
