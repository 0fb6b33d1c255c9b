//! A layer's weights on a device.

use crate::device::{Activation, Device, LinearSpec, RoutingSpec};
use crate::model::layer::{Experts, FeedForward, NormPlacement};
use crate::model::names::Part;
use crate::model::{ModelError, ModelSource};

/// The weights of one layer.
pub(super) struct LayerWeights<D: Device> {
    pub(super) mixer_norms: Norms<D>,
    pub(super) qkv: D::Linear,
    /// The norms of queries and of keys.
    pub(super) qk_norm: Option<(D::Vector, D::Vector)>,
    pub(super) attention_out: D::Linear,
    pub(super) feed_forward_norms: Norms<D>,
    pub(super) feed_forward: FeedForwardWeights<D>,
}

/// The norms of a part of a layer, where there are some.
pub(super) struct Norms<D: Device> {
    pub(super) before: Option<D::Vector>,
    pub(super) after: Option<D::Vector>,
}

/// The weights of a layer's feed-forward part.
pub(super) enum FeedForwardWeights<D: Device> {
    Dense {
        gate_up: D::Linear,
        down: D::Linear,
        activation: Activation,
    },
    Experts {
        router: D::Linear,
        experts: D::Experts,
        routing: RoutingSpec,
    },
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
        let qk_norm = match spec.attention().qk_norm_lengths() {
            Some((q, k)) => Some((
                loader.norm(Part::QueryNorm, q)?,
                loader.norm(Part::KeyNorm, k)?,
            )),
            None => None,
        };
        let qkv = loader.device.load_linear(&source.qkv(layer)?.spec())?;
        let attention_out = source.attention_out(layer)?;
        let attention_out = loader.device.load_linear(&attention_out.spec())?;
        Ok(Self {
            mixer_norms,
            qkv,
            qk_norm,
            attention_out,
            feed_forward_norms,
            feed_forward: loader.feed_forward(&spec.feed_forward)?,
        })
    }
}

impl<D: Device> Loader<'_, D> {
    /// The norms of a part of the layer: those that its placement asks for.
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
        Ok(Norms {
            before: norm(placement.is_before(), before)?,
            after: norm(placement.is_after(), after)?,
        })
    }

    fn norm(&mut self, part: Part, length: usize) -> Result<D::Vector, ModelError> {
        let weight = self.source.norm(self.layer, part, length)?;
        Ok(self.device.load_vector(&weight)?)
    }

    fn feed_forward(&mut self, spec: &FeedForward) -> Result<FeedForwardWeights<D>, ModelError> {
        match *spec {
            FeedForward::Dense { width, activation } => {
                let gate_up = self.source.gate_up(self.layer, width)?;
                let gate_up = self.device.load_linear(&gate_up.spec())?;
                let down = self.source.down(self.layer, width)?;
                Ok(FeedForwardWeights::Dense {
                    gate_up,
                    down: self.device.load_linear(&down.spec())?,
                    activation,
                })
            }
            FeedForward::Experts(experts) => self.experts(experts),
        }
    }

    fn experts(&mut self, spec: Experts) -> Result<FeedForwardWeights<D>, ModelError> {
        let router = self.source.router(self.layer, spec.count)?;
        let router = self.device.load_linear(&router.spec())?;
        let experts = (0..spec.count)
            .map(|expert| self.source.expert(self.layer, expert, spec.width))
            .collect::<Result<Vec<_>, _>>()?;
        let specs = experts.iter();
        let (gate_up, down): (Vec<LinearSpec<'_>>, Vec<LinearSpec<'_>>) = specs
            .map(|(gate_up, down)| (gate_up.spec(), down.spec()))
            .unzip();
        Ok(FeedForwardWeights::Experts {
            router,
            experts: self.device.load_experts(&gate_up, &down)?,
            routing: spec.routing,
        })
    }
}
