//! A device that never answers: every waiter is told, and the process can exit.

use futures_util::StreamExt;
use quell::{
    Engine, EngineConfig, EngineFault, GenerateError, HealthStatus, Request, Shutdown, SubmitError,
};
use sim::{SimOptions, engine, expected};
use std::sync::mpsc;
use std::time::Duration;

/// Deadline of a step: short enough for a quick test, but longer than a working step takes on a
/// busy machine.
const DEADLINE: Duration = Duration::from_secs(5);

fn request(tokens: usize) -> Request {
    Request::new(vec![1, 2, 3, 4, 5]).max_tokens(tokens)
}

/// Creates an engine whose steps are held by the gate.
fn gated(depth: usize) -> (Engine, mpsc::Sender<()>) {
    let (open, gate) = mpsc::channel();
    let options = SimOptions {
        depth,
        gate: Some(gate),
        ..SimOptions::default()
    };
    let config = EngineConfig {
        step_deadline: Some(DEADLINE),
        ..EngineConfig::default()
    };
    (engine(options, config), open)
}

fn is_stuck(fault: &EngineFault) -> bool {
    match fault {
        EngineFault::Stuck { step, waited } => step.as_u64() == 3 && *waited >= DEADLINE,
        _ => false,
    }
}

/// Lets two steps through. The third never completes.
fn two_steps(open: &mpsc::Sender<()>) {
    open.send(()).unwrap();
    open.send(()).unwrap();
}

#[test]
fn blocking_waiters_get_the_stuck_error() {
    let (engine, open) = gated(1);
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let mut stream = engine.generate(request(50)).unwrap();
            std::thread::spawn(move || {
                loop {
                    match stream.next_blocking() {
                        Some(Ok(_)) => {}
                        last => break last,
                    }
                }
            })
        })
        .collect();
    let cancelled = engine.generate(request(50)).unwrap();
    two_steps(&open);
    let cancellation = cancelled.cancel();
    while engine.health().step.as_u64() < 3 {
        assert!(engine.health().is_healthy(), "this test was too slow");
        std::thread::yield_now();
    }
    // The scheduler thread is stuck and will not handle this request.
    let posted = engine.generate(request(50)).unwrap();
    match engine.stats() {
        Err(SubmitError::Closed(fault)) => assert!(is_stuck(&fault), "{fault}"),
        other => panic!("{other:?}"),
    }
    for thread in threads {
        match thread.join().unwrap() {
            Some(Err(GenerateError::Failed(fault))) => assert!(is_stuck(&fault), "{fault}"),
            other => panic!("{other:?}"),
        }
    }
    // It was cancelled before the third step, so its blocks are free already or never will be.
    match cancellation.wait() {
        Ok(_) => {}
        Err(fault) => assert!(is_stuck(&fault), "{fault}"),
    }
    match posted.cancel().wait() {
        Err(fault) => assert!(is_stuck(&fault), "{fault}"),
        other => panic!("{other:?}"),
    }
    match engine.generate(request(5)) {
        Err(SubmitError::Closed(fault)) => assert!(is_stuck(&fault), "{fault}"),
        other => panic!("{other:?}"),
    }
    let health = engine.health();
    assert!(!health.is_healthy() && !health.idle);
    assert!(matches!(health.status, HealthStatus::Stuck { step, .. } if step.as_u64() == 3));
    // The shutdown does not wait for the stuck thread.
    let ended = engine.shutdown(Shutdown::Abort).wait().unwrap_err();
    assert!(is_stuck(&ended), "{ended}");
    let drained = engine.drain(Duration::MAX).wait().unwrap_err();
    assert!(is_stuck(&drained), "{drained}");
}

#[test]
fn async_waiters_get_the_stuck_error() {
    for depth in [1, 2] {
        let (engine, open) = gated(depth);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let streams: Vec<_> = (0..20)
            .map(|_| engine.generate(request(50)).unwrap())
            .collect();
        let cancelled = engine.generate(request(50)).unwrap();
        two_steps(&open);
        runtime.block_on(async {
            let readers = futures_util::future::join_all(streams.into_iter().map(|stream| async {
                let last = stream.fold(None, |_, chunk| async { Some(chunk) }).await;
                match last {
                    Some(Err(GenerateError::Failed(fault))) => assert!(is_stuck(&fault)),
                    other => panic!("{other:?}"),
                }
            }));
            let drain = engine.drain(Duration::MAX);
            while engine.health().step.as_u64() < 3 {
                assert!(engine.health().is_healthy(), "this test was too slow");
                tokio::task::yield_now().await;
            }
            // The cancellation is posted while the thread is stuck.
            let (_, receipt, drained) = tokio::join!(readers, cancelled.cancel(), drain);
            match receipt {
                Err(fault) => assert!(is_stuck(&fault), "{fault}"),
                other => panic!("{other:?}"),
            }
            assert!(is_stuck(&drained.unwrap_err()));
        });
    }
}

#[test]
fn a_device_that_recovers_too_late_ends_the_thread() {
    let (engine, open) = gated(2);
    let stream = engine.generate(request(50)).unwrap();
    two_steps(&open);
    match stream.complete_blocking() {
        Err(GenerateError::Failed(fault)) => assert!(is_stuck(&fault), "{fault}"),
        other => panic!("{other:?}"),
    }
    assert!(open.send(()).is_ok(), "the gate is still there");
    // When the thread ends, it drops its end of the gate.
    while open.send(()).is_ok() {
        std::thread::yield_now();
    }
    assert!(matches!(engine.stats(), Err(SubmitError::Closed(fault)) if is_stuck(&fault)));
    assert!(matches!(engine.health().status, HealthStatus::Stuck { .. }));
}

#[test]
fn an_engine_is_healthy_until_it_is_stuck() {
    let (engine, open) = gated(1);
    // The thread may not have become idle yet.
    while !engine.health().idle {
        std::thread::yield_now();
    }
    let health = engine.health();
    assert!(health.is_healthy() && !health.draining);
    assert_eq!(health.device_call, None);
    let stream = engine.generate(request(2)).unwrap();
    while engine.health().device_call.is_none() {
        assert!(engine.health().is_healthy(), "this test was too slow");
        std::thread::yield_now();
    }
    assert!(!engine.health().idle);
    two_steps(&open);
    let generation = stream.complete_blocking().unwrap();
    assert_eq!(generation.tokens[1].id, expected(&[1, 2, 3, 4, 5], 2)[1]);
    assert!(engine.health().is_healthy());
    let stuck = engine.generate(request(2)).unwrap().complete_blocking();
    match stuck {
        Err(GenerateError::Failed(fault)) => assert!(is_stuck(&fault), "{fault}"),
        other => panic!("{other:?}"),
    }
    drop(open);
}

#[test]
fn health_reports_a_shutdown() {
    let (engine, _open) = gated(1);
    engine.shutdown(Shutdown::Abort).wait().unwrap();
    let health = engine.health();
    assert!(matches!(
        health.status,
        HealthStatus::Closed(EngineFault::Shutdown)
    ));
}

const CHILD: &str = "QUELL_TEST_STUCK_CHILD";

#[test]
fn a_process_with_a_stuck_device_exits() {
    if std::env::var_os(CHILD).is_some() {
        let (engine, open) = gated(1);
        let stream = engine.generate(request(50)).unwrap();
        two_steps(&open);
        assert!(stream.complete_blocking().is_err());
        // Return from `main` while the scheduler thread is in the step that never ends.
        std::mem::forget(open);
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "watchdog::a_process_with_a_stuck_device_exits"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}
