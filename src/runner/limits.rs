//! Checks of the engine's settings, against valid ranges and against the model.

use super::LoadError;
use crate::config::{EngineConfig, Preemption};
use crate::model::ModelConfig;
use std::time::Duration;

/// Returns the maximum number of tokens per sequence that the model and the settings allow.
pub(super) fn context_tokens(model: &ModelConfig, config: &EngineConfig) -> usize {
    config.max_context.unwrap_or(model.native_context())
}

/// Checks the settings that depend on the model. The error names the first that does not fit it.
pub(super) fn check(model: &ModelConfig, config: &EngineConfig) -> Result<(), LoadError> {
    if let Some(tokens) = config.max_context.filter(|tokens| *tokens > model.context) {
        return Err(LoadError::Config {
            name: "max_context",
            value: tokens.to_string(),
            expected: format!("at most {}, the context of the model", model.context),
        });
    }
    if let Some(slots) = config.state_slots.filter(|_| model.recurrent_layers() == 0) {
        return Err(LoadError::Config {
            name: "state_slots",
            value: slots.to_string(),
            expected: "unset, since the model has no recurrent layers".to_owned(),
        });
    }
    Ok(())
}

/// Checks that all settings are in range. The error names the first that is not.
pub(crate) fn validate(config: &EngineConfig) -> Result<(), LoadError> {
    for (name, value, limit) in [
        (
            "max_batch_tokens",
            config.max_batch_tokens.unwrap_or(1),
            1 << 20,
        ),
        ("max_sequences", config.max_sequences, 1 << 20),
        ("max_open_requests", config.max_open_requests, usize::MAX),
        ("block_tokens", config.block_tokens, 1 << 16),
        ("max_context", config.max_context.unwrap_or(1), usize::MAX),
        // Each request allocates a buffer of this many events when it starts.
        ("stream_buffer", config.stream_buffer, 1 << 16),
    ] {
        if value == 0 || value > limit {
            return Err(LoadError::Config {
                name,
                value: value.to_string(),
                expected: match limit {
                    usize::MAX => "at least 1".to_owned(),
                    limit => format!("from 1 to {limit}"),
                },
            });
        }
    }
    if config.preemption == Preemption::Swap && config.swap_bytes == 0 {
        return Err(LoadError::Config {
            name: "swap_bytes",
            value: "0".to_owned(),
            expected: "at least 1, because preempted sequences are to be swapped out".to_owned(),
        });
    }
    if config.pinned_percent > 100 {
        return Err(LoadError::Config {
            name: "pinned_percent",
            value: config.pinned_percent.to_string(),
            expected: "from 0 to 100".to_owned(),
        });
    }
    // A watchdog with a shorter deadline would cost more than it finds.
    let shortest = Duration::from_millis(1);
    if let Some(deadline) = config.step_deadline.filter(|deadline| *deadline < shortest) {
        return Err(LoadError::Config {
            name: "step_deadline",
            value: format!("{deadline:?}"),
            expected: format!("at least {shortest:?}"),
        });
    }
    Ok(())
}
