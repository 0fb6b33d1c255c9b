//! placeholder
use super::args::CliError;
use clap::Args;
#[derive(Debug, Args)]
pub struct ChatArgs {}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct ChatError;
pub fn start(_: ChatArgs) -> Result<(), CliError> { Ok(()) }
