//! Integer, bit and predicate opcodes: the operation of each on a lane.

use super::lanes::{Lanes, binary, compare, predicates, quaternary, select, ternary, unary};
use crate::ptx::decode::form::Form;
use crate::ptx::types::{Class, Type, Type::*};

/// Evaluates `$lanes` with `$t` as the Rust type of an integer type. For other types, the
/// calling function returns `None`.
macro_rules! integers {
    ($of:expr, $t:ident => $lanes:expr) => {
        match $of {
            U8 | B8 => {
                type $t = u8;
                $lanes
            }
            S8 => {
                type $t = i8;
                $lanes
            }
            U16 | B16 => {
                type $t = u16;
                $lanes
            }
            S16 => {
                type $t = i16;
                $lanes
            }
            U32 | B32 => {
                type $t = u32;
                $lanes
            }
            S32 => {
                type $t = i32;
                $lanes
            }
            U64 | B64 => {
                type $t = u64;
                $lanes
            }
            S64 => {
                type $t = i64;
                $lanes
            }
            _ => return None,
        }
    };
}
pub(super) use integers;

/// Evaluates `$lanes` with `$t` as the unsigned and `$s` as the signed type of this width.
macro_rules! widths {
    ($of:expr, $t:ident, $s:ident => $lanes:expr) => {
        match $of.size() {
            2 => {
                #[allow(dead_code)]
                type $t = u16;
                #[allow(dead_code)]
                type $s = i16;
                $lanes
            }
            4 => {
                #[allow(dead_code)]
                type $t = u32;
                #[allow(dead_code)]
                type $s = i32;
                $lanes
            }
            8 => {
                #[allow(dead_code)]
                type $t = u64;
                #[allow(dead_code)]
                type $s = i64;
                $lanes
            }
            _ => return None,
        }
    };
}

/// Returns the lanes of an integer opcode, or `None` if it is not one.
pub fn find(form: &Form) -> Option<Lanes> {
    let of = form.of()?;
    if of == Pred {
        return logic(form);
    }
    if of.is_float() {
        return None;
    }
    arithmetic(form, of)
        .or_else(|| product(form, of))
        .or_else(|| bits(form, of))
}

fn logic(form: &Form) -> Option<Lanes> {
    Some(match form.base {
        "and" => predicates(|a, b| a & b),
        "or" => predicates(|a, b| a | b),
        "xor" => predicates(|a, b| a ^ b),
        _ => return None,
    })
}

fn arithmetic(form: &Form, of: Type) -> Option<Lanes> {
    Some(match form.base {
        "add" if of == S32 && form.has("sat") => binary(|a: i32, b: i32| a.saturating_add(b)),
        "sub" if of == S32 && form.has("sat") => binary(|a: i32, b: i32| a.saturating_sub(b)),
        "add" => widths!(of, T, S => binary(|a: T, b: T| a.wrapping_add(b))),
        "sub" => widths!(of, T, S => binary(|a: T, b: T| a.wrapping_sub(b))),
        "neg" => widths!(of, T, S => unary(|a: T| a.wrapping_neg())),
        "abs" => widths!(of, T, S => unary(|a: S| a.wrapping_abs())),
        "min" => integers!(of, T => binary(|a: T, b: T| a.min(b))),
        "max" => integers!(of, T => binary(|a: T, b: T| a.max(b))),
        // Division by zero sets every bit; the remainder is then the dividend.
        "div" => {
            integers!(of, T => binary(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_div(b) }))
        }
        "rem" => {
            integers!(of, T => binary(|a: T, b: T| if b == 0 { a } else { a.wrapping_rem(b) }))
        }
        "sad" => integers!(of, T => ternary(|a: T, b: T, c: T| {
            let larger = if a < b { b.wrapping_sub(a) } else { a.wrapping_sub(b) };
            c.wrapping_add(larger)
        })),
        _ => return None,
    })
}

