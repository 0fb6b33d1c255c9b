//! Grammars for whole answers of chat models: reasoning first, then a form or tool calls.

use super::{
    Compiled, Compiler, Grammar, GrammarCalls, GrammarError, GrammarForm, GrammarKind,
    SchemaKeywords, Source, prepare_schema,
};
use crate::text::Tokenizer;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::CallRules;
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What an answer of a chat model may consist of.
///
/// Construct it with `..GrammarAnswer::default()`: fields are added in minor releases.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrammarAnswer<'a> {
    /// Reasoning before the answer.
    pub reasoning: Option<GrammarReasoning>,
    /// Form of the answer.
    pub form: Option<GrammarForm<'a>>,
    /// Tool calls. With a form, the answer is either calls or of this form; without one, it must
    /// be calls.
    pub calls: Option<GrammarCalls<'a>>,
}

/// Reasoning before an answer that is constrained. The reasoning itself is not.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct GrammarReasoning {
    /// The marks around it.
    pub format: ReasoningFormat,
    /// Whether the prompt has opened it already, so that the answer begins with it. Otherwise the
    /// model may do without.
    pub is_open: bool,
}

impl GrammarReasoning {
    /// Allows reasoning within the marks of `format`, which the prompt has opened or not.
    pub fn new(format: ReasoningFormat, is_open: bool) -> Self {
        Self { format, is_open }
    }
}

/// Name of the grammar for an answer that is not a call.
const ANSWER: &str = "answer";

impl Grammar {
    /// Compiles a grammar for answers that consist of these parts.
    ///
    /// The arguments of a call conform to the schema of its tool, as far as the format
    /// writes them as JSON and the schema can be enforced.
    ///
    /// # Errors
    /// Returns an error for the same reasons as [`Grammar::new`], and [`GrammarError::Refused`] if
    /// there is neither a form nor calls.
    pub fn answer(
        tokenizer: &Arc<Tokenizer>,
        answer: GrammarAnswer<'_>,
        keywords: SchemaKeywords,
    ) -> Result<Self, GrammarError> {
        if answer.form.is_none() && answer.calls.is_none_or(|calls| calls.tools.is_empty()) {
            return Err(GrammarError::Refused {
                kind: GrammarKind::Lark,
                reason: "the answer has neither a form nor tools to call".to_owned(),
            });
        }
        let source = answer.form.map(|form| Source::new(form, keywords));
        let mut source = source.transpose()?.unwrap_or_else(Source::empty);
        let compiler = Compiler::of(tokenizer)?;
        let compile_of =
            |source: &Source, answer| compile(tokenizer, compiler, source, answer, keywords);
        let mut compiled = source.compiled(compiler, keywords, |source| compile_of(source, answer));
        if let Some(calls) = answer.calls
            && compiled.is_err()
            && keywords == SchemaKeywords::Lenient
        {
            // The schemas of the tools may be what fails, so try again with arguments of
            // any kind.
            let any = json!({"type": "object"});
            let names = calls.tools.iter().map(|(name, _)| *name);
            let tools: Vec<_> = names.map(|name| (name, Some(&any))).collect();
            let calls = GrammarCalls {
                tools: &tools,
                ..calls
            };
            let answer = GrammarAnswer {
                calls: Some(calls),
                ..answer
            };
            source.unenforced.insert("parameters".to_owned());
            compiled = compile_of(&source, answer);
        }
        let (compiled, unenforced) = compiled?;
        source.unenforced.extend(unenforced);
        Ok(Self::of(source, compiled))
    }
}

