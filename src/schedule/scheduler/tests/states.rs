//! Tests of the slots for states of recurrent layers.

use super::*;
use crate::schedule::PrefixMisses;

/// Tokens per block, as in [`Bench`], and between snapshots.
const BLOCK: usize = 4;
const INTERVAL: usize = 8;

fn with_slots(blocks: usize, slots: usize, prefixes: bool, policy: Policy) -> Bench {
    let cache = BlockCache::new(blocks, BLOCK, prefixes).with_states(slots, INTERVAL);
    Bench {
        scheduler: Scheduler::new(policy, cache),
        ..Bench::new(0, policy)
    }
}

fn bench(slots: usize) -> Bench {
    with_slots(64, slots, true, Policy::default())
}

/// Returns the number of slots in use, and of snapshots that nobody holds.
fn slots(bench: &Bench) -> (usize, usize) {
    let counts = bench.scheduler.cache().state_counts();
    (counts.referenced + counts.deferred, counts.cached)
}

/// Runs a sequence to its end and removes it. Returns the rows of its first step.
fn run(bench: &mut Bench, tokens: Vec<u32>, new_tokens: usize) -> (usize, usize) {
    let key = bench.add(spec(tokens, new_tokens));
    let first = bench.launch().unwrap();
    let mut finished = bench.complete(7);
    while finished.is_empty() {
        bench.launch().unwrap();
        finished = bench.complete(7);
    }
    bench.scheduler.remove(key);
    rows(&first)[0]
}

#[test]
fn a_sequence_overwrites_its_own_state() {
    let mut bench = bench(4);
    let key = bench.add(spec(prompt(3, 1), 4));
    let first = bench.step().items[0].state.unwrap();
    assert_eq!((first.before, first.snapshot), (None, None));
    let second = bench.step().items[0].state.unwrap();
    assert_eq!(second.before, Some(first.after));
    assert_eq!(second.after, first.after);
    assert_eq!(slots(&bench), (1, 0));
    bench.scheduler.remove(key);
    assert_eq!(slots(&bench), (0, 0));
}

#[test]
fn the_same_prompt_continues_from_the_last_snapshot_before_its_end() {
    let mut bench = bench(4);
    for (length, snapshot) in [(8, 0), (9, 8), (16, 8), (17, 16), (30, 24)] {
        let tokens = prompt(length, length as u32);
        assert_eq!(run(&mut bench, tokens.clone(), 1), (0, length));
        let again = run(&mut bench, tokens, 1);
        assert_eq!(again, (snapshot, length - snapshot), "{length} tokens");
    }
}

#[test]
fn a_snapshot_is_not_written_by_those_that_start_from_it() {
    let mut bench = bench(8);
    run(&mut bench, prompt(20, 1), 1);
    let [a, b] = [(), ()].map(|()| bench.add(spec(prompt(20, 1), 9)));
    let plan = bench.launch().unwrap();
    assert_eq!(rows(&plan), [(16, 4), (16, 4)]);
    let states: Vec<_> = plan.items.iter().map(|item| item.state.unwrap()).collect();
    assert_eq!(states[0].before, states[1].before);
    let written = states.iter().map(|state| Some(state.after));
    assert!(written.clone().all(|after| after != states[0].before));
    assert_ne!(states[0].after, states[1].after);
    bench.complete(7);
    for key in [a, b] {
        bench.scheduler.remove(key);
    }
    assert_eq!(slots(&bench).0, 0);
}

/// The second prompt shows where prompts differ, so the third finds a snapshot there.
#[test]
fn a_snapshot_is_taken_where_prompts_depart_from_each_other() {
    let mut bench = bench(8);
    let with_suffix = |seed: u32| {
        let mut tokens = prompt(26, 1);
        tokens.extend(prompt(14, seed));
        tokens
    };
    assert_eq!(run(&mut bench, with_suffix(2), 1), (0, 40));
    let before = bench.scheduler.counts().prefix_misses;
    let key = bench.add(spec(with_suffix(3), 1));
    // The step ends at the snapshot, and the next one computes the rest.
    assert_eq!(rows(&bench.launch().unwrap()), [(0, 24)]);
    bench.complete(7);
    assert_eq!(rows(&bench.step()), [(24, 16)]);
    bench.scheduler.remove(key);
    let misses = bench.scheduler.counts().prefix_misses;
    let expected = PrefixMisses {
        no_snapshot: before.no_snapshot + 24,
        no_block: before.no_block + 12,
        ..before
    };
    assert_eq!(misses, expected);
    assert_eq!(run(&mut bench, with_suffix(4), 1), (24, 16));
    assert_eq!(run(&mut bench, with_suffix(3), 1), (32, 8));
}

