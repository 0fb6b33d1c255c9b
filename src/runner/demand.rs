//! What a model needs of a device: the limits of its steps, and the memory that they take.

use super::LoadError;
use super::limits::{check, context_tokens};
use super::memory::{MemoryPlan, cache_layout, cache_shape, least_cache, state_shape};
use crate::cache::CacheLayout;
use crate::config::EngineConfig;
use crate::device::{
    CacheShape, Device, DeviceLimits, ExpertShape, ModelShape, StateShape, StepMemory,
};
use crate::model::{Decoder, ModelConfig, ModelSource, StepLimits};

/// The smallest default of the number of tokens per step.
const LEAST_STEP_TOKENS: usize = 512;

/// By default, texts that are encoded have at most this many tokens, all of which are in one step.
const MOST_TEXT_TOKENS: usize = 1 << 15;

/// By default, the number of tokens per step is chosen so that activations and scratch memory
/// take at most this share of the memory that the weights leave, as a divisor.
const STEP_SHARE: usize = 4;

/// If memory is too small, limits are proposed that leave room for a sequence of this many tokens.
const LEAST_SEQUENCE: usize = 1024;

/// A model and the settings to run it with on a device.
pub(super) struct Demand<'a> {
    source: &'a ModelSource,
    config: &'a EngineConfig,
    layout: CacheLayout,
    limits: DeviceLimits,
    /// Bytes of the device's memory that may be used, before anything is allocated; `None` if it
    /// has no memory of its own.
    usable: Option<usize>,
}

/// Bytes that a model takes on a device besides its KV cache.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub(super) weights: usize,
    pub(super) activations: usize,
    pub(super) steps: StepMemory,
}

/// Dimensions of what sequences keep on the device.
pub(super) struct Shapes {
    pub(super) cache: CacheShape,
    pub(super) states: StateShape,
}

impl Needs {
    fn total(&self) -> usize {
        let steps = self.steps.scratch.saturating_add(self.steps.graphs);
        let rest = self.activations.saturating_add(steps);
        self.weights.saturating_add(rest)
    }
}

impl<'a> Demand<'a> {
    /// Decides the limits of steps. Nothing may have been allocated on the device yet.
    pub(super) fn new<D: Device>(
        source: &'a ModelSource,
        config: &'a EngineConfig,
        device: &D,
    ) -> Result<Self, LoadError> {
        let model = source.config();
        check(model, config)?;
        let layout = cache_layout(model, config)?;
        let limits = DeviceLimits {
            rows: 1,
            sequences: 1,
            sequence_tokens: context_tokens(model, config),
            block_tokens: config.block_tokens,
            groups: layout.groups().len(),
            vocabulary: model.vocabulary,
            model: shape(model),
        };
        let usable = match device.free_memory()? {
            Some(_) => Some(device.cache_budget(0)?),
            None => None,
        };
        let mut demand = Self {
            source,
            config,
            layout,
            limits,
            usable,
        };
        let rows = match config.max_batch_tokens {
            Some(rows) => rows,
            None => demand.default_rows(device),
        };
        demand.limits = demand.limits_of(rows);
        if !model.is_causal() {
            // A step has all tokens of a text.
            demand.limits.sequence_tokens = demand.limits.sequence_tokens.min(rows);
        }
        Ok(demand)
    }

    /// Returns the limits of steps.
    pub(super) fn limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// Returns the limits of steps, as the decoder takes them.
    pub(super) fn step_limits(&self) -> StepLimits {
        step_limits(&self.limits)
    }

    /// Returns how the layers share the KV cache.
    pub(super) fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    fn limits_of(&self, rows: usize) -> DeviceLimits {
        DeviceLimits {
            rows,
            sequences: self.config.max_sequences.min(rows),
            ..self.limits
        }
    }

    /// Returns the device's default number of tokens per step, or less if activations would take
    /// too much of the memory that weights, graphs and the configured KV cache leave, or if that
    /// cache holds fewer tokens.
    fn default_rows<D: Device>(&self, device: &D) -> usize {
        let rows = device.default_step_tokens();
        // A step of an encoder should have room for a longest text.
        let mut rows = match self.source.config().is_causal() {
            true => rows,
            false => rows.max(self.limits.sequence_tokens.min(MOST_TEXT_TOKENS)),
        };
        // A block of each group.
        let blocks = least_cache(self.source.config(), self.config, &self.layout, device);
        let tokens = self.config.kv_cache_bytes.map_or(usize::MAX, |bytes| {
            (bytes / blocks.max(1)).saturating_mul(self.config.block_tokens)
        });
        let suits = |rows: usize| {
            let needs = self.needs(device, &self.limits_of(rows));
            let steps = needs.activations.saturating_add(needs.steps.scratch);
            let left = self.usable.map_or(usize::MAX, |usable| {
                usable
                    .saturating_sub(needs.weights)
                    .saturating_sub(needs.steps.graphs)
                    .saturating_sub(self.config.kv_cache_bytes.unwrap_or(0))
            });
            steps <= left / STEP_SHARE && rows / 2 < tokens
        };
        while rows > LEAST_STEP_TOKENS && !suits(rows) {
            rows = (rows / 2).max(LEAST_STEP_TOKENS);
        }
        rows
    }