/// Compiles the grammar, and returns it with the schema keywords of tools that were dropped.
fn compile(
    tokenizer: &Tokenizer,
    compiler: &Compiler,
    source: &Source,
    answer: GrammarAnswer<'_>,
    keywords: SchemaKeywords,
) -> Result<(Compiled, BTreeSet<String>), GrammarError> {
    let mark = |text: &str| mark(tokenizer, text);
    let rules = answer
        .calls
        .map(|calls| (calls.format).call_rules(calls.tools, calls.several, mark));
    let CallRules { lark, schemas } = rules.unwrap_or_default();
    let mut text = beginning(answer, mark);
    text.push_str(&lark);
    let mut grammars = vec![GrammarWithLexer::from_lark(text)];
    if answer.form.is_some() {
        grammars.push(GrammarWithLexer {
            name: Some(ANSWER.to_owned()),
            ..source.grammar.clone()
        });
    }
    let mut unenforced = BTreeSet::new();
    for (name, schema) in schemas {
        let (schema, left_out) = prepare_schema(&schema, keywords)?;
        unenforced.extend(left_out);
        grammars.push(GrammarWithLexer {
            name: Some(name),
            json_schema: Some(schema),
            ..GrammarWithLexer::default()
        });
    }
    let grammar = TopLevelGrammar {
        grammars,
        max_tokens: None,
    };
    Ok((compiler.compile(source.kind, grammar)?, unenforced))
}

/// Returns the rule `start` and those that it needs, except `calls`.
fn beginning(answer: GrammarAnswer<'_>, mark: impl Fn(&str) -> String) -> String {
    let reasoning = answer.reasoning;
    let is_harmony = reasoning.is_some_and(|one| one.format == ReasoningFormat::HARMONY);
    let framed = match is_harmony {
        true => format!(
            "{} \"final\" {} @{ANSWER}",
            mark("<|channel|>"),
            mark("<|message|>")
        ),
        false => format!("@{ANSWER}"),
    };
    let body = match (answer.form, answer.calls) {
        (Some(_), Some(_)) => format!("{framed} | calls"),
        (Some(_), None) => framed,
        (None, _) => "calls".to_owned(),
    };
    let Some(GrammarReasoning { format, is_open }) = reasoning else {
        return format!("start: {body}\n");
    };
    let close = mark(format.close);
    let (open, times, after) = match is_harmony {
        // Another message follows, which may be reasoning again.
        true => (
            ["<|channel|>", "analysis", "<|message|>"]
                .map(&mark)
                .join(" "),
            "*",
            format!("{} \"assistant\"", mark("<|start|>")),
        ),
        false => (
            mark(format.open),
            "?",
            "blank?\nblank: /[ \\t\\r\\n]{1,4}/".to_owned(),
        ),
    };
    let begins = match is_open {
        true if is_harmony => format!("thought ({open} thought)* body"),
        true => "thought body".to_owned(),
        false => format!("({open} thought){times} body"),
    };
    // Text never contains a special token, but it may contain any other text.
    let thought = match close.starts_with('"') {
        true => format!("thought_text {after}\nthought_text[suffix={close}]: /(?s:.*)/"),
        false => format!("/(?s:.*)/ {close} {after}"),
    };
    format!("start: {begins}\nbody: {body}\nthought: {thought}\n")
}

/// Returns the terminals of a text with marks, of which some may be special tokens.
pub(super) fn mark(tokenizer: &Tokenizer, text: &str) -> String {
    let special = |text: &str| {
        let id = tokenizer.id_of(text);
        id.filter(|id| tokenizer.is_special(*id))
    };
    let mut terminals: Vec<String> = Vec::new();
    let mut literal = String::new();
    let flush = |literal: &mut String, terminals: &mut Vec<String>| {
        if !literal.is_empty() {
            terminals.push(Value::from(std::mem::take(literal)).to_string());
        }
    };
    for part in parts(text) {
        match special(part) {
            Some(id) => {
                flush(&mut literal, &mut terminals);
                terminals.push(format!("<[{id}]>"));
            }
            None => literal.push_str(part),
        }
    }
    flush(&mut literal, &mut terminals);
    match &*terminals {
        [one] => one.clone(),
        several => format!("({})", several.join(" ")),
    }
}

/// Splits a text before each `<` and after each `>`.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('>').flat_map(|part| {
        let (before, tag) = part.split_at(part.find('<').unwrap_or(0));
        [before, tag].into_iter().filter(|part| !part.is_empty())
    })
}
