//! Tests of the block accounting, of single operations and of random sequences of them.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;

/// Returns a cache with a prefix cache and blocks of 16 tokens.
fn cache(blocks: usize) -> BlockCache {
    BlockCache::new(blocks, 16, true)
}

/// Extends `table` so that it has room for `tokens` tokens in all.
fn grow(cache: &mut BlockCache, table: &mut BlockTable, tokens: usize) -> Result<(), OutOfBlocks> {
    // Starting at a block boundary, so that nothing is copied.
    let start = table.group(0).blocks.len() * 16;
    let extent = Extent::all(tokens);
    cache.prepare(table, start, extent, StepId(0), &mut Transfers::default())
}

/// Returns the number of known blocks with which a sequence of one group can begin.
fn known_blocks(
    cache: &BlockCache,
    salt: Option<&Arc<str>>,
    tokens: &[u32],
    limit: usize,
) -> usize {
    cache.lookup(salt, tokens, limit).tokens / 16
}

/// Returns the blocks of a table's first group.
fn blocks(table: &BlockTable) -> &[BlockId] {
    table.group(0).blocks
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7 + seed).collect()
}

#[test]
fn growing_allocates_all_blocks_or_none() {
    let mut cache = cache(4);
    let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
    grow(&mut cache, &mut a, 33).unwrap();
    assert_eq!(a.len(), 3);
    let error = grow(&mut cache, &mut b, 17).unwrap_err();
    assert_eq!(error, OutOfBlocks { needed: 2, free: 1 });
    assert_eq!(b.len(), 0);
    grow(&mut cache, &mut a, 48).unwrap();
    assert_eq!(a.len(), 3, "48 tokens fit in three blocks");
}

/// I4.
#[test]
fn blocks_that_a_step_in_flight_touches_are_deferred() {
    let mut cache = cache(2);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 32).unwrap();
    assert_eq!(cache.release(&mut table, StepId(3)), 2);
    let counts = cache.counts();
    assert_eq!((counts.free, counts.referenced, counts.deferred), (0, 0, 2));
    cache.step_completed(StepId(2));
    assert_eq!(cache.available_blocks(), 0);
    cache.step_completed(StepId(3));
    assert_eq!(cache.available_blocks(), 2);
    grow(&mut cache, &mut table, 1).unwrap();
    cache.release(&mut table, StepId(3));
    assert_eq!(
        cache.available_blocks(),
        2,
        "a completed step defers nothing"
    );
}

/// I4: the block waits for the last step of any holder, not for that of the last holder.
#[test]
fn a_shared_block_waits_for_the_last_step_of_every_holder() {
    let mut cache = cache(2);
    let mut a = BlockTable::default();
    grow(&mut cache, &mut a, 16).unwrap();
    let mut b = cache.share(&a, 16);
    assert_eq!(cache.release(&mut a, StepId(7)), 0, "b holds it");
    assert_eq!(cache.release(&mut b, StepId(5)), 1);
    cache.step_completed(StepId(6));
    assert_eq!(cache.counts().deferred, 1);
    cache.step_completed(StepId(7));
    assert_eq!(cache.counts().free, 2);
}

/// I4: a block that is released, held again and released again waits for the later step.
#[test]
fn an_outdated_release_frees_nothing() {
    let mut cache = cache(2);
    let all = tokens(16, 1);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 16).unwrap();
    cache.publish(&mut table, &all, 16, StepId(0));
    cache.release(&mut table, StepId(3));
    // The block is known, so it is found although it is deferred.
    assert_eq!(attach(&mut cache, &mut table, &all, 16), 16);
    cache.release(&mut table, StepId(5));
    cache.step_completed(StepId(3));
    assert_eq!(cache.counts().deferred, 1);
    cache.step_completed(StepId(5));
    assert_eq!(cache.counts().cached, 1);
}

