//! The weights of a layer, loaded on a device.

use super::gated_delta::GatedDeltaWeights;
use super::latent::LatentWeights;
use super::mamba2::Mamba2LayerWeights;
use super::short_conv::ShortConvWeights;
use super::streams::{LayerStreams, SidePath};
use super::workspace::{DenseSpace, Workspace, of_dense};
use crate::device::{Activation, Device, DeviceError, DeviceTypes, LinearSpec, RoutingSpec};
use crate::model::layer::{Attention, Experts, FeedForward, Mixer, NormPlacement, QkNormKind};
use crate::model::names::{self, Part};
use crate::model::{ModelError, ModelSource};

/// The weights of one layer.
pub(super) struct LayerWeights<D: Device> {
    pub(super) mixer_norms: Norms<D>,
    pub(super) mixer: MixerWeights<D>,
    pub(super) feed_forward_norms: Norms<D>,
    pub(super) feed_forward: FeedForwardWeights<D>,
    /// The weights of the layer's own input, if it has one.
    pub(super) input: Option<LayerInputWeights<D>>,
    /// Factor on the residual stream after the layer, if there is one.
    pub(super) scale: Option<f32>,
    /// The low-rank path beside the mixer, if there is one.
    pub(super) side: Option<SidePath<D>>,
    /// The weights that predict and correct the residual streams, if there are several.
    pub(super) streams: Option<LayerStreams<D>>,
}

/// The weights of a layer's own input.
pub(super) struct LayerInputWeights<D: Device> {
    pub(super) gate: D::Linear,
    pub(super) projection: D::Linear,
    pub(super) norm: D::Vector,
}

/// The weights of a layer's mixer.
pub(super) enum MixerWeights<D: Device> {
    Attention(AttentionWeights<D>),
    Latent(LatentWeights<D>),
    ShortConv(ShortConvWeights<D>),
    GatedDelta(GatedDeltaWeights<D>),
    Mamba2(Mamba2LayerWeights<D>),
    None,
}

/// The weights of attention.
pub(super) struct AttentionWeights<D: Device> {
    pub(super) spec: Attention,
    pub(super) qkv: D::Linear,
    /// The weights of the norms of queries and keys.
    pub(super) qk_norm: QkNormWeights<D>,
    /// The attention sinks, one per query head, if there are any.
    pub(super) sinks: Option<D::Vector>,
    /// Projection to the gate of the output, if there is one.
    pub(super) gate: Option<D::Linear>,
    pub(super) out: D::Linear,
}

/// The weights of the norms of queries and of keys, if there are such norms. A layer without keys
/// of its own has no norm of keys.
type QkNormWeights<D> = Option<(Vector<D>, Option<Vector<D>>)>;
type Vector<D> = <D as DeviceTypes>::Vector;

/// The norms on the input and on the output of a mixer or a feed-forward part.
pub(super) struct Norms<D: Device> {
    pub(super) before: Option<D::Vector>,
    pub(super) after: Option<D::Vector>,
    /// Weight and bias of the norm on the sum of the output and the residual stream.
    pub(super) on_sum: Option<[D::Vector; 2]>,
}

/// The weights of a layer's feed-forward part.
pub(super) enum FeedForwardWeights<D: Device> {
    Dense {
        width: usize,
        gate_up: D::Linear,
        down: D::Linear,
        activation: Activation,
        /// Threshold of the gates, in standard deviations above their mean: it is subtracted from
        /// them, and negative results become 0. `None` if gates are left as they are.
        cut: Option<f32>,
    },
    Experts {
        router: D::Linear,
        experts: D::Experts,
        routing: RoutingSpec,
        /// The dense part beside the experts, if there is one.
        shared: Option<Shared<D>>,
        /// The norms of the experts and of the dense part, if they have norms of their own.
        norms: Option<ExpertNorms<D>>,
    },
    None,
}

/// The norms of experts and of the dense part beside them.
pub(super) struct ExpertNorms<D: Device> {
    pub(super) router: D::Vector,
    pub(super) shared_output: D::Vector,
    pub(super) expert_input: D::Vector,
    pub(super) expert_output: D::Vector,
}

/// The weights of a dense part beside experts.
pub(super) struct Shared<D: Device> {
    width: usize,
    gate_up: D::Linear,
    down: D::Linear,
    /// Projection to the gate of the output, if there is one.
    gate: Option<D::Linear>,
}

impl<D: Device> Shared<D> {
    /// Computes the dense part in `delta` from `normed`.
    pub(super) fn compute(
        &self,
        device: &mut D,
        rows: usize,
        activation: Activation,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let Workspace {
            normed,
            dense,
            shared_gate,
            delta,
            ..
        } = workspace;
        let DenseSpace {
            gate_up, hidden, ..
        } = of_dense(dense, self.width, activation);
        device.gated_linear(normed, &self.gate_up, activation, rows, gate_up, hidden)?;
        if let Some((weight, gate)) = self.gate.as_ref().zip(shared_gate.as_mut()) {
            // The gate is a factor on the output of `down`. As that projection has no bias, the
            // factor can be applied to its input.
            device.linear(normed, weight, rows, gate)?;
            device.sigmoid_gate(hidden, gate, rows)?;
        }
        device.linear(hidden, &self.down, rows, delta)
    }
}

