//! BERT: an encoder with learned embeddings of positions and segments, layer norms on the sums of
//! the residual stream and the outputs, and biases everywhere.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama, names};
use crate::device::Activation;
use crate::model::Biases;
use crate::model::LearnedPositions;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::Variations;
use crate::model::layer::{LayerSpec, NormKind, NormPlacement};
use crate::model::names::Part;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "bert",
    aliases: &[],
    class: CLASS,
    read_config: |config| encoder(config, 0),
    gguf: Some(GgufFormat {
        name: "bert",
        aliases: &[],
        read: read_metadata,
        settings: &["attention.causal"],
    }),
    storage: STORAGE,
    layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 30_522,
    hidden: 768,
    intermediate: 3072,
    activation: Activation::Gelu,
    layers: 12,
    q_heads: 12,
    context: 512,
    norm_epsilon: 1e-12,
    ties_embeddings: true,
    ..llama::CLASS
};

pub(super) const STORAGE: Storage = Storage {
    embedding: "embeddings.word_embeddings",
    prefixes: &["bert.", "roberta.", ""],
    layers: "encoder.layer",
    huggingface_name,
    gguf_name,
    ..Storage::COMMON
};

/// Number of segments of a configuration that does not say how many there are.
const SEGMENTS: usize = 2;

/// Reads the configuration of an encoder whose first `unused` embeddings of positions belong to no
/// token.
pub(super) fn encoder(config: &Config<'_>, unused: usize) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let key = "position_embedding_type";
    if let Some(kind) = settings.text(key)?.filter(|&kind| kind != "absolute") {
        return Err(settings.refused(key, kind, "absolute"));
    }
    for key in ["is_decoder", "add_cross_attention"] {
        if settings.flag(key)? == Some(true) {
            return Err(settings.refused(key, true, "false: the model must be an encoder"));
        }
    }
    let learned_positions = LearnedPositions {
        segments: settings.size_or("type_vocab_size", SEGMENTS)?,
        unused,
    };
    let trained = common.context;
    let Some(context) = trained.checked_sub(unused) else {
        let expected = format!("at least {unused}");
        return Err(settings.refused("max_position_embeddings", trained, expected));
    };
    let mut numbers = Hyperparameters {
        context,
        norm_epsilon: settings.positive_or("layer_norm_eps", CLASS.norm_epsilon)?,
        biases: Biases {
            qkv: Some(true),
            attention_out: Some(true),
            feed_forward: Some(true),
            ..Biases::NONE
        },
        ..encoding(common, learned_positions)
    };
    numbers.names.keys.norm_epsilon = "layer_norm_eps";
    Ok(numbers)
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    if metadata.flag("attention.causal")? == Some(true) {
        return Err(metadata.refused("attention.causal", true, "false"));
    }
    let epsilon = metadata.number("attention.layer_norm_epsilon")?;
    let learned_positions = LearnedPositions {
        segments: metadata.rows("token_types.weight").unwrap_or(SEGMENTS),
        unused: 0,
    };
    let mut numbers = Hyperparameters {
        norm_epsilon: epsilon.unwrap_or(CLASS.norm_epsilon),
        ..encoding(common, learned_positions)
    };
    numbers.names.keys.norm_epsilon = "attention.layer_norm_epsilon";
    Ok(numbers)
}

/// Returns these hyperparameters for a model that encodes: it attends in both directions, and tokens
/// are not rotated.
fn encoding(common: Hyperparameters, learned_positions: LearnedPositions) -> Hyperparameters {
    Hyperparameters {
        norm: NormKind::Layer,
        is_causal: false,
        unrotated: common.leading_layers(common.layers),
        variations: Variations {
            learned_positions: Some(learned_positions),
            ..Variations::default()
        },
        ..common
    }
}

pub(super) fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer_norms: NormPlacement::OnSum,
        feed_forward_norms: NormPlacement::OnSum,
        ..numbers.layer(index)
    }
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::Query => "attention.self.query",
        Part::Key => "attention.self.key",
        Part::Value => "attention.self.value",
        Part::AttentionOut => "attention.output.dense",
        Part::PostAttentionNorm => "attention.output.LayerNorm",
        Part::Up => "intermediate.dense",
        Part::Down => "output.dense",
        Part::PostFeedForwardNorm => "output.LayerNorm",
        other => return names::huggingface(other),
    };
    name.to_owned()
}

fn gguf_name(part: Part) -> String {
    match part {
        Part::PostAttentionNorm => "attn_output_norm".to_owned(),
        Part::PostFeedForwardNorm => "layer_output_norm".to_owned(),
        other => names::gguf(other),
    }
}

#[cfg(test)]
mod tests {
    use crate::model::huggingface;
    use serde_json::json;

    #[test]
    fn an_encoder_has_segments_and_no_norm_after_its_layers() {
        let model = huggingface::read(&json!({"model_type": "bert"})).unwrap();
        assert!(!model.is_causal());
        assert!(!model.has_final_norm());
        assert_eq!(
            (model.context, model.learned_positions.unwrap().segments),
            (512, 2)
        );
        let settings = json!({"model_type": "xlm-roberta", "max_position_embeddings": 514,
            "type_vocab_size": 1, "pad_token_id": 1});
        let model = huggingface::read(&settings).unwrap();
        assert_eq!(
            (model.context, model.learned_positions.unwrap().segments),
            (512, 1)
        );
    }

    #[test]
    fn other_positions_and_decoders_are_refused_by_name() {
        for (key, value) in [
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("add_cross_attention", json!(true)),
            ("hidden_act", json!("relu")),
        ] {
            let settings = json!({"model_type": "bert", key: value});
            let error = huggingface::read(&settings).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
