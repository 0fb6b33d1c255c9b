//! What kind of instruction a PTX statement is, and how many machine instructions it becomes.

use crate::ptx::decode::form::Form;
use crate::ptx::syntax::{Operand, Statement};
use crate::ptx::types::Type;

/// Classes of PTX instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Floating-point arithmetic.
    Float,
    /// Functions that a unit of their own approximates: exponentials, logarithms, reciprocals.
    Special,
    Integer,
    Convert,
    /// Moves and selections.
    Move,
    /// Comparisons, and operations on predicates.
    Compare,
    /// Branches, calls and exits.
    Control,
    /// Loads of parameters.
    Parameter,
    /// Loads from and stores to global memory.
    Global,
    /// Loads from and stores to shared memory.
    Shared,
    /// Accesses to local and to generic addresses.
    Local,
    Atomic,
    /// `cp.async`, and waits for it.
    AsyncCopy,
    LoadMatrix,
    Multiply,
    /// Exchanges between the lanes of a warp.
    Warp,
    Barrier,
    /// Fences, hints and the like.
    Other,
}

impl Class {
    /// All classes, in their order.
    pub const ALL: [Class; 18] = [
        Class::Float,
        Class::Special,
        Class::Integer,
        Class::Convert,
        Class::Move,
        Class::Compare,
        Class::Control,
        Class::Parameter,
        Class::Global,
        Class::Shared,
        Class::Local,
        Class::Atomic,
        Class::AsyncCopy,
        Class::LoadMatrix,
        Class::Multiply,
        Class::Warp,
        Class::Barrier,
        Class::Other,
    ];

    /// Returns the name in results.
    pub fn name(self) -> &'static str {
        match self {
            Class::Float => "float",
            Class::Special => "special",
            Class::Integer => "integer",
            Class::Convert => "convert",
            Class::Move => "move",
            Class::Compare => "compare",
            Class::Control => "control",
            Class::Parameter => "parameter",
            Class::Global => "global",
            Class::Shared => "shared",
            Class::Local => "local",
            Class::Atomic => "atomic",
            Class::AsyncCopy => "async_copy",
            Class::LoadMatrix => "load_matrix",
            Class::Multiply => "multiply",
            Class::Warp => "warp",
            Class::Barrier => "barrier",
            Class::Other => "other",
        }
    }
}

/// The class of an instruction, and its estimated number of machine instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub class: Class,
    pub machine: u8,
}

impl Kind {
    /// Returns the kind of a statement.
    ///
    /// The number of machine instructions is what ptxas 13.0 usually makes of the statement for
    /// compute capability 8.0 to 9.0: registers are renamed instead of moved, parameters are
    /// operands in constant memory, 64-bit integers take two instructions, and divisions and
    /// accurate functions become short programs. The estimate was
    /// fitted to the inner loops of seven kernels, for which the sums are 16 % below to 14 % above
    /// the number of instructions in the disassembly.
    pub fn of(statement: &Statement) -> Kind {
        let form = Form::new(statement.opcode);
        let class = class(&form);
        let machine = match class {
            Class::Parameter => 0,
            Class::Move => moves(&form, &statement.operands),
            Class::Convert => conversions(&form),
            Class::Integer | Class::Compare => integers(&form),
            Class::Float | Class::Special => floats(&form),
            Class::Control if form.base == "call" => 0,
            _ => 1,
        };
        Kind { class, machine }
    }
}

fn class(form: &Form) -> Class {
    let is_float = form.types.iter().any(|of| of.is_float());
    match form.base {
        "mma" => Class::Multiply,
        "ldmatrix" | "stmatrix" => Class::LoadMatrix,
        "ld" | "ldu" | "st" => space(form),
        "atom" | "red" => Class::Atomic,
        "cp" if form.has("prefetch") => Class::Other,
        "cp" => Class::AsyncCopy,
        "bar" | "barrier" if form.has("warp") => Class::Warp,
        "bar" | "barrier" => Class::Barrier,
        "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" => Class::Warp,
        "bra" | "brx" | "call" | "ret" | "exit" | "trap" => Class::Control,
        "setp" | "set" | "testp" => Class::Compare,
        "isspacep" => Class::Compare,
        _ if form.types.first() == Some(&Type::Pred) => Class::Compare,
        "mov" | "selp" | "slct" | "cvta" => Class::Move,
        "cvt" => Class::Convert,
        "ex2" | "lg2" | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "tanh" => Class::Special,
        "div" if is_float => Class::Special,
        "membar" | "fence" | "griddepcontrol" | "nanosleep" | "prefetch" | "prefetchu"
        | "discard" | "applypriority" | "brkpt" | "pmevent" => Class::Other,
        _ if is_float => Class::Float,
        _ => Class::Integer,
    }
}

fn space(form: &Form) -> Class {
    if form.has("global") || form.has("const") {
        Class::Global
    } else if form.has("shared") || form.has("shared::cta") {
        Class::Shared
    } else if form.has("param") {
        Class::Parameter
    } else {
        Class::Local
    }
}

/// Returns whether the instruction has 64-bit operands.
fn is_wide(form: &Form) -> bool {
    form.types.iter().any(|of| of.size() == 8)
}

