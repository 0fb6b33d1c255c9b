//! Reads a model's hyperparameters from a Hugging Face `config.json`, as transformers does.
//!
//! Missing settings have the defaults of the architecture's configuration class. A setting that
//! would change the results but is not supported is refused, and the error names its key.

mod class;
mod rope;
mod settings;
#[cfg(test)]
mod tests;
mod windows;

pub(super) use class::{ConfigClass, RopeRules};
pub(super) use settings::Settings;

use super::architectures::Architecture;
use super::hyperparameters::{Hyperparameters, Variations};
use super::key_names::{self, KeyNames, Keys};
use super::layer::NormKind;
use super::{Biases, ModelConfig, ModelError};
use crate::device::{Activation, HeadShape, Values};
use serde_json::Value;
use std::collections::HashSet;

/// A `config.json` together with the architecture that it names.
pub(super) struct Config<'a> {
    root: Settings<'a>,
    /// Settings of the text model. Models with vision keep them in an object of their own,
    /// `text_config`.
    pub(super) settings: Settings<'a>,
    architecture: &'static Architecture,
}

/// Reads the configuration of the model that a `config.json` describes.
pub(super) fn read(config: &Value) -> Result<ModelConfig, ModelError> {
    let config = Config::new(config)?;
    (config.architecture.read_config)(&config)?.into_model(config.architecture)
}

/// Returns whether the output projection is the embedding, unless the file has one of its own.
pub(super) fn ties_embeddings(config: &Value) -> Result<bool, ModelError> {
    let config = Config::new(config)?;
    let key = "tie_word_embeddings";
    for settings in [config.root, config.settings] {
        if let Some(tied) = settings.flag(key)? {
            return Ok(tied);
        }
    }
    Ok(config.class().ties_embeddings)
}

impl<'a> Config<'a> {
    fn new(config: &'a Value) -> Result<Self, ModelError> {
        let root = Settings::new(config);
        let key = "model_type";
        let name = root.text(key)?.ok_or_else(|| root.missing(key))?;
        let settings = root.part("text_config").unwrap_or(root);
        // The name of a model with vision may stand for several text models, so the name of the
        // text model takes precedence.
        let own = settings.text(key)?.map(Architecture::from_model_type);
        let architecture = match own {
            Some(Ok(architecture)) => architecture,
            _ => Architecture::from_model_type(name)?,
        };
        Ok(Self {
            root,
            settings,
            architecture,
        })
    }

