//! The memory plan: how many blocks the KV cache gets.

use super::demand::Needs;
use super::limits::context_tokens;
use super::{LoadError, SwapInfo};
use crate::cache::{CacheLayout, EmptyWindow, GroupKind, LayerCache};
use crate::config::{EngineConfig, Preemption};
use crate::device::{ATTENTION_SPAN, CacheShape, Device, DeviceLimits, StateShape};
use crate::model::ModelConfig;

/// Maximum number of blocks, on the device or on the host.
const MAX_BLOCKS: usize = u32::MAX as usize >> 8;

/// Memory that a model takes on the device.
///
/// A block of the KV cache holds the keys and values of a fixed number of layers. A sequence has
/// blocks in each group of layers, and a group with a sliding window gives back those that its
/// layers no longer need.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// Size of the weights in bytes, in the device's format.
    pub weights: usize,
    /// Size in bytes of the activations of the largest step, and of the tables of positions.
    pub activations: usize,
    /// Size in bytes of the inputs of a step and of the intermediate results of its operations,
    /// as far as the device reserves memory for them.
    pub scratch: usize,
    /// Maximum number of steps of different sizes that are kept as recordings (CUDA graphs).
    pub graphs: usize,
    /// Estimated size of that many recordings in bytes.
    pub graph_bytes: usize,
    /// Size in bytes of the pinned memory of the host through which inputs and results are
    /// copied, without the memory for swapped-out blocks.
    pub pinned: usize,
    /// Maximum number of tokens per step.
    pub batch_tokens: usize,
    /// Size of the KV cache in bytes per token that all layers keep.
    pub cache_per_token: usize,
    /// Number of blocks of the KV cache.
    pub cache_blocks: usize,
    /// Size of a block in bytes.
    pub block_bytes: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Number of slots for the states of recurrent layers.
    pub state_slots: usize,
    /// Size of a slot in bytes; 0 if no layer is recurrent.
    pub state_bytes: usize,
    /// Number of recurrent layers.
    pub state_layers: usize,
    /// How the layers share blocks.
    pub(crate) layout: CacheLayout,
    /// Maximum number of tokens per sequence.
    pub context_tokens: usize,
}

/// Memory of the layers that share the blocks of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupMemory {
    /// Number of tokens that the layers keep, or `None` if they keep all.
    pub window: Option<usize>,
    /// Indices of the layers.
    pub layers: Vec<usize>,
    /// Size in bytes of the keys and values of a token.
    pub bytes_per_token: usize,
    /// Size in bytes of the blocks that a sequence of [`MemoryPlan::context_tokens`] tokens
    /// holds while it is decoded.
    pub bytes_per_sequence: usize,
}

impl MemoryPlan {
    /// Creates the plan for a model with these needs, a cache of this shape, and steps within
    /// `limits`.
    pub(super) fn new<D: Device>(
        needs: Needs,
        layout: &CacheLayout,
        limits: &DeviceLimits,
        model: &ModelConfig,
        (shape, states): (&CacheShape, &StateShape),
        device: &D,
    ) -> Self {
        let Needs {
            weights,
            activations,
            steps,
        } = needs;
        let mut plan = Self {
            weights,
            activations,
            scratch: steps.scratch,
            graphs: steps.most_graphs,
            graph_bytes: steps.graphs,
            pinned: steps.pinned,
            batch_tokens: limits.rows,
            cache_per_token: 0,
            cache_blocks: shape.blocks,
            block_bytes: block_bytes(shape, device),
            block_tokens: shape.block_tokens,
            state_slots: states.slots,
            state_bytes: slot_bytes(states.elements, device),
            state_layers: model.recurrent_layers(),
            layout: layout.clone(),
            context_tokens: limits.sequence_tokens,
        };
        let groups = plan.groups();
        plan.cache_per_token = groups.iter().map(|group| group.bytes_per_token).sum();
        plan
    }

    /// Returns the size of the whole KV cache in bytes.
    pub fn cache(&self) -> usize {
        self.block_bytes * self.cache_blocks
    }

    /// Returns the size of all slots for states in bytes.
    pub fn states(&self) -> usize {
        self.state_bytes.saturating_mul(self.state_slots)
    }

    /// Returns the number of blocks that a sequence of this many tokens holds while it is
    /// decoded.
    pub fn sequence_blocks(&self, tokens: usize) -> usize {
        self.layout.most_blocks_of_all(tokens, 1, self.block_tokens)
    }

