//! How embeddings and scores are made of hidden states, from the files of sentence-transformers in
//! a Hugging Face folder or from the metadata of a GGUF file.

use super::LoadError;
use crate::model::ModelSource;
use crate::schedule::PooledTokens;
use crate::weights::gguf::Gguf;
use crate::weights::{read_json, read_tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// How a model turns the last hidden states of a text into a vector or a score. Reimers & Gurevych,
/// *Sentence-BERT*, 2019.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Pooling {
    /// The tokens whose hidden states are averaged.
    pub tokens: PooledTokens,
    /// What is computed of the average, in this order.
    pub stages: Vec<PoolingStage>,
    /// Whether the result is the scores of a classifier, such as the relevance of a document to a
    /// query, instead of a vector to compare with others.
    pub is_score: bool,
    /// Whether the model's files say how it is made. Otherwise, it is the mean of all tokens.
    pub is_stated: bool,
    /// Texts to put before a text, by the name of its purpose, such as `query`.
    pub prompts: BTreeMap<String, String>,
    /// The purpose of texts that name none.
    pub default_prompt: Option<String>,
}

/// A computation on a pooled vector.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum PoolingStage {
    /// A linear layer.
    Dense(Dense),
    /// Scales the vector to length 1.
    Normalize,
    /// `1 / (1 + e^(−x))` of each element.
    Sigmoid,
}

/// A linear layer with a non-linearity, `activation(W x + b)`.
#[derive(Clone, PartialEq)]
pub struct Dense {
    /// `W`, row by row.
    weight: Vec<f32>,
    /// `b`; it has one element for each row.
    bias: Vec<f32>,
    /// Whether the activation is tanh; otherwise there is none.
    is_tanh: bool,
}

impl std::fmt::Debug for Dense {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let outputs = self.bias.len();
        formatter
            .debug_struct("Dense")
            .field("inputs", &(self.weight.len() / outputs.max(1)))
            .field("outputs", &outputs)
            .field("is_tanh", &self.is_tanh)
            .finish()
    }
}

impl Dense {
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(x.len().max(1)).zip(&self.bias);
        let sums = rows.map(|(row, &bias)| {
            // Eight sums, which the compiler adds up in one vector register.
            let mut lanes = [0.0f32; 8];
            let (whole, rest) = row.as_chunks::<8>();
            let (xs, last) = x.as_chunks::<8>();
            for (row, x) in whole.iter().zip(xs) {
                for (lane, (w, x)) in lanes.iter_mut().zip(row.iter().zip(x)) {
                    *lane += w * x;
                }
            }
            let rest = rest.iter().zip(last).map(|(w, x)| w * x);
            bias + lanes.iter().sum::<f32>() + rest.sum::<f32>()
        });
        match self.is_tanh {
            true => sums.map(f32::tanh).collect(),
            false => sums.collect(),
        }
    }
}

impl Pooling {
    /// Returns the length of the results for vectors of `hidden` elements.
    pub fn size(&self, hidden: usize) -> usize {
        let mut dense = self.stages.iter().rev().filter_map(|stage| match stage {
            PoolingStage::Dense(dense) => Some(dense.bias.len()),
            _ => None,
        });
        dense.next().unwrap_or(hidden)
    }

    /// Computes the result from the average of the hidden states.
    pub fn finish(&self, mut x: Vec<f32>) -> Vec<f32> {
        for stage in &self.stages {
            match stage {
                PoolingStage::Dense(dense) => x = dense.apply(&x),
                PoolingStage::Normalize => normalize(&mut x),
                PoolingStage::Sigmoid => x.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            }
        }
        x
    }

    /// Returns the text to put before a text with this purpose, or with the model's default one if
    /// it names none. `None` if the model has no such purpose.
    pub fn prompt(&self, purpose: Option<&str>) -> Option<&str> {
        match purpose.or(self.default_prompt.as_deref()) {
            Some(purpose) => self.prompts.get(purpose).map(String::as_str),
            None => Some(""),
        }
    }
}

/// Scales a vector to length 1; a zero vector is left as it is.
pub fn normalize(values: &mut [f32]) {
    let squares = values.iter().map(|&x| f64::from(x) * f64::from(x));
    let length = squares.sum::<f64>().sqrt();
    if length != 0.0 {
        for value in values {
            *value = (f64::from(*value) / length) as f32;
        }
    }
}