fn product(form: &Form, of: Type) -> Option<Lanes> {
    let is_mad = form.base == "mad";
    Some(match form.base {
        "mul" | "mad" if form.has("wide") => match (of, is_mad) {
            (U16, false) => binary(|a: u16, b: u16| u32::from(a) * u32::from(b)),
            (S16, false) => binary(|a: i16, b: i16| i32::from(a) * i32::from(b)),
            (U32, false) => binary(|a: u32, b: u32| u64::from(a) * u64::from(b)),
            (S32, false) => binary(|a: i32, b: i32| i64::from(a) * i64::from(b)),
            (U16, true) => {
                ternary(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c))
            }
            (S16, true) => {
                ternary(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c))
            }
            (U32, true) => {
                ternary(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c))
            }
            (S32, true) => {
                ternary(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c))
            }
            _ => return None,
        },
        "mul" if form.has("hi") => return high_product(of),
        "mad" if form.has("hi") => match of {
            U32 => ternary(|a: u32, b: u32, c: u32| high_u32(a, b).wrapping_add(c)),
            S32 => ternary(|a: i32, b: i32, c: i32| high_s32(a, b).wrapping_add(c)),
            U64 => ternary(|a: u64, b: u64, c: u64| {
                (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)
            }),
            S64 => ternary(|a: i64, b: i64, c: i64| {
                (((i128::from(a) * i128::from(b)) >> 64) as i64).wrapping_add(c)
            }),
            _ => return None,
        },
        "mul" if form.has("lo") => widths!(of, T, S => binary(|a: T, b: T| a.wrapping_mul(b))),
        "mad" if form.has("lo") => {
            widths!(of, T, S => ternary(|a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c)))
        }
        "mul24" | "mad24" => return product24(form, of),
        "dp4a" => match (of, form.types.get(1)) {
            (U32, Some(U32)) => ternary(|a: u32, b: u32, c: u32| dot4(a, b, c, u32_byte, u32_byte)),
            (U32, Some(S32)) => ternary(|a: u32, b: u32, c: u32| dot4(a, b, c, u32_byte, s32_byte)),
            (S32, Some(U32)) => ternary(|a: u32, b: u32, c: u32| dot4(a, b, c, s32_byte, u32_byte)),
            (S32, Some(S32)) => ternary(|a: u32, b: u32, c: u32| dot4(a, b, c, s32_byte, s32_byte)),
            _ => return None,
        },
        _ => return None,
    })
}

