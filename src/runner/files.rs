//! From a path to a runner: which files, which device.

use super::memory::{MemoryPlan, cache_shape};
use super::{LoadError, ModelRunner, Runner, RunnerInfo, generation_config, limits};
use crate::config::EngineConfig;
use crate::device::cpu::{CpuDevice, CpuOptions};
#[cfg(feature = "cuda")]
use crate::device::cuda::{CudaDevice, CudaOptions};
use crate::device::{Device, DeviceError, DeviceInfo};
use crate::model::ModelSource;
use crate::sampling::SamplingDefaults;
use crate::text::{GgufVocabulary, Tokenizer};
use crate::weights::{DType, Gguf, ModelFolder};
use serde_json::Value;
use std::path::{Path, PathBuf};

const TOKENIZER: &str = "tokenizer.json";

/// Where a model is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best device that this machine has.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device, by its index.
    Cuda(usize),
}

/// Whose sampling settings count for requests that have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfig {
    /// The model's: `generation_config.json`, or `general.sampling` metadata.
    #[default]
    Model,
    /// Nobody's: temperature 1, all tokens.
    None,
}

/// How to load a model.
#[derive(Default)]
pub struct LoadOptions {
    /// Where it is to run.
    pub device: DeviceChoice,
    /// Settings of the CPU device.
    pub cpu: CpuOptions,
    /// Settings of the CUDA device; [`DeviceChoice::Cuda`] says which it is.
    #[cfg(feature = "cuda")]
    pub cuda: CudaOptions,
    /// Whose sampling settings [`Engine::sampling_defaults`](crate::Engine::sampling_defaults)
    /// gives.
    pub generation_config: GenerationConfig,
    /// Told after each part of the model how many of how many are loaded.
    pub progress: Option<Box<dyn FnMut(usize, usize) + Send>>,
}

impl LoadOptions {
    /// On the CPU, whatever else there is.
    pub fn cpu() -> Self {
        Self {
            device: DeviceChoice::Cpu,
            ..Self::default()
        }
    }

    /// The device that these options choose. It is made ready and given back.
    pub fn device_info(&self) -> Result<DeviceInfo, LoadError> {
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda_device(self.device, self.cuda.clone())? {
            return Ok(device.info());
        }
        #[cfg(not(feature = "cuda"))]
        refuse_cuda(self.device)?;
        Ok(CpuDevice::new(&self.cpu)?.info())
    }
}

impl std::fmt::Debug for LoadOptions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = formatter.debug_struct("LoadOptions");
        debug.field("device", &self.device).field("cpu", &self.cpu);
        #[cfg(feature = "cuda")]
        debug.field("cuda", &self.cuda);
        debug.field("generation_config", &self.generation_config);
        debug.finish_non_exhaustive()
    }
}

/// The files of a model, opened and checked, its weights not yet read.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    source: ModelSource,
    tokenizer: Option<Tokenizer>,
    /// The name of the recipe that the file was quantised by, if it says.
    recipe: Option<&'static str>,
    /// The model's own sampling settings, or what is wrong with them.
    sampling: Result<SamplingDefaults, LoadError>,
}

