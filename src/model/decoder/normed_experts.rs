//! Experts with a dense part beside them, where both have norms of their own (Gemma 4).

use super::weights::{ExpertNorms, Shared};
use super::workspace::Workspace;
use crate::device::{Device, DeviceError, RoutingSpec};

/// Weights and parameters of a feed-forward part of experts and a dense part, both with norms.
pub(super) struct NormedExperts<'a, D: Device> {
    pub(super) router: &'a D::Linear,
    pub(super) experts: &'a D::Experts,
    pub(super) routing: RoutingSpec,
    pub(super) shared: &'a Shared<D>,
    pub(super) norms: &'a ExpertNorms<D>,
    /// Value added to the mean square in norms.
    pub(super) epsilon: f32,
}

impl<D: Device> NormedExperts<'_, D> {
    /// Computes the sum of both parts in `delta`. `normed` must hold the input of the dense part;
    /// the router and the experts read the residual stream. Overwrites `normed`.
    pub(super) fn compute(
        &self,
        device: &mut D,
        rows: usize,
        workspace: &mut Workspace<D::Tensor>,
    ) -> Result<(), DeviceError> {
        let (norms, epsilon) = (self.norms, self.epsilon);
        self.shared
            .compute(device, rows, self.routing.activation, workspace)?;
        let Workspace {
            residual,
            normed,
            delta,
            router,
            beside,
            ..
        } = workspace;
        let (Some(router), Some(beside)) = (router, beside) else {
            unreachable!("the workspace is allocated for the layers that there are");
        };
        device.rms_norm(delta, &norms.shared_output, epsilon, rows, beside)?;
        device.rms_norm(residual, &norms.router, epsilon, rows, normed)?;
        device.linear(normed, self.router, rows, router)?;
        device.rms_norm(residual, &norms.expert_input, epsilon, rows, normed)?;
        device.experts(normed, router, self.routing, self.experts, rows, delta)?;
        device.rms_norm_add(delta, &norms.expert_output, epsilon, rows, beside)?;
        device.copy(beside, rows, delta)
    }
}
