//! What several routes share: the fields of requests, and answers in the form of OpenAI's API.

pub(crate) mod answer;
pub(crate) mod conversation;
pub(crate) mod envelope;
pub mod fields;
pub(crate) mod legacy_functions;
pub(crate) mod logprobs;
pub(crate) mod notices;
pub(crate) mod parts;
pub(crate) mod prompts;
pub(crate) mod rendering;
pub(crate) mod sampling;
pub(crate) mod session_turn;
pub(crate) mod sse;
pub(crate) mod stream_options;
pub(crate) mod structure;
pub(crate) mod tools;
