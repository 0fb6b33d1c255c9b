//! Whole models whose layers are in several groups, on any device.

use crate::groups::TestDevice;
use quell::internals::cache::{CacheLayout, CachePlace, GroupKind, LayerCache};
use quell::internals::device::*;
use quell::internals::model::{Decoder, ModelSource, StepLimits};
use quell::internals::weights::ModelFolder;

/// Checks that a tiny checkpoint gives the same logits, bit for bit, whether its layers are in
/// groups that give back blocks or all in one. Some of its layers have a window if `windows`.
pub fn a_model_has_the_same_bits_in_groups<D: TestDevice>(
    device: &mut dyn FnMut() -> D,
    name: &str,
    windows: bool,
) {
    const TOKENS: usize = 300;
    const CHUNKS: [usize; 5] = [100, 1, 60, 90, 33];
    let source = source(name);
    let own = caches(&source);
    let has_windows = own.iter().any(|layer| layer.window.is_some());
    assert_eq!(has_windows, windows, "{name}");
    let mut logits = |layers: &[LayerCache]| {
        let layout = CacheLayout::of_layers(layers, TOKENS, ATTENTION_SPAN).unwrap();
        let chunks = CHUNKS.into_iter().chain(std::iter::repeat(1));
        let (logits, firsts) = logits_of_steps(device(), &source, &layout, TOKENS, chunks);
        for (first, group) in firsts.into_iter().zip(layout.groups()) {
            let gives_back = matches!(group.kind, GroupKind::Window(_));
            assert_eq!(first > 0, gives_back, "{:?}", group.kind);
        }
        logits
    };
    let all_tokens = own.iter().map(|layer| LayerCache {
        window: None,
        ..*layer
    });
    let expected = logits(&all_tokens.collect::<Vec<_>>());
    let found = logits(&own);
    assert_eq!(found.len(), expected.len());
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(found.iter().all(|value| value.is_finite()));
        let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
        assert!(bits(found) == bits(expected), "{name}, step {step}");
    }
}

/// Checks that the logits of a tiny checkpoint, whose layers have windows, have the same bits one by
/// one and in chunks of any size, and that its layers are in groups, some of which give back blocks.
pub fn chunks_change_no_bit_of_a_model<D: TestDevice>(device: &mut dyn FnMut() -> D, name: &str) {
    const TOKENS: usize = 153;
    // Tokens before those that are computed one by one.
    const CONTEXT: usize = 130;
    let source = source(name);
    let layout = CacheLayout::of_layers(&caches(&source), TOKENS, ATTENTION_SPAN).unwrap();
    let kinds = layout.groups().iter().map(|group| group.kind);
    let of_windows = kinds.filter(|kind| matches!(kind, GroupKind::Window(_)));
    assert!((1..layout.groups().len()).contains(&of_windows.count()));
    let mut logits = |first: usize, chunk: usize| {
        let chunks = std::iter::once(first).chain(std::iter::repeat(chunk));
        logits_of_steps(device(), &source, &layout, TOKENS, chunks)
    };
    let (single, firsts) = logits(CONTEXT, 1);
    assert!(
        firsts.iter().any(|first| *first > 0),
        "no block was given back"
    );
    for chunk in [7, 16, 64] {
        let ends = (1..).map(|step| (chunk * step).min(TOKENS));
        let (found, _) = logits(chunk, chunk);
        assert_eq!(found.len(), TOKENS.div_ceil(chunk));
        for (found, end) in found.iter().zip(ends).filter(|(_, end)| *end >= CONTEXT) {
            assert!(found.iter().all(|value| value.is_finite()));
            let same = crate::cpu::bits(found) == crate::cpu::bits(&single[end - CONTEXT]);
            assert!(same, "{name}: token {end} in chunks of {chunk}");
        }
    }
}

fn source(name: &str) -> ModelSource {
    let folder = crate::root().join("tests/fixtures/golden/tiny");
    let folder = ModelFolder::open(&folder.join(name)).unwrap();
    ModelSource::from_folder(folder).unwrap()
}

/// What the layers of a model keep.
fn caches(source: &ModelSource) -> Vec<LayerCache> {
    let layers = source.config().layers.iter();
    let own = layers.map(|layer| {
        let attention = layer.attention().unwrap();
        LayerCache {
            window: attention.window,
            size: attention.heads.cache_elements(),
            shares: attention.shares,
        }
    });
    own.collect()
}

/// Computes `tokens` tokens of one sequence in chunks. Each group gives back the blocks that it no
/// longer needs, which become NaN. Returns the logits of the last token of each step, and the first
/// block that each group still has.
fn logits_of_steps<D: TestDevice>(
    mut device: D,
    source: &ModelSource,
    layout: &CacheLayout,
    tokens: usize,
    chunks: impl Iterator<Item = usize>,
) -> (Vec<Vec<f32>>, Vec<usize>) {
    const BLOCK: usize = 16;
    const MOST_ROWS: usize = 130;
    let model = source.config();
    let groups = layout.groups();
    let limits = DeviceLimits {
        rows: MOST_ROWS,
        sequences: 1,
        sequence_tokens: tokens,
        block_tokens: BLOCK,
        groups: groups.len(),
        vocabulary: model.vocabulary,
        model: ModelShape::default(),
    };
    device.reserve(&limits).unwrap();
    let limits = StepLimits {
        rows: MOST_ROWS,
        samples: 1,
        positions: tokens,
    };
    let place = |layer| {
        let CachePlace { group, index, part } = layout.place(layer);
        CacheLayer { group, index, part }
    };
    let mut decoder = Decoder::load(source, &mut device, limits, place, &mut |_, _| {}).unwrap();
    let shape = CacheShape {
        layers: layout.layers_per_block(),
        kv_heads: model.cache_heads().kv_heads,
        head_dim: model.cache_heads().head_dim,
        blocks: groups.len() * tokens.div_ceil(BLOCK),
        block_tokens: BLOCK,
        values: model.heads().values,
    };
    let mut cache = device.allocate_cache(&shape).unwrap();
    let mut free: Vec<u32> = (0..shape.blocks as u32).collect();
    device.poison(&mut cache, &free).unwrap();

    let mut tables = vec![(0, Vec::<u32>::new()); groups.len()];
    let (mut start, mut logits) = (0, Vec::new());
    for count in chunks {
        let count = count.min(tokens - start);
        let end = start + count;
        for (group, (first, blocks)) in tables.iter_mut().enumerate() {
            let needed = layout.first_block(group, start, BLOCK);
            let gone: Vec<u32> = blocks.drain(..needed - *first).collect();
            *first = needed;
            if !gone.is_empty() {
                device.poison(&mut cache, &gone).unwrap();
            }
            free.extend(gone);
            while (*first + blocks.len()) * BLOCK < end {
                blocks.push(free.pop().expect("the cache is large enough"));
            }
        }
        let mut batch = Batch::new(groups.len());
        let ids = start..end;
        let ids: Vec<u32> = ids
            .map(|i| (7 * i + 3) as u32 % model.vocabulary as u32)
            .collect();
        let each = tables.iter();
        let each = each.map(|(first, blocks)| (*first, blocks.iter().copied()));
        batch.push(&ids, start, BLOCK, each);
        batch.sample_rows.push(count - 1);
        let result = decoder.forward(&mut device, &batch, &mut cache).unwrap();
        logits.push(device.read(result, 1));
        start = end;
        if start == tokens {
            break;
        }
    }
    (logits, tables.iter().map(|(first, _)| *first).collect())
}
