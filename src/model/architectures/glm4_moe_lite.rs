//! GLM-4.7-Flash: a small DeepSeek V3, with a list of the layers that are dense. GGUF files use the
//! name of DeepSeek V2 for it, as for every model with latent attention.

use super::deepseek_v2::LatentClass;
use super::deepseek_v3::{ExpertClass, read_sigmoid};
use super::{Architecture, Hyperparameters, ModelError, Storage, llama};
use crate::model::huggingface::{Config, ConfigClass};
use serde_json::Value;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "glm4_moe_lite",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 154_880,
        hidden: 2048,
        intermediate: 10_240,
        layers: 47,
        q_heads: 20,
        context: 202_752,
        norm_epsilon: 1e-5,
        ..llama::CLASS
    },
    read_config,
    gguf: None,
    storage: Storage::COMMON,
    layer: Hyperparameters::layer,
};

const LATENT: LatentClass = LatentClass {
    query_rank: 768,
    latent: 512,
    plain: 192,
    rotated: 64,
    value: 256,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let class = ExpertClass {
        count: 64,
        width: 1536,
        top_k: 4,
        scale: 1.8,
        groups: 1,
        top_groups: 1,
    };
    let numbers = read_sigmoid(config, &LATENT, &class)?;
    Ok(Hyperparameters {
        dense_layers: dense_layers(config, &numbers)?,
        ..numbers
    })
}

/// Returns the layers without experts: those that `mlp_layer_types` lists as dense or, in files
/// without it such as the published ones, the first `first_k_dense_replace` layers.
fn dense_layers(
    config: &Config<'_>,
    numbers: &Hyperparameters,
) -> Result<HashSet<usize>, ModelError> {
    let (settings, key) = (config.settings, "mlp_layer_types");
    let Some(types) = settings.optional(key, "a list of layer types", Value::as_array)? else {
        let dense = settings.size_or("first_k_dense_replace", 1)?;
        return Ok(numbers.leading_layers(dense));
    };
    if types.len() != numbers.layers {
        let found = format!("{} entries long", types.len());
        let expected = format!("one entry for each of the {} layers", numbers.layers);
        return Err(settings.refused(key, found, expected));
    }
    let mut dense = HashSet::new();
    for (layer, kind) in types.iter().enumerate() {
        match kind.as_str() {
            Some("dense") => {
                dense.insert(layer);
            }
            Some("sparse") => {}
            _ => {
                let entry = "mlp_layer_types entry";
                return Err(settings.refused(entry, kind, "dense or sparse"));
            }
        }
    }
    Ok(dense)
}

#[cfg(test)]
mod tests {
    use crate::model::huggingface;
    use crate::model::layer::FeedForward;
    use serde_json::{Value, json};

    #[test]
    fn dense_layers_are_listed_or_are_the_first_ones() {
        let read = |key: &str, value: Value| {
            let mut config = json!({"model_type": "glm4_moe_lite", "num_hidden_layers": 4});
            config[key] = value;
            huggingface::read(&config)
        };
        let dense = |key: &str, value: Value| {
            let model = read(key, value).unwrap();
            let layers = model.layers.iter();
            let layers =
                layers.map(|layer| matches!(layer.feed_forward, FeedForward::Dense { .. }));
            layers.collect::<Vec<_>>()
        };
        let listed = json!(["dense", "sparse", "dense", "sparse"]);
        assert_eq!(dense("mlp_layer_types", listed), [true, false, true, false]);
        assert_eq!(
            dense("mlp_layer_types", json!(null)),
            [true, false, false, false]
        );
        assert_eq!(
            dense("first_k_dense_replace", json!(2)),
            [true, true, false, false]
        );
        for (wrong, message) in [
            (json!(["dense"]), "mlp_layer_types is 1 entries long"),
            (
                json!(["dense", "sparse", "moe", "sparse"]),
                "mlp_layer_types entry is \"moe\"",
            ),
            (json!("dense"), "mlp_layer_types is"),
        ] {
            let error = read("mlp_layer_types", wrong).unwrap_err().to_string();
            assert!(error.contains(message), "{message} is not in: {error}");
        }
    }
}
