//! Sums of rows.

use super::CpuDevice;
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, PooledRows, PoolingOps};
use std::ops::Range;

/// Sums of rows, already computed.
pub struct CpuPooling(Vec<PooledRows>);

impl PoolingOps for CpuDevice {
    type Pooling = CpuPooling;

    fn pool(&mut self, x: &CpuTensor, ranges: &[Range<usize>]) -> Result<CpuPooling, DeviceError> {
        let rows = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        require_shape("pool", "x", x, (rows, x.columns()))?;
        let sum = |range: &Range<usize>| {
            let mut sum = PooledRows::new(x.columns());
            range.clone().for_each(|row| sum.add_row(x.row(row)));
            sum
        };
        // Summing costs little compared with the products that made the rows, so that waking
        // other threads is not worthwhile.
        Ok(CpuPooling(ranges.iter().map(sum).collect()))
    }

    fn collect_pooled(&mut self, pooling: CpuPooling) -> Result<Vec<PooledRows>, DeviceError> {
        Ok(pooling.0)
    }
}
