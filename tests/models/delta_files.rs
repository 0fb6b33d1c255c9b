//! Files of models with gated delta nets, in the forms in which they are published.

use common::gguf_writer::GgufWriter;
use common::golden::{gguf, tiny, tiny_cases};
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::{Array, Gguf, Value as Metadata};
use quell::internals::weights::{DType, ModelFolder, WeightSource};
use quell::{Engine, EngineConfig, LoadOptions, Request, SamplingParams};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// A tensor in bfloat16: its name, its shape and its bytes.
pub(crate) type Tensor = (String, Vec<usize>, Vec<u8>);

/// Writes a folder with these settings and tensors.
pub(crate) fn folder(config: &Value, tensors: &[Tensor]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// The settings and the tensors of a tiny checkpoint.
pub(crate) fn checkpoint(name: &str) -> (Value, Vec<Tensor>) {
    let folder = ModelFolder::open(&tiny(name)).unwrap();
    let read = |name: &str| {
        let tensor = folder.tensor(name).unwrap();
        assert_eq!(tensor.dtype, DType::BF16);
        let data = folder.read(&tensor).unwrap().into_owned();
        (name.to_owned(), tensor.shape.to_vec(), data)
    };
    let tensors = folder.names().into_iter().map(read).collect();
    (folder.config().clone(), tensors)
}

/// The bits of the log probabilities after the longest prompt of the checkpoint `name`.
pub(crate) fn logprobs(path: &Path, name: &str) -> Vec<(u32, u32)> {
    let config = EngineConfig {
        kv_cache_bytes: Some(8 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, LoadOptions::cpu()).unwrap();
    let sampling = SamplingParams {
        logprobs: Some(8),
        ..SamplingParams::greedy()
    };
    let prompt = tiny_cases(name).pop().unwrap().prompt;
    let mut request = Request::new(prompt).max_tokens(4).sampling(sampling);
    request.ignore_eos = true;
    let done = engine.generate(request).unwrap().complete_blocking();
    let tokens = done.unwrap().tokens;
    assert_eq!(tokens.len(), 4);
    let top = tokens.iter().flat_map(|token| token.top.iter());
    top.map(|(id, logprob)| (*id, logprob.to_bits())).collect()
}

/// Replaces the tensors of the experts of each layer by stacked ones.
fn stack_experts(tensors: &mut Vec<Tensor>) {
    let (experts, mut others): (Vec<Tensor>, Vec<Tensor>) = std::mem::take(tensors)
        .into_iter()
        .partition(|(name, ..)| name.contains(".experts."));
    let find = |name: String| experts.iter().find(|tensor| tensor.0 == name);
    for layer in 0..4 {
        let place = format!("model.layers.{layer}.mlp.experts.");
        let (mut gate_up, mut down): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut width = 0;
        for expert in 0..8 {
            let part = |part: &str| find(format!("{place}{expert}.{part}.weight")).unwrap();
            gate_up.extend(&part("gate_proj").2);
            gate_up.extend(&part("up_proj").2);
            down.extend(&part("down_proj").2);
            width = part("up_proj").1[0];
        }
        let name = |part: &str| format!("{place}{part}");
        others.push((name("gate_up_proj"), vec![8, 2 * width, 64], gate_up));
        others.push((name("down_proj"), vec![8, 64, width], down));
    }
    *tensors = others;
}

#[test]
fn a_published_mixture_gives_the_same_bits_as_its_text_model() {
    let name = "qwen3.5-moe";
    let (text, mut tensors) = checkpoint(name);
    stack_experts(&mut tensors);
    for tensor in &mut tensors {
        if let Some(rest) = tensor.0.strip_prefix("model.") {
            tensor.0 = format!("model.language_model.{rest}");
        }
    }
    let extra = |name: &str| (name.to_owned(), vec![2], vec![0; 4]);
    tensors.push(extra("model.visual.patch_embed.proj.bias"));
    tensors.push(extra("mtp.fc.weight"));
    tensors.push(extra("mtp.layers.0.mlp.experts.down_proj"));
    let mut text = text;
    text["rope_parameters"]["mrope_interleaved"] = json!(true);
    text["rope_parameters"]["mrope_section"] = json!([3, 3, 2]);
    text["attn_output_gate"] = json!(true);
    text["mtp_num_hidden_layers"] = json!(1);
    // Sums of the chosen experts' weights do not depend on it.
    text["norm_topk_prob"] = Value::Null;
    let config = json!({
        "model_type": "qwen3_5_moe", "text_config": text, "tie_word_embeddings": false,
        "vision_config": {"depth": 1},
    });
    let published = folder(&config, &tensors);
    assert_eq!(
        logprobs(published.path(), name),
        logprobs(&tiny(name), name)
    );
}

#[test]
fn missing_and_unknown_tensors_of_a_gated_delta_net_are_named() {
    let (config, tensors) = checkpoint("qwen3-next");
    let open = |tensors: &[Tensor]| {
        let folder = folder(&config, tensors);
        let folder = ModelFolder::open(folder.path()).unwrap();
        ModelSource::from_folder(folder).map_err(|error| error.to_string())
    };
    open(&tensors).unwrap();
    for part in [
        "linear_attn.A_log",
        "linear_attn.dt_bias",
        "linear_attn.conv1d.weight",
        "linear_attn.norm.weight",
        "linear_attn.out_proj.weight",
        "mlp.shared_expert_gate.weight",
    ] {
        let name = format!("model.layers.1.{part}");
        let others = tensors.iter().filter(|tensor| tensor.0 != name);
        let others: Vec<Tensor> = others.cloned().collect();
        assert_eq!(others.len() + 1, tensors.len());
        let error = open(&others).unwrap_err();
        assert!(error.contains(&name), "{error}");
    }
    for name in [
        "model.layers.1.linear_attn.in_proj_z.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.3.linear_attn.A_log",
    ] {
        let mut more = tensors.clone();
        more.push((name.to_owned(), vec![2], vec![0; 4]));
        let error = open(&more).unwrap_err();
        assert!(error.contains(name), "{error}");
    }
}

/// A copy of a GGUF file of the fixtures, with some settings changed and without one of them.
fn copy(name: &str, changes: &[(&str, Metadata)], without: Option<&str>) -> GgufWriter {
    let file = Gguf::open(&gguf(name)).unwrap();
    let is_kept = |key: &str| {
        let own = key.rsplit_once("35.").map_or(key, |(_, own)| own);
        let is_changed = changes.iter().any(|(changed, _)| *changed == own);
        !is_changed && Some(own) != without
    };
    let copied = GgufWriter::copy(&file, is_kept);
    changes.iter().fold(copied, |copy, (key, value)| {
        copy.metadata(&format!("qwen35.{key}"), value.clone())
    })
}

#[test]
fn gguf_layers_that_predict_further_tokens_are_skipped() {
    let flags = Array::Bool(vec![true, true, true, false, false]);
    let changes = [
        ("block_count", Metadata::U32(5)),
        ("nextn_predict_layers", Metadata::U32(1)),
        ("attention.recurrent_layers", Metadata::Array(flags)),
    ];
    let expected = logprobs(&gguf("qwen3.5"), "qwen3.5");
    // The second file does not list the recurrent layers, but says how many there are.
    for (changes, without) in [
        (&changes[..], None),
        (&changes[..2], Some("attention.recurrent_layers")),
    ] {
        let writer = copy("qwen3.5", changes, without);
        let writer = writer.f32_tensor("blk.4.nextn.enorm.weight", &[64], &[1.0; 64]);
        let (_folder, path) = writer.written();
        assert_eq!(logprobs(&path, "qwen3.5"), expected);
    }
}

#[test]
fn gguf_settings_of_a_gated_delta_net_are_named() {
    for (key, value) in [
        ("ssm.group_count", 0),
        ("ssm.group_count", 3),
        ("ssm.time_step_rank", 0),
        ("ssm.state_size", 8),
        ("ssm.inner_size", 96),
        ("ssm.inner_size", 63),
        ("ssm.conv_kernel", 1),
        ("ssm.conv_kernel", 9),
    ] {
        let (_folder, path) = copy("qwen3.5", &[(key, Metadata::U32(value))], None).written();
        let error = ModelSource::from_gguf(Gguf::open(&path).unwrap()).unwrap_err();
        let error = error.to_string();
        let named = match (key, value) {
            // The value heads are no multiple of the key heads.
            ("ssm.group_count", 3) => "ssm.time_step_rank",
            _ => key,
        };
        assert!(error.contains(&format!("qwen35.{named} is")), "{error}");
    }
    let all = Metadata::Array(Array::Bool(vec![true; 4]));
    let changes = [("attention.recurrent_layers", all)];
    let (_folder, path) = copy("qwen3.5", &changes, None).written();
    let error = ModelSource::from_gguf(Gguf::open(&path).unwrap()).unwrap_err();
    assert!(error.to_string().contains("attention"), "{error}");
    let interval = [("full_attention_interval", Metadata::U32(0))];
    let writer = copy("qwen3.5", &interval, Some("attention.recurrent_layers"));
    let (_folder, path) = writer.written();
    let error = ModelSource::from_gguf(Gguf::open(&path).unwrap()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("full_attention_interval is 0"), "{error}");
}
