//! A model that says what its prompt tells it to say, so that a test decides what an answer is.

use quell::internals::cache::CacheLayout;
use quell::internals::runner::{Runner, RunnerInfo, StepOutput};
use quell::internals::schedule::{PlanItem, Sequences, StepPlan};
use quell::{
    DeviceError, Engine, EngineConfig, LoadError, ModelInfo, SamplingDefaults, Token, Tokenizer,
};

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
        max_batch_tokens: 512,
        embedding: None,
        pooling: Default::default(),
        generates: true,
        segments: 1,
        whole_prompts: false,
        end_tokens: vec![END_OF_ANSWER],
        cache_blocks: 4096,
        block_tokens: 16,
        layout: CacheLayout::single(),
        states: None,
        swap: None,
        model: defaults.map(ModelInfo::of_sampling),
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
    said.map(|id| Token::with_logprob(id, -0.5))
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
