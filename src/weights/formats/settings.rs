//! The `quantization_config` of a `config.json`, with errors that name the setting at fault.

use super::super::WeightsError;
use serde_json::Value;
use std::path::Path;

/// Settings of a quantisation, and where they are.
#[derive(Clone, Copy)]
pub(in crate::weights) struct Settings<'a> {
    value: &'a Value,
    path: &'a Path,
}

impl<'a> Settings<'a> {
    /// Returns the settings of a model or of the text model within it, if it is quantised.
    pub(super) fn of(config: &'a Value, path: &'a Path) -> Result<Option<Self>, WeightsError> {
        let places = [Some(config), config.get("text_config")];
        let found = places.into_iter().flatten().find_map(|settings| {
            let value = settings.get("quantization_config")?;
            (!value.is_null()).then_some(value)
        });
        let Some(value) = found else {
            return Ok(None);
        };
        let settings = Self { value, path };
        match value.is_object() {
            true => Ok(Some(settings)),
            false => Err(settings.malformed("quantization_config is not an object".to_owned())),
        }
    }

    /// Returns the error for a setting or a tensor that does not fit.
    pub(super) fn malformed(&self, problem: String) -> WeightsError {
        WeightsError::Malformed {
            path: self.path.to_owned(),
            format: "config.json",
            problem,
        }
    }

    /// Returns the error for a setting with this value.
    pub(super) fn refused(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        expected: &str,
    ) -> WeightsError {
        let problem = format!("quantization_config.{key} is {found}, but must be {expected}");
        self.malformed(problem)
    }

    /// Returns a value that is there and not null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, WeightsError> {
        let read = |value: &'a Value| {
            let text = value.as_str();
            text.ok_or_else(|| self.refused(key, value, "a string"))
        };
        self.get(key).map(read).transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        let read = |value: &'a Value| {
            let flag = value.as_bool();
            flag.ok_or_else(|| self.refused(key, value, "true or false"))
        };
        self.get(key).map(read).transpose()
    }

    /// Returns the number of bits per weight, which must be one of these.
    pub(super) fn bits(&self, key: &str, known: &[u32]) -> Result<u32, WeightsError> {
        let bits = self.get(key).and_then(Value::as_u64);
        let found = known.iter().find(|&&known| bits == Some(known.into()));
        found.copied().ok_or_else(|| {
            let shown = self.get(key).map_or("missing".to_owned(), Value::to_string);
            self.refused(key, shown, &format!("one of {known:?}"))
        })
    }
}
