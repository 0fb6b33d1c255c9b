//! Element-wise non-linearities.

use super::CudaDevice;
use super::error::require;
use super::experts::GatedPairs;
use super::launch::{Grid, kernels, vector_grid};
use super::linear::{Operands, Written};
use super::memory::Ptr;
use super::tensor::{CudaTensor, require_shape};
use super::weights::CudaLinear;
use crate::device::{Activation, ActivationOps, DeviceError, LinearOps, Precision};

kernels! {
    /// Kernels of `kernels/activation.cu`.
    pub(super) struct ActivationKernels in "activation" {
        gated_activation(out: Ptr, gate_up: Ptr, rows: u32, columns: u32, gelu: u32);
        squared_relu(out: Ptr, up: Ptr, count: u32);
        gelu(out: Ptr, up: Ptr, count: u32);
        softcap(x: Ptr, cap: f32, count: u32);
        sigmoid_gate(x: Ptr, gates: Ptr, count: u32);
        sigmoid_gates(x: Ptr, gates: Ptr, count: u32, width: u32);
    }
}

impl ActivationOps for CudaDevice {
    fn gated_linear(
        &mut self,
        x: &CudaTensor,
        weight: &CudaLinear,
        activation: Activation,
        rows: usize,
        gate_up: &mut CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let padded = self.step.padded(rows);
        if !self.products.can_gate(weight, activation, padded) {
            self.linear(x, weight, rows, gate_up)?;
            return self.gated_activation(gate_up, activation, rows, out);
        }
        const NAME: &str = "gated_linear";
        let (wide, narrow) = ((padded, weight.inputs), (padded, weight.outputs / 2));
        require_shape(NAME, "x", x, wide, x.precision())?;
        require_shape(NAME, "the result", out, narrow, Precision::Activation)?;
        let operands = Operands {
            x: self.as_activations(x, padded)?,
            out: out.ptr(),
            written: Written::Gated(activation),
            rows: padded,
            experts: None,
        };
        self.multiply(weight, &operands)
    }

    fn gated_activation(
        &mut self,
        gate_up: &CudaTensor,
        activation: Activation,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_activation";
        let rows = self.step.padded(rows);
        let columns = out.columns();
        let wide = (rows, activation.gate_up_columns(columns));
        let narrow = (rows, columns);
        require_shape(NAME, "gate and up", gate_up, wide, Precision::Activation)?;
        require_shape(NAME, "the result", out, narrow, Precision::Activation)?;
        if let Activation::ClampedSwiGlu { slope, limit } = activation {
            let pairs = GatedPairs::of_rows(gate_up.ptr(), out.ptr(), (rows, columns));
            return self.gate_pairs(&pairs, slope, limit);
        }
        self.plain_activation(gate_up.ptr(), out.ptr(), activation, (rows, columns))
    }

    fn softcap(&mut self, x: &mut CudaTensor, cap: f32, rows: usize) -> Result<(), DeviceError> {
        let rows = self.step.padded(rows);
        let count = rows.saturating_mul(x.columns());
        let fits =
            x.rows() >= rows && x.precision() == Precision::Full && u32::try_from(count).is_ok();
        require(fits, "softcap", || {
            let (has_rows, columns) = (x.rows(), x.columns());
            format!(
                "x is {has_rows} × {columns} in {:?} precision, but {rows} rows in Full, less \
                 than 2³² numbers, are needed",
                x.precision()
            )
        })?;
        let grid = Grid::new([count.div_ceil(256) as u32, 1, 1], [256, 1, 1]);
        self.activation
            .softcap(&self.context, grid, x.ptr(), cap, count as u32)
    }

    /// A gate that is in the activation type has as many columns as `x`; in a float32 one, each
    /// column applies to a multiple of eight columns of `x`.
    fn sigmoid_gate(
        &mut self,
        x: &mut CudaTensor,
        gate: &CudaTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "sigmoid_gate";
        let rows = self.step.padded(rows);
        let (columns, gates) = (x.columns(), gate.columns());
        require_shape(NAME, "x", x, (rows, columns), Precision::Activation)?;
        let (context, count) = (&self.context, rows * columns);
        let grid = vector_grid(count);
        if gate.precision() == Precision::Activation {
            let shape = (rows, columns);
            require_shape(NAME, "the gate", gate, shape, Precision::Activation)?;
            return self
                .activation
                .sigmoid_gate(context, grid, x.ptr(), gate.ptr(), count as u32);
        }
        let fits = gate.rows() >= rows && gates > 0 && columns.is_multiple_of(8 * gates);
        require(fits, NAME, || {
            let has_rows = gate.rows();
            format!(
                "{has_rows} × {gates} gates do not divide {rows} × {columns} numbers into parts \
                 of a multiple of 8 columns"
            )
        })?;
        let width = (columns / gates) as u32;
        self.activation
            .sigmoid_gates(context, grid, x.ptr(), gate.ptr(), count as u32, width)
    }
}

impl CudaDevice {
    /// Enqueues an activation without limits of `rows` rows of `columns` results.
    pub(super) fn plain_activation(
        &mut self,
        gate_up: Ptr,
        out: Ptr,
        activation: Activation,
        (rows, columns): (usize, usize),
    ) -> Result<(), DeviceError> {
        let (context, count) = (&self.context, rows * columns);
        let grid = vector_grid(count);
        let (kernels, count) = (&self.activation, count as u32);
        match activation {
            Activation::SquaredRelu => kernels.squared_relu(context, grid, out, gate_up, count),
            Activation::Gelu => kernels.gelu(context, grid, out, gate_up, count),
            _ => kernels.gated_activation(
                context,
                grid,
                out,
                gate_up,
                rows as u32,
                columns as u32,
                u32::from(activation == Activation::GeluTanh),
            ),
        }
    }
}
