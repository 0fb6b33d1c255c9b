//! Tests of the driver through its C functions, as programs call them.

use super::api::unsupported::*;
use super::api::{
    context::*, device::*, error::*, event::*, graph::*, launch::*, memory::*, module::*, stream::*,
};
use super::codes::{self, Code};
use super::control::*;
use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const NON_BLOCKING: u32 = 1;
const OK: Code = codes::SUCCESS;

/// `add(u32* x, u32 y)` and `move(u32* to, u32* from)`: one number per thread. `large`: takes
/// one pointer and declares 40 KiB of shared memory. `stray(u32* x)`: writes 8 bytes at `x` + 4
/// bytes.
const KERNELS: &CStr = cr#"
.version 8.0
.target sm_75
.address_size 64
.visible .entry add(.param .u64 add_param_0, .param .u32 add_param_1)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [add_param_0];
    ld.param.u32 %r1, [add_param_1];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r3, [%rd3];
    add.s32 %r4, %r3, %r1;
    st.global.u32 [%rd3], %r4;
    ret;
}
.visible .entry move(.param .u64 move_param_0, .param .u64 move_param_1)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [move_param_0];
    ld.param.u64 %rd2, [move_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r2, [%rd5];
    st.global.u32 [%rd4], %r2;
    ret;
}
.visible .entry large(.param .u64 large_param_0)
{
    .shared .align 4 .b8 room[40960];
    ret;
}
.visible .entry stray(.param .u64 stray_param_0)
{
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [stray_param_0];
    st.global.u64 [%rd1+4], %rd1;
    ret;
}
"#;

/// The driver with a current context, held exclusively by one test.
struct Gpu {
    context: u64,
    _alone: MutexGuard<'static, ()>,
}

/// Locks the driver for this test, with these settings and a current context.
fn gpu(settings: &[(&str, &str)]) -> Gpu {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    vgpu_reset();
    for (key, value) in settings {
        assert_eq!(set(key, value), 0);
    }
    let mut context = 0;
    unsafe {
        assert_eq!(cuInit(0), OK);
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, 0), OK);
        assert_eq!(cuCtxSetCurrent(context), OK);
    }
    Gpu {
        context,
        _alone: alone,
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.release();
    }
}

impl Gpu {
    /// Releases the context. Other tests cannot use the driver until this value is dropped.
    fn release(&mut self) {
        if std::mem::take(&mut self.context) != 0 {
            unsafe {
                cuDevicePrimaryCtxRelease_v2(0);
                cuCtxSetCurrent(0);
            }
        }
    }

    /// Releases the context, and asserts that there was no violation and no leak.
    fn finish(mut self) {
        assert_eq!(violations(), Vec::<String>::new());
        self.release();
        assert_eq!(violations(), Vec::<String>::new());
    }
}

fn set(key: &str, value: &str) -> i32 {
    let (key, value) = (CString::new(key).unwrap(), CString::new(value).unwrap());
    unsafe { vgpu_set(key.as_ptr(), value.as_ptr()) }
}

fn fail(function: &str, nth: u64, code: Code, times: u64) {
    let function = CString::new(function).unwrap();
    unsafe { vgpu_fail(function.as_ptr(), nth, code, times) };
}

fn statistic(name: &str) -> u64 {
    let name = CString::new(name).unwrap();
    let value = unsafe { vgpu_statistic(name.as_ptr()) };
    assert_ne!(value, u64::MAX);
    value
}

fn violations() -> Vec<String> {
    (0..vgpu_violation_count())
        .map(|index| {
            let mut buffer = vec![0u8; 1 << 12];
            let len = unsafe { vgpu_violation(index, buffer.as_mut_ptr().cast(), buffer.len()) };
            String::from_utf8(buffer[..len.min(buffer.len() - 1)].to_vec()).unwrap()
        })
        .collect()
}

/// Asserts that there is exactly one violation and that it contains the text, then clears it.
#[track_caller]
fn expect(text: &str) {
    let found = violations();
    assert!(
        found.len() == 1 && found[0].contains(text),
        "wanted {text:?}, found {found:#?}"
    );
    forget();
}

/// Clears the violations but keeps the settings.
fn forget() {
    let settings = super::lock().settings.clone();
    vgpu_reset();
    super::lock().apply(settings);
}

fn stream() -> u64 {
    let mut made = 0;
    assert_eq!(unsafe { cuStreamCreate(&mut made, NON_BLOCKING) }, OK);
    made
}

fn event() -> u64 {
    let mut made = 0;
    assert_eq!(unsafe { cuEventCreate(&mut made, 2) }, OK);
    made
}

/// Allocates device memory with these numbers, visible to all streams.
fn device(values: &[u32]) -> u64 {
    let mut made = 0;
    unsafe {
        assert_eq!(cuMemAlloc_v2(&mut made, size_of_val(values)), OK);
        assert_eq!(
            cuMemcpyHtoD_v2(made, values.as_ptr().cast(), size_of_val(values)),
            OK
        );
        assert_eq!(cuStreamSynchronize(0), OK);
    }
    made
}

fn pinned(len: usize) -> &'static mut [u32] {
    let mut made = null_mut();
    unsafe {
        assert_eq!(cuMemHostAlloc(&mut made, len * 4, 0), OK);
        std::slice::from_raw_parts_mut(made.cast(), len)
    }
}

fn unpin(memory: &mut [u32]) -> Code {
    unsafe { cuMemFreeHost(memory.as_mut_ptr().cast()) }
}

/// Reads device memory, without waiting for non-blocking streams.
fn read(address: u64, len: usize) -> Vec<u32> {
    let mut values = vec![0; len];
    assert_eq!(
        unsafe { cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), address, len * 4) },
        OK
    );
    values
}

struct Kernels {
    module: u64,
    add: u64,
    shift: u64,
    large: u64,
    stray: u64,
}

fn kernels() -> Kernels {
    let mut module = 0;
    assert_eq!(
        unsafe { cuModuleLoadData(&mut module, KERNELS.as_ptr().cast()) },
        OK
    );
    let function = |name: &CStr| {
        let mut made = 0;
        assert_eq!(
            unsafe { cuModuleGetFunction(&mut made, module, name.as_ptr()) },
            OK
        );
        made
    };
    Kernels {
        module,
        add: function(c"add"),
        shift: function(c"move"),
        large: function(c"large"),
        stray: function(c"stray"),
    }
}

/// Launches one block of 4 threads.
fn launch(function: u64, stream: u64, first: u64, second: u64) -> Code {
    let (first, second) = (first, second);
    let mut pointers = [
        (&raw const first) as *mut c_void,
        (&raw const second) as *mut c_void,
    ];
    unsafe {
        cuLaunchKernel(
            function,
            1,
            1,
            1,
            4,
            1,
            1,
            0,
            stream,
            pointers.as_mut_ptr(),
            null(),
        )
    }
}

fn free(address: u64) {
    assert_eq!(unsafe { cuMemFree_v2(address) }, OK);
}

const SCHEDULES: [&str; 7] = [
    "eager",
    "late",
    "shuffle:1",
    "shuffle:2",
    "shuffle:3",
    "shuffle:4",
    "shuffle:5",
];

