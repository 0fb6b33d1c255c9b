//! The groups of the KV cache: which layers share a block table.
//!
//! All layers that attend to the same tokens share a table. Layers with a sliding window need
//! only the last tokens of a sequence, so they have tables of their own, whose first blocks are
//! given back. (vLLM's name for this is KV cache groups.)
//!
//! All groups take their blocks from one pool, so every block must have the same size. A block
//! therefore holds the keys and values of a fixed number of layers, and a kind of layer that
//! there is more of is split into several groups. If the numbers do not divide, some places in
//! the blocks stay empty. Layers may differ in the size of their keys and values. A place has room
//! for the largest, and as many smaller ones of a kind share a place as fit in it.
//!
//! A layer that attends to the keys and values of another layer takes no room at all.

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

/// What a layer needs of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerCache {
    /// Its attention window; `None` if it attends to all tokens.
    pub window: Option<usize>,
    /// Size of the keys and values of a token, in any unit that is the same for all layers. A
    /// layer with a size of 0 has no place in the cache.
    pub size: usize,
    /// Index of an earlier layer whose keys and values it attends to, instead of its own.
    pub shares: Option<usize>,
}

impl LayerCache {
    /// The needs of a layer without attention.
    pub const NOTHING: Self = Self {
        window: None,
        size: 0,
        shares: None,
    };
}

/// Layers that share a block table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// The tokens that the layers need.
    pub kind: GroupKind,
    /// Indices of the layers in the model that own keys and values here. They fill at most
    /// [`CacheLayout::layers_per_block`] places.
    pub layers: Vec<usize>,
    /// Number of layers that share a place: more than one if they are smaller than others.
    pub layers_per_place: usize,
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
    /// Where the keys and values of each layer are.
    places: Vec<CachePlace>,
    layers_per_block: usize,
    sharing: usize,
    span: usize,
}

/// Where the keys and values of a layer are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CachePlace {
    /// Index of the group.
    pub group: usize,
    /// Index of the place in the group's blocks.
    pub index: usize,
    /// Number of layers before it in the same place.
    pub part: usize,
}

impl CacheLayout {
    /// Maximum number of groups. Each group costs some work per sequence and step.
    pub const MOST_GROUPS: usize = 16;

    /// Creates the layout for layers of the same size with these windows, where `None` means that
    /// the layer attends to all tokens. See [`CacheLayout::of_layers`].
    ///
    /// # Errors
    /// Returns [`EmptyWindow`] if a window is 0.
    #[cfg(any(test, feature = "internals"))]
    pub fn new(
        windows: &[Option<usize>],
        context_tokens: usize,
        span: usize,
    ) -> Result<Self, EmptyWindow> {
        let layers = windows.iter().map(|&window| LayerCache {
            window,
            size: 1,
            shares: None,
        });
        Self::of_layers(&layers.collect::<Vec<_>>(), context_tokens, span)
    }

    /// Creates the layout for these layers. A window that covers `context_tokens` tokens, the
    /// longest that a sequence can get, is no restriction. Devices read keys in spans of `span`
    /// positions, so the span in which a window begins is kept as a whole. A layer that shares the
    /// cache of another one must have the same window.
    ///
    /// # Errors
    /// Returns [`EmptyWindow`] if a window is 0.
    pub fn of_layers(
        layers: &[LayerCache],
        context_tokens: usize,
        span: usize,
    ) -> Result<Self, EmptyWindow> {
        if let Some(layer) = layers.iter().position(|layer| layer.window == Some(0)) {
            return Err(EmptyWindow { layer });
        }
        let kind = |layer: &LayerCache| match layer.window {
            Some(window) if window < context_tokens => GroupKind::Window(window),
            _ => GroupKind::Full,
        };
        let owners: Vec<Owner> = (0..layers.len())
            .filter(|&layer| layers[layer].shares.is_none() && layers[layer].size > 0)
            .map(|layer| Owner {
                kind: kind(&layers[layer]),
                size: layers[layer].size,
                layer,
            })
            .collect();
        let mut layout = Self::of_owners(owners, layers.len(), span.max(1));
        for (layer, shares) in layers.iter().map(|layer| layer.shares).enumerate() {
            if let Some(owner) = shares {
                layout.places[layer] = layout.places[owner];
            }
        }
        layout.sharing = layers.iter().filter(|layer| layer.shares.is_some()).count();
        Ok(layout)
    }

    /// Creates the layout with one group, whose one layer needs all tokens.
    #[cfg(any(test, feature = "internals"))]
    pub fn single() -> Self {
        Self::of_owners(vec![Owner::ONLY], 1, 1)
    }

