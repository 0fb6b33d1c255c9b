//! The output of the parser: declarations and statements with unresolved names.

use super::types::{Space, Type};
use std::collections::HashMap;

/// A whole module.
#[derive(Default, Debug)]
pub struct Source<'a> {
    /// The compute capability that the image is for, times ten.
    pub target: u32,
    /// Names of the files, by their number in `.loc`.
    pub files: HashMap<u32, &'a str>,
    pub variables: Vec<Variable<'a>>,
    pub functions: Vec<Function<'a>>,
}

/// A variable of a module or function, or a formal parameter.
#[derive(Clone, Debug)]
pub struct Variable<'a> {
    pub space: Space,
    pub name: &'a str,
    pub of: Type,
    /// Alignment in bytes.
    pub align: usize,
    /// Number of elements.
    pub count: usize,
    /// `.extern .shared x[]`: the size is set at launch.
    pub is_dynamic: bool,
    /// Initial values of the first elements.
    pub initial: Vec<Initial<'a>>,
    pub line: u32,
}

impl Variable<'_> {
    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.count * self.of.size()
    }
}

/// An element of an initialiser.
#[derive(Clone, Debug)]
pub enum Initial<'a> {
    Bits(u64),
    /// The address of another variable.
    Address(&'a str, i64),
}

/// An `.entry` or a `.func`.
#[derive(Debug)]
pub struct Function<'a> {
    pub is_entry: bool,
    pub name: &'a str,
    pub results: Vec<Variable<'a>>,
    pub parameters: Vec<Variable<'a>>,
    /// `.maxntid`: maximum number of threads per block.
    pub max_threads: Option<u32>,
    /// `.reqntid`: required shape of a block.
    pub required_block: Option<[u32; 3]>,
    pub body: Vec<Item<'a>>,
}

/// An item of a function's body.
#[derive(Debug)]
pub enum Item<'a> {
    Open,
    Close,
    Label(&'a str),
    /// `.reg .b32 %r<8>, x;`: names, and whether each is the stem of numbered registers.
    Registers(Type, Vec<(&'a str, bool)>),
    Variable(Variable<'a>),
    Statement(Statement<'a>),
}

/// One instruction.
#[derive(Debug)]
pub struct Statement<'a> {
    pub line: u32,
    /// File number and line of the last `.loc`.
    pub location: (u32, u32),
    /// Name of the guard predicate, and whether it is negated.
    pub guard: Option<(&'a str, bool)>,
    /// The opcode with all its dots.
    pub opcode: &'a str,
    pub operands: Vec<Operand<'a>>,
}

/// An operand with unresolved names.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'a> {
    /// A register, a special register, a variable, a label or a function.
    Name(&'a str),
    /// `!%p`.
    Not(&'a str),
    /// `%r1|%p1`.
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
    Integer(u64),
    /// `0f...`.
    Single(u32),
    /// `0d...` or a decimal number.
    Double(f64),
    /// `{a, b}`.
    Vector(Vec<Operand<'a>>),
    /// `[base+offset]`; no base for an absolute address.
    Address(Option<&'a str>, i64),
    /// `name+offset`.
    Offset(&'a str, i64),
    /// `(a, b)`.
    List(Vec<Operand<'a>>),
}
