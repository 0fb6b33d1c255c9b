//! `GET /v1/models`: the model that is served.

use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::body::PathPart;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

/// Lists the models, of which there is one.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&app)]}))
}

/// Returns the model with this name.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    PathPart(name): PathPart,
) -> Result<Json<Value>, ApiError> {
    app.check_model(Some(&name))?;
    Ok(Json(model(&app)))
}

fn model(app: &App) -> Value {
    json!({
        "id": app.options.model_name,
        "object": "model",
        "created": app.started,
        "owned_by": "quell",
        "root": app.options.model_name,
        "parent": null,
        "max_model_len": app.engine.max_sequence_tokens(),
        "vocab_size": app.engine.info().vocabulary,
    })
}