/// Loads the parts of one layer.
struct Loader<'a, D: Device> {
    source: &'a ModelSource,
    device: &'a mut D,
    layer: usize,
}

impl<D: Device> LayerWeights<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
    ) -> Result<Self, ModelError> {
        let spec = &source.config().layers[layer];
        let mut loader = Loader {
            source,
            device,
            layer,
        };
        let mixer_norms = loader.norms(
            spec.mixer_norms,
            Part::AttentionNorm,
            Part::PostAttentionNorm,
        )?;
        let feed_forward_norms = loader.norms(
            spec.feed_forward_norms,
            Part::FeedForwardNorm,
            Part::PostFeedForwardNorm,
        )?;
        let mixer = match spec.mixer {
            Mixer::Attention(attention) => MixerWeights::Attention(loader.attention(attention)?),
            Mixer::Latent(latent) => {
                let device = &mut *loader.device;
                MixerWeights::Latent(LatentWeights::load(source, device, layer, latent)?)
            }
            Mixer::ShortConv(conv) => {
                let device = &mut *loader.device;
                MixerWeights::ShortConv(ShortConvWeights::load(source, device, layer, conv)?)
            }
            Mixer::GatedDelta(delta) => {
                let device = &mut *loader.device;
                MixerWeights::GatedDelta(GatedDeltaWeights::load(source, device, layer, delta)?)
            }
            Mixer::Mamba2(spec) => {
                let device = &mut *loader.device;
                MixerWeights::Mamba2(Mamba2LayerWeights::load(source, device, layer, spec)?)
            }
            Mixer::None => MixerWeights::None,
        };
        Ok(Self {
            mixer_norms,
            mixer,
            feed_forward_norms,
            feed_forward: loader.feed_forward(&spec.feed_forward)?,
            input: loader.input()?,
            scale: match spec.has_scale {
                true => Some(source.layer_scale(layer)?),
                false => None,
            },
            side: SidePath::load(source, device, layer)?,
            streams: LayerStreams::load(source, device, layer)?,
        })
    }
}