    /// Returns the memory that steps within `limits` take, and an estimate for the weights.
    fn needs<D: Device>(&self, device: &D, limits: &DeviceLimits) -> Needs {
        let model = self.source.config();
        let formats = self.source.parameters().by_format;
        let weights = formats
            .iter()
            .map(|(&format, &count)| device.weight_size(format, count))
            .fold(0, usize::saturating_add);
        Needs {
            weights,
            activations: Decoder::activation_bytes(model, device, step_limits(limits)),
            steps: device.step_memory(limits),
        }
    }

    /// Plans the memory before anything is allocated. The sizes of weights and graphs are
    /// estimates.
    ///
    /// # Errors
    /// Returns [`LoadError::Memory`] if the device has too little memory for the plan, and
    /// [`LoadError::Config`] if the KV cache that the settings ask for is too small.
    pub(super) fn plan<D: Device>(&self, device: &D) -> Result<MemoryPlan, LoadError> {
        let needs = self.needs(device, &self.limits);
        if let (Some(cache), Some(free)) = (self.config.kv_cache_bytes, device.free_memory()?)
            && needs.total().saturating_add(cache) > free
        {
            return Err(self.too_little(device, &needs, free));
        }
        let shapes = self.shapes(device, &needs, needs.total())?;
        Ok(self.planned(device, needs, &shapes))
    }

    /// Returns the plan, and the shapes of the KV cache and of the states, after everything but
    /// the graphs and the cache has been allocated.
    ///
    /// # Errors
    /// Returns the same errors as [`Demand::plan`].
    pub(super) fn plan_loaded<D: Device>(
        &self,
        device: &D,
    ) -> Result<(MemoryPlan, Shapes), LoadError> {
        let needs = Needs {
            weights: device.weight_bytes(),
            ..self.needs(device, &self.limits)
        };
        let shapes = self.shapes(device, &needs, needs.steps.graphs)?;
        Ok((self.planned(device, needs, &shapes), shapes))
    }

    /// Returns the shapes of the KV cache and of the states. `unallocated` bytes are yet to be
    /// allocated for anything else.
    fn shapes<D: Device>(
        &self,
        device: &D,
        needs: &Needs,
        unallocated: usize,
    ) -> Result<Shapes, LoadError> {
        let (model, config, layout) = (self.source.config(), self.config, &self.layout);
        let budget = match config.kv_cache_bytes {
            Some(bytes) => bytes,
            None => {
                let budget = device.cache_budget(unallocated)?;
                let least = least_cache(model, config, layout, device);
                if self.usable.is_some() && budget < least {
                    let allocated = needs.total().saturating_sub(unallocated);
                    let usable = device.cache_budget(0)?.saturating_add(allocated);
                    return Err(self.too_little(device, needs, usable));
                }
                budget
            }
        };
        let step = self.limits.rows;
        let states = state_shape(model, config, budget, device)?;
        let rest = budget.saturating_sub(device.state_bytes(&states));
        Ok(Shapes {
            cache: cache_shape(model, config, (layout, step), rest, device)?,
            states,
        })
    }

    fn planned<D: Device>(&self, device: &D, needs: Needs, shapes: &Shapes) -> MemoryPlan {
        let (model, shapes) = (self.source.config(), (&shapes.cache, &shapes.states));
        MemoryPlan::new(needs, &self.layout, &self.limits, model, shapes, device)
    }

    /// Returns the error for a device of which `usable` bytes may be used. It proposes settings
    /// that fit.
    fn too_little<D: Device>(&self, device: &D, needs: &Needs, usable: usize) -> LoadError {
        let least = least_cache(self.source.config(), self.config, &self.layout, device);
        let cache = self.config.kv_cache_bytes.unwrap_or(least);
        LoadError::Memory {
            device: device.info().name,
            needed: mib(needs.total().saturating_add(cache)),
            usable: usable >> 20,
            parts: format!(
                "weights {}, activations {}, scratch {}, graphs {}, KV cache {}{}",
                mib(needs.weights),
                mib(needs.activations),
                mib(needs.steps.scratch),
                mib(needs.steps.graphs),
                if self.config.kv_cache_bytes.is_none() {
                    "at least "
                } else {
                    ""
                },
                mib(cache)
            ),
            remedy: self.remedy(device, needs, usable),
        }
    }

