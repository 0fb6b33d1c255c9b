//! [`Simd`] on AVX2 with FMA and F16C: two registers per vector.

use super::{Kernel, Simd};
use std::arch::x86_64::*;

/// Proof that the machine supports AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Returns whether [`enter`] may be called.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Compiles a kernel for AVX2, FMA and F16C, and runs it.
///
/// # Safety
/// [`available`] must have returned true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// Sixteen `f32`.
#[derive(Clone, Copy)]
pub(super) struct F(__m256, __m256);

/// Sixteen `i32`.
#[derive(Clone, Copy)]
pub(super) struct I(__m256i, __m256i);

/// Calls an intrinsic that reads and writes only registers.
macro_rules! register {
    ($call:expr) => {
        // SAFETY: an `Avx2` exists only inside `enter`, where the features are available.
        unsafe { $call }
    };
}

/// Calls an intrinsic on both halves of two vectors.
macro_rules! halves {
    ($wrap:ident, $intrinsic:ident, $a:expr, $b:expr) => {
        register!($wrap($intrinsic($a.0, $b.0), $intrinsic($a.1, $b.1)))
    };
}

/// Adds `w · x`, summed over the four bytes of each lane, to `acc`. The even and the odd bytes
/// are widened to 16 bits to keep the sums exact, because `vpmaddubsw` would saturate.
///
/// # Safety
/// The machine must support AVX2.
#[inline(always)]
unsafe fn dot4_half(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the caller guarantees AVX2.
    unsafe {
        let w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
        let w_odd = _mm256_srli_epi16::<8>(w);
        let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let x_odd = _mm256_srai_epi16::<8>(x);
        let even = _mm256_madd_epi16(w_even, x_even);
        let odd = _mm256_madd_epi16(w_odd, x_odd);
        _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
    }
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    const ROWS: usize = 2;

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        register!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
    #[inline(always)]
    fn splat(self, value: f32) -> F {
        register!(F(_mm256_set1_ps(value), _mm256_set1_ps(value)))
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe { F(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            F(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> F {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            F(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> F {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            F(
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            )
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: F) {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            _mm256_storeu_ps(to, value.0);
            _mm256_storeu_ps(to.add(8), value.1);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, value: F) {
        let finite = self.max(self.splat(-65504.0), self.min(self.splat(65504.0), value));
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            let low = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(finite.0);
            let high = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(finite.1);
            _mm_storeu_si128(to.cast(), low);
            _mm_storeu_si128(to.add(8).cast(), high);
        }
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        halves!(F, _mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        halves!(F, _mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        halves!(F, _mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        halves!(F, _mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        register!(F(
            _mm256_fmadd_ps(a.0, b.0, c.0),
            _mm256_fmadd_ps(a.1, b.1, c.1)
        ))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        halves!(F, _mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        halves!(F, _mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        let sign = self.splat(-0.0);
        halves!(F, _mm256_andnot_ps, sign, a)
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        register!(F(
            _mm256_round_ps::<NEAREST>(a.0),
            _mm256_round_ps::<NEAREST>(a.1)
        ))
    }
    #[inline(always)]
    fn select_lt(self, a: F, b: F, yes: F, no: F) -> F {
        register!(F(
            _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0)),
            _mm256_blendv_ps(no.1, yes.1, _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1)),
        ))
    }
    #[inline(always)]
    fn reduce_add(self, a: F) -> f32 {
        register!({
            let a = _mm256_add_ps(a.0, a.1);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn reduce_max(self, a: F) -> f32 {
        register!({
            let a = _mm256_max_ps(a.0, a.1);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> I {
        register!(I(_mm256_set1_epi32(value), _mm256_set1_epi32(value)))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> I {
        // SAFETY: the caller guarantees the pointer, and `self` proves the features.
        unsafe {
            I(
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(32).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut i8, value: I) {
        let mut lanes = [0i32; 16];
        // SAFETY: `lanes` holds 16 elements, and the caller guarantees that `to` is writable.
        // `self` proves the features.
        unsafe {
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), value.0);
            _mm256_storeu_si256(lanes.as_mut_ptr().add(8).cast(), value.1);
            for (i, lane) in lanes.into_iter().enumerate() {
                to.add(i).write(lane as i8);
            }
        }
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        halves!(I, _mm256_add_epi32, a, b)
    }
    #[inline(always)]
    fn and_i(self, a: I, b: I) -> I {
        halves!(I, _mm256_and_si256, a, b)
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self, a: I) -> I {
        register!({
            let count = _mm_cvtsi32_si128(BITS as i32);
            I(_mm256_srl_epi32(a.0, count), _mm256_srl_epi32(a.1, count))
        })
    }
    #[inline(always)]
    fn dot4(self, acc: I, w: I, x: I) -> I {
        register!(I(dot4_half(acc.0, w.0, x.0), dot4_half(acc.1, w.1, x.1)))
    }
    #[inline(always)]
    fn reduce_add_i(self, a: I) -> i32 {
        register!({
            let a = _mm256_add_epi32(a.0, a.1);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b1110>(a));
            _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32::<0b01>(a)))
        })
    }
    #[inline(always)]
    fn to_int(self, a: F) -> I {
        register!(I(_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1)))
    }
    #[inline(always)]
    fn to_float(self, a: I) -> F {
        register!(F(_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)))
    }
    #[inline(always)]
    fn power_of_two(self, n: I) -> F {
        let n = self.add_i(n, self.splat_i(127));
        register!(F(
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n.0)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n.1)),
        ))
    }
}
