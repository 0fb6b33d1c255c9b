//! Floating-point opcodes: the operation of each on a lane.
//!
//! Sums, products, fused products, quotients and square roots round once, to nearest, as IEEE
//! 754 specifies. The `.approx` functions are computed in double precision and then rounded, so
//! they are more exact than on any GPU. A computed NaN is PTX's canonical NaN.

use super::directed;
use super::half::{Brain, Half, Small, fused};
use super::lanes::{Lanes, Value, binary, compare, select, ternary, unary};
use crate::ptx::decode::form::Form;
use crate::ptx::types::{Type, Type::*};

/// Replaces any NaN by the canonical one. Works on bits, because the compiler may treat all
/// NaNs as equal.
#[inline(always)]
pub fn canonical(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 {
        0x7fff_ffff
    } else {
        bits
    })
}

#[inline(always)]
fn canonical_double(x: f64) -> f64 {
    let bits = x.to_bits();
    let is_nan = bits & 0x7fff_ffff_ffff_ffff > 0x7ff0_0000_0000_0000;
    f64::from_bits(if is_nan { 0x7ff8_0000_0000_0000 } else { bits })
}

/// `.ftz`: flushes subnormal numbers to zero and keeps the sign.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 {
        bits & 0x8000_0000
    } else {
        bits
    })
}

/// `.sat`: clamps to 0..=1; NaN becomes 0.
#[inline(always)]
pub fn saturate(x: f32) -> f32 {
    if x > 0.0 {
        if x < 1.0 { x } else { 1.0 }
    } else {
        0.0
    }
}

/// Returns the smaller of two numbers. A number is preferred to NaN, and -0 to 0.
#[inline(always)]
fn less(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canonical(b)
    } else if b.is_nan() || a < b {
        a
    } else if a == b {
        f32::from_bits(a.to_bits() | b.to_bits())
    } else {
        b
    }
}

/// Returns the greater of two numbers. A number is preferred to NaN, and 0 to -0.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        canonical(b)
    } else if b.is_nan() || a > b {
        a
    } else if a == b {
        f32::from_bits(a.to_bits() & b.to_bits())
    } else {
        b
    }
}

/// Returns NaN if either argument is NaN, else `chosen`.
#[inline(always)]
fn strict(a: f32, b: f32, chosen: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        f32::from_bits(0x7fff_ffff)
    } else {
        chosen
    }
}

#[inline(always)]
fn through_double(x: f32, f: impl Fn(f64) -> f64) -> f32 {
    f(f64::from(x)) as f32
}

/// Builds a function of singles in its four variants: plain, `.ftz`, `.sat`, both.
macro_rules! singles {
    ($form:expr, $make:ident, |$($a:ident),+| $body:expr) => {
        match ($form.has("ftz"), $form.has("sat")) {
            (false, false) => $make(|$($a: f32),+| canonical($body)),
            (true, false) => $make(|$($a: f32),+| { $(let $a = flush($a);)+ flush(canonical($body)) }),
            (false, true) => $make(|$($a: f32),+| saturate($body)),
            (true, true) => $make(|$($a: f32),+| { $(let $a = flush($a);)+ saturate(flush($body)) }),
        }
    };
}

/// Returns the lanes of a floating-point opcode, or `None` if it is not one.
pub fn find(form: &Form) -> Option<Lanes> {
    if form.base != "cvt" {
        // Results are always rounded to nearest; other roundings stay unknown modifiers.
        form.ignore(&["rn"]);
    }
    match form.of()? {
        F32 => single(form),
        F64 => double(form),
        F16 => small::<Half>(form),
        Bf16 => small::<Brain>(form),
        F16x2 => pairs::<Half>(form),
        Bf16x2 => pairs::<Brain>(form),
        _ => None,
    }
}

