//! Opens the files of a model, plans its memory, and builds a runner.

use super::demand::Demand;
use super::device::{DeviceWork, on_device};
use super::memory::MemoryPlan;
use super::options::{GenerationConfig, LoadOptions};
use super::{LoadError, ModelRunner, Pooling, Runner, RunnerInfo};
use super::{generation_config, limits, pooling};
use crate::config::EngineConfig;
use crate::device::{Device, DeviceInfo};
use crate::model::ModelSource;
use crate::sampling::SamplingDefaults;
use crate::text::{GgufVocabulary, Tokenizer};
#[cfg(any(test, feature = "cli", feature = "internals"))]
use crate::weights::DType;
use crate::weights::{Gguf, ModelFolder};
#[cfg(any(test, feature = "cli", feature = "internals"))]
use serde_json::Value;
use std::path::Path;

/// The files of a model, opened and checked. Their weights have not been read yet.
#[derive(Debug)]
pub struct ModelFiles {
    source: ModelSource,
    /// How embeddings are made of hidden states.
    pooling: Pooling,
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
    /// Returns [`LoadError::Weights`] if a file is missing, cannot be read or is invalid,
    /// [`LoadError::Model`] if quell cannot run the model, and [`LoadError::Text`] if the
    /// tokenizer or the chat template is invalid or not supported.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let (source, pooling, tokenizer, recipe, sampling) = if path.is_dir() {
            // Check the model first: if it is not supported, errors in other files are only
            // consequences.
            let folder = ModelFolder::open(path)?;
            let config = folder.config().clone();
            let recipe = folder.recipe();
            let mut source = ModelSource::from_folder(folder)?;
            let pooling = pooling::of_folder(path, &config, &mut source)?;
            let sampling = generation_config::of_folder(path);
            (source, pooling, folder_tokenizer(path)?, recipe, sampling)
        } else {
            let file = Gguf::open(path)?;
            let tokenizer = gguf_tokenizer(&file)?;
            let recipe = file.file_type();
            let sampling = generation_config::of_gguf(&file);
            let kind = pooling::kind_of_gguf(&file);
            let source = ModelSource::from_gguf(file)?;
            let pooling = pooling::of_gguf(kind, path, &source)?;
            (source, pooling, tokenizer, recipe, sampling)
        };
        Ok(Self {
            source,
            pooling,
            tokenizer,
            recipe,
            sampling,
        })
    }

    /// Opens only the tokenizer of a model, whose configuration and weights may be missing.
    /// Returns `None` if the model has no tokenizer.
    ///
    /// # Errors
    /// Returns [`LoadError::Weights`] if a GGUF file cannot be read or is invalid, and
    /// [`LoadError::Text`] if the tokenizer or the chat template is invalid or not supported.
    pub fn open_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
        match path.is_dir() {
            true => folder_tokenizer(path),
            false => gguf_tokenizer(&Gguf::open(path)?),
        }
    }

    /// Returns the name of a tokenizer file in a format that quell does not read, if the folder
    /// has one and no other.
    #[cfg(feature = "cli")]
    pub(crate) fn unsupported_tokenizer(path: &Path) -> Option<&'static str> {
        const OTHERS: [&str; 4] = ["spiece.model", "tekken.json", "vocab.json", "vocab.txt"];
        let is_there = |name: &&str| path.join(name).exists();
        OTHERS
            .into_iter()
            .find(is_there)
            .filter(|_| !Tokenizer::is_in_folder(path))
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

    /// Returns how embeddings and scores are made of hidden states.
    pub fn pooling(&self) -> &Pooling {
        &self.pooling
    }

    /// Returns the tokenizer, if the files have one and it was not taken.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Returns the device that the options choose and the memory that the model would take
    /// there, without loading it. The sizes of weights and graphs are estimates.
    ///
    /// # Errors
    /// Returns [`LoadError::Config`] if a setting is out of range or if the KV cache has no room
    /// for a block of each group of layers, [`LoadError::Memory`] if the device has too little
    /// memory, [`LoadError::EmptyWindow`] if a layer of the model
    /// attends to no tokens, and [`LoadError::Device`] if the device cannot be used.
    pub fn plan(
        &self,
        config: &EngineConfig,
        options: &LoadOptions,
    ) -> Result<(DeviceInfo, MemoryPlan), LoadError> {
        limits::validate(config)?;
        let plan = Plan {
            source: &self.source,
            config,
        };
        on_device(options, self.source.parameters().is_quantised(), plan)
    }

    /// Returns the model's configuration and tensors.
    #[cfg(feature = "cli")]
    pub(crate) fn source(&self) -> &ModelSource {
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
}

