//! Builds handlers from functions of one lane.
//!
//! Each handler is compiled twice: for any CPU, and for CPUs with AVX2 and FMA, where the loops
//! over the lanes become vector instructions. The version is chosen at decoding.

use super::half::{Brain, Half};
use crate::ptx::instruction::{ALL, Handler, Instruction, LANES};
use crate::ptx::types::Class;

/// The value of one lane, and its representation in a register.
pub trait Value: Copy + 'static {
    /// `u32` or `u64`.
    type Store: Copy + Default;
    /// Class of the register.
    const CLASS: Class;
    fn get(store: Self::Store) -> Self;
    fn put(self) -> Self::Store;
}

macro_rules! value {
    ($($of:ty, $store:ty, $class:ident, $get:expr, $put:expr;)*) => {$(
        impl Value for $of {
            type Store = $store;
            const CLASS: Class = Class::$class;
            #[inline(always)]
            fn get(store: $store) -> Self {
                let get: fn($store) -> $of = $get;
                get(store)
            }
            #[inline(always)]
            fn put(self) -> $store {
                let put: fn($of) -> $store = $put;
                put(self)
            }
        }
    )*};
}

// Bits above a narrow value are never read. Signed values are sign-extended, as PTX requires if
// the destination is wider than the type.
value! {
    u8, u32, Word, |s| s as u8, u32::from;
    i8, u32, Word, |s| s as i8, |v| i32::from(v) as u32;
    u16, u32, Word, |s| s as u16, u32::from;
    i16, u32, Word, |s| s as i16, |v| i32::from(v) as u32;
    u32, u32, Word, |s| s, |v| v;
    i32, u32, Word, |s| s as i32, |v| v as u32;
    f32, u32, Word, f32::from_bits, f32::to_bits;
    Half, u32, Word, |s| Half(s as u16), |v| u32::from(v.0);
    Brain, u32, Word, |s| Brain(s as u16), |v| u32::from(v.0);
    u64, u64, Wide, |s| s, |v| v;
    i64, u64, Wide, |s| s as i64, |v| v as u64;
    f64, u64, Wide, f64::from_bits, f64::to_bits;
}

/// A handler and the classes of its operands: the destination, then the sources.
#[derive(Clone, Debug)]
pub struct Lanes {
    pub run: Handler,
    pub write: Class,
    pub reads: Vec<Class>,
}

/// Returns the row of the register file at which a slot begins.
///
/// # Safety
/// The file must contain the slot.
#[inline(always)]
unsafe fn row<S>(file: *mut u32, slot: u16) -> *mut [S; LANES] {
    // SAFETY: guaranteed by the caller.
    unsafe { file.add(usize::from(slot) * LANES).cast() }
}

/// Writes the lanes of `mask`.
///
/// # Safety
/// As for [`row`].
#[inline(always)]
unsafe fn write<S: Copy>(file: *mut u32, slot: u16, mask: u32, values: &[S; LANES]) {
    // SAFETY: guaranteed by the caller.
    let to = unsafe { &mut *row::<S>(file, slot) };
    if mask == ALL {
        *to = *values;
    } else {
        for lane in 0..LANES {
            if mask >> lane & 1 == 1 {
                to[lane] = values[lane];
            }
        }
    }
}

/// Returns the value of a type that has exactly one, such as a closure without captures.
#[inline(always)]
fn only<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0) };
    // SAFETY: the type has no bytes that could be invalid, and the builder was given a value of
    // it.
    unsafe { std::ptr::NonNull::<F>::dangling().read() }
}