fn single(form: &Form) -> Option<Lanes> {
    if matches!(
        form.base,
        "div" | "sqrt" | "rsqrt" | "rcp" | "sin" | "cos" | "lg2" | "ex2" | "tanh"
    ) {
        form.ignore(&["approx", "full"]);
    }
    if let Some(lanes) = directed::find(form) {
        return Some(lanes);
    }
    Some(match form.base {
        "add" => singles!(form, binary, |a, b| a + b),
        "sub" => singles!(form, binary, |a, b| a - b),
        "mul" => singles!(form, binary, |a, b| a * b),
        "div" => singles!(form, binary, |a, b| a / b),
        "fma" | "mad" => singles!(form, ternary, |a, b, c| a.mul_add(b, c)),
        "neg" => singles!(form, unary, |a| -a),
        "abs" => singles!(form, unary, |a| a.abs()),
        "min" if form.has("NaN") => singles!(form, binary, |a, b| strict(a, b, less(a, b))),
        "max" if form.has("NaN") => singles!(form, binary, |a, b| strict(a, b, greater(a, b))),
        "min" => singles!(form, binary, |a, b| less(a, b)),
        "max" => singles!(form, binary, |a, b| greater(a, b)),
        "rcp" => singles!(form, unary, |a| 1.0 / a),
        "sqrt" => singles!(form, unary, |a| a.sqrt()),
        "rsqrt" => singles!(form, unary, |a| through_double(a, |a| 1.0 / a.sqrt())),
        "ex2" => singles!(form, unary, |a| through_double(a, f64::exp2)),
        "lg2" => singles!(form, unary, |a| through_double(a, f64::log2)),
        "sin" => singles!(form, unary, |a| through_double(a, f64::sin)),
        "cos" => singles!(form, unary, |a| through_double(a, f64::cos)),
        "tanh" => singles!(form, unary, |a| through_double(a, f64::tanh)),
        "copysign" => binary(|a: f32, b: f32| b.copysign(a)),
        "testp" => return test(form),
        "selp" => select(|a: u32, b: u32, p| if p { a } else { b }),
        "slct" => match form.types.get(1)? {
            S32 => ternary(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
            F32 => ternary(|a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b }),
            _ => return None,
        },
        _ => return None,
    })
}

/// Returns the lanes of `testp`, whose single source the decoder passes twice.
fn test(form: &Form) -> Option<Lanes> {
    Some(
        match form.one_of(&[
            "finite",
            "infinite",
            "number",
            "notanumber",
            "normal",
            "subnormal",
        ])? {
            "finite" => compare(|a: f32, _: f32| a.is_finite()),
            "infinite" => compare(|a: f32, _: f32| a.is_infinite()),
            "number" => compare(|a: f32, _: f32| !a.is_nan()),
            "notanumber" => compare(|a: f32, _: f32| a.is_nan()),
            "normal" => compare(|a: f32, _: f32| a.is_normal()),
            _ => compare(|a: f32, _: f32| a.is_subnormal()),
        },
    )
}

fn double(form: &Form) -> Option<Lanes> {
    Some(match form.base {
        "add" => binary(|a: f64, b: f64| canonical_double(a + b)),
        "sub" => binary(|a: f64, b: f64| canonical_double(a - b)),
        "mul" => binary(|a: f64, b: f64| canonical_double(a * b)),
        "div" => binary(|a: f64, b: f64| canonical_double(a / b)),
        "fma" | "mad" => ternary(|a: f64, b: f64, c: f64| canonical_double(a.mul_add(b, c))),
        "neg" => unary(|a: f64| -a),
        "abs" => unary(|a: f64| a.abs()),
        "min" => binary(|a: f64, b: f64| a.min(b)),
        "max" => binary(|a: f64, b: f64| a.max(b)),
        "sqrt" => unary(|a: f64| canonical_double(a.sqrt())),
        // The gross approximations keep only the upper 32 bits and flush subnormal numbers.
        "rcp" if form.has("approx") && form.has("ftz") => unary(|a: f64| gross(1.0 / gross(a))),
        "rsqrt" if form.has("approx") => {
            form.ignore(&["ftz"]);
            unary(|a: f64| gross(1.0 / gross(a).sqrt()))
        }
        "rcp" => unary(|a: f64| canonical_double(1.0 / a)),
        "copysign" => binary(|a: f64, b: f64| b.copysign(a)),
        "selp" => select(|a: u64, b: u64, p| if p { a } else { b }),
        _ => return None,
    })
}

/// Returns the upper half of a double, with subnormals flushed.
#[inline(always)]
fn gross(x: f64) -> f64 {
    let bits = x.to_bits() & 0xffff_ffff_0000_0000;
    let flushed = if bits & 0x7ff0_0000_0000_0000 == 0 {
        bits & 1 << 63
    } else {
        bits
    };
    canonical_double(f64::from_bits(flushed))
}

