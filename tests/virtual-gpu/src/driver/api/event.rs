//! Event management.

use crate::driver::codes::{self, Code};
use crate::driver::objects::{Event, Recorded};
use crate::driver::{Driver, Failure, Need, call};

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut u64, flags: u32) -> Code {
    call("cuEventCreate", Need::CONTEXT, |driver| {
        if flags > 7 {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown event flags {flags:#x}"),
            );
        }
        if flags & INTERPROCESS != 0 {
            return Err(Failure(codes::NOT_SUPPORTED));
        }
        let context = driver.current()?;
        let timing = flags & DISABLE_TIMING == 0;
        let made = driver.events.insert(Event {
            context,
            timing,
            recorded: Recorded::Never,
            time: None,
            asked: false,
        });
        // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
        unsafe { super::put(driver, event, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: u64) -> Code {
    call("cuEventDestroy_v2", Need::RELEASE, |driver| {
        driver.event(event)?;
        driver.events.remove(event);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: u64, stream: u64) -> Code {
    call("cuEventRecord", Need::CONTEXT, |driver| {
        let stream = driver.resolve_stream(stream)?;
        driver.record(event, stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecordWithFlags(event: u64, stream: u64, flags: u32) -> Code {
    call("cuEventRecordWithFlags", Need::CONTEXT, |driver| {
        if flags > 1 {
            return driver.refuse(
                codes::INVALID_VALUE,
                &format!("unknown record flags {flags:#x}"),
            );
        }
        let stream = driver.resolve_stream(stream)?;
        if flags == 1 && driver.stream(stream)?.capture.is_some() {
            return Err(Failure(codes::NOT_SUPPORTED));
        }
        driver.record(event, stream)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: u64) -> Code {
    call("cuEventQuery", Need::INIT, |driver| {
        driver.query_event(event)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: u64) -> Code {
    call("cuEventSynchronize", Need::CONTEXT, |driver| {
        driver.synchronise_event(event)
    })
}

/// # Safety
/// The pointers must be valid; see the [parent module](super).
unsafe fn elapsed(
    driver: &mut Driver,
    milliseconds: *mut f32,
    start: u64,
    end: u64,
) -> Result<(), Failure> {
    let mut times = [None; 2];
    for (event, time) in [start, end].into_iter().zip(&mut times) {
        driver.forbidden_on_captured_event(event)?;
        let found = driver.event(event)?;
        if !found.timing {
            return driver.refuse(codes::INVALID_HANDLE, "the event was made without timing");
        }
        if found.recorded == Recorded::Never {
            return driver.refuse(codes::INVALID_HANDLE, "the event was never recorded");
        }
        *time = found.time;
    }
    let [Some(start), Some(end)] = times else {
        return Err(Failure(codes::NOT_READY));
    };
    let seconds = end.saturating_duration_since(start).as_secs_f32()
        - start.saturating_duration_since(end).as_secs_f32();
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    unsafe { super::put(driver, milliseconds, seconds * 1000.0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: u64, end: u64) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuEventElapsedTime", Need::CONTEXT, |driver| unsafe {
        elapsed(driver, milliseconds, start, end)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(
    milliseconds: *mut f32,
    start: u64,
    end: u64,
) -> Code {
    // SAFETY: the caller's pointers are valid, as the CUDA driver API requires.
    call("cuEventElapsedTime_v2", Need::CONTEXT, |driver| unsafe {
        elapsed(driver, milliseconds, start, end)
    })
}