#[test]
fn freed_blocks_are_recorded_once_asked_for() {
    let mut cache = cache(4);
    let mut table = BlockTable::default();
    assert_eq!(cache.take_freed(), []);
    grow(&mut cache, &mut table, 32).unwrap();
    cache.release(&mut table, StepId(1));
    assert_eq!(cache.take_freed(), [], "step 1 may still touch them");
    cache.step_completed(StepId(1));
    assert_eq!(cache.take_freed(), [BlockId(1), BlockId(0)]);
    assert_eq!(cache.take_freed(), []);
}

/// I3.
#[test]
fn an_audit_finds_a_table_that_was_not_accounted_for() {
    let mut cache = cache(4);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 20).unwrap();
    assert!(cache.audit([&table].into_iter()).is_ok());
    assert!(cache.audit([&table, &table].into_iter()).is_err());
    assert!(cache.audit(std::iter::empty()).is_err());
}

/// Lets an empty table hold the known blocks of `tokens`, within the first `limit` tokens.
/// Returns the number of tokens that need not be computed.
fn attach(cache: &mut BlockCache, table: &mut BlockTable, tokens: &[u32], limit: usize) -> usize {
    let hit = cache.lookup(table.salt(), tokens, limit);
    cache.attach(table, &hit);
    hit.tokens
}

/// Allocates a table for `tokens`, publishes its blocks and releases them.
fn leave_behind(cache: &mut BlockCache, tokens: &[u32]) {
    let mut table = BlockTable::default();
    attach(cache, &mut table, tokens, tokens.len());
    grow(cache, &mut table, tokens.len()).unwrap();
    cache.publish(&mut table, tokens, tokens.len(), StepId(0));
    cache.release(&mut table, StepId(0));
    cache.audit(std::iter::empty()).unwrap();
}

/// I11.
#[test]
fn only_complete_and_computed_blocks_are_found() {
    let mut cache = cache(8);
    let all = tokens(50, 1);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 50).unwrap();
    assert_eq!(known_blocks(&cache, None, &all, 50), 0);
    cache.publish(&mut table, &all, 40, StepId(0));
    assert_eq!(
        known_blocks(&cache, None, &all, 50),
        2,
        "40 tokens are two whole blocks"
    );
    cache.publish(&mut table, &all, 50, StepId(0));
    assert_eq!(known_blocks(&cache, None, &all, 50), 3);
    assert_eq!(
        known_blocks(&cache, None, &all, 47),
        2,
        "no more than asked for"
    );
    assert_eq!(
        known_blocks(&cache, None, &all[16..], 34),
        0,
        "not without what is before"
    );
    let mut other = all.clone();
    other[20] += 1;
    assert_eq!(
        known_blocks(&cache, None, &other, 50),
        1,
        "up to the first difference"
    );
}

#[test]
fn released_blocks_are_found_until_they_are_reallocated() {
    let mut cache = cache(4);
    let (first, second) = (tokens(32, 1), tokens(32, 2));
    leave_behind(&mut cache, &first);
    leave_behind(&mut cache, &second);
    assert_eq!(cache.counts().cached, 4);
    // The first blocks are used again, so the second ones are now older.
    leave_behind(&mut cache, &first);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 16).unwrap();
    assert_eq!(known_blocks(&cache, None, &first, 32), 2);
    assert_eq!(
        known_blocks(&cache, None, &second, 32),
        1,
        "its end went first"
    );
    grow(&mut cache, &mut table, 48).unwrap();
    assert_eq!(known_blocks(&cache, None, &first, 32), 1);
    assert_eq!(known_blocks(&cache, None, &second, 32), 0);
    assert_eq!(grow(&mut cache, &mut table, 80).unwrap_err().needed, 2);
    cache.audit([&table].into_iter()).unwrap();
}

#[test]
fn publishing_known_tokens_replaces_blocks_by_the_known_ones() {
    let mut cache = cache(8);
    let all = tokens(40, 1);
    let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
    grow(&mut cache, &mut a, 40).unwrap();
    grow(&mut cache, &mut b, 40).unwrap();
    cache.publish(&mut a, &all, 40, StepId(0));
    cache.publish(&mut b, &all, 40, StepId(3));
    assert_eq!(blocks(&a)[..2], blocks(&b)[..2]);
    assert_ne!(blocks(&a)[2], blocks(&b)[2], "the last is not complete");
    let counts = cache.audit([&a, &b].into_iter()).unwrap();
    assert_eq!((counts.referenced, counts.deferred), (4, 2));
    // The table that published the blocks is released, but the other still holds the whole
    // chain.
    cache.release(&mut a, StepId(0));
    cache.step_completed(StepId(3));
    let counts = cache.audit([&b].into_iter()).unwrap();
    assert_eq!(
        (counts.referenced, counts.cached, counts.deferred),
        (3, 0, 0)
    );
}

