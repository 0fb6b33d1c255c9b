//! Broken model files give an error that names what is broken. They never cause a panic, nor an
//! allocation out of proportion to the size of the file.

mod folder;
mod gguf;
mod memory;
mod metadata;
mod quantised;
mod settings;
mod tensors;
