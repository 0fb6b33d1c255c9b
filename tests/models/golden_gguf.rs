//! The tiny checkpoints as GGUF files, which llama.cpp's own converter made.

use common::gguf_writer::GgufWriter;
use common::golden;
use common::golden::{Tolerance, checkpoints, gguf, tiny, tiny_cases};
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::{Array, Value as Metadata};
use quell::internals::weights::{Gguf, ModelFolder};
use quell::{Engine, LoadOptions};
use std::path::Path;

/// Checks a file against the reference of the checkpoint `name`.
pub(crate) fn agrees(path: &Path, name: &str) {
    let engine = Engine::load_with(path, golden::small_steps(), LoadOptions::cpu()).unwrap();
    let tolerance = Tolerance {
        max: 0.01,
        margin: 0.01,
    };
    for case in tiny_cases(name) {
        golden::check(&engine, &case, 512, tolerance);
    }
}

/// Checks a file of the fixtures.
fn check_converted(name: &str) {
    agrees(&gguf(name), name);
}

macro_rules! converted {
    ($($test:ident: $name:literal,)*) => {$(
        #[test]
        fn $test() {
            check_converted($name);
        }
    )*};
}

converted! {
    gemma2_as_converted_by_llama_cpp_agrees_with_transformers: "gemma2",
    gemma3_as_converted_by_llama_cpp_agrees_with_transformers: "gemma3",
    llama_as_converted_by_llama_cpp_agrees_with_transformers: "llama",
    llama_with_tied_embeddings_as_converted_by_llama_cpp_agrees_with_transformers: "llama-tied",
    mistral_as_converted_by_llama_cpp_agrees_with_transformers: "mistral",
    mixtral_as_converted_by_llama_cpp_agrees_with_transformers: "mixtral",
    olmo2_as_converted_by_llama_cpp_agrees_with_transformers: "olmo2",
    phi3_as_converted_by_llama_cpp_agrees_with_transformers: "phi3",
    qwen2_as_converted_by_llama_cpp_agrees_with_transformers: "qwen2",
    qwen3_as_converted_by_llama_cpp_agrees_with_transformers: "qwen3",
    qwen3_moe_as_converted_by_llama_cpp_agrees_with_transformers: "qwen3-moe",
    exaone4_as_converted_by_llama_cpp_agrees_with_transformers: "exaone4",
    deepseek_v2_as_converted_by_llama_cpp_agrees_with_transformers: "deepseek-v2",
    gemma3n_as_converted_by_llama_cpp_agrees_with_transformers: "gemma3n",
    llama4_as_converted_by_llama_cpp_agrees_with_transformers: "llama4",
    minimax_m2_as_converted_by_llama_cpp_agrees_with_transformers: "minimax-m2",
    nemotron_h_as_converted_by_llama_cpp_agrees_with_transformers: "nemotron-h",
    nemotron_h_with_experts_as_converted_by_llama_cpp_agrees_with_transformers: "nemotron-h-moe",
    deepseek_v3_as_converted_by_llama_cpp_agrees_with_transformers: "deepseek-v3",
    glm4_moe_lite_as_converted_by_llama_cpp_agrees_with_transformers: "glm4-moe-lite",
    glm4_moe_as_converted_by_llama_cpp_agrees_with_transformers: "glm4-moe",
    gpt_oss_as_converted_by_llama_cpp_agrees_with_transformers: "gpt-oss",
    gemma4_as_converted_by_llama_cpp_agrees_with_transformers: "gemma4",
    gemma4_with_experts_as_converted_by_llama_cpp_agrees_with_transformers: "gemma4-moe",
    cohere2_as_converted_by_llama_cpp_agrees_with_transformers: "cohere2",
    ernie4_5_as_converted_by_llama_cpp_agrees_with_transformers: "ernie4.5",
    glm4_as_converted_by_llama_cpp_agrees_with_transformers: "glm4",
    granite_as_converted_by_llama_cpp_agrees_with_transformers: "granite",
    granite_with_mamba2_as_converted_by_llama_cpp_agrees_with_transformers: "granite-hybrid",
    lfm2_as_converted_by_llama_cpp_agrees_with_transformers: "lfm2",
    lfm2_moe_as_converted_by_llama_cpp_agrees_with_transformers: "lfm2-moe",
    ministral3_as_converted_by_llama_cpp_agrees_with_transformers: "mistral4",
    olmo3_as_converted_by_llama_cpp_agrees_with_transformers: "olmo3",
    qwen3_next_as_converted_by_llama_cpp_agrees_with_transformers: "qwen3-next",
    qwen3_5_as_converted_by_llama_cpp_agrees_with_transformers: "qwen3.5",
    qwen3_5_moe_as_converted_by_llama_cpp_agrees_with_transformers: "qwen3.5-moe",
    seed_oss_as_converted_by_llama_cpp_agrees_with_transformers: "seed-oss",
    smollm3_as_converted_by_llama_cpp_agrees_with_transformers: "smollm3",
}

