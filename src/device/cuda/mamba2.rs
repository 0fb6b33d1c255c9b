//! Mamba-2 layers.

use super::CudaDevice;
use super::cache::CudaCache;
use super::error::{require, unsupported};
use super::launch::Grid;
use super::norm::CudaVector;
use super::recurrent::{MOST_KEYS, RecurrentKernels, recurrence_elements, recurrence_grid};
use super::tensor::{CudaTensor, require_shape};
use crate::device::{DeviceError, Mamba2Ops, Mamba2Spec, Mamba2Weights, Precision, StatePart};

impl Mamba2Ops for CudaDevice {
    fn check_mamba2(&self, spec: &Mamba2Spec) -> Result<(), DeviceError> {
        let (size, projected) = (spec.state_size, spec.projected());
        if size > MOST_KEYS {
            return Err(unsupported(
                format!("a Mamba-2 layer with {size} elements of the state for each column"),
                format!("at most {MOST_KEYS} are supported"),
            ));
        }
        if !projected.is_multiple_of(8) {
            return Err(unsupported(
                format!("a Mamba-2 layer with {} heads", spec.heads),
                "the number of heads must be a multiple of 8",
            ));
        }
        Ok(())
    }

    fn mamba2_elements(&self, spec: &Mamba2Spec) -> usize {
        recurrence_elements(spec.heads, spec.head_dim, spec.state_size)
    }

    fn mamba2(
        &mut self,
        (projected, convolved): (&CudaTensor, &CudaTensor),
        spec: &Mamba2Spec,
        weights: Mamba2Weights<'_, CudaVector>,
        cache: &mut CudaCache,
        part: StatePart,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "mamba2";
        self.check_mamba2(spec)?;
        let (rows, columns) = (self.step.padded(self.step.rows()), spec.columns());
        let activation = Precision::Activation;
        let wide = (rows, spec.projected());
        require_shape(NAME, "the projection", projected, wide, activation)?;
        let channels = (rows, spec.channels());
        require_shape(NAME, "the convolution", convolved, channels, activation)?;
        require_shape(NAME, "the result", out, (rows, columns), activation)?;
        let Mamba2Weights {
            rates,
            skips,
            step_biases,
        } = weights;
        let per_head = [rates, skips, step_biases];
        let fits = spec.head_dim.is_multiple_of(Mamba2Spec::HEAD_DIM)
            && spec.state_size.is_multiple_of(Mamba2Spec::STATE_SIZE)
            && spec.groups > 0
            && spec.heads.is_multiple_of(spec.groups)
            && per_head.iter().all(|vector| vector.length() == spec.heads);
        require(fits, NAME, || format!("{spec:?} does not fit its operands"))?;
        let states = self.part_of_states(NAME, cache, part, self.mamba2_elements(spec))?;
        let (sequences, longest) = self.step.state_sequences();
        let [least, most] = spec.step_limits;
        let launch = match longest {
            0 | 1 => RecurrentKernels::mamba2_token,
            _ => RecurrentKernels::mamba2,
        };
        launch(
            &self.recurrent,
            &self.context,
            recurrence_grid(spec.heads, spec.head_dim, sequences),
            out.ptr(),
            projected.ptr(),
            convolved.ptr(),
            rates.ptr(),
            skips.ptr(),
            step_biases.ptr(),
            states.start,
            self.step.states(),
            least,
            most,
            states.slot_elements,
            spec.heads as u32,
            spec.head_dim as u32,
            spec.state_size as u32,
            spec.groups as u32,
        )
    }

    fn gated_norm(
        &mut self,
        x: &mut CudaTensor,
        gates: &CudaTensor,
        weight: &CudaVector,
        groups: usize,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_norm";
        let rows = self.step.padded(rows);
        let (columns, stride) = (weight.length(), gates.columns());
        let activation = Precision::Activation;
        require_shape(NAME, "x", x, (rows, columns), activation)?;
        require_shape(NAME, "the gates", gates, (rows, stride), activation)?;
        let fits = stride >= columns && groups > 0 && columns.is_multiple_of(8 * groups);
        require(fits, NAME, || {
            format!(
                "{columns} columns in {groups} groups of a multiple of 8 do not fit gates of \
                 {stride} columns"
            )
        })?;
        self.recurrent.gated_norm(
            &self.context,
            Grid::new([rows as u32, groups as u32, 1], [256, 1, 1]),
            x.ptr(),
            gates.ptr(),
            weight.ptr(),
            epsilon,
            (columns / groups) as u32,
            stride as u32,
        )
    }
}
