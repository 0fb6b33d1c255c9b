//! Tests of the scheduler, step by step: which sequence gets which blocks, and which is
//! preempted.

use super::*;
use crate::config::Preemption;
use crate::id::{RequestId, SessionId};
use crate::sampling::{Constraint, ConstraintError, ConstraintState};
use crate::schedule::{
    FinishReason, PlanItem, PooledTokens, Report, Sequence, SequenceSpec, StepPlan, Task,
    TokenInput,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod runs;
mod states;

/// A scheduler, and a device that completes its steps when told to.
struct Bench {
    scheduler: Scheduler,
    in_flight: VecDeque<StepPlan>,
    ids: u64,
}

fn spec(prompt: Vec<u32>, new_tokens: usize) -> SequenceSpec {
    let max_tokens = prompt.len() + new_tokens;
    SequenceSpec::new(prompt, max_tokens)
}

fn prompt(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| i * 31 + seed * 1000).collect()
}

impl Bench {
    fn new(blocks: usize, policy: Policy) -> Self {
        Self {
            scheduler: Scheduler::new(policy, BlockCache::new(blocks, 4, true)),
            in_flight: VecDeque::new(),
            ids: 0,
        }
    }

    fn add(&mut self, spec: SequenceSpec) -> SequenceKey {
        self.ids += 1;
        self.scheduler.add(RequestId(self.ids), spec)
    }

    /// Plans and launches a step, and returns its plan.
    fn launch(&mut self) -> Option<StepPlan> {
        let plan = self.scheduler.plan();
        self.scheduler.audit().unwrap();
        self.in_flight.extend(plan.clone());
        plan
    }

    /// Completes the oldest step, in which every sample is `token`. Returns the finished
    /// sequences.
    fn complete(&mut self, token: u32) -> Vec<SequenceKey> {
        let committed = self.complete_runs(&[token]).into_iter();
        let finished = |(key, commit)| matches!(commit, Commit::Finished { .. }).then_some(key);
        committed.filter_map(finished).collect()
    }

    /// Completes the oldest step, in which every run is `run`.
    fn complete_runs(&mut self, run: &[u32]) -> Vec<(SequenceKey, Commit)> {
        let plan = self.in_flight.pop_front().unwrap();
        self.scheduler.step_succeeded(&plan);
        let mut committed = Vec::new();
        for item in plan.samples() {
            let commit = self.scheduler.commit(plan.step, item, run.iter().copied());
            committed.push((item.key, commit));
        }
        self.scheduler.step_completed(plan.step);
        self.scheduler.audit().unwrap();
        committed
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.launch().expect("there is something to do");
        self.complete(7);
        plan
    }

    fn sequence(&self, key: SequenceKey) -> &Sequence {
        &self.scheduler.sequences()[key]
    }

    fn running(&self, key: SequenceKey) -> bool {
        self.sequence(key).state() == SequenceState::Running
    }
}

fn finished(tokens: usize, reason: FinishReason) -> Commit {
    Commit::Finished { tokens, reason }
}

fn rows(plan: &StepPlan) -> Vec<(usize, usize)> {
    let items = plan.items.iter();
    items.map(|item| (item.start, item.count)).collect()
}

fn swapping() -> Policy {
    Policy {
        preemption: Preemption::Swap,
        swap_blocks: 16,
        ..Policy::default()
    }
}

#[test]
fn blocks_of_an_ended_sequence_are_reused_for_the_same_beginning() {
    let mut bench = Bench::new(16, Policy::default());
    let first = bench.add(spec(prompt(10, 1), 2));
    bench.step();
    bench.scheduler.remove(first);
    assert_eq!(bench.scheduler.cache().counts().cached, 2);
    let second = bench.add(spec(prompt(10, 1), 2));
    assert_eq!(rows(&bench.step()), [(8, 2)]);
    assert_eq!(bench.sequence(second).cached_tokens, 8);
    // If the whole prompt is cached, the last block is still computed for its logits.
    bench.scheduler.remove(second);
    bench.add(spec(prompt(8, 1), 2));
    assert_eq!(rows(&bench.step()), [(4, 4)]);
    let counts = bench.scheduler.counts();
    assert_eq!((counts.prefix_queries, counts.prefix_hits), (28, 12));
}

/// I11.
#[test]
fn a_step_in_flight_publishes_nothing() {
    let mut bench = Bench::new(16, Policy::default());
    bench.add(spec(prompt(10, 1), 2));
    bench.launch().unwrap();
    bench.add(spec(prompt(10, 1), 2));
    assert_eq!(rows(&bench.launch().unwrap())[1], (0, 10));
    bench.complete(1);
    bench.complete(1);
    // Both computed the same tokens, so the second now holds the blocks of the first.
    assert_eq!(bench.scheduler.cache().counts().referenced, 4);
}

/// I11: blocks do not hold what the sequence computed before it was preempted.
#[test]
fn a_step_from_before_a_restart_publishes_nothing() {
    let policy = Policy {
        max_sequences: 1,
        max_batch_tokens: 4,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let tokens = prompt(12, 1);
    let usual = bench.add(spec(tokens.clone(), 2));
    bench.launch().unwrap();
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(4, 2), 2)
    });
    bench.launch().unwrap();
    bench.scheduler.remove(urgent);
    assert_eq!(rows(&bench.launch().unwrap()), [(0, 4)]);
    assert!(bench.running(usual), "it has started again");
    let known = |bench: &Bench| bench.scheduler.cache().lookup(None, &tokens, 12).tokens;
    bench.complete(7);
    assert_eq!(known(&bench), 0);
    bench.complete(7);
    bench.complete(7);
    assert_eq!(known(&bench), 4);
}

