//! Arguments that several subcommands share, and their conversion into checked settings.

use super::error::CliError;
#[cfg(feature = "hub")]
use super::hub;
use super::progress;
use crate::{
    Activations, CpuOptions, DeviceChoice, Engine, EngineConfig, GenerationConfig, KvType,
    LoadOptions, ModelFiles, Preemption, SamplingParams, SimdLevel,
};
#[cfg(feature = "cuda")]
use crate::{CudaActivations, CudaOptions};
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Human-readable text.
    #[default]
    Text,
    /// JSON on one line.
    Json,
}

/// A device: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug)]
pub struct DeviceArg(DeviceChoice);

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let choice = match text.split_once(':') {
            None if text == "auto" => Some(DeviceChoice::Auto),
            None if text == "cpu" => Some(DeviceChoice::Cpu),
            None if text == "cuda" => Some(DeviceChoice::Cuda(0)),
            Some(("cuda", index)) => index.parse().ok().map(DeviceChoice::Cuda),
            _ => None,
        };
        choice
            .map(Self)
            .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".to_owned())
    }
}

/// A list of processors, such as `0-7,16`.
#[derive(Clone, Debug)]
struct Cores(Vec<usize>);

impl Cores {
    /// Processor numbers must be below this, so that a mistyped range does not fill the
    /// memory.
    const MOST: usize = 1 << 16;

