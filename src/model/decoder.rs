//! The decoder: computes the layers of a model on any device.

mod gated_delta;
mod latent;
mod layer_step;
mod learned_positions;
mod mamba2;
mod norm;
mod normed_experts;
mod per_layer;
mod short_conv;
mod streams;
mod weights;
mod workspace;

use super::layer::{FeedForward, Mixer};
use super::{ModelConfig, ModelError, ModelSource};
use crate::device::{
    Batch, CacheLayer, Device, DeviceError, Finished, RopeSpec, Staged, StatePart,
};
use layer_step::LayerStep;
use learned_positions::PositionWeights;
use norm::Norm;
use per_layer::{InputWeights, own_input};
use std::ops::Range;
use streams::StreamWeights;
use weights::{LayerWeights, MixerWeights};
use workspace::Workspace;

/// A model loaded on a device.
pub struct Decoder<D: Device> {
    config: ModelConfig,
    embedding: D::Linear,
    layers: Vec<LayerWeights<D>>,
    /// Place of each layer's keys and values in the KV cache. Unused for layers without attention.
    places: Vec<CacheLayer>,
    /// Parts of each layer in the recurrent state of a sequence: that of its convolution, and that
    /// of its recurrence.
    states: Vec<[StatePart; 2]>,
    /// Weight of the norm after the last layer, if there is one.
    final_norm: Option<D::Vector>,
    /// Weight of the final norm, multiplied by the factor on logits. `None` if the factor is 1.
    logit_norm: Option<D::Vector>,
    /// The output projection; `None` if it is the embedding.
    output: Option<D::Linear>,
    /// The weights of per-layer inputs, if the model has them.
    inputs: Option<InputWeights<D>>,
    /// The weights of the residual streams, if there are several.
    streams: Option<StreamWeights<D>>,
    /// The embeddings of positions and segments, if the model has them.
    position_weights: Option<PositionWeights<D>>,
    /// The position embeddings that layers refer to by index, followed by one that rotates nothing,
    /// for layers without a position embedding.
    ropes: Vec<D::Rope>,
    workspace: Workspace<D::Tensor>,
}

/// Upper limits on the size of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    /// Maximum number of tokens per step.
    pub rows: usize,
    /// Maximum number of sampled rows per step.
    pub samples: usize,
    /// Exclusive upper bound of the positions.
    pub positions: usize,
}