fn moves(form: &Form, operands: &[Operand]) -> u8 {
    match (form.base, operands) {
        ("selp" | "slct", _) => 1 + u8::from(is_wide(form)),
        // Halves of a register are packed with one instruction; 64-bit registers are pairs.
        ("mov", [_, Operand::Vector(_)] | [Operand::Vector(_), _]) => u8::from(!is_wide(form)),
        ("mov", [_, Operand::Name(name)]) => u8::from(is_special(name)),
        _ => 0,
    }
}

/// Returns whether the name is that of a special register.
fn is_special(name: &str) -> bool {
    let names = [
        "%tid",
        "%ctaid",
        "%ntid",
        "%nctaid",
        "%laneid",
        "%warpid",
        "%lanemask",
        "%clock",
        "%global",
        "%smid",
    ];
    names.iter().any(|special| name.starts_with(special))
}

fn conversions(form: &Form) -> u8 {
    let [to, from] = form.types.as_slice() else {
        return 1;
    };
    let is_integer = !to.is_float() && !from.is_float();
    match (to.size(), from.size()) {
        // Truncation takes the lower register; zero-extension adds a register that is zero.
        (4, 8) if is_integer => 0,
        (8, _) if is_integer => u8::from(from.is_signed()),
        (to, from) if is_integer && to <= from && !form.has("sat") => 0,
        _ => 1,
    }
}

fn integers(form: &Form) -> u8 {
    let wide = is_wide(form) && !form.has("wide");
    match form.base {
        "div" | "rem" => 20 * (1 + 3 * u8::from(wide)),
        "mul" | "mad" if wide => 3,
        "mul" | "mad" if form.has("hi") => 2,
        "bfe" | "bfi" | "clz" | "bfind" => 2,
        // Nearly always a part of an address, with a product or a shift beside it: two
        // instructions for both.
        "add" | "sub" | "shl" => 1,
        _ => 1 + u8::from(wide),
    }
}

fn floats(form: &Form) -> u8 {
    match form.base {
        // They become a sign of the operand of the instruction that uses the result.
        "neg" | "abs" => 0,
        "div" if form.has("rn") || form.has("rz") => 10,
        "sqrt" | "rcp" if form.has("rn") => 8,
        "div" | "sqrt" | "sin" | "cos" => 2,
        // Without `ftz`, operands that are too small are scaled up and results down.
        "ex2" | "lg2" | "rcp" | "rsqrt" if !form.has("ftz") => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Class::*;

    fn kind(opcode: &str, operands: Vec<Operand>) -> (Class, u8) {
        let statement = Statement {
            line: 1,
            location: (0, 0),
            guard: None,
            opcode,
            operands,
        };
        let kind = Kind::of(&statement);
        (kind.class, kind.machine)
    }

    #[test]
    fn opcodes_have_a_class_and_a_number_of_machine_instructions() {
        for (opcode, class, machine) in [
            ("fma.rn.f32", Float, 1),
            ("neg.f32", Float, 0),
            ("div.rn.f32", Special, 10),
            ("ex2.approx.ftz.f32", Special, 1),
            ("ex2.approx.f32", Special, 4),
            ("add.s32", Integer, 1),
            ("add.s64", Integer, 1),
            ("or.b64", Integer, 2),
            ("mul.wide.u32", Integer, 1),
            ("mul.lo.s64", Integer, 3),
            ("div.u32", Integer, 20),
            ("div.u64", Integer, 80),
            ("setp.lt.u32", Compare, 1),
            ("setp.lt.f32", Compare, 1),
            ("setp.eq.s64", Compare, 2),
            ("and.pred", Compare, 1),
            ("cvt.rn.bf16x2.f32", Convert, 1),
            ("cvt.u64.u32", Convert, 0),
            ("cvt.u32.u64", Convert, 0),
            ("cvta.to.global.u64", Move, 0),
            ("selp.b32", Move, 1),
            ("ld.param.u64", Parameter, 0),
            ("ld.global.v4.u32", Global, 1),
            ("st.shared.f32", Shared, 1),
            ("ld.local.u32", Local, 1),
            ("red.shared.add.u32", Atomic, 1),
            ("cp.async.cg.shared.global", AsyncCopy, 1),
            ("cp.async.wait_group", AsyncCopy, 1),
            ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", LoadMatrix, 1),
            (
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
                Multiply,
                1,
            ),
            ("shfl.sync.bfly.b32", Warp, 1),
            ("bar.warp.sync", Warp, 1),
            ("bar.sync", Barrier, 1),
            ("bra.uni", Control, 1),
            ("fence.acq_rel.gpu", Other, 1),
        ] {
            assert_eq!(kind(opcode, vec![]), (class, machine), "{opcode}");
        }
    }

    #[test]
    fn moves_between_registers_cost_nothing() {
        let name = Operand::Name;
        let pair = || Operand::Vector(vec![Operand::Name("%a"), Operand::Name("%b")]);
        assert_eq!(kind("mov.u32", vec![name("%r1"), name("%r2")]), (Move, 0));
        assert_eq!(
            kind("mov.u32", vec![name("%r1"), name("%tid.x")]),
            (Move, 1)
        );
        assert_eq!(kind("mov.b32", vec![name("%r1"), pair()]), (Move, 1));
        assert_eq!(kind("mov.b64", vec![pair(), name("%rd1")]), (Move, 0));
    }

    #[test]
    fn classes_are_listed_in_their_order() {
        assert!(Class::ALL.is_sorted());
        assert_eq!(Class::ALL.last().map(|class| *class as usize), Some(17));
    }
}
