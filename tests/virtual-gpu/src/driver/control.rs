//! What tests steer and ask: functions that no real driver has, to be found with
//! `dlsym`. Texts go into a buffer of the caller: a function that gives a text returns
//! its length in bytes and copies as much as fits, with a closing 0.
//!
//! | function | what it does |
//! |---|---|
//! | `vgpu_reset()` | books, injected failures and settings as at the start; what is allocated stays |
//! | `vgpu_set(key, value)` | changes a setting; 0 if it did, else the reason is printed |
//! | `vgpu_fail(function, nth, code, times)` | lets the `nth` call from now on (from 1) of a driver function fail with `code`, `times` times in a row |
//! | `vgpu_waiting_failures()` | failures asked for that have not all happened |
//! | `vgpu_violation_count()` | violations since the reset |
//! | `vgpu_violation(index, buffer, len)` | the text of one (of the first 1000) |
//! | `vgpu_violations(buffer, len)` | the texts of all, a line each |
//! | `vgpu_calls(buffer, len)` | each driver function called since the reset with its count, a line each |
//! | `vgpu_call_count(function)` | calls of one driver function |
//! | `vgpu_kernels(buffer, len)` | each kernel that ran: name, launches, warp instructions, a line each |
//! | `vgpu_statistic(name)` | one number, `u64::MAX` if there is none of that name |
//! | `vgpu_leaks(buffer, len)` | what is alive now, in all contexts, a line each; gives the count of lines |
//! | `vgpu_pending()` | queued work that has not run |
//! | `vgpu_label(address, name)` | a name for an allocation, for reports |
//!
//! Function names are understood with and without their `_v2`. A failure of a function
//! that lets go of something (free, destroy, unload, release) is returned after the
//! function has done its work: so does a real driver, where such an error comes from
//! earlier work. A failure with a code that breaks a context (700, 719, ...) breaks the
//! current one.
//!
//! Settings, see [`Settings`](super::settings::Settings): `name`, `compute_capability`,
//! `memory`, `driver`, `devices`, `multiprocessors`, `shared_memory`, `memory_pools`,
//! `schedule`, `threads`, `check_races`, `check_initialised`, `check_copies`,
//! `backtrace`. Statistics: `launches`, `warp_instructions`, `synchronisations` (calls
//! that made the host wait), `graph_launches`, `queued`, `executed`, `injected`,
//! `undefined_bytes` (copied to the host), `peak_memory`, `violations`.
//!
//! In the environment of a process: `VGPU_` and a setting's key in capitals
//! (`VGPU_SCHEDULE=shuffle:7`); `VGPU_FAIL=FUNCTION:NTH:CODE[:TIMES]`, several with
//! commas between; `VGPU_REPORT=FILE` writes the books to a file when the process ends.
//! Violations are printed to the standard error output in any case. For a process to
//! find the library without being changed, a folder on its `LD_LIBRARY_PATH` has it
//! under the names `libcuda.so` and `libcuda.so.1`.

use super::lock;
use super::report::{Injection, Report, parse_injection};
use super::settings::Settings;
use std::ffi::{CStr, c_char};
use std::panic::catch_unwind;

/// Copies a text with a closing 0 into a buffer, as much as fits. Gives its length.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
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
/// `text` is null or a C string.
unsafe fn argument(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's promise.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// Keeps a panic from leaving a C function.
fn guarded<T>(default: T, body: impl FnOnce() -> T + std::panic::UnwindSafe) -> T {
    catch_unwind(body).unwrap_or(default)
}

/// Books, injected failures and settings as at the start.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_reset() {
    guarded((), || {
        let mut driver = lock();
        driver.report = Report::default();
        inject_from_environment(&mut driver.report);
        driver.apply(Settings::from_environment());
    });
}

/// Changes a setting.
///
/// # Safety
/// Both are C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_set(key: *const c_char, value: *const c_char) -> i32 {
    // SAFETY: by the caller's promise.
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

/// Lets calls of a driver function fail.
///
/// # Safety
/// `function` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_fail(function: *const c_char, nth: u64, code: i32, times: u64) {
    // SAFETY: by the caller's promise.
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

/// Failures asked for that have not all happened.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_waiting_failures() -> u64 {
    guarded(0, || lock().report.waiting_injections() as u64)
}

/// Violations since the reset.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_violation_count() -> u64 {
    guarded(u64::MAX, || lock().report.violation_count())
}

/// The text of a violation; empty if there is none of this index.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_violation(index: u64, buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || {
        let driver = lock();
        usize::try_from(index)
            .ok()
            .and_then(|at| driver.report.violations().get(at).cloned())
            .unwrap_or_default()
    });
    // SAFETY: by the caller's promise.
    unsafe { copy_text(&text, buffer, len) }
}

/// The texts of all violations, a line each.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_violations(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.violations().join("\n"));
    // SAFETY: by the caller's promise.
    unsafe { copy_text(&text, buffer, len) }
}

/// Each driver function called, with its count.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_calls(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.calls());
    // SAFETY: by the caller's promise.
    unsafe { copy_text(&text, buffer, len) }
}

/// Calls of one driver function.
///
/// # Safety
/// `function` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_call_count(function: *const c_char) -> u64 {
    // SAFETY: by the caller's promise.
    let function = unsafe { argument(function) };
    guarded(u64::MAX, move || lock().report.calls_of(&function))
}

/// Each kernel that ran: name, launches, warp instructions.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_kernels(buffer: *mut c_char, len: usize) -> usize {
    let text = guarded(String::new(), || lock().report.kernels());
    // SAFETY: by the caller's promise.
    unsafe { copy_text(&text, buffer, len) }
}

/// One number by name.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_statistic(name: *const c_char) -> u64 {
    // SAFETY: by the caller's promise.
    let name = unsafe { argument(name) };
    guarded(u64::MAX, move || {
        lock().report.statistic(&name).unwrap_or(u64::MAX)
    })
}

/// What is alive now, in all contexts; gives the count.
///
/// # Safety
/// `buffer` is null or has room for `len` bytes.
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
    // SAFETY: by the caller's promise.
    unsafe { copy_text(&lines.join("\n"), buffer, len) };
    lines.len()
}

/// Queued work that has not run.
#[unsafe(no_mangle)]
pub extern "C" fn vgpu_pending() -> u64 {
    guarded(u64::MAX, || lock().queue.len() as u64)
}

/// A name for an allocation.
///
/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vgpu_label(address: u64, name: *const c_char) {
    // SAFETY: by the caller's promise.
    let name = unsafe { argument(name) };
    guarded((), move || {
        if let Some(found) = lock().memory.get_mut(address) {
            found.label = format!("{name} ({} bytes)", found.len);
        }
    });
}

/// Takes `VGPU_FAIL`. What cannot be understood ends the process: a test must not pass
/// because no failure came.
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

/// Lets the books be written when the process ends, if `VGPU_REPORT` asks for that.
pub fn at_exit() {
    unsafe extern "C" {
        fn atexit(function: extern "C" fn()) -> i32;
    }
    if std::env::var_os("VGPU_REPORT").is_some() {
        // SAFETY: the function is there for as long as the library, which is not
        // unloaded by those who use a driver; it does not unwind.
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
