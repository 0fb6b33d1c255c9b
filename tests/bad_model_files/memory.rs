//! Counts the bytes that each test has allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Upper limit on what a test may hold at any time. Its files have a few kilobytes each; the counts
/// that some of the files claim would take gigabytes.
const LIMIT: isize = 64 << 20;

struct Counting;

// Per thread, because tests run beside each other and some of them run whole models. Memory may be
// returned by another thread than the one that allocated it, hence the sign.
thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    let held = HELD.get() + bytes as isize;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    // By default, zeros would be written, and most of them are in pages that are never used.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Fails if the calling thread, which runs one test, held [`LIMIT`] or more bytes at any time.
pub fn assert_little_was_allocated() {
    let peak = PEAK.get();
    assert!(peak < LIMIT, "{peak} bytes were allocated");
}

#[test]
#[should_panic(expected = "bytes were allocated")]
fn large_allocations_are_counted() {
    drop(std::hint::black_box(vec![0u8; 2 * LIMIT as usize]));
    assert_little_was_allocated();
}
