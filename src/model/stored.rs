//! Linear layers whose weights were read from a file, before a device loads them.

use crate::device::{LinearSpec, RowOrder, WeightRows};
use crate::weights::DType;
use std::borrow::Cow;

/// A linear layer whose weights were read from a file: a stack of parts, and a bias.
pub(super) struct StoredLinear<'a> {
    parts: Vec<StoredRows<'a>>,
    bias: Option<Vec<f32>>,
}

/// Rows of a linear layer, as stored in the file.
pub(super) struct StoredRows<'a> {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Cow<'a, [u8]>,
    pub(super) order: RowOrder,
}

impl<'a> StoredLinear<'a> {
    /// Creates a layer of stacked parts without a bias.
    pub(super) fn new(parts: Vec<StoredRows<'a>>) -> Self {
        Self { parts, bias: None }
    }

    /// Returns the same layer with this bias.
    pub(super) fn with_bias(self, bias: Option<Vec<f32>>) -> Self {
        Self { bias, ..self }
    }

    /// Declares that the rows of the first `count` parts are stored in `order`, and puts their
    /// biases in the order of use.
    pub(super) fn order_first(&mut self, count: usize, order: RowOrder) {
        let mut first = 0;
        for part in self.parts.iter_mut().take(count) {
            part.order = order;
            if let Some(bias) = &mut self.bias {
                reorder(&mut bias[first..first + part.rows], order);
            }
            first += part.rows;
        }
    }

    /// Returns a layer of the given rows, in this order. This layer must be stored as one part.
    pub(super) fn select(&self, rows: &[usize]) -> StoredLinear<'static> {
        let part = &self.parts[0];
        let size = part.data.len() / part.rows.max(1);
        let mut data = Vec::with_capacity(rows.len() * size);
        for &row in rows {
            data.extend_from_slice(&part.data[row * size..(row + 1) * size]);
        }
        let bias = self.bias.as_ref();
        let part = StoredRows {
            dtype: part.dtype,
            rows: rows.len(),
            columns: part.columns,
            data: Cow::Owned(data),
            order: part.order,
        };
        StoredLinear::new(vec![part])
            .with_bias(bias.map(|bias| rows.iter().map(|&row| bias[row]).collect()))
    }

    /// Returns this layer with the rows of another one stacked after its own. If only one of them
    /// has a bias, that of the other one is 0.
    pub(super) fn stack(mut self, other: Self) -> Self {
        let count = |linear: &Self| linear.parts.iter().map(|part| part.rows).sum::<usize>();
        let (own, others) = (count(&self), count(&other));
        if self.bias.is_some() || other.bias.is_some() {
            let mut bias = self.bias.unwrap_or_else(|| vec![0.0; own]);
            bias.extend(other.bias.unwrap_or_else(|| vec![0.0; others]));
            self.bias = Some(bias);
        }
        self.parts.extend(other.parts);
        self
    }

    /// Returns the layer as a device loads it.
    pub(super) fn spec(&self) -> LinearSpec<'_> {
        let parts = self.parts.iter().map(|part| WeightRows {
            dtype: part.dtype,
            rows: part.rows,
            columns: part.columns,
            data: &part.data,
            order: part.order,
        });
        LinearSpec {
            parts: parts.collect(),
            bias: self.bias.clone(),
        }
    }
}

/// Returns row indices that undo a grouping: the file stores `groups` groups of rows, each of which
/// has parts of these widths. The indices list the first part of every group, then the second, and
/// so on.
pub(super) fn ungrouped(groups: usize, widths: &[usize]) -> Vec<usize> {
    let size: usize = widths.iter().sum();
    let mut rows = Vec::with_capacity(groups * size);
    let mut first = 0;
    for width in widths {
        for group in 0..groups {
            rows.extend(group * size + first..group * size + first + width);
        }
        first += width;
    }
    rows
}

fn reorder(values: &mut [f32], order: RowOrder) {
    let stored = values.to_vec();
    for (row, value) in values.iter_mut().enumerate() {
        *value = stored[order.stored_row(row)];
    }
}
