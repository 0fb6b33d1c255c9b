//! Tests of the block accounting, of single operations and of random sequences of them.

use super::*;
use proptest::prelude::*;

/// Returns a cache with a prefix cache and blocks of 16 tokens.
fn cache(blocks: usize) -> BlockCache {
    BlockCache::new(blocks, 16, true)
}

/// Extends `table` so that it has room for `tokens` tokens in all.
fn grow(cache: &mut BlockCache, table: &mut BlockTable, tokens: usize) -> Result<(), OutOfBlocks> {
    // Starting at a block boundary, so that nothing is copied.
    let start = table.len() * 16;
    cache.prepare(table, start, tokens, StepId(0), &mut Transfers::default())
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
    assert_eq!(cache.attach(&mut table, &all, 16), 16);
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

/// Allocates a table for `tokens`, publishes its blocks and releases them.
fn leave_behind(cache: &mut BlockCache, tokens: &[u32]) {
    let mut table = BlockTable::default();
    cache.attach(&mut table, tokens, tokens.len());
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
    assert_eq!(cache.lookup(None, &all, 50).0, 0);
    cache.publish(&mut table, &all, 40, StepId(0));
    assert_eq!(
        cache.lookup(None, &all, 50).0,
        2,
        "40 tokens are two whole blocks"
    );
    cache.publish(&mut table, &all, 50, StepId(0));
    assert_eq!(cache.lookup(None, &all, 50).0, 3);
    assert_eq!(cache.lookup(None, &all, 47).0, 2, "no more than asked for");
    assert_eq!(
        cache.lookup(None, &all[16..], 34).0,
        0,
        "not without what is before"
    );
    let mut other = all.clone();
    other[20] += 1;
    assert_eq!(
        cache.lookup(None, &other, 50).0,
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
    assert_eq!(cache.lookup(None, &first, 32).0, 2);
    assert_eq!(cache.lookup(None, &second, 32).0, 1, "its end went first");
    grow(&mut cache, &mut table, 48).unwrap();
    assert_eq!(cache.lookup(None, &first, 32).0, 1);
    assert_eq!(cache.lookup(None, &second, 32).0, 0);
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
    assert_eq!(a.blocks()[..2], b.blocks()[..2]);
    assert_ne!(a.blocks()[2], b.blocks()[2], "the last is not complete");
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
    assert_eq!(a.blocks(), b.blocks());
    cache
        .prepare(&mut b, 20, 21, StepId(4), &mut transfers)
        .unwrap();
    assert_eq!(transfers.copies, [(a.blocks()[1], b.blocks()[1])]);
    assert_eq!(a.blocks()[0], b.blocks()[0]);
    // Neither shares its last block now, so nothing more is copied.
    for (table, start) in [(&mut a, 24), (&mut b, 21)] {
        cache
            .prepare(table, start, start + 1, StepId(5), &mut transfers)
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
    assert_eq!(cache.truncate(&mut table, 20, StepId(0)), 0);
    let mut transfers = Transfers::default();
    cache
        .prepare(&mut table, 20, 21, StepId(1), &mut transfers)
        .unwrap();
    assert_eq!(transfers.copies.len(), 1);
    cache.step_completed(StepId(1));
    assert_eq!(
        cache.lookup(None, &all, 32).0,
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
    assert_eq!(cache.lookup(None, &all, 32).0, 0);
    assert_eq!(cache.counts().free, 4);
}

#[test]
fn clearing_forgets_blocks_that_no_table_holds() {
    let mut cache = cache(4);
    leave_behind(&mut cache, &tokens(32, 1));
    cache.clear_prefixes();
    assert_eq!(cache.counts().free, 4);
    assert_eq!(cache.lookup(None, &tokens(32, 1), 32).0, 0);
    cache.audit(std::iter::empty()).unwrap();
}

#[test]
fn tables_with_different_salts_share_nothing() {
    let mut cache = cache(16);
    let all = tokens(40, 1);
    let salts: [Option<Arc<str>>; 3] = [None, Some("one".into()), Some("two".into())];
    let mut tables = salts.clone().map(BlockTable::salted);
    for (table, salt) in tables.iter_mut().zip(&salts) {
        assert_eq!(cache.lookup(salt.as_ref(), &all, 40).0, 0, "{salt:?}");
        assert_eq!(cache.attach(table, &all, 40), 0);
        grow(&mut cache, table, 40).unwrap();
        cache.publish(table, &all, 40, StepId(0));
        assert_eq!(cache.lookup(salt.as_ref(), &all, 40).0, 2, "{salt:?}");
    }
    cache.audit(tables.iter()).unwrap();
    let fork = cache.share(&tables[1], 40);
    assert_eq!(fork.salt(), salts[1].as_ref());
    // Released blocks are found only with the same salt.
    let [mut none, mut one, two] = tables;
    cache.release(&mut none, StepId(0));
    cache.release(&mut one, StepId(0));
    let mut again = BlockTable::salted(salts[1].clone());
    assert_eq!(cache.attach(&mut again, &all, 40), 32);
    assert_eq!(again.blocks(), &fork.blocks()[..2]);
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

proptest! {
    /// Checks I3, I4 and I11 after every operation. There are only a few token sequences, so
    /// prefixes are shared often.
    #[test]
    fn the_accounting_is_consistent_after_every_operation(
        prefixes in any::<bool>(),
        operations in prop::collection::vec((0usize..6, 0usize..8, 1usize..120, 0u32..2), 1..300)
    ) {
        let mut cache = BlockCache::new(24, 16, prefixes);
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
                    let start = cache.attach(table, held, limit);
                    if cache.prepare(table, start, count, launched, &mut transfers).is_err() {
                        cache.release(table, launched);
                    }
                }
                0 => {
                    let (start, end) = (held.len(), held.len() + count);
                    if cache.prepare(table, start, end, launched, &mut transfers).is_ok() {
                        held.extend(tokens(count, seed));
                    }
                }
                1 => { cache.truncate(table, count, launched); held.truncate(count); }
                2 => { cache.release(table, launched); }
                3 => {
                    let shared = cache.share(table, count);
                    let tokens = held[..count.min(held.len())].to_vec();
                    let next = &mut tables[(which + 1) % 6];
                    cache.release(&mut next.0, launched);
                    *next = (shared, tokens);
                }
                4 | 5 => {
                    let written = held.len().min(count);
                    cache.publish(table, held, written, launched);
                }
                6 if launched > done => { done = done.next(); cache.step_completed(done); }
                _ => launched = launched.next(),
            }
            let targets: Vec<_> = transfers.copies.iter().map(|(_, target)| *target).collect();
            let counts = cache.audit(tables.iter().map(|(table, _)| table)).unwrap();
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
        prop_assert_eq!(counts.available(), 24);
    }
}
