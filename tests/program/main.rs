//! The `quell` program and the examples, run as processes.

#[path = "../common/gguf_writer.rs"]
mod gguf_writer;
#[path = "../common/http.rs"]
mod http;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/serve.rs"]
mod serve;
#[path = "../common/sim.rs"]
mod sim;

mod bench_server;
mod chat;
mod cli;
mod deploy;
mod examples;
mod hub_download;
mod otlp;