    fn class(&self) -> &'static ConfigClass {
        &self.architecture.class
    }

    /// Reads the hyperparameters that all architectures have in common. The result has no windows,
    /// experts, caps or biases: an architecture that has them reads them itself.
    pub(super) fn hyperparameters(&self) -> Result<Hyperparameters, ModelError> {
        let (settings, class) = (self.settings, self.class());
        self.check_activation()?;
        let (layers, hidden, heads) = (self.layers()?, self.hidden()?, self.heads()?);
        let trained_context = self.trained_context()?;
        let (rope, sliding_rope) = self.ropes()?;
        let query_scale = match class.query_scale {
            Some(default) => settings.number_or("query_pre_attn_scalar", Some(default))?,
            None => None,
        };
        Ok(Hyperparameters {
            layers,
            hidden,
            intermediate: self.intermediate()?,
            activation: class.activation,
            heads,
            vocabulary: settings.size_or("vocab_size", class.vocabulary)?,
            context: rope.extended_context(trained_context),
            norm_epsilon: settings
                .number_or("rms_norm_eps", Some(class.norm_epsilon))?
                .ok_or_else(|| settings.refused("rms_norm_eps", "null", "a number"))?,
            norm: NormKind::Rms,
            embedding_scale: 1.0,
            attention_scale: 1.0 / query_scale.unwrap_or(heads.head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            logit_scale: 1.0,
            latent: None,
            unrotated: HashSet::new(),
            has_qk_norm: false,
            query_scale: None,
            rope,
            sliding_rope,
            is_chunked: false,
            is_causal: self.is_causal()?,
            windows: self.same_windows(None)?,
            experts: None,
            dense_layers: HashSet::new(),
            recurrent: None,
            recurrent_layers: HashSet::new(),
            without_mixer: HashSet::new(),
            without_feed_forward: HashSet::new(),
            variations: Variations::default(),
            biases: Biases::NONE,
            prediction_layers: 0,
            end_tokens: self.end_tokens()?,
            names: self.names(),
        })
    }

    /// Returns whether tokens attend to no tokens after them.
    fn is_causal(&self) -> Result<bool, ModelError> {
        let key = "use_bidirectional_attention";
        let Some(value) = self.settings.get(key) else {
            return Ok(true);
        };
        // With "vision", only the tokens of images attend to each other in both directions.
        match (value.as_bool(), value.as_str()) {
            (Some(false), _) | (_, Some("vision")) => Ok(true),
            (Some(true), _) if self.class().may_encode => Ok(false),
            _ => {
                let others = if self.class().may_encode {
                    ", true"
                } else {
                    ""
                };
                let expected = format!("false{others} or vision");
                Err(self.settings.refused(key, value, expected))
            }
        }
    }

    /// Returns the keys of the hyperparameters in this file, for error messages.
    fn names(&self) -> KeyNames {
        let settings = self.settings;
        let names = ["num_local_experts", "n_routed_experts"];
        let named = names.into_iter().find(|key| settings.get(key).is_some());
        let experts = named.unwrap_or(key_names::HUGGINGFACE.experts);
        KeyNames {
            keys: Keys {
                experts,
                ..key_names::HUGGINGFACE
            },
            place: settings.place(),
            rope_place: self.rope_parameters().unwrap_or(settings).place(),
        }
    }

    /// Returns the number of layers.
    pub(super) fn layers(&self) -> Result<usize, ModelError> {
        let default = self.class().layers;
        self.settings.size_or("num_hidden_layers", default)
    }

    /// Returns the width of the dense feed-forward parts, or the first width if the class allows a
    /// list with one for each layer.
    fn intermediate(&self) -> Result<usize, ModelError> {
        let (settings, key) = (self.settings, "intermediate_size");
        let first = match settings.get(key) {
            Some(Value::Array(all)) if self.class().lists_widths => all.first(),
            _ => return settings.size_or(key, self.class().intermediate),
        };
        let first = first.and_then(Value::as_u64);
        let first = first.and_then(|first| usize::try_from(first).ok());
        first.ok_or_else(|| settings.refused(key, "a list", "a list of whole numbers"))
    }

    fn hidden(&self) -> Result<usize, ModelError> {
        self.settings.size_or("hidden_size", self.class().hidden)
    }

    /// Returns the context in tokens that the model was trained on, including training after an
    /// extension.
    fn trained_context(&self) -> Result<usize, ModelError> {
        let default = self.class().context;
        self.settings.size_or("max_position_embeddings", default)
    }

    /// Returns the shape of the attention heads.
    pub(super) fn heads(&self) -> Result<HeadShape, ModelError> {
        let (settings, class) = (self.settings, self.class());
        let q_heads = settings.size_or("num_attention_heads", class.q_heads)?;
        let hidden = self.hidden()?;
        let split = hidden.checked_div(q_heads).unwrap_or(0);
        let key = "head_dim";
        let head_dim = match (settings.size(key)?, class.head_dim) {
            (Some(head_dim), _) => head_dim,
            (None, None) if split == 0 && q_heads > 0 => {
                let expected = format!("at least the number of attention heads, {q_heads}");
                return Err(settings.refused("hidden_size", hidden, expected));
            }
            (None, None) => split,
            (None, Some(_)) if settings.says(key) => {
                return Err(settings.refused(key, "null", "a whole number"));
            }
            (None, Some(head_dim)) => head_dim,
        };
        let key = "num_key_value_heads";
        let kv_heads = match settings.size(key)? {
            Some(kv_heads) => kv_heads,
            // A null means as many key-value heads as query heads.
            None if settings.says(key) => q_heads,
            None => class.kv_heads.unwrap_or(q_heads),
        };
        Ok(HeadShape {
            q_heads,
            kv_heads,
            head_dim,
            values: Values::BesideKeys,
        })
    }

    /// Refuses a non-linearity other than the one of the architecture.
    fn check_activation(&self) -> Result<(), ModelError> {
        let activation = self.class().activation;
        let expected: &[&str] = match activation {
            Activation::Silu | Activation::ClampedSwiGlu { .. } => &["silu", "swish"],
            Activation::SquaredRelu => &["relu2"],
            Activation::Gelu => &["gelu"],
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_fast", "gelu_new"],
        };
        let key = if self.settings.get("hidden_activation").is_some() {
            "hidden_activation"
        } else {
            "hidden_act"
        };
        match self.settings.text(key)? {
            // In early Gemma checkpoints, "gelu" in `hidden_act` means the tanh approximation.
            Some("gelu") if key == "hidden_act" && activation == Activation::GeluTanh => Ok(()),
            Some(found) if !expected.contains(&found) => {
                Err(self.settings.refused(key, found, expected.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// Returns the number of experts per layer, or `default` if the file does not have it.
    pub(super) fn expert_count(&self, default: usize) -> Result<usize, ModelError> {
        match self.settings.size("num_local_experts")? {
            Some(count) => Ok(count),
            None => self.settings.size_or("num_experts", default),
        }
    }

    /// Returns biases on all projections of the attention if `attention_bias` is true, else none.
    pub(super) fn attention_biases(&self) -> Result<Biases, ModelError> {
        let attention = self.attention_bias(false)?;
        Ok(Biases {
            qkv: attention,
            attention_out: attention,
            ..Biases::NONE
        })
    }

    /// Reads `attention_bias`, or returns `default` if it is missing. The result is never `None`.
    pub(super) fn attention_bias(&self, default: bool) -> Result<Option<bool>, ModelError> {
        let said = self.settings.flag("attention_bias")?;
        Ok(Some(said.unwrap_or(default)))
    }

    fn end_tokens(&self) -> Result<Vec<u32>, ModelError> {
        // A negative id means no token.
        let read = |value: &Value| -> Option<Vec<u32>> {
            let ids = match value {
                Value::Array(ids) => ids.as_slice(),
                single => std::slice::from_ref(single),
            };
            let ids: Option<Vec<i64>> = ids.iter().map(Value::as_i64).collect();
            let ids = ids?.into_iter().filter(|&id| id >= 0);
            ids.map(|id| u32::try_from(id).ok()).collect()
        };
        let key = "eos_token_id";
        let expected = "a token id or a list of them";
        match self.root.optional(key, expected, read)? {
            Some(ids) => Ok(ids),
            None => {
                let own = self.settings.optional(key, expected, read)?;
                Ok(own.unwrap_or_default())
            }
        }
    }
}
