//! What some models do to the residual stream besides adding to it.

use super::CudaDevice;
use super::error::{require, unsupported};
use super::launch::{kernels, row_grid, vector_grid};
use super::memory::Ptr;
use super::norm::CudaVector;
use super::tensor::{CudaTensor, require_shape};
use super::weights::CudaLinear;
use crate::device::{Activation, DeviceError, EmbeddingOps, Precision, ResidualOps};

kernels! {
    /// Kernels of `kernels/residual.cu`.
    pub(super) struct ResidualKernels in "residual" {
        copy_full(out: Ptr, x: Ptr, count: u32);
        scale(x: Ptr, factor: f32, count: u32);
        multiply(out: Ptr, x: Ptr, weight: Ptr, count: u32, columns: u32);
        gate_columns(
            gate: Ptr, inputs: Ptr, count: u32, columns: u32, stride: u32, gelu: u32
        );
        match_magnitude(x: Ptr, like: Ptr, floor: f32, columns: u32);
        match_magnitude_full(x: Ptr, like: Ptr, floor: f32, columns: u32);
        mix_streams(
            out_0: Ptr, out_1: Ptr, out_2: Ptr, out_3: Ptr, x_0: Ptr, x_1: Ptr, x_2: Ptr, x_3: Ptr,
            routed: Ptr, weight: Ptr, streams: u32, columns: u32
        );
        correct_streams(
            x_0: Ptr, x_1: Ptr, x_2: Ptr, x_3: Ptr, active: Ptr, updated: Ptr, routed: Ptr,
            weight: Ptr, streams: u32, columns: u32
        );
        cut_gate(gate_up: Ptr, deviations: f32, columns: u32);
    }
}

/// Maximum number of residual streams, as in `kernels/residual.cu`.
const MAX_STREAMS: usize = 4;

/// Returns [`DeviceError::Unsupported`] if there are no kernels for this many residual streams.
pub(super) fn check_streams(count: usize) -> Result<(), DeviceError> {
    if count <= MAX_STREAMS {
        return Ok(());
    }
    Err(unsupported(
        format!("{count} residual streams"),
        format!("at most {MAX_STREAMS} are supported"),
    ))
}

/// Returns the addresses of streams; the last ones are NULL if there are fewer.
fn addresses(streams: &[CudaTensor]) -> [Ptr; MAX_STREAMS] {
    let mut all = [Ptr::NULL; MAX_STREAMS];
    for (address, stream) in all.iter_mut().zip(streams) {
        *address = stream.ptr();
    }
    all
}

/// The operands of an operation on streams that give the factors of each row.
struct Factors<'a> {
    routed: &'a CudaTensor,
    weight: &'a CudaVector,
    /// Number of factors per row.
    count: usize,
}

impl Factors<'_> {
    /// Checks the operands for `rows` rows of `streams` streams.
    fn require(
        &self,
        operation: &'static str,
        rows: usize,
        streams: usize,
    ) -> Result<(), DeviceError> {
        let (routed, weights) = (self.routed, self.weight.length());
        let fits = routed.rows() >= rows
            && routed.columns() == streams
            && routed.precision() == Precision::Full
            && weights == self.count * streams;
        require(fits, operation, || {
            format!(
                "{weights} weights and {} × {} numbers in {:?} precision do not give {} factors of \
                 {streams} streams for {rows} rows",
                routed.rows(),
                routed.columns(),
                routed.precision(),
                self.count,
            )
        })
    }
}

impl ResidualOps for CudaDevice {
    fn copy(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let rows = self.step.padded(rows);
        let shape = (rows, x.columns());
        require_shape("copy", "x", x, shape, Precision::Full)?;
        require_shape("copy", "the result", out, shape, out.precision())?;
        let count = rows * x.columns();
        let (context, grid, count) = (&self.context, vector_grid(count), count as u32);
        match out.precision() {
            Precision::Full => self
                .residual
                .copy_full(context, grid, out.ptr(), x.ptr(), count),
            Precision::Activation => self.norm.convert(context, grid, out.ptr(), x.ptr(), count),
        }
    }

    fn scale(&mut self, x: &mut CudaTensor, factor: f32, rows: usize) -> Result<(), DeviceError> {
        let (rows, columns) = (self.step.padded(rows), x.columns());
        require_shape("scale", "x", x, (rows, columns), Precision::Full)?;
        let count = rows * columns;
        let (context, grid) = (&self.context, vector_grid(count));
        self.residual
            .scale(context, grid, x.ptr(), factor, count as u32)
    }

    /// The kernels that embed tokens take token 0 for every token outside the table.
    fn embed_within(
        &mut self,
        table: &CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        self.embed(table, scale, out)
    }