/// Counted launches, one line of JSON each.
fn launches() -> Vec<String> {
    let mut buffer = vec![0u8; 1 << 16];
    let len = unsafe { vgpu_launches(buffer.as_mut_ptr().cast(), buffer.len()) };
    let text = std::str::from_utf8(&buffer[..len]).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn launches_that_run_while_the_setting_asks_for_it_are_counted() {
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let x = device(&[1; 4]);
    for counting in ["0", "1", "0"] {
        assert_eq!(set("count", counting), 0);
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(unsafe { cuStreamSynchronize(s) }, OK);
    }
    let counted = launches();
    assert_eq!(counted.len(), 1);
    let begin = r#"{"kernel":"add","grid":[1, 1, 1],"block":[4, 1, 1],"static_shared":0,"#;
    assert!(counted[0].starts_with(begin), "{}", counted[0]);
    let load = r#""load":{"requests":1,"bytes":16,"sectors":1}"#;
    assert!(counted[0].contains(load), "{}", counted[0]);
    vgpu_forget_launches();
    assert_eq!(launches(), [""; 0]);
    free(x);
    unsafe {
        assert_eq!(cuModuleUnload(k.module), OK);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    gpu.finish();
}

#[test]
fn work_of_a_stream_runs_in_order_and_only_when_something_waits_for_it() {
    for schedule in SCHEDULES {
        let gpu = gpu(&[("schedule", schedule)]);
        let (s, k) = (stream(), kernels());
        let (x, y) = (device(&[1; 4]), device(&[0; 4]));
        unsafe {
            assert_eq!(launch(k.add, s, x, 1), OK);
            assert_eq!(launch(k.shift, s, y, x), OK);
            assert_eq!(launch(k.add, s, y, 5), OK);
            assert_eq!(launch(k.add, s, x, 1), OK);
            assert_eq!(cuStreamSynchronize(s), OK);
        }
        assert_eq!(
            (read(x, 4), read(y, 4)),
            (vec![3; 4], vec![7; 4]),
            "{schedule}"
        );
        free(x);
        free(y);
        unsafe {
            assert_eq!(cuModuleUnload(k.module), OK);
            assert_eq!(cuStreamDestroy_v2(s), OK);
        }
        gpu.finish();
    }
}

/// Runs a producer and a consumer on two streams, with or without an event between them.
/// Returns what the consumer copied.
fn handed_over(schedule: &str, edge: bool) -> u32 {
    let gpu = gpu(&[("schedule", schedule)]);
    let (producer, consumer, e, k) = (stream(), stream(), event(), kernels());
    let (x, y) = (device(&[1; 4]), device(&[0; 4]));
    unsafe {
        assert_eq!(launch(k.add, producer, x, 10), OK);
        assert_eq!(cuEventRecord(e, producer), OK);
        if edge {
            assert_eq!(cuStreamWaitEvent(consumer, e, 0), OK);
            // A later record does not change what the stream waits for.
            assert_eq!(cuEventRecord(e, consumer), OK);
        }
        assert_eq!(launch(k.shift, consumer, y, x), OK);
        assert_eq!(cuStreamSynchronize(consumer), OK);
    }
    let copied = read(y, 4)[0] % 100;
    unsafe {
        assert_eq!(cuCtxSynchronize(), OK);
        assert_eq!(cuEventDestroy_v2(e), OK);
        assert_eq!(cuModuleUnload(k.module), OK);
        assert_eq!(cuStreamDestroy_v2(producer), OK);
        assert_eq!(cuStreamDestroy_v2(consumer), OK);
    }
    free(x);
    free(y);
    gpu.finish();
    copied
}

#[test]
fn event_edges_are_respected_and_missing_ones_are_exposed() {
    assert_eq!(
        handed_over("late", false),
        1,
        "without an edge the producer has not run"
    );
    assert_eq!(handed_over("late", true), 11);
    let mut without = std::collections::BTreeSet::new();
    for seed in 0..40 {
        assert_eq!(handed_over(&format!("shuffle:{seed}"), true), 11, "{seed}");
        without.insert(handed_over(&format!("shuffle:{seed}"), false));
    }
    assert_eq!(without.into_iter().collect::<Vec<_>>(), [1, 11]);
}

#[test]
fn copies_to_pinned_memory_write_when_they_run() {
    let gpu = gpu(&[]);
    let s = stream();
    let x = device(&[7; 4]);
    let back = pinned(4);
    back.fill(0);
    unsafe {
        assert_eq!(cuMemcpyDtoHAsync_v2(back.as_mut_ptr().cast(), x, 16, s), OK);
        assert_eq!(back, [0; 4]);
        assert_eq!(vgpu_pending(), 1);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(back, [7; 4]);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    assert_eq!(unpin(back), OK);
    free(x);
    gpu.finish();
}

#[test]
fn pinned_memory_is_read_late_and_pageable_memory_at_once() {
    let gpu = gpu(&[]);
    let s = stream();
    let (x, y) = (device(&[0; 4]), device(&[0; 4]));
    let staging = pinned(4);
    staging.fill(1);
    let mut pageable = [1u32; 4];
    unsafe {
        assert_eq!(cuMemcpyHtoDAsync_v2(x, staging.as_ptr().cast(), 16, s), OK);
        assert_eq!(cuMemcpyHtoDAsync_v2(y, pageable.as_ptr().cast(), 16, s), OK);
        staging.fill(2);
        pageable.fill(2);
        assert_eq!(cuStreamSynchronize(s), OK);
    }
    assert_eq!((read(x, 4), read(y, 4)), (vec![2; 4], vec![1; 4]));
    unsafe {
        // A copy to pageable memory waits.
        let before = statistic("synchronisations");
        assert_eq!(
            cuMemcpyDtoHAsync_v2(pageable.as_mut_ptr().cast(), x, 16, s),
            OK
        );
        assert_eq!(
            (pageable, statistic("synchronisations")),
            ([2; 4], before + 1)
        );
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    assert_eq!(unpin(staging), OK);
    free(x);
    free(y);
    gpu.finish();
}

#[test]
fn the_legacy_default_stream_is_in_order_with_blocking_streams_only() {
    for schedule in SCHEDULES {
        let gpu = gpu(&[("schedule", schedule)]);
        let k = kernels();
        let x = device(&[0; 4]);
        let mut blocking = 0;
        unsafe {
            assert_eq!(cuStreamCreate(&mut blocking, 0), OK);
            assert_eq!(launch(k.add, blocking, x, 1), OK);
            assert_eq!(launch(k.shift, 0, x, x), OK);
            assert_eq!(launch(k.add, 2, x, 2), OK);
        }
        assert_eq!(read(x, 4), [3; 4], "{schedule}");
        let free_running = stream();
        assert_eq!(launch(k.add, free_running, x, 4), OK);
        if schedule == "late" {
            assert_eq!(
                read(x, 4),
                [3; 4],
                "the default stream does not wait for it"
            );
        }
        unsafe {
            assert_eq!(cuCtxSynchronize(), OK);
            assert_eq!(read(x, 4), [7; 4]);
            assert_eq!(cuStreamDestroy_v2(blocking), OK);
            assert_eq!(cuStreamDestroy_v2(free_running), OK);
            assert_eq!(cuModuleUnload(k.module), OK);
        }
        free(x);
        gpu.finish();
    }
}

#[test]
fn a_query_returns_not_ready_once_and_then_runs_the_work() {
    let gpu = gpu(&[]);
    let (s, e, k) = (stream(), event(), kernels());
    let x = device(&[0; 4]);
    unsafe {
        assert_eq!(cuEventQuery(e), OK, "never recorded");
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(cuEventRecord(e, s), OK);
        let before = statistic("synchronisations");
        assert_eq!(cuEventQuery(e), codes::NOT_READY);
        assert_eq!(vgpu_pending(), 2);
        cuCtxSetCurrent(0);
        assert_eq!(cuEventQuery(e), OK, "without a current context");
        cuCtxSetCurrent(gpu.context);
        assert_eq!(vgpu_pending(), 0);
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(cuEventQuery(e), OK, "what came later has no part in it");
        assert_eq!(cuStreamQuery(s), codes::NOT_READY);
        assert_eq!(cuStreamQuery(s), OK);
        assert_eq!(statistic("synchronisations"), before);
        assert_eq!(cuEventDestroy_v2(e), OK);
        assert_eq!(cuStreamDestroy_v2(s), OK);
        assert_eq!(cuModuleUnload(k.module), OK);
    }
    assert_eq!(read(x, 4), [2; 4]);
    free(x);
    gpu.finish();
}

#[test]
fn events_record_the_time_when_they_run() {
    let gpu = gpu(&[]);
    let s = stream();
    let (mut start, mut end, without) = (0, 0, event());
    let mut time = f32::NAN;
    unsafe {
        assert_eq!(cuEventCreate(&mut start, 0), OK);
        assert_eq!(cuEventCreate(&mut end, 0), OK);
        assert_eq!(cuEventRecord(start, s), OK);
        assert_eq!(cuEventRecord(end, s), OK);
        assert_eq!(cuEventElapsedTime(&mut time, start, end), codes::NOT_READY);
        assert_eq!(cuEventSynchronize(end), OK);
        assert_eq!(cuEventElapsedTime(&mut time, start, end), OK);
        assert!((0.0..1000.0).contains(&time), "{time}");
        assert_eq!(violations(), Vec::<String>::new());
        assert_eq!(
            cuEventElapsedTime_v2(&mut time, start, without),
            codes::INVALID_HANDLE
        );
        expect("without timing");
        for e in [start, end, without] {
            assert_eq!(cuEventDestroy_v2(e), OK);
        }
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    gpu.finish();
}

fn begin(stream: u64) {
    assert_eq!(unsafe { cuStreamBeginCapture_v2(stream, 1) }, OK);
}

fn end(stream: u64) -> (Code, u64) {
    let mut graph = u64::MAX;
    let code = unsafe { cuStreamEndCapture(stream, &mut graph) };
    (code, graph)
}

#[test]
fn a_captured_graph_replays_with_forks_and_joins() {
    for schedule in SCHEDULES {
        let gpu = gpu(&[("schedule", schedule)]);
        let (main, side, fork, join, k) = (stream(), stream(), event(), event(), kernels());
        let (x, y, z) = (device(&[1; 4]), device(&[0; 4]), device(&[0; 4]));
        let staging = pinned(4);
        staging.fill(5);
        let (mut status, mut exec) = (-1, 0);
        unsafe {
            begin(main);
            assert_eq!(
                cuMemcpyHtoDAsync_v2(x, staging.as_ptr().cast(), 16, main),
                OK
            );
            assert_eq!(cuEventRecord(fork, main), OK);
            assert_eq!(cuStreamWaitEvent(side, fork, 0), OK);
            assert_eq!(cuStreamIsCapturing(side, &mut status), OK);
            assert_eq!(status, 1);
            assert_eq!(launch(k.shift, side, y, x), OK);
            assert_eq!(launch(k.shift, main, z, x), OK);
            assert_eq!(cuEventRecord(join, side), OK);
            assert_eq!(cuStreamWaitEvent(main, join, 0), OK);
            assert_eq!(launch(k.add, main, y, 100), OK);
            let (code, graph) = end(main);
            assert_eq!(code, OK);
            assert_eq!(cuStreamIsCapturing(side, &mut status), OK);
            assert_eq!(status, 0);
            assert_eq!(cuGraphInstantiateWithFlags(&mut exec, graph, 0), OK);
            assert_eq!(cuGraphDestroy(graph), OK);
        }
        assert_eq!(
            (read(x, 4), vgpu_pending()),
            (vec![1; 4], 0),
            "a capture runs nothing"
        );
        for value in [6, 7] {
            staging.fill(value);
            unsafe {
                assert_eq!(cuGraphLaunch(exec, main), OK);
                assert_eq!(cuStreamSynchronize(main), OK);
            }
            assert_eq!(
                (read(y, 4), read(z, 4)),
                (vec![value + 100; 4], vec![value; 4]),
                "{schedule}"
            );
        }
        assert_eq!((statistic("graph_launches"), statistic("launches")), (2, 6));
        unsafe {
            assert_eq!(cuGraphExecDestroy(exec), OK);
            assert_eq!(cuModuleUnload(k.module), OK);
            for s in [main, side] {
                assert_eq!(cuStreamDestroy_v2(s), OK);
            }
            for e in [fork, join] {
                assert_eq!(cuEventDestroy_v2(e), OK);
            }
        }
        assert_eq!(unpin(staging), OK);
        for memory in [x, y, z] {
            free(memory);
        }
        gpu.finish();
    }
}

#[test]
fn two_launches_of_a_graph_do_not_overlap() {
    for schedule in SCHEDULES {
        let gpu = gpu(&[("schedule", schedule)]);
        let (a, b, k) = (stream(), stream(), kernels());
        let (x, y) = (device(&[1; 4]), device(&[0; 4]));
        let mut exec = 0;
        unsafe {
            begin(a);
            assert_eq!(launch(k.add, a, x, 1), OK);
            assert_eq!(launch(k.shift, a, y, x), OK);
            let (_, graph) = end(a);
            assert_eq!(cuGraphInstantiateWithFlags(&mut exec, graph, 0), OK);
            assert_eq!(cuGraphDestroy(graph), OK);
            assert_eq!(cuGraphLaunch(exec, a), OK);
            assert_eq!(cuGraphLaunch(exec, b), OK);
            assert_eq!(cuStreamSynchronize(b), OK);
        }
        assert_eq!(read(y, 4), [3; 4], "{schedule}");
        unsafe {
            assert_eq!(cuGraphExecDestroy(exec), OK);
            assert_eq!(cuModuleUnload(k.module), OK);
            assert_eq!(cuStreamDestroy_v2(a), OK);
            assert_eq!(cuStreamDestroy_v2(b), OK);
        }
        free(x);
        free(y);
        gpu.finish();
    }
}

#[test]
fn calls_that_wait_or_allocate_invalidate_a_capture() {
    type Call = (&'static str, fn(u64, u64) -> Code);
    let calls: [Call; 8] = [
        ("cuStreamSynchronize", |s, _| unsafe {
            cuStreamSynchronize(s)
        }),
        ("cuStreamQuery", |s, _| unsafe { cuStreamQuery(s) }),
        ("cuCtxSynchronize", |_, _| unsafe { cuCtxSynchronize() }),
        ("cuMemAlloc_v2", |_, _| unsafe { cuMemAlloc_v2(&mut 0, 16) }),
        ("cuMemAllocAsync", |s, _| unsafe {
            cuMemAllocAsync(&mut 0, 16, s)
        }),
        ("cuMemcpyDtoH_v2", |_, x| unsafe {
            cuMemcpyDtoH_v2([0u8; 4].as_mut_ptr().cast(), x, 4)
        }),
        ("cuMemcpyHtoDAsync_v2", |s, x| unsafe {
            cuMemcpyHtoDAsync_v2(x, [0u8; 4].as_ptr().cast(), 4, s)
        }),
        ("cuMemcpyDtoHAsync_v2", |s, x| unsafe {
            cuMemcpyDtoHAsync_v2([0u8; 4].as_mut_ptr().cast(), x, 4, s)
        }),
    ];
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let x = device(&[1; 4]);
    for (name, call) in calls {
        begin(s);
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(call(s, x), codes::STREAM_CAPTURE_UNSUPPORTED, "{name}");
        expect(name);
        let mut status = 0;
        assert_eq!(unsafe { cuStreamIsCapturing(s, &mut status) }, OK);
        assert_eq!(status, 2, "{name}");
        assert_eq!(
            launch(k.add, s, x, 1),
            codes::STREAM_CAPTURE_INVALIDATED,
            "{name}"
        );
        assert_eq!(end(s), (codes::STREAM_CAPTURE_INVALIDATED, 0), "{name}");
        assert_eq!(launch(k.add, s, x, 0), OK, "the stream works again");
        assert_eq!(unsafe { cuStreamSynchronize(s) }, OK);
    }
    assert_eq!(read(x, 4), [1; 4]);
    unsafe {
        // Another thread may wait while this one captures in thread-local mode.
        begin(s);
        let context = gpu.context;
        let other = std::thread::spawn(move || {
            cuCtxSetCurrent(context);
            cuMemAlloc_v2(&mut 0, 16)
        });
        assert_eq!(other.join().unwrap(), OK);
        let (code, graph) = end(s);
        assert_eq!(code, OK);
        assert_eq!(cuGraphDestroy(graph), OK);
        // In no mode may it wait for the whole context.
        begin(s);
        let other = std::thread::spawn(move || {
            cuCtxSetCurrent(context);
            cuCtxSynchronize()
        });
        assert_eq!(other.join().unwrap(), codes::STREAM_CAPTURE_UNSUPPORTED);
        expect("cuCtxSynchronize");
        assert_eq!(end(s).0, codes::STREAM_CAPTURE_INVALIDATED);
        // In global mode, it may not allocate either.
        assert_eq!(cuStreamBeginCapture_v2(s, 0), OK);
        let other = std::thread::spawn(move || {
            cuCtxSetCurrent(context);
            cuMemAlloc_v2(&mut 0, 16)
        });
        assert_eq!(other.join().unwrap(), codes::STREAM_CAPTURE_UNSUPPORTED);
        expect("cuMemAlloc_v2");
        assert_eq!(end(s).0, codes::STREAM_CAPTURE_INVALIDATED);
    }
}

#[test]
fn invalid_captures_are_refused() {
    let gpu = gpu(&[]);
    let (a, b, e, k) = (stream(), stream(), event(), kernels());
    let x = device(&[1; 4]);
    unsafe {
        // Forked but not joined.
        begin(a);
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), OK);
        assert_eq!(launch(k.add, b, x, 1), OK);
        assert_eq!(end(a).0, codes::STREAM_CAPTURE_UNJOINED);
        expect("kernel add");
        assert_eq!(cuEventQuery(e), codes::CAPTURED_EVENT);
        expect("last recorded in a capture");
        // Ended in another stream.
        begin(a);
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), OK);
        assert_eq!(end(b).0, codes::STREAM_CAPTURE_UNMATCHED);
        assert_eq!(end(a).0, codes::STREAM_CAPTURE_INVALIDATED);
        expect("another stream");
        // Waits for an event recorded outside.
        assert_eq!(cuEventRecord(e, b), OK);
        begin(a);
        assert_eq!(cuStreamWaitEvent(a, e, 0), codes::STREAM_CAPTURE_ISOLATION);
        assert_eq!(end(a).0, codes::STREAM_CAPTURE_INVALIDATED);
        expect("outside of the capture");
        // Two captures that would be merged.
        begin(a);
        begin(b);
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), codes::STREAM_CAPTURE_MERGE);
        assert_eq!(end(a).0, codes::STREAM_CAPTURE_INVALIDATED);
        assert_eq!(end(b).0, codes::STREAM_CAPTURE_INVALIDATED);
        expect("merge");
        // Ended by another thread.
        begin(a);
        let context = gpu.context;
        let other = std::thread::spawn(move || {
            cuCtxSetCurrent(context);
            end(a).0
        });
        assert_eq!(other.join().unwrap(), codes::STREAM_CAPTURE_WRONG_THREAD);
        expect("another thread");
        let (code, graph) = end(a);
        assert_eq!((code, cuGraphDestroy(graph)), (OK, OK));
        // No capture at all, two captures in one stream, the default stream.
        assert_eq!(end(a).0, codes::ILLEGAL_STATE);
        expect("not being captured");
        begin(a);
        assert_eq!(cuStreamBeginCapture_v2(a, 1), codes::ILLEGAL_STATE);
        expect("being captured already");
        let (_, graph) = end(a);
        assert_eq!(cuGraphDestroy(graph), OK);
        assert_eq!(
            cuStreamBeginCapture_v2(0, 1),
            codes::STREAM_CAPTURE_UNSUPPORTED
        );
        expect("legacy");
        // Work on the default stream while a blocking stream is captured.
        let mut blocking = 0;
        assert_eq!(cuStreamCreate(&mut blocking, 0), OK);
        begin(blocking);
        assert_eq!(launch(k.add, 0, x, 1), codes::STREAM_CAPTURE_IMPLICIT);
        assert_eq!(end(blocking).0, codes::STREAM_CAPTURE_INVALIDATED);
        expect("legacy");
    }
}