impl<D: Device> Decoder<D> {
    /// Loads a model. `place` returns the place of a layer's keys and values in the KV cache.
    /// `progress` is called with the number of parts that are loaded and the total number of
    /// parts: the embedding with the output projection is one part, and each layer is another.
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
        let position_weights = PositionWeights::load(source, device)?;
        let (mut final_norm, mut logit_norm) = (None, None);
        if let Some(mut weight) = source.final_norm()? {
            final_norm = Some(device.load_vector(&weight)?);
            let scale = config.logit_scale;
            if scale != 1.0 {
                weight.iter_mut().for_each(|weight| *weight *= scale);
                logit_norm = Some(device.load_vector(&weight)?);
            }
        }
        let ropes = rope_specs(&config, limits).into_iter();
        let ropes = ropes.map(|spec| device.load_rope(&spec));
        let ropes = ropes.collect::<Result<Vec<_>, _>>()?;
        let workspace = Workspace::allocate(&config, device, limits)?;
        Ok(Self {
            places: (0..config.layers.len()).map(place).collect(),
            states: config.states(device).layers,
            config,
            embedding,
            layers,
            final_norm,
            logit_norm,
            output,
            inputs,
            streams,
            position_weights,
            ropes,
            workspace,
        })
    }

    /// Returns the number of bytes that the activations of steps within `limits` and the rotary
    /// embeddings take on `device`.
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

    /// Enqueues the forward pass of one step: computes every row of `batch` through all layers,
    /// writes keys and values to `cache`, and returns the logits of the sampled rows.
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

    /// Runs the device's warm-up steps, so that later steps are fast from the start. `progress`
    /// is called after each of them with the number of steps that have run.
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

    /// Enqueues the operations of a staged step with `rows` rows, of which `samples` are sampled. A
    /// model without a norm after the last layer, an encoder, has no logits.
    fn enqueue(
        &mut self,
        device: &mut D,
        rows: usize,
        samples: usize,
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let norm = Norm::of(&self.config);
        let workspace = &mut self.workspace;
        match &self.position_weights {
            Some(positions) => positions.embed(device, &self.embedding, norm, rows, workspace)?,
            None => {
                let scale = self.config.embedding_scale;
                device.embed(&self.embedding, scale, &mut workspace.residual)?;
            }
        }
        if let Some(inputs) = &self.inputs {
            inputs.compute(device, rows, &mut self.workspace)?;
        }
        if let Some(streams) = &self.streams {
            streams.begin(device, rows, &mut self.workspace)?;
        }
        // Whether `delta` is still to be added to the residual stream.
        let mut pending = false;
        let places = self.places.iter().zip(&self.states);
        let specs = self.config.layers.iter().zip(places);
        for (index, ((spec, (&place, &state)), layer)) in specs.zip(&self.layers).enumerate() {
            let step = LayerStep {
                spec,
                norm,
                place,
                state,
                rows,
            };
            let workspace = &mut self.workspace;
            if let Some(streams) = &layer.streams {
                streams.predict(device, rows, workspace)?;
            }
            if spec.mixer != Mixer::None {
                let norms = &layer.mixer_norms;
                step.input(device, workspace, norms.before.as_ref(), pending)?;
                match &layer.mixer {
                    MixerWeights::Attention(weights) => {
                        let rope = spec.attention().and_then(|attention| attention.rope);
                        let rope = &self.ropes[rope.unwrap_or(self.config.ropes.len())];
                        step.attention(device, workspace, weights, rope, cache)?;
                    }
                    MixerWeights::Latent(weights) => {
                        step.latent(device, workspace, weights, &self.ropes, cache)?;
                    }
                    MixerWeights::ShortConv(weights) => {
                        step.short_conv(device, workspace, weights, cache)?;
                    }
                    MixerWeights::Mamba2(weights) => {
                        step.mamba2(device, workspace, weights, cache)?;
                    }
                    MixerWeights::GatedDelta(weights) => {
                        step.gated_delta(device, workspace, weights, cache)?;
                    }
                    MixerWeights::None => {}
                }
                pending = step.output(device, workspace, norms)?;
            }
            if let Some(side) = &layer.side {
                // `check_layers` allows a side path only where a norm adds the mixer's output to
                // the residual stream, so `delta` is free.
                side.add(device, step.norm.epsilon, rows, workspace)?;
            }
            if spec.feed_forward != FeedForward::None {
                let norms = &layer.feed_forward_norms;
                step.input(device, workspace, norms.before.as_ref(), pending)?;
                step.feed_forward(device, workspace, layer)?;
                pending = step.output(device, workspace, norms)?;
            }
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

    /// Enqueues the sums of the last hidden states, after the final norm, over each of `ranges` of
    /// the last step's `rows` rows. Must be called after [`Decoder::forward`].
    pub fn pool(
        &mut self,
        device: &mut D,
        rows: usize,
        ranges: &[Range<usize>],
    ) -> Result<D::Pooling, DeviceError> {
        let Workspace {
            residual, normed, ..
        } = &mut self.workspace;
        // Without a norm after the last layer, that layer's own norm has left its results there.
        if let Some(weight) = &self.final_norm {
            Norm::of(&self.config).compute(device, residual, weight, rows, normed)?;
        }
        device.pool(normed, ranges)
    }

    /// Enqueues the logits of the sampled rows.
    fn logits(&mut self, device: &mut D, samples: usize) -> Result<(), DeviceError> {
        let Some(final_norm) = self.final_norm.as_ref().filter(|_| samples > 0) else {
            return Ok(());
        };
        let Workspace {
            residual,
            normed,
            gathered,
            logits,
            ..
        } = &mut self.workspace;
        device.gather_samples(residual, gathered)?;
        let norm = Norm::of(&self.config);
        let weight = self.logit_norm.as_ref().unwrap_or(final_norm);
        norm.compute(device, gathered, weight, samples, normed)?;
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        device.linear(normed, output, samples, logits)?;
        match self.config.logit_softcap {
            Some(cap) => device.softcap(logits, cap, samples),
            None => Ok(()),
        }
    }
}

/// Returns the position embeddings of a model, followed by one that rotates nothing.
fn rope_specs(config: &ModelConfig, limits: StepLimits) -> Vec<RopeSpec> {
    let specs = config.ropes.iter().map(|rope| rope.spec(limits.positions));
    let nothing = RopeSpec::nothing(limits.positions);
    specs.chain([nothing]).collect()
}
