//! A request is dropped or cancelled from every place that a caller can be in: at any await
//! point, without a runtime or while one shuts down, while unwinding, on the scheduler thread
//! itself, after the engine has ended, or together with all other requests. Every block is
//! released (I12) and no other request is affected.

use common::requests::{idle, ids, prompt, request};
use futures_util::{Stream, StreamExt};
use quell::internals::runner::{NullOptions, NullRunner, Runner, StepOutput};
use quell::internals::schedule::{Sequences, StepPlan};
use quell::{
    CancelReason, Cancellation, DeviceError, Engine, EngineConfig, EngineFault, GenerateError,
    Outcome, Shutdown, Stop, TokenStream,
};
use sim::{Fault, SimOptions, expected};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

fn engine(options: SimOptions) -> Engine {
    sim::engine(options, EngineConfig::default())
}

/// Creates an engine that needs a permit for each step until the sender is dropped.
fn gated(depth: usize) -> (Engine, mpsc::Sender<()>) {
    let (permit, gate) = mpsc::channel();
    let options = SimOptions {
        depth,
        gate: Some(gate),
        ..SimOptions::default()
    };
    (engine(options), permit)
}

/// Submits a request that runs longer than any test needs it to.
fn endless(engine: &Engine, index: usize) -> TokenStream {
    engine.generate(request(prompt(index, 5), 400)).unwrap()
}

/// Checks that the engine still answers correctly.
fn answers(engine: &Engine) {
    let answer = engine.generate(request(prompt(9, 7), 20)).unwrap();
    let answer = answer.complete_blocking().unwrap();
    assert_eq!(ids(&answer), expected(&prompt(9, 7), 20));
}

// Dropping futures at await points.

/// Polls `polls` times, letting one step complete before each, and returns whether the future
/// became ready.
fn poll(mut future: Pin<&mut impl Future>, polls: usize, permit: &mpsc::Sender<()>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    (0..polls).any(|_| {
        let _ = permit.send(());
        future.as_mut().poll(&mut context).is_ready()
    })
}

/// Drops a future of an engine after each number of polls below 12. The engine must become idle
/// once the steps in flight have completed.
fn sweep(drop_after: impl Fn(&Engine, usize, &mpsc::Sender<()>) -> bool) {
    for depth in [1, 2] {
        let mut pending = 0;
        for polls in 0..12 {
            let (engine, permit) = gated(depth);
            pending += usize::from(!drop_after(&engine, polls, &permit));
            drop(permit);
            assert_eq!(idle(&engine).outcomes.accepted, 1);
        }
        assert!(pending > 0, "no future was dropped before its end");
    }
}

/// Submits a request that finishes within a few steps.
fn short(engine: &Engine) -> TokenStream {
    engine.generate(request(prompt(1, 5), 6)).unwrap()
}

#[test]
fn the_complete_future_can_be_dropped_at_every_await_point() {
    sweep(|engine, polls, permit| poll(pin!(short(engine).complete()), polls, permit));
}

#[test]
fn the_cancel_future_can_be_dropped_at_every_await_point() {
    sweep(|engine, polls, permit| poll(pin!(short(engine).cancel()), polls, permit));
}

#[test]
fn the_next_future_can_be_dropped_with_its_stream_at_every_await_point() {
    sweep(|engine, polls, permit| {
        let mut stream = short(engine);
        (0..polls).fold(false, |_, _| poll(pin!(stream.next()), 1, permit))
    });
}

#[test]
fn the_drain_future_can_be_dropped_at_every_await_point() {
    sweep(|engine, polls, permit| {
        let _stream = short(engine);
        poll(pin!(engine.drain(Duration::MAX)), polls, permit)
    });
}

#[test]
fn the_futures_of_a_session_can_be_dropped_at_every_await_point() {
    for stop in [Stop::Keep, Stop::Rewind] {
        sweep(|engine, polls, permit| {
            let session = engine.session();
            let _turn = session.generate(request(prompt(1, 5), 6)).unwrap();
            poll(pin!(session.stop(stop)), polls, permit)
        });
    }
    sweep(|engine, polls, permit| {
        let session = engine.session();
        let _turn = session.generate(request(prompt(1, 5), 6)).unwrap();
        poll(pin!(session.end()), polls, permit)
    });
}