/// The scheduler waits for blocks that a step in flight will free.
#[test]
fn no_second_victim_is_chosen_while_a_step_in_flight_frees_enough_blocks() {
    let mut bench = Bench::new(9, Policy::default());
    let first = bench.add(spec(prompt(7, 1), 20));
    let second = bench.add(spec(prompt(6, 2), 20));
    let third = bench.add(spec(prompt(5, 3), 20));
    bench.launch().unwrap();
    let mut plan = bench.launch().unwrap();
    while bench.running(third) {
        bench.complete(7);
        plan = bench.launch().unwrap();
    }
    assert!(bench.scheduler.cache().counts().deferred > 0);
    let planned: Vec<_> = plan.items.iter().map(|item| item.key).collect();
    assert_eq!(planned, [second], "the first waits for its block");
    assert_eq!(bench.scheduler.counts().preemptions, 1);
    bench.complete(7);
    let plan = bench.launch().unwrap();
    assert_eq!(plan.items[0].key, first);
    assert_eq!(bench.scheduler.counts().preemptions, 1);
}

#[test]
fn a_follower_waits_for_the_prompt_of_its_leader_and_shares_the_blocks() {
    let mut bench = Bench::new(16, Policy::default());
    let leader = bench.add(spec(prompt(10, 1), 4));
    let follower =
        bench
            .scheduler
            .add_follower(RequestId(99), spec(prompt(10, 1), 4), Some(leader));
    assert_eq!(rows(&bench.launch().unwrap()), [(0, 10)]);
    assert_eq!(bench.sequence(follower).state(), SequenceState::Blocked);
    bench.complete(1);
    let plan = bench.launch().unwrap();
    // The leader decodes, and the follower computes the last token of the prompt again.
    assert_eq!(rows(&plan), [(10, 1), (9, 1)]);
    let last = bench.sequence(leader).table.group(0).blocks[2];
    let copy = bench.sequence(follower).table.group(0).blocks[2];
    assert_eq!(plan.transfers.copies, [(last, copy)]);
    bench.complete(2);
    let (a, b) = (
        bench.sequence(leader).table.group(0).blocks,
        bench.sequence(follower).table.group(0).blocks,
    );
    assert_eq!(a[..2], b[..2]);
    assert_ne!(a[2], b[2]);
}

#[test]
fn a_follower_whose_leader_is_gone_computes_the_prompt_itself() {
    let mut bench = Bench::new(16, Policy::default());
    let leader = bench.add(spec(prompt(10, 1), 4));
    let id = RequestId(99);
    let follower = bench
        .scheduler
        .add_follower(id, spec(prompt(10, 1), 4), Some(leader));
    bench.scheduler.remove(leader);
    assert_eq!(rows(&bench.step()), [(0, 10)]);
    assert!(bench.running(follower));
}

#[test]
fn urgent_sequences_start_first_and_preempt_less_urgent_ones() {
    let policy = Policy {
        max_sequences: 1,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let usual = bench.add(spec(prompt(4, 1), 9));
    bench.step();
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(4, 2), 2)
    });
    let later = bench.add(spec(prompt(4, 3), 2));
    bench.step();
    bench.step();
    assert!(bench.running(urgent) && !bench.running(usual) && !bench.running(later));
    bench.scheduler.remove(urgent);
    bench.step();
    assert!(bench.running(usual), "it came before the later one");
}

#[test]
fn tenants_are_served_evenly_whatever_their_demand() {
    let policy = Policy {
        max_sequences: 1,
        ..Policy::default()
    };
    let mut bench = Bench::new(64, policy);
    let tenant = |name: &str| Some(Arc::from(name));
    let mut served = Vec::new();
    for i in 0..6 {
        bench.add(SequenceSpec {
            tenant: tenant("many"),
            ..spec(prompt(8, i), 1)
        });
    }
    for i in 6..8 {
        bench.add(SequenceSpec {
            tenant: tenant("few"),
            ..spec(prompt(8, i), 1)
        });
    }
    while let Some(plan) = bench.launch() {
        served.push(
            bench
                .sequence(plan.items[0].key)
                .spec
                .tenant
                .clone()
                .unwrap(),
        );
        for key in bench.complete(1) {
            bench.scheduler.remove(key);
        }
    }
    let first: Vec<&str> = served[..4].iter().map(|name| &**name).collect();
    assert_eq!(
        first.iter().filter(|name| **name == "few").count(),
        2,
        "{first:?}"
    );
    assert_eq!(served.len(), 8);
}

#[test]
fn a_swapped_out_sequence_resumes_where_it_stopped() {
    let mut bench = Bench::new(6, swapping());
    let first = bench.add(spec(prompt(11, 1), 8));
    let second = bench.add(spec(prompt(6, 2), 8));
    let mut out = Vec::new();
    while out.is_empty() {
        let plan = bench.step();
        out = plan.transfers.swap_out;
    }
    assert!(bench.running(first) && !bench.running(second));
    let at = bench.sequence(second).swapped.as_ref().unwrap().tokens;
    assert_eq!(out.len(), at.div_ceil(4));
    assert_eq!(bench.scheduler.counts().swaps, 1);
    bench.scheduler.remove(first);
    let plan = bench.step();
    // Complete blocks are still in the prefix cache; the rest comes back from the host.
    assert_eq!(rows(&plan), [(at, 1)]);
    let back: Vec<_> = plan
        .transfers
        .swap_in
        .iter()
        .map(|(host, _)| *host)
        .collect();
    let rest: Vec<_> = out[at / 4..].iter().map(|(_, host)| *host).collect();
    assert_eq!(back, rest);
    assert_eq!(bench.scheduler.counts().swapped_blocks, 0);
    assert_eq!(bench.scheduler.counts().swaps_in, 1);
}

/// I4: blocks that are being copied to the host are not reallocated before the step completes.
#[test]
fn swapped_out_blocks_stay_deferred_until_they_are_copied() {
    let mut bench = Bench::new(6, swapping());
    bench.add(spec(prompt(11, 1), 8));
    bench.add(spec(prompt(6, 2), 8));
    loop {
        let plan = bench.launch().unwrap();
        if !plan.transfers.swap_out.is_empty() {
            let counts = bench.scheduler.cache().counts();
            assert_eq!(counts.deferred, plan.transfers.swap_out.len());
            bench.complete(7);
            assert_eq!(bench.scheduler.cache().counts().deferred, 0);
            break;
        }
        bench.complete(7);
    }
}

