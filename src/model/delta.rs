//! Reads the tensors of a gated delta net.

use super::names::Part;
use super::stored::{StoredLinear, ungrouped};
use super::{ModelError, ModelSource};
use crate::device::DeltaHeads;

impl ModelSource {
    /// Reads the projections to queries, keys, values and the output gate, stacked in this order.
    pub(super) fn delta_projection(
        &self,
        layer: usize,
        heads: DeltaHeads,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let hidden = self.config().hidden;
        let (qkv, gate) = (heads.qkv_columns(), heads.value_columns());
        if !self.fuses(layer, Part::RecurrentInput) {
            return self.linear(
                layer,
                &[(Part::DeltaQkv, qkv), (Part::DeltaGate, gate)],
                hidden,
            );
        }
        let values = gate / heads.key_heads;
        let widths = [heads.key_dim, heads.key_dim, values, values];
        let fused = self.linear(layer, &[(Part::RecurrentInput, qkv + gate)], hidden)?;
        Ok(fused.select(&ungrouped(heads.key_heads, &widths)))
    }

    /// Reads the projections to the inputs of the update strengths (beta) and of the decays
    /// (alpha), stacked: one row per head of values each.
    pub(super) fn delta_gates(
        &self,
        layer: usize,
        heads: DeltaHeads,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let (hidden, count) = (self.config().hidden, heads.value_heads);
        if !self.fuses(layer, Part::DeltaFusedBetaAlpha) {
            let parts = [(Part::DeltaBeta, count), (Part::DeltaAlpha, count)];
            return self.linear(layer, &parts, hidden);
        }
        let fused = self.linear(layer, &[(Part::DeltaFusedBetaAlpha, 2 * count)], hidden)?;
        let widths = [count / heads.key_heads; 2];
        Ok(fused.select(&ungrouped(heads.key_heads, &widths)))
    }

    /// Returns the projections of a gated delta net that the file stores, fused or separate.
    pub(super) fn delta_projections(&self, layer: usize) -> Vec<Part> {
        let mut parts = match self.fuses(layer, Part::RecurrentInput) {
            true => vec![Part::RecurrentInput],
            false => vec![Part::DeltaQkv, Part::DeltaGate],
        };
        match self.fuses(layer, Part::DeltaFusedBetaAlpha) {
            true => parts.push(Part::DeltaFusedBetaAlpha),
            false => parts.extend([Part::DeltaBeta, Part::DeltaAlpha]),
        }
        parts.push(Part::RecurrentOutput);
        parts
    }

    /// Returns whether the file holds this tensor, which fuses two others.
    fn fuses(&self, layer: usize, part: Part) -> bool {
        self.holds(&self.name(layer, part))
    }
}
