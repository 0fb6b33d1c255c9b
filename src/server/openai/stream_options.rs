//! `stream_options`: what a stream carries in addition to the answer.

use crate::server::error::ApiError;
use serde::Deserialize;

/// What a stream carries in addition to the answer.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// Which events of a stream report token usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UsageEvents {
    #[default]
    None,
    /// One additional event, at the end.
    Last,
    /// Every event, with the counts so far.
    Each,
}

impl StreamOptions {
    /// Returns which events report usage: none without `include_usage`. Refuses stream options
    /// unless the answer is streamed.
    pub fn usage(options: Option<Self>, stream: bool) -> Result<UsageEvents, ApiError> {
        let Some(options) = options else {
            return Ok(UsageEvents::None);
        };
        if !stream {
            let problem = "stream_options needs stream: true";
            return Err(ApiError::invalid(problem).param("stream_options"));
        }
        let continuous = options.continuous_usage_stats.unwrap_or(false);
        Ok(match (options.include_usage.unwrap_or(false), continuous) {
            (false, _) => UsageEvents::None,
            (true, false) => UsageEvents::Last,
            (true, true) => UsageEvents::Each,
        })
    }
}
