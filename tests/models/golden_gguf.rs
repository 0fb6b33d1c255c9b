//! The tiny checkpoints as GGUF files. Those of the fixtures were made by llama.cpp's own
//! converter. The others are converted here by its conventions: names, metadata keys, stacked
//! experts, and interleaved query and key rows. `converted.rs` has more architectures.

use common::gguf_writer::GgufWriter;
use common::golden;
use common::golden::{Tolerance, checkpoints, gguf, tiny, tiny_cases};
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::{Array, Value as Metadata};
use quell::internals::weights::{DType, Gguf, ModelFolder, WeightSource, quant};
use quell::{Engine, EngineConfig, LoadOptions};
use serde_json::Value;
use std::path::Path;

/// A checkpoint that is being converted to a GGUF file.
pub(crate) struct Conversion {
    architecture: &'static str,
    pub(crate) folder: ModelFolder,
    pub(crate) file: GgufWriter,
}

impl Conversion {
    fn new(name: &str, architecture: &'static str) -> Self {
        Self::open(&tiny(name), architecture)
    }

    /// Begins to convert the checkpoint in a folder.
    pub(crate) fn open(folder: &Path, architecture: &'static str) -> Self {
        let folder = ModelFolder::open(folder).unwrap();
        let file = GgufWriter::new().string("general.architecture", architecture);
        Self {
            architecture,
            folder,
            file,
        }
    }

    pub(crate) fn setting(&self, key: &str) -> Option<&Value> {
        self.folder
            .config()
            .get(key)
            .filter(|value| !value.is_null())
    }

    pub(crate) fn size(&self, key: &str) -> Option<usize> {
        self.setting(key)
            .map(|value| value.as_u64().unwrap() as usize)
    }

    pub(crate) fn put(&mut self, key: &str, value: Metadata) {
        let key = format!("{}.{key}", self.architecture);
        self.file = std::mem::take(&mut self.file).metadata(&key, value);
    }

    fn put_size(&mut self, key: &str, from: &str) {
        if let Some(value) = self.size(from) {
            self.put(key, Metadata::U32(value as u32));
        }
    }

    fn put_number(&mut self, key: &str, from: &str) {
        if let Some(value) = self.setting(from) {
            self.put(key, Metadata::F32(value.as_f64().unwrap() as f32));
        }
    }

    fn heads(&self) -> (usize, usize, usize) {
        let q = self.size("num_attention_heads").unwrap();
        let kv = self.size("num_key_value_heads").unwrap();
        let head = self
            .size("head_dim")
            .unwrap_or_else(|| self.size("hidden_size").unwrap() / q);
        (q, kv, head)
    }