#[test]
fn the_shutdown_future_can_be_dropped_at_every_await_point() {
    for how in [Shutdown::Abort, Shutdown::Drain(Duration::MAX)] {
        for polls in 0..12 {
            let (engine, permit) = gated(2);
            let stream = short(&engine);
            poll(pin!(engine.shutdown(how)), polls, &permit);
            drop(permit);
            // The engine shuts down all the same, and the request ends with it.
            let last = stream.blocking().last().unwrap().unwrap();
            let expected = match how {
                Shutdown::Abort => "cancelled",
                Shutdown::Drain(_) => "length",
            };
            assert_eq!(last.finish.unwrap().outcome.as_str(), expected);
            while engine.stats().is_ok() {}
        }
    }
}

#[test]
fn dropping_the_next_future_loses_no_token() {
    for polls in 0..12 {
        let (engine, permit) = gated(1);
        let mut stream = engine.generate(request(prompt(1, 5), 6)).unwrap();
        let mut tokens = Vec::new();
        for _ in 0..polls {
            let _ = permit.send(());
            let mut next = pin!(stream.next());
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(Some(chunk)) = next.as_mut().poll(&mut context) {
                tokens.extend(chunk.unwrap().tokens.ids());
            }
        }
        drop(permit);
        tokens.extend(
            stream
                .blocking()
                .flat_map(|chunk| chunk.unwrap().tokens)
                .map(|token| token.id),
        );
        assert_eq!(tokens, expected(&prompt(1, 5), 6));
    }
}

// With and without a runtime.

/// Unparks the thread that waits for a future without a runtime.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait_without_a_runtime<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park();
    }
}

#[test]
fn a_request_can_be_read_and_cancelled_without_a_runtime() {
    let engine = engine(SimOptions::default());
    let mut stream = endless(&engine, 1);
    let chunk = wait_without_a_runtime(stream.next()).unwrap().unwrap();
    assert!(!chunk.tokens.is_empty());
    let receipt = wait_without_a_runtime(stream.cancel()).unwrap();
    assert!(receipt.blocks_freed > 0);
    drop(endless(&engine, 2));
    assert_eq!(idle(&engine).outcomes.cancelled, 2);
}

#[test]
fn streams_and_cancels_outlive_the_runtime_they_are_used_in() {
    let engine = engine(SimOptions::default());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let tokens = runtime.block_on(async {
        let stream = engine.generate(request(prompt(3, 5), 10)).unwrap();
        stream
            .flat_map(|chunk| futures_util::stream::iter(chunk.unwrap().tokens))
            .map(|token| token.id)
            .collect::<Vec<u32>>()
            .await
    });
    assert_eq!(tokens, expected(&prompt(3, 5), 10));
    let receipt = runtime.block_on(async {
        let mut stream = endless(&engine, 4);
        stream.next().await.unwrap().unwrap();
        stream.cancel().await.unwrap()
    });
    assert!(receipt.blocks_freed > 0);
    // Shut the runtime down while a hundred tasks are in the middle of their streams. Half of
    // them hold their stream without reading on, so that no task ends by itself.
    for index in 0..100 {
        let mut stream = endless(&engine, index);
        runtime.spawn(async move {
            while stream.next().await.is_some() {
                if index % 2 == 0 {
                    std::future::pending::<()>().await;
                }
            }
        });
    }
    runtime.shutdown_timeout(Duration::from_secs(5));
    let cancelled = idle(&engine).outcomes.cancelled;
    assert!(cancelled > 50, "{cancelled} were cut, expected at least 51");
}

/// Cancels its stream when it is dropped, and waits until the blocks are free.
struct CancelOnDrop(Option<TokenStream>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take() {
            assert!(stream.cancel().wait().is_ok());
        }
    }
}