#[test]
fn a_graph_with_freed_memory_or_an_unloaded_module_is_refused() {
    let _gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let (x, y) = (device(&[1; 4]), device(&[1; 4]));
    let graph_of = |memory| {
        let mut exec = 0;
        begin(s);
        assert_eq!(launch(k.add, s, memory, 1), OK);
        let (_, graph) = end(s);
        assert_eq!(
            unsafe { cuGraphInstantiateWithFlags(&mut exec, graph, 0) },
            OK
        );
        exec
    };
    let (of_x, of_y) = (graph_of(x), graph_of(y));
    free(x);
    unsafe {
        assert_eq!(cuGraphLaunch(of_x, s), codes::INVALID_VALUE);
        expect("which has been freed");
        assert_eq!(cuGraphLaunch(of_y, s), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(cuModuleUnload(k.module), OK);
        assert_eq!(cuGraphLaunch(of_y, s), codes::INVALID_HANDLE);
        expect("unloaded");
        assert_eq!(launch(k.add, s, y, 1), codes::INVALID_HANDLE);
        expect("unloaded");
        assert_eq!(
            cuGraphExecUpdate_v2(of_x, of_y, null_mut()),
            codes::INVALID_HANDLE
        );
        expect("is an executable graph, not a graph");
    }
}

#[test]
fn kinds_of_wrong_handles_are_distinguished() {
    let gpu = gpu(&[]);
    let (s, e) = (stream(), event());
    unsafe {
        assert_eq!(cuStreamSynchronize(e), codes::INVALID_HANDLE);
        expect("is an event, not a stream");
        assert_eq!(cuEventRecord(s, s), codes::INVALID_HANDLE);
        expect("is a stream, not an event");
        assert_eq!(cuEventSynchronize(0), codes::INVALID_HANDLE);
        expect("null, expected an event");
        assert_eq!(cuGraphLaunch(0x1234_5678, s), codes::INVALID_HANDLE);
        expect("never was an executable graph");
        assert_eq!(cuEventDestroy_v2(e), OK);
        assert_eq!(cuEventDestroy_v2(e), codes::INVALID_HANDLE);
        expect("was an event and has been destroyed");
        assert_eq!(cuStreamWaitEvent(s, e, 0), codes::INVALID_HANDLE);
        expect("was an event and has been destroyed");
        assert_eq!(cuStreamDestroy_v2(0), codes::INVALID_HANDLE);
        expect("default stream");
        // A handle of another context.
        let mut second = 0;
        assert_eq!(cuCtxCreate_v3(&mut second, null_mut(), 0, 0, 0), OK);
        let mine = stream();
        assert_eq!(cuStreamSynchronize(s), codes::INVALID_HANDLE);
        expect("another context");
        let x = device(&[1]);
        assert_eq!(cuStreamDestroy_v2(mine), OK);
        assert_eq!(cuCtxPopCurrent_v2(null_mut()), OK);
        assert_eq!(cuCtxSetCurrent(gpu.context), OK);
        assert_eq!(cuMemFree_v2(x), codes::INVALID_VALUE);
        expect("another context");
        assert_eq!(cuCtxDestroy_v2(second), OK);
        expect("leaked: device memory");
        assert_eq!(cuCtxSetCurrent(second), codes::INVALID_CONTEXT);
        expect("was a context and has been destroyed");
        assert_eq!(cuCtxDestroy_v2(gpu.context), codes::INVALID_CONTEXT);
        expect("primary");
        // No current context.
        assert_eq!(cuCtxSetCurrent(0), OK);
        assert_eq!(cuStreamSynchronize(s), codes::INVALID_CONTEXT);
        expect("no context is current");
        assert_eq!(cuCtxSetCurrent(gpu.context), OK);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    gpu.finish();
}

#[test]
fn kinds_of_wrong_addresses_are_distinguished() {
    let gpu = gpu(&[]);
    let x = device(&[1; 4]);
    let mut host = [0u32; 8];
    let to = host.as_mut_ptr().cast();
    unsafe {
        assert_eq!(cuMemcpyDtoH_v2(to, x, 20), codes::INVALID_VALUE);
        expect("runs 4 bytes past the end");
        assert_eq!(cuMemcpyDtoH_v2(to, x + 64, 4), codes::INVALID_VALUE);
        expect("begins 48 bytes past the end");
        assert_eq!(cuMemsetD8_v2(0, 0, 4), codes::INVALID_VALUE);
        expect("null");
        assert_eq!(
            cuMemcpyDtoH_v2(x as *mut c_void, x, 4),
            codes::INVALID_VALUE
        );
        expect("is a device address");
        assert_eq!(cuMemcpyDtoH_v2(null_mut(), x, 4), codes::INVALID_VALUE);
        expect("null");
        assert_eq!(cuMemcpyDtoD_v2(x, x + 4, 8), codes::INVALID_VALUE);
        expect("overlap");
        assert_eq!(cuMemFree_v2(x + 4), codes::INVALID_VALUE);
        expect("lies within");
        assert_eq!(cuMemAlloc_v2(&mut 0, 0), codes::INVALID_VALUE);
        expect("0 bytes");
        free(x);
        assert_eq!(cuMemFree_v2(x), codes::INVALID_VALUE);
        expect("freed twice");
        assert_eq!(cuMemcpyDtoH_v2(to, x, 4), codes::INVALID_VALUE);
        expect("which has been freed");
        let memory = pinned(4);
        assert_eq!(cuMemFreeHost(memory.as_mut_ptr().cast()), OK);
        assert_eq!(
            cuMemFreeHost(memory.as_mut_ptr().cast()),
            codes::INVALID_VALUE
        );
        expect("already freed?");
    }
    gpu.finish();
}

#[test]
fn freeing_what_queued_work_uses_is_a_violation() {
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let x = device(&[1; 4]);
    let back = pinned(4);
    unsafe {
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(cuMemcpyDtoHAsync_v2(back.as_mut_ptr().cast(), x, 16, s), OK);
        assert_eq!(unpin(back), OK);
        expect("copy of 16 bytes");
        assert_eq!(vgpu_pending(), 0, "it waits, as a real driver does");
        assert_eq!(launch(k.add, s, x, 1), OK);
        free(x);
        expect("kernel add");
        let y = device(&[1; 4]);
        assert_eq!(launch(k.add, s, y, 1), OK);
        assert_eq!(cuModuleUnload(k.module), OK);
        expect("kernel add");
        free(y);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    gpu.finish();
}

#[test]
fn ordered_allocations_live_and_die_in_stream_order() {
    let gpu = gpu(&[]);
    let (a, b, e, k) = (stream(), stream(), event(), kernels());
    let mut x = 0;
    unsafe {
        assert_eq!(cuMemAllocAsync(&mut x, 16, a), OK);
        assert_eq!(cuMemsetD32Async(x, 3, 4, a), OK);
        assert_eq!(launch(k.add, a, x, 1), OK);
        assert_eq!(cuMemFreeAsync(x, a), OK);
        assert_eq!(cuMemFreeAsync(x, a), codes::INVALID_VALUE);
        expect("freed twice");
        assert_eq!(launch(k.add, a, x, 1), codes::INVALID_VALUE);
        expect("used after cuMemFreeAsync");
        assert_eq!(cuStreamSynchronize(a), OK);
        assert_eq!(vgpu_violation_count(), 0);
        // Freed in a stream that does not wait for the use in another stream.
        assert_eq!(cuMemAllocAsync(&mut x, 16, a), OK);
        assert_eq!(cuMemsetD32Async(x, 3, 4, a), OK);
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), OK);
        assert_eq!(launch(k.add, b, x, 1), OK);
        assert_eq!(cuMemFreeAsync(x, a), OK);
        assert_eq!(cuStreamSynchronize(a), OK);
        assert_eq!(violations().len(), 1);
        assert!(violations()[0].contains("while queued work still uses it: kernel add"));
        assert_eq!(cuStreamSynchronize(b), codes::ILLEGAL_ADDRESS);
    }
    drop(gpu);
    let gpu = self::gpu(&[]);
    unsafe {
        // Used in a stream that does not wait for the allocation.
        let (a, b) = (stream(), stream());
        assert_eq!(cuMemAllocAsync(&mut x, 16, a), OK);
        assert_eq!(cuMemsetD32Async(x, 3, 4, b), OK);
        assert_eq!(cuStreamSynchronize(b), codes::ILLEGAL_ADDRESS);
        assert!(violations()[0].contains("before its cuMemAllocAsync has run"));
    }
    drop(gpu);
    let gpu = self::gpu(&[]);
    let x = device(&[1; 4]);
    unsafe {
        assert_eq!(cuMemFreeAsync(x, 0), codes::INVALID_VALUE);
        expect("not from cuMemAllocAsync");
    }
    free(x);
    gpu.finish();
}

#[test]
fn reading_undefined_memory_breaks_the_context() {
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let (mut x, y) = (0, device(&[0; 4]));
    unsafe {
        assert_eq!(cuMemAlloc_v2(&mut x, 16), OK);
        // Copies propagate the undefined state, and the host reads no plausible number.
        assert_eq!(cuMemcpyDtoD_v2(y, x, 16), OK);
        assert_eq!(read(y, 4), [0x7ffb_7ffb; 4]);
        assert_eq!(statistic("undefined_bytes"), 16);
        assert_eq!(violations(), Vec::<String>::new());
        assert_eq!(set("check_copies", "1"), 0);
        read(y, 1);
        expect("4 bytes were never written");
        assert_eq!(launch(k.add, s, y, 1), OK);
        assert_eq!(cuStreamSynchronize(s), codes::LAUNCH_FAILED);
        let text = violations().join("\n");
        assert!(
            text.contains("UninitialisedRead") && text.contains("allocation"),
            "{text}"
        );
    }
    drop(gpu);
}

#[test]
fn a_fault_stays_with_its_context() {
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let x = device(&[1; 4]);
    let mut y = 0;
    unsafe {
        assert_eq!(
            launch(k.stray, s, x + 8, 0),
            OK,
            "a launch does not wait for its fault"
        );
        assert_eq!(launch(k.add, s, x, 1), OK);
        assert_eq!(cuStreamSynchronize(s), codes::MISALIGNED_ADDRESS);
        assert_eq!(cuStreamSynchronize(s), codes::MISALIGNED_ADDRESS);
        assert_eq!(cuMemAlloc_v2(&mut y, 16), codes::MISALIGNED_ADDRESS);
        assert_eq!(launch(k.add, s, x, 1), codes::MISALIGNED_ADDRESS);
        assert_eq!(vgpu_pending(), 0);
        expect("Misaligned");
        // Objects are released even though the calls return the error.
        assert_eq!(cuMemFree_v2(x), codes::MISALIGNED_ADDRESS);
        assert_eq!(cuStreamDestroy_v2(s), codes::MISALIGNED_ADDRESS);
        assert_eq!(cuModuleUnload(k.module), codes::MISALIGNED_ADDRESS);
    }
    gpu.finish();
    let gpu = self::gpu(&[]);
    unsafe { assert_eq!(cuCtxSynchronize(), OK, "a new context works") };
    gpu.finish();
}

#[test]
fn everything_that_is_not_released_is_a_leak() {
    let mut gpu = gpu(&[]);
    let (s, e, k) = (stream(), event(), kernels());
    let x = device(&[1; 4]);
    let memory = pinned(4);
    memory.fill(0);
    unsafe { vgpu_label(x, c"keys of layer 3".as_ptr()) };
    begin(s);
    let (_, _graph) = end(s);
    let mut buffer = [0u8; 1000];
    assert_eq!(
        unsafe { vgpu_leaks(buffer.as_mut_ptr().cast(), buffer.len()) },
        6
    );
    assert_eq!(vgpu_violation_count(), 0, "asking is not a violation");
    gpu.release();
    let text = violations().join("\n");
    let _ = (e, k.large);
    for leak in [
        "keys of layer 3",
        "pinned host memory",
        "leaked: stream",
        "leaked: event",
        "leaked: module",
        "leaked: graph",
    ] {
        assert!(text.contains(leak), "{leak}: {text}");
    }
    assert_eq!(vgpu_violation_count(), 6);
}

#[test]
fn injected_failures_are_returned() {
    let gpu = gpu(&[]);
    let mut x = 0;
    unsafe {
        fail("cuMemAlloc", 2, codes::OUT_OF_MEMORY, 2);
        assert_eq!(cuMemAlloc_v2(&mut x, 16), OK);
        assert_eq!(cuMemAlloc_v2(&mut 0, 16), codes::OUT_OF_MEMORY);
        assert_eq!(vgpu_waiting_failures(), 1);
        assert_eq!(cuMemAlloc_v2(&mut 0, 16), codes::OUT_OF_MEMORY);
        assert_eq!((vgpu_waiting_failures(), statistic("injected")), (0, 2));
        // Releasing functions still release.
        fail("cuMemFree_v2", 1, codes::UNKNOWN, 1);
        assert_eq!(cuMemFree_v2(x), codes::UNKNOWN);
        assert_eq!(vgpu_call_count(c"cuMemAlloc".as_ptr()), 3);
        let mut buffer = [0u8; 1000];
        vgpu_calls(buffer.as_mut_ptr().cast(), buffer.len());
        let calls = CStr::from_bytes_until_nul(&buffer)
            .unwrap()
            .to_str()
            .unwrap();
        assert!(
            calls.contains("cuMemAlloc_v2 3\n") && calls.contains("cuMemFree_v2 1\n"),
            "{calls}"
        );
        // A lost device stays lost.
        fail("cuStreamCreate", 1, codes::ILLEGAL_ADDRESS, 1);
        assert_eq!(cuStreamCreate(&mut x, 0), codes::ILLEGAL_ADDRESS);
        assert_eq!(cuStreamCreate(&mut x, 0), codes::ILLEGAL_ADDRESS);
    }
    gpu.finish();
}

#[test]
fn launches_are_checked() {
    let gpu = gpu(&[]);
    let k = kernels();
    let x = device(&[1; 4]);
    let value = x;
    let mut pointers = [
        (&raw const value) as *mut c_void,
        (&raw const value) as *mut c_void,
    ];
    let mut run = |function, grid: [u32; 3], block: [u32; 3], shared| unsafe {
        let [gx, gy, gz] = grid;
        let [bx, by, bz] = block;
        cuLaunchKernel(
            function,
            gx,
            gy,
            gz,
            bx,
            by,
            bz,
            shared,
            0,
            pointers.as_mut_ptr(),
            null(),
        )
    };
    assert_eq!(run(k.large, [1; 3], [1; 3], 8192), OK);
    for (grid, block, shared, text) in [
        ([1, 0, 1], [1; 3], 0, "dimension of 0"),
        ([1, 65536, 1], [1; 3], 0, "larger than"),
        ([1; 3], [1, 1, 65], 0, "larger than"),
        ([1; 3], [1024, 2, 1], 0, "2048 threads"),
        ([1; 3], [1; 3], 8193, "8192 are allowed"),
    ] {
        assert_eq!(run(k.large, grid, block, shared), codes::INVALID_VALUE);
        expect(text);
    }
    unsafe {
        assert_eq!(
            cuFuncSetAttribute(k.large, 8, 163 * 1024 - 40960 + 1),
            codes::INVALID_VALUE
        );
        expect("the device has 166912");
        assert_eq!(cuFuncSetAttribute(k.large, 8, 100_000), OK);
        let mut number = 0;
        for (attribute, wanted) in [(0, 1024), (1, 40960), (8, 100_000)] {
            assert_eq!(cuFuncGetAttribute(&mut number, attribute, k.large), OK);
            assert_eq!(number, wanted);
        }
        let (mut offset, mut size) = (0, 0);
        assert_eq!(cuFuncGetParamInfo(k.add, 1, &mut offset, &mut size), OK);
        assert_eq!((offset, size), (8, 4));
        assert_eq!(
            cuFuncGetParamInfo(k.add, 2, &mut offset, &mut size),
            codes::INVALID_VALUE
        );
        assert_eq!(
            cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut number, k.add, 256, 0),
            OK
        );
        assert_eq!(number, 4);
    }
    assert_eq!(run(k.large, [1; 3], [1; 3], 100_000), OK);
    unsafe {
        assert_eq!(
            cuLaunchKernel(k.add, 1, 1, 1, 1, 1, 1, 0, 0, null(), null()),
            codes::INVALID_VALUE
        );
        expect("no parameters");
        // Parameters in a buffer, whose size is known and checked.
        let buffer = [x, 5];
        for (len, code) in [(12usize, OK), (8, codes::INVALID_VALUE)] {
            let (pointer, size): (*mut c_void, *mut c_void) =
                (without_provenance_mut(1), without_provenance_mut(2));
            let extra = [
                pointer,
                buffer.as_ptr().cast_mut().cast(),
                size,
                (&raw const len).cast_mut().cast(),
                null_mut(),
            ];
            assert_eq!(
                cuLaunchKernel(k.add, 1, 1, 1, 4, 1, 1, 0, 0, null(), extra.as_ptr()),
                code
            );
        }
        expect("8 bytes of parameters are passed; the kernel has 12");
        let stale = device(&[1; 4]);
        free(stale);
        assert_eq!(launch(k.add, 0, stale, 1), codes::INVALID_VALUE);
        expect("which has been freed");
        assert_eq!(cuCtxSynchronize(), OK);
        assert_eq!(cuModuleUnload(k.module), OK);
    }
    assert_eq!(read(x, 4), [6; 4]);
    free(x);
    gpu.finish();
}