#[test]
fn misses_are_counted_by_their_reason() {
    let mut bench = with_slots(16, 3, true, Policy::default());
    let since = |bench: &Bench, before: PrefixMisses| {
        let now = bench.scheduler.counts().prefix_misses;
        [
            now.no_block - before.no_block,
            now.no_snapshot - before.no_snapshot,
            now.evicted - before.evicted,
            now.salt - before.salt,
        ]
    };
    run(&mut bench, prompt(20, 1), 1);
    let misses = bench.scheduler.counts().prefix_misses;
    assert_eq!(since(&bench, PrefixMisses::default()), [16, 0, 0, 0]);
    let other = SequenceSpec {
        salt: Some("other".into()),
        ..spec(prompt(20, 1), 1)
    };
    let key = bench.add(other);
    bench.step();
    bench.scheduler.remove(key);
    assert_eq!(since(&bench, misses), [0, 0, 0, 16]);
    // Two prompts take the slots of the snapshots, but not all blocks.
    run(&mut bench, prompt(9, 2), 1);
    run(&mut bench, prompt(9, 3), 1);
    let misses = bench.scheduler.counts().prefix_misses;
    run(&mut bench, prompt(20, 1), 1);
    assert_eq!(since(&bench, misses), [0, 0, 16, 0], "snapshots");
    run(&mut bench, prompt(64, 4), 1);
    let misses = bench.scheduler.counts().prefix_misses;
    run(&mut bench, prompt(20, 1), 1);
    assert_eq!(since(&bench, misses), [0, 0, 16, 0], "blocks");
}

#[test]
fn an_answer_keeps_its_latest_two_snapshots() {
    let mut bench = bench(16);
    let key = bench.add(spec(prompt(10, 1), 60));
    let mut most = 0;
    for _ in 0..50 {
        bench.step();
        let (used, cached) = slots(&bench);
        most = most.max(used + cached);
    }
    assert_eq!(bench.sequence(key).tokens.len(), 60);
    assert_eq!(slots(&bench), (1, 3), "the prompt's, and two of the answer");
    assert_eq!(most, 4);
    let mut turn = bench.sequence(key).tokens.clone();
    bench.scheduler.remove(key);
    turn.extend(prompt(5, 9));
    assert_eq!(run(&mut bench, turn, 1), (56, 9));
}

#[test]
fn sequences_wait_for_a_slot_and_snapshots_make_room_for_them() {
    let mut bench = bench(2);
    run(&mut bench, prompt(20, 1), 1);
    run(&mut bench, prompt(20, 2), 1);
    assert_eq!(
        slots(&bench),
        (0, 1),
        "the second took the slot of the first"
    );
    let keys = [3, 4, 5].map(|seed| bench.add(spec(prompt(20, seed), 3)));
    // A snapshot of the first takes the other slot until it is published.
    assert_eq!(rows(&bench.step()), [(0, 20)]);
    assert_eq!(rows(&bench.step()), [(20, 1), (0, 20)]);
    assert_eq!(slots(&bench), (2, 0), "no slot is left for a snapshot");
    assert!(!bench.running(keys[2]));
    bench.scheduler.remove(keys[0]);
    assert_eq!(rows(&bench.step()).len(), 2);
    assert!(bench.running(keys[2]));
}

#[test]
fn a_sequence_that_was_swapped_out_keeps_its_state() {
    let mut bench = with_slots(8, 4, false, swapping());
    let usual = bench.add(spec(prompt(12, 1), 20));
    bench.step();
    let own = bench.step().items[0].state.unwrap().after;
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(20, 2), 2)
    });
    let plan = bench.step();
    assert!(!plan.transfers.swap_out.is_empty());
    assert!(!bench.running(usual));
    bench.scheduler.remove(urgent);
    let plan = bench.step();
    assert_eq!(rows(&plan), [(13, 1)]);
    assert_eq!(plan.items[0].state.unwrap().before, Some(own));
}