#[test]
fn a_task_dropped_at_runtime_shutdown_can_cancel_and_submit() {
    for threads in [0, 2] {
        let engine = engine(SimOptions::default());
        let runtime = match threads {
            0 => tokio::runtime::Builder::new_current_thread().build(),
            threads => tokio::runtime::Builder::new_multi_thread()
                .worker_threads(threads)
                .build(),
        };
        let runtime = runtime.unwrap();
        let (begun, mut tasks) = tokio::sync::mpsc::unbounded_channel();
        for index in 0..8 {
            let (first, second) = (endless(&engine, index), endless(&engine, index + 100));
            let begun = begun.clone();
            runtime.spawn(async move {
                let _cancelled = CancelOnDrop(Some(first));
                let _dropped = second;
                begun.send(()).unwrap();
                std::future::pending::<()>().await;
            });
        }
        for _ in 0..8 {
            runtime.block_on(tasks.recv()).unwrap();
        }
        drop(runtime);
        assert_eq!(idle(&engine).outcomes.cancelled, 16);
        answers(&engine);
    }
}

// Unwinding.

#[test]
fn a_stream_dropped_while_its_thread_unwinds_is_cancelled() {
    let engine = engine(SimOptions::default());
    let stream = endless(&engine, 1);
    let unwound = std::thread::spawn(move || {
        let _stream = stream;
        panic!("the caller's own affair");
    });
    assert!(unwound.join().is_err());
    assert_eq!(idle(&engine).outcomes.cancelled, 1);
}

#[test]
fn a_cancel_is_acknowledged_while_its_thread_unwinds() {
    let engine = engine(SimOptions::default());
    let guard = CancelOnDrop(Some(endless(&engine, 1)));
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _guard = guard;
        panic!("the caller's own affair");
    }));
    assert!(unwound.is_err());
    assert_eq!(idle(&engine).outcomes.cancelled, 1);
}

// On the scheduler thread itself.

/// A waker that calls a closure once, on the thread that wakes it.
struct OnWake<F: FnOnce() + Send>(Mutex<Option<F>>);

impl<F: FnOnce() + Send + 'static> OnWake<F> {
    fn waker(act: F) -> Waker {
        Waker::from(Arc::new(Self(Mutex::new(Some(act)))))
    }
}

impl<F: FnOnce() + Send> Wake for OnWake<F> {
    fn wake(self: Arc<Self>) {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
    }
}

/// Makes the scheduler thread run `act` when the first chunk of `stream` arrives.
fn when_woken(stream: &mut TokenStream, act: impl FnOnce() + Send + 'static) {
    register(stream, &OnWake::waker(act));
}

/// Waits until the scheduler thread waits for the device. Commands that are posted before the
/// gate opens are then applied together.
fn wait_for_a_step(engine: &Engine) {
    while engine.health().device_call.is_none() {}
}

/// Registers `waker` with a stream that has received nothing yet.
fn register(stream: &mut TokenStream, waker: &Waker) {
    let polled = Pin::new(stream).poll_next(&mut Context::from_waker(waker));
    assert!(polled.is_pending(), "a chunk came before the gate was open");
}

fn on_the_scheduler_thread() -> bool {
    std::thread::current().name() == Some("quell-scheduler")
}

#[test]
fn a_waker_may_drop_and_cancel_other_streams_and_submit_new_ones() {
    for depth in [1, 2] {
        let (engine, gate) = gated(depth);
        let mut stream = engine.generate(request(prompt(1, 5), 10)).unwrap();
        let (dropped, cancelled) = (endless(&engine, 2), endless(&engine, 3));
        let (done, result) = mpsc::channel();
        let handle = engine.clone();
        when_woken(&mut stream, move || {
            drop(dropped);
            let cancellation = cancelled.cancel();
            let submitted = endless(&handle, 4);
            done.send((on_the_scheduler_thread(), cancellation, submitted))
                .unwrap();
        });
        drop(gate);
        let (on_thread, cancellation, submitted) = result.recv().unwrap();
        assert!(
            on_thread,
            "the waker did not run on the scheduler thread: the test proves nothing"
        );
        cancellation.wait().unwrap();
        assert_eq!(
            ids(&stream.complete_blocking().unwrap()),
            expected(&prompt(1, 5), 10)
        );
        drop(submitted);
        assert_eq!(idle(&engine).outcomes.cancelled, 3);
    }
}

