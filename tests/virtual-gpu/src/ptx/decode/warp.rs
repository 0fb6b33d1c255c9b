//! Decodes operations that involve several threads of a warp or block.

use super::form::Form;
use super::{Assembler, Result};
use crate::ptx::instruction::{Action, Barrier, Factors, Reduce, Shuffle, Vote};
use crate::ptx::syntax::Operand;
use crate::ptx::types::{Class, Type};

impl<'a> Assembler<'a> {
    pub(super) fn barrier(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        if form.has("warp") {
            form.ignore(&["sync"]);
            let [mask] = operands else {
                return self.error("expected a member mask");
            };
            let mask = self.read(mask, Class::Word, None)?;
            self.emit(Action::WarpBarrier, &[], &[mask]);
            return Ok(());
        }
        form.ignore(&["cta"]);
        let aligned = form.base == "bar" || form.has("aligned");
        let kind = form.one_of(&["sync", "arrive", "red"]);
        let combine = if kind == Some("red") {
            Some(match form.one_of(&["popc", "and", "or"]) {
                Some("popc") => Vote::Count,
                Some("and") => Vote::All,
                Some("or") => Vote::Any,
                _ => return self.error("this reduction is not known"),
            })
        } else {
            None
        };
        let zero = self.constant(Class::Word, 0);
        let truth = self.constant(Class::Predicate, u64::from(u32::MAX));
        let (mut to, mut predicate, mut operands) = (self.fresh(Class::Word), truth, operands);
        if let Some(vote) = combine {
            let ([first, middle @ .., last], true) = (operands, operands.len() >= 3) else {
                return self.error("operands are missing");
            };
            to = self.write(
                first,
                if vote == Vote::Count {
                    Class::Word
                } else {
                    Class::Predicate
                },
            )?;
            predicate = self.read(last, Class::Predicate, None)?;
            operands = middle;
        }
        let (id, count) = match operands {
            [id] => (id, None),
            [id, count] => (id, Some(count)),
            _ => return self.error("expected a barrier"),
        };
        let id = self.read(id, Class::Word, None)?;
        let count_register = match count {
            Some(count) => self.read(count, Class::Word, None)?,
            None => zero,
        };
        let arrive = kind == Some("arrive");
        if kind.is_none() || arrive && count.is_none() {
            return self.error("this barrier is not known");
        }
        let barrier = Barrier {
            aligned,
            arrive,
            with_count: count.is_some(),
            combine,
        };
        self.emit(
            Action::Barrier(barrier),
            &[to],
            &[id, count_register, predicate],
        );
        Ok(())
    }

    /// Decodes exchanges of values and predicates within a warp.
    pub(super) fn collective(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        if form.base == "activemask" {
            let [to] = operands else {
                return self.error("expected one operand");
            };
            let to = self.write(to, Class::Word)?;
            self.emit(Action::ActiveMask, &[to], &[]);
            return Ok(());
        }
        if !form.has("sync") {
            return self.error("only the forms with .sync are known");
        }
        match form.base {
            "shfl" => self.shuffle(form, operands),
            "vote" => self.vote(form, operands),
            "match" => self.matching(form, operands),
            _ => self.reduce(form, operands),
        }
    }

    fn shuffle(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let mode = match form.one_of(&["up", "down", "bfly", "idx"]) {
            Some("up") => Shuffle::Up,
            Some("down") => Shuffle::Down,
            Some("bfly") => Shuffle::Butterfly,
            Some(_) => Shuffle::Index,
            None => return self.error("the mode is missing"),
        };
        let [to, a, b, c, mask] = operands else {
            return self.error("expected five operands");
        };
        let (to, predicate) = match to {
            Operand::Pair(to, predicate) => (to.as_ref(), self.write(predicate, Class::Predicate)?),
            to => (to, self.fresh(Class::Predicate)),
        };
        let to = self.write(to, Class::Word)?;
        let a = self.read(a, Class::Word, form.of())?;
        let b = self.read(b, Class::Word, None)?;
        let c = self.read(c, Class::Word, None)?;
        let mask = self.read(mask, Class::Word, None)?;
        self.emit(Action::Shuffle(mode), &[to, predicate], &[a, b, c, mask]);
        Ok(())
    }

    fn vote(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let vote = match form.one_of(&["all", "any", "uni", "ballot"]) {
            Some("all") => Vote::All,
            Some("any") => Vote::Any,
            Some("uni") => Vote::Uniform,
            Some(_) => Vote::Ballot,
            None => return self.error("the mode is missing"),
        };
        let [to, predicate, mask] = operands else {
            return self.error("expected three operands");
        };
        let to = self.write(
            to,
            if vote == Vote::Ballot {
                Class::Word
            } else {
                Class::Predicate
            },
        )?;
        let predicate = self.read(predicate, Class::Predicate, None)?;
        let mask = self.read(mask, Class::Word, None)?;
        self.emit(Action::Vote(vote), &[to], &[predicate, mask]);
        Ok(())
    }

