//! Gated delta nets.

use super::CudaDevice;
use super::cache::CudaCache;
use super::error::{require, unsupported};
use super::launch::Grid;
use super::norm::CudaVector;
use super::recurrent::{
    MOST_KEYS, RecurrentKernels, WARP_COLUMNS, recurrence_elements, recurrence_grid,
};
use super::tensor::{CudaTensor, require_shape};
use crate::device::{
    DeltaHeads, DeltaInput, DeltaOps, DeltaOrder, DeviceError, Precision, StatePart,
};

/// Heads per block of the norm.
const NORM_HEADS: usize = 8;

impl DeltaOps for CudaDevice {
    fn check_delta(&self, heads: &DeltaHeads) -> Result<(), DeviceError> {
        if heads.key_dim <= MOST_KEYS {
            return Ok(());
        }
        Err(unsupported(
            format!("a gated delta net with keys of {} elements", heads.key_dim),
            format!("at most {MOST_KEYS} are supported"),
        ))
    }

    fn delta_elements(&self, heads: &DeltaHeads) -> usize {
        recurrence_elements(heads.value_heads, heads.value_dim, heads.key_dim)
    }

    fn gated_delta(
        &mut self,
        input: &DeltaInput<'_, Self>,
        gates: &mut CudaTensor,
        heads: &DeltaHeads,
        cache: &mut CudaCache,
        part: StatePart,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_delta";
        self.check_delta(heads)?;
        let rows = self.step.padded(self.step.rows());
        let (qkv, columns) = (input.qkv, heads.value_columns());
        let fits = heads.key_heads > 0
            && heads.value_heads.is_multiple_of(heads.key_heads)
            && heads.key_dim.is_multiple_of(16)
            && heads.value_dim.is_multiple_of(WARP_COLUMNS)
            && input.decay.length() == heads.value_heads
            && input.bias.length() == heads.value_heads
            && gates.rows() >= rows
            && gates.columns() == 2 * heads.value_heads
            && gates.precision() == Precision::Full;
        require(fits, NAME, || {
            format!("{heads:?} does not fit its operands")
        })?;
        let wide = (rows, heads.qkv_columns());
        let activation = Precision::Activation;
        require_shape(NAME, "query, key and value", qkv, wide, activation)?;
        require_shape(NAME, "the result", out, (rows, columns), activation)?;
        let states = self.part_of_states(NAME, cache, part, self.delta_elements(heads))?;
        let (sequences, longest) = self.step.state_sequences();
        let launch = match longest {
            0 | 1 => RecurrentKernels::gated_delta_token,
            _ => RecurrentKernels::gated_delta,
        };
        launch(
            &self.recurrent,
            &self.context,
            recurrence_grid(heads.value_heads, heads.value_dim, sequences),
            out.ptr(),
            qkv.ptr(),
            gates.ptr(),
            input.decay.ptr(),
            input.bias.ptr(),
            states.start,
            self.step.states(),
            1.0 / (heads.key_dim as f32).sqrt(),
            states.slot_elements,
            heads.key_heads as u32,
            heads.value_heads as u32,
            heads.key_dim as u32,
            heads.value_dim as u32,
            u32::from(heads.order == DeltaOrder::Tiled),
        )
    }

    fn gated_rms_norm(
        &mut self,
        x: &mut CudaTensor,
        (gate, first): (&CudaTensor, usize),
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_rms_norm";
        let rows = self.step.padded(rows);
        let (columns, stride, width) = (x.columns(), gate.columns(), weight.length());
        let activation = Precision::Activation;
        require_shape(NAME, "x", x, (rows, columns), activation)?;
        require_shape(NAME, "the gate", gate, (rows, stride), activation)?;
        let fits = width > 0 && width.is_multiple_of(8) && columns.is_multiple_of(width);
        require(fits, NAME, || {
            format!("{columns} columns are not heads of {width}, or {width} is no multiple of 8")
        })?;
        let has_gates = first.is_multiple_of(8) && first.saturating_add(columns) <= stride;
        require(has_gates, NAME, || {
            format!(
                "there are no {columns} gates from column {first} on, a multiple of 8: there are \
                 {stride}"
            )
        })?;
        let blocks = (columns / width).div_ceil(NORM_HEADS) as u32;
        self.recurrent.gated_rms_norm(
            &self.context,
            Grid::new([rows as u32, blocks, 1], [32 * NORM_HEADS as u32, 1, 1]),
            x.ptr(),
            gate.ptr().offset_bytes(2 * first),
            weight.ptr(),
            epsilon,
            columns as u32,
            width as u32,
            stride as u32,
        )
    }
}
