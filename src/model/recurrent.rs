//! The tensors of a recurrence.

use super::names::Part;
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::weights::TensorView;

impl ModelSource {
    /// The rates at which the state of each head decays: negative numbers.
    pub(super) fn decay_rates(&self, layer: usize, heads: usize) -> Result<Vec<f32>, ModelError> {
        let mut rates = self.recurrent_vector(layer, Part::DecayRates, heads)?;
        // GGUF converters have computed them already.
        if self.naming() != Naming::Gguf {
            rates.iter_mut().for_each(|rate| *rate = -rate.exp());
        }
        Ok(rates)
    }

    /// A vector of a recurrence. GGUF files may have it as a matrix with one row or column, or
    /// with a row for each group of heads.
    pub(super) fn recurrent_vector(
        &self,
        layer: usize,
        part: Part,
        length: usize,
    ) -> Result<Vec<f32>, ModelError> {
        let name = self.name(layer, part);
        let tensor = self.tensor(&name)?;
        let is_flat = self.naming() == Naming::Gguf && tensor.elements() == length;
        let shape = [length];
        let flat = TensorView {
            shape: if is_flat { &shape } else { tensor.shape },
            ..tensor
        };
        self.numbers(&flat, length)
    }
}
