//! How an engine ends: by drain or by shutdown, awaited or not.

use quell::{
    CancelReason, Drained, Engine, EngineConfig, EngineFault, GenerateError, Prompt, Request,
    Shutdown, SubmitError,
};
use sim::{Fault, SimOptions, engine};
use std::future::Future;
use std::sync::mpsc;
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

fn request(index: u32, tokens: usize) -> Request {
    Request::new(vec![index, 2, 3]).max_tokens(tokens)
}

fn gated(depth: usize) -> (Engine, mpsc::Sender<()>) {
    let (open, gate) = mpsc::channel();
    let options = SimOptions {
        depth,
        gate: Some(gate),
        ..SimOptions::default()
    };
    (engine(options, EngineConfig::default()), open)
}

fn is_aborted(result: Result<quell::Generation, GenerateError>) -> bool {
    matches!(
        result,
        Err(GenerateError::Cancelled(CancelReason::Shutdown))
    )
}

#[test]
fn a_drain_finishes_open_requests_and_refuses_new_ones() {
    for depth in [1, 2] {
        let (engine, open) = gated(depth);
        let streams: Vec<_> = (0..5)
            .map(|i| engine.generate(request(i, 6)).unwrap())
            .collect();
        let drain = engine.drain(HOUR);
        assert!(engine.health().draining);
        assert!(matches!(
            engine.generate(request(9, 6)),
            Err(SubmitError::Draining)
        ));
        drop(open);
        let drained = drain.wait().unwrap();
        assert_eq!((drained.finished, drained.aborted), (5, 0));
        for stream in streams {
            assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 6);
        }
        let stats = engine.stats().unwrap();
        assert!(stats.is_idle(), "{stats:?}");
        // No request is open, so the next drain completes at once.
        assert_eq!(engine.drain(HOUR).wait().unwrap(), Drained::default());
    }
}

#[test]
fn a_drain_is_reported_rather_than_a_lack_of_room() {
    let (open, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        max_open_requests: 2,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let prompts = || vec![Prompt::from(vec![1u32, 2]), Prompt::from(vec![3u32])];
    let asked = || engine.generate_prompts(request(0, 6), prompts(), 1);
    let streams = asked().unwrap();
    assert!(matches!(asked(), Err(SubmitError::Overloaded { .. })));
    // Without a place for each answer, an invalid request is still reported as such.
    let invalid = engine.generate_prompts(request(0, 6).stop(""), prompts(), 1);
    assert!(matches!(invalid, Err(SubmitError::EmptyStop { index: 0 })));
    let drain = engine.drain(HOUR);
    assert!(matches!(asked(), Err(SubmitError::Draining)));
    drop(open);
    drain.wait().unwrap();
    for stream in streams {
        assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 6);
    }
}

#[test]
fn a_drain_cancels_the_remaining_requests_at_its_deadline() {
    for depth in [1, 2] {
        let (engine, open) = gated(depth);
        let short = engine.generate(request(1, 1)).unwrap();
        let long: Vec<_> = (0..4)
            .map(|i| engine.generate(request(i, 400)).unwrap())
            .collect();
        open.send(()).unwrap();
        assert_eq!(short.complete_blocking().unwrap().tokens.len(), 1);
        let drain = engine.drain(Duration::ZERO);
        drop(open);
        let drained = drain.wait().unwrap();
        assert_eq!((drained.finished, drained.aborted), (0, 4));
        assert!(engine.stats().unwrap().is_idle());
        for stream in long {
            assert!(is_aborted(stream.complete_blocking()));
        }
    }
}

/// One request is paused for its reader, so nothing but the deadline can end the drain.
#[test]
fn a_drain_ends_at_its_deadline_while_a_request_is_paused() {
    let (open, gate) = mpsc::channel();
    let options = SimOptions {
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        stream_buffer: 2,
        ..EngineConfig::default()
    };
    let engine = engine(options, config);
    let paused = engine.generate(request(1, 100)).unwrap();
    let finished = engine.generate(request(2, 1)).unwrap();
    // The short request finishes well before the drain's deadline.
    let drain = engine.drain(Duration::from_secs(2));
    drop(open);
    let drained = drain.wait().unwrap();
    assert_eq!((drained.finished, drained.aborted), (1, 1));
    assert!(is_aborted(paused.complete_blocking()));
    finished.complete_blocking().unwrap();
}

