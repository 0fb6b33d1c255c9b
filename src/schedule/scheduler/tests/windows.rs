//! Tests of groups of layers whose windows are shorter than the sequences.

use super::*;
use crate::cache::{BlockTable, CacheLayout, Extent, LayerCache, Transfers};
use crate::schedule::retained::RetainedSession;

/// Tokens per block, as in [`Bench`].
const BLOCK: usize = 4;

/// A scheduler for a group of layers that need all tokens and one with a window of 8 tokens.
pub(super) fn bench(blocks: usize, policy: Policy) -> Bench {
    let layout = CacheLayout::new(&[None, Some(8)], 10_000, BLOCK).unwrap();
    let cache = BlockCache::with_layout(blocks, BLOCK, true, layout);
    Bench {
        scheduler: Scheduler::new(policy, cache),
        ..Bench::new(0, policy)
    }
}

/// Returns the number of blocks that a sequence holds in each group.
fn held(bench: &Bench, key: SequenceKey) -> [usize; 2] {
    [0, 1].map(|group| bench.sequence(key).table.group(group).blocks.len())
}

fn chunked(tokens: usize) -> Policy {
    Policy {
        max_batch_tokens: tokens,
        ..Policy::default()
    }
}

#[test]
fn a_prompt_longer_than_the_window_never_holds_blocks_for_all_of_it() {
    let mut bench = bench(100, chunked(8));
    let key = bench.add(spec(prompt(80, 1), 20));
    let mut most = 0;
    for _ in 0..10 {
        bench.launch().unwrap();
        bench.launch();
        let [all, windowed] = held(&bench, key);
        assert!(all >= 20, "the whole prompt is booked at the start");
        most = most.max(windowed);
        bench.complete(7);
        while !bench.in_flight.is_empty() {
            bench.complete(7);
        }
    }
    let layout = bench.scheduler.cache().layout();
    let bound = layout.most_blocks(1, 100, 8, BLOCK);
    assert!(most <= bound, "{most} of {bound}");
    assert!(bound < 20, "{bound}");
    // While it decodes, the window, and up to a block more at each end.
    bench.step();
    assert!(
        held(&bench, key)[1] <= 8 / BLOCK + 2,
        "{:?}",
        held(&bench, key)
    );
}

#[test]
fn the_longest_sequence_that_fits_runs_to_its_end() {
    let layout = CacheLayout::new(&[None, Some(8)], 10_000, BLOCK).unwrap();
    for blocks in [8, 13, 20, 40] {
        for step_tokens in [1, 3, 8, 16] {
            let longest = layout.longest_sequence(blocks, step_tokens, BLOCK, 10_000);
            assert!(longest > 0);
            let mut bench = bench(blocks, chunked(step_tokens));
            let key = bench.add(spec(prompt(longest / 2 + 1, 1), longest - longest / 2 - 1));
            let mut steps = 0;
            while bench.scheduler.sequences().contains_key(key) {
                bench.launch();
                bench.launch();
                assert!(!bench.in_flight.is_empty(), "nothing is planned");
                let finished = bench.complete(7);
                assert!(bench.running(key), "it was preempted after {steps} steps");
                for key in finished {
                    assert_eq!(bench.sequence(key).tokens.len(), longest);
                    bench.scheduler.remove(key);
                }
                steps += 1;
            }
        }
    }
}

#[test]
fn a_swapped_out_sequence_takes_the_blocks_of_its_window_along() {
    let mut bench = bench(30, swapping());
    let long = bench.add(spec(prompt(40, 1), 30));
    for _ in 0..3 {
        bench.step();
    }
    let before = held(&bench, long);
    let first = bench.sequence(long).table.group(1).first;
    assert!(first > 0, "blocks were given back");
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(52, 2), 2)
    });
    let plan = bench.launch().unwrap();
    assert!(!bench.running(long));
    assert_eq!(plan.transfers.swap_out.len(), before[0] + before[1]);
    bench.complete(7);
    while bench.scheduler.sequences().contains_key(urgent) {
        bench.launch().unwrap();
        for key in bench.complete(7) {
            bench.scheduler.remove(key);
        }
    }
    let plan = bench.launch().unwrap();
    assert!(bench.running(long));
    assert_eq!(rows(&plan), [(42, 1)], "nothing is computed again");
    assert!(!plan.transfers.swap_in.is_empty());
    assert_eq!(bench.sequence(long).table.group(1).first, first);
    bench.complete(7);
}

#[test]
fn a_follower_whose_leader_has_moved_on_finds_the_prompt_in_the_prefix_cache() {
    let policy = Policy {
        max_sequences: 2,
        ..Policy::default()
    };
    let mut bench = bench(100, policy);
    let leader = bench.add(spec(prompt(30, 1), 40));
    let other = bench.add(spec(prompt(4, 2), 40));
    let spec = spec(prompt(30, 1), 40);
    let id = RequestId(99);
    let follower = bench.scheduler.add_follower(id, spec, Some(leader));
    for _ in 0..30 {
        bench.step();
    }
    assert!(bench.sequence(leader).table.group(1).first > 30 / BLOCK);
    // Now there is a place for the follower, while the leader goes on.
    bench.scheduler.remove(other);
    let plan = bench.launch().unwrap();
    assert!(bench.running(follower) && bench.running(leader));
    assert!(rows(&plan).contains(&(28, 2)));
    assert_eq!(bench.sequence(follower).cached_tokens, 28);
    bench.complete(7);
}

