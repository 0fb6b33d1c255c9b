//! Tensors whose numbers are only part of a quantised matrix, so that the model builder does not
//! see them.

/// Storage format of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RawType {
    I8,
    U8,
    I32,
    I64,
    F8E4M3,
}

impl RawType {
    /// Returns the number of bytes per number.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::F8E4M3 => 1,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// Description of such a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawTensor<'a> {
    pub(super) kind: RawType,
    /// Outermost dimension first.
    pub(super) shape: &'a [usize],
}
