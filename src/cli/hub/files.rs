//! Which files of a repository belong to a model.

/// Beginning of the names of models that are on a hub.
pub const PREFIX: &str = "hf:";
/// Name of the settings of a model.
pub const CONFIG: &str = "config.json";
/// Name of the tokenizer of a model.
pub const TOKENIZER: &str = "tokenizer.json";
/// Name of weights in a single file.
pub const WEIGHTS: &str = "model.safetensors";
/// Name of the index of weights in several files.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Returns whether a file of a repository belongs to a model, apart from the weights.
pub fn is_wanted(file: &str) -> bool {
    let alone = [CONFIG, "generation_config.json", "special_tokens_map.json"];
    let families = ["tokenizer", "chat_template."];
    is_segment(file)
        && (alone.contains(&file) || families.iter().any(|start| file.starts_with(start)))
}

/// Returns whether a file name is that of a GGUF file.
pub fn is_gguf(file: &str) -> bool {
    file.to_ascii_lowercase().ends_with(".gguf")
}

/// Returns whether the text can be a segment of a name, a URL and a path alike.
pub fn is_segment(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+=,".contains(&byte);
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}
