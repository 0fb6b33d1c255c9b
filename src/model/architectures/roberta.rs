//! RoBERTa and XLM-RoBERTa: BERT, whose positions are counted from after the padding token's id.

use super::{Architecture, Hyperparameters, ModelError, bert};
use crate::model::huggingface::{Config, ConfigClass};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "roberta",
    aliases: &["xlm-roberta", "camembert"],
    class: ConfigClass {
        vocabulary: 50_265,
        ..bert::CLASS
    },
    read_config,
    // Files name it bert, and hold only the embeddings of positions that tokens have.
    gguf: None,
    storage: bert::STORAGE,
    layer: bert::layer,
};

/// Default of `pad_token_id`.
const PADDING: usize = 1;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let padding = config.settings.size_or("pad_token_id", PADDING)?;
    bert::encoder(config, padding + 1)
}
