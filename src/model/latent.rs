//! Reads the tensors of latent attention.

use super::layer::Latent;
use super::names::Part;
use super::stored::{StoredLinear, StoredRows};
use super::tensors::Naming;
use super::{ModelError, ModelSource};
use crate::device::RowOrder;
use crate::weights::{DType, quant};
use std::borrow::Cow;

impl Latent {
    /// Returns the linear layers that a file stores. `splits_up` says whether it splits the
    /// projection from the latent to keys and values.
    pub(super) fn linear_parts(&self, splits_up: bool) -> Vec<Part> {
        let queries: &[Part] = match self.query_rank {
            Some(_) => &[Part::QueryDown, Part::QueryUp],
            None => &[Part::LatentQuery],
        };
        let keys_and_values: &[Part] = match splits_up {
            true => &[Part::LatentKeys, Part::LatentValues],
            false => &[Part::LatentUp],
        };
        let others = [Part::LatentDown, Part::AttentionOut];
        [queries, keys_and_values, &others].concat()
    }

    /// Returns the norms of the latents.
    pub(super) fn norms(&self) -> &'static [Part] {
        match self.query_rank {
            Some(_) => &[Part::LatentNorm, Part::QueryDownNorm],
            None => &[Part::LatentNorm],
        }
    }

    /// Returns the index of the stored row that is used as row `row` of a projection. For each
    /// head, files store `plain` rows that are not rotated, then the rotated rows, whose two halves
    /// may be interleaved. They are used with the rotated rows first, one half after the other.
    fn stored_row(&self, plain: usize, row: usize) -> usize {
        let rotated = self.shape.rotated;
        let (head, within) = (row / (plain + rotated), row % (plain + rotated));
        let stored = match within.checked_sub(rotated) {
            Some(plain) => plain,
            None if self.is_interleaved => {
                let (half, pair) = (within / (rotated / 2), within % (rotated / 2));
                plain + 2 * pair + half
            }
            None => plain + within,
        };
        head * (plain + rotated) + stored
    }
}

impl ModelSource {
    /// Reads the projection from the layer's input to the latent of the queries, of `rank`
    /// elements.
    pub(super) fn query_down(
        &self,
        layer: usize,
        rank: usize,
    ) -> Result<StoredLinear<'_>, ModelError> {
        self.linear(layer, &[(Part::QueryDown, rank)], self.config().hidden)
    }

    /// Reads the projection to the queries, from their latent or from the layer's input.
    pub(super) fn queries(
        &self,
        layer: usize,
        latent: &Latent,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let (part, columns) = match latent.query_rank {
            Some(rank) => (Part::QueryUp, rank),
            None => (Part::LatentQuery, self.config().hidden),
        };
        let rows = latent.shape.query_columns();
        let queries = self.linear(layer, &[(part, rows)], columns)?;
        let stored = (0..rows).map(|row| latent.stored_row(latent.shape.plain, row));
        Ok(queries.select(&stored.collect::<Vec<_>>()))
    }

    /// Reads the projection from the layer's input to the rotated part of the key, followed by the
    /// latent of keys and values.
    pub(super) fn latent_down(
        &self,
        layer: usize,
        latent: &Latent,
    ) -> Result<StoredLinear<'_>, ModelError> {
        let rows = latent.shape.key_columns();
        let down = self.linear(layer, &[(Part::LatentDown, rows)], self.config().hidden)?;
        let stored = (0..rows).map(|row| latent.stored_row(latent.shape.latent, row));
        Ok(down.select(&stored.collect::<Vec<_>>()))
    }

    /// Reads the transposed key weights of each head, `[latent, plain]`. A query multiplied by them
    /// has the same dot product with the latent as the query itself has with the key.
    pub(super) fn latent_keys(
        &self,
        layer: usize,
        latent: &Latent,
    ) -> Result<Vec<StoredLinear<'_>>, ModelError> {
        let (plain, columns) = (latent.shape.plain, latent.shape.latent);
        if self.splits_latent_up(layer) {
            return self.head_entries(layer, Part::LatentKeys, latent, [columns, plain]);
        }
        let up = self.latent_up(layer, latent)?;
        let size = plain + latent.shape.value;
        let transposed = (0..latent.shape.heads).map(|head| {
            let rows = up.part(head * size..head * size + plain);
            StoredLinear::new(vec![rows.transposed()])
        });
        Ok(transposed.collect())
    }

    /// Reads the projection from the latent to the values of each head, `[value, latent]`.
    pub(super) fn latent_values(
        &self,
        layer: usize,
        latent: &Latent,
    ) -> Result<Vec<StoredLinear<'_>>, ModelError> {
        let (value, columns) = (latent.shape.value, latent.shape.latent);
        if self.splits_latent_up(layer) {
            return self.head_entries(layer, Part::LatentValues, latent, [value, columns]);
        }
        let up = self.latent_up(layer, latent)?;
        let size = latent.shape.plain + value;
        let values = (0..latent.shape.heads).map(|head| {
            let end = (head + 1) * size;
            StoredLinear::new(vec![up.part(end - value..end)])
        });
        Ok(values.collect())
    }

    /// Returns whether the file splits the projection from the latent to keys and values, and
    /// stores the part of the keys transposed. GGUF files do, except for old ones.
    pub(super) fn splits_latent_up(&self, layer: usize) -> bool {
        self.naming() == Naming::Gguf && !self.holds(&self.name(layer, Part::LatentUp))
    }

    /// Reads the projection from the latent to keys and values,
    /// `[heads · (plain + value), latent]`. The key rows of each head precede its value rows.
    fn latent_up(&self, layer: usize, latent: &Latent) -> Result<StoredRows<'_>, ModelError> {
        let shape = latent.shape;
        let rows = shape.heads * (shape.plain + shape.value);
        self.matrix(&self.name(layer, Part::LatentUp), rows, shape.latent)
    }

    /// Reads the matrices of all heads from one stacked tensor, `[heads, rows, columns]`.
    fn head_entries(
        &self,
        layer: usize,
        part: Part,
        latent: &Latent,
        [rows, columns]: [usize; 2],
    ) -> Result<Vec<StoredLinear<'_>>, ModelError> {
        let name = self.name(layer, part);
        let heads = latent.shape.heads;
        let entry = |head| {
            let rows = self.stacked_rows(&name, head, [heads, rows, columns])?;
            Ok(StoredLinear::new(vec![rows]))
        };
        (0..heads).map(entry).collect()
    }
}