/// I6: the cancellation flag counts even if it is set after the commands of this step have been
/// applied.
#[test]
fn a_cancel_during_a_commit_discards_uncommitted_tokens() {
    let (engine, gate) = gated(1);
    let busy = endless(&engine, 1);
    wait_for_a_step(&engine);
    // The step's first request finishes with it, and its reader is woken during the commit.
    let mut first = engine.generate(request(prompt(2, 5), 1)).unwrap();
    let second = endless(&engine, 3);
    let (done, result) = mpsc::channel();
    when_woken(&mut first, move || {
        done.send((on_the_scheduler_thread(), second.cancel()))
            .unwrap();
    });
    drop(gate);
    let (on_thread, cancellation) = result.recv().unwrap();
    assert!(
        on_thread,
        "the waker did not run on the scheduler thread: the test proves nothing"
    );
    let receipt = cancellation.wait().unwrap();
    assert_eq!(
        (receipt.tokens_generated, receipt.tokens_discarded),
        (0, 1),
        "the step computed it, and its token does not count"
    );
    drop((first, busy));
    idle(&engine);
}

/// I6: commands that are posted while a step runs are applied before the step is committed.
#[test]
fn an_abort_during_a_step_discards_its_tokens() {
    let (engine, gate) = gated(1);
    let stream = endless(&engine, 1);
    wait_for_a_step(&engine);
    engine.abort_all().unwrap();
    drop(gate);
    let error = stream.complete_blocking().unwrap_err();
    assert!(
        matches!(error, GenerateError::Cancelled(CancelReason::AbortAll)),
        "{error}"
    );
    assert_eq!(idle(&engine).tokens_generated, 0);
}

#[test]
fn a_waker_may_drop_the_stream_that_it_wakes() {
    for depth in [1, 2] {
        let (engine, gate) = gated(depth);
        let place = Arc::new(Mutex::new(Some(endless(&engine, 1))));
        let waker = {
            let place = Arc::clone(&place);
            OnWake::waker(move || drop(place.lock().unwrap().take()))
        };
        register(place.lock().unwrap().as_mut().unwrap(), &waker);
        drop(waker);
        drop(gate);
        assert_eq!(idle_when(&engine, 1).outcomes.cancelled, 1);
        assert!(place.lock().unwrap().is_none());
    }
}

/// Waits until this many requests have been cancelled, and then until the engine is idle.
fn idle_when(engine: &Engine, cancelled: u64) -> quell::EngineStats {
    while engine.stats().unwrap().outcomes.cancelled < cancelled {}
    idle(engine)
}

/// A waker that does nothing when woken, and drops its stream when it is dropped.
struct OwningWaker {
    /// In a mutex because a waker must be `Sync`.
    _stream: Mutex<TokenStream>,
    dropped_on: mpsc::Sender<bool>,
}

impl Wake for OwningWaker {
    fn wake(self: Arc<Self>) {}
}

impl Drop for OwningWaker {
    fn drop(&mut self) {
        self.dropped_on.send(on_the_scheduler_thread()).unwrap();
    }
}

#[test]
fn a_waker_dropped_on_the_scheduler_thread_may_drop_a_stream() {
    let (engine, gate) = gated(2);
    let mut stream = engine.generate(request(prompt(1, 5), 10)).unwrap();
    let (dropped_on, dropped) = mpsc::channel();
    let owner = OwningWaker {
        _stream: Mutex::new(endless(&engine, 2)),
        dropped_on,
    };
    register(&mut stream, &Waker::from(Arc::new(owner)));
    drop(gate);
    assert!(
        dropped.recv().unwrap(),
        "it was not dropped on the scheduler thread"
    );
    assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 10);
    assert_eq!(idle(&engine).outcomes.cancelled, 1);
}

