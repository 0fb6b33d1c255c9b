//! Hugging Face model folders: `config.json` with safetensors weights, in one file or in
//! shards.

use super::directory::{Contents, Directory};
use super::file::WeightFile;
use super::formats::Quantised;
use super::source::refuse_lfs_pointer;
use super::{TensorView, WeightSource, WeightsError, from_python_json, quant, safetensors};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Size limit for JSON files, in bytes. Real ones are about a thousandth of this.
const LARGEST_JSON: u64 = 64 << 20;

/// An open model folder: its configuration and the location of its tensors.
#[derive(Debug)]
pub struct ModelFolder {
    config: Value,
    directory: Directory,
    quantised: Quantised,
}

/// The contents of `model.safetensors.index.json`.
#[derive(serde::Deserialize)]
struct Index {
    /// Name of the shard that holds each tensor, by tensor name.
    weight_map: BTreeMap<String, String>,
}

impl ModelFolder {
    /// Opens the folder at `path`: reads `config.json`, then opens `model.safetensors` or,
    /// if there is none, the shards that `model.safetensors.index.json` names. The files
    /// must not be changed while they are open.
    ///
    /// # Errors
    /// Returns [`WeightsError::Io`] or [`WeightsError::Shortened`] if a file cannot be
    /// read, [`WeightsError::MissingFile`] if one is absent, [`WeightsError::Unsupported`]
    /// for tensors that are not F32, F16 or BF16 and not part of a quantised matrix, for other
    /// methods of quantisation, and for PyTorch checkpoints and Git LFS pointers, and
    /// [`WeightsError::Malformed`] for anything else.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let config_path = path.join(CONFIG);
        if !config_path.exists() {
            return Err(WeightsError::MissingFile {
                path: config_path,
                reason: undescribed(path),
            });
        }
        let config: Value = read_json(&config_path, CONFIG)?;
        if !config.is_object() {
            return Err(WeightsError::Malformed {
                path: config_path,
                format: CONFIG,
                problem: "it is not a JSON object".into(),
            });
        }
        let directory = open_weights(path)?;
        let quantised = Quantised::find(&config, &config_path, &directory)?;
        if let Some(name) = directory.raw_names().find(|name| !quantised.claims(name)) {
            let kind = directory.raw(name).map(|tensor| tensor.kind);
            let kind = kind.map_or_else(String::new, |kind| format!("{kind:?}"));
            return Err(safetensors::unsupported(
                name,
                &kind,
                &directory.path_of(name),
            ));
        }
        Ok(Self {
            config,
            directory,
            quantised,
        })
    }

    /// Returns the contents of `config.json`, which is a JSON object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Returns the name of the format in which the weights are quantised, if they are.
    pub fn recipe(&self) -> Option<&'static str> {
        self.quantised.recipe()
    }

    /// Returns the size of the weight files in bytes.
    #[cfg(any(test, feature = "internals"))]
    pub fn file_bytes(&self) -> u64 {
        self.directory.file_bytes()
    }
}

impl WeightSource for ModelFolder {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let plain = || self.directory.tensor(name);
        self.quantised.tensor(name).or_else(plain)
    }

    fn names(&self) -> Vec<&str> {
        let plain = self.directory.names().into_iter();
        let plain = plain.filter(|name| !self.quantised.claims(name));
        plain.chain(self.quantised.names()).collect()
    }

    fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError> {
        match self.quantised.read(&self.directory, tensor)? {
            Some(data) => Ok(Cow::Owned(data)),
            None => self.directory.read(tensor),
        }
    }
}

/// Reads a tensor of a safetensors file as float32.
///
/// # Errors
/// Returns the same errors as [`ModelFolder::open`], and [`WeightsError::Malformed`] if the file has
/// no tensor of this name and shape.
pub fn read_tensor(path: &Path, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
    let mut directory = Directory::default();
    add_file(&mut directory, path, None)?;
    let malformed = |problem: String| WeightsError::Malformed {
        path: path.to_owned(),
        format: "safetensors",
        problem,
    };
    let tensor = directory.tensor(name);
    let tensor = tensor.ok_or_else(|| malformed(format!("tensor {name:?} is missing")))?;
    if tensor.shape != shape {
        let found = tensor.shape;
        let problem = format!("tensor {name:?} has shape {found:?}, but must have {shape:?}");
        return Err(malformed(problem));
    }
    let mut values = vec![0.0; shape.iter().product()];
    quant::dequantize(tensor.dtype, &directory.read(&tensor)?, &mut values);
    Ok(values)
}

