//! Tiny checkpoints of newer architectures as GGUF files, converted here by the conventions of
//! llama.cpp's converter.

use crate::delta_files::{Tensor, checkpoint, folder, logprobs};
use crate::golden_gguf::{Conversion, agrees, interleave};
use common::gguf_writer::GgufWriter;
use common::golden::tiny;
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::{Array, Value as Metadata};
use quell::internals::weights::{Gguf, ModelFolder, WeightSource, quant};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use tempfile::TempDir;

/// The settings of a file, without the architecture's name. Architectures replace some of the
/// common ones.
type Settings = BTreeMap<&'static str, Metadata>;

/// Pairs of a name in a checkpoint and a name in a GGUF file.
type Names = &'static [(&'static str, &'static str)];

/// A tensor as float32 numbers.
struct Numbers {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Numbers {
    fn read(checkpoint: &Conversion, name: &str) -> Self {
        let tensor = checkpoint.folder.tensor(name).unwrap();
        let data = checkpoint.folder.read(&tensor).unwrap();
        let mut values = vec![0.0; tensor.elements()];
        quant::dequantize(tensor.dtype, &data, &mut values);
        Self {
            shape: tensor.shape.to_vec(),
            values,
        }
    }

    fn stack(entries: Vec<Self>) -> Self {
        Self {
            shape: [&[entries.len()][..], &entries[0].shape].concat(),
            values: entries.into_iter().flat_map(|entry| entry.values).collect(),
        }
    }

    fn shaped(self, shape: &[usize]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), self.values.len());
        Self {
            shape: shape.to_vec(),
            ..self
        }
    }

    /// Transposes each matrix of a stack.
    fn transposed(self) -> Self {
        let [count, rows, columns] = self.stacked();
        let value = |index: usize| {
            let (matrix, within) = (index / (rows * columns), index % (rows * columns));
            let (column, row) = (within / rows, within % rows);
            self.values[(matrix * rows + row) * columns + column]
        };
        Self {
            shape: vec![count, columns, rows],
            values: (0..self.values.len()).map(value).collect(),
        }
    }

    /// Returns some rows of each matrix of a stack.
    fn rows(&self, rows: Range<usize>) -> Self {
        let [count, all, columns] = self.stacked();
        let matrices = self.values.chunks(all * columns);
        let parts = matrices.map(|matrix| &matrix[rows.start * columns..rows.end * columns]);
        Self {
            shape: vec![count, rows.len(), columns],
            values: parts.flatten().copied().collect(),
        }
    }

    fn stacked(&self) -> [usize; 3] {
        self.shape[..].try_into().unwrap()
    }

    /// Puts rows `i` and `i + head / 2` of each head next to each other.
    fn interleaved(self, head: usize) -> Self {
        Self {
            values: interleave(&self.values, self.shape[0], head),
            ..self
        }
    }
}