#[test]
fn images_are_checked() {
    let gpu = gpu(&[]);
    let load = |text: &CStr| {
        let mut module = 0;
        let code = unsafe { cuModuleLoadData(&mut module, text.as_ptr().cast()) };
        if code == OK {
            assert_eq!(unsafe { cuModuleUnload(module) }, OK);
        }
        code
    };
    assert_eq!(load(KERNELS), OK);
    assert_eq!(
        load(c".version 8.5\n.target sm_80\n.address_size 64\n"),
        codes::UNSUPPORTED_PTX_VERSION
    );
    expect("newer than driver 12040");
    assert_eq!(
        load(c".version 8.0\n.target sm_90\n.address_size 64\n"),
        codes::INVALID_PTX
    );
    expect("sm_90");
    assert_eq!(load(c".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry f()\n{\n frobnicate.u32 %r1;\n}\n"), codes::INVALID_PTX);
    expect("frobnicate");
    assert_eq!(load(c"hello"), codes::INVALID_PTX);
    expect(".version");
    assert_eq!(load(c"\x7fELF..."), codes::NO_BINARY_FOR_GPU);
    unsafe {
        let k = kernels();
        let mut function = 0;
        assert_eq!(
            cuModuleGetFunction(&mut function, k.module, c"none".as_ptr()),
            codes::NOT_FOUND
        );
        let mut count = 0;
        assert_eq!(cuModuleGetFunctionCount(&mut count, k.module), OK);
        assert_eq!(count, 4);
        assert_eq!(cuModuleUnload(k.module), OK);
        // The log of a failed load.
        let mut log = [0u8; 200];
        let values = [log.as_mut_ptr().cast::<c_void>(), 200 as *mut c_void];
        let text = c".version 7.0\n.target sm_86\n";
        let code = cuModuleLoadDataEx(
            &mut 0,
            text.as_ptr().cast(),
            2,
            [5, 6].as_ptr(),
            values.as_ptr(),
        );
        assert_eq!(code, codes::INVALID_PTX);
        assert!(
            CStr::from_bytes_until_nul(&log)
                .unwrap()
                .to_str()
                .unwrap()
                .contains("sm_86")
        );
        expect("sm_86");
    }
    gpu.finish();
}

