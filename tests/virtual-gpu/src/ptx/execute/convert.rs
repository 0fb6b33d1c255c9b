//! `cvt`: conversions between all numeric types.
//!
//! Float to integer: a value that is out of range becomes the nearest limit, NaN becomes 0.
//! Float to float and integer to float: rounds to nearest even, or toward zero with `.rz`.

use super::float::{canonical, flush, join, saturate};
use super::half::{Brain, Half, Small};
use super::integer::integers;
use super::lanes::{Lanes, Value, binary, unary};
use crate::ptx::decode::form::Form;
use crate::ptx::types::{Type, Type::*};

/// Returns the lanes of a conversion, or `None` if the combination is not known.
pub fn find(form: &Form) -> Option<Lanes> {
    let (to, from) = (*form.types.first()?, *form.types.get(1)?);
    if form.types.len() != 2 {
        return None;
    }
    match (to.is_float(), from.is_float()) {
        (false, false) => integer_to_integer(form, to, from),
        (false, true) => float_to_integer(form, to, from),
        (true, false) => integer_to_float(form, to, from),
        (true, true) => float_to_float(form, to, from),
    }
}

fn integer_to_integer(form: &Form, to: Type, from: Type) -> Option<Lanes> {
    if form.has("sat") {
        return Some(integers!(to, D => integers!(from, S => unary(|a: S| {
            i128::from(a).clamp(i128::from(D::MIN), i128::from(D::MAX)) as D
        }))));
    }
    Some(integers!(to, D => integers!(from, S => unary(|a: S| a as D))))
}

/// Numbers that convert to doubles exactly.
trait Exact: Value {
    fn double(self) -> f64;
    fn flushed(self) -> f64 {
        self.double()
    }
}

impl Exact for f32 {
    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn flushed(self) -> f64 {
        f64::from(flush(self))
    }
}

impl Exact for f64 {
    #[inline(always)]
    fn double(self) -> f64 {
        self
    }
}

impl Exact for Half {
    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self.wide())
    }
}

impl Exact for Brain {
    #[inline(always)]
    fn double(self) -> f64 {
        f64::from(self.wide())
    }
}

fn float_to_integer(form: &Form, to: Type, from: Type) -> Option<Lanes> {
    form.ignore(&["sat"]); // It always saturates.
    match from {
        F32 => rounded_to_integer::<f32>(form, to),
        F64 => rounded_to_integer::<f64>(form, to),
        F16 => rounded_to_integer::<Half>(form, to),
        Bf16 => rounded_to_integer::<Brain>(form, to),
        _ => None,
    }
}

fn rounded_to_integer<S: Exact>(form: &Form, to: Type) -> Option<Lanes> {
    form.ignore(&["ftz"]);
    Some(match form.one_of(&["rni", "rzi", "rmi", "rpi"])? {
        "rni" => integers!(to, D => unary(|a: S| a.double().round_ties_even() as D)),
        "rzi" => integers!(to, D => unary(|a: S| a.double() as D)),
        "rmi" if form.has("ftz") => integers!(to, D => unary(|a: S| a.flushed().floor() as D)),
        "rpi" if form.has("ftz") => integers!(to, D => unary(|a: S| a.flushed().ceil() as D)),
        "rmi" => integers!(to, D => unary(|a: S| a.double().floor() as D)),
        _ => integers!(to, D => unary(|a: S| a.double().ceil() as D)),
    })
}

fn integer_to_float(form: &Form, to: Type, from: Type) -> Option<Lanes> {
    match (to, form.one_of(&["rn", "rz", "rm", "rp"])?) {
        (F32, "rn") => Some(integers!(from, S => unary(|a: S| a as f32))),
        (F64, "rn") => Some(integers!(from, S => unary(|a: S| a as f64))),
        (F32, "rz") => Some(integers!(from, S => unary(|a: S| {
            let near = a as f32;
            if (near as i128).unsigned_abs() > i128::from(a).unsigned_abs() {
                f32::from_bits(near.to_bits() - 1)
            } else {
                near
            }
        }))),
        // A double represents every integer exactly that does not round to infinity.
        (F16, "rn") => Some(integers!(from, S => unary(|a: S| Half::rounded_double(a as f64)))),
        (Bf16, "rn") if from.size() < 8 => {
            Some(integers!(from, S => unary(|a: S| Brain::rounded_double(a as f64))))
        }
        _ => None,
    }
}

/// Rounds to a whole number of the same type.
macro_rules! whole {
    ($form:expr, $rounding:expr, |$a:ident: $of:ty| $get:expr, |$x:ident| $put:expr) => {
        match $rounding {
            "rni" => unary(|$a: $of| {
                let $x = $get.round_ties_even();
                $put
            }),
            "rzi" => unary(|$a: $of| {
                let $x = $get.trunc();
                $put
            }),
            "rmi" => unary(|$a: $of| {
                let $x = $get.floor();
                $put
            }),
            _ => unary(|$a: $of| {
                let $x = $get.ceil();
                $put
            }),
        }
    };
}

