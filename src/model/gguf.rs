//! Reads a model's hyperparameters from GGUF metadata.

mod rope;

use super::architectures::Architecture;
use super::hyperparameters::{Hyperparameters, MOST_LAYERS, Variations};
use super::key_names::{self, KeyNames};
use super::layer::{Experts, NormKind};
use super::{Biases, ModelConfig, ModelError};
use crate::device::{HeadShape, RouterScore, RoutingSpec, SigmoidRouting, Values};
use crate::weights::WeightSource;
use crate::weights::gguf::{Gguf, Value};
use std::collections::HashSet;

/// A GGUF file's metadata, together with the architecture that it names. The keys of the
/// architecture's settings begin with that name.
pub(super) struct Metadata<'a> {
    file: &'a Gguf,
    name: &'a str,
    architecture: &'static Architecture,
    /// Keys that the architecture reads itself, without the architecture's name.
    own: &'static [&'static str],
}

/// Reads the configuration of the model that a GGUF file describes.
pub(super) fn read(file: &Gguf) -> Result<ModelConfig, ModelError> {
    let key = "general.architecture";
    let name = file.metadata(key).and_then(Value::as_str);
    let name = name.ok_or_else(|| ModelError::MissingSetting {
        key: key.to_owned(),
    })?;
    let (architecture, format) = Architecture::from_gguf_name(name)?;
    let metadata = Metadata {
        file,
        name,
        architecture,
        own: format.settings,
    };
    metadata.refuse_unknown(format.settings)?;
    let numbers = (format.read)(&metadata)?;
    if numbers.experts.is_none() {
        metadata.refuse_experts()?;
    }
    numbers.into_model(architecture)
}

