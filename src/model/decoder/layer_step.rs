//! The computation of one layer in one step.

use super::norm::Norm;
use super::normed_experts::NormedExperts;
use super::weights::{AttentionWeights, FeedForwardWeights, LayerWeights, Norms};
use super::workspace::{AttentionSpace, DenseSpace, Workspace, of_attention, of_dense};
use crate::device::{
    AttentionSpec, CacheLayer, Device, DeviceError, QkNorm, Rotary, RotaryAttention, StatePart,
};
use crate::model::layer::{Attention, LayerSpec, NormKind, QkNormKind};

/// One layer of one step: everything but its weights and activations.
pub(super) struct LayerStep<'a> {
    pub(super) spec: &'a LayerSpec,
    pub(super) norm: Norm,
    /// Place of the layer's keys and values in the KV cache.
    pub(super) place: CacheLayer,
    /// Parts of the layer in a state: that of its convolution, and that of its recurrence.
    pub(super) state: [StatePart; 2],
    pub(super) rows: usize,
}

impl LayerStep<'_> {
    /// Adds `delta` to the residual stream if it is `pending`, then computes a sub-layer's input in
    /// `normed`. Without a `norm`, the sub-layer reads the residual stream, or `normed` as it is.
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

    /// Adds the sub-layer's output in `delta` to the residual stream if `norms` has one for it.
    /// Otherwise returns `true`: the output is still to be added. A norm on the sum also computes the
    /// next sub-layer's input in `normed`.
    pub(super) fn output<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        norms: &Norms<D>,
    ) -> Result<bool, DeviceError> {
        let Workspace {
            residual,
            delta,
            normed,
            ..
        } = workspace;
        let (epsilon, rows) = (self.norm.epsilon, self.rows);
        if let Some([weight, bias]) = &norms.on_sum {
            let parameters = [weight, bias];
            device.add_layer_norm(residual, Some(delta), parameters, epsilon, rows, normed)?;
            return Ok(false);
        }
        match &norms.after {
            Some(weight) => {
                device.rms_norm_add(delta, weight, epsilon, rows, residual)?;
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
            attentions,
            delta,
            ..
        } = workspace;
        let AttentionSpace { qkv, gate, out, .. } = of_attention(attentions, spec);
        let input = match self.spec.mixer_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
        };
        device.linear(input, &weights.qkv, self.rows, qkv)?;
        let norms = weights.qk_norm.as_ref();
        let sinks = weights.sinks.as_ref();
        if spec.shares.is_some() {
            let norm = norms.map(|(q, _)| (q, self.norm.epsilon));
            device.rope_queries(qkv, spec.heads, norm, rope)?;
            if let Some(scale) = spec.query_scale {
                device.scale_queries(qkv, spec.heads, scale)?;
            }
            let spec = attention_spec(spec);
            device.attend(qkv, &spec, sinks, cache, self.place, out)?;
        } else {
            let norm = norms.and_then(|(q, k)| Some((q, k.as_ref()?)));
            let norm = norm.map(|(q, k)| QkNorm {
                q,
                k,
                epsilon: self.norm.epsilon,
                per_head: spec.qk_norm != Some(QkNormKind::WholeRow),
                values: spec.normalizes_values,
            });
            let rotary_attention = RotaryAttention {
                rotary: Rotary {
                    norm,
                    rope,
                    query_scale: spec.query_scale,
                },
                spec: attention_spec(spec),
                sinks,
            };
            device.rope_attend(qkv, &rotary_attention, cache, self.place, out)?;
        }
        if let Some((weight, gate)) = weights.gate.as_ref().zip(gate.as_mut()) {
            device.linear(input, weight, self.rows, gate)?;
            device.sigmoid_gate(out, gate, self.rows)?;
        }
        device.linear(out, &weights.out, self.rows, delta)
    }

    pub(super) fn feed_forward<D: Device>(
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
                } = of_dense(dense, *width, *activation);
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
                // `check_layers` allows shared experts only with a norm on the input and none on
                // the output. So `input` is not the residual stream, and both outputs can be added
                // to that stream one after the other.
                device.add(residual, delta, rows)?;
                shared.compute(device, rows, routing.activation, workspace)
            }
            _ => unreachable!("the workspace is allocated for the layers that there are"),
        }
    }
}

/// Returns the parameters of a layer's attention, as devices take them.
fn attention_spec(attention: &Attention) -> AttentionSpec {
    AttentionSpec {
        heads: attention.heads,
        scale: attention.scale,
        window: attention.window,
        chunked: attention.is_chunked,
        causal: attention.is_causal,
        softcap: attention.softcap,
    }
}