    /// Returns the size of [`MemoryPlan::sequence_blocks`] in bytes, and of a state.
    pub fn sequence_bytes(&self, tokens: usize) -> usize {
        let blocks = self.sequence_blocks(tokens);
        let blocks = blocks.saturating_mul(self.block_bytes);
        blocks.saturating_add(self.state_bytes)
    }

    /// Returns the size in bytes that a sequence of this many tokens would take if every layer
    /// kept all tokens.
    pub fn sequence_bytes_without_windows(&self, tokens: usize) -> usize {
        let blocks = tokens.div_ceil(self.block_tokens);
        let block_tokens = blocks.saturating_mul(self.block_tokens);
        block_tokens.saturating_mul(self.cache_per_token)
    }

    /// Returns the number of tokens that fit in the KV cache, as sequences of
    /// [`MemoryPlan::context_tokens`] tokens. Shorter sequences have less of their tokens outside
    /// the windows, so that fewer tokens fit.
    pub fn tokens(&self) -> usize {
        let tokens = self.context_tokens.next_multiple_of(self.block_tokens);
        let blocks = self.sequence_blocks(tokens).max(1);
        let fit = self.cache_blocks as u128 * tokens as u128 / blocks as u128;
        usize::try_from(fit).unwrap_or(usize::MAX)
    }

    /// Returns the groups of layers that share blocks.
    pub fn groups(&self) -> Vec<GroupMemory> {
        let (tokens, block_tokens) = (self.context_tokens, self.block_tokens);
        let of_place = self.block_bytes / (self.layout.layers_per_block() * block_tokens);
        let groups = self.layout.groups().iter().enumerate();
        let groups = groups.map(|(index, group)| {
            let blocks = self.layout.most_blocks(index, tokens, 1, block_tokens);
            GroupMemory {
                window: match group.kind {
                    GroupKind::Full => None,
                    GroupKind::Window(window) => Some(window),
                },
                layers: group.layers.clone(),
                bytes_per_token: group.layers.len() * of_place / group.layers_per_place,
                bytes_per_sequence: blocks.saturating_mul(self.block_bytes),
            }
        });
        groups.collect()
    }

    /// Describes the memory of each kind of layer, for example `4 layers keep all tokens: 4096
    /// bytes per token, 32.0 MiB per sequence`, where a sequence has the maximum length.
    pub fn describe_memory(&self) -> Vec<String> {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let groups = self.groups();
        let kinds = groups.chunk_by(same_window).map(|same| {
            let of_token: usize = same.iter().map(|group| group.bytes_per_token).sum();
            let of_sequence: usize = same.iter().map(|group| group.bytes_per_sequence).sum();
            let (kind, of_sequence) = (describe(same), mib(of_sequence));
            format!("{kind}: {of_token} bytes per token, {of_sequence} per sequence")
        });
        let sharing = match self.layout.sharing_layers() {
            0 => None,
            1 => Some("1 layer uses the cache of another".to_owned()),
            layers => Some(format!("{layers} layers use the cache of another")),
        };
        let states = match self.state_layers {
            0 => None,
            1 => Some("1 layer keeps a state".to_owned()),
            layers => Some(format!("{layers} layers keep a state")),
        };
        let states = states.map(|kind| format!("{kind}: {} per sequence", mib(self.state_bytes)));
        kinds.chain(sharing).chain(states).collect()
    }
}

fn same_window(a: &GroupMemory, b: &GroupMemory) -> bool {
    a.window == b.window
}

/// Describes groups whose layers keep as many tokens.
fn describe(same: &[GroupMemory]) -> String {
    let layers: usize = same.iter().map(|group| group.layers.len()).sum();
    let tokens = match same[0].window {
        None => "all tokens".to_owned(),
        Some(window) => format!("the last {window} tokens"),
    };
    let layers = match layers {
        1 => "1 layer keeps".to_owned(),
        layers => format!("{layers} layers keep"),
    };
    match same.len() {
        1 => format!("{layers} {tokens}"),
        count => format!("{layers} {tokens}, in {count} groups"),
    }
}

/// Returns how the layers of a model share blocks under the settings.
pub(super) fn cache_layout(
    model: &ModelConfig,
    config: &EngineConfig,
) -> Result<CacheLayout, LoadError> {
    let layers = model.layers.iter().map(|layer| match layer.heads() {
        Some(heads) => LayerCache {
            window: layer.window(),
            size: heads.cache_elements(),
            shares: layer.attention().and_then(|attention| attention.shares),
        },
        None => LayerCache::NOTHING,
    });
    let context = context_tokens(model, config);
    CacheLayout::of_layers(&layers.collect::<Vec<_>>(), context, ATTENTION_SPAN)
        .map_err(|EmptyWindow { layer }| LoadError::EmptyWindow { layer })
}

