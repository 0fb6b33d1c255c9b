//! The callers' side of the engine: sessions and their turns, embeddings, and the
//! permits of open requests.

pub(super) mod embedding;
pub(super) mod permit;
pub(super) mod session;
pub(super) mod turn;
