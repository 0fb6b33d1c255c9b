//! Sixteen-lane vectors, in which the kernels are written for every instruction set.
//!
//! A kernel is a [`Kernel`]: a struct of operands with one function that is generic over
//! [`Simd`]. [`Isa::dispatch`] runs it inside a function compiled for the chosen instruction
//! set, so that every `#[inline(always)]` operation becomes one instruction there (two on
//! AVX2).
//!
//! Kernels must not use vector operations inside closures. A closure is compiled for the
//! baseline instruction set, and every operation in it may become a call.
//!
//! AVX-512 and AVX2 give the same results bit for bit: every operation works lane by lane,
//! `fma` is fused in both, and reductions use the same tree order. The portable form may differ
//! in the last bit, because it does not fuse on targets without FMA.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::options::SimdLevel;
use crate::device::DeviceError;

/// Repeats a block for each `m` below `count`, at most 8 times, with `m` as a constant.
///
/// Accumulators in an array stay in registers only if every index is a constant. The optimiser
/// unrolls loops too late for that.
macro_rules! unroll {
    ($m:ident < $count:expr => $body:block) => {
        $crate::device::cpu::simd::unroll!(@ $m, $count, $body, 0 1 2 3 4 5 6 7);
    };
    (@ $m:ident, $count:expr, $body:block, $($index:literal)*) => {
        $(if $index < $count {
            #[allow(non_upper_case_globals)]
            const $m: usize = $index;
            $body
        })*
    };
}
pub(crate) use unroll;

/// Number of lanes of a vector, rows of a weight tile, and tokens of a key tile.
pub(crate) const LANES: usize = 16;

/// An instruction set. A value of an implementing type proves that the machine supports it.
///
/// `F` is sixteen `f32`; `I` is sixteen `i32`, or 64 bytes.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32`.
    type I: Copy;
    /// Maximum number of activation rows that share one expanded weight tile, as the registers
    /// have room for their accumulators: 8, 4, 2 or 1.
    const ROWS: usize;

    /// Prefetches the cache line at `address`, which need not be readable.
    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}

    /// Returns a vector with `value` in all lanes.
    fn splat(self, value: f32) -> Self::F;
    /// Loads sixteen consecutive numbers.
    ///
    /// # Safety
    /// `from` must be readable for 16 elements.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// Loads sixteen consecutive float16 numbers.
    ///
    /// # Safety
    /// `from` must be readable for 16 elements.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Loads sixteen consecutive bfloat16 numbers.
    ///
    /// # Safety
    /// `from` must be readable for 16 elements.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// Loads sixteen consecutive signed bytes and converts them to `f32`.
    ///
    /// # Safety
    /// `from` must be readable for 16 elements.
    unsafe fn load_i8(self, from: *const i8) -> Self::F;
    /// Stores sixteen numbers.
    ///
    /// # Safety
    /// `to` must be writable for 16 elements.
    unsafe fn store(self, to: *mut f32, value: Self::F);
    /// Stores sixteen numbers as float16, each rounded to the nearest finite value. NaN stays
    /// NaN.
    ///
    /// # Safety
    /// `to` must be writable for 16 elements.
    unsafe fn store_f16(self, to: *mut u16, value: Self::F);

    /// Returns `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `a − b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `a · b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `a · b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Returns `a > b ? a : b`, which is `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `a < b ? a : b`, which is `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Returns `|a|`.
    fn abs(self, a: Self::F) -> Self::F;
    /// Rounds to the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// Returns `a < b ? yes : no`, which is `no` if either is NaN.
    fn select_lt(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// Returns the sum of the lanes. The two halves are added until one lane is left.
    fn reduce_add(self, a: Self::F) -> f32;
    /// Returns the largest lane, in the same tree order.
    fn reduce_max(self, a: Self::F) -> f32;

    /// Returns a vector with `value` in all lanes.
    fn splat_i(self, value: i32) -> Self::I;
    /// Loads 64 consecutive bytes.
    ///
    /// # Safety
    /// `from` must be readable for 64 bytes.
    unsafe fn load_bytes(self, from: *const u8) -> Self::I;
    /// Stores the low byte of each lane.
    ///
    /// # Safety
    /// `to` must be writable for 16 bytes.
    unsafe fn store_low_bytes(self, to: *mut i8, value: Self::I);
    /// Returns `a + b`, lane by lane.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Returns the bitwise and.
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shifts every 32-bit lane right, filling with zeros.
    fn shift_right<const BITS: u32>(self, a: Self::I) -> Self::I;
    /// Returns, per lane, `acc` plus the four products of an unsigned byte of `w` and a signed
    /// byte of `x`.
    fn dot4(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Returns the sum of the lanes.
    fn reduce_add_i(self, a: Self::I) -> i32;
    /// Converts floats to the nearest integers, ties to even.
    fn to_int(self, a: Self::F) -> Self::I;
    /// Converts integers to floats.
    fn to_float(self, a: Self::I) -> Self::F;
    /// Returns `2^n` for integers `n` from −126 to 127.
    fn power_of_two(self, n: Self::I) -> Self::F;

    /// Loads the first `count` of sixteen numbers and sets the others to 0.
    ///
    /// # Safety
    /// `from` must be readable for `count` elements, and `count` must be at most 16.
    #[inline(always)]
    unsafe fn load_part(self, from: *const f32, count: usize) -> Self::F {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the caller guarantees that `from` is readable, and `lanes` holds 16 elements.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            self.load(lanes.as_ptr())
        }
    }
    /// Stores the first `count` of sixteen numbers.
    ///
    /// # Safety
    /// `to` must be writable for `count` elements, and `count` must be at most 16.
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, value: Self::F, count: usize) {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: `lanes` holds 16 elements, and the caller guarantees that `to` is writable.
        unsafe {
            self.store(lanes.as_mut_ptr(), value);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
        }
    }

    /// Returns `e^x`, accurate to 2 units in the last place. The result is exactly 1 at 0 and
    /// exactly 0 below −87.3; the online softmax relies on both.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let lowest = self.splat(-87.3);
        // The operand order propagates NaN.
        let clamped = self.min(self.splat(88.0), self.max(lowest, x));
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 is split in two, so that `n` times the first part is exact.
        let r = self.fma(n, self.splat(-0.693_359_4), clamped);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        // The polynomial of expf in Cephes.
        let mut p = self.splat(1.987_569_1e-4);
        for coefficient in [
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            p = self.fma(p, r, self.splat(coefficient));
        }
        let y = self.add(self.fma(self.mul(r, r), p, r), self.splat(1.0));
        let y = self.mul(y, self.power_of_two(self.to_int(n)));
        self.select_lt(x, lowest, self.splat(0.0), y)
    }

    /// Returns `tanh x` with an error of at most 2e-7; exactly 0 at 0.
    #[inline(always)]
    fn tanh(self, x: Self::F) -> Self::F {
        let one = self.splat(1.0);
        let e = self.exp(self.add(x, x));
        self.sub(one, self.div(self.splat(2.0), self.add(e, one)))
    }
}

