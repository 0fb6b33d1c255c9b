//! PTX: parsing it, and running it with every access checked.
//!
//! [`Module::parse`] reads PTX ISA 8.4 as NVRTC 12.4 emits it for `compute_80`, and decodes
//! every kernel. Anything unknown is an error at that point and never ignored. [`run`] executes
//! a kernel on the host, one warp at a time, and stops at the first [`Fault`].
//!
//! | Checked | How |
//! |---|---|
//! | global, shared, local, parameter accesses | inside one allocation, aligned to their size |
//! | reads of memory never written | a mark per byte of global, per piece of shared memory |
//! | races in shared memory | see `shared.rs`; `cp.async` owns its target until the wait |
//! | barriers | every thread of the block reaches the same one; none has exited |
//! | `shfl`, `vote`, `mma`, … | every lane that takes part executes it, or will |
//! | the launch | size of the parameters, threads, shared memory |
//! | endless loops | a maximum number of instructions per warp |
//! | kernels that overlap | see [`Options::overlaps`] |
//!
//! Not detected: races between blocks, or between threads, on global memory; reads of local
//! memory and registers before they are written; orderings that only fences would establish.

mod count;
mod decode;
mod execute;
mod fault;
mod instruction;
mod kernel;
mod lex;
mod memory;
mod parse;
mod run;
mod shared;
mod syntax;
mod types;

pub use count::{Accesses, Class, Counts, GlobalCounts, Requests, SharedCounts};
pub use fault::{Fault, FaultKind};
pub use kernel::{Kernel, Parameter};
pub use memory::{Argument, GRANULE, HostMemory, Plain, Region, Regions, arguments};
pub use run::{BUDGET, Launch, Options, Statistics, run, run_within};
pub use types::Type;

#[cfg(test)]
mod tests;

use kernel::{GlobalVariable, Globals, MODULE_WINDOW};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use syntax::{Initial, Source};
use types::Space;

/// An error in PTX text: it is malformed, or it uses a feature that is not known here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    pub line: u32,
    pub message: String,
}

impl ParseError {
    fn new(line: u32, message: impl Into<String>) -> Self {
        ParseError {
            line,
            message: message.into(),
        }
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for ParseError {}

/// A module with its decoded kernels.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Kernel>,
}

impl Module {
    /// Parses a module and decodes all its kernels.
    ///
    /// # Errors
    /// Returns the first error: the text is malformed, or uses a feature that is not known
    /// here.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        let source = parse::source(text)?;
        let (addresses, globals) = globals(&source)?;
        let mut kernels = Vec::new();
        for function in source.functions.iter().filter(|f| f.is_entry) {
            kernels.push(decode::kernel(&source, function, &addresses, &globals)?);
        }
        Ok(Module { kernels })
    }

    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.iter().find(|k| k.name == name)
    }

    pub fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.kernels.iter()
    }
}

/// Lays out the module's own variables.
fn globals<'a>(source: &Source<'a>) -> Result<(HashMap<&'a str, u64>, Arc<Globals>), ParseError> {
    let mut addresses = HashMap::new();
    let mut bytes: Vec<u8> = Vec::new();
    let mut places = Vec::new();
    let variables: Vec<_> = source
        .variables
        .iter()
        .filter(|v| v.space == Space::Global)
        .collect();
    for variable in &variables {
        // A gap, so that an access past the end of one variable does not hit the next.
        let offset = (bytes.len() + 256).next_multiple_of(variable.align.max(16));
        places.push(GlobalVariable {
            name: variable.name.to_string(),
            offset,
            size: variable.size(),
        });
        addresses.insert(variable.name, MODULE_WINDOW + offset as u64);
        bytes.resize(offset + variable.size(), 0);
    }
    for variable in &variables {
        let size = variable.of.size();
        if variable.initial.len() > variable.count {
            return Err(ParseError::new(
                variable.line,
                "more initial values than elements",
            ));
        }
        let begin = addresses
            .get(variable.name)
            .map_or(0, |a| (a - MODULE_WINDOW) as usize);
        for (element, initial) in variable.initial.iter().enumerate() {
            let value = match initial {
                Initial::Bits(bits) => *bits,
                Initial::Address(name, offset) => match addresses.get(name) {
                    Some(address) => address.wrapping_add(*offset as u64),
                    None => {
                        return Err(ParseError::new(
                            variable.line,
                            format!("no variable `{name}`"),
                        ));
                    }
                },
            };
            bytes[begin + element * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
    let files = source
        .files
        .iter()
        .map(|(&number, name)| (number, name.to_string()))
        .collect();
    Ok((addresses, Arc::new(Globals::new(&bytes, places, files))))
}
