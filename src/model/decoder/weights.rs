//! A layer's weights on a device.

use crate::device::{Activation, Device, LinearSpec, RoutingSpec};
use crate::model::layer::{Experts, FeedForward, NormPlacement};
use crate::model::names::Part;
use crate::model::{ModelError, ModelSource};

/// The weights of one layer.
pub(super) struct LayerWeights<D: Device> {
    pub(super) attention_norm: Option<D::Vector>,
    pub(super) qkv: D::Linear,
    /// The norms of queries and of keys.
    pub(super) qk_norm: Option<(D::Vector, D::Vector)>,
    pub(super) attention_out: D::Linear,
    pub(super) post_attention_norm: Option<D::Vector>,
    pub(super) feed_forward_norm: Option<D::Vector>,
    pub(super) feed_forward: FeedForwardWeights<D>,
    pub(super) post_feed_forward_norm: Option<D::Vector>,
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
        let (attention_norm, post_attention_norm) = loader.norms(
            spec.mixer_norms,
            Part::AttentionNorm,
            Part::PostAttentionNorm,
        )?;
        let (feed_forward_norm, post_feed_forward_norm) = loader.norms(
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
        Ok(Self {
            attention_norm,
            qkv: loader.device.load_linear(&source.qkv(layer)?.spec())?,
            qk_norm,
            attention_out: loader
                .device
                .load_linear(&source.attention_out(layer)?.spec())?,
            post_attention_norm,
            feed_forward_norm,
            feed_forward: loader.feed_forward(&spec.feed_forward)?,
            post_feed_forward_norm,
        })
    }
}

impl<D: Device> Loader<'_, D> {
    /// The norms before and after a part of the layer, where there are some.
    fn norms(
        &mut self,
        placement: NormPlacement,
        before: Part,
        after: Part,
    ) -> Result<(Option<D::Vector>, Option<D::Vector>), ModelError> {
        let hidden = self.source.config().hidden;
        let mut norm = |is_there: bool, part: Part| match is_there {
            true => self.norm(part, hidden).map(Some),
            false => Ok(None),
        };
        Ok((
            norm(placement.is_before(), before)?,
            norm(placement.is_after(), after)?,
        ))
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
