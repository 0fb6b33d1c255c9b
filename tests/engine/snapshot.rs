//! Snapshots of an engine's state, and cancelling requests by their ids.

use common::requests::{idle, ids, prompt, request};
use quell::internals::runner::StateInfo;
use quell::{
    BlockUse, CancelReason, Engine, EngineConfig, EngineFault, EngineSnapshot, Outcome, RequestId,
    RequestPhase, RequestQuery, Shutdown, TokenStream,
};
use sim::{SimOptions, engine, expected};
use std::collections::HashMap;
use std::sync::mpsc;

/// Settings with which unread requests pause soon, and slow readers are never cancelled.
fn patient() -> EngineConfig {
    EngineConfig {
        stream_buffer: 4,
        slow_consumer_deadline: None,
        ..EngineConfig::default()
    }
}

/// Waits until every open request is paused for its reader and no step is in flight.
fn wait_until_all_paused(engine: &Engine) -> EngineSnapshot {
    loop {
        let snapshot = engine.snapshot().wait().unwrap();
        let paused = |phase| phase == RequestPhase::Paused;
        let all = snapshot
            .requests
            .iter()
            .all(|request| paused(request.phase));
        if all && snapshot.steps_in_flight == 0 && snapshot.stats.closing == 0 {
            return snapshot;
        }
    }
}

fn outcome(stream: TokenStream) -> Outcome {
    let last = stream.blocking().last().expect("a terminal").unwrap();
    last.finish.expect("the last chunk has it").outcome
}

/// I3: the block map adds up to the statistics, and each owner holds the blocks mapped to it.
fn check_owners(snapshot: &EngineSnapshot) {
    let map = snapshot.blocks.as_slice();
    let counts = snapshot.stats.blocks;
    let count = |wanted: fn(&BlockUse) -> bool| map.iter().filter(|used| wanted(used)).count();
    assert_eq!(map.len(), counts.total);
    assert_eq!(count(|used| *used == BlockUse::Free), counts.free);
    assert_eq!(count(|used| *used == BlockUse::Cached), counts.cached);
    assert_eq!(count(|used| *used == BlockUse::Deferred), counts.deferred);
    let mut holders: HashMap<u32, Vec<usize>> = HashMap::new();
    for (place, request) in snapshot.requests.iter().enumerate() {
        for &block in &request.blocks {
            holders.entry(block).or_default().push(place);
        }
    }
    let mut kept = vec![0; snapshot.sessions.len()];
    for (block, &used) in (0..).zip(map) {
        let holders = holders.get(&block).map_or(&[][..], Vec::as_slice);
        match used {
            BlockUse::Free | BlockUse::Cached | BlockUse::Deferred => assert!(holders.is_empty()),
            BlockUse::Request(place) => assert_eq!(holders, [place as usize]),
            BlockUse::Session(place) => {
                assert!(holders.is_empty());
                kept[place as usize] += 1;
            }
            // A session may be among the owners.
            BlockUse::Shared => assert!(holders.len() + snapshot.sessions.len() > 1),
            other => panic!("block {block} is {other:?}"),
        }
    }
    for (session, kept) in snapshot.sessions.iter().zip(kept) {
        assert!(kept <= session.retained.blocks);
    }
}

#[test]
fn the_block_map_names_the_owner_of_every_block() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, patient());
        // Cached: the blocks that an ended request leaves behind.
        let ended = engine.generate(request(prompt(1, 12), 2)).unwrap();
        ended.complete_blocking().unwrap();
        // Kept: the blocks of a session between its turns.
        let session = engine.session();
        let turn = session.generate(request(prompt(2, 9), 3)).unwrap();
        turn.complete_blocking().unwrap();
        // Shared: the prompt of two samples. Owned: their other blocks.
        let samples = engine
            .generate_samples(request(prompt(3, 8), 200), 2)
            .unwrap();
        let alone = engine.generate(request(prompt(4, 8), 200)).unwrap();
        let snapshot = wait_until_all_paused(&engine);
        check_owners(&snapshot);

        let order: Vec<_> = samples
            .iter()
            .chain([&alone])
            .map(TokenStream::id)
            .collect();
        let shown: Vec<_> = snapshot.requests.iter().map(|request| request.id).collect();
        assert_eq!(shown, order);
        let used = |wanted: BlockUse| {
            let map = snapshot.blocks.as_slice().iter();
            map.filter(|used| **used == wanted).count()
        };
        // The answers share blocks too, because the simulated model gives both samples the same
        // answer.
        assert!(used(BlockUse::Shared) >= 2, "depth {depth}");
        assert_eq!(
            used(BlockUse::Request(2)),
            snapshot.requests[2].blocks.len()
        );
        assert!(used(BlockUse::Cached) >= 3);
        let [state] = snapshot.sessions.as_slice() else {
            panic!("{:?}", snapshot.sessions);
        };
        assert_eq!(state.id, session.id());
        assert_eq!(state.retained, session.retained().unwrap());
        assert_eq!(used(BlockUse::Session(0)), state.retained.blocks);
        for shown in &snapshot.requests {
            assert_eq!((shown.prompt_tokens, shown.session), (8, None));
            assert!(shown.generated_tokens >= 4);
            let tokens = shown.prompt_tokens + shown.generated_tokens;
            assert!((shown.prompt_tokens..=tokens).contains(&shown.computed_tokens));
        }
        assert_eq!(snapshot.requests.len(), snapshot.stats.open);
        drop((samples, alone, session));
        idle(&engine);
    }
}

