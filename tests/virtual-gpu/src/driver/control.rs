//! Functions for tests to control and inspect the virtual GPU. No real driver has them; tests
//! find them with `dlsym`. Texts are written to a buffer of the caller: such a function returns
//! the length of the text in bytes, and copies as much as fits, followed by a 0.
//!
//! - `vgpu_reset()`: resets statistics, injected failures and settings to their initial state;
//!   allocations stay.
//! - `vgpu_set(key, value)`: changes a setting. Returns 0, or prints the reason for a failure.
//! - `vgpu_fail(function, nth, code, times)`: makes the `nth` call of a driver function from
//!   now on (counted from 1), and the `times - 1` calls after it, fail with `code`.
//! - `vgpu_waiting_failures()`: requested failures that have not all happened yet.
//! - `vgpu_violation_count()`: number of violations since the reset.
//! - `vgpu_violation(index, buffer, len)`: text of one violation (of the first 1000).
//! - `vgpu_violations(buffer, len)`: texts of these violations, one per line.
//! - `vgpu_calls(buffer, len)`: driver functions called since the reset with their counts, one
//!   per line.
//! - `vgpu_call_count(function)`: number of calls of one driver function.
//! - `vgpu_kernels(buffer, len)`: kernels that ran, with their launches and warp instructions,
//!   one per line.
//! - `vgpu_launches(buffer, len)`: launches that ran with the setting `count`, one line of JSON
//!   each: grid, block, shared memory, and the counts that `Counts` in `ptx/count` describes.
//! - `vgpu_forget_launches()`: empties that list.
//! - `vgpu_statistic(name)`: one statistic, or `u64::MAX` if the name is unknown.
//! - `vgpu_leaks(buffer, len)`: objects that are alive now in any context, one per line.
//!   Returns the number of lines.
//! - `vgpu_pending()`: number of queued operations that have not run.
//! - `vgpu_label(address, name)`: names an allocation in reports.
//!
//! Function names are accepted with and without their `_v2`. If a failure is injected into a
//! function that releases something (free, destroy, unload, release), the function does its
//! work first and then returns the error. Real drivers behave the same, since such an error
//! comes from earlier work. A failure with a code that breaks a context (700, 719, ...) breaks
//! the current one.
//!
//! Settings, see [`Settings`]: `name`, `compute_capability`,
//! `memory`, `driver`, `devices`, `multiprocessors`, `shared_memory`, `memory_pools`,
//! `schedule`, `threads`, `check_races`, `check_initialised`, `check_copies`, `count`,
//! `backtrace`.
//! Statistics: `launches`, `warp_instructions`, `synchronisations` (calls that made the host
//! wait), `graph_launches`, `graph_nodes` (of the graph that was made executable last),
//! `overlapping` (kernels that could begin while the one before still ran), `queued`, `executed`, `injected`, `undefined_bytes` (copied to the
//! host), `peak_memory`, `violations`.
//!
//! These environment variables configure a process: `VGPU_` and a setting's key in capitals
//! (`VGPU_SCHEDULE=shuffle:7`); `VGPU_FAIL=FUNCTION:NTH:CODE[:TIMES]`, or several of them
//! separated by commas; `VGPU_REPORT=FILE` writes the report to a file when the process ends.
//! Violations are always printed to standard error. A process uses the library without any
//! change if a folder on its `LD_LIBRARY_PATH` contains it under the names `libcuda.so` and
//! `libcuda.so.1`.

use super::lock;
use super::report::{Injection, Report, parse_injection};
use super::settings::Settings;
use std::ffi::{CStr, c_char};
use std::panic::catch_unwind;

/// Copies as much of a text as fits into a buffer, followed by a 0. Returns the length of the
/// whole text.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
pub unsafe fn copy_text(text: &str, buffer: *mut c_char, len: usize) -> usize {
    if !buffer.is_null() && len > 0 {
        let kept = text.len().min(len - 1);
        // SAFETY: `kept` bytes and the 0 fit.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast::<u8>(), kept);
            buffer.add(kept).write(0);
        }
    }
    text.len()
}

/// # Safety
/// `text` must be null or a C string.
unsafe fn argument(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: guaranteed by the caller.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// Runs `body` and returns `default` if it panics, since a panic must not leave a C function.
fn guarded<T>(default: T, body: impl FnOnce() -> T + std::panic::UnwindSafe) -> T {
    catch_unwind(body).unwrap_or(default)
}

/// Resets statistics, injected failures and settings to their initial state.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_reset() {
    guarded((), || {
        let mut driver = lock();
        driver.report = Report::default();
        inject_from_environment(&mut driver.report);
        driver.apply(Settings::from_environment());
    });
}

/// Changes a setting. Returns 0 on success.
///
/// # Safety
/// `key` and `value` must be null or C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_set(key: *const c_char, value: *const c_char) -> i32 {
    // SAFETY: guaranteed by the caller.
    let (key, value) = unsafe { (argument(key), argument(value)) };
    guarded(1, move || {
        let mut driver = lock();
        let mut settings = driver.settings.clone();
        match settings.set(&key, &value) {
            Ok(()) => {
                driver.apply(settings);
                0
            }
            Err(why) => {
                eprintln!("virtual GPU: {key} = {value}: {why}");
                1
            }
        }
    })
}

