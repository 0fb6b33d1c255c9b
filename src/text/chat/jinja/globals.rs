//! Global functions of jinja2: `cycler` and `joiner`.

use super::arguments::Arguments;
use super::python::failed;
use minijinja::value::{Object, ObjectRepr, Rest, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(failed("at least one item has to be provided")),
        false => Ok(Value::from_object(Cycler {
            items: items.0,
            position: AtomicUsize::new(0),
        })),
    });
    environment.add_function("joiner", |separator: Option<Value>| {
        Value::from_object(Joiner {
            separator: separator.unwrap_or_else(|| Value::from(", ")),
            used: AtomicBool::new(false),
        })
    });
}

/// Object that returns its items in turn and starts over after the last one.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    position: AtomicUsize,
}

impl Cycler {
    fn current(&self) -> Value {
        let position = self.position.load(Ordering::Relaxed);
        self.items[position % self.items.len()].clone()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(
        self: &Arc<Self>,
        _: &State<'_, '_>,
        method: &str,
        arguments: &[Value],
    ) -> Result<Value, Error> {
        Arguments::of(arguments)?.finish()?;
        match method {
            "next" => {
                let current = self.current();
                self.position.fetch_add(1, Ordering::Relaxed);
                Ok(current)
            }
            "reset" => {
                self.position.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// Object that returns an empty string on its first call and a separator on each later one.
#[derive(Debug)]
struct Joiner {
    separator: Value,
    used: AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &State<'_, '_>, arguments: &[Value]) -> Result<Value, Error> {
        Arguments::of(arguments)?.finish()?;
        match self.used.swap(true, Ordering::Relaxed) {
            true => Ok(self.separator.clone()),
            false => Ok(Value::from("")),
        }
    }
}