/// Runs a turn of session 1 to its end and lets the session keep its tokens.
fn run_turn(bench: &mut Bench, tokens: Vec<u32>, new_tokens: usize) -> Vec<u32> {
    let key = bench.add(turn(1, tokens, new_tokens));
    loop {
        bench.launch().unwrap();
        if !bench.complete(7).is_empty() {
            break;
        }
    }
    let tokens = bench.sequence(key).tokens.clone();
    bench.scheduler.close(key, retain(tokens.len()));
    tokens
}

#[test]
fn a_session_keeps_the_window_and_continues_from_it() {
    let mut bench = bench(100, Policy::default());
    let mut tokens = run_turn(&mut bench, prompt(40, 1), 10);
    let retained = bench.scheduler.retained(SessionId(1));
    assert_eq!(retained.tokens, 49, "the last token has no key yet");
    assert!(retained.blocks <= 13 + 8 / BLOCK + 2, "{retained:?}");
    tokens.extend([1, 2, 3]);
    bench.add(turn(1, tokens, 4));
    assert_eq!(rows(&bench.step()), [(49, 4)]);
}

#[test]
fn a_session_that_goes_back_behind_its_window_uses_what_is_cached() {
    let mut bench = bench(100, Policy::default());
    let tokens = run_turn(&mut bench, prompt(40, 1), 10);
    bench.scheduler.rewind_session(SessionId(1), 22);
    assert_eq!(bench.scheduler.retained(SessionId(1)).tokens, 22);
    bench.scheduler.audit().unwrap();
    let mut branch = tokens[..22].to_vec();
    branch.extend([5, 6]);
    bench.add(turn(1, branch, 4));
    let plan = bench.step();
    assert_eq!(rows(&plan), [(22, 2)]);
    assert_eq!(plan.transfers.copies.len(), 2, "a block of each group");
}

#[test]
fn a_session_that_goes_back_behind_its_window_computes_again_what_is_gone() {
    let mut bench = bench(40, Policy::default());
    let tokens = run_turn(&mut bench, prompt(40, 1), 10);
    // Forgets the window blocks that were given back.
    bench.scheduler.clear_prefixes();
    bench.scheduler.rewind_session(SessionId(1), 22);
    assert_eq!(bench.scheduler.retained(SessionId(1)).tokens, 0);
    bench.scheduler.audit().unwrap();
    let key = bench.add(turn(1, tokens[..24].to_vec(), 4));
    assert_eq!(rows(&bench.step()), [(0, 24)]);
    assert_eq!(bench.sequence(key).cached_tokens, 0);
}

