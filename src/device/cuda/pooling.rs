//! Sums of rows. The ranges are uploaded in one copy, and the sums come back in one copy on the
//! results stream.

use super::CudaDevice;
use super::error::require;
use super::launch::Grid;
use super::tensor::{CudaTensor, require_shape};
use super::transfer::{Download, Downloads, Uploads};
use crate::device::{DeviceError, PooledRows, PoolingOps, Precision};
use std::ops::Range;
use std::rc::Rc;

/// State of pooling that is kept from step to step.
pub(super) struct Pooler {
    uploads: Uploads,
    downloads: Downloads,
}

impl Pooler {
    pub(super) fn new() -> Self {
        Self {
            uploads: Uploads::outside_graphs("the rows that are pooled"),
            downloads: Downloads::default(),
        }
    }
}

/// Sums of rows on their way to the host.
pub struct CudaPooling {
    download: Rc<Download>,
    /// Number of rows of each sum.
    rows: Vec<usize>,
    columns: usize,
}

impl PoolingOps for CudaDevice {
    type Pooling = CudaPooling;

    fn pool(
        &mut self,
        x: &CudaTensor,
        ranges: &[Range<usize>],
    ) -> Result<CudaPooling, DeviceError> {
        const NAME: &str = "pool";
        let columns = x.columns();
        let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        require_shape(NAME, "x", x, (end, columns), Precision::Activation)?;
        let forward = ranges.iter().all(|range| range.start <= range.end);
        require(forward, NAME, || {
            format!("{ranges:?} contains a range that ends before it starts")
        })?;
        let rows: Vec<usize> = ranges.iter().map(Range::len).collect();
        let pairs = ranges.iter().zip(&rows);
        let words: Vec<u32> = pairs
            .flat_map(|(range, &rows)| [range.start as u32, rows as u32])
            .collect();
        let words = self.pooler.uploads.write(&self.context, &words)?;
        let bytes = 8 * columns * ranges.len();
        let download = self.pooler.downloads.next(&self.context, bytes)?;
        let blocks = [columns.div_ceil(256) as u32, ranges.len() as u32, 1];
        self.norm.pool_rows(
            &self.context,
            Grid::new(blocks, [256, 1, 1]),
            download.ptr(),
            x.ptr(),
            words,
            columns as u32,
        )?;
        download.send(&self.context, bytes)?;
        Ok(CudaPooling {
            download,
            rows,
            columns,
        })
    }

    fn collect_pooled(&mut self, pooling: CudaPooling) -> Result<Vec<PooledRows>, DeviceError> {
        let CudaPooling {
            download,
            rows,
            columns,
        } = pooling;
        download.receive(|bytes| {
            let (sums, _) = bytes.as_chunks::<8>();
            let sums = sums.chunks_exact(columns.max(1));
            let pooled = |(&rows, sums): (&usize, &[[u8; 8]])| {
                let sums = sums.iter().map(|&bytes| i64::from_ne_bytes(bytes));
                PooledRows::of_device(rows, sums.collect())
            };
            rows.iter().zip(sums).map(pooled).collect()
        })
    }
}
