//! The HTTP server, with clients of its own tests and with programs that others have written.

#[path = "../common/api.rs"]
mod api;
#[path = "../common/browser.rs"]
mod browser;
#[path = "../common/clients.rs"]
mod clients;
#[path = "../common/http.rs"]
mod http;
#[path = "../common/http2.rs"]
mod http2;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/parrot.rs"]
mod parrot;
#[path = "../common/requests.rs"]
mod requests;
#[path = "../common/serve.rs"]
mod serve;
#[path = "../common/server.rs"]
mod server;
#[path = "../common/sim.rs"]
mod sim;

mod client_programs;
mod disconnect;
mod embeddings;
mod fields;
mod keys;
mod malformed;
mod operations;
mod page;
mod responses;
mod router;
mod runs;
mod sessions;
mod tools;
