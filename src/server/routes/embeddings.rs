//! `POST /v1/embeddings`: turns texts into vectors.

use crate::engine::{Prompt, SubmitError, normalize};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::{JsonBody, integer};
use crate::server::openai::fields::Route;
use crate::server::openai::prompts::Prompts;
use crate::server::openai::sampling::{Side, embed_request, truncation};
use crate::server::submit::{Length, Tokenization};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

#[derive(Deserialize)]
struct EmbeddingsRequest {
    model: Option<String>,
    input: Prompts,
    encoding_format: Option<Encoding>,
    #[serde(default, deserialize_with = "integer::optional")]
    dimensions: Option<usize>,
    add_special_tokens: Option<bool>,
    /// Name of a text of the model's own that is put before texts, such as `query`.
    prompt_name: Option<String>,
    /// −1 means as many as fit in the context.
    #[serde(default, deserialize_with = "integer::optional")]
    truncate_prompt_tokens: Option<i64>,
    truncation_side: Option<Side>,
    /// The user to whom fair scheduling attributes the request.
    user: Option<String>,
    #[serde(default, deserialize_with = "integer::optional")]
    priority: Option<i32>,
    /// Only requests with the same salt share cached prefixes.
    cache_salt: Option<String>,
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// Base64 of little-endian float32 values.
    Base64,
}

#[derive(Serialize)]
struct Embeddings {
    object: &'static str,
    data: Vec<Entry>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Entry {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Default, Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Returns the vectors of the inputs, each normalized to length 1.
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Embeddings)?;
        body.parse::<EmbeddingsRequest>()
    });
    let request = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    if app.engine.info().pooling.is_score {
        let problem = "the model scores pairs of texts: send them to /v1/rerank or /v1/score";
        return Err(ApiError::invalid(problem).param("model"));
    }
    let size = app.engine.info().embedding.unwrap_or(0);
    let dimensions = request.dimensions.unwrap_or(size);
    if dimensions > size || request.dimensions == Some(0) {
        let problem = format!("dimensions is {dimensions}, but must be from 1 to {size}");
        return Err(ApiError::invalid(problem).param("dimensions"));
    }
    let template = embed_request(request.user, request.priority, request.cache_salt)?;
    let room = app.engine.max_sequence_tokens();
    let truncation = truncation(
        request.truncate_prompt_tokens,
        request.truncation_side,
        room,
    )?;
    let mut inputs = request.input.into_vec("input")?;
    add_prompt(&app, request.prompt_name.as_deref(), &mut inputs)?;
    // Tokenize all inputs first, so that an invalid one is refused before anything is computed.
    let tokenization = Tokenization {
        add_special: request.add_special_tokens.unwrap_or(true),
        length: Length::of(truncation),
    };
    let inputs = app.tokenize(inputs, tokenization).await.map_err(of_input)?;
    // Ids beyond the vocabulary are those of a second segment, which pairs of texts have.
    let vocabulary = app.engine.info().vocabulary;
    let mut tokens = inputs.iter().flat_map(|input| input.iter());
    if let Some(&token) = tokens.find(|token| **token as usize >= vocabulary) {
        return Err(of_input(
            SubmitError::UnknownToken { token, vocabulary }.into(),
        ));
    }
    let embeddings = app.embed_all(&caller, inputs, template);
    let embeddings = embeddings.await.map_err(of_input)?;
    let mut usage = Usage::default();
    let encoding = request.encoding_format.unwrap_or_default();
    let mut data = Vec::with_capacity(embeddings.len());
    for (index, mut embedding) in embeddings.into_iter().enumerate() {
        usage.prompt_tokens += embedding.prompt_tokens;
        embedding.values.truncate(dimensions);
        let vector = normalized(embedding.values)?;
        data.push(Entry {
            object: "embedding",
            index,
            embedding: match encoding {
                Encoding::Float => Vector::Float(vector),
                Encoding::Base64 => Vector::Base64(base64(&vector)),
            },
        });
    }
    usage.total_tokens = usage.prompt_tokens;
    Ok(Json(Embeddings {
        object: "list",
        data,
        model,
        usage,
    })
    .into_response())
}

/// Puts the model's own text with this name before texts, or its default one. Inputs that are given
/// as tokens are left as they are.
fn add_prompt(app: &App, name: Option<&str>, inputs: &mut [Prompt]) -> Result<(), ApiError> {
    let pooling = &app.engine.info().pooling;
    let Some(prompt) = pooling.prompt(name) else {
        let names: Vec<&str> = pooling.prompts.keys().map(String::as_str).collect();
        let problem = format!(
            "prompt_name is {:?}, but must be one of the model's: {}",
            name.unwrap_or_default(),
            if names.is_empty() {
                "it has none".to_owned()
            } else {
                names.join(", ")
            },
        );
        return Err(ApiError::invalid(problem).param("prompt_name"));
    };
    for input in inputs {
        if let Prompt::Text(text) = input {
            text.insert_str(0, prompt);
        }
    }
    Ok(())
}

/// Renames the field `prompt` of an error to `input`, its name in this API.
fn of_input(mut error: ApiError) -> ApiError {
    if error.body.param.as_deref() == Some("prompt") {
        error.body.param = Some("input".to_owned());
    }
    error
}

/// Scales a vector to length 1; a zero vector is returned unchanged.
fn normalized(mut values: Vec<f32>) -> Result<Vec<f32>, ApiError> {
    if !values.iter().all(|value| value.is_finite()) {
        return Err(ApiError::not_finite());
    }
    normalize(&mut values);
    Ok(values)
}

fn base64(values: &[f32]) -> String {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    BASE64.encode(bytes)
}
