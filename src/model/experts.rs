//! The tensors of a mixture of experts.

use super::architectures::StackedExperts;
use super::names::{self, Part};
use super::stored::{StoredLinear, StoredRows};
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::device::RowOrder;
use crate::weights::TensorView;
use std::borrow::Cow;

impl ModelSource {
    /// Gate and up projection of one expert, stacked, and its down projection.
    pub(super) fn expert(
        &self,
        layer: usize,
        expert: usize,
        width: usize,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        if let Some(stacked) = self.transposed_experts() {
            return self.transposed_expert(layer, expert, width, stacked);
        }
        let hidden = self.config().hidden;
        let gate_up = [
            (Part::ExpertGate(expert), width),
            (Part::ExpertUp(expert), width),
        ];
        let gate_up = self.expert_linear(layer, expert, &gate_up, hidden)?;
        let down = [(Part::ExpertDown(expert), hidden)];
        Ok((gate_up, self.expert_linear(layer, expert, &down, width)?))
    }

    /// Gate and up projection of the dense part beside the experts, stacked, and its down
    /// projection.
    pub(super) fn shared_expert(
        &self,
        layer: usize,
        width: usize,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let hidden = self.config().hidden;
        let gate_up = [(Part::SharedGate, width), (Part::SharedUp, width)];
        let gate_up = self.linear(layer, &gate_up, hidden)?;
        let down = self.linear(layer, &[(Part::SharedDown, hidden)], width)?;
        Ok((gate_up, down))
    }

    /// What is added to the experts' weights to choose.
    pub(super) fn corrections(&self, layer: usize, count: usize) -> Result<Vec<f32>, ModelError> {
        self.vector(&self.name(layer, Part::Corrections), count)
    }

    /// The tensors that hold a part of all experts of a layer, one after the other: one, or one
    /// for each expert.
    pub(super) fn expert_names(
        &self,
        layer: usize,
        count: usize,
        part: fn(usize) -> Part,
    ) -> Vec<String> {
        if let Some(stacked) = self.transposed_experts() {
            let name = match part(0) {
                Part::ExpertDown(_) => stacked.down,
                _ => stacked.gate_up,
            };
            return vec![self.stacked_path(layer, name)];
        }
        match self.stacked_name(layer, part(0)) {
            Some(stacked) if self.holds(&stacked) => vec![stacked],
            _ => (0..count)
                .map(|expert| self.name(layer, part(expert)))
                .collect(),
        }
    }

    /// The name of the bias that belongs to a tensor of experts.
    pub(super) fn expert_bias_name(&self, weight: &str) -> String {
        match self.transposed_experts() {
            Some(_) => format!("{weight}_bias"),
            None => names::bias(weight),
        }
    }

    /// How the experts of a layer are stacked in Hugging Face checkpoints, if they are.
    fn transposed_experts(&self) -> Option<StackedExperts> {
        match self.naming() {
            Naming::Gguf => None,
            Naming::HuggingFace { .. } => self.config().architecture.storage.stacked_experts,
        }
    }

    /// The full name of a stacked tensor of a Hugging Face checkpoint.
    fn stacked_path(&self, layer: usize, name: &str) -> String {
        let prefix = match self.naming() {
            Naming::Gguf => "",
            Naming::HuggingFace { prefix } => prefix,
        };
        format!("{prefix}layers.{layer}.{name}")
    }

    /// The name of the tensor in which a GGUF file stacks a part of all experts of a layer.
    fn stacked_name(&self, layer: usize, part: Part) -> Option<String> {
        let name = match self.naming() {
            Naming::Gguf => names::gguf_stacked(part)?,
            Naming::HuggingFace { .. } => return None,
        };
        Some(format!("blk.{layer}.{name}.weight"))
    }

    /// A linear layer of parts of one expert, each a tensor of its own or a slice of a stacked
    /// one, with their biases if there are some.
    fn expert_linear(
        &self,
        layer: usize,
        expert: usize,
        parts: &[(Part, usize)],
        columns: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let (mut stored, mut bias) = (Vec::with_capacity(parts.len()), Vec::new());
        let mut is_biased = false;
        for &(part, rows) in parts {
            let own = self.name(layer, part);
            let stacked = self.stacked_name(layer, part);
            let stacked = stacked.filter(|name| self.holds(name));
            let name = stacked.as_ref().unwrap_or(&own);
            let of_expert = |name: &str, shape: &[usize]| match stacked {
                Some(_) => self.entry(name, expert, shape),
                None => self.tensor(name),
            };
            stored.push(self.rows(&of_expert(name, &[rows, columns])?, rows, columns)?);
            let bias_name = names::bias(name);
            if self.has_bias(part, &bias_name) {
                bias.extend(self.numbers(&of_expert(&bias_name, &[rows])?, rows)?);
                is_biased = true;
            } else {
                bias.resize(bias.len() + rows, 0.0);
            }
        }
        Ok(StoredLinear::new(stored).with_bias(is_biased.then_some(bias)))
    }

    /// Entry `index` of a stacked tensor, whose entries must have this shape.
    fn entry(
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

    /// One expert of a checkpoint that stacks them transposed.
    fn transposed_expert(
        &self,
        layer: usize,
        expert: usize,
        width: usize,
        stacked: StackedExperts,
    ) -> Result<(StoredLinear<'_>, StoredLinear<'_>), ModelError> {
        let hidden = self.config().hidden;
        // Where each row of the stacked gate and up projection is.
        let place = |row: usize| match (stacked.alternates, row < width) {
            (false, _) => row,
            (true, true) => 2 * row,
            (true, false) => 2 * (row - width) + 1,
        };
        let gate_up = self.stacked_path(layer, stacked.gate_up);
        let down = self.stacked_path(layer, stacked.down);
        let columns: Vec<usize> = (0..2 * width).map(place).collect();
        let gate_up = self.transposed(&gate_up, expert, hidden, &columns)?;
        let columns: Vec<usize> = (0..hidden).collect();
        Ok((gate_up, self.transposed(&down, expert, width, &columns)?))
    }

    /// The transpose of entry `expert` of a stacked tensor, `[inputs, outputs]`, whose columns
    /// become rows in this order; with its bias, if there is one.
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