/// Returns the size in bytes of a block of a cache of this shape.
fn block_bytes<D: Device>(shape: &CacheShape, device: &D) -> usize {
    device.cache_bytes(&CacheShape {
        blocks: 1,
        ..*shape
    })
}

/// Returns the shape of a cache of one block.
fn one_block(model: &ModelConfig, config: &EngineConfig, layout: &CacheLayout) -> CacheShape {
    let heads = model.cache_heads();
    CacheShape {
        layers: layout.layers_per_block(),
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        blocks: 1,
        block_tokens: config.block_tokens,
        values: heads.values,
    }
}

/// Returns the size in bytes of a slot for states of this many numbers.
fn slot_bytes<D: Device>(elements: usize, device: &D) -> usize {
    device.state_bytes(&StateShape { slots: 1, elements })
}

/// Smallest number of slots: a sequence that starts with a snapshot needs it until its own state is
/// computed.
const LEAST_SLOTS: usize = 2;

/// Returns the shape of the memory for states of a model whose KV cache and states take `budget`
/// bytes.
///
/// By default, states take at most half of the budget. A state is as large as the keys and values
/// of hundreds or thousands of tokens, so more of them would leave too little room for the tokens
/// of the running sequences; what sequences do not need serves the prefix cache. There is no use
/// in more than a few snapshots for each sequence that may run.
pub(super) fn state_shape<D: Device>(
    model: &ModelConfig,
    config: &EngineConfig,
    budget: usize,
    device: &D,
) -> Result<StateShape, LoadError> {
    let elements = model.states(device).elements;
    if elements == 0 {
        return Ok(StateShape::default());
    }
    let bytes = slot_bytes(elements, device).max(1);
    let useful = config.max_sequences.saturating_mul(4);
    let slots = match config.state_slots {
        Some(slots) => slots,
        None => (budget / 2 / bytes).min(useful).max(LEAST_SLOTS),
    };
    let refused = |name, value: usize, expected| LoadError::Config {
        name,
        value: value.to_string(),
        expected,
    };
    if !(LEAST_SLOTS..=MAX_BLOCKS).contains(&slots) {
        let expected = format!("from {LEAST_SLOTS} to {MAX_BLOCKS}");
        return Err(refused("state_slots", slots, expected));
    }
    let taken = slots.saturating_mul(bytes);
    if taken >= budget {
        let expected = format!("more than {taken} (the states of {slots} sequences of this model)");
        return Err(refused("kv_cache_bytes", budget, expected));
    }
    Ok(StateShape { slots, elements })
}

/// Returns the size in bytes of the smallest cache: every group needs a block for the first
/// token, and a sequence needs slots for its state.
pub(super) fn least_cache<D: Device>(
    model: &ModelConfig,
    config: &EngineConfig,
    layout: &CacheLayout,
    device: &D,
) -> usize {
    let block = block_bytes(&one_block(model, config, layout), device);
    let slots = slot_bytes(model.states(device).elements, device).saturating_mul(LEAST_SLOTS);
    block
        .saturating_mul(layout.groups().len())
        .saturating_add(slots)
}

/// Returns the shape of the largest useful cache that fits in `budget` bytes, for steps of up to
/// `step` tokens.
pub(super) fn cache_shape<D: Device>(
    model: &ModelConfig,
    config: &EngineConfig,
    (layout, step): (&CacheLayout, usize),
    budget: usize,
    device: &D,
) -> Result<CacheShape, LoadError> {
    let block = one_block(model, config, layout);
    let block_bytes = block_bytes(&block, device).max(1);
    // All sequences at their full length hold no more at a time. What is beyond that only serves
    // the prefix cache and sessions, so it is used only if someone asks for it.
    let useful = match config.kv_cache_bytes {
        Some(_) => MAX_BLOCKS,
        None => layout
            .most_blocks_of_all(context_tokens(model, config), step, config.block_tokens)
            .saturating_mul(config.max_sequences),
    };
    let least = layout.groups().len();
    // An encoder keeps texts only while the step that has all their tokens is in flight, of which
    // there are at most two.
    let at_once = match model.is_causal() {
        true => MAX_BLOCKS,
        false => {
            let partial = config.max_sequences.min(step);
            let of_step = (step / config.block_tokens).saturating_add(partial);
            of_step.saturating_mul(2 * least)
        }
    };
    let most = useful.min(at_once).min(MAX_BLOCKS);
    let blocks = (budget / block_bytes).min(most);
    if blocks < least {
        let bytes = least.saturating_mul(block_bytes);
        return Err(LoadError::Config {
            name: "kv_cache_bytes",
            value: budget.to_string(),
            expected: match least {
                1 => format!("at least {bytes} (one block of this model)"),
                least => format!(
                    "at least {bytes} (one block for each of the {least} groups of layers of this \
                     model)"
                ),
            },
        });
    }
    if config.preemption == Preemption::Swap && config.swap_bytes < block_bytes {
        let expected = format!(
            "at least {block_bytes} (one block of this model) if preempted sequences are to be \
             swapped out"
        );
        return Err(LoadError::Config {
            name: "swap_bytes",
            value: config.swap_bytes.to_string(),
            expected,
        });
    }
    Ok(CacheShape { blocks, ..block })
}

