//! Which layers have a sliding window, as `config.json` says it.

use super::Config;
use crate::model::ModelError;
use serde_json::Value;
use std::collections::HashSet;

/// No model has more layers; a number beyond is refused before it is used.
const MOST_LAYERS: usize = 1 << 16;

/// What errors call an entry of `layer_types`.
const ENTRY: &str = "layer_types entry";

impl Config<'_> {
    /// `sliding_window`, or the class's where it is missing; `None` where it is null.
    pub(in crate::model) fn window(&self) -> Result<Option<usize>, ModelError> {
        let key = "sliding_window";
        Ok(match self.settings.size(key)? {
            None if !self.settings.says(key) => self.class().window,
            window => window,
        })
    }

    /// The windows of layers that all have the same one, or none.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] when `layer_types` gives full attention to one of them:
    /// transformers gives all layers the window, whatever is listed.
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

    /// The windows of layers of two kinds: those with full attention, and those that slide or
    /// see chunks, as `layer_types` lists them or else as `slides` has it.
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

    /// The windows of layers of which all but each `period`th slide, unless `layer_types` lists
    /// them: `sliding_window_pattern` is the period, by default `default`.
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

    /// The layers of the class's other kind than full attention, as `layer_types` lists them, of
    /// a class whose other kind is recurrent.
    pub(in crate::model) fn recurrent_layers(&self) -> Result<Option<HashSet<usize>>, ModelError> {
        Ok(self.layer_types()?.map(|types| {
            let layers = types.into_iter().enumerate();
            let recurrent = layers.filter(|(_, is_recurrent)| *is_recurrent);
            recurrent.map(|(layer, _)| layer).collect()
        }))
    }

    /// `layer_types`: for each layer whether it is of the class's other kind than full attention.
    fn layer_types(&self) -> Result<Option<Vec<bool>>, ModelError> {
        let (settings, local) = (self.settings, self.class().local_attention);
        let types = settings.optional("layer_types", "a list of layer types", Value::as_array)?;
        let Some(types) = types else { return Ok(None) };
        // Older names, which transformers replaces in all classes.
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
