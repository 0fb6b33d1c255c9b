//! Cost of a grammar: preparing a vocabulary, compiling a schema, and computing the mask for
//! each token of an answer.
//!
//! `cargo bench --bench grammar [-- MODEL]`
//!
//! The answers consist of random tokens that the mask allows, so that strings are long and
//! masks allow many tokens.

use quell::internals::runner::ModelFiles;
use quell::internals::sampling::ConstraintState;
use quell::internals::text::GgufVocabulary;
use quell::{Constraint, Grammar, Tokenizer};
use serde_json::{Value, json};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

const ANSWERS: u64 = 40;
const TOKENS: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let path = path.unwrap_or_else(|| "models/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned());
    let model = ModelFiles::open(Path::new(&path))?.take_tokenizer();
    measure(Arc::new(model.ok_or("the model has no tokenizer")?))?;
    measure(Arc::new(random(131_072)?))
}

/// Builds a byte-level tokenizer with random tokens of two to nine letters.
fn random(vocabulary: usize) -> Result<Tokenizer, Box<dyn Error>> {
    let visible = (33..127).chain(161..173).chain(174..324);
    let mut tokens: Vec<String> = visible
        .filter_map(char::from_u32)
        .map(String::from)
        .collect();
    let mut seen: std::collections::HashSet<String> = tokens.iter().cloned().collect();
    let mut random = Random(1);
    while tokens.len() < vocabulary - 1 {
        let length = 2 + random.below(8);
        let mut letter = || char::from(b'a' + random.below(26) as u8);
        let mut token: String = (0..length).map(|_| letter()).collect();
        if random.below(2) == 0 {
            token.insert(0, 'Ġ');
        }
        if seen.insert(token.clone()) {
            tokens.push(token);
        }
    }
    let mut token_types = vec![1; tokens.len()];
    tokens.push("<|endoftext|>".to_owned());
    token_types.push(3);
    let vocabulary = GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        eos: Some(tokens.len() as u32 - 1),
        tokens,
        token_types,
        ..GgufVocabulary::default()
    };
    Ok(vocabulary.into_tokenizer()?)
}

fn schemas() -> [(&'static str, Value); 3] {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
            "mood": {"enum": ["good", "bad", "unknown"]},
        },
        "required": ["name", "age", "tags", "mood"],
        "additionalProperties": false,
    });
    let dates = json!({
        "type": "array",
        "items": {"type": "string", "format": "date-time"},
    });
    [
        ("any object", json!({"type": "object"})),
        ("a person", person),
        ("dates", dates),
    ]
}

fn measure(tokenizer: Arc<Tokenizer>) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    Grammar::prepare(&tokenizer)?;
    let tokens = tokenizer.vocabulary_size();
    println!("{tokens} tokens, prepared in {:.0?}", began.elapsed());
    println!("grammar       compile  start   masks      p50      p99      max  accept p50, µs");
    for (name, schema) in schemas() {
        let began = Instant::now();
        let grammar = Grammar::json_schema(&tokenizer, &schema)?;
        let compiled = began.elapsed().as_secs_f64() * 1e6;
        let (mut starts, mut masks, mut accepts) = (Vec::new(), Vec::new(), Vec::new());
        for seed in 1..=ANSWERS {
            let began = Instant::now();
            let constraint: Box<dyn Constraint> = grammar.constraint();
            starts.push(began.elapsed().as_secs_f64() * 1e6);
            let mut state = ConstraintState::new(constraint, tokens);
            let mut random = Random(seed);
            for _ in 0..TOKENS {
                let began = Instant::now();
                state.refresh()?;
                masks.push(began.elapsed().as_secs_f64() * 1e6);
                let token = pick(state.mask(), tokens, &mut random);
                if tokenizer.end_tokens().contains(&token) {
                    break;
                }
                let began = Instant::now();
                let complete = state.accept(token)?;
                accepts.push(began.elapsed().as_secs_f64() * 1e6);
                if complete {
                    break;
                }
            }
        }
        for times in [&mut starts, &mut masks, &mut accepts] {
            times.sort_by(f64::total_cmp);
        }
        let at = |times: &[f64], share: f64| times[(share * (times.len() - 1) as f64) as usize];
        println!(
            "{name:<11} {compiled:>9.0} {:>6.0} {:>7} {:>8.1} {:>8.1} {:>8.1} {:>11.1}",
            at(&starts, 0.5),
            masks.len(),
            at(&masks, 0.5),
            at(&masks, 0.99),
            at(&masks, 1.0),
            at(&accepts, 0.5),
        );
    }
    Ok(())
}

/// Picks a random token that the mask allows.
fn pick(mask: &[u32], tokens: usize, random: &mut Random) -> u32 {
    let first = random.below(tokens);
    let all = (first..tokens).chain(0..first);
    let mut allowed = all.filter(|token| mask[token / 32] >> (token % 32) & 1 == 1);
    allowed.next().unwrap_or(0) as u32
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((bits ^ (bits >> 31)) % limit as u64) as usize
    }
}
