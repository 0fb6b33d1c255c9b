//! An opcode taken apart: `ld.global.v4.f32` is `ld` with modifiers and types.

use crate::ptx::types::Type;
use std::cell::RefCell;

/// The parts of an opcode. A modifier that nobody asked for means that the form is not
/// understood, and is an error in the end.
pub struct Form<'a> {
    pub base: &'a str,
    /// In their order.
    pub types: Vec<Type>,
    modifiers: RefCell<Vec<(&'a str, bool)>>,
}

impl<'a> Form<'a> {
    pub fn new(opcode: &'a str) -> Self {
        let mut parts = opcode.split('.');
        let base = parts.next().unwrap_or_default();
        let (mut types, mut modifiers) = (Vec::new(), Vec::new());
        for part in parts {
            match Type::named(part) {
                Some(of) => types.push(of),
                None => modifiers.push((part, false)),
            }
        }
        Form {
            base,
            types,
            modifiers: RefCell::new(modifiers),
        }
    }

    /// Whether the modifier is there; it counts as understood then.
    pub fn has(&self, name: &str) -> bool {
        let mut found = false;
        for (modifier, understood) in self.modifiers.borrow_mut().iter_mut() {
            if *modifier == name {
                *understood = true;
                found = true;
            }
        }
        found
    }

    /// The first of these modifiers that is there.
    pub fn one_of(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.has(name))
    }

    /// Takes note of modifiers that change nothing here.
    pub fn ignore(&self, names: &[&str]) {
        for name in names {
            self.has(name);
        }
    }

    /// Takes note of all modifiers that begin so and change nothing here.
    pub fn ignore_prefix(&self, prefix: &str) {
        for (modifier, understood) in self.modifiers.borrow_mut().iter_mut() {
            *understood |= modifier.starts_with(prefix);
        }
    }

    /// The first type.
    pub fn of(&self) -> Option<Type> {
        self.types.first().copied()
    }

    /// A modifier that was not understood.
    pub fn leftover(&self) -> Option<&'a str> {
        self.modifiers
            .borrow()
            .iter()
            .find(|(_, understood)| !understood)
            .map(|(name, _)| *name)
    }
}