#[test]
fn the_last_handle_may_be_dropped_on_the_scheduler_thread() {
    let (engine, gate) = gated(2);
    let other = endless(&engine, 2);
    wait_for_a_step(&engine); // so that it has blocks
    let mut stream = engine.generate(request(prompt(1, 5), 10)).unwrap();
    let (done, result) = mpsc::channel();
    when_woken(&mut stream, move || {
        drop(engine);
        done.send(other.cancel()).unwrap();
    });
    drop(gate);
    assert!(result.recv().unwrap().wait().unwrap().blocks_freed > 0);
    assert_eq!(stream.complete_blocking().unwrap().tokens.len(), 10);
}

/// A null runner that drops and cancels streams in the middle of a step.
struct DroppingRunner {
    null: NullRunner,
    at_launch: mpsc::Receiver<TokenStream>,
    at_collect: mpsc::Receiver<TokenStream>,
}

impl Runner for DroppingRunner {
    fn depth(&self) -> usize {
        self.null.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        drop(self.at_launch.try_iter().collect::<Vec<_>>());
        self.null.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        let cancels = self.at_collect.try_iter().map(TokenStream::cancel);
        drop(cancels.collect::<Vec<Cancellation>>());
        self.null.collect()
    }
}

#[test]
fn a_runner_may_drop_and_cancel_streams_in_the_middle_of_a_step() {
    for depth in [1, 2] {
        let (launch, at_launch) = mpsc::channel();
        let (collect, at_collect) = mpsc::channel();
        let options = NullOptions {
            depth,
            ..NullOptions::default()
        };
        let config = EngineConfig {
            audit: true,
            ..EngineConfig::default()
        };
        let engine = Engine::with_runner(config, None, move || {
            let null = NullRunner::new(options);
            let info = null.info();
            let runner = DroppingRunner {
                null,
                at_launch,
                at_collect,
            };
            Ok((Box::new(runner) as Box<dyn Runner>, info))
        })
        .unwrap();
        for round in 0..100 {
            let first = round as u32;
            let going_on = engine.generate(request(vec![first], 20)).unwrap();
            launch.send(endless(&engine, round)).unwrap();
            collect.send(endless(&engine, round)).unwrap();
            let answer = going_on.complete_blocking().unwrap();
            let all: Vec<u32> = (1..21).map(|at| options.token(first, at)).collect();
            assert_eq!(ids(&answer), all);
        }
        // The runner drops the remaining streams in the next steps.
        while engine.stats().unwrap().outcomes.cancelled < 200 {
            let step = engine.generate(request(vec![1], 1)).unwrap();
            step.complete_blocking().unwrap();
        }
        idle(&engine);
    }
}

// After the engine has shut down, or its device was lost.