#[test]
fn every_converted_file_of_the_fixtures_has_a_test() {
    let own = include_str!("golden_gguf.rs");
    let mut count = 0;
    for file in std::fs::read_dir(gguf("").parent().unwrap()).unwrap() {
        let file = file.unwrap().file_name().into_string().unwrap();
        let name = file.trim_end_matches(".gguf");
        let line = format!("_as_converted_by_llama_cpp_agrees_with_transformers: {name:?},");
        assert!(own.contains(&line), "{file} has no test");
        count += 1;
    }
    assert!(count > 0);
}

/// Copies a file, with other values for some keys, or without them.
pub(crate) fn changed(path: &Path, changes: &[(&str, Option<Metadata>)]) -> GgufWriter {
    let file = Gguf::open(path).unwrap();
    let is_kept = |key: &str| changes.iter().all(|(changed, _)| *changed != key);
    let copied = GgufWriter::copy(&file, is_kept);
    let values = changes
        .iter()
        .filter_map(|(key, value)| Some((key, value.as_ref()?)));
    values.fold(copied, |copy, (key, value)| {
        copy.metadata(key, value.clone())
    })
}

#[test]
fn lists_that_do_not_fit_the_layers_are_refused_by_their_key() {
    for (key, value) in [
        (
            "attention.head_count_kv",
            Metadata::Array(Array::U32(vec![2, 1])),
        ),
        (
            "attention.head_count_kv",
            Metadata::Array(Array::U32(vec![2, 1, 2, 3])),
        ),
        (
            "feed_forward_length",
            Metadata::Array(Array::U32(vec![128; 5])),
        ),
        ("attention.value_length_swa", Metadata::U32(16)),
        ("attention.shared_kv_layers", Metadata::U32(4)),
        ("embedding_length_per_layer_input", Metadata::U32(1 << 20)),
    ] {
        let full = format!("gemma4.{key}");
        let bytes = changed(&gguf("gemma4-moe"), &[(full.as_str(), Some(value))]).build();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        let error = Engine::load(&path).unwrap_err().to_string();
        let named = key == "attention.head_count_kv" && error.contains("attention.head_count");
        assert!(error.contains(&full) || named, "{full}: {error}");
    }
}

/// YaRN extends the context of a file, whose own key has what the model was trained with.
#[test]
fn files_have_the_context_of_the_folders_that_they_were_converted_from() {
    let mut extended = 0;
    for path in checkpoints().iter().filter(|path| path.is_file()) {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let file = Gguf::open(path).unwrap();
        let key = format!(
            "{}.context_length",
            file.metadata("general.architecture")
                .unwrap()
                .as_str()
                .unwrap()
        );
        let stated = file.metadata(&key).unwrap().as_u64().unwrap() as usize;
        let context = ModelSource::from_gguf(file).unwrap().config().context;
        let folder = ModelFolder::open(&tiny(name)).unwrap();
        let expected = ModelSource::from_folder(folder).unwrap().config().context;
        // The converter states this length for all models with Mamba-2.
        if stated == 1 << 20 {
            continue;
        }
        assert_eq!(context, expected, "{name}");
        extended += usize::from(context > stated);
    }
    println!("{extended} files have an extended context");
}