fn open_weights(folder: &Path) -> Result<Directory, WeightsError> {
    let single = folder.join(WEIGHTS);
    if single.exists() {
        let mut directory = Directory::default();
        add_file(&mut directory, &single, None)?;
        return Ok(directory);
    }
    let index = folder.join(INDEX);
    if index.exists() {
        return open_shards(folder, &index);
    }
    for other in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        let path = folder.join(other);
        if path.exists() {
            return Err(WeightsError::Unsupported {
                path,
                what: "a PyTorch checkpoint".into(),
                expected: format!("convert it to {WEIGHTS}"),
            });
        }
    }
    let others = files_with(folder, "safetensors");
    let instead = match others.first() {
        Some(other) if other.starts_with("consolidated") => format!(
            "; {other} is in Mistral's own layout: use the checkpoint in the layout of \
             transformers"
        ),
        Some(other) => format!("; {other} exists, but no {INDEX} lists it"),
        None => String::new(),
    };
    Err(WeightsError::MissingFile {
        path: single,
        reason: format!("a model folder must have it or {INDEX}{instead}"),
    })
}

/// Explains why a folder has no `config.json`, as far as its other files tell.
fn undescribed(folder: &Path) -> String {
    if folder.join("adapter_config.json").exists() {
        return "adapter_config.json exists: this is an adapter, which must be merged into its \
                base model first"
            .to_owned();
    }
    match files_with(folder, "gguf").first() {
        Some(file) => {
            format!("a model folder must have one; to run {file}, give the path of the file")
        }
        None => "a model folder must have one".to_owned(),
    }
}

/// Returns the names of the files directly in `folder` that have this extension, sorted.
fn files_with(folder: &Path, extension: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| {
            Path::new(name)
                .extension()
                .is_some_and(|own| own == extension)
        })
        .collect();
    names.sort();
    names
}

fn open_shards(folder: &Path, index_path: &Path) -> Result<Directory, WeightsError> {
    let index: Index = read_json(index_path, INDEX)?;
    let mut shards: BTreeMap<&str, HashSet<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        shards.entry(shard).or_default().insert(tensor);
    }
    let mut directory = Directory::default();
    for (shard, tensors) in &shards {
        let path = shard_path(folder, shard, index_path)?;
        if !path.exists() {
            return Err(WeightsError::MissingFile {
                path,
                reason: format!("{INDEX} places {} tensors in it", tensors.len()),
            });
        }
        add_file(&mut directory, &path, Some(tensors))?;
    }
    Ok(directory)
}

/// Returns the path of shard `name`, which must be a file directly in the folder.
fn shard_path(folder: &Path, name: &str, index: &Path) -> Result<PathBuf, WeightsError> {
    let plain = name.ends_with(".safetensors") && !name.contains(['/', '\\', ':', '\0']);
    if plain {
        return Ok(folder.join(name));
    }
    Err(WeightsError::Malformed {
        path: index.to_owned(),
        format: INDEX,
        problem: format!(
            "it names the shard {name:?}; a shard must be a .safetensors file next to the index"
        ),
    })
}

/// Opens a weight file and adds its tensors. If `wanted` is given, adds only those, and the
/// file must have them all.
fn add_file(
    directory: &mut Directory,
    path: &Path,
    wanted: Option<&HashSet<&str>>,
) -> Result<(), WeightsError> {
    let malformed = |problem: String| WeightsError::Malformed {
        path: path.to_owned(),
        format: "safetensors",
        problem,
    };
    let file = WeightFile::open(path)?;
    let (mut entries, mut raw) = safetensors::read(&file, path)?;
    if let Some(wanted) = wanted {
        entries.retain(|entry| wanted.contains(entry.name.as_str()));
        raw.retain(|entry| wanted.contains(entry.name.as_str()));
        if entries.len() + raw.len() < wanted.len() {
            let held = entries.iter().map(|entry| entry.name.as_str());
            let held: HashSet<&str> = held
                .chain(raw.iter().map(|entry| entry.name.as_str()))
                .collect();
            let absent = wanted.difference(&held).min().copied().unwrap_or_default();
            return Err(malformed(format!(
                "it lacks tensor {absent:?}, which {INDEX} places in it"
            )));
        }
    }
    let contents = Contents::File(file);
    let added = directory.add(path, contents, entries);
    let added = added.and_then(|()| directory.add_raw(raw));
    added.map_err(|repeated| {
        malformed(format!(
            "tensor {:?} is also in {}",
            repeated.name,
            repeated.first.display()
        ))
    })
}

/// Reads a JSON file, which may have Python's names of numbers that are not finite. `format` is the
/// name of its contents in errors.
///
/// # Errors
/// Returns [`WeightsError::Io`] if the file cannot be read, [`WeightsError::Unsupported`] for a Git
/// LFS pointer, and [`WeightsError::Malformed`] if it is too large or not of this type.
pub fn read_json<T: DeserializeOwned>(
    path: &Path,
    format: &'static str,
) -> Result<T, WeightsError> {
    let failed = |source| WeightsError::Io {
        path: path.to_owned(),
        source,
    };
    let malformed = |problem: String| WeightsError::Malformed {
        path: path.to_owned(),
        format,
        problem,
    };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if size > LARGEST_JSON {
        return Err(malformed(format!(
            "it has {size} bytes; at most {LARGEST_JSON} are read"
        )));
    }
    let text = std::fs::read(path).map_err(failed)?;
    refuse_lfs_pointer(&text, path)?;
    from_python_json(&text).map_err(|error| malformed(error.to_string()))
}
