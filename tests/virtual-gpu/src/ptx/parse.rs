//! Parses the tokens of a module into declarations and statements.

use super::ParseError;
use super::lex::{Kind, Token, tokens};
use super::syntax::{Function, Initial, Item, Operand, Source, Statement, Variable};
use super::types::{Space, Type};

/// Parses a whole module.
pub fn source(text: &str) -> Result<Source<'_>> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        location: (0, 0),
    };
    let mut source = Source::default();
    while let Some(token) = parser.peek() {
        parser.item(token, &mut source)?;
    }
    Ok(source)
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    location: (u32, u32),
}

type Result<T> = std::result::Result<T, ParseError>;

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    fn peek_is(&self, text: &str) -> bool {
        self.peek()
            .is_some_and(|t| t.text == text && t.kind != Kind::Text)
    }

    fn line(&self) -> u32 {
        self.tokens
            .get(self.at)
            .or(self.tokens.last())
            .map_or(0, |t| t.line)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(ParseError::new(self.line(), message))
    }

    fn next(&mut self) -> Result<Token<'a>> {
        let Some(token) = self.peek() else {
            return self.error("the text ends too early");
        };
        self.at += 1;
        Ok(token)
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Some(Token {
                kind: Kind::Word,
                text,
                ..
            }) => {
                self.at += 1;
                Ok(text)
            }
            Some(other) => self.error(format!("expected a word, found `{}`", other.text)),
            None => self.error("the text ends too early"),
        }
    }

    /// Consumes the next token if it is this one. Returns whether it was.
    fn take(&mut self, text: &str) -> bool {
        let found = self.peek_is(text);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, text: &str) -> Result<()> {
        if self.take(text) {
            return Ok(());
        }
        let found = self.peek().map_or("the end", |t| t.text);
        self.error(format!("expected `{text}`, found `{found}`"))
    }

    /// Parses a number that fits `u32`, such as a size or an alignment.
    fn small(&mut self) -> Result<u32> {
        let word = self.word()?;
        match integer(word).and_then(|n| u32::try_from(n).ok()) {
            Some(number) => Ok(number),
            None => self.error(format!("`{word}` is not a number that fits")),
        }
    }

    /// Returns the number in `.target sm_80`, without consuming it.
    fn target(&self) -> Result<u32> {
        let text = self.tokens.get(self.at + 1).map_or("", |token| token.text);
        let digits = text.strip_prefix("sm_").unwrap_or(text);
        let digits = digits.trim_end_matches(|c: char| !c.is_ascii_digit());
        match digits.parse() {
            Ok(number) => Ok(number),
            Err(_) => self.error(format!("`{text}` is not a target")),
        }
    }

    /// Parses a declaration of the module.
    fn item(&mut self, first: Token<'a>, source: &mut Source<'a>) -> Result<()> {
        match first.text {
            ".version" | ".address_size" => self.at += 2,
            ".target" => {
                source.target = self.target()?;
                self.at += 2;
                while self.take(",") {
                    self.at += 1;
                }
            }
            ".file" => self.file(source)?,
            ".section" => self.section()?,
            ";" => self.at += 1,
            ".visible" | ".weak" | ".common" => self.at += 1,
            ".extern" => {
                self.at += 1;
                if self.peek_is(".func") || self.peek_is(".entry") {
                    // Only a declaration: a call of this function is reported as unresolved.
                    while !self.take(";") {
                        self.at += 1;
                        self.peek().ok_or_else(|| {
                            ParseError::new(self.line(), "a declaration has no end")
                        })?;
                    }
                }
            }
            ".entry" | ".func" => {
                if let Some(function) = self.function()? {
                    source.functions.push(function);
                }
            }
            ".global" | ".const" | ".shared" => source.variables.extend(self.variables()?),
            ".pragma" => while self.next()?.text != ";" {},
            other => return self.error(format!("`{other}` is not known here")),
        }
        Ok(())
    }

    fn file(&mut self, source: &mut Source<'a>) -> Result<()> {
        self.at += 1;
        let number = self.small()?;
        let name = self.next()?;
        source.files.insert(number, name.text);
        while self.take(",") {
            self.at += 1;
        }
        Ok(())
    }

    /// Skips a debug section.
    fn section(&mut self) -> Result<()> {
        while !self.take("{") {
            self.next()?;
        }
        while !self.take("}") {
            self.next()?;
        }
        Ok(())
    }

    fn function(&mut self) -> Result<Option<Function<'a>>> {
        let is_entry = self.next()?.text == ".entry";
        let results = if self.peek_is("(") {
            self.formal_parameters()?
        } else {
            Vec::new()
        };
        let name = self.word()?;
        let parameters = if self.peek_is("(") {
            self.formal_parameters()?
        } else {
            Vec::new()
        };
        let mut function = Function {
            is_entry,
            name,
            results,
            parameters,
            max_threads: None,
            required_block: None,
            body: Vec::new(),
        };
        loop {
            match self.next()?.text {
                "{" => break,
                ";" => return Ok(None),
                ".maxntid" => function.max_threads = Some(self.shape()?.iter().product()),
                ".reqntid" => function.required_block = Some(self.shape()?),
                ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => drop(self.small()?),
                ".noreturn" => {}
                other => return self.error(format!("`{other}` is not known in a function's head")),
            }
        }
        self.body(&mut function.body)?;
        Ok(Some(function))
    }

    fn shape(&mut self) -> Result<[u32; 3]> {
        let mut shape = [1; 3];
        for (axis, extent) in shape.iter_mut().enumerate() {
            if axis > 0 && !self.take(",") {
                break;
            }
            *extent = self.small()?;
        }
        Ok(shape)
    }

    fn formal_parameters(&mut self) -> Result<Vec<Variable<'a>>> {
        self.expect("(")?;
        let mut parameters = Vec::new();
        while !self.take(")") {
            let space = self.word()?;
            if space != ".param" && space != ".reg" {
                return self.error(format!("`{space}` is not known in a parameter list"));
            }
            let (align, of) = self.attributes()?;
            parameters.push(self.declarator(Space::Parameter, align, of)?);
            self.take(",");
        }
        Ok(parameters)
    }

    /// Parses `.align`, `.ptr` and similar attributes, up to and including the type.
    fn attributes(&mut self) -> Result<(Option<usize>, Type)> {
        let mut align = None;
        loop {
            let word = self.word()?;
            if let Some(of) = word.strip_prefix('.').and_then(Type::named) {
                // `.param .u64 .ptr .global .align 16 name`
                if self.take(".ptr") {
                    while self.peek().is_some_and(|t| t.text.starts_with('.')) {
                        if self.next()?.text == ".align" {
                            self.small()?;
                        }
                    }
                }
                return Ok((align, of));
            }
            match word {
                ".align" => align = Some(self.small()? as usize),
                ".attribute" => while !self.take(")") && self.next().is_ok() {},
                _ => return self.error(format!("`{word}` is not known in a declaration")),
            }
        }
    }

    /// Parses a name, its extents and its initial values.
    fn declarator(&mut self, space: Space, align: Option<usize>, of: Type) -> Result<Variable<'a>> {
        let line = self.line();
        let name = self.word()?;
        let (mut count, mut is_dynamic) = (1usize, false);
        while self.take("[") {
            if self.take("]") {
                is_dynamic = true;
                continue;
            }
            let extent = self.small()? as usize;
            count = match count.checked_mul(extent).filter(|&n| n <= 1 << 31) {
                Some(count) => count,
                None => return self.error("a variable is too large"),
            };
            self.expect("]")?;
        }
        let align = align.unwrap_or(of.size());
        if !align.is_power_of_two() {
            return self.error("an alignment is not a power of two");
        }
        let mut initial = Vec::new();
        if self.take("=") {
            self.initial(&mut initial)?;
            if is_dynamic {
                (count, is_dynamic) = (initial.len(), false);
            }
        }
        Ok(Variable {
            space,
            name,
            of,
            align,
            count,
            is_dynamic,
            initial,
            line,
        })
    }

    fn initial(&mut self, values: &mut Vec<Initial<'a>>) -> Result<()> {
        if self.take("{") {
            while !self.take("}") {
                self.initial(values)?;
                self.take(",");
            }
            return Ok(());
        }
        if self.take("generic") {
            self.expect("(")?;
            self.initial(values)?;
            return self.expect(")");
        }
        values.push(match self.operand()? {
            Operand::Integer(bits) => Initial::Bits(bits),
            Operand::Single(bits) => Initial::Bits(u64::from(bits)),
            Operand::Double(value) => Initial::Bits(value.to_bits()),
            Operand::Name(name) => Initial::Address(name, 0),
            Operand::Offset(name, offset) => Initial::Address(name, offset),
            _ => return self.error("an initial value of an unknown form"),
        });
        Ok(())
    }

    /// Parses `.shared .align 4 .b8 name[128];`.
    fn variables(&mut self) -> Result<Vec<Variable<'a>>> {
        let space = match self.next()?.text {
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            ".param" => Space::Parameter,
            _ => Space::Global,
        };
        let (align, of) = self.attributes()?;
        let mut variables = vec![self.declarator(space, align, of)?];
        while self.take(",") {
            variables.push(self.declarator(space, align, of)?);
        }
        self.expect(";")?;
        Ok(variables)
    }

    fn body(&mut self, items: &mut Vec<Item<'a>>) -> Result<()> {
        let mut depth = 0;
        loop {
            let token = self.next()?;
            match token.text {
                "{" => {
                    depth += 1;
                    items.push(Item::Open);
                }
                "}" if depth == 0 => return Ok(()),
                "}" => {
                    depth -= 1;
                    items.push(Item::Close);
                }
                ";" => {}
                ".loc" => self.loc()?,
                ".reg" => items.push(self.registers()?),
                ".shared" | ".local" | ".param" | ".const" | ".global" => {
                    self.at -= 1;
                    items.extend(self.variables()?.into_iter().map(Item::Variable));
                }
                ".pragma" => while self.next()?.text != ";" {},
                _ if token.kind == Kind::Word && self.peek_is(":") => {
                    self.at += 1;
                    items.push(Item::Label(token.text));
                }
                _ => {
                    self.at -= 1;
                    items.push(Item::Statement(self.statement()?));
                }
            }
        }
    }

    /// Parses `.loc file line column[, function_name label[, inlined_at file line column]]`.
    /// The line is that of the innermost function.
    fn loc(&mut self) -> Result<()> {
        let file = self.small()?;
        self.location = (file, self.small()?);
        self.small()?;
        while self.take(",") {
            match self.word()? {
                "function_name" => {
                    self.word()?;
                    if self.take("+") {
                        self.small()?;
                    }
                }
                "inlined_at" => {
                    for _ in 0..3 {
                        self.small()?;
                    }
                }
                other => return self.error(format!("`{other}` is not known in .loc")),
            }
        }
        Ok(())
    }

    fn registers(&mut self) -> Result<Item<'a>> {
        let (_, of) = self.attributes()?;
        let mut names = Vec::new();
        loop {
            let name = self.word()?;
            let is_stem = self.take("<");
            if is_stem {
                self.small()?;
                self.expect(">")?;
            }
            names.push((name, is_stem));
            if !self.take(",") {
                break;
            }
        }
        self.expect(";")?;
        Ok(Item::Registers(of, names))
    }

    fn statement(&mut self) -> Result<Statement<'a>> {
        let guard = if self.take("@") {
            let negated = self.take("!");
            Some((self.word()?, negated))
        } else {
            None
        };
        let line = self.line();
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.take(";") {
            operands.push(self.operand()?);
            if !self.peek_is(";") {
                self.expect(",")?;
            }
        }
        Ok(Statement {
            line,
            location: self.location,
            guard,
            opcode,
            operands,
        })
    }

    fn operand(&mut self) -> Result<Operand<'a>> {
        if self.take("{") {
            return Ok(Operand::Vector(self.operands_until("}")?));
        }
        if self.take("(") {
            return Ok(Operand::List(self.operands_until(")")?));
        }
        if self.take("[") {
            return self.address();
        }
        if self.take("!") {
            return Ok(Operand::Not(self.word()?));
        }
        if self.take("-") {
            return Ok(match self.operand()? {
                Operand::Integer(bits) => Operand::Integer(bits.wrapping_neg()),
                Operand::Single(bits) => Operand::Single(bits ^ 1 << 31),
                Operand::Double(value) => Operand::Double(-value),
                _ => return self.error("a minus before something that is not a number"),
            });
        }
        let word = self.word()?;
        let operand = number(word).unwrap_or(Operand::Name(word));
        if let Operand::Name(name) = operand {
            if self.take("|") {
                let second = self.operand()?;
                return Ok(Operand::Pair(Box::new(operand), Box::new(second)));
            }
            if self.peek_is("+") {
                return Ok(Operand::Offset(name, self.offset()?));
            }
        }
        Ok(operand)
    }

    fn operands_until(&mut self, end: &str) -> Result<Vec<Operand<'a>>> {
        let mut operands = Vec::new();
        while !self.take(end) {
            operands.push(self.operand()?);
            if !self.peek_is(end) {
                self.expect(",")?;
            }
        }
        Ok(operands)
    }

    fn address(&mut self) -> Result<Operand<'a>> {
        let word = self.word()?;
        let address = match number(word) {
            Some(Operand::Integer(absolute)) => Operand::Address(None, absolute as i64),
            Some(_) => return self.error("an address that is not a whole number"),
            None => Operand::Address(Some(word), self.offset()?),
        };
        self.expect("]")?;
        Ok(address)
    }

    /// Parses `+4`, `+-4`, `-4` or nothing.
    fn offset(&mut self) -> Result<i64> {
        let plus = self.take("+");
        let minus = self.take("-");
        if !plus && !minus {
            return Ok(0);
        }
        let word = self.word()?;
        match integer(word) {
            Some(offset) if minus => Ok((offset as i64).wrapping_neg()),
            Some(offset) => Ok(offset as i64),
            None => self.error(format!("`{word}` is not an offset")),
        }
    }
}

