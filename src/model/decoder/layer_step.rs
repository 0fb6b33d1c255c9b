//! One layer of one step.

use super::weights::{AttentionWeights, FeedForwardWeights, LayerWeights};
use super::workspace::Workspace;
use crate::device::{
    AttentionSpec, CacheLayer, Device, DeviceError, QkNorm, Rotary, RotaryAttention, StatePart,
};
use crate::model::ModelConfig;
use crate::model::layer::{LayerSpec, NormKind, QkNormKind};

/// What the norms of the residual stream compute.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    kind: NormKind,
    /// Added to the mean square, or the variance.
    pub(super) epsilon: f32,
}

impl Norm {
    pub(super) fn of(config: &ModelConfig) -> Self {
        Self {
            kind: config.norm,
            epsilon: config.norm_epsilon,
        }
    }

    /// Normalises `x`. A layer norm also subtracts the mean of each row of `x` itself: nothing
    /// that reads `x` later depends on it.
    pub(super) fn compute<D: Device>(
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
pub(super) struct LayerStep<'a> {
    pub(super) spec: &'a LayerSpec,
    pub(super) norm: Norm,
    /// Where the keys and values of the layer are.
    pub(super) place: CacheLayer,
    /// Where the state of the layer is: that of its convolution, and that of its recurrence.
    pub(super) state: [StatePart; 2],
    pub(super) rows: usize,
}

impl LayerStep<'_> {
    /// Adds what is pending to the residual stream and makes a sub-layer's input.
    pub(super) fn input<D: Device>(
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
    pub(super) fn output<D: Device>(
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

    pub(super) fn attention<D: Device>(
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
            attention_gate,
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
        if let Some((weight, gate)) = weights.gate.as_ref().zip(attention_gate.as_mut()) {
            device.linear(input, weight, self.rows, gate)?;
            device.sigmoid_gate(attention, gate, self.rows)?;
        }
        device.linear(attention, &weights.out, self.rows, delta)
    }

    pub(super) fn feed_forward<D: Device>(
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
            shared_gate,
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
                if let Some((weight, gate)) = shared.gate.as_ref().zip(shared_gate.as_mut()) {
                    // A factor on the output of a projection without a bias is one on its input.
                    device.linear(normed, weight, rows, gate)?;
                    device.sigmoid_gate(hidden, gate, rows)?;
                }
                device.linear(hidden, &shared.down, rows, delta)
            }
            _ => unreachable!("the workspace is allocated for the layers that there are"),
        }
    }
}