/// I10: a sequence that is being swapped out starts again only when the copy has completed,
/// because the step may fail.
#[test]
fn a_sequence_is_swapped_in_only_after_the_step_that_swapped_it_out() {
    let policy = Policy {
        max_sequences: 1,
        ..swapping()
    };
    let mut bench = Bench::new(16, policy);
    let usual = bench.add(spec(prompt(6, 1), 8));
    bench.step();
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(4, 2), 2)
    });
    assert!(!bench.launch().unwrap().transfers.swap_out.is_empty());
    bench.scheduler.remove(urgent);
    assert!(bench.launch().is_none(), "its copy is in flight");
    bench.complete(7);
    assert!(!bench.launch().unwrap().transfers.swap_in.is_empty());
    assert!(bench.running(usual));
}

#[test]
fn a_sequence_whose_copy_is_lost_is_recomputed() {
    let mut bench = Bench::new(6, swapping());
    let first = bench.add(spec(prompt(11, 1), 8));
    let second = bench.add(spec(prompt(6, 2), 8));
    loop {
        let plan = bench.launch().unwrap();
        if plan.transfers.swap_out.is_empty() {
            bench.complete(7);
            continue;
        }
        bench.in_flight.clear();
        bench.scheduler.step_failed(&plan);
        bench.scheduler.remove(first);
        bench.scheduler.step_completed(plan.step);
        break;
    }
    bench.scheduler.clear_prefixes();
    let length = bench.sequence(second).tokens.len();
    assert_eq!(rows(&bench.step()), [(0, length)]);
    assert_eq!(bench.scheduler.counts().swapped_blocks, 0);
}

/// I12.
#[test]
fn a_cancelled_sequence_frees_its_host_memory() {
    let mut bench = Bench::new(6, swapping());
    bench.add(spec(prompt(11, 1), 8));
    let second = bench.add(spec(prompt(6, 2), 8));
    while bench.scheduler.counts().swaps == 0 {
        bench.step();
    }
    assert!(bench.scheduler.counts().swapped_blocks > 0);
    bench.scheduler.remove(second);
    assert_eq!(bench.scheduler.counts().swapped_blocks, 0);
}

fn turn(session: u64, prompt: Vec<u32>, new_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        session: Some(SessionId(session)),
        ..spec(prompt, new_tokens)
    }
}

fn retain(tokens: usize) -> BlockDisposition {
    BlockDisposition::Retain {
        tokens,
        pin_until: None,
    }
}

#[test]
fn a_session_continues_from_its_retained_blocks() {
    let mut bench = Bench::new(16, Policy::default());
    let first = bench.add(turn(50, prompt(9, 1), 1));
    bench.step();
    let mut tokens = bench.sequence(first).tokens.clone();
    bench.scheduler.close(first, retain(tokens.len()));
    assert_eq!(bench.scheduler.retained(SessionId(50)).tokens, 9);
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 3);
    tokens.extend([1, 2, 3]);
    bench.add(turn(50, tokens, 1));
    assert_eq!(rows(&bench.step()), [(9, 4)], "even within a block");
}

#[test]
fn a_rewound_turn_leaves_the_session_as_it_was() {
    let mut bench = Bench::new(16, Policy::default());
    let first = bench.add(turn(50, prompt(9, 1), 1));
    bench.step();
    let mut tokens = bench.sequence(first).tokens.clone();
    bench.scheduler.close(first, retain(tokens.len()));
    let before = bench.scheduler.cache().counts();
    tokens.extend(prompt(7, 2));
    let second = bench.add(turn(50, tokens.clone(), 5));
    bench.step();
    bench.step();
    bench.scheduler.close(second, retain(9));
    assert_eq!(bench.scheduler.retained(SessionId(50)).tokens, 9);
    let counts = bench.scheduler.cache().counts();
    assert_eq!(counts.referenced, before.referenced);
    // A turn that never started does not change what the session keeps.
    let third = bench.add(turn(50, tokens, 5));
    bench.scheduler.close(third, retain(9));
    assert_eq!(bench.scheduler.retained(SessionId(50)).tokens, 9);
    let (blocks, _) = bench.scheduler.end_session(SessionId(50));
    assert_eq!(blocks, before.referenced);
    bench.scheduler.audit().unwrap();
}

#[test]
fn the_least_recently_used_session_is_evicted_first() {
    let mut bench = Bench::new(8, Policy::default());
    for session in [50, 51] {
        let key = bench.add(turn(session, prompt(9, session as u32), 1));
        bench.step();
        bench.scheduler.close(key, retain(100));
    }
    bench.add(spec(prompt(14, 9), 1));
    bench.step();
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 0);
    assert_eq!(bench.scheduler.retained(SessionId(51)).blocks, 3);
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

#[test]
fn a_pinned_session_is_evicted_only_for_a_sequence_that_could_never_run_otherwise() {
    let policy = Policy {
        max_pinned_blocks: 3,
        ..Policy::default()
    };
    let mut bench = Bench::new(8, policy);
    let now = Instant::now();
    let until = now + Duration::from_secs(60);
    for session in [50, 51] {
        let key = bench.add(turn(session, prompt(9, session as u32), 1));
        bench.step();
        let disposition = BlockDisposition::Retain {
            tokens: 100,
            pin_until: Some(until),
        };
        bench.scheduler.close(key, disposition);
    }
    assert!(bench.scheduler.retained(SessionId(50)).pinned);
    assert!(
        !bench.scheduler.retained(SessionId(51)).pinned,
        "beyond the cap"
    );
    assert_eq!(bench.scheduler.counts().pins_refused, 1);
    let small = bench.add(spec(prompt(14, 9), 1));
    bench.step();
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 3);
    bench.scheduler.remove(small);
    // With the pin, it could never run, not even alone.
    let large = bench.add(spec(prompt(30, 9), 1));
    bench.step();
    assert!(bench.running(large));
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 0);
}

