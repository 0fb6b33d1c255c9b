//! Runs of several tokens: what is appended, where a run is cut, and which keys and values
//! count.

use super::*;
use crate::cache::BlockId;

/// Adds drafts to a planned item, as a planner that speculates would: their rows are computed
/// and sampled, too.
fn draft(bench: &mut Bench, drafts: usize) -> StepPlan {
    let mut plan = bench.launch().unwrap();
    let item = &mut plan.items[0];
    let sequence = &bench.scheduler.sequences[item.key];
    assert_eq!(sequence.launched_tokens, item.start + item.count);
    let mut transfers = StepPlan {
        step: plan.step,
        ..StepPlan::default()
    };
    assert!((bench.scheduler).make_room(item.key, drafts, &mut transfers));
    assert!(transfers.transfers.is_empty());
    item.count += drafts;
    item.sampled.end += drafts;
    bench.scheduler.sequences[item.key].launched_tokens += drafts;
    bench.in_flight.pop_back();
    bench.in_flight.push_back(plan.clone());
    plan
}

/// Returns how many of a sequence's tokens are in complete blocks of the prefix cache.
fn published(bench: &Bench, tokens: &[u32]) -> usize {
    bench
        .scheduler
        .cache()
        .lookup(None, tokens, tokens.len())
        .tokens
}

/// Returns the numbers of launched and of written tokens.
fn counters(bench: &Bench, key: SequenceKey) -> (usize, usize) {
    let sequence = bench.sequence(key);
    (sequence.launched_tokens, sequence.written_tokens)
}

#[test]
fn the_tokens_of_a_run_are_computed_by_the_next_step_and_published_after_it() {
    let mut bench = Bench::new(16, Policy::default());
    let key = bench.add(spec(prompt(5, 1), 20));
    bench.launch();
    assert_eq!(bench.complete_runs(&[1, 2, 3]), [(key, Commit::Continues)]);
    assert_eq!(bench.sequence(key).generated(), 3);
    assert_eq!(counters(&bench, key), (5, 5));
    let tokens = bench.sequence(key).tokens.clone();
    assert_eq!(published(&bench, &tokens), 4);
    let plan = bench.launch().unwrap();
    assert_eq!(rows(&plan), [(5, 3)]);
    assert_eq!(plan.items[0].sampled, 7..8);
    assert_eq!(plan.items[0].input, TokenInput::Known);
    bench.complete(4);
    assert_eq!(counters(&bench, key), (8, 8));
    assert_eq!(published(&bench, &tokens), 8);
    assert_eq!(rows(&bench.launch().unwrap()), [(8, 1)]);
}

#[test]
fn a_run_is_cut_at_the_token_that_ends_its_sequence() {
    use FinishReason::{Length, Stop};
    let stops = |new_tokens| SequenceSpec {
        stop_tokens: Arc::new([3]),
        ..spec(prompt(6, 1), new_tokens)
    };
    let cases: [(SequenceSpec, [u32; 4], Commit, &[u32]); 8] = [
        (stops(9), [1, 2, 4, 5], Commit::Continues, &[1, 2, 4, 5]),
        (stops(9), [3, 1, 3, 1], finished(1, Stop), &[3]),
        (stops(9), [1, 3, 3, 1], finished(2, Stop), &[1, 3]),
        (stops(9), [1, 2, 2, 3], finished(4, Stop), &[1, 2, 2, 3]),
        (stops(3), [1, 2, 4, 3], finished(3, Length), &[1, 2, 4]),
        (stops(3), [1, 2, 3, 3], finished(3, Stop), &[1, 2, 3]),
        // The constraint is complete, and would fail with any further token.
        (sevens(2, stops(9)), [7; 4], finished(2, Stop), &[7, 7]),
        (sevens(9, stops(2)), [7; 4], finished(2, Length), &[7, 7]),
    ];
    for (spec, run, expected, answer) in cases {
        let mut bench = Bench::new(16, Policy::default());
        let key = bench.add(spec);
        bench.launch();
        assert_eq!(bench.complete_runs(&run), [(key, expected)], "{run:?}");
        assert_eq!(bench.sequence(key).tokens[6..], *answer, "{run:?}");
        assert_eq!(counters(&bench, key), (6, 6));
        bench.scheduler.remove(key);
        let counts = bench.scheduler.cache().counts();
        assert_eq!((counts.cached, counts.free), (1, 15), "{run:?}");
        bench.scheduler.audit().unwrap();
    }
}

#[test]
fn a_token_that_the_constraint_refuses_leaves_those_before_it() {
    let mut bench = Bench::new(16, Policy::default());
    let key = bench.add(sevens(9, spec(prompt(6, 1), 9)));
    bench.launch();
    let (_, failed) = bench.complete_runs(&[7, 7, 8, 7]).remove(0);
    let refused = |error: &ConstraintError| error.0.contains("8 is not 7");
    assert!(matches!(&failed, Commit::Failed { tokens: 2, error } if refused(error)));
    assert_eq!(bench.sequence(key).tokens[6..], [7, 7]);
}

