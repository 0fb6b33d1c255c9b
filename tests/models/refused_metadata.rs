//! GGUF metadata of single architectures: values that make no sense are refused by their key, and
//! what only some files have is read.

use crate::golden_gguf::changed;
use crate::latent;
use common::gguf_writer::GgufWriter;
use common::golden::{gguf, tiny};
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::{Array, Value as Metadata};
use quell::internals::weights::{DType, Gguf, ModelFolder};
use serde_json::json;
use std::path::Path;

fn model(file: &GgufWriter) -> Result<ModelSource, String> {
    let file = Gguf::from_bytes(file.build(), Path::new("changed.gguf")).unwrap();
    ModelSource::from_gguf(file).map_err(|error| error.to_string())
}

/// Checks that a file with any one of these changes is refused, with the changed key in the error.
fn check(path: &Path, architecture: &str, changes: &[(&str, Option<Metadata>)]) {
    model(&changed(path, &[])).unwrap();
    for (key, value) in changes {
        let full = format!("{architecture}.{key}");
        let file = changed(path, &[(full.as_str(), value.clone())]);
        let error = model(&file).unwrap_err();
        assert!(error.contains(&format!("{full} is ")), "{full}: {error}");
    }
}

fn size(size: u32) -> Option<Metadata> {
    Some(Metadata::U32(size))
}

fn number(number: f32) -> Option<Metadata> {
    Some(Metadata::F32(number))
}

fn sizes(sizes: &[i32]) -> Option<Metadata> {
    Some(Metadata::Array(Array::I32(sizes.to_vec())))
}

fn numbers(numbers: &[f32]) -> Option<Metadata> {
    Some(Metadata::Array(Array::F32(numbers.to_vec())))
}

fn flags(flags: &[bool]) -> Option<Metadata> {
    Some(Metadata::Array(Array::Bool(flags.to_vec())))
}

#[test]
fn wrong_settings_of_nemotron_h_are_named() {
    let changes = [
        ("attention.head_count_kv", None),
        ("attention.head_count_kv", sizes(&[0, 0, 2])),
        ("feed_forward_length", None),
        ("feed_forward_length", sizes(&[0, 128, 0])),
        ("feed_forward_length", sizes(&[0, 1 << 23, 0, 128])),
        ("ssm.conv_kernel", None),
        ("ssm.conv_kernel", size(1)),
        ("ssm.state_size", None),
        ("ssm.state_size", size(12)),
        ("ssm.group_count", None),
        ("ssm.group_count", size(3)),
        ("ssm.inner_size", None),
        ("ssm.inner_size", size(100)),
        ("ssm.time_step_rank", None),
        ("ssm.time_step_rank", size(0)),
        ("attention.layer_norm_epsilon", number(0.0)),
    ];
    check(&gguf("nemotron-h"), "nemotron_h", &changes);
}

#[test]
fn wrong_settings_of_nemotron_h_with_experts_are_named() {
    let changes = [
        ("expert_shared_feed_forward_length", None),
        ("expert_shared_feed_forward_length", size(0)),
        ("expert_shared_count", size(2)),
        ("expert_used_count", None),
        ("expert_used_count", size(5)),
        // Models whose layers have different experts are not supported.
        ("expert_used_count", sizes(&[0, 2, 0, 3])),
        ("expert_feed_forward_length", size(0)),
        ("expert_feed_forward_length", sizes(&[0, 32, 0, 32])),
        ("expert_gating_func", size(1)),
        ("expert_weights_scale", number(-1.0)),
        ("moe_latent_size", size(8)),
        ("nextn_predict_layers", size(9)),
    ];
    check(&gguf("nemotron-h-moe"), "nemotron_h_moe", &changes);
}

#[test]
fn wrong_settings_of_minimax_m2_are_named() {
    let changes = [
        ("expert_gating_func", size(1)),
        ("expert_count", size(5000)),
        ("expert_used_count", None),
        ("expert_used_count", size(9)),
        ("expert_feed_forward_length", size(0)),
        ("expert_weights_scale", number(2.0)),
        ("expert_weights_norm", Some(Metadata::Bool(false))),
        ("rope.dimension_count", size(15)),
        ("rope.dimension_count", size(64)),
    ];
    check(&gguf("minimax-m2"), "minimax-m2", &changes);
}

#[test]
fn wrong_settings_of_llama4_are_named() {
    let changes = [
        ("interleave_moe_layer_step", None),
        ("interleave_moe_layer_step", size(0)),
        ("expert_feed_forward_length", size(0)),
        ("expert_gating_func", size(1)),
        ("expert_used_count", size(0)),
        ("expert_weights_norm", Some(Metadata::Bool(true))),
        ("attention.sliding_window", number(32.0)),
        (
            "attention.sliding_window_pattern",
            flags(&[true, true, false]),
        ),
    ];
    check(&gguf("llama4"), "llama4", &changes);
}

