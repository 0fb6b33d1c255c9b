//! The decoder: every family's layers, computed over any device.

use super::tensors::Part;
use super::{ModelConfig, ModelError, ModelSource, NormPlacement, QkNormKind};
use crate::device::{
    AttentionSpec, Batch, Device, DeviceError, Finished, LinearSpec, Precision, QkNorm, RopeSpec,
    RoutingSpec, Staged,
};
use std::ops::Range;

/// A layer's weights on a device.
struct Layer<D: Device> {
    attention_norm: Option<D::Vector>,
    qkv: D::Linear,
    qk_norm: Option<(D::Vector, D::Vector)>,
    attention_out: D::Linear,
    post_attention_norm: Option<D::Vector>,
    feed_forward_norm: Option<D::Vector>,
    feed_forward: FeedForward<D>,
    post_feed_forward_norm: Option<D::Vector>,
}

enum FeedForward<D: Device> {
    Dense {
        gate_up: D::Linear,
        down: D::Linear,
    },
    Experts {
        router: D::Linear,
        experts: D::Experts,
        routing: RoutingSpec,
    },
}

/// Activations of a step, allocated once.
struct Workspace<D: Device> {
    /// The residual stream.
    residual: D::Tensor,
    /// Input of a sub-layer.
    normed: D::Tensor,
    qkv: D::Tensor,
    attention: D::Tensor,
    /// Output of a sub-layer.
    delta: D::Tensor,
    gate_up: Option<D::Tensor>,
    hidden: Option<D::Tensor>,
    router: Option<D::Tensor>,
    /// The rows that are sampled.
    gathered: D::Tensor,
    logits: D::Tensor,
}

/// A model on a device.
pub struct Decoder<D: Device> {
    config: ModelConfig,
    embedding: D::Linear,
    layers: Vec<Layer<D>>,
    final_norm: D::Vector,
    /// `None` when it is the embedding.
    output: Option<D::Linear>,
    rope: D::Rope,
    sliding_rope: D::Rope,
    workspace: Workspace<D>,
}

/// The most rows of a step, and of them sampled.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Tokens of a step.
    pub rows: usize,
    /// Sequences of a step.
    pub samples: usize,
    /// Positions are below this.
    pub positions: usize,
}

impl<D: Device> Decoder<D> {
    /// Loads a model. `progress` is told after each layer how many of how many are
    /// done.
    pub fn load(
        source: &ModelSource,
        device: &mut D,
        limits: StepLimits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let config = source.config().clone();
        let total = config.layers + 1;
        progress(0, total);
        let embedding = device.load_linear(&source.embedding()?.spec())?;
        let output = match source.output()? {
            Some(output) => Some(device.load_linear(&output.spec())?),
            None => None,
        };
        progress(1, total);
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(Layer::load(source, device, layer)?);
            progress(layer + 2, total);
        }
        let final_norm = device.load_vector(&source.final_norm()?)?;
        let load_rope = |device: &mut D, spec: RopeSpec| device.load_rope(&spec);
        let rope = load_rope(device, config.rope.spec(limits.positions))?;
        let sliding_rope = load_rope(device, config.sliding_rope.spec(limits.positions))?;
        let workspace = Workspace::allocate(&config, device, limits)?;
        Ok(Self {
            config,
            embedding,
            layers,
            final_norm,
            output,
            rope,
            sliding_rope,
            workspace,
        })
    }

    /// Enqueues one step: every row of `batch` through all layers, keys and values
    /// into `cache`, and the logits of the sampled rows, which are returned.
    pub fn forward(
        &mut self,
        device: &mut D,
        batch: &Batch,
        cache: &mut D::Cache,
    ) -> Result<&D::Tensor, DeviceError> {
        if device.stage(batch)? == Staged::Enqueue {
            loop {
                let outcome = self.enqueue(device, batch, cache);
                if device.finish(outcome)? == Finished::Done {
                    break;
                }
            }
        }
        Ok(&self.workspace.logits)
    }

    /// Enqueues the operations of a staged step.
    fn enqueue(
        &mut self,
        device: &mut D,
        batch: &Batch,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let rows = batch.rows();
        let config = &self.config;
        let scale = if config.family.scales_embeddings() {
            (config.hidden as f32).sqrt()
        } else {
            1.0
        };
        device.embed(&self.embedding, scale, &mut self.workspace.residual)?;
        // Whether `delta` is still to be added to the residual stream.
        let mut pending = false;
        for (index, layer) in self.layers.iter().enumerate() {
            let step = LayerStep {
                config,
                index,
                rows,
            };
            let rope = match config.layer_window(index) {
                Some(_) => &self.sliding_rope,
                None => &self.rope,
            };
            step.input(
                device,
                &mut self.workspace,
                layer.attention_norm.as_ref(),
                pending,
            )?;
            step.attention(device, &mut self.workspace, layer, rope, cache)?;
            pending = step.output(
                device,
                &mut self.workspace,
                layer.post_attention_norm.as_ref(),
            )?;
            step.input(
                device,
                &mut self.workspace,
                layer.feed_forward_norm.as_ref(),
                pending,
            )?;
            step.feed_forward(device, &mut self.workspace, layer)?;
            pending = step.output(
                device,
                &mut self.workspace,
                layer.post_feed_forward_norm.as_ref(),
            )?;
        }
        if pending {
            device.add(&mut self.workspace.residual, &self.workspace.delta, rows)?;
        }
        self.logits(device, batch.sample_rows.len())
    }

    /// Enqueues the sums of the last hidden states, after the final norm, of some ranges
    /// of the last step's `rows` rows. Comes after [`Decoder::forward`].
    pub fn pool(
        &mut self,
        device: &mut D,
        rows: usize,
        ranges: &[Range<usize>],
    ) -> Result<D::Pooling, DeviceError> {
        let Workspace {
            residual, normed, ..
        } = &mut self.workspace;
        let epsilon = self.config.norm_epsilon;
        device.rms_norm(residual, &self.final_norm, epsilon, rows, normed)?;
        device.pool(normed, ranges)
    }

    /// The logits of the sampled rows.
    fn logits(&mut self, device: &mut D, samples: usize) -> Result<(), DeviceError> {
        if samples == 0 {
            return Ok(());
        }
        let Workspace {
            residual,
            normed,
            gathered,
            logits,
            ..
        } = &mut self.workspace;
        device.gather_samples(residual, gathered)?;
        let epsilon = self.config.norm_epsilon;
        device.rms_norm(gathered, &self.final_norm, epsilon, samples, normed)?;
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        device.linear(normed, output, samples, logits)?;
        match self.config.logit_softcap {
            Some(cap) => device.softcap(logits, cap, samples),
            None => Ok(()),
        }
    }
}

