//! [`Simd`] in plain Rust, as arrays that the compiler vectorises as well as it can.

use super::{LANES, Simd};
use half::{bf16, f16};

/// The portable instruction set, which every machine supports.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Returns `a · b + c`, fused if the target has an instruction for it. Elsewhere, fusing would
/// take a library call per lane.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[inline(always)]
fn lanes<T: Copy, U>(a: [T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn pairs<T: Copy>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// Combines the two halves with each other until one lane is left.
#[inline(always)]
fn tree<T: Copy>(mut a: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            a[i] = f(a[i], a[i + width]);
        }
    }
    a[0]
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: the caller guarantees the pointer.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller guarantees the pointer.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: the caller guarantees the pointer.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes(bits, |b| bf16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::F {
        // SAFETY: the caller guarantees the pointer.
        lanes(
            unsafe { from.cast::<[i8; LANES]>().read_unaligned() },
            f32::from,
        )
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: Self::F) {
        // SAFETY: the caller guarantees the pointer.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: Self::F) {
        let finite = self.max(self.splat(-65504.0), self.min(self.splat(65504.0), value));
        let bits = lanes(finite, |v| f16::from_f32(v).to_bits());
        // SAFETY: the caller guarantees the pointer.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| multiply_add(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        lanes(a, f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        lanes(a, f32::round_ties_even)
    }
    #[inline(always)]
    fn select_lt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        tree(a, |a, b| a + b)
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        tree(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> Self::I {
        // SAFETY: the caller guarantees the pointer.
        let bytes = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        lanes(bytes, i32::from_le_bytes)
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut i8, value: Self::I) {
        // SAFETY: the caller guarantees the pointer.
        unsafe {
            to.cast::<[i8; LANES]>()
                .write_unaligned(lanes(value, |v| v as i8))
        }
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        pairs(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        pairs(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, a: Self::I) -> Self::I {
        lanes(a, |a| (a as u32 >> BITS) as i32)
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            let products = (0..4).map(|j| i32::from(w[j]) * i32::from(x[j] as i8));
            acc[i].wrapping_add(products.sum())
        })
    }
    #[inline(always)]
    fn reduce_add_i(self, a: Self::I) -> i32 {
        tree(a, i32::wrapping_add)
    }
    #[inline(always)]
    fn to_int(self, a: Self::F) -> Self::I {
        lanes(a, |a| a.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        lanes(a, |a| a as f32)
    }
    #[inline(always)]
    fn power_of_two(self, n: Self::I) -> Self::F {
        lanes(n, |n| f32::from_bits((n.wrapping_add(127) as u32) << 23))
    }
}
