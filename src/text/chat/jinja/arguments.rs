//! Arguments of a filter or a method, passed by position or by name as in Python.

use super::python::{failed, integer, text};
use minijinja::value::{Kwargs, Rest, Value, from_args};
use minijinja::{Error, ErrorKind};
use std::vec;

/// Arguments, to be taken in the order in which the function declares them.
pub(super) struct Arguments {
    placed: vec::IntoIter<Value>,
    named: Kwargs,
}

impl Arguments {
    pub(super) fn new(placed: Vec<Value>, named: Kwargs) -> Self {
        Self {
            placed: placed.into_iter(),
            named,
        }
    }

    pub(super) fn of(arguments: &[Value]) -> Result<Self, Error> {
        let (placed, named): (Rest<Value>, Kwargs) = from_args(arguments)?;
        Ok(Self::new(placed.0, named))
    }

    /// Returns the next argument, whose name is `name`, or `None` if it is omitted.
    pub(super) fn next(&mut self, name: &str) -> Result<Option<Value>, Error> {
        match self.placed.next() {
            Some(value) => Ok(Some(value)),
            None if self.named.has(name) => self.named.get::<Value>(name).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn required(&mut self, name: &str) -> Result<Value, Error> {
        self.next(name)?
            .ok_or_else(|| Error::new(ErrorKind::MissingArgument, format!("'{name}'")))
    }

    /// Returns the next argument as a string, or `None` if it is omitted or none.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.next(name)? {
            Some(value) if !value.is_none() => text(&value).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns the next argument, which must be a string.
    pub(super) fn required_string(&mut self, name: &str) -> Result<String, Error> {
        let value = self.required(name)?;
        let string = value.as_str().map(str::to_owned);
        string.ok_or_else(|| failed(format!("'{name}' is {value:?}, expected a string")))
    }

    /// Returns the next argument as an integer, or `None` if it is omitted or none.
    pub(super) fn integer(&mut self, name: &str) -> Result<Option<i64>, Error> {
        match self.next(name)? {
            Some(value) if !value.is_none() => integer(&value)
                .map(|integer| {
                    let bound = i128::from(i64::MAX);
                    Some(i64::try_from(integer.clamp(-bound, bound)).unwrap_or(0))
                })
                .ok_or_else(|| failed(format!("'{name}' is {value:?}, expected an integer"))),
            _ => Ok(None),
        }
    }

    /// Returns whether the next argument is given and true.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool, Error> {
        Ok(self.next(name)?.is_some_and(|value| value.is_true()))
    }

    /// Returns the remaining positional arguments.
    pub(super) fn rest(&mut self) -> Vec<Value> {
        self.placed.by_ref().collect()
    }

    /// Returns the named arguments as one dict, or `None` if there are none.
    pub(super) fn all_named(&mut self) -> Option<Value> {
        let names: Vec<String> = self.named.args().map(str::to_owned).collect();
        let pairs: Vec<(String, Value)> = names
            .into_iter()
            .filter_map(|name| Some((name.clone(), self.named.get::<Value>(&name).ok()?)))
            .collect();
        (!pairs.is_empty()).then(|| Value::from_iter(pairs))
    }

    /// Returns an error if an argument has not been taken.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        match self.placed.next() {
            Some(_) => Err(Error::from(ErrorKind::TooManyArguments)),
            None => self.named.assert_all_used(),
        }
    }
}