    fn settings(&mut self) {
        for (key, from) in [
            ("block_count", "num_hidden_layers"),
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("feed_forward_length", "intermediate_size"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.sliding_window", "sliding_window"),
            ("vocab_size", "vocab_size"),
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
        ] {
            self.put_size(key, from);
        }
        for (key, from) in [
            ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ] {
            self.put_number(key, from);
        }
        let (.., head) = self.heads();
        self.put("attention.key_length", Metadata::U32(head as u32));
        self.put("attention.value_length", Metadata::U32(head as u32));
        self.put("rope.dimension_count", Metadata::U32(head as u32));
        let rope = self.setting("rope_parameters").unwrap().clone();
        let rope = rope.get("full_attention").unwrap_or(&rope);
        let theta = rope["rope_theta"].as_f64().unwrap() as f32;
        self.put("rope.freq_base", Metadata::F32(theta));
        if rope["rope_type"] == "llama3" {
            let factors = llama3_factors(rope, head);
            self.file = std::mem::take(&mut self.file).f32_tensor(
                "rope_freqs.weight",
                &[head / 2],
                &factors,
            );
        }
    }

    fn tensors(&mut self) {
        let names: Vec<String> = self.folder.names().into_iter().map(str::to_owned).collect();
        for name in &names {
            if !name.contains(".experts.") {
                self.tensor(name);
            }
        }
        for layer in 0..self.size("num_hidden_layers").unwrap() {
            self.experts(layer, &names);
        }
    }

    fn tensor(&mut self, name: &str) {
        let gguf = self.gguf_name(name);
        let tensor = self.folder.tensor(name).unwrap();
        let shape = tensor.shape.to_vec();
        let mut data = self.folder.read(&tensor).unwrap().into_owned();
        if let ("llama", Some(head)) = (self.architecture, self.rotated_heads(name)) {
            data = interleave(&data, shape[0], head);
        }
        let file = std::mem::take(&mut self.file);
        self.file = if shape.len() == 1 {
            let mut values = vec![0.0; shape[0]];
            quant::dequantize(tensor.dtype, &data, &mut values);
            if self.architecture.starts_with("gemma") {
                values.iter_mut().for_each(|value| *value += 1.0);
            }
            file.f32_tensor(&gguf, &shape, &values)
        } else {
            file.tensor(&gguf, tensor.dtype, &shape, data)
        };
    }

    /// Returns the rows per head of a query or key projection, and `None` for other tensors.
    fn rotated_heads(&self, name: &str) -> Option<usize> {
        let rotated = name.contains("q_proj") || name.contains("k_proj");
        rotated.then(|| self.heads().2)
    }

    /// Stacks the experts of a layer.
    fn experts(&mut self, layer: usize, names: &[String]) {
        for (gguf, parts) in [
            ("ffn_gate_exps", ["w1", "gate_proj"]),
            ("ffn_up_exps", ["w3", "up_proj"]),
            ("ffn_down_exps", ["w2", "down_proj"]),
        ] {
            let mut data = Vec::new();
            let mut shape = Vec::new();
            for expert in 0..self.size("num_local_experts").unwrap_or(0) {
                let own = names.iter().find(|name| {
                    name.starts_with(&format!("model.layers.{layer}."))
                        && parts
                            .iter()
                            .any(|part| name.ends_with(&format!(".experts.{expert}.{part}.weight")))
                });
                let tensor = self.folder.tensor(own.unwrap()).unwrap();
                assert_eq!(tensor.dtype, DType::BF16);
                data.extend_from_slice(&self.folder.read(&tensor).unwrap());
                shape = vec![expert + 1, tensor.shape[0], tensor.shape[1]];
            }
            if !data.is_empty() {
                let name = format!("blk.{layer}.{gguf}.weight");
                self.file = std::mem::take(&mut self.file).tensor(&name, DType::BF16, &shape, data);
            }
        }
    }

    fn gguf_name(&self, name: &str) -> String {
        let post_norms = matches!(self.architecture, "exaone4" | "gemma2" | "gemma3" | "olmo2");
        match name {
            "model.embed_tokens.weight" => return "token_embd.weight".to_owned(),
            "model.norm.weight" => return "output_norm.weight".to_owned(),
            "lm_head.weight" => return "output.weight".to_owned(),
            _ => {}
        }
        let rest = name.strip_prefix("model.layers.").unwrap();
        let (layer, rest) = rest.split_once('.').unwrap();
        let (part, kind) = rest.rsplit_once('.').unwrap();
        let part = match part {
            "input_layernorm" => "attn_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.qkv_proj" => "attn_qkv",
            "self_attn.o_proj" => "attn_output",
            "self_attn.q_norm" => "attn_q_norm",
            "self_attn.k_norm" => "attn_k_norm",
            "post_attention_layernorm" if post_norms => "post_attention_norm",
            "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
            "post_feedforward_layernorm" => "post_ffw_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            "mlp.gate" | "block_sparse_moe.gate" => "ffn_gate_inp",
            other => panic!("{other} has no GGUF name"),
        };
        format!("blk.{layer}.{part}.{kind}")
    }
}

/// Puts rows `i` and `i + head / 2` of each head next to each other.
pub(crate) fn interleave<T: Copy>(data: &[T], rows: usize, head: usize) -> Vec<T> {
    let columns = data.len() / rows;
    (0..rows)
        .flat_map(|row| {
            let (first, within) = (row / head * head, row % head);
            let from = first + within % 2 * (head / 2) + within / 2;
            data[from * columns..(from + 1) * columns].iter().copied()
        })
        .collect()
}

/// Returns the factors that llama.cpp stores for Llama 3's RoPE scaling: one divisor per
/// rotated pair.
fn llama3_factors(rope: &Value, head: usize) -> Vec<f32> {
    let number = |key: &str| rope[key].as_f64().unwrap();
    let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
    let (factor, context) = (number("factor"), number("original_max_position_embeddings"));
    (0..head / 2)
        .map(|pair| {
            let frequency = number("rope_theta").powf(-2.0 * pair as f64 / head as f64);
            let wavelength = std::f64::consts::TAU / frequency;
            let blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - blend) / factor + blend)) as f32
        })
        .collect()
}

fn check(name: &str, architecture: &'static str) {
    let mut conversion = Conversion::new(name, architecture);
    conversion.settings();
    conversion.tensors();
    let (_folder, path) = conversion.file.written();
    agrees(&path, name);
}

/// Checks a file against the reference of the checkpoint `name`.
pub(crate) fn agrees(path: &Path, name: &str) {
    let config = EngineConfig {
        max_batch_tokens: Some(32),
        kv_cache_bytes: Some(8 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, LoadOptions::cpu()).unwrap();
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

macro_rules! golden {
    ($($test:ident: $name:literal as $architecture:literal,)*) => {$(
        #[test]
        fn $test() {
            check($name, $architecture);
        }
    )*};
}

golden! {
    gemma2_as_gguf_agrees_with_transformers: "gemma2" as "gemma2",
    gemma3_as_gguf_agrees_with_transformers: "gemma3" as "gemma3",
    llama_as_gguf_agrees_with_transformers: "llama" as "llama",
    llama_with_tied_embeddings_as_gguf_agrees_with_transformers: "llama-tied" as "llama",
    mistral_as_gguf_agrees_with_transformers: "mistral" as "llama",
    mixtral_as_gguf_agrees_with_transformers: "mixtral" as "llama",
    olmo2_as_gguf_agrees_with_transformers: "olmo2" as "olmo2",
    phi3_as_gguf_agrees_with_transformers: "phi3" as "phi3",
    qwen2_as_gguf_agrees_with_transformers: "qwen2" as "qwen2",
    qwen3_as_gguf_agrees_with_transformers: "qwen3" as "qwen3",
    exaone4_as_gguf_agrees_with_transformers: "exaone4" as "exaone4",
    qwen3_moe_as_gguf_agrees_with_transformers: "qwen3-moe" as "qwen3moe",
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