/// Creates a model with random weights in `format` instead of files, to measure its speed. Its
/// size is that of a Hugging Face `config.json`, given as `settings`.
///
/// # Errors
/// Returns [`LoadError::Model`] if `settings` describes no model that quell can run, or if its
/// weights cannot have this format.
#[cfg(any(test, feature = "cli", feature = "internals"))]
pub fn random_model(settings: &Value, format: DType) -> Result<ModelFiles, LoadError> {
    Ok(ModelFiles {
        source: ModelSource::random(settings, format)?,
        pooling: Pooling::default(),
        tokenizer: None,
        recipe: None,
        sampling: Ok(SamplingDefaults::default()),
    })
}

/// Loads a model onto its device and allocates the KV cache.
///
/// # Errors
/// Returns an error if the model's sampling settings are to be used and are invalid, if the
/// device cannot be used, or if loading the model fails.
pub fn build_runner(
    files: ModelFiles,
    config: &EngineConfig,
    mut options: LoadOptions,
) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
    let sampling = match options.generation_config {
        GenerationConfig::Model => files.sampling?,
        GenerationConfig::None => SamplingDefaults::default(),
    };
    let source = files.source;
    let progress = options.progress.take();
    let mut progress = progress.unwrap_or_else(|| Box::new(|_, _| {}));
    let load = Load {
        source: &source,
        config,
        sampling,
        pooling: files.pooling,
        progress: &mut progress,
    };
    on_device(&options, source.parameters().is_quantised(), load)
}

/// Plans the memory of a model on a device.
struct Plan<'a> {
    source: &'a ModelSource,
    config: &'a EngineConfig,
}

impl DeviceWork for Plan<'_> {
    type Output = (DeviceInfo, MemoryPlan);

    fn run<D: Device>(self, device: D) -> Result<Self::Output, LoadError> {
        let Self { source, config } = self;
        let plan = Demand::new(source, config, &device)?.plan(&device)?;
        Ok((device.info(), plan))
    }
}

/// Loads a model onto a device.
struct Load<'a> {
    source: &'a ModelSource,
    config: &'a EngineConfig,
    sampling: SamplingDefaults,
    pooling: Pooling,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl DeviceWork for Load<'_> {
    type Output = (Box<dyn Runner>, RunnerInfo);

    fn run<D: Device>(self, device: D) -> Result<Self::Output, LoadError> {
        let Self {
            source,
            config,
            sampling,
            pooling,
            progress,
        } = self;
        let (runner, mut info) = ModelRunner::load(device, source, config, progress)?;
        if let Some(model) = &mut info.model {
            model.sampling = sampling;
        }
        info.embedding = info.embedding.map(|hidden| pooling.size(hidden));
        info.pooling = pooling;
        Ok((Box::new(runner), info))
    }
}

fn folder_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
    match Tokenizer::is_in_folder(path) {
        true => Ok(Some(Tokenizer::from_folder(path)?)),
        false => Ok(None),
    }
}

fn gguf_tokenizer(file: &Gguf) -> Result<Option<Tokenizer>, LoadError> {
    // llama.cpp's converters write these names for a model without a tokenizer.
    let none = |name: &str| matches!(name, "none" | "no_vocab");
    match file.metadata("tokenizer.ggml.model") {
        Some(model) if !model.as_str().is_some_and(none) => {
            let vocabulary = GgufVocabulary::from_file(file)?;
            Ok(Some(vocabulary.into_tokenizer()?))
        }
        _ => Ok(None),
    }
}
