//! Decodes single statements: control flow, moves, and operations on each lane separately.

use super::form::Form;
use super::{Assembler, Result};
use crate::ptx::execute::lanes::{Lanes, binary, compare, predicates, quaternary, select, unary};
use crate::ptx::execute::{convert, float, integer, set};
use crate::ptx::instruction::Action;
use crate::ptx::kernel::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use crate::ptx::syntax::{Operand, Statement};
use crate::ptx::types::{Class, Space, Type};

/// Relations that `set` and `setp` can test.
const RELATIONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

impl<'a> Assembler<'a> {
    /// Decodes one instruction, whose guard is already set.
    pub(super) fn statement(&mut self, statement: &'a Statement<'a>) -> Result<()> {
        let form = Form::new(statement.opcode);
        let operands = statement.operands.as_slice();
        if statement.opcode == ".branchtargets" {
            return self.branch_targets(operands);
        }
        match form.base {
            "bra" => {
                form.ignore(&["uni"]);
                let [Operand::Name(label)] = operands else {
                    return self.error("expected a label");
                };
                self.branch(label);
            }
            "brx" => {
                form.ignore(&["idx", "uni"]);
                self.branch_table(operands)?;
            }
            "call" => {
                form.ignore(&["uni"]);
                self.call(operands)?;
            }
            "ret" | "exit" => {
                form.ignore(&["uni"]);
                self.leave(form.base == "ret");
            }
            "trap" => self.emit(Action::Trap, &[], &[]),
            "griddepcontrol" => {
                self.needs(90)?;
                match form.one_of(&["wait", "launch_dependents"]) {
                    Some("wait") => self.emit(Action::WaitForKernels, &[], &[]),
                    Some(_) => self.emit(Action::LaunchDependents, &[], &[]),
                    None => return self.error("expected wait or launch_dependents"),
                }
            }
            "membar" | "fence" | "nanosleep" | "prefetch" | "prefetchu" | "discard"
            | "applypriority" => {
                form.ignore_prefix("");
                self.emit(Action::Nothing, &[], &[]);
            }
            "brkpt" | "pmevent" => self.emit(Action::Nothing, &[], &[]),
            "mov" => self.move_value(&form, operands)?,
            "setp" => self.compare(&form, operands)?,
            "set" => self.set(&form, operands)?,
            "not" if form.of() == Some(Type::Pred) => {
                self.lanes(
                    predicates(|a, _| !a),
                    Type::Pred,
                    &[operands, &operands[1..]].concat(),
                )?;
            }
            "cvt" => {
                let Some(lanes) = convert::find(&form) else {
                    return self.error("this conversion is not known");
                };
                self.lanes(lanes, form.types[1], operands)?;
            }
            "cvta" => self.convert_address(&form, operands)?,
            "isspacep" => self.is_space(&form, operands)?,
            "testp" => {
                let Some(lanes) = float::find(&form) else {
                    return self.error("this form is not known");
                };
                self.lanes(lanes, Type::F32, &[operands, &operands[1..]].concat())?;
            }
            "ld" | "ldu" | "st" => self.access(&form, operands)?,
            "atom" | "red" => self.atomic(&form, operands)?,
            "cp" => self.async_copy(&form, operands)?,
            "bar" | "barrier" => self.barrier(&form, operands)?,
            "shfl" | "vote" | "match" | "redux" | "activemask" => {
                self.collective(&form, operands)?
            }
            "ldmatrix" | "mma" => self.matrix(&form, operands)?,
            _ if self.with_carry(&form, operands)? => {}
            _ => {
                let found = integer::find(&form).or_else(|| float::find(&form));
                let (Some(lanes), Some(of)) = (found, form.of()) else {
                    return self.error("this form is not known");
                };
                self.lanes(lanes, of, operands)?;
            }
        }
        match form.leftover() {
            Some(modifier) => self.error(format!("the modifier `.{modifier}` is not known here")),
            None => Ok(()),
        }
    }

