//! The 16-bit floating-point types, in integer arithmetic that compilers vectorise.

/// An IEEE half-precision number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Half(pub u16);

/// A bfloat16 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brain(pub u16);

/// Conversions that arithmetic on a 16-bit type needs.
pub trait Small: Copy {
    fn from_bits(bits: u16) -> Self;
    fn bits(self) -> u16;
    /// Widens exactly.
    fn wide(self) -> f32;
    /// Rounds to nearest, ties to even; NaN becomes the canonical NaN.
    fn rounded(value: f32) -> Self;
    /// Like `rounded`, but for values that only a double represents, without double rounding.
    fn rounded_double(value: f64) -> Self;
    /// Rounds toward zero.
    fn truncated(value: f32) -> Self;
    /// Bits of PTX's canonical NaN.
    const NAN: u16 = 0x7fff;
}

impl Small for Half {
    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Half(bits)
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let magnitude = u32::from(self.0 & 0x7fff);
        // Scaling by 2^112 rebiases the exponent for a single; this also handles subnormals.
        let finite = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
        let bits = if magnitude >= 0x7c00 {
            0x7f80_0000 | magnitude << 13
        } else {
            finite.to_bits()
        };
        f32::from_bits(sign | bits)
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        // 2^-14 and above: rebias, and round off the 13 low bits.
        let normal = magnitude.wrapping_sub(112 << 23);
        let normal = normal.wrapping_add(0xfff).wrapping_add(normal >> 13 & 1) >> 13;
        // Below that: adding 0.5 rounds to a multiple of 2^-24 and leaves it in the low bits.
        let subnormal = (f32::from_bits(magnitude) + 0.5)
            .to_bits()
            .wrapping_sub(0x3f00_0000);
        let out = if magnitude > 0x7f80_0000 {
            return Half(Self::NAN);
        } else if magnitude >= 0x477f_f000 {
            0x7c00
        } else if magnitude < 113 << 23 {
            subnormal
        } else {
            normal
        };
        Half((sign | out) as u16)
    }

    #[inline(always)]
    fn rounded_double(value: f64) -> Self {
        Self::rounded(to_odd(value))
    }

    #[inline(always)]
    fn truncated(value: f32) -> Self {
        let nearest = Self::rounded(value);
        if nearest.wide().abs() > value.abs() {
            Half(nearest.0 - 1)
        } else {
            nearest
        }
    }
}

impl Small for Brain {
    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Brain(bits)
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        let bits = value.to_bits();
        let out = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let out = if bits & 0x7fff_ffff > 0x7f80_0000 {
            u32::from(Self::NAN)
        } else {
            out
        };
        Brain(out as u16)
    }

    #[inline(always)]
    fn rounded_double(value: f64) -> Self {
        Self::rounded(to_odd(value))
    }

    #[inline(always)]
    fn truncated(value: f32) -> Self {
        if value.is_nan() {
            Brain(Self::NAN)
        } else {
            Brain((value.to_bits() >> 16) as u16)
        }
    }
}

/// Converts a double to a single, rounded to odd. Rounding the result again is equivalent to
/// rounding the double once.
#[inline(always)]
pub fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let exact = f64::from(nearest);
    if exact == value || value.is_nan() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    let bits = nearest.to_bits();
    if exact.abs() > value.abs() {
        f32::from_bits(bits - 1)
    } else {
        f32::from_bits(bits | 1)
    }
}

/// Computes `a · b + c` with one rounding. The product of two 16-bit numbers is exact in a
/// double. An inexact sum is rounded to odd, so that only the final rounding matters.
#[inline(always)]
pub fn fused<S: Small>(a: S, b: S, c: S) -> S {
    let (product, addend) = (
        f64::from(a.wide()) * f64::from(b.wide()),
        f64::from(c.wide()),
    );
    let sum = product + addend;
    // The exact error of the sum (Knuth).
    let virtual_addend = sum - product;
    let error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
    let odd = if error != 0.0 && sum.is_finite() && sum.to_bits() & 1 == 0 {
        let away = (error > 0.0) == (sum > 0.0);
        f64::from_bits(if away {
            sum.to_bits() + 1
        } else {
            sum.to_bits() - 1
        })
    } else {
        sum
    };
    S::rounded_double(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_float16_round_trips_through_float32() {
        for bits in 0..=u16::MAX {
            let wide = Half(bits).wide();
            if wide.is_nan() {
                assert_eq!(Half::rounded(wide), Half(Half::NAN));
            } else {
                assert_eq!(Half::rounded(wide), Half(bits), "{bits:#x}");
            }
        }
        assert_eq!(Half(0x3c01).wide(), 1.0 + 1.0 / 1024.0);
        assert_eq!(Half(1).wide(), 2f32.powi(-24));
        assert_eq!(Half(0x7bff).wide(), 65504.0);
        assert_eq!(Half(0xfc00).wide(), f32::NEG_INFINITY);
    }

    #[test]
    fn float16_rounds_to_nearest_even() {
        let cases = [
            (65519.996, 0x7bff),
            (65520.0, 0x7c00),
            (1.0 + 1.0 / 2048.0, 0x3c00),
            (1.0 + 3.0 / 2048.0, 0x3c02),
            (2f32.powi(-25), 0),
            (2f32.powi(-25) * 1.0001, 1),
            (3.0 * 2f32.powi(-25), 2),
            (-0.0, 0x8000),
        ];
        for (value, bits) in cases {
            assert_eq!(Half::rounded(value), Half(bits), "{value}");
        }
        assert_eq!(Half::truncated(65519.0), Half(0x7bff));
        assert_eq!(Half::truncated(1e6), Half(0x7bff));
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even() {
        assert_eq!(Brain::rounded(f32::from_bits(0x3f80_8000)), Brain(0x3f80));
        assert_eq!(Brain::rounded(f32::from_bits(0x3f81_8000)), Brain(0x3f82));
        assert_eq!(Brain::rounded(f32::from_bits(0x3f80_8001)), Brain(0x3f81));
        assert_eq!(Brain::rounded(f32::NAN), Brain(0x7fff));
        assert_eq!(Brain::rounded(f32::MAX), Brain(0x7f80));
    }

    #[test]
    fn a_fused_product_is_rounded_once() {
        // (1 + 2^-10) squared is 1 + 2^-9 + 2^-20; with a tiny addend it is just above a tie.
        let a = Half(0x3c01);
        let tie = Half::rounded(2f32.powi(-11) - 2f32.powi(-20));
        let exact = 1.0 + 2f64.powi(-9) + 2f64.powi(-20) + f64::from(tie.wide());
        let expected = if exact > 1.0 + 2f64.powi(-9) + 2f64.powi(-11) {
            0x3c03
        } else {
            0x3c02
        };
        assert_eq!(fused(a, a, tie), Half(expected));
        // 2^15 + 2^-24: the small addend must not be lost in a tie.
        let big = Half::rounded(32768.0);
        assert_eq!(fused(big, Half(0x3c00), Half(1)), big);
    }
}