impl StoredRows<'_> {
    /// Returns a copy of some of the rows.
    fn part(&self, rows: std::ops::Range<usize>) -> StoredRows<'static> {
        let bytes = self.data.len() / self.rows;
        StoredRows {
            dtype: self.dtype,
            rows: rows.len(),
            columns: self.columns,
            data: Cow::Owned(self.data[rows.start * bytes..rows.end * bytes].to_vec()),
            order: RowOrder::AsStored,
        }
    }

    /// Transposes the matrix. Quantised weights become float32, since their blocks cannot be
    /// transposed.
    fn transposed(self) -> StoredRows<'static> {
        let count = self.rows * self.columns;
        let (dtype, data) = match self.dtype.is_float() {
            true => (self.dtype, self.data.into_owned()),
            false => {
                let mut values = vec![0.0; count];
                quant::dequantize(self.dtype, &self.data, &mut values);
                let bytes = values.iter().flat_map(|value| value.to_le_bytes());
                (DType::F32, bytes.collect())
            }
        };
        let size = data.len() / count;
        let mut transposed = Vec::with_capacity(data.len());
        for column in 0..self.columns {
            for row in 0..self.rows {
                let at = (row * self.columns + column) * size;
                transposed.extend_from_slice(&data[at..at + size]);
            }
        }
        StoredRows {
            dtype,
            rows: self.columns,
            columns: self.rows,
            data: Cow::Owned(transposed),
            order: RowOrder::AsStored,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::LatentShape;

    fn latent(is_interleaved: bool) -> Latent {
        Latent {
            shape: LatentShape {
                heads: 2,
                rotated: 4,
                plain: 3,
                latent: 6,
                value: 5,
            },
            query_rank: None,
            scale: 1.0,
            rope: 0,
            norm_epsilon: 1e-6,
            is_interleaved,
        }
    }

    #[test]
    fn rotated_rows_come_first_and_their_halves_one_after_the_other() {
        let rows = |latent: &Latent| -> Vec<usize> {
            (0..14).map(|row| latent.stored_row(3, row)).collect()
        };
        let interleaved = [3, 5, 4, 6, 0, 1, 2, 10, 12, 11, 13, 7, 8, 9];
        assert_eq!(rows(&latent(true)), interleaved);
        let in_halves = [3, 4, 5, 6, 0, 1, 2, 10, 11, 12, 13, 7, 8, 9];
        assert_eq!(rows(&latent(false)), in_halves);
    }

    #[test]
    fn a_part_of_some_rows_is_transposed() {
        let values: Vec<f32> = (0..12).map(|value| value as f32).collect();
        let data: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        let all = StoredRows {
            dtype: DType::F32,
            rows: 4,
            columns: 3,
            data: Cow::Owned(data),
            order: RowOrder::AsStored,
        };
        let found = all.part(1..3).transposed();
        assert_eq!((found.rows, found.columns), (3, 2));
        let mut numbers = vec![0.0; 6];
        quant::dequantize(DType::F32, &found.data, &mut numbers);
        assert_eq!(numbers, [3.0, 6.0, 4.0, 7.0, 5.0, 8.0]);
    }
}
