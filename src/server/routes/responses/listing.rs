//! `GET /v1/responses/{id}/input_items`: lists the input of a response, page by page.

use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::PathPart;
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum number of items per page.
const MAX_LIMIT: usize = 100;

/// Which page is wanted.
#[derive(Debug, Deserialize)]
pub(crate) struct PageQuery {
    limit: Option<usize>,
    order: Option<Order>,
    /// The id of the item before the page.
    after: Option<String>,
    /// The id of the item after the page.
    before: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Order {
    /// Oldest item first.
    Asc,
    /// Latest item first.
    Desc,
}

/// Items in order, each with its id.
type Items = Vec<(String, Arc<str>)>;

/// Returns a page of items.
pub(crate) async fn input_items(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(query) = query.map_err(|problem| ApiError::invalid(problem.body_text()))?;
    query.check()?;
    let (page, more) = query.page(app.responses.input(caller.owner(), &id)?)?;
    let data = page.iter().map(|(_, item)| item_json(item));
    Ok(Json(json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "first_id": page.first().map(|(id, _)| id),
        "last_id": page.last().map(|(id, _)| id),
        "has_more": more,
    })))
}

fn item_json(item: &str) -> Value {
    serde_json::from_str(item).unwrap_or_default()
}

impl PageQuery {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(20)
    }

    fn check(&self) -> Result<(), ApiError> {
        let limit = self.limit();
        if (1..=MAX_LIMIT).contains(&limit) {
            return Ok(());
        }
        let problem = format!("limit is {limit}, but must be from 1 to {MAX_LIMIT}");
        Err(ApiError::invalid(problem).param("limit"))
    }

    /// Returns the items of the page, and whether more follow.
    fn page(&self, mut items: Items) -> Result<(Items, bool), ApiError> {
        let limit = self.limit();
        if self.order != Some(Order::Asc) {
            items.reverse();
        }
        let place = |items: &Items, id: &str, field: &'static str| {
            let place = items.iter().position(|(other, _)| other == id);
            let missing = || {
                let problem = format!("{field}: the response has no item {id:?}");
                ApiError::invalid(problem).param(field)
            };
            place.ok_or_else(missing)
        };
        if let Some(id) = &self.before {
            items.truncate(place(&items, id, "before")?);
        }
        if let Some(id) = &self.after {
            items.drain(..=place(&items, id, "after")?);
        }
        let more = items.len() > limit;
        items.truncate(limit);
        Ok((items, more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(query: Value) -> Result<(Vec<String>, bool), ApiError> {
        let query: PageQuery = serde_json::from_value(query).unwrap();
        query.check()?;
        let items = ["a", "b", "c", "d"].map(|id| (id.to_owned(), Arc::from("{}")));
        let (page, more) = query.page(items.into())?;
        Ok((page.into_iter().map(|(id, _)| id).collect(), more))
    }

    #[test]
    fn pages_follow_one_another() {
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        for (query, expected, more) in [
            (json!({}), &["d", "c", "b", "a"][..], false),
            (json!({"order": "asc", "limit": 3}), &["a", "b", "c"], true),
            (json!({"order": "asc", "after": "c"}), &["d"], false),
            (json!({"limit": 2, "after": "d"}), &["c", "b"], true),
            (json!({"limit": 2, "after": "b"}), &["a"], false),
            (json!({"before": "b"}), &["d", "c"], false),
            (json!({"order": "asc", "after": "d"}), &[], false),
        ] {
            assert_eq!(
                page(query.clone()).unwrap(),
                (ids(expected), more),
                "{query}"
            );
        }
    }

    #[test]
    fn an_invalid_page_query_is_refused_with_its_field() {
        for (query, field) in [
            (json!({"limit": 0}), "limit"),
            (json!({"limit": 101}), "limit"),
            (json!({"after": "x"}), "after"),
            (json!({"before": "x"}), "before"),
        ] {
            assert_eq!(page(query).unwrap_err().body.param.as_deref(), Some(field));
        }
    }
}