/// Otherwise, the first in the queue would wait for a slot that only a sequence behind it has.
#[test]
fn a_swapped_out_sequence_gives_up_its_state_if_nothing_else_can_run() {
    let mut bench = with_slots(8, 2, false, swapping());
    let usual = [1, 2].map(|seed| bench.add(spec(prompt(12, seed), 20)));
    bench.step();
    let urgent = |seed| SequenceSpec {
        priority: -1,
        ..spec(prompt(28, seed), 2)
    };
    let first = bench.add(urgent(3));
    for _ in 0..40 {
        if !bench.scheduler.sequences().contains_key(first) {
            break;
        }
        if bench.launch().is_some() {
            for key in bench.complete(7) {
                bench.scheduler.remove(key);
            }
        }
    }
    assert!(
        !bench.scheduler.sequences().contains_key(first),
        "it is stuck"
    );
    let all_done = |bench: &Bench| {
        usual
            .iter()
            .all(|key| !bench.scheduler.sequences().contains_key(*key))
    };
    for _ in 0..200 {
        if bench.launch().is_some() {
            for key in bench.complete(7) {
                bench.scheduler.remove(key);
            }
        }
    }
    assert!(all_done(&bench));
    assert_eq!(slots(&bench).0, 0);
}

#[test]
fn without_a_prefix_cache_a_session_continues_from_a_snapshot_of_its_own() {
    let mut bench = with_slots(64, 8, false, Policy::default());
    let session = SessionId(1);
    let turn = |tokens: Vec<u32>, new_tokens| SequenceSpec {
        session: Some(session),
        ..spec(tokens, new_tokens)
    };
    let key = bench.add(turn(prompt(10, 1), 20));
    for _ in 0..20 {
        bench.step();
    }
    let mut context = bench.sequence(key).tokens.clone();
    let retain = BlockDisposition::Retain {
        tokens: context.len(),
        pin_until: None,
    };
    bench.scheduler.close(key, retain);
    assert_eq!(bench.scheduler.retained(session).tokens, 24);
    assert_eq!(slots(&bench).0, 2, "the latest two snapshots up to there");
    context.extend(prompt(3, 9));
    bench.add(turn(context, 1));
    assert_eq!(rows(&bench.step()), [(24, 9)]);
}

#[test]
fn without_a_prefix_cache_snapshots_that_nobody_can_use_take_no_slots() {
    let mut bench = with_slots(64, 3, false, Policy::default());
    for seed in 0..3 {
        bench.add(spec(prompt(10, seed), 20));
    }
    for _ in 0..10 {
        assert_eq!(bench.step().items.len(), 3);
    }
}

#[test]
fn an_urgent_sequence_takes_the_slot_of_another() {
    let places = Policy {
        max_sequences: 2,
        ..swapping()
    };
    // Without a free place, and without a free slot.
    for policy in [places, swapping()] {
        let mut bench = with_slots(64, 2, false, policy);
        let usual = [1, 2].map(|seed| bench.add(spec(prompt(12, seed), 20)));
        bench.step();
        let urgent = bench.add(SequenceSpec {
            priority: -1,
            ..spec(prompt(12, 3), 20)
        });
        // The slot is free when the step that touched it has completed.
        bench.launch();
        if !bench.in_flight.is_empty() {
            bench.complete(7);
        }
        bench.step();
        assert!(bench.running(urgent));
        assert_eq!(usual.map(|key| bench.running(key)), [true, false]);
        // It would have kept its slot.
        assert_eq!(bench.scheduler.counts().swaps, 0);
    }
}

#[test]
fn sessions_are_not_evicted_for_slots_that_they_do_not_hold() {
    let mut bench = with_slots(64, 2, true, Policy::default());
    let turn = |session, tokens| SequenceSpec {
        session: Some(SessionId(session)),
        ..spec(tokens, 1)
    };
    let retain = BlockDisposition::Retain {
        tokens: 100,
        pin_until: None,
    };
    let key = bench.add(turn(50, prompt(6, 1)));
    bench.step();
    bench.scheduler.close(key, retain);
    let kept = bench.scheduler.counts().retained_sessions;
    for seed in 2..5 {
        bench.add(spec(prompt(6, seed), 9));
    }
    assert_eq!(bench.step().items.len(), 2, "there are two slots");
    assert_eq!(bench.step().items.len(), 2);
    assert_eq!(bench.scheduler.counts().retained_sessions, kept);
}
