//! Compares an engine with reference outputs, by the rule of ARCHITECTURE.md.

use quell::{Engine, Request, SamplingParams, TokenStream};

/// One step of a reference: the likeliest tokens with their log-probabilities.
pub struct Step {
    pub token: u32,
    /// By how much the likeliest token leads.
    pub margin: f32,
    pub top: Vec<(u32, f32)>,
}

pub struct Case {
    pub name: String,
    pub prompt: Vec<u32>,
    pub steps: Vec<Step>,
}

/// How near is near enough.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub max: f32,
    /// The greedy token may differ where the reference's margin is below this.
    pub margin: f32,
}

fn request(prompt: Vec<u32>, tokens: usize, logprobs: Option<u32>) -> Request {
    let sampling = SamplingParams {
        logprobs,
        ..SamplingParams::greedy()
    };
    let mut request = Request::new(prompt).max_tokens(tokens).sampling(sampling);
    request.ignore_eos = true;
    request
}

/// Errors of the log-probabilities of a case, every step given the reference's
/// tokens so far. `report` likeliest tokens are asked of the engine a step.
pub fn teacher_forced_errors(engine: &Engine, case: &Case, report: u32) -> Vec<f32> {
    let streams: Vec<(&Step, TokenStream)> = case
        .steps
        .iter()
        .enumerate()
        .filter(|(_, step)| !step.top.is_empty())
        .map(|(index, step)| {
            let mut prompt = case.prompt.clone();
            prompt.extend(case.steps[..index].iter().map(|step| step.token));
            (
                step,
                engine.generate(request(prompt, 1, Some(report))).unwrap(),
            )
        })
        .collect();
    let mut errors = Vec::new();
    for (step, stream) in streams {
        let generation = stream.complete_blocking().unwrap();
        let found = &generation.tokens[0].top;
        for &(token, expected) in &step.top {
            let (_, logprob) = found
                .iter()
                .find(|(id, _)| *id == token)
                .unwrap_or_else(|| panic!("{}: token {token} is not among the top", case.name));
            errors.push((logprob - expected).abs());
        }
    }
    errors
}

/// Checks a case: the log-probabilities given the reference's tokens, and the
/// engine's own greedy tokens up to the first that the reference leaves open.
pub fn check(engine: &Engine, case: &Case, report: u32, tolerance: Tolerance) -> Vec<f32> {
    let errors = teacher_forced_errors(engine, case, report);
    let max = errors.iter().copied().fold(0.0, f32::max);
    assert!(
        max <= tolerance.max,
        "{}: max error {max} above {tolerance:?}",
        case.name
    );

    let stream = engine
        .generate(request(case.prompt.clone(), case.steps.len(), None))
        .unwrap();
    let generation = stream.complete_blocking().unwrap();
    assert_eq!(generation.tokens.len(), case.steps.len());
    for (index, (token, step)) in generation.tokens.iter().zip(&case.steps).enumerate() {
        if token.id != step.token {
            assert!(
                step.margin < tolerance.margin,
                "{}: token {index} is {}, not {}, although the margin is {}",
                case.name,
                token.id,
                step.token,
                step.margin
            );
            break;
        }
    }
    errors
}