#[test]
fn wrong_settings_of_gemma3n_are_named() {
    let changes = [
        ("attention.sliding_window", None),
        ("attention.sliding_window", size(0)),
        ("attention.sliding_window_pattern", flags(&[true, false])),
        ("feed_forward_length", None),
        ("feed_forward_length", sizes(&[128, 128])),
        ("feed_forward_length", sizes(&[128, 128, 0, 128, 128])),
        ("attention.shared_kv_layers", size(5)),
        ("altup.num_inputs", size(0)),
        ("altup.num_inputs", size(65)),
        ("altup.active_idx", size(2)),
        ("embedding_length_per_layer_input", size(0)),
        ("activation_sparsity_scale", numbers(&[0.5, 0.5])),
        ("activation_sparsity_scale", numbers(&[f32::NAN; 5])),
        ("activation_sparsity_scale", numbers(&[f32::INFINITY; 5])),
        ("activation_sparsity_scale", sizes(&[1; 5])),
        ("final_logit_softcapping", number(-1.0)),
    ];
    check(&gguf("gemma3n"), "gemma3n", &changes);
}

#[test]
fn wrong_settings_of_old_files_with_latent_attention_are_named() {
    let (_folder, path) = latent::unsplit("deepseek-v2").written();
    let changes = [
        ("attention.key_length", None),
        ("attention.key_length", size(16)),
        ("attention.value_length", None),
        ("attention.value_length", size(0)),
        ("attention.kv_lora_rank", None),
        ("attention.kv_lora_rank", size(0)),
    ];
    check(&path, "deepseek2", &changes);
}

#[test]
fn layers_of_nemotron_h_that_predict_further_tokens_are_skipped() {
    let longer = [
        ("nemotron_h_moe.block_count", size(5)),
        ("nemotron_h_moe.nextn_predict_layers", size(1)),
        (
            "nemotron_h_moe.attention.head_count_kv",
            sizes(&[0, 0, 2, 0, 2]),
        ),
        (
            "nemotron_h_moe.feed_forward_length",
            sizes(&[0, 32, 0, 32, 32]),
        ),
    ];
    let longer = changed(&gguf("nemotron-h-moe"), &longer);
    let longer = longer.f32_tensor("blk.4.nextn.enorm.weight", &[64], &[1.0; 64]);
    let folder = ModelFolder::open(&tiny("nemotron-h-moe")).unwrap();
    let expected = ModelSource::from_folder(folder).unwrap();
    assert_eq!(
        model(&longer).unwrap().config().layers,
        expected.config().layers
    );
}

#[test]
fn llama4_with_as_many_experts_as_maverick_does_not_normalise_queries() {
    let path = gguf("llama4");
    let norms = |experts: u32| {
        let file = changed(&path, &[("llama4.expert_count", size(experts))]);
        let layers = model(&file).unwrap().config().layers.clone();
        let attention = |layer: usize| *layers[layer].attention().unwrap();
        [2, 3].map(|layer| attention(layer).qk_norm.is_some())
    };
    assert_eq!(norms(16), [true, false]);
    assert_eq!(norms(128), [false, false]);
}

#[test]
fn llama4_without_chunks_rotates_every_layer() {
    let path = gguf("llama4");
    let file = changed(&path, &[("llama4.attention.sliding_window", size(0))]);
    for layer in &model(&file).unwrap().config().layers {
        let attention = layer.attention().unwrap();
        assert!(attention.rope.is_some() && attention.window.is_none());
    }
    // Files that do not say have chunks of 8192 tokens.
    let file = changed(&path, &[("llama4.attention.sliding_window", None)]);
    let layers = model(&file).unwrap().config().layers.clone();
    assert_eq!(layers[0].window(), Some(8192));
    assert_eq!(layers[3].window(), None);
}

#[test]
fn sparse_gates_of_gemma3n_are_read_from_both_formats() {
    let path = gguf("gemma3n");
    let cut = 1.644_853_6;
    let cuts = numbers(&[cut, cut, f32::NEG_INFINITY, cut, f32::NEG_INFINITY]);
    let file = changed(&path, &[("gemma3n.activation_sparsity_scale", cuts)]);
    let folder = ModelFolder::open(&tiny("gemma3n")).unwrap();
    let mut settings = folder.config().clone();
    settings["activation_sparsity_pattern"] = json!([0.95, 0.95, 0.0, 0.95, 0.0]);
    let expected = ModelSource::random(&settings, DType::BF16).unwrap();
    assert_eq!(
        model(&file).unwrap().config().layers,
        expected.config().layers
    );
}
