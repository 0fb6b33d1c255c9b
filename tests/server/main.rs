//! The HTTP server, with clients of its own tests and with programs that others have written.

mod client_programs;
mod disconnect;
mod embeddings;
mod fields;
mod keys;
mod malformed;
mod operations;
mod page;
mod rerank;
mod responses;
mod router;
mod runs;
mod sessions;
mod states;
mod tools;