    /// Emits an operation `d, s...` that works on each lane separately.
    fn lanes(&mut self, lanes: Lanes, of: Type, operands: &[Operand<'a>]) -> Result<()> {
        let Some((to, from)) = operands.split_first() else {
            return self.error("operands are missing");
        };
        if from.len() != lanes.reads.len() {
            return self.error(format!(
                "{} sources instead of {}",
                from.len(),
                lanes.reads.len()
            ));
        }
        let mut reads = Vec::with_capacity(from.len());
        for (operand, &class) in from.iter().zip(&lanes.reads) {
            reads.push(self.read(operand, class, Some(of))?);
        }
        let to = self.write(to, lanes.write)?;
        self.emit(Action::Lanes(lanes.run), &[to], &reads);
        Ok(())
    }

    /// Fails if the image is for GPUs that do not have the instruction.
    pub(super) fn needs(&self, target: u32) -> Result<()> {
        match self.source.target {
            found if found < target => self.error(format!(
                "the instruction needs .target sm_{target}; the image is for sm_{found}"
            )),
            _ => Ok(()),
        }
    }

    fn branch(&mut self, label: &'a str) {
        self.branches.push((self.drafts.len(), self.scope, label));
        self.emit(Action::Branch(0), &[], &[]);
    }

    fn branch_targets(&mut self, operands: &'a [Operand<'a>]) -> Result<()> {
        let Some(label) = self.last_label else {
            return self.error("a list of targets without a label");
        };
        let mut names = Vec::new();
        for operand in operands {
            let Operand::Name(name) = operand else {
                return self.error("a target that is not a label");
            };
            names.push(*name);
        }
        self.scopes[self.scope].targets.insert(label, names);
        Ok(())
    }

    /// Decodes a jump through a table as one comparison and branch per entry.
    fn branch_table(&mut self, operands: &[Operand<'a>]) -> Result<()> {
        let [index, Operand::Name(table)] = operands else {
            return self.error("expected an index and a table");
        };
        let mut scope = Some(self.scope);
        let targets = loop {
            let Some(at) = scope else {
                return self.error(format!("no table `{table}` before this"));
            };
            match self.scopes[at].targets.get(table) {
                Some(targets) => break targets.clone(),
                None => scope = self.scopes[at].parent,
            }
        };
        if self.guard.is_some() {
            return self.error("a guarded jump through a table");
        }
        let index = self.read(index, Class::Word, None)?;
        for (entry, target) in targets.into_iter().enumerate() {
            let entry = self.constant(Class::Word, entry as u64);
            let is_it = self.compute(compare(|a: u32, b: u32| a == b), &[index, entry]);
            self.guard = Some((is_it, false));
            self.branch(target);
            self.guard = None;
        }
        self.emit(Action::Trap, &[], &[]);
        Ok(())
    }

    fn leave(&mut self, is_return: bool) {
        let at = self.drafts.len();
        match self.returns.last_mut() {
            Some(returns) if is_return => {
                returns.push(at);
                self.emit(Action::Branch(0), &[], &[]);
            }
            _ => self.emit(Action::Exit, &[], &[]),
        }
    }

    /// Inlines the called function, with its parameters bound to the arguments of the call.
    fn call(&mut self, operands: &'a [Operand<'a>]) -> Result<()> {
        let (results, name, arguments): (&[Operand], _, &[Operand]) = match operands {
            [
                Operand::List(results),
                Operand::Name(name),
                Operand::List(arguments),
            ] => (results, *name, arguments),
            [Operand::Name(name), Operand::List(arguments)] => (&[], *name, arguments),
            [Operand::List(results), Operand::Name(name)] => (results, *name, &[]),
            [Operand::Name(name)] => (&[], *name, &[]),
            _ => return self.error("an indirect call"),
        };
        let source = self.source;
        let Some(function) = source
            .functions
            .iter()
            .find(|f| f.name == name && !f.is_entry)
        else {
            return self.error(format!("no function `{name}`"));
        };
        if self.returns.len() > 30 {
            return self.error("calls nest too deep, or recursively");
        }
        if results.len() != function.results.len() || arguments.len() != function.parameters.len() {
            return self.error(format!("`{name}` takes a different number of arguments"));
        }
        let formals = function.results.iter().chain(&function.parameters);
        let mut bound = Vec::new();
        for (formal, actual) in formals.zip(results.iter().chain(arguments)) {
            let Operand::Name(actual) = actual else {
                return self.error("an argument that is not a variable");
            };
            let Some(symbol) = self.symbol(actual) else {
                return self.error(format!("no variable `{actual}`"));
            };
            bound.push((formal.name, symbol));
        }
        let caller = (self.scope, self.place);
        let skip = self.drafts.len();
        if let Some((guard, negated)) = self.guard.take() {
            self.guard = Some((guard, !negated));
            self.emit(Action::Branch(0), &[], &[]);
            self.guard = None;
        }
        let is_skipped = self.drafts.len() > skip;
        self.open(None);
        self.scopes[self.scope].symbols.extend(bound);
        self.returns.push(Vec::new());
        self.body(function)?;
        let returns = self.returns.pop().unwrap_or_default();
        let end = self.drafts.len() as u32;
        for at in returns.into_iter().chain(is_skipped.then_some(skip)) {
            self.drafts[at].action = Action::Branch(end);
        }
        (self.scope, self.place) = caller;
        self.guard = None;
        // Makes sure that the end of the call is an instruction of this kernel.
        self.emit(Action::Nothing, &[], &[]);
        Ok(())
    }

