//! The callers' side of the engine: the handle, requests and their streams, sessions, and the
//! answers to posted commands.

pub(super) mod answer;
pub(super) mod builder;
pub(super) mod embedding;
pub(super) mod ending;
pub(super) mod handle;
pub(super) mod pending;
pub(super) mod permit;
pub(super) mod request;
pub(super) mod session;
pub(super) mod stream;
mod submit;
mod tokenize;
pub(super) mod turn;
pub(super) mod waiting;
mod wiring;
