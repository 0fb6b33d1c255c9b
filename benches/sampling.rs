//! Cost of choosing a token per row on one thread of the CPU device, compared with the
//! reference sampler, which defines the correct choice.
//!
//! `cargo bench --bench sampling [-- --format json]`

#[path = "common/results.rs"]
mod results;

use quell::internals::device::cpu::CpuDevice;
use quell::internals::device::*;
use quell::internals::sampling::{SampleRow, sample};
use quell::{CpuOptions, SamplingParams};
use results::median;
use serde_json::json;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

const ROUNDS: usize = 101;

fn main() -> Result<(), Box<dyn Error>> {
    let as_json = results::as_json();
    let defaults = SamplingParams::default();
    let cases = [
        ("greedy", SamplingParams::greedy()),
        ("temperature 1", defaults.clone()),
        (
            "top_p 0.9",
            SamplingParams {
                top_p: 0.9,
                ..defaults.clone()
            },
        ),
        (
            "top_k 50, top_p 0.9",
            SamplingParams {
                top_k: 50,
                top_p: 0.9,
                ..defaults.clone()
            },
        ),
        (
            "min_p 0.05",
            SamplingParams {
                min_p: 0.05,
                ..defaults.clone()
            },
        ),
        (
            "repetition_penalty 1.1",
            SamplingParams {
                repetition_penalty: 1.1,
                ..SamplingParams::greedy()
            },
        ),
        (
            "greedy, 5 logprobs",
            SamplingParams {
                logprobs: Some(5),
                ..SamplingParams::greedy()
            },
        ),
    ];
    let mut rows = Vec::new();
    if !as_json {
        println!("microseconds per row, medians of {ROUNDS}");
        println!("vocabulary  {:<24}  device  reference  ratio", "sampling");
    }
    for vocabulary in [49_152, 151_936] {
        let logits = logits(vocabulary);
        let mut device = CpuDevice::new(&CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        })?;
        let mut tensor = device.allocate(1, vocabulary, Precision::Full)?;
        tensor.row_mut(0).copy_from_slice(&logits);
        for (name, params) in &cases {
            let mut row = SampleRow {
                params: Arc::new(params.clone()),
                history: (0..1000).map(|i| i * 31 % vocabulary as u32).collect(),
                prompt_tokens: 500,
                ..SampleRow::default()
            };
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for round in 0..ROUNDS {
                row.position = round as u32;
                let start = Instant::now();
                let pending = device.sample(&tensor, std::slice::from_ref(&row))?;
                let sampled = device.collect(pending)?;
                ours.push(start.elapsed());
                let mut copy = logits.clone();
                let start = Instant::now();
                let expected = sample(&mut copy, &row);
                theirs.push(start.elapsed());
                assert_eq!(sampled.tokens[0].id, expected.id, "{name}");
                device.recycle(sampled);
            }
            let (ours, theirs) = (median(ours), median(theirs));
            if !as_json {
                let ratio = theirs / ours;
                println!("{vocabulary:>10}  {name:<24}  {ours:>6.1}  {theirs:>9.1}  {ratio:>5.1}");
            }
            rows.push(json!({
                "vocabulary": vocabulary, "sampling": name, "us": ours, "reference_us": theirs,
            }));
        }
    }
    if as_json {
        results::print_json(
            "sampling",
            json!({
                "results": rows,
            }),
        );
    }
    Ok(())
}

/// Returns logits distributed like a real model's: a bell curve, and a few likely tokens well
/// above it.
fn logits(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    let token = |index: usize| {
        let bell = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
        let peak = if index % 997 == 5 { 8.0 } else { 0.0 };
        2.5 * bell + peak
    };
    (0..count).map(token).collect()
}