/// I10: no table writes to a block that another one reads.
#[test]
fn a_shared_block_is_copied_before_it_is_written() {
    let mut cache = cache(8);
    let mut transfers = Transfers::default();
    let mut a = BlockTable::default();
    grow(&mut cache, &mut a, 24).unwrap();
    let mut b = cache.share(&a, 20);
    assert_eq!(blocks(&a), blocks(&b));
    cache
        .prepare(&mut b, 20, Extent::all(21), StepId(4), &mut transfers)
        .unwrap();
    assert_eq!(transfers.copies, [(blocks(&a)[1], blocks(&b)[1])]);
    assert_eq!(blocks(&a)[0], blocks(&b)[0]);
    // Neither shares its last block now, so nothing more is copied.
    for (table, start) in [(&mut a, 24), (&mut b, 21)] {
        cache
            .prepare(
                table,
                start,
                Extent::all(start + 1),
                StepId(5),
                &mut transfers,
            )
            .unwrap();
    }
    assert_eq!(transfers.copies.len(), 1);
    cache.audit([&a, &b].into_iter()).unwrap();
}

#[test]
fn a_truncated_published_block_is_copied_before_it_is_written() {
    let mut cache = cache(8);
    let all = tokens(32, 1);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 32).unwrap();
    cache.publish(&mut table, &all, 32, StepId(0));
    assert_eq!(cache.rewind(&mut table, 20, StepId(0)), (20, 0));
    let mut transfers = Transfers::default();
    cache
        .prepare(&mut table, 20, Extent::all(21), StepId(1), &mut transfers)
        .unwrap();
    assert_eq!(transfers.copies.len(), 1);
    cache.step_completed(StepId(1));
    assert_eq!(
        known_blocks(&cache, None, &all, 32),
        2,
        "the old one is still known"
    );
    cache.audit([&table].into_iter()).unwrap();
}

#[test]
fn a_cache_without_prefixes_finds_nothing() {
    let mut cache = BlockCache::new(4, 16, false);
    let all = tokens(32, 1);
    leave_behind(&mut cache, &all);
    assert_eq!(known_blocks(&cache, None, &all, 32), 0);
    assert_eq!(cache.counts().free, 4);
}

#[test]
fn clearing_forgets_blocks_that_no_table_holds() {
    let mut cache = cache(4);
    leave_behind(&mut cache, &tokens(32, 1));
    cache.clear_prefixes();
    assert_eq!(cache.counts().free, 4);
    assert_eq!(known_blocks(&cache, None, &tokens(32, 1), 32), 0);
    cache.audit(std::iter::empty()).unwrap();
}

#[test]
fn clearing_forgets_blocks_that_a_step_in_flight_may_touch() {
    let mut cache = cache(4);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 32).unwrap();
    cache.publish(&mut table, &tokens(32, 1), 32, StepId(1));
    cache.release(&mut table, StepId(2));
    cache.clear_prefixes();
    cache.step_completed(StepId(2));
    assert_eq!(known_blocks(&cache, None, &tokens(32, 1), 32), 0);
    assert_eq!(cache.counts().free, 4);
    cache.audit(std::iter::empty()).unwrap();
}