    fn matching(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let all = form.one_of(&["any", "all"]) == Some("all");
        let ([to, a, mask], Some(of)) = (operands, form.of()) else {
            return self.error("expected three operands");
        };
        let (to, predicate) = match to {
            Operand::Pair(to, predicate) => (to.as_ref(), self.write(predicate, Class::Predicate)?),
            to => (to, self.fresh(Class::Predicate)),
        };
        let to = self.write(to, Class::Word)?;
        let a = self.read(a, of.class(), Some(of))?;
        let mask = self.read(mask, Class::Word, None)?;
        self.emit(
            Action::Match {
                all,
                wide: of.class() == Class::Wide,
            },
            &[to, predicate],
            &[a, mask],
        );
        Ok(())
    }

    fn reduce(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let signed = form.of() == Some(Type::S32);
        let reduce = match form.one_of(&["add", "min", "max", "and", "or", "xor"]) {
            Some("add") => Reduce::Add,
            Some("min") if signed => Reduce::MinSigned,
            Some("max") if signed => Reduce::MaxSigned,
            Some("min") => Reduce::Min,
            Some("max") => Reduce::Max,
            Some("and") => Reduce::And,
            Some("or") => Reduce::Or,
            Some(_) => Reduce::Xor,
            None => return self.error("the operation is missing"),
        };
        let [to, a, mask] = operands else {
            return self.error("expected three operands");
        };
        let to = self.write(to, Class::Word)?;
        let a = self.read(a, Class::Word, None)?;
        let mask = self.read(mask, Class::Word, None)?;
        self.emit(Action::Reduce(reduce), &[to], &[a, mask]);
        Ok(())
    }

    pub(super) fn matrix(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        if !form.has("sync") || !form.has("aligned") {
            return self.error("only forms with .sync.aligned are known");
        }
        if form.base == "mma" {
            return self.multiply(form, operands);
        }
        let count = match form.one_of(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return self.error("the number of matrices is missing"),
        };
        let transposed = form.has("trans");
        form.ignore(&["shared", "shared::cta"]);
        if !form.has("m8n8") || form.of() != Some(Type::B16) {
            return self.error("only 8 × 8 matrices of b16 are known");
        }
        let [to, address] = operands else {
            return self.error("expected two operands");
        };
        let mut registers = Vec::new();
        for part in parts(to) {
            registers.push(self.write(part, Class::Word)?);
        }
        if registers.len() != count {
            return self.error("the number of registers differs from the number of matrices");
        }
        let (address, offset) = self.shared_address(address)?;
        self.emit_offset(
            Action::LoadMatrix {
                count: count as u8,
                transposed,
            },
            &registers,
            &[address],
            offset,
        );
        Ok(())
    }

    fn multiply(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let depth = match form.one_of(&["m16n8k16", "m16n8k8"]) {
            Some("m16n8k16") => 16,
            Some(_) => 8,
            None => return self.error("this shape is not known"),
        };
        if !form.has("row") || !form.has("col") {
            return self.error("only the layout .row.col is known");
        }
        // Only factors have the type tf32, which is therefore not among the types.
        let factors = match (form.types.as_slice(), form.has("tf32")) {
            ([Type::F32, Type::Bf16, Type::Bf16, Type::F32], false) => Factors::Bf16,
            ([Type::F32, Type::F16, Type::F16, Type::F32], false) => Factors::F16,
            ([Type::F32, Type::F32], true) if depth == 8 => Factors::Tf32,
            _ => return self.error("these types are not known"),
        };
        // Registers of a and b hold two factors, or one.
        let per_register = if factors == Factors::Tf32 { 1 } else { 2 };
        let [d, a, b, c] = operands else {
            return self.error("expected four operands");
        };
        let lengths = [
            parts(d).len(),
            parts(a).len(),
            parts(b).len(),
            parts(c).len(),
        ];
        if lengths != [4, depth / 2 / per_register, depth / 4 / per_register, 4] {
            return self.error("the fragments have unexpected sizes");
        }
        let mut writes = Vec::new();
        for part in parts(d) {
            writes.push(self.write(part, Class::Word)?);
        }
        let mut reads = Vec::new();
        for part in parts(a).iter().chain(parts(b)).chain(parts(c)) {
            reads.push(self.read(part, Class::Word, Some(Type::F32))?);
        }
        self.emit(
            Action::Multiply {
                depth: depth as u8,
                factors,
            },
            &writes,
            &reads,
        );
        Ok(())
    }
}

fn parts<'b, 'a>(operand: &'b Operand<'a>) -> &'b [Operand<'a>] {
    match operand {
        Operand::Vector(parts) => parts,
        single => std::slice::from_ref(single),
    }
}
