//! The groups of the KV cache: which layers share a block table.
//!
//! All layers that attend to the same tokens share a table. Layers with a sliding window need
//! only the last tokens of a sequence, so they have tables of their own, whose first blocks are
//! given back. (vLLM's name for this is KV cache groups.)
//!
//! All groups take their blocks from one pool, so every block must have the same size. A block
//! therefore holds the keys and values of a fixed number of layers, and a kind of layer that
//! there is more of is split into several groups. If the numbers do not divide, some places in
//! the blocks stay empty.

use thiserror::Error;

/// The tokens that the layers of a group need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GroupKind {
    /// All tokens of the sequence.
    Full,
    /// The last tokens: a token attends to itself and to the `window - 1` tokens before it.
    Window(usize),
}

impl GroupKind {
    /// Returns the first position that a token at `position` attends to.
    pub fn first_position(self, position: usize) -> usize {
        match self {
            Self::Full => 0,
            Self::Window(window) => (position + 1).saturating_sub(window),
        }
    }
}

/// Layers that share a block table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// The tokens that the layers need.
    pub kind: GroupKind,
    /// Indices of the layers in the model. There are at most
    /// [`CacheLayout::layers_per_block`].
    pub layers: Vec<usize>,
}

/// The error of [`CacheLayout::new`] if a layer's window is empty.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the attention window of layer {layer} is 0 tokens; expected at least 1")]
pub struct EmptyWindow {
    /// Index of the layer.
    pub layer: usize,
}

/// How the layers of a model share blocks and block tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    groups: Vec<CacheGroup>,
    /// Group and index within the group's blocks, by layer.
    places: Vec<(usize, usize)>,
    layers_per_block: usize,
    span: usize,
}

impl CacheLayout {
    /// Maximum number of groups. Each group costs some work per sequence and step.
    pub const MOST_GROUPS: usize = 16;

    /// Creates the layout for layers with these windows, where `None` means that the layer
    /// attends to all tokens. A window that covers `context_tokens` tokens, the longest that a
    /// sequence can get, is no restriction. Devices read keys in spans of `span` positions, so
    /// the span in which a window begins is kept as a whole.
    ///
    /// # Errors
    /// Returns [`EmptyWindow`] if a window is 0.
    pub fn new(
        windows: &[Option<usize>],
        context_tokens: usize,
        span: usize,
    ) -> Result<Self, EmptyWindow> {
        if let Some(layer) = windows.iter().position(|window| *window == Some(0)) {
            return Err(EmptyWindow { layer });
        }
        let kind = |window: &Option<usize>| match *window {
            Some(window) if window < context_tokens => GroupKind::Window(window),
            _ => GroupKind::Full,
        };
        let kinds: Vec<GroupKind> = windows.iter().map(kind).collect();
        Ok(Self::of_kinds(&kinds, span.max(1)))
    }

    /// Creates the layout with one group, whose one layer needs all tokens.
    #[cfg(any(test, feature = "internals"))]
    pub fn single() -> Self {
        Self::of_kinds(&[GroupKind::Full], 1)
    }

    fn of_kinds(kinds: &[GroupKind], span: usize) -> Self {
        let mut sorted = kinds.to_vec();
        sorted.sort_unstable();
        let classes: Vec<(GroupKind, usize)> = sorted
            .chunk_by(|a, b| a == b)
            .map(|class| (class[0], class.len()))
            .collect();
        let counts: Vec<usize> = classes.iter().map(|(_, count)| *count).collect();
        let Some(layers_per_block) = layers_per_block(&counts, Self::MOST_GROUPS) else {
            // Too many kinds to be worth their tables.
            return Self::of_kinds(&vec![GroupKind::Full; kinds.len().max(1)], span);
        };
        let mut groups: Vec<CacheGroup> = Vec::new();
        let mut places = vec![(0, 0); kinds.len()];
        for (kind, _) in classes {
            let layers = (0..kinds.len()).filter(|layer| kinds[*layer] == kind);
            let layers: Vec<usize> = layers.collect();
            for layers in layers.chunks(layers_per_block) {
                for (index, layer) in layers.iter().enumerate() {
                    places[*layer] = (groups.len(), index);
                }
                let layers = layers.to_vec();
                groups.push(CacheGroup { kind, layers });
            }
        }
        Self {
            groups,
            places,
            layers_per_block,
            span,
        }
    }