/// Reads the files of sentence-transformers in the folder at `path`, and the classifier of a
/// cross-encoder. Limits the length of texts to what the files say.
///
/// # Errors
/// Returns [`LoadError::Pooling`] if a file asks for something that is not supported,
/// [`LoadError::Weights`] if a file cannot be read or is invalid, and [`LoadError::Model`] if a tensor
/// has another shape.
pub(super) fn of_folder(
    path: &Path,
    config: &Value,
    source: &mut ModelSource,
) -> Result<Pooling, LoadError> {
    let mut reader = Reader {
        folder: path,
        hidden: source.config().hidden,
        pooling: Pooling::default(),
    };
    reader.length(source)?;
    reader.prompts()?;
    match reader.json("modules.json")? {
        Some(modules) => reader.modules(&modules)?,
        None => reader.classifier(config, source)?,
    }
    reader.pooling.require_one_score(path)?;
    Ok(reader.pooling)
}

/// Returns the number of the kind of pooling that the metadata of a GGUF file names, if it does.
pub(super) fn kind_of_gguf(file: &Gguf) -> Option<u64> {
    let name = file.metadata("general.architecture")?.as_str()?;
    let kind = file.metadata(&format!("{name}.pooling_type"))?;
    // What is no such number is refused like an unknown one.
    Some(kind.as_u64().unwrap_or(u64::MAX))
}

/// Returns the pooling of the kind with this number in the metadata of the GGUF file at `path`.
///
/// # Errors
/// Returns [`LoadError::Pooling`] if there is no such kind or a part of a classifier is missing,
/// and [`LoadError::Model`] if a tensor has another shape.
pub(super) fn of_gguf(
    kind: Option<u64>,
    path: &Path,
    source: &ModelSource,
) -> Result<Pooling, LoadError> {
    let mut pooling = Pooling::default();
    let problem = |problem: String| LoadError::Pooling {
        path: path.to_owned(),
        problem,
    };
    let has = |name| source.shape(name).is_some();
    let is_encoder = !source.config().is_causal();
    // Files of cross-encoders that have no settings of sentence-transformers say only this much.
    let kind = match kind {
        None if is_encoder && has("cls.output.weight") => {
            if !has("cls.weight") {
                return Err(problem(
                    "there is a classifier (cls.output.weight), but not the layer before it \
                     (cls.weight), which llama.cpp's converter may leave out; load the model's \
                     Hugging Face folder"
                        .to_owned(),
                ));
            }
            Some(4)
        }
        kind => kind,
    };
    pooling.tokens = match kind {
        // Embeddings of models without a kind are averages, as in sentence-transformers.
        None | Some(0 | 1) => PooledTokens::All,
        Some(2) => PooledTokens::First,
        Some(3) => PooledTokens::Last,
        // The scores of a causal model are those of two answers, which it can also generate.
        Some(4) if !is_encoder => {
            return match source.shape("cls.output.weight") {
                Some([2, _]) => Ok(pooling),
                found => {
                    let expected = "that of two answers for the pooling_type 4";
                    Err(problem(format!(
                        "the shape of cls.output.weight is {found:?}, but must be {expected}"
                    )))
                }
            };
        }
        Some(4) => {
            pooling.is_score = true;
            PooledTokens::First
        }
        Some(other) => {
            let expected = "from 0 to 4";
            return Err(problem(format!(
                "pooling_type is {other}, but must be {expected}"
            )));
        }
    };
    pooling.is_stated = kind.is_some_and(|kind| kind > 0);
    let stages = match pooling.is_score {
        true => [("cls", true), ("cls.output", false)],
        false => [("dense_2", false), ("dense_3", false)],
    };
    for (stage, is_tanh) in stages {
        pooling.add_dense(source, &format!("{stage}.weight"), is_tanh)?;
    }
    if pooling.is_score && pooling.stages.is_empty() {
        let missing = "there is no tensor cls.output.weight";
        return Err(problem(format!("pooling_type is 4, but {missing}")));
    }
    if pooling.is_score {
        // The file does not say so; it is the default of cross-encoders.
        pooling.stages.push(PoolingStage::Sigmoid);
    }
    pooling.require_one_score(path)?;
    Ok(pooling)
}

impl Pooling {
    /// Fails if the model gives several scores for a text.
    fn require_one_score(&self, path: &Path) -> Result<(), LoadError> {
        let labels = self.size(1);
        if !self.is_score || labels == 1 {
            return Ok(());
        }
        Err(LoadError::Pooling {
            path: path.to_owned(),
            problem: format!("the classifier has {labels} labels, but must have 1"),
        })
    }

