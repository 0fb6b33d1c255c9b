//! Reads the tensors of a recurrence.

use super::names::Part;
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::weights::TensorView;

impl ModelSource {
    /// Reads the rate at which the state of each head decays, a negative number per head.
    pub(super) fn decay_rates(&self, layer: usize, heads: usize) -> Result<Vec<f32>, ModelError> {
        let mut rates = self.recurrent_vector(layer, Part::DecayRates, heads)?;
        // GGUF converters compute the rates already.
        if self.naming() != Naming::Gguf {
            rates.iter_mut().for_each(|rate| *rate = -rate.exp());
        }
        Ok(rates)
    }

    /// Reads a vector of a recurrence. GGUF files may store it as a matrix with one row or column,
    /// or with one row per group of heads.
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
