//! The decoder: a list of layers, computed over any device.

mod latent;
mod weights;
mod workspace;

use super::layer::{LayerSpec, NormKind, QkNormKind};
use super::{ModelConfig, ModelError, ModelSource};
use crate::device::{
    AttentionSpec, Batch, CacheLayer, Device, DeviceError, Finished, QkNorm, RopeSpec, Rotary,
    RotaryAttention, Staged,
};
use std::ops::Range;
use weights::{AttentionWeights, FeedForwardWeights, LayerWeights, MixerWeights};
use workspace::Workspace;

/// A model on a device.
pub struct Decoder<D: Device> {
    config: ModelConfig,
    embedding: D::Linear,
    layers: Vec<LayerWeights<D>>,
    /// Where each layer's keys and values are in the KV cache.
    places: Vec<CacheLayer>,
    final_norm: D::Vector,
    /// The weight of the final norm times the factor on logits, unless that is 1.
    logit_norm: Option<D::Vector>,
    /// `None` when it is the embedding.
    output: Option<D::Linear>,
    /// The position embeddings that layers refer to by index, and one that rotates nothing.
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
        let mut weight = source.final_norm()?;
        let final_norm = device.load_vector(&weight)?;
        let logit_norm = match config.logit_scale {
            1.0 => None,
            scale => {
                weight.iter_mut().for_each(|weight| *weight *= scale);
                Some(device.load_vector(&weight)?)
            }
        };
        let ropes = rope_specs(&config, limits).into_iter();
        let ropes = ropes.map(|spec| device.load_rope(&spec));
        let ropes = ropes.collect::<Result<Vec<_>, _>>()?;
        let workspace = Workspace::allocate(&config, device, limits)?;
        Ok(Self {
            places: (0..config.layers.len()).map(place).collect(),
            config,
            embedding,
            layers,
            final_norm,
            logit_norm,
            output,
            ropes,
            workspace,
        })
    }

    /// Returns the bytes that the activations of steps within `limits` and the tables of
    /// positions take on `device`.
    pub fn activation_bytes(config: &ModelConfig, device: &D, limits: StepLimits) -> usize {
        let mut bytes = workspace::bytes(config, device, limits);
        let specs = rope_specs(config, limits);
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
                norm: Norm::of(&self.config),
                place,
                rows,
            };
            let workspace = &mut self.workspace;
            let norms = &layer.mixer_norms;
            step.input(device, workspace, norms.before.as_ref(), pending)?;
            let ropes = &self.ropes;
            match &layer.mixer {
                MixerWeights::Attention(weights) => {
                    let rope = &ropes[weights.spec.rope.unwrap_or(self.config.ropes.len())];
                    step.attention(device, workspace, weights, rope, cache)?;
                }
                MixerWeights::Latent(weights) => {
                    step.latent(device, workspace, weights, ropes, cache)?;
                }
            }
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
        let norm = Norm::of(&self.config);
        norm.compute(device, residual, &self.final_norm, rows, normed)?;
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
        let norm = Norm::of(&self.config);
        let weight = self.logit_norm.as_ref().unwrap_or(&self.final_norm);
        norm.compute(device, gathered, weight, samples, normed)?;
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        device.linear(normed, output, samples, logits)?;
        match self.config.logit_softcap {
            Some(cap) => device.softcap(logits, cap, samples),
            None => Ok(()),
        }
    }
}

/// Returns the position embeddings of a model, and one that rotates nothing.
fn rope_specs(config: &ModelConfig, limits: StepLimits) -> Vec<RopeSpec> {
    let specs = config.ropes.iter().map(|rope| rope.spec(limits.positions));
    let nothing = RopeSpec::nothing(limits.positions);
    specs.chain([nothing]).collect()
}

/// What the norms of the residual stream compute.
#[derive(Clone, Copy)]
struct Norm {
    kind: NormKind,
    /// Added to the mean square, or the variance.
    epsilon: f32,
}

impl Norm {
    fn of(config: &ModelConfig) -> Self {
        Self {
            kind: config.norm,
            epsilon: config.norm_epsilon,
        }
    }

    /// Normalises `x`. A layer norm also subtracts the mean of each row of `x` itself: nothing
    /// that reads `x` later depends on it.
    fn compute<D: Device>(
        self,
        device: &mut D,
        x: &mut D::Tensor,
        weight: &D::Vector,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), DeviceError> {
        if self.kind == NormKind::Layer {
            device.centre(x, rows)?;
        }
        device.rms_norm(x, weight, self.epsilon, rows, out)
    }
}

/// One layer of one step.
struct LayerStep<'a> {
    spec: &'a LayerSpec,
    norm: Norm,
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
        let (epsilon, rows) = (self.norm.epsilon, self.rows);
        match norm {
            Some(weight) if pending && self.norm.kind == NormKind::Rms => {
                device.add_rms_norm(residual, delta, weight, epsilon, rows, normed)
            }
            Some(weight) => {
                if pending {
                    device.add(residual, delta, rows)?;
                }
                self.norm.compute(device, residual, weight, rows, normed)
            }
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
                device.rms_norm_add(delta, weight, self.norm.epsilon, self.rows, residual)?;
                Ok(false)
            }
            None => Ok(true),
        }
    }

    fn attention<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        weights: &AttentionWeights<D>,
        rope: &D::Rope,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let spec = &weights.spec;
        let Workspace {
            residual,
            normed,
            qkv,
            attention,
            delta,
            ..
        } = workspace;
        let input = match self.spec.mixer_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
        };
        device.linear(input, &weights.qkv, self.rows, qkv)?;
        let norm = weights.qk_norm.as_ref().map(|(q, k)| QkNorm {
            q,
            k,
            epsilon: self.norm.epsilon,
            per_head: spec.qk_norm != Some(QkNormKind::WholeRow),
        });
        let rotary = Rotary {
            norm,
            rope,
            query_scale: spec.query_scale,
        };
        let spec = AttentionSpec {
            heads: spec.heads,
            scale: spec.scale,
            window: spec.window,
            chunked: spec.is_chunked,
            softcap: spec.softcap,
        };
        let rotary_attention = RotaryAttention {
            rotary,
            spec,
            sinks: weights.sinks.as_ref(),
        };
        device.rope_attend(qkv, &rotary_attention, cache, self.place, attention)?;
        device.linear(attention, &weights.out, self.rows, delta)
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
            shared_gate_up,
            shared_hidden,
            ..
        } = workspace;
        let input = match self.spec.feed_forward_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
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
                    shared,
                },
                _,
                _,
                Some(router),
            ) => {
                device.linear(input, weight, self.rows, router)?;
                device.experts(input, router, *routing, experts, self.rows, delta)?;
                let shared = shared.as_ref().zip(shared_gate_up.as_mut());
                let Some(((shared, gate_up), hidden)) = shared.zip(shared_hidden.as_mut()) else {
                    return Ok(());
                };
                // `check_layers` allows shared experts only where `input` is not the residual
                // stream, and nothing but `delta` is pending.
                device.add(residual, delta, self.rows)?;
                let (rows, activation) = (self.rows, routing.activation);
                device.gated_linear(normed, &shared.gate_up, activation, rows, gate_up, hidden)?;
                device.linear(hidden, &shared.down, rows, delta)
            }
            _ => unreachable!("the workspace is allocated for the layers that there are"),
        }
    }
}
