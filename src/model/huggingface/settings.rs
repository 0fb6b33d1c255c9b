//! The settings of a `config.json`, read with the name of what is wrong.

use crate::model::ModelError;
use serde_json::Value;

/// An object of settings.
#[derive(Clone, Copy)]
pub(in crate::model) struct Settings<'a> {
    value: &'a Value,
    /// The keys that lead to the object, outermost first. Unused places are empty.
    place: [&'static str; 3],
}

impl<'a> Settings<'a> {
    /// The settings of the whole file.
    pub(super) fn new(value: &'a Value) -> Self {
        Self {
            value,
            place: [""; 3],
        }
    }

    /// The object under `key`, unless it is missing or null.
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

    /// Whether the settings are an object without any setting.
    pub(super) fn is_empty(&self) -> bool {
        self.value
            .as_object()
            .is_some_and(|object| object.is_empty())
    }

    /// The keys that lead to the object, each followed by a dot.
    pub(super) fn place(&self) -> String {
        let place = self.place.iter().filter(|key| !key.is_empty());
        place.map(|key| format!("{key}.")).collect()
    }

    /// The full name of a setting, from the beginning of the file.
    pub(in crate::model) fn name(&self, key: &str) -> String {
        self.place() + key
    }

    /// The error for a setting with this value.
    pub(in crate::model) fn refused(
        &self,
        key: &str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> ModelError {
        ModelError::setting(self.name(key), value, expected)
    }

    /// The error for a setting that is not there.
    pub(in crate::model) fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingSetting {
            key: self.name(key),
        }
    }

    /// The setting, unless it is missing or null.
    pub(in crate::model) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// Whether the setting is there at all, null included.
    pub(in crate::model) fn says(&self, key: &str) -> bool {
        self.value.get(key).is_some()
    }

    /// The setting as `read` understands it; `None` where it is missing or null.
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

    /// The setting, or `default` where it is missing. A null is refused: transformers'
    /// configuration classes have no meaning for it.
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

    /// The setting, or `default` where it is missing; `None` where it is null.
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

    /// The number, which must be positive, or `default` where it is missing.
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

    pub(in crate::model) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a string", Value::as_str)
    }

    /// The number, which must be there.
    pub(in crate::model) fn required_number(&self, key: &str) -> Result<f32, ModelError> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }
}
