//! Turns a function's statements into instructions by resolving registers, variables and
//! labels.
//!
//! Called functions are inlined, so a kernel is one piece of code without a stack.

mod allocate;
mod carry;
pub mod form;
mod memory;
mod statement;
mod warp;

use super::ParseError;
use super::count::Kind;
use super::execute::lanes::{Lanes, unary};
use super::instruction::{Action, Instruction, OPERANDS, Place, UNGUARDED};
use super::kernel::{Globals, Kernel, Parameter, Preset};
use super::syntax::{Function, Item, Operand, Source, Statement, Variable};
use super::types::{Class, Space, Type};
use std::collections::HashMap;
use std::sync::Arc;

type Result<T> = std::result::Result<T, ParseError>;

/// A register that has no slot in the register file yet.
pub type Virtual = u32;

/// An instruction whose registers have no slots yet.
pub struct Draft {
    pub action: Action,
    /// Registers, destinations first.
    pub operands: Vec<Virtual>,
    /// Number of destinations.
    pub writes: usize,
    pub guard: Option<(Virtual, bool)>,
    pub offset: i32,
    pub place: Place,
    /// `None` for a further part of a PTX instruction.
    pub kind: Option<Kind>,
}

/// Location of a variable.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    space: Space,
    address: u64,
}

/// The names declared between two braces, or in the whole function.
#[derive(Default)]
struct Scope<'a> {
    parent: Option<usize>,
    /// Declared names of registers, or the stems of numbered names.
    declared: HashMap<&'a str, (Type, bool)>,
    registers: HashMap<&'a str, Virtual>,
    symbols: HashMap<&'a str, Symbol>,
    labels: HashMap<&'a str, usize>,
    /// `.branchtargets` lists, by their label.
    targets: HashMap<&'a str, Vec<&'a str>>,
}

/// Decodes one kernel.
pub struct Assembler<'a> {
    source: &'a Source<'a>,
    globals: &'a HashMap<&'a str, u64>,
    classes: Vec<Class>,
    constants: HashMap<(Class, u64), Virtual>,
    presets: HashMap<Preset, Virtual>,
    drafts: Vec<Draft>,
    scopes: Vec<Scope<'a>>,
    scope: usize,
    branches: Vec<(usize, usize, &'a str)>,
    /// The `ret`s of each call that is being inlined; they become branches to its end.
    returns: Vec<Vec<usize>>,
    last_label: Option<&'a str>,
    place: Place,
    /// Kind of the PTX instruction, until its first part is emitted.
    kind: Option<Kind>,
    guard: Option<(Virtual, bool)>,
    /// The carry flag, if it is used.
    carry: Option<Virtual>,
    shared: usize,
    shared_align: usize,
    local: usize,
    granule: usize,
}

/// Decodes the kernel `function`.
pub fn kernel<'a>(
    source: &'a Source<'a>,
    function: &'a Function<'a>,
    addresses: &'a HashMap<&'a str, u64>,
    globals: &Arc<Globals>,
) -> Result<Kernel> {
    let mut assembler = Assembler {
        source,
        globals: addresses,
        classes: Vec::new(),
        constants: HashMap::new(),
        presets: HashMap::new(),
        drafts: Vec::new(),
        scopes: vec![Scope::default()],
        scope: 0,
        branches: Vec::new(),
        returns: Vec::new(),
        last_label: None,
        place: Place::default(),
        kind: None,
        guard: None,
        carry: None,
        shared: 0,
        shared_align: 1,
        local: 0,
        granule: 16,
    };
    let mut parameters = Vec::new();
    let mut offset = 0usize;
    for parameter in &function.parameters {
        offset = offset.next_multiple_of(parameter.align);
        let symbol = Symbol {
            space: Space::Parameter,
            address: offset as u64,
        };
        assembler.scopes[0].symbols.insert(parameter.name, symbol);
        parameters.push(Parameter {
            offset,
            size: parameter.size(),
            align: parameter.align,
            of: parameter.of,
        });
        offset += parameter.size();
    }
    assembler.body(function)?;
    assembler.emit(Action::Exit, &[], &[]);
    assembler.resolve()?;
    assembler.finish(function, parameters, globals)
}

