//! Mixture-of-experts layers.

use super::{Activation, DeviceError, DeviceTypes, LinearSpec};

/// How a mixture-of-experts layer chooses its experts.
///
/// Of equal experts, the one with the lower index is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutingSpec {
    /// Number of experts per token.
    pub top_k: usize,
    /// How experts are weighted, and which are chosen.
    pub score: RouterScore,
    /// Whether the weights of the chosen experts are scaled to sum to 1.
    pub normalize: bool,
    /// Non-linearity of the experts.
    pub activation: Activation,
}

/// How the router's logits become weights of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterScore {
    /// The softmax over all experts. Those with the largest weights are chosen.
    Softmax,
    /// The sigmoid of each logit.
    Sigmoid(SigmoidRouting),
}

/// A router whose weights are sigmoids. The experts with the largest logits are chosen or, if the
/// layer has corrections, those with the largest sums of the weight and its correction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SigmoidRouting {
    /// Factor on the weights, after they are normalised.
    pub scale: f32,
    /// Number of groups of equally many experts; 1 if all are in one. With several groups, each
    /// has at least two experts.
    pub groups: usize,
    /// Number of groups of which experts are chosen: those whose two best experts are best
    /// together.
    pub top_groups: usize,
    /// Whether the weights multiply the inputs of the experts instead of their outputs.
    pub scales_input: bool,
}

impl RoutingSpec {
    /// Returns whether the weights multiply the inputs of the experts.
    pub fn scales_input(&self) -> bool {
        match self.score {
            RouterScore::Softmax => false,
            RouterScore::Sigmoid(sigmoid) => sigmoid.scales_input,
        }
    }

    /// Checks that experts can be chosen so out of `count`. The error says why not.
    pub fn check(&self, count: usize) -> Result<(), String> {
        let top_k = self.top_k;
        if !(1..=count).contains(&top_k) {
            return Err(format!(
                "cannot choose {top_k} experts per token out of {count}"
            ));
        }
        let RouterScore::Sigmoid(SigmoidRouting {
            groups, top_groups, ..
        }) = self.score
        else {
            return Ok(());
        };
        let even = groups > 0 && count.is_multiple_of(groups);
        if !even || (groups > 1 && count / groups < 2) {
            return Err(format!(
                "{count} experts cannot be divided into {groups} groups of at least two"
            ));
        }
        if !(1..=groups).contains(&top_groups) || top_k > top_groups * (count / groups) {
            return Err(format!(
                "cannot choose {top_k} experts per token out of {top_groups} of {groups} groups \
                 of {count} experts"
            ));
        }
        Ok(())
    }
}

/// The part of a [`Device`](super::Device) that computes mixture-of-experts layers.
pub trait ExpertOps: DeviceTypes {
    /// The loaded experts of a layer.
    type Experts;

    /// Loads the experts of one layer. Entry `e` of both lists is expert `e`. In `gate_up`, the
    /// rows of the gate come first, if there are some. If there are corrections, one per expert, they are added to
    /// the weights to choose experts, see [`SigmoidRouting`].
    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
        corrections: Option<&[f32]>,
    ) -> Result<Self::Experts, DeviceError>;

    /// Computes a mixture-of-experts feed-forward layer. `router` has one logit per expert. The
    /// outputs of a row's experts are summed in the order of their index.
    fn experts(
        &mut self,
        x: &Self::Tensor,
        router: &Self::Tensor,
        routing: RoutingSpec,
        experts: &Self::Experts,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