#[test]
fn allocations_beyond_the_memory_of_the_device_fail() {
    let gpu = gpu(&[("memory", "1M")]);
    let s = stream();
    let (mut x, mut y) = (0, 0);
    let (mut left, mut all) = (0, 0);
    unsafe {
        assert_eq!(cuMemAllocAsync(&mut x, 700_000, s), OK);
        assert_eq!(cuMemAlloc_v2(&mut y, 700_000), codes::OUT_OF_MEMORY);
        assert_eq!(cuMemGetInfo_v2(&mut left, &mut all), OK);
        assert_eq!((left, all), ((1 << 20) - 700_416, 1 << 20));
        assert_eq!(cuMemFreeAsync(x, s), OK);
        assert_eq!(cuMemAlloc_v2(&mut y, 700_000), OK, "queued frees run first");
        assert_eq!(statistic("peak_memory"), 700_416);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    free(y);
    gpu.finish();
}

static HOST_CALLS: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn note(data: *mut c_void) {
    HOST_CALLS.store(data as u64, Ordering::SeqCst);
}

unsafe extern "C" fn misbehave(_data: *mut c_void) {
    HOST_CALLS.store(unsafe { cuCtxSynchronize() } as u64, Ordering::SeqCst);
}

#[test]
fn host_functions_run_in_order_and_may_not_call_the_driver() {
    let gpu = gpu(&[]);
    let s = stream();
    unsafe {
        HOST_CALLS.store(0, Ordering::SeqCst);
        assert_eq!(cuLaunchHostFunc(s, Some(note), 7 as *mut c_void), OK);
        assert_eq!(HOST_CALLS.load(Ordering::SeqCst), 0);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(HOST_CALLS.load(Ordering::SeqCst), 7);
        assert_eq!(cuLaunchHostFunc(s, Some(misbehave), null_mut()), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(
            HOST_CALLS.load(Ordering::SeqCst),
            codes::NOT_PERMITTED as u64
        );
        expect("called by a host function");
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    gpu.finish();
}

#[test]
fn the_device_has_the_properties_in_the_settings() {
    let gpu = gpu(&[
        ("compute_capability", "7.5"),
        ("driver", "11080"),
        ("name", "old one"),
        ("memory", "2G"),
    ]);
    let mut number = 0;
    let mut bytes = 0;
    unsafe {
        for (attribute, wanted) in [(75, 7), (76, 5), (97, 65536), (16, 4), (10, 32), (115, 1)] {
            assert_eq!(cuDeviceGetAttribute(&mut number, attribute, 0), OK);
            assert_eq!(number, wanted, "attribute {attribute}");
        }
        assert_eq!(cuDriverGetVersion(&mut number), OK);
        assert_eq!(number, 11080);
        assert_eq!(cuDeviceTotalMem_v2(&mut bytes, 0), OK);
        assert_eq!(bytes, 2 << 30);
        let mut name = [0u8; 5];
        assert_eq!(cuDeviceGetName(name.as_mut_ptr().cast(), 5, 0), OK);
        assert_eq!(&name, b"old \0");
        assert_eq!(cuDeviceGet(&mut number, 1), codes::INVALID_DEVICE);
        assert_eq!(set("devices", "0"), 0);
        assert_eq!(cuInit(0), codes::NO_DEVICE);
        assert_eq!(set("devices", "1"), 0);
        let mut text = null();
        assert_eq!(cuGetErrorName(codes::OUT_OF_MEMORY, &mut text), OK);
        assert_eq!(CStr::from_ptr(text), c"CUDA_ERROR_OUT_OF_MEMORY");
        assert_eq!(cuGetErrorString(codes::NO_DEVICE, &mut text), OK);
        assert_eq!(CStr::from_ptr(text), c"no CUDA-capable device is detected");
        assert_eq!(cuGetErrorName(12345, &mut text), codes::INVALID_VALUE);
        assert_eq!(cuMemPoolCreate(), codes::NOT_SUPPORTED);
    }
    gpu.finish();
}

#[test]
fn eager_calls_report_their_own_fault() {
    let gpu = gpu(&[("schedule", "eager")]);
    let (s, k) = (stream(), kernels());
    let x = device(&[1; 4]);
    assert_eq!(launch(k.add, s, x, 1), OK);
    assert_eq!(vgpu_pending(), 0);
    assert_eq!(launch(k.add, s, x + 8, 1), codes::ILLEGAL_ADDRESS);
    expect("OutOfBounds");
    drop(gpu);
}

#[test]
fn a_destroyed_stream_ends_its_capture() {
    let gpu = gpu(&[]);
    let (a, b, e) = (stream(), stream(), event());
    unsafe {
        assert_eq!(cuStreamBeginCapture_v2(a, 0), OK);
        assert_eq!(cuEventRecord(e, a), OK);
        assert_eq!(cuStreamWaitEvent(b, e, 0), OK);
        assert_eq!(cuStreamDestroy_v2(a), codes::STREAM_CAPTURE_UNSUPPORTED);
        expect("is being captured");
        assert_eq!(cuStreamSynchronize(b), OK);
        assert_eq!(cuStreamDestroy_v2(b), OK);
        assert_eq!(cuEventDestroy_v2(e), OK);
    }
    gpu.finish();
}

#[test]
fn no_panic_unwinds_out_of_a_call() {
    let gpu = gpu(&[]);
    let code = super::call("cuTest", super::Need::NOTHING, |_| panic!("on purpose"));
    assert_eq!(code, codes::UNKNOWN);
    expect("cuTest: the virtual GPU itself failed: on purpose");
    assert_eq!(unsafe { cuCtxSynchronize() }, OK, "the driver still works");
    gpu.finish();
}

#[test]
fn threads_share_the_device() {
    for schedule in ["late", "shuffle:9"] {
        let gpu = gpu(&[("schedule", schedule)]);
        let context = gpu.context;
        let work = move |seed: u32| {
            unsafe { assert_eq!(cuCtxSetCurrent(context), OK) };
            let (s, k, x) = (stream(), kernels(), device(&[seed; 4]));
            let back = pinned(4);
            for round in 1..=20 {
                unsafe {
                    assert_eq!(launch(k.add, s, x, 1), OK);
                    assert_eq!(cuMemcpyDtoHAsync_v2(back.as_mut_ptr().cast(), x, 16, s), OK);
                    assert_eq!(cuStreamSynchronize(s), OK);
                }
                assert_eq!(back, [seed + round; 4]);
            }
            unsafe {
                assert_eq!(cuModuleUnload(k.module), OK);
                assert_eq!(cuStreamDestroy_v2(s), OK);
            }
            free(x);
            assert_eq!(unpin(back), OK);
        };
        std::thread::scope(|scope| {
            for seed in 0..4 {
                scope.spawn(move || work(seed * 1000));
            }
        });
        assert_eq!(statistic("launches"), 80);
        gpu.finish();
    }
}

#[test]
fn a_copy_from_pageable_memory_may_still_run_when_its_call_returns() {
    let gpu = gpu(&[]);
    let (s, k) = (stream(), kernels());
    let (x, y) = (device(&[1; 4]), device(&[0; 4]));
    let memory = pinned(4);
    memory.fill(3);
    unsafe {
        assert_eq!(cuMemcpyHtoD_v2(x, [2u32; 4].as_ptr().cast(), 16), OK);
        assert_eq!(launch(k.shift, s, y, x), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(
            read(y, 4),
            [1; 4],
            "the stream does not wait for the default stream"
        );
        assert_eq!(cuMemcpyHtoD_v2(x, memory.as_ptr().cast(), 16), OK);
        assert_eq!(launch(k.shift, s, y, x), OK);
        assert_eq!(cuStreamSynchronize(s), OK);
        assert_eq!(read(y, 4), [3; 4], "from pinned memory it has run");
        assert_eq!(cuModuleUnload(k.module), OK);
        assert_eq!(cuStreamDestroy_v2(s), OK);
    }
    assert_eq!(unpin(memory), OK);
    free(x);
    free(y);
    gpu.finish();
}

#[test]
fn a_device_lost_during_a_capture_releases_everything() {
    let gpu = gpu(&[]);
    let (s, e, k) = (stream(), event(), kernels());
    let x = device(&[1; 4]);
    let memory = pinned(4);
    assert_eq!(unsafe { cuStreamBeginCapture_v2(s, 0) }, OK);
    assert_eq!(launch(k.add, s, x, 1), OK);
    fail("cuCtxGetCurrent", 1, codes::LAUNCH_FAILED, 1);
    let lost = codes::LAUNCH_FAILED;
    unsafe {
        assert_eq!(cuCtxGetCurrent(&mut 0), lost);
        assert_eq!(end(s).0, lost);
        assert_eq!(cuMemFree_v2(x), lost);
        assert_eq!(unpin(memory), lost);
        assert_eq!(cuModuleUnload(k.module), lost);
        assert_eq!(cuEventDestroy_v2(e), lost);
        assert_eq!(cuStreamDestroy_v2(s), lost);
    }
    gpu.finish();
}

/// `copies(u32* to, u32* from)`: one number per thread, after waiting for the kernels before.
/// `early`: the same, but it waits between reading and writing.
const OVERLAPPING: &CStr = cr#"
.version 8.0
.target sm_90
.address_size 64
.visible .entry copies(.param .u64 to, .param .u64 from)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [to];
    ld.param.u64 %rd2, [from];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    griddepcontrol.wait;
    griddepcontrol.launch_dependents;
    ld.global.u32 %r2, [%rd5];
    st.global.u32 [%rd4], %r2;
    ret;
}
.visible .entry early(.param .u64 to, .param .u64 from)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [to];
    ld.param.u64 %rd2, [from];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.u32 %r2, [%rd5];
    griddepcontrol.wait;
    st.global.u32 [%rd4], %r2;
    ret;
}
"#;

/// Loads the two kernels.
fn overlapping() -> [u64; 2] {
    let mut module = 0;
    let image = OVERLAPPING.as_ptr().cast();
    assert_eq!(unsafe { cuModuleLoadData(&mut module, image) }, OK);
    [c"copies", c"early"].map(|name| {
        let mut made = 0;
        let found = unsafe { cuModuleGetFunction(&mut made, module, name.as_ptr()) };
        assert_eq!(found, OK);
        made
    })
}

/// Launches one block of 4 threads, which may begin while the kernel before it still runs.
fn launch_early(function: u64, stream: u64, to: u64, from: u64) -> Code {
    let mut pointers = [&raw const to, &raw const from].map(|pointer| pointer as *mut c_void);
    let mut value = [0; 16];
    value[0] = 1;
    let attribute = Attribute {
        id: 6,
        pad: [0; 4],
        value,
    };
    let configuration = Configuration {
        grid: [1, 1, 1],
        block: [4, 1, 1],
        shared: 0,
        stream,
        attributes: &attribute,
        count: 1,
    };
    unsafe { cuLaunchKernelEx(&configuration, function, pointers.as_mut_ptr(), null()) }
}

#[test]
fn a_kernel_that_reads_what_the_one_before_it_writes_must_wait_first() {
    let gpu = gpu(&[("compute_capability", "9.0")]);
    let [copies, early] = overlapping();
    let (stream, other) = (stream(), device(&[0; 4]));
    let (from, to) = (device(&[1, 2, 3, 4]), device(&[0; 4]));
    assert_eq!(launch_early(copies, stream, to, from), OK);
    // What an older kernel has written may be read at once, and so may what no kernel writes.
    assert_eq!(launch_early(early, stream, other, from), OK);
    assert_eq!(launch_early(early, stream, from, to), OK);
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, OK);
    assert_eq!(statistic("overlapping"), 2);
    assert_eq!(read(from, 4), [1, 2, 3, 4]);
    // A copy waits for the kernel before it, and the kernel after it waits for the copy.
    assert_eq!(launch_early(copies, stream, to, from), OK);
    assert_eq!(unsafe { cuMemcpyDtoDAsync_v2(other, from, 16, stream) }, OK);
    assert_eq!(launch_early(early, stream, from, to), OK);
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, OK);
    assert_eq!(violations(), Vec::<String>::new());
    assert_eq!(launch_early(copies, stream, to, from), OK);
    assert_eq!(launch_early(early, stream, other, to), OK);
    assert_ne!(unsafe { cuStreamSynchronize(stream) }, OK);
    expect("reads what the kernel before it writes");
    drop(gpu);
}