/// Returns how many blocks of a cache of this shape can be swapped out under the settings;
/// `None` if there is no room for one.
pub(super) fn swap_info<D: Device>(
    config: &EngineConfig,
    shape: &CacheShape,
    device: &D,
) -> Option<SwapInfo> {
    let block_bytes = block_bytes(shape, device);
    let blocks = config.swap_bytes.checked_div(block_bytes)?;
    (blocks > 0).then(|| SwapInfo {
        blocks: blocks.min(MAX_BLOCKS),
        seconds_per_block: block_bytes as f64 / device.swap_bandwidth(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::{CpuDevice, CpuOptions, KvType};
    use crate::model::ModelSource;
    use crate::runner::demand::Demand;
    use crate::weights::DType;

    /// Returns the plan for the layers of Gemma 3 1B, with `full` of 26 layers without a window.
    fn plan(full: usize) -> MemoryPlan {
        let windows: Vec<Option<usize>> = (0..26)
            .map(|layer| (layer >= full).then_some(512))
            .collect();
        let layout = CacheLayout::new(&windows, 32_768, ATTENTION_SPAN).unwrap();
        let of_layer = 1024;
        MemoryPlan {
            weights: 0,
            activations: 0,
            scratch: 0,
            graphs: 0,
            graph_bytes: 0,
            pinned: 0,
            batch_tokens: 512,
            cache_per_token: 26 * of_layer,
            cache_blocks: 10_000,
            block_bytes: layout.layers_per_block() * 16 * of_layer,
            block_tokens: 16,
            state_slots: 0,
            state_bytes: 0,
            state_layers: 0,
            layout,
            context_tokens: 32_768,
        }
    }

    #[test]
    fn a_sequence_takes_less_where_layers_have_windows() {
        let plan = plan(4);
        let all = plan.sequence_bytes_without_windows(8192);
        assert_eq!(all, 8192 * 26 * 1024);
        // All tokens in four layers, and at most 42 blocks in each of the other groups.
        let bytes = plan.sequence_bytes(8192);
        assert!(bytes <= (512 + 6 * 45) * 4 * 16 * 1024, "{bytes}");
        assert!(bytes >= (512 + 6 * 33) * 4 * 16 * 1024, "{bytes}");
        assert!(4 * bytes < all, "{bytes} {all}");
        let longer = plan.sequence_bytes(32_768);
        assert!(5 * longer < plan.sequence_bytes_without_windows(32_768));
        // A sequence shorter than the windows saves nothing, and the empty places cost some.
        let short = plan.sequence_bytes(16);
        assert_eq!(short, 7 * 4 * 16 * 1024);
    }

    #[test]
    fn without_windows_the_cache_holds_as_many_tokens_as_it_has_slots() {
        let plan = plan(26);
        assert_eq!(plan.tokens(), 160_000);
        for tokens in [1, 16, 17, 32_768] {
            let bytes = plan.sequence_bytes(tokens);
            assert_eq!(bytes, plan.sequence_bytes_without_windows(tokens));
        }
        let expected = "26 layers keep all tokens: 26624 bytes per token, 832.0 MiB per sequence";
        assert_eq!(plan.describe_memory(), [expected]);
    }

    #[test]
    fn a_cache_has_a_block_for_each_group_and_none_that_would_never_be_used() {
        let source = source_of("gemma3");
        let (model, config) = (source.config(), EngineConfig::default());
        let device = CpuDevice::new(&CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        })
        .unwrap();
        let layout = cache_layout(model, &config).unwrap();
        assert_eq!(layout.groups().len(), 6);
        let step = 512;
        let shape = |budget| cache_shape(model, &config, (&layout, step), budget, &device);

        let most = shape(usize::MAX).unwrap();
        let of_sequence = layout.most_blocks_of_all(512, step, config.block_tokens);
        assert_eq!(most.blocks, of_sequence * config.max_sequences);
        assert_eq!(most.layers, 1);
        let asked = EngineConfig {
            kv_cache_bytes: Some(1 << 40),
            ..config.clone()
        };
        let more = cache_shape(model, &asked, (&layout, step), 1 << 40, &device).unwrap();
        assert!(
            more.blocks > most.blocks,
            "a size that was asked for is used"
        );
        let block = block_bytes(&most, &device);
        assert_eq!(shape(6 * block).unwrap().blocks, 6);
        let error = shape(6 * block - 1).unwrap_err().to_string();
        let least = format!("at least {} (one block for each of the 6 groups", 6 * block);
        assert!(error.contains(&least), "{error}");
    }

    /// Returns a model of the size of a tiny checkpoint.
    fn source_of(name: &str) -> ModelSource {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/tiny");
        let settings = std::fs::read_to_string(format!("{tiny}/{name}/config.json")).unwrap();
        let settings = serde_json::from_str(&settings).unwrap();
        ModelSource::random(&settings, DType::BF16).unwrap()
    }

    /// Returns the plan for a tiny checkpoint on the CPU.
    fn plan_of(name: &str) -> MemoryPlan {
        let source = source_of(name);
        let options = CpuOptions {
            threads: Some(1),
            kv: KvType::F16,
            ..CpuOptions::default()
        };
        let device = CpuDevice::new(&options).unwrap();
        let config = EngineConfig::default();
        let demand = Demand::new(&source, &config, &device).unwrap();
        demand.plan(&device).unwrap()
    }

    #[test]
    fn every_second_layer_of_gpt_oss_keeps_its_window() {
        let plan = plan_of("gpt-oss");
        let expected = [
            "2 layers keep all tokens: 512 bytes per token, 0.2 MiB per sequence",
            "2 layers keep the last 24 tokens: 512 bytes per token, 0.1 MiB per sequence",
        ];
        assert_eq!(plan.describe_memory(), expected);
        let bytes = plan.sequence_bytes(512);
        let all = plan.sequence_bytes_without_windows(512);
        assert!(10 * bytes < 8 * all, "{bytes} of {all}");
    }

    #[test]
    fn layers_without_a_cache_of_their_own_take_no_memory() {
        let plan = plan_of("gemma4");
        // Of six layers, two with a window and two without own keys and values, of two heads of
        // 32 and of 64 elements.
        assert_eq!(plan.cache_per_token, 2 * 2 * 2 * (2 * 32 + 2 * 64));
        let expected = [
            "2 layers keep all tokens, in 2 groups: 1024 bytes per token, 0.5 MiB per sequence",
            "2 layers keep the last 24 tokens: 512 bytes per token, 0.1 MiB per sequence",
            "2 layers use the cache of another",
        ];
        assert_eq!(plan.describe_memory(), expected);
        // Both layers with a window share the one place of a block.
        assert_eq!(plan.block_bytes, 16 * 2 * 2 * 2 * 64);
    }

    #[test]
    fn groups_are_described_by_what_their_layers_keep() {
        let described = plan(25).describe_memory();
        let last = "1 layer keeps the last 512 tokens: 1024 bytes per token, ";
        assert!(described[1].starts_with(last), "{described:?}");
        assert_eq!(described.len(), 2);
        let mib = 6.0 * 44.0 * 4.0 * 16.0 / 1024.0;
        let expected = [
            "4 layers keep all tokens: 4096 bytes per token, 128.0 MiB per sequence".to_owned(),
            format!(
                "22 layers keep the last 512 tokens, in 6 groups: 22528 bytes per token, \
                 {mib:.1} MiB per sequence"
            ),
        ];
        assert_eq!(plan(4).describe_memory(), expected);
    }

    #[test]
    fn the_memory_of_all_groups_is_that_of_a_sequence() {
        for full in [1, 4, 25, 26] {
            let plan = plan(full);
            let groups = plan.groups();
            let sum = |of: fn(&GroupMemory) -> usize| groups.iter().map(of).sum::<usize>();
            assert_eq!(sum(|group| group.bytes_per_token), plan.cache_per_token);
            let of_sequence = plan.sequence_bytes(plan.context_tokens);
            assert_eq!(sum(|group| group.bytes_per_sequence), of_sequence);
            assert_eq!(sum(|group| group.layers.len()), 26);
        }
    }
}