/// Returns whether this CPU has the features that the vector version of the handlers needs.
pub fn has_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("bmi2")
            && std::is_x86_feature_detected!("lzcnt")
            && std::is_x86_feature_detected!("popcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Defines a handler whose body is compiled in both versions.
macro_rules! handler {
    ($(#[$doc:meta])* $name:ident<$($of:ident),*>($($argument:ty),*) -> $out:ty { $write:expr, $reads:expr }
        |$file:ident, $i:ident, $mask:ident, $f:ident| $body:block) => {
        $(#[$doc])*
        pub fn $name<$($of: Value,)* F: Fn($($argument),*) -> $out + Copy + 'static>(_: F) -> Lanes {
            #[inline(always)]
            unsafe fn body<$($of: Value,)* F: Fn($($argument),*) -> $out + Copy>(
                $file: *mut u32,
                $i: &Instruction,
                $mask: u32,
            ) {
                let $f = only::<F>();
                // SAFETY: the caller upholds the contract of `Handler`.
                unsafe { $body }
            }
            unsafe fn plain<$($of: Value,)* F: Fn($($argument),*) -> $out + Copy>(f: *mut u32, i: &Instruction, m: u32) {
                // SAFETY: guaranteed by the caller.
                unsafe { body::<$($of,)* F>(f, i, m) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn vector<$($of: Value,)* F: Fn($($argument),*) -> $out + Copy>(f: *mut u32, i: &Instruction, m: u32) {
                // SAFETY: guaranteed by the caller.
                unsafe { body::<$($of,)* F>(f, i, m) }
            }
            #[cfg(target_arch = "x86_64")]
            let run: Handler = if has_vectors() { vector::<$($of,)* F> } else { plain::<$($of,)* F> };
            #[cfg(not(target_arch = "x86_64"))]
            let run: Handler = plain::<$($of,)* F>;
            Lanes { run, write: $write, reads: $reads }
        }
    };
}

handler! {
    /// `d = f(a)`.
    unary<A, D>(A) -> D { D::CLASS, vec![A::CLASS] }
    |file, i, mask, f| {
        let a = &*row::<A::Store>(file, i.slots[1]);
        let mut d = [D::Store::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(A::get(a[lane])).put();
        }
        write(file, i.slots[0], mask, &d);
    }
}

handler! {
    /// `d = f(a, b)`.
    binary<A, B, D>(A, B) -> D { D::CLASS, vec![A::CLASS, B::CLASS] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<B::Store>(file, i.slots[2]));
        let mut d = [D::Store::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(A::get(a[lane]), B::get(b[lane])).put();
        }
        write(file, i.slots[0], mask, &d);
    }
}

handler! {
    /// `d = f(a, b, c)`.
    ternary<A, B, C, D>(A, B, C) -> D { D::CLASS, vec![A::CLASS, B::CLASS, C::CLASS] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<B::Store>(file, i.slots[2]));
        let c = &*row::<C::Store>(file, i.slots[3]);
        let mut d = [D::Store::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(A::get(a[lane]), B::get(b[lane]), C::get(c[lane])).put();
        }
        write(file, i.slots[0], mask, &d);
    }
}

handler! {
    /// `d = f(a, b, c, e)`.
    quaternary<A, B, C, E, D>(A, B, C, E) -> D { D::CLASS, vec![A::CLASS, B::CLASS, C::CLASS, E::CLASS] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<B::Store>(file, i.slots[2]));
        let (c, e) = (&*row::<C::Store>(file, i.slots[3]), &*row::<E::Store>(file, i.slots[4]));
        let mut d = [D::Store::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(A::get(a[lane]), B::get(b[lane]), C::get(c[lane]), E::get(e[lane])).put();
        }
        write(file, i.slots[0], mask, &d);
    }
}

handler! {
    /// `predicate = f(a, b)`.
    compare<A, B>(A, B) -> bool { Class::Predicate, vec![A::CLASS, B::CLASS] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<B::Store>(file, i.slots[2]));
        let mut bits = 0u32;
        for lane in 0..LANES {
            bits |= u32::from(f(A::get(a[lane]), B::get(b[lane]))) << lane;
        }
        let to = file.add(usize::from(i.slots[0]));
        *to = (*to & !mask) | (bits & mask);
    }
}

handler! {
    /// `d = f(a, b, predicate)`.
    select<A, D>(A, A, bool) -> D { D::CLASS, vec![A::CLASS, A::CLASS, Class::Predicate] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<A::Store>(file, i.slots[2]));
        let bits = *file.add(usize::from(i.slots[3]));
        let mut d = [D::Store::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(A::get(a[lane]), A::get(b[lane]), bits >> lane & 1 == 1).put();
        }
        write(file, i.slots[0], mask, &d);
    }
}

handler! {
    /// `predicate = f(a, b, predicate)`.
    judge<A>(A, A, bool) -> bool { Class::Predicate, vec![A::CLASS, A::CLASS, Class::Predicate] }
    |file, i, mask, f| {
        let (a, b) = (&*row::<A::Store>(file, i.slots[1]), &*row::<A::Store>(file, i.slots[2]));
        let given = *file.add(usize::from(i.slots[3]));
        let mut bits = 0u32;
        for lane in 0..LANES {
            bits |= u32::from(f(A::get(a[lane]), A::get(b[lane]), given >> lane & 1 == 1)) << lane;
        }
        let to = file.add(usize::from(i.slots[0]));
        *to = (*to & !mask) | (bits & mask);
    }
}

/// `predicate = f(predicate, predicate)`, on the bits of all lanes at once.
pub fn predicates<F: Fn(u32, u32) -> u32 + Copy + 'static>(_: F) -> Lanes {
    unsafe fn run<F: Fn(u32, u32) -> u32 + Copy>(file: *mut u32, i: &Instruction, mask: u32) {
        // SAFETY: the contract of `Handler` guarantees that the file contains these words.
        unsafe {
            let word = |slot: u16| file.add(usize::from(slot));
            let bits = only::<F>()(*word(i.slots[1]), *word(i.slots[2]));
            let to = word(i.slots[0]);
            *to = (*to & !mask) | (bits & mask);
        }
    }
    Lanes {
        run: run::<F>,
        write: Class::Predicate,
        reads: vec![Class::Predicate; 2],
    }
}