#[test]
fn recorded_kernels_overlap_as_well() {
    let gpu = gpu(&[("compute_capability", "9.0")]);
    let [copies, early] = overlapping();
    let (stream, other) = (stream(), device(&[0; 4]));
    let (from, to) = (device(&[1, 2, 3, 4]), device(&[0; 4]));
    let record = |first: u64| {
        let (mut graph, mut exec) = (0, 0);
        unsafe {
            assert_eq!(cuStreamBeginCapture_v2(stream, 1), OK);
            assert_eq!(launch_early(copies, stream, to, from), OK);
            assert_eq!(launch_early(first, stream, other, to), OK);
            assert_eq!(cuStreamEndCapture(stream, &mut graph), OK);
            assert_eq!(cuGraphInstantiateWithFlags(&mut exec, graph, 0), OK);
            assert_eq!(cuGraphDestroy(graph), OK);
        }
        exec
    };
    let (sound, unsound) = (record(copies), record(early));
    assert_eq!(statistic("graph_nodes"), 2);
    unsafe {
        assert_eq!(cuGraphLaunch(sound, stream), OK);
        assert_eq!(cuStreamSynchronize(stream), OK);
        // The first kernel of a graph waits for what was queued before.
        assert_eq!(statistic("overlapping"), 1);
        assert_eq!(violations(), Vec::<String>::new());
        assert_eq!(cuGraphLaunch(unsound, stream), OK);
        assert_ne!(cuStreamSynchronize(stream), OK);
    }
    expect("reads what the kernel before it writes");
    drop(gpu);
}

