//! Mixture-of-experts layers.

use super::{Activation, DeviceError, DeviceTypes, LinearSpec};

/// How a mixture-of-experts layer chooses its experts.
///
/// Takes the softmax over all experts and chooses the `top_k` experts with the largest weights;
/// of equal weights, the lower index wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingSpec {
    /// Number of experts per token.
    pub top_k: usize,
    /// Whether the weights of the chosen experts are scaled to sum to 1.
    pub normalize: bool,
    /// Non-linearity of the experts.
    pub activation: Activation,
}

/// The part of a [`Device`](super::Device) that computes mixture-of-experts layers.
pub trait ExpertOps: DeviceTypes {
    /// The loaded experts of a layer.
    type Experts;

    /// Loads the experts of one layer. Entry `e` of both lists is expert `e`. In `gate_up`, the
    /// rows of the gate come first.
    fn load_experts(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
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
