//! Gives registers their places in the register file.

use super::{Draft, Virtual};
use crate::ptx::types::Class;

/// Where the registers are.
pub struct File {
    /// By register: a word, for predicates; otherwise a row of 32 words.
    pub slots: Vec<u16>,
    /// Rows of the whole file.
    pub rows: usize,
}

/// Places every register; `None` if there are too many.
pub fn slots(_drafts: &[Draft], classes: &[Class], _fixed: &[Virtual]) -> Option<File> {
    let predicates = classes.iter().filter(|&&c| c == Class::Predicate).count();
    let (mut word, mut row) = (0usize, predicates.div_ceil(32));
    let mut slots = Vec::with_capacity(classes.len());
    for class in classes {
        let (next, size) = match class {
            Class::Predicate => (&mut word, 1),
            Class::Word => (&mut row, 1),
            Class::Wide => (&mut row, 2),
        };
        slots.push(u16::try_from(*next).ok()?);
        *next += size;
    }
    Some(File { slots, rows: row })
}
