//! `set` on two 16-bit numbers in one register.

use super::float::split;
use super::half::{Brain, Half, Small};
use super::lanes::{Lanes, binary};
use crate::ptx::types::{Type, Type::*};

/// Returns the lanes of `set` for pairs of type `of`. If the relation holds, each half becomes
/// 1.0, or all ones for an integer result.
pub fn pairs(relation: &str, to: Type, of: Type) -> Option<Lanes> {
    match (to, of) {
        (F16x2, F16x2) => lanes::<Half, 0x3c00>(relation),
        (U32 | S32, F16x2) => lanes::<Half, 0xffff>(relation),
        (Bf16x2, Bf16x2) => lanes::<Brain, 0x3f80>(relation),
        (U32 | S32, Bf16x2) => lanes::<Brain, 0xffff>(relation),
        _ => None,
    }
}

#[inline(always)]
fn both<S: Small, const YES: u32>(a: u32, b: u32, holds: impl Fn(f32, f32) -> bool) -> u32 {
    let ((a, c), (b, d)) = (split::<S>(a), split::<S>(b));
    let yes = |holds: bool| if holds { YES } else { 0 };
    yes(holds(a.wide(), b.wide())) | yes(holds(c.wide(), d.wide())) << 16
}

#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn lanes<S: Small + 'static, const YES: u32>(relation: &str) -> Option<Lanes> {
    macro_rules! pair {
        (|$a:ident, $b:ident| $holds:expr) => {
            binary(|a: u32, b: u32| both::<S, YES>(a, b, |$a, $b| $holds))
        };
    }
    Some(match relation {
        "eq" => pair!(|a, b| a == b),
        "ne" => pair!(|a, b| a < b || a > b),
        "lt" => pair!(|a, b| a < b),
        "le" => pair!(|a, b| a <= b),
        "gt" => pair!(|a, b| a > b),
        "ge" => pair!(|a, b| a >= b),
        "equ" => pair!(|a, b| !(a < b || a > b)),
        "neu" => pair!(|a, b| a != b),
        "ltu" => pair!(|a, b| !(a >= b)),
        "leu" => pair!(|a, b| !(a > b)),
        "gtu" => pair!(|a, b| !(a <= b)),
        "geu" => pair!(|a, b| !(a < b)),
        "num" => pair!(|a, b| !a.is_nan() && !b.is_nan()),
        "nan" => pair!(|a, b| a.is_nan() || b.is_nan()),
        _ => return None,
    })
}