/// One layer of one step.
struct LayerStep<'a> {
    config: &'a ModelConfig,
    index: usize,
    rows: usize,
}

impl LayerStep<'_> {
    /// Adds what is pending to the residual stream and makes a sub-layer's input.
    fn input<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D>,
        norm: Option<&D::Vector>,
        pending: bool,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            delta,
            ..
        } = workspace;
        let (epsilon, rows) = (self.config.norm_epsilon, self.rows);
        match norm {
            Some(weight) if pending => {
                device.add_rms_norm(residual, delta, weight, epsilon, rows, normed)
            }
            Some(weight) => device.rms_norm(residual, weight, epsilon, rows, normed),
            None if pending => device.add(residual, delta, rows),
            None => Ok(()),
        }
    }

    /// Takes a sub-layer's output; `true` when it is still to be added.
    fn output<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D>,
        norm: Option<&D::Vector>,
    ) -> Result<bool, DeviceError> {
        let Workspace {
            residual, delta, ..
        } = workspace;
        match norm {
            Some(weight) => {
                let epsilon = self.config.norm_epsilon;
                device.rms_norm_add(delta, weight, epsilon, self.rows, residual)?;
                Ok(false)
            }
            None => Ok(true),
        }
    }

    fn attention<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D>,
        layer: &Layer<D>,
        rope: &D::Rope,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let config = self.config;
        let Workspace {
            residual,
            normed,
            qkv,
            attention,
            delta,
            ..
        } = workspace;
        let input = if layer.attention_norm.is_some() {
            normed
        } else {
            residual
        };
        device.linear(input, &layer.qkv, self.rows, qkv)?;
        let norm = layer.qk_norm.as_ref().map(|(q, k)| QkNorm {
            q,
            k,
            epsilon: config.norm_epsilon,
            per_head: config.family.qk_norm() == Some(QkNormKind::PerHead),
        });
        device.rope_store(qkv, config.heads, norm.as_ref(), rope, cache, self.index)?;
        let spec = AttentionSpec {
            heads: config.heads,
            scale: config.attention_scale,
            window: config.layer_window(self.index),
            softcap: config.attention_softcap,
        };
        device.attend(qkv, &spec, cache, self.index, attention)?;
        device.linear(attention, &layer.attention_out, self.rows, delta)
    }

    fn feed_forward<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D>,
        layer: &Layer<D>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            delta,
            gate_up,
            hidden,
            router,
            ..
        } = workspace;
        let input = if layer.feed_forward_norm.is_some() {
            normed
        } else {
            residual
        };
        match (&layer.feed_forward, gate_up, hidden, router) {
            (
                FeedForward::Dense {
                    gate_up: weight,
                    down,
                },
                Some(gate_up),
                Some(hidden),
                _,
            ) => {
                device.linear(input, weight, self.rows, gate_up)?;
                let activation = self.config.family.activation();
                device.gated_activation(gate_up, activation, self.rows, hidden)?;
                device.linear(hidden, down, self.rows, delta)
            }
            (
                FeedForward::Experts {
                    router: weight,
                    experts,
                    routing,
                },
                _,
                _,
                Some(router),
            ) => {
                device.linear(input, weight, self.rows, router)?;
                device.experts(input, router, *routing, experts, self.rows, delta)
            }
            _ => unreachable!("the workspace is allocated for the layers that there are"),
        }
    }
}

