//! The memory for the activations of a step.

use super::StepLimits;
use super::gated_delta::GatedDeltaSpace;
use super::latent::LatentWorkspace;
use super::mamba2::Mamba2Space;
use super::short_conv::ShortConvSpace;
use crate::device::{Activation, Device, DeviceError, Precision};
use crate::model::ModelConfig;
use crate::model::layer::{Attention, Mixer, PerLayerInputs, Streams};

/// Activations of a step, allocated once and shared by all layers. `T` is the device's tensor.
pub(super) struct Workspace<T> {
    /// The residual stream.
    pub(super) residual: T,
    /// Normalised input of a mixer, of a feed-forward part, or of the output projection.
    pub(super) normed: T,
    /// Activations of attention, one entry per distinct pair of column counts.
    pub(super) attentions: Vec<AttentionSpace<T>>,
    /// Activations of latent attention, if a layer has it.
    pub(super) latent: Option<LatentWorkspace<T>>,
    /// Activations of gated convolutions, if a layer has one.
    pub(super) short_conv: Option<ShortConvSpace<T>>,
    /// Activations of gated delta nets, if a layer has one.
    pub(super) gated_delta: Option<GatedDeltaSpace<T>>,
    /// Activations of Mamba-2 recurrences, if a layer has one.
    pub(super) mamba2: Option<Mamba2Space<T>>,
    /// Output of a mixer or of a feed-forward part.
    pub(super) delta: T,
    /// Activations of dense feed-forward parts, one entry per distinct pair of column counts.
    pub(super) dense: Vec<DenseSpace<T>>,
    pub(super) router: Option<T>,
    /// Gate of the dense part beside experts; it has one column.
    pub(super) shared_gate: Option<T>,
    /// Sum of the outputs of the dense part and of the experts, if they have norms of their own.
    pub(super) beside: Option<T>,
    pub(super) inputs: Option<InputSpace<T>>,
    /// Result of the first of the two matrices of a low-rank path beside a mixer.
    pub(super) side: Option<T>,
    pub(super) streams: Option<StreamSpace<T>>,
    /// The sampled rows of the residual stream.
    pub(super) gathered: T,
    pub(super) logits: T,
}

/// Activations of attention.
pub(super) struct AttentionSpace<T> {
    /// Columns of `qkv`, and of `gate` and `out`.
    columns: [usize; 2],
    /// Queries, followed by keys and values if the layer has its own.
    pub(super) qkv: T,
    /// Gate of the output before its sigmoid; `None` if no layer of the model has such a gate.
    pub(super) gate: Option<T>,
    pub(super) out: T,
}

/// Activations of a dense feed-forward part.
pub(super) struct DenseSpace<T> {
    /// Columns of `hidden`, and of `gate_up`.
    columns: [usize; 2],
    pub(super) gate_up: T,
    pub(super) hidden: T,
}

/// Activations of per-layer inputs.
pub(super) struct InputSpace<T> {
    /// The inputs of all layers in one row.
    pub(super) inputs: T,
    /// Projection of the usual token embeddings to the inputs of all layers.
    pub(super) projected: T,
    /// Gate of one layer.
    pub(super) gate: T,
}

/// The residual streams, if there are several.
pub(super) struct StreamSpace<T> {
    pub(super) current: Vec<T>,
    /// The streams that a layer predicts.
    pub(super) predicted: Vec<T>,
    /// Outputs of a layer's router, one column per stream.
    pub(super) routed: T,
}

/// Returns the activations of this attention.
pub(super) fn of_attention<'a, T>(
    spaces: &'a mut [AttentionSpace<T>],
    attention: &Attention,
) -> &'a mut AttentionSpace<T> {
    let columns = columns(attention);
    let found = spaces.iter_mut().find(|space| space.columns == columns);
    found.unwrap_or_else(|| unreachable!("there is a workspace for each attention"))
}

/// Returns the activations of a dense part of this width and activation.
pub(super) fn of_dense<T>(
    spaces: &mut [DenseSpace<T>],
    width: usize,
    activation: Activation,
) -> &mut DenseSpace<T> {
    let columns = [width, activation.gate_up_columns(width)];
    let found = spaces.iter_mut().find(|space| space.columns == columns);
    found.unwrap_or_else(|| unreachable!("there is a workspace for each width"))
}

fn columns(attention: &Attention) -> [usize; 2] {
    [attention.projected_columns(), attention.heads.q_columns()]
}

impl<T> Workspace<T> {
    pub(super) fn allocate<D: Device<Tensor = T>>(
        config: &ModelConfig,
        device: &mut D,
        limits: StepLimits,
    ) -> Result<Self, DeviceError> {
        Self::make(config, limits, |rows, columns, precision| {
            device.allocate(rows, columns, precision)
        })
    }

