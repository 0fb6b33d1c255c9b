//! The handlers: one file per route.

pub(crate) mod abort;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod models;
pub(crate) mod openapi;
pub(crate) mod page;
pub(crate) mod rerank;
pub(crate) mod responses;
pub(crate) mod sessions;
pub(crate) mod snapshot;
pub(crate) mod tokenize;
pub(crate) mod version;