/// A computation written once for every instruction set.
pub(crate) trait Kernel {
    /// Result type.
    type Output;
    /// Runs the computation. Implementations must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// An instruction set that this machine is known to support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Kind);

impl Isa {
    /// Returns the instruction set for `level`, or [`DeviceError::Unsupported`] if the machine
    /// lacks it.
    pub(crate) fn choose(level: SimdLevel) -> Result<Self, DeviceError> {
        let missing = |what: &str| DeviceError::Unsupported {
            device: "cpu",
            what: format!("{what} on this machine"),
            expected: "SIMD level 'auto' selects the best supported instruction set".to_owned(),
        };
        #[cfg(target_arch = "x86_64")]
        match level {
            SimdLevel::Portable => Ok(Self(Kind::Portable)),
            SimdLevel::Auto | SimdLevel::Avx512 if avx512::available() => Ok(Self(Kind::Avx512)),
            SimdLevel::Auto | SimdLevel::Avx2 if avx2::available() => Ok(Self(Kind::Avx2)),
            SimdLevel::Auto => Ok(Self(Kind::Portable)),
            SimdLevel::Avx512 => Err(missing("AVX-512 with VNNI")),
            SimdLevel::Avx2 => Err(missing("AVX2 with FMA and F16C")),
        }
        #[cfg(not(target_arch = "x86_64"))]
        match level {
            SimdLevel::Auto | SimdLevel::Portable => Ok(Self(Kind::Portable)),
            SimdLevel::Avx512 => Err(missing("AVX-512")),
            SimdLevel::Avx2 => Err(missing("AVX2")),
        }
    }

    /// Returns its name, for the start-up log.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "AVX2",
            Kind::Portable => "portable",
        }
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: an `Isa` of this kind is created only if `available` returned true.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { avx512::enter(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { avx2::enter(kernel) },
            Kind::Portable => kernel.run(portable::Portable),
        }
    }
}