    fn gate_columns(
        &mut self,
        gate: &mut CudaTensor,
        activation: Activation,
        inputs: &CudaTensor,
        first: usize,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gate_columns";
        if !matches!(activation, Activation::Silu | Activation::GeluTanh) {
            return Err(unsupported(
                format!("{activation:?} of the gate of a layer's own input"),
                "it must be SiLU or GELU",
            ));
        }
        let rows = self.step.padded(rows);
        let (columns, stride) = (gate.columns(), inputs.columns());
        let shape = (rows, columns);
        require_shape(NAME, "the gate", gate, shape, Precision::Activation)?;
        require_shape(NAME, "the inputs", inputs, (rows, stride), Precision::Full)?;
        let fits = first.saturating_add(columns) <= stride && first.is_multiple_of(8);
        require(fits, NAME, || {
            format!(
                "{columns} columns from {first}, which must be a multiple of 8, are outside the \
                 {stride} columns of the inputs"
            )
        })?;
        let count = rows * columns;
        self.residual.gate_columns(
            &self.context,
            vector_grid(count),
            gate.ptr(),
            inputs.ptr().offset_bytes(first * size_of::<f32>()),
            count as u32,
            columns as u32,
            stride as u32,
            u32::from(activation == Activation::GeluTanh),
        )
    }

    fn multiply(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "multiply";
        let rows = self.step.padded(rows);
        let columns = weight.length();
        require_shape(NAME, "x", x, (rows, columns), Precision::Full)?;
        let shape = (rows, columns);
        require_shape(NAME, "the result", out, shape, Precision::Activation)?;
        let count = rows * columns;
        self.residual.multiply(
            &self.context,
            vector_grid(count),
            out.ptr(),
            x.ptr(),
            weight.ptr(),
            count as u32,
            columns as u32,
        )
    }

    fn match_magnitude(
        &mut self,
        x: &mut CudaTensor,
        like: &CudaTensor,
        floor: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "match_magnitude";
        let rows = self.step.padded(rows);
        let shape = (rows, x.columns());
        require_shape(NAME, "x", x, shape, x.precision())?;
        require_shape(NAME, "the other", like, shape, Precision::Full)?;
        let (context, grid, columns) = (&self.context, row_grid(rows), x.columns() as u32);
        let (to, like) = (x.ptr(), like.ptr());
        match x.precision() {
            Precision::Full => self
                .residual
                .match_magnitude_full(context, grid, to, like, floor, columns),
            Precision::Activation => self
                .residual
                .match_magnitude(context, grid, to, like, floor, columns),
        }
    }

    fn mix_streams(
        &mut self,
        streams: &[CudaTensor],
        routed: &CudaTensor,
        weight: &CudaVector,
        rows: usize,
        out: &mut [CudaTensor],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "mix_streams";
        let (rows, count) = (self.step.padded(rows), streams.len());
        let columns = streams.first().map_or(0, CudaTensor::columns);
        check_streams(count)?;
        require(out.len() == count, NAME, || {
            format!("there are {count} streams and {} results", out.len())
        })?;
        let factors = Factors {
            routed,
            weight,
            count: count * count,
        };
        factors.require(NAME, rows, count)?;
        for stream in streams.iter().chain(&*out) {
            require_shape(NAME, "a stream", stream, (rows, columns), Precision::Full)?;
        }
        let ([x_0, x_1, x_2, x_3], [out_0, out_1, out_2, out_3]) =
            (addresses(streams), addresses(out));
        self.residual.mix_streams(
            &self.context,
            row_grid(rows),
            out_0,
            out_1,
            out_2,
            out_3,
            x_0,
            x_1,
            x_2,
            x_3,
            routed.ptr(),
            weight.ptr(),
            count as u32,
            columns as u32,
        )
    }

    fn correct_streams(
        &mut self,
        updated: &CudaTensor,
        (routed, weight): (&CudaTensor, &CudaVector),
        active: usize,
        rows: usize,
        streams: &mut [CudaTensor],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "correct_streams";
        let (rows, count) = (self.step.padded(rows), streams.len());
        let shape = (rows, updated.columns());
        check_streams(count)?;
        require(active < count, NAME, || {
            format!("there is no stream {active}: there are {count}")
        })?;
        let factors = Factors {
            routed,
            weight,
            count,
        };
        factors.require(NAME, rows, count)?;
        require_shape(NAME, "the update", updated, shape, Precision::Full)?;
        for stream in &*streams {
            require_shape(NAME, "a stream", stream, shape, Precision::Full)?;
        }
        let [x_0, x_1, x_2, x_3] = addresses(streams);
        self.residual.correct_streams(
            &self.context,
            row_grid(rows),
            x_0,
            x_1,
            x_2,
            x_3,
            streams[active].ptr(),
            updated.ptr(),
            routed.ptr(),
            weight.ptr(),
            count as u32,
            shape.1 as u32,
        )
    }

    fn cut_gate(
        &mut self,
        gate_up: &mut CudaTensor,
        deviations: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "cut_gate";
        let (rows, columns) = (self.step.padded(rows), gate_up.columns());
        let shape = (rows, columns);
        require_shape(NAME, "gate and up", gate_up, shape, Precision::Activation)?;
        require(columns.is_multiple_of(16), NAME, || {
            format!("gate and up have {columns} columns, but a multiple of 16 is needed")
        })?;
        self.residual.cut_gate(
            &self.context,
            row_grid(rows),
            gate_up.ptr(),
            deviations,
            (columns / 2) as u32,
        )
    }
}
