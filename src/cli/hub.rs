//! placeholder
use std::path::PathBuf;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct HubError;
pub fn resolve(m: &str, _: bool) -> Result<PathBuf, HubError> { Ok(m.into()) }