#[test]
fn a_forgotten_prefix_is_found_by_nobody_and_blocks_of_others_stay() {
    let mut cache = cache(8);
    leave_behind(&mut cache, &tokens(16, 1));
    let (mut broken, mut other) = (BlockTable::default(), BlockTable::default());
    let all = tokens(48, 1);
    for table in [&mut broken, &mut other] {
        assert_eq!(attach(&mut cache, table, &all, 16), 16);
    }
    grow(&mut cache, &mut broken, 48).unwrap();
    cache.publish(&mut broken, &all, 48, StepId(0));
    assert_eq!(known_blocks(&cache, None, &all, 48), 3);
    cache.forget_prefix(&mut broken);
    assert_eq!(known_blocks(&cache, None, &all, 48), 1);
    cache.release(&mut broken, StepId(0));
    assert_eq!(cache.counts().free, 7);
    cache.audit(std::iter::once(&other)).unwrap();
}

#[test]
fn tables_with_different_salts_share_nothing() {
    let mut cache = cache(16);
    let all = tokens(40, 1);
    let salts: [Option<Arc<str>>; 3] = [None, Some("one".into()), Some("two".into())];
    let mut tables = salts.clone().map(BlockTable::salted);
    for (table, salt) in tables.iter_mut().zip(&salts) {
        assert_eq!(known_blocks(&cache, salt.as_ref(), &all, 40), 0, "{salt:?}");
        assert_eq!(attach(&mut cache, table, &all, 40), 0);
        grow(&mut cache, table, 40).unwrap();
        cache.publish(table, &all, 40, StepId(0));
        assert_eq!(known_blocks(&cache, salt.as_ref(), &all, 40), 2, "{salt:?}");
    }
    cache.audit(tables.iter()).unwrap();
    let fork = cache.share(&tables[1], 40);
    assert_eq!(fork.salt(), salts[1].as_ref());
    // Released blocks are found only with the same salt.
    let [mut none, mut one, two] = tables;
    cache.release(&mut none, StepId(0));
    cache.release(&mut one, StepId(0));
    let mut again = BlockTable::salted(salts[1].clone());
    assert_eq!(attach(&mut cache, &mut again, &all, 40), 32);
    assert_eq!(blocks(&again), &blocks(&fork)[..2]);
    cache.audit([&fork, &two, &again].into_iter()).unwrap();
    // An audit finds a table with blocks that were published with another salt.
    let foreign = BlockTable {
        salt: salts[2].clone(),
        ..cache.share(&again, 32)
    };
    let tables = [&fork, &two, &again, &foreign];
    let error = cache.audit(tables.into_iter()).unwrap_err();
    assert!(error.to_string().contains("salt"), "{error}");
}

/// Returns a cache with a group of layers that need all tokens, and one with a window of 20
/// tokens that is read in spans of 16.
fn windowed(blocks: usize, prefixes: bool) -> BlockCache {
    let layout = CacheLayout::new(&[None, Some(20)], 10_000, 16).unwrap();
    BlockCache::with_layout(blocks, 16, prefixes, layout)
}

/// Lets `table`, which has `from` tokens, grow to all of `tokens` in steps of 16, as a sequence
/// does.
fn decode(cache: &mut BlockCache, table: &mut BlockTable, tokens: &[u32], from: usize) {
    for end in (from..tokens.len())
        .step_by(16)
        .skip(1)
        .chain([tokens.len()])
    {
        let start = end.saturating_sub(16).max(from);
        let transfers = &mut Transfers::default();
        cache
            .prepare(table, start, Extent::all(end), StepId(0), transfers)
            .unwrap();
        cache.publish(table, tokens, end, StepId(0));
        cache.give_back(table, end, StepId(0));
    }
}

#[test]
fn blocks_behind_the_window_are_given_back() {
    let mut cache = windowed(40, false);
    let mut table = BlockTable::default();
    let all = tokens(200, 1);
    decode(&mut cache, &mut table, &all, 0);
    assert_eq!(table.group(0).blocks.len(), 13);
    // A block before the end, the token at 184 attends to those from 165, in the span from 160.
    assert_eq!(table.group(1).first, 10);
    assert_eq!(table.group(1).blocks.len(), 3);
    let counts = cache.audit([&table].into_iter()).unwrap();
    assert_eq!((counts.referenced, counts.free), (16, 24));
    assert_eq!(cache.release(&mut table, StepId(0)), 16);
    assert_eq!(cache.counts().free, 40);
}

