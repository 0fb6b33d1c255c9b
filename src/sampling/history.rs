//! Counts the tokens of a sequence, as the penalties need them.

use super::SampleRow;

/// Sentinel: the token has no entry.
const NONE: u32 = u32::MAX;

/// Counts the tokens of histories and reuses its memory between them.
#[derive(Default)]
pub(crate) struct HistoryCounts {
    /// Index of each token's entry in the history that is being counted, by token id. All
    /// are [`NONE`] between two histories.
    entry_of: Vec<u32>,
}

impl HistoryCounts {
    /// Adds one entry per distinct token below `vocabulary` in the row's history, in the
    /// order of first occurrence: the token and its number of occurrences in the answer.
    pub(crate) fn count(
        &mut self,
        row: &SampleRow,
        vocabulary: usize,
        entries: &mut Vec<[u32; 2]>,
    ) {
        self.entry_of.resize(vocabulary, NONE);
        let start = entries.len();
        for (index, &token) in row.history.iter().enumerate() {
            let Some(entry) = self.entry_of.get_mut(token as usize) else {
                continue;
            };
            if *entry == NONE {
                *entry = entries.len() as u32;
                entries.push([token, 0]);
            }
            entries[*entry as usize][1] += u32::from(index >= row.prompt_tokens);
        }
        for entry in &entries[start..] {
            self.entry_of[entry[0] as usize] = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_tokens_count_as_seen_and_answer_tokens_per_occurrence() {
        let mut counts = HistoryCounts::default();
        let mut entries = vec![[9, 9]];
        let mut row = SampleRow {
            history: vec![5, 3, 5, 100, 3, 7, 3],
            prompt_tokens: 3,
            ..SampleRow::default()
        };
        counts.count(&row, 8, &mut entries);
        assert_eq!(entries, [[9, 9], [5, 0], [3, 2], [7, 1]]);
        // Nothing is left over for the next history, whatever its vocabulary.
        row.history = vec![7, 3];
        for vocabulary in [4, 8] {
            let mut entries = Vec::new();
            counts.count(&row, vocabulary, &mut entries);
            let both = [[7, 0], [3, 0]];
            assert_eq!(entries, both[usize::from(vocabulary == 4)..]);
        }
    }
}
