//! `POST /tokenize` and `POST /detokenize`: text to token ids and back, in the form of vLLM's
//! routes.

use crate::engine::Prompt;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::body::{JsonBody, integer};
use crate::server::openai::conversation::{Conversation, Fit};
use crate::server::openai::fields::Route;
use crate::server::openai::rendering::RenderingFields;
use crate::server::openai::tools::ToolFields;
use crate::server::submit::{Length, Tokenization};
use crate::text::{Detokenizer, Message};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::iter;
use std::sync::Arc;

#[derive(Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    /// Replaces `prompt`.
    messages: Option<Vec<Message>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Deserialize)]
struct DetokenizeRequest {
    model: Option<String>,
    #[serde(deserialize_with = "integer::list")]
    tokens: Vec<u32>,
}

/// Returns the tokens of a text or of a conversation.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let bytes = body.len();
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Tokenize)?;
        Ok((
            body.parse::<TokenizeRequest>()?,
            body.parse::<ToolFields>()?.check()?,
            body.parse::<RenderingFields>()?,
        ))
    });
    let (request, tools, rendering) = fields.await?;
    app.check_model(request.model.as_deref())?;
    let tokenizer = Arc::clone(app.require_tokenizer("tokenization")?);
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            let tokenization = Tokenization {
                add_special: request.add_special_tokens.unwrap_or(true),
                length: Length::Any,
            };
            let tokenized = app.tokenize(vec![Prompt::Text(text)], tokenization).await?;
            tokenized.into_iter().next().unwrap_or_default()
        }
        (None, Some(messages)) => {
            let conversation = Conversation {
                messages,
                tools,
                structure: None,
                rendering: rendering.check(&app)?,
                hide_reasoning: false,
                fit: Fit::Refuse,
            };
            conversation.prepare(&app, bytes).await?.prompt
        }
        _ => {
            let problem = "expected either prompt or messages, but not both";
            return Err(ApiError::invalid(problem).param("prompt"));
        }
    };
    let names = request.return_token_strs.unwrap_or(false);
    let head = format!(
        r#"{{"count":{},"max_model_len":{},"tokens":["#,
        tokens.len(),
        app.engine.max_sequence_tokens(),
    );
    let ids = list(Arc::clone(&tokens), |id, piece| {
        piece.push_str(&id.to_string());
    });
    let pieces = iter::once(head).chain(ids);
    if !names {
        return Ok(written(
            pieces.chain(iter::once(r#"],"token_strs":null}"#.to_owned())),
        ));
    }
    let names = list(tokens, move |id, piece| {
        push_json(tokenizer.token_text(id).unwrap_or(""), piece);
    });
    let between = iter::once(r#"],"token_strs":["#.to_owned());
    let end = iter::once("]}".to_owned());
    Ok(written(pieces.chain(between).chain(names).chain(end)))
}

/// Returns the text of tokens.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let request = body.read(&app, |body| {
        body.check_fields(Route::Detokenize)?;
        body.parse::<DetokenizeRequest>()
    });
    let request = request.await?;
    app.check_model(request.model.as_deref())?;
    let tokenizer = Arc::clone(app.require_tokenizer("detokenization")?);
    let known = tokenizer.vocabulary_size();
    if let Some(token) = request.tokens.iter().find(|&&id| id as usize >= known) {
        let problem = format!("token {token} is outside the vocabulary of {known} tokens");
        return Err(ApiError::invalid(problem).param("tokens"));
    }
    let mut text = Detokenizer::new(tokenizer, false);
    let last = request.tokens.len().saturating_sub(1);
    let tokens: Arc<[u32]> = request.tokens.into();
    let texts = Pieces::new(tokens, move |id, index, piece| {
        push_inside(&text.push(id), piece);
        if index == last {
            push_inside(&text.finish(), piece);
        }
    });
    let head = iter::once(r#"{"prompt":""#.to_owned());
    let end = iter::once(r#""}"#.to_owned());
    Ok(written(head.chain(texts).chain(end)))
}

/// Size in bytes at which a piece of a response is sent.
const PIECE: usize = 32 << 10;

/// Writes the JSON of a list of tokens piece by piece while it is sent, because all of it can
/// be forty times as large as the request.
struct Pieces<F> {
    tokens: Arc<[u32]>,
    next: usize,
    write: F,
}

impl<F: FnMut(u32, usize, &mut String)> Pieces<F> {
    /// Creates the iterator. `write` is called with each token and its index, and appends the
    /// token's JSON.
    fn new(tokens: Arc<[u32]>, write: F) -> Self {
        Self {
            tokens,
            next: 0,
            write,
        }
    }
}

impl<F: FnMut(u32, usize, &mut String)> Iterator for Pieces<F> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut piece = String::new();
        while piece.len() < PIECE
            && let Some(&id) = self.tokens.get(self.next)
        {
            (self.write)(id, self.next, &mut piece);
            self.next += 1;
        }
        // An empty piece may be followed by more, because tokens may have no text.
        let more = self.next < self.tokens.len() || !piece.is_empty();
        more.then_some(piece)
    }
}

/// Like [`Pieces::new`], with commas between the tokens.
fn list(
    tokens: Arc<[u32]>,
    mut write: impl FnMut(u32, &mut String),
) -> impl Iterator<Item = String> {
    Pieces::new(tokens, move |id, index, piece| {
        if index > 0 {
            piece.push(',');
        }
        write(id, piece);
    })
}

/// Appends a text as a JSON string.
fn push_json(text: &str, json: &mut String) {
    json.push_str(&Value::from(text).to_string());
}

/// Appends a text to the inside of a JSON string.
fn push_inside(text: &str, json: &mut String) {
    let quoted = Value::from(text).to_string();
    json.push_str(&quoted[1..quoted.len() - 1]);
}

/// Returns the response that consists of these pieces of JSON.
fn written(pieces: impl Iterator<Item = String> + Send + 'static) -> Response {
    let pieces = stream::iter(pieces.map(Ok::<_, Infallible>));
    let json = (header::CONTENT_TYPE, "application/json");
    ([json], Body::from_stream(pieces)).into_response()
}

/// Describes the tokenizer, in the form of vLLM's route.
pub(crate) async fn tokenizer_info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let tokenizer = app.require_tokenizer("its description")?;
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
    let template = tokenizer.chat_template().map(|template| template.source());
    Ok(Json(json!({
        "tokenizer_class": "quell",
        "vocab_size": tokenizer.vocabulary_size(),
        "model_max_length": app.engine.max_sequence_tokens(),
        "bos_token": text(tokenizer.bos()),
        "eos_token": text(tokenizer.eos()),
        "pad_token": null,
        "end_tokens": tokenizer.end_tokens(),
        "chat_template": template,
    })))
}