/// `mul.hi`: returns the lanes for the upper half of a product.
pub fn high_product(of: Type) -> Option<Lanes> {
    Some(match of {
        U16 => binary(|a: u16, b: u16| ((u32::from(a) * u32::from(b)) >> 16) as u16),
        S16 => binary(|a: i16, b: i16| ((i32::from(a) * i32::from(b)) >> 16) as i16),
        U32 => binary(high_u32),
        S32 => binary(high_s32),
        U64 => binary(|a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        S64 => binary(|a: i64, b: i64| ((i128::from(a) * i128::from(b)) >> 64) as i64),
        _ => return None,
    })
}

#[inline(always)]
fn high_u32(a: u32, b: u32) -> u32 {
    ((u64::from(a) * u64::from(b)) >> 32) as u32
}

#[inline(always)]
fn high_s32(a: i32, b: i32) -> i32 {
    ((i64::from(a) * i64::from(b)) >> 32) as i32
}

#[inline(always)]
fn u32_byte(word: u32, at: u32) -> i32 {
    i32::from((word >> (8 * at)) as u8)
}

#[inline(always)]
fn s32_byte(word: u32, at: u32) -> i32 {
    i32::from((word >> (8 * at)) as i8)
}

#[inline(always)]
fn dot4(a: u32, b: u32, c: u32, left: fn(u32, u32) -> i32, right: fn(u32, u32) -> i32) -> u32 {
    (0..4).fold(c, |sum, at| {
        sum.wrapping_add((left(a, at) * right(b, at)) as u32)
    })
}

fn product24(form: &Form, of: Type) -> Option<Lanes> {
    let (high, low) = (form.has("hi"), form.has("lo"));
    let add = form.base == "mad24";
    Some(match (of, high, low, add) {
        (U32, false, true, false) => {
            binary(|a: u32, b: u32| low_24(a).wrapping_mul(low_24(b)) as u32)
        }
        (U32, true, false, false) => {
            binary(|a: u32, b: u32| (low_24(a).wrapping_mul(low_24(b)) >> 16) as u32)
        }
        (S32, false, true, false) => {
            binary(|a: i32, b: i32| signed_24(a).wrapping_mul(signed_24(b)) as i32)
        }
        (S32, true, false, false) => {
            binary(|a: i32, b: i32| (signed_24(a).wrapping_mul(signed_24(b)) >> 16) as i32)
        }
        (U32, false, true, true) => ternary(|a: u32, b: u32, c: u32| {
            (low_24(a).wrapping_mul(low_24(b)) as u32).wrapping_add(c)
        }),
        (S32, false, true, true) => ternary(|a: i32, b: i32, c: i32| {
            (signed_24(a).wrapping_mul(signed_24(b)) as i32).wrapping_add(c)
        }),
        _ => return None,
    })
}

#[inline(always)]
fn low_24(a: u32) -> u64 {
    u64::from(a & 0xff_ffff)
}

#[inline(always)]
fn signed_24(a: i32) -> i64 {
    i64::from(a << 8 >> 8)
}

fn bits(form: &Form, of: Type) -> Option<Lanes> {
    Some(match form.base {
        "and" => widths!(of, T, S => binary(|a: T, b: T| a & b)),
        "or" => widths!(of, T, S => binary(|a: T, b: T| a | b)),
        "xor" => widths!(of, T, S => binary(|a: T, b: T| a ^ b)),
        "not" => widths!(of, T, S => unary(|a: T| !a)),
        "cnot" => widths!(of, T, S => unary(|a: T| T::from(a == 0))),
        // Shifts by the width or more leave only zeros or copies of the sign.
        "shl" => widths!(of, T, S => binary(|a: T, n: u32| if n < T::BITS { a << n } else { 0 })),
        "shr" => {
            integers!(of, T => binary(|a: T, n: u32| if n < T::BITS { a >> n } else { a >> (T::BITS - 1) >> 1 }))
        }
        "popc" => widths!(of, T, S => unary(|a: T| a.count_ones())),
        "clz" => widths!(of, T, S => unary(|a: T| a.leading_zeros())),
        "brev" => widths!(of, T, S => unary(|a: T| a.reverse_bits())),
        "bfind" => return find_bit(form, of),
        "bfe" => match of {
            U32 => ternary(|a: u32, p: u32, n: u32| extract(u64::from(a), p, n, false, 32) as u32),
            S32 => ternary(|a: i32, p: u32, n: u32| {
                extract(i64::from(a) as u64, p, n, true, 32) as u32
            }),
            U64 => ternary(|a: u64, p: u32, n: u32| extract(a, p, n, false, 64)),
            S64 => ternary(|a: u64, p: u32, n: u32| extract(a, p, n, true, 64)),
            _ => return None,
        },
        "bfi" => widths!(of, T, S => quaternary(|a: T, b: T, p: u32, n: u32| {
            let (p, n) = (p & 0xff, n & 0xff);
            let ones = if n >= T::BITS { T::MAX } else { ((1u64 << n) - 1) as T };
            if p >= T::BITS { b } else { b & !(ones << p) | (a & ones) << p }
        })),
        "shf" => return funnel(form),
        "lop3" => quaternary(logic_table),
        "prmt" => return permute(form),
        "selp" => widths!(of, T, S => select(|a: T, b: T, p| if p { a } else { b })),
        "slct" => match (of.class(), form.types.get(1)?) {
            (Class::Word, S32) => ternary(|a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
            (Class::Word, F32) => ternary(|a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b }),
            (Class::Wide, S32) => ternary(|a: u64, b: u64, c: i32| if c >= 0 { a } else { b }),
            _ => return None,
        },
        _ => return None,
    })
}

/// `bfe`: bits beyond the end of the field are copies of the sign, or zeros.
#[inline(always)]
fn extract(a: u64, position: u32, length: u32, signed: bool, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let last = (position + length - 1).min(width - 1);
    let sign = signed && a >> last & 1 == 1;
    let shifted = if position < width { a >> position } else { 0 };
    let kept = if position < width {
        last - position + 1
    } else {
        0
    };
    let ones = if kept >= 64 {
        u64::MAX
    } else {
        (1u64 << kept) - 1
    };
    let field = shifted & ones;
    if sign { field | !ones } else { field }
}

fn find_bit(form: &Form, of: Type) -> Option<Lanes> {
    let shift = form.has("shiftamt");
    Some(match (of, shift) {
        (U32 | B32, false) => unary(|a: u32| highest(u64::from(a))),
        (U32 | B32, true) => unary(|a: u32| if a == 0 { u32::MAX } else { a.leading_zeros() }),
        (S32, false) => unary(|a: i32| highest(u64::from((a ^ a >> 31) as u32))),
        (S32, true) => unary(|a: i32| {
            let other = a ^ a >> 31;
            if other == 0 {
                u32::MAX
            } else {
                other.leading_zeros()
            }
        }),
        (U64 | B64, false) => unary(|a: u64| highest(a)),
        (S64, false) => unary(|a: i64| highest((a ^ a >> 63) as u64)),
        _ => return None,
    })
}

/// Returns the position of the highest set bit, or all ones if no bit is set.
#[inline(always)]
fn highest(a: u64) -> u32 {
    63u32.wrapping_sub(a.leading_zeros())
}

fn funnel(form: &Form) -> Option<Lanes> {
    let (left, wrap) = (form.has("l"), form.has("wrap"));
    form.ignore(&["r", "clamp"]);
    Some(match (left, wrap) {
        (true, true) => ternary(|a: u32, b: u32, n: u32| (both(a, b) << (n & 31) >> 32) as u32),
        (true, false) => ternary(|a: u32, b: u32, n: u32| {
            if n >= 32 {
                a
            } else {
                (both(a, b) << n >> 32) as u32
            }
        }),
        (false, true) => ternary(|a: u32, b: u32, n: u32| (both(a, b) >> (n & 31)) as u32),
        (false, false) => ternary(|a: u32, b: u32, n: u32| (both(a, b) >> n.min(32)) as u32),
    })
}

#[inline(always)]
fn both(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// `lop3`: each result bit is the bit of the table at index `a·4 + b·2 + c`.
#[inline(always)]
fn logic_table(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut out = 0;
    for place in 0..8 {
        let chosen = 0u32.wrapping_sub(table >> place & 1);
        let a = if place & 4 == 0 { !a } else { a };
        let b = if place & 2 == 0 { !b } else { b };
        let c = if place & 1 == 0 { !c } else { c };
        out |= a & b & c & chosen;
    }
    out
}

fn permute(form: &Form) -> Option<Lanes> {
    // Modes other than the default select bytes by the low two bits of c.
    Some(
        match form.one_of(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]) {
            None => ternary(|a: u32, b: u32, c: u32| {
                let bytes = both(a, b);
                let mut out = 0;
                for at in 0..4 {
                    let choice = c >> (4 * at);
                    let byte = (bytes >> (8 * (choice & 7))) as u8;
                    let byte = if choice & 8 == 0 {
                        byte
                    } else {
                        ((byte as i8) >> 7) as u8
                    };
                    out |= u32::from(byte) << (8 * at);
                }
                out
            }),
            Some("f4e") => ternary(|a: u32, b: u32, c: u32| (both(a, b) >> (8 * (c & 3))) as u32),
            Some("b4e") => {
                ternary(|a: u32, b: u32, c: u32| pick(a, b, |at| (c & 3).wrapping_sub(at) & 7))
            }
            Some("rc8") => ternary(|a: u32, b: u32, c: u32| pick(a, b, |_| c & 3)),
            Some("ecl") => ternary(|a: u32, b: u32, c: u32| pick(a, b, |at| at.max(c & 3))),
            Some("ecr") => ternary(|a: u32, b: u32, c: u32| pick(a, b, |at| at.min(c & 3))),
            _ => ternary(|a: u32, b: u32, c: u32| pick(a, b, |at| (c & 1) * 2 + (at & 1))),
        },
    )
}

#[inline(always)]
fn pick(a: u32, b: u32, choice: impl Fn(u32) -> u32) -> u32 {
    (0..4).fold(0, |out, at| {
        out | ((both(a, b) >> (8 * choice(at))) as u32 & 0xff) << (8 * at)
    })
}

/// Returns the lanes of `setp` on integers.
pub fn comparison(relation: &str, of: Type) -> Option<Lanes> {
    Some(match relation {
        "eq" => integers!(of, T => compare(|a: T, b: T| a == b)),
        "ne" => integers!(of, T => compare(|a: T, b: T| a != b)),
        "lt" | "lo" => integers!(of, T => compare(|a: T, b: T| a < b)),
        "le" | "ls" => integers!(of, T => compare(|a: T, b: T| a <= b)),
        "gt" | "hi" => integers!(of, T => compare(|a: T, b: T| a > b)),
        "ge" | "hs" => integers!(of, T => compare(|a: T, b: T| a >= b)),
        _ => return None,
    })
}
