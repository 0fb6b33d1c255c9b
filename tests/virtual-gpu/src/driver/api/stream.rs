//! Streams and stream capture.

use super::context::PRIORITIES;
use crate::driver::capture::{Mode, exchange_thread_mode};
use crate::driver::codes::{self, Code};
use crate::driver::objects::{Graph, Stream, StreamRole};
use crate::driver::{Driver, Failure, Need, call};

const NON_BLOCKING: u32 = 1;

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn create(
    driver: &mut Driver,
    stream: *mut u64,
    flags: u32,
    priority: i32,
) -> Result<(), Failure> {
    if flags & !NON_BLOCKING != 0 {
        return driver.refuse(
            codes::INVALID_VALUE,
            &format!("unknown stream flags {flags:#x}"),
        );
    }
    let context = driver.current()?;
    let made = driver.streams.insert(Stream {
        context,
        role: StreamRole::Created,
        blocking: flags & NON_BLOCKING == 0,
        priority: priority.clamp(PRIORITIES.1, PRIORITIES.0),
        tail: None,
        last_kernel: None,
        capture: None,
        asked: None,
    });
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { super::put(driver, stream, made) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut u64, flags: u32) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuStreamCreate", Need::CONTEXT, |driver| unsafe {
        create(driver, stream, flags, 0)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut u64,
    flags: u32,
    priority: i32,
) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call(
        "cuStreamCreateWithPriority",
        Need::CONTEXT,
        |driver| unsafe { create(driver, stream, flags, priority) },
    )
}

/// Work queued on the stream stays queued, as with a real driver: it is still reachable through
/// events and the context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: u64) -> Code {
    call("cuStreamDestroy_v2", Need::RELEASE, |driver| {
        if stream <= 2 {
            return driver.refuse(
                codes::INVALID_HANDLE,
                "a default stream cannot be destroyed",
            );
        }
        if driver.stream(stream)?.role != StreamRole::Created {
            return driver.refuse(
                codes::INVALID_HANDLE,
                "a default stream cannot be destroyed",
            );
        }
        let captured = driver.stream(stream)?.capture;
        driver.streams.remove(stream);
        match captured {
            Some(id) => driver.lose_captured_stream(id, stream),
            None => Ok(()),
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: u64) -> Code {
    call("cuStreamSynchronize", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        driver.synchronise_stream(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: u64) -> Code {
    call("cuStreamQuery", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        driver.query_stream(stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) -> Code {
    call("cuStreamWaitEvent", Need::CONTEXT, |driver| {
        if flags > 1 {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown wait flags {flags:#x}"),
            );
        }
        let stream = driver.resolve_stream(stream)?;
        driver.wait_event(stream, event)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetPriority(stream: u64, priority: *mut i32) -> Code {
    call("cuStreamGetPriority", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        let value = driver.stream(stream)?.priority;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, priority, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetFlags(stream: u64, flags: *mut u32) -> Code {
    call("cuStreamGetFlags", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        let value = if driver.stream(stream)?.blocking {
            0
        } else {
            NON_BLOCKING
        };
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, flags, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetId(stream: u64, id: *mut u64) -> Code {
    call("cuStreamGetId", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, id, stream) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCtx(stream: u64, context: *mut u64) -> Code {
    call("cuStreamGetCtx", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        let value = driver.stream(stream)?.context;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, context, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: u64, mode: i32) -> Code {
    call("cuStreamBeginCapture_v2", Need::CONTEXT, |driver| {
        let Some(mode) = Mode::from_raw(mode) else {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown capture mode {mode}"),
            );
        };
        let stream = driver.resolve_stream(stream)?;
        driver.begin_capture(stream, mode)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: u64, graph: *mut u64) -> Code {
    call("cuStreamEndCapture", Need::CONTEXT, |driver| {
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, graph, 0) }?;
        let stream = driver.resolve_stream(stream)?;
        let (context, nodes) = driver.end_capture(stream)?;
        let made = driver.graphs.insert(Graph {
            context,
            nodes: nodes.into(),
        });
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, graph, made) }
    })
}

/// Returns the `CUstreamCaptureStatus` of a stream and the ID of its capture.
fn capture_status(driver: &mut Driver, stream: u64) -> Result<(i32, u64), Failure> {
    let stream = driver.resolve_stream(stream)?;
    let captured = driver.stream(stream)?.capture;
    Ok(match captured {
        None => (0, 0),
        Some(id) if driver.capture_is_spoiled(id) => (2, id),
        Some(id) => (1, id),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: u64, status: *mut i32) -> Code {
    call("cuStreamIsCapturing", Need::CONTEXT, |driver| {
        let (value, _) = capture_status(driver, stream)?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, status, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo(
    stream: u64,
    status: *mut i32,
    id: *mut u64,
) -> Code {
    call("cuStreamGetCaptureInfo", Need::CONTEXT, |driver| {
        let (value, capture) = capture_status(driver, stream)?;
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put_optional(id, capture);
            super::put(driver, status, value)
        }
    })
}

/// Fails if the caller asks for the graph under construction or its nodes, which cannot be
/// returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo_v2(
    stream: u64,
    status: *mut i32,
    id: *mut u64,
    graph: *mut u64,
    depends: *mut *const u64,
    count: *mut usize,
) -> Code {
    call("cuStreamGetCaptureInfo_v2", Need::CONTEXT, |driver| {
        let (value, capture) = capture_status(driver, stream)?;
        if value == 1 && !(graph.is_null() && depends.is_null() && count.is_null()) {
            return Err(Failure(codes::NOT_SUPPORTED));
        }
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe {
            super::put_optional(id, capture);
            super::put(driver, status, value)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut i32) -> Code {
    call(
        "cuThreadExchangeStreamCaptureMode",
        Need::NOTHING,
        |driver| {
            // SAFETY: null is checked first; otherwise the pointer is valid, as the CUDA driver
            // API requires.
            let wanted = if mode.is_null() {
                -1
            } else {
                unsafe { mode.read() }
            };
            if Mode::from_raw(wanted).is_none() {
                return driver.refuse(
                    codes::INVALID_VALUE,
                    &format!("unknown capture mode {wanted}"),
                );
            }
            // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
            unsafe { super::put(driver, mode, exchange_thread_mode(wanted)) }
        },
    )
}
