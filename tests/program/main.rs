//! The `quell` program and the examples, run as processes.

mod bench_server;
mod chat;
mod cli;
mod deploy;
mod examples;
mod gpu_scripts;
mod hub_download;
mod otlp;
