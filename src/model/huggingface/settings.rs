//! Reads the settings of a `config.json`, with errors that name the setting at fault.

use crate::model::ModelError;
use serde_json::Value;
use std::collections::HashSet;

/// An object of settings, and where it is in the file.
#[derive(Clone, Copy)]
pub(in crate::model) struct Settings<'a> {
    value: &'a Value,
    /// The keys that lead to the object, outermost first. Unused entries are empty.
    place: [&'static str; 3],
}

impl<'a> Settings<'a> {
    /// Creates the settings of a whole file.
    pub(super) fn new(value: &'a Value) -> Self {
        Self {
            value,
            place: [""; 3],
        }
    }

    /// Returns the object under `key`, or `None` if it is missing or null.
    pub(super) fn part(&self, key: &'static str) -> Option<Self> {
        let mut part = Self {
            value: self.get(key)?,
            ..*self
        };
        if let Some(free) = part.place.iter_mut().find(|place| place.is_empty()) {
            *free = key;
        }
        Some(part)
    }

    /// Returns whether this is an object without any settings.
    pub(super) fn is_empty(&self) -> bool {
        self.value
            .as_object()
            .is_some_and(|object| object.is_empty())
    }

    /// Returns the keys that lead to the object, each followed by a dot.
    pub(super) fn place(&self) -> String {
        let place = self.place.iter().filter(|key| !key.is_empty());
        place.map(|key| format!("{key}.")).collect()
    }

    /// Returns the full name of a setting, which begins with the keys that lead to it.
    pub(in crate::model) fn name(&self, key: &str) -> String {
        self.place() + key
    }

    /// Returns the error for a setting whose value is refused.
    pub(in crate::model) fn refused(
        &self,
        key: &str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> ModelError {
        ModelError::setting(self.name(key), value, expected)
    }

    /// Returns the error for a missing setting.
    pub(in crate::model) fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingSetting {
            key: self.name(key),
        }
    }

    /// Returns the value of a setting, or `None` if it is missing or null.
    pub(in crate::model) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// Returns whether the file has the setting, even if it is null.
    pub(in crate::model) fn says(&self, key: &str) -> bool {
        self.value.get(key).is_some()
    }

    /// Converts the value of a setting with `read`. Returns `None` if it is missing or null.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] if `read` returns `None`.
    pub(in crate::model) fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refused(key, value, expected)),
        }
    }

    pub(in crate::model) fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.optional(key, "a whole number", |value| {
            let number = value.as_u64();
            number.and_then(|number| usize::try_from(number).ok())
        })
    }

    /// Reads a whole number, or returns `default` if it is missing. A null is refused: it has no
    /// meaning in transformers' configuration classes.
    pub(in crate::model) fn size_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        match self.size(key)? {
            Some(size) => Ok(size),
            None if self.says(key) => Err(self.refused(key, "null", "a whole number")),
            None => Ok(default),
        }
    }

    pub(in crate::model) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.optional(key, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    /// Reads a number. Returns `default` if it is missing, and `None` if it is null.
    pub(in crate::model) fn number_or(
        &self,
        key: &str,
        default: Option<f32>,
    ) -> Result<Option<f32>, ModelError> {
        match self.number(key)? {
            None if !self.says(key) => Ok(default),
            number => Ok(number),
        }
    }

    /// Reads a number, which must be positive, or returns `default` if it is missing. A null is
    /// refused.
    pub(in crate::model) fn positive_or(&self, key: &str, default: f32) -> Result<f32, ModelError> {
        let number = self.number_or(key, Some(default))?;
        match number {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            Some(number) => Err(self.refused(key, number, "a positive number")),
            None => Err(self.refused(key, "null", "a positive number")),
        }
    }

    pub(in crate::model) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    /// Reads a list of the indices of layers.
    pub(in crate::model) fn layers(&self, key: &str) -> Result<Option<HashSet<usize>>, ModelError> {
        self.optional(key, "a list of layers", |value| {
            let layers = value.as_array()?.iter();
            let layers = layers.map(|layer| layer.as_u64().map(|layer| layer as usize));
            layers.collect()
        })
    }

    pub(in crate::model) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a string", Value::as_str)
    }

    /// Reads a number that must not be missing or null.
    pub(in crate::model) fn required_number(&self, key: &str) -> Result<f32, ModelError> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }
}