impl<D: Device> Layer<D> {
    fn load(source: &ModelSource, device: &mut D, layer: usize) -> Result<Self, ModelError> {
        let config = source.config();
        let placement = config.family.norm_placement();
        let before = placement != NormPlacement::After;
        let after = placement != NormPlacement::Before;
        let norm = |device: &mut D, wanted: bool, part: Part| -> Result<_, ModelError> {
            if !wanted {
                return Ok(None);
            }
            Ok(Some(device.load_vector(&source.norm(
                layer,
                part,
                config.hidden,
            )?)?))
        };
        let heads = config.heads;
        let qk_norm = match config.family.qk_norm() {
            Some(kind) => {
                let (q, k) = match kind {
                    QkNormKind::PerHead => (heads.head_dim, heads.head_dim),
                    QkNormKind::WholeRow => (heads.q_columns(), heads.kv_heads * heads.head_dim),
                };
                Some((
                    device.load_vector(&source.norm(layer, Part::QueryNorm, q)?)?,
                    device.load_vector(&source.norm(layer, Part::KeyNorm, k)?)?,
                ))
            }
            None => None,
        };
        Ok(Self {
            attention_norm: norm(device, before, Part::AttentionNorm)?,
            qkv: device.load_linear(&source.qkv(layer)?.spec())?,
            qk_norm,
            attention_out: device.load_linear(&source.attention_out(layer)?.spec())?,
            post_attention_norm: norm(device, after, Part::PostAttentionNorm)?,
            feed_forward_norm: norm(device, before, Part::FeedForwardNorm)?,
            feed_forward: FeedForward::load(source, device, layer)?,
            post_feed_forward_norm: norm(device, after, Part::PostFeedForwardNorm)?,
        })
    }
}

impl<D: Device> FeedForward<D> {
    fn load(source: &ModelSource, device: &mut D, layer: usize) -> Result<Self, ModelError> {
        let config = source.config();
        let Some(mixture) = config.layer_experts(layer) else {
            return Ok(Self::Dense {
                gate_up: device.load_linear(&source.gate_up(layer)?.spec())?,
                down: device.load_linear(&source.down(layer)?.spec())?,
            });
        };
        let router = device.load_linear(&source.router(layer, mixture.count)?.spec())?;
        let experts = (0..mixture.count)
            .map(|expert| source.expert(layer, expert, mixture.intermediate))
            .collect::<Result<Vec<_>, _>>()?;
        let specs = experts.iter();
        let (gate_up, down): (Vec<LinearSpec<'_>>, Vec<LinearSpec<'_>>) = specs
            .map(|(gate_up, down)| (gate_up.spec(), down.spec()))
            .unzip();
        let experts = device.load_experts(&gate_up, &down)?;
        let routing = RoutingSpec {
            top_k: mixture.top_k,
            normalize: mixture.normalize,
            activation: config.family.activation(),
        };
        Ok(Self::Experts {
            router,
            experts,
            routing,
        })
    }
}

impl<D: Device> Workspace<D> {
    fn allocate(
        config: &ModelConfig,
        device: &mut D,
        limits: StepLimits,
    ) -> Result<Self, DeviceError> {
        let StepLimits { rows, samples, .. } = limits;
        let dense = (0..config.layers).any(|layer| config.layer_experts(layer).is_none());
        let (activation, full) = (Precision::Activation, Precision::Full);
        let optional = |device: &mut D, wanted: bool, columns: usize| {
            wanted
                .then(|| device.allocate(rows, columns, activation))
                .transpose()
        };
        Ok(Self {
            gate_up: optional(device, dense, 2 * config.intermediate)?,
            hidden: optional(device, dense, config.intermediate)?,
            router: match config.experts {
                Some(experts) => Some(device.allocate(rows, experts.count, full)?),
                None => None,
            },
            residual: device.allocate(rows, config.hidden, full)?,
            normed: device.allocate(rows.max(samples), config.hidden, activation)?,
            qkv: device.allocate(rows, config.heads.qkv_columns(), activation)?,
            attention: device.allocate(rows, config.heads.q_columns(), activation)?,
            delta: device.allocate(rows, config.hidden, activation)?,
            gathered: device.allocate(samples, config.hidden, full)?,
            logits: device.allocate(samples, config.vocabulary, full)?,
        })
    }
}