    /// Adds a linear layer, if it is among the model's tensors.
    fn add_dense(
        &mut self,
        source: &ModelSource,
        weight: &str,
        is_tanh: bool,
    ) -> Result<(), LoadError> {
        let Some(&[outputs, _]) = source.shape(weight) else {
            return Ok(());
        };
        let inputs = self.size(source.config().hidden);
        let bias = format!("{}bias", weight.trim_end_matches("weight"));
        self.stages.push(PoolingStage::Dense(Dense {
            weight: source.floats(weight, &[outputs, inputs])?,
            bias: match source.shape(&bias) {
                Some(_) => source.floats(&bias, &[outputs])?,
                None => vec![0.0; outputs],
            },
            is_tanh,
        }));
        Ok(())
    }
}

/// Files that may limit the length of texts, in the order in which sentence-transformers looks for
/// them.
const LENGTH_FILES: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// Reads the files of a folder.
struct Reader<'a> {
    folder: &'a Path,
    hidden: usize,
    pooling: Pooling,
}

impl Reader<'_> {
    fn problem(&self, file: impl AsRef<Path>, problem: impl Into<String>) -> LoadError {
        LoadError::Pooling {
            path: self.folder.join(file),
            problem: problem.into(),
        }
    }

    /// Reads a JSON file, if there is one.
    fn json(&self, file: &str) -> Result<Option<Value>, LoadError> {
        let path = self.folder.join(file);
        match path.exists() {
            true => Ok(Some(read_json(&path, "JSON")?)),
            false => Ok(None),
        }
    }

    /// Reads the settings of a module, which are in a folder of its own.
    fn module(&self, module: &Value) -> Result<(String, Value), LoadError> {
        let path = module["path"].as_str().unwrap_or_default();
        let is_name = |part: Component<'_>| matches!(part, Component::Normal(_));
        if path.is_empty() || !Path::new(path).components().all(is_name) {
            let problem =
                format!("the path {path:?} of a module must be a folder within the model's");
            return Err(self.problem("modules.json", problem));
        }
        let file = format!("{path}/config.json");
        match self.json(&file)? {
            Some(config) => Ok((file, config)),
            None => Err(self.problem(&file, "the file is missing, but its module needs it")),
        }
    }

    /// Reads the longest text that the model was trained for.
    fn length(&self, source: &mut ModelSource) -> Result<(), LoadError> {
        let is_there = |name: &&str| self.folder.join(name).exists();
        let Some(file) = LENGTH_FILES.into_iter().find(is_there) else {
            return Ok(());
        };
        let config: Value = read_json(&self.folder.join(file), "JSON")?;
        if config["do_lower_case"] == Value::Bool(true) {
            let problem = "do_lower_case is true, but must be false: the tokenizer must do it";
            return Err(self.problem(file, problem));
        }
        match config.get("max_seq_length") {
            None | Some(Value::Null) => Ok(()),
            Some(length) => match length.as_u64().filter(|&length| length > 0) {
                Some(length) => {
                    source.limit_context(usize::try_from(length).unwrap_or(usize::MAX));
                    Ok(())
                }
                None => {
                    let problem = format!("max_seq_length is {length}, but must be at least 1");
                    Err(self.problem(file, problem))
                }
            },
        }
    }

    /// Reads the texts that are put before other texts.
    fn prompts(&mut self) -> Result<(), LoadError> {
        let file = "config_sentence_transformers.json";
        let Some(config) = self.json(file)? else {
            return Ok(());
        };
        if let Some(function) = config
            .get("similarity_fn_name")
            .filter(|value| !value.is_null())
            && !matches!(function.as_str(), Some("cosine" | "dot"))
        {
            let problem = format!("similarity_fn_name is {function}, but must be cosine or dot");
            return Err(self.problem(file, problem));
        }
        if let Some(prompts) = config.get("prompts").filter(|value| !value.is_null()) {
            let Some(prompts) = prompts.as_object() else {
                let problem = format!("prompts is {prompts}, but must be texts by their names");
                return Err(self.problem(file, problem));
            };
            for (name, text) in prompts {
                let Some(text) = text.as_str() else {
                    let problem = format!("the prompt {name:?} is {text}, but must be a text");
                    return Err(self.problem(file, problem));
                };
                self.pooling.prompts.insert(name.clone(), text.to_owned());
            }
        }
        let default = config.get("default_prompt_name");
        if let Some(name) = default.filter(|value| !value.is_null()) {
            let known = name
                .as_str()
                .filter(|name| self.pooling.prompts.contains_key(*name));
            let Some(name) = known else {
                let problem =
                    format!("default_prompt_name is {name}, but must be that of a prompt");
                return Err(self.problem(file, problem));
            };
            self.pooling.default_prompt = Some(name.to_owned());
        }
        Ok(())
    }

    /// Reads the modules: the model itself, the pooling, and stages after it.
    fn modules(&mut self, modules: &Value) -> Result<(), LoadError> {
        let file = "modules.json";
        let modules = modules.as_array().map(Vec::as_slice).unwrap_or_default();
        let kinds: Vec<&str> = modules.iter().map(kind_of).collect();
        let (["Transformer", "Pooling", ..], [_, pooling, stages @ ..]) = (&kinds[..], modules)
        else {
            let found = kinds.join(", ");
            let problem = format!(
                "the modules are {found:?}, but must begin with Transformer and Pooling of \
                 sentence_transformers"
            );
            return Err(self.problem(file, problem));
        };
        self.pooling.is_stated = true;
        self.pooling_module(pooling)?;
        for module in stages {
            match kind_of(module) {
                "Dense" => self.dense_module(module)?,
                "Normalize" => self.pooling.stages.push(PoolingStage::Normalize),
                _ => {
                    let found = &module["type"];
                    let problem = format!(
                        "the module {found} is not supported after Pooling; supported are Dense \
                         and Normalize of sentence_transformers"
                    );
                    return Err(self.problem(file, problem));
                }
            }
        }
        Ok(())
    }

    fn pooling_module(&mut self, module: &Value) -> Result<(), LoadError> {
        let (file, config) = self.module(module)?;
        let listed = match &config["pooling_mode"] {
            Value::Null => None,
            Value::Array(modes) => Some(modes.clone()),
            mode => Some(vec![mode.clone()]),
        };
        let modes: Vec<String> = match listed {
            Some(modes) => {
                let text = |mode: Value| mode.as_str().map_or(mode.to_string(), str::to_owned);
                modes.into_iter().map(text).collect()
            }
            None => {
                let switches = config.as_object().into_iter().flatten();
                let on = switches.filter(|(_, value)| **value == Value::Bool(true));
                let named = on.filter_map(|(key, _)| key.strip_prefix("pooling_mode_"));
                named.map(str::to_owned).collect()
            }
        };
        self.pooling.tokens = match modes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            // If no mode is named, sentence-transformers averages as well.
            [] | ["mean" | "mean_tokens"] => PooledTokens::All,
            ["cls" | "cls_token"] => PooledTokens::First,
            ["lasttoken"] => PooledTokens::Last,
            _ => {
                let problem = format!(
                    "the pooling mode is {}, but must be mean, cls or lasttoken",
                    modes.join(" with ")
                );
                return Err(self.problem(&file, problem));
            }
        };
        if config["include_prompt"] == Value::Bool(false) {
            let problem = "include_prompt is false, but must be true";
            return Err(self.problem(&file, problem));
        }
        Ok(())
    }

    fn dense_module(&mut self, module: &Value) -> Result<(), LoadError> {
        let (file, config) = self.module(module)?;
        let activation = config["activation_function"].as_str().unwrap_or("Tanh");
        let is_tanh = match activation.rsplit('.').next() {
            Some("Tanh") => true,
            Some("Identity") => false,
            _ => {
                let problem =
                    format!("activation_function is {activation:?}, but must be Identity or Tanh");
                return Err(self.problem(&file, problem));
            }
        };
        for key in ["module_input_name", "module_output_name"] {
            let name = config.get(key).filter(|value| !value.is_null());
            if let Some(name) = name.filter(|name| *name != "sentence_embedding") {
                let problem = format!("{key} is {name}, but must be sentence_embedding");
                return Err(self.problem(&file, problem));
            }
        }
        let inputs = self.pooling.size(self.hidden);
        let size = |key: &str| {
            let found = config[key]
                .as_u64()
                .and_then(|size| usize::try_from(size).ok());
            found.ok_or_else(|| {
                let problem = format!("{key} is {}, but must be a whole number", config[key]);
                self.problem(&file, problem)
            })
        };
        let outputs = size("out_features")?;
        if size("in_features")? != inputs {
            let found = &config["in_features"];
            let problem = format!("in_features is {found}, but must be {inputs}");
            return Err(self.problem(&file, problem));
        }
        let weights = self.folder.join(&file).with_file_name("model.safetensors");
        let weight = read_tensor(&weights, "linear.weight", &[outputs, inputs])?;
        let bias = match config["bias"] == Value::Bool(false) {
            true => vec![0.0; outputs],
            false => read_tensor(&weights, "linear.bias", &[outputs])?,
        };
        self.pooling.stages.push(PoolingStage::Dense(Dense {
            weight,
            bias,
            is_tanh,
        }));
        Ok(())
    }

    /// Reads the classifier of a model of sequences, if it is one.
    fn classifier(&mut self, config: &Value, source: &ModelSource) -> Result<(), LoadError> {
        let file = "config.json";
        let named = config["architectures"][0].as_str().unwrap_or_default();
        let task = named.split_once("For").map(|(_, task)| task);
        match task.filter(|_| !source.config().is_causal()) {
            None | Some("MaskedLM" | "PreTraining" | "CausalLM") => return Ok(()),
            Some("SequenceClassification") => {}
            Some(task) => {
                let problem = format!(
                    "architectures is {named:?}, but {task} is not supported for encoders; \
                     supported is SequenceClassification"
                );
                return Err(self.problem(file, problem));
            }
        }
        let pooler = format!("{}pooler.dense.weight", source.prefix());
        let stages = match source.shape("classifier.dense.weight") {
            Some(_) => ["classifier.dense.weight", "classifier.out_proj.weight"],
            None => [&pooler, "classifier.weight"],
        };
        for (name, is_tanh) in stages.into_iter().zip([true, false]) {
            self.pooling.add_dense(source, name, is_tanh)?;
        }
        if self.pooling.stages.len() != 2 {
            let problem = format!(
                "architectures is {named:?}, but the tensors {} and {} of its classifier are missing",
                stages[0], stages[1]
            );
            return Err(self.problem(file, problem));
        }
        self.pooling.is_score = true;
        self.pooling.tokens = PooledTokens::First;
        let own = &config["sentence_transformers"]["activation_fn"];
        let older = &config["sbert_ce_default_activation_function"];
        let activation = own.as_str().or(older.as_str());
        match activation.and_then(|path| path.rsplit('.').next()) {
            Some("Identity") => {}
            // The default of a classifier with one label. Others are refused.
            Some("Sigmoid") | None => self.pooling.stages.push(PoolingStage::Sigmoid),
            Some(other) => {
                let problem = format!("the activation is {other}, but must be Identity or Sigmoid");
                return Err(self.problem(file, problem));
            }
        }
        Ok(())
    }
}

