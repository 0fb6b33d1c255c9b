//! The types that opcodes name, and the state spaces.

/// A type suffix of an opcode or a declaration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    B8,
    B16,
    B32,
    B64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
    Pred,
}

use Type::*;

impl Type {
    /// Returns the type with this name, which has no dot.
    pub fn named(name: &str) -> Option<Type> {
        Some(match name {
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "f32" => F32,
            "f64" => F64,
            "pred" => Pred,
            _ => return None,
        })
    }

    /// Returns the size in memory in bytes.
    pub fn size(self) -> usize {
        match self {
            U8 | S8 | B8 | Pred => 1,
            U16 | S16 | B16 | F16 | Bf16 => 2,
            U32 | S32 | B32 | F32 | F16x2 | Bf16x2 => 4,
            U64 | S64 | B64 | F64 => 8,
        }
    }

    /// Returns the class of a register of this type.
    pub fn class(self) -> Class {
        match self {
            Pred => Class::Predicate,
            U64 | S64 | B64 | F64 => Class::Wide,
            _ => Class::Word,
        }
    }

    /// Returns whether this is a signed integer.
    pub fn is_signed(self) -> bool {
        matches!(self, S8 | S16 | S32 | S64)
    }

    /// Returns whether this is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, F16 | F16x2 | Bf16 | Bf16x2 | F32 | F64)
    }
}

/// How the lanes of a register are stored in the register file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// One bit per lane, 32 bits in total.
    Predicate,
    /// 32 × u32; narrower values are extended to 32 bits.
    Word,
    /// 32 × u64.
    Wide,
}

/// A state space of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Global,
    Shared,
    Local,
    Parameter,
    Generic,
}