impl<'a> Metadata<'a> {
    /// Returns the name that the file has for the architecture.
    pub(super) fn name(&self) -> &'a str {
        self.name
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.file.metadata(&self.key(key)) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let found = format!("of type {}", value.type_name());
                Err(self.refused(key, found, expected))
            }
        }
    }

    /// Returns the error for a setting whose value is refused.
    pub(super) fn refused(
        &self,
        key: &str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> ModelError {
        ModelError::setting(self.key(key), value, expected)
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.optional(key, "a whole number", |value| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
        })
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    /// Reads a number that some files store once and others for each layer. It must be the same for
    /// all layers, unless the architecture reads the key itself; then the first one is returned.
    fn uniform_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.sizes(key)? {
            Some(all) => self.uniform(key, &all),
            None => Ok(None),
        }
    }

    /// Returns the number that all entries of `all` have in common, or the first one if the
    /// architecture reads the key itself.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] if there are no entries, or if they differ although the
    /// architecture does not read the key itself.
    fn uniform(&self, key: &str, all: &[usize]) -> Result<Option<usize>, ModelError> {
        match all.first() {
            Some(&first) if self.own.contains(&key) || all.iter().all(|&value| value == first) => {
                Ok(Some(first))
            }
            _ => {
                let expected = "the same number for every layer";
                Err(self.refused(key, format!("{all:?}"), expected))
            }
        }
    }

    /// Reads a number that some files store once and others for each layer, as a list.
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, ModelError> {
        self.optional(key, "a whole number", |value| {
            let all = match value {
                Value::Array(_) => value.as_u64s()?,
                single => vec![single.as_u64()?],
            };
            let all = all.into_iter().map(|value| usize::try_from(value).ok());
            all.collect::<Option<Vec<_>>>()
        })
    }

    /// Like [`Metadata::size_of_each`], for a number that the file must have.
    pub(super) fn required_size_of_each(
        &self,
        key: &str,
        layers: usize,
    ) -> Result<Vec<usize>, ModelError> {
        let sizes = self.size_of_each(key, layers)?;
        sizes.ok_or_else(|| self.missing(key))
    }

    /// Reads a number that some files store once for all layers and others for each layer. The
    /// result has one entry for each of `layers` layers.
    pub(super) fn size_of_each(
        &self,
        key: &str,
        layers: usize,
    ) -> Result<Option<Vec<usize>>, ModelError> {
        match self.sizes(key)? {
            None => Ok(None),
            Some(all) if all.len() == layers => Ok(Some(all)),
            Some(all) if all.len() == 1 => Ok(Some(vec![all[0]; layers])),
            Some(all) => {
                let found = format!("a list of {} numbers", all.len());
                let expected = format!("one number, or one for each of the {layers} layers");
                Err(self.refused(key, found, expected))
            }
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.optional(key, "a number", Value::as_f32)
    }

    /// Reads a number, which must be positive. Returns `None` if it is missing or 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let number = self.number(key)?.filter(|&number| number != 0.0);
        match number {
            Some(number) if !(number.is_finite() && number > 0.0) => {
                Err(self.refused(key, number, "a positive number"))
            }
            number => Ok(number),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    /// Reads a list of flags.
    pub(super) fn flags(&self, key: &str) -> Result<Option<Vec<bool>>, ModelError> {
        self.optional(key, "a list of true and false", |value| {
            value.as_bools().map(<[bool]>::to_vec)
        })
    }

    /// Reads a list of numbers.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>, ModelError> {
        self.optional(key, "a list of numbers", |value| {
            value.as_f32s().map(<[f32]>::to_vec)
        })
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a string", Value::as_str)
    }

    fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingSetting { key: self.key(key) }
    }

    /// Reads the hyperparameters that all architectures have in common. The result has no experts:
    /// an architecture that has experts reads them itself.
    pub(super) fn hyperparameters(&self) -> Result<Hyperparameters, ModelError> {
        let hidden = self.required_size("embedding_length")?;
        self.hyperparameters_of(self.heads(hidden)?)
    }

    /// Like [`Metadata::hyperparameters`], but with these heads instead of those of the metadata.
    pub(super) fn hyperparameters_of(
        &self,
        heads: HeadShape,
    ) -> Result<Hyperparameters, ModelError> {
        let layers = self.layers()?;
        let hidden = self.required_size("embedding_length")?;
        let context = self.required_size("context_length")?;
        let intermediate = match self.uniform_size("feed_forward_length")? {
            Some(intermediate) => intermediate,
            // Models without dense layers may leave it out.
            None if self.size("expert_count")?.unwrap_or(0) > 0 => {
                self.size("expert_feed_forward_length")?.unwrap_or(0)
            }
            None => 0,
        };
        let rope = self.rope(heads.head_dim, context)?;
        Ok(Hyperparameters {
            layers,
            hidden,
            intermediate,
            activation: self.architecture.class.activation,
            heads,
            vocabulary: self.vocabulary()?,
            context: rope.extended_context(context),
            norm_epsilon: self
                .number("attention.layer_norm_rms_epsilon")?
                .unwrap_or(1e-6),
            norm: NormKind::Rms,
            embedding_scale: 1.0,
            attention_scale: 1.0 / (heads.head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: self.number("final_logit_softcapping")?,
            logit_scale: 1.0,
            latent: None,
            unrotated: HashSet::new(),
            has_qk_norm: false,
            query_scale: None,
            sliding_rope: rope.clone(),
            rope,
            is_chunked: false,
            is_causal: true,
            windows: self.windows(self.window(None)?, 0)?,
            experts: None,
            dense_layers: HashSet::new(),
            recurrent: None,
            recurrent_layers: self.layers_without_heads()?,
            without_mixer: HashSet::new(),
            without_feed_forward: HashSet::new(),
            variations: Variations::default(),
            biases: Biases::AS_STORED,
            prediction_layers: 0,
            end_tokens: Vec::new(),
            names: KeyNames {
                keys: key_names::GGUF,
                place: self.key(""),
                rope_place: self.key("rope.scaling."),
            },
        })
    }

    fn layers(&self) -> Result<usize, ModelError> {
        self.required_size("block_count")
    }

    fn heads(&self, hidden: usize) -> Result<HeadShape, ModelError> {
        let key = "attention.head_count";
        let q_heads = self.uniform_size(key)?.ok_or_else(|| self.missing(key))?;
        let head_dim = match self.size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if hidden < q_heads => {
                let expected = format!("at least {q_heads}, the number of heads");
                return Err(self.refused("embedding_length", hidden, expected));
            }
            None => hidden.checked_div(q_heads).unwrap_or(0),
        };
        let key = "attention.value_length";
        if let Some(value_dim) = self.size(key)?
            && value_dim != head_dim
        {
            let expected = format!("{head_dim}, the key length");
            return Err(self.refused(key, value_dim, expected));
        }
        let kv_heads = self.kv_heads()?;
        Ok(HeadShape {
            q_heads,
            kv_heads: kv_heads.unwrap_or(q_heads),
            head_dim,
            values: Values::BesideKeys,
        })
    }

    /// Reads the number of key-value heads of the layers that have any. It must be the same in all
    /// of them, unless the architecture reads the key itself.
    fn kv_heads(&self) -> Result<Option<usize>, ModelError> {
        let Some(mut all) = self.sizes("attention.head_count_kv")? else {
            return Ok(None);
        };
        if all.iter().any(|&heads| heads > 0) {
            all.retain(|&heads| heads > 0);
        }
        self.uniform("attention.head_count_kv", &all)
    }

    /// Returns the layers that have no attention, which the file gives 0 key-value heads. The
    /// result is empty if all layers have 0, or if the key is missing.
    fn layers_without_heads(&self) -> Result<HashSet<usize>, ModelError> {
        let heads = self.sizes("attention.head_count_kv")?.unwrap_or_default();
        if heads.iter().all(|&heads| heads == 0) {
            return Ok(HashSet::new());
        }
        let layers = heads.iter().enumerate();
        let without = layers.filter(|(_, heads)| **heads == 0);
        Ok(without.map(|(layer, _)| layer).collect())
    }

    fn vocabulary(&self) -> Result<usize, ModelError> {
        // The shape of the embedding counts more than `vocab_size`: some files pad the embedding
        // beyond the tokenizer's vocabulary.
        let name = "token_embd.weight";
        if let Some(embedding) = self.file.tensor(name) {
            return match *embedding.shape {
                [rows, _] => Ok(rows),
                _ => Err(ModelError::WrongShape {
                    name: name.to_owned(),
                    found: embedding.shape.to_vec(),
                    expected: vec![0, self.required_size("embedding_length")?],
                }),
            };
        }
        let size = self.size("vocab_size")?;
        size.ok_or_else(|| ModelError::MissingTensor {
            name: name.to_owned(),
        })
    }

    /// Reads the sliding window; `default` if it is missing. A window of 0 means no window.
    pub(super) fn window(&self, default: Option<usize>) -> Result<Option<usize>, ModelError> {
        Ok(match self.size("attention.sliding_window")? {
            None => default,
            window => window.filter(|&window| window > 0),
        })
    }

    /// Returns the window of each layer. The file may list the layers that have `window`, or store
    /// a period: then all layers but the last of each period have it. If the file has neither, the
    /// period is `period`. A period of 0 gives the window to all layers.
    pub(super) fn windows(
        &self,
        window: Option<usize>,
        period: usize,
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let key = "attention.sliding_window_pattern";
        let expected = "a number or a list of true and false";
        let pattern = self.optional(key, expected, |value| match value {
            Value::Array(_) => value.as_bools().map(|list| Pattern::List(list.to_vec())),
            _ => Some(Pattern::Period(usize::try_from(value.as_u64()?).ok()?)),
        })?;
        let of = |slides: bool| window.filter(|_| slides);
        let period = match pattern {
            Some(Pattern::List(list)) => return Ok(list.into_iter().map(of).collect()),
            Some(Pattern::Period(period)) => period,
            None => period,
        };
        let slides = |layer: usize| period == 0 || layer % period < period - 1;
        let layers = 0..self.layers()?.min(MOST_LAYERS);
        Ok(layers.map(|layer| of(slides(layer))).collect())
    }

    /// Reads the mixture of experts, if there is one. The router's scores go through a softmax, and
    /// the weights of the chosen experts are scaled to sum to 1.
    pub(super) fn experts(&self) -> Result<Option<Experts>, ModelError> {
        let Some(count) = self.size("expert_count")?.filter(|&count| count > 0) else {
            return Ok(None);
        };
        let width = match self.size("expert_feed_forward_length")? {
            Some(width) => width,
            None => {
                let key = "feed_forward_length";
                match self.uniform_size(key)?.ok_or_else(|| self.missing(key))? {
                    0 => {
                        let expected = "above 0 without expert_feed_forward_length";
                        return Err(self.refused(key, 0, expected));
                    }
                    width => width,
                }
            }
        };
        Ok(Some(Experts {
            count,
            width,
            routing: RoutingSpec {
                top_k: self.required_size("expert_used_count")?,
                score: RouterScore::Softmax,
                normalize: true,
                activation: self.architecture.class.activation,
            },
            has_corrections: false,
            shared: None,
            has_shared_gate: false,
            has_own_norms: false,
        }))
    }

    /// Refuses a file whose `expert_weights_norm` is other than what the architecture computes.
    pub(super) fn require_weights_norm(&self, normalize: bool) -> Result<(), ModelError> {
        let key = "expert_weights_norm";
        match self.flag(key)?.filter(|&stated| stated != normalize) {
            Some(stated) => Err(self.refused(key, stated, normalize.to_string())),
            None => Ok(()),
        }
    }

    /// Reads the mixture of experts, if there is one, of an architecture whose expert weights are
    /// sigmoids.
    pub(super) fn sigmoid_experts(&self) -> Result<Option<Experts>, ModelError> {
        let Some(experts) = self.experts()? else {
            return Ok(None);
        };
        let key = "expert_gating_func";
        if let Some(function) = self.size(key)?.filter(|&function| function != SIGMOID) {
            return Err(self.refused(key, function, "2, the sigmoid"));
        }
        let shared = self.size("expert_shared_count")?.unwrap_or(0);
        let size_or_1 = |key| Ok::<_, ModelError>(self.size(key)?.unwrap_or(1).max(1));
        Ok(Some(Experts {
            routing: RoutingSpec {
                score: RouterScore::Sigmoid(SigmoidRouting {
                    scale: self.positive("expert_weights_scale")?.unwrap_or(1.0),
                    groups: size_or_1("expert_group_count")?,
                    top_groups: size_or_1("expert_group_used_count")?,
                    scales_input: false,
                }),
                normalize: self.flag("expert_weights_norm")?.unwrap_or(false),
                ..experts.routing
            },
            has_corrections: true,
            shared: (shared > 0).then_some(experts.width.saturating_mul(shared)),
            ..experts
        }))
    }

    /// Returns the number of rows of a matrix, if the file has it.
    pub(super) fn rows(&self, name: &str) -> Option<usize> {
        match *self.file.tensor(name)?.shape {
            [rows, _] => Some(rows),
            _ => None,
        }
    }

    /// Returns whether the file has a tensor of this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// Refuses a file with experts whose architecture has none.
    fn refuse_experts(&self) -> Result<(), ModelError> {
        let key = "expert_count";
        match self.size(key)?.filter(|&count| count > 0) {
            Some(count) => {
                let expected = format!("0 for the architecture '{}'", self.name);
                Err(self.refused(key, count, expected))
            }
            None => Ok(()),
        }
    }

    /// Refuses settings that would change the results but that the architecture does not read.
    /// `own` are the keys that it reads.
    fn refuse_unknown(&self, own: &[&str]) -> Result<(), ModelError> {
        for (key, neutral) in [
            ("attention.clamp_kqv", 0.0),
            ("attention.max_alibi_bias", 0.0),
            ("attention.scale", 0.0),
            ("attention.temperature_scale", 0.0),
            ("embedding_scale", 1.0),
            ("expert_gating_func", 1.0),
            ("expert_group_count", 1.0),
            ("expert_shared_count", 0.0),
            ("expert_weights_scale", 1.0),
            ("leading_dense_block_count", 0.0),
            ("logit_scale", 1.0),
            ("moe_latent_size", 0.0),
            ("nextn_predict_layers", 0.0),
            ("residual_scale", 1.0),
        ] {
            if own.contains(&key) {
                continue;
            }
            // Some of these are whole numbers.
            let read = |value: &Value| value.as_f32().or_else(|| Some(value.as_i64()? as f32));
            // A value of 0 means that the setting is not used.
            let value = self.optional(key, "a number", read)?;
            let value = value.filter(|&value| value != 0.0);
            if let Some(value) = value.filter(|&value| value != neutral) {
                let expected = format!("{neutral} for the architecture '{}'", self.name);
                return Err(self.refused(key, value, expected));
            }
        }
        let expected = format!("true for the architecture '{}'", self.name);
        let key = "attention.causal";
        match self.flag(key)? {
            Some(false) if !own.contains(&key) => Err(self.refused(key, false, expected)),
            _ => Ok(()),
        }
    }
}

/// Value of `expert_gating_func` for expert weights that are sigmoids.
const SIGMOID: usize = 2;

/// The two forms of `attention.sliding_window_pattern`.
enum Pattern {
    /// Whether each layer has the window.
    List(Vec<bool>),
    /// All layers but the last of each period have the window.
    Period(usize),
}
