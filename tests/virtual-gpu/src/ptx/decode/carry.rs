//! Multi-word sums and products: `add.cc`, `addc`, `mad.lo.cc`, `madc` and the like.
//!
//! The carry flag is a predicate register of the thread. Each opcode becomes a sum and the
//! computation of its carry.

use super::form::Form;
use super::{Assembler, Result, Virtual};
use crate::ptx::execute::integer;
use crate::ptx::execute::lanes::{Lanes, binary, judge, predicates, select};
use crate::ptx::instruction::Action;
use crate::ptx::syntax::Operand;
use crate::ptx::types::Class;

/// Returns the lanes for the sum (or difference) of two words and a carry, and for its carry
/// (or borrow).
fn sum(wide: bool, subtract: bool) -> (Lanes, Lanes) {
    match (wide, subtract) {
        (false, false) => (
            select(|a: u32, b: u32, c| a.wrapping_add(b).wrapping_add(u32::from(c))),
            judge(|a: u32, b: u32, c| {
                u64::from(a) + u64::from(b) + u64::from(c) > u64::from(u32::MAX)
            }),
        ),
        (true, false) => (
            select(|a: u64, b: u64, c| a.wrapping_add(b).wrapping_add(u64::from(c))),
            judge(|a: u64, b: u64, c| {
                u128::from(a) + u128::from(b) + u128::from(c) > u128::from(u64::MAX)
            }),
        ),
        (false, true) => (
            select(|a: u32, b: u32, c| a.wrapping_sub(b).wrapping_sub(u32::from(c))),
            judge(|a: u32, b: u32, c| u64::from(a) < u64::from(b) + u64::from(c)),
        ),
        (true, true) => (
            select(|a: u64, b: u64, c| a.wrapping_sub(b).wrapping_sub(u64::from(c))),
            judge(|a: u64, b: u64, c| u128::from(a) < u128::from(b) + u128::from(c)),
        ),
    }
}

impl<'a> Assembler<'a> {
    fn carry_flag(&mut self) -> Virtual {
        match self.carry {
            Some(register) => register,
            None => {
                let register = self.fresh(Class::Predicate);
                self.carry = Some(register);
                register
            }
        }
    }

    /// Decodes the opcode if it reads or writes the carry flag. Returns whether it does.
    pub(super) fn with_carry(&mut self, form: &Form, operands: &[Operand<'a>]) -> Result<bool> {
        let reads = matches!(form.base, "addc" | "subc" | "madc");
        let known = reads || matches!(form.base, "add" | "sub" | "mad");
        if !known || !(reads || form.has("cc")) {
            return Ok(false);
        }
        let writes = form.has("cc");
        let Some(of) = form.of().filter(|of| !of.is_float() && of.size() >= 4) else {
            return self.error("this form is not known");
        };
        let class = of.class();
        let (a, b) = if form.base.starts_with("mad") {
            let [_, a, b, c] = operands else {
                return self.error("expected four operands");
            };
            let product = match (form.one_of(&["lo", "hi"]), class) {
                (Some("lo"), Class::Word) => binary(|a: u32, b: u32| a.wrapping_mul(b)),
                (Some("lo"), _) => binary(|a: u64, b: u64| a.wrapping_mul(b)),
                (Some("hi"), _) => match integer::high_product(of) {
                    Some(lanes) => lanes,
                    None => return self.error("this form is not known"),
                },
                _ => return self.error("this form is not known"),
            };
            let (a, b) = (
                self.read(a, class, Some(of))?,
                self.read(b, class, Some(of))?,
            );
            (self.compute(product, &[a, b]), c)
        } else {
            let [_, a, b] = operands else {
                return self.error("expected three operands");
            };
            (self.read(a, class, Some(of))?, b)
        };
        let b = self.read(b, class, Some(of))?;
        let carry = if reads {
            self.carry_flag()
        } else {
            self.constant(Class::Predicate, 0)
        };
        let (total, carries) = sum(class == Class::Wide, form.base.starts_with("sub"));
        let carried = writes.then(|| self.compute(carries, &[a, b, carry]));
        let d = self.write(&operands[0], class)?;
        self.emit(Action::Lanes(total.run), &[d], &[a, b, carry]);
        if let Some(carried) = carried {
            let flag = self.carry_flag();
            self.emit(
                Action::Lanes(predicates(|a, _| a).run),
                &[flag],
                &[carried, carried],
            );
        }
        Ok(true)
    }
}