    /// Creates each matrix with `make`, which takes its number of rows, its number of columns and
    /// its precision.
    fn make(
        config: &ModelConfig,
        limits: StepLimits,
        mut make: impl FnMut(usize, usize, Precision) -> Result<T, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let StepLimits { rows, samples, .. } = limits;
        let (activation, full) = (Precision::Activation, Precision::Full);
        let mut mixers = config.layers.iter().map(|layer| layer.mixer);
        let mamba2 = mixers.find_map(|mixer| match mixer {
            Mixer::Mamba2(spec) => Some(spec),
            _ => None,
        });
        let of_columns = |columns, precision| make(rows, columns, precision);
        let mamba2 = mamba2.map(|spec| Mamba2Space::make(&spec, of_columns));
        let mamba2 = mamba2.transpose()?;
        let of_columns = |columns, precision| make(rows, columns, precision);
        let gated_delta = config.gated_delta();
        let gated_delta = gated_delta.map(|spec| GatedDeltaSpace::make(spec.heads, of_columns));
        let gated_delta = gated_delta.transpose()?;
        let mut attentions: Vec<AttentionSpace<T>> = Vec::new();
        let is_gated = config.attentions().any(|attention| attention.has_gate);
        for attention in config.attentions() {
            let columns = columns(attention);
            if attentions.iter().all(|space| space.columns != columns) {
                attentions.push(AttentionSpace {
                    columns,
                    qkv: make(rows, columns[0], activation)?,
                    gate: match is_gated {
                        true => Some(make(rows, columns[1], activation)?),
                        false => None,
                    },
                    out: make(rows, columns[1], activation)?,
                });
            }
        }
        let mut dense = Vec::new();
        for columns in config.dense_widths() {
            dense.push(DenseSpace {
                columns,
                gate_up: make(rows, columns[1], activation)?,
                hidden: make(rows, columns[0], activation)?,
            });
        }
        let inputs = match config.per_layer_inputs {
            Some(PerLayerInputs { width, .. }) => Some(InputSpace {
                inputs: make(rows, config.layers.len() * width, full)?,
                projected: make(rows, config.layers.len() * width, activation)?,
                gate: make(rows, width, activation)?,
            }),
            None => None,
        };
        let streams = match config.streams {
            Some(Streams { count, .. }) => {
                let mut streams = || {
                    let all = (0..count).map(|_| make(rows, config.hidden, full));
                    all.collect::<Result<Vec<_>, _>>()
                };
                let (current, predicted) = (streams()?, streams()?);
                Some(StreamSpace {
                    current,
                    predicted,
                    routed: make(rows, count, full)?,
                })
            }
            None => None,
        };
        let mut optional = |columns: Option<usize>, precision: Precision| {
            columns
                .map(|columns| make(rows, columns, precision))
                .transpose()
        };
        let experts = config.experts();
        let normed = experts.filter(|experts| experts.has_own_norms);
        let gated = experts.filter(|experts| experts.has_shared_gate);
        let mut mixers = config.layers.iter().map(|layer| layer.mixer);
        let convolves = mixers.any(|mixer| matches!(mixer, Mixer::ShortConv(_)));
        let convolved = convolves.then_some(config.hidden);
        let conv_input = optional(convolved.map(|channels| 3 * channels), activation)?;
        let conv_output = optional(convolved, activation)?;
        let short_conv = conv_input.zip(conv_output);
        Ok(Self {
            short_conv: short_conv.map(|(input, output)| ShortConvSpace { input, output }),
            gated_delta,
            mamba2,
            shared_gate: optional(gated.map(|_| 1), full)?,
            router: optional(experts.map(|experts| experts.count), full)?,
            beside: optional(normed.map(|_| config.hidden), full)?,
            side: optional(config.side_rank(), activation)?,
            attentions,
            dense,
            inputs,
            streams,
            latent: match config.latent() {
                Some(spec) => {
                    let make = |columns, precision| make(rows, columns, precision);
                    Some(LatentWorkspace::make(spec, make)?)
                }
                None => None,
            },
            residual: make(rows, config.hidden, full)?,
            normed: make(rows.max(samples), config.hidden, activation)?,
            delta: make(rows, config.hidden, activation)?,
            gathered: make(samples, config.hidden, full)?,
            logits: make(samples, config.vocabulary, full)?,
        })
    }
}

/// Returns the number of bytes that the activations of steps within `limits` take on a device.
pub(super) fn bytes<D: Device>(config: &ModelConfig, device: &D, limits: StepLimits) -> usize {
    let mut bytes = 0usize;
    let add = |rows, columns, precision| {
        bytes = bytes.saturating_add(device.tensor_bytes(rows, columns, precision));
        Ok(())
    };
    // `add` never fails.
    let _ = Workspace::make(config, limits, add);
    bytes
}
