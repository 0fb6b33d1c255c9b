//! Linear layers, and how their weights are passed to a device.

use super::{DeviceError, DeviceTypes};
use crate::weights::DType;

/// Order in which the rows of a stored matrix are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The stored order.
    AsStored,
    /// The order of the query and key projections of many checkpoints. Within each head, the two
    /// halves that RoPE rotates are stored interleaved. Loading de-interleaves them, so
    /// that every model uses the same half-split RoPE.
    RopeInterleaved {
        /// Number of rows per head.
        head_dim: usize,
        /// Number of leading rows of a head that are interleaved; the others are stored in
        /// order.
        rotary_dim: usize,
    },
}

impl RowOrder {
    /// Returns the index of the stored row that is used as row `row`.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::RopeInterleaved {
                head_dim,
                rotary_dim,
            } => {
                let (head, within) = (row / head_dim, row % head_dim);
                if within >= rotary_dim {
                    return row;
                }
                let (half, pair) = (within / (rotary_dim / 2), within % (rotary_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

/// Rows of a weight matrix as stored in a model file.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    /// Storage format of the weights.
    pub dtype: DType,
    /// Number of rows (outputs).
    pub rows: usize,
    /// Number of columns (inputs); must be a multiple of the block length of `dtype`.
    pub columns: usize,
    /// The stored bytes, row after row, `dtype.bytes_for(columns)` bytes per row.
    pub data: &'a [u8],
    /// Order in which the rows are used.
    pub order: RowOrder,
}

impl WeightRows<'_> {
    /// Checks that the rows can be part of a layer with this number of columns. The error says
    /// why not.
    pub(super) fn check(&self, columns: usize) -> Result<(), String> {
        let rows = self.rows;
        if self.columns != columns {
            let own = self.columns;
            return Err(format!(
                "parts of one layer have {columns} and {own} columns"
            ));
        }
        let row_bytes = self.dtype.bytes_for(columns);
        let bytes = row_bytes.and_then(|row| row.checked_mul(rows));
        if bytes != Some(self.data.len()) {
            let (dtype, found) = (self.dtype, self.data.len());
            return Err(format!(
                "{rows} × {columns} weights of type {dtype} do not take {found} bytes"
            ));
        }
        match self.order {
            RowOrder::RopeInterleaved {
                head_dim,
                rotary_dim,
            } if head_dim == 0
                || rotary_dim > head_dim
                || !rotary_dim.is_multiple_of(2)
                || !rows.is_multiple_of(head_dim) =>
            {
                Err(format!(
                    "{rows} rows cannot be divided into heads of {head_dim} rows, of which \
                     {rotary_dim} (which must be even) are interleaved"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Specification of a linear layer to load: `y = W x + b`, where `W` is the row-wise stack of
/// `parts`.
///
/// Fused projections (query, key and value; gate and up) are made by stacking projections that
/// are stored separately. The parts may differ in `dtype` but not in `columns`.
#[derive(Clone, Debug)]
pub struct LinearSpec<'a> {
    /// The stacked parts, in the order of their outputs.
    pub parts: Vec<WeightRows<'a>>,
    /// Bias, if the layer has one: one value per output row of all parts together.
    pub bias: Option<Vec<f32>>,
}

/// The part of a [`Device`](super::Device) that loads linear layers and multiplies by them.
pub trait LinearOps: DeviceTypes {
    /// Returns about how many bytes this many weights take on this device, if they are stored as
    /// `dtype`.
    fn weight_size(&self, dtype: DType, weights: usize) -> usize {
        dtype.bytes_for(weights).unwrap_or(usize::MAX)
    }

    /// Loads a linear layer.
    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<Self::Linear, DeviceError>;

    /// Computes `out = W x + b`.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        weight: &Self::Linear,
        rows: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}
