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
/// The largest plausible `pad_token_id`.
const LARGEST_PADDING: usize = 1 << 16;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let key = "pad_token_id";
    let padding = config.settings.size_or(key, PADDING)?;
    // Each position before the first one has an embedding that no token uses.
    if padding > LARGEST_PADDING {
        let expected = format!("at most {LARGEST_PADDING}");
        return Err(config.settings.refused(key, padding, expected));
    }
    bert::encoder(config, padding + 1)
}
