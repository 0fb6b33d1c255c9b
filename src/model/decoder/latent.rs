//! Latent attention: its weights, its activations and its computation.

use super::layer_step::LayerStep;
use super::workspace::Workspace;
use crate::device::{
    AttentionSpec, Device, DeviceError, Latents, LinearSpec, Precision, Rotary, RotaryAttention,
};
use crate::model::layer::Latent;
use crate::model::names::Part;
use crate::model::stored::StoredLinear;
use crate::model::{ModelError, ModelSource};

/// The weights of latent attention.
pub(super) struct LatentWeights<D: Device> {
    spec: Latent,
    /// Projection of the layer's input to the latent of the queries, and the weight of that
    /// latent's norm. `None` if queries are projected from the layer's input.
    query_down: Option<(D::Linear, D::Vector)>,
    /// Projection to the queries, from their latent or from the layer's input.
    queries: D::Linear,
    /// Projection of the layer's input to the rotated part of the key and the latent of keys and
    /// values.
    down: D::Linear,
    /// Weight of the norm of the latent of keys and values.
    norm: D::Vector,
    /// Per head, the transposed projection from the latent to the key. It is applied to the query,
    /// so that attention can use the latent as the key.
    keys: D::HeadLinear,
    /// Per head, the projection from the latent to the value.
    values: D::HeadLinear,
    out: D::Linear,
}

/// Activations of latent attention.
pub(super) struct LatentWorkspace<T> {
    /// The latent of the queries, before and after its norm; `None` if there is no such latent.
    query_down: Option<[T; 2]>,
    queries: T,
    /// `[rotated part of the key | latent before its norm]`.
    keys: T,
    values: T,
    /// Queries and key of the attention over latents.
    qkv: T,
    /// Output of the attention over latents.
    attention: T,
}

impl<D: Device> LatentWeights<D> {
    pub(super) fn load(
        source: &ModelSource,
        device: &mut D,
        layer: usize,
        spec: Latent,
    ) -> Result<Self, ModelError> {
        let keys = load_heads(device, &source.latent_keys(layer, &spec)?)?;
        let values = load_heads(device, &source.latent_values(layer, &spec)?)?;
        let query_down = match spec.query_rank {
            Some(rank) => {
                let down = device.load_linear(&source.query_down(layer, rank)?.spec())?;
                let norm = source.norm(layer, Part::QueryDownNorm, rank)?;
                Some((down, device.load_vector(&norm)?))
            }
            None => None,
        };
        let norm = source.norm(layer, Part::LatentNorm, spec.shape.latent)?;
        let out = source.attention_out(layer, spec.shape.value_columns())?;
        Ok(Self {
            spec,
            query_down,
            queries: device.load_linear(&source.queries(layer, &spec)?.spec())?,
            down: device.load_linear(&source.latent_down(layer, &spec)?.spec())?,
            norm: device.load_vector(&norm)?,
            keys,
            values,
            out: device.load_linear(&out.spec())?,
        })
    }
}

fn load_heads<D: Device>(
    device: &mut D,
    heads: &[StoredLinear<'_>],
) -> Result<D::HeadLinear, DeviceError> {
    let specs: Vec<LinearSpec<'_>> = heads.iter().map(StoredLinear::spec).collect();
    device.load_heads(&specs)
}

impl<T> LatentWorkspace<T> {
    /// Creates each matrix with `make`, which takes its number of columns and its precision.
    pub(super) fn make(
        spec: &Latent,
        mut make: impl FnMut(usize, Precision) -> Result<T, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let shape = spec.shape;
        let query_down = match spec.query_rank {
            // The norm reads float32 and writes the precision of activations.
            Some(rank) => {
                let down = make(rank, Precision::Full)?;
                Some([down, make(rank, Precision::Activation)?])
            }
            None => None,
        };
        let mut make = |columns| make(columns, Precision::Activation);
        Ok(Self {
            query_down,
            queries: make(shape.query_columns())?,
            keys: make(shape.key_columns())?,
            values: make(shape.value_columns())?,
            qkv: make(shape.heads().qkv_columns())?,
            attention: make(shape.heads().out_columns())?,
        })
    }
}

impl LayerStep<'_> {
    /// Enqueues the latent attention of the layer, which writes its output to `delta`.
    pub(super) fn latent<D: Device>(
        &self,
        device: &mut D,
        workspace: &mut Workspace<D::Tensor>,
        weights: &LatentWeights<D>,
        ropes: &[D::Rope],
        cache: &mut D::Cache,
    ) -> Result<(), DeviceError> {
        let Workspace {
            residual,
            normed,
            latent,
            delta,
            ..
        } = workspace;
        let Some(LatentWorkspace {
            query_down,
            queries,
            keys,
            values,
            qkv,
            attention,
        }) = latent
        else {
            unreachable!("the workspace is allocated for the layers that there are")
        };
        let input = match self.spec.mixer_norms.reads_residual() {
            true => &*residual,
            false => &*normed,
        };
        let LatentWeights { spec, .. } = weights;
        let rows = self.rows;
        match (&weights.query_down, query_down) {
            (Some((weight, norm)), Some([down, down_normed])) => {
                device.linear(input, weight, rows, down)?;
                device.rms_norm(down, norm, spec.norm_epsilon, rows, down_normed)?;
                device.linear(down_normed, &weights.queries, rows, queries)?;
            }
            _ => device.linear(input, &weights.queries, rows, queries)?,
        }
        device.linear(input, &weights.down, rows, keys)?;
        let latents = Latents {
            shape: spec.shape,
            queries,
            keys,
            norm: &weights.norm,
            epsilon: spec.norm_epsilon,
            absorbed: &weights.keys,
        };
        device.latent_qkv(&latents, rows, qkv)?;
        let rotary_attention = RotaryAttention {
            rotary: Rotary {
                norm: None,
                rope: &ropes[spec.rope],
                query_scale: None,
            },
            spec: AttentionSpec {
                causal: true,
                heads: spec.shape.heads(),
                scale: spec.scale,
                window: None,
                chunked: false,
                softcap: None,
            },
            sinks: None,
        };
        device.rope_attend(qkv, &rotary_attention, cache, self.place, attention)?;
        device.multiply_heads(attention, &weights.values, rows, values)?;
        device.linear(values, &weights.out, rows, delta)
    }
}
