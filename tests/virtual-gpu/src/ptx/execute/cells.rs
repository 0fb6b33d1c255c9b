//! Single values in memory that other host threads may access at the same time.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// A value of 1, 2, 4 or 8 bytes.
pub trait Cell: Copy {
    /// # Safety
    /// The bytes must exist and be aligned to their size.
    unsafe fn read(data: *mut u8) -> Self;
    /// # Safety
    /// The bytes must exist and be aligned to their size.
    unsafe fn write(self, data: *mut u8);
    fn wide(self) -> u64;
    fn signed(self) -> u64;
    fn narrow(value: u64) -> Self;
    fn from_bytes(bytes: &[u8]) -> Self;
    fn to_bytes(self, bytes: &mut [u8]);
}

macro_rules! cell {
    ($($of:ty, $signed:ty, $atomic:ty;)*) => {$(
        impl Cell for $of {
            #[inline(always)]
            unsafe fn read(data: *mut u8) -> Self {
                // SAFETY: guaranteed by the caller.
                unsafe { <$atomic>::from_ptr(data.cast()).load(Relaxed) }
            }

            #[inline(always)]
            unsafe fn write(self, data: *mut u8) {
                // SAFETY: guaranteed by the caller.
                unsafe { <$atomic>::from_ptr(data.cast()).store(self, Relaxed) }
            }

            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }

            #[inline(always)]
            fn signed(self) -> u64 {
                self as $signed as i64 as u64
            }

            #[inline(always)]
            fn narrow(value: u64) -> Self {
                value as $of
            }

            #[inline(always)]
            fn from_bytes(bytes: &[u8]) -> Self {
                <$of>::from_le_bytes(bytes.try_into().unwrap_or_default())
            }

            #[inline(always)]
            fn to_bytes(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

cell! {
    u8, i8, AtomicU8;
    u16, i16, AtomicU16;
    u32, i32, AtomicU32;
    u64, i64, AtomicU64;
}

/// Evaluates `$body` with `$of` as the cell type of `$size` bytes.
macro_rules! sized {
    ($size:expr, $of:ident => $body:expr) => {
        match $size {
            1 => {
                type $of = u8;
                $body
            }
            2 => {
                type $of = u16;
                $body
            }
            4 => {
                type $of = u32;
                $body
            }
            _ => {
                type $of = u64;
                $body
            }
        }
    };
}
pub(super) use sized;

/// Returns whether all of 1, 2, 4, 8 or 16 marks (bytes) are set.
///
/// # Safety
/// The marks must exist.
#[inline(always)]
pub unsafe fn all_marked(marks: *const AtomicU8, count: usize) -> bool {
    /// Returns whether no byte is zero.
    fn full(word: u64) -> bool {
        word.wrapping_sub(0x0101_0101_0101_0101) & !word & 0x8080_8080_8080_8080 == 0
    }
    let marks = marks.cast_mut().cast::<u8>();
    let step = count.min(8);
    // SAFETY: the marks exist, as the caller guarantees; their alignment is checked here.
    unsafe {
        if !(marks as usize).is_multiple_of(step) {
            return (0..count).all(|at| u8::read(marks.add(at)) != 0);
        }
        match count {
            1 => u8::read(marks) != 0,
            2 => full(u64::from(u16::read(marks)) | !0xffff),
            4 => full(u64::from(u32::read(marks)) | !0xffff_ffff),
            8 => full(u64::read(marks)),
            _ => full(u64::read(marks)) && full(u64::read(marks.add(8))),
        }
    }
}

/// Sets 1, 2, 4, 8 or 16 marks.
///
/// # Safety
/// The marks must exist.
#[inline(always)]
pub unsafe fn set_marks(marks: *const AtomicU8, count: usize) {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let marks = marks.cast_mut().cast::<u8>();
    // SAFETY: the marks exist, as the caller guarantees; their alignment is checked here.
    unsafe {
        if !(marks as usize).is_multiple_of(count.min(8)) {
            return (0..count).for_each(|at| 1u8.write(marks.add(at)));
        }
        match count {
            1 => 1u8.write(marks),
            2 => (ONES as u16).write(marks),
            4 => (ONES as u32).write(marks),
            8 => ONES.write(marks),
            _ => {
                ONES.write(marks);
                ONES.write(marks.add(8));
            }
        }
    }
}
