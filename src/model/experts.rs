//! Reads the tensors of a mixture of experts.

use super::architectures::StackedExperts;
use super::layer::Experts;
use super::names::{self, GateUp, Part};
use super::stored::{StoredLinear, StoredRows};
use super::tensors::{Naming, require_shape};
use super::{ModelError, ModelSource};
use crate::device::{Activation, RowOrder};
use crate::weights::TensorView;
use std::borrow::Cow;

/// Ending of the name of a tensor of stacked experts that is stored in MXFP4. Such a tensor is not
/// transposed.
const BLOCKS: &str = "_blocks";

impl StackedExperts {
    /// Returns the places of the gate rows and then of the up rows of an expert of this width.
    fn stored_rows(self, width: usize) -> Vec<usize> {
        let place = |row: usize| match (self.alternates, row < width) {
            (false, _) => row,
            (true, true) => 2 * row,
            (true, false) => 2 * (row - width) + 1,
        };
        (0..2 * width).map(place).collect()
    }
}

impl ModelSource {
    /// Reads one expert: its gate and up projections, stacked, or only the up projection if the
    /// activation has no gate; and its down projection.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        spec: &Experts,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let (hidden, width) = (self.config().hidden, spec.width);
        if let Some(stacked) = self.stacked_experts(layer) {
            let gate_up = self.stack_name(layer, stacked.gate_up);
            let down = self.stack_name(layer, stacked.down);
            let is_transposed = |name: &str| stacked.are_transposed && !name.ends_with(BLOCKS);
            let places = stacked.stored_rows(width);
            let gate_up = match is_transposed(&gate_up) {
                true => self.transposed(&gate_up, expert, hidden, &places)?,
                false => {
                    let stored = self.expert_entry(&gate_up, expert, 2 * width, hidden)?;
                    match stacked.alternates {
                        true => stored.select(&places),
                        false => stored,
                    }
                }
            };
            let down = match is_transposed(&down) {
                true => {
                    let columns: Vec<usize> = (0..hidden).collect();
                    self.transposed(&down, expert, width, &columns)?
                }
                false => self.expert_entry(&down, expert, hidden, width)?,
            };
            return Ok((gate_up, down));
        }
        let down = [(Part::ExpertDown(expert), hidden)];
        if let Some(fused) = self.fused_experts(layer) {
            let gate_up = self.entry(&fused, expert, &[2 * width, hidden])?;
            let gate_up = StoredLinear::new(vec![self.rows(&gate_up, 2 * width, hidden)?]);
            return Ok((gate_up, self.expert_linear(layer, expert, &down, width)?));
        }
        let gate_up = [
            (Part::ExpertGate(expert), width),
            (Part::ExpertUp(expert), width),
        ];
        let first = usize::from(!spec.routing.activation.is_gated());
        let gate_up = self.expert_linear(layer, expert, &gate_up[first..], hidden)?;
        Ok((gate_up, self.expert_linear(layer, expert, &down, width)?))
    }

    /// Reads the dense part beside the experts: its gate and up projections, stacked, or only the
    /// up projection if the activation has no gate; and its down projection.
    pub(super) fn shared_expert(
        &self,
        layer: usize,
        width: usize,
        activation: Activation,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let hidden = self.config().hidden;
        let gate_up = self.gate_up_parts(layer, GateUp::SHARED, activation, width);
        let gate_up = self.linear(layer, &gate_up, hidden)?;
        let down = self.linear(layer, &[(Part::SharedDown, hidden)], width)?;
        Ok((gate_up, down))
    }

    /// Reads the projection to the gate of the dense part beside the experts: one row.
    pub(super) fn shared_gate(&self, layer: usize) -> Result<StoredLinear<'_>, ModelError> {
        let tensor = self.tensor(&self.name(layer, Part::SharedGateOut))?;
        let row = [1, self.config().hidden];
        // GGUF files may store it as a vector.
        let shape: &[usize] = match tensor.shape == &row[1..] {
            true => &row,
            false => tensor.shape,
        };
        let rows = self.rows(&TensorView { shape, ..tensor }, row[0], row[1])?;
        Ok(StoredLinear::new(vec![rows]))
    }

    /// Reads the weight of the norm on the router's input.
    pub(super) fn router_scale(&self, layer: usize) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::RouterScale), self.config().hidden)
    }

    /// Reads the factors on the experts' outputs, one per expert.
    pub(super) fn expert_scales(&self, layer: usize, count: usize) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::ExpertScales), count)
    }

    /// Reads the corrections, one per expert, that are added to the experts' weights when experts
    /// are chosen.
    pub(super) fn corrections(&self, layer: usize, count: usize) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::Corrections), count)
    }

    /// Returns the names of the tensors that hold a part of all experts of a layer: one stacked
    /// tensor, or one tensor per expert in order. If the file holds neither, it is the name of the
    /// stacked tensor, if the format or the architecture has one.
    pub(super) fn expert_names(
        &self,
        layer: usize,
        count: usize,
        part: fn(usize) -> Part,
    ) -> Vec<String> {
        let is_down = matches!(part(0), Part::ExpertDown(_));
        if let Some(fused) = self.fused_experts(layer).filter(|_| !is_down) {
            return vec![fused];
        }
        let single = || (0..count).map(|expert| self.name(layer, part(expert)));
        let is_used = || {
            let is_stored = self.stacked_name(layer, part(0)).is_some();
            is_stored || self.stacked_experts(layer).is_some()
        };
        match self.stack_of(layer, part(0)) {
            Some(stack) if is_used() || !single().any(|name| self.holds(&name)) => vec![stack],
            _ => single().collect(),
        }
    }

    /// Returns the name of the tensor in which the format or the architecture stacks a part of all
    /// experts of a layer, if there is such a name.
    fn stack_of(&self, layer: usize, part: Part) -> Option<String> {
        Some(match (self.naming(), part) {
            (Naming::Gguf, part) => {
                self.layer_prefix(layer) + names::gguf_stacked(part)? + ".weight"
            }
            (_, Part::ExpertDown(_)) => self.stack_name(layer, self.stacks()?.down),
            _ => self.stack_name(layer, self.stacks()?.gate_up),
        })
    }

    /// Returns the name of a tensor in which a Hugging Face checkpoint stacks a part of all experts
    /// of a layer. It has another ending if it is stored in MXFP4.
    fn stack_name(&self, layer: usize, name: &str) -> String {
        let name = self.layer_prefix(layer) + name;
        let blocks = format!("{name}{BLOCKS}");
        if self.holds(&blocks) { blocks } else { name }
    }

    /// Returns how Hugging Face checkpoints of the architecture may stack experts.
    fn stacks(&self) -> Option<StackedExperts> {
        self.config().architecture.storage.stacked_experts
    }

    /// Returns the name of the bias that belongs to a tensor of experts.
    pub(super) fn expert_bias_name(&self, weight: &str) -> String {
        match weight.ends_with(".weight") {
            true => names::bias(weight),
            false => format!("{}_bias", weight.trim_end_matches(BLOCKS)),
        }
    }

    /// Returns how a Hugging Face checkpoint stacks the experts of a layer, if it does.
    fn stacked_experts(&self, layer: usize) -> Option<StackedExperts> {
        let stacked = match self.naming() {
            Naming::Gguf => None,
            Naming::HuggingFace { .. } => self.stacks(),
        };
        stacked.filter(|stacked| {
            stacked.are_transposed || self.holds(&self.stack_name(layer, stacked.gate_up))
        })
    }

    /// Returns the name of the tensor in which a GGUF file stacks the gate and up projections of
    /// all experts of a layer, if the file holds it. The rows of each expert's gate come first.
    fn fused_experts(&self, layer: usize) -> Option<String> {
        if self.naming() != Naming::Gguf {
            return None;
        }
        let name = self.layer_prefix(layer) + "ffn_gate_up_exps.weight";
        self.holds(&name).then_some(name)
    }

    /// Returns the name of the tensor in which a GGUF file stacks a part of all experts of a layer,
    /// if the file holds it.
    fn stacked_name(&self, layer: usize, part: Part) -> Option<String> {
        let name = self
            .stack_of(layer, part)
            .filter(|_| self.naming() == Naming::Gguf);
        name.filter(|name| self.holds(name))
    }

    /// Reads a linear layer from parts of one expert, with their biases if there are any. Each part
    /// is a tensor of its own or an entry of a stacked tensor.
    fn expert_linear(
        &self,
        layer: usize,
        expert: usize,
        parts: &[(Part, usize)],
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear_of(parts, columns, |part| {
            match self.stacked_name(layer, part) {
                Some(stacked) => (stacked, Some(expert)),
                None => (self.name(layer, part), None),
            }
        })
    }

    /// Returns entry `index` of a stacked tensor.
    ///
    /// # Errors
    /// [`ModelError::WrongShape`] if there is no such entry or it does not have this shape.
    pub(super) fn entry(
        &self,
        name: &str,
        index: usize,
        shape: &[usize],
    ) -> Result<TensorView<'_>, ModelError> {
        let tensor = self.tensor(name)?;
        let entry = tensor.slice(index).filter(|entry| entry.shape == shape);
        entry.ok_or_else(|| ModelError::WrongShape {
            name: name.to_owned(),
            found: tensor.shape.to_vec(),
            expected: [&[index + 1][..], shape].concat(),
        })
    }

    /// Reads matrix `index` of a tensor that stacks matrices, `[count, rows, columns]`.
    ///
    /// # Errors
    /// [`ModelError::WrongShape`] if the tensor does not have this shape.
    pub(super) fn stacked_rows(
        &self,
        name: &str,
        index: usize,
        shape: [usize; 3],
    ) -> Result<StoredRows<'_>, ModelError> {
        let tensor = self.tensor(name)?;
        require_shape(&tensor, &shape)?;
        let [_, rows, columns] = shape;
        self.rows(&self.entry(name, index, &[rows, columns])?, rows, columns)
    }

    /// Reads the rows of one expert from a stacked tensor, with its bias if there is one.
    fn expert_entry(
        &self,
        name: &str,
        expert: usize,
        rows: usize,
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let stored = self.rows(&self.entry(name, expert, &[rows, columns])?, rows, columns)?;
        let bias_name = self.expert_bias_name(name);
        let bias = match self.has_bias(Part::ExpertDown(expert), &bias_name) {
            true => Some(self.numbers(&self.entry(&bias_name, expert, &[rows])?, rows)?),
            false => None,
        };
        Ok(StoredLinear::new(vec![stored]).with_bias(bias))
    }

    /// Reads entry `expert` of a stacked tensor, `[inputs, outputs]`, and transposes it: row `i` of
    /// the result is column `columns[i]`. The bias, if there is one, is put in the same order.
    fn transposed(
        &self,
        name: &str,
        expert: usize,
        inputs: usize,
        columns: &[usize],
    ) -> Result<StoredLinear<'_>, ModelError> {
        let outputs = columns.len();
        let entry = self.entry(name, expert, &[inputs, outputs])?;
        if !entry.dtype.is_float() {
            return Err(ModelError::WrongFormat {
                name: name.to_owned(),
                found: entry.dtype.to_string(),
                expected: "F32, F16 or BF16",
            });
        }
        let data = self.read(&entry)?;
        let size = data.len() / (inputs * outputs);
        let mut rows = Vec::with_capacity(data.len());
        for &column in columns {
            for input in 0..inputs {
                let at = (input * outputs + column) * size;
                rows.extend_from_slice(&data[at..at + size]);
            }
        }
        let rows = StoredRows {
            dtype: entry.dtype,
            rows: outputs,
            columns: inputs,
            data: Cow::Owned(rows),
            order: RowOrder::AsStored,
        };
        let bias_name = self.expert_bias_name(name);
        let bias = match self.has_bias(Part::ExpertDown(expert), &bias_name) {
            true => {
                let stored = self.numbers(&self.entry(&bias_name, expert, &[outputs])?, outputs)?;
                Some(columns.iter().map(|&column| stored[column]).collect())
            }
            false => None,
        };
        Ok(StoredLinear::new(vec![rows]).with_bias(bias))
    }
}
