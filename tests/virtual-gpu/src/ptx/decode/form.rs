//! An opcode split into its parts: `ld.global.v4.f32` is `ld` with modifiers and types.

use crate::ptx::types::Type;
use std::cell::RefCell;

/// The parts of an opcode. A modifier that no decoder queries was not understood and is
/// reported as an error in the end.
pub struct Form<'a> {
    pub base: &'a str,
    /// Types in the order in which the opcode names them.
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

    /// Returns whether the opcode has this modifier, and marks it as understood.
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

    /// Returns the first of these modifiers that the opcode has.
    pub fn one_of(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.has(name))
    }

    /// Marks modifiers as understood that have no effect here.
    pub fn ignore(&self, names: &[&str]) {
        for name in names {
            self.has(name);
        }
    }

    /// Marks all modifiers with this prefix as understood; they have no effect here.
    pub fn ignore_prefix(&self, prefix: &str) {
        for (modifier, understood) in self.modifiers.borrow_mut().iter_mut() {
            *understood |= modifier.starts_with(prefix);
        }
    }

    /// Returns the first type.
    pub fn of(&self) -> Option<Type> {
        self.types.first().copied()
    }

    /// Returns a modifier that was not understood.
    pub fn leftover(&self) -> Option<&'a str> {
        self.modifiers
            .borrow()
            .iter()
            .find(|(_, understood)| !understood)
            .map(|(name, _)| *name)
    }
}
