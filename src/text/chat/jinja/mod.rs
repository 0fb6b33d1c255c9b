//! Jinja as transformers configures it for chat templates: jinja2 on Python's values.
//!
//! minijinja parses and runs the templates. The modules here make up for its differences
//! from jinja2: [`source`] rewrites templates where minijinja cannot be extended, and the
//! others contain the operators, filters, tests and methods.

mod arguments;
mod filters;
mod globals;
mod methods;
mod operators;
mod predicates;
pub(super) mod python;
mod source;
mod text_filters;
mod urlize;

#[cfg(test)]
mod tests;

use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
pub(super) use source::translate;

/// Creates an environment that behaves like that of transformers, without any template.
pub(super) fn python_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(write_as_python);
    environment.set_unknown_method_callback(methods::call);
    filters::register(&mut environment);
    globals::register(&mut environment);
    operators::register(&mut environment);
    predicates::register(&mut environment);
    environment.add_function("raise_exception", raise_exception);
    // In jinja2, `self` gives access to the template's blocks, which are not supported here.
    environment.add_global("self", Value::from(()));
    environment
}

/// Message that a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Prints a value as Python does.
fn write_as_python(
    output: &mut minijinja::Output<'_>,
    _: &minijinja::State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => output.write_str(text),
        None => output.write_str(&python::text(value)?),
    };
    written.map_err(Error::from)
}
