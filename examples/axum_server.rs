//! An HTTP server of one's own with axum: it streams answers as server-sent events. When a
//! client disconnects, axum drops the stream, and the drop cancels the request.
//!
//! `cargo run --release --example axum_server -- models/SmolLM2-135M-Instruct.Q4_1.gguf`
//! `curl -N http://127.0.0.1:8000/answer -d 'Once upon a time'`

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::routing::{Router, get, post};
use futures_util::{Stream, StreamExt};
use quell::{Engine, GenerateError, Request};

type Refused = (StatusCode, String);

/// Streams the answer to a prompt.
async fn answer(
    State(engine): State<Engine>,
    prompt: String,
) -> Result<Sse<impl Stream<Item = Result<Event, GenerateError>>>, Refused> {
    let request = Request::new(prompt).max_tokens(2000).ignore_eos();
    let stream = engine
        .generate(request)
        .map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    Ok(Sse::new(stream.map(|chunk| {
        chunk.map(|chunk| Event::default().data(chunk.text))
    })))
}

/// Says how many requests are open and how many were cancelled.
async fn status(State(engine): State<Engine>) -> Result<String, Refused> {
    let stats = engine.inspect().await;
    let stats = stats.map_err(|error| (StatusCode::SERVICE_UNAVAILABLE, error.to_string()))?;
    let (open, cancelled) = (stats.open, stats.outcomes.cancelled);
    Ok(format!("{open} open, {cancelled} cancelled\n"))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("usage: axum_server MODEL [ADDRESS]")?;
    let address = arguments.next().unwrap_or("127.0.0.1:8000".to_owned());
    let engine = Engine::load(path)?;
    let routes = Router::new()
        .route("/answer", post(answer))
        .route("/status", get(status))
        .with_state(engine);
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, routes).await?;
    Ok(())
}