#[test]
fn a_session_is_evicted_after_its_pin_has_expired() {
    let policy = Policy {
        max_pinned_blocks: 8,
        ..Policy::default()
    };
    let mut bench = Bench::new(8, policy);
    let now = Instant::now();
    let key = bench.add(turn(50, prompt(9, 1), 1));
    bench.step();
    let disposition = BlockDisposition::Retain {
        tokens: 100,
        pin_until: Some(now),
    };
    bench.scheduler.close(key, disposition);
    assert_eq!(bench.scheduler.counts().pinned_blocks, 3);
    bench.scheduler.expire_pins(now);
    assert_eq!(bench.scheduler.counts().pinned_blocks, 0);
    let other = bench.add(spec(prompt(9, 3), 1));
    bench.step();
    bench.add(spec(prompt(10, 4), 1));
    bench.step();
    assert!(bench.running(other));
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 0);
}

/// I3: the pin of an ended session no longer counts against the cap.
#[test]
fn ending_a_session_removes_its_pin() {
    let policy = Policy {
        max_pinned_blocks: 3,
        ..Policy::default()
    };
    let mut bench = Bench::new(8, policy);
    let until = Instant::now() + Duration::from_secs(3600);
    for session in [50, 51] {
        let key = bench.add(turn(session, prompt(9, session as u32), 1));
        bench.step();
        let disposition = BlockDisposition::Retain {
            tokens: 100,
            pin_until: Some(until),
        };
        bench.scheduler.close(key, disposition);
        bench.scheduler.audit().unwrap();
        assert!(bench.scheduler.retained(SessionId(session)).pinned);
        bench.scheduler.end_session(SessionId(session));
        let counts = bench.scheduler.counts();
        assert_eq!((counts.retained_blocks, counts.pinned_blocks), (0, 0));
        bench.scheduler.audit().unwrap();
    }
    assert_eq!(bench.scheduler.counts().pins_refused, 0);
}

#[test]
fn a_fork_shares_the_blocks_and_copies_what_it_writes() {
    let mut bench = Bench::new(16, Policy::default());
    let first = bench.add(turn(50, prompt(9, 1), 1));
    bench.step();
    let tokens = bench.sequence(first).tokens.clone();
    bench.scheduler.close(first, retain(100));
    bench.scheduler.fork_session(SessionId(50), SessionId(51));
    assert_eq!(bench.scheduler.cache().counts().referenced, 3);
    let one = bench.add(turn(50, [&tokens[..], &[1, 2]].concat(), 3));
    let two = bench.add(turn(51, [&tokens[..], &[3, 4]].concat(), 3));
    let plan = bench.step();
    assert_eq!(rows(&plan), [(9, 3), (9, 3)]);
    assert_eq!(
        plan.transfers.copies.len(),
        1,
        "the second to write is the only holder"
    );
    let (a, b) = (
        bench.sequence(one).table.group(0).blocks,
        bench.sequence(two).table.group(0).blocks,
    );
    assert_eq!(a[..2], b[..2]);
    assert_ne!(a[2], b[2]);
}

