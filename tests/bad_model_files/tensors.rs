//! Models with a tensor of another name: it is missing, and what has its data is unknown. Either is
//! refused by its name.

use common::gguf_writer::GgufWriter;
use common::golden::checkpoints;
use quell::ModelError;
use quell::internals::model::ModelSource;
use quell::internals::weights::{Gguf, ModelFolder, WeightSource};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// Opens a model with another name for one tensor, if any.
type Open = Box<dyn Fn(Option<&str>) -> Result<ModelSource, ModelError>>;

/// Returns the name of a tensor without the numbers of layers and experts.
fn kind(name: &str) -> String {
    let parts = name.split('.');
    let parts = parts.map(|part| match part.parse::<usize>() {
        Ok(_) => "N",
        Err(_) => part,
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Returns the last tensor of each kind.
fn one_of_each_kind(names: Vec<String>) -> Vec<String> {
    let names = names.into_iter().map(|name| (kind(&name), name));
    names.collect::<BTreeMap<_, _>>().into_values().collect()
}

/// Whether a tensor belongs to a tower for images, which is skipped.
fn is_skipped(name: &str) -> bool {
    name.contains(".visual.") || name.contains(".vision_tower.")
}

/// Returns whether an error names one of the tensors that can take the place of `name`.
fn names_a_replacement(error: &str, name: &str) -> bool {
    let replacements = [
        ("qkv_proj", "q_proj"),
        ("attn_qkv", "attn_q"),
        ("in_proj_ba", "in_proj_b"),
        ("in_proj_qkvz", "in_proj_qkv"),
        ("ssm_ba", "ssm_beta"),
        ("ffn_gate_up_exps", "ffn_gate_exps"),
    ];
    let replaced = |(whole, part): (&str, &str)| {
        name.contains(whole) && error.contains(&name.replace(whole, part))
    };
    replacements.into_iter().any(replaced)
}

/// A name that no model has.
fn renamed(name: &str) -> String {
    format!("{name}.other")
}

/// A Hugging Face folder whose header can be written anew.
pub struct Folder {
    folder: TempDir,
    pub header: Map<String, Value>,
    pub data: Vec<u8>,
}

impl Folder {
    pub fn copy(path: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = "config.json";
        std::fs::copy(path.join(config), folder.path().join(config)).unwrap();
        let file = std::fs::read(path.join("model.safetensors")).unwrap();
        let (length, rest) = file.split_at(8);
        let length = u64::from_le_bytes(length.try_into().unwrap());
        let (header, data) = rest.split_at(length as usize);
        Self {
            folder,
            header: serde_json::from_slice(header).unwrap(),
            data: data.to_vec(),
        }
    }

    /// Opens the model with another name for one tensor, if any.
    fn open(&self, changed: Option<&str>) -> Result<ModelSource, ModelError> {
        let mut header = self.header.clone();
        if let Some(name) = changed {
            rename(&mut header, name);
        }
        self.write_with(header);
        ModelSource::from_folder(ModelFolder::open(self.folder.path()).unwrap())
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Gives a tensor another name.
    pub fn rename(&mut self, name: &str) {
        rename(&mut self.header, name);
    }

    /// Moves the tensors together, so that there are no bytes between them.
    pub fn repack(&mut self) {
        let mut data = Vec::new();
        for (name, entry) in &mut self.header {
            if name == "__metadata__" {
                continue;
            }
            let place = |index: usize| entry["data_offsets"][index].as_u64().unwrap() as usize;
            let bytes = &self.data[place(0)..place(1)];
            let first = data.len();
            data.extend_from_slice(bytes);
            entry["data_offsets"] = serde_json::json!([first, data.len()]);
        }
        self.data = data;
    }

    /// Returns the bytes of a tensor.
    pub fn bytes(&mut self, name: &str) -> &mut [u8] {
        let place = |index: usize| self.header[name]["data_offsets"][index].as_u64().unwrap();
        let range = place(0) as usize..place(1) as usize;
        &mut self.data[range]
    }

    pub fn change_config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.path().join("config.json");
        let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
    }

    /// Writes the weights.
    pub fn write(&self) {
        self.write_with(self.header.clone());
    }

    fn write_with(&self, header: Map<String, Value>) {
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(&self.data);
        std::fs::write(self.folder.path().join("model.safetensors"), file).unwrap();
    }
}

/// Gives a tensor another name.
fn rename(header: &mut Map<String, Value>, name: &str) {
    let entry = header.remove(name).unwrap();
    header.insert(renamed(name), entry);
}

/// Opens a GGUF file with another name for one tensor, if any.
fn open_gguf(path: &Path, changed: Option<&str>) -> Result<ModelSource, ModelError> {
    let file = Gguf::open(path).unwrap();
    let own = |name: &str| match changed {
        Some(changed) if changed == name => renamed(name),
        _ => name.to_owned(),
    };
    let copied = GgufWriter::copy_renamed(&file, |_| true, own);
    ModelSource::from_gguf(Gguf::from_bytes(copied.build(), path).unwrap())
}

#[test]
fn every_tensor_is_missed_by_its_name() {
    let mut tried = 0;
    let mut complaints = Vec::new();
    for path in checkpoints() {
        let (names, open): (Vec<String>, Open) = if path.is_dir() {
            let folder = Folder::copy(&path);
            let names = folder.header.keys().filter(|name| *name != "__metadata__");
            let names = names.cloned().collect();
            (names, Box::new(move |changed| folder.open(changed)))
        } else {
            let file = Gguf::open(&path).unwrap();
            let names = file.names().into_iter().map(str::to_owned).collect();
            let path = path.clone();
            (names, Box::new(move |changed| open_gguf(&path, changed)))
        };
        let file = path.file_name().unwrap().to_str().unwrap();
        open(None).unwrap_or_else(|error| panic!("{file}: {error}"));
        for name in one_of_each_kind(names) {
            if is_skipped(&name) {
                continue;
            }
            tried += 1;
            match open(Some(&name)) {
                Ok(_) => complaints.push(format!("{file}: {name} is not needed")),
                Err(error) if error.to_string().contains(&name) => {}
                Err(error) if names_a_replacement(&error.to_string(), &name) => {}
                Err(error) => complaints.push(format!("{file}: {name}: {error}")),
            }
        }
    }
    for complaint in &complaints {
        println!("{complaint}");
    }
    assert!(tried > 700, "{tried} tensors");
    assert!(complaints.is_empty(), "{} of {tried}", complaints.len());
}