impl ModelFiles {
    /// Opens a `.gguf` file or a Hugging Face folder.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let (source, tokenizer, recipe, sampling) = if path.is_dir() {
            // What model it is comes first: whatever else differs follows from it.
            let source = ModelSource::from_folder(ModelFolder::open(path)?)?;
            let sampling = generation_config::of_folder(path);
            (source, folder_tokenizer(path)?, None, sampling)
        } else {
            let file = Gguf::open(path)?;
            let tokenizer = gguf_tokenizer(&file)?;
            let recipe = file.file_type();
            let sampling = generation_config::of_gguf(&file);
            (ModelSource::from_gguf(file)?, tokenizer, recipe, sampling)
        };
        Ok(Self {
            path: path.to_owned(),
            source,
            tokenizer,
            recipe,
            sampling,
        })
    }

    /// The tokenizer of a model, whose settings and weights need not be there.
    pub fn open_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
        match path.is_dir() {
            true => folder_tokenizer(path),
            false => gguf_tokenizer(&Gguf::open(path)?),
        }
    }

    /// The file that holds a tokenizer in a form that quell does not read, in a folder
    /// without `tokenizer.json`.
    pub fn unread_tokenizer(path: &Path) -> Option<&'static str> {
        const OTHERS: [&str; 6] = [
            "tokenizer.model",
            "spiece.model",
            "tekken.json",
            "tokenizer.tiktoken",
            "vocab.json",
            "vocab.txt",
        ];
        let is_there = |name: &&str| path.join(name).exists();
        OTHERS
            .into_iter()
            .find(is_there)
            .filter(|_| !is_there(&TOKENIZER))
    }

    /// No files at all: random weights in `format`, of a model of the size that a
    /// Hugging Face `config.json` says, to measure its speed. `name` stands for its path.
    pub fn random(name: &str, settings: &Value, format: DType) -> Result<Self, LoadError> {
        Ok(Self {
            path: PathBuf::from(name),
            source: ModelSource::random(settings, format)?,
            tokenizer: None,
            recipe: None,
            sampling: Ok(SamplingDefaults::default()),
        })
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The usual name of the weights' format: of the recipe, such as `Q4_K_M`, or of
    /// most weights.
    pub fn quantisation(&self) -> String {
        match (self.recipe, self.source.parameters().main_format()) {
            (Some(recipe), _) => recipe.to_owned(),
            (None, Some(format)) => format.to_string(),
            (None, None) => "none".to_owned(),
        }
    }

    /// The model's own sampling settings.
    ///
    /// # Errors
    /// [`LoadError::GenerationConfig`] when they make no sense.
    pub fn sampling_defaults(&self) -> Result<&SamplingDefaults, &LoadError> {
        self.sampling.as_ref()
    }

    /// The tokenizer, if the files have one and it was not taken.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The device that the options choose and the memory that the model would take
    /// there, without loading it: weights as in the file.
    pub fn plan(
        &self,
        config: &EngineConfig,
        options: &LoadOptions,
    ) -> Result<(DeviceInfo, MemoryPlan), LoadError> {
        limits::validate(config)?;
        let parameters = self.source.parameters();
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda_device(options.device, options.cuda.clone())? {
            // Its cache gets what the weights leave.
            let budget = device.cache_budget()?.saturating_sub(parameters.bytes);
            return self.plan_on(&device, config, budget);
        }
        #[cfg(not(feature = "cuda"))]
        refuse_cuda(options.device)?;
        let cpu = options.cpu.clone().for_weights(parameters.is_quantised());
        let device = CpuDevice::new(&cpu)?;
        self.plan_on(&device, config, device.cache_budget()?)
    }

    /// The plan where the device would give the cache `budget` bytes.
    fn plan_on<D: Device>(
        &self,
        device: &D,
        config: &EngineConfig,
        budget: usize,
    ) -> Result<(DeviceInfo, MemoryPlan), LoadError> {
        let budget = config.kv_cache_bytes.unwrap_or(budget);
        let shape = cache_shape(self.source.config(), config, budget, device)?;
        let weights = self.source.parameters().bytes;
        Ok((device.info(), MemoryPlan::new(weights, &shape, device)))
    }

    /// The model's numbers and tensors.
    pub fn source(&self) -> &ModelSource {
        &self.source
    }

    /// The tokenizer, if the files have one, to change its chat template.
    pub fn tokenizer_mut(&mut self) -> Option<&mut Tokenizer> {
        self.tokenizer.as_mut()
    }

    /// The tokenizer, if the files have one; it is given away once.
    pub fn take_tokenizer(&mut self) -> Option<Tokenizer> {
        self.tokenizer.take()
    }

    /// Loads the model onto its device, with a key-value cache.
    pub fn build_runner(
        mut self,
        config: &EngineConfig,
        options: LoadOptions,
    ) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let LoadOptions {
            device,
            cpu,
            #[cfg(feature = "cuda")]
            cuda,
            generation_config,
            progress,
        } = options;
        let sampling = std::mem::replace(&mut self.sampling, Ok(SamplingDefaults::default()));
        let sampling = match generation_config {
            GenerationConfig::Model => sampling?,
            GenerationConfig::None => SamplingDefaults::default(),
        };
        let mut progress = progress.unwrap_or_else(|| Box::new(|_, _| {}));
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda_device(device, cuda)? {
            return self.run_on(device, config, sampling, &mut progress);
        }
        #[cfg(not(feature = "cuda"))]
        refuse_cuda(device)?;
        let quantised = self.source.parameters().is_quantised();
        let device = CpuDevice::new(&cpu.for_weights(quantised))?;
        self.run_on(device, config, sampling, &mut progress)
    }

    fn run_on<D: Device>(
        &self,
        device: D,
        config: &EngineConfig,
        sampling: SamplingDefaults,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let (runner, mut info) = ModelRunner::load(device, &self.source, config, progress)?;
        if let Some(model) = &mut info.model {
            model.sampling = sampling;
        }
        Ok((Box::new(runner), info))
    }
}

/// The CUDA device, if it is to be used.
#[cfg(feature = "cuda")]
fn cuda_device(
    choice: DeviceChoice,
    options: CudaOptions,
) -> Result<Option<CudaDevice>, DeviceError> {
    match choice {
        DeviceChoice::Cpu => Ok(None),
        DeviceChoice::Cuda(device) => CudaDevice::new(&CudaOptions { device, ..options }).map(Some),
        DeviceChoice::Auto => match CudaDevice::new(&options) {
            Ok(device) => Ok(Some(device)),
            Err(DeviceError::Unavailable { reason, .. }) => {
                tracing::info!("running on the CPU: {reason}");
                Ok(None)
            }
            Err(error) => Err(error),
        },
    }
}

/// Without the CUDA device there is nothing but the CPU.
#[cfg(not(feature = "cuda"))]
fn refuse_cuda(choice: DeviceChoice) -> Result<(), DeviceError> {
    match choice {
        DeviceChoice::Cuda(index) => Err(DeviceError::Unavailable {
            device: format!("cuda:{index}"),
            reason: "this quell was built without the feature 'cuda'".to_owned(),
        }),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(()),
    }
}

fn folder_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
    match path.join(TOKENIZER).exists() {
        true => Ok(Some(Tokenizer::from_folder(path)?)),
        false => Ok(None),
    }
}

fn gguf_tokenizer(file: &Gguf) -> Result<Option<Tokenizer>, LoadError> {
    // What llama.cpp's converters write of a model without one.
    let none = |name: &str| matches!(name, "none" | "no_vocab");
    match file.metadata("tokenizer.ggml.model") {
        Some(model) if !model.as_str().is_some_and(none) => Ok(Some(Tokenizer::from_gguf(
            GgufVocabulary::from_file(file)?,
        )?)),
        _ => Ok(None),
    }
}