    /// Creates the layout for the layers that own keys and values, out of `count` layers.
    fn of_owners(mut owners: Vec<Owner>, count: usize, span: usize) -> Self {
        if owners.is_empty() {
            owners.push(Owner::ONLY);
        }
        owners.sort_unstable();
        let most = owners.iter().map(|owner| owner.size).max().unwrap_or(1);
        let same = |a: &Owner, b: &Owner| (a.kind, a.size) == (b.kind, b.size);
        let per_place = |class: &[Owner]| most / class[0].size;
        let classes = owners.chunk_by(same);
        let counts: Vec<usize> = classes
            .map(|class| class.len().div_ceil(per_place(class)))
            .collect();
        let Some(layers_per_block) = layers_per_block(&counts, Self::MOST_GROUPS) else {
            // Too many kinds to be worth their tables.
            let alike = |owner: &Owner| Owner {
                kind: GroupKind::Full,
                size: most,
                layer: owner.layer,
            };
            return Self::of_owners(owners.iter().map(alike).collect(), count, span);
        };
        let mut groups: Vec<CacheGroup> = Vec::new();
        let mut places = vec![CachePlace::default(); count.max(1)];
        for class in owners.chunk_by(same) {
            let layers_per_place = per_place(class);
            for owners in class.chunks(layers_per_block * layers_per_place) {
                let layers: Vec<usize> = owners.iter().map(|owner| owner.layer).collect();
                for (at, layer) in layers.iter().enumerate() {
                    places[*layer] = CachePlace {
                        group: groups.len(),
                        index: at / layers_per_place,
                        part: at % layers_per_place,
                    };
                }
                groups.push(CacheGroup {
                    kind: class[0].kind,
                    layers,
                    layers_per_place,
                });
            }
        }
        Self {
            groups,
            places,
            layers_per_block,
            sharing: 0,
            span,
        }
    }

    /// Returns the groups. Those that need all tokens come first.
    pub fn groups(&self) -> &[CacheGroup] {
        &self.groups
    }

    /// Returns how many layers of the largest size a block has room for.
    pub fn layers_per_block(&self) -> usize {
        self.layers_per_block
    }

    /// Returns where the keys and values are that a layer attends to. Without meaning for a layer
    /// without attention.
    pub fn place(&self, layer: usize) -> CachePlace {
        self.places[layer]
    }

    /// Returns how many layers have no keys and values of their own.
    pub fn sharing_layers(&self) -> usize {
        self.sharing
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

/// A layer that owns keys and values. The order is that of the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    kind: GroupKind,
    size: usize,
    layer: usize,
}

impl Owner {
    /// The first layer, which needs all tokens.
    const ONLY: Self = Self {
        kind: GroupKind::Full,
        size: 1,
        layer: 0,
    };
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
                let place = layout.place(layer);
                assert_eq!(layout.groups()[place.group].layers[place.index], layer);
                assert!(place.index < layout.layers_per_block() && place.part == 0);
                assert!(seen.insert(place), "layer {layer} shares its place");
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

    /// Layers of which each `period`th needs all tokens and is of size `full`, and the others
    /// have a window and are of size `windowed`. The last `shared` ones attend to the cache of the
    /// last layer of their kind before them.
    fn uneven(count: usize, period: usize, sizes: [usize; 2], shared: usize) -> CacheLayout {
        let is_full = |layer: usize| (layer + 1).is_multiple_of(period);
        let first = count - shared;
        let layers = (0..count).map(|layer| LayerCache {
            window: (!is_full(layer)).then_some(512),
            size: sizes[usize::from(!is_full(layer))],
            shares: (layer >= first).then(|| {
                let mut own = (0..first).rev();
                own.find(|&own| is_full(own) == is_full(layer)).unwrap()
            }),
        });
        CacheLayout::of_layers(&layers.collect::<Vec<_>>(), 32_768, 128).unwrap()
    }

    #[test]
    fn smaller_layers_share_a_place_and_no_two_the_same_part_of_it() {
        // The sizes of Gemma 4 E2B, E4B, 31B and 26B-A4B.
        for (count, period, sizes, shared) in [
            (35, 5, [512, 256], 20),
            (42, 6, [1024, 512], 18),
            (60, 6, [2048, 4096], 0),
            (30, 6, [1024, 2048], 0),
        ] {
            let layout = uneven(count, period, sizes, shared);
            let most = sizes[0].max(sizes[1]);
            let mut seen = std::collections::HashSet::new();
            for layer in 0..count - shared {
                let place = layout.place(layer);
                let size = sizes[usize::from((layer + 1) % period != 0)];
                assert!(place.index < layout.layers_per_block());
                assert!((place.part + 1) * size <= most, "{place:?}");
                assert!(seen.insert(place), "{place:?}");
            }
            assert_eq!(layout.sharing_layers(), shared);
            // What is used of the room of all groups' blocks.
            let room = layout.groups().len() * layout.layers_per_block() * most;
            let used: usize = (0..count - shared)
                .map(|layer| sizes[usize::from((layer + 1) % period != 0)])
                .sum();
            assert!(used * 4 >= room * 3, "{used} of {room}: {layout:?}");
        }
    }

    #[test]
    fn a_layer_without_a_cache_of_its_own_is_where_the_other_layer_is() {
        let layout = uneven(35, 5, [512, 256], 20);
        for layer in 15..35 {
            let owner = if (layer + 1) % 5 == 0 { 14 } else { 13 };
            assert_eq!(layout.place(layer), layout.place(owner), "layer {layer}");
        }
        assert_eq!(uneven(10, 5, [1, 1], 0).sharing_layers(), 0);
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
