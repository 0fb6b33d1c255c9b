//! DeepSeek V3 and R1: latent attention, and, after some dense layers, a mixture of experts with
//! expert groups, a sigmoid router and a shared expert.

use super::deepseek_v2::{LATENT, LatentClass, read_latent, require_text, shared};
use super::{Architecture, Hyperparameters, ModelError, Storage, llama};
use crate::device::{Activation, RouterScore, RoutingSpec, SigmoidRouting};
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::Experts;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "deepseek_v3",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 129_280,
        hidden: 7168,
        intermediate: 18_432,
        layers: 61,
        q_heads: 128,
        context: 4096,
        ..llama::CLASS
    },
    read_config,
    gguf: None,
    storage: Storage::COMMON,
    layer: Hyperparameters::layer,
};

/// Defaults of a configuration class for the mixture of experts.
pub(super) struct ExpertClass {
    /// `n_routed_experts`.
    pub(super) count: usize,
    /// `moe_intermediate_size`.
    pub(super) width: usize,
    /// `num_experts_per_tok`.
    pub(super) top_k: usize,
    /// `routed_scaling_factor`.
    pub(super) scale: f32,
    /// `n_group`.
    pub(super) groups: usize,
    /// `topk_group`.
    pub(super) top_groups: usize,
}

impl ExpertClass {
    /// Reads a mixture of experts with a sigmoid router from a configuration, without shared
    /// experts.
    pub(super) fn read(
        &self,
        config: &Config<'_>,
        activation: Activation,
    ) -> Result<Experts, ModelError> {
        let settings = config.settings;
        Ok(Experts {
            count: settings.size_or("n_routed_experts", self.count)?,
            width: settings.size_or("moe_intermediate_size", self.width)?,
            routing: RoutingSpec {
                top_k: settings.size_or("num_experts_per_tok", self.top_k)?,
                score: RouterScore::Sigmoid(SigmoidRouting {
                    scale: settings.positive_or("routed_scaling_factor", self.scale)?,
                    groups: settings.size_or("n_group", self.groups)?,
                    top_groups: settings.size_or("topk_group", self.top_groups)?,
                    scales_input: false,
                }),
                normalize: settings.flag("norm_topk_prob")?.unwrap_or(true),
                activation,
            },
            has_corrections: true,
            shared: None,
            has_shared_gate: false,
            has_own_norms: false,
        })
    }
}

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let class = ExpertClass {
        count: 256,
        width: 2048,
        top_k: 8,
        scale: 2.5,
        groups: 8,
        top_groups: 4,
    };
    let numbers = read_sigmoid(config, &LATENT, &class)?;
    let dense = config.settings.size_or("first_k_dense_replace", 3)?;
    Ok(Hyperparameters {
        dense_layers: numbers.leading_layers(dense),
        ..numbers
    })
}

/// Reads the hyperparameters of a model that has latent attention and a mixture of experts with a
/// sigmoid router in every layer.
pub(super) fn read_sigmoid(
    config: &Config<'_>,
    latent: &LatentClass,
    class: &ExpertClass,
) -> Result<Hyperparameters, ModelError> {
    let settings = config.settings;
    require_text(settings, "scoring_func", "sigmoid")?;
    require_text(settings, "topk_method", "noaux_tc")?;
    let is_interleaved = settings.flag("rope_interleave")?.unwrap_or(true);
    let numbers = read_latent(config, latent, is_interleaved)?;
    let experts = class.read(config, numbers.activation)?;
    let experts = Experts {
        shared: shared(experts.width, settings.size_or("n_shared_experts", 1)?),
        ..experts
    };
    Ok(Hyperparameters {
        experts: Some(experts),
        prediction_layers: settings.size_or("num_nextn_predict_layers", 1)?.min(64),
        ..numbers
    })
}

#[cfg(test)]
mod tests {
    use crate::model::huggingface;
    use crate::model::layer::{FeedForward, Mixer};
    use serde_json::{Value, json};

    #[test]
    fn published_settings_are_read() {
        // The relevant settings of DeepSeek V3's `config.json`.
        let config = json!({
            "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
            "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163_840,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
            "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
            "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
            "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129_280,
        });
        let model = huggingface::read(&config).unwrap();
        // 576 elements per token and layer are cached.
        assert_eq!(model.heads().head_dim, 576);
        assert_eq!(model.heads().value_dim(), 512);
        assert_eq!(model.heads().kv_heads, 1);
        let dense = |layer: usize| {
            matches!(
                model.layers[layer].feed_forward,
                FeedForward::Dense { width: 18_432, .. }
            )
        };
        assert!(dense(2) && !dense(3));
        assert_eq!(model.prediction_layers, 1);
        assert_eq!(model.shared_width(), Some(2048));
    }

    #[test]
    fn other_routers_are_refused_by_key_and_rotated_rows_may_be_in_halves() {
        let read = |key: &str, value: Value| {
            let mut config = json!({"model_type": "deepseek_v3"});
            config[key] = value;
            huggingface::read(&config)
        };
        for (key, value) in [("scoring_func", "softmax"), ("topk_method", "greedy")] {
            let error = read(key, json!(value)).unwrap_err().to_string();
            assert!(error.contains(&format!("{key} is {value}")), "{error}");
        }
        for (value, expected) in [
            (json!(true), true),
            (json!(false), false),
            (json!(null), true),
        ] {
            let model = read("rope_interleave", value).unwrap();
            let Mixer::Latent(latent) = model.layers[0].mixer else {
                panic!("attention is not latent");
            };
            assert_eq!(latent.is_interleaved, expected);
        }
    }
}