/// Makes calls of a driver function fail.
///
/// # Safety
/// `function` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_fail(function: *const c_char, nth: u64, code: i32, times: u64) {
    // SAFETY: guaranteed by the caller.
    let function = unsafe { argument(function) };
    guarded((), move || {
        lock().report.inject(Injection {
            function,
            before: nth.saturating_sub(1),
            times,
            code,
        });
    });
}

/// Returns the number of requested failures that have not all happened yet.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_waiting_failures() -> u64 {
    guarded(0, || lock().report.waiting_injections() as u64)
}

/// Returns the number of violations since the reset.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_violation_count() -> u64 {
    guarded(u64::MAX, || lock().report.violation_count())
}

/// Copies the text of a violation; empty if the index is out of range.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_violation(index: u64, buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || {
        let driver = lock();
        usize::try_from(index)
            .ok()
            .and_then(|at| driver.report.violations().get(at).cloned())
            .unwrap_or_default()
    });
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&text, buffer, len) }
}

/// Copies the texts of all violations, one per line.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_violations(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.violations().join("\n"));
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&text, buffer, len) }
}

/// Copies the names of all driver functions called, with their counts.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_calls(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.calls());
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&text, buffer, len) }
}

/// Returns the number of calls of one driver function.
///
/// # Safety
/// `function` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_call_count(function: *const c_char) -> u64 {
    // SAFETY: guaranteed by the caller.
    let function = unsafe { argument(function) };
    guarded(u64::MAX, move || lock().report.calls_of(&function))
}

/// Copies the names of all kernels that ran, with their launches and warp instructions.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_kernels(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.kernels());
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&text, buffer, len) }
}

/// Copies the counted launches, one line of JSON each.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_launches(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.launches());
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&text, buffer, len) }
}

/// Forgets the counted launches.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_forget_launches() {
    guarded((), || lock().report.forget_launches());
}

/// Returns a statistic by name, or `u64::MAX` if the name is unknown.
///
/// # Safety
/// `name` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_statistic(name: *const c_char) -> u64 {
    // SAFETY: guaranteed by the caller.
    let name = unsafe { argument(name) };
    guarded(u64::MAX, move || {
        lock().report.statistic(&name).unwrap_or(u64::MAX)
    })
}

/// Copies descriptions of the objects that are alive in any context. Returns their number.
///
/// # Safety
/// `buffer` must be null or have room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_leaks(buffer: *mut c_char, len: usize) -> usize {
    let lines = guarded(Vec::new(), || {
        let driver = lock();
        let contexts = driver.contexts.handles(|_| true);
        contexts
            .iter()
            .flat_map(|context| driver.leaks(*context))
            .collect::<Vec<_>>()
    });
    // SAFETY: guaranteed by the caller.
    unsafe { copy_text(&lines.join("\n"), buffer, len) };
    lines.len()
}

/// Returns the number of queued operations that have not run.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_pending() -> u64 {
    guarded(u64::MAX, || lock().queue.len() as u64)
}

/// Names an allocation in reports.
///
/// # Safety
/// `name` must be null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_label(address: u64, name: *const c_char) {
    // SAFETY: guaranteed by the caller.
    let name = unsafe { argument(name) };
    guarded((), move || {
        if let Some(found) = lock().memory.get_mut(address) {
            found.label = format!("{name} ({} bytes)", found.len);
        }
    });
}

/// Injects the failures that `VGPU_FAIL` requests. A malformed value aborts the process,
/// because a test must not pass just because its failure was never injected.
pub fn inject_from_environment(report: &mut Report) {
    let Ok(wanted) = std::env::var("VGPU_FAIL") else {
        return;
    };
    for text in wanted.split(',').filter(|text| !text.trim().is_empty()) {
        match parse_injection(text.trim()) {
            Ok(injection) => report.inject(injection),
            Err(why) => {
                eprintln!("virtual GPU: VGPU_FAIL={text}: {why}");
                std::process::abort();
            }
        }
    }
}

/// Arranges for the report to be written when the process ends, if `VGPU_REPORT` is set.
pub fn at_exit() {
    unsafe extern "C" {
        fn atexit(function: extern "C" fn()) -> i32;
    }
    if std::env::var_os("VGPU_REPORT").is_some() {
        // SAFETY: the function exists for as long as the library, which users of a driver do
        // not unload; it does not unwind.
        unsafe { atexit(write_report) };
    }
}

extern "C" fn write_report() {
    guarded((), || {
        let Some(path) = std::env::var_os("VGPU_REPORT") else {
            return;
        };
        if super::IN_HOST_FUNCTION.get() {
            eprintln!("virtual GPU: the process ends within a host function, without a report");
            return;
        }
        let driver = lock();
        let mut text = driver.report.text();
        for context in driver.contexts.handles(|_| true) {
            for leak in driver.leaks(context) {
                text.push_str(&format!("alive {leak}\n"));
            }
        }
        if let Err(error) = std::fs::write(&path, text) {
            eprintln!(
                "virtual GPU: {}: {error}",
                std::path::Path::new(&path).display()
            );
        }
    });
}
