//! The weights of linear layers in device memory.

use super::memory::{Buffer, Ptr};
use super::pack::Format;
use crate::weights::DType;

/// Kind of weights, which decides the kernels that multiply by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Floating-point weights, stored in the activation type.
    Dense,
    /// Repacked weights of a block format, with the type in the model file.
    Quantised(Format, DType),
}

impl Kind {
    pub(super) fn of(dtype: DType) -> Self {
        Format::of(dtype).map_or(Self::Dense, |format| Self::Quantised(format, dtype))
    }
}

/// Consecutive outputs whose weights are of one kind.
pub(super) struct Segment {
    pub(super) first_output: usize,
    pub(super) outputs: usize,
    pub(super) kind: Kind,
    /// The weights, matrix after matrix.
    pub(super) weights: Buffer,
}

/// A loaded linear layer, or the corresponding layers of all experts.
pub struct CudaLinear {
    pub(super) segments: Vec<Segment>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Number of matrices: 1, or one per expert.
    pub(super) matrices: usize,
    /// The bias, if there is one: float32 per output.
    pub(super) bias: Option<Buffer>,
}

impl CudaLinear {
    /// Returns the number of outputs.
    pub fn rows(&self) -> usize {
        self.outputs
    }

    /// Returns the number of inputs.
    pub fn columns(&self) -> usize {
        self.inputs
    }

    /// Returns the weights if they form one floating-point matrix: `rows × columns` elements of
    /// the activation type, row-major.
    pub(super) fn dense(&self) -> Option<Ptr> {
        match &self.segments[..] {
            [segment] if segment.kind == Kind::Dense => Some(segment.weights.ptr()),
            _ => None,
        }
    }
}
