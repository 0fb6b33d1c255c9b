//! Broken model files give the error that names what is broken: they never cause
//! a panic, nor an allocation out of proportion to the file.

#[path = "../common/mod.rs"]
mod common;
mod folder;
mod gguf;
mod memory;
