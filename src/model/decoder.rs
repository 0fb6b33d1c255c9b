//! The decoder: a list of layers, computed over any device.

mod norm;
mod normed_experts;
mod per_layer;
mod streams;
mod weights;
mod workspace;

use super::layer::{Attention, LayerSpec, NormKind, QkNormKind};
use super::{ModelConfig, ModelError, ModelSource};
use crate::device::{
    AttentionSpec, Batch, CacheLayer, Device, DeviceError, Finished, QkNorm, RopeSpec, Rotary,
    RotaryAttention, Staged,
};
use norm::Norm;
use normed_experts::NormedExperts;
use per_layer::{InputWeights, own_input};
use std::ops::Range;
use streams::StreamWeights;
use weights::{FeedForwardWeights, LayerWeights};
use workspace::{AttentionSpace, DenseSpace, Workspace, of_attention, of_dense};

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
    /// The inputs of single layers.
    inputs: Option<InputWeights<D>>,
    /// The residual streams, if there are several.
    streams: Option<StreamWeights<D>>,
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
        let inputs = InputWeights::load(source, device)?;
        let streams = StreamWeights::load(source, device)?;
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
            inputs,
            streams,
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
        if let Some(inputs) = &self.inputs {
            inputs.compute(device, rows, &mut self.workspace)?;
        }
        if let Some(streams) = &self.streams {
            streams.begin(device, rows, &mut self.workspace)?;
        }
        // Whether `delta` is still to be added to the residual stream.
        let mut pending = false;
        let specs = self.config.layers.iter().zip(&self.places);
        for (index, ((spec, &place), layer)) in specs.zip(&self.layers).enumerate() {
            let step = LayerStep {
                spec,
                norm: Norm::of(&self.config),
                place,
                rows,
            };
            let workspace = &mut self.workspace;
            if let Some(streams) = &layer.streams {
                streams.predict(device, rows, workspace)?;
            }
            let norms = &layer.mixer_norms;
            step.input(device, workspace, norms.before.as_ref(), pending)?;
            let nothing = self.config.ropes.len();
            let rope = &self.ropes[spec.attention().rope.unwrap_or(nothing)];
            step.attention(device, workspace, layer, rope, cache)?;
            pending = step.output(device, workspace, norms.after.as_ref())?;
            if let Some(side) = &layer.side {
                // `check_layers` allows it only where the output is added by its norm.
                side.add(device, step.norm.epsilon, rows, workspace)?;
            }
            let norms = &layer.feed_forward_norms;
            step.input(device, workspace, norms.before.as_ref(), pending)?;
            step.feed_forward(device, workspace, layer)?;
            pending = step.output(device, workspace, norms.after.as_ref())?;
            let ends = layer.input.is_some() || layer.scale.is_some() || layer.streams.is_some();
            if ends && std::mem::take(&mut pending) {
                device.add(&mut workspace.residual, &workspace.delta, rows)?;
            }
            match &layer.streams {
                Some(streams) => {
                    let input = (index, layer.input.as_ref());
                    streams.correct(device, &self.config, input, rows, workspace)?;
                }
                None if ends => own_input(device, &self.config, (index, layer), rows, workspace)?,
                None => {}
            }
        }
        if let Some(streams) = &self.streams {
            streams.end(device, rows, &mut self.workspace)?;
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
        layer: &LayerWeights<D>,
        rope: &D::Rope,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let spec = self.spec.attention();
        let Workspace {
            residual,
            normed,
            attentions,
            delta,
            ..
        } = workspace;
        let AttentionSpace { qkv, out, .. } = of_attention(attentions, spec);
        let input = match self.spec.mixer_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
        };
        device.linear(input, &layer.qkv, self.rows, qkv)?;
        let norms = layer.qk_norm.as_ref();
        if spec.shares.is_some() {
            let norm = norms.map(|(q, _)| (q, self.norm.epsilon));
            device.rope_queries(qkv, spec.heads, norm, rope)?;
            if let Some(scale) = spec.query_scale {
                device.scale_queries(qkv, spec.heads, scale)?;
            }
            let spec = attention_spec(spec);
            device.attend(qkv, &spec, layer.sinks.as_ref(), cache, self.place, out)?;
            return device.linear(out, &layer.attention_out, self.rows, delta);
        }
        let norm = norms.and_then(|(q, k)| Some((q, k.as_ref()?)));
        let norm = norm.map(|(q, k)| QkNorm {
            q,
            k,
            epsilon: self.norm.epsilon,
            per_head: spec.qk_norm != Some(QkNormKind::WholeRow),
            values: spec.normalizes_values,
        });
        let rotary = Rotary {
            norm,
            rope,
            query_scale: spec.query_scale,
        };
        let rotary_attention = RotaryAttention {
            rotary,
            spec: attention_spec(spec),
            sinks: layer.sinks.as_ref(),
        };
        device.rope_attend(qkv, &rotary_attention, cache, self.place, out)?;
        device.linear(out, &layer.attention_out, self.rows, delta)
    }

    fn feed_forward<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        layer: &LayerWeights<D>,
    ) -> Result<(), DeviceError> {
        let rows = self.rows;
        let Workspace {
            residual,
            normed,
            delta,
            dense,
            router,
            ..
        } = workspace;
        let input = match self.spec.feed_forward_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
        };
        match (&layer.feed_forward, router) {
            (
                FeedForwardWeights::Dense {
                    width,
                    gate_up: weight,
                    down,
                    activation,
                    cut,
                },
                _,
            ) => {
                let DenseSpace {
                    gate_up, hidden, ..
                } = of_dense(dense, *width);
                match cut {
                    None => {
                        device.gated_linear(input, weight, *activation, rows, gate_up, hidden)?;
                    }
                    Some(deviations) => {
                        device.linear(input, weight, rows, gate_up)?;
                        device.cut_gate(gate_up, *deviations, rows)?;
                        device.gated_activation(gate_up, *activation, rows, hidden)?;
                    }
                }
                device.linear(hidden, down, rows, delta)
            }
            (
                FeedForwardWeights::Experts {
                    router,
                    experts,
                    routing,
                    shared: Some(shared),
                    norms: Some(norms),
                },
                Some(_),
            ) => NormedExperts {
                router,
                experts,
                routing: *routing,
                shared,
                norms,
                epsilon: self.norm.epsilon,
            }
            .compute(device, rows, workspace),
            (
                FeedForwardWeights::Experts {
                    router: weight,
                    experts,
                    routing,
                    shared,
                    ..
                },
                Some(router),
            ) => {
                device.linear(input, weight, rows, router)?;
                device.experts(input, router, *routing, experts, rows, delta)?;
                let Some(shared) = shared else {
                    return Ok(());
                };
                // `check_layers` allows shared experts only where `input` is not the residual
                // stream, and nothing but `delta` is pending.
                device.add(residual, delta, rows)?;
                shared.compute(device, rows, routing.activation, workspace)
            }
            _ => unreachable!("the workspace is allocated for the layers that there are"),
        }
    }
}

/// The attention of a layer as devices take it.
fn attention_spec(attention: &Attention) -> AttentionSpec {
    AttentionSpec {
        heads: attention.heads,
        scale: attention.scale,
        window: attention.window,
        chunked: attention.is_chunked,
        softcap: attention.softcap,
    }
}