#[test]
fn a_run_whose_sequence_is_gone_is_discarded() {
    let mut bench = Bench::new(16, Policy::default());
    let key = bench.add(spec(prompt(6, 1), 9));
    bench.launch();
    bench.scheduler.remove(key);
    assert_eq!(bench.complete_runs(&[1, 2]), [(key, Commit::Discarded)]);
}

#[test]
fn only_the_rows_of_committed_drafts_count_as_written() {
    let drafts = [51, 52, 53];
    for (run, written) in [
        (&[51, 52, 53, 54][..], 10), // all drafts are right
        (&[51, 70][..], 8),
        (&[70][..], 7),
    ] {
        let mut bench = Bench::new(16, Policy::default());
        let key = bench.add(spec(prompt(6, 1), 20));
        bench.step();
        let plan = draft(&mut bench, drafts.len());
        assert_eq!(rows(&plan), [(6, 4)]);
        assert_eq!(plan.items[0].sampled, 6..10);
        bench.scheduler.step_succeeded(&plan);
        assert_eq!(counters(&bench, key), (10, 7), "no draft is right yet");
        assert_eq!(bench.complete_runs(run), [(key, Commit::Continues)]);
        assert_eq!(counters(&bench, key), (written, written), "{run:?}");
        let tokens = bench.sequence(key).tokens.clone();
        assert_eq!(tokens[7..], *run);
        assert_eq!(published(&bench, &tokens), written / 4 * 4, "{run:?}");
        // The positions behind them are computed again.
        let next = bench.launch().unwrap();
        assert_eq!(rows(&next), [(written, tokens.len() - written)]);
    }
}

/// I11.
#[test]
fn discarded_drafts_are_neither_published_nor_retained() {
    let mut bench = Bench::new(16, Policy::default());
    let stops = SequenceSpec {
        stop_tokens: Arc::new([52]),
        ..turn(50, prompt(6, 1), 20)
    };
    let key = bench.add(stops);
    bench.step();
    let drafts = [51, 52, 53, 54, 55];
    draft(&mut bench, drafts.len());
    let mut discarded = bench.sequence(key).tokens.clone();
    discarded.extend(drafts);
    let stop = finished(2, FinishReason::Stop);
    assert_eq!(bench.complete_runs(&drafts), [(key, stop)]);
    assert_eq!(published(&bench, &discarded), 8);
    bench.scheduler.close(key, retain(discarded.len()));
    // The stop token itself is computed if the session goes on.
    assert_eq!(bench.scheduler.retained(SessionId(50)).tokens, 8);
    bench.scheduler.audit().unwrap();
}

#[test]
fn a_sequence_that_is_swapped_out_with_drafts_resumes_behind_the_committed_ones() {
    let mut bench = Bench::new(16, swapping());
    let key = bench.add(spec(prompt(6, 1), 20));
    bench.step();
    draft(&mut bench, 3);
    let mut away = StepPlan {
        step: bench.scheduler.launched.next(),
        ..StepPlan::default()
    };
    bench
        .scheduler
        .preempt(key, &mut away, room::Keep::Anything);
    bench.scheduler.launched = away.step;
    bench.in_flight.push_back(away);
    bench.complete_runs(&[51, 70]);
    bench.complete_runs(&[]);
    let back = bench.launch().unwrap();
    assert_eq!(rows(&back), [(8, 1)]);
    assert!(!back.transfers.swap_in.is_empty());
}

#[test]
fn each_group_is_swapped_in_where_it_was_when_drafts_are_dropped() {
    let mut bench = super::windows::bench(40, swapping());
    let key = bench.add(spec(prompt(6, 1), 20));
    bench.step();
    draft(&mut bench, 3);
    let places = |bench: &Bench| -> Vec<(usize, usize, BlockId)> {
        let table = &bench.sequence(key).table;
        let places = (0..2).flat_map(|group| (0..4).map(move |index| (group, index)));
        places
            .filter_map(|(group, index)| Some((group, index, table.block(group, index)?)))
            .collect()
    };
    let before = places(&bench);
    let mut away = StepPlan {
        step: bench.scheduler.launched.next(),
        ..StepPlan::default()
    };
    bench
        .scheduler
        .preempt(key, &mut away, room::Keep::Anything);
    bench.scheduler.launched = away.step;
    let hosts = away.transfers.swap_out.clone();
    assert_eq!(hosts.len(), 6, "three blocks of each group");
    bench.in_flight.push_back(away);
    bench.complete_runs(&[51, 70]);
    bench.complete_runs(&[]);
    let back = bench.launch().unwrap();
    assert_eq!(rows(&back), [(8, 1)]);
    let after = places(&bench);
    assert_eq!(
        back.transfers.swap_in.len(),
        2 + 2 - 2 * bench.sequence(key).table.published()
    );
    for (host, block) in &back.transfers.swap_in {
        let (old, _) = hosts.iter().find(|(_, other)| other == host).unwrap();
        let place = |places: &[(usize, usize, BlockId)], block| {
            let found = places.iter().find(|(.., other)| *other == block);
            found.map(|(group, index, _)| (*group, *index))
        };
        assert_eq!(place(&after, *block), place(&before, *old));
    }
}
