//! `quell inspect`: shows what a model file holds and how much memory it needs, or
//! describes a GPU.

use super::args::{Format, RunArgs, resolve};
use super::error::CliError;
use super::generate::println_json;
use crate::model::ModelConfig;
use crate::{DeviceInfo, GenerationConfig, MemoryPlan, ModelFiles};
use crate::{PooledTokens, Pooling, PoolingStage};
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;

/// Show what a model file holds and how much memory it needs.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model to show: a .gguf file, a Hugging Face folder, or hf:ORG/NAME[/FILE] to
    /// download. With --device cuda[:N] it may be omitted to show the GPU instead.
    #[arg(value_name = "PATH")]
    model: Option<String>,
    #[command(flatten)]
    run: RunArgs,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Runs the subcommand.
pub fn run(args: InspectArgs) -> Result<(), CliError> {
    let (config, options) = (args.run.config()?, args.run.options()?);
    let Some(model) = &args.model else {
        if !args.run.wants_cuda() {
            let problem = "<PATH> is missing; only --device cuda[:N] can be shown without a model";
            return Err(CliError::Usage(problem.to_owned()));
        }
        return show_device(&options.device_info()?, args.format);
    };
    let files = ModelFiles::open(&resolve(model)?)?;
    let (device, plan) = files.plan(&config, &options)?;
    let config = files.source().config();
    let parameters = files.source().parameters();
    let formats: Value = parameters
        .by_format
        .iter()
        .map(|(format, count)| (format.name().to_owned(), json!(count)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let quantisation = files.quantisation();
    let tokens = plan.tokens();
    let tokenizer = files.tokenizer();
    let sampling = match (options.generation_config, files.sampling_defaults()) {
        (GenerationConfig::None, _) => Ok(Vec::new()),
        (GenerationConfig::Model, Ok(defaults)) => Ok(defaults.named()),
        (GenerationConfig::Model, Err(error)) => Err(error.to_string()),
    };
    if args.format == Format::Json {
        return println_json(&json!({
            "path": model,
            "architecture": config.architecture.name(),
            "quantisation": quantisation,
            "parameters": parameters.total,
            "parameters_by_format": formats,
            "layers": config.layers.len(),
            "hidden_size": config.hidden,
            "attention_heads": config.heads().q_heads,
            "kv_heads": config.heads().kv_heads,
            "head_dim": config.heads().head_dim,
            "vocabulary": config.vocabulary,
            "context": config.context,
            "sliding_window": config.window(),
            "experts": config.experts().map(|experts| experts.count),
            "embedding": files.pooling().size(config.hidden),
            "scores_pairs": files.pooling().is_score,
            "tokenizer": tokenizer.is_some(),
            "chat_template": tokenizer.is_some_and(|t| t.chat_template().is_some()),
            "sampling_defaults": match &sampling {
                Ok(named) => named
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), json!(value)))
                    .collect::<serde_json::Map<_, _>>()
                    .into(),
                Err(problem) => json!({ "error": problem }),
            },
            "default_context": config.native_context(),
            "device": device.name,
            "device_details": details(&device),
            "memory": memory(&plan),
        }));
    }
    let text = match tokenizer {
        Some(tokenizer) => format!(
            "{} tokens, {}",
            tokenizer.vocabulary_size(),
            if tokenizer.chat_template().is_some() {
                "chat template"
            } else {
                "no chat template"
            }
        ),
        None => "none: token ids only".to_owned(),
    };
    let sampling = match sampling {
        Ok(named) if named.is_empty() => "no defaults of its own".to_owned(),
        Ok(named) => named
            .iter()
            .map(|(name, value)| format!("{} {value}", name.replace('_', "-")))
            .collect::<Vec<_>>()
            .join(", "),
        Err(problem) => problem,
    };
    let context = match config.native_context() {
        native if native < config.context => {
            format!("{native} tokens, up to {} with --context", config.context)
        }
        native => format!("{native} tokens"),
    };
    let by_format: Vec<String> = parameters
        .by_format
        .iter()
        .map(|(format, count)| format!("{} {format}", millions(*count)))
        .collect();
    let rows = [
        ("model", model.clone()),
        ("architecture", config.architecture.name().to_owned()),
        ("quantisation", quantisation),
        (
            "parameters",
            format!("{} ({})", millions(parameters.total), by_format.join(", ")),
        ),
        ("shape", shape(config)),
        ("context", context),
        ("tokenizer", text),
        ("sampling", sampling),
        ("embedding", embedding(files.pooling(), config.hidden)),
        ("device", format!("{}: {}", device.name, device.description)),
        ("weights", mib(plan.weights)),
        ("steps", of_steps(&plan)),
        ("KV per token", format!("{} bytes", plan.cache_per_token)),
        ("KV sequence", of_sequence(&plan)),
        (
            "KV cache",
            format!(
                "{}: {} blocks of {} tokens, {tokens} tokens",
                mib(plan.cache()),
                plan.cache_blocks,
                plan.block_tokens
            ),
        ),
    ];
    let states = (plan.state_slots > 0).then(|| {
        let (slots, bytes) = (plan.state_slots, mib(plan.state_bytes));
        let text = format!("{}: {slots} slots of {bytes}", mib(plan.states()));
        ("states", text)
    });
    let kinds = plan.describe_memory().into_iter();
    let kinds = kinds.map(|kind| ("KV group", kind));
    let mut out = std::io::stdout().lock();
    for (name, value) in rows.into_iter().chain(states).chain(kinds) {
        writeln!(out, "{name:<13} {value}")?;
    }
    Ok(())
}