    /// Returns which settings would fit in `usable` bytes, with room for a sequence of
    /// [`LEAST_SEQUENCE`] tokens.
    fn remedy<D: Device>(&self, device: &D, needs: &Needs, usable: usize) -> String {
        let room = |limits: &DeviceLimits| {
            let needs = Needs {
                weights: needs.weights,
                ..self.needs(device, limits)
            };
            usable.checked_sub(needs.total())
        };
        let fits = |limits: &DeviceLimits| {
            room(limits).is_some_and(|room| room >= self.sequence(device, limits))
        };
        let mut limits = self.limits;
        let mut settings = Vec::new();
        for setting in [Limit::BatchTokens, Limit::Sequences, Limit::Context] {
            let before = *setting.of(&mut limits);
            while !fits(&limits) && *setting.of(&mut limits) > setting.least() {
                let value = setting.of(&mut limits);
                *value = (*value / 2).max(setting.least());
                limits.sequences = limits.sequences.min(limits.rows);
            }
            let after = *setting.of(&mut limits);
            if after != before {
                settings.push(format!("a {} of {after}", setting.name()));
            }
        }
        let room = room(&limits).unwrap_or(0);
        if self.config.kv_cache_bytes.is_some_and(|cache| cache > room) {
            settings.push(format!("a kv_cache_bytes of {room}"));
        }
        match fits(&limits) {
            true => format!("{} would fit", settings.join(" and ")),
            false => format!(
                "no limits leave room for a sequence of {} tokens; use a GPU with more free \
                 memory, or weights of fewer bits",
                limits.sequence_tokens.min(LEAST_SEQUENCE)
            ),
        }
    }

    /// Returns the bytes of the KV cache for one sequence of [`LEAST_SEQUENCE`] tokens, or of the
    /// maximum length if that is less.
    fn sequence<D: Device>(&self, device: &D, limits: &DeviceLimits) -> usize {
        let (layout, block_tokens) = (&self.layout, self.config.block_tokens);
        let tokens = limits.sequence_tokens.min(LEAST_SEQUENCE);
        let blocks = layout.most_blocks_of_all(tokens, limits.rows, block_tokens);
        let of_groups = least_cache(self.source.config(), self.config, layout, device);
        let block_bytes = of_groups / layout.groups().len().max(1);
        blocks.saturating_mul(block_bytes)
    }
}

/// A limit that can be lowered if memory is too small.
#[derive(Clone, Copy)]
enum Limit {
    BatchTokens,
    Sequences,
    Context,
}

impl Limit {
    /// Returns the name of the setting.
    fn name(self) -> &'static str {
        match self {
            Self::BatchTokens => "max_batch_tokens",
            Self::Sequences => "max_sequences",
            Self::Context => "max_context",
        }
    }

    /// Returns the smallest value that is proposed.
    fn least(self) -> usize {
        match self {
            Self::BatchTokens => 64,
            Self::Sequences => 1,
            Self::Context => 512,
        }
    }

    /// Returns the limit.
    fn of(self, limits: &mut DeviceLimits) -> &mut usize {
        match self {
            Self::BatchTokens => &mut limits.rows,
            Self::Sequences => &mut limits.sequences,
            Self::Context => &mut limits.sequence_tokens,
        }
    }
}

/// Returns a number of bytes in MiB, rounded up.
fn mib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}

fn step_limits(limits: &DeviceLimits) -> StepLimits {
    StepLimits {
        rows: limits.rows,
        samples: limits.sequences,
        positions: limits.sequence_tokens,
    }
}

/// Returns the sizes of a model that a device's scratch memory depends on.
fn shape(model: &ModelConfig) -> ModelShape {
    let normed = model.layers.iter().all(|layer| {
        !(layer.mixer_norms.reads_residual() || layer.feed_forward_norms.reads_residual())
    });
    let is_read = !normed || model.per_layer_inputs.is_some() || model.streams.is_some();
    ModelShape {
        layers: model.layers.len(),
        heads: model.cache_heads(),
        narrow_heads: model.narrow_heads(),
        // Whether the residual stream itself is multiplied by weights, without a norm before.
        full_columns: if is_read { model.hidden } else { 0 },
        experts: model.experts().map(|experts| ExpertShape {
            count: experts.count,
            top_k: experts.routing.top_k,
            columns: model.hidden,
            hidden: experts.width,
        }),
        streams: model.streams.map_or(0, |streams| streams.count),
    }
}
