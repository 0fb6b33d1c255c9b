//! Loads, stores, atomic operations and asynchronous copies.

use super::form::Form;
use super::{Assembler, Result, Virtual};
use crate::ptx::execute::lanes::binary;
use crate::ptx::instruction::{Access, Action, AtomicOperation};
use crate::ptx::syntax::Operand;
use crate::ptx::types::{Class, Space, Type};

/// Modifiers for caching and for the scope of an ordering, none of which has an effect here.
const HINTS: [&str; 10] = [
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "noftz",
];
const REACH: [&str; 4] = ["cta", "gpu", "sys", "cluster"];
const ORDERS: [&str; 6] = [
    "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio",
];

impl<'a> Assembler<'a> {
    /// Returns the state space that the opcode names; generic if it names none.
    pub(super) fn space(&self, form: &Form) -> Space {
        let spaces = [
            ("global", Space::Global),
            ("const", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("local", Space::Local),
            ("param", Space::Parameter),
            ("param::entry", Space::Parameter),
            ("param::func", Space::Parameter),
        ];
        spaces
            .iter()
            .find(|(name, _)| form.has(name))
            .map_or(Space::Generic, |(_, space)| *space)
    }

    /// Resolves an address to a register and an offset, and to the variable's state space if it
    /// names a variable.
    fn address(&mut self, operand: &Operand<'a>) -> Result<(Virtual, i32, Option<Space>)> {
        let Operand::Address(base, offset) = operand else {
            return self.error("expected an address");
        };
        let Ok(small) = i32::try_from(*offset) else {
            return self.error("the offset of an address is too large");
        };
        let Some(name) = base else {
            return Ok((self.constant(Class::Wide, *offset as u64), 0, None));
        };
        if let Some(register) = self.find_register(name) {
            return match self.classes[register as usize] {
                Class::Predicate => self.error("a predicate as address"),
                _ => Ok((register, small, None)),
            };
        }
        if let Some(symbol) = self.symbol(name) {
            let address = symbol.address.wrapping_add(*offset as u64);
            return Ok((self.constant(Class::Wide, address), 0, Some(symbol.space)));
        }
        Ok((
            self.read(&Operand::Name(name), Class::Wide, None)?,
            small,
            None,
        ))
    }

    /// Tracks the smallest access to shared memory.
    fn use_shared(&mut self, space: Space, bytes: usize) {
        if matches!(space, Space::Shared | Space::Generic) {
            self.granule = self.granule.min(bytes);
        }
    }

    pub(super) fn access(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let is_load = form.base != "st";
        let ([first, second], Some(of)) = (operands, form.of()) else {
            return self.error("expected two operands");
        };
        let mut space = self.space(form);
        form.ignore(&HINTS);
        form.ignore(&REACH);
        form.ignore_prefix("L1::");
        form.ignore_prefix("L2::");
        let ordered = form.one_of(&ORDERS).is_some();
        let count = match form.one_of(&["v2", "v4", "v8"]) {
            None => 1,
            Some("v2") => 2,
            Some("v4") => 4,
            Some(_) => return self.error("vectors of eight are not known"),
        };
        let (address, values) = if is_load {
            (second, first)
        } else {
            (first, second)
        };
        let (address, offset, named) = self.address(address)?;
        if let Some(named) = named.filter(|_| space == Space::Parameter || space == Space::Generic)
        {
            space = named; // parameters of a call are local; a variable named directly needs no window
        }
        let values: &[Operand] = match values {
            Operand::Vector(values) => values,
            single => std::slice::from_ref(single),
        };
        if values.len() != count {
            return self.error("the length of the vector does not match the opcode");
        }
        if of == Type::Pred {
            return self.error("predicates cannot be loaded or stored");
        }
        // Registers may be wider than the type; the first one decides.
        let wide = match &values[0] {
            Operand::Name(name) if *name != "_" => {
                let register = self.find_register(name);
                register.map_or(of.class(), |r| self.classes[r as usize]) == Class::Wide
            }
            _ => of.class() == Class::Wide,
        };
        if of.size() == 8 && !wide {
            return self.error("a 64-bit value needs a 64-bit register");
        }
        let class = if wide { Class::Wide } else { Class::Word };
        let access = Access {
            space,
            size: of.size() as u8,
            count: count as u8,
            signed: of.is_signed(),
            wide,
            wide_address: self.classes[address as usize] == Class::Wide,
            ordered,
        };
        if access.bytes() > 16 {
            return self.error("a vector of more than 16 bytes");
        }
        self.use_shared(space, access.bytes());
        let mut registers = Vec::with_capacity(count);
        for value in values {
            registers.push(if is_load {
                self.write(value, class)?
            } else {
                self.read(value, class, Some(of))?
            });
        }
        if is_load {
            self.emit_offset(Action::Load(access), &registers, &[address], offset);
        } else if space == Space::Parameter {
            return self.error("a store to a kernel's parameter");
        } else {
            self.emit_offset(
                Action::Store(access),
                &[],
                &[&[address], registers.as_slice()].concat(),
                offset,
            );
        }
        Ok(())
    }

    /// Decodes `atom` and `red`: `[d,] [address], b[, c]`.
    pub(super) fn atomic(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let Some(of) = form.of() else {
            return self.error("the type is missing");
        };
        let space = self.space(form);
        form.ignore(&HINTS);
        form.ignore(&REACH);
        form.ignore(&ORDERS);
        let names = [
            "add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas",
        ];
        let operation = match (form.one_of(&names), of) {
            (Some("add"), Type::F32) => AtomicOperation::AddSingle,
            (Some("add"), Type::F64) => AtomicOperation::AddDouble,
            (_, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2) => {
                return self.error("atomics of 16-bit floats");
            }
            (Some("add"), _) => AtomicOperation::Add,
            (Some("min"), of) if of.is_signed() => AtomicOperation::MinSigned,
            (Some("max"), of) if of.is_signed() => AtomicOperation::MaxSigned,
            (Some("min"), Type::U32 | Type::U64) => AtomicOperation::Min,
            (Some("max"), Type::U32 | Type::U64) => AtomicOperation::Max,
            (Some("and"), _) => AtomicOperation::And,
            (Some("or"), _) => AtomicOperation::Or,
            (Some("xor"), _) => AtomicOperation::Xor,
            (Some("inc"), Type::U32) => AtomicOperation::Increment,
            (Some("dec"), Type::U32) => AtomicOperation::Decrement,
            (Some("exch"), _) => AtomicOperation::Exchange,
            (Some("cas"), _) => AtomicOperation::CompareAndSwap,
            _ => return self.error("this atomic operation is not known"),
        };
        if of.size() < 4 {
            return self.error("atomic operations have 32 or 64 bits");
        }
        let class = of.class();
        let (to, operands) = if form.base == "atom" {
            let Some((to, rest)) = operands.split_first() else {
                return self.error("operands are missing");
            };
            (self.write(to, class)?, rest)
        } else {
            (self.fresh(class), operands)
        };
        let (address, values) = match operands {
            [address, b] if operation != AtomicOperation::CompareAndSwap => (address, [b, b]),
            [address, b, c] if operation == AtomicOperation::CompareAndSwap => (address, [b, c]),
            _ => return self.error("wrong number of operands for this opcode"),
        };
        let (address, offset, named) = self.address(address)?;
        let space = if space == Space::Generic {
            named.unwrap_or(space)
        } else {
            space
        };
        let b = self.read(values[0], class, Some(of))?;
        let c = self.read(values[1], class, Some(of))?;
        let access = Access {
            space,
            size: of.size() as u8,
            count: 1,
            signed: false,
            wide: class == Class::Wide,
            wide_address: self.classes[address as usize] == Class::Wide,
            ordered: true,
        };
        self.use_shared(space, access.bytes());
        self.emit_offset(
            Action::Atomic(access, operation),
            &[to],
            &[address, b, c],
            offset,
        );
        Ok(())
    }

    /// Decodes `cp.async` and the instructions that wait for it.
    pub(super) fn async_copy(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        if !form.has("async") {
            return self.error("only cp.async is known");
        }
        if form.has("bulk") && form.has("prefetch") {
            return self.prefetch(form, operands);
        }
        if form.has("commit_group") {
            self.emit(Action::AsyncCommit, &[], &[]);
            return Ok(());
        }
        if form.has("wait_all") {
            self.emit(Action::AsyncWait(None), &[], &[]);
            return Ok(());
        }
        if form.has("wait_group") {
            let [Operand::Integer(pending)] = operands else {
                return self.error("expected a number of groups");
            };
            self.emit(
                Action::AsyncWait(Some((*pending).min(1 << 20) as u32)),
                &[],
                &[],
            );
            return Ok(());
        }
        let through_l2 = form.one_of(&["ca", "cg"]) == Some("cg");
        form.ignore(&["shared", "shared::cta", "global"]);
        form.ignore_prefix("L2::");
        let [to, from, Operand::Integer(size), rest @ ..] = operands else {
            return self.error("expected two addresses and a size");
        };
        if !(*size == 16 || !through_l2 && matches!(*size, 4 | 8)) {
            return self.error("copies of this size do not exist");
        }
        let (to, offset, _) = self.address(to)?;
        let to = self.narrowed(to);
        let (mut from, from_offset, _) = self.address(from)?;
        if self.classes[from as usize] != Class::Wide {
            return self.error("the address in global memory has 64 bits");
        }
        if from_offset != 0 {
            let distance = self.constant(Class::Wide, i64::from(from_offset) as u64);
            from = self.compute(
                binary(|a: u64, b: u64| a.wrapping_add(b)),
                &[from, distance],
            );
        }
        let bytes = match rest {
            [] => self.constant(Class::Word, *size),
            [bytes] => self.read(bytes, Class::Word, None)?,
            _ => return self.error("cache policies are not known"),
        };
        self.use_shared(Space::Shared, *size as usize);
        self.emit_offset(
            Action::AsyncCopy(*size as u8),
            &[],
            &[to, from, bytes],
            offset,
        );
        Ok(())
    }

    /// Decodes `cp.async.bulk.prefetch.L2.global [address], bytes`.
    fn prefetch(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        self.needs(90)?;
        form.ignore(&["L2", "global"]);
        let [from, bytes] = operands else {
            return self.error("expected an address and a size");
        };
        let (from, offset, _) = self.address(from)?;
        if self.classes[from as usize] != Class::Wide {
            return self.error("the address in global memory has 64 bits");
        }
        let bytes = self.read(bytes, Class::Word, None)?;
        self.emit_offset(Action::Prefetch, &[], &[from, bytes], offset);
        Ok(())
    }

    /// Resolves an address in shared memory to a 32-bit register and an offset.
    pub(super) fn shared_address(&mut self, operand: &Operand<'a>) -> Result<(Virtual, i32)> {
        let (address, offset, _) = self.address(operand)?;
        Ok((self.narrowed(address), offset))
    }
}