#[test]
fn a_shutdown_completes_when_the_thread_has_ended() {
    for how in [Shutdown::Abort, Shutdown::Drain(Duration::ZERO)] {
        let (engine, open) = gated(2);
        let streams: Vec<_> = (0..4)
            .map(|i| engine.generate(request(i, 400)).unwrap())
            .collect();
        let shutdown = engine.shutdown(how);
        drop(open);
        shutdown.wait().unwrap();
        for stream in streams {
            assert!(is_aborted(stream.complete_blocking()));
        }
        assert!(matches!(
            engine.generate(request(1, 5)),
            Err(SubmitError::Closed(EngineFault::Shutdown))
        ));
        assert!(engine.stats().is_err());
        // A second shutdown changes nothing and completes at once.
        engine.shutdown(how).wait().unwrap();
        let late = engine.drain(HOUR).wait();
        assert!(matches!(late, Err(EngineFault::Shutdown)));
    }
}

#[test]
fn a_draining_shutdown_lets_open_requests_finish() {
    let (engine, open) = gated(1);
    let stream = engine.generate(request(1, 20)).unwrap();
    let shutdown = engine.shutdown(Shutdown::Drain(HOUR));
    assert!(matches!(
        engine.generate(request(1, 5)),
        Err(SubmitError::Draining)
    ));
    drop(open);
    shutdown.wait().unwrap();
    assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 20);
}

#[test]
fn an_abort_ends_a_drain_early() {
    let (engine, open) = gated(1);
    let stream = engine.generate(request(1, 400)).unwrap();
    let drain = engine.drain(HOUR);
    let shutdown = engine.shutdown(Shutdown::Abort);
    drop(open);
    let drained = drain.wait().unwrap();
    assert_eq!((drained.finished, drained.aborted), (0, 1));
    shutdown.wait().unwrap();
    assert!(is_aborted(stream.complete_blocking()));
}

#[test]
fn drain_and_shutdown_futures_wake_their_task() {
    let (engine, open) = gated(1);
    let stream = engine.generate(request(1, 20)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let drain = engine.drain(HOUR);
    let opener = std::thread::spawn(move || drop(open));
    let drained = runtime.block_on(drain).unwrap();
    assert_eq!(drained.finished, 1);
    opener.join().unwrap();
    runtime.block_on(engine.shutdown(Shutdown::Abort)).unwrap();
    drop(stream);
}

/// I8: dropping the acknowledgement does not undo the command.
#[test]
fn dropping_drain_and_shutdown_futures_after_any_poll_changes_nothing() {
    for polls in 0..4 {
        let (engine, open) = gated(1);
        let stream = engine.generate(request(1, 20)).unwrap();
        let poll = |future: &mut (dyn Future<Output = ()> + Unpin)| {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            for _ in 0..polls {
                let _ = std::pin::Pin::new(&mut *future).poll(&mut context);
            }
        };
        poll(&mut Box::pin(async {
            let _ = engine.drain(HOUR).await;
        }));
        drop(engine.drain(HOUR));
        drop(engine.shutdown(Shutdown::Drain(HOUR)));
        drop(open);
        assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 20);
        engine.shutdown(Shutdown::Abort).wait().unwrap();
    }
}

#[test]
fn drain_and_shutdown_report_a_broken_engine() {
    for fault in [Fault::Lost, Fault::Panic] {
        let (open, gate) = mpsc::channel();
        let options = SimOptions {
            gate: Some(gate),
            fault: Some((3, fault)),
            ..SimOptions::default()
        };
        let engine = engine(options, EngineConfig::default());
        let stream = engine.generate(request(1, 20)).unwrap();
        let drain = engine.drain(HOUR);
        let shutdown = engine.shutdown(Shutdown::Drain(HOUR));
        drop(open);
        let error = drain.wait().unwrap_err();
        assert!(error.to_string().contains("made to"), "{error}");
        let error = shutdown.wait().unwrap_err();
        assert!(error.to_string().contains("made to"), "{error}");
        stream.complete_blocking().unwrap_err();
    }
}
