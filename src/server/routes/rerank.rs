//! `POST /v1/rerank`: orders documents by how well they answer a query. `POST /v1/score`: scores
//! pairs of texts.

use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::{JsonBody, integer};
use crate::server::openai::fields::Route;
use crate::server::openai::sampling::embed_request;
use crate::server::scoring::{Scores, Scoring};
use crate::server::{App, unix_time};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// Maximum number of pairs of one request.
const MAX_PAIRS: usize = 2048;

#[derive(Deserialize)]
struct RerankRequest {
    model: Option<String>,
    query: String,
    documents: Documents,
    #[serde(default, deserialize_with = "integer::optional")]
    top_n: Option<usize>,
    return_documents: Option<bool>,
    /// What makes a document relevant, for models that take such a text.
    instruction: Option<String>,
    /// Maximum number of tokens of a document. The rest is left out.
    #[serde(default, deserialize_with = "integer::optional")]
    max_tokens_per_doc: Option<usize>,
    /// The user to whom fair scheduling attributes the request.
    user: Option<String>,
    #[serde(default, deserialize_with = "integer::optional")]
    priority: Option<i32>,
    /// Only requests with the same salt share cached prefixes.
    cache_salt: Option<String>,
}

#[derive(Deserialize)]
struct ScoreRequest {
    model: Option<String>,
    text_1: Texts,
    text_2: Texts,
    /// What makes a document relevant, for models that take such a text.
    instruction: Option<String>,
    /// Maximum number of tokens of a document. The rest is left out.
    #[serde(default, deserialize_with = "integer::optional")]
    max_tokens_per_doc: Option<usize>,
    /// The user to whom fair scheduling attributes the request.
    user: Option<String>,
    #[serde(default, deserialize_with = "integer::optional")]
    priority: Option<i32>,
    /// Only requests with the same salt share cached prefixes.
    cache_salt: Option<String>,
}

/// The fields of both requests besides the texts.
struct Common {
    instruction: Option<String>,
    max_tokens_per_doc: Option<usize>,
    user: Option<String>,
    priority: Option<i32>,
    cache_salt: Option<String>,
}

/// A document: a text, alone or as Cohere's and Jina's clients wrap it.
struct Document(String);

/// One text or a list of texts.
enum Texts {
    One(String),
    Many(Vec<String>),
}

/// The documents of a request. A list that is too long is not read to its end, since each of its
/// texts takes more memory than it has bytes.
struct Documents(Vec<String>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentVisitor)
    }
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string, or an object with a text")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Document, E> {
        Ok(Document(text.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
        #[derive(Deserialize)]
        struct Wrapped {
            text: String,
        }
        let wrapped = Wrapped::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Document(wrapped.text))
    }
}

impl<'de> Deserialize<'de> for Documents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentsVisitor)
    }
}

struct DocumentsVisitor;

impl<'de> Visitor<'de> for DocumentsVisitor {
    type Value = Documents;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of strings or of objects with a text")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Documents, A::Error> {
        let mut texts = Vec::new();
        while let Some(Document(text)) = list.next_element()? {
            if texts.len() == MAX_PAIRS {
                let problem =
                    format!("there are more than {MAX_PAIRS} texts, the accepted maximum");
                return Err(A::Error::custom(problem));
            }
            texts.push(text);
        }
        Ok(Documents(texts))
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextsVisitor)
    }
}

struct TextsVisitor;