/// Returns the last part of the name of a module's class; empty unless it is a class of
/// sentence-transformers.
fn kind_of(module: &Value) -> &str {
    let class = module["type"].as_str().unwrap_or_default();
    match class.starts_with("sentence_transformers.") {
        true => class.rsplit('.').next().unwrap_or_default(),
        false => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(weight: &[f32], bias: &[f32], is_tanh: bool) -> PoolingStage {
        PoolingStage::Dense(Dense {
            weight: weight.to_vec(),
            bias: bias.to_vec(),
            is_tanh,
        })
    }

    #[test]
    fn stages_are_computed_in_order() {
        let pooling = Pooling {
            stages: vec![
                dense(&[1.0, 2.0, 0.0, 1.0, 1.0, 1.0], &[0.0, 0.5, -1.0], false),
                dense(&[0.0, 0.0, 1.0, 1.0, 0.0, 0.0], &[0.0, 0.0], true),
                PoolingStage::Normalize,
            ],
            ..Pooling::default()
        };
        assert_eq!(pooling.size(2), 2);
        let found = pooling.finish(vec![0.25, 0.5]);
        let (a, b) = ((-0.25f32).tanh(), 1.25f32.tanh());
        let length = a.hypot(b);
        assert!((found[0] - a / length).abs() < 1e-6 && (found[1] - b / length).abs() < 1e-6);
        assert_eq!(Pooling::default().finish(vec![3.0, 4.0]), [3.0, 4.0]);
    }

    #[test]
    fn long_rows_are_summed_to_their_end() {
        let weight: Vec<f32> = (0..19).map(|i| i as f32).collect();
        let stage = dense(&weight, &[0.5], false);
        let pooling = Pooling {
            stages: vec![stage],
            ..Pooling::default()
        };
        assert_eq!(pooling.finish(vec![1.0; 19]), [171.5]);
    }

    #[test]
    fn an_unknown_purpose_is_no_prompt() {
        let prompts = [("query".to_owned(), "Q: ".to_owned())];
        let mut pooling = Pooling {
            prompts: prompts.into(),
            ..Pooling::default()
        };
        assert_eq!(pooling.prompt(None), Some(""));
        assert_eq!(pooling.prompt(Some("query")), Some("Q: "));
        assert_eq!(pooling.prompt(Some("passage")), None);
        pooling.default_prompt = Some("query".to_owned());
        assert_eq!(pooling.prompt(None), Some("Q: "));
    }
}