#[test]
fn streams_can_be_dropped_and_cancelled_after_a_shutdown() {
    for depth in [1, 2] {
        let engine = engine(SimOptions {
            depth,
            ..SimOptions::default()
        });
        let mut streams: Vec<_> = (0..6).map(|index| endless(&engine, index)).collect();
        let unread = streams.split_off(3);
        drop(engine.shutdown(Shutdown::Abort));
        for stream in &mut streams {
            let last = std::iter::from_fn(|| stream.next_blocking()).last();
            let finish = last.unwrap().unwrap().finish.unwrap();
            assert_eq!(finish.outcome, Outcome::Cancelled(CancelReason::Shutdown));
        }
        // The thread has ended once it no longer answers.
        while engine.stats().is_ok() {}
        for stream in streams.into_iter().chain(unread) {
            match stream.cancel().wait() {
                // The cancellation was acknowledged before the thread ended.
                Ok(receipt) => assert!(receipt.step.as_u64() > 0 || receipt.blocks_freed == 0),
                Err(EngineFault::Shutdown) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn streams_can_be_dropped_and_cancelled_after_device_loss() {
    for fault in [Fault::Lost, Fault::Panic] {
        let engine = engine(SimOptions {
            fault: Some((3, fault)),
            ..SimOptions::default()
        });
        let streams: Vec<_> = (0..6)
            .filter_map(|index| engine.generate(request(prompt(index, 5), 400)).ok())
            .collect();
        while engine.stats().is_ok() {}
        for (index, stream) in streams.into_iter().enumerate() {
            if index % 2 == 0 {
                drop(stream);
            } else {
                // The requests of a failed step have been acknowledged already.
                if let Err(error) = stream.cancel().wait() {
                    assert!(error.to_string().contains("made to"), "{error}");
                }
            }
        }
    }
}

// All requests at once.

#[test]
fn sixty_four_threads_can_end_requests_at_once() {
    const THREADS: usize = 64;
    for depth in [1, 2] {
        let engine = engine(SimOptions {
            depth,
            blocks: 512,
            ..SimOptions::default()
        });
        let together = Arc::new(Barrier::new(THREADS));
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                let (engine, together) = (engine.clone(), Arc::clone(&together));
                std::thread::spawn(move || {
                    let mut stream = endless(&engine, index);
                    stream.next_blocking().unwrap().unwrap();
                    together.wait();
                    match index % 4 {
                        0 => drop(stream),
                        1 => drop(stream.cancel()),
                        2 => drop(stream.cancel().wait().unwrap()),
                        _ => engine.abort_all().unwrap(),
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        let outcomes = idle(&engine).outcomes;
        assert_eq!(outcomes.accepted, THREADS as u64);
        assert_eq!(outcomes.cancelled + outcomes.length, THREADS as u64);
        assert!(outcomes.cancelled > 0);
        answers(&engine);
    }
}

// Consumers that panic or never read.

/// A waker that panics, and counts how often it has.
struct Panics(AtomicUsize);

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
        panic!("a waker's own affair");
    }
}

/// I9: no reader can hold up the scheduler thread.
#[test]
fn a_panicking_waker_affects_only_its_own_stream() {
    let (engine, gate) = gated(2);
    let panics = Arc::new(Panics(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&panics));
    let mut cancelled = endless(&engine, 1);
    gate.send(()).unwrap();
    cancelled.next_blocking().unwrap().unwrap();
    // The second step is in flight, and holds its blocks until the gate is open.
    let mut cancellation = cancelled.cancel();
    let polled = pin!(&mut cancellation).poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending(), "a step completed without a permit");
    let mut read = endless(&engine, 2);
    register(&mut read, &waker);
    let other = engine.generate(request(prompt(3, 5), 10)).unwrap();
    drop(gate);
    assert_eq!(
        ids(&other.complete_blocking().unwrap()),
        expected(&prompt(3, 5), 10)
    );
    assert!(cancellation.wait().is_ok());
    assert!(read.next_blocking().unwrap().is_ok());
    drop(read);
    assert_eq!(idle(&engine).outcomes.cancelled, 2);
    assert_eq!(panics.0.load(Ordering::SeqCst), 2);
    answers(&engine);
}

/// I9: no reader can hold up the scheduler thread.
#[test]
fn consumers_that_never_read_block_no_other_request() {
    for depth in [1, 2] {
        let options = SimOptions {
            depth,
            blocks: 64,
            ..SimOptions::default()
        };
        let config = EngineConfig {
            stream_buffer: 2,
            max_sequences: 4,
            ..EngineConfig::default()
        };
        let engine = sim::engine(options, config);
        let never_read: Vec<_> = (0..16).map(|index| endless(&engine, index)).collect();
        answers(&engine);
        let mut half = never_read;
        // These streams are not even dropped.
        half.drain(..8).for_each(std::mem::forget);
        drop(half);
        answers(&engine);
        engine.abort_all().unwrap();
        assert_eq!(idle(&engine).outcomes.cancelled, 16);
        answers(&engine);
    }
}