impl<'a> Assembler<'a> {
    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(ParseError::new(self.place.line, message))
    }

    fn body(&mut self, function: &'a Function<'a>) -> Result<()> {
        for item in &function.body {
            match item {
                Item::Open => self.open(Some(self.scope)),
                Item::Close => self.scope = self.scopes[self.scope].parent.unwrap_or(0),
                Item::Label(name) => {
                    let at = self.drafts.len();
                    self.scopes[self.scope].labels.insert(name, at);
                    self.last_label = Some(name);
                }
                Item::Registers(of, names) => {
                    let declared = names.iter().map(|&(name, is_stem)| (name, (*of, is_stem)));
                    self.scopes[self.scope].declared.extend(declared);
                }
                Item::Variable(variable) => self.variable(variable)?,
                Item::Statement(statement) => self.guarded(statement)?,
            }
        }
        Ok(())
    }

    fn open(&mut self, parent: Option<usize>) {
        self.scopes.push(Scope {
            parent,
            ..Scope::default()
        });
        self.scope = self.scopes.len() - 1;
    }

    fn guarded(&mut self, statement: &'a Statement<'a>) -> Result<()> {
        self.place = Place {
            line: statement.line,
            location: statement.location,
        };
        self.kind = Some(Kind::of(statement));
        self.guard = None;
        if let Some((name, negated)) = statement.guard {
            let register = self.register(name)?;
            match self.classes[register as usize] {
                Class::Predicate => self.guard = Some((register, negated)),
                _ => return self.error(format!("the guard `{name}` is not a predicate")),
            }
        }
        self.statement(statement).map_err(|mut error| {
            error.message = format!("`{}`: {}", statement.opcode, error.message);
            error
        })
    }

    fn variable(&mut self, variable: &'a Variable<'a>) -> Result<()> {
        self.place.line = variable.line;
        let symbol = match variable.space {
            Space::Shared => self.place_shared(variable),
            // Parameters of a call are stored like local variables.
            Space::Local | Space::Parameter => {
                self.local = self.local.next_multiple_of(variable.align);
                let address = self.local as u64;
                self.local += variable.size();
                Symbol {
                    space: Space::Local,
                    address,
                }
            }
            _ => return self.error("a global variable inside a function"),
        };
        self.scopes[self.scope]
            .symbols
            .insert(variable.name, symbol);
        Ok(())
    }

    fn place_shared(&mut self, variable: &Variable<'a>) -> Symbol {
        self.shared_align = self.shared_align.max(variable.align);
        self.shared = self.shared.next_multiple_of(variable.align);
        let address = self.shared as u64;
        self.shared += variable.size();
        Symbol {
            space: Space::Shared,
            address,
        }
    }

    fn fresh(&mut self, class: Class) -> Virtual {
        self.classes.push(class);
        (self.classes.len() - 1) as Virtual
    }

    fn constant(&mut self, class: Class, bits: u64) -> Virtual {
        if let Some(&register) = self.constants.get(&(class, bits)) {
            return register;
        }
        let register = self.fresh(class);
        self.constants.insert((class, bits), register);
        register
    }

    fn preset(&mut self, preset: Preset) -> Virtual {
        if let Some(&register) = self.presets.get(&preset) {
            return register;
        }
        let class = if preset == Preset::DynamicSharedWide {
            Class::Wide
        } else {
            Class::Word
        };
        let register = self.fresh(class);
        self.presets.insert(preset, register);
        register
    }

    /// Returns the register with this name, if one is declared.
    fn find_register(&mut self, name: &'a str) -> Option<Virtual> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let mut scope = Some(self.scope);
        while let Some(at) = scope {
            if let Some(&register) = self.scopes[at].registers.get(name) {
                return Some(register);
            }
            let exact = self.scopes[at]
                .declared
                .get(name)
                .filter(|(_, is_stem)| !is_stem);
            let numbered = self.scopes[at]
                .declared
                .get(stem)
                .filter(|(_, is_stem)| *is_stem && stem != name);
            if let Some(&(of, _)) = exact.or(numbered) {
                let register = self.fresh(of.class());
                self.scopes[at].registers.insert(name, register);
                return Some(register);
            }
            scope = self.scopes[at].parent;
        }
        None
    }

    fn register(&mut self, name: &'a str) -> Result<Virtual> {
        match self.find_register(name) {
            Some(register) => Ok(register),
            None => self.error(format!("no register `{name}`")),
        }
    }

    /// Returns the variable with this name, from the function or the module.
    fn symbol(&mut self, name: &'a str) -> Option<Symbol> {
        let mut scope = Some(self.scope);
        while let Some(at) = scope {
            if let Some(&symbol) = self.scopes[at].symbols.get(name) {
                return Some(symbol);
            }
            scope = self.scopes[at].parent;
        }
        if let Some(&address) = self.globals.get(name) {
            return Some(Symbol {
                space: Space::Global,
                address,
            });
        }
        let source = self.source;
        let shared = source
            .variables
            .iter()
            .find(|v| v.space == Space::Shared && !v.is_dynamic && v.name == name)?;
        let symbol = self.place_shared(shared);
        self.scopes[0].symbols.insert(name, symbol);
        Some(symbol)
    }

    /// Returns whether the name denotes the shared memory whose size is set at launch.
    fn is_dynamic_shared(&mut self, name: &str) -> bool {
        let source = self.source;
        let found = source
            .variables
            .iter()
            .find(|v| v.is_dynamic && v.name == name);
        if let Some(variable) = found {
            self.shared_align = self.shared_align.max(variable.align);
        }
        found.is_some()
    }

    fn emit(&mut self, action: Action, writes: &[Virtual], reads: &[Virtual]) {
        self.emit_offset(action, writes, reads, 0);
    }

    fn emit_offset(&mut self, action: Action, writes: &[Virtual], reads: &[Virtual], offset: i32) {
        self.drafts.push(Draft {
            action,
            operands: [writes, reads].concat(),
            writes: writes.len(),
            guard: self.guard,
            offset,
            place: self.place,
            kind: self.kind.take(),
        });
    }

    /// Applies `lanes` to registers and returns a new register with the result.
    fn compute(&mut self, lanes: Lanes, reads: &[Virtual]) -> Virtual {
        let to = self.fresh(lanes.write);
        self.emit(Action::Lanes(lanes.run), &[to], reads);
        to
    }

    /// Converts an address in shared memory to 32 bits.
    fn narrowed(&mut self, register: Virtual) -> Virtual {
        match self.classes[register as usize] {
            Class::Wide => self.compute(unary(|a: u64| a as u32), &[register]),
            _ => register,
        }
    }

    /// Returns the register that an operand writes to.
    fn write(&mut self, operand: &Operand<'a>, class: Class) -> Result<Virtual> {
        let Operand::Name(name) = operand else {
            return self.error("the destination is not a register");
        };
        if *name == "_" {
            return Ok(self.fresh(class));
        }
        let register = self.register(name)?;
        self.check_class(name, register, class)?;
        Ok(register)
    }

    fn check_class(&self, name: &str, register: Virtual, class: Class) -> Result<()> {
        let found = self.classes[register as usize];
        if found == class {
            return Ok(());
        }
        self.error(format!("`{name}` is {found:?}, expected {class:?}"))
    }

    /// Returns the register that an operand reads from; numbers become constants.
    fn read(&mut self, operand: &Operand<'a>, class: Class, of: Option<Type>) -> Result<Virtual> {
        let bits = match (operand, class) {
            (Operand::Integer(bits), Class::Wide) => *bits,
            (Operand::Integer(bits), Class::Word) => *bits & 0xffff_ffff,
            (Operand::Integer(bits), Class::Predicate) => u64::from(*bits != 0) * 0xffff_ffff,
            (Operand::Single(bits), Class::Word) => u64::from(*bits),
            (Operand::Single(bits), Class::Wide) => f64::from(f32::from_bits(*bits)).to_bits(),
            (Operand::Double(value), Class::Word) if of == Some(Type::F32) => {
                u64::from((*value as f32).to_bits())
            }
            (Operand::Double(value), Class::Wide) => value.to_bits(),
            (Operand::Not(name), Class::Predicate) => {
                let register = self.read(&Operand::Name(name), class, of)?;
                return Ok(self.compute(
                    super::execute::lanes::predicates(|a, _| !a),
                    &[register, register],
                ));
            }
            (Operand::Name(name), _) => return self.read_name(name, class),
            (Operand::Offset(name, offset), _) => {
                let Some(symbol) = self.symbol(name) else {
                    return self.error(format!("no variable `{name}`"));
                };
                symbol.address.wrapping_add(*offset as u64)
            }
            _ => return self.error("an operand of an unknown form"),
        };
        Ok(self.constant(class, bits))
    }

    fn read_name(&mut self, name: &'a str, class: Class) -> Result<Virtual> {
        if let Some(register) = self.find_register(name) {
            self.check_class(name, register, class)?;
            return Ok(register);
        }
        if name.starts_with('%') {
            return self.special(name, class);
        }
        if let Some(symbol) = self.symbol(name) {
            return Ok(self.constant(class, symbol.address));
        }
        if self.is_dynamic_shared(name) {
            return Ok(self.preset(match class {
                Class::Wide => Preset::DynamicSharedWide,
                _ => Preset::DynamicShared,
            }));
        }
        if name == "WARP_SZ" {
            return Ok(self.constant(class, 32));
        }
        self.error(format!("`{name}` is not known"))
    }

    fn special(&mut self, name: &'a str, class: Class) -> Result<Virtual> {
        let (stem, axis) = name.split_once('.').unwrap_or((name, "x"));
        let axis = match axis {
            "x" => 0,
            "y" => 1,
            "z" => 2,
            _ => return self.error(format!("`{name}` is not known")),
        };
        let preset = match stem {
            "%tid" => Preset::Thread(axis),
            "%ntid" => Preset::BlockSize(axis),
            "%ctaid" => Preset::Block(axis),
            "%nctaid" => Preset::Grid(axis),
            "%laneid" => Preset::Lane,
            "%warpid" => Preset::Warp,
            "%nwarpid" => Preset::Warps,
            "%lanemask_eq" => Preset::MaskEqual,
            "%lanemask_lt" => Preset::MaskLess,
            "%lanemask_le" => Preset::MaskLessEqual,
            "%lanemask_gt" => Preset::MaskGreater,
            "%lanemask_ge" => Preset::MaskGreaterEqual,
            "%dynamic_smem_size" => Preset::DynamicSize,
            "%gridid" | "%smid" => return Ok(self.constant(class, 0)),
            "%nsmid" => return Ok(self.constant(class, 1)),
            "%clock" | "%clock_hi" | "%clock64" | "%globaltimer" | "%globaltimer_lo" => {
                let wide = self.fresh(Class::Wide);
                self.emit(Action::Clock, &[wide], &[]);
                return Ok(if class == Class::Wide {
                    wide
                } else {
                    self.narrowed(wide)
                });
            }
            _ => return self.error(format!("no register `{name}`")),
        };
        let register = self.preset(preset);
        self.check_class(name, register, class)?;
        Ok(register)
    }

    /// Returns the index of the instruction that a label denotes, as seen from a scope.
    fn label(&self, name: &str, mut scope: usize) -> Option<usize> {
        loop {
            if let Some(&at) = self.scopes[scope].labels.get(name) {
                return Some(at);
            }
            scope = self.scopes[scope].parent?;
        }
    }

    fn resolve(&mut self) -> Result<()> {
        for (draft, scope, name) in std::mem::take(&mut self.branches) {
            let Some(target) = self.label(name, scope) else {
                self.place = self.drafts[draft].place;
                return self.error(format!("no label `{name}`"));
            };
            self.drafts[draft].action = Action::Branch(target as u32);
        }
        Ok(())
    }

    fn finish(
        self,
        function: &Function,
        parameters: Vec<Parameter>,
        globals: &Arc<Globals>,
    ) -> Result<Kernel> {
        let fixed: Vec<Virtual> = self
            .constants
            .values()
            .chain(self.presets.values())
            .copied()
            .collect();
        let Some(file) = allocate::slots(&self.drafts, &self.classes, &fixed) else {
            return self.error("more registers than the interpreter holds");
        };
        let slot = |register: Virtual| file.slots[register as usize];
        let mut code = Vec::with_capacity(self.drafts.len());
        for draft in &self.drafts {
            let mut slots = [0; OPERANDS];
            for (slot_of, &operand) in slots.iter_mut().zip(&draft.operands) {
                *slot_of = slot(operand);
            }
            let (guard, negated) = draft
                .guard
                .map_or((UNGUARDED, false), |(g, negated)| (slot(g), negated));
            code.push(Instruction {
                action: draft.action,
                slots,
                offset: draft.offset,
                guard,
                negated,
            });
        }
        let constants = self
            .constants
            .iter()
            .map(|(&(class, bits), &register)| (slot(register), class, bits));
        Ok(Kernel {
            name: function.name.to_string(),
            parameters,
            static_shared: self.shared,
            code,
            places: self.drafts.iter().map(|d| d.place).collect(),
            kinds: self.drafts.iter().map(|d| d.kind).collect(),
            constants: constants.collect(),
            presets: self
                .presets
                .iter()
                .map(|(&preset, &register)| (preset, slot(register)))
                .collect(),
            rows: file.rows,
            dynamic_shared_at: self.shared.next_multiple_of(self.shared_align),
            local: self.local.next_multiple_of(16),
            granule: self.granule,
            max_threads: function.max_threads,
            required_block: function.required_block,
            globals: Arc::clone(globals),
        })
    }
}