/// I4.
#[test]
fn blocks_behind_the_window_wait_for_the_steps_that_read_them() {
    let mut cache = windowed(40, false);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 100).unwrap();
    assert_eq!(cache.give_back(&mut table, 100, StepId(2)), 4);
    assert_eq!(cache.counts().deferred, 4);
    cache.step_completed(StepId(2));
    assert_eq!(cache.counts().deferred, 0);
    cache.audit([&table].into_iter()).unwrap();
}

#[test]
fn a_hit_ends_where_every_group_can_continue() {
    let mut cache = windowed(40, true);
    let all = tokens(160, 1);
    let mut table = BlockTable::default();
    decode(&mut cache, &mut table, &all, 0);
    cache.release(&mut table, StepId(0));
    let hit = cache.lookup(None, &all, 159);
    // Of the window, only the blocks that the token at 144 attends to: from 125, so from 112.
    assert_eq!((hit.tokens, hit.blocks, hit.cached), (144, 9 + 2, 11));
    // Take all free blocks and the least recently used cached ones. The window blocks that were
    // given back first are evicted first.
    let mut other = BlockTable::default();
    grow(&mut cache, &mut other, 14 * 16).unwrap();
    let counts = cache.audit([&other].into_iter()).unwrap();
    assert_eq!((counts.free, counts.cached), (0, 12));
    assert_eq!(cache.lookup(None, &all, 159).tokens, 144);
    assert_eq!(
        cache.lookup(None, &all, 143).tokens,
        0,
        "all tokens up to 128 are known to one group, but the other could not continue there"
    );
    let mut again = BlockTable::default();
    assert_eq!(attach(&mut cache, &mut again, &all, 159), 144);
    assert_eq!(again.group(0).blocks.len(), 9);
    assert_eq!((again.group(1).first, again.group(1).blocks.len()), (7, 2));
    cache.audit([&other, &again].into_iter()).unwrap();
}

#[test]
fn evicting_a_block_that_all_tokens_need_frees_the_window_blocks_with_it() {
    let mut cache = windowed(8, true);
    leave_behind(&mut cache, &tokens(32, 1));
    assert_eq!((cache.counts().cached, cache.counts().free), (4, 4));
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 48).unwrap();
    let counts = cache.audit([&table].into_iter()).unwrap();
    assert_eq!((counts.referenced, counts.cached, counts.free), (6, 2, 0));
    assert_eq!(cache.lookup(None, &tokens(32, 1), 32).tokens, 16);
}

#[test]
fn going_back_takes_window_blocks_from_the_prefix_cache_again() {
    let mut cache = windowed(40, true);
    let all = tokens(160, 1);
    let mut table = BlockTable::default();
    decode(&mut cache, &mut table, &all, 0);
    assert!(!cache.can_continue(&table, 70));
    assert_eq!(cache.rewind(&mut table, 70, StepId(0)).0, 70);
    assert!(cache.can_continue(&table, 70));
    // The token at 70 attends to those from 51, in the span from 48.
    assert_eq!((table.group(1).first, table.group(1).blocks.len()), (3, 2));
    assert_eq!(table.group(0).blocks.len(), 5);
    cache.audit([&table].into_iter()).unwrap();
}

#[test]
fn going_back_further_than_the_window_reaches_starts_again_without_a_prefix_cache() {
    let mut cache = windowed(40, false);
    let all = tokens(160, 1);
    let mut table = BlockTable::default();
    decode(&mut cache, &mut table, &all, 0);
    assert_eq!(
        cache.rewind(&mut table, 150, StepId(0)).0,
        150,
        "within a block"
    );
    assert_eq!(cache.rewind(&mut table, 70, StepId(0)).0, 0);
    assert!(table.is_empty());
    assert_eq!(cache.audit([&table].into_iter()).unwrap().free, 40);
}

#[test]
fn a_share_holds_only_what_is_needed_to_continue() {
    let mut cache = windowed(40, true);
    let all = tokens(160, 1);
    let mut table = BlockTable::default();
    grow(&mut cache, &mut table, 160).unwrap();
    cache.publish(&mut table, &all, 160, StepId(0));
    let fork = cache.share(&table, 160);
    assert_eq!(fork.group(0).blocks.len(), 10);
    assert_eq!(fork.group(1).first, 7, "and a block more");
    cache.audit([&table, &fork].into_iter()).unwrap();
}