#[test]
fn a_snapshot_distinguishes_waiting_and_running_requests() {
    let (open, gate) = mpsc::channel::<()>();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_sequences: 1,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let mut first = engine
        .generate(request(prompt(1, 6), 20).tenant("one"))
        .unwrap();
    open.send(()).unwrap();
    first.next_blocking().unwrap().unwrap();
    let second = engine
        .generate(request(prompt(2, 6), 20).priority(3))
        .unwrap();
    let asked = engine.snapshot();
    // Let the current step complete: commands that were posted meanwhile are then answered.
    open.send(()).unwrap();
    let snapshot = asked.wait().unwrap();
    let [running, waiting] = snapshot.requests.as_slice() else {
        panic!("{snapshot:?}");
    };
    assert_eq!(
        (running.id, running.phase),
        (first.id(), RequestPhase::Running)
    );
    assert_eq!(running.tenant.as_deref(), Some("one"));
    assert_eq!(
        (waiting.id, waiting.phase),
        (second.id(), RequestPhase::Waiting)
    );
    assert_eq!(waiting.priority, 3);
    assert!(waiting.blocks.is_empty() && !running.blocks.is_empty());
    check_owners(&snapshot);
    drop(open);
    assert_eq!(outcome(first), Outcome::Length);
    assert_eq!(
        ids(&second.complete_blocking().unwrap()),
        expected(&prompt(2, 6), 20)
    );
}

#[test]
fn a_preempted_request_is_shown_as_preempted() {
    let (open, gate) = mpsc::channel::<()>();
    let options = SimOptions {
        blocks: 8,
        gate: Some(gate),
        ..SimOptions::default()
    };
    let engine = engine(options, EngineConfig::default());
    let streams: Vec<_> = (0..2)
        .map(|index| engine.generate(request(prompt(index, 10), 20)).unwrap())
        .collect();
    let snapshot = loop {
        let asked = engine.snapshot();
        open.send(()).unwrap();
        let snapshot = asked.wait().unwrap();
        check_owners(&snapshot);
        assert!(snapshot.stats.open > 0, "no request was preempted");
        if snapshot.stats.preemptions > 0 {
            break snapshot;
        }
    };
    let shown: Vec<_> = snapshot
        .requests
        .iter()
        .map(|shown| (shown.id, shown.phase))
        .collect();
    let [first, second] = [streams[0].id(), streams[1].id()];
    assert_eq!(
        shown,
        [
            (first, RequestPhase::Running),
            (second, RequestPhase::Preempted)
        ]
    );
    assert!(snapshot.requests[1].blocks.is_empty());
    drop(open);
    for (index, stream) in streams.into_iter().enumerate() {
        let tokens = ids(&stream.complete_blocking().unwrap());
        assert_eq!(tokens, expected(&prompt(index, 10), 20));
    }
}

#[test]
fn a_preempted_paused_request_holds_no_blocks() {
    let options = SimOptions {
        blocks: 8,
        ..SimOptions::default()
    };
    let engine = engine(options, patient());
    let paused = engine.generate(request(prompt(1, 10), 20)).unwrap();
    wait_until_all_paused(&engine);
    // This request needs the whole cache, so the paused one is preempted.
    let large = engine.generate(request(prompt(2, 30), 2)).unwrap();
    large.complete_blocking().unwrap();
    let snapshot = engine.snapshot().wait().unwrap();
    let [shown] = snapshot.requests.as_slice() else {
        panic!("{snapshot:?}");
    };
    assert_eq!((shown.id, shown.phase), (paused.id(), RequestPhase::Paused));
    assert!(shown.blocks.is_empty());
    assert_eq!(snapshot.stats.preemptions, 1);
    assert_eq!(
        ids(&paused.complete_blocking().unwrap()),
        expected(&prompt(1, 10), 20)
    );
}