    fn move_value(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let ([to, from], Some(of)) = (operands, form.of()) else {
            return self.error("expected two operands");
        };
        match (to, from) {
            (Operand::Vector(parts), whole) => self.unpack(of, parts, whole),
            (whole, Operand::Vector(parts)) => {
                let lanes = match (of.size(), parts.len()) {
                    (8, 2) => binary(|low: u32, high: u32| u64::from(high) << 32 | u64::from(low)),
                    (4, 2) => binary(|low: u16, high: u16| u32::from(high) << 16 | u32::from(low)),
                    (2, 2) => binary(|low: u8, high: u8| u16::from(high) << 8 | u16::from(low)),
                    (8, 4) => quaternary(|a: u16, b: u16, c: u16, d: u16| {
                        u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
                    }),
                    (4, 4) => {
                        quaternary(|a: u8, b: u8, c: u8, d: u8| u32::from_le_bytes([a, b, c, d]))
                    }
                    _ => return self.error("these parts do not make a register"),
                };
                self.lanes(lanes, of, &[std::slice::from_ref(whole), parts].concat())
            }
            _ if of == Type::Pred => self.lanes(
                predicates(|a, _| a),
                of,
                &[to.clone(), from.clone(), from.clone()],
            ),
            _ if of.class() == Class::Wide => self.lanes(unary(|a: u64| a), of, operands),
            _ => self.lanes(unary(|a: u32| a), of, operands),
        }
    }