/// Returns the layout with a number; all of them have blocks of one layer.
fn layout(which: usize) -> CacheLayout {
    let windows: &[Option<usize>] = match which {
        0 => &[None],
        1 => &[None, Some(20)],
        2 => &[Some(20)],
        _ => &[None, Some(9), None, Some(40)],
    };
    CacheLayout::new(windows, 10_000, if which == 1 { 32 } else { 8 }).unwrap()
}

proptest! {
    /// Checks I3, I4 and I11 after every operation. There are only a few token sequences, so
    /// prefixes are shared often.
    #[test]
    fn the_accounting_is_consistent_after_every_operation(
        prefixes in any::<bool>(),
        which_layout in 0usize..4,
        operations in prop::collection::vec((0usize..6, 0usize..9, 1usize..120, 0u32..2), 1..300)
    ) {
        let layout = layout(which_layout);
        let total = 24 * layout.groups().len();
        let mut cache = BlockCache::with_layout(total, 16, prefixes, layout);
        let mut tables: Vec<(BlockTable, Vec<u32>)> =
            (0..6).map(|which| {
                let salt = (which < 3).then(|| Arc::from("salt"));
                (BlockTable::salted(salt), Vec::new())
            }).collect();
        let (mut launched, mut done) = (StepId(0), StepId(0));
        for (which, operation, count, seed) in operations {
            let mut transfers = Transfers::default();
            let (table, held) = &mut tables[which];
            match operation {
                0 | 1 if table.is_empty() => {
                    *held = tokens(count, seed);
                    let limit = held.len() - 1;
                    let start = attach(&mut cache, table, held, limit);
                    prop_assert!(cache.can_continue(table, start));
                    let extent = Extent::all(count);
                    if cache.prepare(table, start, extent, launched, &mut transfers).is_err() {
                        cache.release(table, launched);
                    }
                }
                0 => {
                    let (start, end) = (held.len(), held.len() + count);
                    let extent = Extent::all(end);
                    if cache.prepare(table, start, extent, launched, &mut transfers).is_ok() {
                        held.extend(tokens(count, seed));
                    }
                }
                1 => {
                    let (left, _) = cache.rewind(table, count.min(held.len()), launched);
                    held.truncate(left);
                }
                2 => { cache.release(table, launched); }
                3 => {
                    let count = count.min(held.len());
                    if cache.can_continue(table, count) {
                        let shared = cache.share(table, count);
                        let tokens = held[..count].to_vec();
                        let next = &mut tables[(which + 1) % 6];
                        cache.release(&mut next.0, launched);
                        *next = (shared, tokens);
                    }
                }
                4 | 5 => {
                    let written = held.len().min(count);
                    cache.publish(table, held, written, launched);
                }
                6 if launched > done => { done = done.next(); cache.step_completed(done); }
                7 if !table.is_empty() => {
                    cache.publish(table, held, held.len(), launched);
                    cache.give_back(table, held.len(), launched);
                }
                _ => launched = launched.next(),
            }
            let targets: Vec<_> = transfers.copies.iter().map(|(_, target)| *target).collect();
            let counts = cache.audit(tables.iter().map(|(table, _)| table)).unwrap();
            for (table, held) in &tables {
                if table.is_empty() {
                    continue;
                }
                prop_assert!(cache.can_continue(table, held.len()));
                for group in 0..cache.groups() {
                    let GroupBlocks { first, blocks } = table.group(group);
                    prop_assert!(first + blocks.len() >= held.len().div_ceil(16));
                }
            }
            for target in targets {
                prop_assert_eq!(cache.pool.references(target), 1);
            }
            if launched == done {
                prop_assert_eq!(counts.deferred, 0);
            }
        }
        for (table, _) in &mut tables {
            cache.release(table, launched);
        }
        cache.step_completed(launched);
        let counts = cache.audit(std::iter::empty()).unwrap();
        prop_assert_eq!(counts.available(), total);
    }
}