/// I6: the receipt is sent once the blocks are free.
#[test]
fn cancelling_a_request_by_its_id_frees_its_blocks() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            ..SimOptions::default()
        };
        let engine = engine(options, patient());
        let stream = engine.generate(request(prompt(1, 9), 200)).unwrap();
        let other = engine.generate(request(prompt(2, 9), 200)).unwrap();
        let before = wait_until_all_paused(&engine);
        let id = stream.id();
        let receipt = engine.cancel_request(id, CancelReason::Explicit).wait();
        let receipt = receipt.unwrap().expect("it is open");
        assert_eq!(receipt.blocks_freed, before.requests[0].blocks.len());
        assert_eq!(
            receipt.tokens_generated,
            before.requests[0].generated_tokens
        );
        let after = wait_until_all_paused(&engine);
        assert_eq!(
            after.stats.blocks.referenced + receipt.blocks_freed,
            before.stats.blocks.referenced
        );
        let left: Vec<_> = after.requests.iter().map(|request| request.id).collect();
        assert_eq!(left, [other.id()]);
        let end = after.recent_ends[0];
        assert_eq!(
            (end.id, end.outcome, end.reason),
            (id, "cancelled", "explicit")
        );
        assert_eq!(end.blocks_freed, receipt.blocks_freed);
        assert_eq!(end.posted_to_freed, receipt.freed_at - receipt.posted_at);
        assert_eq!(outcome(stream), Outcome::Cancelled(CancelReason::Explicit));
        drop(other);
        idle(&engine);
    }
}

#[test]
fn open_requests_are_found_by_their_id_label_and_owner() {
    let engine = engine(SimOptions::default(), patient());
    let open = |label: &str, owner| {
        let request = request(prompt(1, 9), 200).label(label).owner(owner);
        engine.generate(request).unwrap()
    };
    let streams = [open("a", 1), open("b", 1), open("a", 2)];
    let [one, two, three] = [&streams[0], &streams[1], &streams[2]].map(TokenStream::id);
    let find = |query| engine.find(query).wait().unwrap();
    let any = RequestQuery::default;
    assert_eq!(find(any()), [one, two, three]);
    assert_eq!(find(any().label("a")), [one, three]);
    assert_eq!(find(any().owner(1)), [one, two]);
    assert_eq!(find(any().label("a").owner(2)), [three]);
    assert_eq!(find(any().id(two)), [two]);
    assert_eq!(find(any().id(two).owner(1)), [two]);
    assert_eq!(find(any().id(two).owner(2)), []);
    assert_eq!(find(any().label("c")), []);
    let snapshot = engine.snapshot().wait().unwrap();
    let owners: Vec<_> = snapshot.requests.iter().map(|open| open.owner).collect();
    assert_eq!(owners, [Some(1), Some(1), Some(2)]);
    drop(streams);
    idle(&engine);
    assert_eq!(find(any()), []);
}

/// Checks I8.
#[test]
fn a_second_cancel_by_id_changes_nothing() {
    let engine = engine(SimOptions::default(), patient());
    let stream = engine.generate(request(prompt(1, 9), 200)).unwrap();
    let first = engine.cancel_request(stream.id(), CancelReason::Disconnect);
    let second = engine.cancel_request(stream.id(), CancelReason::Explicit);
    assert!(first.wait().unwrap().is_some());
    assert_eq!(second.wait().unwrap(), None);
    assert_eq!(
        outcome(stream),
        Outcome::Cancelled(CancelReason::Disconnect)
    );
    assert_eq!(idle(&engine).outcomes.cancelled, 1);
}

#[test]
fn cancelling_an_id_that_is_not_open_returns_none() {
    let engine = engine(SimOptions::default(), patient());
    let ended = engine.generate(request(prompt(1, 9), 2)).unwrap();
    let ended_id = ended.id();
    ended.complete_blocking().unwrap();
    let open = engine.generate(request(prompt(2, 9), 20)).unwrap();
    for id in [
        ended_id,
        RequestId::from_u64(0),
        RequestId::from_u64(u64::MAX),
    ] {
        let cancelled = engine.cancel_request(id, CancelReason::Explicit).wait();
        assert_eq!(cancelled.unwrap(), None, "{id}");
    }
    assert_eq!(
        ids(&open.complete_blocking().unwrap()),
        expected(&prompt(2, 9), 20)
    );
}