/// Settings that the converter writes for all architectures that have them.
const SIZES: Names = &[
    ("num_hidden_layers", "block_count"),
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("head_dim", "attention.value_length"),
    ("vocab_size", "vocab_size"),
    ("num_local_experts", "expert_count"),
    ("n_routed_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
    ("n_shared_experts", "expert_shared_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
];

const FLOATS: Names = &[
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("routed_scaling_factor", "expert_weights_scale"),
];

fn common_settings(checkpoint: &Conversion) -> Settings {
    let mut settings = Settings::new();
    for (from, key) in SIZES {
        if let Some(value) = checkpoint.setting(from) {
            settings.insert(*key, sizes(value));
        }
    }
    let number = |value: &Value| Metadata::F32(value.as_f64().unwrap() as f32);
    for (from, key) in FLOATS {
        if let Some(value) = checkpoint.setting(from) {
            settings.insert(*key, number(value));
        }
    }
    if let Some(rope) = checkpoint.setting("rope_parameters") {
        let full = rope.get("full_attention").unwrap_or(rope);
        settings.insert("rope.freq_base", number(&full["rope_theta"]));
        if let Some(sliding) = rope.get("sliding_attention") {
            settings.insert("rope.freq_base_swa", number(&sliding["rope_theta"]));
        }
    }
    if checkpoint.setting("scoring_func") == Some(&json!("sigmoid")) {
        settings.insert("expert_gating_func", Metadata::U32(2));
    }
    if checkpoint.setting("norm_topk_prob") == Some(&json!(true)) {
        settings.insert("expert_weights_norm", Metadata::Bool(true));
    }
    settings
}

/// Returns a size, or a list of sizes, as the converter writes it.
fn sizes(value: &Value) -> Metadata {
    let size = |value: &Value| value.as_u64().unwrap() as usize;
    match value.as_array() {
        Some(all) => list(all.iter().map(size)),
        None => Metadata::U32(size(value) as u32),
    }
}

fn list(sizes: impl Iterator<Item = usize>) -> Metadata {
    Metadata::Array(Array::I32(sizes.map(|size| size as i32).collect()))
}

fn insert<const N: usize>(settings: &mut Settings, sizes: [(&'static str, usize); N]) {
    settings.extend(sizes.map(|(key, size)| (key, Metadata::U32(size as u32))));
}

/// Names of tensors that belong to no layer.
const WHOLE: Names = &[
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("backbone.embeddings.weight", "token_embd.weight"),
    ("backbone.norm_f.weight", "output_norm.weight"),
    (
        "model.embed_tokens_per_layer.weight",
        "per_layer_token_embd.weight",
    ),
    (
        "model.per_layer_model_projection.weight",
        "per_layer_model_proj.weight",
    ),
    (
        "model.per_layer_projection_norm.weight",
        "per_layer_proj_norm.weight",
    ),
];

/// Names of the parts of layers that most architectures have.
const PARTS: Names = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Returns the name of a tensor in the GGUF file. `own` are the names that the architecture has
/// beside [`PARTS`], or instead of them: those of parts, or those of tensors in a layer.
fn renamed(name: &str, own: Names) -> String {
    let find = |names: Names, from: &str| names.iter().find(|pair| pair.0 == from);
    if let Some((_, gguf)) = find(WHOLE, name) {
        return (*gguf).to_owned();
    }
    let (layer, rest) = in_layer(name);
    if let Some((_, gguf)) = find(own, rest) {
        return format!("blk.{layer}.{gguf}");
    }
    let (part, suffix) = rest.rsplit_once('.').unwrap();
    let found = find(own, part).or_else(|| find(PARTS, part));
    let (_, gguf) = found.unwrap_or_else(|| panic!("{name} has no GGUF name"));
    format!("blk.{layer}.{gguf}.{suffix}")
}

/// Returns the layer of a tensor, and the rest of its name.
fn in_layer(name: &str) -> (&str, &str) {
    let (_, rest) = name.split_once("layers.").unwrap();
    rest.split_once('.').unwrap()
}

/// Returns the name of a tensor of a GGUF file within its layer.
fn within(gguf: &str) -> &str {
    gguf.splitn(3, '.').nth(2).unwrap_or_default()
}

fn names(checkpoint: &Conversion) -> Vec<String> {
    let names = checkpoint.folder.names().into_iter();
    names.map(str::to_owned).collect()
}

fn write(checkpoint: &mut Conversion, name: &str, tensor: &Numbers) {
    let file = std::mem::take(&mut checkpoint.file);
    checkpoint.file = file.f32_tensor(name, &tensor.shape, &tensor.values);
}

/// Writes what `convert` makes of each tensor.
fn tensors(checkpoint: &mut Conversion, convert: impl Fn(&str, Numbers) -> Vec<(String, Numbers)>) {
    for name in names(checkpoint) {
        for (gguf, tensor) in convert(&name, Numbers::read(checkpoint, &name)) {
            write(checkpoint, &gguf, &tensor);
        }
    }
}

/// Whether a tensor belongs to a single expert, which [`stack_experts`] converts.
fn is_of_expert(name: &str) -> bool {
    let rest = name.split_once(".experts.").map(|(_, rest)| rest);
    rest.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// Stacks the tensors of all experts of each layer. `parts` are their names in each expert, and
/// the names of the stacks.
fn stack_experts(checkpoint: &mut Conversion, parts: Names) {
    let mut stacks: BTreeMap<String, BTreeMap<usize, Numbers>> = BTreeMap::new();
    for name in names(checkpoint) {
        if !is_of_expert(&name) {
            continue;
        }
        let (_, rest) = name.split_once(".experts.").unwrap();
        let (expert, part) = rest.split_once('.').unwrap();
        let part = part.trim_end_matches(".weight");
        let (_, gguf) = parts.iter().find(|pair| pair.0 == part).unwrap();
        let stack = format!("blk.{}.{gguf}.weight", in_layer(&name).0);
        let tensor = Numbers::read(checkpoint, &name);
        let stack = stacks.entry(stack).or_default();
        stack.insert(expert.parse().unwrap(), tensor);
    }
    for (name, experts) in stacks {
        let stack = Numbers::stack(experts.into_values().collect());
        write(checkpoint, &name, &stack);
    }
}

fn finished(mut checkpoint: Conversion, settings: Settings) -> GgufWriter {
    for (key, value) in settings {
        checkpoint.put(key, value);
    }
    checkpoint.file
}

const NEMOTRON_H: Names = &[
    ("norm", "attn_norm"),
    ("mixer.q_proj", "attn_q"),
    ("mixer.k_proj", "attn_k"),
    ("mixer.v_proj", "attn_v"),
    ("mixer.o_proj", "attn_output"),
    ("mixer.in_proj", "ssm_in"),
    ("mixer.conv1d", "ssm_conv1d"),
    ("mixer.dt_bias", "ssm_dt.bias"),
    ("mixer.A_log", "ssm_a"),
    ("mixer.D", "ssm_d"),
    ("mixer.norm", "ssm_norm"),
    ("mixer.out_proj", "ssm_out"),
    ("mixer.up_proj", "ffn_up"),
    ("mixer.down_proj", "ffn_down"),
    ("mixer.gate", "ffn_gate_inp"),
    ("mixer.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mixer.shared_experts.up_proj", "ffn_up_shexp"),
    ("mixer.shared_experts.down_proj", "ffn_down_shexp"),
];

pub(crate) fn nemotron_h(folder: &Path) -> GgufWriter {
    let checkpoint = Conversion::open(folder, "nemotron_h");
    let width = checkpoint.size("intermediate_size").unwrap();
    let settings = nemotron_settings(&checkpoint, '-', width);
    nemotron_tensors(checkpoint, settings)
}

pub(crate) fn nemotron_h_moe(folder: &Path) -> GgufWriter {
    let mut checkpoint = Conversion::open(folder, "nemotron_h_moe");
    let width = checkpoint.size("moe_intermediate_size").unwrap();
    let mut settings = nemotron_settings(&checkpoint, 'E', width);
    let shared = checkpoint.size("moe_shared_expert_intermediate_size");
    let key = "expert_shared_feed_forward_length";
    insert(&mut settings, [(key, shared.unwrap())]);
    let parts: Names = &[("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")];
    stack_experts(&mut checkpoint, parts);
    nemotron_tensors(checkpoint, settings)
}

/// Returns the settings of a Nemotron-H model. `kind` marks its feed-forward layers, and `width` is
/// theirs.
fn nemotron_settings(checkpoint: &Conversion, kind: char, width: usize) -> Settings {
    let mut settings = common_settings(checkpoint);
    let size = |key: &str| checkpoint.size(key).unwrap();
    let heads = size("mamba_num_heads");
    insert(
        &mut settings,
        [
            // The converter gives all models without RoPE this context.
            ("context_length", 1 << 20),
            ("ssm.conv_kernel", size("conv_kernel")),
            ("ssm.state_size", size("ssm_state_size")),
            ("ssm.group_count", size("n_groups")),
            ("ssm.inner_size", heads * size("mamba_head_dim")),
            ("ssm.time_step_rank", heads),
            (
                "rope.dimension_count",
                size("hidden_size") / size("num_attention_heads"),
            ),
        ],
    );
    settings.insert("rope.scaling.finetuned", Metadata::Bool(false));
    let pattern = checkpoint.setting("hybrid_override_pattern").unwrap();
    let pattern = pattern.as_str().unwrap();
    let only = |kind: char, size: usize| {
        let size = move |own: char| if own == kind { size } else { 0 };
        list(pattern.chars().map(size))
    };
    let kv_heads = size("num_key_value_heads");
    settings.insert("attention.head_count_kv", only('*', kv_heads));
    settings.insert("feed_forward_length", only(kind, width));
    settings
}

fn nemotron_tensors(mut checkpoint: Conversion, settings: Settings) -> GgufWriter {
    let size = |key: &str| checkpoint.size(key).unwrap();
    let (head, taps, groups) = (size("head_dim"), size("conv_kernel"), size("n_groups"));
    tensors(&mut checkpoint, |name, tensor| {
        if is_of_expert(name) {
            return Vec::new();
        }
        let gguf = renamed(name, NEMOTRON_H);
        let length = tensor.values.len();
        let tensor = match within(&gguf) {
            "attn_q.weight" | "attn_k.weight" => tensor.interleaved(head),
            "ssm_a" => Numbers {
                shape: vec![length, 1],
                values: tensor.values.iter().map(|rate| -rate.exp()).collect(),
            },
            "ssm_d" => tensor.shaped(&[length, 1]),
            "ssm_conv1d.weight" => tensor.shaped(&[length / taps, taps]),
            "ssm_norm.weight" => tensor.shaped(&[groups, length / groups]),
            _ => tensor,
        };
        vec![(gguf, tensor)]
    });
    finished(checkpoint, settings)
}

const MINIMAX_M2: Names = &[
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    (
        "block_sparse_moe.e_score_correction_bias",
        "exp_probs_b.bias",
    ),
];

pub(crate) fn minimax_m2(folder: &Path) -> GgufWriter {
    let mut checkpoint = Conversion::open(folder, "minimax-m2");
    let mut settings = common_settings(&checkpoint);
    let size = |key: &str| checkpoint.size(key).unwrap();
    insert(
        &mut settings,
        [
            ("expert_feed_forward_length", size("intermediate_size")),
            ("rope.dimension_count", size("rotary_dim")),
        ],
    );
    let parts: Names = &[
        ("w1", "ffn_gate_exps"),
        ("w2", "ffn_down_exps"),
        ("w3", "ffn_up_exps"),
    ];
    stack_experts(&mut checkpoint, parts);
    tensors(&mut checkpoint, |name, tensor| match is_of_expert(name) {
        true => Vec::new(),
        false => vec![(renamed(name, MINIMAX_M2), tensor)],
    });
    finished(checkpoint, settings)
}

const LLAMA4: Names = &[
    ("feed_forward.gate_proj", "ffn_gate"),
    ("feed_forward.up_proj", "ffn_up"),
    ("feed_forward.down_proj", "ffn_down"),
    ("feed_forward.router", "ffn_gate_inp"),
    ("feed_forward.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("feed_forward.shared_expert.up_proj", "ffn_up_shexp"),
    ("feed_forward.shared_expert.down_proj", "ffn_down_shexp"),
    (
        "feed_forward.experts.gate_up_proj",
        "ffn_gate_up_exps.weight",
    ),
    ("feed_forward.experts.down_proj", "ffn_down_exps.weight"),
];

pub(crate) fn llama4(folder: &Path) -> GgufWriter {
    let mut checkpoint = Conversion::open(folder, "llama4");
    let mut settings = common_settings(&checkpoint);
    let size = |key: &str| checkpoint.size(key).unwrap();
    let step = "interleave_moe_layer_step";
    insert(
        &mut settings,
        [
            ("feed_forward_length", size("intermediate_size_mlp")),
            ("expert_feed_forward_length", size("intermediate_size")),
            (step, size(step)),
            ("rope.dimension_count", size("head_dim")),
            // The converter does not write it: all published models have the same chunks.
            ("attention.sliding_window", size("attention_chunk_size")),
        ],
    );
    tensors(&mut checkpoint, |name, tensor| {
        let gguf = renamed(name, LLAMA4);
        match within(&gguf) {
            "ffn_gate_up_exps.weight" => {
                let both = tensor.transposed();
                let width = both.shape[1] / 2;
                let own = |part: &str| gguf.replace("gate_up", part);
                vec![
                    (own("gate"), both.rows(0..width)),
                    (own("up"), both.rows(width..2 * width)),
                ]
            }
            "ffn_down_exps.weight" => vec![(gguf, tensor.transposed())],
            _ => vec![(gguf, tensor)],
        }
    });
    finished(checkpoint, settings)
}

const GEMMA3N: Names = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("per_layer_input_gate", "inp_gate"),
    ("per_layer_projection", "proj"),
    ("post_per_layer_input_norm", "post_norm"),
    ("altup.correction_coefs", "altup_correct_coef"),
    ("altup.correct_output_scale", "altup_correct_scale.weight"),
    ("altup.prediction_coefs", "altup_predict_coef"),
    ("altup.modality_router", "altup_router"),
    ("altup.router_norm", "altup_router_norm"),
    ("laurel.linear_left", "laurel_l"),
    ("laurel.linear_right", "laurel_r"),
    ("laurel.post_laurel_norm", "laurel_post_norm"),
];

pub(crate) fn gemma3n(folder: &Path) -> GgufWriter {
    let mut checkpoint = Conversion::open(folder, "gemma3n");
    let settings = gemma3n_settings(&checkpoint);
    let stacks: Names = &[
        ("model.altup_projections.", "altup_proj.weight"),
        (
            "model.altup_unembed_projections.",
            "altup_unembd_proj.weight",
        ),
    ];
    let others = checkpoint.size("altup_num_inputs").unwrap() - 1;
    for (from, gguf) in stacks {
        let read = |stream: usize| Numbers::read(&checkpoint, &format!("{from}{stream}.weight"));
        let stack = Numbers::stack((0..others).map(read).collect());
        write(&mut checkpoint, gguf, &stack);
    }
    tensors(&mut checkpoint, |name, tensor| {
        match stacks.iter().any(|(from, _)| name.starts_with(from)) {
            true => Vec::new(),
            // Unlike those of other Gemmas, these norms have no offset.
            false => vec![(renamed(name, GEMMA3N), tensor)],
        }
    });
    finished(checkpoint, settings)
}

fn gemma3n_settings(checkpoint: &Conversion) -> Settings {
    let mut settings = common_settings(checkpoint);
    let size = |key: &str| checkpoint.size(key).unwrap();
    insert(
        &mut settings,
        [
            ("attention.sliding_window", size("sliding_window")),
            ("attention.shared_kv_layers", size("num_kv_shared_layers")),
            ("altup.num_inputs", size("altup_num_inputs")),
            ("altup.active_idx", size("altup_active_idx")),
            (
                "embedding_length_per_layer_input",
                size("hidden_size_per_layer_input"),
            ),
        ],
    );
    let all = |key: &str| checkpoint.setting(key).unwrap().as_array().unwrap().iter();
    let slides = all("layer_types").map(|kind| kind == "sliding_attention");
    let pattern = Metadata::Array(Array::Bool(slides.collect()));
    settings.insert("attention.sliding_window_pattern", pattern);
    // The quantile of a share of 0.
    let quantile = |share: &Value| match share.as_f64() {
        Some(0.0) => f32::NEG_INFINITY,
        _ => panic!("the checkpoint has sparse gates"),
    };
    let cuts = all("activation_sparsity_pattern").map(quantile).collect();
    let cuts = Metadata::Array(Array::F32(cuts));
    settings.insert("activation_sparsity_scale", cuts);
    settings
}

const DEEPSEEK2: Names = &[
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_a_layernorm", "attn_q_a_norm"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias"),
    ("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_experts.up_proj", "ffn_up_shexp"),
    ("mlp.shared_experts.down_proj", "ffn_down_shexp"),
];

/// Converts a model with latent attention.
pub(crate) fn deepseek2(folder: &Path) -> GgufWriter {
    let checkpoint = Conversion::open(folder, "deepseek2");
    let size = |key: &str| checkpoint.size(key).unwrap();
    let (plain, rotated) = (size("qk_nope_head_dim"), size("qk_rope_head_dim"));
    let (latent, value) = (size("kv_lora_rank"), size("v_head_dim"));
    let heads = size("num_attention_heads");
    let mut settings = deepseek2_settings(&checkpoint);
    insert(
        &mut settings,
        [
            ("attention.head_count_kv", 1),
            ("attention.key_length", latent + rotated),
            ("attention.value_length", latent),
            ("attention.key_length_mla", plain + rotated),
            ("attention.value_length_mla", value),
        ],
    );
    let split = |gguf: String, tensor: Numbers| {
        let up = tensor.shaped(&[heads, plain + value, latent]);
        let own = |part: &str| gguf.replace("kv_b", part);
        vec![
            (own("k_b"), up.rows(0..plain).transposed()),
            (own("v_b"), up.rows(plain..plain + value)),
        ]
    };
    deepseek2_tensors(checkpoint, settings, split)
}

/// Converts such a model as older versions of the converter did, which did not split the projection
/// from the latent.
pub(crate) fn deepseek2_unsplit(folder: &Path) -> GgufWriter {
    let checkpoint = Conversion::open(folder, "deepseek2");
    let size = |key: &str| checkpoint.size(key).unwrap();
    let columns = size("qk_nope_head_dim") + size("qk_rope_head_dim");
    let mut settings = deepseek2_settings(&checkpoint);
    insert(
        &mut settings,
        [
            ("attention.key_length", columns),
            ("attention.value_length", size("v_head_dim")),
        ],
    );
    deepseek2_tensors(checkpoint, settings, |gguf, up| vec![(gguf, up)])
}

fn deepseek2_settings(checkpoint: &Conversion) -> Settings {
    let mut settings = common_settings(checkpoint);
    let size = |key: &str| checkpoint.size(key).unwrap();
    insert(
        &mut settings,
        [
            ("leading_dense_block_count", size("first_k_dense_replace")),
            ("attention.kv_lora_rank", size("kv_lora_rank")),
            ("rope.dimension_count", size("qk_rope_head_dim")),
        ],
    );
    if let Some(rank) = checkpoint.size("q_lora_rank") {
        insert(&mut settings, [("attention.q_lora_rank", rank)]);
    }
    settings
}

/// Converts the tensors of such a model. `split` returns what becomes of the projection from the
/// latent.
fn deepseek2_tensors(
    mut checkpoint: Conversion,
    settings: Settings,
    split: impl Fn(String, Numbers) -> Vec<(String, Numbers)>,
) -> GgufWriter {
    let parts: Names = &[
        ("gate_proj", "ffn_gate_exps"),
        ("up_proj", "ffn_up_exps"),
        ("down_proj", "ffn_down_exps"),
    ];
    stack_experts(&mut checkpoint, parts);
    tensors(&mut checkpoint, |name, tensor| {
        if is_of_expert(name) {
            return Vec::new();
        }
        let gguf = renamed(name, DEEPSEEK2);
        match within(&gguf) {
            "attn_kv_b.weight" => split(gguf, tensor),
            _ => vec![(gguf, tensor)],
        }
    });
    finished(checkpoint, settings)
}

/// Checks a converted checkpoint against its folder, and against its reference.
fn check(name: &str, convert: fn(&Path) -> GgufWriter) {
    let (_folder, path) = convert(&tiny(name)).written();
    let file = ModelSource::from_gguf(Gguf::open(&path).unwrap()).unwrap();
    let folder = ModelSource::from_folder(ModelFolder::open(&tiny(name)).unwrap()).unwrap();
    assert_eq!(file.config().layers, folder.config().layers);
    agrees(&path, name);
}

macro_rules! golden {
    ($($test:ident: $name:literal by $convert:ident,)*) => {$(
        #[test]
        fn $test() {
            check($name, $convert);
        }
    )*};
}

golden! {
    nemotron_h_as_gguf_agrees_with_transformers: "nemotron-h" by nemotron_h,
    minimax_m2_as_gguf_agrees_with_transformers: "minimax-m2" by minimax_m2,
    llama4_as_gguf_agrees_with_transformers: "llama4" by llama4,
    gemma3n_as_gguf_agrees_with_transformers: "gemma3n" by gemma3n,
    deepseek_v2_as_gguf_agrees_with_transformers: "deepseek-v2" by deepseek2,
    deepseek_v2_as_old_gguf_agrees_with_transformers: "deepseek-v2" by deepseek2_unsplit,
    deepseek_v3_as_gguf_agrees_with_transformers: "deepseek-v3" by deepseek2,
    deepseek_v3_as_old_gguf_agrees_with_transformers: "deepseek-v3" by deepseek2_unsplit,
}

/// Returns a folder of a Nemotron-H model with experts, made of the tiny checkpoint's weights.
pub(crate) fn nemotron_with_experts() -> TempDir {
    let (mut config, tensors) = checkpoint("nemotron-h");
    for (key, value) in [
        ("hybrid_override_pattern", json!("ME*E")),
        ("n_routed_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
        ("moe_intermediate_size", json!(32)),
        ("moe_shared_expert_intermediate_size", json!(128)),
        ("n_shared_experts", json!(1)),
        ("norm_topk_prob", json!(true)),
        ("routed_scaling_factor", json!(2.5)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
    ] {
        config[key] = value;
    }
    let tensors: Vec<Tensor> = tensors.into_iter().flat_map(with_experts).collect();
    folder(&config, &tensors)
}

/// Returns the tensors of four experts, of a shared one and of a router in place of one of a
/// feed-forward part.
fn with_experts(tensor: Tensor) -> Vec<Tensor> {
    let (name, _, data) = &tensor;
    let (part, shape) = match name.split_once("mixer.") {
        Some((_, "up_proj.weight")) => ("up_proj", vec![32, 64]),
        Some((_, "down_proj.weight")) => ("down_proj", vec![64, 32]),
        _ => return vec![tensor],
    };
    let place = name.trim_end_matches(&format!("{part}.weight"));
    let experts = data.chunks(data.len() / 4).enumerate();
    let mut tensors: Vec<Tensor> = experts
        .map(|(expert, data)| {
            let name = format!("{place}experts.{expert}.{part}.weight");
            (name, shape.clone(), data.to_vec())
        })
        .collect();
    let shared = format!("{place}shared_experts.{part}.weight");
    tensors.push((shared, tensor.1.clone(), data.clone()));
    if part == "up_proj" {
        let router = data[..2 * 4 * 64].to_vec();
        tensors.push((format!("{place}gate.weight"), vec![4, 64], router));
        let corrections = format!("{place}gate.e_score_correction_bias");
        tensors.push((corrections, vec![4], data[64..72].to_vec()));
    }
    tensors
}

#[test]
fn nemotron_h_with_experts_computes_the_same_from_both_formats() {
    let source = nemotron_with_experts();
    let (_folder, path) = nemotron_h_moe(source.path()).written();
    let expected = logprobs(source.path(), "nemotron-h");
    let found = logprobs(&path, "nemotron-h");
    assert_eq!(found.len(), expected.len());
    for ((id, found), (expected_id, expected)) in found.into_iter().zip(expected) {
        assert_eq!(id, expected_id);
        let error = (f32::from_bits(found) - f32::from_bits(expected)).abs();
        assert!(error < 0.01, "{error}");
    }
}
