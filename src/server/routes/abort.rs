//! `POST /abort_request`: cancels requests by their ids, on any connection. With API keys, only
//! an admin key cancels the requests of other keys.

use crate::engine::{CancelReason, Receipt, RequestQuery};
use crate::id::RequestId;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::JsonBody;
use axum::Json;
use axum::extract::State;
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Which requests to cancel.
#[derive(Debug, Default, Deserialize)]
struct AbortRequest {
    /// SGLang calls this field `rid`.
    #[serde(alias = "rid")]
    request_id: Option<NumberOrLabel>,
    #[serde(default)]
    abort_all: Option<bool>,
}

/// The `id` of an answer, such as `chatcmpl-…`, or the engine's number for a request, as its
/// snapshots and logs show it.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected the id of an answer or the number of a request"
)]
enum NumberOrLabel {
    Number(u64),
    Label(String),
}

/// The requests that were cancelled and whose blocks are now free.
#[derive(Debug, Serialize)]
pub(crate) struct Aborted {
    aborted: Vec<AbortedRequest>,
}

#[derive(Debug, Serialize)]
struct AbortedRequest {
    /// The engine's number for the request.
    id: RequestId,
    #[serde(flatten)]
    freed: Freed,
}

/// The contents of a receipt, in the form that clients see.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Freed {
    blocks_freed: usize,
    states_freed: usize,
    tokens_generated: usize,
    /// Milliseconds from posting the cancel until the blocks were free.
    posted_to_freed_ms: f64,
}

impl From<Receipt> for Freed {
    fn from(receipt: Receipt) -> Self {
        let took = receipt
            .freed_at
            .saturating_duration_since(receipt.posted_at);
        Self {
            blocks_freed: receipt.blocks_freed,
            states_freed: receipt.states_freed,
            tokens_generated: receipt.tokens_generated,
            posted_to_freed_ms: took.as_secs_f64() * 1e3,
        }
    }
}

/// Cancels requests, and answers once their blocks are free. Requests that are no longer open
/// are left out of the answer, so aborting the same request twice is not an error. The same
/// goes for requests that the caller may not cancel: the answer does not tell that they exist.
pub(crate) async fn abort_request(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Aborted>, ApiError> {
    let request: AbortRequest = body.parse()?;
    let all = request.abort_all.unwrap_or(false);
    let reason = match all {
        true => CancelReason::AbortAll,
        false => CancelReason::Explicit,
    };
    let query = RequestQuery::default();
    let query = match (request.request_id, all) {
        (_, true) => query,
        (Some(NumberOrLabel::Number(id)), false) => query.id(RequestId::from_u64(id)),
        (Some(NumberOrLabel::Label(name)), false) => match name.parse() {
            Ok(id) => query.id(RequestId::from_u64(id)),
            Err(_) => query.label(name),
        },
        (None, false) => {
            let problem = "request_id is missing, and abort_all is not true";
            return Err(ApiError::invalid(problem).param("request_id"));
        }
    };
    let query = caller.limit(query);
    let everything = query == RequestQuery::default();
    let ids = app.engine.find(query).await?;
    let cancels = ids.into_iter().map(|id| {
        let cancel = app.engine.cancel_request(id, reason);
        async move { Ok::<_, ApiError>((id, cancel.await?)) }
    });
    // Post every cancel before waiting for the first one.
    let cancels: Vec<_> = cancels.collect();
    if everything {
        // Also cancel the requests that have arrived since the answer.
        app.engine.abort_all()?;
    }
    let receipts = try_join_all(cancels).await?;
    let aborted = receipts.into_iter().filter_map(|(id, receipt)| {
        let freed = receipt?.into();
        Some(AbortedRequest { id, freed })
    });
    Ok(Json(Aborted {
        aborted: aborted.collect(),
    }))
}