#[inline(always)]
fn sum<S: Small>(a: S, b: S) -> S {
    S::rounded(a.wide() + b.wide())
}

#[inline(always)]
fn difference<S: Small>(a: S, b: S) -> S {
    S::rounded(a.wide() - b.wide())
}

#[inline(always)]
fn product<S: Small>(a: S, b: S) -> S {
    S::rounded_double(f64::from(a.wide()) * f64::from(b.wide()))
}

#[inline(always)]
fn clamped<S: Small>(x: S) -> S {
    S::rounded(saturate(x.wide()))
}

/// `.relu`: negative numbers become 0, NaN becomes the canonical NaN.
#[inline(always)]
fn positive<S: Small>(x: S) -> S {
    if x.wide().is_nan() {
        S::from_bits(S::NAN)
    } else if x.bits() & 0x8000 != 0 {
        S::from_bits(0)
    } else {
        x
    }
}

#[inline(always)]
fn negated<S: Small>(x: S) -> S {
    S::from_bits(x.bits() ^ 0x8000)
}

#[inline(always)]
fn magnitude<S: Small>(x: S) -> S {
    S::from_bits(x.bits() & 0x7fff)
}

#[inline(always)]
fn least<S: Small>(a: S, b: S) -> S {
    S::rounded(less(a.wide(), b.wide()))
}

#[inline(always)]
fn most<S: Small>(a: S, b: S) -> S {
    S::rounded(greater(a.wide(), b.wide()))
}

#[inline(always)]
fn least_strict<S: Small>(a: S, b: S) -> S {
    S::rounded(strict(a.wide(), b.wide(), less(a.wide(), b.wide())))
}

#[inline(always)]
fn most_strict<S: Small>(a: S, b: S) -> S {
    S::rounded(strict(a.wide(), b.wide(), greater(a.wide(), b.wide())))
}

#[inline(always)]
fn computed<S: Small>(x: S, f: impl Fn(f64) -> f64) -> S {
    S::rounded_double(f(f64::from(x.wide())))
}

/// The operations of the 16-bit types, shared by single numbers and by pairs in a register:
/// `$one`, `$two` and `$three` build lanes from functions of one, two and three numbers.
macro_rules! small_table {
    ($form:expr, $S:ident, $one:ident, $two:ident, $three:ident) => {{
        // Subnormal halves are kept; `.ftz` of the 16-bit types is not emulated.
        let plain = !$form.has("ftz") || matches!($form.base, "ex2" | "tanh");
        if !plain {
            return None;
        }
        if matches!($form.base, "ex2" | "tanh") {
            $form.ignore(&["approx"]);
        }
        match ($form.base, $form.has("sat"), $form.has("relu")) {
            ("add", false, false) => $two!($S, |a, b| sum(a, b)),
            ("add", true, false) => $two!($S, |a, b| clamped(sum(a, b))),
            ("sub", false, false) => $two!($S, |a, b| difference(a, b)),
            ("sub", true, false) => $two!($S, |a, b| clamped(difference(a, b))),
            ("mul", false, false) => $two!($S, |a, b| product(a, b)),
            ("mul", true, false) => $two!($S, |a, b| clamped(product(a, b))),
            ("fma", false, false) => $three!($S, |a, b, c| fused(a, b, c)),
            ("fma", true, false) => $three!($S, |a, b, c| clamped(fused(a, b, c))),
            ("fma", false, true) => $three!($S, |a, b, c| positive(fused(a, b, c))),
            ("neg", false, false) => $one!($S, |a| negated(a)),
            ("abs", false, false) => $one!($S, |a| magnitude(a)),
            ("min", false, false) if $form.has("NaN") => $two!($S, |a, b| least_strict(a, b)),
            ("max", false, false) if $form.has("NaN") => $two!($S, |a, b| most_strict(a, b)),
            ("min", false, false) => $two!($S, |a, b| least(a, b)),
            ("max", false, false) => $two!($S, |a, b| most(a, b)),
            ("ex2", false, false) => $one!($S, |a| computed(a, f64::exp2)),
            ("tanh", false, false) => $one!($S, |a| computed(a, f64::tanh)),
            _ => return None,
        }
    }};
}

macro_rules! one {
    ($S:ident, |$a:ident| $e:expr) => {
        unary(|$a: $S| -> $S { $e })
    };
}

