//! `GET /version`: the version of the program.

use axum::Json;
use serde_json::{Value, json};

/// Returns the version of the program.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
