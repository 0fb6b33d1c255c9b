//! Single-precision sums and products that are rounded down, up or toward zero.

use super::float::canonical;
use super::lanes::{Lanes, binary, ternary};
use crate::ptx::decode::form::Form;

/// Returns the lanes of `add`, `sub`, `mul` or `fma` with `.rm`, `.rp` or `.rz`.
pub fn find(form: &Form) -> Option<Lanes> {
    let rounding = form.one_of(&["rm", "rp", "rz"])?;
    macro_rules! forms {
        ($round:ident) => {
            match form.base {
                "add" => binary(|a: f32, b: f32| fused(a, 1.0, b, $round)),
                "sub" => binary(|a: f32, b: f32| fused(a, 1.0, -b, $round)),
                "mul" => binary(|a: f32, b: f32| round(f64::from(a) * f64::from(b), 0.0, $round)),
                "fma" => ternary(|a: f32, b: f32, c: f32| fused(a, b, c, $round)),
                _ => return None,
            }
        };
    }
    Some(match rounding {
        "rm" => forms!(down),
        "rp" => forms!(up),
        _ => forms!(zero),
    })
}

/// Returns the next number below `near` if the exact value is below it, else `near`.
#[inline(always)]
fn down(near: f32, above: bool, below: bool) -> f32 {
    let _ = above;
    if below { near.next_down() } else { near }
}

/// Returns the next number above `near` if the exact value is above it, else `near`.
#[inline(always)]
fn up(near: f32, above: bool, below: bool) -> f32 {
    let _ = below;
    if above { near.next_up() } else { near }
}

#[inline(always)]
fn zero(near: f32, above: bool, below: bool) -> f32 {
    if near > 0.0 {
        down(near, above, below)
    } else {
        up(near, above, below)
    }
}

/// Computes `a · b + c`: the product is exact in a double, and the error of the sum is computed
/// (Knuth).
#[inline(always)]
fn fused(a: f32, b: f32, c: f32, direction: impl Fn(f32, bool, bool) -> f32) -> f32 {
    let (product, addend) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + addend;
    let part = sum - product;
    let error = (product - (sum - part)) + (addend - part);
    round(sum, error, direction)
}

/// Rounds `value + error`, where the error is smaller than the last place of the value.
#[inline(always)]
fn round(value: f64, error: f64, direction: impl Fn(f32, bool, bool) -> f32) -> f32 {
    let near = value as f32;
    let rest = value - f64::from(near);
    let (above, below) = (
        rest > 0.0 || rest == 0.0 && error > 0.0,
        rest < 0.0 || rest == 0.0 && error < 0.0,
    );
    if value.is_finite() {
        direction(near, above, below)
    } else {
        canonical(near)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_products_are_rounded_in_the_given_direction() {
        let tiny = 2f32.powi(-60);
        assert_eq!(fused(1.0, 1.0, tiny, down), 1.0);
        assert_eq!(fused(1.0, 1.0, tiny, up), 1.0f32.next_up());
        assert_eq!(fused(1.0, 1.0, -tiny, down), 1.0f32.next_down());
        assert_eq!(fused(1.0, -1.0, -tiny, zero), -1.0);
        assert_eq!(fused(1.0, -1.0, tiny, zero), (-1.0f32).next_up());
        assert_eq!(fused(f32::MAX, 2.0, 0.0, down), f32::MAX);
        assert_eq!(fused(f32::MAX, 2.0, 0.0, up), f32::INFINITY);
        assert_eq!(fused(3.0, 5.0, 2.0, down), 17.0);
        let exact = f64::from(0.1f32) * f64::from(0.1f32);
        assert!(
            f64::from(round(exact, 0.0, up)) > exact && f64::from(round(exact, 0.0, down)) < exact
        );
        assert_eq!(round(exact, 0.0, down).next_up(), round(exact, 0.0, up));
    }
}