macro_rules! two {
    ($S:ident, |$a:ident, $b:ident| $e:expr) => {
        binary(|$a: $S, $b: $S| -> $S { $e })
    };
}

macro_rules! three {
    ($S:ident, |$a:ident, $b:ident, $c:ident| $e:expr) => {
        ternary(|$a: $S, $b: $S, $c: $S| -> $S { $e })
    };
}

fn small<S: Small + Value>(form: &Form) -> Option<Lanes> {
    if form.base == "selp" {
        return Some(select(|a: u32, b: u32, p| if p { a } else { b }));
    }
    Some(small_table!(form, S, one, two, three))
}

#[inline(always)]
pub fn split<S: Small>(both: u32) -> (S, S) {
    (S::from_bits(both as u16), S::from_bits((both >> 16) as u16))
}

#[inline(always)]
pub fn join<S: Small>(low: S, high: S) -> u32 {
    u32::from(low.bits()) | u32::from(high.bits()) << 16
}

macro_rules! pair_one {
    ($S:ident, |$a:ident| $e:expr) => {
        unary(|a: u32| {
            let f = |$a: $S| -> $S { $e };
            let (low, high) = split::<$S>(a);
            join(f(low), f(high))
        })
    };
}

macro_rules! pair_two {
    ($S:ident, |$a:ident, $b:ident| $e:expr) => {
        binary(|a: u32, b: u32| {
            let f = |$a: $S, $b: $S| -> $S { $e };
            let ((a, c), (b, d)) = (split::<$S>(a), split::<$S>(b));
            join(f(a, b), f(c, d))
        })
    };
}

macro_rules! pair_three {
    ($S:ident, |$a:ident, $b:ident, $c:ident| $e:expr) => {
        ternary(|a: u32, b: u32, c: u32| {
            let f = |$a: $S, $b: $S, $c: $S| -> $S { $e };
            let ((a, p), (b, q), (c, r)) = (split::<$S>(a), split::<$S>(b), split::<$S>(c));
            join(f(a, b, c), f(p, q, r))
        })
    };
}

fn pairs<S: Small + 'static>(form: &Form) -> Option<Lanes> {
    Some(small_table!(form, S, pair_one, pair_two, pair_three))
}

/// Builds `setp` on `T`, with `$get` applied to each operand.
macro_rules! relations {
    ($relation:expr, $T:ty, $get:expr) => {
        match $relation {
            "eq" => compare(|a: $T, b: $T| $get(a) == $get(b)),
            "ne" => compare(|a: $T, b: $T| $get(a) < $get(b) || $get(a) > $get(b)),
            "lt" => compare(|a: $T, b: $T| $get(a) < $get(b)),
            "le" => compare(|a: $T, b: $T| $get(a) <= $get(b)),
            "gt" => compare(|a: $T, b: $T| $get(a) > $get(b)),
            "ge" => compare(|a: $T, b: $T| $get(a) >= $get(b)),
            "equ" => compare(|a: $T, b: $T| !($get(a) < $get(b) || $get(a) > $get(b))),
            "neu" => compare(|a: $T, b: $T| $get(a) != $get(b)),
            "ltu" => compare(|a: $T, b: $T| !($get(a) >= $get(b))),
            "leu" => compare(|a: $T, b: $T| !($get(a) > $get(b))),
            "gtu" => compare(|a: $T, b: $T| !($get(a) <= $get(b))),
            "geu" => compare(|a: $T, b: $T| !($get(a) < $get(b))),
            "num" => compare(|a: $T, b: $T| !$get(a).is_nan() && !$get(b).is_nan()),
            "nan" => compare(|a: $T, b: $T| $get(a).is_nan() || $get(b).is_nan()),
            _ => return None,
        }
    };
}

/// Returns the lanes of `setp` on floating-point numbers.
#[allow(clippy::neg_cmp_op_on_partial_ord)]
pub fn comparison(relation: &str, of: Type, ftz: bool) -> Option<Lanes> {
    Some(match of {
        F32 if ftz => relations!(relation, f32, |a: f32| flush(a)),
        F32 => relations!(relation, f32, |a: f32| a),
        F64 => relations!(relation, f64, |a: f64| a),
        F16 => relations!(relation, Half, |a: Half| a.wide()),
        Bf16 => relations!(relation, Brain, |a: Brain| a.wide()),
        _ => return None,
    })
}