    fn parse(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|core| *core < Self::MOST);
        let range = |part: &str| match part.split_once('-') {
            Some((first, last)) => Some(number(first)?..=number(last)?),
            None => number(part).map(|core| core..=core),
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        let ranges = ranges.filter(|ranges| ranges.iter().all(|range| !range.is_empty()));
        let ranges = ranges.ok_or("expected numbers and ranges, such as 0-7,16")?;
        Ok(Self(ranges.into_iter().flatten().collect()))
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SimdArg {
    Auto,
    Avx512,
    Avx2,
    Portable,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ActivationsArg {
    Auto,
    F32,
    Int8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PreemptionArg {
    Auto,
    Recompute,
    Swap,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum GenerationConfigArg {
    Model,
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum KvArg {
    Auto,
    F32,
    F16,
}

/// Which model to run, and how.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model to run: a .gguf file, a Hugging Face folder, or hf:ORG/NAME[/FILE] to
    /// download.
    #[arg(long, value_name = "PATH")]
    pub model: String,
    #[command(flatten)]
    pub run: RunArgs,
}

/// How to run a model.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Device to run on: auto, cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceArg,
    /// Memory for the KV cache, in MiB [default: 512 on the CPU; on a GPU, what the weights
    /// leave].
    #[arg(long, value_name = "MIB")]
    kv_cache_mib: Option<usize>,
    /// Number of slots for the states of recurrent layers: one for each running sequence and one
    /// for each kept snapshot [default: as many as half of the KV cache's memory holds, at most
    /// four for each sequence that may run].
    #[arg(long, value_name = "N")]
    state_slots: Option<usize>,
    /// Maximum number of tokens per step, decode tokens and prompt chunks together [default:
    /// 512 on the CPU; on a GPU 8192, or less if memory is short].
    #[arg(long, value_name = "N")]
    max_batch_tokens: Option<usize>,
    /// Maximum length of a sequence in tokens, prompt and answer together [default: the
    /// model's own limit].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Do not keep the KV cache of finished requests for later ones with the same prefix.
    #[arg(long)]
    no_prefix_cache: bool,
    /// Host memory for requests that are swapped out, in MiB; allocated as needed.
    #[arg(long, value_name = "MIB", default_value_t = EngineConfig::default().swap_bytes >> 20)]
    swap_mib: usize,
    /// How to preempt a request when KV cache memory runs out; auto picks the faster way.
    #[arg(long, value_enum, default_value_t = PreemptionArg::Auto)]
    preemption: PreemptionArg,
    /// Number of threads of the CPU device [default: one per processor in --cores, or all
    /// processors].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Processors to bind the CPU device's threads to, such as 0-7,16; best those of one
    /// socket [default: the system chooses].
    #[arg(long, value_name = "LIST", value_parser = Cores::parse)]
    cores: Option<Cores>,
    /// Instruction set that the CPU device uses.
    #[arg(long, value_enum, default_value_t = SimdArg::Auto)]
    simd: SimdArg,
    /// Number format of the activations that the CPU device multiplies with quantised
    /// weights.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Auto)]
    activations: ActivationsArg,
    /// Number format of cached keys and values on the CPU device.
    #[arg(long, value_enum, default_value_t = KvArg::Auto)]
    kv_type: KvArg,
    /// Source of default sampling settings: model (generation_config.json, or
    /// general.sampling in GGUF files) or none.
    #[arg(long, value_enum, default_value_t = GenerationConfigArg::Model)]
    generation_config: GenerationConfigArg,
    #[cfg(feature = "cuda")]
    #[command(flatten)]
    cuda: CudaArgs,
}

/// How to use the CUDA device.
#[cfg(feature = "cuda")]
#[derive(Debug, Args)]
struct CudaArgs {
    /// Number format of activations, keys and values on the CUDA device.
    #[arg(long, value_enum, default_value_t = CudaActivationsArg::Bf16)]
    cuda_activations: CudaActivationsArg,
    /// Fraction of the GPU's memory that may be used, from 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    gpu_memory_utilization: f32,
    /// Do not record CUDA graphs while the model is loaded. The first steps of each size are
    /// then slower. generate records none in any case.
    #[arg(long)]
    no_warm_up: bool,
    /// Do not record CUDA graphs at all: enqueue the kernels of every step one by one.
    #[arg(long)]
    enforce_eager: bool,
    /// Do not let a kernel begin while the one before it still runs. Only GPUs of compute
    /// capability 9.0 or higher can do so.
    #[arg(long)]
    no_overlap: bool,
}

#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CudaActivationsArg {
    Bf16,
    F16,
}

impl ModelArgs {
    /// Loads the model and starts its engine, with a progress bar on a terminal. A GPU is warmed
    /// up for steps of up to `warm_up` sequences.
    pub fn start(&self, warm_up: usize) -> Result<Engine, CliError> {
        self.start_with(warm_up, None, |_| ())
    }

    /// Like [`ModelArgs::start`], with a chat template in place of the model's own and with
    /// changes to settings that have no flag here.
    pub fn start_with(
        &self,
        warm_up: usize,
        chat_template: Option<&str>,
        change: impl FnOnce(&mut EngineConfig),
    ) -> Result<Engine, CliError> {
        // Report invalid settings before the download.
        let mut config = self.run.config()?;
        change(&mut config);
        self.run.options()?;
        let path = resolve(&self.model)?;
        let mut files = ModelFiles::open(&path)?;
        if let Some(source) = chat_template {
            let tokenizer = files.tokenizer_mut();
            let missing = || CliError::no_tokenizer(&self.model, &path);
            tokenizer.ok_or_else(missing)?.set_chat_template(source)?;
        }
        self.run.start_with(files, config, warm_up)
    }
}

impl RunArgs {
    /// Loads a model and starts its engine, with a progress bar on a terminal. A GPU is warmed
    /// up for steps of up to `warm_up` sequences, unless a flag forbids it.
    pub fn start_with(
        &self,
        files: ModelFiles,
        config: EngineConfig,
        warm_up: usize,
    ) -> Result<Engine, CliError> {
        let bar = progress::bar(0, "loading");
        let ticks = bar.clone();
        let mut options = self.options()?;
        options.progress = Some(Box::new(move |done, total| {
            ticks.set_length(total as u64);
            ticks.set_position(done as u64);
        }));
        #[cfg(feature = "cuda")]
        {
            options.cuda.warm_up = options.cuda.warm_up.min(warm_up);
        }
        #[cfg(not(feature = "cuda"))]
        let _ = warm_up;
        let engine = Engine::from_files(files, config, options);
        bar.finish_and_clear();
        Ok(engine?)
    }

    /// Returns the engine's settings.
    pub fn config(&self) -> Result<EngineConfig, CliError> {
        for (flag, value) in [
            ("--kv-cache-mib", self.kv_cache_mib),
            ("--max-batch-tokens", self.max_batch_tokens),
            ("--context", self.context),
            ("--threads", self.threads),
        ] {
            if value == Some(0) {
                return Err(CliError::Usage(format!(
                    "{flag} is 0, but must be at least 1"
                )));
            }
        }
        Ok(EngineConfig {
            kv_cache_bytes: self.kv_cache_mib.map(|mib| mib.saturating_mul(1 << 20)),
            state_slots: self.state_slots,
            max_batch_tokens: self.max_batch_tokens,
            max_context: self.context,
            prefix_cache: !self.no_prefix_cache,
            swap_bytes: self.swap_mib.saturating_mul(1 << 20),
            preemption: match self.preemption {
                PreemptionArg::Auto => Preemption::Auto,
                PreemptionArg::Recompute => Preemption::Recompute,
                PreemptionArg::Swap => Preemption::Swap,
            },
            ..EngineConfig::default()
        })
    }

    /// Returns whether the command line names a CUDA device.
    pub fn wants_cuda(&self) -> bool {
        matches!(self.device.0, DeviceChoice::Cuda(_))
    }

    /// Returns the options for loading a model.
    pub fn options(&self) -> Result<LoadOptions, CliError> {
        Ok(LoadOptions {
            device: self.device.0,
            cpu: self.cpu(),
            #[cfg(feature = "cuda")]
            cuda: self.cuda()?,
            generation_config: match self.generation_config {
                GenerationConfigArg::Model => GenerationConfig::Model,
                GenerationConfigArg::None => GenerationConfig::None,
            },
            progress: None,
        })
    }

    /// Returns the settings of the CUDA device.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> Result<CudaOptions, CliError> {
        let utilisation = self.cuda.gpu_memory_utilization;
        if !(utilisation > 0.0 && utilisation <= 1.0) {
            return Err(CliError::Usage(format!(
                "--gpu-memory-utilization is {utilisation}, but must be more than 0 and at most 1"
            )));
        }
        Ok(CudaOptions {
            activations: match self.cuda.cuda_activations {
                CudaActivationsArg::Bf16 => CudaActivations::Bf16,
                CudaActivationsArg::F16 => CudaActivations::F16,
            },
            utilisation,
            max_graphs: match self.cuda.enforce_eager {
                true => 0,
                false => CudaOptions::default().max_graphs,
            },
            warm_up: if self.cuda.no_warm_up { 0 } else { usize::MAX },
            overlap: !self.cuda.no_overlap,
            ..CudaOptions::default()
        })
    }

    /// Returns the settings of the CPU device.
    fn cpu(&self) -> CpuOptions {
        CpuOptions {
            threads: self.threads,
            cores: self.cores.clone().map_or(Vec::new(), |cores| cores.0),
            simd: match self.simd {
                SimdArg::Auto => SimdLevel::Auto,
                SimdArg::Avx512 => SimdLevel::Avx512,
                SimdArg::Avx2 => SimdLevel::Avx2,
                SimdArg::Portable => SimdLevel::Portable,
            },
            activations: match self.activations {
                ActivationsArg::Auto => Activations::Auto,
                ActivationsArg::F32 => Activations::F32,
                ActivationsArg::Int8 => Activations::Int8,
            },
            kv: match self.kv_type {
                KvArg::Auto => KvType::Auto,
                KvArg::F32 => KvType::F32,
                KvArg::F16 => KvType::F16,
            },
        }
    }
}

/// Returns the model's path, after downloading the model if it is a name on a hub.
#[cfg(feature = "hub")]
pub fn resolve(model: &str) -> Result<PathBuf, CliError> {
    Ok(hub::resolve(model, progress::on_terminal())?)
}

/// Returns the model's path. Refuses names on a hub.
#[cfg(not(feature = "hub"))]
pub fn resolve(model: &str) -> Result<PathBuf, CliError> {
    if model.starts_with("hf:") {
        let built = "this quell was built without the feature 'hub'; download the model by hand";
        return Err(CliError::Usage(format!("cannot download {model}: {built}")));
    }
    Ok(PathBuf::from(model))
}

/// How to choose tokens.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Divide the logits by T; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep only the K likeliest tokens; 0 means all [default: the model's own, else 0].
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep only the likeliest tokens whose probabilities add up to P [default: the model's
    /// own, else 1].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep only tokens at least P times as likely as the likeliest [default: the model's
    /// own, else 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divide the positive logits of tokens that have occurred by X, and multiply the
    /// negative ones; 1 means no penalty [default: the model's own, else 1].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtract X from the logit of each token that the answer contains.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    presence_penalty: f32,
    /// Subtract X from a token's logit for each time that the answer contains it.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,
    /// Add BIAS to the logit of token ID; may be repeated.
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers; the same seed gives the same tokens.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    text.split_once('=')
        .and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)))
        .ok_or_else(|| "expected a token id and a number, as in 42=-1.5".to_owned())
}

impl SamplingArgs {
    /// Returns whether a temperature was given.
    pub fn has_temperature(&self) -> bool {
        self.temperature.is_some()
    }

    /// Returns the settings, with those of `default` where no flag was given. They are
    /// checked as far as possible without a model.
    pub fn params(
        &self,
        default: &SamplingParams,
        logprobs: Option<u32>,
    ) -> Result<SamplingParams, CliError> {
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            logprobs,
        };
        params
            .validate(usize::MAX)
            .map_err(|error| CliError::Usage(error.to_string()))?;
        Ok(params)
    }
}