impl<'de> Visitor<'de> for TextsVisitor {
    type Value = Texts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string or a list of strings")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Texts, E> {
        Ok(Texts::One(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Texts, A::Error> {
        let Documents(texts) = DocumentsVisitor.visit_seq(list)?;
        Ok(Texts::Many(texts))
    }
}

#[derive(Serialize)]
struct Ranking {
    id: String,
    model: String,
    results: Vec<Ranked>,
    usage: Usage,
}

#[derive(Serialize)]
struct Ranked {
    index: usize,
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<Text>,
}

#[derive(Serialize)]
struct Text {
    text: String,
}

#[derive(Serialize)]
struct ScoreList {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    data: Vec<Score>,
    usage: Usage,
}

#[derive(Serialize)]
struct Score {
    index: usize,
    object: &'static str,
    score: f32,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    fn of(scores: &Scores) -> Self {
        Self {
            prompt_tokens: scores.prompt_tokens,
            total_tokens: scores.prompt_tokens,
        }
    }
}

impl Common {
    /// Returns what to compute for pairs of texts.
    fn scoring(
        self,
        pairs: Vec<(Arc<str>, String)>,
        field: &'static str,
    ) -> Result<Scoring, ApiError> {
        if pairs.is_empty() {
            return Err(ApiError::invalid(format!("{field} is an empty list")).param(field));
        }
        if self.max_tokens_per_doc == Some(0) {
            let problem = "max_tokens_per_doc is 0, but must be at least 1";
            return Err(ApiError::invalid(problem).param("max_tokens_per_doc"));
        }
        Ok(Scoring {
            pairs,
            instruction: self.instruction,
            most_tokens: self.max_tokens_per_doc,
            template: embed_request(self.user, self.priority, self.cache_salt)?,
        })
    }
}

/// Returns the documents of the highest scores, best first. Equal scores keep their order.
pub(crate) async fn rerank(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Rerank)?;
        body.parse::<RerankRequest>()
    });
    let request = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    if request.top_n == Some(0) {
        return Err(ApiError::invalid("top_n is 0, but must be at least 1").param("top_n"));
    }
    let Documents(texts) = request.documents;
    let query: Arc<str> = request.query.into();
    let pairs = texts.iter().map(|text| (Arc::clone(&query), text.clone()));
    let common = Common {
        instruction: request.instruction,
        max_tokens_per_doc: request.max_tokens_per_doc,
        user: request.user,
        priority: request.priority,
        cache_salt: request.cache_salt,
    };
    let scoring = common.scoring(pairs.collect(), "documents")?;
    let scores = app.score(&caller, scoring).await.map_err(of_documents)?;
    let with_text = request.return_documents.unwrap_or(true);
    let ranked = scores.scores.iter().zip(texts).enumerate();
    let ranked = ranked.map(|(index, (&relevance_score, text))| Ranked {
        index,
        relevance_score,
        document: with_text.then_some(Text { text }),
    });
    let mut results: Vec<Ranked> = ranked.collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(request.top_n.unwrap_or(usize::MAX));
    Ok(Json(Ranking {
        id: app.answer_id("rerank"),
        model,
        results,
        usage: Usage::of(&scores),
    })
    .into_response())
}

/// Returns the score of each pair of texts, in order. One text is paired with each of several.
pub(crate) async fn score(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Score)?;
        body.parse::<ScoreRequest>()
    });
    let request = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    let pairs = match (request.text_1, request.text_2) {
        (Texts::One(first), second) => {
            let second = match second {
                Texts::One(text) => vec![text],
                Texts::Many(texts) => texts,
            };
            let first: Arc<str> = first.into();
            second
                .into_iter()
                .map(|text| (Arc::clone(&first), text))
                .collect()
        }
        (Texts::Many(first), Texts::Many(second)) if first.len() == second.len() => {
            first.into_iter().map(Into::into).zip(second).collect()
        }
        (Texts::Many(first), Texts::One(second)) if first.len() == 1 => {
            first.into_iter().map(Into::into).zip([second]).collect()
        }
        (Texts::Many(first), second) => {
            let other = match second {
                Texts::One(_) => "one text".to_owned(),
                Texts::Many(texts) => format!("{} texts", texts.len()),
            };
            let count = first.len();
            let problem = format!(
                "text_1 has {count} texts and text_2 {other}; the numbers must be the same, or \
                 text_1 must be one text"
            );
            return Err(ApiError::invalid(problem).param("text_1"));
        }
    };
    let common = Common {
        instruction: request.instruction,
        max_tokens_per_doc: request.max_tokens_per_doc,
        user: request.user,
        priority: request.priority,
        cache_salt: request.cache_salt,
    };
    let scoring = common.scoring(pairs, "text_2")?;
    let scores = app.score(&caller, scoring).await.map_err(of_documents)?;
    let usage = Usage::of(&scores);
    let data = scores.scores.into_iter().enumerate();
    let data = data.map(|(index, score)| Score {
        index,
        object: "score",
        score,
    });
    Ok(Json(ScoreList {
        id: app.answer_id("score"),
        object: "list",
        created: unix_time(),
        model,
        data: data.collect(),
        usage,
    })
    .into_response())
}

/// Renames the field `prompt` of an error, which is not one of these requests.
fn of_documents(mut error: ApiError) -> ApiError {
    if error.body.param.as_deref() == Some("prompt") {
        error.body.param = None;
    }
    error
}