    /// Returns the groups. Those that need all tokens come first.
    pub fn groups(&self) -> &[CacheGroup] {
        &self.groups
    }

    /// Returns how many layers a block has room for.
    pub fn layers_per_block(&self) -> usize {
        self.layers_per_block
    }

    /// Returns the group of a layer, and the layer's index in the blocks of that group.
    pub fn place(&self, layer: usize) -> (usize, usize) {
        self.places[layer]
    }

    /// Returns the index of the first block of `group` that a step needs whose first token for
    /// the sequence is at `position`.
    pub fn first_block(&self, group: usize, position: usize, block_tokens: usize) -> usize {
        match self.groups[group].kind.first_position(position) {
            0 => 0,
            first => (first - first % self.span) / block_tokens,
        }
    }

    /// Returns the index of the first block of `group` that a sequence keeps when its next token
    /// is at `position`. It could go back by a block and continue from there, as it must when
    /// the last tokens of an answer are dropped.
    pub fn first_kept_block(&self, group: usize, position: usize, block_tokens: usize) -> usize {
        self.first_block(group, position.saturating_sub(block_tokens), block_tokens)
    }

    /// Returns the largest number of blocks that a sequence of `tokens` tokens holds in `group`
    /// at any time, if it is computed in steps of at most `step_tokens` tokens. Two steps may be
    /// in flight.
    pub fn most_blocks(
        &self,
        group: usize,
        tokens: usize,
        step_tokens: usize,
        block_tokens: usize,
    ) -> usize {
        let all = tokens.div_ceil(block_tokens);
        match self.groups[group].kind {
            GroupKind::Full => all,
            // One more block at each end that is only partly needed.
            GroupKind::Window(window) => {
                let kept = window + block_tokens + self.span;
                let most = kept.saturating_add(step_tokens.saturating_mul(2));
                all.min(most.div_ceil(block_tokens).saturating_add(2))
            }
        }
    }

    /// Returns [`CacheLayout::most_blocks`] of all groups together.
    pub fn most_blocks_of_all(
        &self,
        tokens: usize,
        step_tokens: usize,
        block_tokens: usize,
    ) -> usize {
        (0..self.groups.len())
            .map(|group| self.most_blocks(group, tokens, step_tokens, block_tokens))
            .fold(0, usize::saturating_add)
    }

    /// Returns the length in tokens of the longest sequence that fits in `blocks` blocks at any
    /// time, if it is computed in steps of at most `step_tokens` tokens. No sequence is longer
    /// than `limit`.
    pub fn longest_sequence(
        &self,
        blocks: usize,
        step_tokens: usize,
        block_tokens: usize,
        limit: usize,
    ) -> usize {
        let fits =
            |tokens: usize| self.most_blocks_of_all(tokens, step_tokens, block_tokens) <= blocks;
        // The number of blocks grows with the number of tokens.
        let (mut fitting, mut end) = (0, limit + 1);
        while end - fitting > 1 {
            let middle = fitting + (end - fitting) / 2;
            match fits(middle) {
                true => fitting = middle,
                false => end = middle,
            }
        }
        fitting
    }
}