/// Parses a whole number in any of PTX's bases, with an optional trailing `U`.
fn integer(word: &str) -> Option<u64> {
    let word = word.strip_suffix('U').unwrap_or(word);
    if let Some(digits) = word.strip_prefix("0x").or(word.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok();
    }
    if let Some(digits) = word.strip_prefix("0b").or(word.strip_prefix("0B")) {
        return u64::from_str_radix(digits, 2).ok();
    }
    if word.len() > 1 && word.starts_with('0') {
        return u64::from_str_radix(&word[1..], 8).ok();
    }
    word.parse().ok()
}

/// Parses a number. Returns `None` if the word is not one.
fn number(word: &str) -> Option<Operand<'_>> {
    if !word.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let lower = |prefix| {
        word.get(..2)
            .filter(|p| p.eq_ignore_ascii_case(prefix))
            .map(|_| &word[2..])
    };
    if let Some(digits) = lower("0f").filter(|d| d.len() == 8) {
        return u32::from_str_radix(digits, 16).ok().map(Operand::Single);
    }
    if let Some(digits) = lower("0d").filter(|d| d.len() == 16) {
        return u64::from_str_radix(digits, 16)
            .ok()
            .map(|bits| Operand::Double(f64::from_bits(bits)));
    }
    integer(word)
        .map(Operand::Integer)
        .or_else(|| word.parse().ok().map(Operand::Double))
}
