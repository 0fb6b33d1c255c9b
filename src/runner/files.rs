//! Opens the files of a model, chooses a device, and builds a runner.

use super::memory::{MemoryPlan, cache_shape};
use super::{LoadError, ModelRunner, Runner, RunnerInfo, generation_config, limits};
use crate::config::EngineConfig;
use crate::device::cpu::{CpuDevice, CpuOptions};
#[cfg(feature = "cuda")]
use crate::device::cuda::{CudaDevice, CudaOptions};
use crate::device::{CacheOps, Device, DeviceError, DeviceInfo};
use crate::model::ModelSource;
use crate::sampling::SamplingDefaults;
use crate::text::{GgufVocabulary, Tokenizer};
use crate::weights::{DType, Gguf, ModelFolder};
use serde_json::Value;
use std::path::{Path, PathBuf};

const TOKENIZER: &str = "tokenizer.json";

/// The device that a model runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A CUDA device if one can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device with this index.
    Cuda(usize),
}

/// Which sampling settings apply to requests that set none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfig {
    /// The model's own, from `generation_config.json` or `general.sampling` metadata.
    #[default]
    Model,
    /// None. The temperature is 1, and all tokens may be chosen.
    None,
}

/// How to load a model.
#[derive(Default)]
pub struct LoadOptions {
    /// The device to run on.
    pub device: DeviceChoice,
    /// Settings of the CPU device.
    pub cpu: CpuOptions,
    /// Settings of the CUDA device. [`DeviceChoice::Cuda`] overrides the index in them.
    #[cfg(feature = "cuda")]
    pub cuda: CudaOptions,
    /// Which sampling settings [`Engine::sampling_defaults`](crate::Engine::sampling_defaults)
    /// returns.
    pub generation_config: GenerationConfig,
    /// Called after each part of the model that is loaded, with the number of parts loaded and
    /// the number of all parts.
    pub progress: Option<Box<dyn FnMut(usize, usize) + Send>>,
}

impl LoadOptions {
    /// Returns the default options with the CPU as the device.
    pub fn cpu() -> Self {
        Self {
            device: DeviceChoice::Cpu,
            ..Self::default()
        }
    }

    /// Returns the description of the device that these options choose. The device is
    /// initialised for this and released again.
    ///
    /// # Errors
    /// Returns an error if the device cannot be used.
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

/// The files of a model, opened and checked. Their weights have not been read yet.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    source: ModelSource,
    tokenizer: Option<Tokenizer>,
    /// Name of the recipe by which the file was quantised, if the file states it.
    recipe: Option<&'static str>,
    /// The model's own sampling settings, or what is wrong with them.
    sampling: Result<SamplingDefaults, LoadError>,
}

impl ModelFiles {
    /// Opens a `.gguf` file or a Hugging Face folder.
    ///
    /// # Errors
    /// Returns an error if the files cannot be read, or if the model or its tokenizer is not
    /// supported.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let (source, tokenizer, recipe, sampling) = if path.is_dir() {
            // Check the model first: if it is not supported, errors in other files are only
            // consequences.
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

    /// Opens only the tokenizer of a model, whose configuration and weights may be missing.
    /// Returns `None` if the model has no tokenizer.
    ///
    /// # Errors
    /// Returns an error if the files cannot be read or the tokenizer is not supported.
    pub fn open_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
        match path.is_dir() {
            true => folder_tokenizer(path),
            false => gguf_tokenizer(&Gguf::open(path)?),
        }
    }

    /// Returns the name of a tokenizer file in a format that quell does not read, if the folder
    /// has one and no `tokenizer.json`.
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

    /// Creates a model with random weights in `format` instead of files, to measure its speed.
    /// Its size is that of a Hugging Face `config.json`, given as `settings`. `name` stands for
    /// its path.
    ///
    /// # Errors
    /// Returns an error if `settings` describes no model that quell can run.
    pub fn random(name: &str, settings: &Value, format: DType) -> Result<Self, LoadError> {
        Ok(Self {
            path: PathBuf::from(name),
            source: ModelSource::random(settings, format)?,
            tokenizer: None,
            recipe: None,
            sampling: Ok(SamplingDefaults::default()),
        })
    }

    /// Returns the path of the file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the usual name of the format of the weights: the name of the recipe, such as
    /// `Q4_K_M`, or else the format of most weights.
    pub fn quantisation(&self) -> String {
        match (self.recipe, self.source.parameters().main_format()) {
            (Some(recipe), _) => recipe.to_owned(),
            (None, Some(format)) => format.to_string(),
            (None, None) => "none".to_owned(),
        }
    }

    /// Returns the model's own sampling settings.
    ///
    /// # Errors
    /// Returns [`LoadError::GenerationConfig`] if they are invalid.
    pub fn sampling_defaults(&self) -> Result<&SamplingDefaults, &LoadError> {
        self.sampling.as_ref()
    }

    /// Returns the tokenizer, if the files have one and it was not taken.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Returns the device that the options choose and the memory that the model would take
    /// there, without loading it. The weights are assumed to take as much memory as in the
    /// file.
    ///
    /// # Errors
    /// Returns an error if a setting is out of range, if the device cannot be used, or if the
    /// cache has no room for a single block.
    pub fn plan(
        &self,
        config: &EngineConfig,
        options: &LoadOptions,
    ) -> Result<(DeviceInfo, MemoryPlan), LoadError> {
        limits::validate(config)?;
        let parameters = self.source.parameters();
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda_device(options.device, options.cuda.clone())? {
            // The cache of a GPU gets the memory that the weights leave.
            let budget = device.cache_budget()?.saturating_sub(parameters.bytes);
            return self.plan_on(&device, config, budget);
        }
        #[cfg(not(feature = "cuda"))]
        refuse_cuda(options.device)?;
        let cpu = options.cpu.clone().for_weights(parameters.is_quantised());
        let device = CpuDevice::new(&cpu)?;
        self.plan_on(&device, config, device.cache_budget()?)
    }

    /// Returns the plan for a device that grants the cache `budget` bytes.
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

    /// Returns the model's configuration and tensors.
    pub fn source(&self) -> &ModelSource {
        &self.source
    }

    /// Returns the tokenizer, if the files have one, so that its chat template can be changed.
    pub fn tokenizer_mut(&mut self) -> Option<&mut Tokenizer> {
        self.tokenizer.as_mut()
    }

    /// Takes the tokenizer out, if the files have one and it was not taken before.
    pub fn take_tokenizer(&mut self) -> Option<Tokenizer> {
        self.tokenizer.take()
    }

    /// Loads the model onto its device and allocates the KV cache.
    ///
    /// # Errors
    /// Returns an error if the model's sampling settings are to be used and are invalid, if the
    /// device cannot be used, or if loading the model fails.
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

/// Opens the CUDA device, unless the CPU is chosen or automatic choice finds no usable GPU.
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

/// Refuses the choice of a CUDA device, which this build does not support.
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
    // llama.cpp's converters write these names for a model without a tokenizer.
    let none = |name: &str| matches!(name, "none" | "no_vocab");
    match file.metadata("tokenizer.ggml.model") {
        Some(model) if !model.as_str().is_some_and(none) => Ok(Some(Tokenizer::from_gguf(
            GgufVocabulary::from_file(file)?,
        )?)),
        _ => Ok(None),
    }
}