    fn unpack(&mut self, of: Type, parts: &[Operand<'a>], whole: &Operand<'a>) -> Result<()> {
        let shifts: Vec<Lanes> = match (of.size(), parts.len()) {
            (8, 2) => vec![unary(|a: u64| a as u32), unary(|a: u64| (a >> 32) as u32)],
            (4, 2) => vec![unary(|a: u32| a as u16), unary(|a: u32| (a >> 16) as u16)],
            (2, 2) => vec![unary(|a: u16| a as u8), unary(|a: u16| (a >> 8) as u8)],
            (8, 4) => vec![
                unary(|a: u64| a as u16),
                unary(|a: u64| (a >> 16) as u16),
                unary(|a: u64| (a >> 32) as u16),
                unary(|a: u64| (a >> 48) as u16),
            ],
            (4, 4) => vec![
                unary(|a: u32| a as u8),
                unary(|a: u32| (a >> 8) as u8),
                unary(|a: u32| (a >> 16) as u8),
                unary(|a: u32| (a >> 24) as u8),
            ],
            _ => return self.error("a register does not have these parts"),
        };
        for (part, lanes) in parts.iter().zip(shifts) {
            if *part != Operand::Name("_") {
                self.lanes(lanes, of, &[part.clone(), whole.clone()])?;
            }
        }
        Ok(())
    }

    /// Decodes `set.relation.to.from d, a, b`: 1.0 or all ones if the relation holds, else 0.
    fn set(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let (Some(relation), [to, of]) = (form.one_of(&RELATIONS), form.types.as_slice()) else {
            return self.error("this comparison is not known");
        };
        if let Some(lanes) = set::pairs(relation, *to, *of) {
            return self.lanes(lanes, *of, operands);
        }
        let found = integer::comparison(relation, *of)
            .or_else(|| float::comparison(relation, *of, form.has("ftz")));
        let ([d, a, b], Some(lanes)) = (operands, found) else {
            return self.error("this comparison is not known");
        };
        let a = self.read(a, lanes.reads[0], Some(*of))?;
        let b = self.read(b, lanes.reads[1], Some(*of))?;
        let holds = self.compute(lanes, &[a, b]);
        let yes = match to {
            Type::F32 => 1f32.to_bits(),
            Type::U32 | Type::S32 => u32::MAX,
            Type::F16 => 0x3c00,
            Type::Bf16 => 0x3f80,
            _ => return self.error("this comparison is not known"),
        };
        let (yes, no) = (
            self.constant(Class::Word, u64::from(yes)),
            self.constant(Class::Word, 0),
        );
        let d = self.write(d, Class::Word)?;
        self.emit(
            Action::Lanes(select(|a: u32, b: u32, p| if p { a } else { b }).run),
            &[d],
            &[yes, no, holds],
        );
        Ok(())
    }

    /// Decodes `setp.relation[.and|.or|.xor].type p[|q], a, b[, c]`.
    fn compare(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let (Some(relation), Some(of)) = (form.one_of(&RELATIONS), form.of()) else {
            return self.error("this comparison is not known");
        };
        let found = integer::comparison(relation, of)
            .or_else(|| float::comparison(relation, of, form.has("ftz")));
        let Some(lanes) = found else {
            return self.error("this comparison is not known");
        };
        let [to, a, b, rest @ ..] = operands else {
            return self.error("operands are missing");
        };
        let combine = match (form.one_of(&["and", "or", "xor"]), rest) {
            (None, []) => None,
            (Some("and"), [c]) => Some((predicates(|a, c| a & c), c)),
            (Some("or"), [c]) => Some((predicates(|a, c| a | c), c)),
            (Some("xor"), [c]) => Some((predicates(|a, c| a ^ c), c)),
            _ => return self.error("the third source does not fit the opcode"),
        };
        let (first, second) = match to {
            Operand::Pair(first, second) => (first.as_ref(), Some(second.as_ref())),
            first => (first, None),
        };
        if let (None, None) = (&combine, second) {
            return self.lanes(lanes, of, &[first.clone(), a.clone(), b.clone()]);
        }
        let a = self.read(a, lanes.reads[0], Some(of))?;
        let b = self.read(b, lanes.reads[1], Some(of))?;
        let combine = match combine {
            Some((lanes, c)) => Some((lanes, self.read(c, Class::Predicate, None)?)),
            None => None,
        };
        let is_true = self.compute(lanes, &[a, b]);
        let is_false = self.compute(predicates(|a, _| !a), &[is_true, is_true]);
        for (to, value) in [(Some(first), is_true), (second, is_false)] {
            let Some(to) = to.filter(|&to| *to != Operand::Name("_")) else {
                continue;
            };
            let value = match &combine {
                Some((lanes, c)) => self.compute(lanes.clone(), &[value, *c]),
                None => value,
            };
            let to = self.write(to, Class::Predicate)?;
            self.emit(
                Action::Lanes(predicates(|a, _| a).run),
                &[to],
                &[value, value],
            );
        }
        Ok(())
    }

    /// Converts between addresses of a state space and generic addresses.
    fn convert_address(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let (to_space, space) = (form.has("to"), self.space(form));
        if form.of() != Some(Type::U64) {
            return self.error("addresses have 64 bits");
        }
        let lanes = match (space, to_space) {
            (Space::Shared, false) => unary(|a: u64| a.wrapping_add(SHARED_WINDOW)),
            (Space::Shared, true) => unary(|a: u64| a.wrapping_sub(SHARED_WINDOW)),
            (Space::Local, false) => unary(|a: u64| a.wrapping_add(LOCAL_WINDOW)),
            (Space::Local, true) => unary(|a: u64| a.wrapping_sub(LOCAL_WINDOW)),
            (Space::Global, _) => unary(|a: u64| a),
            _ => return self.error("this space has no generic addresses here"),
        };
        self.lanes(lanes, Type::U64, operands)
    }

    fn is_space(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<()> {
        let lanes = match self.space(form) {
            Space::Shared => compare(|a: u64, _: u64| a.wrapping_sub(SHARED_WINDOW) < WINDOW_SIZE),
            Space::Local => compare(|a: u64, _: u64| a.wrapping_sub(LOCAL_WINDOW) < WINDOW_SIZE),
            Space::Global => compare(|a: u64, _: u64| a < LOCAL_WINDOW),
            _ => return self.error("this space has no generic addresses here"),
        };
        let [to, a] = operands else {
            return self.error("expected two operands");
        };
        self.lanes(lanes, Type::U64, &[to.clone(), a.clone(), a.clone()])
    }
}
