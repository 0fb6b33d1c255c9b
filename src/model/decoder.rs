//! The decoder: a list of layers, computed over any device.

mod weights;
mod workspace;

use super::layer::{LayerSpec, QkNormKind};
use super::{ModelConfig, ModelError, ModelSource};
use crate::device::{
    AttentionSpec, Batch, CacheLayer, Device, DeviceError, Finished, QkNorm, RopeSpec, Rotary,
    Staged,
};
use std::ops::Range;
use weights::{FeedForwardWeights, LayerWeights};
use workspace::Workspace;

/// A model on a device.
pub struct Decoder<D: Device> {
    config: ModelConfig,
    embedding: D::Linear,
    layers: Vec<LayerWeights<D>>,
    /// Where each layer's keys and values are in the KV cache.
    places: Vec<CacheLayer>,
    final_norm: D::Vector,
    /// `None` when it is the embedding.
    output: Option<D::Linear>,
    /// The position embeddings that layers refer to by index.
    ropes: Vec<D::Rope>,
    workspace: Workspace<D::Tensor>,
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
    /// Loads a model. `place` returns where a layer's keys and values are in the KV cache.
    /// `progress` is told after each layer how many of how many are done.
    pub fn load(
        source: &ModelSource,
        device: &mut D,
        limits: StepLimits,
        place: impl Fn(usize) -> CacheLayer,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let config = source.config().clone();
        let total = config.layers.len() + 1;
        progress(0, total);
        let embedding = device.load_linear(&source.embedding()?.spec())?;
        let output = match source.output()? {
            Some(output) => Some(device.load_linear(&output.spec())?),
            None => None,
        };
        progress(1, total);
        let mut layers = Vec::with_capacity(config.layers.len());
        for layer in 0..config.layers.len() {
            layers.push(LayerWeights::load(source, device, layer)?);
            progress(layer + 2, total);
        }
        let final_norm = device.load_vector(&source.final_norm()?)?;
        let ropes = config.ropes.iter();
        let ropes = ropes.map(|rope| device.load_rope(&rope.spec(limits.positions)));
        let ropes = ropes.collect::<Result<Vec<_>, _>>()?;
        let workspace = Workspace::allocate(&config, device, limits)?;
        Ok(Self {
            places: (0..config.layers.len()).map(place).collect(),
            config,
            embedding,
            layers,
            final_norm,
            output,
            ropes,
            workspace,
        })
    }

    /// Returns the bytes that the activations of steps within `limits` and the tables of
    /// positions take on `device`.
    pub fn activation_bytes(config: &ModelConfig, device: &D, limits: StepLimits) -> usize {
        let mut bytes = workspace::bytes(config, device, limits);
        let specs = config.ropes.iter().map(|rope| rope.spec(limits.positions));
        let specs: Vec<RopeSpec> = specs.collect();
        for (index, spec) in specs.iter().enumerate() {
            if !specs[..index].contains(spec) {
                bytes = bytes.saturating_add(device.rope_bytes(spec));
            }
        }
        bytes
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
                let outcome = self.enqueue(device, batch.rows(), batch.sample_rows.len(), cache);
                if device.finish(outcome)? == Finished::Done {
                    break;
                }
            }
        }
        Ok(&self.workspace.logits)
    }

    /// Runs the steps that make later ones fast. `progress` is called after each of them with
    /// the number of steps that have run.
    pub fn warm_up(
        &mut self,
        device: &mut D,
        cache: &mut D::Cache,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(), DeviceError> {
        for step in 0..device.warm_up_steps() {
            device.warm_up(step, &mut |device, rows| {
                self.enqueue(device, rows, rows, cache)
            })?;
            progress(step + 1);
        }
        Ok(())
    }

    /// Enqueues the operations of a staged step with this number of rows, and of rows that are
    /// sampled.
    fn enqueue(
        &mut self,
        device: &mut D,
        rows: usize,
        samples: usize,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let scale = self.config.embedding_scale;
        device.embed(&self.embedding, scale, &mut self.workspace.residual)?;
        // Whether `delta` is still to be added to the residual stream.
        let mut pending = false;
        let specs = self.config.layers.iter().zip(&self.places);
        for ((spec, &place), layer) in specs.zip(&self.layers) {
            let step = LayerStep {
                spec,
                epsilon: self.config.norm_epsilon,
                place,
                rows,
            };
            let workspace = &mut self.workspace;
            let norms = &layer.mixer_norms;
            step.input(device, workspace, norms.before.as_ref(), pending)?;
            let rope = &self.ropes[spec.attention().rope];
            step.attention(device, workspace, layer, rope, cache)?;
            pending = step.output(device, workspace, norms.after.as_ref())?;
            let norms = &layer.feed_forward_norms;
            step.input(device, workspace, norms.before.as_ref(), pending)?;
            step.feed_forward(device, workspace, layer)?;
            pending = step.output(device, workspace, norms.after.as_ref())?;
        }
        if pending {
            device.add(&mut self.workspace.residual, &self.workspace.delta, rows)?;
        }
        self.logits(device, samples)
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
    spec: &'a LayerSpec,
    /// Added to the mean square in norms.
    epsilon: f32,
    place: CacheLayer,
    rows: usize,
}

impl LayerStep<'_> {
    /// Adds what is pending to the residual stream and makes a sub-layer's input.
    fn input<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        norm: Option<&D::Vector>,
        pending: bool,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            delta,
            ..
        } = workspace;
        let (epsilon, rows) = (self.epsilon, self.rows);
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
        workspace: &mut Workspace<D::Tensor>,
        norm: Option<&D::Vector>,
    ) -> Result<bool, DeviceError> {
        let Workspace {
            residual, delta, ..
        } = workspace;
        match norm {
            Some(weight) => {
                device.rms_norm_add(delta, weight, self.epsilon, self.rows, residual)?;
                Ok(false)
            }
            None => Ok(true),
        }
    }

    fn attention<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        layer: &LayerWeights<D>,
        rope: &D::Rope,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let spec = self.spec.attention();
        let Workspace {
            residual,
            normed,
            qkv,
            attention,
            delta,
            ..
        } = workspace;
        let input = if layer.mixer_norms.before.is_some() {
            normed
        } else {
            residual
        };
        device.linear(input, &layer.qkv, self.rows, qkv)?;
        let norm = layer.qk_norm.as_ref().map(|(q, k)| QkNorm {
            q,
            k,
            epsilon: self.epsilon,
            per_head: spec.qk_norm == Some(QkNormKind::PerHead),
        });
        let rotary = Rotary { norm, rope };
        let spec = AttentionSpec {
            heads: spec.heads,
            scale: spec.scale,
            window: spec.window,
            softcap: spec.softcap,
        };
        device.rope_attend(qkv, &rotary, &spec, cache, self.place, attention)?;
        device.linear(attention, &layer.attention_out, self.rows, delta)
    }

    fn feed_forward<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        layer: &LayerWeights<D>,
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
        let input = if layer.feed_forward_norms.before.is_some() {
            normed
        } else {
            residual
        };
        match (&layer.feed_forward, gate_up, hidden, router) {
            (
                FeedForwardWeights::Dense {
                    gate_up: weight,
                    down,
                    activation,
                },
                Some(gate_up),
                Some(hidden),
                _,
            ) => {
                device.gated_linear(input, weight, *activation, self.rows, gate_up, hidden)?;
                device.linear(hidden, down, self.rows, delta)
            }
            (
                FeedForwardWeights::Experts {
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