#[test]
fn kernels_do_not_overlap_on_older_gpus() {
    let gpu = gpu(&[("compute_capability", "8.0")]);
    let kernels = kernels();
    let (stream, to) = (stream(), device(&[0; 4]));
    let from = device(&[1, 2, 3, 4]);
    assert_eq!(launch_early(kernels.shift, stream, to, from), OK);
    assert_eq!(launch_early(kernels.shift, stream, from, to), OK);
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, OK);
    assert_eq!(statistic("overlapping"), 0);
    unsafe {
        assert_eq!(cuModuleUnload(kernels.module), OK);
        for memory in [to, from] {
            assert_eq!(cuMemFree_v2(memory), OK);
        }
        assert_eq!(cuStreamDestroy_v2(stream), OK);
    }
    gpu.finish();
}

#[test]
fn an_image_for_an_older_gpu_may_not_hold_newer_instructions() {
    let gpu = gpu(&[("compute_capability", "9.0")]);
    let text = OVERLAPPING.to_str().unwrap().replace("sm_90", "sm_80");
    let (text, mut module) = (CString::new(text).unwrap(), 0);
    let loaded = unsafe { cuModuleLoadData(&mut module, text.as_ptr().cast()) };
    assert_eq!(loaded, codes::INVALID_PTX);
    expect("needs .target sm_90");
    drop(gpu);
}