/// Describes the vectors or scores that the model computes of texts of this width.
fn embedding(pooling: &Pooling, hidden: usize) -> String {
    let of = match pooling.tokens {
        PooledTokens::All => "the mean of all tokens",
        PooledTokens::First => "the first token",
        PooledTokens::Last => "the last token",
    };
    let stages = pooling.stages.iter().map(|stage| match stage {
        PoolingStage::Dense(_) => ", a linear layer",
        PoolingStage::Normalize => ", scaled to length 1",
        PoolingStage::Sigmoid => ", a sigmoid",
    });
    let (size, stages) = (pooling.size(hidden), stages.collect::<String>());
    let what = if pooling.is_score { "scores" } else { "values" };
    format!("{size} {what}: {of}{stages}")
}

/// Returns the memory plan.
fn memory(plan: &MemoryPlan) -> Value {
    json!({
        "weights_bytes": plan.weights,
        "activation_bytes": plan.activations,
        "scratch_bytes": plan.scratch,
        "graphs": plan.graphs,
        "graph_bytes": plan.graph_bytes,
        "pinned_bytes": plan.pinned,
        "batch_tokens": plan.batch_tokens,
        "kv_bytes_per_token": plan.cache_per_token,
        "kv_blocks": plan.cache_blocks,
        "kv_block_tokens": plan.block_tokens,
        "kv_tokens": plan.tokens(),
        "kv_bytes": plan.cache(),
        "kv_block_bytes": plan.block_bytes,
        "kv_groups": groups(plan),
        "kv_sharing_layers": plan.layout.sharing_layers(),
        "state_layers": plan.state_layers,
        "state_slots": plan.state_slots,
        "state_slot_bytes": plan.state_bytes,
        "context_tokens": plan.context_tokens,
        "kv_bytes_per_sequence": plan.sequence_bytes(plan.context_tokens),
        "kv_bytes_per_sequence_without_windows":
            plan.sequence_bytes_without_windows(plan.context_tokens),
    })
}

/// Returns the groups of layers that share blocks of the KV cache.
fn groups(plan: &MemoryPlan) -> Value {
    let groups = plan.groups().into_iter().map(|group| {
        let keeps = match group.window {
            None => "all tokens",
            Some(_) => "window",
        };
        json!({
            "keeps": keeps,
            "window": group.window,
            "layers": group.layers,
            "bytes_per_token": group.bytes_per_token,
            "bytes_per_sequence": group.bytes_per_sequence,
        })
    });
    groups.collect()
}

/// Describes the memory that steps take besides the weights and the KV cache.
fn of_steps(plan: &MemoryPlan) -> String {
    let mut text = format!(
        "{} for activations of up to {} tokens",
        mib(plan.activations),
        plan.batch_tokens
    );
    if plan.scratch > 0 {
        text += &format!(", {} of scratch memory", mib(plan.scratch));
    }
    if plan.graphs > 0 {
        let bytes = mib(plan.graph_bytes);
        text += &format!(", about {bytes} for up to {} graphs", plan.graphs);
    }
    if plan.pinned > 0 {
        text += &format!("; {} pinned on the host", mib(plan.pinned));
    }
    text
}

/// Describes the memory that one sequence of the maximum length takes.
fn of_sequence(plan: &MemoryPlan) -> String {
    let tokens = plan.context_tokens;
    let bytes = plan.sequence_bytes(tokens);
    let all = plan.sequence_bytes_without_windows(tokens);
    let size = format!("{} for {tokens} tokens", mib(bytes));
    match bytes < all {
        true => format!("{size}, {} without windows", mib(all)),
        false => size,
    }
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Prints what is known about a device, without a model.
fn show_device(device: &DeviceInfo, format: Format) -> Result<(), CliError> {
    if format == Format::Json {
        return println_json(&json!({
            "device": device.name,
            "device_details": details(device),
        }));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<18} {}", "device", device.name)?;
    for (name, value) in &device.details {
        writeln!(out, "{name:<18} {value}")?;
    }
    Ok(())
}

fn details(device: &DeviceInfo) -> Value {
    let details = device.details.iter();
    details
        .map(|(name, value)| (name.replace(' ', "_"), json!(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn shape(config: &ModelConfig) -> String {
    let (heads, experts) = (config.heads(), config.experts());
    let width = config.dense_width();
    let mut shape = format!(
        "{} layers, hidden {}, feed-forward {}, {} heads ({} KV) of {}, vocabulary {}",
        config.layers.len(),
        config.hidden,
        width.or(experts.map(|experts| experts.width)).unwrap_or(0),
        heads.q_heads,
        heads.kv_heads,
        heads.head_dim,
        config.vocabulary
    );
    let mut others = config.attentions().map(|attention| attention.heads);
    if let Some(other) = others.find(|other| *other != heads) {
        let (kv, dim) = (other.kv_heads, other.head_dim);
        shape += &format!(
            ", {} heads ({kv} KV) of {dim} in other layers",
            other.q_heads
        );
    }
    if let Some(experts) = experts {
        let top_k = experts.routing.top_k;
        shape += &format!(", {} experts, {top_k} per token", experts.count);
    }
    if let Some(window) = config.window() {
        shape += &format!(", window {window}");
    }
    shape
}

fn millions(count: usize) -> String {
    match count {
        0..1_000_000 => count.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.2} G", count as f64 / 1e9),
    }
}