impl<D: Device> Loader<'_, D> {
    /// Loads the norms of a part of the layer that `placement` asks for.
    fn norms(
        &mut self,
        placement: NormPlacement,
        before: Part,
        after: Part,
    ) -> Result<Norms<D>, ModelError> {
        let hidden = self.source.config().hidden;
        let mut norm = |is_there: bool, part: Part| match is_there {
            true => self.norm(part, hidden).map(Some),
            false => Ok(None),
        };
        let (before, own_after) = (
            norm(placement.is_before(), before)?,
            norm(placement.is_after(), after)?,
        );
        Ok(Norms {
            before,
            after: own_after,
            on_sum: match placement {
                NormPlacement::OnSum => {
                    let weight = self.source.name(self.layer, after);
                    let bias = self.source.vector(&names::bias(&weight), hidden)?;
                    Some([self.norm(after, hidden)?, self.device.load_vector(&bias)?])
                }
                _ => None,
            },
        })
    }

    fn attention(&mut self, spec: Attention) -> Result<AttentionWeights<D>, ModelError> {
        let (source, layer, heads) = (self.source, self.layer, spec.heads);
        self.device.check_heads(heads, spec.is_causal)?;
        let qk_norm = self.qk_norm(&spec)?;
        let sinks = match spec.has_sinks {
            true => Some(self.device.load_vector(&source.sinks(layer, heads)?)?),
            false => None,
        };
        let (qkv, gate) = match spec.has_gate {
            true => {
                let (qkv, gate) = source.gated_qkv(layer, heads)?;
                (qkv, Some(self.device.load_linear(&gate.spec())?))
            }
            false => (source.qkv(layer, &spec)?, None),
        };
        let qkv = self.device.load_linear(&qkv.spec())?;
        let out = source.attention_out(layer, heads.out_columns())?;
        Ok(AttentionWeights {
            spec,
            qkv,
            qk_norm,
            sinks,
            gate,
            out: self.device.load_linear(&out.spec())?,
        })
    }

    /// Loads the norms of queries and keys, if there are such norms. Norms without stored weights
    /// get weights of 1.
    fn qk_norm(&mut self, attention: &Attention) -> Result<QkNormWeights<D>, ModelError> {
        if attention.qk_norm == Some(QkNormKind::PerHeadUnweighted) {
            let ones = vec![1.0; attention.heads.head_dim];
            let mut load = || self.device.load_vector(&ones);
            return Ok(Some((load()?, Some(load()?))));
        }
        let Some((q, k)) = attention.qk_norm_lengths() else {
            return Ok(None);
        };
        let q = self.norm(Part::QueryNorm, q)?;
        let k = match attention.shares {
            Some(_) => None,
            None => Some(self.norm(Part::KeyNorm, k)?),
        };
        Ok(Some((q, k)))
    }

    /// Loads the weights of the layer's own input, if the model has per-layer inputs.
    fn input(&mut self) -> Result<Option<LayerInputWeights<D>>, ModelError> {
        let config = self.source.config();
        let Some(inputs) = config.per_layer_inputs else {
            return Ok(None);
        };
        let (gate, projection) = self.source.per_layer_input(self.layer, inputs)?;
        Ok(Some(LayerInputWeights {
            gate: self.device.load_linear(&gate.spec())?,
            projection: self.device.load_linear(&projection.spec())?,
            norm: self.norm(Part::PerLayerNorm, config.hidden)?,
        }))
    }

    fn norm(&mut self, part: Part, length: usize) -> Result<D::Vector, ModelError> {
        let weight = self.source.norm(self.layer, part, length)?;
        Ok(self.device.load_vector(&weight)?)
    }

    fn feed_forward(&mut self, spec: &FeedForward) -> Result<FeedForwardWeights<D>, ModelError> {
        match *spec {
            FeedForward::Dense {
                width,
                activation,
                cut,
            } => {
                let gate_up = self.source.gate_up(self.layer, width, activation)?;
                let gate_up = self.device.load_linear(&gate_up.spec())?;
                let down = self.source.down(self.layer, width)?;
                Ok(FeedForwardWeights::Dense {
                    width,
                    gate_up,
                    down: self.device.load_linear(&down.spec())?,
                    activation,
                    cut,
                })
            }
            FeedForward::Experts(experts) => self.experts(experts),
            FeedForward::None => Ok(FeedForwardWeights::None),
        }
    }

    fn experts(&mut self, spec: Experts) -> Result<FeedForwardWeights<D>, ModelError> {
        let router = self.source.router(self.layer, spec.count)?;
        let router = self.device.load_linear(&router.spec())?;
        let experts = (0..spec.count)
            .map(|expert| self.source.expert(self.layer, expert, &spec))
            .collect::<Result<Vec<_>, _>>()?;
        let specs = experts.iter();
        let (gate_up, down): (Vec<LinearSpec<'_>>, Vec<LinearSpec<'_>>) = specs
            .map(|(gate_up, down)| (gate_up.spec(), down.spec()))
            .unzip();
        let corrections = match spec.has_corrections {
            true => Some(self.source.corrections(self.layer, spec.count)?),
            false => None,
        };
        let corrections = corrections.as_deref();
        let scales = match spec.has_own_norms {
            true => Some(self.source.expert_scales(self.layer, spec.count)?),
            false => None,
        };
        let scales = scales.as_deref();
        let loaded = self
            .device
            .load_experts(&gate_up, &down, corrections, scales)?;
        Ok(FeedForwardWeights::Experts {
            router,
            experts: loaded,
            routing: spec.routing,
            shared: match spec.shared {
                Some(width) => {
                    let activation = spec.routing.activation;
                    Some(self.shared(width, activation, spec.has_shared_gate)?)
                }
                None => None,
            },
            norms: match spec.has_own_norms {
                true => Some(self.expert_norms()?),
                false => None,
            },
        })
    }

    fn expert_norms(&mut self) -> Result<ExpertNorms<D>, ModelError> {
        let hidden = self.source.config().hidden;
        // The model divides the router's input by the root of the hidden size.
        let scale = 1.0 / (hidden as f32).sqrt();
        let mut router = self.source.router_scale(self.layer)?;
        router.iter_mut().for_each(|weight| *weight *= scale);
        Ok(ExpertNorms {
            router: self.device.load_vector(&router)?,
            shared_output: self.norm(Part::SharedOutputNorm, hidden)?,
            expert_input: self.norm(Part::ExpertInputNorm, hidden)?,
            expert_output: self.norm(Part::ExpertOutputNorm, hidden)?,
        })
    }

    fn shared(
        &mut self,
        width: usize,
        activation: Activation,
        has_gate: bool,
    ) -> Result<Shared<D>, ModelError> {
        let (gate_up, down) = self.source.shared_expert(self.layer, width, activation)?;
        let gate = match has_gate {
            true => {
                let gate = self.source.shared_gate(self.layer)?;
                Some(self.device.load_linear(&gate.spec())?)
            }
            false => None,
        };
        Ok(Shared {
            width,
            gate,
            gate_up: self.device.load_linear(&gate_up.spec())?,
            down: self.device.load_linear(&down.spec())?,
        })
    }
}