/// Chooses how many layers a block holds, for kinds of layers that occur `counts` times: the
/// largest number that leaves at most an eighth of the places empty, because fewer groups mean
/// less work per step. Returns `None` if there would be more than `most_groups`.
fn layers_per_block(counts: &[usize], most_groups: usize) -> Option<usize> {
    let layers: usize = counts.iter().sum();
    let groups = |size: usize| {
        counts
            .iter()
            .map(|count| count.div_ceil(size))
            .sum::<usize>()
    };
    let largest = counts.iter().copied().max()?;
    let size = (1..=largest)
        .rev()
        .find(|&size| (groups(size) * size - layers) * 8 <= groups(size) * size)?;
    (groups(size) <= most_groups).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(full: usize, windowed: usize) -> CacheLayout {
        let every = (full + windowed) / full.max(1);
        let windows: Vec<Option<usize>> = (0..full + windowed)
            .map(|layer| {
                let is_full = full > 0 && layer % every == every - 1 && layer / every < full;
                (!is_full).then_some(512)
            })
            .collect();
        CacheLayout::new(&windows, 32_768, 128).unwrap()
    }

    #[test]
    fn every_layer_has_a_place_of_its_own() {
        for (full, windowed) in [
            (4, 22),
            (5, 29),
            (8, 40),
            (10, 52),
            (3, 15),
            (13, 13),
            (1, 31),
        ] {
            let layout = layout(full, windowed);
            let mut seen = std::collections::HashSet::new();
            for layer in 0..full + windowed {
                let (group, index) = layout.place(layer);
                assert_eq!(layout.groups()[group].layers[index], layer);
                assert!(index < layout.layers_per_block());
                assert!(
                    seen.insert((group, index)),
                    "layer {layer} shares its place"
                );
            }
            let places = layout.groups().len() * layout.layers_per_block();
            let empty = places - (full + windowed);
            assert!(empty * 8 <= places, "{layout:?}");
        }
    }

    #[test]
    fn gemma_3_has_one_full_group_and_windows_in_blocks_of_the_same_size() {
        let sizes = |full, windowed| {
            let layout = layout(full, windowed);
            (layout.layers_per_block(), layout.groups().len())
        };
        assert_eq!(sizes(4, 22), (4, 7), "1B");
        assert_eq!(sizes(5, 29), (6, 6), "4B");
        assert_eq!(sizes(8, 40), (10, 5), "12B");
        assert_eq!(sizes(10, 52), (14, 5), "27B");
        assert_eq!(sizes(13, 13), (13, 2), "Gemma 2 2B");
    }

    #[test]
    fn layers_of_one_kind_are_one_group() {
        for layout in [layout(32, 0), layout(0, 32), CacheLayout::single()] {
            assert_eq!(layout.groups().len(), 1);
            assert_eq!(layout.layers_per_block(), layout.groups()[0].layers.len());
        }
    }

    #[test]
    fn a_window_as_long_as_the_context_is_no_window() {
        let layout = CacheLayout::new(&[Some(4096), None], 4096, 128).unwrap();
        assert_eq!(layout.groups().len(), 1);
        assert_eq!(layout.groups()[0].kind, GroupKind::Full);
    }

    #[test]
    fn an_empty_window_is_refused_by_its_layer() {
        let error = CacheLayout::new(&[None, Some(0)], 4096, 128).unwrap_err();
        assert_eq!(error, EmptyWindow { layer: 1 });
    }

    #[test]
    fn too_many_kinds_of_windows_fall_back_to_one_full_group() {
        let windows: Vec<Option<usize>> = (1..40).map(Some).collect();
        let layout = CacheLayout::new(&windows, 4096, 128).unwrap();
        assert_eq!(layout.groups().len(), 1);
        assert_eq!(layout.groups()[0].kind, GroupKind::Full);
    }

    #[test]
    fn the_span_in_which_a_window_begins_is_needed_as_a_whole() {
        let layout = layout(1, 1);
        let (full, window) = (0, 1);
        assert_eq!(layout.first_block(full, 10_000, 16), 0);
        // The token at 1,000 attends to the positions from 489, in the span from 384.
        assert_eq!(layout.first_block(window, 1_000, 16), 384 / 16);
        assert_eq!(layout.first_block(window, 511, 16), 0);
        // From a block further back, it would attend to the positions from 383.
        assert_eq!(layout.first_kept_block(window, 910, 16), 256 / 16);
    }
}
