//! A model that says what its prompt tells it to say, so that a test decides what an answer is.

use quell::cache::CacheLayout;
use quell::config::EngineConfig;
use quell::device::{DeviceError, DeviceInfo};
use quell::runner::{MemoryPlan, ModelFiles, ModelInfo, Runner, RunnerInfo, StepOutput};
use quell::sampling::{SamplingDefaults, Token};
use quell::schedule::{PlanItem, Sequences, StepPlan};
use quell::text::Tokenizer;
use quell::{Engine, LoadError};
use std::time::Duration;

/// Special tokens of the fixture's tokenizer that mark where the text to say begins and ends.
const BEGIN: (u32, &str) = (11, "<jupyter_start>");
const END: (u32, &str) = (13, "<jupyter_code>");
const END_OF_ANSWER: u32 = 2;

/// Returns what a message must contain to make the model answer `text`.
pub fn say(text: &str) -> String {
    format!("{}{text}{}", BEGIN.1, END.1)
}

/// Creates an engine over the model, with this chat template.
pub fn engine(template: &str) -> Engine {
    start(template.into(), 1, None)
}

/// Creates an engine over the model, which says this many tokens per step.
pub fn engine_with_runs(template: &str, run: usize) -> Engine {
    start(template.into(), run, None)
}

/// Creates an engine over the model. `template` is the value of `chat_template` in
/// `tokenizer_config.json`: one template or a list of them.
pub fn engine_with(template: serde_json::Value) -> Engine {
    start(template, 1, None)
}

/// Creates an engine over the model, with this chat template and these settings of its own.
pub fn engine_with_defaults(template: &str, defaults: SamplingDefaults) -> Engine {
    start(template.into(), 1, Some(defaults))
}

/// Describes a model with these sampling settings. Only the settings matter.
fn described(sampling: SamplingDefaults) -> ModelInfo {
    let tiny = crate::root().join("tests/fixtures/golden/tiny/llama");
    let files = ModelFiles::open(&tiny).unwrap();
    ModelInfo {
        config: files.source().config().clone(),
        parameters: files.source().parameters(),
        device: DeviceInfo {
            name: "parrot".to_owned(),
            description: String::new(),
            details: Vec::new(),
        },
        memory: MemoryPlan {
            weights: 0,
            cache_per_token: 0,
            cache_blocks: 4096,
            block_bytes: 0,
            block_tokens: 16,
            layout: CacheLayout::single(),
            context_tokens: 2048,
        },
        sampling,
        load_time: Duration::ZERO,
    }
}

fn start(template: serde_json::Value, run: usize, defaults: Option<SamplingDefaults>) -> Engine {
    let fixture = crate::root().join("tests/fixtures/text/folder");
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| std::fs::copy(fixture.join(name), folder.path().join(name));
    copy("tokenizer.json").unwrap();
    let config = serde_json::json!({
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    });
    let path = folder.path().join("tokenizer_config.json");
    std::fs::write(path, config.to_string()).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let info = RunnerInfo {
        vocabulary: tokenizer.vocabulary_size(),
        context_tokens: 4096,
        embedding: None,
        end_tokens: vec![END_OF_ANSWER],
        cache_blocks: 4096,
        block_tokens: 16,
        layout: CacheLayout::single(),
        swap: None,
        model: defaults.map(described),
    };
    let config = EngineConfig {
        audit: true,
        ..EngineConfig::default()
    };
    Engine::with_runner(config, Some(tokenizer), move || {
        let output = StepOutput::default();
        Ok::<_, LoadError>((Box::new(Parrot { run, output }) as Box<dyn Runner>, info))
    })
    .unwrap()
}

/// Answers with the tokens between the last two marks in the prompt, then ends.
struct Parrot {
    /// Number of tokens per run. They do not end with the answer.
    run: usize,
    output: StepOutput,
}

/// Returns the tokens that follow an item's rows.
fn tokens(item: &PlanItem, sequences: &Sequences) -> impl Iterator<Item = Token> {
    let sequence = sequences.get(item.key).unwrap();
    let prompt = &sequence.tokens[..sequence.prompt_tokens];
    let last = |token: u32| prompt.iter().rposition(|&other| other == token);
    let words = match (last(BEGIN.0), last(END.0)) {
        (Some(begin), Some(end)) => &prompt[begin + 1..end],
        _ => &[],
    };
    let place = item.start + item.count - prompt.len();
    let said = words.iter().skip(place).copied();
    let said = said.chain(std::iter::repeat(END_OF_ANSWER));
    said.map(|id| Token {
        logprob: -0.5,
        ..Token::new(id)
    })
}

impl Runner for Parrot {
    fn depth(&self) -> usize {
        1
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        self.output.clear();
        for item in plan.samples() {
            let run = tokens(item, sequences).take(self.run);
            self.output.samples.tokens.extend(run);
            self.output.runs.push(self.run);
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        Ok(std::mem::take(&mut self.output))
    }
}