fn float_to_float(form: &Form, to: Type, from: Type) -> Option<Lanes> {
    if let Some(rounding) = form.one_of(&["rni", "rzi", "rmi", "rpi"]) {
        return Some(match (to, from, form.has("ftz"), form.has("sat")) {
            (F32, F32, false, false) => whole!(form, rounding, |a: f32| a, |x| canonical(x)),
            (F32, F32, true, false) => whole!(form, rounding, |a: f32| flush(a), |x| canonical(x)),
            (F32, F32, false, true) => whole!(form, rounding, |a: f32| a, |x| saturate(x)),
            (F64, F64, false, false) => whole!(form, rounding, |a: f64| a, |x| x),
            (F16, F16, false, false) => {
                whole!(form, rounding, |a: Half| a.wide(), |x| Half::rounded(x))
            }
            (Bf16, Bf16, false, false) => {
                whole!(form, rounding, |a: Brain| a.wide(), |x| Brain::rounded(x))
            }
            _ => return None,
        });
    }
    match (to, from) {
        (F32, F16) => widened::<Half>(form),
        (F32, Bf16) => widened::<Brain>(form),
        (F64, F32) if form.has("ftz") => Some(unary(|a: f32| f64::from(flush(a)))),
        (F64, F32) => Some(unary(|a: f32| f64::from(a))),
        (F64, F16) => Some(unary(|a: Half| a.double())),
        (F64, Bf16) => Some(unary(|a: Brain| a.double())),
        (F32, F32) => Some(match (form.has("ftz"), form.has("sat")) {
            (false, false) => unary(|a: f32| a),
            (true, false) => unary(|a: f32| flush(a)),
            (false, true) => unary(|a: f32| saturate(a)),
            (true, true) => unary(|a: f32| saturate(flush(a))),
        }),
        (F64, F64) | (F16, F16) | (Bf16, Bf16) if form.has("sat") => None,
        (F64, F64) => Some(unary(|a: f64| a)),
        (F16, F16) | (Bf16, Bf16) => Some(unary(|a: u16| a)),
        (F32, F64) => Some(match (form.one_of(&["rn", "rz"])?, form.has("ftz")) {
            ("rn", false) => unary(|a: f64| canonical(a as f32)),
            ("rn", true) => unary(|a: f64| flush(canonical(a as f32))),
            ("rz", false) => unary(|a: f64| canonical(toward_zero(a))),
            _ => return None,
        }),
        (F16, F32) => narrowed::<Half>(form),
        (Bf16, F32) => narrowed::<Brain>(form),
        (F16, F64) => form
            .has("rn")
            .then(|| unary(|a: f64| Half::rounded_double(a))),
        (Bf16, F64) => form
            .has("rn")
            .then(|| unary(|a: f64| Brain::rounded_double(a))),
        (F16, Bf16) => form
            .has("rn")
            .then(|| unary(|a: Brain| Half::rounded(a.wide()))),
        (Bf16, F16) => form
            .has("rn")
            .then(|| unary(|a: Half| Brain::rounded(a.wide()))),
        (F16x2, F32) => packed::<Half>(form),
        (Bf16x2, F32) => packed::<Brain>(form),
        _ => None,
    }
}

fn toward_zero(a: f64) -> f32 {
    let near = a as f32;
    if f64::from(near).abs() > a.abs() {
        f32::from_bits(near.to_bits() - 1)
    } else {
        near
    }
}

fn widened<S: Small + Value>(form: &Form) -> Option<Lanes> {
    Some(match (form.has("ftz"), form.has("sat")) {
        (_, false) => unary(|a: S| canonical(a.wide())),
        (_, true) => unary(|a: S| saturate(a.wide())),
    })
}

/// `.relu`: negative values become 0.
#[inline(always)]
fn positive(x: f32) -> f32 {
    if x < 0.0 || x.to_bits() == 0x8000_0000 {
        0.0
    } else {
        x
    }
}

fn narrowed<S: Small + Value>(form: &Form) -> Option<Lanes> {
    Some(
        match (
            form.one_of(&["rn", "rz"])?,
            form.has("relu"),
            form.has("sat"),
            form.has("ftz"),
        ) {
            ("rn", false, false, false) => unary(|a: f32| S::rounded(a)),
            ("rn", true, false, false) => unary(|a: f32| S::rounded(positive(a))),
            ("rn", false, true, false) => unary(|a: f32| S::rounded(saturate(a))),
            ("rn", false, false, true) => unary(|a: f32| S::rounded(flush(a))),
            ("rz", false, false, false) => unary(|a: f32| S::truncated(a)),
            _ => return None,
        },
    )
}

/// Packs two singles into one register, the first one into the upper half.
fn packed<S: Small + 'static>(form: &Form) -> Option<Lanes> {
    Some(match (form.one_of(&["rn", "rz"])?, form.has("relu")) {
        ("rn", false) => binary(|a: f32, b: f32| join(S::rounded(b), S::rounded(a))),
        ("rn", true) => {
            binary(|a: f32, b: f32| join(S::rounded(positive(b)), S::rounded(positive(a))))
        }
        ("rz", false) => binary(|a: f32, b: f32| join(S::truncated(b), S::truncated(a))),
        _ => return None,
    })
}