#[test]
fn one_block_of_each_group_is_reserved_for_each_running_sequence() {
    // The first sequence holds two blocks of each group once it decodes.
    let mut bench = bench(9, Policy::default());
    let first = bench.add(spec(prompt(4, 1), 4));
    bench.step();
    let second = bench.add(spec(prompt(7, 2), 4));
    bench.step();
    assert!(bench.running(first));
    assert_eq!(held(&bench, first), [2, 2]);
    assert!(
        !bench.running(second),
        "it needs 4 of the 5 blocks, but the first may need one of each group"
    );
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

#[test]
fn a_prompt_that_runs_out_of_window_blocks_waits_and_keeps_what_it_has() {
    let mut bench = bench(40, chunked(5));
    let other = bench.add(spec(prompt(1, 1), 20));
    bench.step();
    let key = bench.add(spec(prompt(40, 2), 4));
    bench.step();
    let computed = bench.sequence(key).launched_tokens;
    assert!(bench.running(key) && computed < 40);
    // A pinned session takes all free blocks.
    let mut table = BlockTable::default();
    let tokens = bench.scheduler.cache.available_blocks() / 2 * BLOCK;
    let (step, transfers) = (bench.scheduler.launched, &mut Transfers::default());
    let cache = &mut bench.scheduler.cache;
    let extent = Extent::all(tokens);
    cache
        .prepare(&mut table, 0, extent, step, transfers)
        .unwrap();
    assert!(cache.available_blocks() < 2);
    let hoard = RetainedSession {
        tokens: prompt(tokens, 3),
        table,
        pinned_until: Some(Instant::now() + Duration::from_secs(1000)),
        ..RetainedSession::default()
    };
    bench.scheduler.retained.insert(SessionId(1), hoard);
    let mut plan = bench.step();
    while rows(&plan).len() > 1 {
        plan = bench.step();
    }
    assert_eq!(keys(&plan), [other], "only the other sequence goes on");
    assert!(bench.running(key), "it keeps its blocks");
    let computed = bench.sequence(key).launched_tokens.max(computed);
    assert_eq!(bench.scheduler.counts().preemptions, 0);
    bench.scheduler.end_session(SessionId(1));
    let next = rows(&bench.step());
    assert_eq!(next.len(), 2, "{next:?}");
    assert_eq!(next[1].0, computed, "nothing is computed again");
}

/// Gemma 3 1B has 26 layers, of which every sixth attends to all tokens and the others to the
/// last 512.
#[test]
fn gemma_3_holds_a_quarter_of_the_blocks_at_8192_tokens() {
    let windows: Vec<Option<usize>> = (0..26)
        .map(|layer| (layer % 6 != 5).then_some(512))
        .collect();
    let layout = CacheLayout::new(&windows, 32_768, 128).unwrap();
    let layers_per_block = layout.layers_per_block();
    let cache = BlockCache::with_layout(10_000, 16, true, layout);
    let mut bench = Bench {
        scheduler: Scheduler::new(Policy::default(), cache),
        ..Bench::new(0, Policy::default())
    };
    let key = bench.add(spec(prompt(8100, 1), 1000));
    while bench.sequence(key).tokens.len() < 8192 {
        bench.step();
    }
    // In blocks of 16 tokens of one layer.
    let held = bench.sequence(key).table.len() * layers_per_block;
    let before = 8192 / 16 * 26;
    assert_eq!(before, 13_312);
    assert_eq!(held, 3_008);
    let receipt = bench.scheduler.remove(key).unwrap().1;
    assert_eq!(
        receipt * layers_per_block,
        held,
        "the receipt counts all groups"
    );
    let counts = bench.scheduler.audit().unwrap();
    assert_eq!(counts.referenced + counts.deferred, 0);
}

/// Gemma 4 E4B has 42 layers, of which every sixth attends to all tokens, with heads twice as
/// large, and the last 18 to the keys and values of earlier ones.
#[test]
fn shared_and_smaller_caches_take_fewer_blocks() {
    let is_full = |layer: usize| layer % 6 == 5;
    let layers: Vec<LayerCache> = (0..42)
        .map(|layer| LayerCache {
            window: (!is_full(layer)).then_some(512),
            size: if is_full(layer) { 2 } else { 1 },
            shares: (layer >= 24).then_some(if is_full(layer) { 23 } else { 22 }),
        })
        .collect();
    let layout = CacheLayout::of_layers(&layers, 32_768, 128).unwrap();
    // Four large layers in the first group; twice ten small ones in five places of the others.
    let sizes = layout.groups().iter().map(|group| group.layers.len());
    assert_eq!(sizes.collect::<Vec<_>>(), [4, 10, 10]);
    assert_eq!(layout.layers_per_block(), 5);
    let cache = BlockCache::with_layout(10_000, 16, true, layout);
    let mut bench = Bench {
        scheduler: Scheduler::new(Policy::default(), cache),
        ..Bench::new(0, Policy::default())
    };
    let key = bench.add(spec(prompt(8100, 1), 1000));
    while bench.sequence(key).tokens.len() < 8192 {
        bench.step();
    }
    let held = [0, 1, 2].map(|group| bench.sequence(key).table.group(group).blocks.len());
    assert_eq!(held[0], 512);
    assert!(
        held[1..].iter().all(|held| (33..46).contains(held)),
        "{held:?}"
    );
    bench.scheduler.remove(key).unwrap();
    let counts = bench.scheduler.audit().unwrap();
    assert_eq!(counts.referenced + counts.deferred, 0);
}

/// Otherwise, a stream of short requests could keep the prompt from ever going on.
#[test]
fn nothing_starts_while_a_prompt_waits_for_blocks_of_a_step_in_flight() {
    let mut waited = 0;
    let layout = CacheLayout::new(&[None, Some(8)], 10_000, BLOCK).unwrap();
    let fits = |blocks: &usize| layout.longest_sequence(*blocks, 40, BLOCK, 10_000) > 200;
    for blocks in (0..120).filter(fits) {
        let mut bench = bench(blocks, chunked(40));
        // A sequence that goes on takes blocks that the prompt would need.
        bench.add(spec(prompt(2, 200), 60));
        bench.step();
        let long = bench.add(spec(prompt(200, 1), 1));
        for seed in 2..100 {
            bench.add(spec(prompt(3, seed), 1));
            let plan = bench.launch();
            if let Some(plan) = &plan {
                let pending = bench.running(long) && bench.sequence(long).pending() > 0;
                let waits = pending && plan.items.iter().all(|item| item.key != long);
                let starts = plan.items.iter().any(|item| item.start == 0);
                let deferred = bench.scheduler.cache().counts().deferred > 0;
                waited += usize::from(waits && deferred);
                assert!(!waits || !deferred || !starts, "{blocks} blocks");
            }
            if bench.in_flight.len() > 1 || plan.is_none() {
                for key in bench.complete(7) {
                    bench.scheduler.remove(key);
                }
            }
            if !bench.scheduler.sequences().contains_key(long) {
                break;
            }
        }
    }
    assert!(waited > 0);
}