/// I2.
#[test]
fn paused_sequences_do_not_run_and_resume_in_order() {
    let policy = Policy {
        max_sequences: 1,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let first = bench.add(spec(prompt(4, 1), 9));
    let second = bench.add(spec(prompt(4, 2), 9));
    bench.step();
    bench.scheduler.set_paused(first, true);
    bench.step();
    assert!(bench.running(second));
    assert_eq!(bench.scheduler.counts().paused, 1);
    bench.scheduler.set_paused(first, false);
    bench.scheduler.set_paused(second, true);
    bench.step();
    assert!(bench.running(first));
    bench.scheduler.audit().unwrap();
}

#[test]
fn a_follower_that_was_paused_does_not_wait_for_the_prompt_again() {
    let policy = Policy {
        max_sequences: 2,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let leader = bench.add(spec(prompt(10, 1), 9));
    let id = RequestId(99);
    let follower = bench
        .scheduler
        .add_follower(id, spec(prompt(10, 1), 9), Some(leader));
    bench.step();
    bench.step();
    // Both are preempted, so the leader no longer holds the prompt.
    for key in [leader, follower] {
        bench.scheduler.set_paused(key, true);
    }
    for seed in 2..4 {
        bench.add(spec(prompt(4, seed), 2));
    }
    bench.step();
    assert!(!bench.running(leader) && !bench.running(follower));
    bench.scheduler.set_paused(follower, false);
    assert_eq!(bench.sequence(follower).state(), SequenceState::Waiting);
}

#[test]
fn when_the_leader_goes_the_first_follower_computes_the_prompt_for_the_rest() {
    let mut bench = Bench::new(32, Policy::default());
    let leader = bench.add(spec(prompt(10, 1), 4));
    let followers: Vec<_> = (0..3)
        .map(|index| {
            let id = RequestId(90 + index);
            let spec = spec(prompt(10, 1), 4);
            bench.scheduler.add_follower(id, spec, Some(leader))
        })
        .collect();
    bench.scheduler.remove(leader);
    assert_eq!(rows(&bench.step()), [(0, 10)]);
    assert_eq!(rows(&bench.step()), [(10, 1), (9, 1), (9, 1)]);
    assert!(followers.iter().all(|key| bench.running(*key)));
}

#[test]
fn followers_do_not_wait_for_the_reader_of_their_leader() {
    let mut bench = Bench::new(32, Policy::default());
    let leader = bench.add(spec(prompt(10, 1), 4));
    let followers = [90, 91].map(|id| {
        let spec = spec(prompt(10, 1), 4);
        bench
            .scheduler
            .add_follower(RequestId(id), spec, Some(leader))
    });
    bench.scheduler.set_paused(leader, true);
    bench.step();
    bench.step();
    assert!(followers.iter().all(|key| bench.running(*key)));
}

/// Otherwise, both would wait for a reader, and with them everything behind `other`.
#[test]
fn paused_sequences_give_up_blocks_that_only_they_share() {
    let mut bench = Bench::new(10, Policy::default());
    let leader = bench.add(spec(prompt(30, 1), 9));
    let id = RequestId(90);
    let follower = bench
        .scheduler
        .add_follower(id, spec(prompt(30, 1), 9), Some(leader));
    bench.step();
    bench.step();
    assert_eq!(bench.scheduler.cache().available_blocks(), 1);
    for key in [leader, follower] {
        bench.scheduler.set_paused(key, true);
    }
    let other = bench.add(spec(prompt(18, 2), 2));
    bench.step();
    assert!(bench.running(other));
}

#[test]
fn sessions_are_not_evicted_in_vain() {
    let mut bench = Bench::new(16, Policy::default());
    let running = bench.add(spec(prompt(30, 1), 9));
    bench.step();
    for session in [50, 51] {
        let key = bench.add(turn(session, prompt(8, session as u32), 1));
        bench.step();
        bench.scheduler.close(key, retain(100));
    }
    // Too long for what is free and what the sessions keep.
    let waiting = bench.add(spec(prompt(50, 2), 1));
    bench.step();
    assert_eq!(bench.scheduler.counts().retained_sessions, 2);
    bench.scheduler.remove(running);
    bench.step();
    assert!(bench.running(waiting));
    assert_eq!(bench.scheduler.counts().retained_sessions, 1);
}

#[test]
fn a_turn_does_not_evict_its_own_session() {
    let mut bench = Bench::new(12, Policy::default());
    for session in [50, 51] {
        let key = bench.add(turn(session, prompt(15, session as u32), 1));
        bench.step();
        bench.scheduler.close(key, retain(100));
    }
    let mut tokens = prompt(15, 50);
    tokens.extend(prompt(20, 9));
    let next = bench.add(turn(50, tokens, 1));
    // Another session is used later, so this one is the least recently used.
    bench.scheduler.rewind_session(SessionId(51), 15);
    assert_eq!(rows(&bench.step()), [(15, 20)]);
    assert!(bench.running(next));
    assert_eq!(bench.scheduler.counts().retained_sessions, 0);
}

/// The block in which the turn departs from what the session keeps must be copied, and there is
/// none for the copy.
#[test]
fn a_turn_that_fits_only_without_its_session_runs() {
    let mut bench = Bench::new(8, Policy::default());
    let first = bench.add(turn(50, prompt(15, 1), 1));
    bench.step();
    bench.scheduler.close(first, retain(15));
    let mut tokens = prompt(11, 1);
    tokens.extend(prompt(20, 9));
    let next = bench.add(turn(50, tokens, 1));
    bench.step();
    assert!(bench.running(next));
}

#[test]
fn nothing_is_preempted_in_vain() {
    let mut bench = Bench::new(10, Policy::default());
    let usual = bench.add(spec(prompt(16, 1), 4));
    let low = SequenceSpec {
        priority: 1,
        ..spec(prompt(12, 2), 8)
    };
    let low = bench.add(low);
    bench.step();
    // It would not fit even if the less urgent one were preempted.
    let large = bench.add(spec(prompt(28, 3), 2));
    bench.step();
    assert!(bench.running(usual) && bench.running(low));
    bench.scheduler.remove(usual);
    bench.step();
    assert!(bench.running(large) && !bench.running(low));
}

/// Preempting the less urgent sequence would not make enough room for the new sequence and for
/// the next block of the running one.
#[test]
fn nothing_is_preempted_if_the_next_block_of_a_running_sequence_would_be_missing() {
    let mut bench = Bench::new(10, Policy::default());
    let usual = bench.add(spec(prompt(16, 1), 4));
    let low = bench.add(SequenceSpec {
        priority: 1,
        ..spec(prompt(12, 2), 8)
    });
    bench.step();
    let counts = bench.scheduler.cache().counts();
    assert_eq!((counts.referenced, counts.free), (7, 3));
    // With the three blocks of the less urgent sequence, exactly six would be free.
    let large = bench.add(spec(prompt(24, 3), 2));
    bench.launch().unwrap();
    assert!(bench.running(usual) && bench.running(low) && !bench.running(large));
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

/// A sequence starts only if one block per running sequence stays free, so that it is not
/// preempted for their next tokens at once.
#[test]
fn a_block_is_reserved_for_each_running_sequence() {
    let mut bench = Bench::new(4, Policy::default());
    let first = bench.add(spec(prompt(6, 1), 5));
    bench.step();
    assert_eq!(bench.scheduler.cache().counts().free, 2);
    // The two free blocks would hold the prompt of the second.
    let second = bench.add(spec(prompt(8, 2), 2));
    loop {
        bench.launch().unwrap();
        assert!(!bench.running(second), "the first needs a third block");
        if bench.complete(7) == [first] {
            break;
        }
    }
    bench.scheduler.remove(first);
    bench.step();
    assert!(bench.running(second));
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

/// Nothing is evicted or preempted for a new sequence while a step in flight frees enough
/// blocks.
#[test]
fn a_sequence_that_starts_waits_for_deferred_blocks() {
    let mut bench = Bench::new(8, Policy::default());
    let turn = bench.add(turn(50, prompt(9, 1), 1));
    bench.step();
    bench.scheduler.close(turn, retain(100));
    let cancelled = bench.add(spec(prompt(12, 2), 9));
    bench.launch().unwrap();
    bench.scheduler.remove(cancelled);
    let counts = bench.scheduler.cache().counts();
    assert_eq!((counts.deferred, counts.free), (3, 2));
    let newcomer = bench.add(spec(prompt(14, 3), 2));
    assert!(
        bench.launch().is_none(),
        "two of its four blocks are deferred"
    );
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 3);
    bench.complete(7);
    bench.launch().unwrap();
    assert!(bench.running(newcomer));
    assert_eq!(bench.scheduler.retained(SessionId(50)).blocks, 3);
}

/// A step copies out to the host before it copies in, so host blocks that it reads back are not
/// reallocated in the same step.
#[test]
fn host_memory_that_a_step_reads_is_not_written_by_it() {
    let policy = Policy {
        max_sequences: 2,
        ..swapping()
    };
    let mut bench = Bench::new(32, policy);
    let first = bench.add(spec(prompt(6, 1), 9));
    let second = bench.add(spec(prompt(6, 2), 9));
    bench.step();
    // The first sequence is swapped out while it is paused. It comes back in the same step in
    // which another paused sequence is swapped out for a new one.
    bench.scheduler.set_paused(first, true);
    bench.add(spec(prompt(6, 3), 9));
    let plan = bench.step();
    assert!(!plan.transfers.swap_out.is_empty());
    bench.scheduler.clear_prefixes();
    bench.scheduler.set_paused(first, false);
    bench.scheduler.set_paused(second, true);
    let third = bench.scheduler.running.keys()[1];
    bench.scheduler.set_paused(third, true);
    bench.add(spec(prompt(6, 4), 9));
    let plan = bench.step();
    let read: Vec<_> = plan
        .transfers
        .swap_in
        .iter()
        .map(|(host, _)| *host)
        .collect();
    let written = plan.transfers.swap_out.iter().map(|(_, host)| *host);
    assert!(!read.is_empty() && !plan.transfers.swap_out.is_empty());
    assert!(written.into_iter().all(|host| !read.contains(&host)));
}

fn embedding(prompt: Vec<u32>) -> SequenceSpec {
    SequenceSpec {
        task: Task::Embed(PooledTokens::All),
        ..spec(prompt, 0)
    }
}

fn scored(prompt: Vec<u32>, new_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        task: Task::Score { top: 0 },
        ..spec(prompt, new_tokens)
    }
}

/// Returns start, number of rows, whether the last row is sampled, `end` and report of each
/// item.
fn reports(plan: &StepPlan) -> Vec<(usize, usize, bool, bool, Report)> {
    let items = plan.items.iter();
    items
        .map(|item| {
            let PlanItem {
                start,
                count,
                sampled,
                end,
                report,
                ..
            } = item.clone();
            let next = start + count;
            let sample = !sampled.is_empty();
            assert_eq!(sampled, next - usize::from(sample)..next);
            (start, count, sample, end, report)
        })
        .collect()
}

#[test]
fn an_embedding_computes_its_whole_prompt_even_if_cached_and_publishes_it() {
    let policy = Policy {
        max_batch_tokens: 6,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    for _ in 0..2 {
        let key = bench.add(embedding(prompt(10, 1)));
        let first = bench.launch().unwrap();
        assert_eq!(reports(&first), [(0, 6, false, false, Report::Sum(0..6))]);
        let last = bench.launch().unwrap();
        assert_eq!(reports(&last), [(6, 4, false, true, Report::Sum(6..10))]);
        assert!(bench.launch().is_none(), "nothing follows the prompt");
        bench.complete(7);
        bench.complete(7);
        let end = bench.scheduler.commit_end(key);
        assert_eq!(end, finished(0, FinishReason::Stop));
        bench.scheduler.remove(key);
        assert_eq!(bench.scheduler.cache().counts().cached, 2);
    }
    let counts = bench.scheduler.counts();
    assert_eq!((counts.prefix_queries, counts.prefix_hits), (0, 0));
}

#[test]
fn an_embedding_of_one_token_reports_only_that_token() {
    let policy = Policy {
        max_batch_tokens: 6,
        ..Policy::default()
    };
    for (tokens, first, last) in [
        (PooledTokens::First, Report::Sum(0..1), Report::Nothing),
        (PooledTokens::Last, Report::Nothing, Report::Sum(9..10)),
    ] {
        let mut bench = Bench::new(16, policy);
        bench.add(SequenceSpec {
            task: Task::Embed(tokens),
            ..spec(prompt(10, 1), 0)
        });
        let begin = bench.launch().unwrap();
        assert_eq!(reports(&begin), [(0, 6, false, false, first)]);
        let end = bench.launch().unwrap();
        assert_eq!(reports(&end), [(6, 4, false, true, last)]);
    }
}

#[test]
fn whole_prompts_wait_for_a_step_that_has_room_for_them() {
    let policy = Policy {
        max_batch_tokens: 10,
        whole_prompts: true,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    for length in [4, 5, 3, 7, 10] {
        bench.add(embedding(prompt(length, length as u32)));
    }
    for lengths in [&[4, 5][..], &[3, 7], &[10]] {
        let plan = bench.launch().unwrap();
        let counts: Vec<usize> = plan.items.iter().map(|item| item.count).collect();
        assert_eq!(counts, lengths);
        assert!(plan.items.iter().all(|item| item.start == 0 && item.end));
    }
    assert!(bench.launch().is_none());
}

/// Rows whose report is in flight are neither reported twice nor computed again.
#[test]
fn a_report_that_was_launched_is_not_launched_again_after_a_restart() {
    let policy = Policy {
        max_sequences: 1,
        max_batch_tokens: 6,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let key = bench.add(embedding(prompt(14, 1)));
    bench.step();
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(4, 2), 2)
    });
    bench.step();
    bench.scheduler.remove(urgent);
    assert!(!bench.running(key));
    // The first block is cached. Two tokens of the second block were reported.
    let again = bench.step();
    assert_eq!(reports(&again), [(4, 6, false, false, Report::Sum(6..10))]);
    let last = bench.step();
    assert_eq!(reports(&last), [(10, 4, false, true, Report::Sum(10..14))]);
}

/// A sequence that only waits for its end to be committed is not started again.
#[test]
fn an_embedding_whose_end_is_in_flight_waits_for_it() {
    let policy = Policy {
        max_sequences: 1,
        ..Policy::default()
    };
    let mut bench = Bench::new(16, policy);
    let key = bench.add(embedding(prompt(6, 1)));
    bench.launch().unwrap();
    let urgent = bench.add(SequenceSpec {
        priority: -1,
        ..spec(prompt(4, 2), 1)
    });
    bench.launch().unwrap();
    bench.scheduler.remove(urgent);
    assert_eq!(bench.sequence(key).state(), SequenceState::Blocked);
    assert!(bench.launch().is_none());
    bench.complete(7);
    let end = bench.scheduler.commit_end(key);
    assert_eq!(end, finished(0, FinishReason::Stop));
}

#[test]
fn scored_rows_count_towards_the_sample_limit_of_a_step() {
    let policy = Policy {
        max_sequences: 4,
        max_batch_tokens: 16,
        ..Policy::default()
    };
    let mut bench = Bench::new(32, policy);
    let decode = bench.add(spec(prompt(3, 1), 20));
    bench.step();
    let key = bench.add(scored(prompt(8, 2), 2));
    let later = bench.add(spec(prompt(5, 3), 2));
    let first = bench.step();
    // The decode takes one of the four samples. No sample is left for the last sequence.
    let scores = |from: usize, to: usize| Report::Scores(from..to);
    assert_eq!(reports(&first)[1..], [(0, 3, false, false, scores(0, 3))]);
    let second = bench.step();
    assert_eq!(second.sample_count(), 4);
    assert_eq!(reports(&second)[1..], [(3, 3, false, false, scores(3, 6))]);
    bench.scheduler.remove(decode);
    let third = bench.step();
    assert_eq!(
        reports(&third),
        [
            (6, 2, true, false, scores(6, 7)),
            (0, 5, true, false, Report::Nothing)
        ]
    );
    // All samples have been committed, so the host knows the next tokens.
    let fourth = bench.launch().unwrap();
    let inputs: Vec<_> = fourth.items.iter().map(|item| item.input).collect();
    assert_eq!(inputs, [TokenInput::Known; 2]);
    assert_eq!(fourth.sample_count(), 2);
    for key in [key, later] {
        bench.scheduler.remove(key);
    }
}

#[test]
fn feedback_refers_to_the_sample_after_the_scored_rows() {
    let mut bench = Bench::new(32, Policy::default());
    bench.add(scored(prompt(8, 2), 3));
    bench.add(spec(prompt(5, 3), 3));
    bench.launch().unwrap();
    let next = bench.launch().unwrap();
    let inputs: Vec<_> = next.items.iter().map(|item| item.input).collect();
    let sample = |sample| TokenInput::Feedback { sample };
    assert_eq!(inputs, [sample(7), sample(8)]);
}

#[test]
fn a_prompt_that_is_only_scored_ends_with_it() {
    let mut bench = Bench::new(16, Policy::default());
    for (length, report) in [(6, Report::Scores(0..5)), (1, Report::Nothing)] {
        let key = bench.add(scored(prompt(length, 1), 0));
        let plan = bench.step();
        assert_eq!(reports(&plan), [(0, length, false, true, report)]);
        let end = bench.scheduler.commit_end(key);
        assert_eq!(end, finished(0, FinishReason::Length));
        bench.scheduler.remove(key);
    }
}

/// The retained tokens were not scored in this turn.
#[test]
fn a_scored_turn_recomputes_its_whole_session() {
    let mut bench = Bench::new(16, Policy::default());
    let first = bench.add(turn(1, prompt(10, 1), 2));
    bench.step();
    let disposition = BlockDisposition::Retain {
        tokens: 10,
        pin_until: None,
    };
    bench.scheduler.close(first, disposition);
    let second = SequenceSpec {
        task: Task::Score { top: 0 },
        ..turn(1, prompt(12, 1), 2)
    };
    let second = bench.add(second);
    assert_eq!(rows(&bench.step()), [(0, 12)]);
    bench.scheduler.close(second, disposition);
    assert_eq!(bench.scheduler.retained(SessionId(1)).tokens, 10);
}
/// Allows the token 7 this many times. It fails for other tokens, and if asked for a mask with
/// a count of 13.
#[derive(Clone, Debug)]
struct Sevens(usize);

impl Constraint for Sevens {
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), ConstraintError> {
        match self.0 {
            13 => Err(ConstraintError("thirteen".to_owned())),
            _ => {
                mask[0] = 1 << 7;
                Ok(())
            }
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.0 -= 1;
        match token {
            7 => Ok(()),
            other => Err(ConstraintError(format!("{other} is not 7"))),
        }
    }

    fn is_complete(&self) -> bool {
        self.0 == 0
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Adds a constraint that allows this many sevens.
fn sevens(count: usize, spec: SequenceSpec) -> SequenceSpec {
    SequenceSpec {
        constraint: Some(ConstraintState::new(Box::new(Sevens(count)), 32)),
        ..spec
    }
}

fn keys(plan: &StepPlan) -> Vec<SequenceKey> {
    plan.items.iter().map(|item| item.key).collect()
}

#[test]
fn a_constrained_sequence_is_planned_when_its_last_token_is_known() {
    let mut bench = Bench::new(64, Policy::default());
    let free = bench.add(spec(prompt(5, 1), 20));
    let held = bench.add(sevens(99, spec(prompt(6, 2), 20)));
    assert_eq!(keys(&bench.launch().unwrap()), [free, held]);
    // With two steps in flight, the unconstrained sequence continues by feedback, while the
    // constrained one waits for its token.
    for _ in 0..8 {
        let plan = bench.launch().unwrap();
        assert_eq!(keys(&plan), [free]);
        assert!(matches!(plan.items[0].input, TokenInput::Feedback { .. }));
        bench.complete(7);
        let plan = bench.launch().unwrap();
        assert_eq!(keys(&plan), [free, held]);
        assert!(matches!(plan.items[0].input, TokenInput::Feedback { .. }));
        assert_eq!(plan.items[1].input, TokenInput::Known);
        bench.complete(7);
    }
    assert_eq!(bench.sequence(held).generated(), 8);
    // Without the other sequence there is nothing to do until the token is committed.
    bench.scheduler.remove(free);
    assert!(bench.launch().is_none());
}

#[test]
fn a_constrained_prompt_is_computed_in_chunks_without_waiting() {
    let policy = Policy {
        max_batch_tokens: 4,
        ..Policy::default()
    };
    let mut bench = Bench::new(64, policy);
    bench.add(sevens(99, spec(prompt(10, 1), 20)));
    for expected in [(0, 4), (4, 4), (8, 2)] {
        assert_eq!(rows(&bench.launch().unwrap()), [expected]);
    }
    assert!(bench.launch().is_none(), "its sample is in flight");
}

#[test]
fn a_complete_constraint_finishes_its_sequence_with_stop() {
    let mut bench = Bench::new(64, Policy::default());
    let key = bench.add(sevens(2, spec(prompt(5, 1), 2)));
    bench.launch();
    assert_eq!(bench.complete_runs(&[7]), [(key, Commit::Continues)]);
    bench.launch();
    // This is also the last token that `max_tokens` allows.
    let stop = finished(1, FinishReason::Stop);
    assert_eq!(bench.complete_runs(&[7]), [(key, stop)]);
    bench.scheduler.remove(key);
    let long = bench.add(sevens(9, spec(prompt(5, 2), 1)));
    bench.launch();
    let length = finished(1, FinishReason::Length);
    assert_eq!(bench.complete_runs(&[7]), [(long, length)]);
}

#[test]
fn a_stop_token_is_not_passed_to_the_constraint() {
    let mut bench = Bench::new(64, Policy::default());
    let stops = SequenceSpec {
        stop_tokens: Arc::new([3]),
        ..spec(prompt(5, 1), 20)
    };
    let key = bench.add(sevens(9, stops));
    bench.launch();
    let stop = finished(1, FinishReason::Stop);
    assert_eq!(bench.complete_runs(&[3]), [(key, stop)]);
    assert_eq!(bench.sequence(key).tokens.last(), Some(&3));
}

#[test]
fn a_token_that_the_constraint_refuses_fails_its_sequence_and_is_not_appended() {
    let mut bench = Bench::new(64, Policy::default());
    let key = bench.add(sevens(9, spec(prompt(5, 1), 20)));
    bench.launch();
    let failed = bench.complete_runs(&[8]).remove(0).1;
    let refused = |error: &ConstraintError| error.0.contains("8 is not 7");
    assert!(matches!(failed, Commit::Failed { tokens: 0, error } if refused(&error)));
    assert_eq!(bench.sequence(key).generated(), 0);
    bench.scheduler.remove(key);
    bench.scheduler.audit().unwrap();
}

#[test]
fn masks_are_computed_for_sampled_items_and_failures_are_returned() {
    let policy = Policy {
        max_batch_tokens: 12,
        ..Policy::default()
    };
    let mut bench = Bench::new(64, policy);
    bench.add(spec(prompt(3, 1), 20));
    let fails = bench.add(sevens(13, spec(prompt(4, 2), 20)));
    let good = bench.add(sevens(12, spec(prompt(4, 3), 20)));
    // Its first chunk is not sampled, so its constraint is not asked for a mask.
    let later = bench.add(sevens(13, spec(prompt(9, 4), 20)));
    let plan = bench.launch().unwrap();
    assert_eq!(keys(&plan).len(), 4);
    let failed = bench.scheduler.refresh_masks(&plan);
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].0, fails);
    let mask = |key| bench.sequence(key).spec.constraint.as_ref().unwrap().mask();
    assert_eq!(mask(good)[0], 1 << 7);
    assert!(mask(later).is_empty(), "its constraint was not asked");
}

#[test]
fn a_preempted_sequence_keeps_the_state_of_its_constraint() {
    for policy in [Policy::default(), swapping()] {
        let mut bench = Bench::new(8, policy);
        let first = bench.add(spec(prompt(10, 1), 20));
        let held = bench.add(sevens(9, spec(prompt(10, 2), 20)));
        let mut finished = Vec::new();
        for _ in 0..60 {
            if bench.launch().is_none() {
                break;
            }
            for key in bench.complete(7) {
                assert_eq!(
                    bench.sequence(key).generated(),
                    if key == held { 9 } else { 20 }
                );
                bench.scheduler.remove(key);
                finished.push(key);
            }
        }
        assert!(bench.scheduler.counts().preemptions > 0);
        finished.sort_unstable();
        assert_eq!(finished, [first, held]);
    }
}

#[test]
fn sequences_with_different_salts_share_nothing() {
    let salted = |salt: &str, spec: SequenceSpec| SequenceSpec {
        salt: Some(salt.into()),
        ..spec
    };
    let mut bench = Bench::new(32, Policy::default());
    let first = bench.add(salted("one", turn(50, prompt(9, 1), 1)));
    bench.step();
    let tokens = bench.sequence(first).tokens.clone();
    bench.scheduler.close(first, retain(tokens.len()));
    // Neither another salt nor no salt finds the blocks in the cache.
    bench.add(salted("two", spec(prompt(9, 1), 1)));
    assert_eq!(rows(&bench.step()), [(0, 9)]);
    bench.add(salted("one", spec(prompt(9, 1), 1)));
    assert_eq!(rows(&bench.step()), [(8, 1)], "two whole blocks are known");
    bench.add(spec(prompt(9, 1), 1));
    assert_eq!(rows(&bench.step()), [(0, 9)]);
    // A fork has the salt of its session. A turn with another salt does not reuse what its
    // session keeps.
    bench.scheduler.fork_session(SessionId(50), SessionId(51));
    bench.add(salted("one", turn(51, prompt(12, 1), 1)));
    assert_eq!(rows(&bench.step()), [(9, 3)]);
    bench.add(salted("two", turn(50, prompt(12, 1), 1)));
    assert_eq!(
        rows(&bench.step()),
        [(8, 4)],
        "the second sequence left two blocks"
    );
    assert_eq!(bench.scheduler.retained(SessionId(50)).tokens, 0);
    // A sequence with another salt does not follow the leader.
    let leader = bench.add(salted("one", spec(prompt(9, 7), 1)));
    let other = salted("two", spec(prompt(9, 7), 1));
    bench
        .scheduler
        .add_follower(RequestId(90), other, Some(leader));
    assert_eq!(rows(&bench.step()), [(0, 9), (0, 9)]);
}

mod windows;