#[test]
fn the_last_64_ends_are_remembered() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    let ended: Vec<_> = (0..70)
        .map(|index| {
            let stream = engine.generate(request(prompt(index, 5), 2)).unwrap();
            let id = stream.id();
            stream.complete_blocking().unwrap();
            id
        })
        .collect();
    idle(&engine);
    let snapshot = engine.snapshot().wait().unwrap();
    let shown: Vec<_> = snapshot.recent_ends.iter().map(|end| end.id).collect();
    let latest_first: Vec<_> = ended.into_iter().rev().take(64).collect();
    assert_eq!(shown, latest_first);
    let length = |end: &quell::RequestEnd| (end.outcome, end.generated_tokens);
    assert!(
        snapshot
            .recent_ends
            .iter()
            .all(|end| length(end) == ("length", 2))
    );
}

#[test]
fn an_ended_engine_reports_why_it_ended() {
    let engine = engine(SimOptions::default(), EngineConfig::default());
    engine.shutdown(Shutdown::Abort).wait().unwrap();
    let shutdown = |fault| matches!(fault, EngineFault::Shutdown);
    assert!(engine.snapshot().wait().is_err_and(shutdown));
    assert!(engine.inspect().wait().is_err_and(shutdown));
    let cancelled = engine.cancel_request(RequestId::from_u64(1), CancelReason::Explicit);
    assert!(cancelled.wait().is_err_and(shutdown));
}

#[tokio::test(flavor = "current_thread")]
async fn snapshots_and_cancels_can_be_awaited() {
    let engine = engine(SimOptions::default(), patient());
    let stream = engine.generate(request(prompt(1, 9), 200)).unwrap();
    assert_eq!(engine.inspect().await.unwrap().open, 1);
    assert_eq!(engine.snapshot().await.unwrap().requests[0].id, stream.id());
    let receipt = engine
        .cancel_request(stream.id(), CancelReason::Explicit)
        .await;
    assert!(receipt.unwrap().is_some());
    assert_eq!(engine.inspect().await.unwrap().open, 0);
}

#[test]
fn a_snapshots_json_encodes_blocks_as_runs() {
    let engine = engine(SimOptions::default(), patient());
    let stream = engine.generate(request(prompt(1, 8), 200)).unwrap();
    let snapshot = wait_until_all_paused(&engine);
    let json = serde_json::to_value(&snapshot).unwrap();
    assert_eq!(json["requests"][0]["id"], stream.id().as_u64());
    assert_eq!(json["requests"][0]["phase"], "paused");
    assert!(json["requests"][0]["age_ms"].is_f64());
    let numbers = |value: &serde_json::Value| -> Vec<u64> {
        let numbers = value.as_array().unwrap().iter();
        numbers.map(|number| number.as_u64().unwrap()).collect()
    };
    // Blocks are handed out in order, so there is one run and the free rest.
    let held = snapshot.requests[0].blocks.len() as u64;
    assert_eq!(numbers(&json["requests"][0]["blocks"]), [0, held]);
    assert_eq!(numbers(&json["blocks"]), [4, held, 0, 256 - held]);
    assert_eq!(json["stats"]["blocks"]["referenced"], held);
}

/// The map of the slots adds up to the statistics, and each request holds the slots mapped to it.
#[test]
fn a_snapshot_shows_who_holds_each_state() {
    let options = SimOptions {
        states: Some(StateInfo {
            slots: 12,
            interval: 8,
        }),
        ..SimOptions::default()
    };
    let engine = engine(options, patient());
    let without = SimOptions::default();
    let plain = sim::engine(without, patient()).snapshot().wait().unwrap();
    assert!(plain.states.as_slice().is_empty());

    let session = engine.session();
    let turn = session.generate(request(prompt(9, 20), 2)).unwrap();
    turn.complete_blocking().unwrap();
    let streams: Vec<_> = (0..3)
        .map(|index| engine.generate(request(prompt(index, 20), 40)).unwrap())
        .collect();
    let snapshot = wait_until_all_paused(&engine);
    let map = snapshot.states.as_slice();
    let counts = snapshot.stats.states;
    let count = |wanted: fn(&BlockUse) -> bool| map.iter().filter(|used| wanted(used)).count();
    assert_eq!(map.len(), 12);
    assert_eq!(count(|used| *used == BlockUse::Free), counts.free);
    assert_eq!(count(|used| *used == BlockUse::Cached), counts.cached);
    for (place, request) in (0..).zip(&snapshot.requests) {
        assert!(!request.states.is_empty(), "{request:?}");
        for slot in &request.states {
            let used = map[*slot as usize];
            let own = used == BlockUse::Request(place);
            assert!(own || used == BlockUse::Shared, "slot {slot}: {used:?}");
        }
    }
    assert!(map.contains(&BlockUse::Session(0)), "{map:?}");
    drop(streams);
    session.end().wait().unwrap();
    idle(&engine);
}
