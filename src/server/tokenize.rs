//! `POST /tokenize` and `POST /detokenize`: text to token ids and back, in the form of
//! vLLM's routes.

use super::App;
use super::conversation::Conversation;
use super::error::ApiError;
use super::fields::Route;
use super::integer;
use super::json::JsonBody;
use super::rendering::RenderingFields;
use super::tools::ToolFields;
use crate::engine::SubmitError;
use crate::text::{EncodeOptions, Message};
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

#[derive(Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    /// In place of `prompt`.
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

/// The tokens of a text, or of a conversation.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    body.check_fields(Route::Tokenize)?;
    let request: TokenizeRequest = body.parse()?;
    app.check_model(request.model.as_deref())?;
    let tokenizer = app.require_tokenizer("tokenization")?;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            let options = EncodeOptions {
                add_special: request.add_special_tokens.unwrap_or(true),
                parse_special: true,
            };
            tokenizer
                .encode(&text, options)
                .map_err(SubmitError::Text)?
        }
        (None, Some(messages)) => {
            let conversation = Conversation {
                messages,
                tools: body.parse::<ToolFields>()?.check()?,
                structure: None,
                rendering: body.parse::<RenderingFields>()?.check(&app)?,
                hide_reasoning: false,
                truncate_to: None,
            };
            conversation.prepare(&app).await?.prompt
        }
        _ => {
            let problem = "either prompt or messages is needed, and not both";
            return Err(ApiError::invalid(problem).param("prompt"));
        }
    };
    let names = request.return_token_strs.unwrap_or(false).then(|| {
        let each = tokens.iter().map(|&id| tokenizer.token_text(id));
        each.map(|text| text.unwrap_or("").to_owned())
            .collect::<Vec<_>>()
    });
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": app.engine.max_sequence_tokens(),
        "tokens": tokens,
        "token_strs": names,
    })))
}

/// The text of tokens.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    body.check_fields(Route::Detokenize)?;
    let request: DetokenizeRequest = body.parse()?;
    app.check_model(request.model.as_deref())?;
    let tokenizer = app.require_tokenizer("detokenization")?;
    let known = tokenizer.vocabulary_size();
    if let Some(token) = request.tokens.iter().find(|&&id| id as usize >= known) {
        let problem = format!("token {token} is outside the vocabulary of {known} tokens");
        return Err(ApiError::invalid(problem).param("tokens"));
    }
    Ok(Json(
        json!({"prompt": tokenizer.decode(&request.tokens, false)}),
    ))
}

/// What a client needs to know of the tokenizer, in the form of vLLM's route.
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
