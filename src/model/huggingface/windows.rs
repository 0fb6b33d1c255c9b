//! Reads from `config.json` which layers have a sliding window.

use super::Config;
use crate::model::ModelError;
use crate::model::hyperparameters::MOST_LAYERS;
use serde_json::Value;
use std::collections::HashSet;

/// Name of an entry of `layer_types` in errors.
const ENTRY: &str = "layer_types entry";

impl Config<'_> {
    /// Reads `sliding_window`. Returns the default of the class if it is missing, and `None` if it
    /// is null.
    pub(in crate::model) fn window(&self) -> Result<Option<usize>, ModelError> {
        let key = "sliding_window";
        Ok(match self.settings.size(key)? {
            None if !self.settings.says(key) => self.class().window,
            window => window,
        })
    }

    /// Returns one window per layer, each of which is `window`.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] if there is a window and `layer_types` lists a layer with full
    /// attention: transformers would give that layer the window as well.
    pub(in crate::model) fn same_windows(
        &self,
        window: Option<usize>,
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let Some(slides) = self.layer_types()? else {
            return Ok(vec![window; self.layers()?.min(MOST_LAYERS)]);
        };
        if window.is_some() && slides.contains(&false) {
            let expected = format!(
                "sliding_attention for every layer of a {} model with a sliding_window",
                self.architecture.name()
            );
            let found = "full_attention";
            return Err(self.settings.refused(ENTRY, found, expected));
        }
        Ok(vec![window; slides.len()])
    }

    /// Returns the windows of all layers, of which some have full attention and the others have
    /// `window`, which slides or is a chunk. `layer_types` lists the kinds; if it is missing,
    /// `slides` returns whether a layer has the window.
    pub(in crate::model) fn mixed_windows(
        &self,
        window: Option<usize>,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let slides = match self.layer_types()? {
            Some(listed) => listed,
            None => (0..self.layers()?.min(MOST_LAYERS)).map(slides).collect(),
        };
        let windows = slides.into_iter().map(|slides| window.filter(|_| slides));
        Ok(windows.collect())
    }

    /// Like [`Config::mixed_windows`], but if `layer_types` is missing, the last layer of each
    /// period has full attention and the others have the window. The period is
    /// `sliding_window_pattern`, or `default` if that is missing.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] if the period is 0.
    pub(in crate::model) fn periodic_windows(
        &self,
        window: Option<usize>,
        default: usize,
    ) -> Result<Vec<Option<usize>>, ModelError> {
        let key = "sliding_window_pattern";
        let period = match self.settings.get("layer_types") {
            Some(_) => default,
            None => self.settings.size(key)?.unwrap_or(default),
        };
        if period == 0 {
            return Err(self.settings.refused(key, period, "at least 1"));
        }
        self.mixed_windows(window, |layer| (layer + 1) % period != 0)
    }

    /// Returns the layers that `layer_types` does not list with full attention, for a class whose
    /// other layers are recurrent. Returns `None` if `layer_types` is missing.
    pub(in crate::model) fn recurrent_layers(&self) -> Result<Option<HashSet<usize>>, ModelError> {
        Ok(self.layer_types()?.map(|types| {
            let layers = types.into_iter().enumerate();
            let recurrent = layers.filter(|(_, is_recurrent)| *is_recurrent);
            recurrent.map(|(layer, _)| layer).collect()
        }))
    }

    /// Reads `layer_types`. For each layer, the result is whether it is of the class's other kind
    /// than full attention.
    fn layer_types(&self) -> Result<Option<Vec<bool>>, ModelError> {
        let (settings, local) = (self.settings, self.class().local_attention);
        let types = settings.optional("layer_types", "a list of layer types", Value::as_array)?;
        let Some(types) = types else { return Ok(None) };
        // Older names, which transformers replaces in every class.
        let current = |kind| match kind {
            "attention" => "full_attention",
            "mamba" => "linear_attention",
            other => other,
        };
        let slides = types.iter().map(|kind| match kind.as_str().map(current) {
            Some(kind) if kind == local => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let expected = format!("{local} or full_attention");
                Err(settings.refused(ENTRY, kind, expected))
            }
        });
        slides.collect::<Result<_, _>>().map(Some)
    }
}
